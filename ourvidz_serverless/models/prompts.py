"""Prompts to SDXL's conditioning: both encoders, any length, any weights.

CLIP reads 77 tokens. A longer text is read in chunks of 75, each between its own start and end
token, and the chunks' hidden states are laid end to end, as A1111 and Compel do; no word is cut
off silently. The pooled embedding is the first chunk's, and is not weighted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ourvidz_serverless.weights import Prompt


@dataclass(frozen=True, slots=True)
class Embedding:
    """What the UNet is conditioned on: `hidden` (1, 77 n, dim) and `pooled` (1, dim)."""

    hidden: torch.Tensor
    pooled: torch.Tensor

    def zeros(self) -> Embedding:
        """SDXL's unconditional embedding: what an absent negative prompt was trained to be."""
        return Embedding(torch.zeros_like(self.hidden), torch.zeros_like(self.pooled))

    def extended(self, filler: torch.Tensor, tokens: int) -> Embedding:
        """The same, made `tokens` long with chunks that say nothing."""
        missing = (tokens - self.hidden.shape[1]) // filler.shape[1]
        return Embedding(torch.cat([self.hidden, *[filler] * missing], dim=1), self.pooled)


@dataclass(frozen=True, slots=True)
class Encoder:
    """One text encoder with its tokenizer."""

    tokenizer: Any
    model: Any

    @torch.inference_mode()
    def read(self, text: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states (1, 77 n, dim), and the first output (1, dim), of a text's n chunks."""
        ids = torch.tensor(chunk(self.tokenizer, text), device=self.model.device)
        output = self.model(ids, output_hidden_states=True)
        # SDXL conditions on the layer before the last of both encoders (arXiv:2307.01952, 2.1).
        return output.hidden_states[-2].flatten(0, 1)[None], output[0][:1]

    @torch.inference_mode()
    def weigh(self, prompt: Prompt) -> torch.Tensor:
        """Hidden states (1, 77 n, dim) of a weighted prompt, by Compel's arithmetic.

        A weight above 1 scales a word's distance from an empty prompt; below 1 it blends in the
        prompt without the word (https://github.com/damian0815/compel).
        """
        # Half a second of imports, for those jobs alone that bring weights.
        from compel.embeddings_provider import EmbeddingsProvider, ReturnedEmbeddingsType

        provider = EmbeddingsProvider(
            self.tokenizer,
            self.model,
            truncate=False,
            returned_embeddings_type=ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED,
        )
        return provider.get_embeddings_for_weighted_prompt_fragments(
            text_batch=[[fragment.text for fragment in prompt]],
            fragment_weights_batch=[[fragment.weight for fragment in prompt]],
            device=self.model.device,
        )


def level(embeddings: Sequence[Embedding], empty: Callable[[], Embedding]) -> list[Embedding]:
    """The same embeddings at the longest one's length, since they will share a batch.

    `empty` is asked for an empty prompt's where one has to be made longer.
    """
    longest = max(embedding.hidden.shape[1] for embedding in embeddings)
    if all(embedding.hidden.shape[1] == longest for embedding in embeddings):
        return list(embeddings)
    filler = empty().hidden
    return [embedding.extended(filler, longest) for embedding in embeddings]


class PromptEncoder:
    """SDXL's two encoders as one."""

    def __init__(self, pipe: Any) -> None:
        self._first = Encoder(pipe.tokenizer, pipe.text_encoder)
        self._second = Encoder(pipe.tokenizer_2, pipe.text_encoder_2)

    def encode(self, prompt: Prompt) -> Embedding:
        """The embedding of a prompt; a short plain one is read as `pipe.encode_prompt` reads it."""
        text = "".join(fragment.text for fragment in prompt)
        one, _ = self._first.read(text)
        two, pooled = self._second.read(text)
        if any(fragment.weight != 1 for fragment in prompt):
            one, two = self._first.weigh(prompt), self._second.weigh(prompt)
        # Two vocabularies may need different numbers of chunks for the same words.
        longest = max(one.shape[1], two.shape[1])
        one, two = self._filled(self._first, one, longest), self._filled(self._second, two, longest)
        return Embedding(torch.cat([one, two], dim=-1), pooled)

    @staticmethod
    def _filled(encoder: Encoder, hidden: torch.Tensor, tokens: int) -> torch.Tensor:
        if hidden.shape[1] == tokens:
            return hidden
        filler, _ = encoder.read("")
        return torch.cat([hidden, *[filler] * ((tokens - hidden.shape[1]) // filler.shape[1])], 1)


def chunk(tokenizer: Any, text: str) -> list[list[int]]:
    """Rows of 77 token ids: start, up to 75 tokens of the text, end, padding."""
    words = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids
    room = tokenizer.model_max_length - 2
    parts = [words[start : start + room] for start in range(0, len(words), room)] or [[]]
    return [_row(tokenizer, part, room) for part in parts]


def _row(tokenizer: Any, words: list[int], room: int) -> list[int]:
    padding = [tokenizer.pad_token_id] * (room - len(words))
    return [tokenizer.bos_token_id, *words, tokenizer.eos_token_id, *padding]
