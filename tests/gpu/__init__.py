"""Tests on a real CUDA device: `.venv/bin/python -m pytest -m gpu`, or `make gpu`, which runs each
file for itself. They need no network, no server and no downloaded weights.

With `GPU_TESTS_DEVICE=cpu` those that need no CUDA run on the processor, to try them.
"""
