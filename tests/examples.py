"""How many examples a property test tries: a hundred, and with `HYPOTHESIS_PROFILE=deep` 2,000."""

import os

import hypothesis

PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "usual")

#: The examples of each profile, by the number of the usual ones.
FACTORS = {"usual": 1, "deep": 20}
if PROFILE not in FACTORS:
    raise ValueError(f"HYPOTHESIS_PROFILE: {PROFILE} is none of {', '.join(FACTORS)}")


def load_profile() -> None:
    """Load the profile that `HYPOTHESIS_PROFILE` names.

    The time of an example depends on the machine, so it has no deadline.
    """
    for name, factor in FACTORS.items():
        hypothesis.settings.register_profile(
            name,
            max_examples=100 * factor,
            deadline=None,
            suppress_health_check=[hypothesis.HealthCheck.too_slow],
        )
    hypothesis.settings.load_profile(PROFILE)


def examples(count: int, **others: object) -> hypothesis.settings:
    """The settings of a test that tries `count` examples in the usual profile."""
    return hypothesis.settings(max_examples=count * FACTORS[PROFILE], **others)  # type: ignore[arg-type]
