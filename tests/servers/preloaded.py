"""What the processes of `warm_python` have imported when they start.

`runpod` is not among them: it reads its environment when it is imported. What it imports is, and
the processor's name, for which py-cpuinfo starts another Python of 0.9 seconds.
"""

import importlib
import os
import sys

import cpuinfo

# As in a worker: the settings of `logs.configure` and `models.load` precede the imports.
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.modules.setdefault("torchao", None)  # type: ignore[arg-type]

for name in ("models.chat.loader", "models.sdxl.loader", "models.wan.loader", "worker"):
    importlib.import_module(f"ourvidz_serverless.{name}")
for name in ("aiohttp_retry", "boto3", "paramiko", "tqdm_loggable"):
    importlib.import_module(name)
sdk = importlib.import_module("ourvidz_serverless.serving.runpod_sdk")
if name := sdk.processor():
    cpuinfo.get_cpu_info = lambda: {"brand_raw": name}
# Each process unpickles its function from there.
importlib.import_module("tests.servers.warm_python")
# A model searches for garbage whenever it leaves its device. What is imported is none.
garbage = importlib.import_module("ourvidz_serverless.models.memory.garbage")
garbage.leave_out_what_lives()
