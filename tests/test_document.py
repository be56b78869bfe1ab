"""The document of a job, as the platform accepts it."""

import pytest

from ourvidz_serverless import errors
from ourvidz_serverless.document import Document, check_result


def test_a_result_that_the_platform_would_lose_is_an_error() -> None:
    with pytest.raises(errors.InternalError, match="the platform takes 10000000"):
        check_result(Document("j", "w", "completed", metadata={"text": "x" * 10_000_001}))
    with pytest.raises(errors.InternalError, match="JSON"):
        check_result(Document("j", "w", "completed", metadata={"number": float("nan")}))
    with pytest.raises(errors.InternalError, match="JSON"):
        check_result(Document("j", "w", "completed", metadata={"text": "\ud800"}))
