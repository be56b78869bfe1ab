"""A model that remembers what it is to film, and films nothing."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from tests.fakes.fake_chat import Parrot
from tests.fakes.fake_sdxl import NoDevice


class Film:
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
        self.enhancer = Parrot("More is said of ", "a red circle.")
        self.calls: list[dict[str, Any]] = []

    def expect(self) -> None: ...

    def route(self, **places: bool) -> str:
        return "vace"

    def generate(self, **call: Any) -> Iterator[Any]:
        self.calls.append(call)
        yield from ()
