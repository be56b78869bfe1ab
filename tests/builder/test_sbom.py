"""The bill of materials of this environment, which has the same packages as an image."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import av
import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from builder import sbom
from builder.lock import ENTRY, LOCKS, REQUIREMENTS

POCKET = REQUIREMENTS.parent / "pocket"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    dest = tmp_path_factory.mktemp("bill") / "sbom.cdx.json"
    told = ["--name", "ourvidz-sdxl", "--version", "1.0", "--weights", str(POCKET)]
    sbom.main([*told, "--dest", str(dest)])
    return dest.read_text()


@pytest.fixture(scope="module")
def components(text: str) -> dict[str, dict[str, Any]]:
    return {each["bom-ref"]: each for each in json.loads(text)["components"]}


def test_the_bill_of_materials_is_valid_cyclonedx(text: str) -> None:
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None


def test_an_invalid_bill_of_materials_fails_the_validation(text: str) -> None:
    broken = text.replace('"library"', '"books"')

    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(broken) is not None


@pytest.mark.parametrize(
    ("name", "version"), re.findall(r"^([\w-]+)==(\S+)", REQUIREMENTS.read_text(), re.MULTILINE)
)
def test_every_requirement_is_in_the_bill_of_materials_with_its_version(
    components: dict[str, dict[str, Any]], name: str, version: str
) -> None:
    (found,) = (each for each in components.values() if each["name"] == name.lower())

    # The version of another build of torch has a suffix after a plus.
    assert found["version"].partition("+")[0] == version
    assert found["purl"].partition("@")[0] == f"pkg:pypi/{name.lower()}"


def test_weights_are_in_the_bill_of_materials_with_their_checksums(
    components: dict[str, dict[str, Any]],
) -> None:
    name = "pocket/sdxl.safetensors"
    digest = hashlib.sha256((REQUIREMENTS.parent / name).read_bytes()).hexdigest()

    assert components[name]["type"] == "machine-learning-model"
    assert components[name]["hashes"] == [{"alg": "SHA-256", "content": digest}]


def test_all_weights_are_in_the_bill_of_materials(components: dict[str, dict[str, Any]]) -> None:
    files = {path.relative_to(POCKET.parent).as_posix() for path in POCKET.rglob("*.safetensors")}

    assert {name for name in components if name.endswith(".safetensors")} == files


def test_the_same_system_has_the_same_bill_of_materials(text: str, tmp_path: Path) -> None:
    again = sbom.bill_of("ourvidz-sdxl", "1.0", [POCKET])

    assert again == json.loads(text)


def locked() -> set[str]:
    """The packages of an image, as the lock files name them."""
    entries = [each for path in LOCKS for each in ENTRY.findall(path.read_text())]
    return {entry.split("==")[0] for entry in entries}


def test_every_package_of_an_image_has_a_licence(components: dict[str, dict[str, Any]]) -> None:
    names = locked()
    unknown = [
        each["name"]
        for each in components.values()
        if each["name"] in names and each.get("purl", "").startswith("pkg:pypi/")
        if not each.get("licenses")
    ]

    assert unknown == []


def native(components: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    names = locked()
    return {
        part["name"]: part
        for each in components.values()
        if each["name"] in names
        for part in each.get("components", ())
    }


def test_every_native_library_of_a_wheel_is_listed_with_its_licence(
    components: dict[str, dict[str, Any]],
) -> None:
    listed = native(components)
    folders = Path(av.__file__).parents[1].glob("*.libs")
    files = [file.name for folder in folders for file in folder.glob("*.so*")]

    assert len(files) > 20
    for file in files:
        assert any(f"lib{name}" in file for name in listed), file
    assert [name for name, part in listed.items() if not part.get("licenses")] == []


def test_a_codec_under_the_gpl_has_the_gpl_as_its_licence(
    components: dict[str, dict[str, Any]],
) -> None:
    for codec in ("x264", "x265"):
        (licence,) = native(components)[codec]["licenses"]
        assert licence == {"expression": "GPL-2.0-or-later"}


def test_the_notice_names_every_library_under_the_gpl(
    components: dict[str, dict[str, Any]],
) -> None:
    notice = (REQUIREMENTS.parent / "NOTICE").read_text()
    under_gpl = [
        name
        for name, part in native(components).items()
        if part["licenses"][0]["expression"].startswith("GPL")
    ]

    assert {"x264", "x265"} <= set(under_gpl)
    assert [name for name in under_gpl if name not in notice] == []
