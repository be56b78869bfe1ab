"""SDXL on one set of weights: text-to-image and image-to-image by the same denoising loop.

diffusers loads the weights and owns the networks and the schedulers. The loop is in `denoising`.
"""

from __future__ import annotations

import functools
from collections.abc import Generator, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from PIL import Image

from ourvidz_serverless.errors import InvalidPrompt
from ourvidz_serverless.models.chat.cuda_graphs import Capture
from ourvidz_serverless.models.finite import check_finite
from ourvidz_serverless.models.memory.device import Device
from ourvidz_serverless.models.memory.device_memory import standalone_handle
from ourvidz_serverless.models.memory.ledger import ModelHandle
from ourvidz_serverless.models.memory.movable_tensors import MovableParts
from ourvidz_serverless.models.memory.oom_fallback import MemoryPlans, OomFallback, SdxlMemoryPlan
from ourvidz_serverless.models.memory.types import Check
from ourvidz_serverless.models.progress import NoProgress, Progress
from ourvidz_serverless.models.sdxl import vae
from ourvidz_serverless.models.sdxl.denoising import Conditioning, Denoiser
from ourvidz_serverless.models.sdxl.latent_mask import LatentMask, cells_of
from ourvidz_serverless.models.sdxl.loras import LoraStore, applied
from ourvidz_serverless.models.sdxl.networks import SdxlNetworks
from ourvidz_serverless.models.sdxl.prompt_encoder import Embedding, PromptEncoder, same_length
from ourvidz_serverless.models.sdxl.prompt_weighting import Prompt, plain
from ourvidz_serverless.models.sdxl.request import ImageRequest, IpAdapterImage
from ourvidz_serverless.models.sdxl.step_graphs import StepGraphs
from ourvidz_serverless.models.sdxl.vae import Decoder, Vae
from ourvidz_serverless.models.sdxl.working_memory import decoding_bytes, denoising_bytes
from ourvidz_serverless.models.speed.embedding_cache import EmbeddingCache
from ourvidz_serverless.models.speed.presets import SDXL, ForwardStats, SpeedPreset
from ourvidz_serverless.models.speed.regional_compile import CompiledBlocks

#: The side, in pixels, that SDXL was trained for.
TRAINED_SIDE = 1024

#: The most images in one forward, unless the deployer sets another number.
MAX_BATCH = 6


class SdxlModel:
    """One SDXL checkpoint on one device. It generates for one job at a time.

    `compiled_blocks` are the UNet's compiled blocks, or None where nothing is compiled. With
    `capture` the steps of exact jobs are replayed as CUDA graphs.
    """

    def __init__(
        self,
        networks: SdxlNetworks,
        device: Device,
        loras: LoraStore | None = None,
        handle: ModelHandle | None = None,
        plans: MemoryPlans[SdxlMemoryPlan] | None = None,
        compiled_blocks: CompiledBlocks | None = None,
        capture: Capture | None = None,
    ) -> None:
        self.networks = networks
        self.device = device
        self.loras = loras or LoraStore(None)
        self.handle = handle or standalone_handle(MovableParts(networks.parts(), device))
        self.compiled_blocks = compiled_blocks
        self.parts = cast(MovableParts, self.handle.model)
        self._plans = plans or MemoryPlans(SdxlMemoryPlan(MAX_BATCH))
        self._prompt_encoder = PromptEncoder(networks.pipe)
        self._embeddings = EmbeddingCache(device)
        self.graphs = StepGraphs(networks.unet, capture) if capture else None
        if self.graphs:
            self.parts.on_leave = self.graphs.clear

    @property
    def has_ip_adapter(self) -> bool:
        return self.networks.ip_adapter is not None

    @property
    def is_inpainting_checkpoint(self) -> bool:
        return self.networks.is_for_inpainting

    def prefetch(self) -> None:
        """Start to move the weights to the device."""
        self.handle.prefetch()

    def generate(
        self, request: ImageRequest, progress: Progress
    ) -> Generator[np.ndarray, None, None]:
        """The images by their seeds, uint8 (height, width, 3), each as soon as it is decoded.

        Raises OutOfMemory if not even one image fits the device by the smallest memory plan,
        ModelLoadError if a LoRA does not fit the checkpoint, and whatever `progress` raises.
        """
        preset = SDXL[request.speed]
        decoder = self._decoder(preset)
        if self.graphs:
            self.graphs.begin_job()
        shape = _shape(request, decoder)
        # A LoRA's layers are none of those that are compiled.
        compiled = (
            self.compiled_blocks.job(use_compiled=not request.loras)
            if self.compiled_blocks
            else nullcontext()
        )
        with (
            self.handle.using(
                progress.check,
                f"{shape} x{len(request.seeds)}",
                self._expected_bytes(request, decoder, self._plans.get(shape)),
            ) as lease,
            applied(self.networks.pipe, request.loras),
            compiled,
        ):
            others = self.device.allocated_bytes() - self.parts.device_bytes
            fallback = OomFallback(self._plans, shape, self.device, progress.memory_plan)
            self._choose_decode(fallback, decoder, request.size)
            denoiser = self._denoiser(request, preset, fallback, progress.check)
            stats = ForwardStats()
            for latents in self._denoise(denoiser, fallback, progress, stats):
                if request.speed != "exact":
                    progress.speed(stats.report(request.speed, decoder.lever))
                for latent in latents:
                    decode = functools.partial(self.decode, decoder, latent)
                    with progress.span("decode"):
                        pixels = fallback.run(self.handle, "decode", decode)
                    yield pixels
            fallback.succeeded()
            lease.measured_bytes = self._working_bytes(others)

    def warm_up(self) -> None:
        """Generate one image in one step: on a GPU of the usual size, elsewhere of a small one."""
        side = TRAINED_SIDE if self.device.is_cuda else 64
        request = ImageRequest(
            prompt=plain(""),
            negative=plain(""),
            seeds=(0,),
            size=(side, side),
            steps=1,
            guidance_scale=2.0,
        )
        for _ in self.generate(request, NoProgress()):
            pass

    def encode(
        self, image: Image.Image, plan: SdxlMemoryPlan, hidden: np.ndarray | None = None
    ) -> torch.Tensor:
        """The latent (1, 4, height / 8, width / 8) of an image: the most likely one, no sample.

        The pixels where `hidden` (height, width) is true are replaced by a medium grey.
        """
        self._to_device(plan, "vae")
        network = self.networks.vae
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).to(self.device.name)
        pixels = pixels.permute(2, 0, 1)[None].to(network.dtype) / 127.5 - 1
        if hidden is not None:
            pixels = pixels * torch.from_numpy(~hidden).to(pixels.device)
        return vae.normalised(network.encode(pixels).latent_dist.mode(), network.config)

    def decode(self, decoder: Decoder, latent: torch.Tensor, plan: SdxlMemoryPlan) -> np.ndarray:
        """The image, uint8 (height, width, 3), of one latent (4, height / 8, width / 8)."""
        self._to_device(plan, decoder.part)
        decoded = decoder.decode(check_finite(latent, "the latent")[None], plan.tiled_decode)
        with self.device.uncounted() if plan.tiled_decode else nullcontext():
            check_finite(decoded, "the decoded picture")
            # bf16 has fewer than 255 grey levels. An exact job rounds as diffusers does.
            pixels = to_pixels(decoded.float() if decoder.lever else decoded)
        return self.device.copy_to_host(pixels).numpy()

    def _to_device(self, plan: SdxlMemoryPlan, *parts: str) -> None:
        """Have these parts on the device; by a plan that offloads, no others."""
        if plan.offload:
            self.parts.to_device_only(*parts)
        else:
            self.parts.to_device()

    def _choose_decode(
        self, fallback: OomFallback[SdxlMemoryPlan], decoder: Decoder, size: tuple[int, int]
    ) -> None:
        """By a plan that offloads, decode in tiles if a whole decode takes more than the UNet."""
        plan, parts = fallback.plan, self.parts.parts
        if plan.offload and not plan.tiled_decode:
            room = parts["unet"].num_bytes - parts[decoder.part].num_bytes
            if decoder.whole_bytes(*size) > room:
                fallback.shrink("decode")

    def _working_bytes(self, others: int) -> int | None:
        """The job's peak without all weights and what `others` hold, in bytes; None on a CPU."""
        peak = self.device.peak_bytes()
        return None if peak is None else max(peak - others - self.parts.num_bytes, 0)

    def _expected_bytes(self, request: ImageRequest, decoder: Decoder, plan: SdxlMemoryPlan) -> int:
        """What a job will take beside the weights, by the counts of its largest stage."""
        (width, height), networks = request.size, self.networks
        cells = width * height // networks.pipe.vae_scale_factor**2
        rows = plan.size(len(request.seeds)) * (2 if request.guidance_scale > 1 else 1)
        denoising = denoising_bytes(networks.unet, rows, cells)
        if plan.tiled_decode:
            return denoising
        dtype = self.device.dtype if decoder.lever else networks.vae.dtype
        return max(denoising, decoding_bytes(networks.vae, dtype, width * height))

    def _decoder(self, preset: SpeedPreset) -> Decoder:
        """The decoder of a job: the VAE as it is, unless the preset allows a smaller one."""
        if preset.tiny_vae and self.networks.tiny_vae:
            return self.networks.tiny_vae
        if preset.vae_bf16:
            return vae.in_bf16(self.networks.vae, self.device)
        return Vae(self.networks.vae, self.device, self.networks.vae.dtype)

    def _denoiser(
        self,
        request: ImageRequest,
        preset: SpeedPreset,
        fallback: OomFallback[SdxlMemoryPlan],
        check: Check,
    ) -> Denoiser:
        """The denoising loop of a request, with its prompts and its reference encoded."""
        conditioning = fallback.run(
            self.handle, "condition", lambda plan: self._encode_prompts(request, plan, check)
        )
        if self.networks.ip_adapter:
            embed = functools.partial(
                self._embed_ip_adapter_image, request.ip_adapter_image, conditioning.is_guided
            )
            image_embeds = fallback.run(self.handle, "condition", embed)
            conditioning = replace(conditioning, image_embeds=image_embeds)
        start = None
        if request.start:
            encode = functools.partial(self.encode, request.start.image)
            start = fallback.run(self.handle, "condition", encode)
        mask = self._mask(request, fallback)
        width, height = request.size
        factor, unet = self.networks.pipe.vae_scale_factor, self.networks.unet
        return Denoiser(
            unet=unet,
            scheduler_config=self.networks.pipe.scheduler.config,
            device=self.device,
            request=request,
            conditioning=conditioning,
            latent_shape=(unet.config.out_channels, height // factor, width // factor),
            start=start,
            preset=preset,
            mask=mask,
            graphs=self._graphs_for(request),
        )

    def _mask(
        self, request: ImageRequest, fallback: OomFallback[SdxlMemoryPlan]
    ) -> LatentMask | None:
        """Where a job repaints: everywhere, if it has no mask and the UNet reads one."""
        mask, reads_mask = request.mask, self.is_inpainting_checkpoint
        if mask is None and not reads_mask:
            return None
        width, height = request.size
        repainted = np.ones((height, width), bool) if mask is None else np.asarray(mask) > 0
        cells = cells_of(repainted, self.networks.pipe.vae_scale_factor)
        cells = cells.to(self.device.name, self.device.dtype)
        if not reads_mask:
            return LatentMask(cells)
        image = request.start.image if request.start else Image.new("RGB", request.size)
        encode = functools.partial(self.encode, image, hidden=repainted)
        visible = fallback.run(self.handle, "condition", encode)
        return LatentMask(cells, visible.to(self.device.dtype))

    def _graphs_for(self, request: ImageRequest) -> StepGraphs | None:
        """The graphs, unless a job changes the network: with a preset, a LoRA or an IP-Adapter."""
        is_usual = request.speed == "exact" and not request.loras and not self.has_ip_adapter
        return self.graphs if is_usual else None

    def _denoise(
        self,
        denoiser: Denoiser,
        fallback: OomFallback[SdxlMemoryPlan],
        progress: Progress,
        stats: ForwardStats,
    ) -> Iterator[torch.Tensor]:
        """The seeds' latents, in equal batches that the memory holds; no pixel depends on that."""
        seeds, num_steps = denoiser.request.seeds, denoiser.num_steps
        finished = 0

        def denoise(plan: SdxlMemoryPlan) -> torch.Tensor:
            batch = seeds[finished : finished + plan.size(len(seeds))]

            def on_step(done: int) -> None:
                progress.step(finished * num_steps + done * len(batch), num_steps * len(seeds))

            if plan.lean and self.graphs:
                # The memory is short, and this plan may move the weights.
                self.graphs.clear()
            self._to_device(plan, "unet")
            return denoiser.denoise(batch, on_step, stats, plan.lean)

        while finished < len(seeds):
            latents = fallback.run(self.handle, "denoise", denoise, len(seeds))
            finished += len(latents)
            yield latents

    def _encode_prompts(
        self, request: ImageRequest, plan: SdxlMemoryPlan, check: Check
    ) -> Conditioning:
        def embed(key: tuple[Prompt, int]) -> tuple[torch.Tensor, torch.Tensor]:
            self._to_device(plan, "text")
            prompt, clip_skip = key
            made = self._prompt_encoder.encode(prompt, check, clip_skip)
            return made.hidden, made.pooled

        def read(prompt: Prompt, clip_skip: int = 0) -> Embedding:
            # A LoRA changes the text encoders, so its embeddings are not cached.
            cached, key = not request.loras, (prompt, clip_skip)
            return Embedding(*(self._embeddings.get(embed, key) if cached else embed(key)))

        _check_clip_skip(request.clip_skip, self._prompt_encoder.max_clip_skip)
        # As in diffusers, the negative prompt's embedding leaves out the last layer alone.
        rows = [read(request.prompt, request.clip_skip)]
        guidance_embed = self._guidance_embed(request.guidance_scale)
        # At a scale of 1 the negative row cancels out, so it is not computed.
        if request.guidance_scale > 1 and guidance_embed is None:
            if request.negative is None and self.networks.pipe.config.force_zeros_for_empty_prompt:
                rows = [rows[0].zeros(), *rows]
            else:
                empty = plain("")
                rows = same_length([read(request.negative or empty), *rows], lambda: read(empty))
        width, height = request.size
        time_ids = torch.tensor([[height, width, 0, 0, height, width]], device=self.device.name)
        return Conditioning(
            hidden=torch.cat([row.hidden for row in rows]),
            pooled=torch.cat([row.pooled for row in rows]),
            time_ids=time_ids.to(rows[0].hidden.dtype),
            guidance_embed=guidance_embed,
        )

    def _guidance_embed(self, guidance_scale: float) -> torch.Tensor | None:
        """The embedded guidance scale that an LCM's UNet takes (arXiv:2310.04378), else None."""
        width = self.networks.unet.config.time_cond_proj_dim
        if width is None:
            return None
        scale = torch.tensor([guidance_scale - 1.0])
        embedded = self.networks.pipe.get_guidance_scale_embedding(scale, embedding_dim=width)
        return embedded.to(self.device.name, self.device.dtype)

    def _embed_ip_adapter_image(
        self, reference: IpAdapterImage | None, is_guided: bool, plan: SdxlMemoryPlan
    ) -> torch.Tensor:
        """The image embeddings for the UNet. From now on the IP-Adapter acts for this reference."""
        assert self.networks.ip_adapter is not None
        self._to_device(plan, "image", "unet")
        return self.networks.ip_adapter.encode(reference, is_guided)


def _check_clip_skip(clip_skip: int, most: int) -> None:
    if clip_skip > most:
        raise InvalidPrompt(
            f"config.clip_skip: Input should be at most {most}, "
            f"since a text encoder of this checkpoint has {most + 1} layers"
        )


def _shape(request: ImageRequest, decoder: Decoder) -> str:
    """What the memory for one image of a request depends on, as the ledger's reports name it."""
    width, height = request.size
    shape = f"{width}x{height}{'' if request.guidance_scale > 1 else ' unguided'}"
    return f"{shape} {decoder.lever}" if decoder.lever else shape


def to_pixels(decoded: torch.Tensor) -> torch.Tensor:
    """A decoded image (3, height, width), of -1 to 1, as uint8 (height, width, 3)."""
    pixels = (decoded / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
    return pixels.permute(1, 2, 0).contiguous()
