"""The rules for pictures: which picture is refused, and by which rule."""

import pytest
from pydantic import ValidationError

from ourvidz_serverless.guard import pictures
from ourvidz_serverless.guard.pictures import Finding
from ourvidz_serverless.job import Signs
from ourvidz_serverless.settings import Settings

#: Labels that no refusal may show.
LABELS = "gore:refuse:0.8,teen|child:refuse_if_sexual:0.4,nude:sexual,crowd:mark:0.3"
RULES = Settings(safety_rules=LABELS).safety_rules

SEXUAL, MINOR, NEITHER = Signs(sexual=True), Signs(minor=True), Signs()


def find(*scores: dict[str, float]) -> Finding:
    return pictures.find(RULES, scores)


@pytest.mark.parametrize(
    ("scores", "signs", "rule"),
    [
        ({"gore": 0.79}, SEXUAL, None),
        ({"gore": 0.8}, NEITHER, "refuse"),
        ({"child": 0.9}, NEITHER, None),
        ({"child": 0.9}, SEXUAL, "refuse_if_sexual"),
        ({"child": 0.9, "nude": 0.6}, NEITHER, "refuse_if_sexual"),
        ({"nude": 0.6}, NEITHER, None),
        ({"nude": 0.6}, MINOR, "minor+sexual"),
        ({"crowd": 1.0}, SEXUAL, None),
        ({"other": 1.0}, SEXUAL, None),
    ],
)
def test_a_picture_is_refused_by_its_scores_and_the_signs_of_its_jobs_texts(
    scores: dict[str, float], signs: Signs, rule: str | None
) -> None:
    assert pictures.judge(find(scores), signs) == rule


def test_a_sign_in_a_reference_counts_beside_one_in_the_result() -> None:
    child, nude = find({"child": 0.9}), find({"nude": 0.9})

    assert pictures.judge(nude, NEITHER, references=child) == "refuse_if_sexual"
    assert pictures.judge(child, NEITHER, references=nude) == "refuse_if_sexual"
    assert pictures.judge(find({}), NEITHER, references=child) is None


def test_a_sexual_picture_beside_a_reference_needs_consent() -> None:
    assert pictures.judge(find({"nude": 0.9}), NEITHER, lacks_consent=True) == "consent"
    assert pictures.judge(find({"crowd": 0.9}), NEITHER, lacks_consent=True) is None


def test_the_scores_of_a_rules_labels_add_up_within_each_classifier() -> None:
    assert find({"child": 0.3, "teen": 0.2}).is_refused_if_sexual
    assert not find({"child": 0.3}, {"teen": 0.2}).is_refused_if_sexual
    assert find({"child": 0.3, "other": 1.0}, {"child": 0.35}).scores == {"child": 0.35}


def test_labels_match_in_any_case() -> None:
    assert find({"NUDE": 0.9}).is_sexual


def test_the_frames_of_a_video_are_judged_together() -> None:
    frames = pictures.together([find({"child": 0.9}), find({"nude": 0.7}), find({"nude": 0.6})])

    assert pictures.judge(frames, NEITHER) == "refuse_if_sexual"
    assert frames.scores == {"child": 0.9, "nude": 0.7}
    assert frames.marks == ("nude",)


def test_sexual_and_marked_pictures_tell_their_labels_and_refusals_tell_none() -> None:
    assert find({"nude": 0.5, "crowd": 0.3, "gore": 0.9}).marks == ("nude", "crowd")
    for rule in ("refuse", "refuse_if_sexual", "minor+sexual", "consent"):
        message = pictures.refusal(rule, "reference").message
        assert "content policy" in message
        assert not any(label in message for label in ("gore", "teen", "child", "nude"))


@pytest.mark.parametrize(
    "rules",
    ["nude", "nude:ban", "nude:mark:0", "nude:mark:1.5", "nude:mark:x", ":mark", "a||b:mark"],
)
def test_a_rule_that_cannot_be_read_is_refused(rules: str) -> None:
    with pytest.raises(ValidationError, match="LABEL:ACTION:THRESHOLD"):
        Settings(safety_rules=rules)


def test_a_rule_may_have_blanks_and_labels_with_colons() -> None:
    (rule,) = Settings(safety_rules=" More than 70 | a:b|0-2 : mark : .25 ").safety_rules

    assert (rule.labels, rule.action, rule.threshold) == (
        ("more than 70", "a:b", "0-2"),
        "mark",
        0.25,
    )
    assert str(rule) == "more than 70|a:b|0-2:mark:0.25"
