"""Classifiers that look at pictures. Only `loader` and `classifier` import torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from PIL import Image

#: A picture from outside, or pixels that a model made: uint8, shape (height, width, 3).
Picture = Image.Image | np.ndarray


class PictureClassifier(Protocol):
    """A classifier in the worker's ledger."""

    @property
    def name(self) -> str:
        """The model and its revision, for the audit trail."""

    def scores(
        self, pictures: Sequence[Picture], check: Callable[[], None]
    ) -> list[dict[str, float]]:
        """The score of each label, from 0 to 1, for each picture.

        `check` raises the error of a job that must stop. Every other error means that the pictures
        were not looked at.
        """
