"""Each dependency with each kind of fault: how often it is tried, and how the job ends.

The numbers of tries are those that docs/reliability.md promises.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ourvidz_serverless.delivery.callback import webhook_id
from ourvidz_serverless.net.retries import Retry
from tests.faults import RUNS, Dependencies, Outcome, policy, running_dependencies
from tests.files import ROOT
from tests.servers.broken_proxy import FAULTS, Fault
from tests.servers.s3 import SeaweedServer

PAGE = ROOT / "docs/reliability.md"

#: Faults that end quickly, so that the next try can succeed.
PASSING: tuple[Fault, ...] = ("reset", "5xx", "garbage", "lost")

STORES = [name for name in RUNS if name.startswith("storage")]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory, s3: SeaweedServer) -> Iterator[Dependencies]:
    with running_dependencies(tmp_path_factory.mktemp("dependencies"), s3) as running:
        yield running


def promised() -> dict[tuple[str, str], int]:
    """The tries that the page promises, by dependency and fault."""
    rows = re.findall(r"^\| (.+?) \|((?: \d \|){8})$", PAGE.read_text(), re.MULTILINE)
    return {
        (name, fault): int(tries)
        for name, row in rows
        for fault, tries in zip(FAULTS, row.replace("|", "").split(), strict=True)
    }


def test_the_reliability_page_has_every_dependency_with_every_fault() -> None:
    assert set(promised()) == {(name, fault) for name in RUNS for fault in FAULTS}


def code(outcome: Outcome) -> str | None:
    return outcome.document.failure.code if outcome.document.failure else None


# --- a fault that stays ---


@pytest.mark.parametrize("fault", FAULTS)
def test_a_reference_that_cannot_be_fetched_is_left_out_with_a_warning(
    servers: Dependencies, fault: Fault
) -> None:
    outcome = servers.reference([fault], policy(fault))

    assert outcome.tries == promised()["reference host", fault]
    assert (code(outcome), outcome.document.metadata["reference_mode"]) == (None, "none")
    assert len(outcome.document.metadata["warnings"]) == 1


@pytest.mark.parametrize("fault", FAULTS)
def test_a_required_reference_that_cannot_be_fetched_fails_the_job(
    servers: Dependencies, fault: Fault
) -> None:
    outcome = servers.reference([fault], policy(fault), required=True)

    assert outcome.tries == promised()["reference host", fault]
    assert (code(outcome), outcome.document.assets) == ("REFERENCE_FRAME_ERROR", ())


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("store", STORES)
def test_an_asset_that_cannot_be_stored_fails_the_job(
    servers: Dependencies, store: str, fault: Fault
) -> None:
    outcome = RUNS[store](servers, [fault], policy(fault))

    assert outcome.tries == promised()[store, fault]
    assert (code(outcome), outcome.document.assets) == ("UPLOAD_ERROR", ())
    assert outcome.document.failure is not None
    assert outcome.document.failure.retryable


@pytest.mark.parametrize("fault", FAULTS)
def test_a_document_that_cannot_be_delivered_is_kept_and_the_job_completes(
    servers: Dependencies, fault: Fault
) -> None:
    outcome = servers.receiver([fault], policy(fault))

    assert outcome.tries == promised()["callback receiver", fault]
    assert (code(outcome), len(outcome.document.assets)) == (None, 1)
    assert outcome.document.metadata["callback"]["delivered"] is False
    assert outcome.kept == [outcome.document.metadata["callback"]["kept"]]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("fail_open", "expected"), [(True, None), (False, "WORKER_UNAVAILABLE")])
def test_a_job_that_cannot_be_counted_completes_only_if_the_limits_fail_open(
    servers: Dependencies, fault: Fault, fail_open: bool, expected: str | None
) -> None:
    outcome = servers.limits([fault], policy(fault), fail_open=fail_open)

    assert outcome.tries == promised()["Redis", fault]
    assert code(outcome) == expected
    counted = "within, by this worker's own count" if fail_open else "not counted: "
    assert outcome.audit["rate"].startswith(counted)


# --- a fault that passes ---


@pytest.mark.parametrize("fault", PASSING)
def test_a_reference_is_fetched_at_the_second_try(servers: Dependencies, fault: Fault) -> None:
    outcome = servers.reference([fault, "pass"], policy(fault))

    assert (code(outcome), outcome.document.metadata["reference_mode"]) == (None, "modify")
    assert outcome.tries == 2


@pytest.mark.parametrize("fault", PASSING)
@pytest.mark.parametrize("store", STORES)
def test_an_asset_is_stored_once_at_the_second_try(
    servers: Dependencies, store: str, fault: Fault
) -> None:
    outcome = RUNS[store](servers, [fault, "pass"], policy(fault))

    assert code(outcome) is None
    assert sorted(outcome.seen) == ["user-1/job-1/0.png", "user-1/job-1/0.thumb.webp"]
    assert outcome.tries == 3  # Two for the image, one for the thumbnail.


@pytest.mark.parametrize("fault", PASSING)
def test_a_document_is_delivered_at_the_second_try_under_the_same_id(
    servers: Dependencies, fault: Fault
) -> None:
    outcome = servers.receiver([fault, "pass"], policy(fault))

    assert "callback" not in outcome.document.metadata
    assert {each.headers["webhook-id"] for each in outcome.seen} == {
        webhook_id("job-1", "completed")
    }
    assert outcome.seen[-1].document == outcome.document.callback()
    assert len(outcome.seen) == (2 if fault == "lost" else 1)


@pytest.mark.parametrize("fault", PASSING)
def test_a_job_is_counted_at_the_second_try(servers: Dependencies, fault: Fault) -> None:
    outcome = servers.limits([fault, "pass"], policy(fault))

    assert (code(outcome), outcome.audit["rate"]) == (None, "within")
    # After a lost answer the job is counted twice, so a limit may apply too early, never too late.
    assert outcome.seen == (2 if fault == "lost" else 1)


# --- time ---


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS.keys())
def test_a_host_that_answers_too_slowly_is_tried_again_within_its_time(
    servers: Dependencies, run: Callable[..., Outcome]
) -> None:
    outcome = run(servers, ["drip", "pass"], policy("drip", try_s=1.5))

    assert (code(outcome), outcome.document.status) == (None, "completed")
    assert outcome.tries >= 2


def waits(tries: int, **changes: Any) -> list[float]:
    return [Retry(jitter=0, **changes).wait_s(n) for n in range(1, tries)]


def test_the_waits_between_tries_start_at_half_a_second_and_double() -> None:
    assert waits(4) == [0.5, 1.0, 2.0]
