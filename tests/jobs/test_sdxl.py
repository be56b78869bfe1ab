"""SDXL jobs: what reaches the model, what the document says, and what needs consent."""

import base64
import io
from collections.abc import Callable, Generator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ourvidz_serverless.document import Document
from ourvidz_serverless.models.progress import Progress
from ourvidz_serverless.models.sdxl.request import ImageRequest, IpAdapterImage, StartImage
from tests.fakes.fake_sdxl import FakeSdxl
from tests.fakes.local_worker import LocalWorker, sdxl_payload

MakeLocal = Callable[..., LocalWorker]


def data_uri() -> str:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def code(document: Document) -> str | None:
    return document.failure.code if document.failure else None


def test_clip_skip_reaches_the_model(local: MakeLocal) -> None:
    at = local()

    at.run(sdxl_payload(config={"clip_skip": 1}))

    assert at.fake_sdxl.requests[0].clip_skip == 1


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


@pytest.mark.parametrize("prompt", ["a chi()ld", "a chi(())(ld:1.2)", "(little)1.1(girl)1.2"])
def test_the_floor_reads_a_weighted_prompt_as_the_model_does(local: MakeLocal, prompt: str) -> None:
    weighted = {"compel_enabled": True, "metadata": OPTIMIZED}

    assert code(local().run(sdxl_payload(prompt=prompt, **weighted))) == "CONTENT_REFUSED"
    assert code(local().run(sdxl_payload(prompt="a ri()()ver", **weighted))) is None


# --- references ---


class AdaptedSdxl(FakeSdxl):
    has_ip_adapter = True


def used_reference(model: FakeSdxl, at: LocalWorker, **metadata: Any) -> tuple[Any, Any]:
    """What the model got of a reference, and the method that the document names."""
    document = at.run(sdxl_payload(metadata={"reference_image_url": data_uri(), **metadata}))
    return model.requests[-1].reference, document.callback()["metadata"]["reference_method"]


@pytest.mark.parametrize("kind", ["style", "composition", "character"])
def test_a_typed_reference_goes_to_the_ip_adapter_if_there_is_one(
    local: MakeLocal, kind: str
) -> None:
    (with_adapter, method), (without, other_method) = (
        used_reference(model, local(fake_sdxl=model), reference_type=kind)
        for model in (AdaptedSdxl(), FakeSdxl())
    )

    assert (type(with_adapter), with_adapter.keeps, method) == (IpAdapterImage, kind, "ip_adapter")
    assert (type(without), other_method) == (StartImage, "img2img")


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"reference_type": "style", "denoise_strength": 0.1},
        {"reference_type": "style", "exact_copy_mode": True},
        {"reference_type": "style", "reference_mode": "copy"},
    ],
)
def test_a_reference_whose_pixels_are_kept_is_the_start_image_despite_an_ip_adapter(
    local: MakeLocal, asked: dict[str, Any]
) -> None:
    model = AdaptedSdxl()

    reference, method = used_reference(model, local(fake_sdxl=model), **asked)

    assert (type(reference), method) == (StartImage, "img2img")


@pytest.mark.parametrize("asked", [{"denoise_strength": 0.11}, {"reference_strength": 0.95}])
def test_a_reference_that_may_change_more_goes_to_the_ip_adapter(
    local: MakeLocal, asked: dict[str, Any]
) -> None:
    model = AdaptedSdxl()

    reference, _ = used_reference(model, local(fake_sdxl=model), reference_type="style", **asked)

    assert isinstance(reference, IpAdapterImage)


@pytest.mark.parametrize(
    ("asked", "scale"),
    [
        ({"reference_type": "style"}, 1.0),
        ({"reference_type": "composition"}, 1.0),
        ({"reference_type": "character"}, 0.6),
        ({"reference_type": "style", "reference_strength": 0.75}, 0.75),
        ({"reference_type": "character", "denoise_strength": 0.75}, 0.25),
    ],
)
def test_the_ip_adapter_has_the_strength_that_the_job_asks_to_keep_or_its_types_own(
    local: MakeLocal, asked: dict[str, Any], scale: float
) -> None:
    model = AdaptedSdxl()

    reference, _ = used_reference(model, local(fake_sdxl=model), **asked)

    assert reference.scale == pytest.approx(scale)


# --- a stop ---


def test_a_job_is_stopped_between_two_steps_too(local: MakeLocal) -> None:
    class StoppedSdxl(FakeSdxl):
        def generate(
            self, request: ImageRequest, progress: Progress
        ) -> Generator[np.ndarray, None, None]:
            at.stop.set()
            progress.check()
            yield from super().generate(request, progress)

    at = local(fake_sdxl=StoppedSdxl())

    assert code(at.run()) == "CANCELLED"
    assert at.fake_sdxl.requests == []


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


# --- the caller's own URLs ---


def refusal(local: MakeLocal, **config: Any) -> str:
    at = local()
    failure = at.run(sdxl_payload(config=config)).failure
    assert failure and failure.code == "INVALID_PROMPT"
    assert at.fake_sdxl.requests == []
    return failure.message


@pytest.mark.parametrize("value", ["7", False])
@pytest.mark.parametrize(
    "field",
    [
        *("num_images", "num_inference_steps", "guidance_scale", "seed", "denoise_strength"),
        "quality",
    ],
)
def test_a_number_of_the_config_must_be_a_json_number(
    local: MakeLocal, field: str, value: object
) -> None:
    message = refusal(local, **{field: value})

    assert message == f"config.{field}: Input should be a number"


def test_a_whole_number_may_have_a_decimal_point(local: MakeLocal) -> None:
    at = local()

    at.run(sdxl_payload(config={"num_inference_steps": 20.0, "seed": 7.0}))

    (request,) = at.fake_sdxl.requests
    assert (request.steps, request.seeds) == (20, (7,))


def upload_urls(count: int) -> list[str]:
    return [f"https://bucket.example/{index}.png?signature=hush" for index in range(count)]


@pytest.mark.parametrize(
    ("num_images", "count", "asked"), [(1, 3, "1 URL"), (3, 1, "3 URLs"), (6, 5, "6 URLs")]
)
def test_a_job_needs_one_upload_url_for_each_of_its_pictures(
    local: MakeLocal, num_images: int, count: int, asked: str
) -> None:
    message = refusal(local, num_images=num_images, upload_urls=upload_urls(count))

    assert message == (
        f"config.upload_urls: Input should have {asked}, one for each asset of the job, not {count}"
    )


def test_a_list_without_upload_urls_is_refused(local: MakeLocal) -> None:
    assert refusal(local, upload_urls=[]).startswith("config.upload_urls: ")


def test_two_pictures_may_not_go_to_one_url(local: MakeLocal) -> None:
    message = refusal(local, num_images=3, upload_urls=upload_urls(1) * 3)

    assert message == "config.upload_urls: Input should be different URLs"


def test_pictures_go_into_the_document_or_to_urls_and_not_to_both(local: MakeLocal) -> None:
    message = refusal(local, inline=True, upload_urls=upload_urls(1))

    assert message == "config.inline: Input should be false beside upload_urls"


@pytest.mark.parametrize(
    "url",
    [
        *("http://bucket.example/0.png?s=hush", "https://127.0.0.1/0.png?s=hush"),
        *("https://user:hush@bucket.example/0.png", "https://bucket.example:8443/0.png?s=hush"),
        *("https://localhost/0.png?s=hush", "s3://bucket/0.png?s=hush", "file:///0.png?s=hush"),
        *("https://bucket.example/\\0.png?s=hush", "https://bucket.example/0.png?s=hush#x", "hush"),
    ],
)
def test_an_upload_url_that_is_not_plain_is_refused_without_being_repeated(
    local: MakeLocal, url: str
) -> None:
    message = refusal(local, upload_urls=[url])

    assert message.startswith("config.upload_urls.0: Input should be a plain https URL")
    assert "hush" not in message
