# Two processes of one image each, as on two GPUs: each with estimates of its
# own, with estimates averaged after each iteration (SyncEstimatesHook), and
# with moments of all images (sync_bn). In detection_pretrained_rate.py one
# process has both images.
_base_ = './detection_pretrained.py'
common = dict(method='BCN+WS', images=1, processes=2, lr=3e-3)
blocks = [
    dict(update_rate=0.0006),
    dict(update_rate=0.00125, sync=['estimates', 'layers']),
]
seeds = [0, 1]
tune = None

report = dict(rows=['method', 'sync', 'update_rate'])
