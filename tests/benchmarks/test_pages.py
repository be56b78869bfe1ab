"""The simulation of pages against a padded cache, and its table in the document."""

from pathlib import Path

import pytest

from benchmarks import pages

DOCUMENT = Path(__file__).parents[2] / "docs" / "benchmarks.md"


def test_the_document_has_the_simulated_tables() -> None:
    text = DOCUMENT.read_text()

    for table in (pages.table(), pages.forwards_table()):
        rows = [line for line in str(table).splitlines() if line.startswith("|")]
        assert "\n".join(rows) in text


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


def test_a_prompt_in_the_forward_of_the_replies_costs_no_forward_of_its_own() -> None:
    def requests() -> list[pages.Request]:
        return [pages.Request(prompt=300, reply=100) for _ in range(4)]

    # Four prompts of 300 tokens are four forwards, and the last reply has 99 more.
    assert pages.num_forwards(requests(), 0, are_together=True) == 4 + 99
    # The last prompt's forward is followed by one for all replies.
    assert pages.num_forwards(requests(), 0, are_together=False) == 2 * 4 + 98
