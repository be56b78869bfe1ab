"""The presets of `config.speed`, in levers, and an account of what they did to a job.

`exact` pulls none of them: what is always on changes no pixel, or the last bits of one. The others
trade likeness to it for forwards that are left out, or are smaller:

    guided       the last steps add detail, for which guidance does little (arXiv:2404.07724)
    deep_every   DeepCache (arXiv:2312.00858) computes a UNet's deep blocks at each 2nd to 5th step
    settled      not before the first steps, in which a picture's layout is decided
    threshold    first-block caching, a simple form of TeaCache (arXiv:2411.19108), whose authors
                 take 0.05 to 0.08 for WAN's 1.3B networks
    fp8          transformer blocks multiply in 8 bits (`models.fp8`), where `FP8` lets them
    vae_bf16     a VAE that fp16 is too narrow for decodes in bf16 instead of fp32
    tiny_vae     a tiny VAE decodes, where the deployer has set one

The presets' values were chosen by what each lever does to the pocket models: `docs/speed.md`. No
preset pulls `guided`, which costs the most likeness for what it saves there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Levers:
    """`guided` is the share of steps, the first ones, that are guided. `deep_every` is at how many
    steps once the UNet's deep blocks are computed, after the share of steps that is `settled`, in
    which they all are, and `threshold` how little the first block's doing
    must have changed for WAN's other blocks to be left out; 0 never leaves them out. `vae_bf16` and
    `tiny_vae` say by what SDXL may decode, the latter first (`models.decoders`), `fp8` whether
    transformer blocks multiply in it.
    """

    guided: float = 1.0
    deep_every: int = 1
    settled: float = 0.0
    threshold: float = 0.0
    fp8: bool = False
    vae_bf16: bool = False
    tiny_vae: bool = False

    def guided_steps(self, steps: int) -> int:
        """How many of the steps are guided: at least one."""
        return max(math.ceil(self.guided * steps), 1)

    def within(self, *, fp8: bool) -> Levers:
        """The same, with fp8 only where that is allowed."""
        return replace(self, fp8=self.fp8 and fp8)

    def settled_steps(self, steps: int) -> int:
        """How many of the steps, the first ones, leave nothing out."""
        return math.ceil(self.settled * steps)


EXACT = Levers()

SDXL = {
    "exact": EXACT,
    "balanced": Levers(deep_every=2, settled=0.2, vae_bf16=True),
    "fast": Levers(deep_every=4, settled=0.2, vae_bf16=True, tiny_vae=True, fp8=True),
}
#: No `guided` here: WAN's steps are long at the end, and there it costs much for little.
WAN = {
    "exact": EXACT,
    "balanced": Levers(threshold=0.08),
    "fast": Levers(threshold=0.15, fp8=True),
}

#: Hears what a preset did, where it is not `exact`.
Sped = Callable[[Mapping[str, Any]], None]


@dataclass(slots=True)
class Tally:
    """Forwards of the denoising network, where a guided step has two.

    `whole` ones were computed, `shallow` ones by a part of the network, and `left_out` those of
    unguided steps that would have been guided; `in_fp8` is how many of those computed were in it.
    """

    whole: int = 0
    shallow: int = 0
    left_out: int = 0
    in_fp8: int = 0

    def count(self, forwards: int, is_whole: bool, left_out: int = 0, is_fp8: bool = False) -> None:
        self.left_out += left_out
        self.in_fp8 += forwards if is_fp8 else 0
        if is_whole:
            self.whole += forwards
        else:
            self.shallow += forwards

    def add(self, other: Tally) -> None:
        self.whole += other.whole
        self.shallow += other.shallow
        self.left_out += other.left_out
        self.in_fp8 += other.in_fp8

    def report(self, preset: str, decoder: str | None = None) -> dict[str, Any]:
        """What the caller is told: the preset, the levers that acted, and the forwards.

        `decoder` is the lever by which the result is decoded, if that is by any.
        """
        acted = {
            "guidance_cutoff": self.left_out,
            "step_cache": self.shallow,
            "fp8": self.in_fp8,
        }
        return {
            "preset": preset,
            "levers": [name for name, times in acted.items() if times] + [decoder] * bool(decoder),
            "forwards": self.whole,
            "shallow_forwards": self.shallow,
            "plain_forwards": self.whole + self.shallow + self.left_out,
        }
