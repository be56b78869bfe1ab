"""After an out-of-memory a smaller batch runs, and grows slowly again."""

from ourvidz_serverless.models.chat.batch_limit import BatchLimit


def steps_until_larger(limit: BatchLimit) -> int:
    return next(step for step in range(1, 10_000) if limit.note_step(limit.size))


def test_each_out_of_memory_doubles_the_steps_before_a_larger_batch_is_tried() -> None:
    limit, steps = BatchLimit(64), []
    for _ in range(9):
        limit.shrink(8)
        steps.append(steps_until_larger(limit))

    assert steps == [64, 128, 256, 512, 1024, 2048, 4096, 8192, 8192]


def test_only_full_batches_make_the_next_one_larger() -> None:
    limit = BatchLimit(64)
    limit.shrink(8)

    assert not any(limit.note_step(3) for _ in range(1000))
    assert limit.size == 4


def test_a_full_batch_of_the_largest_size_forgets_earlier_out_of_memories() -> None:
    limit = BatchLimit(8)
    limit.shrink(8)
    limit.shrink(8)
    while limit.size < limit.maximum:
        limit.note_step(limit.size)
    for _ in range(128):
        limit.note_step(8)
    limit.shrink(8)

    assert steps_until_larger(limit) == 64
