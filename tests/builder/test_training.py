"""The pocket models' training: a run uses the stored stages of runs with the same inputs only.

Each training here has one step. No test checks that it learns.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from builder import (
    pocket_sdxl,
    pocket_wan,
    train_pocket_sdxl,
    train_pocket_vae,
    train_pocket_wan,
)
from builder.train_pocket_tiny_vae import distil
from builder.train_pocket_vae import calibrated
from builder.training import keyed, learn


@pytest.fixture(autouse=True)
def short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage at its smallest, in its own folder."""
    monkeypatch.setattr(train_pocket_sdxl, "POOL", [(64, 64, 2)])
    monkeypatch.setattr(train_pocket_vae, "CALIBRATION", (2, 64))
    for module in (train_pocket_sdxl, train_pocket_wan):
        monkeypatch.setattr(module, "CACHE", tmp_path)
        monkeypatch.setattr(module, "WORD_STEPS", 1)
        monkeypatch.setattr(module, "WORD_BATCH", 2)
    monkeypatch.setattr(train_pocket_wan, "PLACE_STEPS", 1)
    monkeypatch.setattr(train_pocket_wan, "MENU", [((1, 64, 64, 1), 1.0)])
    monkeypatch.setattr(train_pocket_wan, "VACE_MENU", [((5, 64, 64, 1), 1.0)])
    monkeypatch.setattr(train_pocket_sdxl, "MENUS", [(0, [((64, 64, 1), 1.0)])])


def vae(scale: float = 1.0) -> Any:
    """The pocket's VAE; its latents are `scale` times as large."""
    network = pocket_sdxl.load().vae
    with torch.no_grad():
        network.quant_conv.weight *= scale
        network.quant_conv.bias *= scale
    return network


def latents(network: Any, seed: int = 0) -> Tensor:
    ((found, _),) = train_pocket_sdxl.latent_pool(network, seed).values()
    return found


def test_training_latents_are_encoded_by_the_given_vae() -> None:
    first = latents(vae())

    assert torch.allclose(latents(vae(scale=2.0)), 2 * first, atol=1e-5)
    assert torch.equal(latents(vae()), first)


def test_another_seed_gives_other_training_drawings() -> None:
    first = latents(vae())

    assert not torch.equal(latents(vae(), seed=1), first)


def test_another_pool_of_latents_is_encoded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    latents(vae())
    monkeypatch.setattr(train_pocket_sdxl, "POOL", [(64, 64, 3)])

    assert len(latents(vae())) == 3


def test_a_pool_of_latents_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    network, encoded = vae(), []
    network.encoder.register_forward_hook(lambda *_: encoded.append(1))

    latents(network)
    latents(network)

    assert len(encoded) == 2  # the pool's two drawings


def picture_words(seed: int) -> Tensor:
    pipe = pocket_sdxl.assemble(seed=0)
    train_pocket_sdxl.teach_words(pipe, "cpu", seed)
    return weights(pipe.text_encoder)


def video_words(seed: int) -> Tensor:
    pipe = pocket_wan.assemble(seed=0)
    train_pocket_wan.teach_words(pipe, seed)
    return weights(pipe.text_encoder)


def places(seed: int) -> Tensor:
    transformer = pocket_wan.assemble(seed=0).transformer
    torch.manual_seed(0)
    reader = train_pocket_wan.Places(transformer)
    train_pocket_wan.teach_places(transformer, reader, seed)
    return weights(transformer)


def weights(network: Any) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in network.parameters()])


@pytest.mark.parametrize("stage", [picture_words, video_words, places])
def test_a_training_stage_is_repeated_for_another_seed(stage: Callable[[int], Tensor]) -> None:
    first = stage(0)

    assert not torch.equal(stage(1), first)


@pytest.mark.parametrize("stage", [picture_words, video_words, places])
def test_a_training_stage_is_not_repeated_for_the_same_seed(
    stage: Callable[[int], Tensor], tmp_path: Path
) -> None:
    first = stage(0)
    made = sorted(tmp_path.iterdir())

    assert torch.equal(stage(0), first)
    assert sorted(tmp_path.iterdir()) == made


@pytest.mark.parametrize("stage", [picture_words, video_words])
def test_text_encoders_do_not_depend_on_random_numbers_drawn_before_their_training(
    stage: Callable[[int], Tensor], tmp_path: Path
) -> None:
    first = stage(0)
    for path in tmp_path.iterdir():
        path.unlink()
    torch.rand(1)

    assert torch.equal(stage(0), first)


def train_videos() -> Tensor:
    pipe = pocket_wan.assemble(seed=0)
    reader = train_pocket_wan.train_base(pipe, 1, seed=0)
    vace = pocket_wan.with_references(pipe.transformer, 0)
    return weights(train_pocket_wan.train_both(pipe, vace, reader, 1, seed=0))


def stages(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.pt"))


def test_a_repeated_video_training_uses_every_stored_stage(tmp_path: Path) -> None:
    first = train_videos()
    made = stages(tmp_path)

    assert len(made) == 4
    assert torch.equal(train_videos(), first)
    assert stages(tmp_path) == made


def test_a_repeated_picture_training_uses_every_stored_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, stored = vae(), tmp_path / "stored" / "sdxl.safetensors"
    stored.parent.mkdir()
    monkeypatch.setattr(pocket_sdxl, "CHECKPOINT", stored)
    monkeypatch.setattr(pocket_sdxl, "CONFIG", stored.with_suffix(""))
    train_pocket_sdxl.train_unet(network, 1, "cpu", seed=0)
    made, exported = stages(tmp_path), stored.read_bytes()

    train_pocket_sdxl.train_unet(network, 1, "cpu", seed=0)

    assert len(made) == 3
    assert stages(tmp_path) == made
    assert stored.read_bytes() == exported


def test_the_training_of_a_tiny_vae_is_continued_only_for_the_same_vae(tmp_path: Path) -> None:
    path = tmp_path / "tiny.pt"
    first = weights(distil(vae(), path, steps=1, seed=0))

    assert torch.equal(weights(distil(vae(), path, steps=1, seed=0)), first)
    assert not torch.equal(weights(distil(vae(scale=2.0), path, steps=1, seed=0)), first)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_vae_is_calibrated_once(tmp_path: Path) -> None:
    first = weights(calibrated(vae(), tmp_path, seed=0))
    (path,) = tmp_path.iterdir()
    before = path.stat().st_mtime_ns

    assert torch.equal(weights(calibrated(vae(), tmp_path, seed=0)), first)
    assert path.stat().st_mtime_ns == before


def test_an_interrupted_training_continues_at_its_step(tmp_path: Path) -> None:
    begun: list[int] = []

    def batches(start: int) -> list[Tensor]:
        begun.append(start)
        return [torch.ones(1)] * (2 if start == 0 else 9)

    def train(steps: int) -> None:
        network = torch.nn.Linear(1, 1)

        def loss(pixels: Tensor) -> tuple[Tensor, float]:
            return network(pixels).square().sum(), 0.0

        learn(network, tmp_path / "line.pt", batches, loss, steps, 1e-3, "line")

    train(steps=2)
    train(steps=4)

    assert begun == [0, 2]


def test_the_path_of_a_stored_stage_depends_on_weights_and_facts() -> None:
    path, network = Path("cache/stage.pt"), torch.nn.Linear(2, 2)
    first = keyed(path, network, seed=0)

    assert first.parent == path.parent
    assert (first.name[:6], first.suffix) == ("stage-", ".pt")
    assert keyed(path, network, seed=1) != first
    with torch.no_grad():
        network.weight[0, 0] += 1
    assert keyed(path, network, seed=0) != first
