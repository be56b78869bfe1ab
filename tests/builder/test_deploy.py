"""`python -m builder.deploy` against RunPod's API as it is documented."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from builder import presets
from builder.deploy import options as deploy_options
from builder.deploy.__main__ import main
from builder.deploy.api import LONGEST_PAUSE_S, OPTIONS, Api, DeployError, by_option
from builder.deploy.secrets import SECRET, SETTINGS, masked
from tests.files import ROOT
from tests.patience import PATIENCE_S
from tests.servers.runpod_api import KEY, Refused, RunpodApi, problem

IMAGE = "ghcr.io/owner/ourvidz-sdxl:v0.1.0"
NEW = ("--family", "sdxl", "--image", IMAGE)

Deploy = Callable[..., int]


@pytest.fixture
def runpod() -> Iterator[RunpodApi]:
    with RunpodApi() as server:
        yield server


@pytest.fixture
def deploy(runpod: RunpodApi, monkeypatch: pytest.MonkeyPatch) -> Deploy:
    """Runs the command with a key, and returns its exit code."""
    monkeypatch.setenv("RUNPOD_API_KEY", KEY)
    return lambda *args: main(["--api-url", runpod.url, *args])


@pytest.fixture
def endpoint(deploy: Deploy, runpod: RunpodApi) -> dict[str, Any]:
    """An endpoint that the command has made. What it sent is forgotten."""
    assert deploy(*NEW, "--yes") == 0
    runpod.requests.clear()
    (made,) = runpod.endpoints.values()
    return made


# --- what it makes ---


def test_a_family_and_an_image_are_enough_for_an_endpoint_and_its_template(
    deploy: Deploy, runpod: RunpodApi
) -> None:
    assert deploy(*NEW, "--yes") == 0

    (template,), (endpoint,) = runpod.templates.values(), runpod.endpoints.values()
    assert endpoint["name"] == template["name"] == "ourvidz-sdxl"
    assert endpoint["image"] == template["image"] == IMAGE
    assert endpoint["env"] == template["env"] == presets.PRESETS["sdxl"].env
    assert endpoint["type"] == "QUEUE"
    assert endpoint["gpu"]["pools"] == ["ADA_24", "AMPERE_24"]


def test_a_template_is_for_serverless_and_adds_no_variables_of_pods(
    deploy: Deploy, runpod: RunpodApi
) -> None:
    deploy(*NEW, "--yes")

    (template,) = runpod.templates.values()
    assert template["serverless"]
    assert not template["startSsh"] and not template["startJupyter"]


def test_a_new_endpoint_takes_hosts_whose_driver_runs_the_image(
    endpoint: dict[str, Any],
) -> None:
    assert endpoint["gpu"]["minCudaVersion"] == presets.CUDA_VERSIONS[0]
    assert endpoint["gpu"]["allowedCudaVersions"] == []


@pytest.mark.parametrize("digest", ["", "@sha256:0123"])
def test_an_image_for_an_older_cuda_version_takes_older_hosts(
    digest: str, deploy: Deploy, runpod: RunpodApi
) -> None:
    assert deploy("--family", "sdxl", "--image", f"{IMAGE}-cuda12.8{digest}", "--yes") == 0

    (endpoint,) = runpod.endpoints.values()
    assert endpoint["gpu"]["minCudaVersion"] == "12.8"


def test_another_image_asks_for_the_hosts_that_run_it(
    deploy: Deploy, endpoint: dict[str, Any]
) -> None:
    assert deploy("--family", "sdxl", "--image", f"{IMAGE}-cuda12.8", "--yes") == 0
    assert endpoint["gpu"]["minCudaVersion"] == "12.8"

    assert deploy("--family", "sdxl", "--cuda", "13.1", "--yes") == 0
    assert deploy(*NEW, "--yes") == 0
    assert endpoint["gpu"]["allowedCudaVersions"] == ["13.1"]


def test_runpod_ends_a_job_later_than_the_worker_does(endpoint: dict[str, Any]) -> None:
    assert endpoint["timeout"] == 600_000


def test_an_endpoint_whose_workers_serve_http_is_load_balanced(
    deploy: Deploy, runpod: RunpodApi
) -> None:
    key = "WORKER_API_KEY={{ RUNPOD_SECRET_key }}"
    assert deploy(*NEW, "--yes", "--env", "SERVE=http", "--env", key) == 0

    (endpoint,) = runpod.endpoints.values()
    assert endpoint["type"] == "LOAD_BALANCER"
    assert endpoint["ports"] == ["8000/http"] and endpoint["env"]["PORT"] == "8000"
    assert endpoint["scaling"]["type"] == "REQUEST_COUNT"


def test_every_option_of_an_endpoint_reaches_its_field(deploy: Deploy, runpod: RunpodApi) -> None:
    named = (
        *("--name", "pictures", "--registry", "reg1", "--disk", "77"),
        *("--gpu", "AMPERE_24,HOPPER_141", "--exclude-gpu", "NVIDIA L4", "--gpu-count", "2"),
        *("--cuda", "13.0,13.1", "--network-volume", "vol1", "--data-center", "EU-RO-1"),
        *("--min-workers", "1", "--max-workers", "4", "--idle-timeout", "60"),
        *("--queue-delay", "2.5", "--execution-timeout", "900", "--flashboot", "priority"),
    )
    assert deploy(*NEW, *named, "--yes") == 0

    (endpoint,) = runpod.endpoints.values()
    wanted = {
        "name": "pictures",
        "registry": "reg1",
        "disk": 77,
        "networkVolumes": ["vol1"],
        "dataCenterIds": ["EU-RO-1"],
        "workers": {"min": 1, "max": 4, "idleTimeout": 60},
        "scaling": {"type": "QUEUE_DELAY", "queueDelay": 2.5},
        "timeout": 900_000,
        "flashboot": "PRIORITY_FLASHBOOT",
        "gpu": {
            "pools": ["AMPERE_24", "HOPPER_141"],
            "excludedTypes": ["NVIDIA L4"],
            "count": 2,
            "allowedCudaVersions": ["13.0", "13.1"],
            "minCudaVersion": None,
        },
    }
    assert {name: endpoint[name] for name in wanted} == wanted


def test_the_command_runs_as_a_module(runpod: RunpodApi) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "builder.deploy", "--api-url", runpod.url, *NEW, "--yes"],
        cwd=ROOT,
        env={**os.environ, "RUNPOD_API_KEY": KEY},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("send jobs to https://api.runpod.ai/v2/ep1/runsync\n")


# --- what it changes ---


def test_a_second_run_changes_nothing(
    deploy: Deploy, runpod: RunpodApi, endpoint: dict[str, Any], capsys: Any
) -> None:
    assert deploy(*NEW, "--yes") == 0

    assert runpod.requests == []
    assert capsys.readouterr().out.count("no change") == 2


def test_another_image_changes_the_image_alone(
    deploy: Deploy, runpod: RunpodApi, endpoint: dict[str, Any]
) -> None:
    assert deploy("--family", "sdxl", "--image", "ghcr.io/owner/x:v0.2.0", "--yes") == 0

    assert [body for _, _, body in runpod.requests] == [{"image": "ghcr.io/owner/x:v0.2.0"}] * 2


def test_what_somebody_set_in_the_console_stays(
    deploy: Deploy, runpod: RunpodApi, endpoint: dict[str, Any]
) -> None:
    endpoint["workers"]["max"] = 9
    endpoint["env"]["LOG_LEVEL"] = "WARNING"

    assert deploy("--family", "sdxl", "--env", "JOB_TIMEOUT_S=300", "--yes") == 0

    assert endpoint["workers"]["max"] == 9
    assert endpoint["env"]["LOG_LEVEL"] == "WARNING"
    assert endpoint["env"]["JOB_TIMEOUT_S"] == "300"


def test_a_variable_is_removed_by_its_name(deploy: Deploy, endpoint: dict[str, Any]) -> None:
    assert deploy("--family", "sdxl", "--unset", "RUNPOD_INIT_TIMEOUT", "--yes") == 0

    assert "RUNPOD_INIT_TIMEOUT" not in endpoint["env"]
    assert endpoint["env"]["FAMILIES"] == "sdxl"


def test_new_pools_keep_the_number_of_gpus_and_the_cuda_version(
    deploy: Deploy, endpoint: dict[str, Any]
) -> None:
    assert deploy("--family", "sdxl", "--gpu", "HOPPER_141", "--yes") == 0

    assert endpoint["gpu"] == {
        "pools": ["HOPPER_141"],
        "count": 1,
        "allowedCudaVersions": [],
        "minCudaVersion": "13.0",
    }


def test_a_set_of_cuda_versions_takes_the_place_of_the_lowest_one_and_back(
    deploy: Deploy, endpoint: dict[str, Any]
) -> None:
    assert deploy("--family", "sdxl", "--cuda", "12.8", "--yes") == 0
    assert endpoint["gpu"]["allowedCudaVersions"] == ["12.8"]
    assert endpoint["gpu"]["minCudaVersion"] is None

    assert deploy("--family", "sdxl", "--min-cuda", "12.8", "--yes") == 0
    assert endpoint["gpu"]["allowedCudaVersions"] == []
    assert endpoint["gpu"]["minCudaVersion"] == "12.8"


def test_scaling_by_requests_gives_up_the_idle_timeout_that_runpod_refuses_with_it(
    deploy: Deploy, endpoint: dict[str, Any]
) -> None:
    assert deploy("--family", "sdxl", "--requests-per-worker", "2", "--yes") == 0

    assert endpoint["scaling"] == {"type": "REQUEST_COUNT", "requestCount": 2}
    assert endpoint["workers"] == {"min": 0, "max": 3}


def test_an_endpoint_with_flashboot_in_its_name_is_found(
    deploy: Deploy, runpod: RunpodApi, endpoint: dict[str, Any]
) -> None:
    endpoint["name"] = "ourvidz-sdxl -fb"

    assert deploy(*NEW, "--yes") == 0

    assert runpod.requests == []


def test_a_run_after_a_refused_endpoint_continues_with_the_template_that_was_made(
    deploy: Deploy, runpod: RunpodApi
) -> None:
    # Four lists and the template are answered, and the endpoint is not made.
    runpod.script([200, 200, 200, 200, "reset"])
    assert deploy(*NEW, "--yes") == 1
    assert runpod.templates and not runpod.endpoints

    assert deploy(*NEW, "--yes") == 0

    assert len(runpod.templates) == len(runpod.endpoints) == 1


# --- who agrees ---


def test_a_dry_run_shows_the_changes_and_makes_none(
    deploy: Deploy, runpod: RunpodApi, capsys: Any
) -> None:
    assert deploy(*NEW, "--max-workers", "5", "--dry-run") == 0

    shown = capsys.readouterr().out
    assert re.search(r"\+ image +ghcr\.io/owner/ourvidz-sdxl:v0\.1\.0", shown)
    assert re.search(r"\+ workers\.max +5", shown)
    assert runpod.requests == []


def test_without_a_terminal_a_change_needs_yes(
    deploy: Deploy, runpod: RunpodApi, capsys: Any
) -> None:
    assert deploy(*NEW) == 1

    assert capsys.readouterr().err.startswith("--yes: needed")
    assert runpod.requests == []


@pytest.mark.parametrize(("answer", "is_done"), [("y", True), ("", False), ("no", False)])
def test_at_a_terminal_somebody_is_asked(
    answer: str,
    is_done: bool,
    deploy: Deploy,
    runpod: RunpodApi,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: answer)

    assert deploy(*NEW) == 0

    assert bool(runpod.endpoints) == is_done


def test_a_change_is_shown_with_what_was_and_what_will_be(
    deploy: Deploy, endpoint: dict[str, Any], capsys: Any
) -> None:
    capsys.readouterr()
    deploy("--family", "sdxl", "--max-workers", "5", "--unset", "RUNPOD_INIT_TIMEOUT", "--dry-run")

    shown = re.sub(" +", " ", capsys.readouterr().out)
    assert "~ workers.max 3 -> 5" in shown
    assert f"- env.RUNPOD_INIT_TIMEOUT {presets.INIT_TIMEOUT_S}" in shown


def test_list_prices_of_the_catalog_are_shown_by_the_hour_and_the_second(
    deploy: Deploy, capsys: Any
) -> None:
    deploy(*NEW, "--max-workers", "4", "--dry-run")

    assert (
        "ADA_24: $1.10 an hour, $0.000306 a second of a worker; at most $4.40 an hour"
        in capsys.readouterr().out
    )


def test_pools_with_less_memory_than_the_weights_are_pointed_out(
    deploy: Deploy, capsys: Any
) -> None:
    deploy("--preset", "everything", "--image", IMAGE, "--gpu", "ADA_24,ADA_48_PRO", "--dry-run")

    assert re.findall(r"note: (\w+) has less memory", capsys.readouterr().out) == ["ADA_24"]


# --- secrets ---


def test_neither_the_key_nor_a_secret_is_printed(
    deploy: Deploy, runpod: RunpodApi, endpoint: dict[str, Any], capfd: Any
) -> None:
    secrets = ("--env", "WORKER_API_KEY=hunter2", "--env", "REDIS_URL=redis://u:hunter3@host")
    assert deploy("--family", "sdxl", *secrets, "--yes") == 0
    assert deploy("--family", "sdxl", "--env", "WORKER_API_KEY=hunter4", "--yes") == 0

    shown = "".join(capfd.readouterr())
    assert endpoint["env"]["WORKER_API_KEY"] == "hunter4"
    assert "*** -> *** (another value)" in shown
    assert not [word for word in (KEY, "hunter") if word in shown]


def test_an_error_that_repeats_a_secret_is_shown_without_it(
    deploy: Deploy, runpod: RunpodApi, endpoint: dict[str, Any], capsys: Any
) -> None:
    def refuse(*_: Any) -> Any:
        raise Refused(422, "Unprocessable Entity", f"no hunter2 for {KEY}")

    runpod._update_endpoint = refuse  # type: ignore[method-assign]
    assert deploy("--family", "sdxl", "--env", "WORKER_API_KEY=hunter2", "--yes") == 1

    assert "no *** for ***" in capsys.readouterr().err


def test_a_secret_that_is_written_out_is_pointed_out_and_a_reference_is_not(
    deploy: Deploy, capsys: Any
) -> None:
    reference = "JOB_CALLBACK_SECRET={{ RUNPOD_SECRET_callback }}"
    deploy(*NEW, "--env", "WORKER_API_KEY=hunter2", "--env", reference, "--dry-run")

    shown = capsys.readouterr().out
    assert re.findall(r"note: (\w+) is stored", shown) == ["WORKER_API_KEY"]
    assert "{{ RUNPOD_SECRET_callback }}" in shown


def test_a_variable_without_a_value_takes_the_shells(
    deploy: Deploy, runpod: RunpodApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORKER_API_KEY", "hunter2")

    assert deploy(*NEW, "--env", "WORKER_API_KEY", "--yes") == 0

    (endpoint,) = runpod.endpoints.values()
    assert endpoint["env"]["WORKER_API_KEY"] == "hunter2"


SECRETS = sorted(name for name, is_secret in SETTINGS.items() if is_secret)


@pytest.mark.parametrize("name", [*SECRETS, "AWS_SECRET_ACCESS_KEY", "OTEL_TOKEN"])
def test_the_value_of_a_secret_is_masked(name: str) -> None:
    assert masked(name, "hunter2") == "***"


def test_every_setting_that_sounds_like_a_secret_is_one_or_is_known_to_be_none() -> None:
    none = {"ADMIN_REQUIRES_KEY", "CHAT_KV_TOKENS", "CHAT_PREFIX_TOKENS"}

    assert {name for name in SETTINGS if SECRET.search(name)} - set(SECRETS) == none
    assert masked("CHAT_KV_TOKENS", "4096") == "4096"


def test_a_password_and_the_query_of_a_url_are_masked() -> None:
    assert masked("CALLBACK_URL", "https://me:pw@host/hook?sig=1") == "https://***@host/hook?***"


@pytest.mark.parametrize("url", ["http://runpod.example", "ftp://x", "http://127.0.0.1.evil:1"])
def test_the_key_goes_to_no_address_without_tls(url: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        deploy_options.parse(["--api-url", url, "--family", "sdxl"])

    assert "--api-url" in capsys.readouterr().err


# --- what it refuses before anything is sent ---


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (("--family", "sdxl"), "--image: needed"),
        ((*NEW, "--gpu", "ADA_99"), "--gpu: there is no pool ADA_99. Pools are ADA_24,"),
        ((*NEW, "--gpu", "H200"), "--gpu: H200 is a GPU; its pool is HOPPER_141"),
        (
            (*NEW, "--gpu", "ADA_24", "--exclude-gpu", "NVIDIA L4"),
            "--exclude-gpu: NVIDIA L4 is not in",
        ),
        (
            (*NEW, "--gpu", "ADA_24", "--exclude-gpu", "NVIDIA GeForce RTX 4090"),
            "--exclude-gpu: no GPU is left",
        ),
        ((*NEW, "--min-workers", "4"), "--min-workers: 4 is more than --max-workers, 3"),
        ((*NEW, "--network-volume", "vol9"), "--network-volume: there is no volume vol9"),
        ((*NEW, "--network-volume", "../gpus"), "--network-volume: there is no volume ../gpus"),
        (
            (*NEW, "--network-volume", "vol1", "--data-center", "US-KS-2"),
            "--data-center: volume vol1 is in EU-RO-1",
        ),
        ((*NEW, "--execution-timeout", "570"), "--execution-timeout: 570 is not more than JOB_"),
        (
            (*NEW, "--requests-per-worker", "2", "--idle-timeout", "5"),
            "--idle-timeout: RunPod has none with --requests-per-worker",
        ),
        ((*NEW, "--env", "SDXL_MODLE=x"), "--env SDXL_MODLE: no setting has this name; did you"),
        ((*NEW, "--env", "STORAGE_URL=s3://b"), "--env STORAGE_URL: needs BUCKET_ACCESS_KEY_ID"),
        ((*NEW, "--env", "SDXL_MAX_BATCH=7"), "--env SDXL_MAX_BATCH: Input should be less than"),
        ((*NEW, "--unset", "SDXL_MODEL"), "--env SDXL_MODEL: Field required on RunPod"),
    ],
)
def test_a_wrong_argument_is_refused_by_its_name(
    args: tuple[str, ...], line: str, deploy: Deploy, runpod: RunpodApi, capsys: Any
) -> None:
    assert deploy(*args, "--yes") == 1

    assert capsys.readouterr().err.startswith(line)
    assert runpod.requests == []


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (("--family", "films"), "--family: films is none of sdxl, chat, wan"),
        (("--family", "sdxl,wan"), "--preset everything --env FAMILIES=sdxl,wan"),
        ((*NEW, "--idle-timeout", "0"), "--idle-timeout: a number from 1 to 3600"),
        ((*NEW, "--queue-delay", "0.1"), "--queue-delay: seconds from 0.5"),
        ((*NEW, "--cuda", "thirteen"), "--cuda: a version such as 13.0"),
        ((*NEW, "--cuda", "13.0", "--min-cuda", "12.8"), "--cuda: not together with --min-cuda"),
        ((*NEW, "--flashboot", "maybe"), "--flashboot: invalid choice"),
        ((*NEW, "--env", "not a name=x"), "--env: KEY=VALUE"),
        ((*NEW, "--env", "NOT_IN_THIS_SHELL"), "--env NOT_IN_THIS_SHELL: this shell has no"),
        ((*NEW, "--exclude-gpu", "NVIDIA L4"), "--exclude-gpu: needs --gpu"),
        (("--image", IMAGE), "--family"),
    ],
)
def test_an_argument_that_cannot_be_right_ends_the_command_at_once(
    args: tuple[str, ...], word: str, capsys: Any
) -> None:
    with pytest.raises(SystemExit) as ended:
        deploy_options.parse(args, {})

    assert ended.value.code == 2
    assert word in capsys.readouterr().err


def test_a_secret_of_runpods_counts_as_set(deploy: Deploy, runpod: RunpodApi) -> None:
    env = (
        "STORAGE_URL=supabase://pictures",
        "SUPABASE_URL={{ RUNPOD_SECRET_url }}",
        "SUPABASE_SERVICE_KEY={{ RUNPOD_SECRET_key }}",
        "RATE_LIMIT_USER={{ RUNPOD_SECRET_limit }}",
    )
    assert deploy(*NEW, *(word for each in env for word in ("--env", each)), "--yes") == 0

    (endpoint,) = runpod.endpoints.values()
    assert endpoint["env"]["SUPABASE_URL"] == "{{ RUNPOD_SECRET_url }}"


def test_a_type_that_cannot_change_is_refused(
    deploy: Deploy, endpoint: dict[str, Any], capsys: Any
) -> None:
    assert deploy("--family", "sdxl", "--env", "SERVE=http", "--yes") == 1

    assert "an endpoint's type cannot change" in capsys.readouterr().err


def test_two_endpoints_of_the_name_are_refused(
    deploy: Deploy, runpod: RunpodApi, endpoint: dict[str, Any], capsys: Any
) -> None:
    runpod.endpoints["ep2"] = {**endpoint, "id": "ep2"}

    assert deploy(*NEW, "--yes") == 1

    assert "2 endpoints are called ourvidz-sdxl: ep1, ep2" in capsys.readouterr().err


# --- what RunPod answers ---


def test_a_missing_key_is_asked_for(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.delenv("RUNPOD_API_KEY", raising=False)

    assert main([*NEW]) == 1

    assert capsys.readouterr().err.startswith("RUNPOD_API_KEY: set it")


@pytest.mark.parametrize(
    ("status", "line"),
    [
        (401, "RUNPOD_API_KEY: RunPod does not accept this key"),
        (
            problem(403, "Forbidden", "access denied"),
            "RUNPOD_API_KEY: this key may not GET /v2/serverless",
        ),
        (403, "RunPod refused GET /v2/serverless (403): no reason"),
        (500, "RunPod refused GET /v2/serverless (500): no reason"),
        ("reset", "RunPod did not answer GET /v2/serverless"),
        ("cut", "RunPod did not answer GET /v2/serverless"),
    ],
)
def test_a_failure_of_runpods_is_told_in_one_line(
    status: Any, line: str, deploy: Deploy, runpod: RunpodApi, capsys: Any
) -> None:
    runpod.script([status])

    assert deploy(*NEW, "--yes") == 1

    error = capsys.readouterr().err
    assert error.startswith(line) and error.count("\n") == 1


def test_a_field_that_runpod_refuses_is_told_by_its_option(runpod: RunpodApi) -> None:
    body = {"workers": {"max": -1}, "scaling": {"type": "QUEUE_DELAY", "queueDelay": 0}}
    runpod.endpoints["ep1"] = {}

    with Api(KEY, runpod.url) as api, pytest.raises(DeployError) as refused:
        api.update("serverless", "ep1", body)

    head, *lines = str(refused.value).splitlines()
    assert head == "RunPod refused PATCH /v2/serverless/ep1 (422): Request validation failed."
    assert [line.partition(":")[0] for line in lines] == [
        "--queue-delay or --requests-per-worker",
        "--max-workers",
    ]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        ("$.gpu.pools[0]: unknown", "--gpu: unknown"),
        ("$/workers/max: too small", "--max-workers: too small"),
        ("$: additional properties 'x' not allowed", "$: additional properties 'x' not allowed"),
        ("something else", "something else"),
    ],
)
def test_an_error_in_another_form_stays_as_it_is(error: str, told: str) -> None:
    assert by_option(error) == told


def test_every_option_in_an_error_is_one_of_the_command() -> None:
    options = {word for text in OPTIONS.values() for word in text.split(" or ")}

    assert not options - set(deploy_options._parser()._option_string_actions)


def test_a_rate_limit_is_waited_for_as_long_as_runpod_says(runpod: RunpodApi) -> None:
    pauses: list[float] = []
    runpod.script([(429, {"Retry-After": "12"}), (429, {"Retry-After": "9999"}), (429, {})])

    with Api(KEY, runpod.url, pauses.append) as api:
        assert api.endpoints() == []

    assert pauses == [12.0, LONGEST_PAUSE_S, 1.0]


def test_a_rate_limit_without_an_end_is_an_error(runpod: RunpodApi) -> None:
    runpod.script([429] * 4)

    with Api(KEY, runpod.url, lambda _: None) as api, pytest.raises(DeployError, match="429"):
        api.endpoints()


# --- presets ---


@pytest.mark.parametrize("preset", presets.PRESETS.values(), ids=lambda preset: preset.name)
def test_an_endpoint_of_a_preset_can_be_made_as_it_is(
    preset: presets.Preset, deploy: Deploy, runpod: RunpodApi
) -> None:
    assert deploy("--preset", preset.name, "--image", IMAGE, "--gpu", "HOPPER_141", "--yes") == 0

    (endpoint,) = runpod.endpoints.values()
    assert endpoint["env"] == preset.env
    assert endpoint["disk"] == preset.disk_gb


@pytest.mark.parametrize("preset", presets.PRESETS.values(), ids=lambda preset: preset.name)
def test_a_preset_names_pools_of_runpod_that_hold_its_weights(preset: presets.Preset) -> None:
    pools = {pool.name: pool for pool in presets.POOLS}

    assert all(pools[name].memory_gb > preset.gpu_gb for name in preset.pools)


def test_everything_weighs_what_its_families_weigh() -> None:
    *families, everything = (
        presets.PRESETS[name] for name in ("sdxl", "chat", "wan", "everything")
    )

    assert everything.weights_gb == pytest.approx(sum(each.weights_gb for each in families))
    assert everything.gpu_gb == pytest.approx(sum(each.gpu_gb for each in families))


# --- its page ---

PAGE = (ROOT / "docs/deploying.md").read_text()


def test_the_page_shows_what_the_command_prints(
    deploy: Deploy, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (shown,) = re.findall(r"```text\n(endpoint ourvidz-sdxl.*?)```", PAGE, re.DOTALL)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: print(f"{question}y") or "y")

    assert deploy("--family", "sdxl", "--image", "ghcr.io/OWNER/ourvidz-sdxl:v0.1.0") == 0

    printed = capsys.readouterr().out
    assert printed.replace("tpl1", "30zmvf89kd").replace("ep1", "4m7x2k9q") == shown


def rows(head: str) -> list[list[str]]:
    """The rows of the page's table whose head begins so, each as its cells, without backticks."""
    (table,) = re.findall(rf"^\| {re.escape(head)}.*\n\|[-|]+\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    return [[cell.strip(" `") for cell in row.strip("|").split("|")] for row in table.splitlines()]


def test_the_pages_pools_are_those_of_the_presets() -> None:
    assert [row[:3] for row in rows("pool")] == [
        [pool.name, pool.gpus, f"{pool.memory_gb} GB"] for pool in presets.POOLS
    ]


def test_the_pages_downloads_are_those_of_the_presets() -> None:
    assert rows("preset | download") == [
        [
            preset.name,
            f"{preset.weights_gb} GB",
            *(f"{preset.weights_gb * 1000 / speed:.0f} s" for speed in (50, 100, 400)),
        ]
        for preset in presets.PRESETS.values()
        if preset.weights_gb
    ]


def test_the_pages_first_pools_are_those_of_the_presets() -> None:
    chosen = {row[2].partition("`")[0]: row[-1].split("`, `") for row in rows("you want")}

    assert chosen == {each.name: list(each.pools) for each in presets.PRESETS.values()}
