"""The Python client: runs jobs on workers, without torch and without RunPod's SDK.

    client = Client({"sdxl": "abc123", "chat": ["def456", "ghi789"]}, api_key="rpa_...")
    document = client.run({"type": "sdxl_image_fast", "user_id": "user-1", "prompt": "a lake"})
    client.download(document, "pictures")

`Client(...)` talks to RunPod's queue, `Client.over_http(URL)` to a worker with `SERVE=http`, and
`Client.local()` to the test server of RunPod's SDK, `--rp_serve_api`. `AsyncClient` has the same
methods for asyncio. A job that fails raises the class of `ourvidz_serverless.errors` that the
worker raised. docs/python-client.md has an example for each operation.
"""

from ourvidz_serverless.client.asynchronous import AsyncClient, AsyncSubmittedJob
from ourvidz_serverless.client.callback import BadSignature, verify_callback
from ourvidz_serverless.client.outcome import (
    Asset,
    Document,
    Outcome,
    Progress,
    StillUnderWay,
    read_outcome,
)
from ourvidz_serverless.client.payload import data_uri
from ourvidz_serverless.client.routes import family_of
from ourvidz_serverless.client.services import NotSupported
from ourvidz_serverless.client.steps import RequestFailed
from ourvidz_serverless.client.sync import Client, SubmittedJob
from ourvidz_serverless.errors import JobError
from ourvidz_serverless.net.retries import Retry

__all__ = [
    "Asset",
    "AsyncClient",
    "AsyncSubmittedJob",
    "BadSignature",
    "Client",
    "Document",
    "JobError",
    "NotSupported",
    "Outcome",
    "Progress",
    "RequestFailed",
    "Retry",
    "StillUnderWay",
    "SubmittedJob",
    "data_uri",
    "family_of",
    "read_outcome",
    "verify_callback",
]
