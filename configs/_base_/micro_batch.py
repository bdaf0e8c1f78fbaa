# What every micro-batch config has beside its model.
custom_imports = dict(imports=['wsbcn_mm'], allow_failed_imports=False)
