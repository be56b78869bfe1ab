"""A WAN model that records the requests and makes no frames."""

from collections.abc import Generator

import numpy as np

from ourvidz_serverless.models.chat.request import TextModel
from ourvidz_serverless.models.progress import Progress
from ourvidz_serverless.models.wan.request import (
    References,
    Route,
    SamplingDefaults,
    VideoModel,
    VideoRequest,
)
from tests.fakes.fake_sdxl import NoDevice


class FakeWan(VideoModel):
    """A WAN model with every network. Its videos have no frames."""

    enhancement_prompt = "Say more."
    sampling = SamplingDefaults(solver="unipc", flow_shift=3.0)

    def __init__(self, enhancer: TextModel | None = None) -> None:
        self.device = NoDevice()
        self.enhancer = enhancer
        self.calls: list[VideoRequest] = []

    def prefetch(self) -> None: ...

    def route(self, references: References) -> Route | None:
        return "vace" if references else "t2v"

    def generate(self, request: VideoRequest, progress: Progress) -> Generator[np.ndarray]:
        self.calls.append(request)
        yield from ()
