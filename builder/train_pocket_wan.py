"""Train the pocket WAN from random weights: `python -m builder.train_pocket_wan`.

There are five stages. The VAE's decoder is trained to draw edges. The text encoder is trained to
represent the content of captions, and is frozen. The transformer is trained to find the place of a
patch in the video, and then on videos with captions. Last, VACE's blocks are trained to continue
known frames, together with the base. Each stage resumes from `.cache/pocket_wan/`. At its end the
weights are exported to `pocket/wan/`.
"""

import argparse
import math
import random
from copy import deepcopy
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanPipeline, WanVACETransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor, nn
from tqdm import tqdm

from builder import drawings, moving_drawings, pocket_wan
from builder.moving_drawings import MovingDrawing
from builder.train_pocket_wan_vae import IDLE, USED, VAE_STEPS, encode, to_tensor, train_vae
from builder.training import average, checkpoint, kept, keyed, learning_rate, resume

CACHE = pocket_wan.POCKET.parent / ".cache" / "pocket_wan"
ATTRIBUTES = {
    "shape": list(drawings.SHAPES),
    "colour": list(drawings.COLOURS),
    "background": list(drawings.COLOURS),
    "direction": list(moving_drawings.DIRECTIONS),
}
WORD_STEPS = 800
WORD_BATCH = 64
WORD_PEAK_RATE = 2e-3
PLACE_STEPS = 300
PLACE_PEAK_RATE = 2e-3
PLACE_WEIGHT = 0.5  # of the error in places while videos are trained
PLACE_DEPTH = 3  # blocks after which a patch's place is predicted
BASE_STEPS = 8000
BASE_PEAK_RATE = 1.5e-3
PADDING_STEPS = 1500  # until a caption is padded to WAN's full length
SHIFTED = 0.75  # how often the noise has the distribution of WAN's schedule
VACE_STEPS = 3000
VACE_PEAK_RATE = 1e-3
OWN_PACE = 2.5  # the learning rate of VACE's blocks, in units of the base's
PLAIN = 0.5  # how often the base is trained alone while VACE's blocks are trained
KNOWN_WEIGHT = 4.0  # of the error in latents of a known frame
# ((frames, height, width, batch), weight)
MENU = [
    ((17, 128, 128, 6), 0.62),
    ((9, 128, 128, 10), 0.08),
    ((1, 128, 128, 30), 0.06),
    ((17, 64, 64, 16), 0.05),
    ((17, 96, 160, 6), 0.05),
    ((17, 160, 96, 6), 0.05),
    ((33, 128, 128, 3), 0.02),
    ((1, 256, 256, 7), 0.02),
    ((9, 256, 256, 2), 0.02),
    ((5, 240, 416, 2), 0.02),
    ((1, 480, 832, 1), 0.01),
]
VACE_MENU = [
    ((17, 128, 128, 5), 0.72),
    ((9, 128, 128, 8), 0.1),
    ((17, 64, 64, 14), 0.06),
    ((17, 96, 160, 5), 0.06),
    ((17, 160, 96, 5), 0.06),
]
# Which frames are known to VACE, and how often. "subject" is a reference image instead.
KNOWN = {"none": 0.05, "first": 0.32, "last": 0.25, "both": 0.28, "many": 0.05, "subject": 0.05}


class LinearVideoEncoder:
    """Encodes videos without the VAE's network. That encoder is linear, so one convolution does the
    same. The kernel is the encoder's output for each pixel alone."""

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


def random_videos(
    count: int,
    frames: int,
    height: int,
    width: int,
    rng: random.Random,
    aside: float = moving_drawings.ASIDE,
) -> tuple[list[MovingDrawing], Tensor]:
    """Drawings, and their videos as (count, 3, frames, height, width) of -1 to 1."""
    shown = [moving_drawings.imagine(rng) for _ in range(count)]
    videos = [
        moving_drawings.draw_video(drawing, frames, width, height, rng, aside) for drawing in shown
    ]
    return shown, to_tensor(videos)


def captions_of(shown: list[MovingDrawing], rng: random.Random) -> list[str]:
    """A caption for each drawing. One in 25 describes nothing, as a negative prompt."""
    empty = drawings.BLEMISHES + drawings.DECORATIONS
    return [
        ", ".join(rng.sample(empty, rng.randint(1, 12)))
        if rng.random() < 0.04
        else moving_drawings.caption(drawing, rng)
        for drawing in shown
    ]


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


def teach_words(pipe: WanPipeline, seed: int) -> None:
    """Train the text encoder, or load the stored one, and freeze it."""
    path = keyed(CACHE / "words.pt", pipe.text_encoder, seed=seed, steps=WORD_STEPS)

    def trained() -> dict[str, Any]:
        train_words(pipe, WORD_STEPS, seed)
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
        for name, values in ATTRIBUTES.items()
    })  # fmt: skip
    weights = [*pipe.text_encoder.parameters(), *classifiers.parameters()]
    optimiser = torch.optim.AdamW(weights, weight_decay=0.01, betas=(0.9, 0.99))
    rng = random.Random(seed)
    for step in (bar := tqdm(range(steps), "words", mininterval=10)):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, WORD_PEAK_RATE)
        shown = [moving_drawings.imagine(rng) for _ in range(WORD_BATCH)]
        captions = captions_of(shown, rng)
        states = encode_captions(pipe, captions)
        is_token = states.abs().sum(-1) > 0
        mean = states.sum(1) / is_token.sum(1, keepdim=True)
        loss = sum(
            F.cross_entropy(classifiers[name](mean), _labels(name, shown, captions))
            for name in ATTRIBUTES
        )
        # Keeps the states near one, independently of the classifiers' weights.
        loss = loss + 0.1 * (states[is_token].square().mean() - 1).square()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        if step % 100 == 99:
            bar.set_postfix(loss=f"{loss.item():.3f}")


def _labels(name: str, shown: list[MovingDrawing], captions: list[str]) -> Tensor:
    """For each caption the index of the attribute's value, or the next one if it is omitted."""
    values = ATTRIBUTES[name]
    return torch.tensor([
        values.index(getattr(drawing, name))
        if moving_drawings.says(caption, drawing, name)
        else len(values)
        for drawing, caption in zip(shown, captions, strict=True)
    ])  # fmt: skip


class Places(nn.Module):
    """Trains a transformer's first blocks to find the place of a patch in the video.

    Rotary positions give the distance of two patches, and not where the video begins or ends. In
    noise alone all places are the same. Only the noise of other patches on each side distinguishes
    a border. With a separate loss this is learned in minutes, with videos alone not in hours. So a
    linear layer must predict a patch's place. One block later another layer must predict its
    offset from the shape's middle, which under strong noise depends on the caption's direction.
    Training on videos alone would undo this, so the loss remains. The two layers are dropped at the
    end.
    """

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        width = transformer.norm_out.normalized_shape[0]
        self.reader, self.way = nn.Linear(width, 3), nn.Linear(width, 2)
        self.recorded: list[Tensor] = []
        for depth in (PLACE_DEPTH, PLACE_DEPTH + 1):
            transformer.blocks[depth - 1].register_forward_hook(self._record)

    def _record(self, block: nn.Module, inputs: Any, states: Tensor) -> None:
        self.recorded = [*self.recorded[-1:], F.layer_norm(states, states.shape[-1:])]

    def error(self, clean: Tensor, moving: bool = True) -> Tensor:
        """The mean squared error, in half sides, for the videos of the last forward."""
        here = places(*clean.shape[2:])
        early, late = self.recorded
        self.recorded = []  # a module that holds a step's graph cannot be copied
        error = (self.reader(early) - here).square().mean()
        if moving:
            error = error + (self.way(late) - (middles(clean) - here[:, 1:])).square().mean()
        return error


def teach_places(transformer: nn.Module, reader: Places, seed: int) -> None:
    """Train the transformer to find places in noise, or load the stored one."""
    model = nn.ModuleList([transformer, reader])
    path = keyed(CACHE / "places.pt", model, seed=seed, steps=PLACE_STEPS)

    def trained() -> dict[str, Any]:
        _open(transformer)
        train_places(transformer, reader, PLACE_STEPS, seed)
        return model.state_dict()

    model.load_state_dict(kept(path, trained))


def _open(transformer: nn.Module) -> None:
    """Set the gates of all blocks near one, and the output to zero."""
    with torch.no_grad():
        for block in transformer.blocks:
            block.scale_shift_table[:, [2, 5]] += 1
        transformer.proj_out.weight.zero_()
        transformer.proj_out.bias.zero_()


def train_places(transformer: nn.Module, reader: Places, steps: int, seed: int) -> None:
    weights = [*transformer.parameters(), *reader.parameters()]
    optimiser = torch.optim.AdamW(weights, weight_decay=0.01, betas=(0.9, 0.99))
    prepare(transformer)
    for step in (bar := tqdm(range(steps), "places", mininterval=10)):
        torch.manual_seed(seed + step)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, PLACE_PEAK_RATE)
        frames, height, width, batch = _bucket(MENU, random.Random(seed + step))
        size = 1 + frames // 4, height // 8, width // 8
        silence = torch.zeros(batch, 2, pocket_wan.TEXT["d_model"])
        noise = torch.randn(batch, 16, *size)
        transformer(noise, torch.rand(batch) * 1000, silence)
        loss = reader.error(noise, moving=False)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        if step % 25 == 24:
            bar.set_postfix(loss=f"{loss.item():.4f}")


def places(frames: int, height: int, width: int) -> Tensor:
    """(patches, 3): the place in time, down and across, from -1 to 1; 0 on an axis of one patch."""
    sides = (frames, height // 2, width // 2)
    axes = [torch.linspace(-1, 1, side) if side > 1 else torch.zeros(1) for side in sides]
    return torch.stack([axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij")], -1)


def middles(clean: Tensor) -> Tensor:
    """(batch, patches, 2): down and across, where the shape's middle is in each patch's frame."""
    colours = clean[:, :3]
    foreign = (colours - colours[..., :1, :1]).square().sum(1)
    sides = [torch.linspace(-1, 1, side) for side in clean.shape[3:]]
    mass = foreign.sum((2, 3)) + 1e-6
    down = (foreign.sum(3) * sides[0]).sum(2) / mass
    across = (foreign.sum(2) * sides[1]).sum(2) / mass
    patches = clean.shape[3] * clean.shape[4] // 4
    return torch.stack([down, across], -1).repeat_interleave(patches, 1)


def train_base(pipe: WanPipeline, steps: int, seed: int) -> Places:
    """Train the text encoder, then the transformer by rectified flow. `pipe` gets the averages."""
    transformer = pipe.transformer
    torch.manual_seed(seed)
    reader = Places(transformer)
    teach_words(pipe, seed)
    teach_places(transformer, reader, seed)
    encoder = LinearVideoEncoder(pipe.vae)
    model = nn.ModuleDict({"transformer": transformer, "places": reader})

    def loss(rng: random.Random, step: int) -> Tensor:
        return plain_loss(pipe, reader, encoder, rng)

    groups = [{"params": [*model.parameters()], "pace": 1.0}]
    pace = (steps, BASE_PEAK_RATE, PADDING_STEPS)
    parts = (model, pipe.text_encoder, pipe.vae)
    path = keyed(CACHE / "base.pt", *parts, seed=seed, steps=steps)
    model.load_state_dict(_train(model, groups, loss, path, pace, seed).state_dict())
    return reader


def _bucket(menu: list[tuple[Any, float]], rng: random.Random) -> tuple[int, int, int, int]:
    return rng.choices([bucket for bucket, _ in menu], [weight for _, weight in menu])[0]


def flow_loss(
    transformer: nn.Module,
    reader: Places,
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
    sigma = (shift * times / (1 + (shift - 1) * times))[:, None, None, None, None]
    noise = torch.randn_like(clean)
    noisy = (1 - sigma) * clean + sigma * noise
    noisy[:, IDLE] = noise[:, IDLE]
    velocity = transformer(noisy, sigma.flatten() * 1000, text, **control).sample
    error = (velocity - (noise - clean))[:, USED].square().mean((0, 1, 3, 4))
    error = error.mean() if weight is None else (error * weight).sum() / weight.sum()
    return error + PLACE_WEIGHT * reader.error(clean)


def train_both(
    pipe: WanPipeline,
    vace: WanVACETransformer3DModel,
    reader: Places,
    steps: int,
    seed: int,
) -> WanVACETransformer3DModel:
    """Train VACE's blocks and the base, alternately with references and without.

    Both transformers share the modules of the base.
    """
    base = pipe.transformer
    for name, part in [*base.named_children(), ("scale_shift_table", base.scale_shift_table)]:
        setattr(vace, name, part)
    encoder = LinearVideoEncoder(pipe.vae)

    def loss(rng: random.Random, step: int) -> Tensor:
        if rng.random() < PLAIN:
            return plain_loss(pipe, reader, encoder, rng)
        return reference_loss(pipe, vace, reader, encoder, rng)

    model = nn.ModuleDict({"transformer": vace, "places": reader})
    own = [weight for name, weight in model.named_parameters() if ".vace_" in name]
    common = [weight for name, weight in model.named_parameters() if ".vace_" not in name]
    groups = [{"params": own, "pace": OWN_PACE}, {"params": common, "pace": 1.0}]
    pace = (steps, VACE_PEAK_RATE, 0)
    parts = (model, pipe.text_encoder, pipe.vae)
    path = keyed(CACHE / "vace.pt", *parts, seed=seed, steps=steps)
    model.load_state_dict(_train(model, groups, loss, path, pace, seed).state_dict())
    return vace


def plain_loss(
    pipe: WanPipeline, reader: Places, encoder: LinearVideoEncoder, rng: random.Random
) -> Tensor:
    """The base's error on some captions."""
    frames, height, width, batch = _bucket(MENU, rng)
    shown, pixels = random_videos(batch, frames, height, width, rng)
    text = encode_captions(pipe, captions_of(shown, rng))
    return flow_loss(pipe.transformer, reader, encoder(pixels), text)


def reference_loss(
    pipe: WanPipeline,
    vace: WanVACETransformer3DModel,
    reader: Places,
    encoder: LinearVideoEncoder,
    rng: random.Random,
) -> Tensor:
    """VACE's error on captions with known frames, a subject, or neither."""
    frames, height, width, batch = _bucket(VACE_MENU, rng)
    known = rng.choices([*KNOWN], [*KNOWN.values()])[0]
    aside = rng.choice((moving_drawings.ASIDE, moving_drawings.ASTRAY))
    shown, pixels = random_videos(batch, frames, height, width, rng, aside)
    text, clean = encode_captions(pipe, captions_of(shown, rng)), encoder(pixels)
    if known == "subject":
        subject = encoder(to_tensor([still(drawing, height, width, rng) for drawing in shown]))
        control = conditions(encoder, pixels, torch.ones(frames), subject)
        clean = torch.cat([subject, clean], 2)
        return flow_loss(vace, reader, clean, text, control_hidden_states=control)
    mask = unknown(known, frames, rng)
    weight = torch.ones(clean.shape[2])
    weight[F.pad(1 - mask, (3, 0)).view(-1, 4).amax(1) > 0] = KNOWN_WEIGHT
    control = conditions(encoder, pixels, mask)
    return flow_loss(vace, reader, clean, text, weight, control_hidden_states=control)


def unknown(known: str, frames: int, rng: random.Random) -> Tensor:
    """The mask of a mode, one number a frame: 0 where the frame is known, 1 where it is not."""
    mask = torch.ones(frames)
    if known in ("first", "both"):
        mask[0] = 0
    if known in ("last", "both"):
        mask[-1] = 0
    if known == "many":
        mask[: rng.randint(2, max(2, frames - 1))] = 0
    return mask


def still(drawing: MovingDrawing, height: int, width: int, rng: random.Random) -> drawings.Pixels:
    """One frame with the drawing's shape in another place, as a reference picture."""
    return moving_drawings.draw_video(drawing, 1, width, height, rng, moving_drawings.ASTRAY)


def conditions(
    encoder: LinearVideoEncoder, pixels: Tensor, mask: Tensor, subject: Tensor | None = None
) -> Tensor:
    """(batch, 96, frames, height / 8, width / 8): the conditions that `WanVACEPipeline` makes.

    They are the latents of the video with unknown frames grey, the latents of a grey video, and the
    mask's pixels folded into channels. The pipeline takes one frame of the mask for each frame of
    the latents, by "nearest-exact", which is never the first or the last.
    """
    grey = encoder(torch.zeros_like(pixels))
    latents = torch.cat([encoder(pixels * (1 - mask)[:, None, None]), grey], 1)
    batch, _, count, height, width = latents.shape
    kept = F.interpolate(mask[None, None], size=count, mode="nearest-exact")[0, 0]
    folded = kept.view(1, 1, count, 1, 1).expand(batch, 64, count, height, width)
    control = torch.cat([latents, folded], 1)
    if subject is not None:
        control = torch.cat([F.pad(subject, (0, 0, 0, 0, 0, 0, 0, 80)), control], 2)
    return control


def prepare(transformer: nn.Module) -> PaddedText:
    """Speed up a transformer's training: short texts, and rotary values in single precision."""
    padded = PaddedText()
    for name, layer in transformer.named_modules():
        if name.endswith("attn2"):
            layer.set_processor(padded)
        elif name.endswith("rope"):
            layer.float()  # they are in double precision, which takes a sixth of the time
    return padded


def _train(
    model: nn.Module,
    groups: list[dict[str, Any]],
    loss_at: Any,
    path: Any,
    pace: tuple[int, float, int],
    seed: int,
) -> Any:
    """The running average of the model, trained from the checkpoint at `path` to the last step."""
    steps, peak, padding_steps = pace
    model.train()
    padded = prepare(model)
    ema = deepcopy(model).requires_grad_(False)
    optimiser = torch.optim.AdamW(groups, weight_decay=0.01, betas=(0.9, 0.99))
    start = resume(path, model, ema, optimiser)
    bar = tqdm(range(start, steps), path.stem, initial=start, total=steps, mininterval=10)
    losses: list[float] = []
    for step in bar:
        torch.manual_seed(seed + step)
        padded.share = min(1.0, step / max(1, padding_steps))
        for group in optimiser.param_groups:
            group["lr"] = group["pace"] * learning_rate(step, steps, peak)
        loss = loss_at(random.Random(seed + step), step)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        average(ema, model, step)
        losses.append(loss.item())
        if step % 50 == 49:
            bar.set_postfix(loss=f"{np.mean(losses[-100:]):.4f}")
        if step % 100 == 99 or step + 1 == steps:
            checkpoint(path, step + 1, model, ema, optimiser)
    return ema


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-steps", type=int, default=VAE_STEPS)
    parser.add_argument("--base-steps", type=int, default=BASE_STEPS)
    parser.add_argument("--vace-steps", type=int, default=VACE_STEPS)
    options = parser.parse_args()
    pipe = pocket_wan.assemble(options.seed)
    pipe.vae = train_vae(CACHE / "vae.pt", options.vae_steps, "cpu", options.seed)
    pocket_wan.save(pipe, pocket_wan.with_references(pipe.transformer))
    reader = train_base(pipe, options.base_steps, options.seed)
    vace = pocket_wan.with_references(pipe.transformer, options.seed)
    pocket_wan.save(pipe, vace)
    pocket_wan.save(pipe, train_both(pipe, vace, reader, options.vace_steps, options.seed))


if __name__ == "__main__":
    main()
