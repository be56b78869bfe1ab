"""The simulation of pages against a padded cache, and its table in the document."""

from pathlib import Path

import pytest

from benchmarks import pages

DOCUMENT = Path(__file__).parents[2] / "docs" / "benchmarks.md"


def test_the_document_has_the_simulated_table() -> None:
    rows = str(pages.table()).splitlines()[2:6]

    assert "\n".join(rows) in DOCUMENT.read_text()


@pytest.mark.parametrize("name", pages.WORKLOADS)
def test_pages_take_less_memory_and_fewer_steps_than_padded_rows(name: str) -> None:
    make, kv_tokens = pages.WORKLOADS[name], 65536

    steps, _ = pages.paged_steps(make(), kv_tokens)

    assert pages.paged_tokens(make()) < pages.padded_tokens(make()) / 4
    assert steps < pages.padded_steps(make(), kv_tokens) / 2


def test_requests_are_computed_again_where_pages_run_out_and_all_are_answered() -> None:
    requests = [pages.Request(prompt=200, reply=900) for _ in range(8)]

    _, num_again = pages.paged_steps(requests, 4096)

    assert num_again > 0
    assert all(each.num_done == each.reply for each in requests)
