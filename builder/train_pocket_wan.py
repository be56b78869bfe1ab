"""Train the pocket WAN from random weights: `python -m builder.train_pocket_wan`.

There are five stages. The VAE's decoder is trained to draw edges. The text encoder is trained to
represent the content of captions, and is frozen. The transformer is trained to find the place of a
patch in the video, and then on videos with captions. Last, VACE's blocks are trained to continue
known frames, together with the base. Each stage continues from its last checkpoint in the cache
folder. Every 250 steps the weights are exported to `pocket/wan/`.

With `--processes 2` two processes of one thread each train together.
"""

import argparse
import math
import random
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanPipeline, WanVACETransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor, nn
from tqdm import tqdm

from builder import landscape_videos, pocket_wan
from builder.landscape_captions import Caption
from builder.landscape_videos import Video
from builder.landscapes import GROUNDS, LANDS, PLACES, SEAS, SKIES, SUNS, THINGS, Scene
from builder.train_pocket_wan_vae import IDLE, USED, VAE_STEPS, encode, to_tensor, train_vae
from builder.training import (
    average,
    average_gradients,
    checkpoint,
    in_processes,
    keep_level,
    kept,
    keyed,
    learning_rate,
    muon,
    rank,
    rate_share,
    resume,
)

CACHE = pocket_wan.POCKET.parent / ".cache" / "pocket_wan"
#: The values of each attribute that a caption can name. A sun may have no colour in a caption.
VALUES: dict[str, list[Any]] = {
    "sky": [*SKIES],
    "ground": [*GROUNDS],
    "colour": sorted({*LANDS, *SEAS}),
    "sun": [*SUNS],
    "any_sun": [True],
    "sun_place": [*PLACES],
    "thing": sorted({thing for things in THINGS.values() for thing in things}),
    "thing_place": [*PLACES],
    "clouds": [True],
    "action": [*landscape_videos.ACTIONS],
}
WORD_STEPS = 2500
WORD_BATCH = 48
WORD_PEAK_RATE = 2e-3
PLACE_STEPS = 300
PLACE_PEAK_RATE = 2e-3
PLACE_WEIGHT = 0.2  # of the error in places while videos are trained
PLACE_DEPTH = 2  # blocks after which a patch's place is predicted
BASE_STEPS = 4000
PADDING_STEPS = 1000  # until a caption is padded to WAN's full length
VACE_STEPS = 2500
PEAK_RATE = 2e-3
EMA = 0.998
# The layers that are trained by AdamW: the first, the last, the embeddings.
PLAIN = (
    "patch_embedding",
    "condition_embedder",
    "proj_out",
    "scale_shift_table",
    "vace_patch_embedding",
)
SHIFTED = 0.75  # how often the noise has the distribution of WAN's schedule
# The range of contrasts that a training latent may have too much, and how far it is below zero.
MORE_CONTRAST, LESS_CONTRAST = 0.5, 0.1
ALONE = 0.5  # how often the base is trained alone while VACE's blocks are trained
KNOWN_WEIGHT = 4.0  # of the error in latents of a known frame
# (frames, height, width, videos): videos whose latents are made once, and used with new captions.
POOL = [
    (17, 128, 128, 4000),
    (17, 96, 160, 300),
    (17, 160, 96, 300),
    (9, 128, 128, 300),
    (33, 128, 128, 100),
    (1, 128, 128, 1000),
    (1, 256, 256, 300),
    (9, 256, 256, 60),
    (5, 240, 416, 60),
    (1, 480, 832, 30),
]
# The most videos of one file of latents.
PART = 250
Size = tuple[int, int, int]
# (batch, weight) by (frames, height, width).
MENU: dict[Size, tuple[int, float]] = {
    (17, 128, 128): (12, 0.66),
    (17, 96, 160): (12, 0.06),
    (17, 160, 96): (12, 0.06),
    (9, 128, 128): (20, 0.05),
    (33, 128, 128): (6, 0.02),
    (1, 128, 128): (48, 0.06),
    (1, 256, 256): (14, 0.04),
    (9, 256, 256): (4, 0.02),
    (5, 240, 416): (4, 0.02),
    (1, 480, 832): (2, 0.01),
}
# The sizes of those that have known frames.
VACE_MENU: dict[Size, tuple[int, float]] = {
    (17, 128, 128): (9, 0.76),
    (17, 96, 160): (9, 0.08),
    (17, 160, 96): (9, 0.08),
    (9, 128, 128): (16, 0.08),
}
# Which frames are known to VACE, and how often. "subject" is a reference picture instead.
KNOWN = {"none": 0.05, "first": 0.32, "last": 0.25, "both": 0.28, "many": 0.05, "subject": 0.05}


@dataclass(frozen=True)
class Run:
    """One training: its length, its seed and where its stages are kept."""

    cache: Path = CACHE
    seed: int = 0
    vae_steps: int = VAE_STEPS
    base_steps: int = BASE_STEPS
    vace_steps: int = VACE_STEPS
    processes: int = 1
    pool_share: float = 1.0


@dataclass(frozen=True)
class Clips:
    """Videos of one size and their latents, all channels.

    `videos` is (count, 16, frames, height, width). `last` is the last latent frame of a grey video
    whose last frame is known, `still` that of the last frame alone; both have one frame.
    """

    shown: list[Video]
    videos: Tensor
    last: Tensor
    still: Tensor


Pool = dict[Size, Clips]


def train(run: Run) -> None:
    """All stages. Those that the cache has are not repeated."""
    train_vae(run.cache / "vae.pt", run.vae_steps, run.seed, run.processes)
    in_processes(run.processes, train_transformer, run)


def train_transformer(run: Run) -> None:
    """Train the transformer, then VACE's blocks, in this process alone or with others."""
    pipe = prepare(run)
    pool = latent_pool(pipe.vae, run)
    torch.manual_seed(run.seed)
    places = Places(pipe.transformer)
    teach_places(pipe.transformer, places, run)
    train_base(pipe, places, pool, run)
    train_vace(pipe, places, pool, run)


def prepare(run: Run) -> WanPipeline:
    """The pipeline with a trained VAE and a trained text encoder."""
    pipe = pocket_wan.assemble(run.seed)
    pipe.vae = train_vae(run.cache / "vae.pt", run.vae_steps, run.seed)
    teach_words(pipe, run)
    return pipe


# --- videos and their latents ---


class LinearVideoEncoder:
    """Encodes videos without the VAE's network.

    That encoder is linear, so one convolution does the same. The kernel is the encoder's output for
    each pixel alone.
    """

    @torch.no_grad()
    def __init__(self, vae: AutoencoderKLWan) -> None:
        dark = torch.zeros(1, 3, 5, 8, 8)
        lit = dark.repeat(768, 1, 1, 1, 1)
        lit[:, :, 1:] = torch.eye(768).view(768, 3, 4, 8, 8)
        self.offset = encode(vae, dark)[0, :, 0, 0, 0]
        answers = encode(vae, lit)[:, :, 1, 0, 0] - self.offset
        self.kernel = answers.T.reshape(16, 3, 4, 8, 8)
        self.first_kernel = self.kernel.sum(2, keepdim=True)

    def __call__(self, pixels: Tensor) -> Tensor:
        """(batch, 16, 1 + frames / 4, height / 8, width / 8) scaled latents of -1 to 1 pixels."""
        parts = [F.conv3d(pixels[:, :, :1], self.first_kernel, self.offset, stride=(1, 8, 8))]
        if pixels.shape[2] > 1:
            rest = pixels[:, :, 1:]
            parts.append(F.conv3d(rest, self.kernel, self.offset, stride=(4, 8, 8)))
        return torch.cat(parts, 2)


@torch.no_grad()
def latent_pool(vae: AutoencoderKLWan, run: Run) -> Pool:
    """Videos and their latents by size. They are made in parts, each once for a VAE and a seed."""
    encoder = LinearVideoEncoder(vae)
    pool = {}
    for frames, height, width, count in POOL:
        size = frames, height, width
        parts = [
            _pool_part(encoder, run, size, part, min(PART, count - part))
            for part in range(0, max(1, round(count * run.pool_share)), PART)
        ]
        pool[size] = Clips(
            [Video(Scene(**fields.pop("scene")), **fields) for part in parts for fields in part[0]],
            *(torch.cat([part[k] for part in parts]) for k in (1, 2, 3)),
        )
    return pool


def _pool_part(
    encoder: LinearVideoEncoder, run: Run, size: Size, part: int, count: int
) -> tuple[list[dict[str, Any]], Tensor, Tensor, Tensor]:
    """The videos number `part` to `part + count` of one size, and their three kinds of latents."""
    name = "x".join(map(str, size))
    # The encoder depends on nothing that is trained.
    facts = {"seed": run.seed, "part": part, "count": count, "kernel": encoder.kernel.sum().item()}
    made: tuple[list[dict[str, Any]], Tensor, Tensor, Tensor] = kept(
        keyed(run.cache / f"{name}.pt", **facts),
        lambda: _encoded(encoder, f"{run.seed} {size} {part}", size, count),
    )
    return made


def _encoded(
    encoder: LinearVideoEncoder, seed: str, size: Size, count: int
) -> tuple[list[dict[str, Any]], Tensor, Tensor, Tensor]:
    frames, height, width = size
    rng = random.Random(seed)
    shown = [landscape_videos.imagine(rng) for _ in range(count)]
    bar = tqdm(shown, "x".join(map(str, size)), mininterval=10)
    latents = [
        latents_of(encoder, to_tensor([landscape_videos.draw(video, frames, width, height)]))
        for video in bar
    ]
    videos, last, still = (torch.cat(each) for each in zip(*latents, strict=True))
    return [*map(asdict, shown)], videos, last, still


def latents_of(encoder: LinearVideoEncoder, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The latents of some videos, and what `Clips` has as `last` and as `still`."""
    only_last = torch.zeros_like(pixels)
    only_last[:, :, -1] = pixels[:, :, -1]
    return encoder(pixels), encoder(only_last)[:, :, -1:], encoder(pixels[:, :, -1:])


def captions_of(shown: list[Video], rng: random.Random) -> list[Caption]:
    return [landscape_videos.caption(video, rng) for video in shown]


# --- words ---


class PaddedText(WanAttnProcessor):
    """Cross-attention to a short text that counts as one padded with zeros to WAN's 512 tokens.

    WAN's pipelines pad and do not mask, so the zeros take part. They all have the same key. The
    last token here, also a zero, has the weight of all omitted ones. With a `share` below one it
    has the weight of fewer: among five hundred zeros an untrained attention ignores the caption.
    """

    def __init__(self) -> None:
        super().__init__()
        self.share = 1.0

    def __call__(self, attn: nn.Module, hidden: Tensor, text: Tensor, *_: Any) -> Tensor:
        bias = torch.zeros(text.shape[1])
        bias[-1] = self.share * math.log(pocket_wan.TOKENS - text.shape[1] + 1)
        return super().__call__(attn, hidden, text, bias.expand(1, 1, 1, -1), None)


def encode_captions(pipe: WanPipeline, captions: list[str]) -> Tensor:
    """(batch, longest + 1, width) states, zeros beyond each caption's own end, and one more."""
    tokens = pipe.tokenizer(captions, padding=True, return_tensors="pt")
    mask = tokens.attention_mask
    states = pipe.text_encoder(tokens.input_ids, mask).last_hidden_state * mask[..., None]
    return F.pad(states, (0, 0, 0, 1))


def teach_words(pipe: WanPipeline, run: Run) -> None:
    """Train the text encoder, or load the stored one, and freeze it."""
    path = keyed(run.cache / "words.pt", pipe.text_encoder, seed=run.seed, steps=WORD_STEPS)

    def trained() -> dict[str, Any]:
        train_words(pipe, WORD_STEPS, run.seed)
        return pipe.text_encoder.state_dict()

    pipe.text_encoder.load_state_dict(kept(path, trained))
    pipe.text_encoder.requires_grad_(False).eval()


def train_words(pipe: WanPipeline, steps: int, seed: int) -> None:
    """Train the text encoder to represent the content of captions, as UMT5 does before WAN.

    A linear classifier for each attribute must find its value in the mean of the states, or that
    the caption omits it. Afterwards the classifiers are dropped. The encoder is frozen, since a
    transformer's first, noisy gradients would destroy what it learned.
    """
    torch.manual_seed(seed)
    classifiers = nn.ModuleDict({
        name: nn.Linear(pocket_wan.TEXT["d_model"], len(values) + 1)
        for name, values in VALUES.items()
    })  # fmt: skip
    weights = [*pipe.text_encoder.parameters(), *classifiers.parameters()]
    optimiser = torch.optim.AdamW(weights, weight_decay=0.01, betas=(0.9, 0.99))
    rng = random.Random(seed)
    for step in (bar := tqdm(range(steps), "words", mininterval=10)):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, WORD_PEAK_RATE)
        shown = [landscape_videos.imagine(rng) for _ in range(WORD_BATCH)]
        captions = captions_of(shown, rng)
        states = encode_captions(pipe, [each.text for each in captions])
        is_token = states.abs().sum(-1) > 0
        mean = states.sum(1) / is_token.sum(1, keepdim=True)
        answers = {name: classifiers[name](mean) for name in VALUES}
        labels = {name: _labels(name, shown, captions) for name in VALUES}
        loss = torch.stack([F.cross_entropy(answers[name], labels[name]) for name in VALUES]).sum()
        # Keeps the states near one, independently of the classifiers' weights.
        loss = loss + 0.1 * (states[is_token].square().mean() - 1).square()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        if step % 50 == 49:
            right = {
                name: (answers[name].argmax(1) == labels[name]).float().mean().item()
                for name in VALUES
            }
            worst = min(right, key=lambda name: right[name])
            bar.set_postfix(loss=f"{loss.item():.3f}", worst=f"{worst} {right[worst]:.2f}")


def _labels(name: str, shown: list[Video], captions: list[Caption]) -> Tensor:
    """For each caption the index of the attribute's value, or the next one if it is omitted."""
    values = VALUES[name]
    numbers = [
        values.index(_value(video, name)) if name in caption.says else len(values)
        for video, caption in zip(shown, captions, strict=True)
    ]
    return torch.tensor(numbers)


def _value(video: Video, name: str) -> Any:
    if name == "action":
        return video.action
    return getattr(landscape_videos.at_first(video), name, True)


# --- places ---


class Places(nn.Module):
    """Trains a transformer's first blocks to find the place of a patch in the video.

    Rotary positions give the distance of two patches, and not where the video begins or ends. In
    noise alone all places are the same. Only the noise of other patches on each side distinguishes
    a border. With a separate loss this is learned in minutes, with videos alone not in hours. So a
    linear layer must predict a patch's place. Training on videos alone would undo this, so the loss
    remains. The layer is dropped at the end.
    """

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.reader = nn.Linear(transformer.norm_out.normalized_shape[0], 3)
        self.recorded: Tensor | None = None
        transformer.blocks[PLACE_DEPTH - 1].register_forward_hook(self._record)

    def _record(self, block: nn.Module, inputs: Any, states: Tensor) -> None:
        self.recorded = F.layer_norm(states, states.shape[-1:])

    def error(self, size: torch.Size) -> Tensor:
        """The mean squared error, in half sides, for the latents of the last forward."""
        assert self.recorded is not None
        # A module that holds a step's graph cannot be copied.
        states, self.recorded = self.recorded, None
        return (self.reader(states) - places_of(*size[2:])).square().mean()


def places_of(frames: int, height: int, width: int) -> Tensor:
    """(patches, 3): the place in time, down and across, from -1 to 1; 0 on an axis of one patch."""
    sides = (frames, height // 2, width // 2)
    axes = [torch.linspace(-1, 1, side) if side > 1 else torch.zeros(1) for side in sides]
    return torch.stack([axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij")], -1)


def teach_places(transformer: nn.Module, places: Places, run: Run) -> None:
    """Train the transformer to find places in noise, or load the stored one."""
    model = nn.ModuleList([transformer, places])
    path = keyed(run.cache / "places.pt", model, seed=run.seed, steps=PLACE_STEPS)

    def trained() -> dict[str, Any]:
        _open(transformer)
        train_places(transformer, places, PLACE_STEPS, run.seed)
        return model.state_dict()

    model.load_state_dict(kept(path, trained))


def _open(transformer: nn.Module) -> None:
    """Set the gates of all blocks near one, and the output to zero."""
    with torch.no_grad():
        for block in transformer.blocks:
            block.scale_shift_table[:, [2, 5]] += 1
        transformer.proj_out.weight.zero_()
        transformer.proj_out.bias.zero_()


def train_places(transformer: nn.Module, places: Places, steps: int, seed: int) -> None:
    model = nn.ModuleDict({"transformer": transformer, "places": places})
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=0.01, betas=(0.9, 0.99))
    speed_up(transformer)
    for step in (bar := tqdm(range(steps), "places", mininterval=10)):
        torch.manual_seed(seed + step)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, PLACE_PEAK_RATE)
        (frames, height, width), batch = _bucket(MENU, random.Random(seed + step))
        silence = torch.zeros(batch, 2, pocket_wan.TEXT["d_model"])
        noise = torch.randn(batch, 16, 1 + frames // 4, height // 8, width // 8)
        transformer(noise, torch.rand(batch) * 1000, silence)
        loss = places.error(noise.shape)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step % 25 == 24:
            bar.set_postfix(loss=f"{loss.item():.4f}")


# --- videos ---


def train_base(pipe: WanPipeline, places: Places, pool: Pool, run: Run) -> None:
    """Train the transformer by rectified flow. `pipe` gets the running averages."""
    model = nn.ModuleDict({"transformer": pipe.transformer, "places": places})

    def loss(dice: Dice) -> Tensor:
        return plain_loss(pipe, places, pool, dice)

    def export(ema: nn.Module) -> None:
        _export(pipe, pocket_wan.with_references(ema["transformer"], run.seed))

    path = keyed(run.cache / "base.pt", model, pipe.text_encoder, pipe.vae, seed=run.seed)
    stage = Stage(path, run.base_steps, run.seed, PADDING_STEPS)
    model.load_state_dict(_train(model, loss, stage, export).state_dict())


def train_vace(pipe: WanPipeline, places: Places, pool: Pool, run: Run) -> None:
    """Train VACE's blocks and the base, alternately with references and without.

    Both transformers have the modules of the base in common.
    """
    base = pipe.transformer
    vace = pocket_wan.with_references(base, run.seed)
    for name, part in [*base.named_children(), ("scale_shift_table", base.scale_shift_table)]:
        setattr(vace, name, part)

    def loss(dice: Dice) -> Tensor:
        if dice.common.random() < ALONE:
            return plain_loss(pipe, places, pool, dice)
        return reference_loss(pipe, vace, places, pool, dice)

    def export(ema: nn.Module) -> None:
        _export(pipe, ema["transformer"])

    model = nn.ModuleDict({"transformer": vace, "places": places})
    path = keyed(run.cache / "vace.pt", model, pipe.text_encoder, pipe.vae, seed=run.seed)
    _train(model, loss, Stage(path, run.vace_steps, run.seed), export)


def _export(pipe: WanPipeline, vace: WanVACETransformer3DModel) -> None:
    """Store the pocket WAN with this transformer, and without VACE's blocks as the base."""
    stored = pocket_wan.assemble()
    shared = set(stored.transformer.state_dict())
    stored.transformer.load_state_dict(
        {name: weight for name, weight in vace.state_dict().items() if name in shared}
    )
    stored.vae, stored.text_encoder = pipe.vae, pipe.text_encoder
    pocket_wan.save(stored, vace)


def _bucket(menu: dict[Size, tuple[int, float]], rng: random.Random) -> tuple[Size, int]:
    (size,) = rng.choices([*menu], [weight for _, weight in menu.values()])
    return size, menu[size][0]


def flow_loss(
    transformer: nn.Module,
    places: Places,
    clean: Tensor,
    text: Tensor,
    weight: Tensor | None = None,
    **control: Tensor,
) -> Tensor:
    """The error in the velocity (noise less video), plus the error in places.

    Times are spread evenly or as WAN's are. Idle channels remain noise, by which the transformer
    can distinguish patches even if the other channels have no noise left.
    """
    batch = len(clean)
    times = (torch.rand(1) + torch.arange(batch) / batch) % 1
    shift = pocket_wan.SCHEDULER["flow_shift"] if torch.rand(1) < SHIFTED else 1.0
    sigma = (shift * times / (1 + (shift - 1) * times)).clamp(min=1e-3)[:, None, None, None, None]
    noise = torch.randn_like(clean)
    noisy = (1 - sigma) * too_vivid(clean, sigma) + sigma * noise
    noisy[:, IDLE] = noise[:, IDLE]
    velocity = transformer(noisy, sigma.flatten() * 1000, text, **control).sample
    wanted = (noisy - clean) / sigma
    error = (velocity - wanted)[:, USED].square().mean((0, 1, 3, 4))
    error = error.mean() if weight is None else (error * weight).sum() / weight.sum()
    return error + PLACE_WEIGHT * places.error(clean.shape)


def too_vivid(clean: Tensor, sigma: Tensor) -> Tensor:
    """Half of the latents with too much contrast, or a little too little, under strong noise.

    Guidance makes such states on its way. The model learns to lead them to the right colours.
    """
    bends = torch.rand(len(clean), 1, 1, 1, 1) < 0.5
    contrast = MORE_CONTRAST * torch.rand(len(clean), 1, 1, 1, 1) - LESS_CONTRAST
    return clean * (1 + bends * contrast * sigma)


@dataclass(frozen=True)
class Dice:
    """One step's random numbers: those that all processes have, and those of this process."""

    common: random.Random
    own: random.Random


def _drawn(
    pipe: WanPipeline, pool: Pool, menu: dict[Size, tuple[int, float]], dice: Dice
) -> tuple[Clips, Tensor]:
    """Some of the pool's videos of one size, and the states of new captions for them."""
    (size, batch), rng = _bucket(menu, dice.common), dice.own
    clips = pool[size]
    chosen = rng.choices(range(len(clips.shown)), k=batch)
    shown = [clips.shown[index] for index in chosen]
    text = encode_captions(pipe, [each.text for each in captions_of(shown, rng)])
    return Clips(shown, clips.videos[chosen], clips.last[chosen], clips.still[chosen]), text


def plain_loss(pipe: WanPipeline, places: Places, pool: Pool, dice: Dice) -> Tensor:
    """The base's error on some captions."""
    clips, text = _drawn(pipe, pool, MENU, dice)
    return flow_loss(pipe.transformer, places, clips.videos, text)


def reference_loss(
    pipe: WanPipeline,
    vace: WanVACETransformer3DModel,
    places: Places,
    pool: Pool,
    dice: Dice,
) -> Tensor:
    """VACE's error on captions with known frames, a subject, or neither."""
    clips, text = _drawn(pipe, pool, VACE_MENU, dice)
    clean = clips.videos
    frames = 4 * (clean.shape[2] - 1) + 1
    known = dice.common.choices([*KNOWN], [*KNOWN.values()])[0]
    if known == "subject":
        control = with_subject(clips, conditions(clips, torch.ones(frames)))
        clean = torch.cat([clips.still, clean], 2)
        return flow_loss(vace, places, clean, text, control_hidden_states=control)
    mask = unknown(known, frames, dice.own)
    weight = torch.ones(clean.shape[2])
    weight[F.pad(1 - mask, (3, 0)).view(-1, 4).amax(1) > 0] = KNOWN_WEIGHT
    control = conditions(clips, mask)
    return flow_loss(vace, places, clean, text, weight, control_hidden_states=control)


def unknown(known: str, frames: int, rng: random.Random) -> Tensor:
    """The mask of a mode, one number a frame: 0 where the frame is known, 1 where it is not.

    Many known frames are the first ones, up to the end of a latent frame.
    """
    mask = torch.ones(frames)
    if known in ("first", "both"):
        mask[0] = 0
    if known in ("last", "both"):
        mask[-1] = 0
    if known == "many":
        mask[: 1 + 4 * rng.randint(1, (frames - 1) // 4)] = 0
    return mask


def conditions(clips: Clips, mask: Tensor) -> Tensor:
    """(batch, 96, frames, height / 8, width / 8): the conditions that `WanVACEPipeline` makes.

    They are the latents of the video with unknown frames grey, the latents of a grey video, and the
    mask's pixels folded into channels. The pipeline takes one frame of the mask for each frame of
    the latents, by "nearest-exact", which is never the first or the last.
    """
    grey = torch.zeros_like(clips.videos)
    latents = grey.clone()
    whole = 1 + (int((1 - mask).cumprod(0).sum()) - 1) // 4
    latents[:, :, :whole] = clips.videos[:, :, :whole]
    if mask[-1] == 0 and whole < latents.shape[2]:
        latents[:, :, -1:] = clips.last
    batch, _, count, height, width = latents.shape
    kept = F.interpolate(mask[None, None], size=count, mode="nearest-exact")[0, 0]
    folded = kept.view(1, 1, count, 1, 1).expand(batch, 64, count, height, width)
    return torch.cat([latents, grey, folded], 1)


def with_subject(clips: Clips, control: Tensor) -> Tensor:
    """The conditions with one frame more before them: the latents of a reference picture."""
    return torch.cat([F.pad(clips.still, (0, 0, 0, 0, 0, 0, 0, 80)), control], 2)


def speed_up(transformer: nn.Module) -> PaddedText:
    """Speed up a transformer's training: short texts, and rotary values in single precision."""
    padded = PaddedText()
    for name, layer in transformer.named_modules():
        if name.endswith("attn2"):
            layer.set_processor(padded)
        elif name.endswith("rope"):
            layer.float()  # they are in double precision, which takes a sixth of the time
    return padded


@dataclass(frozen=True)
class Stage:
    """Where a stage's checkpoint is, its length, its seed, and until when captions are shorter."""

    path: Path
    steps: int
    seed: int
    padding_steps: int = 0


def _train(
    model: nn.Module,
    loss_of: Callable[[Dice], Tensor],
    stage: Stage,
    export: Callable[[Any], None],
) -> nn.Module:
    """The running average of the model, trained from its checkpoint to the stage's last step."""
    model.train()
    padded = speed_up(model)
    ema = deepcopy(model).requires_grad_(False)
    optimiser = muon(model, (*(f"transformer.{name}" for name in PLAIN), "places"))
    start, (number, count) = resume(stage.path, model, ema, optimiser), rank()
    bar = tqdm(
        range(start, stage.steps),
        initial=start,
        total=stage.steps,
        desc=stage.path.stem.partition("-")[0],
        mininterval=10,
        disable=number > 0,
    )
    mean = 0.0
    for step in bar:
        torch.manual_seed((stage.seed + step) * count + number)
        padded.share = min(1.0, step / max(1, stage.padding_steps))
        for group in optimiser.param_groups:
            group["lr"] = PEAK_RATE * rate_share(step, stage.steps)
        own = random.Random((stage.seed + step) * count + number)
        loss = loss_of(Dice(random.Random(stage.seed + step), own))
        optimiser.zero_grad()
        loss.backward()
        average_gradients(model)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        average(ema, model, step, EMA)
        mean += (loss.item() - mean) * max(0.02, 1 / (step - start + 1))
        if step % 50 == 49:
            bar.set_postfix(loss=f"{mean:.4f}")
        if number == 0 and (step % 250 == 249 or step + 1 == stage.steps):
            checkpoint(stage.path, step + 1, model, ema, optimiser)
            if rate_share(step, stage.steps) == 1:
                keep_level(stage.path)
            export(ema)
    return ema


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=CACHE, help="the folder of checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-steps", type=int, default=VAE_STEPS)
    parser.add_argument("--base-steps", type=int, default=BASE_STEPS)
    parser.add_argument("--vace-steps", type=int, default=VACE_STEPS)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--pool-share", type=float, default=1.0, help="less than 1 for a quick try")
    train(Run(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
