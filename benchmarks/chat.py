"""Replies a second: transformers' `generate` one by one, and the engine with all at once.

    python -m benchmarks.chat                  the pocket model, on what there is
    python -m benchmarks.chat --model 7b       Qwen2.5-7B's architecture with random weights

Greedy, so that the two arms' tokens can be compared; the same prompts in both. `ceiling` is the
pace of one stream if nothing but the weights' way from memory took time (`--bandwidth`, in TB/s).
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from ourvidz_serverless.models.device import Device
from ourvidz_serverless.models.engine import Engine, Generation, Limits
from ourvidz_serverless.models.qwen import POCKET
from ourvidz_serverless.models.sampling import Sampling
from ourvidz_serverless.settings import Settings

QWEN_7B = Qwen2Config(
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    max_position_embeddings=32768,
    rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="pocket", help="pocket, 7b, or a folder")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=100, help="tokens; half of them are shared")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of a reply")
    parser.add_argument("--alone", type=int, default=4, help="requests in the first arm")
    parser.add_argument("--bandwidth", type=float, default=4.8)
    options = parser.parse_args()

    device = Device.choose(Settings(), on_gpu=torch.bfloat16)
    model = load(options.model, device)
    prompts = make_prompts(model.config.vocab_size, options.requests, options.prompt)
    weights = sum(each.numel() * each.element_size() for each in model.parameters())
    print(f"{weights / 1e9:.2f} GB on {device.name} in {device.dtype}, {options}")

    alone = one_by_one(model, device, prompts[: options.alone], options.tokens)
    engine = Engine(model, device, ends=[], limits=Limits(max_batch=options.requests))
    at_once(engine, prompts[:2], 2)  # warms up
    together = at_once(engine, prompts, options.tokens)
    equal = sum(one == other for one, other in zip(alone, together, strict=False))
    print(f"equal: {equal} of {len(alone)}")
    if device.is_cuda:
        print(f"ceiling of one stream: {options.bandwidth * 1e12 / weights:.0f} tokens/s")


def load(name: str, device: Device) -> Any:
    if name == "7b":
        with torch.device(device.name):
            return Qwen2ForCausalLM(QWEN_7B).to(device.dtype).eval()
    folder = POCKET if name == "pocket" else name
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=device.dtype)
    return model.to(device.name).eval()


def make_prompts(vocabulary: int, requests: int, length: int) -> list[list[int]]:
    random = torch.Generator().manual_seed(0)
    rows = torch.randint(100, vocabulary, (requests, length), generator=random)
    rows[:, : length // 2] = rows[0, : length // 2]
    return rows.tolist()


def one_by_one(
    model: Any, device: Device, prompts: list[list[int]], tokens: int
) -> list[list[int]]:
    began, replies = time.monotonic(), []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=device.name)
        options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
        reply = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0]
        replies.append(reply[len(prompt) :].tolist())
    say("generate, one by one", len(prompts) * tokens, time.monotonic() - began)
    return replies


def at_once(engine: Engine, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    began = time.monotonic()
    generations = [
        Generation(
            prompt,
            Sampling(max_tokens=tokens, temperature=0),
            decode=lambda ids: "x" * len(ids),
            num_shared=len(prompt) // 2,
        )
        for prompt in prompts
    ]
    for generation in generations:
        engine.submit(generation)
    with ThreadPoolExecutor(len(generations)) as threads:
        list(threads.map("".join, generations))
    say(f"engine, {len(prompts)} at once", len(prompts) * tokens, time.monotonic() - began)
    first = sorted(each.time_to_first_token_s for each in generations)
    print(f"{'':24} first token: median {first[len(first) // 2]:.3f} s, last {first[-1]:.3f} s")
    return [each.ids[each.num_prompt :] for each in generations]


def say(arm: str, tokens: int, seconds: float) -> None:
    print(f"{arm:24} {tokens / seconds:8.1f} tokens/s ({tokens} in {seconds:.2f} s)", flush=True)


if __name__ == "__main__":
    main()
