"""What the operator's rules say of a picture, from the scores that classifiers give its labels.

A rule of `SAFETY_RULES` names labels and what they mean if they score at least its threshold:

    refuse             the picture is not delivered
    refuse_if_sexual   not if the job or the picture is sexual: a sign of a minor, for example
    sexual             the picture is sexual, and the asset is marked
    mark               the asset is marked

The signs of a picture and those of its job's texts and references add up, as those of texts do in
`content_floor`. This module is pure: it reads and writes nothing, and it sees no picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ourvidz_serverless.errors import ContentRefused
from ourvidz_serverless.job import Signs
from ourvidz_serverless.setting_checks import SafetyRule

#: The rule that concerns one picture alone. Every other one concerns all pictures of a job.
OF_ONE_PICTURE = "refuse"


@dataclass(frozen=True, slots=True)
class Finding:
    """What the rules found in a picture, or in several together.

    `marks` are the labels that the caller is told. `scores` has the labels that rules name.
    """

    is_refused: bool = False
    is_refused_if_sexual: bool = False
    is_sexual: bool = False
    marks: tuple[str, ...] = ()
    scores: Mapping[str, float] = field(default_factory=dict)


def find(rules: Sequence[SafetyRule], scores: Sequence[Mapping[str, float]]) -> Finding:
    """What the rules find in a picture, to which each classifier gave scores by label.

    The scores of the labels of one rule add up, classifier by classifier; the highest sum counts.
    """
    by_label = [{label.lower(): score for label, score in each.items()} for each in scores]
    matching = [
        rule
        for rule in rules
        if any(
            sum(each.get(label, 0.0) for label in rule.labels) >= rule.threshold
            for each in by_label
        )
    ]
    actions = {rule.action for rule in matching}
    told = [rule.name for rule in matching if rule.action in ("sexual", "mark")]
    named = {label for rule in rules for label in rule.labels}
    return Finding(
        is_refused="refuse" in actions,
        is_refused_if_sexual="refuse_if_sexual" in actions,
        is_sexual="sexual" in actions,
        marks=tuple(dict.fromkeys(told)),
        scores=_highest(
            {label: score for label, score in each.items() if label in named} for each in by_label
        ),
    )


def together(findings: Iterable[Finding]) -> Finding:
    """What was found in any of several pictures, such as the frames of a video."""
    all_findings = list(findings)
    return Finding(
        any(each.is_refused for each in all_findings),
        any(each.is_refused_if_sexual for each in all_findings),
        any(each.is_sexual for each in all_findings),
        tuple(dict.fromkeys(mark for each in all_findings for mark in each.marks)),
        _highest(each.scores for each in all_findings),
    )


def _highest(scores: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The highest score of each label."""
    found: dict[str, float] = {}
    for each in scores:
        for label, score in each.items():
            found[label] = max(score, found.get(label, 0.0))
    return found


def judge(
    found: Finding, signs: Signs, references: Finding = Finding(), lacks_consent: bool = False
) -> str | None:
    """The rule by which a picture is refused; None if it passes.

    `signs` are those of the job's texts. `references` is what was found in its references.
    `lacks_consent`: the job has a reference, and nobody declared that the person in it agreed.
    """
    if found.is_refused:
        return OF_ONE_PICTURE
    is_sexual = found.is_sexual or references.is_sexual
    is_suspect = found.is_refused_if_sexual or references.is_refused_if_sexual
    if is_suspect and (is_sexual or signs.sexual):
        return "refuse_if_sexual"
    if is_sexual and signs.minor:
        return "minor+sexual"
    if is_sexual and lacks_consent:
        return "consent"
    return None


def refusal(rule: str, role: str | None = None) -> ContentRefused:
    """The error that ends a job by a rule; `role` is that of a refused reference.

    It names no label.
    """
    if rule == "consent":
        return ContentRefused(
            "content policy: metadata.reference_consent must be true beside a reference image, "
            "since a picture of this job is sexual"
        )
    what = f"{role}: refused" if role else "refused"
    return ContentRefused(f"{what} under the content policy (picture rule {rule})")
