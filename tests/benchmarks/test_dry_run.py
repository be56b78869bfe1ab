"""What the worker asks of a card, held in numbers: on fake CUDA tensors, by shallow networks.

The figures were counted with `depth.shallow()`. If a change makes them smaller, record the smaller
ones.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, WanTransformer3DModel
from transformers import Qwen2Config

from benchmarks import architectures, report
from benchmarks.cards import CARDS
from benchmarks.dry_run import __main__ as dry_run
from benchmarks.dry_run import chat, fused, guard, memory, sdxl, tables, wan
from benchmarks.dry_run.attention import chosen
from benchmarks.dry_run.counts import Counts
from benchmarks.dry_run.depth import SHALLOW, shallow
from benchmarks.dry_run.fake_cuda import RESERVED_BYTES, FakeCuda
from benchmarks.dry_run.installed import installed
from benchmarks.dry_run.stages import DECODING, PROMPTS, STEP, Run
from ourvidz_serverless.models.chat.kv_cache import bytes_per_token
from ourvidz_serverless.models.memory.device_memory import standalone_handle
from ourvidz_serverless.models.memory.movable_tensors import MovableTensors
from ourvidz_serverless.models.sdxl.working_memory import decoding_bytes, denoising_bytes
from ourvidz_serverless.models.wan.network import WanNetwork
from tests.fakes.tiny_chat import CPU
from tests.files import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        guard.missing() is not None, reason=f"no fake CUDA device: {guard.missing()}"
    ),
]

GIB = 2**30
CUDA = torch.device("cuda", 0)

# --- the device ---


@pytest.fixture
def fake() -> Iterator[FakeCuda]:
    """A fake device that is installed; each test enters `on()` itself."""
    with installed(FakeCuda()) as device:
        yield device


def test_an_operation_on_the_device_is_counted_with_its_bytes_and_flops(fake: FakeCuda) -> None:
    with fake.on():
        left, right = (torch.empty(8, 8, dtype=torch.float16, device=CUDA) for _ in range(2))
        left @ right

    found = fake.take()
    assert (found.kernels, found.num_bytes, found.flops["half"]) == (1, 3 * 128, 2 * 8**3)


@pytest.mark.parametrize(("weight", "kernels"), [(torch.bfloat16, 1), (torch.float32, 7)])
def test_a_norm_is_one_kernel_on_cuda_if_its_weight_has_the_dtype_of_its_input(
    fake: FakeCuda, weight: torch.dtype, kernels: int
) -> None:
    with fake.on(), torch.inference_mode():
        hidden = torch.empty(4, 64, dtype=torch.bfloat16, device=CUDA)
        scale = torch.empty(64, dtype=weight, device=CUDA)
        torch.nn.functional.rms_norm(hidden, (64,), scale, 1e-6)

    assert fake.take().kernels == pytest.approx(kernels, abs=2 * (kernels > 1))


def test_what_an_operation_only_writes_to_is_not_read(fake: FakeCuda) -> None:
    with fake.on():
        numbers, result = torch.empty(8, device=CUDA), torch.empty(8, device=CUDA)
        fake.take()
        torch.add(numbers, 1, out=result)

    assert fake.take().num_bytes == 2 * 32


def test_an_element_that_a_tensor_repeats_is_read_once(fake: FakeCuda) -> None:
    with fake.on():
        row = torch.empty(1, 8, device=CUDA).expand(100, 8)
        row.sum(0)

    assert fake.take().num_bytes == 32 + 32


def test_a_pageable_copy_makes_the_host_wait_and_a_pinned_one_does_not(fake: FakeCuda) -> None:
    with fake.on():
        torch.ones(4).to(CUDA, non_blocking=True)
        pageable = fake.take()
        torch.ones(4).pin_memory().to(CUDA, non_blocking=True)
        pinned = fake.take()

    assert (pageable.num_waits, pageable.up.num_pinned) == (1, 0)
    assert (pinned.num_waits, pinned.up.num_pinned, pinned.up.num_bytes) == (0, 1, 16)


def test_a_number_that_the_host_reads_is_a_wait_with_the_line_that_reads_it(fake: FakeCuda) -> None:
    with fake.on():
        assert torch.ones(4, device=CUDA).sum().item() == 0

    (line,) = fake.take().waits
    assert line.startswith("reads a number: test_dry_run.py:")


def test_a_tensor_that_is_made_of_a_list_of_tensors_reads_each_of_them(fake: FakeCuda) -> None:
    with fake.on():
        made = torch.tensor([torch.ones((), device=CUDA), 2.0])

    assert made.tolist() == [0, 2]
    assert fake.take().num_waits == 1


def test_a_list_of_numbers_comes_down_in_one_copy(fake: FakeCuda) -> None:
    with fake.on():
        assert torch.ones(3, device=CUDA).tolist() == [0, 0, 0]

    found = fake.take()
    assert (found.num_waits, found.down.num, found.down.num_bytes) == (1, 1, 12)


def test_what_comes_down_into_a_buffer_is_zeros(fake: FakeCuda) -> None:
    buffer = torch.full((4,), torch.nan)

    with fake.on():
        buffer[1:3].copy_(torch.ones(2, device=CUDA))

    assert buffer[1:3].tolist() == [0, 0] and buffer[0].isnan()


def test_freed_memory_is_counted_no_longer(fake: FakeCuda) -> None:
    with fake.on():
        tensor = torch.empty(1000, device=CUDA)
        assert fake.live_bytes == 4096
        del tensor

    assert fake.live_bytes == 0
    assert fake.take().peak_bytes == 4096


def test_a_tensor_that_does_not_fit_the_card_raises_torchs_error(fake: FakeCuda) -> None:
    with fake.on(), pytest.raises(torch.OutOfMemoryError):
        torch.empty(141 << 30, dtype=torch.uint8, device=CUDA)


def test_tensors_on_two_devices_are_refused(fake: FakeCuda) -> None:
    with fake.on(), pytest.raises(RuntimeError, match="two devices"):
        torch.ones(4, device=CUDA) + torch.ones(4)


def test_a_product_of_two_dtypes_is_noted_as_mixed(fake: FakeCuda) -> None:
    with fake.on():
        torch.ones(4, 4, device=CUDA, dtype=torch.float16) @ torch.ones(4, 4, device=CUDA)

    (line,) = fake.take().mixed
    assert line.startswith("mm of float16 and float32: test_dry_run.py:")


def test_inference_mode_counts_the_same_operations(fake: FakeCuda) -> None:
    counted = []
    for is_inference in (False, True):
        with fake.on(), torch.inference_mode(is_inference), torch.no_grad():
            image = torch.empty(1, 4, 8, 8, device=CUDA)
            torch.nn.functional.dropout(image, training=False)
            torch.nn.functional.interpolate(image, scale_factor=2.0)
            torch.nn.functional.linear(image, torch.empty(3, 8, device=CUDA))
        found = fake.take()
        counted.append((found.kernels, found.num_bytes))

    assert counted[0] == counted[1]


def test_a_moved_module_keeps_its_parameters_and_a_shared_one_moves_once(fake: FakeCuda) -> None:
    with fake.fake:
        first, second = torch.nn.Linear(16, 16, bias=False), torch.nn.Linear(16, 16, bias=False)
    second.weight = first.weight
    before = first.weight

    with fake.on():
        torch.nn.ModuleList([first, second]).to(CUDA)

    assert first.weight is second.weight is before
    assert before.device == CUDA
    assert fake.take().up.num == 1


def test_other_threads_and_the_time_after_see_torch_as_it_is() -> None:
    apply = torch.nn.Module._apply

    with installed(FakeCuda()):
        assert torch.ones(2).sum().item() == 2  # not in `on()`

    assert torch.nn.Module._apply is apply
    assert not torch.cuda.is_available() or torch.cuda.mem_get_info()[1] > 0


@pytest.mark.parametrize(
    ("kernel", "dtype", "key_heads", "has_mask", "size"),
    [
        ("flash", torch.float16, 4, False, 64),
        ("flash", torch.bfloat16, 2, False, 128),
        ("efficient", torch.float16, 4, True, 64),
        ("efficient", torch.float32, 4, False, 512),
        ("math", torch.bfloat16, 2, True, 128),
    ],
)
def test_attention_takes_the_kernel_that_torch_takes_on_cuda(
    kernel: str, dtype: torch.dtype, key_heads: int, has_mask: bool, size: int
) -> None:
    query = torch.empty(1, 4, 16, size, dtype=dtype, device="meta")
    key = torch.empty(1, key_heads, 16, size, dtype=dtype, device="meta")
    mask = torch.empty(16, 16, dtype=dtype, device="meta") if has_mask else None

    assert chosen(query, key, key, mask) == kernel


def test_a_floor_is_the_longer_of_computing_and_memory() -> None:
    counts = Counts()
    card = CARDS["H200"]
    counts.note_kernel("mm", num_bytes=1, flops=int(card.half), precision="half")
    counts.note_kernel("add", num_bytes=int(card.bytes_s), flops=0, precision="half")

    assert counts.floor_s["H200"] == pytest.approx(2)
    assert counts.memory_bound_s["H200"] == pytest.approx(1)


# --- the families ---


@pytest.fixture(scope="module")
def pictures() -> Run:
    with shallow():
        return sdxl.ours(sdxl.Job(6))


@pytest.fixture(scope="module")
def video() -> Run:
    with shallow():
        return wan.ours(wan.Job("t2v", frames=9))


@pytest.fixture(scope="module")
def vace_video() -> Run:
    with shallow():
        return wan.ours(wan.Job("vace", frames=5, size=(416, 240)))


@pytest.fixture(scope="module")
def replies() -> Run:
    with shallow():
        return chat.ours(chat.Job(16, 1000))


def test_sdxl_waits_for_nothing_during_its_steps_with_euler(pictures: Run) -> None:
    assert not pictures.step.waits


def test_inpainting_puts_the_picture_back_after_a_step_without_a_wait() -> None:
    with shallow():
        run = sdxl.ours(sdxl.Job(side=256, strength=1.0, is_masked=True))

    assert not run.step.waits


def test_chat_waits_once_for_the_next_tokens_of_all_replies(replies: Run) -> None:
    assert replies.stages[chat.DECODE].num_waits == 1


def test_penalties_cost_the_same_operations_for_any_number_of_replies() -> None:
    def added(rows: int) -> tuple[int, int]:
        with shallow():
            runs = [chat.ours(chat.Job(rows, 16, penalty=penalty)) for penalty in (1.0, 1.1)]
        without, having = (run.stages[chat.DECODE] for run in runs)
        return having.kernels - without.kernels, having.up.num - without.up.num

    assert added(3) == added(9) == (8, 1)


def test_wan_waits_for_nothing_during_its_steps(video: Run, vace_video: Run) -> None:
    assert (video.step.num_waits, vace_video.step.num_waits) == (0, 0)


@pytest.mark.parametrize(
    "job",
    [
        pytest.param(sdxl.Job(side=256, has_lora=True), marks=pytest.mark.deep),
        pytest.param(sdxl.Job(side=256, keeps="character"), marks=pytest.mark.deep),
        pytest.param(wan.Job("flf2v", frames=5, size=(416, 240)), marks=pytest.mark.deep),
        pytest.param(
            wan.Job("vace", frames=5, size=(416, 240), given=("subject",)), marks=pytest.mark.deep
        ),
    ],
    ids=str,
)
def test_other_jobs_wait_for_nothing_during_their_steps_either(job: Any) -> None:
    with shallow():
        run = memory.run_of(job)(job)

    assert not run.step.waits
    assert not [line for stage in run.stages.values() for line in stage.mixed]


def test_prompts_of_64_conversations_take_little_more_memory_than_their_tokens() -> None:
    with shallow():
        run = chat.ours(chat.Job(64, 1000))

    tokens = 64 * 1004 * bytes_per_token(Qwen2Config(**architectures.QWEN_7B), torch.bfloat16)
    shallow_part = (
        SHALLOW["QWEN_7B"]["num_hidden_layers"] / architectures.QWEN_7B["num_hidden_layers"]
    )
    kept = run.stages[chat.DECODE].peak_bytes - run.weight_bytes
    assert kept <= 1.25 * tokens * shallow_part + 0.25 * GIB


@pytest.mark.deep
def test_weights_come_from_the_disk_with_as_few_waits_as_at_first() -> None:
    with shallow():
        stages = sdxl.moves().stages

    first, again = stages["to the device"], stages["from the disk to the device"]
    assert (again.up.num_bytes, again.up.num_pinned) == (first.up.num_bytes, first.up.num)
    assert again.num_waits <= first.num_waits


@pytest.mark.parametrize("name", ["pictures", "video", "vace_video", "replies"])
def test_no_operation_mixes_dtypes(name: str, request: pytest.FixtureRequest) -> None:
    run: Run = request.getfixturevalue(name)

    assert not [line for stage in run.stages.values() for line in stage.mixed]


#: By family and stage: operations, and GB that they read and write.
RECORDED = {
    ("pictures", PROMPTS): (166, 0.289),
    ("pictures", STEP): (347, 46.9),
    ("pictures", DECODING): (912, 365),
    ("video", PROMPTS): (165, 2.51),
    ("video", STEP): (283, 8.57),
    ("vace_video", STEP): (395, 2.81),
    ("replies", chat.PREFILL): (134, 20.2),
    ("replies", chat.DECODE): (117, 2.20),
}


@pytest.mark.parametrize(("name", "stage"), RECORDED)
def test_a_stage_has_at_most_the_recorded_operations_and_bytes(
    name: str, stage: str, request: pytest.FixtureRequest
) -> None:
    found = request.getfixturevalue(name).stages[stage]

    operations, gigabytes = RECORDED[name, stage]
    assert found.kernels <= 1.05 * operations
    assert found.num_bytes / 1e9 <= 1.05 * gigabytes


def test_the_compiler_plans_at_most_the_recorded_kernels_and_bytes_for_a_wan_block() -> None:
    block = next(each for each in fused.BLOCKS if each.name.startswith("WAN T2V"))

    found, (operations, num_bytes) = fused.fused(block.make), fused.eager(block.make)

    assert (found.kernels, found.triton) == (24, 10)
    assert found.kernels < operations
    assert found.num_bytes / 1e9 <= 1.05 * 7.22 < 0.6 * num_bytes / 1e9


#: GiB of the full-size weights that are on the card at the same time, by `test_benchmarks`' numbers
#: of parameters, and the card on which the job must run without any of them leaving it.
CARD_OF = {
    "pictures": (6.62, "16 GB"),
    "video": (13.70, "24 GB"),
    "replies": (14.19, "24 GB"),
}


@pytest.mark.parametrize("name", CARD_OF)
def test_a_job_fits_beside_the_weights_on_the_card_that_the_document_names(
    name: str, request: pytest.FixtureRequest
) -> None:
    run: Run = request.getfixturevalue(name)
    weights, card = CARD_OF[name]

    working = (run.peak_bytes - run.weight_bytes) / GIB

    assert weights + working + RESERVED_BYTES / GIB <= memory.SIZES[card]


def test_the_ledger_expects_at_least_the_counted_memory_and_at_most_twice_as_much(
    pictures: Run, video: Run
) -> None:
    with architectures.made_on("meta", torch.float16):
        unet = UNet2DConditionModel(**architectures.SDXL_UNET)
        vae = AutoencoderKL(**architectures.SDXL_VAE)
    with architectures.made_on("meta", torch.bfloat16):
        transformer = WanTransformer3DModel(**architectures.WAN_TRANSFORMER)
    network = WanNetwork(transformer, standalone_handle(MovableTensors([], CPU)))

    for run, stage, expected in (
        (pictures, STEP, denoising_bytes(unet, 2 * 6, 128 * 128)),
        (pictures, DECODING, decoding_bytes(vae, torch.float32, 1024 * 1024)),
        (video, STEP, network.expected_bytes((1, 16, 3, 60, 104))),
    ):
        counted = run.stages[stage].peak_bytes - run.weight_bytes
        assert counted <= expected <= 2 * counted, stage


# --- the command and the documents ---


@pytest.mark.parametrize(
    ("page", "titles"), [("benchmarks", tables.TITLES[:-1]), ("deploying", [tables.MEMORY])]
)
def test_the_documents_have_the_tables(page: str, titles: Any) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")

    assert not [title for title in titles if f"**{title}**" not in text]


def test_a_family_that_is_counted_alone_leaves_the_rows_of_the_others() -> None:
    old = report.table("Some", ["work", "GB"], [["A 1", 1], ["A 2", None], ["B 1", 3]], "A note.")
    new = report.table("Some", ["work", "GB"], [["A 3", 4]], "A note.")

    found = tables.merged(new, f"# Title\n\n{old}\nmore", ["A", "B"], "A")

    assert [list(row) for row in found.rows] == [["A 3", 4], ["B 1", "3"]]


@pytest.mark.deep
def test_the_command_counts_each_family_and_its_peer(tmp_path: Path) -> None:
    path = tmp_path / "found.json"

    dry_run.main(["--tiny", "--json", str(path)])

    document = json.loads(path.read_text())
    found = {table["title"]: table["rows"] for table in document["tables"]}
    assert list(found) == list(tables.TITLES)
    assert {row[1] for row in found[tables.COUNTS]} == {"worker", "diffusers", "transformers"}
