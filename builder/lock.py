"""The lock files: every package that an image installs, at its version, with its hashes.

    python -m builder.lock              after a change of requirements.txt
    python -m builder.lock --upgrade    and newer versions of what only other packages require

Three files, for Python 3.11 and 3.12 alike, made by `uv pip compile` from the package index that
this machine is configured for. `requirements.torch.lock` holds torch as the index has it, built
for CUDA, with the libraries that only this build needs; `requirements.lock` holds all the rest,
which goes with any build of torch. `requirements-c2pa.lock` holds what requirements-c2pa.txt adds
to both.
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
C2PA_REQUIREMENTS = ROOT / "requirements-c2pa.txt"
LOCK, TORCH_LOCK = ROOT / "requirements.lock", ROOT / "requirements.torch.lock"
C2PA_LOCK = ROOT / "requirements-c2pa.lock"
LOCKS = (LOCK, TORCH_LOCK, C2PA_LOCK)

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

#: Packages that others require and no image imports: they are left out. An override replaces a
#: requirement wherever it stands. `NEVER` is true on no system, so the lock omits these packages,
#: and those that only they require.
NEVER = 'sys_platform == "never"'
OVERRIDES = (
    # runpod asks for `fastapi[all]`: a command line that talks to a cloud and to Sentry, mail
    # addresses, forms, templates. The HTTP service needs none of them.
    "fastapi",
    # runpod's command line, which manages pods from a terminal.
    f"inquirerpy ; {NEVER}",
    f"prettytable ; {NEVER}",
    f"watchdog ; {NEVER}",
    # The command line of transformers.
    f"typer ; {NEVER}",
)

HEAD = "# Made by `python -m builder.lock`.\n\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--upgrade", action="store_true")
    upgrade = parser.parse_args(argv).upgrade
    base = compiled([REQUIREMENTS], upgrade)
    whole = compiled([REQUIREMENTS, C2PA_REQUIREMENTS], upgrade)
    _write(LOCK, [entry for entry in base if not OF_TORCH.match(entry)])
    _write(TORCH_LOCK, [entry for entry in base if OF_TORCH.match(entry)])
    _write(C2PA_LOCK, [entry for entry in whole if entry not in base])


def _write(path: Path, entries: Sequence[str]) -> None:
    path.write_text(HEAD + "".join(entries))
    print(f"{path.name}: {len(entries)} packages")


def compiled(requirements: Sequence[Path], upgrade: bool) -> list[str]:
    """The entries of one lock of all requirements; versions that are locked already stay."""
    with tempfile.TemporaryDirectory() as folder:
        whole, overrides = Path(folder) / "whole.lock", Path(folder) / "overrides.txt"
        whole.write_text("".join(path.read_text() for path in LOCKS if path.exists()))
        overrides.write_text("\n".join(OVERRIDES))
        uv = Path(sys.executable).with_name("uv")
        options = [*OPTIONS, *(["--upgrade"] if upgrade else []), "--override", str(overrides)]
        options += ["--output-file", str(whole)]
        subprocess.run([uv, "pip", "compile", "--quiet", *options, *requirements], check=True)
        return [entry for entry in entries_of(whole.read_text()) if "'never'" not in entry]


def entries_of(text: str) -> list[str]:
    """The entries of a lock. Ends the program where one has no hashes, and names it."""
    rest = ENTRY.sub("", text).splitlines()
    bare = [line for line in rest if line.strip() and not line.startswith("#")]
    if bare:
        sys.exit(f"cannot lock, since there are no hashes of it: {bare[0]}")
    return ENTRY.findall(text)


if __name__ == "__main__":
    main()
