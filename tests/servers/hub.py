"""The Hub's side of its protocol, as far as a download goes: metadata, redirects, ranges, tokens.

It answers what `huggingface_hub` asks, with the headers that the Hub sends:
https://huggingface.co/docs/hub/api, and `hf_raise_for_status` of that package for its errors.

Large files lie in a storage on another host, to which the hub redirects and which must never see
the token.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from tests.servers.local_server import Answer, LocalServer, Request, json_answer

TOKEN = "hf_local"
REVISION = "0123456789abcdef0123456789abcdef01234567"

#: What changes an answer of the storage: a cut, corrupt bytes, a status.
Mishap = Callable[[Answer], Answer]


class Storage(LocalServer):
    """Where the large files lie. Each name in `mishaps` spoils that many of the next answers.

    A parameter `size` asks for another file. `etag` makes a file's ETag, or none.
    """

    def __init__(self, files: Mapping[str, bytes]) -> None:
        super().__init__()
        self.files = dict(files)
        self.requests: list[Request] = []
        self.mishaps: dict[str, list[Mishap]] = {}
        self.etag: Callable[[bytes], str | None] = strong_etag

    def answer(self, request: Request) -> Answer:
        with self.changed:
            self.requests.append(request)
            name = request.path.removeprefix("/")
            size = request.query.get("size")
            answer = _ranged(
                self.files[f"{name}?size={size}" if size else name], request, self.etag
            )
            mishaps = self.mishaps.get(name)
            return mishaps.pop(0)(answer) if mishaps else answer

    def ranges(self, name: str) -> list[str | None]:
        """The ranges that were asked for of one file, in order."""
        return [each.headers["Range"] for each in self.requests if each.path == f"/{name}"]


class Hub(LocalServer):
    """One repository at one revision; files of more than `large` bytes lie in `storage`."""

    def __init__(self, repository: str, files: Mapping[str, bytes], large: int = 1000) -> None:
        super().__init__()
        self.repository = repository
        self.files = dict(files)
        self.gated = False
        self.requests: list[Request] = []
        self._large = {name for name, data in files.items() if len(data) > large}
        self.storage = Storage({name: files[name] for name in self._large})

    def __enter__(self) -> "Hub":
        self.storage.__enter__()
        return super().__enter__()

    def stop(self) -> None:
        self.storage.stop()
        super().stop()

    def answer(self, request: Request) -> Answer:
        with self.changed:
            self.requests.append(request)
        if self.gated and request.headers["Authorization"] != f"Bearer {TOKEN}":
            return refusal(401, "GatedRepo")
        api = f"/api/models/{self.repository}"
        if request.path.startswith(f"{api}/tree/"):
            return json_answer([self._entry(name, data) for name, data in self.files.items()])
        if request.path in (api, f"{api}/revision/main", f"{api}/revision/{REVISION}"):
            return json_answer(self._info())
        if request.path.startswith(f"{api}/revision/"):
            return refusal(404, "RevisionNotFound")
        if request.path.startswith("/api/"):
            # So that nobody learns which private repositories exist.
            return refusal(401, "RepoNotFound")
        name = request.path.removeprefix(f"/{self.repository}/resolve/{REVISION}/")
        return self._file(name) if name in self.files else refusal(404, "EntryNotFound")

    def _file(self, name: str) -> Answer:
        data = self.files[name]
        headers = {"X-Repo-Commit": REVISION}
        if name not in self._large:
            return Answer(200, data, {**headers, "ETag": f'"{git_blob(data)}"'})
        linked = {"X-Linked-ETag": strong_etag(data), "X-Linked-Size": str(len(data))}
        # The host has another name, so that it is another one.
        url = self.storage.url.replace("127.0.0.1", "localhost")
        return Answer(302, b"", {**headers, **linked, "Location": f"{url}/{name}?signature=secret"})

    def _entry(self, name: str, data: bytes) -> dict[str, Any]:
        sibling = self._sibling(name, data)
        oid = {"type": "file", "path": name, "size": len(data), "oid": sibling["blobId"]}
        if lfs := sibling.get("lfs"):
            oid["lfs"] = {"oid": lfs["sha256"], "size": lfs["size"], "pointerSize": 134}
        return oid

    def _info(self) -> dict[str, Any]:
        siblings = [self._sibling(name, data) for name, data in self.files.items()]
        return {"id": self.repository, "sha": REVISION, "siblings": siblings}

    def _sibling(self, name: str, data: bytes) -> dict[str, Any]:
        info: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": git_blob(data)}
        if name in self._large:
            sha256 = hashlib.sha256(data).hexdigest()
            info["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 134}
        return info


def refusal(status: int, code: str) -> Answer:
    """An error of the Hub's, which the client tells by a header."""
    return Answer(status, b"", {"X-Error-Code": code})


def git_blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def cut(at: int) -> Mishap:
    """The connection is closed after so many bytes."""
    return lambda answer: Answer(answer.status, answer.body, answer.headers, cut_at=at)


def corrupt(answer: Answer) -> Answer:
    """All bytes arrive, and the first is wrong."""
    return Answer(answer.status, b"\xff" + answer.body[1:], answer.headers)


def status(number: int) -> Mishap:
    return lambda answer: Answer(number, json.dumps({"error": "mishap"}).encode())


def strong_etag(data: bytes) -> str:
    return f'"{hashlib.sha256(data).hexdigest()}"'


def weak_etag(data: bytes) -> str:
    return f'W/"{len(data)}"'


def no_etag(data: bytes) -> None:
    return None


def _ranged(
    data: bytes, request: Request, etag_of: Callable[[bytes], str | None] = strong_etag
) -> Answer:
    """The file, or its rest: of the file alone whose strong ETag `If-Range` names (RFC 9110)."""
    asked, only_of, etag = request.headers["Range"], request.headers["If-Range"], etag_of(data)
    headers = {"ETag": etag} if etag else {}
    if not asked or (only_of and (only_of != etag or only_of.startswith("W/"))):
        return Answer(200, data, headers)
    start = int(asked.removeprefix("bytes=").rstrip("-"))
    if start >= len(data):
        return Answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
    headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
    return Answer(206, data[start:], headers)
