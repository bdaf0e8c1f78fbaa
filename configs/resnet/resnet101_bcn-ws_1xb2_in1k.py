_base_ = './resnet101_bcn-ws_1xb1_in1k.py'
from wsbcn_mm import micro_batch_model

model = micro_batch_model(
    _base_.model,
    images_per_gpu=2,
    images_per_update=128,
)
train_dataloader = dict(batch_size=2)
optim_wrapper = dict(accumulative_counts=64)
auto_scale_lr = dict(base_batch_size=2)
