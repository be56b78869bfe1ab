"""WAN's eight types: the wire's words on one side, diffusers' on the other.

{"id": "job_1", "type": "video_fast", "user_id": "user_1", "prompt": "a red circle moving right",
 "config": {"width": 480, "height": 832, "frames": 81, "fps": 16, "num_inference_steps": 25,
            "guidance_scale": 6, "sample_solver": "dpm++", "seed": 42,
            "reference_mode": "both", "first_frame": "https://...", "last_frame": "https://..."},
 "metadata": {"reference_strength": 0.8}}

What the application sends without sizes and frames is read for what it means: the orientation of
`aspect_ratio` or `resolution` at 480p, and the frames of `duration`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from fractions import Fraction
from typing import Any, Literal

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
from ourvidz_serverless.guard.admission import check_made
from ourvidz_serverless.job import SEEDS, CheckedText, Job, Reference, Wire, says_adult
from ourvidz_serverless.models.chat.request import ChatGenerator, ChatRequest, SamplingParams
from ourvidz_serverless.output import FrameQueue, Output, Video
from ourvidz_serverless.references import fetch as images
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
Speed = Literal["exact", "balanced", "fast"]
Solver = Literal["unipc", "dpm++", "euler"]

STEPS = {"fast": 25, "high": 50}

#: WAN's own: `sample_guide_scale` of its generate.py, and the default of diffusers' pipelines.
GUIDANCE_SCALE = 5.0

#: WAN was trained at this rate (`sample_fps` of its configuration).
FPS = 16
MAX_FRAMES = 83

#: The rate by which the application turns a document's `frame_num` into seconds.
APPLICATIONS_FPS = 16

#: WAN's VAE halves a side three times, and its patches once more.
MIN_SIDE, MAX_SIDE, SIDE_MULTIPLE = 64, 1280, 16
#: 720p, the largest that WAN 2.1 was trained on.
MAX_AREA = 1280 * 720

#: 480p as WAN means it, in any orientation: the application's three, and this area for others.
SIZES = {Fraction(9, 16): (480, 832), Fraction(16, 9): (832, 480), Fraction(1): (624, 624)}
AREA = 480 * 832

#: Solvers by other names; what stands in none of these columns is the first, with a warning.
SOLVERS: dict[Solver, tuple[str, ...]] = {
    "unipc": ("unipc", "unipcmultistep"),
    "dpm++": ("dpmpp", "dpmpp2m", "dpmsolver", "dpmsolverpp", "dpmsolvermultistep"),
    "euler": ("euler", "flowmatch", "flowmatcheuler", "flowmatcheulerdiscrete"),
}

WHITE = (255, 255, 255)

#: The references that each mode wants, the first that is there for each of its frames.
WANTED: dict[Mode, tuple[str, ...]] = {
    "none": (),
    "single": ("single",),
    "start": ("start",),
    "end": ("end",),
    "both": ("start", "end"),
}

#: The mode that a start and an end stand for, where no mode is named.
FRAMES_GIVEN: dict[tuple[bool, bool], Mode] = {
    (True, True): "both",
    (True, False): "start",
    (False, True): "end",
}

#: An enhanced prompt has about eighty words, as WAN's authors expand theirs. The rest is what
#: Qwen2.5-7B-Instruct ships in its generation_config.json.
ENHANCEMENT = SamplingParams(
    max_tokens=200, temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05
)

Text = Field(None, max_length=20_000)
Strength = Field(None, ge=0.0, le=1.0)
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
    resize_mode: Literal["crop", "pad", "stretch"] = "crop"
    reference_required: bool = False
    speed: Speed = "exact"

    @field_validator("resolution", mode="before", json_schema_input_type=str | None)
    @classmethod
    def _width_x_height(cls, value: object) -> Fraction:
        return _ratio(value, "xX", "WIDTHxHEIGHT")

    @field_validator("aspect_ratio", mode="before", json_schema_input_type=str | None)
    @classmethod
    def _width_to_height(cls, value: object) -> Fraction:
        return _ratio(value, ":/", "WIDTH:HEIGHT")

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
    # The user's own words, of which only what reads as a ratio counts.
    aspect_ratio: str | None = Field(None, max_length=100)
    duration: float | None = Field(None, gt=0, le=600)
    video_reference_mode: Mode | None = None
    reference_image_url: str | None = Reference
    start_reference_url: str | None = Reference
    end_reference_url: str | None = Reference
    reference_strength: float | None = Strength
    denoise_strength: float | None = Strength
    reference_consent: bool = False
    content_type: str | None = Field(None, validation_alias=AliasChoices("contentType"))
    nsfw_optimization: bool = False


def _ratio(value: object, separators: str, shape: str) -> Fraction:
    """Two numbers with a sign between them as the first over the second, from 1/4 to 4."""
    number = r"(\d{1,5}(?:\.\d{1,3})?)"
    match = re.fullmatch(rf"{number}\s*[{separators}]\s*{number}", str(value).strip())
    sides = [Fraction(side) for side in match.groups()] if match else [0, 0]
    if not all(sides) or not Fraction(1, 4) <= sides[0] / sides[1] <= 4:
        raise ValueError(f"Input should be {shape}, neither more than four times the other")
    return Fraction(sides[0]) / sides[1]


class WanJob(Job):
    type: Type
    prompt: str | None = Text
    negative_prompt: str | None = Text
    content_type: str | None = None
    config: WanConfig = WanConfig()
    metadata: WanMetadata = WanMetadata()

    @model_validator(mode="after")
    def _something_to_render(self) -> WanJob:
        if self.prompt is None and not self.references:
            raise ValueError("prompt: Field required where no reference image is given")
        return self

    @model_validator(mode="after")
    def _a_frame_for_each_reference(self) -> WanJob:
        if self.mode == "both" and not self.is_image and self.num_frames == 1:
            raise ValueError("config.frames: Input should be at least 4 for two reference frames")
        return self

    @property
    def texts(self) -> list[CheckedText]:
        # Read as a user's text: a prohibition counts in a conversation's system message alone.
        system = self.config.enhancement_system_prompt or ""
        return [
            *_read_by_wan(self.prompt or "", "prompt"),
            CheckedText(system, "config.enhancement_system_prompt"),
        ]

    @property
    def adult(self) -> bool:
        labels = self.content_type, self.metadata.content_type
        return says_adult(*labels) or self.metadata.nsfw_optimization

    @property
    def reference_consent(self) -> bool:
        return self.metadata.reference_consent

    @property
    def reference_required(self) -> bool:
        return self.config.reference_required

    @property
    def is_image(self) -> bool:
        return self.type.startswith("image")

    @property
    def is_enhanced(self) -> bool:
        return self.type.endswith("_enhanced")

    @property
    def steps(self) -> int:
        return self.config.num_inference_steps or STEPS["high" if "high" in self.type else "fast"]

    @property
    def negative(self) -> str | None:
        """The negative prompt: top level, then `config`, then `metadata`."""
        places = (self.negative_prompt, self.config.negative_prompt, self.metadata.negative_prompt)
        return next((text for text in places if text is not None), None)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height: those given, else 480p in the orientation that is asked for."""
        if self.config.width and self.config.height:
            return self.config.width, self.config.height
        ratio = self.config.aspect_ratio or self.users_ratio or self.config.resolution
        return _size_of(ratio or Fraction(9, 16))

    @property
    def users_ratio(self) -> Fraction | None:
        """The ratio of `metadata`, where it reads as one."""
        try:
            return _ratio(self.metadata.aspect_ratio, ":/xX", "")
        except ValueError:
            return None

    @property
    def num_frames(self) -> int:
        """How many frames are made, 4k + 1: the nearest to those that are asked for."""
        if self.is_image:
            return 1
        return min(self.frames_asked_for, MAX_FRAMES) // 4 * 4 + 1

    @property
    def frames_asked_for(self) -> int:
        """`frames`, or those of the `duration`; as many as there may be, where neither is given."""
        seconds = self.config.duration or self.metadata.duration
        if self.config.frames:
            return self.config.frames
        return max(round(seconds * self.config.fps), 1) if seconds else MAX_FRAMES

    @property
    def solver(self) -> Solver | None:
        """The solver by any of its names; None where the job names none."""
        if self.config.sample_solver is None:
            return None
        return _known_solver(self.config.sample_solver) or "unipc"

    @property
    def mode(self) -> Mode:
        """The reference mode: the one that is named, else what the references are fit for."""
        named = self.config.reference_mode or self.metadata.video_reference_mode
        frames = FRAMES_GIVEN.get((bool(self._start), bool(self._end)))
        return named or frames or ("single" if self._single else "none")

    @property
    def references(self) -> dict[str, str]:
        # The application also copies a single reference into the start's place, or names a mode
        # and fills the other's place: the one that is there is meant.
        found = {
            "single": self._single or self._start,
            "start": self._start or (self._single if self.mode == "start" else None),
            "end": self._end,
        }
        return {role: url for role in WANTED[self.mode] if (url := found[role])}

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
    def strength_asked_for(self) -> tuple[str, float] | None:
        """The field that sets the strength of a reference, and that strength, 0 to 1."""
        changed = {
            "config.denoise_strength": self.config.denoise_strength,
            "metadata.denoise_strength": self.metadata.denoise_strength,
        }
        for field, strength in changed.items():
            if strength is not None:
                return field, 1 - strength
        kept = self.metadata.reference_strength
        return None if kept is None else ("metadata.reference_strength", kept)

    @property
    def conditioning_scale(self) -> float:
        """How strongly VACE holds to a reference, from 0 to 1; all of it unless asked otherwise."""
        return self.strength_asked_for[1] if self.strength_asked_for else 1.0

    def seed(self) -> int:
        """The job's seed, or `own_seed` if it has none."""
        return self.own_seed if self.config.seed is None else self.config.seed


def _size_of(ratio: Fraction) -> tuple[int, int]:
    """480p's sides for a ratio of width to height."""
    if ratio in SIZES:
        return SIZES[ratio]
    width = round((AREA * ratio) ** 0.5 / SIDE_MULTIPLE) * SIDE_MULTIPLE
    return width, round(AREA / width / SIDE_MULTIPLE) * SIDE_MULTIPLE


def _known_solver(name: str) -> Solver | None:
    plain = re.sub(r"[\W_]+", "", name.lower().replace("++", "pp")).removesuffix("scheduler")
    return next((solver for solver, names in SOLVERS.items() if plain in names), None)


def parse(payload: Mapping[str, Any], settings: Settings) -> WanJob:
    """The job of a payload; raises pydantic's ValidationError."""
    return WanJob.model_validate(payload)


def prepare(job: WanJob, model: Any, context: JobContext) -> None:
    """Have the weights on their way."""
    model.prefetch()


def run(
    job: WanJob, model: Any, references: Mapping[str, Image.Image], context: JobContext
) -> Iterator[Output | Video]:
    """The job's video, or its picture; `context.metadata` tells what was done to make it."""
    seed = job.seed()
    prompt = _prompt(job, model, seed, context)
    conditioning = _conditioning(job, model, references, context)
    sampling = _sampling(job, model, context)
    _warn(job, context)
    context.metadata["batch_size"] = 1

    width, height = job.size
    frames = model.generate(
        prompt=prompt,
        negative_prompt=job.negative,
        seed=seed,
        width=width,
        height=height,
        num_frames=job.num_frames,
        step=lambda done, total: context.step("generate", done, total),
        check=context.check,
        speed=job.config.speed,
        planned=lambda plan: context.metadata.update(memory_plan=dict(plan)),
        sped=lambda report: context.metadata.update(speed=dict(report)),
        **sampling,
        **conditioning,
    )
    facts = {
        "width": width,
        "height": height,
        "batch_size": 1,
        "asset_index": 0,
        "seed": seed,
        "steps": sampling["num_inference_steps"],
        "num_inference_steps": sampling["num_inference_steps"],
        "guidance_scale": sampling["guidance_scale"],
    }
    make = _picture if job.is_image else _video
    with closing(frames):
        yield from make(job, frames, facts, bool(conditioning), context)


def _picture(
    job: WanJob, frames: Iterator[Any], facts: dict[str, Any], composite: bool, context: JobContext
) -> Iterator[Output]:
    for piece in frames:
        yield Output(index=0, pixels=piece[0], metadata=facts, composite=composite)


def _video(
    job: WanJob, frames: Iterator[Any], facts: dict[str, Any], composite: bool, context: JobContext
) -> Iterator[Video]:
    """The video at its first piece, and then the pieces: it is encoded while they are decoded."""
    queue, num_frames = FrameQueue(), 0
    try:
        for piece in frames:
            if not num_frames:
                yield Video(0, queue, *job.size, job.config.fps, facts, composite)
            queue.put(piece, context.check)
            num_frames += len(piece)
        queue.end()
    except BaseException:
        queue.close()
        raise
    context.metadata.update(_length(num_frames, job.config.fps))


def _length(num_frames: int, fps: int) -> dict[str, Any]:
    """A video's length as the application reads it: it divides `frame_num` by 16, at any rate.

    The asset's own `frame_num` counts the frames of the file.
    """
    return {"frame_num": round(num_frames / fps * APPLICATIONS_FPS), "fps": fps}


def _sampling(job: WanJob, model: Any, context: JobContext) -> dict[str, Any]:
    """How the noise is taken away: as the job asks, unless the checkpoint knows one way alone."""
    own = model.sampling
    solver = own.solver if own.is_distilled else job.solver or own.solver
    flow_shift = job.config.flow_shift or own.flow_shift
    if own.is_distilled:
        context.metadata["distilled"] = True
    if own.distilled_timesteps:
        solver, flow_shift = "dmd", 1.0
    context.metadata.update({"sample_solver": solver, "flow_shift": flow_shift})
    return {
        "num_inference_steps": own.distilled_steps or job.steps,
        "guidance_scale": 1.0 if own.is_distilled else job.config.guidance_scale,
        "solver": solver,
        "flow_shift": flow_shift,
    }


def _warn(job: WanJob, context: JobContext) -> None:
    """Say what the job asked for and did not get."""
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


# --- the prompt, enhanced ---


def _prompt(job: WanJob, model: Any, seed: int, context: JobContext) -> str:
    """The job's prompt, or what the enhancer made of it; `metadata` tells which, and the text."""
    prompt = job.prompt or ""
    if not job.is_enhanced:
        return prompt
    system = job.config.enhancement_system_prompt or model.enhancement_prompt
    context.metadata["enhancement_source"] = "none"
    try:
        with context.stage("enhance"):
            enhanced = _enhance(model.enhancer, system, prompt, seed, context)
    except (WorkerUnavailable, InvalidPrompt, OutOfMemory, InternalError) as exc:
        context.warnings.append(f"enhancement: {exc.message}; the original prompt was taken")
        return prompt
    check_made(_read_by_wan(enhanced, "enhanced_prompt"), job, context)
    context.metadata.update(
        enhancement_source="qwen_instruct", enhanced_prompt=enhanced, system_prompt_used=system
    )
    return enhanced


def _read_by_wan(text: str, field: str) -> list[CheckedText]:
    """A text, and WAN's reading of it if that differs: its pipelines repair misencoded text.

    That is `prompt_clean` of diffusers. It also unescapes HTML, as the floor does by itself.
    """
    # Here, since other families' workers read this module too and need none of it.
    from ftfy import fix_text

    mended = fix_text(text)
    return [CheckedText(each, field) for each in dict.fromkeys((text, mended))]


def _enhance(
    enhancer: ChatGenerator | None, system: str, prompt: str, seed: int, context: JobContext
) -> str:
    if enhancer is None:
        raise WorkerUnavailable("this worker has no enhancer")
    if not prompt.strip():
        raise InvalidPrompt("there is no prompt to enhance")
    messages = ("system", system), ("user", prompt)
    request = ChatRequest(messages, replace(ENHANCEMENT, seed=seed))
    enhanced = "".join(enhancer.generate(request, context.check)).strip().strip('"').strip()
    if not enhanced:
        raise InternalError("the enhancer said nothing")
    return enhanced


# --- references ---


def _conditioning(
    job: WanJob, model: Any, references: Mapping[str, Image.Image], context: JobContext
) -> dict[str, Any]:
    """What the model is told of the references that could be had; `metadata` tells the mode.

    Raises ReferenceFrameError when that is less than the job requires.
    """
    given, route = _served(model, _given(job, references), context)
    mode = _rendered_mode(job, given)
    context.metadata["reference_mode"] = mode
    if mode != job.mode:
        why = _why(job, mode, context)
        if job.reference_required and not (job.is_image and given):
            raise ReferenceFrameError(f"config.reference_required: {why}")
        context.metadata["reference_fallback"] = why
    if not given:
        return {}
    context.metadata["reference_method"] = route
    context.metadata["resize_mode"] = job.config.resize_mode
    if mode == "single":
        context.metadata["single_mode"] = "subject" if "subject" in given else "first_frame"
    _warn_of_strength(job, route, is_subject="subject" in given, context=context)
    if route == "vace":
        context.metadata["reference_strength"] = job.conditioning_scale
        return {**given, "conditioning_scale": job.conditioning_scale}
    return given


def _warn_of_strength(job: WanJob, route: str, is_subject: bool, context: JobContext) -> None:
    """Warn that a strength below 1 weakens a given frame, or that it has no effect."""
    field, strength = job.strength_asked_for or ("", 1.0)
    if strength == 1.0:
        return
    if route != "vace":
        context.warnings.append(f"{field}: the network for given frames takes no strength")
    elif not is_subject:
        context.warnings.append(
            f"{field}: at {strength:.3g} the video may leave the given frame; at 1 it keeps it"
        )


def _given(job: WanJob, references: Mapping[str, Image.Image]) -> dict[str, Image.Image]:
    """The references as the model takes them: a first frame, a last one, or a subject."""
    if job.is_image or (job.mode == "single" and job.config.single_mode == "subject"):
        # A picture is no frame of itself; and VACE was trained on subjects set on white.
        shown = [images.fit(each, *job.size, "pad", WHITE) for each in references.values()]
        return {"subject": shown[0]} if shown else {}
    fitted = {
        role: images.fit(each, *job.size, job.config.resize_mode)
        for role, each in references.items()
    }
    places = {"first": fitted.get("start") or fitted.get("single"), "last": fitted.get("end")}
    return {place: image for place, image in places.items() if image}


def _served(
    model: Any, given: dict[str, Image.Image], context: JobContext
) -> tuple[dict[str, Image.Image], str]:
    """What of this the worker has a network for, and the name of that network."""
    without_last = {place: image for place, image in given.items() if place != "last"}
    for kept in (given, without_last, {}):
        route = model.route(**{place: place in kept for place in ("first", "last", "subject")})
        if route:
            break
    if len(kept) < len(given):
        what = "these two frames" if kept else "this reference"
        context.warnings.append(
            f"reference: this worker has no network for {what}, see WAN_VACE_MODEL"
        )
    return kept, route


def _rendered_mode(job: WanJob, given: Mapping[str, Any]) -> Mode:
    if "subject" in given or (given and job.mode == "single"):
        return "single"
    if "last" in given:
        return "both" if "first" in given else "end"
    return "start" if given else "none"


def _why(job: WanJob, mode: Mode, context: JobContext) -> str:
    """Why the mode that was rendered is not the one that was asked for."""
    missing = [role for role in WANTED[job.mode] if role not in job.references]
    if missing:
        return f"{' and '.join(missing)}: no reference is given"
    if job.is_image and mode != "none":
        return "a picture takes its reference as a subject"
    about = (*WANTED[job.mode], "reference")
    return next(each for each in reversed(context.warnings) if each.split(":")[0] in about)
