"""The decoders of SDXL's latents: the VAE, the VAE in bf16, and a tiny VAE."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from benchmarks import presets
from benchmarks.presets import psnr
from ourvidz_serverless.errors import ModelLoadError, OutOfMemory
from ourvidz_serverless.models.memory.device import Device
from ourvidz_serverless.models.memory.device_memory import CountedMemory
from ourvidz_serverless.models.memory.oom_fallback import SdxlMemoryPlan
from ourvidz_serverless.models.sdxl import loader, tiled_vae
from ourvidz_serverless.models.sdxl import vae as decoders
from ourvidz_serverless.models.sdxl.networks import SdxlNetworks
from ourvidz_serverless.models.sdxl.pipeline import SdxlModel
from ourvidz_serverless.models.sdxl.request import StartImage
from ourvidz_serverless.models.speed import presets as speed
from ourvidz_serverless.settings import Settings
from tests.fakes import tiny_sdxl
from tests.fakes.overflowing_vae import overflowing_vae_settings
from tests.fakes.recorded_progress import RecordedProgress
from tests.fakes.tiny_sdxl import narrow_vae
from tests.files import ROOT

TINY = ROOT / "pocket/sdxl_tiny_vae"
CPU = torch.device("cpu")
USUAL, TILED = SdxlMemoryPlan(6), SdxlMemoryPlan(6, tiled_decode=True)


@pytest.fixture(scope="module")
def equipped() -> SdxlModel:
    """The pocket SDXL with its tiny VAE."""
    return loader.load(Settings(sdxl_tiny_vae="pocket"))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> SdxlModel:
    """In fp16, with a VAE that is kept in fp32, and a tiny one."""
    return loader.load(overflowing_vae_settings(tmp_path_factory.mktemp("wide")))


@pytest.fixture
def calls() -> Callable[[Any], list[Any]]:
    """Records the inputs of a module from now on."""

    def watch(module: Any) -> list[Any]:
        given: list[Any] = []
        module.register_forward_pre_hook(lambda _, args: given.append(args[0]))
        return given

    return watch


def paint(model: SdxlModel, **changes: Any) -> list[np.ndarray]:
    prompt = "green hills under a blue sky, a yellow sun on the right"
    return tiny_sdxl.render(model, prompt, **{"size": (128, 64), "steps": 4, **changes})


def denoised(model: SdxlModel, side: int) -> list[torch.Tensor]:
    """Four denoised latents (4, side / 8, side / 8), which the UNet made."""
    return [presets.latent_of(model, seed, side, steps=10) for seed in (1, 2, 3, 4)]


@pytest.fixture(scope="module")
def latents(equipped: SdxlModel) -> list[torch.Tensor]:
    """In fp32: those of a model in fp16 are the same but for their rounding."""
    return denoised(equipped, side=128)


def counted() -> tuple[Device, CountedMemory]:
    memory = CountedMemory(1 << 32)
    return Device(CPU, torch.float32, memory), memory


# --- a tiny VAE ---


def test_a_fast_job_decodes_each_image_once_with_the_tiny_vae(
    equipped: SdxlModel, calls: Any
) -> None:
    progress = RecordedProgress()
    tiny, own = calls(equipped.networks.tiny_vae.network), calls(equipped.networks.vae.decoder)

    paint(equipped, seeds=(1, 2), speed="fast", progress=progress)

    assert (len(tiny), len(own)) == (2, 0)
    assert "tiny_vae" in progress.speed_reports[0]["levers"]
    assert "vae_bf16" not in progress.speed_reports[0]["levers"]


@pytest.mark.parametrize("preset", ["exact", "balanced"])
def test_only_fast_jobs_decode_with_the_tiny_vae_and_others_keep_their_bits(
    equipped: SdxlModel, sdxl: Any, calls: Any, preset: str
) -> None:
    progress = RecordedProgress()
    tiny = calls(equipped.networks.tiny_vae.network)

    (picture,) = paint(equipped, speed=preset, progress=progress)

    assert not tiny
    assert np.array_equal(picture, paint(sdxl, speed=preset)[0])
    assert all("tiny_vae" not in report["levers"] for report in progress.speed_reports)


def test_without_a_tiny_vae_a_fast_job_decodes_with_the_vae(sdxl: Any, calls: Any) -> None:
    progress = RecordedProgress()
    own = calls(sdxl.networks.vae.decoder)

    paint(sdxl, speed="fast", progress=progress)

    assert len(own) == 1
    assert "tiny_vae" not in progress.speed_reports[0]["levers"]


# Measured: 28.4 and 33.6 dB, of latents that the UNet made.
@pytest.mark.parametrize(("side", "least_db"), [(128, 27), (256, 32)])
def test_an_image_of_the_tiny_vae_is_near_that_of_the_vae(
    equipped: SdxlModel, latents: list[torch.Tensor], side: int, least_db: float
) -> None:
    own = decoders.in_bf16(equipped.networks.vae, equipped.device)
    likeness = []

    for latent in latents if side == 128 else denoised(equipped, side):
        exact, tiny = (
            equipped.decode(by, latent, USUAL) for by in (own, equipped.networks.tiny_vae)
        )
        likeness.append(psnr(exact, tiny))

    assert np.mean(likeness) > least_db


def test_the_tiny_vae_decodes_as_diffusers_pipelines_do(
    equipped: SdxlModel, latents: list[torch.Tensor]
) -> None:
    latent = latents[0]
    theirs = AutoencoderTiny.from_pretrained(TINY, local_files_only=True, torch_dtype=torch.float32)

    with torch.inference_mode():
        decoded = theirs.decode(latent[None] / theirs.config.scaling_factor).sample
    expected = VaeImageProcessor().postprocess(decoded, "np")

    ours = equipped.decode(equipped.networks.tiny_vae, latent, USUAL)
    assert np.array_equal(ours, (expected[0] * 255).round().astype(np.uint8))


def test_a_fast_job_encodes_its_reference_with_the_vae(equipped: SdxlModel, calls: Any) -> None:
    encoded, tiny = calls(equipped.networks.vae.encoder), calls(equipped.networks.tiny_vae.network)

    paint(equipped, reference=StartImage(Image.new("RGB", (128, 64), "green"), 0.5), speed="fast")

    assert (len(encoded), len(tiny)) == (1, 1)


@pytest.mark.parametrize("rows", [8, 63, 128])
def test_the_tiny_vae_decodes_the_same_with_tiles_as_without(rows: int) -> None:
    torch.manual_seed(0)
    network = AutoencoderTiny(decoder_block_out_channels=(8,) * 4).eval().decoder
    latent = torch.randn(1, 4, rows, 6)
    whole_device, whole_memory = counted()
    tiled_device, tiled_memory = counted()

    with whole_device.computing():
        whole = network(latent)
    with tiled_device.computing():
        tiled = tiled_vae.decode_tiny(network, latent, tiled_device)

    torch.testing.assert_close(tiled, whole, atol=1e-5, rtol=0)
    if rows == 128:
        assert tiled_memory.peak_bytes < whole_memory.peak_bytes / 2


def test_a_tile_has_every_row_of_the_latent_that_its_pixels_depend_on() -> None:
    torch.manual_seed(0)
    network = AutoencoderTiny(decoder_block_out_channels=(8,) * 4).eval().decoder.double()
    latent = torch.randn(1, 4, 64, 1, dtype=torch.float64, requires_grad=True)

    network(latent)[:, :, 256:264].sum().backward()

    rows = latent.grad.abs().sum((0, 1, 3)).nonzero().flatten()  # type: ignore[union-attr]
    reach = tiled_vae.receptive_field(network.layers)
    assert 32 - reach <= rows.min() <= 32 - reach + 2
    assert rows.max() <= 32 + reach


def test_low_vram_has_only_the_tiny_vae_on_the_device_and_decodes_in_tiles(
    equipped: SdxlModel,
) -> None:
    progress = RecordedProgress()
    card = loader.load(Settings(sdxl_tiny_vae="pocket", low_vram=True, vram_budget_gb=0.2))
    there: list[Any] = []

    def look(*_: Any) -> None:
        parts = card.parts.parts
        there.append([name for name, part in parts.items() if part.device_bytes])

    card.networks.tiny_vae.network.register_forward_pre_hook(look)
    (picture,) = paint(card, speed="fast", size=(256, 384), progress=progress)

    assert there == [["tiny"]] * tiled_vae.MAX_TILES
    assert progress.memory_plans[-1]["tiled_decode"]
    (usual,) = paint(equipped, speed="fast", size=(256, 384))
    assert np.abs(picture.astype(int) - usual).max() <= 1


def test_the_ledger_counts_the_tiny_vae_and_loads_it_again(equipped: SdxlModel, sdxl: Any) -> None:
    model = loader.load(Settings(sdxl_tiny_vae="pocket"))
    parts = model.parts
    tiny_bytes = sum(each.nbytes for each in model.networks.tiny_vae.network.parameters())

    parts.drop()
    assert not any(each.numel() for each in model.networks.tiny_vae.network.parameters())
    parts.load()
    parts.to_device()

    # The VAE's own is a file of fp16, too, and both are fp32 on a CPU.
    assert parts.num_bytes == sdxl.parts.num_bytes + tiny_bytes
    assert np.array_equal(paint(model, speed="fast")[0], paint(equipped, speed="fast")[0])


def test_the_ledger_knows_the_memory_of_a_job_by_its_decoder() -> None:
    budget = 100 / 1024
    model = loader.load(Settings(sdxl_tiny_vae="pocket", vram_budget_gb=budget))

    for preset in ("exact", "fast"):
        paint(model, speed=preset)

    (row,) = model.handle.ledger.report()
    assert set(row.working_bytes) == {"128x64 x1", "128x64 tiny_vae x1"}


# --- files that are no tiny VAE, or that of another model ---


def load_tiny(name: Path | str) -> Any:
    return decoders.read_tiny(
        Settings(sdxl_tiny_vae=str(name)), Device(CPU, torch.float32), narrow_vae()
    )


def test_a_tiny_vae_in_a_file_without_configuration_has_taesdxls_size(tmp_path: Path) -> None:
    published = AutoencoderTiny()
    published.save_pretrained(tmp_path)

    tiny = load_tiny(tmp_path / "diffusion_pytorch_model.safetensors")

    assert tiny.scaling_factor == 1.0
    latent = torch.randn(1, 4, 4, 4)
    assert torch.equal(tiny.decode(latent, is_tiled=False), published.decode(latent).sample[0])


def test_a_tiny_vae_for_other_latents_is_refused_in_one_line(tmp_path: Path) -> None:
    AutoencoderTiny(latent_channels=16).save_pretrained(tmp_path)

    with pytest.raises(ModelLoadError, match=r"SDXL_TINY_VAE: .*16 channels and 1/8 .* 4"):
        load_tiny(tmp_path)


def test_a_vae_that_is_not_a_tiny_one_is_refused_in_one_line(tmp_path: Path) -> None:
    narrow_vae().save_pretrained(tmp_path)

    with pytest.raises(ModelLoadError, match="an AutoencoderKL, where AutoencoderTiny is wanted"):
        load_tiny(tmp_path)


# --- the VAE in bf16 ---


@pytest.mark.parametrize("preset", ["balanced", "fast"])
def test_a_vae_that_overflows_in_fp16_decodes_in_bf16(
    wide: SdxlModel, calls: Any, preset: str
) -> None:
    progress = RecordedProgress()
    given = calls(wide.networks.vae.decoder.conv_out)
    without_tiny = SdxlModel(SdxlNetworks(wide.networks.pipe), wide.device)

    paint(without_tiny, speed=preset, progress=progress)

    assert [each.dtype for each in given] == [torch.bfloat16]
    assert "vae_bf16" in progress.speed_reports[0]["levers"]


def test_an_exact_job_decodes_in_fp32_before_and_after_a_job_in_bf16(
    wide: SdxlModel, calls: Any
) -> None:
    weights = [each.data_ptr() for each in wide.networks.vae.parameters()]
    (before,) = paint(wide)
    paint(wide, speed="balanced")

    given = calls(wide.networks.vae.decoder.conv_out)
    (after,) = paint(wide)

    assert [each.dtype for each in given] == [torch.float32]
    assert np.array_equal(before, after)
    assert [each.data_ptr() for each in wide.networks.vae.parameters()] == weights


def test_an_image_decoded_in_bf16_is_within_a_grey_level_of_the_exact_one(
    wide: SdxlModel, latents: list[torch.Tensor]
) -> None:
    exact = decoders.Vae(wide.networks.vae, wide.device, torch.float32)
    narrow = decoders.in_bf16(wide.networks.vae, wide.device)

    for latent in (each.half() for each in latents):
        usual = wide.decode(exact, latent, USUAL)
        # An error of one grey level, as a root of the mean of squares, is 48.1 dB.
        assert psnr(usual, wide.decode(narrow, latent, USUAL)) > 48.1
        assert psnr(usual, wide.decode(narrow, latent, TILED)) > 48.1


def test_a_decode_in_bf16_takes_little_more_than_half_the_memory() -> None:
    network, latent = narrow_vae(), torch.randn(1, 4, 32, 32)
    peaks = {}

    for dtype in (torch.float32, torch.bfloat16):
        device, memory = counted()
        with device.computing():
            decoders.Vae(network, device, dtype).decode(latent, is_tiled=False)
        peaks[dtype] = memory.peak_bytes

    assert peaks[torch.bfloat16] < 0.6 * peaks[torch.float32]


@pytest.mark.parametrize(
    ("kept", "model", "acts"),
    [
        ("float32", "float16", True),
        ("float32", "float32", False),
        ("float16", "float16", False),
        ("bfloat16", "bfloat16", False),
    ],
)
def test_a_vae_decodes_in_bf16_only_if_it_is_wider_than_the_model(
    kept: str, model: str, acts: bool
) -> None:
    network = narrow_vae().to(getattr(torch, kept))

    chosen = decoders.in_bf16(network, Device(CPU, getattr(torch, model)))

    assert chosen.lever == ("vae_bf16" if acts else None)
    assert chosen.dtype == (torch.bfloat16 if acts else network.dtype)


def test_a_decode_that_fails_leaves_the_weights_as_they_were(
    wide: SdxlModel, latents: list[torch.Tensor]
) -> None:
    narrow, latent = decoders.in_bf16(wide.networks.vae, wide.device), latents[0].half()

    def no_room(*_: Any) -> None:
        raise OutOfMemory("no room")

    with (
        wide.networks.vae.decoder.conv_out.register_forward_pre_hook(no_room),
        pytest.raises(OutOfMemory),
    ):
        wide.decode(narrow, latent, USUAL)

    assert {each.dtype for each in wide.networks.vae.parameters()} == {torch.float32}


def test_the_exact_preset_always_decodes_with_the_vae_as_it_is() -> None:
    assert not (speed.EXACT.vae_bf16 or speed.EXACT.tiny_vae)
    assert [name for name, levers in speed.SDXL.items() if levers.tiny_vae] == ["fast"]
    assert [name for name, each in speed.SDXL.items() if each.vae_bf16] == ["balanced", "fast"]
