"""BCN's update rate as a share of what it was, as learning rates are."""

from torch import nn

from wsbcn_mm import BCN


class ScheduledRates:
    """The update rates of a model's estimates, for a schedule to set.

    Args:
        model (nn.Module): The model, its rates the highest they shall have.
    """

    def __init__(self, model: nn.Module):
        self.highest = {
            layer: layer.momentum
            for layer in model.modules()
            if isinstance(layer, BCN)
        }

    def set(self, share: float) -> None:
        """Give each layer this share of its highest rate."""
        for layer, rate in self.highest.items():
            layer.momentum = rate * share
