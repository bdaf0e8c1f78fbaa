"""Real processes for tests of what happens between them."""

import pickle
import tempfile
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


class Processes:
    """A few processes that have joined a gloo group and wait for work.

    Args:
        world_size (int): How many. Default: 2
    """

    def __init__(self, world_size: int = 2):
        context = mp.get_context('spawn')
        self._folder = tempfile.TemporaryDirectory()
        meeting_point = str(Path(self._folder.name) / 'meeting_point')
        self._ends, self._processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(theirs, meeting_point, rank, world_size),
                daemon=True,
            )
            process.start()
            self._ends.append(ours)
            self._processes.append(process)

    def run(self, function, *arguments) -> list:
        """Call a function in each process.

        Args:
            function (Callable): At the top level of a module.
            *arguments: For each an object per process, in a list.

        Returns:
            list: What each process returned.
        """
        for rank, end in enumerate(self._ends):
            _send(end, (function, [a[rank] for a in arguments]))
        results = []
        for end in self._ends:
            assert end.poll(60), f'{function.__name__} hangs'
            results.append(_receive(end))
        for failed, result in results:
            assert not failed, result
        return [result for _, result in results]

    def close(self) -> None:
        for process in self._processes:
            process.terminate()
            process.join()
        self._folder.cleanup()


def _send(end, value) -> None:
    # By value: torch would share the memory of tensors between processes.
    end.send_bytes(pickle.dumps(value))


def _receive(end):
    return pickle.loads(end.recv_bytes())


def _serve(end, meeting_point: str, rank: int, world_size: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        'gloo',
        init_method=f'file://{meeting_point}',
        rank=rank,
        world_size=world_size,
    )
    while True:
        function, arguments = _receive(end)
        torch.manual_seed(0)
        try:
            answer = False, function(*arguments)
        except Exception:
            answer = True, traceback.format_exc()
        _send(end, answer)
