_base_ = './deeplabv3plus_r50b-d8_bcn-ws_1xb1-640k_voc12aug-512x512.py'
from wsbcn_mm import micro_batch_model

model = micro_batch_model(_base_.model, images_per_gpu=2, images_per_update=16)
train_dataloader = dict(batch_size=2)
optim_wrapper = dict(accumulative_counts=8)
auto_scale_lr = dict(base_batch_size=2)
train_cfg = dict(max_iters=320000, val_interval=32000)
param_scheduler = _base_.param_scheduler
param_scheduler[0].end = 320000
default_hooks = dict(checkpoint=dict(interval=32000))
