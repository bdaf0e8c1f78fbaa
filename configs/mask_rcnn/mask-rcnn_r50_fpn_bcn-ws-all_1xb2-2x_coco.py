_base_ = './mask-rcnn_r50_fpn_bcn-ws-all_1xb1-2x_coco.py'
from wsbcn_mm import micro_batch_model

model = micro_batch_model(_base_.model, images_per_gpu=2)
train_dataloader = dict(batch_size=2)
optim_wrapper = dict(accumulative_counts=8)
auto_scale_lr = dict(base_batch_size=2)
param_scheduler = _base_.param_scheduler
param_scheduler[0].end = 500 * 8
