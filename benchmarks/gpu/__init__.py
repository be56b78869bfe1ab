"""The first minutes on a real card: tests, then full-size benchmarks with random weights.

    make gpu                              on a machine with a CUDA device, at most nine minutes
    make gpu DEVICE=cpu                   the same steps on small networks; the figures mean nothing
    .venv/bin/python -m benchmarks.gpu --minutes 5 --only machine,sdxl

It needs no network, and writes no weights: they are drawn on the device. Each part runs in a
process of its own, has a budget of seconds, and writes what it finds as it goes. So a part that
hangs or crashes costs only itself, and keeps what it had found. The most valuable parts come first.
A part that the time does not reach is named.

Each benchmark runs the worker and its peer, diffusers or transformers, alternately and on the same
weights. Beside a figure stands its floor, counted by `benchmarks.dry_run` (`counted.json`). The
folder then has:

    summary.md      tables, what disagreed with the counts, and what was not reached
    summary.json    the same as data; `--docs` copies it to docs/measured/ and writes the tables
    log.txt         all that the parts printed, the tests' failures among it

Another machine may have other versions of the libraries. Then the summary says so. What the parts
need beside torch, transformers, accelerate, peft, safetensors, numpy, Pillow, psutil and pytest is
in `NEEDED` (`machine.py`).
"""
