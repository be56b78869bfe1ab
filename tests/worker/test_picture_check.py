"""Pictures that a classifier refuses never leave the worker: references, batches and videos."""

import json
import logging
from collections.abc import Callable
from typing import Any

import pytest

from ourvidz_serverless.delivery.callback import Callback
from ourvidz_serverless.document import Document
from ourvidz_serverless.errors import ModelLoadError, OutOfMemory
from ourvidz_serverless.models.memory.device_memory import open_ledger
from ourvidz_serverless.models.safety import PictureClassifier, loader
from ourvidz_serverless.settings import Settings
from tests.fakes.fake_chat import FakeChat
from tests.fakes.landscapes import (
    BOAT,
    HOUSE,
    TREE,
    BrokenClassifier,
    HeldClassifier,
    PainterSdxl,
    PainterWan,
    data_uri,
)
from tests.fakes.local_worker import LocalWorker, sdxl_payload, wan_payload
from tests.patience import PATIENCE_S, start
from tests.servers.supabase import CallbackReceiver

MakeLocal = Callable[..., LocalWorker]

SIX = (TREE, HOUSE, BOAT, TREE, HOUSE, TREE)
#: A boat is refused, a tree makes a picture sexual, and a house stands for a sign of a minor.
RULES = "boat:refuse,tree:sexual:0.8,house:refuse_if_sexual:0.8"


@pytest.fixture(scope="module")
def pocket() -> PictureClassifier:
    settings = Settings(safety_model="pocket", safety_rules="boat:refuse")
    (classifier,) = loader.load(settings, open_ledger(settings))
    return classifier


@pytest.fixture
def looking(local: MakeLocal, pocket: PictureClassifier) -> MakeLocal:
    """A worker at whose pictures the pocket classifier looks, by the rules `boat:refuse`."""

    def make(rules: str = "boat:refuse", **parts: Any) -> LocalWorker:
        given = {"safety_model": "pocket", "safety_rules": rules, **parts.pop("settings", {})}
        parts.setdefault("classifiers", (pocket,))
        return local(settings=Settings(**given), **parts)

    return make


def batch(*scenes: Any, **changes: Any) -> dict[str, Any]:
    config = {"resolution": "128x128", "num_images": len(scenes), **changes.pop("config", {})}
    return sdxl_payload(config=config, **changes)


def code(document: Document) -> str | None:
    return document.failure.code if document.failure else None


def indices(document: Document) -> list[int]:
    return [asset.metadata["asset_index"] for asset in document.assets]


# --- a batch of pictures ---


def test_a_refused_picture_of_six_is_left_out_and_the_others_are_delivered(
    looking: MakeLocal,
) -> None:
    at = looking(fake_sdxl=PainterSdxl(*SIX))

    document = at.run(batch(*SIX))

    assert (document.status, indices(document)) == ("completed", [0, 1, 3, 4, 5])
    assert document.metadata["refused"] == [2]
    assert document.metadata["warnings"] == ["pictures: 1 of 6 refused under the content policy"]
    assert [asset.metadata["seed"] for asset in document.assets] == [7, 8, 10, 11, 12]
    assert not [key for key in at.stored() if "/2." in key]
    assert len(at.stored()) == 10


def test_a_batch_of_refused_pictures_ends_the_job(looking: MakeLocal) -> None:
    at = looking(fake_sdxl=PainterSdxl(BOAT, BOAT))

    document = at.run(batch(BOAT, BOAT))

    assert code(document) == "CONTENT_REFUSED"
    assert document.failure and not document.failure.retryable
    assert document.failure.message == "refused under the content policy (picture rule refuse)"
    assert at.stored() == []


def test_a_sign_of_a_minor_in_one_picture_of_a_sexual_job_ends_the_whole_job(
    looking: MakeLocal,
) -> None:
    at = looking(RULES, fake_sdxl=PainterSdxl(TREE, HOUSE, TREE))

    document = at.run(batch(TREE, HOUSE, TREE, content_type="nsfw"))

    assert code(document) == "CONTENT_REFUSED"
    assert document.failure and "(picture rule refuse_if_sexual)" in document.failure.message
    assert at.stored() == []


def test_a_sexual_picture_beside_a_minor_in_the_text_ends_the_job(looking: MakeLocal) -> None:
    at = looking(RULES, fake_sdxl=PainterSdxl(TREE))

    document = at.run(batch(TREE, prompt="a child under a tree"))

    assert document.failure and "(picture rule minor+sexual)" in document.failure.message
    assert at.stored() == []


def test_pictures_that_pass_are_delivered_with_their_marks(looking: MakeLocal) -> None:
    at = looking(RULES, fake_sdxl=PainterSdxl(TREE, HOUSE))

    document = at.run(batch(TREE, HOUSE))

    assert [asset.metadata.get("marks") for asset in document.assets] == [["tree"], None]
    assert "refused" not in document.metadata


def test_a_refused_picture_is_not_in_an_inline_document(looking: MakeLocal) -> None:
    at = looking(fake_sdxl=PainterSdxl(TREE, BOAT, HOUSE))

    document = at.run(batch(TREE, BOAT, HOUSE, config={"inline": True}))

    assert indices(document) == [0, 2]
    assert all(asset.url.startswith("data:image/png") for asset in document.assets)


def test_the_time_of_looking_is_in_the_timings_and_in_the_audit_line(
    looking: MakeLocal, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ourvidz.audit")
    at = looking(fake_sdxl=PainterSdxl(TREE, BOAT))

    document = at.run(batch(TREE, BOAT))

    assert 0 < document.metadata["timings"]["safety"] <= document.metadata["timings"]["generate"]
    (line,) = [json.loads(each.message) for each in caplog.records if "audit" in each.name]
    safety = line["safety"]
    assert [name.partition("@")[0] for name in safety["models"]] == ["pocket"]
    assert {name: each["rule"] for name, each in safety["pictures"].items()} == {
        "0": None,
        "1": "refuse",
    }
    assert safety["pictures"]["1"]["scores"]["boat"] > 0.5


# --- references ---


@pytest.mark.parametrize("reference_required", [False, True])
def test_a_refused_reference_ends_the_job_before_anything_is_computed(
    looking: MakeLocal, reference_required: bool
) -> None:
    at = looking(fake_sdxl=PainterSdxl(TREE))
    config = {"image": data_uri(BOAT), "reference_required": reference_required}

    document = at.run(batch(TREE, config=config))

    assert code(document) == "CONTENT_REFUSED"
    assert document.failure and document.failure.message == (
        "reference: refused under the content policy (picture rule refuse)"
    )
    assert at.fake_sdxl.requests == []
    assert at.stored() == []


def test_a_mask_says_only_where_so_no_classifier_looks_at_it(looking: MakeLocal) -> None:
    at = looking(fake_sdxl=PainterSdxl(HOUSE))

    document = at.run(batch(HOUSE, config={"image": data_uri(TREE), "mask": data_uri(BOAT)}))

    assert document.status == "completed"


@pytest.mark.parametrize(("consents", "expected"), [(False, "CONTENT_REFUSED"), (True, None)])
@pytest.mark.parametrize(("reference", "result"), [(TREE, BOAT), (BOAT, TREE)])
def test_a_sexual_reference_and_a_sexual_result_of_one_need_consent(
    looking: MakeLocal, reference: Any, result: Any, consents: bool, expected: str | None
) -> None:
    at = looking("tree:sexual:0.8", fake_sdxl=PainterSdxl(result))
    metadata = {"reference_consent": consents}

    document = at.run(batch(result, config={"image": data_uri(reference)}, metadata=metadata))

    assert code(document) == expected
    if expected:
        assert document.failure and "metadata.reference_consent" in document.failure.message
        assert at.stored() == []


# --- videos ---


def video(local: LocalWorker, **config: Any) -> Document:
    return local.run(wan_payload(config={"width": 128, "height": 128, "frames": 17, **config}))


@pytest.mark.parametrize(
    "scenes",
    [
        pytest.param([(BOAT, 1), (TREE, 16)], id="first frame"),
        pytest.param([(TREE, 8), (BOAT, 1), (TREE, 8)], id="after one second"),
        pytest.param([(TREE, 16), (BOAT, 1)], id="last frame"),
    ],
)
def test_a_video_with_a_refused_frame_is_never_stored(
    looking: MakeLocal, scenes: list[Any]
) -> None:
    at = looking(models={"wan": PainterWan(*scenes)})

    document = video(at)

    assert code(document) == "CONTENT_REFUSED"
    assert at.stored() == []


def test_the_last_frame_is_looked_at_where_the_seconds_do_not_end_with_it(
    looking: MakeLocal,
) -> None:
    at = looking(models={"wan": PainterWan((TREE, 12), (BOAT, 1))})

    assert code(video(at, frames=13)) == "CONTENT_REFUSED"


def test_a_video_that_passes_is_delivered_with_its_marks(looking: MakeLocal) -> None:
    at = looking("tree:mark:0.8,boat:refuse", models={"wan": PainterWan((TREE, 17))})

    document = video(at)

    (asset,) = document.assets
    assert (asset.metadata["frame_num"], asset.metadata["marks"]) == (17, ["tree"])
    assert "safety" in document.metadata["timings"]


@pytest.mark.parametrize("field", ["first_frame", "last_frame"])
def test_a_refused_frame_of_the_caller_ends_a_video_before_it_is_computed(
    looking: MakeLocal, field: str
) -> None:
    wan = PainterWan((TREE, 17))
    at = looking(models={"wan": wan})
    frames = {"first_frame": data_uri(TREE), "last_frame": data_uri(HOUSE), field: data_uri(BOAT)}

    assert code(video(at, **frames)) == "CONTENT_REFUSED"
    assert wan.calls == []


@pytest.mark.parametrize("kind", ["image_fast", "image7b_fast_enhanced", "video7b_fast_enhanced"])
def test_pictures_of_wan_and_enhanced_jobs_are_looked_at(looking: MakeLocal, kind: str) -> None:
    frames = 1 if kind.startswith("image") else 9
    wan = PainterWan((BOAT, frames), enhancer=FakeChat("A calm sea."))
    at = looking(models={"wan": wan})

    document = at.run(wan_payload(type=kind, config={"width": 128, "height": 128}))

    assert code(document) == "CONTENT_REFUSED"
    assert at.stored() == []


def test_a_sign_of_a_minor_in_the_enhanced_prompt_counts_beside_a_sexual_frame(
    looking: MakeLocal,
) -> None:
    wan = PainterWan((TREE, 9), enhancer=FakeChat("A child under a tree."))
    at = looking("tree:sexual:0.8", models={"wan": wan})

    document = at.run(
        wan_payload(type="video7b_fast_enhanced", config={"width": 128, "height": 128})
    )

    assert document.failure and "(picture rule minor+sexual)" in document.failure.message
    assert at.stored() == []


# --- a classifier that fails ---


def test_a_classifier_that_fails_ends_the_job_and_nothing_is_delivered(looking: MakeLocal) -> None:
    broken = BrokenClassifier(OutOfMemory("does not fit"))
    at = looking(fake_sdxl=PainterSdxl(TREE, TREE), classifiers=(broken,))

    document = at.run(batch(TREE, TREE))

    assert code(document) == "INTERNAL_ERROR"
    assert document.failure and document.failure.retryable
    assert (broken.seen, at.stored()) == (2, [])


def test_with_fail_open_the_pictures_are_delivered_with_a_warning(looking: MakeLocal) -> None:
    at = looking(
        fake_sdxl=PainterSdxl(TREE),
        classifiers=(BrokenClassifier(ValueError("a bug")),),
        settings={"safety_fail_open": True},
    )

    document = at.run(batch(TREE))

    assert indices(document) == [0]
    assert document.metadata["warnings"] == ["pictures: no classifier has looked at them"]


def test_a_failure_at_the_reference_does_not_excuse_the_result(
    looking: MakeLocal, pocket: PictureClassifier
) -> None:
    class FailsOnce:
        name, has_failed = "once@0", False

        def scores(self, pictures: Any, check: Any) -> Any:
            if self.has_failed:
                return pocket.scores(pictures, check)
            self.has_failed = True
            raise ValueError("a bug")

    at = looking(
        fake_sdxl=PainterSdxl(BOAT),
        classifiers=(FailsOnce(),),
        settings={"safety_fail_open": True},
    )

    document = at.run(batch(BOAT, config={"image": data_uri(TREE)}))

    assert code(document) == "CONTENT_REFUSED"
    assert at.stored() == []


def test_a_sexual_job_does_not_fail_open_where_a_classifier_is_required(
    looking: MakeLocal,
) -> None:
    at = looking(
        fake_sdxl=PainterSdxl(TREE),
        classifiers=(BrokenClassifier(ValueError("a bug")),),
        settings={"safety_fail_open": True, "require_safety_model": True},
    )

    assert code(at.run(batch(TREE, content_type="nsfw"))) == "INTERNAL_ERROR"
    assert code(at.run(batch(TREE, id="job-2"))) is None


def test_a_job_that_is_cancelled_while_a_classifier_looks_is_cancelled(looking: MakeLocal) -> None:
    held = HeldClassifier()
    at = looking(
        fake_sdxl=PainterSdxl(TREE), classifiers=(held,), settings={"safety_fail_open": True}
    )
    running = start(lambda: at.run(batch(TREE)))
    assert held.is_looking.wait(PATIENCE_S)

    at.stop.set()

    assert code(running.result(PATIENCE_S)) == "CANCELLED"
    assert at.stored() == []


# --- an administrator ---


def test_an_administrator_sees_the_classifier_beside_the_families(looking: MakeLocal) -> None:
    settings = Settings(safety_model="pocket", safety_rules="boat:refuse")
    ledger = open_ledger(settings)
    at = looking(classifiers=loader.load(settings, ledger), ledger=ledger)

    def ask(operation: str, **config: Any) -> dict[str, Any]:
        config = {"operation": operation, **config}
        answer = at.run({"id": operation, "type": "admin_utilities", "config": config})
        found: dict[str, Any] = answer.reply["result"]
        return found

    # It is no model that serves jobs.
    assert ask("health")["model_loaded"] is ask("memory_status")["model_loaded"] is False
    assert [row["name"] for row in ask("memory_report")["models"]] == ["safety_pocket"]
    assert ask("memory_unload", target_worker="safety")["models"] == {"safety_pocket": "disk"}


# --- what leaves the worker ---


def test_no_log_line_and_no_callback_shows_a_refused_picture_or_its_label(
    looking: MakeLocal, receiver: CallbackReceiver, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    callback = Callback(receiver.callback_url, receiver.secret)
    at = looking(fake_sdxl=PainterSdxl(BOAT, TREE), callback=callback)

    at.run(batch(BOAT, TREE))
    at.run(batch(BOAT, TREE, id="job-2", config={"image": data_uri(BOAT)}))

    posted = [json.dumps(each.document) for each in receiver.received]
    logged = [each.message for each in caplog.records if each.name != "ourvidz.audit"]
    assert len(posted) == 2
    assert not [line for line in posted + logged if "boat" in line]
    assert "/0.png" not in posted[0] and "/1.png" in posted[0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"require_safety_model": True}, "SAFETY_MODEL: Field required with REQUIRE_SAFETY_MODEL"),
        ({"safety_rules": "boat:refuse"}, "SAFETY_RULES: needs SAFETY_MODEL"),
        ({"safety_model": "pocket"}, "SAFETY_RULES: Field required with SAFETY_MODEL"),
    ],
)
def test_settings_that_do_not_fit_together_end_the_start(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], message: str
) -> None:
    from ourvidz_serverless import settings

    for name, value in given.items():
        monkeypatch.setenv(name.upper(), str(value))

    with pytest.raises(ModelLoadError, match=message):
        settings.read_for_worker()
