"""The pocket WAN is WAN 2.1 in everything but size, and works offline."""

import argparse
import inspect
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanVACEPipeline
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from builder import moving_drawings, pocket_wan
from builder.measure_pocket_wan import MODES, question, reference, render, render_with_references
from builder.train_pocket_wan import (
    LinearVideoEncoder,
    PaddedText,
    conditions,
    encode_captions,
    middles,
    random_videos,
    unknown,
)
from builder.train_pocket_wan_vae import IDLE, decode, encode

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def pipe() -> Any:
    return pocket_wan.load()


@pytest.fixture(scope="module")
def vace(pipe: Any) -> Any:
    return pocket_wan.load_vace(pipe)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def frames(pipe: Any, count: int = 5, **options: Any) -> Any:
    return pipe(
        "a red circle moving right on a blue background",
        height=64,
        width=64,
        num_frames=count,
        num_inference_steps=2,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
        **options,
    ).frames[0]


def test_the_pocket_wan_makes_a_video_offline(pipe: Any) -> None:
    assert frames(pipe).shape == (5, 64, 64, 3)


def test_the_pocket_wan_makes_the_same_video_for_the_same_seed(pipe: Any) -> None:
    assert np.array_equal(frames(pipe), frames(pipe))


def test_the_pocket_vace_shares_all_parts_but_its_transformer(pipe: Any, vace: Any) -> None:
    assert isinstance(vace, WanVACEPipeline)
    assert vace.vae is pipe.vae
    assert vace.text_encoder is pipe.text_encoder
    assert frames(vace).shape == (5, 64, 64, 3)


def test_the_pocket_wan_and_its_vace_have_equal_common_tensors_to_the_byte() -> None:
    alone = load_file(pocket_wan.FOLDER / WEIGHTS)
    referring = load_file(pocket_wan.VACE_FOLDER / WEIGHTS)

    assert {name for name in referring if name not in alone} == {
        name for name in referring if name.startswith("vace_")
    }
    for name, tensor in alone.items():
        assert tensor.view(torch.uint8).equal(referring[name].view(torch.uint8)), name


def test_references_change_nothing_at_a_strength_of_zero(pipe: Any, vace: Any) -> None:
    known = [Image.new("RGB", (64, 64), "yellow")] * 5
    mask = [Image.new("L", (64, 64), 0)] * 5

    ignored = frames(vace, video=known, mask=mask, conditioning_scale=0.0)

    assert np.allclose(ignored, frames(pipe), atol=0.02)


def test_the_pocket_wan_and_its_vace_have_less_than_nine_megabytes_in_half_precision() -> None:
    stored = [*pocket_wan.FOLDER.rglob("*"), *pocket_wan.VACE_FOLDER.rglob("*")]
    weights = [path for path in stored if path.suffix == ".safetensors"]

    assert sum(path.stat().st_size for path in stored if path.is_file()) < 9e6
    assert len(weights) == 4
    assert {tensor.dtype for path in weights for tensor in load_file(path).values()} == {
        torch.float16
    }


@given(st.text(max_size=60))
def test_the_pocket_wans_tokenizer_has_tokens_for_any_text(text: str) -> None:
    words = tokenizer()

    ids = words(text).input_ids

    assert words.unk_token_id not in ids
    assert ids[-1] == words.eos_token_id


def test_the_pocket_wans_tokenizer_decodes_what_it_encodes() -> None:
    words = tokenizer()
    text = "a red circle, ein großer kreis, 赤い円 🔴"

    assert words.decode(words(text).input_ids, skip_special_tokens=True) == text


def test_each_word_of_the_moving_drawings_is_one_token() -> None:
    words = tokenizer()

    lengths = {word: len(words(word).input_ids) for word in moving_drawings.vocabulary()}

    assert set(lengths.values()) == {2}  # itself and the end


def tokenizer() -> Any:
    if not hasattr(tokenizer, "kept"):
        from transformers import AutoTokenizer

        tokenizer.kept = AutoTokenizer.from_pretrained(  # type: ignore[attr-defined]
            pocket_wan.FOLDER / "tokenizer", local_files_only=True
        )
    return tokenizer.kept  # type: ignore[attr-defined]


def test_the_pocket_wan_has_the_architecture_of_wan(pipe: Any, vace: Any) -> None:
    own, referring = pipe.transformer.config, vace.transformer.config

    assert tuple(own.patch_size) == (1, 2, 2)
    assert own.qk_norm == "rms_norm_across_heads"
    assert own.cross_attn_norm is True
    assert own.freq_dim == 256
    assert own.in_channels == own.out_channels == 16
    assert own.text_dim == pipe.text_encoder.config.d_model
    assert own.image_dim is None
    assert 0 in referring.vace_layers
    assert referring.vace_in_channels == 16 + 16 + 8 * 8


def test_the_pocket_wans_vae_compresses_and_scales_as_wans_does(pipe: Any) -> None:
    published = inspect.signature(AutoencoderKLWan.__init__).parameters
    config = pipe.vae.config

    for name in ("z_dim", "dim_mult", "temperal_downsample", "latents_mean", "latents_std"):
        assert config[name] == published[name].default, name
    latents = pipe.vae.encode(torch.zeros(1, 3, 9, 64, 96)).latent_dist.mode()
    assert latents.shape == (1, 16, 3, 8, 12)


def test_the_pocket_wans_scheduler_is_that_of_wan(pipe: Any) -> None:
    config = pipe.scheduler.config

    assert type(pipe.scheduler).__name__ == "UniPCMultistepScheduler"
    assert config.prediction_type == "flow_prediction"
    assert config.use_flow_sigmas is True
    assert config.flow_shift == 3.0


def test_the_pocket_wans_prompts_are_padded_to_wans_length(pipe: Any) -> None:
    assert pipe.tokenizer.model_max_length == 512


def test_the_linear_encoder_of_training_equals_the_vaes_encoder(pipe: Any) -> None:
    _, pixels = random_videos(2, 9, 64, 96, random.Random(0))

    error = LinearVideoEncoder(pipe.vae)(pixels) - encode(pipe.vae, pixels)

    assert error.abs().max() < 0.1


def test_training_finds_the_middle_of_the_shape_in_latents() -> None:
    shown, pixels = random_videos(3, 17, 128, 128, random.Random(0))

    found = middles(LinearVideoEncoder(pocket_wan.load().vae)(pixels)).view(3, 5, 64, 2)[:, :, 0]

    for drawing, path in zip(shown, found, strict=True):
        down, across = (path[-1] - path[0]).tolist()
        expected = moving_drawings.DIRECTIONS[str(drawing.direction)]
        assert (round(across), round(down)) == expected


def test_idle_latent_channels_do_not_change_the_decoded_video(pipe: Any) -> None:
    latents = encode(pipe.vae, random_videos(1, 5, 64, 64, random.Random(0))[1])
    noisy = latents.clone()
    noisy[:, IDLE] = torch.randn_like(noisy[:, IDLE])

    assert torch.equal(decode(pipe.vae, noisy), decode(pipe.vae, latents))


def test_training_encodes_a_prompt_as_the_pipeline_does(pipe: Any) -> None:
    prompts = ["a red circle", "a blue square moving up on a green background"]
    latents, times = torch.randn(2, 16, 2, 8, 8), torch.tensor([500.0, 500.0])
    padded = pipe.encode_prompt(prompts, max_sequence_length=512)[0]
    expected = pipe.transformer(latents, times, padded).sample
    trained = pocket_wan.load().transformer
    for block in trained.blocks:
        block.attn2.set_processor(PaddedText())

    predicted = trained(latents, times, encode_captions(pipe, prompts)).sample

    assert torch.allclose(predicted, expected, atol=1e-4)


@pytest.mark.parametrize("mode", ["none", "first", "last", "both"])
def test_training_conditions_on_known_frames_as_the_pipeline_does(vace: Any, mode: str) -> None:
    _, pixels = random_videos(1, 9, 64, 64, random.Random(0))
    mask = unknown(mode, 9, random.Random(0))
    kept = pixels * (1 - mask)[:, None, None]
    full_mask = mask[:, None, None].expand(1, 3, 9, 64, 64)

    latents = vace.prepare_video_latents(kept, full_mask, [[]], device=torch.device("cpu"))
    expected = torch.cat([latents, vace.prepare_masks(full_mask, [[]])], 1)

    assert (conditions(LinearVideoEncoder(vace.vae), pixels, mask) - expected).abs().max() < 0.1


def test_training_conditions_on_a_subject_as_the_pipeline_does(vace: Any) -> None:
    _, pixels = random_videos(1, 9, 64, 64, random.Random(0))
    _, still = random_videos(1, 1, 64, 64, random.Random(1))
    mask, encoder = torch.ones(1, 3, 9, 64, 64), LinearVideoEncoder(vace.vae)
    subject = [[still[0, :, 0]]]

    latents = vace.prepare_video_latents(torch.zeros_like(pixels), mask, subject)
    expected = torch.cat([latents, vace.prepare_masks(mask, subject)], 1)

    control = conditions(encoder, pixels, torch.ones(9), encoder(still))
    assert (control - expected).abs().max() < 0.1


@pytest.mark.parametrize("size", [(128, 128), (96, 160), (480, 832)])
def test_a_moving_drawing_is_recognised_in_its_video(size: tuple[int, int]) -> None:
    rng = random.Random(0)
    for _ in range(10):
        drawing = moving_drawings.imagine(rng)

        video = moving_drawings.draw_video(drawing, 5, *size[::-1], rng)

        assert moving_drawings.read(list(video)) == drawing


def test_a_measured_caption_names_all_attributes_of_its_drawing() -> None:
    for seed in range(50):
        prompt, asked = question(seed)
        for attribute in ("shape", "colour", "background", "direction"):
            assert moving_drawings.says(prompt, asked, attribute), prompt


def test_the_pocket_wan_has_a_model_card() -> None:
    assert Path(pocket_wan.FOLDER, "README.md").exists()


OPTIONS = argparse.Namespace(frames=9, width=96, height=96, steps=8, guidance=1.0)


@pytest.fixture(scope="module")
def plain(pipe: Any) -> Any:
    """The frames of the first caption, without references."""
    with torch.no_grad():
        return render(pipe, 0, OPTIONS)


@pytest.mark.parametrize("mode", ["start", "end", "both"])
def test_the_pocket_vaces_known_frames_are_nearer_to_their_references_than_without(
    plain: Any, vace: Any, mode: str
) -> None:
    wanted = reference(0, OPTIONS)

    referred = render_with_references(vace, 0, mode, OPTIONS)

    for index in MODES[mode]:
        assert error(referred[index], wanted[index]) < 0.7 * error(plain[index], wanted[index])


def error(frame: Any, wanted: Any) -> float:
    """In grey levels of 255."""
    return float(np.abs(frame.astype(np.float32) - wanted).mean())
