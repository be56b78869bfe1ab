"""`builder.fetch_models` as a command, with a hub that can fail."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from builder import fetch_models
from ourvidz_serverless.families import FAMILIES
from ourvidz_serverless.models.loading import checkpoints
from ourvidz_serverless.net import hub as hub_client
from ourvidz_serverless.net.retries import Retry
from tests.files import ROOT
from tests.patience import PATIENCE_S
from tests.servers.hub import (
    REVISION,
    TOKEN,
    Hub,
    corrupt,
    cut,
    status,
)

REPOSITORY = "tiny/painter"
WEIGHTS = bytes(range(256)) * 12_000
#: The client writes a file in pieces of this size, and continues after the last one.
CHUNK = constants.DOWNLOAD_CHUNK_SIZE
LARGE = WEIGHTS * (CHUNK // len(WEIGHTS) + 1)
FILES = {
    "model_index.json": b'{"_class_name": "FakeSdxl"}',
    "unet/config.json": b"{}",
    "unet/model.safetensors": WEIGHTS,
    "unet/model.onnx": b"x" * 5000,
    "vae/model.safetensors": WEIGHTS[:50_000],
}
WANTED = ["*.json", "unet/*.safetensors", "vae/*.safetensors"]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub(REPOSITORY, FILES) as server:
        yield server


class Place:
    """A folder to download to, with its own manifest and lock file."""

    def __init__(self, folder: Path, hub: Hub) -> None:
        self.dest, self.lock = folder / "models", folder / "lock.json"
        self.manifest = folder / "manifest.json"
        self.hub = hub
        self.write(dict.fromkeys(WANTED))

    def write(self, files: dict[str, str | None], revision: str | None = REVISION) -> None:
        entry = {"family": "sdxl", "license": "mit", "revision": revision, "files": files}
        self.manifest.write_text(json.dumps({REPOSITORY: entry}))

    def arguments(self, *args: str) -> list[str]:
        places = ["--dest", self.dest, "--manifest", self.manifest, "--lock", self.lock]
        return ["--family", "sdxl", *map(str, places), *args]

    def command(self, *args: str) -> list[str]:
        return [sys.executable, "-m", "builder.fetch_models", *self.arguments(*args)]

    def environment(self, **env: str) -> dict[str, str]:
        known = {"HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.dest / "home")}
        return {**os.environ, **known, "HF_TOKEN": "", **env}

    def fetch_by_process(self, *args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*args),
            capture_output=True,
            text=True,
            env=self.environment(),
            cwd=ROOT,
            timeout=PATIENCE_S,
        )

    def fetch(self, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        """What the command does, in this process."""
        code, stdout, stderr = 0, StringIO(), StringIO()
        with (
            pytest.MonkeyPatch.context() as patch,
            redirect_stdout(stdout),
            redirect_stderr(stderr),
        ):
            for name, value in self.environment(**env).items():
                patch.setenv(name, value)
            patch.setattr(hub_client, "RETRY", Retry(tries=4, base_s=0.01))
            # The library has read HF_HOME already: no token of the person who runs the tests.
            patch.setattr(constants, "HF_TOKEN_PATH", str(self.dest / "home" / "token"))
            try:
                fetch_models.main(self.arguments(*args))
            except SystemExit as exc:
                code = 1
                print(exc.code, file=stderr)
        return subprocess.CompletedProcess(args, code, stdout.getvalue(), stderr.getvalue())

    def locked(self) -> dict[str, Any]:
        return json.loads(self.lock.read_text())

    @property
    def snapshot(self) -> Path:
        return self.dest / "models--tiny--painter" / "snapshots" / REVISION


@pytest.fixture
def place(tmp_path: Path, hub: Hub) -> Place:
    return Place(tmp_path, hub)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_fetched_files_are_where_a_worker_finds_them(place: Place) -> None:
    run = place.fetch_by_process()

    assert run.returncode == 0, run.stderr
    found = checkpoints.find("SDXL_MODEL", REPOSITORY, [place.dest])
    files = {str(path.relative_to(found)) for path in found.rglob("*") if path.is_file()}
    assert files == set(FILES) - {"unet/model.onnx"}
    assert (found / "unet/model.safetensors").read_bytes() == WEIGHTS


def test_a_fetch_asks_the_hub_although_the_environment_says_offline(
    place: Place, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    run = place.fetch_by_process()

    assert run.returncode == 0, run.stderr
    assert hub.storage.requests


def test_an_import_of_the_command_leaves_the_environment_as_it_was() -> None:
    script = (
        "import os, sys\n"
        "before = dict(os.environ)\n"
        "import builder.fetch_models\n"
        "sys.exit(os.environ != before)"
    )

    assert (
        subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=PATIENCE_S).returncode == 0
    )


def test_a_fetch_prints_the_licences(place: Place) -> None:
    assert f"{REPOSITORY}: licence mit" in place.fetch().stdout


def test_the_first_fetch_records_revisions_and_hashes_that_the_manifest_lacks(place: Place) -> None:
    place.write(dict.fromkeys(WANTED), revision=None)

    place.fetch()

    recorded = place.locked()[REPOSITORY]
    assert recorded["revision"] == REVISION
    assert recorded["files"]["unet/model.safetensors"] == sha256(WEIGHTS)
    assert recorded["files"]["model_index.json"] == sha256(FILES["model_index.json"])


def test_a_file_that_differs_from_the_lock_file_is_refused(place: Place) -> None:
    place.write(dict.fromkeys(WANTED), revision=None)
    lock = {REPOSITORY: {"revision": REVISION, "files": {"vae/model.safetensors": "0" * 64}}}
    place.lock.write_text(json.dumps(lock))

    run = place.fetch()

    assert run.returncode == 1
    assert "cannot fetch: vae/model.safetensors: sha256 is" in run.stderr
    assert place.locked() == lock


def test_a_file_that_differs_from_the_manifest_is_refused(place: Place) -> None:
    place.write({"unet/model.safetensors": "f" * 64})

    run = place.fetch_by_process()

    assert run.returncode == 1
    assert "unet/model.safetensors: sha256 is" in run.stderr
    assert not (place.snapshot / "unet/model.safetensors").exists()
    assert not place.lock.exists()


def test_a_download_continues_after_a_broken_connection(place: Place, hub: Hub) -> None:
    name = "unet/model.safetensors"
    hub.files[name] = hub.storage.files[name] = LARGE
    hub.storage.mishaps[name] = [cut(CHUNK + 1000)]

    run = place.fetch()

    assert run.returncode == 0, run.stderr
    assert hub.storage.ranges(name) == [None, f"bytes={CHUNK}-"]
    assert (place.snapshot / name).read_bytes() == LARGE


def test_a_fetch_that_was_killed_keeps_its_complete_files(place: Place, hub: Hub) -> None:
    name = "unet/model.safetensors"
    hub.storage.mishaps[name] = [status(503)] * 99
    with subprocess.Popen(place.command(), env=place.environment(), cwd=ROOT) as fetching:
        hub.storage.wait_until(lambda: len(hub.storage.ranges(name)) > 1)
        fetching.kill()
    hub.storage.mishaps.clear()
    hub.storage.requests.clear()

    assert place.fetch().returncode == 0

    assert [request.path for request in hub.storage.requests] == [f"/{name}"]
    assert (place.snapshot / name).read_bytes() == WEIGHTS


def test_a_corrupt_file_is_fetched_once_more(place: Place, hub: Hub) -> None:
    hub.storage.mishaps["vae/model.safetensors"] = [corrupt]

    run = place.fetch()

    assert run.returncode == 0, run.stderr
    assert "vae/model.safetensors: sha256 is" in run.stderr
    assert hub.storage.ranges("vae/model.safetensors") == [None, None]
    assert (place.snapshot / "vae/model.safetensors").read_bytes() == WEIGHTS[:50_000]


def test_a_file_that_is_corrupt_twice_is_an_error_and_leaves_nothing(
    place: Place, hub: Hub
) -> None:
    hub.storage.mishaps["vae/model.safetensors"] = [corrupt, corrupt]

    run = place.fetch()

    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith("cannot fetch: vae/model.safetensors: sha256")
    assert not list(place.snapshot.glob("vae/*"))


def test_a_small_file_is_verified_by_its_git_hash(place: Place, hub: Hub) -> None:
    hub.files["unet/config.json"] = b"[]"
    place.fetch()
    hub.files["unet/config.json"] = b"{}"
    (place.snapshot / "unet/config.json").write_bytes(b"broken on the volume")
    place.lock.unlink()

    run = place.fetch()

    assert run.returncode == 0, run.stderr
    assert (place.snapshot / "unet/config.json").read_bytes() == b"{}"


def test_a_valid_file_is_not_fetched_again(place: Place, hub: Hub) -> None:
    place.fetch()
    hub.storage.requests.clear()

    assert place.fetch().returncode == 0

    assert hub.storage.requests == []


def test_a_file_that_was_damaged_on_the_volume_is_fetched_again(place: Place, hub: Hub) -> None:
    place.fetch()
    weights = place.snapshot / "unet/model.safetensors"
    weights.write_bytes(b"\xff" + WEIGHTS[1:])

    assert place.fetch().returncode == 0

    assert weights.read_bytes() == WEIGHTS


def test_a_fetch_waits_for_a_storage_that_is_down_for_a_while(place: Place, hub: Hub) -> None:
    hub.storage.mishaps["vae/model.safetensors"] = [status(503), status(429)]

    assert place.fetch().returncode == 0


def test_a_storage_that_refuses_a_request_is_not_tried_again(place: Place, hub: Hub) -> None:
    hub.storage.mishaps["vae/model.safetensors"] = [status(403)]

    run = place.fetch()

    assert f"cannot fetch: {REPOSITORY}: HTTP 403" in run.stderr
    assert hub.storage.ranges("vae/model.safetensors") == [None]
    assert "signature" not in run.stderr


def test_a_gated_repository_asks_for_a_token(place: Place, hub: Hub) -> None:
    hub.gated = True

    run = place.fetch()

    assert run.returncode == 1
    assert f"cannot fetch: {REPOSITORY} is gated: accept its terms on the Hub" in run.stderr


def test_the_token_goes_to_the_hub_and_not_to_its_storage(place: Place, hub: Hub) -> None:
    hub.gated = True

    run = place.fetch(HF_TOKEN=TOKEN)

    assert run.returncode == 0, run.stderr
    assert TOKEN not in run.stdout + run.stderr
    assert hub.storage.requests
    assert all(each.headers["Authorization"] is None for each in hub.storage.requests)


def test_a_pattern_that_matches_nothing_is_an_error(place: Place) -> None:
    place.write({"unet/*.bin": None})

    assert f"cannot fetch: {REPOSITORY} has no unet/*.bin" in place.fetch().stderr


def test_a_checkpoint_by_url_comes_with_the_configurations_and_no_other_weights(
    place: Place, hub: Hub
) -> None:
    checkpoint = b"checkpoint" * 500
    hub.storage.files["mine.safetensors"] = checkpoint
    url = f"{hub.storage.url}/mine.safetensors?token=secret"

    run = place.fetch("--url", url, "--sha256", sha256(checkpoint))

    assert run.returncode == 0, run.stderr
    assert (place.dest / "mine.safetensors").read_bytes() == checkpoint
    assert (place.snapshot / "unet/config.json").exists()
    assert not list(place.snapshot.rglob("*.safetensors"))
    assert "secret" not in place.lock.read_text()


def test_a_checkpoint_with_another_hash_is_refused(place: Place, hub: Hub) -> None:
    hub.storage.files["mine.safetensors"] = b"something else"
    url = f"{hub.storage.url}/mine.safetensors"

    run = place.fetch("--url", url, "--sha256", "0" * 64)

    assert run.returncode == 1
    assert "mine.safetensors: sha256 is" in run.stderr


# --- a checkpoint by URL, and its source ---

CHECKPOINT = WEIGHTS[::-1]
OTHER = b"another checkpoint" * 170_000
NAME = "mine.safetensors"


def publish(hub: Hub, data: bytes, name: str = NAME) -> str:
    """The URL of a file in the storage."""
    hub.storage.files[name] = data
    return f"{hub.storage.url}/{name}"


def test_another_checkpoint_of_the_same_name_is_not_used(place: Place, hub: Hub) -> None:
    place.fetch("--url", publish(hub, OTHER, f"one/{NAME}"))
    before = place.locked()

    run = place.fetch("--url", publish(hub, CHECKPOINT, f"two/{NAME}"))

    assert f"cannot fetch: {NAME} is there already, and may not be" in run.stderr
    assert (place.dest / NAME).read_bytes() == OTHER
    assert place.locked() == before


def test_a_file_with_another_hash_than_the_given_one_is_not_replaced(
    place: Place, hub: Hub
) -> None:
    place.fetch("--url", publish(hub, OTHER, f"one/{NAME}"))

    url = publish(hub, CHECKPOINT, f"two/{NAME}")
    run = place.fetch("--url", url, "--sha256", sha256(CHECKPOINT))

    assert f"cannot fetch: {NAME} is there already, and it is another file" in run.stderr
    assert (place.dest / NAME).read_bytes() == OTHER


def test_a_known_source_does_not_replace_another_known_sources_file(place: Place, hub: Hub) -> None:
    first = publish(hub, CHECKPOINT, f"two/{NAME}")
    place.fetch("--url", first)
    (place.dest / NAME).unlink()
    place.fetch("--url", publish(hub, OTHER, f"one/{NAME}"))

    run = place.fetch("--url", first)

    assert f"cannot fetch: {NAME} is there already, and it is another file" in run.stderr
    assert (place.dest / NAME).read_bytes() == OTHER


def test_a_checkpoint_by_url_that_was_damaged_on_the_volume_is_fetched_again(
    place: Place, hub: Hub
) -> None:
    url = publish(hub, CHECKPOINT)
    place.fetch("--url", url)
    (place.dest / NAME).write_bytes(b"\x00" + CHECKPOINT[1:-1])

    run = place.fetch("--url", url)

    assert run.returncode == 0, run.stderr
    assert (place.dest / NAME).read_bytes() == CHECKPOINT


def test_a_source_does_not_replace_an_unknown_file_under_a_new_name(place: Place, hub: Hub) -> None:
    url = publish(hub, CHECKPOINT)
    place.fetch("--url", url)
    (place.dest / "own.safetensors").write_bytes(b"nobody knows whose")

    run = place.fetch("--url", url, "--name", "own.safetensors")

    assert "cannot fetch: own.safetensors is there already, and it is another file" in run.stderr
    assert (place.dest / "own.safetensors").read_bytes() == b"nobody knows whose"


def test_a_hash_in_capitals_is_the_same_hash(place: Place, hub: Hub) -> None:
    run = place.fetch("--url", publish(hub, CHECKPOINT), "--sha256", sha256(CHECKPOINT).upper())

    assert run.returncode == 0, run.stderr


def test_urls_with_different_queries_are_different_files(place: Place, hub: Hub) -> None:
    full = publish(hub, CHECKPOINT, "models/128713?size=full")
    pruned = publish(hub, OTHER, "models/128713?size=pruned")

    for url, name in ((full, "full.safetensors"), (pruned, "pruned.safetensors")):
        run = place.fetch("--url", f"{url}&token=secret", "--name", name)
        assert run.returncode == 0, run.stderr

    assert (place.dest / "full.safetensors").read_bytes() == CHECKPOINT
    assert (place.dest / "pruned.safetensors").read_bytes() == OTHER
    assert place.locked()[full] == {"files": {"full.safetensors": sha256(CHECKPOINT)}}
    assert place.locked()[pruned] == {"files": {"pruned.safetensors": sha256(OTHER)}}


def test_a_source_has_one_hash_under_each_name(place: Place, hub: Hub) -> None:
    url = publish(hub, CHECKPOINT)
    place.fetch("--url", url)
    publish(hub, OTHER)

    run = place.fetch("--url", url, "--name", "again.safetensors")

    assert "cannot fetch: again.safetensors: sha256 is" in run.stderr
    assert not (place.dest / "again.safetensors").exists()


def test_a_new_signature_is_the_same_source(place: Place, hub: Hub) -> None:
    url = publish(hub, CHECKPOINT)
    place.fetch("--url", f"{url}?X-Amz-Signature=1&X-Amz-Date=1")
    hub.storage.requests.clear()

    run = place.fetch("--url", f"{url}?X-Amz-Signature=2&X-Amz-Date=2")

    assert run.returncode == 0, run.stderr
    assert hub.storage.requests == []


@pytest.mark.parametrize(
    "url",
    [
        "https://user:secret@example.com/file.safetensors",
        "https://example.com/file.safetensors?token=secret",
        "https://example.com/file.safetensors?api_key=secret",
        "https://example.com/file.safetensors?Signature=secret&Policy=secret&Expires=1",
    ],
)
def test_the_lock_file_has_no_secret_of_a_url(url: str) -> None:
    source = fetch_models.source_of(url)

    assert source.startswith("https://example.com/file.safetensors")
    assert "secret" not in source


def test_a_url_without_a_file_name_is_an_error_that_asks_for_a_name(place: Place, hub: Hub) -> None:
    run = place.fetch("--url", f"{hub.storage.url}/")

    assert "cannot fetch: --name: the URL's path does not end with a file's name" in run.stderr


def test_a_name_outside_the_folder_is_refused(place: Place, hub: Hub) -> None:
    run = place.fetch("--url", publish(hub, CHECKPOINT), "--name", "../outside.safetensors")

    assert "cannot fetch: --name" in run.stderr
    assert not (place.dest.parent / "outside.safetensors").exists()


def test_a_checkpoint_by_url_continues_after_a_broken_connection(place: Place, hub: Hub) -> None:
    url = publish(hub, LARGE)
    hub.storage.mishaps[NAME] = [cut(CHUNK + 1000)]

    run = place.fetch("--url", url)

    assert run.returncode == 0, run.stderr
    assert hub.storage.ranges(NAME) == [None, f"bytes={CHUNK}-"]
    assert (place.dest / NAME).read_bytes() == LARGE


def test_a_checkpoint_by_url_that_does_not_arrive_leaves_nothing(place: Place, hub: Hub) -> None:
    url = publish(hub, CHECKPOINT)
    hub.storage.mishaps[NAME] = [status(403)]

    run = place.fetch("--url", f"{url}?token=secret")

    assert run.stderr.splitlines()[-1] == f"cannot fetch: {NAME}: HTTP 403"
    assert not list(place.dest.glob(f"{NAME}*"))


# --- the manifest of this repository ---

MANIFEST = json.loads(fetch_models.MANIFEST.read_text())


def test_every_family_has_weights_in_the_manifest() -> None:
    assert {each["family"] for each in MANIFEST.values()} == set(FAMILIES)


@pytest.mark.parametrize("repository", MANIFEST)
def test_a_manifest_entry_pins_its_revision_and_names_its_licence(repository: str) -> None:
    entry = MANIFEST[repository]

    assert len(entry["revision"]) == 40
    assert entry["license"]
    assert all(digest is None or len(digest) == 64 for digest in entry["files"].values())


def test_a_manifest_entry_with_a_wildcard_has_no_hash() -> None:
    patterns = [
        digest
        for entry in MANIFEST.values()
        for name, digest in entry["files"].items()
        if "*" in name
    ]

    assert patterns
    assert set(patterns) == {None}
