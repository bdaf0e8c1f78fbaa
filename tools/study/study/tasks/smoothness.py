"""How far the gradient can be trusted, during the classification training.

Along the gradient direction of every so many steps, at a few step sizes
around the learning rate: by how much the loss varies, by how much the
gradient changes, and the largest change of the gradient per distance, an
estimate of its Lipschitz constant. As in `How Does Batch Normalization Help
Optimization? <https://arxiv.org/abs/1805.11604>`_.
"""

from typing import List

import torch
from torch import Tensor, nn

from . import classification

STEP_SIZES = (0.25, 0.5, 1.0, 2.0)


def run(settings: dict) -> dict:
    """Train, measure every ``settings['every']`` steps, and evaluate."""
    curves = []

    def measure(step, model, images, labels):
        if step % settings['every'] == 0:
            curves.append(
                dict(
                    step=step,
                    **smoothness(model, images, labels, settings['lr']),
                )
            )

    result = classification.run(settings, on_step=measure)
    for key in ('loss_range', 'gradient_change', 'lipschitz'):
        result[key] = sum(c[key] for c in curves) / len(curves)
    result['curves'] = curves
    return result


def smoothness(model: nn.Module, images, labels, lr: float) -> dict:
    """Measure at the model's present weights, and leave it as it was."""
    state = {k: v.clone() for k, v in model.state_dict().items()}
    parameters = list(model.parameters())
    start = [p.detach().clone() for p in parameters]
    first_loss, first = _gradient(model, parameters, images, labels)
    norm = _norm(first)
    losses, changes, slopes = [first_loss], [], []
    for size in STEP_SIZES:
        model.load_state_dict(state)
        with torch.no_grad():
            for p, origin, g in zip(parameters, start, first):
                p.copy_(origin - lr * size * g)
        loss, gradient = _gradient(model, parameters, images, labels)
        change = _norm([a - b for a, b in zip(gradient, first)])
        losses.append(loss)
        changes.append(change)
        slopes.append(change / (lr * size * norm))
    model.load_state_dict(state)
    return dict(
        loss_range=max(losses) - min(losses),
        gradient_change=max(changes) / norm,
        lipschitz=max(slopes),
        gradient_norm=norm,
    )


def _gradient(model, parameters: List[Tensor], images, labels):
    loss = classification.loss_of(model, images, labels)
    return float(loss.detach()), torch.autograd.grad(loss, parameters)


def _norm(tensors) -> float:
    return float(sum(t.double().square().sum() for t in tensors) ** 0.5)
