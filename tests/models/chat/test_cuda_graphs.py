"""Replies from recorded steps: the same texts, and a recorder that fails costs nobody a reply."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import pytest
import torch
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from ourvidz_serverless.errors import Cancelled
from ourvidz_serverless.models.chat import cuda_graphs, norms
from ourvidz_serverless.models.chat.engine import Generation
from ourvidz_serverless.models.chat.kv_cache import KVCache
from ourvidz_serverless.models.chat.model import Writer
from ourvidz_serverless.models.chat.request import SamplingParams
from ourvidz_serverless.models.chat.sampling import Sampler, choose
from tests.fakes.fake_cuda_graph import Misplaced, Operations, Tape, failing, num_made, stale
from tests.fakes.tiny_chat import (
    CPU,
    Gate,
    request,
    say,
    say_all,
    tiny_llama,
    tiny_model,
    tiny_writer,
    until,
)

PROMPTS = [f"question {i} " + "and so on " * (i % 7) for i in range(24)]
SYSTEM = "you are a patient machine that writes letters. " * 3
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "big": {"type": "boolean"}},
    "required": ["city", "big"],
    "additionalProperties": False,
}
RULES: list[dict[str, Any]] = [
    {},
    {"temperature": 1.3, "top_p": 0.9, "seed": 5},
    {"temperature": 1.1, "top_k": 9, "seed": 6, "repetition_penalty": 1.2},
    {"presence_penalty": 1.0, "frequency_penalty": 0.5},
]


@pytest.fixture(scope="module")
def plain() -> Writer:
    return tiny_writer()


def make(writer: Writer, at: int) -> Generation:
    shared = SYSTEM if at % 2 else ""
    rules = {"max_tokens": 5 + at % 17, **RULES[at % len(RULES)]}
    made: Generation = request(writer, PROMPTS[at], shared=shared, **rules)
    return made


def count_calls(model: Any) -> list[int]:
    """How often the model's own Python has run since."""
    calls = [0]

    def note(module: Any, given: Any) -> None:
        calls[0] += 1

    model.base_model.register_forward_pre_hook(note)
    return calls


# --- the same texts ---


@pytest.mark.parametrize(
    "limits", [{}, {"max_batch": 3}, {"prefill_tokens": 8}, {"kv_tokens": 2048}]
)
def test_replies_are_the_same_whoever_joins_and_leaves(
    plain: Writer, limits: dict[str, int]
) -> None:
    tape = Tape()
    writer = tiny_writer(record=tape, **limits)
    alone = [say(plain.engine, make(plain, at)) for at in range(24)]

    assert say_all(writer.engine, [make(writer, at) for at in range(24)]) == alone
    assert tape.replayed > tape.recorded > 0
    assert not writer.engine.replay.is_off


def test_what_is_replayed_runs_no_python_of_the_model() -> None:
    model, tape = tiny_model(), Tape()
    calls = count_calls(model)
    writer = tiny_writer(model, tape)

    say(writer.engine, request(writer, "hello", max_tokens=60))

    # The prompt, two steps as ever, the recording, and the step that it is compared on.
    assert calls == [5]
    assert (tape.recorded, writer.engine.replay.replayed) == (1, 56)


def test_lengths_cross_buckets_and_the_cache_grows(plain: Writer) -> None:
    tape = Tape()
    writer = tiny_writer(record=tape)
    texts, lengths = ["a" * 20, "b" * 200, "c" * 20], [40, 120, 40]

    def both(engine_of: Writer) -> list[str]:
        return [
            say(engine_of.engine, request(engine_of, text, max_tokens=tokens))
            for text, tokens in zip(texts, lengths, strict=True)
        ]

    assert both(writer) == both(plain)
    # The second one's cache lies elsewhere, and has both sizes; the third finds one of them again.
    assert writer.engine.replay.buckets == [(1, 512), (1, 256)]
    assert tape.recorded == 3


def test_a_llama_is_replayed_too() -> None:
    tape = Tape()
    plain, writer = tiny_writer(tiny_llama()), tiny_writer(tiny_llama(), tape)

    expected = say(plain.engine, request(plain, "hello", max_tokens=100))

    assert say(writer.engine, request(writer, "hello", max_tokens=100)) == expected
    assert tape.replayed > 50


def test_json_that_fits_its_schema(plain: Writer) -> None:
    tape = Tape()
    writer = tiny_writer(record=tape)

    def answer(of: Writer, seed: int) -> str:
        sampling = SamplingParams(max_tokens=60, temperature=1.5, seed=seed)
        grammar = of.grammars.matcher(SCHEMA)
        return say(
            of.engine,
            Generation(of.tokens.encode("x"), sampling, of.tokens.decode, grammar=grammar),
        )

    assert [answer(writer, seed) for seed in range(3)] == [answer(plain, seed) for seed in range(3)]
    assert tape.replayed > 0


def test_one_that_is_cancelled_changes_nothing_for_the_others(plain: Writer) -> None:
    writer = tiny_writer(record=Tape())
    gate = Gate(turns=3)
    alone = [say(plain.engine, request(plain, text, max_tokens=60)) for text in PROMPTS[:4]]
    leaving = request(writer, "short", check=gate, max_tokens=400)
    staying = [request(writer, text, max_tokens=60) for text in PROMPTS[:4]]
    writer.engine.submit(leaving)
    for each in staying:
        writer.engine.submit(each)
    gate.let(20)
    until(lambda: gate.holds)
    gate.is_set = True
    gate.open()

    with pytest.raises(Cancelled):
        list(leaving)
    assert ["".join(each) for each in staying] == alone


# --- what a step is made of ---


def operations(layers: int) -> int:
    """How many operations make something new in one recorded step."""
    model, counts = tiny_model(layers=layers), []

    def count(compute: Any) -> Any:
        counts.append(num_made(compute))
        return Tape()(compute)

    writer = tiny_writer(model, count)
    say(writer.engine, request(writer, "hello", max_tokens=4))
    return counts[0]


def test_a_layer_is_26_operations() -> None:
    assert operations(layers=3) - operations(layers=2) == 26


@pytest.mark.parametrize(
    ("dtype", "apart"), [(torch.float32, 0.0), (torch.bfloat16, torch.finfo(torch.bfloat16).eps)]
)
def test_fused_norms_differ_in_the_last_bits_at_most(dtype: torch.dtype, apart: float) -> None:
    norm = Qwen2RMSNorm(256).to(dtype)
    torch.manual_seed(0)
    hidden = torch.randn(9, 1, 256, dtype=dtype) * 3
    with torch.no_grad():
        norm.weight.normal_(1, 0.3)
        expected = norm(hidden)
        norms.fuse(norm)
        fused = norm(hidden)

    assert torch.all((fused - expected).abs() <= apart * expected.abs())


# --- how long a recording lives, and how many there are ---


def test_recordings_end_with_the_models_stay_and_are_made_anew(plain: Writer) -> None:
    tape = Tape()
    writer = tiny_writer(record=tape)
    first = say(writer.engine, request(writer, "hello", max_tokens=20))

    writer.to_host()
    assert writer.engine.replay.buckets == []
    writer.to_device()

    assert say(writer.engine, request(writer, "hello", max_tokens=20)) == first
    assert tape.recorded == 2


def test_after_an_out_of_memory_recordings_are_made_anew(plain: Writer) -> None:
    model, tape = tiny_model(), Tape()
    is_full = [True]

    def fail(module: Any, args: Any, kwargs: Any) -> None:
        if kwargs["input_ids"].shape == (2, 1) and is_full[0]:
            is_full[0] = False
            raise torch.OutOfMemoryError("full")

    model.base_model.register_forward_pre_hook(fail, with_kwargs=True)
    writer = tiny_writer(model, tape)
    alone = [say(plain.engine, request(plain, text)) for text in PROMPTS[:2]]

    assert say_all(writer.engine, [request(writer, text) for text in PROMPTS[:2]]) == alone
    assert not is_full[0]
    assert not writer.engine.replay.is_off


def test_the_cache_moves_seldom_where_there_is_room() -> None:
    cache = KVCache(tiny_model().config, CPU.name, CPU.dtype)
    sizes = []
    for rows, length in [(1, 700), (2, 300), (1, 1000), (1, 1100), (3, 100), (1, 2100)]:
        cache.reserve(rows, length, cells=8192)
        sizes.append((cache.rows, cache.length))

    # The last one leaves no room for more than it needs.
    assert sizes == [(1, 1024), (2, 1024), (2, 1024), (2, 2048), (4, 2048), (1, 2304)]
    assert cache.version == 6


def test_steps_of_all_sizes_have_few_shapes() -> None:
    shapes = {
        cuda_graphs._bucket([(1, length - 1)] * rows, 8192)[0]
        for rows, length in itertools.product(range(1, 65), range(1, 8193, 100))
    }

    assert len(shapes) == 42
    assert all(rows & (rows - 1) == 0 for rows, _ in shapes)


def test_the_recording_that_was_not_used_longest_is_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda_graphs, "MAX_RECORDINGS", 2)
    writer = tiny_writer(record=Tape())

    for at_once in (4, 1, 2):
        say_all(writer.engine, [request(writer, "hello", max_tokens=30) for _ in range(at_once)])

    assert len(writer.engine.replay.buckets) == 2


# --- recorders that fail ---


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (stale, "it computed something else"),
        (Misplaced(), "it computed something else"),
        (failing(torch.OutOfMemoryError("full")), "OutOfMemoryError"),
        (failing(RuntimeError("secret")), "RuntimeError"),
        (failing(RuntimeError("secret"), after=9), "RuntimeError"),
    ],
    ids=["stale", "misplaced", "out of memory", "refused", "later"],
)
def test_a_recorder_that_fails_is_one_warning_and_no_reply_is_lost(
    plain: Writer, record: Any, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    writer = tiny_writer(record=record)
    expected = [say(plain.engine, make(plain, at)) for at in range(8)]

    with caplog.at_level(logging.WARNING, "ourvidz"):
        replies = [say(writer.engine, make(writer, at)) for at in range(8)]

    assert replies == expected
    assert [each.getMessage() for each in caplog.records] == [
        f"CHAT_GRAPHS: no step is replayed from now on ({why})"
    ]
    assert writer.engine.replay.is_off
    until(lambda: writer.engine.num_running == 0)


def test_what_a_wrong_recording_wrote_is_read_anew(plain: Writer) -> None:
    writer = tiny_writer(record=Misplaced())

    replies = [say(of.engine, request(of, "x", max_tokens=60)) for of in (writer, plain)]

    assert replies[0] == replies[1]
    assert writer.engine.replay.is_off


def test_nothing_is_recorded_on_a_cpu_or_where_it_is_switched_off() -> None:
    config = Qwen2Config()

    assert cuda_graphs.recorder("auto", CPU, config) is None
    assert cuda_graphs.recorder("off", CPU, config) is None


# --- what the host waits for ---


def test_the_host_waits_for_no_number_but_the_tokens() -> None:
    logits = torch.randn(4, 5000, generator=torch.Generator().manual_seed(0))
    samplers = [Sampler(SamplingParams(max_tokens=9, **each), prompt=[1, 2]) for each in RULES]

    with Operations() as operations:
        for _ in range(3):
            for sampler, token in zip(samplers, choose(logits.clone(), samplers), strict=True):
                sampler.note(token)

    assert [name for name in operations.waits if name != "lift_fresh"] == []


@pytest.mark.parametrize("at_once", [1, 5])
def test_a_step_sends_the_same_few_numbers_however_long_the_reply(at_once: int) -> None:
    logits = torch.randn(at_once, 500, generator=torch.Generator().manual_seed(0))
    rules = {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.1}
    samplers = [
        Sampler(SamplingParams(max_tokens=99, **rules), list(range(200))) for _ in range(at_once)
    ]
    sent = []
    for _ in range(6):
        with Operations() as operations:
            tokens = choose(logits.clone(), samplers)
        for sampler, token in zip(samplers, tokens, strict=True):
            sampler.note(token)
        sent.append(operations.waits.count("lift_fresh"))

    # The rules of all, and each one's last token. At first each one's prompt instead.
    assert sent == [1 + at_once] * 6
