"""`admin_utilities`: the specification's bodies with true values, while something else renders."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from ourvidz_serverless.context import Stop
from ourvidz_serverless.jobs.admin import CHANGING, OPERATIONS
from ourvidz_serverless.models.memory.ledger import Ledger
from ourvidz_serverless.settings import Settings
from tests.fakes.devices import FakeMemory, FakeModel
from tests.fakes.fake_chat import FakeChat
from tests.fakes.fake_sdxl import FakeSdxl
from tests.fakes.local_worker import LocalWorker, sdxl_payload
from tests.files import SPECIFICATION
from tests.patience import PATIENCE_S

MIB = 1 << 20
SIZES = {"sdxl": 10 * 1024, "qwen_instruct": 15 * 1024, "qwen_base": 15 * 1024}


class Site:
    """A worker for SDXL and chat on a card of 24 GB, whose models are parcels of that size."""

    def __init__(self, local: Callable[..., LocalWorker], **settings: Any) -> None:
        card = FakeMemory(24 * 1024 * MIB)
        self.ledger = Ledger(card)
        self.parcels = {name: FakeModel(size * MIB, card) for name, size in SIZES.items()}
        for name, parcel in self.parcels.items():
            family = "sdxl" if name == "sdxl" else "chat"
            is_pinned = name == "sdxl"
            self.ledger.register(
                parcel, name, family, source=f"{name}.safetensors", is_pinned=is_pinned
            )
        self.ledger.preload(self.parcels["sdxl"])
        fake_sdxl = FakeSdxl()
        served = {"families": ("sdxl", "chat"), "chat_base_model": "/models/base", **settings}
        self.at = local(
            settings=Settings(**served),
            ledger=self.ledger,
            fake_sdxl=fake_sdxl,
            models={"sdxl": fake_sdxl, "chat": FakeChat("Rain.")},
        )

    def ask(self, operation: str, **config: Any) -> dict[str, Any]:
        return self.answer(operation, **config).reply["result"]

    def answer(self, operation: str, key: str | None = None, **config: Any) -> Any:
        payload = {
            "id": f"admin-{operation}",
            "type": "admin_utilities",
            "api_key": key,
            "config": {"operation": operation, **config},
        }
        return self.at.run(payload, stop=Stop())


@pytest.fixture
def site(local: Callable[..., LocalWorker]) -> Site:
    return Site(local)


# --- the specification's bodies ---


@pytest.mark.parametrize("operation", SPECIFICATION["admin"])
def test_every_operation_answers_with_every_key_of_the_specification(
    site: Site, operation: str
) -> None:
    body = site.ask(operation, job_id="job-1")

    assert set(SPECIFICATION["admin"][operation]) <= set(body)
    assert body["operation"] == operation


def test_the_operations_are_those_of_the_specification() -> None:
    assert list(OPERATIONS) == list(SPECIFICATION["admin"])


def test_the_answer_is_a_document_without_assets(site: Site) -> None:
    document = site.answer("health").result()

    assert document["status"] == "completed"
    assert document["assets"] == []
    assert json.loads(json.dumps(document)) == document


def test_health_tells_what_is_loaded_and_where(site: Site) -> None:
    assert site.ask("health")["model_loaded"] is True
    assert site.ask("health", target_worker="chat_worker")["model_loaded"] is False
    assert site.ask("health")["device"] == "fake"


def test_memory_is_told_in_the_specifications_words(site: Site) -> None:
    status = site.ask("memory_status")

    assert status["memory_usage"] == "10GB"
    assert status["workers"] == {
        "sdxl_worker": "loaded",
        "chat_worker": "unloaded",
        "wan_worker": "not_served",
    }
    assert status["memory_allocation"] == {
        "sdxl": "10GB (always loaded)",
        "chat": "30GB (load when possible)",
    }
    assert status["vram_usage"] == {
        "total": 24576,
        "used": 10240,
        "free": 14336,
        "pressure": "low",
    }


def test_the_report_tells_each_workers_share_and_what_would_help(site: Site) -> None:
    report = site.ask("memory_report")

    assert report["available_vram"] == 14336
    assert report["worker_status"] == {
        "sdxl": {"loaded": True, "memory": 10240},
        "chat": {"loaded": False, "memory": 0},
        "wan": {"loaded": False, "memory": 0},
    }
    assert report["recommendations"] == ["unload_sdxl_for_chat"]


def test_pressure_follows_what_the_device_holds(site: Site) -> None:
    assert site.ask("pressure_check")["pressure_level"] == "low"

    site.ask("memory_unload", target_worker="sdxl_worker")
    site.ask("memory_load", target_worker="qwen_base")
    site.ask("memory_load", target_worker="sdxl")
    assert site.ask("pressure_check")["pressure_level"] == "low"

    site.ledger.memory.held_by_others = 8 * 1024 * MIB
    assert site.ask("pressure_check")["pressure_level"] == "critical"


def test_what_chat_can_do_is_told_by_its_models(site: Site) -> None:
    info = site.ask("enhancement_info")

    assert info["models_available"] == ["qwen_instruct", "qwen_base"]
    assert info["model_info"]["base_model"] == "base"
    assert set(info["capabilities"]) == set(SPECIFICATION["capabilities"])


def test_the_environment_is_told_by_paths_and_versions_alone(
    local: Callable[..., LocalWorker],
) -> None:
    secrets = {
        "worker_api_key": "key-of-the-house",
        "supabase_service_key": "key-of-the-base",
        "job_callback_secret": "key-of-the-post",
        "bucket_access_key_id": "id-of-the-store",
        "bucket_secret_access_key": "key-of-the-store",
        "upstash_redis_rest_token": "key-of-the-redis",
    }
    site = Site(local, **secrets)

    for operation in OPERATIONS:
        told = json.dumps(site.answer(operation, key="key-of-the-house", job_id="job-1").result())
        assert not [secret for secret in secrets.values() if secret in told]

    body = site.answer("debug_env", key="key-of-the-house").reply["result"]
    known = {"operation", *SPECIFICATION["admin"]["debug_env"], "package_path", "versions"}
    assert set(body) == known
    assert body["model_paths"]["qwen_base"] == "/models/base"


# --- beside whatever computes ---


def test_an_answer_comes_while_a_picture_is_painted(site: Site) -> None:
    site.at.fake_sdxl.hold()
    with ThreadPoolExecutor() as threads:
        painting = threads.submit(site.at.run)
        assert site.at.fake_sdxl.at_step.wait(PATIENCE_S)

        status = site.ask("job_status", job_id="job-1", user_id="user-1")

        assert (status["status"], status["stage"]) == ("processing", "generate")
        assert site.ask("health")["jobs"]["processing"] == 2
        site.at.fake_sdxl.go_on.set()
        assert painting.result(PATIENCE_S).status == "completed"


def test_a_job_that_is_over_is_told_by_its_end(site: Site) -> None:
    site.at.run()
    site.at.run(sdxl_payload(id="job-2", config={"num_images": 2}))
    site.at.run(sdxl_payload(id="job-3", reference_required=True, type="video_fast"))

    assert site.ask("job_status", job_id="job-1", user_id="user-1")["status"] == "completed"
    assert site.ask("job_status", job_id="job-2", user_id="user-1")["status"] == "unknown"
    failed = site.ask("job_status", job_id="job-3", user_id="user-1")
    assert (failed["status"], failed["error"]["code"]) == ("failed", "WORKER_UNAVAILABLE")


def test_nobody_is_told_of_anothers_job_by_its_id_alone(site: Site) -> None:
    site.at.run()

    assert site.ask("job_status", job_id="job-1")["status"] == "unknown"


def test_nobody_is_told_of_a_job_of_another_key(site: Site) -> None:
    site.at.run(sdxl_payload(api_key="mine"))
    question = {"operation": "job_status", "job_id": "job-1", "user_id": "user-1"}
    payload = {"id": "admin", "type": "admin_utilities", "config": question}

    answers = [site.at.run({**payload, "api_key": key}).reply for key in ("mine", "another")]

    assert [each["result"]["status"] for each in answers] == ["completed", "unknown"]


def test_a_job_in_the_middle_is_counted_until_its_end(site: Site) -> None:
    site.at.run()

    assert site.ask("status")["jobs"] == {"processing": 1, "completed": 1, "failed": 0}


# --- what changes the worker ---


def test_a_model_is_loaded_and_unloaded_on_demand(site: Site) -> None:
    unloaded = site.ask("memory_unload", target_worker="sdxl_worker")
    loaded = site.ask("memory_load", target_worker="qwen_instruct")

    assert (unloaded["success"], unloaded["models"]) == (True, {"sdxl": "host"})
    assert (loaded["success"], loaded["models"]) == (True, {"qwen_instruct": "device"})
    assert site.ask("health", target_worker="sdxl")["model_loaded"] is False


def test_without_force_nothing_is_driven_out(site: Site) -> None:
    refused = site.ask("memory_load", target_worker="chat_worker")
    forced = site.ask("memory_load", target_worker="chat_worker", force=True)

    assert refused["success"] is False
    assert refused["refused"]["qwen_instruct"] == "there is no room for it"
    assert forced["models"] == {"qwen_instruct": "device", "qwen_base": "host"}
    assert site.ask("health", target_worker="sdxl")["model_loaded"] is False


def test_a_model_in_use_is_not_unloaded_under_its_job(site: Site) -> None:
    with site.ledger.using(site.parcels["sdxl"]):
        refused = site.ask("memory_unload", target_worker="sdxl_worker")
        forced = site.ask("force_unload", target_worker="sdxl_worker")

        assert refused["refused"] == {"sdxl": "it is in use"}
        assert (forced["success"], forced["pending"]) == (True, ["sdxl"])
        assert site.parcels["sdxl"].place == "device"

    assert site.parcels["sdxl"].was_evicted.wait(PATIENCE_S)
    assert site.ask("health", target_worker="sdxl")["model_loaded"] is False


def test_a_forced_unload_leaves_nothing_in_the_hosts_memory(site: Site) -> None:
    assert site.ask("force_unload", target_worker="sdxl")["models"] == {"sdxl": "disk"}


def test_a_prediction_brings_a_model_unless_the_pressure_is_high(site: Site) -> None:
    brought = site.ask("predictive_load", target_worker="chat_worker")
    site.ledger.memory.held_by_others = 8 * 1024 * MIB
    refused = site.ask("predictive_load", target_worker="sdxl_worker")

    assert brought["models"]["qwen_instruct"] == "device"
    assert (refused["success"], refused["reason"]) == (False, "the pressure is critical")


def test_the_emergency_operations_own_shape_is_understood(site: Site) -> None:
    payload = {
        "id": "admin",
        "type": "admin_utilities",
        "operation": "force_unload",
        "target_worker": "sdxl_worker",
        "force": False,
    }

    assert site.at.run(payload).reply["result"]["models"] == {"sdxl": "disk"}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_where_a_key_is_required_changes_need_one(
    local: Callable[..., LocalWorker], operation: str
) -> None:
    site = Site(local, admin_requires_key=True)

    document = site.answer(operation, target_worker="sdxl", job_id="job-1")

    refused = bool(document.failure and document.failure.code == "UNAUTHORIZED")
    assert refused == (operation in CHANGING)
    if refused:
        assert site.parcels["sdxl"].place == "device"


def test_whoever_brings_the_key_may_change_what_he_likes(local: Callable[..., LocalWorker]) -> None:
    site = Site(local, admin_requires_key=True, worker_api_key="open-sesame")

    document = site.answer("force_unload", key="open-sesame", target_worker="sdxl")

    assert document.reply["result"]["models"] == {"sdxl": "disk"}


@pytest.mark.parametrize(
    ("config", "code", "message"),
    [
        ({"operation": "burn"}, "INVALID_PROMPT", "config.operation: Input should be 'health'"),
        ({}, "INVALID_PROMPT", "config.operation: Field required"),
        ({"operation": "job_status"}, "INVALID_PROMPT", "config.job_id: Field required"),
        (
            {"operation": "health", "target_worker": "oven"},
            "INVALID_PROMPT",
            "config.target_worker: Input should be one of chat, qwen_base",
        ),
        (
            {"operation": "memory_load", "target_worker": "wan_worker"},
            "WORKER_UNAVAILABLE",
            "config.target_worker: wan is not served here; this endpoint serves sdxl",
        ),
    ],
)
def test_what_does_not_hold_is_refused_by_its_name(
    site: Site, config: dict[str, Any], code: str, message: str
) -> None:
    document = site.at.run({"id": "admin", "type": "admin_utilities", "config": config})

    assert document.failure.code == code
    assert document.failure.message.startswith(message)


@pytest.mark.parametrize("operation", ["health", "info", "debug_env", "pressure_check"])
def test_a_target_that_there_is_not_is_refused_by_every_operation(
    site: Site, operation: str
) -> None:
    document = site.answer(operation, target_worker="oven")

    assert document.failure.message.startswith("config.target_worker: Input should be one of")
