"""The benchmarks of docs/benchmarks.md: `python -m benchmarks.<name>`."""

import os
import sys

# Set before torch is imported. On a shared machine two threads are slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# As the worker has it (ourvidz_serverless/models/__init__.py).
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# transformers and diffusers import torchao if it is installed, which takes seconds.
sys.modules.setdefault("torchao", None)  # type: ignore[arg-type]
