"""Precision of a run: which there are, and whether the processor has units for it."""

import warnings

import torch

PRECISIONS = ("32-true", "bf16-mixed")


def warn_if_slow(precision: str, device: torch.device) -> None:
    """Warn of ``bf16-mixed`` on a processor without units for bfloat16.

    ResNet-20, batch 64, on a processor with AVX2 alone: ``tent`` 28.4 frozen float32 forwards a step, 2.2 in float32.
    """
    if precision == "bf16-mixed" and device.type == "cpu" and not _has_units():
        warnings.warn(
            "precision=bf16-mixed takes 7 to 13 times as long as 32-true on this processor, which has no units for "
            "bfloat16. Leave precision= out.",
            RuntimeWarning,
            stacklevel=3,
        )


def _has_units() -> bool:
    asked = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # torch has no public name for it
    return asked is None or bool(asked())
