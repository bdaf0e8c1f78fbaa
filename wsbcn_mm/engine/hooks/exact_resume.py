from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import IterBasedTrainLoop

from ..random_state import seed_all


class _SeededBatches:
    """Seeds before it fetches, so that augmentation is seeded too."""

    def __init__(self, batches, seed: int):
        self._batches = batches
        self._seed = seed
        self._iter = 0

    def __iter__(self):
        return self

    def __next__(self):
        # The maintained fork makes the iterator late, by a random number.
        getattr(self._batches, '_ensure_iterator', lambda: None)()
        # A resumed loop skips what has been trained on, and counts it here.
        seed_all(self._seed, get_rank(), self._iter)
        self._iter += 1
        return next(self._batches)

    def skip_iter(self, num_iters: int) -> None:
        """The maintained fork's way of skipping."""
        self._iter += num_iters
        self._batches.skip_iter(num_iters)


@HOOKS.register_module()
class ExactResumeHook(Hook):
    """Make a resumed training draw the random numbers of an unbroken one.

    MMEngine's checkpoints hold the model, its estimates, the optimizer and
    the schedules, and the samplers find their place again, but the random
    numbers of augmentation, dropout and the sampling of proposals start
    anew. With this hook they are a function of ``randomness.seed``, the
    process, and the iteration (in epoch-based training: the epoch), so that
    nothing need be saved, and neither an interruption nor validation changes
    them. On a CPU, training resumed from a checkpoint then equals training
    that was never interrupted, bit for bit.

    What remains to be seen to: a fixed ``randomness=dict(seed=...)``; in
    epoch-based training, checkpoints at the ends of epochs (MMEngine resumes
    nowhere else) and ``persistent_workers=False``; with accumulated
    gradients, checkpoints at multiples of ``accumulative_counts``.

    Example:
        >>> custom_hooks = [dict(type='ExactResumeHook')]
    """

    priority = 'VERY_HIGH'

    def before_train(self, runner) -> None:
        if (
            runner._resume
            and runner.cfg.get('randomness', {}).get('seed') is None
        ):
            runner.logger.warning(
                'ExactResumeHook: without randomness=dict(seed=...) in the '
                'config, the resumed training sees its images in another '
                'order.'
            )
        loop = runner.train_loop
        if isinstance(loop, IterBasedTrainLoop):
            loop.dataloader_iterator = _SeededBatches(
                loop.dataloader_iterator, runner.seed
            )

    def before_train_epoch(self, runner) -> None:
        if not isinstance(runner.train_loop, IterBasedTrainLoop):
            seed_all(runner.seed, get_rank(), runner.epoch)
