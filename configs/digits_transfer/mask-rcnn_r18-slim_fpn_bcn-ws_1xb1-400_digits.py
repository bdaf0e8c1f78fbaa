# The second half of transfer in miniature: the same steps from a backbone
# that has learned to tell digit crops apart.
_base_ = './mask-rcnn_r18-slim-scratch_fpn_bcn-ws_1xb1-400_digits.py'

model = dict(
    backbone=dict(
        init_cfg=dict(
            _delete_=True,
            type='Pretrained',
            checkpoint='work_dirs/transfer/resnet18-slim_bcn-ws.pth',
        )
    )
)
