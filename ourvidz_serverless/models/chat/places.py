"""Where the pocket chat model is."""

from __future__ import annotations

from pathlib import Path

from ourvidz_serverless.errors import ModelLoadError

POCKET = Path(__file__).parents[3] / ".cache" / "pocket_chat"


def pocket(variable: str) -> Path:
    """The folder of the pocket model; raises ModelLoadError if `make chat` has not made it."""
    if not POCKET.exists():
        raise ModelLoadError(f"{variable}: there is nothing at {POCKET}; `make chat` puts it there")
    return POCKET
