"""What a backbone's features say of objects before any training.

A linear map of the features of each stage, fitted on some scenes, tells the
positions of objects from the background of others: the area under its ROC
curve. The network is the detector's, with random weights.
"""

import glob
import os
import os.path as osp

import mmcv
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import set_random_seed
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from . import openmmlab

DEFAULTS = dict(openmmlab.DEFAULTS, fitted=40, evaluated=20)
prepare = openmmlab.prepare  # the scenes that cells ask for
GROUND = 0  # in the label images


def load_scenes(root: str, count: int, mean, std):
    """Normalized images (N, 3, H, W), and where objects are (N, 1, H, W)."""
    folder = osp.join(root, 'leftImg8bit', 'train')
    paths = sorted(glob.glob(osp.join(folder, '*', '*.png')))[:count]
    if len(paths) < count:
        raise ValueError(
            f'{folder} has {len(paths)} images, {count} are needed: set '
            'num_train.'
        )
    images = torch.stack([_read(p, 'color', 'rgb') for p in paths])
    images = images.permute(0, 3, 1, 2).float()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (mean, std))
    labels = torch.stack(
        [
            _read(
                p.replace('leftImg8bit' + os.sep, 'gtFine' + os.sep).replace(
                    '_leftImg8bit', '_gtFine_labelTrainIds'
                ),
                'unchanged',
            )
            for p in paths
        ]
    )
    return (images - mean) / std, labels[:, None].ne(GROUND).float()


def _read(path: str, *mode: str) -> torch.Tensor:
    return torch.from_numpy(mmcv.imread(path, *mode))


@torch.no_grad()
def run(settings: dict) -> dict:
    """Measure."""
    settings = {**DEFAULTS, **settings}
    set_random_seed(settings['seed'])
    cfg = Config.fromfile(osp.join(openmmlab.ROOT, settings['config']))
    init_default_scope('mmdet')
    model = openmmlab.build_model(cfg.model, settings)
    backbone = MODELS.build(model.backbone)
    MMLogger.get_current_instance().setLevel('WARNING')
    backbone.init_weights()
    backbone.train()  # nothing was learned that could be used in evaluation
    fitted = settings['fitted']
    images, objects = load_scenes(
        openmmlab.data_root(settings),
        fitted + settings['evaluated'],
        model.data_preprocessor.mean,
        model.data_preprocessor.std,
    )
    result = {}
    for features in backbone(images):
        wanted = F.adaptive_avg_pool2d(objects, features.shape[2:])
        x = features.movedim(1, -1).numpy()
        y = wanted.movedim(1, -1).numpy()
        readout = make_pipeline(StandardScaler(), Ridge(alpha=1.0))
        channels = x.shape[-1]
        readout.fit(x[:fitted].reshape(-1, channels), y[:fitted].ravel())
        score = roc_auc_score(
            y[fitted:].ravel() > 0.5,
            readout.predict(x[fitted:].reshape(-1, channels)),
        )
        stride = images.shape[-1] // features.shape[-1]
        result[f'stride{stride}'] = float(score)
    return result
