"""A straight-line handler, as RunPod's public workers write it: what `overhead` measures against.

Load, generate, save as Pillow does by default, upload, return: one job after another, in a plain
function. It runs in the environment of a RunPod worker.
"""

import io
import os
import time
from typing import Any

import requests
import runpod

from benchmarks.arms import plain_picture, plain_pipeline

PIPE = plain_pipeline()


def handler(job: dict[str, Any]) -> dict[str, Any]:
    began = time.monotonic()
    picture = plain_picture(PIPE, **job["input"])
    generated_s = time.monotonic() - began
    file = io.BytesIO()
    picture.save(file, "PNG")
    seed = job["input"]["seed"]
    url = f"{os.environ['STORE_URL']}/straight/{job['id']}-seed-{seed}.png"
    key = os.environ["STORE_KEY"]
    headers = {"apikey": key, "Authorization": f"Bearer {key}", "Content-Type": "image/png"}
    requests.post(url, data=file.getvalue(), headers=headers, timeout=30).raise_for_status()
    return {"image_url": url, "generate": generated_s}


if __name__ == "__main__":
    runpod.serverless.start({"handler": handler})
