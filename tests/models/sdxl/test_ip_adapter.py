"""An IP-Adapter acts in the blocks of the reference's type, and only in jobs with a reference."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ourvidz_serverless import jobs
from ourvidz_serverless.context import Bounds, JobContext, Stop
from ourvidz_serverless.errors import ModelLoadError
from ourvidz_serverless.jobs.envelope import Envelope
from ourvidz_serverless.models.progress import NoProgress
from ourvidz_serverless.models.sdxl import loader
from ourvidz_serverless.models.sdxl.pipeline import SdxlModel
from ourvidz_serverless.models.sdxl.request import IpAdapterImage, Keeps
from ourvidz_serverless.settings import Settings
from tests.fakes import tiny_sdxl
from tests.fakes.ip_adapter import IMAGE_DIM, write_ip_adapter
from tests.fakes.local_worker import sdxl_payload
from tests.fakes.tiny_sdxl import image_request, through_diffusers

RED = Image.new("RGB", (80, 50), "red")


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "plus"])
def adapted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The pocket SDXL with an IP-Adapter, and with an IP-Adapter Plus."""
    folder = tmp_path_factory.mktemp("adapter")
    path = write_ip_adapter(folder, loader.load(Settings()).networks.unet, is_plus=request.param)
    return loader.load(Settings(sdxl_ip_adapter=path))


def render(model: SdxlModel, **changes: Any) -> np.ndarray:
    return np.stack(tiny_sdxl.render(model, **{"seeds": (3, 4), **changes})).astype(int)


def test_a_job_without_a_reference_is_rendered_as_if_there_were_no_adapter(
    adapted: Any, sdxl: Any
) -> None:
    assert np.array_equal(render(adapted), render(sdxl))


@pytest.mark.parametrize("keeps", ["style", "composition", "character"])
def test_an_ip_adapter_image_acts_by_its_scale(adapted: Any, sdxl: Any, keeps: Keeps) -> None:
    without = render(sdxl)

    little, much = (
        np.abs(render(adapted, reference=IpAdapterImage(RED, keeps, scale)) - without).mean()
        for scale in (0.1, 1.0)
    )

    assert 0 < little < much


@pytest.mark.parametrize("guidance_scale", [1.0, 6.0])
def test_an_ip_adapter_image_acts_as_in_diffusers_pipeline(
    adapted: Any, guidance_scale: float
) -> None:
    request = image_request(
        guidance_scale=guidance_scale, reference=IpAdapterImage(RED, "character", 0.6)
    )
    (ours,) = adapted.generate(request, NoProgress())

    adapted.networks.pipe.set_ip_adapter_scale(0.6)
    theirs = through_diffusers(adapted.networks.pipe, request, ip_adapter_image=RED)

    assert np.array_equal(ours, theirs)


def test_an_ip_adapter_acts_in_the_blocks_of_each_reference_type(adapted: Any) -> None:
    blocks: dict[str, set[str]] = {}
    kinds: tuple[Keeps, ...] = ("style", "composition", "character")
    for keeps in kinds:
        adapted.networks.ip_adapter.encode(IpAdapterImage(RED, keeps), is_guided=False)
        blocks[keeps] = {
            name.split(".transformer")[0]
            for name, processor in adapted.networks.unet.attn_processors.items()
            if getattr(processor, "scale", [0.0])[0]
        }

    assert blocks["style"] == {"up_blocks.0.attentions.1"}
    assert len(blocks["composition"]) == 1
    assert next(iter(blocks["composition"])).startswith("down_blocks.2.attentions.")
    assert blocks["character"] > blocks["style"] | blocks["composition"]


def test_the_ip_adapter_does_not_act_in_the_next_job_without_a_reference(
    adapted: Any, sdxl: Any
) -> None:
    render(adapted, reference=IpAdapterImage(RED, "character"))

    assert np.array_equal(render(adapted), render(sdxl))


def run(model: Any, config: Mapping[str, Any] = MappingProxyType({}), **metadata: Any) -> Any:
    """The metadata that a job with a red reference leaves."""
    context = JobContext(Stop(), lambda progress: None, Bounds(60))
    metadata = {"reference_image_url": "https://a.example/red.png", **metadata}
    event = {"input": sdxl_payload(config=dict(config), metadata=metadata)}
    list(jobs.run(Envelope.of(event).job(Settings()), model, {"reference": RED}, context))
    return context.metadata


def test_a_reference_with_a_type_uses_the_ip_adapter_if_there_is_one(adapted: Any) -> None:
    metadata = run(adapted, reference_type="style", reference_strength=0.6)

    assert (metadata["reference_method"], metadata["reference_type"]) == ("ip_adapter", "style")
    assert metadata["reference_scale"] == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("keeps", "scale"), [("style", 1.0), ("composition", 1.0), ("character", 0.6)]
)
def test_each_reference_type_has_its_own_default_scale(
    adapted: Any, keeps: str, scale: float
) -> None:
    assert run(adapted, reference_type=keeps)["reference_scale"] == scale


def test_a_reference_with_a_type_uses_image_to_image_without_an_ip_adapter(sdxl: Any) -> None:
    metadata = run(sdxl, reference_type="style")

    assert (metadata["reference_method"], metadata["denoise_strength"]) == ("img2img", 0.8)


@pytest.mark.parametrize("metadata", [{}, {"exact_copy_mode": True, "reference_type": "style"}])
def test_a_reference_without_a_type_or_a_copy_never_uses_the_ip_adapter(
    adapted: Any, metadata: dict[str, Any]
) -> None:
    assert run(adapted, **metadata)["reference_method"] == "img2img"


@pytest.mark.parametrize("keeps", ["style", "composition", "character"])
@pytest.mark.parametrize("place", ["config", "metadata"])
@pytest.mark.parametrize("strength", [0.05, 0.1])
def test_a_denoise_strength_of_at_most_a_tenth_is_image_to_image_whatever_the_type(
    adapted: Any, keeps: str, place: str, strength: float
) -> None:
    asked = {"denoise_strength": strength}
    config, metadata = (asked, {}) if place == "config" else ({}, asked)

    done = run(adapted, config, reference_mode="modify", reference_type=keeps, **metadata)

    assert (done["reference_method"], done["denoise_strength"]) == ("img2img", strength)


@pytest.mark.parametrize("asked", [{"denoise_strength": 0.11}, {"reference_strength": 0.95}])
def test_a_larger_denoise_strength_or_a_reference_strength_uses_the_ip_adapter(
    adapted: Any, asked: dict[str, float]
) -> None:
    assert run(adapted, reference_type="character", **asked)["reference_method"] == "ip_adapter"


def test_an_ip_adapter_that_does_not_load_ends_the_start(tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"not weights")

    with pytest.raises(ModelLoadError, match=r"SDXL_IP_ADAPTER: broken\.safetensors does not load"):
        loader.load(Settings(sdxl_ip_adapter=tmp_path / "broken.safetensors"))


def of_another_encoder(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    wider = weights["image_proj.proj.weight"].repeat(1, 2)
    return {**weights, "image_proj.proj.weight": wider}


def of_faces(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The layout of IP-Adapter FaceID, which reads the embedding of a face recognition network."""
    dim = weights["image_proj.norm.weight"].shape[0]
    del weights["image_proj.proj.weight"], weights["image_proj.proj.bias"]
    wide = torch.zeros(2 * IMAGE_DIM, IMAGE_DIM)
    return {
        **weights,
        "image_proj.proj.0.weight": wide,
        "image_proj.proj.0.bias": wide[:, 0].clone(),
        "image_proj.proj.2.weight": torch.zeros(4 * dim, 2 * IMAGE_DIM),
        "image_proj.proj.2.bias": torch.zeros(4 * dim),
    }


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (of_another_encoder, "it was trained with another encoder"),
        (of_faces, "IPAdapterFaceIDImageProjection does not read an image encoder's output"),
    ],
)
def test_an_ip_adapter_that_would_fail_in_each_job_ends_the_start(
    sdxl: Any, tmp_path: Path, change: Any, line: str
) -> None:
    path = write_ip_adapter(tmp_path, sdxl.networks.unet)
    save_file(change(load_file(path)), path)

    with pytest.raises(ModelLoadError) as refused:
        loader.load(Settings(sdxl_ip_adapter=path))

    assert refused.value.message.startswith("SDXL_IP_ADAPTER: ")
    assert line in refused.value.message
