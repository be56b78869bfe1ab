"""Which pages of the KV cache are free, which requests use each, and which tokens each holds.

A page is the keys and values of a few consecutive tokens of a text. Pages form a tree: a page
follows the page before it in its text, so the path to a page is everything that its keys and values
depend on. Requests whose texts begin alike share the pages of that beginning. Only whole pages are
shared, which nobody writes to again; from a page that agrees in part, the part is copied.

A page that no request uses any more is kept for later requests. If more pages are kept than may be,
those that were not used longest are dropped, the ends of texts before their beginnings.

A text may have a salt: then it shares pages with texts of the same salt alone. vLLM has the same
under the same name (`cache_salt`, https://docs.vllm.ai/en/latest/design/prefix_caching/).

This module knows no tensors: a page is an index. Page 0 holds no text. Forwards whose results are
dropped write there.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

#: A shorter beginning is computed faster than it is copied.
MIN_COPIED = 16


@dataclass(eq=False, slots=True)
class Page:
    """A page: the tokens it holds, how many of them are computed, and the pages around it."""

    index: int
    parent: Page | None = None
    tokens: list[int] = field(default_factory=list)
    num_written: int = 0
    num_users: int = 1
    #: The salt of the texts that may share it, in the first page of a text.
    salt: str = ""
    #: The pages that follow in any text, in the order in which they were taken.
    children: dict[Page, None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Found:
    """The beginning of a text in the cache: whole pages, and the first tokens of one more."""

    pages: list[Page]
    tail: Page | None
    num_tail: int
    num_tokens: int


class Pages:
    """All pages of one cache, of `size` tokens each.

    Requests should use no more than `max_used` pages together, see `num_left`; `take` does not
    refuse. `max_kept` pages may be kept beside them.
    """

    def __init__(self, size: int, max_used: int, max_kept: int) -> None:
        self.size, self.max_used, self.max_kept = size, max_used, max_kept
        self.clear()

    def clear(self) -> None:
        """Forget all pages."""
        self._root = Page(0)
        self._free: list[int] = []
        self._kept: OrderedDict[Page, None] = OrderedDict()
        self.num_made, self.num_used = 1, 0

    @property
    def num_left(self) -> int:
        """The pages that requests may still take; negative if one request uses more than all."""
        return self.max_used - self.num_used

    @property
    def num_kept(self) -> int:
        return len(self._kept)

    def count(self, num_tokens: int) -> int:
        """The pages that a text of that many tokens takes."""
        return -(-num_tokens // self.size)

    def shareable(self, num_tokens: int) -> int:
        """How many tokens of a common beginning a request can have from another one's pages."""
        rest = num_tokens % self.size
        return num_tokens - rest if rest < MIN_COPIED else num_tokens

    def find(self, ids: Sequence[int], salt: str = "") -> Found:
        """The longest beginning of a text that is in the cache, under the text's salt."""
        pages: list[Page] = []
        at = self._root
        while True:
            done = len(pages) * self.size
            rest = ids[done : done + self.size]
            lengths = {
                child: self._num_usable(child, rest)
                for child in at.children
                if at is not self._root or child.salt == salt
            }
            best = max(lengths, key=lengths.__getitem__, default=None)
            if best is not None and lengths[best] == self.size:
                pages.append(best)
                at = best
            elif best is not None and lengths[best] >= MIN_COPIED:
                return Found(pages, best, lengths[best], done + lengths[best])
            else:
                return Found(pages, None, 0, done)

    def _num_usable(self, page: Page, ids: Sequence[int]) -> int:
        """The tokens that a page has in common with a text; to be copied, they must be computed."""
        length = common_length(page.tokens, ids)
        return length if length == self.size else min(length, page.num_written)

    def num_new(self, found: Found) -> int:
        """The pages that a request takes which shares what was found."""
        return sum(not page.num_users for page in found.pages) + (found.tail is not None)

    def share(self, pages: Sequence[Page]) -> list[Page]:
        """Let one more request use these pages."""
        for page in pages:
            if not page.num_users:
                del self._kept[page]
                self.num_used += 1
            page.num_users += 1
        return list(pages)

    def take(self, parent: Page | None, salt: str = "") -> Page:
        """A new page for one request, after its page `parent`, or at the beginning of its text."""
        if self._free:
            index = heapq.heappop(self._free)
        else:
            index, self.num_made = self.num_made, self.num_made + 1
        page = Page(index, parent or self._root, salt=salt)
        (parent or self._root).children[page] = None
        self.num_used += 1
        return page

    def release(self, pages: Sequence[Page]) -> None:
        """One request uses these pages no more."""
        # From the end, so that a page is never dropped before those that follow it.
        for page in reversed(pages):
            page.num_users -= 1
            if page.num_users:
                continue
            self.num_used -= 1
            if page.num_written:
                self._kept[page] = None
            else:
                self._drop(page)
        while len(self._kept) > self.max_kept:
            self._drop(self._kept.popitem(last=False)[0])

    def _drop(self, page: Page) -> None:
        assert page.parent
        del page.parent.children[page]
        heapq.heappush(self._free, page.index)


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """The number of tokens with which both texts begin."""
    length = min(len(one), len(other))
    if not length or one[0] != other[0]:
        return 0
    if one[:length] == other[:length]:
        return length
    low, high = 0, length - 1
    while low < high:  # the texts agree up to `low`, and not up to `high` + 1
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
