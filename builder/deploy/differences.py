"""The difference between two records, for a person. Secrets are masked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from builder.deploy.secrets import masked


@dataclass(frozen=True, slots=True)
class Difference:
    """One field that is new (`+`), gone (`-`) or another (`~`), and its values as shown."""

    sign: str
    field: str
    values: str


def between(
    was: Mapping[str, Any], will_be: Mapping[str, Any], order: Sequence[str]
) -> list[Difference]:
    """The fields that differ, `group.name` in nested ones, by the order of their groups.

    Groups that the order does not have come last.
    """
    before, after = dict(_leaves(was)), dict(_leaves(will_be))

    def place(name: str) -> int:
        group = name.partition(".")[0]
        return order.index(group) if group in order else len(order)

    return list(_differences(before, after, sorted({**after, **before}, key=place)))


def _leaves(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}{name}.")
        elif value not in ([], "") or path == "env.":
            yield path + name, value


def _differences(
    was: Mapping[str, Any], will_be: Mapping[str, Any], names: Iterable[str]
) -> Iterator[Difference]:
    for name in names:
        if name not in was:
            yield Difference("+", name, _shown(name, will_be[name]))
        elif name not in will_be:
            yield Difference("-", name, _shown(name, was[name]))
        elif was[name] != will_be[name]:
            before, after = _shown(name, was[name]), _shown(name, will_be[name])
            hidden = " (another value)" if before == after else ""
            yield Difference("~", name, f"{before} -> {after}{hidden}")


def _shown(name: str, value: Any) -> str:
    if name == "timeout":
        return f"{value / 1000:g} s"
    if isinstance(value, list):
        return ",".join(map(str, value))
    return masked(name.removeprefix("env."), value) if name.startswith("env.") else str(value)
