"""`FETCH_MODELS`: weights from a Hub that can fail, by its real client and real processes."""

import hashlib
import json
import logging
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from ourvidz_serverless.errors import ModelLoadError
from ourvidz_serverless.families import FAMILIES, Weights
from ourvidz_serverless.models.loading import checkpoints, fetch
from ourvidz_serverless.models.loading.fetch import Wanted
from ourvidz_serverless.net import hub as client
from ourvidz_serverless.net.retries import Retry
from ourvidz_serverless.settings import Settings
from tests.files import ROOT
from tests.patience import PATIENCE_S
from tests.servers import handler
from tests.servers.hub import REVISION, TOKEN, Hub, Storage, status
from tests.servers.local_server import Answer, LocalServer, Request, free_port

pytestmark = pytest.mark.slow

REPOSITORY = "tiny/painter"
WEIGHTS = bytes(range(256)) * 40
FILES = {
    "model_index.json": b"{}",
    "scheduler/scheduler_config.json": b"{}",
    "tokenizer/vocab.json": b"{}",
    **{f"{part}/config.json": b"{}" for part in ("text_encoder", "vae", "transformer")},
    "text_encoder/model.safetensors": b"t" + WEIGHTS,
    "text_encoder/pytorch_model.bin": b"b" + WEIGHTS,
    "vae/diffusion_pytorch_model.safetensors": b"v" + WEIGHTS,
    "transformer/diffusion_pytorch_model.safetensors": b"x" + WEIGHTS,
    "README.md": b"a picture",
    "single.safetensors": b"s" + WEIGHTS,
}
NAME = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.setattr(client, "RETRY", Retry(tries=3, base_s=0.01))
    # No token of the person who runs the tests.
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with Hub(REPOSITORY, FILES) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., Settings]:
    """Settings of a worker that fetches WAN, with some values changed."""

    def make(**values: Any) -> Settings:
        defaults = {
            "families": "wan",
            "wan_model": f"{REPOSITORY}@{REVISION}",
            "fetch_models": True,
            "model_dirs": f"{tmp_path}/image,{tmp_path}/volume",
        }
        return Settings.model_validate({**defaults, **values})

    return make


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# --- what a repository has, and what of it is fetched ---

SDXL_REPOSITORY = [
    "model_index.json",
    "README.md",
    "sd_xl_base_1.0.safetensors",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/flax_model.msgpack",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/model.onnx",
    "text_encoder/model.safetensors",
    "tokenizer/merges.txt",
    "unet/config.json",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "vae_decoder/model.safetensors",
]
CHAT_REPOSITORY = [
    "config.json",
    "merges.txt",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "consolidated.safetensors",
    "original/model.safetensors",
    "pytorch_model.bin",
]
ADAPTERS = [
    "models/ip-adapter_sd15.safetensors",
    "sdxl_models/ip-adapter_sdxl.bin",
    "sdxl_models/ip-adapter_sdxl.safetensors",
    "sdxl_models/image_encoder/config.json",
    "sdxl_models/image_encoder/model.safetensors",
    "sdxl_models/image_encoder/pytorch_model.bin",
]


def row(setting: str) -> Weights:
    rows = [each for family in FAMILIES.values() for each in family.weights]
    return next(each for each in rows if each.setting == setting)


def chosen(files: list[str], setting: str, name: str, half: bool = True) -> set[str]:
    (wish,) = Wanted.of(name, row(setting))
    return set(fetch.choose(files, wish, half))


def test_of_sdxl_one_format_in_half_precision_is_fetched_for_a_gpu() -> None:
    left_out = {
        *("README.md", "sd_xl_base_1.0.safetensors", "text_encoder/flax_model.msgpack"),
        *("text_encoder/model.onnx", "text_encoder/model.safetensors"),
        *("unet/diffusion_pytorch_model.safetensors", "vae_decoder/model.safetensors"),
    }

    assert chosen(SDXL_REPOSITORY, "SDXL_MODEL", "org/sdxl") == set(SDXL_REPOSITORY) - left_out


def test_of_sdxl_the_full_precision_is_fetched_for_a_cpu() -> None:
    found = chosen(SDXL_REPOSITORY, "SDXL_MODEL", "org/sdxl", half=False)

    assert "unet/diffusion_pytorch_model.safetensors" in found
    assert not [name for name in found if "fp16" in name]


def test_of_shards_in_two_precisions_one_is_fetched_with_its_index() -> None:
    shards = {
        precision: {
            f"unet/diffusion_pytorch_model{precision}-00001-of-00001.safetensors",
            f"unet/diffusion_pytorch_model.safetensors.index{precision}.json",
        }
        for precision in ("", ".fp16")
    }
    files = [*shards[""], *shards[".fp16"], "unet/pytorch_model.bin.index.json"]

    assert chosen(files, "SDXL_MODEL", "org/sdxl") == shards[".fp16"]
    assert chosen(files, "SDXL_MODEL", "org/sdxl", half=False) == shards[""]


def test_of_a_chat_model_the_shards_and_the_tokenizer_are_fetched() -> None:
    assert chosen(CHAT_REPOSITORY, "CHAT_INSTRUCT_MODEL", "org/chat") == {
        *("config.json", "merges.txt", "model.safetensors.index.json"),
        *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
    }


def test_of_an_ip_adapter_its_file_and_the_encoder_beside_it_are_fetched() -> None:
    name = "h94/IP-Adapter/sdxl_models/ip-adapter_sdxl.safetensors"

    assert chosen(ADAPTERS, "SDXL_IP_ADAPTER", name) == {
        "sdxl_models/ip-adapter_sdxl.safetensors",
        "sdxl_models/image_encoder/config.json",
        "sdxl_models/image_encoder/model.safetensors",
    }


def test_of_a_folder_in_a_repository_only_its_own_files_are_fetched() -> None:
    files = [f"deep/{name}" for name in SDXL_REPOSITORY] + SDXL_REPOSITORY

    found = chosen(files, "SDXL_MODEL", "org/all/deep")

    assert found
    assert all(name.startswith("deep/") for name in found)


# --- where the weights go, and what is not fetched ---


def test_fetched_weights_are_on_the_volume_where_the_worker_finds_them(
    hub: Hub, settings: Callable[..., Settings], tmp_path: Path
) -> None:
    config = settings()

    fetch.fetch(config)

    found = checkpoints.find("WAN_MODEL", config.wan_model, config.model_dirs)
    assert found.is_relative_to(tmp_path / "volume")
    others = {"text_encoder/pytorch_model.bin", "README.md", "single.safetensors"}
    assert files_below(found) == set(FILES) - others
    assert (found / NAME).read_bytes() == FILES[NAME]


def test_a_volume_that_is_not_mounted_is_no_place_for_weights(tmp_path: Path) -> None:
    image = tmp_path / "image"

    assert fetch.destination([image, tmp_path / "unmounted" / "models"]) == image
    assert not (tmp_path / "unmounted").exists()


def test_a_volume_that_cannot_be_written_is_named_and_the_disk_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    volume = tmp_path / "volume"
    volume.write_text("in the way")

    assert fetch.destination([tmp_path / "image", volume]) == tmp_path / "image"
    assert f"{volume} cannot be written: File exists" in caplog.text


def test_a_start_ends_if_no_folder_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")

    with pytest.raises(ModelLoadError, match=r"FETCH_MODELS: none of .*file can be written"):
        fetch.destination([tmp_path / "file"])


def test_weights_that_are_there_are_not_fetched_again(
    hub: Hub, settings: Callable[..., Settings]
) -> None:
    fetch.fetch(settings())
    hub.requests.clear()

    assert fetch.missing(settings()) == []
    fetch.fetch(settings())

    assert hub.requests == []


@pytest.mark.parametrize(
    "place",
    [
        f"models--tiny--painter/snapshots/{REVISION}",  # RunPod's cache has such a folder
        "tiny/painter",
    ],
)
def test_weights_in_another_folder_are_not_fetched(
    settings: Callable[..., Settings], tmp_path: Path, place: str
) -> None:
    for name, data in FILES.items():
        path = tmp_path / "image" / place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    assert fetch.missing(settings(wan_model=REPOSITORY)) == []


@pytest.mark.parametrize(
    "values",
    [{"fetch_models": False}, {"wan_model": "pocket"}, {"wan_model": "/models/wan"}],
)
def test_no_fetch_is_needed_for_what_is_no_repository(
    settings: Callable[..., Settings], values: dict[str, Any]
) -> None:
    assert fetch.missing(settings(**values)) == []


def test_a_model_that_two_settings_share_is_fetched_with_what_each_of_them_needs(
    hub: Hub, settings: Callable[..., Settings]
) -> None:
    fetch.fetch(settings(wan_model="pocket", wan_vace_model=f"{REPOSITORY}@{REVISION}"))
    assert len(hub.storage.requests) == 1

    fetch.fetch(settings())

    assert fetch.missing(settings()) == []
    assert len(hub.storage.requests) == 3


def test_a_name_without_a_revision_stays_at_the_one_that_was_fetched(
    hub: Hub, settings: Callable[..., Settings], caplog: pytest.LogCaptureFixture
) -> None:
    config = settings(wan_model=REPOSITORY)

    fetch.fetch(config)

    assert f"{REPOSITORY} has no revision; this one is @{REVISION}" in caplog.text
    assert fetch.missing(config) == []
    assert checkpoints.find("WAN_MODEL", REPOSITORY, config.model_dirs).name == REVISION


def test_a_fetch_that_was_interrupted_is_not_taken_for_complete(
    hub: Hub, settings: Callable[..., Settings]
) -> None:
    hub.storage.mishaps[NAME] = [status(403)]
    with pytest.raises(ModelLoadError):
        fetch.fetch(settings())
    assert [wish.variable for wish in fetch.missing(settings())] == ["WAN_MODEL"]
    hub.storage.requests.clear()

    fetch.fetch(settings())

    assert fetch.missing(settings()) == []
    assert [request.path for request in hub.storage.requests] == [f"/{NAME}"]


def test_partial_files_of_a_killed_fetch_are_deleted(
    hub: Hub, settings: Callable[..., Settings], tmp_path: Path
) -> None:
    blobs = tmp_path / "volume" / "models--tiny--painter" / "blobs"
    blobs.mkdir(parents=True)
    old, new = blobs / "a.0.incomplete", blobs / "b.0.incomplete"
    for path in (old, new):
        path.touch()
    os.utime(old, (0, 0))

    fetch.fetch(settings())

    # Another process may write the new one.
    assert (old.exists(), new.exists()) == (False, True)


# --- failures ---


def line(config: Settings) -> str:
    with pytest.raises(ModelLoadError) as failure:
        fetch.fetch(config)
    return failure.value.message


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("nobody/nothing", "the Hub has no nobody/nothing, or HF_TOKEN may not read it"),
        (f"{REPOSITORY}@v9", f"{REPOSITORY} has no revision v9"),
        (f"{REPOSITORY}/vae", f"{REPOSITORY} has no .safetensors where WAN 2.1 has them"),
        ("a b/c d", "a b/c d cannot be the name of a repository"),
    ],
)
def test_a_name_that_cannot_be_fetched_ends_the_start_with_one_line(
    hub: Hub, settings: Callable[..., Settings], name: str, why: str
) -> None:
    assert line(settings(wan_model=name)) == f"WAN_MODEL: {why}"


def test_a_repository_with_a_single_file_is_named_with_that_file(
    hub: Hub, settings: Callable[..., Settings]
) -> None:
    hub.files = {"small.safetensors": b"s", "large.safetensors": WEIGHTS}

    assert line(settings(families="sdxl", sdxl_model=REPOSITORY)) == (
        f"SDXL_MODEL: {REPOSITORY} has no folders of diffusers, but a file: "
        f"try {REPOSITORY}/large.safetensors"
    )


def test_a_gated_repository_ends_the_start_unless_the_token_may_read_it(
    hub: Hub, settings: Callable[..., Settings], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    hub.gated = True
    assert line(settings()) == (
        f"WAN_MODEL: {REPOSITORY} is gated: accept its terms on the Hub, and set HF_TOKEN"
    )

    fetch.fetch(settings(hf_token=TOKEN))

    assert fetch.missing(settings()) == []
    assert TOKEN not in caplog.text
    assert all(each.headers["Authorization"] is None for each in hub.storage.requests)


def test_a_hub_that_cannot_be_reached_ends_the_start(
    hub: Hub, settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free_port()}")

    assert line(settings()) == f"WAN_MODEL: {REPOSITORY}: its host does not answer (ConnectError)"


def test_a_storage_that_is_down_for_a_while_is_asked_again(
    hub: Hub, settings: Callable[..., Settings]
) -> None:
    hub.storage.mishaps[NAME] = [status(503), status(429)]

    fetch.fetch(settings())

    assert fetch.missing(settings()) == []


def test_a_disk_that_is_too_small_is_found_before_the_download(tmp_path: Path) -> None:
    with pytest.raises(client.FetchError, match=r"^1000000000\.0 GB are missing, and .* are free$"):
        client.check_space(10**18, tmp_path)


def test_a_disk_or_a_quota_that_is_full_is_named() -> None:
    with (
        pytest.raises(client.FetchError, match=r"^org/name: no space is left for it$"),
        client._explained("org/name", None),
        open("/dev/full", "w") as full,
    ):
        full.write("x")


# --- a checkpoint by its URL ---


@pytest.fixture
def storage() -> Iterator[Storage]:
    with Storage({"mine.safetensors": WEIGHTS}) as server:
        yield server


@pytest.fixture
def by_url(storage: Storage, settings: Callable[..., Settings]) -> Callable[..., Settings]:
    """Settings that name the storage's file, followed by some text."""

    def make(more: str = "", **values: Any) -> Settings:
        url = f"{storage.url}/mine.safetensors{more}"
        return settings(families="sdxl", sdxl_model=url, sdxl_config=ROOT / "pocket/sdxl", **values)

    return make


def test_a_checkpoint_by_url_is_fetched_once(
    hub: Hub, storage: Storage, by_url: Callable[..., Settings], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    config = by_url("?token=secret")

    fetch.fetch(config)
    fetch.fetch(config)

    found = checkpoints.find("SDXL_MODEL", config.sdxl_model, config.model_dirs)
    assert found.read_bytes() == WEIGHTS
    assert len(storage.requests) == 1
    assert "secret" not in caplog.text


def test_a_checkpoint_by_url_must_have_the_hash_that_is_given(
    hub: Hub, by_url: Callable[..., Settings], tmp_path: Path
) -> None:
    right = hashlib.sha256(WEIGHTS).hexdigest()

    assert line(by_url(f"#sha256={'0' * 64}")) == (
        f"SDXL_MODEL: mine.safetensors: sha256 is {right[:12]}..., and should be 000000000000..."
    )
    assert not list(tmp_path.rglob("*.safetensors*"))
    fetch.fetch(by_url(f"#sha256={right}"))


def test_a_checkpoint_by_url_without_configurations_gets_those_of_sdxl(
    by_url: Callable[..., Settings],
) -> None:
    config = by_url().model_copy(update={"sdxl_config": None})

    variables = {wish.variable: wish.name for wish in fetch.missing(config)}

    assert str(variables["SDXL_CONFIG"]) == fetch.SDXL_BASE


def test_sdxls_configurations_are_those_of_the_manifest() -> None:
    repository, _, revision = fetch.SDXL_BASE.partition("@")
    manifest = json.loads((ROOT / "builder/models.json").read_text())

    assert manifest[repository]["revision"] == revision


class Shop(LocalServer):
    """A host that wants a token, and redirects to a storage that must not see it."""

    def __init__(self, storage: Storage) -> None:
        super().__init__()
        self._storage = storage

    def answer(self, request: Request) -> Answer:
        if request.headers["Authorization"] != "Bearer shop-token":
            return Answer(401)
        url = self._storage.url.replace("127.0.0.1", "localhost")
        return Answer(307, b"", {"Location": f"{url}/mine.safetensors?signature=secret"})


def test_a_hosts_token_goes_to_that_host_alone(
    hub: Hub, storage: Storage, settings: Callable[..., Settings], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with Shop(storage) as shop:
        named = {
            "families": "sdxl",
            "sdxl_model": f"{shop.url}/models/1",
            "sdxl_config": ROOT / "pocket/sdxl",
        }
        assert line(settings(**named)) == "SDXL_MODEL: 1.safetensors: HTTP 401"

        fetch.fetch(settings(**named, lora_host_tokens="127.0.0.1=shop-token"))

    assert [each.headers["Authorization"] for each in storage.requests] == [None]
    assert "secret" not in caplog.text
    assert "shop-token" not in caplog.text


# --- progress ---


def test_a_download_logs_a_line_for_each_tenth(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    report = fetch._progress("org/name", 10_000_000, 4)

    for received in range(0, 10_000_001, 1000):
        report(received, received // 2_500_000)

    assert len(caplog.messages) == 9
    assert caplog.messages[4] == "fetch: org/name: 5.0 MB of 10.0 MB, 2 of 4 files"


# --- processes ---


def environment(tmp_path: Path, hub: Hub, **env: str) -> dict[str, str]:
    """A container's: with `HF_HUB_OFFLINE`, and without a token."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RUNPOD")}
    (tmp_path / "volume").mkdir(exist_ok=True)
    return {
        **clean,
        "FAMILIES": "wan",
        "WAN_MODEL": f"{REPOSITORY}@{REVISION}",
        "MODEL_DIRS": str(tmp_path / "volume"),
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
        **env,
    }


def start(tmp_path: Path, hub: Hub, *args: str, **env: str) -> "subprocess.Popen[str]":
    """`python -m ourvidz_serverless fetch`."""
    return subprocess.Popen(
        [sys.executable, "-m", "ourvidz_serverless", "fetch", *args],
        env=environment(tmp_path, hub, **env),
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def test_workers_that_start_at_once_fetch_each_file_once(hub: Hub, tmp_path: Path) -> None:
    with ExitStack() as stack:
        workers = [stack.enter_context(start(tmp_path, hub)) for _ in range(3)]
        logs = [worker.communicate(timeout=PATIENCE_S)[1] for worker in workers]

    assert [worker.returncode for worker in workers] == [0, 0, 0], logs
    paths = [request.path for request in hub.storage.requests]
    assert len(paths) == len(set(paths)) == 3


def test_the_command_fetches_what_a_gpu_needs_also_where_there_is_none(tmp_path: Path) -> None:
    settings = {"FAMILIES": "sdxl", "SDXL_MODEL": f"{REPOSITORY}@{REVISION}"}
    with (
        Hub(REPOSITORY, dict.fromkeys(SDXL_REPOSITORY, b"{}")) as hub,
        start(tmp_path, hub, **settings) as fetching,
    ):
        _, log = fetching.communicate(timeout=PATIENCE_S)

    assert fetching.returncode == 0, log
    found = [path.name for path in (tmp_path / "volume").rglob("unet/*.safetensors")]
    assert found == ["diffusion_pytorch_model.fp16.safetensors"]


def test_a_killed_worker_does_not_keep_the_others_from_fetching(hub: Hub, tmp_path: Path) -> None:
    hub.storage.mishaps[NAME] = [status(503)] * 99
    with start(tmp_path, hub) as first:
        hub.storage.wait_until(lambda: len(hub.storage.ranges(NAME)) > 1)
        with start(tmp_path, hub) as second:
            assert second.stderr
            waits = next(line for line in second.stderr if "waiting for it" in line)
            first.kill()
            hub.storage.mishaps.clear()
            _, log = second.communicate(timeout=PATIENCE_S)

    assert waits
    assert second.returncode == 0, log


def test_a_fetch_ends_with_the_worker_that_needs_it(hub: Hub, tmp_path: Path) -> None:
    hub.storage.mishaps[NAME] = [status(503)] * 99
    with start(tmp_path, hub, "--with-parent") as fetching:
        hub.storage.wait_until(lambda: hub.storage.ranges(NAME))
        assert fetching.stdin
        fetching.stdin.close()

        assert fetching.wait(PATIENCE_S) == 1


def test_a_worker_fetches_its_checkpoint_and_paints_although_the_hub_is_offline(
    hub: Hub, tmp_path: Path
) -> None:
    hub.storage.files["sdxl.safetensors"] = (ROOT / "pocket/sdxl.safetensors").read_bytes()
    payload = (
        '{"input": {"id": "a", "type": "sdxl_image_fast", "user_id": "u", "prompt": "a sun", '
        '"config": {"resolution": "256x256", "num_inference_steps": 10}}}'
    )
    env = environment(
        tmp_path,
        hub,
        FAMILIES="sdxl",
        FETCH_MODELS="true",
        SDXL_MODEL=f"{hub.storage.url}/sdxl.safetensors",
        SDXL_CONFIG=str(ROOT / "pocket/sdxl"),
        STORAGE_URL=f"file:{tmp_path}/outputs",
    )

    run = handler.run_handler("--test_input", payload, **env)

    assert run.returncode == 0, run.stderr
    assert (tmp_path / "outputs/u/a/0.png").exists()


def test_a_worker_that_cannot_fetch_ends_with_one_line(hub: Hub, tmp_path: Path) -> None:
    env = environment(tmp_path, hub, FETCH_MODELS="true", WAN_MODEL="nobody/nothing")

    run = handler.run_handler("--test_input", "{}", **env)

    assert run.returncode == 1
    lines = [line for line in run.stderr.splitlines() if "cannot start" in line]
    assert lines == [
        "cannot start: WAN_MODEL: the Hub has no nobody/nothing, or HF_TOKEN may not read it"
    ]


def test_sigterm_ends_a_start_that_fetches(hub: Hub, tmp_path: Path) -> None:
    hub.storage.mishaps[NAME] = [status(503)] * 99
    env = environment(tmp_path, hub, FETCH_MODELS="true")
    command = [sys.executable, str(ROOT / "handler.py")]
    with subprocess.Popen(command, env=env, cwd=tmp_path) as worker:
        hub.storage.wait_until(lambda: hub.storage.ranges(NAME))
        worker.terminate()

        assert worker.wait(PATIENCE_S) == 0


def test_the_http_service_answers_a_ping_while_it_fetches(hub: Hub, tmp_path: Path) -> None:
    hub.storage.mishaps[NAME] = [status(503)] * 99
    port = free_port()
    env = environment(tmp_path, hub, FETCH_MODELS="true", SERVE="http", HOST="127.0.0.1")
    command = [sys.executable, str(ROOT / "handler.py")]
    with subprocess.Popen(command, env={**env, "PORT": str(port)}, cwd=tmp_path) as worker:
        try:
            hub.storage.wait_until(lambda: hub.storage.ranges(NAME))
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ping") as answer:
                assert answer.status == 204
        finally:
            worker.terminate()
        assert worker.wait(PATIENCE_S) == 0
    asked = len(hub.requests)
    time.sleep(0.5)
    assert len(hub.requests) == asked
