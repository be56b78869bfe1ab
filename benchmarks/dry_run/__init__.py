"""A GPU on paper: what a card would do with the worker's code at full size, counted without one.

    python -m benchmarks.dry_run --quick      one job of each family
    python -m benchmarks.dry_run              all jobs
    python -m benchmarks.dry_run --docs       and write the tables to docs/
    python -m benchmarks.dry_run --only chat  one family; with --docs too

The networks have the published sizes and no weights. Tensors on `cuda` are fake: a shape, a dtype
and a size (`fake_cuda`). All else is the worker's own code, and diffusers' and transformers' own
pipelines beside it. So the counts are the same on every machine, and need neither an idle processor
nor a GPU. They need a C++ compiler, once (`guard`).

What the counts are:

- An operation is one of torch's that writes on the device. Some of them are several kernels.
- Bytes are those of an operation's inputs and outputs. Caches, and what a library reads twice, are
  not in them.
- A floor is the sum over the operations of the longer of computing and memory, by data sheets. It
  knows no time to launch a kernel, and no library that misses its peak.
- Memory is what tensors take, in blocks of 512 bytes. Fragments are not in it; for CUDA's context
  and the libraries' workspaces 0.75 GiB are assumed.
- Attention's kernel is chosen by torch's rules, written again in `attention`.

- Compiled blocks are a table of their own: Inductor plans their kernels on the same fake device
  (`fused`).

What they do not cover: loaders of weights, CUDA graphs, numbers, and whatever depends on them. The
host reads 0, or True, from the device.
"""
