"""`admin_utilities`: the specification's answers with true values, also while a job computes."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ourvidz_serverless
from ourvidz_serverless.context import Stop
from ourvidz_serverless.errors import ModelLoadError
from ourvidz_serverless.jobs.admin import CHANGING, OPERATIONS
from ourvidz_serverless.models.memory.ledger import Ledger
from ourvidz_serverless.settings import Settings
from tests.fakes.devices import FakeMemory, FakeModel
from tests.fakes.fake_chat import FakeChat
from tests.fakes.fake_sdxl import FakeSdxl
from tests.fakes.local_worker import LocalWorker, sdxl_payload
from tests.files import SPECIFICATION
from tests.patience import PATIENCE_S, start

MIB = 1 << 20
SIZES = {"sdxl": 10 * 1024, "qwen_instruct": 15 * 1024, "qwen_base": 15 * 1024}


class Site:
    """A worker for SDXL and chat on a card of 24 GB, with fake models of realistic sizes."""

    def __init__(self, local: Callable[..., LocalWorker], **settings: Any) -> None:
        card = FakeMemory(24 * 1024 * MIB)
        self.ledger = Ledger(card)
        self.models = {name: FakeModel(size * MIB, card) for name, size in SIZES.items()}
        for name, model in self.models.items():
            family = "sdxl" if name == "sdxl" else "chat"
            is_pinned = name == "sdxl"
            self.ledger.register(
                model, name, family, source=f"{name}.safetensors", is_pinned=is_pinned
            )
        self.ledger.preload(self.models["sdxl"])
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
        return start(self.at.run, payload, stop=Stop()).result(PATIENCE_S)


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


def test_health_reports_whether_models_are_loaded_and_the_device(site: Site) -> None:
    assert site.ask("health")["model_loaded"] is True
    assert site.ask("health", target_worker="chat_worker")["model_loaded"] is False
    assert site.ask("health")["device"] == "fake"


def test_a_worker_that_lacks_no_model_is_healthy_and_names_none(site: Site) -> None:
    health = site.ask("health")

    assert health["status"] == "healthy"
    assert "models_lost" not in health


def test_a_worker_whose_model_does_not_load_is_degraded_and_names_it(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load() -> None:
        raise ModelLoadError("the file is gone")

    monkeypatch.setattr(site.models["qwen_base"], "load", load)
    site.ask("force_unload", target_worker="qwen_base")
    site.ask("memory_load", target_worker="qwen_base", force=True)

    health = site.ask("health")

    assert (health["status"], health["models_lost"]) == ("degraded", ["qwen_base"])


def test_the_uptime_counts_from_the_start_of_the_worker(local: Callable[..., LocalWorker]) -> None:
    before = time.monotonic()

    uptime = Site(local).ask("health")["uptime"]

    # The answer is rounded to milliseconds.
    assert 0 <= uptime <= time.monotonic() - before + 0.001


def test_a_worker_without_a_ledger_has_no_device_and_no_pressure(
    local: Callable[..., LocalWorker],
) -> None:
    health = local().worker.health()

    assert (health["device"], health["pressure"], health["model_loaded"]) == ("none", "low", False)


def test_status_names_the_batches_that_a_family_accepts(site: Site) -> None:
    assert site.ask("status", target_worker="sdxl")["batch_support"] == [1, 2, 3, 4, 5, 6]
    assert site.ask("status", target_worker="chat")["batch_support"] == [1]


def test_memory_status_has_the_specifications_words(site: Site) -> None:
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


def test_the_memory_report_has_each_familys_share_and_a_recommendation(site: Site) -> None:
    report = site.ask("memory_report")

    assert report["available_vram"] == 14336
    assert report["worker_status"] == {
        "sdxl": {"loaded": True, "memory": 10240},
        "chat": {"loaded": False, "memory": 0},
        "wan": {"loaded": False, "memory": 0},
    }
    assert report["recommendations"] == ["unload_sdxl_for_chat"]


def test_the_pressure_follows_the_devices_used_memory(site: Site) -> None:
    assert site.ask("pressure_check")["pressure_level"] == "low"

    site.ask("memory_unload", target_worker="sdxl_worker")
    site.ask("memory_load", target_worker="qwen_base")
    site.ask("memory_load", target_worker="sdxl")
    assert site.ask("pressure_check")["pressure_level"] == "low"

    site.ledger.memory.held_by_others = 8 * 1024 * MIB
    assert site.ask("pressure_check")["pressure_level"] == "critical"


def test_enhancement_info_lists_the_chat_models_and_capabilities(site: Site) -> None:
    info = site.ask("enhancement_info")

    assert info["models_available"] == ["qwen_instruct", "qwen_base"]
    assert info["model_info"]["base_model"] == "base"
    assert set(info["capabilities"]) == set(SPECIFICATION["capabilities"])


def test_info_names_the_main_model_of_each_family(local: Callable[..., LocalWorker]) -> None:
    site = Site(local, chat_instruct_model="/models/Qwen2.5-7B-Instruct")

    assert site.ask("info")["models"] == {"sdxl": "pocket", "chat": "Qwen2.5-7B-Instruct"}


def test_no_answer_shows_a_secret_and_debug_env_has_paths_and_versions_only(
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
        answer = json.dumps(site.answer(operation, key="key-of-the-house", job_id="job-1").result())
        assert not [secret for secret in secrets.values() if secret in answer]

    body = site.answer("debug_env", key="key-of-the-house").reply["result"]
    known = {"operation", *SPECIFICATION["admin"]["debug_env"], "package_path", "versions"}
    assert set(body) == known
    assert body["model_paths"]["qwen_base"] == "/models/base"


def test_debug_env_names_the_folder_of_the_package_and_wans_code_in_it(
    local: Callable[..., LocalWorker],
) -> None:
    question = {"id": "admin", "type": "admin_utilities", "operation": "debug_env"}

    body = local(models={"wan": FakeSdxl()}).run(question).reply["result"]

    package = Path(ourvidz_serverless.__file__).parent
    assert body["package_path"] == str(package)
    assert body["wan_generate_path"] == str(package / "models/wan/pipeline.py")
    assert Path(body["wan_generate_path"]).is_file()


# --- while jobs run ---


def test_questions_are_answered_while_a_picture_is_generated(site: Site) -> None:
    site.at.fake_sdxl.hold()
    generating = start(site.at.run)
    assert site.at.fake_sdxl.at_step.wait(PATIENCE_S)

    status = site.ask("job_status", job_id="job-1", user_id="user-1")

    assert (status["status"], status["stage"]) == ("processing", "generate")
    assert site.ask("health")["jobs"]["processing"] == 2
    site.at.fake_sdxl.go_on.set()
    assert generating.result(PATIENCE_S).status == "completed"


def test_job_status_reports_how_a_job_ended(site: Site) -> None:
    site.at.run()
    site.at.run(sdxl_payload(id="job-2", config={"num_images": 7}))
    site.at.run(sdxl_payload(id="job-3", reference_required=True, type="video_fast"))

    assert site.ask("job_status", job_id="job-1", user_id="user-1")["status"] == "completed"
    assert site.ask("job_status", job_id="job-2", user_id="user-1")["status"] == "unknown"
    failed = site.ask("job_status", job_id="job-3", user_id="user-1")
    assert (failed["status"], failed["error"]["code"]) == ("failed", "WORKER_UNAVAILABLE")


def test_job_status_needs_the_jobs_user(site: Site) -> None:
    site.at.run()

    assert site.ask("job_status", job_id="job-1")["status"] == "unknown"


def test_job_status_needs_the_jobs_key(site: Site) -> None:
    site.at.run(sdxl_payload(api_key="mine"))
    question = {"operation": "job_status", "job_id": "job-1", "user_id": "user-1"}
    payload = {"id": "admin", "type": "admin_utilities", "config": question}

    answers = [site.at.run({**payload, "api_key": key}).reply for key in ("mine", "another")]

    assert [each["result"]["status"] for each in answers] == ["completed", "unknown"]


def test_status_counts_the_running_job_that_asks(site: Site) -> None:
    site.at.run()

    assert site.ask("status")["jobs"] == {"processing": 1, "completed": 1, "failed": 0}


# --- what changes the worker ---


def test_a_model_is_loaded_and_unloaded_on_demand(site: Site) -> None:
    unloaded = site.ask("memory_unload", target_worker="sdxl_worker")
    loaded = site.ask("memory_load", target_worker="qwen_instruct")

    assert (unloaded["success"], unloaded["models"]) == (True, {"sdxl": "host"})
    assert (loaded["success"], loaded["models"]) == (True, {"qwen_instruct": "device"})
    assert site.ask("health", target_worker="sdxl")["model_loaded"] is False


def test_only_a_forced_load_evicts_other_models(site: Site) -> None:
    refused = site.ask("memory_load", target_worker="chat_worker")
    forced = site.ask("memory_load", target_worker="chat_worker", force=True)

    assert refused["success"] is False
    assert refused["refused"]["qwen_instruct"] == "there is no room for it"
    assert forced["models"] == {"qwen_instruct": "device", "qwen_base": "host"}
    assert site.ask("health", target_worker="sdxl")["model_loaded"] is False


def test_a_model_in_use_is_unloaded_only_after_its_job(site: Site) -> None:
    with site.ledger.using(site.models["sdxl"]):
        refused = site.ask("memory_unload", target_worker="sdxl_worker")
        forced = site.ask("force_unload", target_worker="sdxl_worker")

        assert refused["refused"] == {"sdxl": "it is in use"}
        assert (forced["success"], forced["pending"]) == (True, ["sdxl"])
        assert site.models["sdxl"].place == "device"

    assert site.models["sdxl"].was_evicted.wait(PATIENCE_S)
    assert site.ask("health", target_worker="sdxl")["model_loaded"] is False


def test_a_forced_unload_frees_the_hosts_memory_too(site: Site) -> None:
    assert site.ask("force_unload", target_worker="sdxl")["models"] == {"sdxl": "disk"}


def test_a_predictive_load_loads_a_model_unless_the_pressure_is_high(site: Site) -> None:
    loaded = site.ask("predictive_load", target_worker="chat_worker")
    site.ledger.memory.held_by_others = 8 * 1024 * MIB
    refused = site.ask("predictive_load", target_worker="sdxl_worker")

    assert loaded["models"]["qwen_instruct"] == "device"
    assert (refused["success"], refused["reason"]) == (False, "the pressure is critical")


def test_an_operation_may_be_at_the_top_level(site: Site) -> None:
    payload = {
        "id": "admin",
        "type": "admin_utilities",
        "operation": "force_unload",
        "target_worker": "sdxl_worker",
        "force": False,
    }

    assert site.at.run(payload).reply["result"]["models"] == {"sdxl": "disk"}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_with_admin_requires_key_every_change_needs_a_key(
    local: Callable[..., LocalWorker], operation: str
) -> None:
    site = Site(local, admin_requires_key=True)

    document = site.answer(operation, target_worker="sdxl", job_id="job-1")

    refused = bool(document.failure and document.failure.code == "UNAUTHORIZED")
    assert refused == (operation in CHANGING)
    if refused:
        assert site.models["sdxl"].place == "device"


def test_with_admin_requires_key_a_change_with_the_key_is_done(
    local: Callable[..., LocalWorker],
) -> None:
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
def test_an_invalid_operation_or_target_is_refused_by_its_field(
    site: Site, config: dict[str, Any], code: str, message: str
) -> None:
    document = site.at.run({"id": "admin", "type": "admin_utilities", "config": config})

    assert document.failure.code == code
    assert document.failure.message.startswith(message)


@pytest.mark.parametrize("operation", ["health", "info", "debug_env", "pressure_check"])
def test_every_operation_refuses_an_unknown_target(site: Site, operation: str) -> None:
    document = site.answer(operation, target_worker="oven")

    assert document.failure.message.startswith("config.target_worker: Input should be one of")
