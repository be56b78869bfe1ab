"""Uploads to URLs that a stranger wrote, through the same gate as downloads.

A redirect is not followed: the signature of a presigned URL holds for its own host alone.
"""

from __future__ import annotations

from ourvidz_serverless import deadline as deadlines
from ourvidz_serverless.deadline import Deadline
from ourvidz_serverless.net.connection import USER_AGENT, Request, read_body
from ourvidz_serverless.net.download import connected, faults, host_and_target
from ourvidz_serverless.net.policy import Policy
from ourvidz_serverless.net.retries import Fault, is_transient, retry


def upload(
    url: str, data: bytes, mime: str, policy: Policy, deadline: Deadline | None = None
) -> None:
    """PUT a file to an https URL, tried again by the policy until the deadline.

    Raises Fault. Its message may be shown to anybody: it contains no path, query, address or
    secret.
    """
    retry(
        lambda: _try(url, data, mime, policy),
        on=is_transient,
        policy=policy.retry,
        deadline=deadline,
    )


def _try(url: str, data: bytes, mime: str, policy: Policy) -> None:
    with faults(policy):
        deadline = deadlines.current().within(policy.deadline_s)
        host, target = host_and_target(url, policy)
        request = Request("PUT", target, _headers(host, data, mime), data)
        with connected(host, policy, deadline) as connection:
            response = connection.exchange(request, deadline)
            read_body(response, policy.max_bytes)
    if not 200 <= response.status < 300:
        raise Fault(response.status, response.getheader("Retry-After"))


def _headers(host: str, data: bytes, mime: str) -> dict[str, str]:
    return {
        "Host": host,
        "Content-Type": mime,
        "Content-Length": str(len(data)),
        "User-Agent": USER_AGENT,
        "Connection": "close",
    }
