"""Looks at the pictures of a job, before anything of them is delivered.

The references are looked at before the model computes. The pictures that a job makes are looked at
together, in one batch, and of a video the first frame, one a second, and the last. What happens
then is told in `docs/picture-check.md`: a picture that a rule `refuse` concerns is left out, and
every other refusal ends the job.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from ourvidz_serverless import logs, models
from ourvidz_serverless.context import JobContext
from ourvidz_serverless.errors import DeviceLost, InternalError
from ourvidz_serverless.guard import pictures
from ourvidz_serverless.guard.pictures import OF_ONE_PICTURE, Finding
from ourvidz_serverless.job import Job, Signs
from ourvidz_serverless.models.safety import Picture, PictureClassifier
from ourvidz_serverless.output import Output, Text, Video
from ourvidz_serverless.settings import Settings


class PictureCheck:
    """The check of one job. It runs in the job's thread, which holds no lease meanwhile."""

    def __init__(
        self,
        classifiers: Sequence[PictureClassifier],
        settings: Settings,
        job: Job,
        context: JobContext,
    ) -> None:
        self._classifiers, self._settings = classifiers, settings
        self._job, self._context = job, context
        self._references = Finding()
        self._lacks_consent = False
        self._audit: dict[str, Any] = {}

    def look_at_references(self, images: Mapping[str, Image.Image]) -> None:
        """Raise ContentRefused if one of the references, by role, is refused.

        A mask is not looked at: it says where to paint, and nothing of it is shown.
        """
        images = {role: image for role, image in images.items() if role != "mask"}
        if not images:
            return
        self._lacks_consent = self._context.needs_consent and not self._job.reference_consent
        findings = self._look(list(images.values()))
        self._references = pictures.together(findings)
        for role, found in zip(images, findings, strict=True):
            if rule := self._rule_of(role, found):
                raise pictures.refusal(rule, role)

    def passed(self, outputs: Iterator[Output | Text | Video]) -> Iterator[Output | Text | Video]:
        """The outputs that may be delivered. Raises ContentRefused if the job is refused.

        Pictures come when all of them are made. A video comes at once, and its frames do not end
        before they were looked at.
        """
        made: list[Output] = []
        for output in outputs:
            if isinstance(output, Output):
                made.append(output)
            elif isinstance(output, Video):
                yield self._watched(output)
            else:
                yield output
        yield from self._not_refused(made)

    def _not_refused(self, made: Sequence[Output]) -> list[Output]:
        findings = self._look([each.pixels for each in made])
        rules = [
            self._rule_of(str(each.index), found)
            for each, found in zip(made, findings, strict=True)
        ]
        for rule in rules:
            if rule not in (None, OF_ONE_PICTURE):
                raise pictures.refusal(rule)
        refused = [each.index for each, rule in zip(made, rules, strict=True) if rule]
        if refused and len(refused) == len(made):
            raise pictures.refusal(OF_ONE_PICTURE)
        if refused:
            self._context.metadata["refused"] = refused
            self._context.warnings.append(
                f"pictures: {len(refused)} of {len(made)} refused under the content policy"
            )
        return [
            replace(each, metadata={**each.metadata, **_marks(found)})
            for each, found in zip(made, findings, strict=True)
            if each.index not in refused
        ]

    def _watched(self, video: Video) -> Video:
        # A dict of this video's own: its marks are known when its file is nearly complete.
        metadata = dict(video.metadata)

        def look(frames: Sequence[np.ndarray]) -> None:
            found = pictures.together(self._look(frames))
            if rule := self._rule_of(str(video.index), found):
                raise pictures.refusal(rule)
            metadata.update(_marks(found))

        video.frames.inspector = Samples(video.fps, look)
        return replace(video, metadata=metadata)

    def _rule_of(self, name: str, found: Finding) -> str | None:
        """The rule by which a picture is refused, which the audit trail gets with its scores."""
        signs = self._context.signs or Signs()
        rule = pictures.judge(found, signs, self._references, self._lacks_consent)
        scores = {label: round(score, 3) for label, score in found.scores.items()}
        self._audit.setdefault("pictures", {})[name] = {"rule": rule, "scores": scores}
        return rule

    def _look(self, seen: Sequence[Picture]) -> list[Finding]:
        if not seen:
            return []
        self._audit["models"] = [each.name for each in self._classifiers]
        self._context.audit["safety"] = self._audit
        with self._context.stage("safety"):
            scores = self._scores(seen)
        if scores is None:
            return [Finding()] * len(seen)
        rules = self._settings.safety_rules
        return [pictures.find(rules, each) for each in zip(*scores, strict=True)]

    def _scores(self, seen: Sequence[Picture]) -> list[list[dict[str, float]]] | None:
        """Each classifier's scores of each picture; None if one failed, and the job may go on."""
        failure: Exception | None = None
        try:
            return [each.scores(seen, self._context.check) for each in self._classifiers]
        except Exception as exc:
            failure = self._failure(exc)
        # Not inside the `except`: there the traceback still pins the tensors.
        if failure:
            raise failure
        return None

    def _failure(self, error: Exception) -> Exception | None:
        """The error that ends a job whose pictures were not looked at; None if it may go on."""
        if stopped := self._context.stop_reason:
            return stopped
        if isinstance(lost := models.as_job_error(error), DeviceLost):
            return lost
        logs.bug(self._job.id, error)
        self._audit["failed"] = True
        if self._may_fail:
            self._context.warnings.append("pictures: no classifier has looked at them")
            return None
        return InternalError("a classifier of pictures failed, so that nothing was delivered")

    @property
    def _may_fail(self) -> bool:
        """Whether pictures that nobody looked at are delivered.

        In a sexual job they are not, if the operator requires a classifier.
        """
        signs = self._context.signs or Signs()
        is_required = self._settings.require_safety_model and signs.sexual
        return self._settings.safety_fail_open and not is_required


class Samples:
    """An `Inspector` of a video's frames: it keeps the first, one a second, and the last."""

    def __init__(self, fps: int, look: Callable[[Sequence[np.ndarray]], None]) -> None:
        self._fps, self._look = fps, look
        self._count = 0
        self._kept: list[np.ndarray] = []
        self._last_piece: np.ndarray | None = None

    def see(self, piece: np.ndarray) -> None:
        for frame in piece:
            if self._count % self._fps == 0:
                # A copy, so that the rest of its piece is freed.
                self._kept.append(frame.copy())
            self._count += 1
        self._last_piece = piece

    def end(self) -> None:
        is_last_kept = (self._count - 1) % self._fps == 0
        if self._last_piece is not None and not is_last_kept:
            self._kept.append(self._last_piece[-1])
        self._look(self._kept)


def _marks(found: Finding) -> dict[str, Any]:
    return {"marks": list(found.marks)} if found.marks else {}
