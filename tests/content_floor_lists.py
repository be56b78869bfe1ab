"""Lists of signs and look-alikes for the content floor, a language a file.

Somebody who had not read the floor's lists wrote them, so that they say how the floor judges texts
that it has not seen. They stay as they are: a miss is corrected in the floor, never in a list."""

import tomllib
from dataclasses import dataclass
from pathlib import Path

DATA = Path(__file__).parent / "data"
FOLDER = DATA / "content_floor"
FIRST_RUN = FOLDER / "first_run.json"
LATEST_RUN = FOLDER / "latest_run.json"
BLIND_FOLDER = DATA / "content_floor_second"
BLIND_RUN = BLIND_FOLDER / "first_run.json"


@dataclass(frozen=True, slots=True)
class LanguageList:
    """Words and short phrases of one language, by what the floor should make of them."""

    language: str
    minor: dict[str, list[str]]
    """Signs of a minor, by group: ages, ages in words, limits, school, words."""
    sexual: list[str]
    passes_in_adult_mode: dict[str, list[str]]
    """Look-alikes by group: adult ages, words that resemble a sign, things such as durations."""
    passes_outside_adult_mode: list[str]
    """Family life: signs of a minor beside nothing sexual. The second lists have none."""

    @property
    def signs(self) -> list[str]:
        return [text for group in self.minor.values() for text in group]

    @property
    def look_alikes(self) -> list[str]:
        return [text for group in self.passes_in_adult_mode.values() for text in group]


def language_lists(folder: Path = FOLDER) -> list[LanguageList]:
    """All languages, in the order of their names."""
    lists = [_read(path) for path in folder.glob("*.toml")]
    return sorted(lists, key=lambda one: one.language)


def blind_lists() -> list[LanguageList]:
    """The second lists. Their author had read neither the floor nor the first lists."""
    return language_lists(BLIND_FOLDER)


def _read(path: Path) -> LanguageList:
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    return LanguageList(
        table["language"],
        table["minor"],
        table["sexual"]["words"],
        table["passes_in_adult_mode"],
        table.get("passes_outside_adult_mode", {"texts": []})["texts"],
    )
