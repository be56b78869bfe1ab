"""A family is two modules and one row: the recipe of docs/architecture.md, tried on a copy."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from PIL import Image

from ourvidz_serverless.families import FAMILIES, FAMILY_OF
from tests.files import ROOT, SPECIFICATION
from tests.patience import PATIENCE_S
from tests.servers.handler import LOCAL_API, failure, served_at
from tests.servers.worker_process import WorkerProcess
from tests.serving.http.test_page import logic

RECIPE = ROOT / "docs" / "architecture.md"
TABLE = "ourvidz_serverless/families.py"
TABLE_ENDS = "\n)\n\n#: The families by name."
WEIGHTS = 'weights=(Weights("ECHO_MODEL", "an echo", ("unet",)),)'

Ask = Callable[..., dict[str, Any]]


def recipe() -> dict[str, str]:
    """The recipe's code, by the file that it belongs to."""
    return dict(re.findall(r"```python\n# (\S+)\n(.*?)```", RECIPE.read_text(), re.DOTALL))


def project_with(folder: Path, row: str) -> Path:
    """A copy of the project with the recipe's modules and a row in the table of families."""
    for name in ("ourvidz_serverless", "builder", "contract", "clients"):
        ignored = shutil.ignore_patterns("node_modules", "__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    shutil.copy(ROOT / "handler.py", folder)
    for name, code in recipe().items():
        if name != TABLE:
            (folder / name).write_text(code)
    table = (folder / TABLE).read_text()
    assert TABLE_ENDS in table
    (folder / TABLE).write_text(table.replace(TABLE_ENDS, f"\n{row.rstrip()}{TABLE_ENDS}"))
    return folder


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with the recipe's family."""
    return project_with(tmp_path_factory.mktemp("echo"), recipe()[TABLE])


def run(project: Path, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Python in the copy, which serves the new family alone."""
    return subprocess.run(
        [sys.executable, *args],
        cwd=project,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(project), "FAMILIES": "echo", **env},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


@pytest.fixture(scope="module")
def ask(project: Path) -> Iterator[Ask]:
    """The answer to a job of one `handler.py` of the copy, which serves the SDK's own API."""
    env = {"PYTHONPATH": str(project), "FAMILIES": "echo", "STORAGE_URL": "file:outputs"}
    program = sys.executable  # a warm process has imported the project itself
    with WorkerProcess(
        None, project / "handler.py", env=env, cwd=project, args=LOCAL_API, program=program
    ) as process:
        url = served_at(process)

        def ask(**payload: Any) -> dict[str, Any]:
            job = {"input": {"id": "job-1", "user_id": "user-1", **payload}}
            answer = requests.post(f"{url}/runsync", json=job, timeout=PATIENCE_S)
            found: dict[str, Any] = answer.json()
            return found

        yield ask


def answer(project: Path, code: str, **env: str) -> Any:
    """What a piece of code prints as JSON in the copy."""
    done = run(project, "-c", f"import json\n{code}", **env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_families_serve_the_specifications_job_types() -> None:
    assert sorted([*FAMILY_OF, "admin_utilities"]) == sorted(SPECIFICATION["job_types"])
    assert {family.name for family in FAMILY_OF.values()} == set(FAMILIES)


def test_a_family_by_the_recipe_renders_through_the_handler(project: Path, ask: Ask) -> None:
    found = ask(type="echo_image", prompt="teal")["output"]

    assert found["status"] == "completed"
    with Image.open(project / "outputs" / found["assets"][0]["url"]) as image:
        assert image.getcolors() == [(64 * 64, (0, 128, 128))]


def test_a_family_by_the_recipe_refuses_a_payload_by_its_field(ask: Ask) -> None:
    found = failure(ask(type="echo_image"))

    assert found["message"] == "prompt: Field required"


def test_a_worker_of_a_family_by_the_recipe_refuses_jobs_of_other_families(ask: Ask) -> None:
    found = failure(ask(type="sdxl_image_fast", prompt="a red sun"))

    assert found["message"] == "sdxl_image_fast is not served here; this endpoint serves echo"


@pytest.mark.parametrize("operation", ["health", "info", "status", "memory_report", "debug_env"])
def test_an_administrator_can_ask_a_worker_of_a_family_by_the_recipe(
    ask: Ask, operation: str
) -> None:
    found = ask(type="admin_utilities", config={"operation": operation})["output"]

    assert found["status"] == "completed"


def test_admin_info_names_the_types_of_a_family_by_the_recipe(ask: Ask) -> None:
    found = ask(type="admin_utilities", config={"operation": "info"})["output"]

    assert found["result"]["families"] == ["echo"]
    assert found["result"]["job_types"] == ["echo_image", "admin_utilities"]


def test_the_contract_of_a_family_by_the_recipe_is_made_from_its_job(project: Path) -> None:
    done = run(project, "-m", "builder.contract")

    assert done.returncode == 0, done.stderr
    schema = json.loads((project / "contract/jobs/echo_image.schema.json").read_text())
    assert schema["properties"]["type"]["const"] == "echo_image"
    assert schema["required"] == ["prompt"]


def test_the_bridge_hands_jobs_to_the_endpoint_of_a_family_by_the_recipe(project: Path) -> None:
    code = """
from ourvidz_serverless.settings import Settings
from ourvidz_serverless.serving.redis_bridge import endpoints
print(json.dumps(endpoints(Settings())["echo"]))
"""
    assert answer(project, code, ECHO_ENDPOINT_ID="abc, def") == ["abc", "def"]


def test_the_page_has_a_form_for_a_family_without_a_form_of_its_own() -> None:
    (payload,) = logic("payloads", forms=[{"type": "echo_image", "values": {"prompt": "teal"}}])

    assert logic("form", type="echo_image") == ["prompt", "config.seed"]
    assert payload == {"type": "echo_image", "user_id": "page", "prompt": "teal"}


def test_the_weights_of_a_family_are_a_setting_and_are_read_ahead(
    tmp_path: Path,
) -> None:
    row = recipe()[TABLE].replace('models.echo",', f'models.echo",\n        {WEIGHTS},')
    project = project_with(tmp_path / "project", row)
    unet = tmp_path / "weights" / "unet"
    unet.mkdir(parents=True)
    shutil.copy(ROOT / "pocket/sdxl.safetensors", unet / "model.safetensors")
    code = """
from ourvidz_serverless.models.loading import readahead
from ourvidz_serverless.settings import Settings
print(json.dumps([str(path) for path in readahead.files(Settings())]))
"""
    read = answer(project, code, ECHO_MODEL=str(unet.parent))

    assert read == [str(unet / "model.safetensors")]


def test_on_runpod_the_weights_of_a_family_must_be_named(tmp_path: Path) -> None:
    row = recipe()[TABLE].replace('models.echo",', f'models.echo",\n        {WEIGHTS},')
    project = project_with(tmp_path / "project", row)

    done = run(project, "handler.py", RUNPOD_ENDPOINT_ID="e")

    assert done.returncode == 1
    assert "ECHO_MODEL: Field required on RunPod" in done.stderr
