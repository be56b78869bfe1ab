"""A pytest plugin: `pytest -p tests.affected --affected 90` runs what concerns your changes.

Changes are those of the working tree; without any, those of the last commit. A test concerns them
if it failed last time, or if its module imports a changed one, directly or over others, or names a
changed file. The nearest come first, up to the given seconds of tests. Every run of the suite with
this plugin records how long each test took. Without `--affected` all tests run, the files that took
longest first: with several processes none is left alone with a long file at the end.
"""

from __future__ import annotations

import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

#: The folders of the imports that are followed.
PACKAGES = ("ourvidz_serverless", "tests", "builder", "benchmarks")

#: Where the cache of pytest holds the seconds of each test.
SECONDS = "affected/seconds"

#: The seconds of a test that was never measured.
UNMEASURED_S, UNMEASURED_SLOW_S = 0.1, 10.0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--affected", type=float, metavar="SECONDS", help="run what changes concern")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(config))


class Recorder:
    """Adds the seconds of each test of this run to the cache."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._seconds: dict[str, float] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        so_far = self._seconds.get(report.nodeid, 0.0)
        self._seconds[report.nodeid] = round(so_far + report.duration, 3)

    def pytest_sessionfinish(self) -> None:
        cache = self._config.cache
        if cache and self._seconds:
            cache.set(SECONDS, {**cache.get(SECONDS, {}), **self._seconds})


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    limit_s = config.getoption("--affected")
    assert config.cache
    seconds = config.cache.get(SECONDS, {})
    if limit_s is None:
        items[:] = _longest_first(items, seconds)
        return
    distances = distance_of_files(config.rootpath, changed_files(config.rootpath))
    failed = set(config.cache.get("cache/lastfailed", {}))
    concerned = [item for item in items if item.nodeid in failed or item.path in distances]
    concerned.sort(key=lambda item: (item.nodeid not in failed, distances.get(item.path, 0)))
    chosen = set(_within(limit_s, concerned, seconds))
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = [item for item in items if item in chosen]


def _within(
    limit_s: float, items: Iterable[pytest.Item], seconds: Mapping[str, float]
) -> Iterable[pytest.Item]:
    """The items up to the limit; one that is too long is left out, and shorter ones follow."""
    left_s = limit_s
    for item in items:
        cost_s = _cost_s(item, seconds)
        if cost_s <= left_s:
            left_s -= cost_s
            yield item


def _longest_first(items: list[pytest.Item], seconds: Mapping[str, float]) -> list[pytest.Item]:
    costs_s: dict[Path, float] = defaultdict(float)
    for item in items:
        costs_s[item.path] += _cost_s(item, seconds)
    return sorted(items, key=lambda item: -costs_s[item.path])


def _cost_s(item: pytest.Item, seconds: Mapping[str, float]) -> float:
    """The seconds of the test at its last run, or an estimate."""
    slow = item.get_closest_marker("slow") is not None
    return seconds.get(item.nodeid, UNMEASURED_SLOW_S if slow else UNMEASURED_S)


def changed_files(root: Path) -> set[Path]:
    """The changed, added and deleted files of the working tree, or else of the last commit."""
    changed = _git(root, "diff", "--name-only", "HEAD")
    changed += _git(root, "ls-files", "--others", "--exclude-standard")
    return {root / name for name in changed or _git(root, "diff", "--name-only", "HEAD~1", "HEAD")}


def distance_of_files(root: Path, changed: set[Path]) -> dict[Path, int]:
    """How many imports lie between each file and the nearest changed one, for files with a way.

    A file under `tests` that names a changed file, which is no module, is one import away from it.
    """
    import grimp

    sys.path.insert(0, str(root))
    try:
        found = [name for name in PACKAGES if (root / name / "__init__.py").exists()]
        graph = grimp.build_graph(*found, cache_dir=None)
    finally:
        sys.path.remove(str(root))
    files = {name: _file(root, name) for name in graph.modules}
    names = {path.name for path in changed if path not in files.values()}
    distances = {name: 0 for name, path in files.items() if path in changed}
    for name, path in files.items():
        if name.startswith("tests.") and any(each in path.read_text() for each in names):
            distances.setdefault(name, 1)
    nearest = sorted(distances, key=lambda name: distances[name])
    for name in nearest:  # it grows
        for importer in sorted(graph.find_modules_that_directly_import(name)):
            if importer not in distances:
                distances[importer] = distances[name] + 1
                nearest.append(importer)
    return {files[name]: distance for name, distance in distances.items()}


def _file(root: Path, module: str) -> Path:
    path = root.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _git(root: Path, *args: str) -> list[str]:
    done = subprocess.run(["git", *args], cwd=root, capture_output=True, text=True)
    return done.stdout.splitlines()
