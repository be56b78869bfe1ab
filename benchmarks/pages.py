"""Chat's cache in pages against a padded cache, simulated: the memory of a batch, and its steps.

    python -m benchmarks.pages

The padded cache is what a batch of rows needs: each row as long as the longest request may become,
the number of rows a power of two, lengths multiples of 256. The pages are the worker's own books
(`models/chat/pages.py`) with the engine's rules: a request is admitted when its prompt fits beside
one more page of each running request, and takes a page when it needs it. Both serve the same
requests, in the order of their arrival, with Qwen2.5-7B's keys and values. `memory` is that of all
requests at once, at the end of their replies. `steps` are the forwards until the last reply is
complete on a card of 24 GB, beside the weights; each computes a token of every running reply, and
prompts are computed in the step in which they are admitted. No tensor is computed, so the figures
are the same on every machine.

The second table counts the forwards until the last reply is complete, each of which reads all
weights. The engine's forwards have the next token of each running reply, and of prompts at most
512. `apart` is an engine that computes prompts in one forward, and then replies in another one. The
requests come together, or one of them in so many forwards. There is room for all of them.
"""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from transformers import Qwen2Config

from benchmarks import architectures, report
from ourvidz_serverless.models.chat.attention import VARLEN_PAGE
from ourvidz_serverless.models.chat.cache_budget import CACHE_SHARE
from ourvidz_serverless.models.chat.engine import EngineLimits
from ourvidz_serverless.models.chat.kv_cache import bytes_per_token, next_power_of_two, rounded
from ourvidz_serverless.models.chat.pages import Page, Pages

TITLE = "Chat's cache in pages against a padded one, simulated"
HEADERS = (
    "64 requests",
    "padded, GiB",
    "pages, GiB",
    "padded, steps",
    "pages, steps",
    "times fewer steps",
    "computed again",
)

TOGETHER = "Prompts and replies in one forward, simulated"

TOGETHER = "Prompts and replies in one forward, simulated"

GIB = 1 << 30

#: The bytes of the smallest card that Qwen2.5-7B in 16 bits fits, and of its weights.
CARD_BYTES, WEIGHT_BYTES = 24 * 10**9, 15_231_233_024

#: The most tokens of a reply, which the caller asked for, and those that it has: a reply seldom
#: uses its limit.
MAX_REPLY, SHORTEST_REPLY, LONGEST_REPLY = 1024, 32, 512


#: How often a request comes, in forwards; 0: all at once.
ARRIVALS = (0, 4)


@dataclass(eq=False)
class Request:
    """A prompt and its reply, in tokens, and how far it is."""

    prompt: int
    reply: int
    num_done: int = 0
    pages: list[Page] = field(default_factory=list)

    @property
    def length(self) -> int:
        """The tokens that are computed when the next one is."""
        return self.prompt + self.num_done + 1


def wide() -> list[Request]:
    """64 requests of 16 to 8,000 tokens, short ones more often than long ones."""
    return _requests([16 * 500 ** _random(at).random() for at in range(64)])


def few_long() -> list[Request]:
    """60 conversations of 16 to 300 tokens, and 4 of 8,000 between them."""
    return _requests([8000 if at % 16 == 7 else _random(at).uniform(16, 300) for at in range(64)])


def _random(at: int) -> random.Random:
    return random.Random(at)


def _requests(prompts: Sequence[float]) -> list[Request]:
    replies = [_random(1000 + at).randint(SHORTEST_REPLY, LONGEST_REPLY) for at in range(64)]
    return [Request(int(prompt), reply) for prompt, reply in zip(prompts, replies, strict=True)]


WORKLOADS = {"16 to 8,000 tokens": wide, "60 short and 4 long": few_long}


def main(argv: Sequence[str] | None = None) -> None:
    options = report.parser(__doc__).parse_args(argv)
    report.finish("pages", [table(), forwards_table()], options.json)


def _budget() -> tuple[int, int]:
    """The bytes of a token in the cache, and the tokens that the card has room for."""
    token_bytes = bytes_per_token(Qwen2Config(**architectures.QWEN_7B), torch.bfloat16)
    return token_bytes, int(CACHE_SHARE * (CARD_BYTES - WEIGHT_BYTES) / token_bytes)


def table() -> report.Table:
    token_bytes, kv_tokens = _budget()
    rows = []
    for name, make in WORKLOADS.items():
        steps, (fewer, num_again) = padded_steps(make(), kv_tokens), paged_steps(make(), kv_tokens)
        memory = [
            f"{tokens * token_bytes / GIB:.1f}"
            for tokens in (padded_tokens(make()), paged_tokens(make()))
        ]
        rows.append([name, *memory, steps, fewer, f"{steps / fewer:.1f}", num_again])
    note = f"Room for {kv_tokens} tokens, pages of {VARLEN_PAGE}, at most 64 requests at once."
    return report.table(TITLE, HEADERS, rows, note)


def forwards_table() -> report.Table:
    headers = ("64 requests", "come", "apart", "together", "fewer forwards")
    rows: list[list[object]] = []
    for (name, make), every in itertools.product(WORKLOADS.items(), ARRIVALS):
        apart, together = (num_forwards(make(), every, each) for each in (False, True))
        when = f"one in {every} forwards" if every else "at once"
        rows.append([name, when, apart, together, f"{100 * (1 - together / apart):.0f} %"])
    return report.table(TOGETHER, headers, rows)


def num_forwards(requests: Sequence[Request], every: int, are_together: bool) -> int:
    """The forwards until all requests are answered, of which one comes in `every` forwards."""
    coming = deque(enumerate(requests))
    unread: dict[Request, int] = {}
    now = num_made = 0
    while coming or unread:
        now = now if unread else max(now, coming[0][0] * every)
        while coming and coming[0][0] * every <= now:
            request = coming.popleft()[1]
            unread[request] = request.prompt
        waiting = {each for each, num_tokens in unread.items() if num_tokens}
        reads = _read_prompts(unread)
        if not are_together:
            _draw(each for each in waiting if not unread[each])
        replies = [each for each, num_tokens in unread.items() if not num_tokens]
        _draw(replies)
        made = 1 if are_together else reads + bool(replies)
        now, num_made = now + made, num_made + made
        unread = {each: left for each, left in unread.items() if each.num_done < each.reply}
    return num_made


def _read_prompts(unread: dict[Request, int]) -> bool:
    """Compute the next tokens of prompts by the engine's rule. Returns False if there are none."""
    most = num_left = EngineLimits().prefill_tokens
    for request, num_tokens in unread.items():
        if num_left == most or num_tokens <= num_left:
            count = min(num_tokens, num_left)
            unread[request], num_left = num_tokens - count, num_left - count
    return num_left < most


def _draw(requests: Iterable[Request]) -> None:
    for each in requests:
        each.num_done += 1


def padded_tokens(requests: Sequence[Request]) -> int:
    """The tokens of a cache whose rows are as long as the longest request may become."""
    longest = max(each.prompt for each in requests) + MAX_REPLY
    return next_power_of_two(len(requests)) * rounded(longest)


def paged_tokens(requests: Sequence[Request]) -> int:
    """The tokens of the pages of all requests, at the end of their replies."""
    return sum(rounded(each.prompt + each.reply) for each in requests)


def padded_steps(requests: Sequence[Request], kv_tokens: int) -> int:
    """The steps until all requests are answered with a padded cache."""
    waiting, running, steps = deque(requests), list[Request](), 0
    while waiting or running:
        while waiting and (not running or padded_tokens([*running, waiting[0]]) <= kv_tokens):
            running.append(waiting.popleft())
        for each in running:
            each.num_done += 1
        running = [each for each in running if each.num_done < each.reply]
        steps += 1
    return steps


def paged_steps(requests: Sequence[Request], kv_tokens: int) -> tuple[int, int]:
    """The steps with pages, and how often a request gave its pages back."""
    pages = Pages(VARLEN_PAGE, kv_tokens // VARLEN_PAGE, max_kept=0)
    waiting, running = deque(requests), list[Request]()
    steps = num_again = 0
    while waiting or running:
        while waiting and (
            not running or pages.count(waiting[0].length) + len(running) <= pages.num_left
        ):
            running.append(waiting.popleft())
            _grow(running[-1], pages)
        for each in list(running):
            while each in running and _needs(each, pages) > pages.num_left and len(running) > 1:
                last = running.pop()
                pages.release(last.pages)
                last.pages = []
                waiting.appendleft(last)
                num_again += 1
            if each in running:
                _grow(each, pages)
                each.num_done += 1
        for each in [each for each in running if each.num_done == each.reply]:
            running.remove(each)
            pages.release(each.pages)
        steps += 1
    return steps, num_again


def _needs(request: Request, pages: Pages) -> int:
    return pages.count(request.length) - len(request.pages)


def _grow(request: Request, pages: Pages) -> None:
    for _ in range(_needs(request, pages)):
        request.pages.append(pages.take(request.pages[-1] if request.pages else None))


if __name__ == "__main__":
    main()
