"""WAN's payloads: what each field does, and the document that is returned."""

import io
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ourvidz_serverless import jobs
from ourvidz_serverless.context import Bounds, JobContext, Stop
from ourvidz_serverless.delivery import provenance, video
from ourvidz_serverless.document import Document
from ourvidz_serverless.errors import Cancelled, InvalidPrompt
from ourvidz_serverless.jobs.envelope import Envelope
from ourvidz_serverless.jobs.video_size import MAX_AREA
from ourvidz_serverless.jobs.wan import WanJob
from ourvidz_serverless.models.wan import loader as models
from ourvidz_serverless.models.wan.pipeline import WanModel
from ourvidz_serverless.settings import Settings
from tests.fakes.clock import Clock
from tests.fakes.fake_chat import FakeChat
from tests.fakes.local_worker import LocalWorker, wan_payload
from tests.fakes.tiny_chat import tiny_chat
from tests.fakes.tiny_wan import data_uri, frames_of, out_of_memory, picture, write_i2v
from tests.files import PAYLOADS, SPECIFICATION
from tests.patience import PATIENCE_S

TYPES = [name for name in SPECIFICATION["job_types"] if jobs.FAMILY_OF[name] == "wan"]
MakeLocal = Callable[..., LocalWorker]

#: In place of the application's values: a video of 480p takes an hour on two cores.
TINY = {"width": 64, "height": 64, "frames": 5, "num_inference_steps": 2}


def parse(**changes: Any) -> WanJob:
    job = Envelope.of({"id": "rp-1", "input": wan_payload(**changes)}).job(Settings())
    assert isinstance(job, WanJob)
    return job


def refusal(**changes: Any) -> str:
    with pytest.raises(InvalidPrompt) as refused:
        parse(**changes)
    return refused.value.message


@pytest.mark.parametrize("value", ["8", True])
@pytest.mark.parametrize("field", ["width", "frames", "duration", "fps", "guidance_scale", "seed"])
def test_a_number_of_the_config_must_be_a_json_number(field: str, value: object) -> None:
    assert refusal(config={field: value}) == f"config.{field}: Input should be a number"


@pytest.mark.parametrize("value", ["true", 1])
def test_consent_must_be_a_json_boolean(value: object) -> None:
    message = refusal(metadata={"reference_consent": value})

    assert message.startswith("metadata.reference_consent: ")


START, END = data_uri(picture(1, 64, 64)), data_uri(picture(2, 64, 64))
BOTH = {"first_frame": START, "last_frame": END}
BROKEN = "data:image/png;base64,xxxx"


def short_payload(**changes: Any) -> dict[str, Any]:
    """A payload for five frames, unless its `config` names another number."""
    return wan_payload(**{**changes, "config": {"frames": 5, **changes.get("config", {})}})


@pytest.fixture
def run_job(local: MakeLocal, wan: WanModel) -> Callable[..., tuple[Document, LocalWorker]]:
    """Runs a payload on a worker with WAN, and returns its document and that worker."""

    def run_job(**changes: Any) -> tuple[Document, LocalWorker]:
        at = local(models={"wan": changes.pop("model", wan)})
        return at.run(short_payload(**changes)), at

    return run_job


@pytest.fixture
def enhancer(wan: WanModel) -> Iterator[Callable[..., FakeChat]]:
    """Gives WAN an enhancer that replies with these words, for one test."""

    def give(*words: str) -> FakeChat:
        wan.enhancer = fake_chat = FakeChat(*words)
        return fake_chat

    yield give
    wan.enhancer = None


@pytest.fixture(scope="module")
def usual(wan: WanModel, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """The frames of `short_payload()`, made once."""
    at = LocalWorker(tmp_path_factory.mktemp("usual"), models={"wan": wan})
    assert code(at.run(short_payload())) is None
    return frames(at)


@pytest.fixture(scope="module")
def guided(wan: WanModel, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """The frames of `short_payload()` with a first frame, made once."""
    at = LocalWorker(tmp_path_factory.mktemp("guided"), models={"wan": wan})
    assert code(at.run(short_payload(config={"first_frame": START}))) is None
    return frames(at)


def code(document: Document) -> str | None:
    return document.failure.code if document.failure else None


def frames(at: LocalWorker, url: str = "user-1/job-1/0.mp4") -> np.ndarray:
    return frames_of(at.root / url)


def is_same(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two videos are the same: less than one grey level apart, which encoding may cause."""
    return bool(np.abs(one.astype(float) - other).mean() < 1)


# --- every type ---


@pytest.mark.parametrize("name", TYPES)
def test_the_applications_payload_of_each_type_makes_an_asset(
    local: MakeLocal, wan: WanModel, enhancer: Callable[..., FakeChat], name: str
) -> None:
    payload = json.loads((PAYLOADS / f"{name}.json").read_text())
    payload["config"] |= TINY
    enhancer("a red sun in bright light")
    at = local(models={"wan": wan})

    document = at.run(payload)

    (asset,) = document.assets
    kind, extension = ("image", "png") if name.startswith("image") else ("video", "mp4")
    assert (asset.type, asset.url) == (kind, f"user-1/{payload['id']}/0.{extension}")
    assert document.metadata["reference_mode"] == "none"
    assert ("enhanced_prompt" in document.metadata) == name.endswith("enhanced")
    assert "warnings" not in document.metadata


@pytest.mark.parametrize("name", ["video_fast", "image_fast"])
def test_a_job_takes_one_upload_url_however_many_images_it_asks_for(name: str) -> None:
    urls = [f"https://bucket.example/{index}" for index in range(3)]

    assert refusal(type=name, config={"num_images": 3, "upload_urls": urls}) == (
        "config.upload_urls: Input should have 1 URL, one for each asset of the job, not 3"
    )


def test_wan_has_exactly_the_types_of_the_specification() -> None:
    assert len(TYPES) == 8
    assert sorted(WanJob.model_fields["type"].annotation.__args__) == sorted(TYPES)


@pytest.mark.parametrize(("name", "steps"), [("fast", 25), ("high", 50)])
def test_a_type_has_its_own_number_of_steps_unless_the_job_names_one(name: str, steps: int) -> None:
    for template in ("image_{}", "video_{}", "image7b_{}_enhanced", "video7b_{}_enhanced"):
        kind = template.format(name)
        assert parse(type=kind, config={"num_inference_steps": None}).steps == steps
        assert parse(type=kind, config={"num_inference_steps": 7}).steps == 7


# --- what was made ---


def test_a_videos_document_has_every_field_of_the_specification(run_job: Any) -> None:
    document, at = run_job()
    body = document.callback()

    (asset,) = body["assets"]
    assert sorted(asset) == sorted(SPECIFICATION["asset"])
    assert sorted(asset["metadata"]) == sorted(SPECIFICATION["video_metadata"])
    assert set(SPECIFICATION["document_metadata"]) <= set(body["metadata"])
    assert at.stored() == ["user-1/job-1/0.mp4", "user-1/job-1/0.thumb.webp"]


def test_a_videos_metadata_equals_what_its_file_has(run_job: Any) -> None:
    document, at = run_job(config={"width": 96, "height": 64, "frames": 7, "fps": 12})

    facts = document.assets[0].metadata
    data = (at.root / document.assets[0].url).read_bytes()
    with av.open(io.BytesIO(data)) as file:
        stream = file.streams.video[0]
        assert (facts["width"], facts["height"]) == (stream.width, stream.height) == (96, 64)
        assert facts["frame_num"] == stream.frames == 5
        assert (facts["batch_size"], facts["asset_index"]) == (1, 0)
        assert facts["fps"] == stream.average_rate == 12
        assert facts["duration_seconds"] == pytest.approx(5 / 12, abs=1e-3)
    assert facts["file_size_bytes"] == len(data)
    assert (facts["seed"], facts["steps"], facts["guidance_scale"]) == (7, 3, 5.0)
    assert provenance.digital_source_type(data) == provenance.TRAINED


@pytest.mark.parametrize(
    ("fps", "frames_made", "frames_at_16"), [(16, 9, 9), (8, 9, 18), (24, 9, 6), (12, 5, 7)]
)
def test_a_document_counts_frames_at_16_a_second_and_its_asset_the_frames_of_the_file(
    run_job: Any, fps: int, frames_made: int, frames_at_16: int
) -> None:
    document, _ = run_job(config={"frames": frames_made, "fps": fps, "num_inference_steps": 1})

    (asset,) = document.assets
    assert (document.metadata["frame_num"], document.metadata["fps"]) == (frames_at_16, fps)
    assert (asset.metadata["frame_num"], asset.metadata["fps"]) == (frames_made, fps)


def test_a_pictures_document_counts_no_frames(run_job: Any) -> None:
    document, _ = run_job(type="image_fast")

    assert not {"frame_num", "fps"} & set(document.metadata)


def test_the_poster_is_a_small_webp_of_the_first_frame(run_job: Any) -> None:
    document, at = run_job(
        config={"width": 512, "height": 64, "frames": 1, "num_inference_steps": 1}
    )

    with Image.open(at.root / document.assets[0].thumbnail_url) as poster:
        assert (poster.format, poster.size) == ("WEBP", (256, 32))
        first = Image.fromarray(frames(at)[0]).resize(poster.size)
        distance = np.abs(np.array(poster.convert("RGB")).astype(int) - np.array(first))
    assert distance.mean() < 12


def test_an_image_type_gives_one_png(run_job: Any) -> None:
    document, at = run_job(type="image_fast", config={"frames": 81})

    assert at.stored() == ["user-1/job-1/0.png", "user-1/job-1/0.thumb.webp"]
    assert sorted(document.assets[0].metadata) == sorted(SPECIFICATION["image_metadata"])
    with Image.open(at.root / document.assets[0].url) as image:
        assert (image.format, image.size) == ("PNG", (64, 64))


def test_a_seed_repeats_the_video_and_another_seed_does_not(
    run_job: Any, usual: np.ndarray
) -> None:
    again, other = (frames(run_job(config={"seed": seed})[1]) for seed in (7, 8))

    assert is_same(again, usual)
    assert not is_same(other, usual)


def test_a_job_without_a_seed_makes_the_same_video_at_each_delivery_and_reports_its_seed(
    run_job: Any,
) -> None:
    first, at = run_job(config={"seed": None})
    before = frames(at)
    again, at = run_job(config={"seed": None})

    assert is_same(before, frames(at))
    seeds = [document.assets[0].metadata["seed"] for document in (first, again)]
    assert seeds[0] == seeds[1] > 0


def test_jobs_without_a_seed_have_different_seeds() -> None:
    assert len({parse(id=f"job-{i}", config={"seed": None}).seed for i in range(50)}) == 50
    assert parse(config={"seed": 0}).seed == 0


# --- sizes ---


@pytest.mark.parametrize(
    ("config", "metadata", "size"),
    [
        ({"resolution": "576x1024"}, {}, (480, 832)),
        ({"resolution": "1024x576"}, {}, (832, 480)),
        ({"resolution": "1024x1024"}, {}, (624, 624)),
        ({"resolution": "480x832"}, {}, (480, 832)),
        ({}, {"aspect_ratio": "16:9"}, (832, 480)),
        ({}, {"aspect_ratio": "1:1"}, (624, 624)),
        ({"resolution": "1024x1024"}, {"aspect_ratio": "9:16"}, (480, 832)),
        ({"aspect_ratio": "16:9"}, {"aspect_ratio": "9:16"}, (832, 480)),
        ({"resolution": "1024x1024"}, {"aspect_ratio": "as the original"}, (624, 624)),
        ({"width": 96, "height": 80, "resolution": "1024x1024"}, {}, (96, 80)),
        ({}, {}, (480, 832)),
    ],
)
def test_the_size_is_the_one_given_or_480p_in_the_orientation_asked_for(
    config: dict[str, Any], metadata: dict[str, Any], size: tuple[int, int]
) -> None:
    config = {"width": None, "height": None, **config}

    assert parse(config=config, metadata=metadata).size == size


@given(st.integers(1, 4000), st.integers(1, 4000))
def test_any_ratio_becomes_a_size_that_wan_can_make(width: int, height: int) -> None:
    config = {"width": None, "height": None, "resolution": f"{width}x{height}"}
    if not 1 / 4 <= width / height <= 4:
        assert refusal(config=config).startswith("config.resolution: ")
        return

    made = parse(config=config).size

    assert all(side % 16 == 0 for side in made)
    assert made[0] / made[1] == pytest.approx(width / height, rel=0.07)
    assert made[0] * made[1] <= 1.07 * 480 * 832


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"width": 100}, "config.width"),
        ({"width": 48}, "config.width"),
        ({"height": 1296}, "config.height"),
        ({"width": None}, "config"),
        ({"width": 1280, "height": 736}, "config"),
        ({"resolution": "large"}, "config.resolution"),
        ({"aspect_ratio": "9:0"}, "config.aspect_ratio"),
        ({"frames": 0}, "config.frames"),
        ({"frames": 84}, "config.frames"),
        ({"fps": 7}, "config.fps"),
        ({"fps": 25}, "config.fps"),
        ({"duration": 0}, "config.duration"),
        ({"guidance_scale": 0.5}, "config.guidance_scale"),
        ({"guidance_scale": 21}, "config.guidance_scale"),
        ({"flow_shift": 0}, "config.flow_shift"),
        ({"num_inference_steps": 0}, "config.num_inference_steps"),
        ({"num_inference_steps": 101}, "config.num_inference_steps"),
        ({"seed": -1}, "config.seed"),
        ({"seed": 2**31}, "config.seed"),
        ({"reference_mode": "modify"}, "config.reference_mode"),
        ({"single_mode": "both"}, "config.single_mode"),
        ({"resize_mode": "zoom"}, "config.resize_mode"),
        ({"denoise_strength": 1.1}, "config.denoise_strength"),
    ],
)
def test_a_value_out_of_bounds_is_refused_by_its_field(config: dict[str, Any], field: str) -> None:
    named, words = refusal(config=config).split(":", 1)

    assert named == field
    assert "inf" not in words and "nan" not in words


def test_a_side_without_the_other_is_refused_by_the_missing_one() -> None:
    assert refusal(config={"height": None}).startswith("config: height: Field required")
    assert str(MAX_AREA) in refusal(config={"width": 1280, "height": 736})


# --- frames ---


def test_two_reference_frames_need_a_video_of_at_least_four_frames() -> None:
    assert refusal(config={**BOTH, "frames": 3}).startswith("config.frames: ")
    assert parse(config={**BOTH, "frames": 4}).num_frames == 5


@pytest.mark.parametrize(
    ("asked", "made"), [(1, 1), (2, 1), (3, 1), (4, 5), (5, 5), (16, 17), (80, 81), (83, 81)]
)
def test_frames_become_the_nearest_number_that_wan_makes(asked: int, made: int) -> None:
    assert parse(config={"frames": asked}).num_frames == made


@pytest.mark.parametrize(
    ("config", "metadata", "made"),
    [
        ({"fps": 16}, {"duration": 5}, 81),
        ({"fps": 16}, {"duration": 1}, 17),
        ({"fps": 8}, {"duration": 2}, 17),
        ({"fps": 8, "duration": 1}, {"duration": 5}, 9),
        ({"fps": 8, "frames": 5}, {"duration": 5}, 5),
        ({"fps": 16}, {}, 81),
    ],
)
def test_frames_follow_from_the_duration_where_they_are_not_given(
    config: dict[str, Any], metadata: dict[str, Any], made: int
) -> None:
    assert parse(config={"frames": None, **config}, metadata=metadata).num_frames == made


def test_a_duration_that_is_too_long_is_shortened_with_a_warning(run_job: Any) -> None:
    job = parse(config={"frames": None, "fps": 24}, metadata={"duration": 10})
    assert job.num_frames == 81

    document, _ = run_job(
        config={"frames": None, "num_inference_steps": 1}, metadata={"duration": 11}
    )

    assert document.assets[0].metadata["frame_num"] == 81
    assert document.metadata["warnings"] == ["duration: 10.1 s were made, the longest at this fps"]


# --- how it is sampled ---


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("unipc", "unipc"),
        ("UniPC", "unipc"),
        ("dpm++", "dpm++"),
        ("DPM++ 2M", "dpm++"),
        ("dpmpp_2m", "dpm++"),
        ("DPMSolverMultistepScheduler", "dpm++"),
        ("euler", "euler"),
        ("FlowMatchEulerDiscrete", "euler"),
        ("heun", "unipc"),
    ],
)
def test_a_solver_is_known_by_any_of_its_names(name: str, meant: str) -> None:
    assert parse(config={"sample_solver": name}).solver == meant


def test_an_unknown_solver_is_replaced_with_a_warning(run_job: Any) -> None:
    document, _ = run_job(config={"sample_solver": "heun"})

    assert document.metadata["sample_solver"] == "unipc"
    assert document.metadata["warnings"] == [
        "config.sample_solver: not one of unipc, dpm++, euler; unipc was taken"
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"config": {"sample_solver": "euler"}},
        {"config": {"flow_shift": 9}},
        {"config": {"guidance_scale": 1}},
        {"config": {"num_inference_steps": 4}},
        {"negative_prompt": "blue"},
        {"config": {"negative_prompt": "blue"}},
        {"metadata": {"negative_prompt": "blue"}},
        {"prompt": "a blue sea"},
        {"config": {"width": 80}},
    ],
)
def test_each_field_changes_the_video(
    run_job: Any, usual: np.ndarray, change: dict[str, Any]
) -> None:
    document, at = run_job(**change)

    assert code(document) is None
    after = frames(at)
    assert usual.shape != after.shape or not is_same(usual, after)


def test_a_job_that_is_stopped_while_its_frames_are_not_read_releases_its_models(
    wan: WanModel,
) -> None:
    stop = Stop()
    context = JobContext(stop, lambda progress: None, Bounds(60))
    job = WanJob.model_validate(wan_payload(), context=Settings())
    outputs = jobs.run(job, wan, {}, context)
    next(outputs)
    threading.Timer(1, stop.set).start()

    with pytest.raises(Cancelled) as remembered:
        next(outputs)

    assert not any(row.num_users for row in wan.vae.handle.ledger.report())
    assert remembered.traceback


def test_the_negative_prompt_is_the_first_one_of_three_fields() -> None:
    places = {"config": {"negative_prompt": "c"}, "metadata": {"negative_prompt": "m"}}

    assert parse(negative_prompt="t", **places).negative == "t"
    assert parse(**places).negative == "c"
    assert parse(metadata={"negative_prompt": "m"}).negative == "m"


def test_a_job_for_three_images_makes_one_with_a_warning(run_job: Any) -> None:
    document, _ = run_job(type="image_fast", config={"num_images": 3})

    assert len(document.assets) == 1
    assert document.metadata["warnings"] == ["config.num_images: WAN makes one at a time"]


def test_an_aspect_ratio_of_the_metadata_that_is_none_is_ignored_with_a_warning(
    run_job: Any,
) -> None:
    document, _ = run_job(metadata={"aspect_ratio": "wide"})

    assert document.metadata["warnings"] == [
        "metadata.aspect_ratio: does not read as WIDTH:HEIGHT; left out"
    ]


def test_a_distilled_checkpoint_uses_its_own_sampling_and_reports_it(
    run_job: Any, wan_settings: Settings
) -> None:
    distilled = models.load(wan_settings.model_copy(update={"wan_distilled_steps": 2}))

    document, _ = run_job(
        model=distilled,
        config={"num_inference_steps": 25, "guidance_scale": 6, "sample_solver": "dpm++"},
    )

    facts = document.assets[0].metadata
    assert (facts["steps"], facts["guidance_scale"]) == (2, 1.0)
    assert document.metadata["sample_solver"] == "euler"
    assert document.metadata["distilled"] is True


# --- references ---


@pytest.mark.parametrize(
    ("config", "metadata", "mode", "roles"),
    [
        ({}, {}, "none", []),
        ({"image": START}, {}, "single", ["single"]),
        ({}, {"reference_image_url": START}, "single", ["single"]),
        ({"first_frame": START}, {}, "start", ["start"]),
        ({}, {"start_reference_url": START}, "start", ["start"]),
        ({"last_frame": END}, {}, "end", ["end"]),
        ({}, {"end_reference_url": END}, "end", ["end"]),
        (BOTH, {}, "both", ["start", "end"]),
        ({"first_frame": START}, {"end_reference_url": END}, "both", ["start", "end"]),
        # The application copies a single reference into the start's field.
        ({}, {"reference_image_url": START, "start_reference_url": START}, "start", ["start"]),
        # A named mode wins, in `config` before `metadata`.
        ({"reference_mode": "none", "first_frame": START}, {}, "none", []),
        ({"first_frame": START}, {"video_reference_mode": "none"}, "none", []),
        ({"reference_mode": "end", **BOTH}, {"video_reference_mode": "none"}, "end", ["end"]),
        (BOTH, {"video_reference_mode": "end"}, "end", ["end"]),
        ({"first_frame": START}, {"video_reference_mode": "single"}, "single", ["single"]),
        ({"image": START}, {"video_reference_mode": "start"}, "start", ["start"]),
        ({"first_frame": START}, {"video_reference_mode": "both"}, "both", ["start"]),
        # `modify` and `copy` are about pictures.
        ({"first_frame": START}, {"reference_mode": "modify"}, "start", ["start"]),
    ],
)  # fmt: skip
def test_the_reference_mode_and_what_it_needs(
    config: dict[str, Any], metadata: dict[str, Any], mode: str, roles: list[str]
) -> None:
    job = parse(config=config, metadata=metadata)

    assert job.mode == mode
    assert list(job.references) == roles


MODES: dict[str, dict[str, Any]] = {
    "none": {},
    "single": {"image": START},
    "start": {"first_frame": START},
    "end": {"last_frame": END},
    "both": BOTH,
}


def test_these_tests_cover_every_reference_mode_of_the_specification() -> None:
    assert sorted(MODES) == sorted(SPECIFICATION["reference_modes"])


@pytest.mark.parametrize("mode", MODES)
def test_every_reference_mode_makes_a_video_and_is_reported(run_job: Any, mode: str) -> None:
    document, at = run_job(config=MODES[mode])

    assert document.metadata["reference_mode"] == mode
    assert document.metadata.get("reference_method") == (None if mode == "none" else "vace")
    assert "reference_fallback" not in document.metadata
    data = (at.root / document.assets[0].url).read_bytes()
    assert provenance.digital_source_type(data) == (
        provenance.TRAINED if mode == "none" else provenance.COMPOSITE
    )


def test_no_two_reference_modes_make_the_same_video(run_job: Any) -> None:
    asked = [*MODES.values(), {"image": START, "single_mode": "subject"}]
    asked.remove(MODES["single"])  # a single reference is a first frame

    videos = [frames(run_job(config=config)[1]) for config in asked]

    assert all(
        not np.array_equal(one, other)
        for index, one in enumerate(videos)
        for other in videos[:index]
    )


def test_a_single_reference_is_the_first_frame_unless_it_is_a_subject(
    run_job: Any, guided: np.ndarray
) -> None:
    single, at = run_job(config={"image": START})
    as_single = frames(at)
    subject, _ = run_job(config={"image": START, "single_mode": "subject"})

    assert is_same(as_single, guided)
    assert single.metadata["single_mode"] == "first_frame"
    assert subject.metadata["single_mode"] == "subject"


@pytest.mark.parametrize(
    ("config", "metadata", "scale"),
    [
        ({}, {}, 1.0),
        ({}, {"reference_strength": 0.3}, 0.3),
        ({}, {"reference_strength": 0.3, "denoise_strength": 0.1}, 0.9),
        ({"denoise_strength": 0.6}, {"denoise_strength": 0.1}, 0.4),
    ],
)
def test_the_strength_of_a_reference_comes_from_the_first_field_that_is_given(
    config: dict[str, Any], metadata: dict[str, Any], scale: float
) -> None:
    assert parse(config=config, metadata=metadata).conditioning_scale == pytest.approx(scale)


def test_the_strength_of_a_reference_changes_the_video_and_is_reported(run_job: Any) -> None:
    strong, at = run_job(config={"first_frame": START})
    before = frames(at)
    weak, at = run_job(config={"first_frame": START}, metadata={"reference_strength": 0.2})

    assert not is_same(before, frames(at))
    assert strong.metadata["reference_strength"] == 1.0
    assert weak.metadata["reference_strength"] == 0.2


@pytest.mark.parametrize(
    ("field", "value"), [("reference_strength", 0.8), ("denoise_strength", 0.2)]
)
def test_a_strength_that_weakens_a_given_frame_causes_a_warning_that_names_its_field(
    run_job: Any, field: str, value: float
) -> None:
    document, _ = run_job(config={"first_frame": START}, metadata={field: value})

    (warning,) = document.metadata["warnings"]
    assert warning.startswith(f"metadata.{field}: ")
    assert "0.8" in warning


@pytest.mark.parametrize(
    ("config", "metadata"),
    [
        ({"first_frame": START}, {}),
        ({"first_frame": START}, {"reference_strength": 1.0}),
        ({"image": START, "single_mode": "subject"}, {"reference_strength": 0.8}),
        ({}, {"reference_strength": 0.8}),
    ],
)
def test_a_strength_that_weakens_no_given_frame_causes_no_warning(
    run_job: Any, config: dict[str, Any], metadata: dict[str, Any]
) -> None:
    document, _ = run_job(config=config, metadata=metadata)

    assert "warnings" not in document.metadata


def test_the_resize_mode_changes_the_video_of_a_reference_of_another_shape(run_job: Any) -> None:
    wide = data_uri(picture(3, 256, 64))

    videos = [
        frames(run_job(config={"first_frame": wide, "resize_mode": mode})[1])
        for mode in ("crop", "pad", "stretch")
    ]

    assert not is_same(videos[0], videos[1])
    assert not is_same(videos[0], videos[2])


def test_a_picture_takes_its_reference_as_a_subject(run_job: Any) -> None:
    document, _ = run_job(type="image_fast", config={"first_frame": START})

    assert document.metadata["reference_mode"] == "single"
    assert document.metadata["single_mode"] == "subject"
    assert document.metadata["reference_fallback"] == "a picture takes its reference as a subject"


# --- references that fail ---


def test_without_its_failed_reference_a_job_makes_the_video_of_its_prompt_and_says_why(
    run_job: Any, usual: np.ndarray
) -> None:
    document, at = run_job(config={"first_frame": BROKEN})

    assert code(document) is None
    assert document.metadata["reference_mode"] == "none"
    assert document.metadata["reference_fallback"].startswith("start: ")
    assert document.metadata["reference_fallback"] in document.metadata["warnings"]
    assert is_same(frames(at), usual)


def test_if_one_of_two_references_fails_the_other_one_is_used(
    run_job: Any, guided: np.ndarray
) -> None:
    document, at = run_job(config={"first_frame": START, "last_frame": BROKEN})

    assert document.metadata["reference_mode"] == "start"
    assert document.metadata["reference_fallback"].startswith("end: ")
    assert is_same(frames(at), guided)


def test_a_mode_without_references_is_reported_as_a_fallback(run_job: Any) -> None:
    document, _ = run_job(config={"reference_mode": "both"})

    assert document.metadata["reference_mode"] == "none"
    assert document.metadata["reference_fallback"] == "start and end: no reference is given"


def test_a_required_reference_that_fails_ends_the_job(run_job: Any) -> None:
    document, at = run_job(config={"first_frame": BROKEN, "reference_required": True})

    assert code(document) == "REFERENCE_FRAME_ERROR"
    assert at.stored() == []


@pytest.fixture(scope="module")
def without_vace(wan_settings: Settings) -> WanModel:
    return models.load(wan_settings.model_copy(update={"wan_vace_model": None}))


def test_a_worker_without_a_network_for_references_falls_back_and_says_so(
    run_job: Any, without_vace: WanModel
) -> None:
    document, _ = run_job(model=without_vace, config={"first_frame": START})

    assert document.metadata["reference_mode"] == "none"
    assert "WAN_VACE_MODEL" in document.metadata["reference_fallback"]


def test_a_worker_without_a_network_for_references_refuses_a_required_one(
    run_job: Any, without_vace: WanModel
) -> None:
    config = {"first_frame": START, "reference_required": True}

    document, _ = run_job(model=without_vace, config=config)

    assert code(document) == "REFERENCE_FRAME_ERROR"


def test_a_worker_with_only_a_first_frame_network_ignores_last_frames_and_says_so(
    run_job: Any, wan_settings: Settings, tmp_path: Path
) -> None:
    i2v = {"wan_vace_model": None, "wan_i2v_model": write_i2v(tmp_path)}
    model = models.load(wan_settings.model_copy(update=i2v))

    both, _ = run_job(model=model, config=BOTH)
    end, _ = run_job(model=model, config={"last_frame": END})

    assert both.metadata["reference_mode"] == "start"
    assert both.metadata["reference_method"] == "i2v"
    assert "reference_strength" not in both.metadata
    assert both.metadata["reference_fallback"] == (
        "reference: this worker has no network for these two frames, see WAN_VACE_MODEL"
    )
    assert end.metadata["reference_mode"] == "none"


def test_a_strength_for_a_first_frame_network_causes_a_warning_that_names_its_field(
    run_job: Any, wan_settings: Settings, tmp_path: Path
) -> None:
    i2v = {"wan_vace_model": None, "wan_i2v_model": write_i2v(tmp_path)}
    model = models.load(wan_settings.model_copy(update=i2v))

    document, _ = run_job(
        model=model, config={"first_frame": START}, metadata={"reference_strength": 0.8}
    )

    assert document.metadata["warnings"] == [
        "metadata.reference_strength: the network for given frames takes no strength"
    ]


def test_a_required_mode_without_its_reference_ends_the_job(run_job: Any) -> None:
    document, _ = run_job(config={"reference_mode": "start", "reference_required": True})

    assert code(document) == "REFERENCE_FRAME_ERROR"
    assert document.failure.message.endswith("start: no reference is given")


def test_a_reference_in_adult_mode_needs_consent(run_job: Any) -> None:
    refused, _ = run_job(content_type="nsfw", config={"first_frame": START})
    consented, _ = run_job(
        content_type="nsfw",
        config={"first_frame": START},
        metadata={"reference_consent": True},
    )

    assert (code(refused), code(consented)) == ("CONTENT_REFUSED", None)


# --- prompts ---


def test_a_prompt_may_be_empty_and_is_needed_only_where_there_is_no_reference() -> None:
    assert parse(prompt="").prompt == ""
    assert parse(prompt=None, config={"image": START}).prompt is None
    assert refusal(prompt=None).startswith("prompt: Field required")


def test_the_video_is_made_from_the_enhanced_prompt_which_is_reported(
    run_job: Any, enhancer: Callable[..., FakeChat]
) -> None:
    _, at = run_job(prompt="a red sun in a garden at dawn")
    expected = frames(at)
    fake_chat = enhancer(' "a red sun ', 'in a garden at dawn"\n')

    document, at = run_job(
        type="video7b_fast_enhanced", config={"enhancement_system_prompt": "Say more."}
    )

    assert document.metadata["enhanced_prompt"] == "a red sun in a garden at dawn"
    assert document.metadata["enhancement_source"] == "qwen_instruct"
    assert document.metadata["system_prompt_used"] == "Say more."
    assert "enhance" in document.metadata["timings"]
    assert is_same(frames(at), expected)
    (call,) = fake_chat.calls
    assert call.messages == (("system", "Say more."), ("user", "a red circle moving right"))
    assert call.sampling.seed == 7


def test_a_job_without_a_system_prompt_uses_the_neutral_one(
    run_job: Any, enhancer: Callable[..., FakeChat]
) -> None:
    fake_chat = enhancer("a red sun")

    document, _ = run_job(type="image7b_high_enhanced")

    text = Settings().wan_enhancement_prompt.read_text().strip()
    assert fake_chat.calls[0].messages[0] == ("system", text)
    assert document.metadata["system_prompt_used"] == text


def test_a_real_chat_model_enhances_alike_for_the_same_seed(run_job: Any, wan: WanModel) -> None:
    wan.enhancer = tiny_chat(context=2048)
    try:
        texts = [
            run_job(type="image7b_fast_enhanced", config={"seed": seed})[0].metadata[
                "enhanced_prompt"
            ]
            for seed in (1, 1, 2)
        ]
    finally:
        wan.enhancer = None

    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("says", "why"),
    [
        (None, "enhancement: this worker has no enhancer; the original prompt was taken"),
        ((" ", "\n"), "enhancement: the enhancer said nothing; the original prompt was taken"),
    ],
)
def test_an_enhancement_that_fails_falls_back_to_the_original_and_says_so(
    run_job: Any, usual: np.ndarray, enhancer: Callable[..., FakeChat], says: Any, why: str
) -> None:
    if says:
        enhancer(*says)

    document, at = run_job(type="video7b_fast_enhanced")

    assert code(document) is None
    assert document.metadata["warnings"] == [why]
    assert document.metadata["enhancement_source"] == "none"
    assert "enhanced_prompt" not in document.metadata
    assert is_same(frames(at), usual)


def test_an_enhancer_whose_context_is_too_small_falls_back(run_job: Any, wan: WanModel) -> None:
    wan.enhancer = tiny_chat(context=64)
    try:
        document, _ = run_job(type="image7b_fast_enhanced")
    finally:
        wan.enhancer = None

    assert code(document) is None
    assert document.metadata["enhancement_source"] == "none"


def test_the_floor_checks_the_prompt_and_the_system_prompt(
    run_job: Any, enhancer: Callable[..., FakeChat]
) -> None:
    fake_chat = enhancer("a lake")

    plain, _ = run_job(prompt="nude child")
    system, _ = run_job(
        type="video7b_fast_enhanced", config={"enhancement_system_prompt": "nude child"}
    )

    assert (code(plain), code(system)) == ("CONTENT_REFUSED", "CONTENT_REFUSED")
    assert fake_chat.calls == []


def test_a_reference_with_a_sexual_prompt_needs_consent(run_job: Any) -> None:
    asked = {"prompt": "a nude in oil", "config": {"first_frame": START}}

    refused, _ = run_job(**asked)
    consented, _ = run_job(**asked, metadata={"reference_consent": True})

    assert (code(refused), code(consented)) == ("CONTENT_REFUSED", None)


def test_a_reference_with_a_prompt_that_becomes_sexual_needs_consent(
    run_job: Any, enhancer: Callable[..., FakeChat]
) -> None:
    enhancer("a nude in oil")
    asked = {"type": "video7b_fast_enhanced", "config": {"first_frame": START}}

    refused, _ = run_job(**asked)
    consented, _ = run_job(**asked, metadata={"reference_consent": True})

    assert (code(refused), code(consented)) == ("CONTENT_REFUSED", None)


@pytest.mark.parametrize(
    "labelled", [{"content_type": "NSFW"}, {"metadata": {"contentType": "NSFW"}}]
)
def test_a_content_type_means_adult_in_any_case(run_job: Any, labelled: dict[str, Any]) -> None:
    assert code(run_job(prompt="a child", **labelled)[0]) == "CONTENT_REFUSED"


def test_a_prohibition_in_the_system_prompt_of_enhancement_is_not_exempt_from_the_floor(
    run_job: Any, enhancer: Callable[..., FakeChat]
) -> None:
    enhancer("a lake")
    system = "No school or minor context applies."

    document, _ = run_job(
        type="video7b_fast_enhanced",
        content_type="nsfw",
        config={"enhancement_system_prompt": system},
    )

    assert code(document) == "CONTENT_REFUSED"


def test_the_floor_checks_an_enhanced_prompt_before_wan_reads_it(
    run_job: Any, wan: WanModel, enhancer: Callable[..., FakeChat]
) -> None:
    enhancer("All of them ", "nude.")
    reads: list[Any] = []
    hook = wan.text_encoder.model.register_forward_hook(lambda *call: reads.append(call))

    document, at = run_job(type="video7b_fast_enhanced", prompt="Children at a lake.")
    hook.remove()

    assert code(document) == "CONTENT_REFUSED"
    assert "content policy" in document.failure.message
    assert reads == []
    assert at.stored() == []
    assert "enhanced_prompt" not in document.metadata


def test_a_negative_prompt_is_exempt_from_the_floor(run_job: Any) -> None:
    assert code(run_job(negative_prompt="child", content_type="nsfw")[0]) is None


# --- long work ---


def test_progress_reports_steps_and_the_remaining_seconds(run_job: Any) -> None:
    _, at = run_job(config={"num_inference_steps": 4})

    assert [report["step"] for report in at.progress] == [1, 2, 3, 4]
    assert "remaining_s" not in at.progress[0]
    assert all(report["remaining_s"] >= 0 for report in at.progress[1:])
    assert at.progress[-1]["remaining_s"] == 0


class StopAt(Stop):
    """A stop signal that is set when the job checks it for the nth time."""

    def __init__(self, checks: int) -> None:
        super().__init__()
        self._checks = checks

    @property
    def error(self) -> Any:
        self._checks -= 1
        if self._checks <= 0:
            self.set()
        return super().error


def test_a_job_stopped_at_any_time_ends_cancelled_and_stores_no_incomplete_file(
    local: MakeLocal, wan: WanModel
) -> None:
    at = local(models={"wan": wan})
    checks = 0
    while True:
        checks += 1
        document = at.run(wan_payload(), stop=StopAt(checks))
        if code(document) is None:
            break
        assert code(document) == "CANCELLED"
        # If all frames were decoded already, the video is complete, with or without its poster.
        complete = ["user-1/job-1/0.mp4", "user-1/job-1/0.thumb.webp"]
        assert at.stored() in ([], complete[:1], complete)

    # At the start of each stage, at each of three steps, between pieces, at delivery.
    assert checks > 8


def test_frames_are_encoded_while_later_frames_are_decoded(
    local: MakeLocal, wan: WanModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = local(models={"wan": wan})
    decode, encode, encoded = wan.vae.decode, video.to_video_frame, threading.Semaphore(0)

    def counted(*frame: Any) -> Any:
        encoded.release()
        return encode(*frame)

    def held(latents: Any, *how: Any) -> Iterator[np.ndarray]:
        pieces = decode(latents, *how)
        for _ in range(8):
            yield next(pieces)
        # The first frame, and four of each further piece. Without encoding meanwhile, this would
        # wait forever.
        for _ in range(1 + 7 * 4):
            assert encoded.acquire(timeout=PATIENCE_S)
        yield from pieces

    monkeypatch.setattr(wan.vae, "decode", held)
    monkeypatch.setattr(video, "to_video_frame", counted)

    document = at.run(wan_payload(config={"frames": 33}))

    assert document.assets[0].metadata["frame_num"] == 33
    assert [encoded.acquire(blocking=False) for _ in range(5)] == [True] * 4 + [False]


def test_a_deadline_ends_a_job_while_frames_are_decoded(
    local: MakeLocal, wan: WanModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    at = local(models={"wan": wan}, settings=Settings(job_timeout_s=60), clock=clock)
    decode = wan.vae.decode

    def slow(latents: Any, *how: Any) -> Iterator[np.ndarray]:
        for _ in range(10):
            for piece in decode(latents, *how):
                clock.advance(10)
                yield piece

    monkeypatch.setattr(wan.vae, "decode", slow)

    document = at.run(wan_payload())

    assert code(document) == "TIMEOUT_ERROR"
    assert at.stored() == []


def test_an_out_of_memory_is_reported_and_the_next_job_succeeds(
    local: MakeLocal, wan: WanModel
) -> None:
    at = local(models={"wan": wan})
    with out_of_memory(wan, times=2):
        document = at.run(wan_payload())

    assert code(document) == "OOM_ERROR"
    assert code(at.run(wan_payload())) is None


def test_a_failing_encoder_fails_its_job_and_not_the_next_one(
    local: MakeLocal, wan: WanModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = local(models={"wan": wan})
    with monkeypatch.context() as broken:
        broken.setattr("ourvidz_serverless.delivery.video.PRESET", "no such preset")
        document = at.run(wan_payload(config={"frames": 33}))

    assert code(document) == "INTERNAL_ERROR"
    assert code(at.run(wan_payload())) is None


FIELDS = st.sampled_from(["prompt", "negative_prompt", "config", "metadata", "content_type"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=8,
)
CONFIG = st.dictionaries(
    st.sampled_from(
        ["width", "resolution", "aspect_ratio", "frames", "fps", "duration", "sample_solver",
         "reference_mode", "image", "seed"]
    ),
    JSON,
)  # fmt: skip


@given(st.dictionaries(FIELDS, JSON), CONFIG)
def test_any_payload_parses_or_is_refused_with_the_name_of_a_field(
    fields: Any, config: Any
) -> None:
    event = {"id": "rp-1", "input": {**wan_payload(config=config), **fields}}
    try:
        job = Envelope.of(event).job(Settings())
    except InvalidPrompt as refused:
        assert refused.message.split(":")[0].split(".")[0] in {*fields, "config", "prompt"}
        words = refused.message.partition(":")[2]
        assert "inf" not in words and "nan" not in words
    else:
        assert job.num_frames % 4 == 1
