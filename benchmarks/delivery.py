"""From the decoder's tensor to the stored file: the worker against the usual libraries.

    python -m benchmarks.delivery

Each pair is timed alternately on the same pixels, and the results are compared. The baselines are
diffusers' conversion to a `PIL.Image`, Pillow's default PNG, one upload after another, and
`export_to_video` (or, if imageio is missing, PyAV with the settings that it gives to x264).
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import av
import numpy as np
import requests
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import export_to_video
from diffusers.video_processor import VideoProcessor
from PIL import Image

from benchmarks import png, report
from benchmarks.interleaved_timing import control_ratio, time_interleaved
from benchmarks.slow_storage import BUCKET, SlowStorage
from ourvidz_serverless.delivery.files import File
from ourvidz_serverless.delivery.storage.base import locate, upload
from ourvidz_serverless.delivery.storage.supabase import SupabaseStorage
from ourvidz_serverless.delivery.uploads import Uploads
from ourvidz_serverless.delivery.video import encode_video
from ourvidz_serverless.models.sdxl.pipeline import to_pixels
from ourvidz_serverless.models.wan.vae import as_uint8
from ourvidz_serverless.output import FrameQueue, Output
from ourvidz_serverless.worker.job_files import DELIVERY_THREADS

PICTURES = 4
FPS = 16

#: imageio's options for `export_to_video`'s quality of 5: 51 * (1 - 5 / 10), x264's own preset.
IMAGEIO = {"crf": "25"}

CONVERSION, PNG, UPLOADS, VIDEO = TITLES = (
    "From the decoder to bytes",
    "PNG against Pillow's default",
    "Four pictures, from the decoder to storage",
    "A video's frames to an MP4",
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--upload-ms", type=float, default=80, help="time of an upload")
    parser.add_argument(
        "--chunk-ms", type=float, default=50, help="time in which four frames are decoded"
    )
    options = parser.parse_args(argv)
    scale = scale_of(options)
    tables = [
        conversion(scale),
        pngs(scale),
        uploads(scale, options.upload_ms / 1000),
        videos(scale, options.chunk_ms / 1000),
    ]
    report.finish("delivery", tables, options.json)


@dataclass(frozen=True, slots=True)
class Scale:
    """The sizes of pictures and videos, and the rounds of interleaved timing."""

    side: int = 1024
    frames: int = 81
    size: tuple[int, int] = (832, 480)
    rounds: int = 10


def scale_of(options: argparse.Namespace) -> Scale:
    if options.tiny:
        return Scale(side=64, frames=9, size=(64, 48), rounds=1)
    return Scale(rounds=3) if options.quick else Scale()


# --- pixels ---


def conversion(scale: Scale) -> report.Table:
    """A picture and a video, from the decoder's floats to the encoder's bytes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    width, height = scale.size
    picture = decoded(png.grainy(scale.side)).to(device)
    video = decoded(moving(scale.frames, width, height)).to(device)
    image_processor, video_processor = VaeImageProcessor(), VideoProcessor()

    def pil() -> Any:
        return np.asarray(image_processor.postprocess(picture[None], output_type="pil")[0])

    def frames() -> Any:
        made = video_processor.postprocess_video(video[None], output_type="np")[0]
        return (made * 255).round().astype(np.uint8)  # export_to_video would truncate

    rows = []
    for what, worker, baseline in (
        ("picture", lambda: to_pixels(picture).cpu().numpy(), pil),
        ("video", lambda: as_uint8(video), frames),
    ):
        assert np.array_equal(worker(), baseline())
        timing = time_interleaved(worker, baseline, scale.rounds)
        rows.append([what, device, timing.trusted_ratio, timing.control, "equal"])
    note = f"A picture of {scale.side}x{scale.side}, {scale.frames} frames of {width}x{height}."
    return report.table(
        CONVERSION, ["what", "device", "times as fast", "control", "pixels"], rows, note
    )


def decoded(pixels: Any) -> torch.Tensor:
    """Bytes (..., height, width, 3) as a VAE's output: (3, ..., height, width), from -1 to 1."""
    return torch.from_numpy(pixels).movedim(-1, 0).float().div(127.5).sub(1)


# --- PNG ---


def pngs(scale: Scale) -> report.Table:
    rows = []
    for picture in (png.soft, png.grainy, png.sharp, png.drawing):
        pixels = picture(scale.side)
        with Image.open(io.BytesIO(png.worker_png(pixels))) as read:
            assert np.array_equal(np.asarray(read), pixels)
        timing = time_interleaved(
            partial(png.worker_png, pixels), partial(png.pillow_png, pixels), scale.rounds
        )
        size = len(png.worker_png(pixels)) / len(png.pillow_png(pixels))
        rows.append(
            [
                picture.__name__,
                timing.trusted_ratio,
                timing.control,
                round(1000 * timing.a_s, 1),
                round(size, 3),
            ]
        )
    headers = ["picture", "times as fast", "control", "ms, ours", "size against Pillow's"]
    note = f"{scale.side}x{scale.side}; every pixel is read back and equal."
    return report.table(PNG, headers, rows, note)


# --- stored pictures ---


def uploads(scale: Scale, upload_s: float) -> report.Table:
    """The worker's threads, with thumbnails, against Pillow's PNG and one upload after another.

    The worker stores twice as many files: each picture has a thumbnail.
    """
    pictures = [decoded(png.grainy(scale.side)) for _ in range(PICTURES)]
    rounds = max(1, scale.rounds // 2)
    with SlowStorage(upload_s) as store, ThreadPoolExecutor(DELIVERY_THREADS) as pool:
        storage = SupabaseStorage(store.url, store.service_key, BUCKET)

        def send(file: File) -> str:
            key = f"user/job/{file.name}"
            upload(storage, key, file.data, file.mime)
            return locate(storage, key, "path", 60)

        def worker() -> None:
            with Uploads(pool, send) as delivery:
                for index, picture in enumerate(pictures):
                    delivery.submit(Output(index, to_pixels(picture).numpy(), {}))
                delivery.assets(lambda: None)

        def baseline() -> None:
            for index, picture in enumerate(pictures):
                image = VaeImageProcessor().postprocess(picture[None], output_type="pil")[0]
                file = io.BytesIO()
                image.save(file, "PNG")
                post(store, f"baseline/{index}.png", file.getvalue())

        worker()
        timing = time_interleaved(worker, baseline, rounds)
        num_files = sum(path.startswith("user") for _, path in store.objects)
    rows = [
        ["worker, in threads, with thumbnails", num_files, 1000 * timing.a_s, timing.trusted_ratio],
        ["Pillow's PNG, one by one", PICTURES, 1000 * timing.b_s, None],
    ]
    note = (
        f"{PICTURES} of {scale.side}x{scale.side}, {1000 * upload_s:.0f} ms an upload; "
        f"control {report.cell(timing.control)}."
    )
    return report.table(UPLOADS, ["variant", "files", "ms", "times as fast"], rows, note)


def post(store: SlowStorage, key: str, data: bytes) -> None:
    headers = {
        "apikey": store.service_key,
        "Authorization": f"Bearer {store.service_key}",
        "Content-Type": "image/png",
        "x-upsert": "true",
    }
    url = f"{store.objects_url}/{key}"
    requests.post(url, data=data, headers=headers, timeout=30).raise_for_status()


# --- video ---


@dataclass(frozen=True, slots=True)
class Encoded:
    """An MP4, the seconds of encoding it, and those of them after the last frame came."""

    data: bytes
    seconds: float
    after_s: float


def videos(scale: Scale, chunk_s: float) -> report.Table:
    """Encoding while frames arrive from a decoder, or once they are all there."""
    width, height = scale.size
    pixels = moving(scale.frames, width, height)
    chunks = [pixels[:1], *np.split(pixels[1:], (scale.frames - 1) // 4)]
    runs: dict[str, list[Encoded]] = {"streamed": [], "afterwards": []}
    for _ in range(max(1, scale.rounds // 3)):
        for make in (streamed, afterwards, afterwards, streamed):
            runs[make.__name__].append(make(arriving(chunks, chunk_s), width, height))
    rows = []
    for name, made in runs.items():
        frames = read_back(made[0].data)
        assert len(frames) == len(pixels)
        seconds = [each.seconds for each in made]
        control = control_ratio(seconds)
        after_ms = report.trusted(1000 * median(each.after_s for each in made), control)
        total_s = report.trusted(median(seconds), control)
        kib = len(made[0].data) >> 10
        psnr_db = round(psnr(frames, pixels), 1)
        rows.append([name, total_s, after_ms, control, len(frames), psnr_db, kib])
    headers = ["variant", "s in all", "ms after the last frame", "control"]
    headers += ["frames", "PSNR, dB", "KiB"]
    baseline = "export_to_video" if has_imageio() else "PyAV with x264's own preset and crf 25"
    note = (
        f"{scale.frames} frames of {width}x{height}, four in {1000 * chunk_s:.0f} ms. "
        f"Afterwards: {baseline}."
    )
    return report.table(VIDEO, headers, rows, note)


def streamed(chunks: Iterator[Any], width: int, height: int) -> Encoded:
    """The worker's way: the encoder runs in a thread and takes frames from a queue."""
    began, queue = time.perf_counter(), FrameQueue()
    with ThreadPoolExecutor(1) as pool:
        encoding = pool.submit(encode_video, queue, width, height, FPS)
        for chunk in chunks:
            last = time.perf_counter()
            queue.put(chunk, lambda: None)
        queue.end()
        data = encoding.result().data
    ended = time.perf_counter()
    return Encoded(data, ended - began, ended - last)


def afterwards(chunks: Iterator[Any], width: int, height: int) -> Encoded:
    """The way of diffusers' examples: all frames as floats, then a file."""
    began = time.perf_counter()
    frames = [chunk.astype(np.float32) / 255 for chunk in chunks]
    last = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        export([frame for chunk in frames for frame in chunk], path, width, height)
        data = path.read_bytes()
    ended = time.perf_counter()
    return Encoded(data, ended - began, ended - last)


def has_imageio() -> bool:
    return all(importlib.util.find_spec(name) for name in ("imageio", "imageio_ffmpeg"))


def export(frames: list[Any], path: Path, width: int, height: int) -> None:
    """Write the frames by `export_to_video`, or, without imageio, by PyAV in the same way."""
    if has_imageio():
        export_to_video(frames, str(path), fps=FPS)
        return
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=FPS, options=IMAGEIO)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames:
            pixels = (frame * 255).astype(np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode(None))


def moving(frames: int, width: int, height: int) -> Any:
    """Grainy clouds that move by two pixels a frame: uint8 (frames, height, width, 3)."""
    still = png.grainy(max(width, height))[:height, :width]
    return np.stack([np.roll(still, 2 * frame, axis=1) for frame in range(frames)])


def arriving(chunks: Sequence[Any], chunk_s: float) -> Iterator[Any]:
    """Yield chunks as a decoder does: each takes `chunk_s` seconds, from when it is asked for."""
    for chunk in chunks:
        time.sleep(chunk_s)
        yield chunk


def read_back(data: bytes) -> Any:
    """All frames of an MP4, uint8 (frames, height, width, 3)."""
    with av.open(io.BytesIO(data)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def psnr(one: Any, other: Any) -> float:
    """Peak signal-to-noise ratio of bytes, in dB."""
    error = np.mean([np.mean((a.astype(int) - b) ** 2) for a, b in zip(one, other, strict=True)])
    return float(10 * np.log10(255**2 / error))


if __name__ == "__main__":
    main()
