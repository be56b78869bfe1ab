"""UniPC (arXiv:2302.04867) without waits for the device.

diffusers' `UniPCMultistepScheduler` copies each number of its schedule to the device and solves its
small linear systems there, so the host waits for the device several times a step. Here these
numbers stay on the host, and only the latents' arithmetic runs on the device. On one device the
latents equal those of diffusers, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler

from ourvidz_serverless.models.memory.device import to_device_async


@dataclass(frozen=True, slots=True)
class _Update:
    """The numbers of one update from one sigma to another, all on the host.

    `scale` multiplies the sample, `outer` and `phi` the newest prediction. `ratios` are the
    distances to the older predictions, in units of this update. `system` (order, order) and
    `goal` (order) are the equations of the weights.
    """

    scale: torch.Tensor
    outer: torch.Tensor
    phi: torch.Tensor
    b_h: torch.Tensor
    ratios: Sequence[torch.Tensor]
    system: torch.Tensor
    goal: torch.Tensor


class HostUniPC(UniPCMultistepScheduler):
    """diffusers' UniPC, with its schedule on the host."""

    def multistep_uni_p_bh_update(
        self, model_output: torch.Tensor, *args: Any, sample: Any, order: int, **kwargs: Any
    ) -> torch.Tensor:
        """The predictor: the sample at the next sigma, from the newest `order` predictions."""
        now = self.step_index
        newest, *older = reversed(self.model_outputs[-order:])
        update = self._update(now + 1, [now - index for index in range(order)])
        differences = _differences(newest, older, update)
        moved = self._moved(update, sample, newest)
        if not differences:
            return moved.to(sample.dtype)
        # As the paper does: with two predictions the weight is about 0.5, whatever the steps.
        weights = torch.full((1,), 0.5)
        if order > 2:
            weights = torch.linalg.solve(update.system[:-1, :-1], update.goal[:-1])
        correction = _weighted_sum(weights.to(sample.dtype), differences)
        return (moved - update.outer * update.b_h * correction).to(sample.dtype)

    def multistep_uni_c_bh_update(
        self,
        this_model_output: torch.Tensor,
        *args: Any,
        last_sample: Any,
        this_sample: Any,
        order: int,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The corrector: `this_sample` again, now that its own prediction is known."""
        now = self.step_index
        newest, *older = reversed(self.model_outputs[-order:])
        update = self._update(now, [now - 1 - index for index in range(order)])
        differences = _differences(newest, older, update)
        weights = torch.full((1,), 0.5)
        if order > 1:
            weights = torch.linalg.solve(update.system, update.goal)
        weights = weights.to(last_sample.dtype)
        correction = weights[-1] * (this_model_output - newest)
        if differences:
            correction = _weighted_sum(weights[:-1], differences) + correction
        moved = self._moved(update, last_sample, newest)
        return (moved - update.outer * update.b_h * correction).to(last_sample.dtype)

    def _update(self, target: int, sources: Sequence[int]) -> _Update:
        """The update to the sigma of index `target`, from those of `sources`, the newest first."""
        alpha_t, sigma_t = self._sigma_to_alpha_sigma_t(self.sigmas[target])
        alpha_s, sigma_s = self._sigma_to_alpha_sigma_t(self.sigmas[sources[0]])
        log_snr = self._log_snr(sources[0])
        step = self._log_snr(target) - log_snr
        ratios = [(self._log_snr(index) - log_snr) / step for index in sources[1:]]
        hh = -step if self.predict_x0 else step
        phi = torch.expm1(hh)
        b_h = hh if self.config.solver_type == "bh1" else torch.expm1(hh)
        system, goal = _equations(torch.stack([*ratios, torch.ones(())]), hh, phi, b_h)
        scale = sigma_t / sigma_s if self.predict_x0 else alpha_t / alpha_s
        outer = alpha_t if self.predict_x0 else sigma_t
        return _Update(scale, outer, phi, b_h, ratios, system, goal)

    def _log_snr(self, index: int) -> torch.Tensor:
        alpha, sigma = self._sigma_to_alpha_sigma_t(self.sigmas[index])
        return torch.log(alpha) - torch.log(sigma)

    @staticmethod
    def _moved(update: _Update, sample: torch.Tensor, newest: torch.Tensor) -> torch.Tensor:
        return update.scale * sample - update.outer * update.phi * newest


def _equations(
    ratios: torch.Tensor, hh: torch.Tensor, phi: torch.Tensor, b_h: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The linear system of the weights: UniPC's equation for B(h)."""
    rows, goal, factorial, phi_k = [], [], 1, phi / hh - 1
    for power in range(len(ratios)):
        rows.append(torch.pow(ratios, power))
        goal.append(phi_k * factorial / b_h)
        factorial *= power + 2
        phi_k = phi_k / hh - 1 / factorial
    return torch.stack(rows), torch.stack(goal)


def _differences(
    newest: torch.Tensor, older: Sequence[torch.Tensor], update: _Update
) -> list[torch.Tensor]:
    return [(each - newest) / ratio for each, ratio in zip(older, update.ratios, strict=True)]


def _weighted_sum(weights: torch.Tensor, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    if len(tensors) == 1:
        return weights[0] * tensors[0]
    sent = to_device_async(weights, tensors[0].device)
    # One contraction, as diffusers' own, so that it rounds in the same way.
    summed: torch.Tensor = torch.einsum("k,bkc...->bc...", sent, torch.stack(list(tensors), dim=1))
    return summed
