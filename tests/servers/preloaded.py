"""What the processes of `warm_python` have imported when they start.

`runpod` is not among them: it reads its environment when it is imported.
"""

import importlib
import os
import sys

# As in a worker: the settings of `logs.configure` and `models.load` precede the imports.
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.modules.setdefault("torchao", None)  # type: ignore[arg-type]

for name in ("models.chat.loader", "models.sdxl.loader", "models.wan.loader", "worker"):
    importlib.import_module(f"ourvidz_serverless.{name}")
# Each process unpickles its function from there.
importlib.import_module("tests.servers.warm_python")
