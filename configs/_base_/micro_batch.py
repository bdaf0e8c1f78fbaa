# What every micro-batch config has beside its model.
custom_imports = dict(imports=['wsbcn_mm'], allow_failed_imports=False)
custom_hooks = [
    # The estimates of layers that were loaded from a GN checkpoint.
    dict(type='CalibrateEstimatesHook'),
    # One set of estimates for all GPUs.
    dict(type='SyncEstimatesHook'),
]
