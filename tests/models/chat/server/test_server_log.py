"""Which lines of a chat server are logged."""

import pytest

from ourvidz_serverless.models.chat.server.server_log import AfterPrompts, before_prompts


def test_a_line_of_the_start_is_logged_without_colours_and_without_the_key() -> None:
    line = "\x1b[36mINFO\x1b[0m args: {'api_key': ['hush-hush']}\n"

    assert before_prompts(line, "hush-hush") == "INFO args: {'api_key': ['***']}"


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        (
            "(APIServer pid=5757) ERROR 11-30 17:07:08 [async_llm.py:906] zebra failed.",
            "ERROR [async_llm.py:906]",
        ),
        (
            '(Core pid=7) ERROR 11-30 17:07:08 [core.py:9]   File "/vllm/a.py", line 8, in go',
            'File "/vllm/a.py", line 8, in go',
        ),
        (
            "ERROR 11-30 17:07:08 [core.py:9] vllm.v1.exceptions.EngineDeadError: zebra",
            "vllm.v1.exceptions.EngineDeadError",
        ),
        (
            '  File "/usr/lib/x.py", line 3, in <module>',
            'File "/usr/lib/x.py", line 3, in <module>',
        ),
        ("torch.OutOfMemoryError: zebra", "torch.OutOfMemoryError"),
        ("WARNING:  Invalid HTTP request: zebra", "WARNING"),
        ("KeyboardInterrupt", "KeyboardInterrupt"),
    ],
)
def test_of_a_later_line_the_level_the_place_and_the_kind_of_an_error_are_logged(
    line: str, shown: str
) -> None:
    assert AfterPrompts().shown(line) == shown


def test_a_traceback_in_records_is_logged_without_the_records_that_repeat() -> None:
    begin = "ERROR 11-30 17:07:08 [core.py:9]"
    lines = (
        "zebra failed",
        "Traceback:",
        '  File "a.py", line 8, in go',
        "    zebra()",
        "ValueError: z",
    )
    log = AfterPrompts()

    shown = [log.shown(f"{begin} {line}") for line in lines]
    later = log.shown("ERROR 11-30 17:07:09 [core.py:9] zebra failed")

    first = "ERROR [core.py:9]"
    assert shown == [first, None, 'File "a.py", line 8, in go', None, "ValueError"]
    assert later == first


@pytest.mark.parametrize(
    "line",
    [
        "INFO 11-30 17:07:08 [logger.py:39] Received request: prompt: 'zebra'",
        "zebra",
        "zebra Error: what",
        "    raise zebra",
        "    prompt = 'ValueError: zebra'",
        'File "zebra", line one',
        "(zebra, with commas) hello",
        "",
    ],
)
def test_a_later_line_that_may_hold_a_prompt_is_not_logged(line: str) -> None:
    assert AfterPrompts().shown(line) is None
