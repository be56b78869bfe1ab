"""The pocket models' training: a run uses the stored stages of runs with the same inputs only.

Each training here has one step. No test checks that it learns.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
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
    train_pocket_words,
)
from builder.train_pocket_sdxl import Run
from builder.train_pocket_tiny_vae import distil
from builder.train_pocket_vae import calibrated
from builder.training import Muon, keyed, learn, muon, orthogonal
from tests.servers import warm_python


@pytest.fixture(autouse=True)
def short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch, tmp_path)


def shorten(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Every stage at its smallest, in its own folder."""
    patch.setattr(train_pocket_sdxl, "POOL", [(64, 64, 2)])
    patch.setattr(train_pocket_vae, "CALIBRATION", (2, 64))
    patch.setattr(train_pocket_vae, "VAE_MENU", [(64, 64, 1)])
    patch.setattr(train_pocket_wan, "CACHE", folder)
    for module in (train_pocket_words, train_pocket_wan):
        patch.setattr(module, "WORD_STEPS", 1)
        patch.setattr(module, "WORD_BATCH", 2)
    patch.setattr(train_pocket_wan, "PLACE_STEPS", 1)
    patch.setattr(train_pocket_wan, "MENU", [((1, 64, 64, 1), 1.0)])
    patch.setattr(train_pocket_wan, "VACE_MENU", [((5, 64, 64, 1), 1.0)])
    patch.setattr(train_pocket_sdxl, "MENUS", [(0, {(64, 64): (1, 1.0)})])


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """The shortest training of the pocket SDXL."""
    return Run(cache=tmp_path / "cache", vae_steps=1, unet_steps=1, tuning_steps=1)


@pytest.fixture
def exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    stored = tmp_path / "stored" / "sdxl.safetensors"
    stored.parent.mkdir()
    store_at(stored, monkeypatch)
    return stored


def store_at(stored: Path, patch: pytest.MonkeyPatch) -> None:
    """Have a training store the model there, instead of in the project's own folder."""
    patch.setattr(pocket_sdxl, "CHECKPOINT", stored)
    patch.setattr(pocket_sdxl, "CONFIG", stored.with_suffix(""))


def vae(scale: float = 1.0) -> Any:
    """An untrained VAE; its latents are `scale` times as large."""
    network = pocket_sdxl.assemble().vae
    with torch.no_grad():
        network.quant_conv.weight *= scale
        network.quant_conv.bias *= scale
    return network


def latents(network: Any, run: Run) -> Tensor:
    ((found, _),) = train_pocket_sdxl.latent_pool(network, run).values()
    return found


def test_training_latents_are_encoded_by_the_given_vae(run: Run) -> None:
    first = latents(vae(), run)

    assert torch.allclose(latents(vae(scale=2.0), run), 2 * first, atol=1e-5)
    assert torch.equal(latents(vae(), run), first)


def test_another_seed_gives_other_training_landscapes(run: Run) -> None:
    first = latents(vae(), run)

    assert not torch.equal(latents(vae(), replace(run, seed=1)), first)


def test_another_pool_of_latents_is_encoded_again(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents(vae(), run)
    monkeypatch.setattr(train_pocket_sdxl, "POOL", [(64, 64, 3)])

    assert len(latents(vae(), run)) == 3


def test_a_pool_of_latents_is_encoded_once(run: Run) -> None:
    network, encoded = vae(), []
    network.encoder.register_forward_hook(lambda *_: encoded.append(1))

    latents(network, run)
    latents(network, run)

    assert len(encoded) == 2  # the pool's two landscapes


def picture_words(seed: int, cache: Path) -> Tensor:
    pipe = pocket_sdxl.assemble(seed=0)
    train_pocket_words.teach_words(pipe, cache, seed)
    return weights(pipe.text_encoder)


def video_words(seed: int, _: Path) -> Tensor:
    pipe = pocket_wan.assemble(seed=0)
    train_pocket_wan.teach_words(pipe, seed)
    return weights(pipe.text_encoder)


def places(seed: int, _: Path) -> Tensor:
    transformer = pocket_wan.assemble(seed=0).transformer
    torch.manual_seed(0)
    reader = train_pocket_wan.Places(transformer)
    train_pocket_wan.teach_places(transformer, reader, seed)
    return weights(transformer)


def weights(network: Any) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in network.parameters()])


@pytest.mark.parametrize("stage", [picture_words, video_words, places])
def test_a_training_stage_is_repeated_for_another_seed(
    stage: Callable[[int, Path], Tensor], tmp_path: Path
) -> None:
    first = stage(0, tmp_path)

    assert not torch.equal(stage(1, tmp_path), first)


@pytest.mark.parametrize("stage", [picture_words, video_words, places])
def test_a_training_stage_is_not_repeated_for_the_same_seed(
    stage: Callable[[int, Path], Tensor], tmp_path: Path
) -> None:
    first = stage(0, tmp_path)
    made = sorted(tmp_path.iterdir())

    assert torch.equal(stage(0, tmp_path), first)
    assert sorted(tmp_path.iterdir()) == made


@pytest.mark.parametrize("stage", [picture_words, video_words])
def test_text_encoders_do_not_depend_on_random_numbers_drawn_before_their_training(
    stage: Callable[[int, Path], Tensor], tmp_path: Path
) -> None:
    first = stage(0, tmp_path)
    for path in tmp_path.iterdir():
        path.unlink()
    torch.rand(1)

    assert torch.equal(stage(0, tmp_path), first)


def train_videos() -> Tensor:
    pipe = pocket_wan.assemble(seed=0)
    reader = train_pocket_wan.train_base(pipe, 1, seed=0)
    vace = pocket_wan.with_references(pipe.transformer, 0)
    return weights(train_pocket_wan.train_both(pipe, vace, reader, 1, seed=0))


def stages(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.pt"))


@pytest.mark.deep
def test_a_repeated_video_training_uses_every_stored_stage(tmp_path: Path) -> None:
    first = train_videos()
    made = stages(tmp_path)

    assert len(made) == 4
    assert torch.equal(train_videos(), first)
    assert stages(tmp_path) == made


@pytest.mark.deep
def test_a_repeated_picture_training_uses_every_stored_stage(run: Run, exported: Path) -> None:
    train_pocket_sdxl.train(run)
    made, stored = stages(run.cache), exported.read_bytes()

    train_pocket_sdxl.train(run)

    # The VAE, its calibration, the words, the latents, the UNet and the decoder.
    assert len(made) == 6
    assert stages(run.cache) == made
    assert exported.read_bytes() == stored


@pytest.mark.deep
@pytest.mark.usefixtures("exported")
def test_a_trained_pocket_is_loaded_as_a_single_file_and_paints(run: Run) -> None:
    train_pocket_sdxl.train(run)

    picture = pocket_sdxl.load()("green hills", num_inference_steps=1, width=64, height=64)

    assert picture.images[0].size == (64, 64)


@pytest.mark.deep
def test_two_processes_train_one_model(run: Run, exported: Path) -> None:
    train_pocket_sdxl.prepare(run)
    # The tests' own process may have begun autograd's threads, and a fork of it could not train.
    ends = [warm_python.call(half, rank, run, exported) for rank in range(2)]
    for end in ends:
        end.join(120)

    assert [end.exitcode for end in ends] == [0, 0]
    one, other = (torch.load(run.cache / f"half-{rank}", weights_only=True) for rank in range(2))
    assert torch.equal(one, other)


def half(rank: int, run: Run, stored: Path) -> None:
    """One of two processes that train together. It stores the weights that it ends with."""
    torch.set_num_threads(1)
    meeting = f"file://{run.cache}/meeting"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch, run.cache.parent)
        store_at(stored, patch)
        pipe = train_pocket_sdxl.prepare(run)
        train_pocket_sdxl.train_unet(run, pipe)
    torch.save(weights(pipe.unet), run.cache / f"half-{rank}")


def test_states_under_little_noise_keep_their_contrast() -> None:
    torch.manual_seed(0)
    clean = torch.randn(64, 4, 8, 8)

    little, much = (
        train_pocket_sdxl.too_vivid(clean, torch.full((64, 1, 1, 1), kept)) - clean
        for kept in (0.999, 0.01)
    )

    assert little.abs().max() < 0.1
    assert much.abs().max() > 0.3


def test_an_orthogonal_matrix_has_singular_values_near_one() -> None:
    torch.manual_seed(0)

    for shape in ((3, 8, 24), (2, 24, 8)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
        assert values.min() > 0.5 and values.max() < 1.4


def test_muon_takes_kernels_and_adam_the_rest() -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 4, 3))

    first, second = muon(network, plain=("0",)).each

    assert isinstance(first, Muon)
    assert [weight.shape for weight in first.param_groups[0]["params"]] == [(4, 4, 3, 3)]
    assert len(second.param_groups[0]["params"]) == 3


def test_muon_continues_from_its_state() -> None:
    def steps(count: int, state: Any = None) -> tuple[Tensor, Any]:
        torch.manual_seed(0)
        network = torch.nn.Linear(4, 4)
        optimiser = muon(network, plain=())
        if state:
            network.load_state_dict(state["network"])
            optimiser.load_state_dict(state["optimiser"])
        for _ in range(count):
            optimiser.zero_grad()
            network(torch.eye(4)).square().sum().backward()
            optimiser.step()
        kept = {"network": network.state_dict(), "optimiser": optimiser.state_dict()}
        return weights(network), deepcopy(kept)

    straight, _ = steps(4)
    _, halfway = steps(2)

    assert torch.allclose(steps(2, halfway)[0], straight)


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
