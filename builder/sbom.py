"""The bill of materials of the system that this runs in: CycloneDX 1.6, as JSON.

    python -m builder.sbom --name ourvidz-sdxl --version 1.0 --weights /models --dest sbom.cdx.json

Python's packages and Debian's as they are installed, and every file of weights in the folders that
are given, with the SHA-256 of what lies there. Run while an image is built; it needs nothing but
the standard library. The same system gives the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

Component = dict[str, Any]

DPKG = ("dpkg-query", "--show", "--showformat", "${Package}\t${Version}\t${Architecture}\n")

#: What a package index calls licences, before the name of one.
CLASSIFIER = "License :: OSI Approved :: "


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", required=True)
    parser.add_argument("--version", required=True)
    parser.add_argument("--weights", type=Path, nargs="*", default=[], help="folders")
    parser.add_argument("--dest", type=Path, required=True)
    args = parser.parse_args(argv)
    bill = bill_of(args.name, args.version, args.weights)
    args.dest.write_text(json.dumps(bill, indent=1) + "\n")


def bill_of(name: str, version: str, weights: Sequence[Path]) -> Component:
    """The bill of this system, called `name`."""
    components = [*packages(), *system_packages()]
    for folder in weights:
        components += models(folder)
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": {"type": "container", "name": name, "version": version}},
        "components": components,
    }


def packages() -> list[Component]:
    """Python's packages, by name."""
    found = {}
    for each in importlib.metadata.distributions():
        name = re.sub(r"[-_.]+", "-", each.metadata["Name"]).lower()
        purl = f"pkg:pypi/{name}@{quote(each.version, safe='')}"
        found[name] = {**_library(name, each.version, purl), **_licences(each.metadata)}
    return [found[name] for name in sorted(found)]


def system_packages() -> Iterator[Component]:
    """Debian's packages, or Ubuntu's; none where the system has another kind."""
    if not shutil.which(DPKG[0]):
        return
    vendor = platform.freedesktop_os_release()["ID"]
    told = subprocess.run(DPKG, capture_output=True, text=True, check=True).stdout
    for line in told.splitlines():
        name, version, architecture = line.split("\t")
        purl = f"pkg:deb/{vendor}/{quote(name)}@{quote(version, safe='')}?arch={architecture}"
        yield _library(name, version, purl)


def models(folder: Path) -> Iterator[Component]:
    """The files of weights below a folder, by their paths from it on."""
    for path in sorted(folder.rglob("*.safetensors")):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        name = f"{folder.name}/{path.relative_to(folder).as_posix()}"
        yield {
            "type": "machine-learning-model",
            "bom-ref": name,
            "name": name,
            "hashes": [{"alg": "SHA-256", "content": digest}],
        }


def _library(name: str, version: str, purl: str) -> Component:
    return {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}


def _licences(metadata: importlib.metadata.PackageMetadata) -> Component:
    if "License-Expression" in metadata:
        return {"licenses": [{"expression": metadata["License-Expression"]}]}
    kinds = metadata.get_all("Classifier") or []
    names = [kind.removeprefix(CLASSIFIER) for kind in kinds if kind.startswith(CLASSIFIER)]
    return {"licenses": [{"license": {"name": name}} for name in names]} if names else {}


if __name__ == "__main__":
    main()
