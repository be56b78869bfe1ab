"""The command line, each command in a process of its own."""

import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import requests

from ourvidz_serverless import __main__
from ourvidz_serverless.settings import Settings
from tests.files import ROOT
from tests.patience import PATIENCE_S
from tests.servers import warm_python
from tests.servers.worker_process import WorkerProcess


def environment(**env: str) -> dict[str, str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("RUNPOD")}
    return {**clean, "OMP_NUM_THREADS": "1", **env}


def run(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ourvidz_serverless", *args],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(**env),
        timeout=PATIENCE_S,
    )


def table(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """What the command `settings` printed: each setting's name and the rest of its line."""
    assert done.returncode == 0, done.stderr
    return dict(re.split(r"\s+", line, maxsplit=1) for line in done.stdout.splitlines())  # type: ignore[misc]


def test_help_lists_every_command_with_what_it_does() -> None:
    done = run("--help")

    words = " ".join(done.stdout.split())
    assert done.returncode == 0
    for name, command in __main__.COMMANDS.items():
        assert f"{name} {command.__doc__}" in words


@pytest.mark.parametrize("command", ["serve", "bridge", "replay", "settings"])
def test_every_command_has_its_own_help(command: str) -> None:
    done = run(command, "--help", PYTHONPROFILEIMPORTTIME="1")

    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: python -m ourvidz_serverless {command} [-h]")
    # Nobody waits for what takes a second to import.
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported
    assert not imported & {"torch", "diffusers", "transformers", "runpod", "boto3"}


@pytest.mark.parametrize("args", [[], ["paint"], ["settings", "--colour"], ["bridge", "now"]])
def test_a_command_line_that_is_wrong_ends_with_its_usage_and_code_2(args: list[str]) -> None:
    done = run(*args)

    assert done.returncode == 2
    assert done.stderr.startswith("usage: python -m ourvidz_serverless")


@pytest.mark.parametrize(
    ("command", "env", "line"),
    [
        ("serve", {"STORAGE_URL": "s3://bucket"}, "STORAGE_URL: needs BUCKET_ACCESS_KEY_ID"),
        ("bridge", {}, "RUNPOD_API_KEY, one of SDXL_ENDPOINT_ID, "),
    ],
)
def test_a_command_that_lacks_a_setting_ends_with_one_line_and_code_1(
    command: str, env: dict[str, str], line: str
) -> None:
    done = run(command, **env)

    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith(f"cannot start: {line}")
    assert "Traceback" not in done.stderr


def test_serve_takes_one_job_from_the_options_of_runpods_sdk(tmp_path: Path) -> None:
    question = json.dumps({"input": {"type": "admin_utilities", "operation": "health"}})

    done = warm_python.run(
        ["-m", "ourvidz_serverless", "serve", "--test_input", question],
        env=environment(**warm_python.ENVIRONMENT, STORAGE_URL=f"file:{tmp_path}", VERBOSE="1"),
        cwd=ROOT,
        timeout=PATIENCE_S,
    )

    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout[done.stdout.index("{") :])
    assert document["result"]["status"] == "healthy"


def test_serve_answers_over_http_until_sigterm(tmp_path: Path) -> None:
    env = {"SERVE": "http", "HOST": "127.0.0.1", "PORT": "0", "STORAGE_URL": f"file:{tmp_path}"}

    with WorkerProcess(None, "-m", env=env, cwd=ROOT, args=["ourvidz_serverless", "serve"]) as it:
        port = re.search(r"HTTP on port (\d+)", it.wait_for_log("ready"))
        assert port
        answer = requests.get(f"http://127.0.0.1:{port[1]}/ping", timeout=PATIENCE_S)
        it.terminate()

        assert answer.status_code == 200
        assert it.wait() == 0


def test_settings_prints_every_setting_with_its_value() -> None:
    printed = table(run("settings", FAMILIES="sdxl, chat", PORT="9000"))

    assert list(printed) == [name.upper() for name in Settings.model_fields]
    assert printed["FAMILIES"] == "sdxl,chat    (default sdxl)"
    assert printed["PORT"] == "9000    (default 8000)"
    assert printed["REQUIRE_REFERENCE_CONSENT"] == "true"
    assert printed["POISON_DIR"] == "-"


def test_settings_prints_no_secret() -> None:
    done = run(
        "settings",
        WORKER_API_KEY="hush-1,hush-2",
        JOB_CALLBACK_SECRET="hush-3",
        CALLBACK_URL="https://user:hush-4@application.test/callback?token=hush-5",
    )

    printed = table(done)
    assert "hush" not in done.stdout + done.stderr
    assert printed["WORKER_API_KEY"] == "***,***    (default -)"
    assert printed["JOB_CALLBACK_SECRET"] == "***    (default -)"
    assert printed["CALLBACK_URL"] == "https://***@application.test/callback?***    (default -)"


def test_settings_names_every_setting_that_does_not_hold_and_no_value() -> None:
    done = run("settings", CONCURRENCY="hush", DTYPE="int3", PORT="many")

    assert (done.returncode, done.stdout) == (1, "")
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == [
        "DTYPE",
        "CONCURRENCY",
        "PORT",
    ]
    assert "hush" not in done.stderr


def test_the_console_script_is_the_command_line() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]

    assert EntryPoint("ourvidz", scripts["ourvidz"], "console_scripts").load() is __main__.main
