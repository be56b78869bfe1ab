"""What a reference may be."""

from __future__ import annotations

from dataclasses import dataclass

from ourvidz_serverless.errors import ReferenceFrameError
from ourvidz_serverless.net.policy import Policy


@dataclass(frozen=True, slots=True)
class ReferencePolicy(Policy):
    """Which references are allowed, and how large each may be."""

    accept: str = "image/png, image/jpeg, image/webp"
    libraries: frozenset[str] = frozenset({"user-library"})  # first segments above a user's own
    max_pixels: int = 64_000_000  # width times height: a phone's largest photograph
    max_aspect: float = 8.0  # the long side over the short one


def refused(why: str) -> ReferenceFrameError:
    """The error for a reference that is not used, in words for the caller."""
    return ReferenceFrameError(f"reference: {why}")
