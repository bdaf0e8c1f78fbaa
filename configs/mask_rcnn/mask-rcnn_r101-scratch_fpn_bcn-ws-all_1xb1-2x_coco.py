_base_ = './mask-rcnn_r101_fpn_bcn-ws-all_1xb1-2x_coco.py'
from wsbcn_mm import micro_batch_model

model = micro_batch_model(_base_.model, images_per_gpu=1, pretrained=False)
