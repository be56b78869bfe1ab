"""The environment, and the page that describes it."""

import re
from pathlib import Path

import pytest

from ourvidz_serverless import settings
from ourvidz_serverless.errors import ModelLoadError
from ourvidz_serverless.settings import Settings

ROOT = Path(__file__).parents[1]


def test_every_setting_is_in_the_documented_table_and_no_other() -> None:
    page = (ROOT / "docs/settings.md").read_text()

    documented = re.findall(r"^\| `([A-Z0-9_]+)` \|", page, re.MULTILINE)

    assert sorted(documented) == sorted(name.upper() for name in Settings.model_fields)


def test_families_are_a_comma_separated_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAMILIES", "sdxl, wan")

    assert settings.read().families == ("sdxl", "wan")


def test_an_empty_variable_is_as_good_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOB_TIMEOUT_S", "")

    assert settings.read().job_timeout_s == 600


def test_all_wrong_variables_are_named_at_once_and_no_value_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CONCURRENCY", "a-secret")
    monkeypatch.setenv("DTYPE", "int3")

    with pytest.raises(ModelLoadError) as wrong:
        settings.read()

    assert "CONCURRENCY: " in wrong.value.message
    assert "DTYPE: " in wrong.value.message
    assert "a-secret" not in wrong.value.message


def test_printing_the_settings_prints_no_secret() -> None:
    assert "hush" not in repr(Settings(job_callback_secret="hush", supabase_service_key="hush"))


@pytest.mark.parametrize(
    ("families", "jobs"), [(("sdxl",), 2), (("wan",), 1), (("sdxl", "chat"), 64)]
)
def test_concurrency_is_the_familys_own_unless_set(families: tuple[str, ...], jobs: int) -> None:
    assert Settings(families=families).resolved_concurrency == jobs
    assert Settings(families=families, concurrency=5).resolved_concurrency == 5
