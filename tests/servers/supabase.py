"""The application's side: the edge function that takes callbacks, and Supabase Storage."""

import base64
import hmac
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.message import Message
from typing import Any
from uuid import uuid4

from tests.patience import PATIENCE_S
from tests.servers.local_server import Answer, LocalServer, Request, json_answer

# --- the edge function ---

TOLERANCE = 5 * 60
TRIO = ("webhook-id", "webhook-timestamp", "webhook-signature")


@dataclass(frozen=True)
class Received:
    """One callback, whether its signatures are valid, and the receiver's answer.

    `webhook_ok` is None if no header of Standard Webhooks was sent. `status` is None if the
    connection was reset.
    """

    headers: Message
    body: bytes
    document: Any
    at: float
    signature_ok: bool
    webhook_ok: bool | None
    status: int | None
    answer: str


class CallbackReceiver(LocalServer):
    """The edge function `job-callback`: checks the signatures, then the document, then the job.

    Both signatures are required. It knows every job, or those of `known` only; `jobs` holds the
    status of each. With a `service_key` it requires that bearer token, as the gateway does.
    """

    def __init__(
        self,
        secret: str = "whsec_" + base64.b64encode(b"a callback secret of our own").decode(),
        known: set[str] | None = None,
        service_key: str | None = None,
    ) -> None:
        super().__init__()
        self.secret = secret
        self.service_key = service_key
        self.known = known
        self.jobs: dict[str, str] = {}
        self.received: list[Received] = []

    @property
    def callback_url(self) -> str:
        return f"{self.url}/functions/v1/job-callback"

    def wait(self, count: int = 1, timeout: float = PATIENCE_S) -> list[Received]:
        """Wait for this number of callbacks, valid or not, and return all of them."""
        what = f"{count} callbacks"
        self.wait_until(lambda: len(self.received) >= count, timeout, what)
        return list(self.received)

    def answer(self, request: Request) -> Answer:
        if request.method != "POST":
            return json_answer({"error": "method not allowed"}, 405)
        if self._unauthorised(request):
            return json_answer({"error": "unauthorized"}, 401)
        document = _parse(request.body)
        if not _acceptable(document):
            return json_answer({"error": "job_id and a valid status are required"}, 400)
        return json_answer(self._update(document["job_id"], document["status"]))

    def note(self, request: Request, answer: Answer | None) -> None:
        received = Received(
            request.headers,
            request.body,
            _parse(request.body),
            request.at,
            signature_ok(self.secret, request),
            webhook_ok(self.secret, request),
            answer.status if answer else None,
            answer.body.decode() if answer else "",
        )
        with self.changed:
            self.received.append(received)
            self.changed.notify_all()

    def _unauthorised(self, request: Request) -> bool:
        token = request.headers.get("Authorization")
        if self.service_key and token != f"Bearer {self.service_key}":
            return True
        return not (signature_ok(self.secret, request) and webhook_ok(self.secret, request))

    def _update(self, job: str, status: str) -> dict[str, Any]:
        with self.changed:
            if self.known is not None and job not in self.known:
                return {"success": True, "skipped": "unknown job"}
            if self.jobs.get(job) in ("completed", "cancelled"):
                return {"success": True, "skipped": f"already {self.jobs[job]}"}
            self.jobs[job] = status
        return {"success": True}


def signature_ok(secret: str, request: Request) -> bool:
    """Whether `X-Callback-Signature` is a signature of exactly these bytes."""
    expected = "sha256=" + hmac.digest(secret.encode(), request.body, "sha256").hex()
    return _same(request.headers.get("X-Callback-Signature", ""), expected)


def webhook_ok(secret: str, request: Request) -> bool | None:
    """Whether the Standard Webhooks headers sign these bytes now; None if there are no headers."""
    id, timestamp, signatures = (request.headers.get(name, "") for name in TRIO)
    if not (id or timestamp or signatures):
        return None
    if not timestamp.isdigit() or abs(request.at - int(timestamp)) > TOLERANCE:
        return False
    signed = f"{id}.{timestamp}.".encode() + request.body
    digest = hmac.digest(webhook_key(secret), signed, "sha256")
    expected = "v1," + base64.b64encode(digest).decode()
    return bool(id) and any(_same(signature, expected) for signature in signatures.split())


def _same(given: str, expected: str) -> bool:
    return hmac.compare_digest(given.encode(), expected.encode())


def webhook_key(secret: str) -> bytes:
    if secret.startswith("whsec_"):
        return base64.b64decode(secret.removeprefix("whsec_"))
    return secret.encode()


def _parse(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return None


def _acceptable(document: Any) -> bool:
    return (
        isinstance(document, dict)
        and isinstance(document.get("job_id"), str)
        and bool(document["job_id"])
        and document.get("status") in ("completed", "failed", "processing")
    )


# --- Supabase Storage ---

#: The characters that Supabase Storage allows in a key (storage-api, `isValidKey`).
_NAME = r"[\w!\-.*'() &$@=;:+,?]+"
KEY = re.compile(rf"{_NAME}(/{_NAME})*", re.ASCII)
MEDIA = ("image/png", "image/jpeg", "image/webp", "video/mp4", "application/json", "text/plain")


@dataclass(frozen=True)
class Bucket:
    """A bucket's rules. A MIME type must match exactly; `allowed=None` allows any."""

    public: bool = False
    allowed: tuple[str, ...] | None = MEDIA
    size_limit: int = 50 * 1024 * 1024


class SupabaseStorage(LocalServer):
    """The REST API of Supabase Storage, behind Supabase's gateway.

    `url` is SUPABASE_URL. It accepts two keys: `service_key`, a JWT, in `Authorization` and
    `apikey`; `secret_key` (`sb_secret_...`) in `apikey` alone. `objects` holds the stored objects,
    `requests` every request with the HTTP status of its answer (None for a reset). Uploads are
    raw bodies; there are no multipart forms. `clock` lets a test expire a signed URL.
    """

    def __init__(
        self,
        buckets: Mapping[str, Bucket] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__()
        self.buckets = dict(buckets or {"workspace-temp": Bucket()})
        self.objects: dict[tuple[str, str], tuple[bytes, str]] = {}
        self.requests: list[tuple[Request, int | None]] = []
        self.secret_key = f"sb_secret_{uuid4().hex}"
        self._jwt_secret = uuid4().bytes
        self._clock = clock
        self.service_key = _jwt({"role": "service_role", "iss": "supabase"}, self._jwt_secret)

    def note(self, request: Request, answer: Answer | None) -> None:
        with self.changed:
            self.requests.append((request, answer.status if answer else None))
            self.changed.notify_all()

    def answer(self, request: Request) -> Answer:
        head, _, rest = request.path.partition("/storage/v1/object/")
        if head or not rest:
            return _error(404, "Not Found", f"Route {request.method}:{request.path} not found")
        route, _, name = rest.partition("/")
        if request.method in ("GET", "HEAD"):
            if route == "public":
                return self._public(*_split(name))
            if route == "sign":
                return self._signed(*_split(name), request.query.get("token", ""))
        if refusal := self._refuse_caller(request.headers):
            return refusal
        if request.method == "POST" and route == "list":
            return self._list(name, request)
        if request.method == "DELETE":
            return self._delete(*_split(rest))
        if request.method == "POST" and route == "sign":
            return self._sign(*_split(name), request)
        if request.method in ("GET", "HEAD"):
            return self._read(*_split(name if route == "authenticated" else rest))
        if request.method in ("POST", "PUT"):
            return self._write(*_split(rest), request)
        return _error(404, "Not Found", f"Route {request.method}:{request.path} not found")

    def _refuse_caller(self, headers: Message) -> Answer | None:
        apikey, authorization = headers.get("apikey", ""), headers.get("Authorization", "")
        if not apikey:
            return json_answer({"message": "No API key found in request"}, 401)
        if apikey == self.secret_key and not authorization:
            return None
        if apikey not in (self.secret_key, self.service_key):
            return json_answer({"message": "Invalid API key"}, 401)
        if not authorization:
            return _error(400, "Error", "headers must have required property 'authorization'")
        token = authorization.removeprefix("Bearer ")
        if token.count(".") != 2:
            return _error(403, "Unauthorized", "Invalid Compact JWS")
        if _claims(token, self._jwt_secret) is None:
            return _error(403, "Unauthorized", "signature verification failed")
        return None

    def _write(self, bucket: str, path: str, request: Request) -> Answer:
        rules = self.buckets.get(bucket)
        mime = request.headers.get("Content-Type", "application/octet-stream")
        overwrite = request.method == "PUT" or request.headers.get("x-upsert") == "true"
        if rules is None:
            return _error(404, "Bucket not found", "Bucket not found")
        if not KEY.fullmatch(path):
            return _error(400, "InvalidKey", f"Invalid key: {path}")
        if rules.allowed is not None and mime not in rules.allowed:
            return _error(415, "invalid_mime_type", f"mime type {mime} is not supported")
        if len(request.body) > rules.size_limit:
            return _error(413, "Payload too large", "The object exceeded the maximum allowed size")
        with self.changed:
            if (bucket, path) in self.objects and not overwrite:
                return _error(409, "Duplicate", "The resource already exists")
            self.objects[bucket, path] = (request.body, mime)
            self.changed.notify_all()
        return json_answer({"Key": f"{bucket}/{path}", "Id": str(uuid4())})

    def _read(self, bucket: str, path: str) -> Answer:
        if bucket not in self.buckets:
            return _error(404, "Bucket not found", "Bucket not found")
        if (bucket, path) not in self.objects:
            return _error(404, "not_found", "Object not found")
        body, mime = self.objects[bucket, path]
        return Answer(200, body, {"Content-Type": mime})

    def _list(self, bucket: str, request: Request) -> Answer:
        """The entries of one folder: files with an id, folders without one."""
        query = _parse(request.body)
        found: dict[str, str | None] = {}
        for home, path in sorted(self.objects):
            if home == bucket and path.startswith(query["prefix"]):
                name, _, below = path.removeprefix(query["prefix"]).partition("/")
                found[name] = None if below else str(uuid4())
        entries = [{"name": name, "id": id} for name, id in found.items()]
        return json_answer(entries[query["offset"] :][: query["limit"]])

    def _delete(self, bucket: str, path: str) -> Answer:
        with self.changed:
            if self.objects.pop((bucket, path), None) is None:
                return _error(404, "not_found", "Object not found")
            self.changed.notify_all()
        return json_answer({"message": "Successfully deleted"})

    def _public(self, bucket: str, path: str) -> Answer:
        if bucket not in self.buckets or not self.buckets[bucket].public:
            return _error(404, "Bucket not found", "Bucket not found")
        return self._read(bucket, path)

    def _sign(self, bucket: str, path: str, request: Request) -> Answer:
        seconds = (_parse(request.body) or {}).get("expiresIn")
        if not isinstance(seconds, int) or seconds < 1:
            return _error(400, "Error", "body/expiresIn must be >= 1")
        found = self._read(bucket, path)
        if found.status != 200:
            return found
        claims = {"url": f"{bucket}/{path}", "exp": self._clock() + seconds}
        token = _jwt(claims, self._jwt_secret)
        return json_answer({"signedURL": f"/object/sign/{bucket}/{path}?token={token}"})

    def _signed(self, bucket: str, path: str, token: str) -> Answer:
        claims = _claims(token, self._jwt_secret)
        if claims is None or claims.get("url") != f"{bucket}/{path}":
            return _error(400, "InvalidJWT", "signature verification failed")
        if claims["exp"] <= self._clock():
            return _error(400, "InvalidJWT", '"exp" claim timestamp check failed')
        return self._read(bucket, path)


def _split(name: str) -> tuple[str, str]:
    bucket, _, path = name.partition("/")
    return bucket, path


def _error(status: int, error: str, message: str) -> Answer:
    # The HTTP status is always 400. The real one is in the body, as a string.
    return json_answer({"statusCode": str(status), "error": error, "message": message}, 400)


def _jwt(claims: dict[str, Any], secret: bytes) -> str:
    header = {"alg": "HS256", "typ": "JWT"}
    signed = ".".join(_base64url(json.dumps(part).encode()) for part in (header, claims))
    return f"{signed}.{_base64url(hmac.digest(secret, signed.encode(), 'sha256'))}"


def _claims(token: str, secret: bytes) -> dict[str, Any] | None:
    signed, _, signature = token.rpartition(".")
    if not _same(signature, _base64url(hmac.digest(secret, signed.encode(), "sha256"))):
        return None
    claims: dict[str, Any] = json.loads(base64.urlsafe_b64decode(signed.partition(".")[2] + "=="))
    return claims


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")
