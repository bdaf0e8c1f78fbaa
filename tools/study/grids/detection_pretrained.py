# Mask R-CNN from the backbone of a classifier, as the papers train it: few
# steps, on the scenes of detection.py. BN-frozen is what the zoo does with one
# or two images.
_base_ = './detection.py'
common = dict(steps=400, pretrained=True)
blocks = [
    dict(method=['BN-frozen', 'BN', 'GN', 'GN+WS'], images=1),
    dict(method='BCN+WS', images=1, update_rate=0.00625),
    dict(method='MABN+CenConv', images=1),
    dict(method='BN', images=2),
    dict(method='BCN+WS', images=2, update_rate=0.0125),
]
tune = dict(lr=[1e-3, 3e-3, 1e-2])
