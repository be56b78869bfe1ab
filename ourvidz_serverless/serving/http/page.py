"""A page to look at, at `/` of the HTTP service: a job's form, its progress, and what came of it.

    GET /                 the page; GET /page/{name} its parts
    GET /assets/{key}     an asset from `file:` storage, with the worker's key

It is there where `PAGE` says so, and otherwise only for who sits at the machine itself. It asks no
other host for anything, and a browser is told to let it ask none.
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

#: The page's parts, and what else a storage holds that it may show. All else, such as documents
#: that wait for their delivery, is nobody's to see.
PARTS = {"page.css": "text/css", "page.js": "text/javascript", "job.js": "text/javascript"}
MEDIA = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
    ".mp4": "video/mp4",
}

#: Its own parts, its own worker, and pictures that it has fetched itself.
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
    """Whether the page is there: as `PAGE` says, or else on an address that only this host has."""
    return is_loopback(settings.host) if settings.page is None else settings.page


def make_router(settings: Settings, needs_key: Any, hosts: Collection[str]) -> APIRouter:
    """The page's routes. A worker that listens only at loopback serves only it and `hosts`.

    A request for an asset has to pass `needs_key` first.
    """
    is_local = is_loopback(settings.host)

    async def own_host(request: Request) -> None:
        # A site whose name was made to lead here would be no other origin to the browser.
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
