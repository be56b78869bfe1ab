"""vLLM for `benchmarks.chat_peers`, which runs this file with the Python that has vLLM.

    python -P vllm_arm.py FOLDER

It reads lines of requests and writes lines of replies, as `chat_peers.Arm` says. It imports nothing
of this repository.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    # What vLLM and its engine's process print goes to stderr.
    os.dup2(2, 1)
    vllm: Any = importlib.import_module("vllm")
    engine = vllm.LLM(
        model=sys.argv[1],
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=2048,
        max_num_batched_tokens=2048,
        max_num_seqs=64,
    )
    for line in sys.stdin:
        requests = json.loads(line)
        sampling = [
            vllm.SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
            for _, count in requests
        ]
        prompts = [{"prompt_token_ids": ids} for ids, _ in requests]
        made = engine.generate(prompts, sampling, use_tqdm=False)
        print(json.dumps([list(each.outputs[0].token_ids) for each in made]), file=out, flush=True)


if __name__ == "__main__":
    main()
