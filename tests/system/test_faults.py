"""Each dependency in each kind of trouble: how often it is tried, and how the job ends.

The exact numbers of tries are those that docs/reliability.md promises.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ourvidz_serverless.delivery.callback import webhook_id
from ourvidz_serverless.net.retries import Retry
from tests.faults import DEPENDENCIES, Outcome, World, policy, world
from tests.files import ROOT
from tests.servers.broken_proxy import FAULTS, Fault
from tests.servers.s3 import SeaweedServer

PAGE = ROOT / "docs/reliability.md"

#: Faults after which the very next try may go well, and does so at once.
PASSING: tuple[Fault, ...] = ("reset", "5xx", "garbage", "lost")

STORES = [name for name in DEPENDENCIES if name.startswith("storage")]


@pytest.fixture(scope="module")
def these(tmp_path_factory: pytest.TempPathFactory, s3: SeaweedServer) -> Iterator[World]:
    with world(tmp_path_factory.mktemp("world"), s3) as servers:
        yield servers


def promised() -> dict[tuple[str, str], int]:
    """The tries by dependency and fault, off the page."""
    rows = re.findall(r"^\| (.+?) \|((?: \d \|){8})$", PAGE.read_text(), re.MULTILINE)
    return {
        (name, fault): int(tries)
        for name, row in rows
        for fault, tries in zip(FAULTS, row.replace("|", "").split(), strict=True)
    }


def test_the_page_has_every_dependency_under_every_fault() -> None:
    assert set(promised()) == {(name, fault) for name in DEPENDENCIES for fault in FAULTS}


def code(outcome: Outcome) -> str | None:
    return outcome.document.failure.code if outcome.document.failure else None


# --- a fault that stays ---


@pytest.mark.parametrize("fault", FAULTS)
def test_a_reference_that_cannot_be_had_is_left_out_with_a_warning(
    these: World, fault: Fault
) -> None:
    outcome = these.reference([fault], policy(fault))

    assert outcome.tries == promised()["reference host", fault]
    assert (code(outcome), outcome.document.metadata["reference_mode"]) == (None, "none")
    assert len(outcome.document.metadata["warnings"]) == 1


@pytest.mark.parametrize("fault", FAULTS)
def test_a_required_reference_that_cannot_be_had_ends_the_job(these: World, fault: Fault) -> None:
    outcome = these.reference([fault], policy(fault), required=True)

    assert outcome.tries == promised()["reference host", fault]
    assert (code(outcome), outcome.document.assets) == ("REFERENCE_FRAME_ERROR", ())


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("store", STORES)
def test_an_asset_that_cannot_be_stored_ends_the_job(
    these: World, store: str, fault: Fault
) -> None:
    outcome = DEPENDENCIES[store](these, [fault], policy(fault))

    assert outcome.tries == promised()[store, fault]
    assert (code(outcome), outcome.document.assets) == ("UPLOAD_ERROR", ())
    assert outcome.document.failure is not None
    assert outcome.document.failure.retryable


@pytest.mark.parametrize("fault", FAULTS)
def test_a_document_that_cannot_be_delivered_is_kept_and_the_job_is_done(
    these: World, fault: Fault
) -> None:
    outcome = these.receiver([fault], policy(fault))

    assert outcome.tries == promised()["callback receiver", fault]
    assert (code(outcome), len(outcome.document.assets)) == (None, 1)
    assert outcome.document.metadata["callback"]["delivered"] is False
    assert outcome.kept == [outcome.document.metadata["callback"]["kept"]]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("fail_open", "ends"), [(True, None), (False, "WORKER_UNAVAILABLE")])
def test_a_job_that_cannot_be_counted_is_done_or_not_as_told(
    these: World, fault: Fault, fail_open: bool, ends: str | None
) -> None:
    outcome = these.limits([fault], policy(fault), fail_open=fail_open)

    assert outcome.tries == promised()["Redis", fault]
    assert code(outcome) == ends
    assert outcome.audit["rate"].startswith("not counted: ")


# --- a fault that passes ---


@pytest.mark.parametrize("fault", PASSING)
def test_a_reference_is_had_at_the_second_try(these: World, fault: Fault) -> None:
    outcome = these.reference([fault, "pass"], policy(fault))

    assert (code(outcome), outcome.document.metadata["reference_mode"]) == (None, "modify")
    assert outcome.tries == 2


@pytest.mark.parametrize("fault", PASSING)
@pytest.mark.parametrize("store", STORES)
def test_an_asset_is_stored_at_the_second_try_and_once(
    these: World, store: str, fault: Fault
) -> None:
    outcome = DEPENDENCIES[store](these, [fault, "pass"], policy(fault))

    assert code(outcome) is None
    assert sorted(outcome.seen) == ["user-1/job-1/0.png", "user-1/job-1/0.thumb.webp"]
    assert outcome.tries == 3  # one for the thumbnail


@pytest.mark.parametrize("fault", PASSING)
def test_a_document_is_delivered_at_the_second_try_under_the_same_id(
    these: World, fault: Fault
) -> None:
    outcome = these.receiver([fault, "pass"], policy(fault))

    assert "callback" not in outcome.document.metadata
    assert {each.headers["webhook-id"] for each in outcome.seen} == {
        webhook_id("job-1", "completed")
    }
    assert outcome.seen[-1].document == outcome.document.callback()
    assert len(outcome.seen) == (2 if fault == "lost" else 1)


@pytest.mark.parametrize("fault", PASSING)
def test_a_job_is_counted_at_the_second_try(these: World, fault: Fault) -> None:
    outcome = these.limits([fault, "pass"], policy(fault))

    assert (code(outcome), outcome.audit["rate"]) == (None, "within")
    # An answer that was lost leaves a job counted twice: early, never late.
    assert outcome.seen == (2 if fault == "lost" else 1)


# --- time ---


@pytest.mark.parametrize("run", DEPENDENCIES.values(), ids=DEPENDENCIES.keys())
def test_a_host_that_drips_may_yet_be_asked_again(
    these: World, run: Callable[..., Outcome]
) -> None:
    outcome = run(these, ["drip", "pass"], policy("drip", patience_s=1.5))

    assert (code(outcome), outcome.document.status) == (None, "completed")
    assert outcome.tries >= 2


def waits(tries: int, **changes: Any) -> list[float]:
    return [Retry(jitter=0, **changes).wait_s(n) for n in range(1, tries)]


def test_waits_grow_from_half_a_second_and_double() -> None:
    assert waits(4) == [0.5, 1.0, 2.0]
