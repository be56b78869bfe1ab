"""Train the pocket SDXL's text encoders to tell what a caption says, and encode captions."""

import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionXLPipeline
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTokenizer

from builder import pocket_sdxl
from builder.landscape_captions import Caption, caption
from builder.landscapes import GROUNDS, LANDS, PLACES, SEAS, SKIES, SUNS, THINGS, Scene, imagine
from builder.training import kept, keyed, learning_rate

ENCODERS = ("text_encoder", "text_encoder_2")
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
}
WORD_STEPS = 2500
WORD_BATCH = 48
WORD_PEAK_RATE = 2e-3


def teach_words(pipe: StableDiffusionXLPipeline, cache: Path, seed: int) -> None:
    """Train the text encoders, or load the stored ones, and freeze them."""
    encoders = nn.ModuleDict({name: getattr(pipe, name) for name in ENCODERS})
    path = keyed(cache / "words.pt", encoders, seed=seed, steps=WORD_STEPS)

    def trained() -> dict[str, Any]:
        train_words(pipe, WORD_STEPS, seed)
        return encoders.state_dict()

    encoders.load_state_dict(kept(path, trained))
    encoders.requires_grad_(False).eval()


def train_words(pipe: StableDiffusionXLPipeline, steps: int, seed: int) -> None:
    """Train both text encoders to represent the content of captions, as CLIP's do before SDXL.

    A linear classifier for each attribute must find its value, or that the caption omits it, in
    each of the three inputs of the UNet. Afterwards the classifiers are dropped. The encoders are
    frozen, since the UNet's first, noisy gradients would destroy what they learned.
    """
    torch.manual_seed(seed)
    encoders = nn.ModuleList([getattr(pipe, name) for name in ENCODERS]).train()
    classifiers = nn.ModuleList([
        nn.ModuleDict({
            name: nn.Linear(width["hidden_size"], len(values) + 1)
            for name, values in VALUES.items()
        })
        for width in (pocket_sdxl.TEXT_1, pocket_sdxl.TEXT_2, pocket_sdxl.TEXT_2)
    ])  # fmt: skip
    weights = [*encoders.parameters(), *classifiers.parameters()]
    optimiser = torch.optim.AdamW(weights, weight_decay=0.01, betas=(0.9, 0.99))
    rng = random.Random(seed)
    for step in (bar := tqdm(range(steps), "words", mininterval=10)):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, WORD_PEAK_RATE)
        shown = [imagine(rng) for _ in range(WORD_BATCH)]
        captions = [caption(scene, rng) for scene in shown]
        labels = {name: _labels(name, shown, captions) for name in VALUES}
        states = _end_states(pipe, [each.text for each in captions])
        marks = [
            _classification(classifier, state, labels)
            for classifier, state in zip(classifiers, states, strict=True)
        ]
        optimiser.zero_grad()
        loss = torch.stack([loss for loss, _ in marks]).sum()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        if step % 50 == 49:
            right = {name: min(each[name] for _, each in marks) for name in VALUES}
            worst = min(right, key=lambda name: right[name])
            bar.set_postfix(loss=f"{loss.item():.3f}", worst=f"{worst} {right[worst]:.2f}")


def _end_states(pipe: StableDiffusionXLPipeline, texts: list[str]) -> tuple[Tensor, ...]:
    """Both encoders' word states at the end token, which attends to all, and the pooled one."""
    ends: list[Tensor] = []
    for tokenizer, encoder in _encoders(pipe):
        tokens = _tokens(tokenizer, texts)
        output = encoder(tokens, output_hidden_states=True)
        end = (tokens == tokenizer.eos_token_id).int().argmax(1)
        ends.append(output.hidden_states[-2][torch.arange(len(end)), end])
    return ends[0], ends[1], output.text_embeds


def _classification(
    classifier: nn.ModuleDict, states: Tensor, labels: dict[str, Tensor]
) -> tuple[Tensor, dict[str, float]]:
    """The loss, and the share of right answers for each attribute."""
    answers = {name: classifier[name](states) for name in VALUES}
    loss = torch.stack([F.cross_entropy(answers[name], labels[name]) for name in VALUES]).sum()
    right = {
        name: (answer.argmax(1) == labels[name]).float().mean().item()
        for name, answer in answers.items()
    }
    # Keeps the states near one, independently of the classifiers' weights.
    return loss + 0.1 * (states.square().mean() - 1).square(), right


def _labels(name: str, shown: list[Scene], captions: list[Caption]) -> Tensor:
    """For each caption the index of the attribute's value, or the next one if it is omitted."""
    values = VALUES[name]
    numbers = [
        values.index(getattr(scene, name, True)) if name in caption.says else len(values)
        for scene, caption in zip(shown, captions, strict=True)
    ]
    return torch.tensor(numbers)


@torch.no_grad()
def encode(pipe: StableDiffusionXLPipeline, texts: list[str]) -> tuple[Tensor, Tensor]:
    """(batch, 77, width) word states of both encoders, and (batch, width) pooled ones, as SDXL's.

    The word states are the second-to-last hidden states.
    """
    states = []
    for tokenizer, encoder in _encoders(pipe):
        output = encoder(_tokens(tokenizer, texts), output_hidden_states=True)
        states.append(output.hidden_states[-2])
    return torch.cat(states, -1), output.text_embeds


def _encoders(pipe: StableDiffusionXLPipeline) -> tuple[tuple[CLIPTokenizer, Any], ...]:
    return (pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)


def _tokens(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    options = {"padding": "max_length", "max_length": 77, "truncation": True}
    return tokenizer(texts, **options, return_tensors="pt").input_ids
