"""A model that records what it is asked for and makes no frames."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from tests.fakes.fake_chat import FakeChat
from tests.fakes.fake_sdxl import NoDevice


class FakeWan:
    """Stands where the WAN models stand, and makes nothing."""

    enhancement_prompt = "Say more."
    sampling = SimpleNamespace(
        is_distilled=False,
        solver="unipc",
        flow_shift=3.0,
        distilled_steps=None,
        distilled_timesteps=None,
    )

    def __init__(self) -> None:
        self.device = NoDevice()
        self.enhancer = FakeChat("More is said of ", "a red circle.")
        self.calls: list[dict[str, Any]] = []

    def prefetch(self) -> None: ...

    def route(self, **places: bool) -> str:
        return "vace"

    def generate(self, **call: Any) -> Iterator[Any]:
        self.calls.append(call)
        yield from ()
