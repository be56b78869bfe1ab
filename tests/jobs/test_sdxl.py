"""SDXL jobs: what reaches the model, what the document says, and what needs consent."""

import base64
import io
from collections.abc import Callable, Generator

import numpy as np
import pytest
from PIL import Image

from ourvidz_serverless.document import Document
from ourvidz_serverless.models.progress import Progress
from ourvidz_serverless.models.sdxl.request import ImageRequest
from tests.fakes.fake_sdxl import FakeSdxl
from tests.fakes.local_worker import LocalWorker, sdxl_payload

MakeLocal = Callable[..., LocalWorker]


def data_uri() -> str:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def code(document: Document) -> str | None:
    return document.failure.code if document.failure else None


# --- the content floor and consent ---

OPTIMIZED = {"nsfw_optimization": True}


def test_nsfw_optimization_means_adult_for_the_content_floor(local: MakeLocal) -> None:
    at, ordinary = local(), local()

    refused = at.run(sdxl_payload(prompt="a child at a lake", metadata=OPTIMIZED))

    assert code(refused) == "CONTENT_REFUSED"
    assert at.fake_sdxl.requests == []
    assert code(ordinary.run(sdxl_payload(prompt="a child at a lake"))) is None


def test_a_reference_with_nsfw_optimization_needs_consent(local: MakeLocal) -> None:
    metadata = {"reference_image_url": data_uri(), **OPTIMIZED}

    refused = local().run(sdxl_payload(metadata=metadata))
    accepted = local().run(sdxl_payload(metadata={**metadata, "reference_consent": True}))

    assert (code(refused), code(accepted)) == ("CONTENT_REFUSED", None)


# --- the files ---


class NoisySdxl(FakeSdxl):
    """Paints noise, which a file of a lower quality shortens."""

    def generate(
        self, request: ImageRequest, progress: Progress
    ) -> Generator[np.ndarray, None, None]:
        for flat in super().generate(request, progress):
            yield np.random.default_rng(0).integers(0, 256, flat.shape, dtype=np.uint8)


@pytest.mark.parametrize("name", ["jpeg", "webp"])
def test_a_lower_quality_makes_a_smaller_file(local: MakeLocal, name: str) -> None:
    def num_bytes(**quality: int) -> int:
        at = local(fake_sdxl=NoisySdxl())
        (asset,) = at.run(sdxl_payload(config={"output_format": name, **quality})).assets
        return (at.root / asset.url).stat().st_size

    sizes = [num_bytes(quality=each) for each in (10, 50, 95, 100)]

    assert sizes == sorted(set(sizes))
    assert num_bytes() == sizes[2]
