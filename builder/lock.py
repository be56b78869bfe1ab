"""The lock files: every package that an image installs, at its version, with its hashes.

    python -m builder.lock              after a change of requirements.txt
    python -m builder.lock --upgrade    and newer versions of what only other packages require

Two files, for Python 3.11 and 3.12 alike, made by `uv pip compile` from the package index that
this machine is configured for. `requirements.torch.lock` holds torch as the index has it, built
for CUDA, with the libraries that only this build needs; `requirements.lock` holds all the rest,
which goes with any build of torch.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
REQUIREMENTS = ROOT / "requirements.txt"
LOCK, TORCH_LOCK = ROOT / "requirements.lock", ROOT / "requirements.torch.lock"

#: torch, and what its build for CUDA alone requires.
OF_TORCH = re.compile(r"(torch|triton|cuda-\S+|nvidia-\S+)==")

#: A requirement with its marker, and the hashes on the lines below it.
ENTRY = re.compile(r"^[a-z0-9].*\\\n(?:    --hash=.*\n)+", re.MULTILINE)

OPTIONS = (
    *("--universal", "--python-version", "3.11"),
    *("--generate-hashes", "--no-header", "--no-annotate"),
    # A lock names what is installed; whence is the machine's own affair.
    *("--no-emit-index-url", "--no-emit-find-links"),
)

HEAD = "# Made by `python -m builder.lock` from requirements.txt.\n\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--upgrade", action="store_true")
    entries = compiled(parser.parse_args(argv).upgrade)
    for path, of_torch in ((LOCK, False), (TORCH_LOCK, True)):
        ours = [entry for entry in entries if bool(OF_TORCH.match(entry)) is of_torch]
        path.write_text(HEAD + "".join(ours))
        print(f"{path.name}: {len(ours)} packages")


def compiled(upgrade: bool) -> list[str]:
    """The entries of one lock of everything; versions that are locked already stay."""
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole.lock"
        whole.write_text("".join(path.read_text() for path in (LOCK, TORCH_LOCK) if path.exists()))
        uv = Path(sys.executable).with_name("uv")
        options = [*OPTIONS, *(["--upgrade"] if upgrade else []), "--output-file", str(whole)]
        subprocess.run([uv, "pip", "compile", "--quiet", *options, REQUIREMENTS], check=True)
        return ENTRY.findall(whole.read_text())


if __name__ == "__main__":
    main()
