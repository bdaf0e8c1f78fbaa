"""Batch Normalization that no config reaches, by config all the same."""

from typing import Optional

from mmengine.logging import print_log
from mmengine.registry import MODELS
from torch import nn

from .convert import convert_to_micro_batch


@MODELS.register_module(name='ConvertedModel', force=True)
def converted_model(
    model: dict,
    norm_cfg: Optional[dict] = None,
    conv_cfg: Optional[dict] = None,
    data_preprocessor: Optional[dict] = None,
) -> nn.Module:
    """Build a model, then :func:`convert_to_micro_batch` it.

    What ``micro_batch_model(..., convert=True)`` asks for. The model is that
    of the inner config, so nothing else sees that it was built this way.

    Args:
        model (dict): The model config.
        norm_cfg, conv_cfg (dict | None): Those of
            :func:`convert_to_micro_batch`.
        data_preprocessor (dict | None): MMEngine puts that of the whole
            config here, for a model that has none of its own.

    Returns:
        nn.Module: The converted model. What was changed is logged.
    """
    if data_preprocessor is not None:
        model = {'data_preprocessor': data_preprocessor, **model}
    built, report = convert_to_micro_batch(
        MODELS.build(model),
        norm_cfg,
        conv_cfg,
        return_report=True,
    )
    print_log(f'Converted after building:\n{report}', logger='current')
    return built
