"""A device that takes no more work from this process: its job may be retried, its worker ends."""

import asyncio
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ourvidz_serverless.errors import DeviceLost, InternalError, OutOfMemory
from ourvidz_serverless.models.chat.engine import Engine
from ourvidz_serverless.models.memory.device import Device, as_job_error, is_out_of_memory
from ourvidz_serverless.serving.runpod_queue import make_fitness_check
from ourvidz_serverless.settings import Settings
from tests.fakes import lost_device
from tests.fakes.fake_chat import FakeChat
from tests.fakes.local_worker import LocalWorker, chat_payload, sdxl_payload
from tests.fakes.slow_handler import Slowdown
from tests.fakes.tiny_chat import (
    generate_text,
    new_generation,
    tiny_chat_model,
    tiny_folder,
    tiny_network,
    until,
)
from tests.files import ROOT
from tests.patience import PATIENCE_S
from tests.servers.handler import failure
from tests.servers.http_service import ServedHttp
from tests.servers.runpod import Platform
from tests.servers.worker_process import WorkerDied, WorkerProcess

#: Such a job takes twelve seconds or more with the slowdown on.
MANY_STEPS = {"config": {"num_inference_steps": 50}}
#: The device fails at a job of this size.
LOSES_DEVICE = {"config": {"resolution": "128x64"}}


def start(platform: Platform, tmp_path: Path, **env: str) -> WorkerProcess:
    env = {
        "OMP_NUM_THREADS": "1",
        "STORAGE_URL": f"file:{tmp_path / 'assets'}",
        "POISON_DIR": str(tmp_path / "poison"),
        "SLOWDOWN": str(tmp_path / "slowdown"),
        **env,
    }
    return WorkerProcess(platform, "-m", args=[lost_device.__name__], env=env, cwd=ROOT)


def cuda_error(code: int | None = None, message: str = lost_device.CUDA_MESSAGE) -> Exception:
    """The error that torch raises. It has a code if the driver gave one."""
    error = torch.AcceleratorError(message)
    if code is not None:
        error.error_code = code
    return error


# --- through the real loop ---


@pytest.mark.slow
def test_a_worker_is_replaced_after_it_lost_its_device_and_its_other_jobs_complete(
    tmp_path: Path,
) -> None:
    with Platform() as platform, start(platform, tmp_path, CONCURRENCY="3") as process:
        with Slowdown(tmp_path / "slowdown").on():
            long = platform.submit(sdxl_payload(id="long", **MANY_STEPS))
            platform.wait_for_updates(long)
            loses_device, waits = (
                platform.submit(sdxl_payload(id=name, **changes))
                for name, changes in (("loses-device", LOSES_DEVICE), ("waits", {}))
            )
            # Both arrive while the first job computes. After the device is lost no job starts.
            for name in ("loses-device", "waits"):
                process.wait_for_log(f"({name})")

        result = platform.result(loses_device)
        others = [platform.result(job) for job in (long, waits)]

        assert process.wait() == 0
    assert result["stopPod"] is True
    assert failure(platform.status(loses_device)) == {
        "code": "INTERNAL_ERROR",
        "message": "the device failed, and with it this worker; another one can do the job",
        "retryable": True,
    }
    assert [other["output"]["status"] for other in others] == ["completed", "completed"]
    # The job that ended its worker is recorded as a poison job.
    assert len(list((tmp_path / "poison").iterdir())) == 1


@pytest.mark.slow
def test_a_chat_worker_that_lost_its_device_is_replaced(tmp_path: Path) -> None:
    env = {"FAMILIES": "chat", "CHAT_INSTRUCT_MODEL": tiny_folder(tmp_path / "chat")}
    with Platform() as platform, start(platform, tmp_path, **env) as process:
        job = platform.submit(chat_payload())

        result = platform.result(job)

        assert process.wait() == 0
    assert result["stopPod"] is True
    assert failure(platform.status(job))["code"] == "INTERNAL_ERROR"


def test_a_worker_whose_chat_server_dies_while_it_is_idle_takes_no_further_job(
    tmp_path: Path,
) -> None:
    pids = tmp_path / "pids"
    program = shlex.quote(sys.executable)
    env = {
        "FAMILIES": "chat",
        "CHAT_ENGINE": "openai",
        "CHAT_SERVER_COMMAND": (
            f"{program} -m tests.servers.chat_server --port {{port}} --children {pids}"
        ),
        "STORAGE_URL": f"file:{tmp_path / 'assets'}",
    }
    with Platform() as platform, WorkerProcess(platform, "handler.py", env=env, cwd=ROOT) as worker:
        os.kill(int(pids.read_text().split()[0]), signal.SIGKILL)

        assert worker.wait() == 0
        job = platform.submit(chat_payload())
        assert platform.status(job)["status"] == "IN_QUEUE"


@pytest.mark.slow
def test_a_device_that_does_not_compute_ends_the_worker_before_it_takes_a_job(
    tmp_path: Path,
) -> None:
    with Platform() as platform:
        job = platform.submit(sdxl_payload())
        with (
            pytest.raises(WorkerDied, match="exit 1"),
            start(platform, tmp_path, FAIL_FROM_START="1"),
        ):
            pass

        assert platform.status(job)["status"] == "IN_QUEUE"
        (ping,) = platform.pings
    assert (ping.params["status"], ping.params["check"]) == ("unhealthy", "device_computes")
    assert "an illegal memory access was encountered" in ping.params["reason"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_device_that_computes_passes_the_check(dtype: torch.dtype) -> None:
    Device(torch.device("cpu"), dtype).check()


def test_a_device_that_computes_wrong_numbers_fails_the_check(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "matmul", lambda left, right: right)

    with pytest.raises(RuntimeError, match="computes wrong numbers"):
        Device(torch.device("cpu"), torch.float32).check()


def test_a_device_that_does_not_answer_fails_the_check() -> None:
    class HungWorker:
        answer = threading.Event()

        def check_device(self) -> None:
            self.answer.wait(PATIENCE_S)

    async def ask() -> None:
        try:
            await make_fitness_check(worker, within_s=0.1)()
        finally:
            worker.answer.set()

    worker: Any = HungWorker()
    with pytest.raises(RuntimeError, match=r"does not answer within 0\.1 seconds"):
        asyncio.run(ask())


# --- which errors mean a lost device ---


@pytest.mark.parametrize(
    "error",
    [
        cuda_error(),
        cuda_error(719, "CUDA error: something new"),
        cuda_error(None, "CUDA error: device-side assert triggered\nCUDA kernel errors might be"),
        cuda_error(None, "CUDA error: unspecified launch failure"),
        cuda_error(None, "CUDA error: uncorrectable ECC error encountered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        RuntimeError("CUDA error: misaligned address"),
        RuntimeError("CUDA driver error: an illegal memory access was encountered"),
        RuntimeError("CUDA driver error: unknown error"),
        RuntimeError("Triton Error [CUDA]: unspecified launch failure"),
    ],
    ids=str,
)
def test_an_error_after_which_cuda_takes_no_more_work_is_a_lost_device(error: Exception) -> None:
    assert type(as_job_error(error)) is DeviceLost


@pytest.mark.parametrize(
    "error",
    [
        cuda_error(1, "CUDA error: invalid argument"),
        cuda_error(98, "CUDA error: invalid device function"),
        RuntimeError("CUDA driver error: invalid argument"),
        RuntimeError("Triton Error [CUDA]: device kernel image is invalid"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ValueError("CUDA error: an illegal memory access was encountered"),
    ],
    ids=str,
)
def test_an_error_that_concerns_one_job_only_is_no_lost_device(error: Exception) -> None:
    assert type(as_job_error(error)) is InternalError
    assert not is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        cuda_error(2, "CUDA error: out of memory\nCUDA kernel errors might be"),
        cuda_error(None, "CUDA error: out of memory"),
        cuda_error(None, "HIP error: out of memory"),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
    ids=str,
)
def test_a_failed_allocation_is_out_of_memory_whatever_its_message(
    error: Exception,
) -> None:
    assert is_out_of_memory(error)
    assert type(as_job_error(error)) is OutOfMemory


def test_a_lost_device_is_recognized_as_the_cause_of_another_error() -> None:
    wrapped = KeyError("weights")
    wrapped.__context__ = cuda_error()

    assert type(as_job_error(wrapped)) is DeviceLost


def test_the_chat_engine_fails_its_requests_with_device_cuda_error() -> None:
    model = tiny_chat_model()
    model.engine.decoder.register_forward_pre_hook(lost_device.fail, with_kwargs=True)

    with pytest.raises(DeviceLost):
        generate_text(model, "a")


def test_requests_get_device_lost_even_if_the_device_refuses_to_free_memory() -> None:
    class CannotFree(Device):
        def free_memory(self) -> None:
            raise cuda_error()

    model, network = tiny_chat_model(), tiny_network()
    network.base_model.register_forward_pre_hook(lost_device.fail, with_kwargs=True)
    engine = Engine(network, CannotFree(torch.device("cpu"), torch.float32), eos_ids=[])
    generation = new_generation(model, "a")
    engine.submit(generation)

    until(lambda: engine.num_running == 0)
    with pytest.raises(DeviceLost):
        list(generation)


# --- after the loss ---


def without_device(local: Callable[..., LocalWorker]) -> LocalWorker:
    """A worker whose last job lost the device."""
    worker = local()
    worker.fake_sdxl.fails.append(cuda_error())
    document = worker.run()
    assert document.result()["refresh_worker"] is True
    return worker


def test_a_worker_without_its_device_refuses_jobs_with_a_retryable_error(
    local: Callable[..., LocalWorker],
) -> None:
    document = without_device(local).run(sdxl_payload(id="next"))

    assert document.failure
    assert (document.failure.code, document.failure.retryable) == ("WORKER_UNAVAILABLE", True)
    assert "refresh_worker" not in document.result()


def test_a_worker_without_its_device_answers_admin_jobs(local: Callable[..., LocalWorker]) -> None:
    question = {"type": "admin_utilities", "config": {"operation": "health"}}

    answer = without_device(local).run({"id": "health", **question})

    assert answer.reply["result"]["status"] == "unhealthy"


def test_a_worker_without_its_device_is_unhealthy_over_http(
    local: Callable[..., LocalWorker],
) -> None:
    lost = without_device(local)

    with ServedHttp(lost.settings, lost.worker) as service:
        ping, health = service.get("/ping"), service.get("/health")

    assert (ping.status_code, health.status_code) == (503, 503)
    assert health.json()["status"] == "unhealthy"


@pytest.mark.parametrize(
    "error", [DeviceLost("the device failed"), cuda_error()], ids=["chat", "sdxl"]
)
def test_a_lost_device_is_recognized_even_if_its_job_was_stopped(
    tmp_path: Path, error: Exception
) -> None:
    class StoppedThenLost(FakeChat):
        def generate(self, *call: Any) -> Any:
            local.stop.set()
            raise error

    local = LocalWorker(
        tmp_path, settings=Settings(families=("chat",)), models={"chat": StoppedThenLost()}
    )

    local.run(chat_payload())

    assert local.worker.is_lost


def test_a_worker_takes_jobs_after_an_error_that_is_no_lost_device(
    local: Callable[..., LocalWorker],
) -> None:
    worker = local()
    worker.fake_sdxl.fails.append(RuntimeError("a shape does not fit"))

    assert "refresh_worker" not in worker.run().result()
    assert worker.run(sdxl_payload(id="next")).status == "completed"
