"""The baseline handler of `benchmarks.overhead`: written as RunPod's public workers are.

It handles one job after another in a plain function: load, generate, save with Pillow's default,
upload, return. It runs in the environment of a RunPod worker.
"""

import io
import os
import time
from typing import Any

import requests
import runpod

from benchmarks.baselines import baseline_picture, load_baseline_pipeline

PIPE = load_baseline_pipeline()


def handler(job: dict[str, Any]) -> dict[str, Any]:
    began = time.monotonic()
    picture = baseline_picture(PIPE, **job["input"])
    generated_s = time.monotonic() - began
    file = io.BytesIO()
    picture.save(file, "PNG")
    seed = job["input"]["seed"]
    url = f"{os.environ['STORE_URL']}/baseline/{job['id']}-seed-{seed}.png"
    key = os.environ["STORE_KEY"]
    headers = {"apikey": key, "Authorization": f"Bearer {key}", "Content-Type": "image/png"}
    requests.post(url, data=file.getvalue(), headers=headers, timeout=30).raise_for_status()
    return {"image_url": url, "generate": generated_s}


if __name__ == "__main__":
    runpod.serverless.start({"handler": handler})
