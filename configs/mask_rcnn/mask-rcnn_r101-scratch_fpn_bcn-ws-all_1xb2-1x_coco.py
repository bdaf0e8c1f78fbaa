_base_ = './mask-rcnn_r101_fpn_bcn-ws-all_1xb2-1x_coco.py'
from wsbcn_mm import micro_batch_model

model = micro_batch_model(_base_.model, images_per_gpu=2, pretrained=False)
