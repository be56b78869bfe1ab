"""WAN 2.1: text to video, and references through VACE or the 14B image-to-video networks.

The denoising loop is our own, so that a stop or a deadline takes effect at the next step, and
frames are given out while the next ones are decoded. diffusers loads the weights and provides the
networks and the schedulers. Tests compare our frames with those of its pipelines, bit for bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from ourvidz_serverless.models.chat.model import Chat
from ourvidz_serverless.models.memory.device import Device, translate_out_of_memory
from ourvidz_serverless.models.memory.ledger import ModelHandle
from ourvidz_serverless.models.memory.oom_fallback import MemoryPlans, OomFallback, WanMemoryPlan
from ourvidz_serverless.models.progress import NoProgress, Progress
from ourvidz_serverless.models.schedulers import take_step, timestep_pairs
from ourvidz_serverless.models.speed.presets import EXACT, WAN, ForwardStats
from ourvidz_serverless.models.speed.step_cache import FirstBlockCache
from ourvidz_serverless.models.wan.conditioning import (
    Conditioning,
    i2v_conditioning,
    vace_conditioning,
)
from ourvidz_serverless.models.wan.network import WanNetwork
from ourvidz_serverless.models.wan.request import (
    References,
    Route,
    SamplingDefaults,
    VideoModel,
    VideoRequest,
)
from ourvidz_serverless.models.wan.sampling import Guidance, make_scheduler
from ourvidz_serverless.models.wan.text_encoder import WanTextEncoder
from ourvidz_serverless.models.wan.vae import VideoVae

#: Two latent frames: the VAE decodes the first one differently from all later ones. With three
#: steps, UniPC, which is WAN's own solver, takes a step of each order.
WARM_UP_FRAMES, WARM_UP_STEPS = 5, 3


@dataclass(eq=False)
class WanModel(VideoModel):
    """WAN 2.1 on one device. It computes one job at a time; the worker sees to that.

    `networks` are those that the settings name, by route.
    """

    device: Device
    text_encoder: WanTextEncoder
    vae: VideoVae
    networks: Mapping[Route, WanNetwork]
    scheduler_config: Any
    sampling: SamplingDefaults
    plans: MemoryPlans[WanMemoryPlan]
    enhancement_prompt: str
    enhancer: Chat | None

    def prefetch(self) -> None:
        self.text_encoder.handle.prefetch()

    def route(self, references: References) -> Route | None:
        if not references:
            return "t2v"
        image_to_video: Route = "flf2v" if references.last else "i2v"
        if references.first and not references.subject and image_to_video in self.networks:
            return image_to_video
        return "vace" if "vace" in self.networks else None

    def warm_up(self) -> None:
        """Generate a few frames by each network, and a text by WAN's own enhancer."""
        size = (832, 480) if self.device.is_cuda else (32, 32)
        grey = Image.new("RGB", size, "grey")
        references: dict[Route, References] = {
            "t2v": References(),
            "vace": References(subject=grey),
            "i2v": References(first=grey),
            "flf2v": References(first=grey, last=grey),
        }
        for route in self.networks:
            request = VideoRequest(
                prompt="",
                negative="",
                seed=0,
                size=size,
                num_frames=WARM_UP_FRAMES,
                steps=WARM_UP_STEPS,
                guidance_scale=2.0,
                references=references[route],
            )
            for _ in self.generate(request, NoProgress()):
                pass
        if self.enhancer:
            self.enhancer.warm_up()
        self.prefetch()

    def generate(self, request: VideoRequest, progress: Progress) -> Generator[np.ndarray]:
        route = self.route(request.references)
        if route is None:
            raise ValueError("there is no network for these references")
        return _Generation(self, self.networks[route], request, progress).frames()


class _Generation:
    """One job and its stages: encode prompts, encode references, denoise, decode."""

    def __init__(
        self, wan: WanModel, network: WanNetwork, request: VideoRequest, progress: Progress
    ) -> None:
        self._wan, self._network = wan, network
        self._request, self._progress = request, progress
        width, height = request.size
        self._shape = f"{width}x{height}x{request.num_frames}"
        self._fallback = OomFallback(wan.plans, self._shape, wan.device, progress.memory_plan)

    def frames(self) -> Generator[np.ndarray]:
        with translate_out_of_memory():
            latents = self._denoise(self._encode_prompts(), self._encode_references())
            vae, expected = self._wan.vae.handle, self._expected_in_decode()
            with self._progress.span("decode"), self._using(vae, self._shape, expected):
                yield from self._decode(latents)
            self._fallback.succeeded()

    @contextmanager
    def _using(
        self, handle: ModelHandle, shape: str, expected_bytes: int | None = None
    ) -> Iterator[None]:
        """Have a model on the device for one stage, and measure the memory that the stage takes."""
        device = self._wan.device
        with handle.using(self._progress.check, shape, expected_bytes) as lease:
            before = device.begin_stage()
            yield
            lease.measured_bytes = device.stage_peak_bytes(before)

    def _encode_prompts(self) -> Guidance:
        request, encoder = self._request, self._wan.text_encoder
        # At a scale of 1 the negative prompt cancels out, and half of the forwards with it.
        is_guided = request.guidance_scale > 1 and not self._wan.sampling.is_distilled
        texts = [request.prompt, request.negative or ""] if is_guided else [request.prompt]
        positive, *others = self._fallback.run(
            encoder.handle, "condition", lambda plan: encoder.encode(texts, self._progress.check)
        )
        return Guidance(positive, others[0] if others else None, request.guidance_scale)

    def _encode_references(self) -> Conditioning:
        request, network, vae = self._request, self._network, self._wan.vae
        if not request.references:
            return Conditioning()

        # The encoder's layers are those of the decoder, the other way round.
        expected = vae.decode_bytes(request.size, is_tiled=False)

        def encode(plan: WanMemoryPlan) -> Conditioning:
            with self._using(vae.handle, f"{self._shape} in", expected):
                if network.is_vace:
                    return vace_conditioning(request, network.transformer, vae)
                return i2v_conditioning(request, vae)

        return self._fallback.run(vae.handle, "condition", encode)

    def _denoise(self, guidance: Guidance, conditioning: Conditioning) -> torch.Tensor:
        """Latents (1, channels, frames, h, w) in fp32."""
        speed, network = self._request.speed, self._network
        expected = network.expected_bytes(self._noise_shape(conditioning))
        with self._using(network.handle, self._shape, expected), network.compiled():
            conditioning = self._with_image_embeddings(conditioning)
            latents, stats = self._fallback.run(
                network.handle, "denoise", lambda plan: self._take_steps(guidance, conditioning)
            )
        if speed != "exact":
            self._progress.speed(stats.report(speed))
        return latents

    def _with_image_embeddings(self, conditioning: Conditioning) -> Conditioning:
        """The conditioning with the known frames' CLIP embeddings, if the network reads these."""
        network, encoder = self._network, self._network.image_encoder
        images = list(self._request.references.frames(self._request.num_frames).values())
        if encoder is None or not images:
            return conditioning
        embeddings = self._fallback.run(
            network.handle, "condition", lambda plan: encoder.encode(images, self._wan.device.name)
        )
        extra_kwargs = {"encoder_hidden_states_image": embeddings.to(network.transformer.dtype)}
        return replace(conditioning, extra_kwargs=extra_kwargs)

    @torch.inference_mode()
    def _take_steps(
        self, guidance: Guidance, conditioning: Conditioning
    ) -> tuple[torch.Tensor, ForwardStats]:
        """The denoising loop: the latents that the seed's noise becomes, and counted forwards."""
        wan, request, network = self._wan, self._request, self._network
        scheduler = make_scheduler(wan.scheduler_config, wan.sampling, request)
        # Drawn on the CPU and in fp32: then a seed gives the same video on every device.
        generator = torch.Generator().manual_seed(request.seed)
        noise = torch.randn(self._noise_shape(conditioning), generator=generator)
        latents = noise.to(wan.device.name)
        # Only the steps of a distilled checkpoint draw noise.
        extra = {"generator": generator} if wan.sampling.distilled_timesteps else {}
        # No two steps of a distilled checkpoint are alike, so none can be left out.
        preset = EXACT if wan.sampling.is_distilled else WAN[request.speed]
        cache, stats = (
            FirstBlockCache(network.transformer, preset.first_block_threshold),
            ForwardStats(),
        )

        def forward(timestep: torch.Tensor, branch: str, prompt: torch.Tensor) -> torch.Tensor:
            cache.begin_forward(branch)
            predicted = network.predict(latents, timestep, prompt, conditioning)
            stats.count(1, cache.is_full)
            return predicted

        with cache.enabled():
            timesteps = timestep_pairs(scheduler, wan.device.name)
            for done, (timestep, sent) in enumerate(timesteps, start=1):
                predicted = guidance.predict(partial(forward, sent))
                latents = take_step(scheduler, predicted, timestep, latents, **extra)
                self._progress.step(done, len(timesteps))
        return latents[:, :, conditioning.leading_frames :], stats

    def _noise_shape(self, conditioning: Conditioning) -> tuple[int, ...]:
        width, height = self._request.size
        shape = self._wan.vae.latent_shape(self._request.num_frames, height, width)
        return (*shape[:2], shape[2] + conditioning.leading_frames, *shape[3:])

    def _expected_in_decode(self) -> int:
        """The bytes that the decode will take. It is tiled if whole frames cannot fit."""
        vae, fallback = self._wan.vae, self._fallback
        handle, size = vae.handle, self._request.size
        room = handle.ledger.memory.total_bytes - handle.model.num_bytes
        if vae.decode_bytes(size, fallback.plan.tiled_decode) > room:
            fallback.shrink("decode")
        return vae.decode_bytes(size, fallback.plan.tiled_decode)

    def _decode(self, latents: torch.Tensor) -> Iterator[np.ndarray]:
        """The frames, piece by piece. If one does not fit, decoding begins again with more room."""
        vae, check = self._wan.vae, self._progress.check
        pieces = _RestartablePieces(
            lambda: vae.decode(latents, self._fallback.plan.tiled_decode, check)
        )
        while piece := self._fallback.run(vae.handle, "decode", lambda plan: pieces.next()):
            self._progress.check()
            yield piece[0]


class _RestartablePieces:
    """Pieces of an iterator. After an error it begins again and skips those already given out."""

    def __init__(self, begin: Callable[[], Iterator[np.ndarray]]) -> None:
        self._begin, self._given_out = begin, 0
        self._pieces: Iterator[np.ndarray] | None = None

    def next(self) -> list[np.ndarray]:
        """The next piece, if there is one."""
        pieces = self._pieces or itertools.islice(self._begin(), self._given_out, None)
        self._pieces = None
        found = list(itertools.islice(pieces, 1))
        self._pieces = pieces
        self._given_out += len(found)
        return found
