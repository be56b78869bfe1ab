"""WAN's eight types: the payload in the application's terms, the request in the model's.

{"id": "job_1", "type": "video_fast", "user_id": "user_1", "prompt": "a red circle moving right",
 "config": {"width": 480, "height": 832, "frames": 81, "fps": 16, "num_inference_steps": 25,
            "guidance_scale": 6, "sample_solver": "dpm++", "seed": 42,
            "reference_mode": "both", "first_frame": "https://...", "last_frame": "https://..."},
 "metadata": {"reference_strength": 0.8}}

A payload without a size gets 480p in the orientation of its `aspect_ratio` or `resolution`. One
without a number of frames gets as many as its `duration` takes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from fractions import Fraction
from typing import Any, Literal

import numpy as np
from PIL import Image
from pydantic import AliasChoices, Field, field_validator, model_validator

from ourvidz_serverless.context import JobContext
from ourvidz_serverless.errors import (
    InternalError,
    InvalidPrompt,
    OutOfMemory,
    ReferenceFrameError,
    WorkerUnavailable,
)
from ourvidz_serverless.guard.admission import check_generated
from ourvidz_serverless.job import SEEDS, CheckedText, Flag, Reference, Wire, no_text_nor_flag
from ourvidz_serverless.jobs.enhancement import as_wan_reads, enhance
from ourvidz_serverless.jobs.media import (
    JobProgress,
    MediaJob,
    ResizeMode,
    Speed,
    Strength,
    Text,
    UploadUrls,
)
from ourvidz_serverless.jobs.video_size import (
    MAX_AREA,
    MAX_SIDE,
    MIN_SIDE,
    SIDE_MULTIPLE,
    read_ratio,
    size_at_480p,
)
from ourvidz_serverless.models.wan.request import (
    References,
    Route,
    SamplingDefaults,
    VideoModel,
    VideoRequest,
)
from ourvidz_serverless.output import FrameQueue, Output, Video
from ourvidz_serverless.references import decode
from ourvidz_serverless.settings import Settings

Type = Literal[
    "image_fast",
    "image_high",
    "video_fast",
    "video_high",
    "image7b_fast_enhanced",
    "image7b_high_enhanced",
    "video7b_fast_enhanced",
    "video7b_high_enhanced",
]
Mode = Literal["none", "single", "start", "end", "both"]
Solver = Literal["unipc", "dpm++", "euler"]

STEPS = {"fast": 25, "high": 50}

#: WAN's own: `sample_guide_scale` of its generate.py, and the default of diffusers' pipelines.
GUIDANCE_SCALE = 5.0

#: WAN was trained at this rate (`sample_fps` of its configuration).
FPS = 16
MAX_FRAMES = 83

#: The rate by which the application turns a document's `frame_num` into seconds.
APPLICATIONS_FPS = 16

#: Each solver and its names. Any other name becomes unipc, with a warning.
SOLVERS: dict[Solver, tuple[str, ...]] = {
    "unipc": ("unipc", "unipcmultistep"),
    "dpm++": ("dpmpp", "dpmpp2m", "dpmsolver", "dpmsolverpp", "dpmsolvermultistep"),
    "euler": ("euler", "flowmatch", "flowmatcheuler", "flowmatcheulerdiscrete"),
}

WHITE = (255, 255, 255)

#: The references that each mode takes.
ROLES: dict[Mode, tuple[str, ...]] = {
    "none": (),
    "single": ("single",),
    "start": ("start",),
    "end": ("end",),
    "both": ("start", "end"),
}

#: The mode of a job that names none, by whether it has a start and an end.
MODE_OF_FRAMES: dict[tuple[bool, bool], Mode] = {
    (True, True): "both",
    (True, False): "start",
    (False, True): "end",
}

Side = Field(None, ge=MIN_SIDE, le=MAX_SIDE, multiple_of=SIDE_MULTIPLE)


class WanConfig(Wire):
    width: int | None = Side
    height: int | None = Side
    resolution: Fraction | None = None
    aspect_ratio: Fraction | None = None
    frames: int | None = Field(None, ge=1, le=MAX_FRAMES)
    duration: float | None = Field(None, gt=0, le=600)
    fps: int = Field(FPS, ge=8, le=24)
    num_images: int = Field(1, ge=1, le=6)
    num_inference_steps: int | None = Field(
        None, ge=1, le=100, validation_alias=AliasChoices("num_inference_steps", "steps")
    )
    guidance_scale: float = Field(GUIDANCE_SCALE, ge=1.0, le=20.0)
    flow_shift: float | None = Field(None, ge=1.0, le=20.0)
    sample_solver: str | None = Field(None, max_length=100)
    seed: int | None = Field(None, ge=0, lt=SEEDS)
    negative_prompt: str | None = Text
    enhancement_system_prompt: str | None = Text
    reference_mode: Mode | None = None
    image: str | None = Reference
    first_frame: str | None = Reference
    last_frame: str | None = Reference
    single_mode: Literal["first_frame", "subject"] = "first_frame"
    denoise_strength: float | None = Strength
    resize_mode: ResizeMode = "crop"
    reference_required: Flag = False
    upload_urls: UploadUrls | None = None
    speed: Speed = "exact"

    _json_numbers = field_validator(
        *("width", "height", "frames", "duration", "fps", "num_images", "num_inference_steps"),
        *("guidance_scale", "flow_shift", "seed", "denoise_strength"),
        mode="before",
    )(no_text_nor_flag)

    @field_validator("resolution", mode="before", json_schema_input_type=str | None)
    @classmethod
    def _width_x_height(cls, value: object) -> Fraction:
        return read_ratio(value, "xX", "WIDTHxHEIGHT")

    @field_validator("aspect_ratio", mode="before", json_schema_input_type=str | None)
    @classmethod
    def _width_to_height(cls, value: object) -> Fraction:
        return read_ratio(value, ":/", "WIDTH:HEIGHT")

    @model_validator(mode="after")
    def _both_sides_or_none(self) -> WanConfig:
        if (self.width is None) != (self.height is None):
            missing = "width" if self.width is None else "height"
            raise ValueError(f"{missing}: Field required where the other side is given")
        if self.width and self.height and self.width * self.height > MAX_AREA:
            raise ValueError(f"width x height should be less than or equal to {MAX_AREA}")
        return self


class WanMetadata(Wire):
    negative_prompt: str | None = Text
    # Free text of the user. It counts only if it can be read as a ratio.
    aspect_ratio: str | None = Field(None, max_length=100)
    duration: float | None = Field(None, gt=0, le=600)
    video_reference_mode: Mode | None = None
    reference_image_url: str | None = Reference
    start_reference_url: str | None = Reference
    end_reference_url: str | None = Reference
    reference_strength: float | None = Strength
    denoise_strength: float | None = Strength
    reference_consent: Flag = False
    content_type: str | None = Field(None, validation_alias=AliasChoices("contentType"))
    nsfw_optimization: bool = False


class WanJob(MediaJob):
    type: Type
    config: WanConfig = WanConfig()
    metadata: WanMetadata = WanMetadata()

    @model_validator(mode="after")
    def _a_frame_for_each_reference(self) -> WanJob:
        if self.mode == "both" and not self.is_image and self.num_frames == 1:
            raise ValueError("config.frames: Input should be at least 4 for two reference frames")
        return self

    @property
    def texts(self) -> list[CheckedText]:
        # The system prompt is checked as a user's text. Prohibitions ("no minors") are allowed only
        # in a conversation's system message.
        system = self.config.enhancement_system_prompt or ""
        return [
            *as_wan_reads(self.prompt or "", "prompt"),
            CheckedText(system, "config.enhancement_system_prompt"),
        ]

    @property
    def is_image(self) -> bool:
        return self.type.startswith("image")

    @property
    def is_enhanced(self) -> bool:
        return self.type.endswith("_enhanced")

    @property
    def num_outputs(self) -> int:
        return 1

    @property
    def steps(self) -> int:
        return self.config.num_inference_steps or STEPS["high" if "high" in self.type else "fast"]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height: those given, else 480p in the orientation that is asked for."""
        if self.config.width and self.config.height:
            return self.config.width, self.config.height
        ratio = self.config.aspect_ratio or self.users_ratio or self.config.resolution
        return size_at_480p(ratio or Fraction(9, 16))

    @property
    def users_ratio(self) -> Fraction | None:
        """The ratio of `metadata`, if it can be read as one."""
        try:
            return read_ratio(self.metadata.aspect_ratio, ":/xX", "")
        except ValueError:
            return None

    @property
    def num_frames(self) -> int:
        """How many frames are made: 4k + 1, the nearest number to those that are asked for."""
        if self.is_image:
            return 1
        return min(self.frames_asked_for, MAX_FRAMES) // 4 * 4 + 1

    @property
    def frames_asked_for(self) -> int:
        """`frames`, else those of the `duration`, else the maximum."""
        seconds = self.config.duration or self.metadata.duration
        if self.config.frames:
            return self.config.frames
        return max(round(seconds * self.config.fps), 1) if seconds else MAX_FRAMES

    @property
    def solver(self) -> Solver | None:
        """The solver by any of its names; None if the job names none."""
        if self.config.sample_solver is None:
            return None
        return _known_solver(self.config.sample_solver) or "unipc"

    @property
    def mode(self) -> Mode:
        """The reference mode: the one that the job names, else the one for its references."""
        named = self.config.reference_mode or self.metadata.video_reference_mode
        of_frames = MODE_OF_FRAMES.get((bool(self._start), bool(self._end)))
        return named or of_frames or ("single" if self._single else "none")

    @property
    def references(self) -> dict[str, str]:
        # The application also copies a single reference to the start's field, or names a mode and
        # sends the reference in the field of another. Then that one reference is meant.
        found = {
            "single": self._single or self._start,
            "start": self._start or (self._single if self.mode == "start" else None),
            "end": self._end,
        }
        return {role: url for role in ROLES[self.mode] if (url := found[role])}

    @property
    def _single(self) -> str | None:
        return self.config.image or self.metadata.reference_image_url

    @property
    def _start(self) -> str | None:
        return self.config.first_frame or self.metadata.start_reference_url

    @property
    def _end(self) -> str | None:
        return self.config.last_frame or self.metadata.end_reference_url

    @property
    def conditioning_scale(self) -> float:
        """How closely VACE follows a reference, from 0 to 1, which is the default."""
        return self.reference_strength.kept if self.reference_strength else 1.0


def _known_solver(name: str) -> Solver | None:
    plain = re.sub(r"[\W_]+", "", name.lower().replace("++", "pp")).removesuffix("scheduler")
    return next((solver for solver, names in SOLVERS.items() if plain in names), None)


def parse(payload: Mapping[str, Any], settings: Settings) -> WanJob:
    """The job of a payload; raises pydantic's ValidationError."""
    return WanJob.model_validate(payload)


def prepare(job: WanJob, model: VideoModel, context: JobContext) -> None:
    """Start to load the weights that the job needs first."""
    model.prefetch()


def run(
    job: WanJob, model: VideoModel, references: Mapping[str, Image.Image], context: JobContext
) -> Iterator[Output | Video]:
    """The job's video, or its image; `context.metadata` says how it was made."""
    request = _request(job, model, references, context)
    facts = job.asset_metadata(request.seed, request.steps, request.guidance_scale)
    is_composite = bool(request.references)
    with closing(model.generate(request, JobProgress(context))) as frames:
        if job.is_image:
            for piece in frames:
                yield Output(index=0, pixels=piece[0], metadata=facts, composite=is_composite)
        else:
            video = Video(0, FrameQueue(), *job.size, job.config.fps, facts, is_composite)
            yield from _stream(video, frames, context)


def _stream(video: Video, frames: Iterable[np.ndarray], context: JobContext) -> Iterator[Video]:
    """Yield the video at its first piece, then put each piece into its queue as it is decoded."""
    num_frames = 0
    try:
        for piece in frames:
            if not num_frames:
                yield video
            video.frames.put(piece, context.check)
            num_frames += len(piece)
        video.frames.end()
    except BaseException:
        video.frames.close()
        raise
    # The application divides `frame_num` by 16 to get seconds, whatever the rate is. The asset's
    # own `frame_num` counts the frames of the file.
    frame_num = round(num_frames / video.fps * APPLICATIONS_FPS)
    context.metadata.update(frame_num=frame_num, fps=video.fps)


def _request(
    job: WanJob, model: VideoModel, references: Mapping[str, Image.Image], context: JobContext
) -> VideoRequest:
    """What the model is asked for; `context.metadata` and `context.warnings` say what differs."""
    prompt = _prompt(job, model, context)
    kept = _references(job, model, references, context)
    own = model.sampling
    solver, flow_shift = _solver_and_flow_shift(job, own)
    if own.is_distilled:
        context.metadata["distilled"] = True
    context.metadata.update(sample_solver=solver, flow_shift=flow_shift)
    _warn(job, context)
    context.metadata["batch_size"] = 1
    return VideoRequest(
        prompt=prompt,
        negative=job.negative,
        seed=job.seed,
        size=job.size,
        num_frames=job.num_frames,
        steps=own.distilled_steps or job.steps,
        guidance_scale=1.0 if own.is_distilled else job.config.guidance_scale,
        solver=solver,
        flow_shift=flow_shift,
        speed=job.config.speed,
        references=kept,
    )


def _solver_and_flow_shift(job: WanJob, own: SamplingDefaults) -> tuple[str, float]:
    """As the job asks, else the checkpoint's own; a distilled checkpoint has one solver only."""
    if own.distilled_timesteps:
        return "dmd", 1.0
    solver = own.solver if own.is_distilled else job.solver or own.solver
    return solver, job.config.flow_shift or own.flow_shift


def _warn(job: WanJob, context: JobContext) -> None:
    """Warn of what the job asks for and does not get."""
    config = job.config
    if config.sample_solver and not _known_solver(config.sample_solver):
        known = ", ".join(SOLVERS)
        context.warnings.append(f"config.sample_solver: not one of {known}; unipc was taken")
    if not job.is_image and not config.frames and job.frames_asked_for > MAX_FRAMES:
        context.warnings.append(
            f"duration: {job.num_frames / config.fps:.3g} s were made, the longest at this fps"
        )
    if config.num_images > 1:
        context.warnings.append("config.num_images: WAN makes one at a time")
    if job.metadata.aspect_ratio and not job.users_ratio:
        context.warnings.append("metadata.aspect_ratio: does not read as WIDTH:HEIGHT; left out")


def _prompt(job: WanJob, model: VideoModel, context: JobContext) -> str:
    """The job's prompt, enhanced if the job asks for that; `context.metadata` says which."""
    prompt = job.prompt or ""
    if not job.is_enhanced:
        return prompt
    system = job.config.enhancement_system_prompt or model.enhancement_prompt
    context.metadata["enhancement_source"] = "none"
    try:
        with context.stage("enhance"):
            enhanced = enhance(model.enhancer, system, prompt, job.seed, context)
    except (WorkerUnavailable, InvalidPrompt, OutOfMemory, InternalError) as exc:
        context.warnings.append(f"enhancement: {exc.message}; the original prompt was taken")
        return prompt
    # The model reads this prompt, so its signs count beside those of the pictures.
    context.signs = check_generated(as_wan_reads(enhanced, "enhanced_prompt"), job, context)
    context.metadata.update(
        enhancement_source="qwen_instruct", enhanced_prompt=enhanced, system_prompt_used=system
    )
    return enhanced


# --- references ---


def _references(
    job: WanJob, model: VideoModel, images: Mapping[str, Image.Image], context: JobContext
) -> References:
    """The references that the model gets; `context.metadata` says which.

    Raises ReferenceFrameError if these are fewer than the job requires.
    """
    kept, route = _with_a_network(_fitted(job, images), model, context)
    mode = _mode_of(job, kept)
    context.metadata["reference_mode"] = mode
    if mode != job.mode:
        reason = _fallback_reason(job, mode, context)
        if job.reference_required and not (job.is_image and kept):
            raise ReferenceFrameError(f"config.reference_required: {reason}")
        context.metadata["reference_fallback"] = reason
    if not kept:
        return kept
    context.metadata["reference_method"] = route
    context.metadata["resize_mode"] = job.config.resize_mode
    if mode == "single":
        context.metadata["single_mode"] = "subject" if kept.subject else "first_frame"
    _warn_of_strength(job, kept, route, context)
    if route == "vace":
        context.metadata["reference_strength"] = job.conditioning_scale
    return kept


def _fitted(job: WanJob, images: Mapping[str, Image.Image]) -> References:
    """The references at the video's size: a first frame, a last one, or a subject."""
    if job.is_image or (job.mode == "single" and job.config.single_mode == "subject"):
        # A reference of an image is no frame of it. VACE was trained on subjects on white.
        subject = next(iter(images.values()), None)
        return References(
            subject=subject and decode.fit(subject, *job.size, "pad", WHITE),
            scale=job.conditioning_scale,
        )
    fitted = {role: job.fit(image, job.config.resize_mode) for role, image in images.items()}
    return References(
        first=fitted.get("start") or fitted.get("single"),
        last=fitted.get("end"),
        scale=job.conditioning_scale,
    )


def _with_a_network(
    given: References, model: VideoModel, context: JobContext
) -> tuple[References, Route]:
    """The references that a network of this worker takes, and the route of that network."""
    candidates = (given, replace(given, last=None), References())
    kept, route = next((each, route) for each in candidates if (route := model.route(each)))
    if kept is not given:
        what = "these two frames" if kept else "this reference"
        context.warnings.append(
            f"reference: this worker has no network for {what}, see WAN_VACE_MODEL"
        )
    return kept, route


def _warn_of_strength(job: WanJob, kept: References, route: Route, context: JobContext) -> None:
    """Warn that a strength below 1 weakens a given frame, or that it has no effect."""
    strength = job.reference_strength
    if strength is None or strength.kept == 1.0:
        return
    if route != "vace":
        context.warnings.append(f"{strength.field}: the network for given frames takes no strength")
    elif not kept.subject:
        context.warnings.append(
            f"{strength.field}: at {strength.kept:.3g} the video may leave the given frame; "
            "at 1 it keeps it"
        )


def _mode_of(job: WanJob, kept: References) -> Mode:
    """The reference mode of the video that is made."""
    if kept.subject or (kept and job.mode == "single"):
        return "single"
    return MODE_OF_FRAMES.get((bool(kept.first), bool(kept.last)), "none")


def _fallback_reason(job: WanJob, mode: Mode, context: JobContext) -> str:
    """Why the mode of the video is not the one that the job asks for."""
    missing = [role for role in ROLES[job.mode] if role not in job.references]
    if missing:
        return f"{' and '.join(missing)}: no reference is given"
    if job.is_image and mode != "none":
        return "a picture takes its reference as a subject"
    about = (*ROLES[job.mode], "reference")
    return next(each for each in reversed(context.warnings) if each.split(":")[0] in about)
