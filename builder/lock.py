"""Write the lock files: every package of an image, with its version and its hashes.

    python -m builder.lock              after a change of requirements.txt
    python -m builder.lock --upgrade    and newer versions of indirect requirements

There are four files, for Python 3.11 and 3.12. `uv pip compile` makes them from the package index
that this machine is configured for. `requirements.torch.cuda13.0.lock` has the index's build of
torch, which is for CUDA, and the libraries that only this build needs.
`requirements.torch.cuda12.8.lock` has the same for an older CUDA. `requirements.lock` has all other
packages, which work with any build of torch. `requirements-c2pa.lock` has the packages that
requirements-c2pa.txt adds.
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
LOCK, C2PA_LOCK = ROOT / "requirements.lock", ROOT / "requirements-c2pa.lock"
TORCH_LOCK = ROOT / "requirements.torch.cuda13.0.lock"
OLDER_TORCH_LOCK = ROOT / "requirements.torch.cuda12.8.lock"
LOCKS = (LOCK, TORCH_LOCK, C2PA_LOCK)

#: The newest torch on PyPI that is built for CUDA 12.8, for hosts whose driver has no CUDA 13.0:
#: https://dev-discuss.pytorch.org/t/3325 and https://github.com/pytorch/pytorch/issues/178665.
OLDER_TORCH = "torch==2.10.0"

#: torch, and the packages that only its build for CUDA requires.
OF_TORCH = re.compile(r"(torch|triton|cuda-\S+|nvidia-\S+)==")

#: A requirement with its marker, and the hashes on the lines below it.
ENTRY = re.compile(r"^[a-z0-9].*\\\n(?:    --hash=.*\n)+", re.MULTILINE)

OPTIONS = (
    *("--universal", "--python-version", "3.11"),
    *("--generate-hashes", "--no-header", "--no-annotate"),
    # A lock has no package index: each machine has its own.
    *("--no-emit-index-url", "--no-emit-find-links"),
)

#: Packages that others require and no image imports are left out. An override replaces every
#: requirement of a package. `NEVER` is true on no system, so the lock omits these packages, and
#: those that only they require.
NEVER = 'sys_platform == "never"'
OVERRIDES = (
    # runpod requires `fastapi[all]`, with a command line that uses a cloud service and Sentry, and
    # with mail addresses, forms and templates. The HTTP service needs none of them.
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
    older = compiled([REQUIREMENTS], upgrade, OLDER_TORCH)
    whole = compiled([REQUIREMENTS, C2PA_REQUIREMENTS], upgrade)
    _write(LOCK, [entry for entry in base if not OF_TORCH.match(entry)])
    _write(TORCH_LOCK, [entry for entry in base if OF_TORCH.match(entry)])
    _write(OLDER_TORCH_LOCK, older_torch(base, older))
    _write(C2PA_LOCK, [entry for entry in whole if entry not in base])


def _write(path: Path, entries: Sequence[str]) -> None:
    path.write_text(HEAD + "".join(entries))
    print(f"{path.name}: {len(entries)} packages")


def older_torch(base: Sequence[str], older: Sequence[str]) -> list[str]:
    """The entries that only an older torch needs; all others are those of the newer torch.

    Exits with an error that names an entry of another version.
    """
    # A marker may differ, if another package needs it on more systems.
    versions = {entry.split()[0] for entry in base}
    others = [entry.split()[0] for entry in older if not OF_TORCH.match(entry)]
    if different := set(others) - versions:
        sys.exit(f"cannot lock, since {OLDER_TORCH} needs another version: {min(different)}")
    return [entry for entry in older if OF_TORCH.match(entry)]


def compiled(requirements: Sequence[Path], upgrade: bool, torch: str | None = None) -> list[str]:
    """The entries of one lock of all requirements. Without `upgrade` locked versions stay.

    `torch` is a requirement that replaces that of the files.
    """
    locks = (LOCK, OLDER_TORCH_LOCK) if torch else LOCKS
    with tempfile.TemporaryDirectory() as folder:
        whole, overrides = Path(folder) / "whole.lock", Path(folder) / "overrides.txt"
        whole.write_text("".join(path.read_text() for path in locks if path.exists()))
        overrides.write_text("\n".join([*OVERRIDES, *([torch] if torch else [])]))
        uv = Path(sys.executable).with_name("uv")
        options = [*OPTIONS, *(["--upgrade"] if upgrade else []), "--override", str(overrides)]
        options += ["--output-file", str(whole)]
        subprocess.run([uv, "pip", "compile", "--quiet", *options, *requirements], check=True)
        return [entry for entry in entries_of(whole.read_text()) if "'never'" not in entry]


def entries_of(text: str) -> list[str]:
    """The entries of a lock. Exits with an error that names an entry without hashes."""
    rest = ENTRY.sub("", text).splitlines()
    bare = [line for line in rest if line.strip() and not line.startswith("#")]
    if bare:
        sys.exit(f"cannot lock, since there are no hashes of it: {bare[0]}")
    return ENTRY.findall(text)


if __name__ == "__main__":
    main()
