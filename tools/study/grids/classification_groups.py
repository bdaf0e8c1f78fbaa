# What classification.py did not grant: tuned groups for GN and BGN, as BCN had
# them, WS for BGN, and the lower of two learning rates that tie for BCN.
_base_ = './classification.py'
blocks = [
    dict(method='BCN+WS', images=[8, 16, 32]),
    dict(method='GN', images=32, num_groups=dict(best_of=[2, 4, 8, 16])),
    # Groups of channels and positions, of which BGN can have more.
    dict(
        method=['BGN', 'BGN+WS'],
        images=[1, 2, 32],
        num_groups=dict(best_of=[8, 16, 64]),
    ),
]
tune = dict(tie=0.5)  # accuracies of two seeds tell no less

report = dict(everywhere=['GN'])
