"""An image classifier of transformers on the worker's device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from ourvidz_serverless.models.finite import check_finite
from ourvidz_serverless.models.memory.device import Device, translate_out_of_memory
from ourvidz_serverless.models.memory.ledger import ModelHandle
from ourvidz_serverless.models.safety import Picture

#: The most pictures in one forward: more than a job has, and about a second of a video's frames.
MAX_BATCH = 16

#: What a forward takes beside the weights until one was measured, in sizes of its input. It is
#: computed for ViT-B/16 at 384 pixels: a block's tokens, its MLP and its attention are about 17.
WORKING_FACTOR = 32


class ImageClassifier:
    """A checkpoint of `AutoModelForImageClassification`, with its own image processor."""

    def __init__(
        self, name: str, model: Any, processor: Any, device: Device, handle: ModelHandle
    ) -> None:
        self.name = name
        self._model, self._processor, self._device = model, processor, device
        self._handle = handle

    @property
    def labels(self) -> list[str]:
        """The labels in the order of the model's outputs."""
        names = self._model.config.id2label
        return [str(names[index]) for index in sorted(names)]

    def scores(
        self, pictures: Sequence[Picture], check: Callable[[], None] = lambda: None
    ) -> list[dict[str, float]]:
        """See `PictureClassifier`. Raises InternalError for scores that are no numbers."""
        images = [_as_image(each) for each in pictures]
        pixels = self._processor(images=images, return_tensors="pt")["pixel_values"]
        batches = pixels.to(self._model.dtype).split(MAX_BATCH)
        shape, expected = f"{len(batches[0])} pictures", WORKING_FACTOR * batches[0].nbytes
        rows: list[list[float]] = []
        with translate_out_of_memory(), self._handle.using(check, shape, expected) as lease:
            before = self._device.begin_stage()
            for batch in batches:
                check()
                rows += self._forward(batch)
            lease.measured_bytes = self._device.stage_peak_bytes(before)
        return [dict(zip(self.labels, row, strict=True)) for row in rows]

    def warm_up(self) -> None:
        """Classify a grey square."""
        self.scores([Image.new("RGB", (64, 64), "grey")])

    def _forward(self, pixels: torch.Tensor) -> list[list[float]]:
        with self._device.computing():
            logits = self._model(pixel_values=self._device.copy_to_device(pixels)).logits.float()
            scores = self._device.copy_to_host(_probabilities(logits, self._model.config))
        found: list[list[float]] = check_finite(scores, "the scores").tolist()
        return found


def _as_image(picture: Picture) -> Image.Image:
    if isinstance(picture, np.ndarray):
        return Image.fromarray(picture)
    return picture.convert("RGB")


def _probabilities(logits: torch.Tensor, config: Any) -> torch.Tensor:
    """Scores from 0 to 1. The labels exclude one another, unless the model says otherwise."""
    is_independent = config.problem_type == "multi_label_classification" or config.num_labels == 1
    return logits.sigmoid() if is_independent else logits.softmax(dim=-1)
