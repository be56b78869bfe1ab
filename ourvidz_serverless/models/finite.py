"""Latents and pictures that are not finite: their job fails, and its error says so.

A byte cannot hold such a value: a cast makes it black, and the job would end as completed.
"""

from __future__ import annotations

import torch

from ourvidz_serverless.errors import InternalError


def check_finite(values: torch.Tensor, what: str) -> torch.Tensor:
    """The same values. Raises InternalError where one of them is not finite."""
    # Two numbers on the device: `isfinite` alone would make a tensor as long as the values.
    if not all(torch.isfinite(end) for end in torch.aminmax(values)):
        raise InternalError(
            f"the generation failed: {what} is not finite; "
            "a strong LoRA or word weight, or a damaged checkpoint, can cause that"
        )
    return values
