"""Tokens a second: transformers' `generate` one by one, and the engine with many at once.

    python -m benchmarks.chat                  the pocket model, on what there is
    python -m benchmarks.chat --size full      Qwen2.5-7B's architecture, random weights, on a GPU
    python -m benchmarks.chat --model FOLDER

Decoding is greedy, so that the tokens can be compared. Both get the same prompts. No two prompts
begin alike, and the engine keeps none, so both compute every token of them. `with cached prefixes`
is an engine on prompts with one common first half, which is cached from an earlier request.
`generate` has no prefix cache, so this figure is compared with nothing. On CUDA the engine replays
CUDA graphs; a second engine without graphs is timed between its runs. `decoding` is the tokens a
second of one reply after its first token, `late` the time to the first token of a request that
comes while all others run. The floor of one stream's decoding is the time to read the weights from
memory, once a token.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks import architectures, report
from ourvidz_serverless.models.chat.cuda_graphs import Capture, choose_capture
from ourvidz_serverless.models.chat.engine import Engine, EngineLimits
from ourvidz_serverless.models.chat.generation import Generation
from ourvidz_serverless.models.chat.loader import POCKET as POCKET_FOLDER
from ourvidz_serverless.models.chat.request import SamplingParams
from ourvidz_serverless.models.memory.device import Device
from ourvidz_serverless.settings import Settings
from tests.fakes.tiny_chat import tiny_folder

POCKET, FULL = TITLES = (
    "Chat against generate, one by one, pocket size",
    "Chat against generate, one by one, full size",
)
HEADERS = (
    "requests at once",
    "tokens/s, engine",
    "with cached prefixes",
    "without graphs",
    "tokens/s, one by one",
    "times as fast",
    "control",
    "replies equal",
    "decoding, tokens/s",
    "first token, ms",
    "late, ms",
)
FULL_HEADERS = (*HEADERS, "floor, tokens/s of a stream", "share of the floor")
AT_ONCE = (1, 16, 64)


@dataclass(frozen=True, slots=True)
class Scale:
    """Tokens of a prompt and of a reply, requests one by one, and rounds of interleaved timing."""

    prompt: int = 100
    reply: int = 64
    one_by_one: int = 4
    rounds: int = 3


def main(argv: Sequence[str] | None = None) -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--size", choices=("pocket", "full", "both"), default="both")
    parser.add_argument("--model", type=Path, help="a folder, instead of the pocket model")
    options = parser.parse_args(argv)
    scale, at_once = Scale(), AT_ONCE
    if options.quick:
        scale = Scale(prompt=48, reply=12, one_by_one=2, rounds=1)
    if options.tiny:
        scale, at_once = Scale(prompt=8, reply=2, one_by_one=1, rounds=1), (1, 2)
    tables = []
    if options.size != "full":
        tables.append(pocket(options.model, options.tiny, at_once, scale))
    if options.size != "pocket":
        tables.append(full(at_once, scale))
    report.finish("chat", tables, options.json)


def pocket(
    folder: Path | None, is_tiny: bool, at_once: Sequence[int], scale: Scale
) -> report.Table:
    device = Device.choose(Settings(), on_gpu=torch.bfloat16)
    with tempfile.TemporaryDirectory() as scratch:
        # Without the pocket model, which must be downloaded, take the tests' tiny one.
        is_tiny = is_tiny or not (folder or POCKET_FOLDER).exists()
        place = tiny_folder(Path(scratch)) if is_tiny else folder or POCKET_FOLDER
        model = AutoModelForCausalLM.from_pretrained(place, dtype=device.dtype)
        rows = comparison(model.to(device.name).eval(), device, scale).rows(at_once)
    note = f"{scale.prompt} tokens of a prompt, {scale.reply} of a reply, {device.dtype}"
    return report.table(POCKET, HEADERS, rows, f"{note}{', random weights' if is_tiny else ''}.")


def full(at_once: Sequence[int], scale: Scale) -> report.Table:
    """The published architecture's table; without a GPU its rows are not measured."""
    if torch.cuda.is_available():
        gpu = architectures.gpu()
        return full_table(at_once, scale, gpu and gpu[1], Settings())
    print("chat at full size needs a GPU")
    return report.table(FULL, FULL_HEADERS, [report.unmeasured(n, FULL_HEADERS) for n in at_once])


def full_table(
    at_once: Sequence[int], scale: Scale, bandwidth: float | None, settings: Settings
) -> report.Table:
    """The full-size table on the device of these settings. `bandwidth` is in bytes a second."""
    device = Device.choose(settings, on_gpu=torch.bfloat16)
    with architectures.made_on(str(device.name), device.dtype):
        model = architectures.chat().eval()
    weights = sum(each.numel() * each.element_size() for each in model.parameters())
    rows = []
    for row in comparison(model, device, scale).rows(at_once):
        # Streams of one batch share each read of the weights, so only one stream has this floor.
        floor = bandwidth / weights if bandwidth and row[0] == 1 else None
        decoding = float(str(row[HEADERS.index("decoding, tokens/s")]))
        share = floor and f"{100 * decoding / floor:.0f} %"
        rows.append([*row, floor, share])
    note = f"{weights / 1e9:.2f} GB of weights, {scale.reply} tokens of a reply, {device.dtype}."
    return report.table(FULL, FULL_HEADERS, rows, note)


def comparison(model: Any, device: Device, scale: Scale) -> Comparison:
    return Comparison(model, device, scale, choose_capture("auto", device, model.config))


class Comparison:
    """The engine and `generate` on the same prompts and model.

    With `capture` the engine uses CUDA graphs, and an engine without graphs is compared too.
    """

    def __init__(
        self, model: Any, device: Device, scale: Scale, capture: Capture | None = None
    ) -> None:
        self.model, self.device, self.scale, self.capture = model, device, scale, capture
        size = (model.config.vocab_size, max(AT_ONCE) + 1, scale.prompt)
        self.prompts = make_prompts(*size)
        self.num_rounds = 0

    def rows(self, at_once: Sequence[int]) -> list[list[object]]:
        return [self.row(count) for count in at_once]

    def row(self, count: int) -> list[object]:
        """The table's row for `count` requests at once against one by one, interleaved."""
        engine = self.engine(count, self.capture)
        prompts = self.prompts[:count]
        one_by_one = self.prompts[: min(count, self.scale.one_by_one)]
        self.answer_all(engine, prompts if self.capture else prompts[:2])  # warms up, and captures
        uncaptured = self.engine(count, None) if self.capture else None
        if uncaptured:
            self.answer_all(uncaptured, prompts)
        keeping = self.engine(count, self.capture, keeps_pages=True)
        self.answer_all(keeping, self.prefixed(count))
        batched: list[float] = []
        cached: list[float] = []
        eager: list[float] = []
        sequential: list[float] = []
        controls: list[float] = []
        for _ in range(self.scale.rounds):
            together = self.answer_all(engine, prompts)
            singly = [self.generate(one_by_one) for _ in range(2)]
            if uncaptured:
                eager += [self.answer_all(uncaptured, prompts).tokens_s for _ in range(2)]
            cached.append(self.answer_all(keeping, self.prefixed(count)).tokens_s)
            again = self.answer_all(engine, prompts)
            batched += [together.tokens_s, again.tokens_s]
            sequential += [each.tokens_s for each in singly]
            controls.append(singly[0].tokens_s / singly[1].tokens_s)
        equal = sum(map(list.__eq__, together.replies, singly[0].replies))
        control = median(controls)
        return [
            count,
            median(batched),
            median(cached),
            median(eager) if eager else None,
            median(sequential),
            report.trusted(median(batched) / median(sequential), control),
            control,
            f"{equal} of {len(one_by_one)}",
            median(together.decoding),
            1000 * median(together.first_s),
            1000 * self.late_s(engine, count),
        ]

    def prefixed(self, count: int) -> list[list[int]]:
        """Prompts with one first half, the same each time, and second halves that are new."""
        self.num_rounds += 1
        return with_common_prefix(self.prompts[:count], self.num_rounds)

    def engine(self, count: int, capture: Capture | None, keeps_pages: bool = False) -> Engine:
        limits = EngineLimits(max_batch=count + 1)
        if not keeps_pages:
            limits = replace(limits, prefix_tokens=0)
        return Engine(self.model, self.device, eos_ids=[], limits=limits, capture=capture)

    def generate(self, prompts: Sequence[list[int]]) -> Answers:
        """The replies of transformers' `generate`, one after another."""
        began, replies, tokens = time.monotonic(), [], self.scale.reply
        options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
        for prompt in prompts:
            ids = torch.tensor([prompt], device=self.device.name)
            reply = self.model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0]
            replies.append(reply[len(prompt) :].tolist())
        return Answers(replies, time.monotonic() - began)

    def answer_all(self, engine: Engine, prompts: Sequence[list[int]]) -> Answers:
        """The engine's replies to all prompts at once."""
        began = time.monotonic()
        asked = [self.ask(engine, prompt) for prompt in prompts]
        with ThreadPoolExecutor(len(asked)) as threads:
            list(threads.map("".join, asked))
        first_s = [each.time_to_first_token_s for each in asked]
        replies = [each.ids[each.num_prompt :] for each in asked]
        seconds = time.monotonic() - began
        return Answers(replies, seconds, first_s, [each.tokens_per_second or 0 for each in asked])

    def late_s(self, engine: Engine, count: int) -> float:
        """Seconds to the first token of a request that comes while `count` others run."""
        with ThreadPoolExecutor(count + 1) as threads:
            asked = [self.ask(engine, prompt) for prompt in self.prompts[:count]]
            pieces = [iter(each) for each in asked]
            list(threads.map(next, pieces))  # each has its first token
            late = self.ask(engine, self.prompts[-1])
            list(threads.map("".join, [*pieces, iter(late)]))
        return late.time_to_first_token_s

    def ask(self, engine: Engine, prompt: list[int]) -> Generation:
        """Submit a prompt."""
        sampling = SamplingParams(max_tokens=self.scale.reply, temperature=0)
        generation = Generation(prompt, sampling, decode=lambda ids: "x" * len(ids))
        engine.submit(generation)
        return generation


@dataclass(frozen=True, slots=True)
class Answers:
    """Replies as tokens, and the seconds that all of them took together.

    For each reply `first_s` has the seconds to its first token, and `decoding` its tokens a second
    after that.
    """

    replies: list[list[int]]
    seconds: float
    first_s: Sequence[float] = ()
    decoding: Sequence[float] = ()

    @property
    def tokens_s(self) -> float:
        """Tokens a second of all replies together."""
        return sum(map(len, self.replies)) / self.seconds


def make_prompts(vocabulary: int, requests: int, length: int) -> list[list[int]]:
    """Random prompts of `length` tokens; no two have the same first token."""
    random = torch.Generator().manual_seed(0)
    rows = torch.randint(100, vocabulary, (requests, length), generator=random)
    rows[:, 0] = 100 + torch.arange(requests)
    return rows.tolist()


def with_common_prefix(prompts: Sequence[list[int]], number: int) -> list[list[int]]:
    """The prompts with one common first half, and second halves that no other `number` has."""
    half = len(prompts[0]) // 2
    return [[*prompts[0][-half:], 100 + number, *each[half + 1 :]] for each in prompts]


if __name__ == "__main__":
    main()
