"""The caller's own presigned URLs as the place for a job's files: one URL for each output.

Their queries hold signatures, which let anybody write. So no query is in a document, an error, a
log or the audit trail.
"""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlsplit, urlunsplit

from ourvidz_serverless.deadline import Deadline
from ourvidz_serverless.delivery.files import File
from ourvidz_serverless.delivery.storage.base import RETRY
from ourvidz_serverless.errors import InvalidPrompt, UploadError
from ourvidz_serverless.net.addresses import may_be_public
from ourvidz_serverless.net.download import plain_url
from ourvidz_serverless.net.policy import Policy
from ourvidz_serverless.net.retries import Fault
from ourvidz_serverless.net.upload import upload

#: The payload's field for the URLs.
FIELD = "config.upload_urls"

#: The largest answer to an upload that is read, in bytes.
MAX_ANSWER_BYTES = 1_000_000


def upload_policy() -> Policy:
    """The policy for production: any public host, and the tries of every storage."""
    return Policy(max_bytes=MAX_ANSWER_BYTES, deadline_s=RETRY.try_s, retry=RETRY)


class UploadUrls:
    """The URLs of one job, in the order of its outputs."""

    def __init__(self, urls: Sequence[str], policy: Policy) -> None:
        """Raises InvalidPrompt, before anything is computed, if a host is known to be private."""
        self._urls, self._policy = urls, policy
        for host in {plain_url(url)[0] for url in urls}:
            if not may_be_public(host, policy.is_public, policy.resolve):
                raise InvalidPrompt(f"{FIELD}: Input should name hosts of the public internet")

    def put(self, file: File, deadline: Deadline) -> str:
        """Upload an output's file to the URL of that output; the URL without its query.

        Raises UploadError after the tries of the policy.
        """
        url = self._urls[file.index]
        try:
            upload(url, file.data, file.mime, self._policy, deadline)
        except Fault as exc:
            raise UploadError(f"{FIELD}: the URL did not take an asset ({exc})") from exc
        return urlunsplit(urlsplit(url)._replace(query=""))
