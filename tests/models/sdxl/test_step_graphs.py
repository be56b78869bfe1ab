"""SDXL's steps from CUDA graphs, which a CPU replays as lists of operations."""

import logging
from typing import Any

import numpy as np
import pytest

from ourvidz_serverless.models.chat.cuda_graphs import Capture
from ourvidz_serverless.models.sdxl import loader
from ourvidz_serverless.models.sdxl.networks import SdxlNetworks
from ourvidz_serverless.models.sdxl.pipeline import SdxlModel
from ourvidz_serverless.settings import Settings
from tests.fakes import tiny_sdxl
from tests.fakes.fake_cuda_graph import FakeCudaGraphs, capture_result, failing_capture


@pytest.fixture(scope="module")
def eager() -> SdxlModel:
    return loader.load(Settings())


@pytest.fixture(scope="module")
def networks(eager: SdxlModel) -> SdxlNetworks:
    return eager.networks


def model_with(networks: SdxlNetworks, eager: SdxlModel, capture: Capture | None) -> SdxlModel:
    return SdxlModel(networks, eager.device, capture=capture)


def render(model: SdxlModel, prompt: str = "a red sun", **changes: Any) -> np.ndarray:
    options: dict[str, Any] = {"steps": 4, **changes}
    return np.stack(tiny_sdxl.render(model, prompt, **options))


def test_a_picture_from_graphs_is_the_one_without_them(
    networks: SdxlNetworks, eager: SdxlModel
) -> None:
    capture = FakeCudaGraphs()
    model = model_with(networks, eager, capture)
    expected = render(eager)

    made = [render(model) for _ in range(3)]

    assert all(np.array_equal(each, expected) for each in made)
    assert model.graphs is not None
    # All steps but those that capture and compare, which are two of the second job.
    assert (capture.num_captured, model.graphs.num_replayed) == (1, 2 + 4)


def test_each_job_has_its_own_prompt_seed_and_scheduler_in_the_same_graph(
    networks: SdxlNetworks, eager: SdxlModel
) -> None:
    capture = FakeCudaGraphs()
    model = model_with(networks, eager, capture)
    jobs = [
        {"prompt": "a red sun"},
        {"prompt": "a blue house", "seeds": (8,)},
        {"prompt": "a tree", "scheduler": "dpmpp_2m"},
        {"prompt": "a boat", "scheduler": "lcm"},
    ]

    made = [render(model, **job) for job in jobs]

    assert all(
        np.array_equal(each, render(eager, **job)) for each, job in zip(made, jobs, strict=True)
    )
    assert capture.num_captured == 1


def test_each_size_and_number_of_pictures_has_a_graph(
    networks: SdxlNetworks, eager: SdxlModel
) -> None:
    capture = FakeCudaGraphs()
    model = model_with(networks, eager, capture)
    jobs: list[dict[str, Any]] = [{}, {"seeds": (1, 2)}, {"size": (96, 64)}, {"guidance_scale": 1}]

    for job in jobs:
        render(model, **job)
        assert np.array_equal(render(model, **job), render(eager, **job))

    assert capture.num_captured == len(jobs)


def test_a_job_with_a_preset_runs_without_a_graph(networks: SdxlNetworks, eager: SdxlModel) -> None:
    model = model_with(networks, eager, FakeCudaGraphs())

    made = [render(model, speed="balanced") for _ in range(3)]

    assert np.array_equal(made[-1], render(eager, speed="balanced"))
    assert model.graphs is not None and model.graphs.num_captured == 0


def test_graphs_end_when_the_weights_leave_the_device(
    networks: SdxlNetworks, eager: SdxlModel
) -> None:
    capture = FakeCudaGraphs()
    model = model_with(networks, eager, capture)
    expected = [render(model) for _ in range(2)][-1]

    model.parts.to_host()

    assert np.array_equal(render(model), expected)
    assert capture.num_captured == 2


@pytest.mark.parametrize(
    ("capture", "why"),
    [
        (failing_capture(RuntimeError("no graph")), "RuntimeError"),
        (capture_result, "it computed something else"),
    ],
)
def test_a_graph_that_fails_is_one_warning_and_the_pictures_are_right(
    networks: SdxlNetworks,
    eager: SdxlModel,
    caplog: pytest.LogCaptureFixture,
    capture: Capture,
    why: str,
) -> None:
    model = model_with(networks, eager, capture)

    with caplog.at_level(logging.WARNING):
        made = [render(model) for _ in range(3)]

    assert all(np.array_equal(each, render(eager)) for each in made)
    lines = [each.message for each in caplog.records if "SDXL_GRAPHS" in each.message]
    assert lines == [f"SDXL_GRAPHS: no step is replayed from now on ({why})"]


def test_a_worker_on_a_cpu_has_no_graphs() -> None:
    assert loader.load(Settings(sdxl_graphs="auto")).graphs is None
