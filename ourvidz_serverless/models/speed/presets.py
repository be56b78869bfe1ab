"""The presets of `config.speed`, and the count of forwards that a preset saved.

`exact` uses nothing of this: what is always on changes no pixel, or only the last bits of one. The
other presets trade similarity to `exact` for forwards that are skipped, or are smaller. Their
values were chosen by their effect on the pocket models, see `docs/speed.md`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class SpeedPreset:
    """What a preset may skip or replace.

    `deep_cache_interval`: SDXL's UNet computes its deep blocks at one step in so many (DeepCache,
    arXiv:2312.00858), after the first steps.
    `warmup_share`: the share of those first steps, in which an image's layout is decided.
    `first_block_threshold`: WAN skips its other blocks if the first one changed by less than this
    share (first-block caching, a simple form of TeaCache, arXiv:2411.19108, whose authors take
    0.05 to 0.08 for WAN's 1.3B networks); 0 never skips.
    `vae_bf16`: an SDXL VAE for which fp16 is too narrow decodes in bf16 instead of fp32.
    `tiny_vae`: a tiny VAE decodes, if the deployer has set one; this comes before `vae_bf16`.
    """

    deep_cache_interval: int = 1
    warmup_share: float = 0.0
    first_block_threshold: float = 0.0
    vae_bf16: bool = False
    tiny_vae: bool = False

    def warmup_steps(self, steps: int) -> int:
        """How many of the steps, the first ones, skip nothing."""
        return math.ceil(self.warmup_share * steps)


EXACT = SpeedPreset()

SDXL = {
    "exact": EXACT,
    "balanced": SpeedPreset(deep_cache_interval=2, warmup_share=0.2, vae_bf16=True),
    "fast": SpeedPreset(deep_cache_interval=4, warmup_share=0.2, vae_bf16=True, tiny_vae=True),
}
WAN = {
    "exact": EXACT,
    "balanced": SpeedPreset(first_block_threshold=0.08),
    "fast": SpeedPreset(first_block_threshold=0.15),
}


@dataclass(slots=True)
class ForwardStats:
    """Counts of forwards of the denoising network. A guided step has two.

    `full` forwards computed the whole network, `shallow` ones only a part of it.
    """

    full: int = 0
    shallow: int = 0

    def count(self, forwards: int, is_full: bool) -> None:
        if is_full:
            self.full += forwards
        else:
            self.shallow += forwards

    def add(self, other: ForwardStats) -> None:
        self.full += other.full
        self.shallow += other.shallow

    def report(self, preset: str, decoder: str | None = None) -> dict[str, Any]:
        """The document's `metadata.speed`: the preset, the levers that acted, and the forwards.

        `decoder` is the lever that decoded the result, if any did.
        """
        return {
            "preset": preset,
            "levers": ["step_cache"] * bool(self.shallow) + [decoder] * bool(decoder),
            "forwards": self.full,
            "shallow_forwards": self.shallow,
            "plain_forwards": self.full + self.shallow,
        }
