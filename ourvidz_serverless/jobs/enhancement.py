"""Prompts that a chat model expands before WAN reads them."""

from __future__ import annotations

from dataclasses import replace

from ourvidz_serverless.context import JobContext
from ourvidz_serverless.errors import InternalError, InvalidPrompt, WorkerUnavailable
from ourvidz_serverless.job import CheckedText
from ourvidz_serverless.models.chat.request import ChatRequest, SamplingParams, TextModel

#: An enhanced prompt has about eighty words, as those of WAN's authors. The other values are those
#: of Qwen2.5-7B-Instruct's generation_config.json.
SAMPLING = SamplingParams(
    max_tokens=200, temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05
)


def enhance(
    enhancer: TextModel | None, system: str, prompt: str, seed: int, context: JobContext
) -> str:
    """The prompt as the chat model expands it.

    Raises WorkerUnavailable without a chat model, InvalidPrompt without a prompt, InternalError if
    the reply is empty, and what the chat model raises.
    """
    if enhancer is None:
        raise WorkerUnavailable("this worker has no enhancer")
    if not prompt.strip():
        raise InvalidPrompt("there is no prompt to enhance")
    messages = ("system", system), ("user", prompt)
    reply = enhancer.generate(ChatRequest(messages, replace(SAMPLING, seed=seed)), context.check)
    enhanced = "".join(reply).strip().strip('"').strip()
    if not enhanced:
        raise InternalError("the enhancer said nothing")
    return enhanced


def as_wan_reads(text: str, field: str) -> list[CheckedText]:
    """A text for the content floor, and the text as WAN reads it if that differs.

    WAN's pipelines repair misencoded text (`prompt_clean` of diffusers). They also unescape HTML,
    which the floor does by itself.
    """
    # Imported here, because workers of other families import this module and do without ftfy.
    from ftfy import fix_text

    return [CheckedText(each, field) for each in dict.fromkeys((text, fix_text(text)))]
