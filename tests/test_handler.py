"""The start of a worker: one that fails says why in one line, before it reads any weights."""

import re
import socket
from pathlib import Path
from typing import Any

import pytest
import requests

from ourvidz_serverless.errors import ModelLoadError
from ourvidz_serverless.serving.http.server import serve
from ourvidz_serverless.settings import Settings
from ourvidz_serverless.worker import Worker
from tests.files import ROOT
from tests.patience import PATIENCE_S
from tests.servers.handler import HANDLER, POCKET, run_handler
from tests.servers.worker_process import WorkerProcess

#: Weights that do not exist: a start that looks for them fails with SDXL_MODEL or WAN_MODEL.
NOWHERE: dict[str, Any] = {"sdxl_model": "/no/such/model", "wan_model": "/no/such/model"}


def blocked(tmp_path: Path) -> Path:
    """A path that cannot become a folder."""
    (tmp_path / "file").write_text("not a folder")
    return tmp_path / "file" / "folder"


def refusal(**settings: Any) -> str:
    with pytest.raises(ModelLoadError) as refused:
        Worker.of(Settings(**NOWHERE, **settings))
    return refused.value.message


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"storage_url": "nowhere"}, "STORAGE_URL: "),
        ({"storage_url": "s3://bucket"}, "STORAGE_URL: needs BUCKET_ACCESS_KEY_ID"),
        ({"storage_url": "supabase://bucket"}, "STORAGE_URL: needs SUPABASE_URL"),
        ({"c2pa_cert": "half"}, "C2PA_CERT: needs both"),
        ({"families": ("sdxl", "chat"), "chat_quantization": "int4"}, "CHAT_QUANTIZATION: "),
        ({"attention_backend": "cudnn"}, "ATTENTION_BACKEND: this device has no cudnn"),
        ({"device": "cuda:99"}, "DEVICE: cuda"),
        (
            {"families": ("sdxl", "wan"), "wan_enhancement_prompt": "/no/such/prompt"},
            "WAN_ENHANCEMENT_PROMPT: there is nothing at /no/such/prompt",
        ),
    ],
)
def test_an_invalid_setting_is_reported_before_weights_are_looked_for(
    wrong: dict[str, Any], line: str
) -> None:
    assert refusal(**wrong).startswith(line)


@pytest.mark.parametrize(
    ("variable", "others"), [("poison_dir", {}), ("compile_cache_dir", {"compile": "regional"})]
)
def test_a_folder_that_cannot_be_created_is_reported_before_weights_are_looked_for(
    tmp_path: Path, variable: str, others: dict[str, str]
) -> None:
    line = refusal(**{variable: blocked(tmp_path)}, **others)

    assert line == f"{variable.upper()}: the folder cannot be used: Not a directory"


def test_a_folder_that_is_not_writable_is_reported_before_weights_are_looked_for() -> None:
    assert refusal(poison_dir="/proc/self").startswith("POISON_DIR: the folder cannot be used: ")


def test_an_invalid_s3_endpoint_is_reported_at_the_start() -> None:
    keys = {"bucket_access_key_id": "id", "bucket_secret_access_key": "secret"}

    line = refusal(storage_url="s3://bucket", bucket_endpoint_url="http://-minio:9000", **keys)

    assert line == "BUCKET_ENDPOINT_URL: Input should be the URL of a host"


@pytest.mark.parametrize(
    ("env", "line"),
    [
        ({"RUNPOD_POD_ID": "pod"}, "SDXL_MODEL: Field required on RunPod"),
        ({"STORAGE_URL": "s3://bucket"}, "STORAGE_URL: needs BUCKET_ACCESS_KEY_ID"),
        ({"JOB_CALLBACK_SECRET": "whsec_abc"}, "JOB_CALLBACK_SECRET: "),
        ({"POISON_DIR": "/dev/null/marks"}, "POISON_DIR: "),
        ({"SERVE": "http", "HOST": "no.such.host.invalid"}, "HOST, PORT: cannot listen at"),
    ],
)
def test_a_start_that_fails_ends_with_one_line_and_no_traceback(
    env: dict[str, str], line: str
) -> None:
    run = run_handler(**env)

    assert run.returncode == 1
    assert run.stderr.strip().splitlines()[-1].startswith(f"cannot start: {line}")
    assert "Traceback" not in run.stderr


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_a_host_of_two_colons_listens_at_ipv6_and_ipv4(tmp_path: Path) -> None:
    env = {"SERVE": "http", "HOST": "::", "PORT": "0", "STORAGE_URL": f"file:{tmp_path}", **POCKET}

    with WorkerProcess(None, str(HANDLER), env=env, cwd=ROOT) as worker:
        port = re.search(r"HTTP on port (\d+)", worker.wait_for_log("HTTP on port"))
        assert port

        for host in ("127.0.0.1", "[::1]"):
            answer = requests.get(f"http://{host}:{port[1]}/ping", timeout=PATIENCE_S)
            assert answer.status_code in (200, 204)


def test_a_port_in_use_is_reported_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ModelLoadError, match=f"cannot listen at 127.0.0.1, port {port}: "):
            serve(Settings(host="127.0.0.1", port=port))
