"""The web page of the HTTP service, at `/`: a form for jobs, their progress and their results.

    GET /                 the page; GET /page/{name} its parts
    GET /assets/{key}     an asset from `file:` storage, with the worker's key

`PAGE` turns it on or off. Without `PAGE` it is on if the worker listens only at a loopback address.
The page requests nothing from another host, and its Content-Security-Policy forbids it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import FileResponse
from starlette.exceptions import HTTPException

from ourvidz_serverless.delivery.storage.choose import open_storage
from ourvidz_serverless.delivery.storage.directory import DirectoryStorage
from ourvidz_serverless.net.addresses import is_loopback
from ourvidz_serverless.serving.http.request_checks import is_own_host
from ourvidz_serverless.settings import Settings

FOLDER = Path(__file__).parent / "static"

#: The page's parts, and the files of a storage that it may show. It shows no other file, such as a
#: document that was not delivered.
SCRIPTS = ("page.js", "dom.js", "form.js", "job.js", "pictures.js", "stage.js", "worker.js")
PARTS = {"page.css": "text/css", **dict.fromkeys(SCRIPTS, "text/javascript")}
MEDIA = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
    ".mp4": "video/mp4",
}

#: The page may load its own parts, call its own worker, and show pictures that it has fetched.
POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src blob: data:",
        "media-src blob:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


def is_wanted(settings: Settings) -> bool:
    """Whether the page is served: by `PAGE`, or by default on a loopback address."""
    return is_loopback(settings.host) if settings.page is None else settings.page


def make_router(settings: Settings, needs_key: Any, hosts: Collection[str]) -> APIRouter:
    """The page's routes. `needs_key` checks the key of a request for an asset.

    A worker that listens at a loopback address serves the page only for loopback names and `hosts`.
    """
    is_local = is_loopback(settings.host)

    async def own_host(request: Request) -> None:
        # DNS rebinding: a site's name may resolve to this machine, and the browser then takes the
        # page as part of that site.
        if is_local and not is_own_host(request.headers.get("Host", ""), hosts):
            raise HTTPException(404, "Not Found")

    router = APIRouter(include_in_schema=False, dependencies=[Depends(own_host)])
    storage = open_storage(settings)

    @router.head("/")
    @router.get("/")
    async def index() -> FileResponse:
        return _file(FOLDER / "index.html", "text/html")

    @router.head("/page/{name}")
    @router.get("/page/{name}")
    async def part(name: str) -> FileResponse:
        return _file(FOLDER / name, _kind(PARTS, name))

    @router.head("/assets/{key:path}", dependencies=[needs_key])
    @router.get("/assets/{key:path}", dependencies=[needs_key])
    async def asset(key: str) -> FileResponse:
        kind = _kind(MEDIA, Path(key).suffix.lower())
        path = storage.find(key) if isinstance(storage, DirectoryStorage) else None
        if path is None:
            raise HTTPException(404, "no asset of that name is stored here")
        return _file(path, kind)

    return router


def _file(path: Path, kind: str) -> FileResponse:
    return FileResponse(path, media_type=kind, headers=HEADERS)


def _kind(kinds: Mapping[str, str], name: str) -> str:
    if name not in kinds:
        raise HTTPException(404, "Not Found")
    return kinds[name]
