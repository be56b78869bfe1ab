"""The classes of errors, and the specification's codes."""

from ourvidz_serverless import errors
from tests.files import SPECIFICATION


def test_every_code_of_the_specification_has_one_class() -> None:
    classes = errors.JobError.__subclasses__()

    assert {each.code: each.retryable for each in classes} == SPECIFICATION["error_codes"]
    assert len(classes) == len(SPECIFICATION["error_codes"])
