"""Layers that no config reaches, converted by config all the same."""

from mmengine.logging import print_log
from mmengine.registry import MODELS
from torch import nn

from .convert import ConversionReport, convert_to_micro_batch


@MODELS.register_module(name='ConvertedModel', force=True)
def converted_model(conversion: dict, **model_cfg) -> nn.Module:
    """Build a model, then :func:`convert_to_micro_batch` it.

    What ``micro_batch_model(..., convert=True)`` asks for. The model is that
    of the config without ``conversion``, so nothing else sees that it was
    built this way.

    Args:
        conversion (dict): ``model_type``, the type of the model, and
            ``norm_cfg`` and ``conv_cfg`` of :func:`convert_to_micro_batch`.
        **model_cfg: All else in the config of the model.

    Returns:
        nn.Module: The converted model. What was changed is logged, and which
        Batch Normalizations were not.
    """
    built, report = convert_to_micro_batch(
        MODELS.build({**model_cfg, 'type': conversion['model_type']}),
        conversion['norm_cfg'],
        conversion['conv_cfg'],
        return_report=True,
    )
    left = [entry for entry in report.left if 'BatchNorm' in entry.before]
    report = ConversionReport(report.changed, left)
    print_log(f'Converted once built:\n{report}', logger='current')
    return built
