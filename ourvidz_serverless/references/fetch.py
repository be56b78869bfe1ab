"""References: the images that a payload names, fetched and decoded.

A reference is untrusted. It may be

    https://host/path?query                     any public host, or one of `allowed_hosts`
    data:image/png;base64,...                   the image itself
    <user>/<job>/0.png                          a key in storage, of the job's own user
    user-library/<user>/portrait.webp           the same, in one of `ReferencePolicy.libraries`

and becomes an upright sRGB image without alpha, profile or metadata, or a ReferenceFrameError.

This module knows nothing of jobs, and of storage only a function that reads a key.
"""

from __future__ import annotations

import base64
import functools
import re
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor

from PIL import Image

from ourvidz_serverless.deadline import NEVER, Deadline
from ourvidz_serverless.errors import ReferenceFrameError
from ourvidz_serverless.net.download import download
from ourvidz_serverless.net.retries import Fault, is_transient, retry
from ourvidz_serverless.references.decode import decode
from ourvidz_serverless.references.policy import ReferencePolicy, refused

#: Reads a key of storage: one try, which raises Fault.
ReadObject = Callable[[str], bytes]

MAX_KEY_CHARS = 512

_DATA = re.compile(r"data:image/[a-z.+-]{1,32};base64,", re.IGNORECASE | re.ASCII)
_SEGMENT = r"[A-Za-z0-9_-](?:[A-Za-z0-9_. -]*[A-Za-z0-9_-])?"
_KEY = re.compile(rf"{_SEGMENT}(?:/{_SEGMENT})+")


def fetch(
    reference: str,
    *,
    policy: ReferencePolicy,
    user_id: str,
    read_object: ReadObject | None = None,
    deadline: Deadline = NEVER,
) -> Image.Image:
    """The image that a reference names: upright, RGB in sRGB, nothing but pixels.

    Raises ReferenceFrameError, whose message contains no path, query, address or secret.
    """
    if reference[:5].lower() == "data:":
        data = _from_text(reference, policy)
    elif ":" in reference:
        data = _from_web(reference, policy, deadline)
    else:
        data = _from_storage(reference, policy, user_id, read_object, deadline)
    return decode(data, policy)


def fetch_all(
    references: Mapping[str, str],
    *,
    policy: ReferencePolicy,
    user_id: str,
    read_object: ReadObject | None = None,
    deadline: Deadline = NEVER,
) -> dict[str, Image.Image | ReferenceFrameError]:
    """Each role's image, or the error that its reference ended in, fetched in parallel.

    A reference that two roles name is fetched once.
    """

    def one(reference: str) -> Image.Image | ReferenceFrameError:
        try:
            return fetch(
                reference,
                policy=policy,
                user_id=user_id,
                read_object=read_object,
                deadline=deadline,
            )
        except ReferenceFrameError as exc:
            return exc

    if not references:
        return {}
    distinct = list(dict.fromkeys(references.values()))
    with ThreadPoolExecutor(min(len(distinct), 4), thread_name_prefix="reference") as pool:
        found = dict(zip(distinct, pool.map(one, distinct), strict=True))
    return {role: found[reference] for role, reference in references.items()}


def _from_text(reference: str, policy: ReferencePolicy) -> bytes:
    prefix = _DATA.match(reference)
    if not prefix:
        raise refused("the data URI is not data:image/...;base64,")
    if (len(reference) - prefix.end()) * 3 // 4 > policy.max_bytes + 2:
        raise refused(f"more than {policy.max_bytes} bytes")
    try:
        data = base64.b64decode(reference[prefix.end() :], validate=True)
    except ValueError as exc:
        raise refused("the data URI is not base64") from exc
    return _bounded(data, policy)


def _bounded(data: bytes, policy: ReferencePolicy) -> bytes:
    if len(data) > policy.max_bytes:
        raise refused(f"more than {policy.max_bytes} bytes")
    return data


def _from_web(url: str, policy: ReferencePolicy, deadline: Deadline) -> bytes:
    try:
        return download(url, policy, deadline)
    except Fault as exc:
        raise refused(str(exc)) from exc


def _from_storage(
    key: str,
    policy: ReferencePolicy,
    user_id: str,
    read_object: ReadObject | None,
    deadline: Deadline,
) -> bytes:
    check_key(key, user_id, policy.libraries)
    if read_object is None:
        raise refused("no storage is configured for storage paths")
    try:
        data = retry(
            functools.partial(read_object, key),
            on=is_transient,
            policy=policy.retry,
            deadline=deadline,
        )
    except Exception as exc:  # the caller's function may raise anything
        raise refused("storage could not read the path") from exc
    return _bounded(data, policy)


def check_key(key: str, user_id: str, libraries: Collection[str]) -> None:
    """Raise ReferenceFrameError unless a storage key lies in the user's own folder.

    That is `<user>/...`, or `<library>/<user>/...` for one of `libraries`. No other folder may
    come first, or `<other user>/<user>/x.png` would pass. A user whose name is a library's owns
    nothing, or every user's library would be theirs.
    """
    if len(key) > MAX_KEY_CHARS or not _KEY.fullmatch(key):
        raise refused("not an https URL, a data URI or a plain storage path")
    folders = key.split("/")[:-1]
    owner = folders[1:2] if folders[0] in libraries else folders[:1]
    if owner != [user_id] or user_id in libraries:
        raise refused("the storage path is not in the user's own folder")
