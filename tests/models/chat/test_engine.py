"""The chat engine with a real, tiny Qwen2: a reply does not depend on the other requests."""

import threading
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2Config

from ourvidz_serverless.errors import Cancelled, InternalError, InvalidPrompt, OutOfMemory
from ourvidz_serverless.models.chat import batch_limit, sampling
from ourvidz_serverless.models.chat.engine import Engine
from ourvidz_serverless.models.chat.generation import Generation
from ourvidz_serverless.models.chat.kv_cache import bytes_per_token
from ourvidz_serverless.models.chat.model import ChatModel
from ourvidz_serverless.models.chat.request import SamplingParams
from ourvidz_serverless.models.memory.device import Device
from tests.fakes.tiny_chat import (
    CPU,
    CancelCheck,
    Gate,
    generate_text,
    new_generation,
    rest_of,
    text_of,
    texts_of,
    tiny_chat_model,
    tiny_network,
    tiny_tokenizer,
    until,
)
from tests.patience import PATIENCE_S, start

PROMPTS = [f"question {i} " + "and so on " * (i % 7) for i in range(50)]
LENGTHS = [3 + i % 23 for i in range(50)]
SYSTEM = "you are a patient machine that writes letters. " * 3


@pytest.fixture(scope="module")
def model() -> ChatModel:
    return tiny_chat_model()


# --- the same text, alone and among others ---


def test_a_greedy_reply_is_the_one_that_transformers_generates(model: ChatModel) -> None:
    network, ids = tiny_network(), model.tokenizer.encode("hello there")

    theirs = network.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[
        0, len(ids) :
    ]

    assert generate_text(model, "hello there") == model.tokenizer.decode(theirs.tolist())


@pytest.mark.parametrize(
    "limits",
    [{}, {"max_batch": 3}, {"prefill_tokens": 8}, {"kv_tokens": 2048}, {"prefix_tokens": 0}],
)
def test_fifty_requests_at_once_get_the_replies_that_each_gets_alone(
    limits: dict[str, int],
) -> None:
    alone = tiny_chat_model()
    together = tiny_chat_model(**limits)

    def make(at: int) -> Generation:
        shared = SYSTEM if at % 2 else ""
        return new_generation(alone, PROMPTS[at], shared=shared, max_tokens=LENGTHS[at])

    one_by_one = [text_of(alone.engine, make(at)) for at in range(50)]

    assert texts_of(together.engine, [make(at) for at in range(50)]) == one_by_one


def test_a_seed_repeats_its_reply_in_any_batch(model: ChatModel) -> None:
    def make(seed: int) -> Generation:
        return new_generation(
            model, "once upon", temperature=1.2, top_p=0.95, seed=seed, max_tokens=20
        )

    alone = [text_of(model.engine, make(seed)) for seed in range(8)]

    assert texts_of(model.engine, [make(seed) for seed in range(8)]) == alone
    assert len(set(alone)) == 8


def test_each_request_has_its_own_sampling_parameters(model: ChatModel) -> None:
    greedy = generate_text(model, "once upon")
    params: list[dict[str, Any]] = [
        {},
        {"temperature": 2.0, "seed": 1},
        {"temperature": 2.0, "top_k": 1},
        {"temperature": 2.0, "top_p": 1e-9},
        {"presence_penalty": 2.0, "frequency_penalty": 2.0},
        {"max_tokens": 4},
    ]

    replies = texts_of(
        model.engine, [new_generation(model, "once upon", **each) for each in params]
    )

    assert replies[0] == replies[2] == replies[3] == greedy
    assert replies[1] != greedy
    assert replies[5] == greedy[:4]


def test_a_late_request_joins_the_running_batch(model: ChatModel) -> None:
    gate = Gate(steps=20)
    first = new_generation(model, "a long one", check=gate, max_tokens=400)
    late = new_generation(model, "a short one", max_tokens=3)
    model.engine.submit(first)
    until(lambda: gate.is_blocking)

    model.engine.submit(late)
    gate.allow(20)

    assert rest_of(late)
    assert first.finish_reason is None
    gate.open()
    rest_of(first)
    assert first.num_completion == 400


# --- ends ---


def test_a_reply_ends_at_max_tokens_or_at_the_models_end_token(model: ChatModel) -> None:
    cut = new_generation(model, "hello", max_tokens=3)
    text_of(model.engine, cut)
    network = tiny_network()
    end = tiny_tokenizer().eos_token_id
    with torch.no_grad():
        network.lm_head.weight[end] = network.lm_head.weight.sum(0) * 50
    ended = new_generation(model, "hello", max_tokens=400)
    text = text_of(tiny_chat_model(network).engine, ended)

    assert (cut.finish_reason, cut.num_completion) == ("length", 3)
    assert (ended.finish_reason, ended.ids[-1]) == ("stop", end)
    assert "<|im_end|>" not in text


def test_a_stop_string_ends_the_reply_and_is_not_part_of_it(model: ChatModel) -> None:
    full_text = generate_text(model, "hello", max_tokens=30)
    stop = full_text[10:13]

    stopped = new_generation(model, "hello", max_tokens=30, stop=(stop, "not in it"))
    text = text_of(model.engine, stopped)

    assert text == full_text[: full_text.index(stop)]
    assert stopped.finish_reason == "stop"
    assert stopped.num_completion < 30


# --- cancelled requests ---


def test_a_cancelled_request_ends_at_the_next_token(model: ChatModel) -> None:
    gate = Gate(steps=20)
    stopped = new_generation(model, "hello", check=gate, max_tokens=400)
    model.engine.submit(stopped)
    pieces = iter(stopped)
    start(next, pieces).result(PATIENCE_S)
    gate.is_cancelled = True
    gate.open()

    with pytest.raises(Cancelled):
        rest_of(pieces)

    until(lambda: model.engine.num_running == 0)
    assert stopped.num_completion < 400


def test_a_waiting_request_can_be_cancelled() -> None:
    one = tiny_chat_model(max_batch=1)
    gate, leave = Gate(steps=0), CancelCheck()
    first = new_generation(one, "hello", check=gate, max_tokens=400)
    waiting = new_generation(one, "hello", check=leave)
    one.engine.submit(first)
    one.engine.submit(waiting)
    leave.is_cancelled = True
    gate.allow(20)

    with pytest.raises(Cancelled):
        rest_of(waiting)

    assert first.finish_reason is None
    gate.open()
    rest_of(first)


def test_a_request_ends_when_nobody_reads_its_reply(model: ChatModel) -> None:
    gate = Gate(steps=20)
    generation = new_generation(model, "hello", check=gate, max_tokens=400)
    model.engine.submit(generation)
    pieces = iter(generation)
    start(next, pieces).result(PATIENCE_S)
    pieces.close()
    gate.open()

    until(lambda: model.engine.num_running == 0)
    assert generation.finish_reason is None


def test_cancelled_requests_do_not_change_other_replies(model: ChatModel) -> None:
    alone = [generate_text(model, text, max_tokens=40) for text in PROMPTS[:8]]
    leaves = [CancelCheck() for _ in range(8)]
    staying = [new_generation(model, text, max_tokens=40) for text in PROMPTS[:8]]
    leaving = [new_generation(model, "short", check=leave, max_tokens=40) for leave in leaves]
    timers = [
        threading.Timer(0.01 * i, setattr, (leave, "is_cancelled", True))
        for i, leave in enumerate(leaves)
    ]

    for stays, leaves_early in zip(staying, leaving, strict=True):
        model.engine.submit(leaves_early)
        model.engine.submit(stays)
    for timer in timers:
        timer.start()

    assert [rest_of(each) for each in staying] == alone


# --- requests that share the device ---


def test_one_token_of_qwen_7b_takes_56_kib_of_the_cache() -> None:
    config = Qwen2Config(
        hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4
    )

    assert bytes_per_token(config, torch.bfloat16) == 56 * 1024


def test_a_beginning_that_requests_share_is_computed_once() -> None:
    own = tiny_chat_model()
    asked = [new_generation(own, text, shared=SYSTEM) for text in PROMPTS[:10]]
    first = texts_of(own.engine, asked)
    read = own.engine.num_computed
    later = new_generation(own, PROMPTS[0], shared=SYSTEM)

    assert text_of(own.engine, later) == first[0]

    reused = [each.num_reused for each in asked]
    assert reused[0] == 0 and min(reused[1:]) >= len(SYSTEM)
    assert read + sum(reused) == sum(each.num_prompt + 11 for each in asked)
    assert later.num_reused == later.num_prompt - 1


def test_requests_with_different_salts_share_nothing() -> None:
    own = tiny_chat_model()
    asked = [new_generation(own, "a", shared=SYSTEM, salt=salt) for salt in ("ada", "grace", "ada")]
    texts = texts_of(own.engine, asked)
    later = new_generation(own, "a", shared=SYSTEM, salt="grace")
    stranger = new_generation(own, "a", shared=SYSTEM, salt="")

    assert {*texts, text_of(own.engine, later), text_of(own.engine, stranger)} == {texts[0]}

    reused = [each.num_reused for each in (*asked, later, stranger)]
    assert [each > 0 for each in reused] == [False, False, True, True, False]


def test_the_next_turn_of_a_conversation_reuses_the_reply_before_it() -> None:
    own = tiny_chat_model()
    first = new_generation(own, "hello there", max_tokens=106)
    text = text_of(own.engine, first)

    text_of(own.engine, second := new_generation(own, f"hello there{text} and then"))

    # The last token of a reply is never read.
    assert second.num_reused == first.num_prompt + 105


def test_the_least_recently_used_prefix_is_removed() -> None:
    own = tiny_chat_model(prefix_tokens=100)
    for shared in ("a" * 60, "b" * 60):
        generate_text(own, "x", shared=shared)
    again = [new_generation(own, "x", shared=shared) for shared in ("b" * 60, "a" * 60)]
    for each in again:
        text_of(own.engine, each)

    assert [each.num_reused for each in again] == [60, 0]


def test_a_prefix_that_was_used_stays_longer_than_one_that_was_not() -> None:
    own = tiny_chat_model(prefix_tokens=192)
    asked = [new_generation(own, "x", shared=letter * 64) for letter in "abaca"]
    for each in asked:
        text_of(own.engine, each)

    assert [each.num_reused for each in asked] == [0, 0, 64, 0, 64]


def test_of_a_text_that_is_too_long_to_keep_the_beginning_is_kept() -> None:
    own = tiny_chat_model(prefix_tokens=96)
    asked = [new_generation(own, "x", shared="b" * 300) for _ in range(2)]
    for each in asked:
        text_of(own.engine, each)

    assert [each.num_reused for each in asked] == [0, 96]


def test_a_shared_prefix_that_is_longer_than_a_chunk_is_kept_whole() -> None:
    own = tiny_chat_model(prefill_tokens=40)
    asked = [new_generation(own, "hello", shared="a" * 60) for _ in range(2)]
    for each in asked:
        text_of(own.engine, each)

    assert [each.num_reused for each in asked] == [0, 64]


def test_requests_that_begin_alike_are_computed_in_one_forward() -> None:
    network = tiny_network()
    own = tiny_chat_model(network)
    gate = Gate(steps=1)
    running = new_generation(own, "hello", check=gate, max_tokens=20)
    own.engine.submit(running)
    until(lambda: gate.is_blocking)
    prefills = rows_of_each_forward(network, least_tokens=2)
    asked = [new_generation(own, text, shared=SYSTEM) for text in ("one", "two", "six")]
    for each in asked:
        own.engine.submit(each)
    gate.open()

    assert all(rest_of(each) for each in [running, *asked])
    # The three prompts, and the running reply.
    assert prefills == [4]
    # Four pages of 32 tokens.
    assert [each.num_reused for each in asked] == [0, 128, 128]


def test_a_prompt_is_computed_in_the_forward_of_the_running_replies(model: ChatModel) -> None:
    network = tiny_network()
    own = tiny_chat_model(network, prefill_tokens=8)
    running, late = [f"{at} hello" for at in range(3)], "b" * 20
    alone = [generate_text(model, text, max_tokens=40) for text in (*running, late)]
    gate = Gate(steps=0)
    asked = [new_generation(own, text, check=gate, max_tokens=40) for text in running]
    for each in asked:
        own.engine.submit(each)
    gate.allow(30)  # ten steps of three requests
    until(lambda: gate.is_blocking)
    forwards: list[list[int]] = []
    network.base_model.register_forward_pre_hook(
        lambda _, __, kwargs: forwards.append(kwargs["pages"].batch.counts), with_kwargs=True
    )
    own.engine.submit(newcomer := new_generation(own, late, max_tokens=40))
    gate.open()

    assert [rest_of(each) for each in (*asked, newcomer)] == alone
    at = next(at for at, counts in enumerate(forwards) if max(counts) > 1)
    assert forwards[at : at + 4] == [[1, 1, 1, 8], [1, 1, 1, 8], [1, 1, 1, 4], [1, 1, 1, 1]]


def test_a_request_waits_for_the_part_of_a_page_that_it_can_copy() -> None:
    network = tiny_network()
    own = tiny_chat_model(network)
    prefills = rows_of_each_forward(network, least_tokens=2)
    gate = Gate(steps=0)
    first = new_generation(own, "x", shared="a" * 60, check=gate)
    asked = [new_generation(own, text, shared="a" * 60) for text in "yz"]
    for each in [first, *asked]:
        own.engine.submit(each)
    gate.open()

    assert all(rest_of(each) for each in [first, *asked])
    # One token each is left to compute then.
    assert prefills == [1]
    assert [each.num_reused for each in asked] == [60, 60]


def test_requests_go_on_when_the_one_that_they_share_with_is_cancelled() -> None:
    own = tiny_chat_model(prefill_tokens=8)
    alone = [generate_text(own, text, shared=SYSTEM) for text in ("one", "two")]
    again = tiny_chat_model(prefill_tokens=8)
    gate = Gate(steps=5)
    leaving = new_generation(again, "six", shared=SYSTEM, check=gate)
    staying = [new_generation(again, text, shared=SYSTEM) for text in ("one", "two")]
    for each in [leaving, *staying]:
        again.engine.submit(each)
    until(lambda: gate.is_blocking)
    gate.is_cancelled = True
    gate.open()

    assert [rest_of(each) for each in staying] == alone
    with pytest.raises(Cancelled):
        rest_of(leaving)


def test_prompts_of_different_lengths_are_packed_without_padding() -> None:
    network = tiny_network()
    own = tiny_chat_model(network, prefill_tokens=64)
    sizes: list[int] = []
    network.base_model.register_forward_pre_hook(
        lambda _, __, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    gate = Gate(steps=0)
    texts = ["a" * 40, "b" * 7, "c" * 100]
    asked = [new_generation(own, text, check=gate, max_tokens=1) for text in texts]
    for each in asked:
        own.engine.submit(each)
    gate.open()

    assert all(rest_of(each) for each in asked)
    # The third prompt does not fit beside the others, and is longer than a batch.
    assert sizes == [47, 64, 36]


def rows_of_each_forward(network: Any, least_tokens: int = 1) -> list[int]:
    """Filled with the number of requests of each forward of that many tokens a request."""
    rows: list[int] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        counts = kwargs["pages"].batch.counts
        if max(counts) >= least_tokens:
            rows.append(len(counts))

    network.base_model.register_forward_pre_hook(note, with_kwargs=True)
    return rows


def test_no_more_requests_run_at_once_than_the_pages_hold() -> None:
    network = tiny_network()
    rows = rows_of_each_forward(network)
    own = tiny_chat_model(network, kv_tokens=256)

    texts_of(own.engine, [new_generation(own, f"{at} hello", max_tokens=40) for at in range(12)])

    # Eight pages: one for each prompt, and one more for each reply.
    assert max(rows) == 4


@pytest.mark.parametrize("prefix_tokens", [0, 16384])
def test_replies_that_outgrow_the_pages_are_the_same(model: ChatModel, prefix_tokens: int) -> None:
    params: list[dict[str, Any]] = [
        {},
        {"temperature": 1.2, "seed": 4},
        {"frequency_penalty": 0.7, "repetition_penalty": 1.3},
    ]

    def make(at: int) -> Generation:
        options = {"max_tokens": 60 + 20 * (at % 4), **params[at % 3]}
        return new_generation(model, f"question {at}", **options)

    network = tiny_network()
    own, most_used = tiny_chat_model(network, kv_tokens=256, prefix_tokens=prefix_tokens), [0]

    def note(*_: Any) -> None:
        most_used[0] = max(most_used[0], own.engine.pages.num_used)

    network.base_model.register_forward_pre_hook(note)
    alone = [text_of(model.engine, make(at)) for at in range(9)]
    asked = [make(at) for at in range(9)]

    assert texts_of(own.engine, asked) == alone
    # Eight pages at any time, which are too few: some requests were computed again.
    assert most_used == [8]
    assert own.engine.num_computed > sum(len(each.ids) - 1 for each in asked) - 9 * 32
    assert own.engine.pages.num_used == 0


def test_the_request_that_came_first_is_never_computed_again() -> None:
    network = tiny_network()
    own = tiny_chat_model(network, kv_tokens=256, prefix_tokens=0)
    asked = [new_generation(own, f"bye {at}", max_tokens=200) for at in range(5)]
    computed: list[int] = []
    network.base_model.register_forward_pre_hook(lambda *_: computed.append(asked[0].num_computed))

    assert all(len(text) == 200 for text in texts_of(own.engine, asked))
    assert computed == sorted(computed)
    # Others were.
    assert own.engine.num_computed > sum(len(each.ids) - 1 for each in asked)


def test_a_request_that_is_longer_than_the_cache_runs_alone() -> None:
    network = tiny_network()
    own = tiny_chat_model(network, kv_tokens=256)
    gate = Gate(steps=3)
    long = new_generation(own, "a" * 300, check=gate, max_tokens=40)
    own.engine.submit(long)
    until(lambda: gate.is_blocking)
    rows = rows_of_each_forward(network)
    own.engine.submit(short := new_generation(own, "bye", max_tokens=3))
    gate.open()

    assert rest_of(short) and rest_of(long)
    assert set(rows) == {1}


def test_running_replies_go_on_while_a_long_prompt_is_computed() -> None:
    own = tiny_chat_model(prefill_tokens=8)
    gate = Gate(steps=20)
    running = new_generation(own, "hello", check=gate, max_tokens=300)
    own.engine.submit(running)
    until(lambda: gate.is_blocking)
    before = running.num_completion

    long = new_generation(own, "a" * 160, max_tokens=1)
    own.engine.submit(long)
    gate.allow(100)
    rest_of(long)

    # Twenty chunks of eight tokens, and one token of the running reply between any two.
    assert running.num_completion - before >= 19
    gate.open()
    rest_of(running)


# --- errors ---


def failing(network: Any, error: Exception, rows: int, times: list[int]) -> Any:
    """The network, which raises `error` for more than `rows` rows, `times` times."""

    def fail(module: Any, args: Any, kwargs: Any) -> None:
        if len(kwargs["pages"].batch.counts) > rows and times[0]:
            times[0] -= 1
            raise error

    network.base_model.register_forward_pre_hook(fail, with_kwargs=True)
    return network


def test_an_out_of_memory_makes_the_batch_smaller_and_loses_no_reply(model: ChatModel) -> None:
    alone = [generate_text(model, text) for text in PROMPTS[:8]]
    network = tiny_network()
    tried = rows_of_each_forward(network)
    small = tiny_chat_model(failing(network, torch.OutOfMemoryError("full"), rows=2, times=[99]))

    assert texts_of(small.engine, [new_generation(small, text) for text in PROMPTS[:8]]) == alone
    too_large = [rows for rows in tried if rows > 2]
    assert too_large == sorted(set(too_large), reverse=True) != []


def test_an_out_of_memory_while_a_token_is_drawn_uses_up_no_random_number(
    model: ChatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replies(engine: Engine) -> list[str]:
        seeded = {"temperature": 1.2, "max_tokens": 20}
        return texts_of(engine, [new_generation(model, "once", seed=i, **seeded) for i in range(4)])

    alone, failures = replies(tiny_chat_model().engine), [torch.OutOfMemoryError("full")] * 2
    draw = sampling.draw_tokens

    def fail(*args: Any) -> Any:
        if failures:
            raise failures.pop()
        return draw(*args)

    monkeypatch.setattr(sampling, "draw_tokens", fail)

    assert replies(tiny_chat_model().engine) == alone
    assert not failures


class Failing(TorchDispatchMode):
    """Raises out-of-memory at the first call of an operation, before or after it computes."""

    def __init__(self, operation: str, is_computed: bool) -> None:
        super().__init__()
        self.operation, self.is_computed, self.failed = operation, is_computed, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        fails = not self.failed and str(func).startswith(f"aten.{self.operation}.")
        self.failed = self.failed or fails
        made = None if fails and not self.is_computed else func(*args, **(kwargs or {}))
        if fails:
            raise torch.OutOfMemoryError("full")
        return made


@dataclass(frozen=True)
class FailingDevice(Device):
    mode: Failing | None = None

    def counting(self) -> Any:
        return self.mode or super().counting()


PENALTIES = {"presence_penalty": 2.0, "frequency_penalty": 1.0, "repetition_penalty": 1.5}


@pytest.mark.parametrize("is_computed", [False, True])
@pytest.mark.parametrize("operation", ["index", "where", "sub", "index_put_", "argmax"])
def test_an_out_of_memory_while_penalties_are_computed_loses_no_count(
    model: ChatModel, operation: str, is_computed: bool
) -> None:
    def replies(engine: Engine) -> list[str]:
        texts = ["hello", "bye"]
        asked = [new_generation(model, each, max_tokens=20, **PENALTIES) for each in texts]
        return texts_of(engine, asked)

    mode = Failing(operation, is_computed)
    device = FailingDevice(CPU.name, CPU.dtype, mode=mode)
    failing_once = Engine(tiny_network(), device, [])

    assert replies(failing_once) == replies(Engine(tiny_network(), CPU, []))
    assert mode.failed


def test_a_batch_grows_again_after_an_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_limit, "STEPS", 4)
    network, sizes = tiny_network(), [0]

    def note(module: Any, args: Any, kwargs: Any) -> None:
        counts = kwargs["pages"].batch.counts
        if max(counts) == 1 and len(counts) != sizes[-1]:
            sizes.append(len(counts))

    network.base_model.register_forward_pre_hook(note, with_kwargs=True)
    own = tiny_chat_model(failing(network, torch.OutOfMemoryError("full"), rows=7, times=[1]))

    texts_of(own.engine, [new_generation(own, "hello", max_tokens=200) for _ in range(8)])

    assert sizes[1:6] == [4, 5, 6, 7, 8]


def test_a_conversation_that_does_not_fit_alone_is_out_of_memory() -> None:
    network = failing(tiny_network(), torch.OutOfMemoryError("full"), rows=0, times=[1])
    small = tiny_chat_model(network)

    with pytest.raises(OutOfMemory):
        generate_text(small, "hello")

    assert generate_text(small, "hello")


def test_an_out_of_memory_frees_the_shared_prefixes_too() -> None:
    network = tiny_network()
    own = tiny_chat_model(network)
    generate_text(own, "x", shared=SYSTEM)
    failing(network, torch.OutOfMemoryError("full"), rows=1, times=[1])
    gate = Gate(steps=3)
    first = new_generation(own, "hello", check=gate, max_tokens=20)
    own.engine.submit(first)
    until(lambda: gate.is_blocking)
    own.engine.submit(second := new_generation(own, "bye", max_tokens=20))
    gate.open()
    rest_of(first), rest_of(second)

    text_of(own.engine, later := new_generation(own, "x", shared=SYSTEM))

    assert later.num_reused == 0


def test_a_request_that_fails_leaves_the_batch_before_anybody_reads_its_error(
    model: ChatModel,
) -> None:
    def refuse(ids: Any) -> str:
        raise InvalidPrompt("no letters")

    prompt, sampling = model.tokenizer.encode("hello"), SamplingParams(max_tokens=400)
    failed = Generation(prompt, sampling, refuse)
    model.engine.submit(failed)

    until(lambda: failed.num_completion > 0 and model.engine.num_running == 0)
    assert failed.num_completion == 1
    with pytest.raises(InvalidPrompt):
        rest_of(failed)


def test_after_a_bug_the_next_request_is_answered() -> None:
    broken = tiny_chat_model(failing(tiny_network(), RuntimeError("secret"), rows=0, times=[1]))

    with pytest.raises(InternalError) as error:
        generate_text(broken, "hello")

    assert "secret" not in error.value.message
    assert generate_text(broken, "hello")
