"""How a network is run with the ``example_inputs`` that a user gives."""

from typing import Any

from torch import nn


def run_example(caller: str, module: nn.Module, example_inputs: Any) -> Any:
    """Call a network with its example.

    Args:
        caller (str): The function that the example was given to.
        module (nn.Module): The network.
        example_inputs (Any): A tuple of arguments, a dict of keyword
            arguments, or the only argument.

    Raises:
        ValueError: If the network does not run.
    """
    args, kwargs = (example_inputs,), {}
    if isinstance(example_inputs, tuple):
        args = example_inputs
    elif isinstance(example_inputs, dict):
        args, kwargs = (), example_inputs
    try:
        return module(*args, **kwargs)
    except Exception as error:
        raise ValueError(
            f'{caller}: the network does not run with these example_inputs '
            f'({type(error).__name__}: {error}). Expected a tuple of its '
            'arguments, a dict of keyword arguments, or its only argument'
        ) from error
