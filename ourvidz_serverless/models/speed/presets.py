"""The presets of `config.speed`, in levers, and an account of what they did to a job.

`exact` pulls none of them: what is always on changes no pixel, or the last bits of one. The others
trade likeness to it for forwards that are left out, or are smaller:

    deep_every   DeepCache (arXiv:2312.00858) computes a UNet's deep blocks at each 2nd to 5th step
    settled      not before the first steps, in which a picture's layout is decided
    threshold    first-block caching, a simple form of TeaCache (arXiv:2411.19108), whose authors
                 take 0.05 to 0.08 for WAN's 1.3B networks
    vae_bf16     a VAE that fp16 is too narrow for decodes in bf16 instead of fp32
    tiny_vae     a tiny VAE decodes, where the deployer has set one

The presets' values were chosen by what each lever does to the pocket models: `docs/speed.md`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Levers:
    """`deep_every` is at how many steps once the UNet's deep blocks are computed, after the share
    of steps that is `settled`, in which they all are, and `threshold` how little the first block's
    doing must have changed for WAN's other blocks to be left out; 0 never leaves them out.
    `vae_bf16` and `tiny_vae` say by what SDXL may decode, the latter first (`models.sdxl.vae`).
    """

    deep_every: int = 1
    settled: float = 0.0
    threshold: float = 0.0
    vae_bf16: bool = False
    tiny_vae: bool = False

    def settled_steps(self, steps: int) -> int:
        """How many of the steps, the first ones, leave nothing out."""
        return math.ceil(self.settled * steps)


EXACT = Levers()

SDXL = {
    "exact": EXACT,
    "balanced": Levers(deep_every=2, settled=0.2, vae_bf16=True),
    "fast": Levers(deep_every=4, settled=0.2, vae_bf16=True, tiny_vae=True),
}
WAN = {"exact": EXACT, "balanced": Levers(threshold=0.08), "fast": Levers(threshold=0.15)}

#: Hears what a preset did, where it is not `exact`.
Sped = Callable[[Mapping[str, Any]], None]


@dataclass(slots=True)
class Tally:
    """Forwards of the denoising network, where a guided step has two.

    `whole` ones were computed, and `shallow` ones by a part of the network.
    """

    whole: int = 0
    shallow: int = 0

    def count(self, forwards: int, is_whole: bool) -> None:
        if is_whole:
            self.whole += forwards
        else:
            self.shallow += forwards

    def add(self, other: Tally) -> None:
        self.whole += other.whole
        self.shallow += other.shallow

    def report(self, preset: str, decoder: str | None = None) -> dict[str, Any]:
        """What the caller is told: the preset, the levers that acted, and the forwards.

        `decoder` is the lever by which the result is decoded, if that is by any.
        """
        return {
            "preset": preset,
            "levers": ["step_cache"] * bool(self.shallow) + [decoder] * bool(decoder),
            "forwards": self.whole,
            "shallow_forwards": self.shallow,
            "plain_forwards": self.whole + self.shallow,
        }
