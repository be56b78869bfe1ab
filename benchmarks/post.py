"""From the decoder's tensor to the stored file: ours, and as it is done elsewhere.

    python -m benchmarks.post

Each pair of arms takes turns, with the same pixels; what they make is compared. `elsewhere` is
diffusers' own way to a `PIL.Image`, Pillow's default PNG, one upload after another, and
`export_to_video` (or, where imageio is missing, PyAV with the settings that it gives to x264).
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
from benchmarks.store import BUCKET, Store
from benchmarks.turns import control_of, take_turns
from ourvidz_serverless.delivery.storage.base import Storage, locate, upload
from ourvidz_serverless.delivery.storage.supabase import SupabaseStorage
from ourvidz_serverless.delivery.uploads import Delivery
from ourvidz_serverless.delivery.video import encode_video
from ourvidz_serverless.job_files import DELIVERY_THREADS
from ourvidz_serverless.models.sdxl.pipeline import to_pixels
from ourvidz_serverless.models.wan.vae import as_uint8
from ourvidz_serverless.output import FrameQueue, Output

PICTURES = 4
FPS = 16

#: What imageio makes of `export_to_video`'s quality of 5: 51 * (1 - 5 / 10), x264's own preset.
IMAGEIO = {"crf": "25"}

CONVERSION, PNG, UPLOADS, FILM = TITLES = (
    "From the decoder to bytes",
    "PNG against Pillow's default",
    "Four pictures, decoded to stored",
    "A video's frames to an MP4",
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--upload-ms", type=float, default=80, help="what the store takes a file")
    parser.add_argument(
        "--piece-ms", type=float, default=50, help="what the decoder takes four frames"
    )
    options = parser.parse_args(argv)
    scale = scale_of(options)
    tables = [
        conversion(scale),
        pngs(scale),
        uploads(scale, options.upload_ms / 1000),
        film(scale, options.piece_ms / 1000),
    ]
    report.finish("post", tables, options.json)


@dataclass(frozen=True, slots=True)
class Scale:
    """How large the pictures are, and how often each pair of arms takes turns."""

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
    """A picture and a video, from the decoder's floats to what an encoder reads."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    width, height = scale.size
    picture = decoded(png.grainy(scale.side)).to(device)
    video = decoded(moving(scale.frames, width, height)).to(device)
    images, videos = VaeImageProcessor(), VideoProcessor()

    def pil() -> Any:
        return np.asarray(images.postprocess(picture[None], output_type="pil")[0])

    def frames() -> Any:
        made = videos.postprocess_video(video[None], output_type="np")[0]
        return (made * 255).round().astype(np.uint8)  # export_to_video would cut, not round

    rows = []
    for what, ours, theirs in (
        ("picture", lambda: to_pixels(picture).cpu().numpy(), pil),
        ("video", lambda: as_uint8(video), frames),
    ):
        assert np.array_equal(ours(), theirs())
        turns = take_turns(ours, theirs, scale.rounds)
        rows.append([what, device, turns.told, turns.control, "equal"])
    note = f"A picture of {scale.side}x{scale.side}, {scale.frames} frames of {width}x{height}."
    return report.table(
        CONVERSION, ["what", "device", "times as fast", "control", "pixels"], rows, note
    )


def decoded(pixels: Any) -> torch.Tensor:
    """Bytes (..., height, width, 3) as a VAE decodes them: (3, ..., height, width), -1 to 1."""
    return torch.from_numpy(pixels).movedim(-1, 0).float().div(127.5).sub(1)


# --- PNG ---


def pngs(scale: Scale) -> report.Table:
    rows = []
    for picture in (png.soft, png.grainy, png.sharp, png.drawing):
        pixels = picture(scale.side)
        with Image.open(io.BytesIO(png.ours(pixels))) as read:
            assert np.array_equal(np.asarray(read), pixels)
        turns = take_turns(partial(png.ours, pixels), partial(png.pillow, pixels), scale.rounds)
        size = len(png.ours(pixels)) / len(png.pillow(pixels))
        rows.append(
            [
                picture.__name__,
                turns.told,
                turns.control,
                round(1000 * turns.a_s, 1),
                round(size, 3),
            ]
        )
    headers = ["picture", "times as fast", "control", "ms, ours", "size against Pillow's"]
    note = f"{scale.side}x{scale.side}; every pixel is read back and equal."
    return report.table(PNG, headers, rows, note)


# --- stored pictures ---


def uploads(scale: Scale, upload_s: float) -> report.Table:
    """Ours with thumbnails, in threads, against Pillow's PNG and one upload after another.

    Ours stores twice as many files: the thumbnails are part of what the worker does.
    """
    pictures = [decoded(png.grainy(scale.side)) for _ in range(PICTURES)]
    rounds = max(1, scale.rounds // 2)
    with Store(upload_s) as store, ThreadPoolExecutor(DELIVERY_THREADS) as pool:
        place = SupabaseStorage(store.url, store.service_key, BUCKET)

        def ours() -> None:
            with pooled(pool, place) as delivery:
                for index, picture in enumerate(pictures):
                    delivery.submit(Output(index, to_pixels(picture).numpy(), {}))
                delivery.assets(lambda: None)

        def elsewhere() -> None:
            for index, picture in enumerate(pictures):
                image = VaeImageProcessor().postprocess(picture[None], output_type="pil")[0]
                file = io.BytesIO()
                image.save(file, "PNG")
                post(store, f"theirs/{index}.png", file.getvalue())

        ours()
        turns = take_turns(ours, elsewhere, rounds)
        num_ours = sum(path.startswith("user") for _, path in store.objects)
    rows = [
        ["ours with thumbnails, pooled", num_ours, 1000 * turns.a_s, turns.told],
        ["Pillow's PNG, one by one", PICTURES, 1000 * turns.b_s, None],
    ]
    note = (
        f"{PICTURES} of {scale.side}x{scale.side}, {1000 * upload_s:.0f} ms an upload; "
        f"control {report.cell(turns.control)}."
    )
    return report.table(UPLOADS, ["arm", "files", "ms", "times as fast"], rows, note)


def pooled(pool: ThreadPoolExecutor, place: Storage) -> Delivery:
    return Delivery(
        pool,
        "user/job",
        upload=lambda key, data, mime: upload(place, key, data, mime),
        url=lambda key: locate(place, key, "path", 60),
    )


def post(store: Store, key: str, data: bytes) -> None:
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
class Film:
    """An MP4, the seconds that it took in all, and those of them after the last frame came."""

    data: bytes
    seconds: float
    after_s: float


def film(scale: Scale, piece_s: float) -> report.Table:
    """Encoding while frames arrive at a decoder's pace, or once they are all there."""
    width, height = scale.size
    pixels = moving(scale.frames, width, height)
    pieces = [pixels[:1], *np.split(pixels[1:], (scale.frames - 1) // 4)]
    films: dict[str, list[Film]] = {"streamed": [], "afterwards": []}
    for _ in range(max(1, scale.rounds // 3)):
        for make in (streamed, afterwards, afterwards, streamed):
            films[make.__name__].append(make(arriving(pieces, piece_s), width, height))
    rows = []
    for name, made in films.items():
        frames = read_back(made[0].data)
        assert len(frames) == len(pixels)
        seconds = [each.seconds for each in made]
        control = control_of(seconds)
        after_ms = report.trusted(1000 * median(each.after_s for each in made), control)
        told = report.trusted(median(seconds), control)
        kib = len(made[0].data) >> 10
        psnr_db = round(psnr(frames, pixels), 1)
        rows.append([name, told, after_ms, control, len(frames), psnr_db, kib])
    headers = ["arm", "s in all", "ms after the last frame", "control"]
    headers += ["frames", "PSNR, dB", "KiB"]
    peer = "export_to_video" if has_imageio() else "PyAV with x264's own preset and crf 25"
    note = (
        f"{scale.frames} frames of {width}x{height}, four in {1000 * piece_s:.0f} ms. "
        f"Afterwards: {peer}."
    )
    return report.table(FILM, headers, rows, note)


def streamed(arriving: Iterator[Any], width: int, height: int) -> Film:
    """As the worker does it: the encoder in a thread, behind a queue."""
    began, queue = time.perf_counter(), FrameQueue()
    with ThreadPoolExecutor(1) as pool:
        encoding = pool.submit(encode_video, queue, width, height, FPS)
        for piece in arriving:
            last = time.perf_counter()
            queue.put(piece, lambda: None)
        queue.end()
        data = encoding.result().data
    ended = time.perf_counter()
    return Film(data, ended - began, ended - last)


def afterwards(arriving: Iterator[Any], width: int, height: int) -> Film:
    """As diffusers' examples do it: the frames as floats, then a file."""
    began = time.perf_counter()
    frames = [piece.astype(np.float32) / 255 for piece in arriving]
    last = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        export([frame for piece in frames for frame in piece], path, width, height)
        data = path.read_bytes()
    ended = time.perf_counter()
    return Film(data, ended - began, ended - last)


def has_imageio() -> bool:
    return all(importlib.util.find_spec(name) for name in ("imageio", "imageio_ffmpeg"))


def export(frames: list[Any], path: Path, width: int, height: int) -> None:
    """`export_to_video`, or what it does, without imageio."""
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


def arriving(pieces: Sequence[Any], piece_s: float) -> Iterator[Any]:
    """Pieces at a decoder's pace, which begins the next when one is taken."""
    for piece in pieces:
        time.sleep(piece_s)
        yield piece


def read_back(data: bytes) -> Any:
    """All frames of a file, uint8 (frames, height, width, 3)."""
    with av.open(io.BytesIO(data)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def psnr(one: Any, other: Any) -> float:
    """Peak signal-to-noise ratio of bytes, in dB."""
    error = np.mean([np.mean((a.astype(int) - b) ** 2) for a, b in zip(one, other, strict=True)])
    return float(10 * np.log10(255**2 / error))


if __name__ == "__main__":
    main()
