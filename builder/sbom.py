"""The bill of materials of the system that this runs on: CycloneDX 1.6, as JSON.

    python -m builder.sbom --name ourvidz-sdxl --version 1.0 --weights /models --dest sbom.cdx.json

It lists the installed packages of Python and Debian, the native libraries in each wheel below its
package, and every file of weights in the given folders, with its SHA-256. It runs while an image is
built, and needs only the standard library. The same system gives the same bytes.
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

#: The prefix of a licence's classifier in a package index.
CLASSIFIER = "License :: OSI Approved :: "

#: Licences that no field of the package's metadata names, only its text.
OF_PACKAGES = {"torchao": "BSD-3-Clause"}

#: A native library in the folder NAME.libs of a wheel: `libx264-d6533a8d.so.165`.
NATIVE = re.compile(r"lib(?P<name>.+?)_?(?:-[0-9a-f]{8})*\.so(?:\.(?P<version>[\d.]+))?")

_DUAL = "LGPL-3.0-or-later OR GPL-2.0-or-later"

#: The licences of those libraries, by their authors. A wheel's own licence is that of its Python
#: part: av is BSD, and contains x264 and x265. NOTICE says what that means.
OF_NATIVE = {
    **dict.fromkeys(("x264", "x265"), "GPL-2.0-or-later"),
    # FFmpeg, configured with --enable-version3.
    **dict.fromkeys(("avcodec", "avdevice", "avfilter", "avformat"), "LGPL-3.0-or-later"),
    **dict.fromkeys(("avutil", "swresample", "swscale"), "LGPL-3.0-or-later"),
    **dict.fromkeys(("gmp", "hogweed", "nettle", "unistring"), _DUAL),
    **dict.fromkeys(("asound", "gnutls", "quadmath"), "LGPL-2.1-or-later"),
    "mp3lame": "LGPL-2.0-or-later",
    "gfortran": "GPL-3.0-or-later WITH GCC-exception-3.1",
    "freetype": "FTL OR GPL-2.0-or-later",
    **dict.fromkeys(("opencore-amrnb", "opencore-amrwb"), "Apache-2.0"),
    **dict.fromkeys(("opus", "sharpyuv", "vpx", "webp", "webpdemux"), "BSD-3-Clause"),
    **dict.fromkeys(("webpmux", "zstd", "scipy_openblas64"), "BSD-3-Clause"),
    "SvtAv1Enc": "BSD-3-Clause-Clear",
    **dict.fromkeys(("avif", "dav1d", "openjp2"), "BSD-2-Clause"),
    **dict.fromkeys(("brotlicommon", "brotlidec", "lcms2", "vpl"), "MIT"),
    **dict.fromkeys(("Xau", "drm", "xcb", "xcb-shape", "xcb-shm", "xcb-xfixes"), "MIT"),
    "harfbuzz": "MIT-Modern-Variant",
    "jpeg": "IJG AND BSD-3-Clause AND Zlib",
    "lzma": "0BSD",
    "png16": "libpng-2.0",
    "tiff": "libtiff",
}


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
    """The bill of materials of this system, called `name`."""
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
        found[name] = {**_library(name, each.version, purl), **_licences(name, each.metadata)}
        if native := list(_native(purl, each)):
            found[name]["components"] = native
    return [found[name] for name in sorted(found)]


def system_packages() -> Iterator[Component]:
    """The packages of Debian or Ubuntu; none on another system."""
    if not shutil.which(DPKG[0]):
        return
    vendor = platform.freedesktop_os_release()["ID"]
    told = subprocess.run(DPKG, capture_output=True, text=True, check=True).stdout
    for line in told.splitlines():
        name, version, architecture = line.split("\t")
        purl = f"pkg:deb/{vendor}/{quote(name)}@{quote(version, safe='')}?arch={architecture}"
        yield _library(name, version, purl)


def models(folder: Path) -> Iterator[Component]:
    """The files of weights below a folder, by relative path."""
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


def _native(purl: str, package: importlib.metadata.Distribution) -> Iterator[Component]:
    """The native libraries in a wheel's folder `NAME.libs`, by name."""
    for file in sorted(package.files or ()):
        if file.parts[0].endswith(".libs") and (match := NATIVE.fullmatch(file.name)):
            name, version = match["name"], match["version"] or ""
            licence = OF_NATIVE.get(name)
            component = {"type": "library", "bom-ref": f"{purl}#{file}", "name": name}
            if version:
                component["version"] = version
            yield {**component, **({"licenses": [{"expression": licence}]} if licence else {})}


def _licences(name: str, metadata: importlib.metadata.PackageMetadata) -> Component:
    """A package's licence by its metadata: an expression, a classifier, or free text."""
    expressions = metadata.get_all("License-Expression") or OF_PACKAGES.get(name, "").split()
    if expressions:
        return {"licenses": [{"expression": expressions[0]}]}
    kinds = metadata.get_all("Classifier") or []
    names = [kind.removeprefix(CLASSIFIER) for kind in kinds if kind.startswith(CLASSIFIER)]
    # Some packages have the whole text of the licence there.
    first = [text.strip().partition("\n")[0] for text in metadata.get_all("License") or []]
    names = names or first
    return {"licenses": [{"license": {"name": name}} for name in names]} if names else {}


if __name__ == "__main__":
    main()
