"""The networks with a block of each kind instead of all: as wide as the published ones, and fast.

Widths and sizes decide which kernels run, in which dtype, and most of the peak of memory. So tests
hold the counts of shallow networks, which take seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from benchmarks import architectures

SHALLOW: dict[str, dict[str, Any]] = {
    "SDXL_UNET": {"layers_per_block": 1, "transformer_layers_per_block": [1, 1, 1]},
    "SDXL_TEXT": {"num_hidden_layers": 2},
    "SDXL_TEXT_2": {"num_hidden_layers": 2},
    "WAN_TRANSFORMER": {"num_layers": 2},
    "WAN_I2V_14B": {"num_layers": 1},
    "WAN_IMAGE_ENCODER": {"num_hidden_layers": 2},
    "WAN_TEXT": {"num_layers": 1},
    "QWEN_7B": {"num_hidden_layers": 2},
}


@contextmanager
def shallow() -> Iterator[None]:
    """Within this context `architectures` makes shallow networks."""
    with ExitStack() as stack:
        for name, changes in SHALLOW.items():
            stack.enter_context(patch.dict(getattr(architectures, name), changes))
        yield
