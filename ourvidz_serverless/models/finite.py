"""A job whose latents or pixels are not finite fails with an error that says so.

Without this check the cast to bytes would make such values black, and the job would succeed.
"""

from __future__ import annotations

import torch

from ourvidz_serverless.errors import InternalError


def check_finite(values: torch.Tensor, what: str) -> torch.Tensor:
    """Return the same values. Raises InternalError if one of them is not finite."""
    # `aminmax` gives two numbers. `isfinite` alone would allocate a tensor as long as the values.
    if not all(torch.isfinite(end) for end in torch.aminmax(values)):
        raise InternalError(
            f"the generation failed: {what} is not finite; "
            "a strong LoRA or word weight, or a damaged checkpoint, can cause that"
        )
    return values
