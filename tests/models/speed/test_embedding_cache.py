"""The cache of text embeddings."""

from typing import Any

import torch

from ourvidz_serverless.models.memory.device import Device
from ourvidz_serverless.models.memory.device_memory import CountedMemory
from ourvidz_serverless.models.sdxl import loader as sdxl_models
from ourvidz_serverless.models.sdxl.prompt_weighting import parse, plain
from ourvidz_serverless.models.speed.embedding_cache import EmbeddingCache
from ourvidz_serverless.settings import Settings
from tests.fakes import tiny_sdxl
from tests.models.speed.rendering import CPU, counting, distance, render_image


def test_a_repeated_prompt_is_not_encoded_again_and_paints_the_same() -> None:
    model = sdxl_models.load(Settings())
    encoders = (model.networks.pipe.text_encoder, model.networks.pipe.text_encoder_2)

    with counting(*encoders) as calls:
        first = render_image(model)
        again = render_image(model, seeds=(3,))
        render_image(model, "a blue sea")

    assert distance(first, again) == 0
    # The prompt, the negative prompt, and the new prompt.
    assert [calls[each] for each in encoders] == [3, 3]


def test_a_weighted_prompt_paints_another_image_than_its_words_alone(sdxl: Any) -> None:
    words, weighted = plain("a red sun"), parse("a (red:1.5) sun")

    assert distance(tiny_sdxl.render(sdxl, words)[0], tiny_sdxl.render(sdxl, weighted)[0]) > 0


def test_the_cache_drops_the_least_recently_used_embedding_beyond_its_size() -> None:
    embedding = torch.zeros(1, 256)
    cache = EmbeddingCache(CPU, max_bytes=3 * embedding.nbytes)

    for key in ("a", "b", "c", "a", "d"):
        cache.get(lambda key: (embedding,), key)

    assert [key in cache for key in "abcd"] == [True, False, True, True]
    assert cache.num_bytes == 3 * embedding.nbytes
    assert (cache.misses, cache.hits) == (4, 1)


def test_cached_embeddings_take_no_device_memory() -> None:
    memory = CountedMemory(1 << 20)
    device = Device(torch.device("cpu"), torch.float32, memory)
    cache = EmbeddingCache(device)

    with device.computing():
        cache.get(lambda key: (torch.zeros(1, 1024),), "a")
    assert (memory.used_bytes, cache.num_bytes) == (0, 4096)

    with device.computing():
        (embedding,) = cache.get(lambda key: (), "a")
        assert memory.used_bytes == embedding.nbytes


def test_one_text_encoded_in_two_ways_is_cached_twice() -> None:
    cache = EmbeddingCache(CPU)

    def read(key: tuple[str, int]) -> tuple[torch.Tensor]:
        text, skipped_layers = key
        return (torch.full((1, 4), float(len(text) + skipped_layers)),)

    rows = [cache.get(read, ("a sun", skipped))[0] for skipped in (0, 1, 0)]

    assert [embedding[0, 0].item() for embedding in rows] == [5, 6, 5]
    assert (cache.misses, cache.hits) == (2, 1)
