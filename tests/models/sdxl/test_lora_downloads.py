"""LoRAs from a real HTTPS host: one file for each source and its user, within a size."""

import os
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save

from ourvidz_serverless import jobs
from ourvidz_serverless.context import Bounds, JobContext, Stop
from ourvidz_serverless.deadline import NEVER
from ourvidz_serverless.errors import ModelLoadError
from ourvidz_serverless.jobs.envelope import Envelope
from ourvidz_serverless.models.sdxl.lora_downloads import IN_USE_S, Downloads
from ourvidz_serverless.models.sdxl.loras import LoraStore
from ourvidz_serverless.net.addresses import Address
from ourvidz_serverless.net.policy import Policy
from ourvidz_serverless.settings import Settings
from tests.fakes.local_worker import sdxl_payload
from tests.fakes.tiny_sdxl import write_lora
from tests.servers.local_server import Answer, LocalServer, Request

HOST = "https://images.example"


def weights(number: float) -> bytes:
    return save({"lora": torch.full((4,), number)})


class Host(LocalServer):
    """Serves a file for each version; those in `private/` need a signed request."""

    def __init__(self, authority: Path) -> None:
        super().__init__()
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(authority / "host.pem")
        self._http.socket = tls.wrap_socket(self._http.socket, server_side=True)
        self.bold = b""
        self.asked: list[dict[str, str]] = []

    def answer(self, request: Request) -> Answer:
        self.asked.append(request.query)
        signed = {"X-Amz-Signature", "Signature", "sig", "token"} & request.query.keys()
        if "/private/" in request.path and not any(
            request.query[name] == "right" for name in signed
        ):
            return Answer(403, b"")
        if "/bold" in request.path:
            return Answer(200, self.bold)
        if "/page" in request.path:
            return Answer(200, b"<html>log in</html>")
        return Answer(200, weights(float(request.query.get("version", 0))))


@pytest.fixture
def host(authority: Path) -> Iterator[Host]:
    with Host(authority) as server:
        yield server


@pytest.fixture
def shelf(host: Host, authority: Path, tmp_path: Path) -> LoraStore:
    def is_public(address: Address) -> bool:
        return address.is_loopback

    policy = Policy(
        frozenset({"images.example"}),
        resolve=lambda name: ["127.0.0.1"],
        is_public=is_public,
        port=int(host.url.rsplit(":", 1)[1]),
        tls=ssl.create_default_context(cafile=authority / "ca.pem"),
    )
    return LoraStore(tmp_path, policy)


@pytest.fixture
def fetch(shelf: LoraStore) -> Callable[..., Path]:
    """Fetches a path of the host for a user, by default Ann."""
    return lambda path, user="ann": shelf.fetch(HOST + path, user, NEVER)


def test_a_store_sends_a_host_the_token_of_the_settings() -> None:
    settings = Settings.model_validate(
        {"lora_hosts": "civitai.com", "lora_host_tokens": "Civitai.com=secret, other.example=x"}
    )

    policy = LoraStore.of(settings).policy

    assert policy
    assert policy.tokens == {"civitai.com": "secret", "other.example": "x"}
    assert policy.allowed_hosts == {"civitai.com"}


def number(path: Path) -> float:
    return float(load_file(path)["lora"][0])


def test_urls_that_differ_in_their_query_are_different_files(fetch: Callable[..., Path]) -> None:
    one, other = fetch("/style?version=1"), fetch("/style?version=2")

    assert (number(one), number(other)) == (1, 2)


def test_a_file_that_needs_no_signature_is_fetched_once_for_everybody(
    fetch: Callable[..., Path], host: Host
) -> None:
    assert fetch("/style?version=1", "ann") == fetch("/style?version=1", "ben")

    assert len(host.asked) == 1


#: The two signatures that one host gave for the same file at different times.
SIGNED = {
    "S3": (
        "X-Amz-Date=1&X-Amz-Expires=60&X-Amz-Signature=right",
        "X-Amz-Date=2&X-Amz-Expires=60&X-Amz-Signature=other",
    ),
    "CloudFront": (
        "Expires=1&Signature=right&Key-Pair-Id=K",
        "Expires=2&Signature=other&Key-Pair-Id=K",
    ),
    "Azure": ("sv=2&se=1&sig=right", "sv=2&se=2&sig=other"),
    "Supabase": ("token=right", "token=other"),
}


@pytest.mark.parametrize("scheme", SIGNED)
def test_a_new_signature_of_a_file_that_its_user_has_fetched_is_the_same_file(
    fetch: Callable[..., Path], host: Host, scheme: str
) -> None:
    one, other = SIGNED[scheme]

    assert fetch(f"/private/a?version=1&{one}") == fetch(f"/private/a?version=1&{other}")

    assert len(host.asked) == 1


@pytest.mark.parametrize("scheme", SIGNED)
def test_signed_urls_with_different_queries_are_different_files(
    fetch: Callable[..., Path], scheme: str
) -> None:
    signature = SIGNED[scheme][0]

    files = [fetch(f"/private/a?version={each}&{signature}") for each in (1, 2)]

    assert [number(file) for file in files] == [1, 2]


@pytest.mark.parametrize("scheme", SIGNED)
@pytest.mark.parametrize("is_signed", [False, True])
def test_another_users_signed_file_is_not_served_without_the_right_signature(
    fetch: Callable[..., Path], scheme: str, is_signed: bool
) -> None:
    right, wrong = SIGNED[scheme]
    fetch(f"/private/a?{right}", "ann")

    with pytest.raises(ModelLoadError, match="403"):
        fetch(f"/private/a?{wrong}" if is_signed else "/private/a", "ben")


def test_the_file_used_least_recently_is_deleted_for_room(
    shelf: LoraStore, fetch: Callable[..., Path]
) -> None:
    first, second = fetch("/style?version=1"), fetch("/style?version=2")
    long_ago = time.time() - IN_USE_S
    os.utime(first, (long_ago - 20, long_ago - 20))
    os.utime(second, (long_ago - 10, long_ago - 10))
    narrow = replace(shelf, max_cached_bytes=2 * first.stat().st_size)

    narrow.fetch(f"{HOST}/style?version=3", "ann", NEVER)

    assert not first.exists()
    assert second.exists()


def test_a_file_that_is_used_again_stays_longer(
    shelf: LoraStore, fetch: Callable[..., Path], host: Host
) -> None:
    first, second = fetch("/style?version=1"), fetch("/style?version=2")
    for file in (first, second):
        os.utime(file, (0, 0))
    fetch("/style?version=1")
    narrow = replace(shelf, max_cached_bytes=2 * first.stat().st_size)

    narrow.fetch(f"{HOST}/style?version=3", "ann", NEVER)

    assert first.exists()
    assert not second.exists()


def test_files_in_use_are_not_deleted_and_a_download_without_room_is_refused(
    shelf: LoraStore, fetch: Callable[..., Path]
) -> None:
    first = fetch("/style?version=1")
    narrow = replace(shelf, max_cached_bytes=first.stat().st_size)

    with pytest.raises(ModelLoadError, match="no room for this download, see LORA_CACHE_GB"):
        narrow.fetch(f"{HOST}/style?version=2", "ann", NEVER)

    assert [file.name for file in first.parent.iterdir()] == [first.name]


def test_an_unfinished_download_of_a_killed_process_is_deleted_for_room(tmp_path: Path) -> None:
    (tmp_path / "tmp_unfinished").write_bytes(b"0" * 900)
    os.utime(tmp_path / "tmp_unfinished", (0, 0))
    downloads = Downloads(tmp_path, max_bytes=1000)

    downloads.keep(downloads.path(f"{HOST}/style", "ann"), weights(1))

    assert not (tmp_path / "tmp_unfinished").exists()


def test_a_download_that_is_no_safetensors_file_is_refused_and_not_stored(
    shelf: LoraStore, fetch: Callable[..., Path]
) -> None:
    with pytest.raises(ModelLoadError, match="no safetensors"):
        fetch("/page")

    assert list((shelf.folder / "downloads").iterdir()) == []  # type: ignore[operator]


def test_a_job_uses_the_lora_that_its_users_signed_url_gave(
    sdxl: Any, shelf: LoraStore, host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lora(tmp_path / "bold.safetensors", "to_q", "to_v")
    host.bold = (tmp_path / "bold.safetensors").read_bytes()
    monkeypatch.setattr(sdxl, "loras", shelf)
    urls = [f"{HOST}/private/bold?token={token}" for token in ("right", "wrong")]
    anns, bens = (
        Envelope.of({"input": sdxl_payload(user_id=user, config=CONFIG | lora(url))}).job(
            Settings()
        )
        for user, url in zip(("ann", "ben"), urls, strict=True)
    )
    context = JobContext(Stop(), lambda progress: None, Bounds(60))

    jobs.prepare(anns, sdxl, context)
    (painted,) = jobs.run(anns, sdxl, {}, context)
    with pytest.raises(ModelLoadError, match="403"):
        jobs.prepare(bens, sdxl, context)

    plainly = sdxl_payload(user_id="ann", config=CONFIG)
    (plain,) = jobs.run(Envelope.of({"input": plainly}).job(Settings()), sdxl, {}, context)
    assert (painted.pixels != plain.pixels).any()


CONFIG = {"resolution": "64x64", "seed": 3}


def lora(url: str) -> dict[str, Any]:
    return {"loras": [{"url": url}]}
