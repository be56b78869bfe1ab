"""Shared by all trainings: the learning rate, the running average and checkpoints.

`learn` trains a network on pictures with one loss. The names of files that are kept from run to run
have a digest of their inputs (`keyed`): a run with another seed, another number of steps or other
networks does not find them and makes its own.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

Network = TypeVar("Network", bound=nn.Module)


def learn(
    network: Network,
    path: Path,
    batches: Callable[[int], Iterable[Tensor]],
    loss_of: Callable[[Tensor], tuple[Tensor, float]],
    steps: int,
    peak: float,
    name: str,
) -> Network:
    """The running average of the network, trained from the checkpoint at `path` to the last step.

    `batches(step)` gives the batches from that step on. `loss_of(batch)` gives the loss and the
    mean error of pixels, which are from -1 to 1.
    """
    ema = deepcopy(network).requires_grad_(False)
    optimiser = torch.optim.AdamW(network.parameters(), weight_decay=0.0, betas=(0.9, 0.99))
    start = resume(path, network, ema, optimiser)
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=10)
    for step, pixels in zip(bar, batches(start), strict=False):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        loss, error = loss_of(pixels)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        average(ema, network, step)
        if step % 100 == 99:
            bar.set_postfix(loss=f"{loss.item():.4f}", grey_levels=f"{error * 127.5:.2f}")
        if step % 500 == 499 or step + 1 == steps:
            checkpoint(path, step + 1, network, ema, optimiser)
    return ema


def learning_rate(step: int, steps: int, peak: float) -> float:
    """A short warm-up, then a cosine down to a fiftieth of the peak."""
    warm = min(1.0, (step + 1) / 100)
    done = min(1.0, step / steps)
    return peak * warm * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * done)))


def average(ema: nn.Module, model: nn.Module, step: int) -> None:
    """Update the running average of the weights. It decays faster in the first steps."""
    decay = min(0.999, (1 + step) / (10 + step))
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def keyed(path: Path, *networks: nn.Module, **facts: Any) -> Path:
    """The path, with a digest of the networks' weights and of the facts in its name.

    Facts are JSON values, such as a seed or a number of steps.
    """
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for network in networks:
        for name, weight in sorted(network.state_dict().items()):
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)};".encode())
            data = weight.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(data.numpy().tobytes())
    return path.with_stem(f"{path.stem}-{digest.hexdigest()[:16]}")


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """The value stored at a path. If there is none, it is made and stored."""
    if not path.exists():
        _save(make(), path)
    return torch.load(path, weights_only=True)


def _save(state: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)


def checkpoint(
    path: Path, step: int, model: nn.Module, ema: nn.Module, optimiser: torch.optim.Optimizer
) -> None:
    state = {
        "step": step,
        "model": model.state_dict(),
        "ema": ema.state_dict(),
        "optimiser": optimiser.state_dict(),
    }
    _save(state, path)


def resume(path: Path, model: nn.Module, ema: nn.Module, optimiser: torch.optim.Optimizer) -> int:
    """Restore the checkpoint at `path`. The value is its number of steps, 0 without one."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    ema.load_state_dict(state["ema"])
    optimiser.load_state_dict(state["optimiser"])
    return int(state["step"])
