"""Pages of the cache: who uses them, what is shared, and what is dropped first."""

import random

import pytest

from ourvidz_serverless.models.chat.pages import MIN_COPIED, Page, Pages, common_length

SIZE = 32


def new_pages(max_used: int = 100, max_kept: int = 100) -> Pages:
    return Pages(SIZE, max_used, max_kept)


def write(pages: Pages, ids: list[int]) -> list[Page]:
    """The pages of a text, as a request takes and fills them."""
    table = pages.share(pages.find(ids).pages)
    for at in range(len(table) * SIZE, len(ids), SIZE):
        table.append(page := pages.take(table[-1] if table else None))
        page.tokens = ids[at : at + SIZE]
        page.num_written = len(page.tokens)
    return table


def text(seed: int, length: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(1000) for _ in range(length)]


def test_a_text_finds_the_whole_pages_of_one_that_begins_alike() -> None:
    pages, first = new_pages(), text(0, 100)
    table = write(pages, first)

    found = pages.find([*first[:70], -1, -1])

    assert found.pages == table[:2]
    assert (found.tail, found.num_tokens) == (None, 64)


def test_a_part_of_a_page_is_found_if_it_is_long_enough_to_be_copied() -> None:
    pages, first = new_pages(), text(0, 100)
    table = write(pages, first)

    short = pages.find([*first[: 63 + MIN_COPIED], -1])
    long = pages.find([*first[: 64 + MIN_COPIED], -1])

    assert (short.tail, short.num_tokens) == (None, 64)
    assert (long.tail, long.num_tokens) == (table[2], 64 + MIN_COPIED)


def test_a_page_that_is_not_computed_yet_can_be_shared_but_not_copied() -> None:
    pages, first = new_pages(), text(0, 64)
    for page in write(pages, first):
        page.num_written = 0

    assert pages.find([*first[:50], -1]).num_tokens == 32


def test_shared_pages_count_once() -> None:
    pages, ids = new_pages(), text(0, 64)
    tables = [write(pages, [*ids, at]) for at in range(5)]

    assert pages.num_used == 2 + 5
    for table in tables:
        pages.release(table)
    assert (pages.num_used, pages.num_kept) == (0, 7)


def test_the_end_of_a_text_is_dropped_before_its_beginning() -> None:
    pages, ids = new_pages(max_kept=2), text(0, 128)
    pages.release(write(pages, ids))

    assert pages.find(ids).num_tokens == 64
    assert pages.num_kept == 2


def test_a_page_is_never_dropped_while_it_is_used() -> None:
    pages, ids = new_pages(max_kept=0), text(0, 64)
    first, second = write(pages, ids), write(pages, ids)
    pages.release(first)

    assert pages.find(ids).pages == second


def test_dropped_pages_are_taken_again() -> None:
    pages = new_pages(max_kept=0)
    for seed in range(20):
        pages.release(write(pages, text(seed, 96)))

    # Page 0 is nobody's.
    assert pages.num_made == 1 + 3


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_texts_keeps_the_books_balanced(seed: int) -> None:
    source, pages, running = random.Random(seed), new_pages(max_kept=source_size(seed)), []
    for _ in range(200):
        if running and source.random() < 0.5:
            pages.release(running.pop(source.randrange(len(running))))
        else:
            ids = [
                token
                for _ in range(source.randrange(1, 6))
                for token in text(source.randrange(2), 20)
            ]
            running.append(write(pages, ids))
        used = {page for table in running for page in table}
        assert pages.num_used == len(used)
        assert pages.num_kept <= pages.max_kept
        assert len({page.index for page in used}) == len(used)
        assert all(
            page.parent is table[at - 1] for table in running for at, page in enumerate(table) if at
        )
    for table in running:
        pages.release(table)

    assert pages.num_used == 0


def source_size(seed: int) -> int:
    return 3 * (seed % 4)


@pytest.mark.parametrize("length", [0, 1, 2, 7, 31, 32, 33])
def test_the_common_length_is_that_of_the_first_difference(length: int) -> None:
    ids = list(range(40))

    assert common_length(ids, [*ids[:length], -1, *ids]) == length
    assert common_length(ids[:length], ids) == length
