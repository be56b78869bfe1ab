"""Where a job of inpainting makes latents anew.

A UNet of four channels knows of no mask: after each step the loop puts the picture's own latents
back, with the noise of that step (arXiv:2201.09865, and diffusers' inpainting pipelines). A UNet of
nine channels reads the mask, and the picture without what the mask hides, in every step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class LatentMask:
    """`cells` (1, 1, height / 8, width / 8) are 1 where latents are made anew, and 0 elsewhere.

    `visible` (1, 4, height / 8, width / 8) are the latents of the picture without what the mask
    hides, for a UNet that reads the mask; else None.
    """

    cells: torch.Tensor
    visible: torch.Tensor | None = None

    def beside(self, rows: torch.Tensor) -> torch.Tensor:
        """The UNet's rows, with the mask and the visible picture as further channels."""
        if self.visible is None:
            return rows
        further = torch.cat([self.cells, self.visible], dim=1)
        return torch.cat([rows, further.expand(len(rows), -1, -1, -1)], dim=1)


def cells_of(repainted: np.ndarray, factor: int) -> torch.Tensor:
    """The cells (1, 1, height / factor, width / factor) that hold a repainted pixel, as 1.0.

    diffusers looks at one pixel of each cell, and so loses a thin line.
    """
    pixels = torch.from_numpy(repainted)[None, None].float()
    return torch.nn.functional.max_pool2d(pixels, factor)
