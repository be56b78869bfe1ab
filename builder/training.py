"""Shared by all trainings: the optimiser, the learning rate, the running average and checkpoints.

`learn` trains a network on pictures with one loss. The names of files that are kept from run to run
have a digest of their inputs (`keyed`): a run with another seed, another number of steps or other
networks does not find them and makes its own.
"""

import hashlib
import json
import math
import os
import shutil
import socket
from collections.abc import Callable, Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, multiprocessing, nn
from tqdm import tqdm

Network = TypeVar("Network", bound=nn.Module)

MOMENTUM = 0.95
#: The last share of the steps, in which the learning rate of `rate_share` falls.
DECAY = 0.3
NEWTON_SCHULZ_STEPS = 4


def learn(
    network: Network,
    path: Path,
    batches: Callable[[int], Iterable[Any]],
    loss_of: Callable[[Any], tuple[Tensor, float]],
    steps: int,
    peak: float,
    name: str,
    optimiser: "torch.optim.Optimizer | Optimisers | None" = None,
) -> Network:
    """The running average of the network, trained from the checkpoint at `path` to the last step.

    `batches(step)` gives the batches from that step on. `loss_of(batch)` gives the loss and the
    mean error of pixels, which are from -1 to 1. The optimiser is AdamW unless one is given.
    """
    ema = deepcopy(network).requires_grad_(False)
    if optimiser is None:
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
        if step % 200 == 199 or step + 1 == steps:
            checkpoint(path, step + 1, network, ema, optimiser)
    return ema


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: for matrices and for kernels, which are flattened to matrices.

    Keller Jordan's Muon (https://kellerjordan.github.io/posts/muon/) with the step of
    arXiv:2502.16982, so that one learning rate serves it and AdamW. `torch.optim.Muon` takes
    matrices only, one by one; here those of one shape are orthogonalised together.
    """

    def __init__(self, weights: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.01):
        super().__init__(list(weights), {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            directions = self._directions(weights)
            for weight, direction in zip(weights, directions, strict=True):
                scale = 0.2 * math.sqrt(max(direction.shape)) * group["lr"]
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(direction.view_as(weight), alpha=-scale)

    def _directions(self, weights: list[nn.Parameter]) -> list[Tensor]:
        """The orthogonalised momentum (Nesterov's) of each weight, as a matrix."""
        alike: dict[torch.Size, list[int]] = {}
        momenta = []
        for index, weight in enumerate(weights):
            momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
            momentum.lerp_(weight.grad, 1 - MOMENTUM)
            momenta.append(weight.grad.lerp(momentum, MOMENTUM).reshape(len(weight), -1))
            alike.setdefault(momenta[-1].shape, []).append(index)
        for indices in alike.values():
            together = orthogonal(torch.stack([momenta[index] for index in indices]))
            for index, direction in zip(indices, together, strict=True):
                momenta[index] = direction
        return momenta


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices with the same singular vectors and singular values near one, by Newton-Schulz."""
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    x = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x if wide is matrices else x.mT


class Optimisers:
    """Several optimisers, used as one."""

    def __init__(self, *each: torch.optim.Optimizer):
        self.each = each

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimiser in self.each for group in optimiser.param_groups]

    def zero_grad(self) -> None:
        for optimiser in self.each:
            optimiser.zero_grad()

    def step(self) -> None:
        for optimiser in self.each:
            optimiser.step()

    def state_dict(self) -> dict[str, Any]:
        return {str(index): each.state_dict() for index, each in enumerate(self.each)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for index, optimiser in enumerate(self.each):
            optimiser.load_state_dict(state[str(index)])


def muon(network: nn.Module, plain: tuple[str, ...], weight_decay: float = 0.01) -> Optimisers:
    """Muon for the network's matrices and kernels; AdamW for the rest.

    The rest are vectors and the layers whose names begin with one of `plain`: the first and the
    last layers and the embeddings.
    """
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, weight in network.named_parameters():
        if weight.requires_grad:
            (matrices if weight.ndim >= 2 and not name.startswith(plain) else others).append(weight)
    adam = torch.optim.AdamW(others, weight_decay=weight_decay, betas=(0.9, 0.99))
    return Optimisers(Muon(matrices, 1e-3, weight_decay), adam)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """A short warm-up, then a cosine down to a fiftieth of the peak."""
    warm = min(1.0, (step + 1) / 100)
    done = min(1.0, step / steps)
    return peak * warm * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * done)))


def rate_share(step: int, steps: int) -> float:
    """The share of the peak learning rate: a warm-up, a long level, then down to zero.

    On the level (arXiv:2404.06395) nothing depends on the number of steps, so that a training can
    be made longer or shorter.
    """
    return min(1.0, (step + 1) / 100, (steps - step) / (DECAY * steps))


def in_processes(count: int, function: Callable[..., None], *arguments: Any) -> None:
    """Call the function in so many processes of one thread, which `average_gradients` joins."""
    if count == 1:
        function(*arguments)
        return
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", str(_free_port())
    multiprocessing.spawn(_join, (count, function, arguments), nprocs=count)


def _join(number: int, count: int, function: Callable[..., None], arguments: Any) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=number, world_size=count)
    function(*arguments)
    distributed.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def rank() -> tuple[int, int]:
    """This process's number, and how many there are."""
    if not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def average_gradients(model: nn.Module) -> None:
    """Give every process the mean of all processes' gradients."""
    if not distributed.is_initialized():
        return
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def average(ema: nn.Module, model: nn.Module, step: int, most: float = 0.999) -> None:
    """Update the running average of the weights. It decays faster in the first steps."""
    decay = min(most, (1 + step) / (10 + step))
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
    path: Path,
    step: int,
    model: nn.Module,
    ema: nn.Module,
    optimiser: "torch.optim.Optimizer | Optimisers",
) -> None:
    state = {
        "step": step,
        "model": model.state_dict(),
        "ema": ema.state_dict(),
        "optimiser": optimiser.state_dict(),
    }
    _save(state, path)


def keep_level(path: Path) -> None:
    """Copy the checkpoint beside it, as `.level`: a longer training can continue from there."""
    shutil.copyfile(path, path.with_suffix(".level"))


def resume(
    path: Path, model: nn.Module, ema: nn.Module, optimiser: "torch.optim.Optimizer | Optimisers"
) -> int:
    """Restore the checkpoint at `path`. The value is its number of steps, 0 without one."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    ema.load_state_dict(state["ema"])
    optimiser.load_state_dict(state["optimiser"])
    return int(state["step"])
