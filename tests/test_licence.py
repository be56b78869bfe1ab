"""The licence of the project, as the files say it that people and tools read."""

import importlib.metadata
import json
import tomllib
from pathlib import Path

import pytest

from tests.files import ROOT

LICENCE = "Apache-2.0"
CARDS = sorted(ROOT.glob("pocket/*/README.md"))


def test_the_licence_is_the_official_text() -> None:
    # accelerate is under the same licence, and its wheel holds the text.
    files = importlib.metadata.files("accelerate") or []
    (official,) = [file for file in files if file.name == "LICENSE"]

    # The file of apache.org begins with an empty line.
    assert (ROOT / "LICENSE").read_text().strip() == official.read_text().strip()


def test_the_packages_of_python_and_npm_name_the_licence() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    package = json.loads((ROOT / "clients/typescript/package.json").read_text())

    assert (project["license"], package["license"]) == (LICENCE, LICENCE)
    assert [name for name in project["license-files"] if not (ROOT / name).exists()] == []


def test_an_image_holds_the_licence_and_names_it_in_a_label() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()

    assert "COPY LICENSE NOTICE " in dockerfile
    assert f'org.opencontainers.image.licenses="{LICENCE}"' in dockerfile


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.parent.name)
def test_the_card_of_a_pocket_model_links_the_licence(card: Path) -> None:
    assert f"[{LICENCE}](../../LICENSE)" in card.read_text()
