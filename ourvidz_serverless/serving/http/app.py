"""The ASGI application: the routes, the page, the checks of each request, and error responses.

Serves RunPod's load-balancing endpoints, pods and local work. Each failure is a status that is not
2xx with the body `{"success": false, "error": "<text>", ...}`, or OpenAI's body below `/v1/`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncIterator

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from ourvidz_serverless import __version__, logs
from ourvidz_serverless.errors import InternalError, InvalidPrompt, JobError
from ourvidz_serverless.serving.http import openai_routes, page, request_ids
from ourvidz_serverless.serving.http.openapi import describe
from ourvidz_serverless.serving.http.replies import NeedsKey
from ourvidz_serverless.serving.http.request_checks import RequestChecks
from ourvidz_serverless.serving.http.request_ids import RequestIds
from ourvidz_serverless.serving.http.responses import error_response
from ourvidz_serverless.serving.http.routes import router
from ourvidz_serverless.serving.http.service import HttpService
from ourvidz_serverless.serving.openai.failures import ApiError


def make_app(service: HttpService) -> FastAPI:
    """The application of a service, whose models may still be loading."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await service.shutdown()

    app = FastAPI(
        title="ourvidz_serverless",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        # FastAPI's own spans have the query of a URL, and its logs what a caller sent.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    app.state.service = service
    described = functools.partial(get_openapi, title=app.title, version=app.version)
    app.openapi = functools.cache(  # type: ignore[method-assign]
        lambda: describe(described(routes=app.routes), service.settings)
    )
    app.include_router(router)
    app.include_router(openai_routes.router)
    if page.is_wanted(service.settings):
        app.include_router(page.make_router(service.settings, NeedsKey, service.own_hosts))
    app.add_exception_handler(ApiError, _on_error)
    app.add_exception_handler(JobError, _on_error)
    app.add_exception_handler(HTTPException, _on_error)
    app.add_exception_handler(RequestValidationError, _on_bad_parameter)
    app.add_exception_handler(Exception, _on_bug)
    app.add_middleware(
        RequestChecks,
        keys=service.settings.worker_api_key,
        hosts=service.own_hosts,
        refuse=_refuse,
    )
    # Outermost, so that the checks' own responses have an id too.
    app.add_middleware(RequestIds)
    return app


def _refuse(exc: Exception, path: str) -> Response:
    """The response for an error, in the words of the protocol that the path belongs to."""
    if openai_routes.is_route(path):
        return openai_routes.error_response(exc, path)
    return error_response(exc)


async def _on_error(request: Request, exc: Exception) -> Response:
    return _refuse(exc, request.url.path)


async def _on_bad_parameter(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, RequestValidationError)
    error = exc.errors()[0]
    return _refuse(InvalidPrompt(f"{error['loc'][-1]}: {error['msg']}"), request.url.path)


async def _on_bug(request: Request, exc: Exception) -> Response:
    logs.bug(request.url.path, exc)
    answer = _refuse(InternalError("an internal error; the log says where"), request.url.path)
    # Such a response passes no middleware.
    answer.headers[request_ids.HEADER] = request_ids.id_of(request.scope)
    return answer
