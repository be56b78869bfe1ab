"""Videos as files: what every player needs, read back by FFmpeg's own decoder."""

import io
import tempfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ourvidz_serverless.delivery import provenance
from ourvidz_serverless.delivery.video import EncodedVideo, encode_video
from tests.examples import examples

WIDTH, HEIGHT = 96, 64


def frame(index: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """A smooth picture that moves with its index."""
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [np.sin((columns + 3 * index) / 15), np.cos(rows / 11), np.sin((rows + index) / 19)]
    return np.stack([127 + 100 * wave for wave in waves], axis=-1).astype(np.uint8)


def pieces(count: int, width: int = WIDTH, height: int = HEIGHT) -> Iterator[np.ndarray]:
    """As WAN's decoder gives them: one frame, and then four at a time."""
    yield frame(0, width, height)[None]
    for start in range(1, count, 4):
        stop = min(start + 4, count)
        yield np.stack([frame(index, width, height) for index in range(start, stop)])


def encoded(count: int = 9, fps: int = 16) -> EncodedVideo:
    return encode_video(pieces(count), WIDTH, HEIGHT, fps)


def opened(video: EncodedVideo) -> av.container.InputContainer:
    return av.open(io.BytesIO(video.data))


# --- plays everywhere ---


def test_a_video_is_h264_in_yuv420p_with_its_colours_named() -> None:
    with opened(encoded()) as file:
        codec = file.streams.video[0].codec_context

        assert (codec.name, codec.pix_fmt) == ("h264", "yuv420p")
        assert (codec.width, codec.height) == (WIDTH, HEIGHT)
        assert {codec.colorspace, codec.color_primaries, codec.color_trc, codec.color_range} == {1}


def test_the_index_of_a_video_stands_before_its_frames() -> None:
    kinds = [kind for kind, _ in provenance.mp4_boxes(encoded().data)]

    assert kinds.index(b"moov") < kinds.index(b"mdat")


@given(count=st.integers(1, 30), fps=st.integers(8, 24))
@examples(12)
def test_the_frame_count_and_the_rate_of_a_video_are_exact(count: int, fps: int) -> None:
    video = encode_video(pieces(count), WIDTH, HEIGHT, fps)

    with opened(video) as file:
        stream = file.streams.video[0]
        times = [each.pts * each.time_base for each in file.decode(stream)]
        assert video.num_frames == stream.frames == len(times) == count
        assert stream.average_rate == fps
        assert times == [index / stream.average_rate for index in range(count)]


def luma(picture: np.ndarray) -> np.ndarray:
    """Brightness, as BT.709 weighs it; colour has a quarter of its pixels in any yuv420p."""
    return picture @ np.array([0.2126, 0.7152, 0.0722])


def test_a_video_looks_like_its_frames() -> None:
    with opened(encoded(17)) as file:
        shown = [each.to_ndarray(format="rgb24") for each in file.decode(video=0)]

    errors = [luma(picture) - luma(frame(index)) for index, picture in enumerate(shown)]
    # A peak signal-to-noise ratio of 42 dB: no visible difference.
    assert max(float((error**2).mean()) for error in errors) < 255**2 / 10**4.2


@pytest.mark.parametrize("colour", [(200, 30, 60), (20, 160, 40), (250, 250, 250), (5, 5, 5)])
def test_a_video_of_one_colour_keeps_the_colour(colour: tuple[int, int, int]) -> None:
    flat = np.broadcast_to(np.array(colour, np.uint8), (5, HEIGHT, WIDTH, 3))

    with opened(encode_video([flat], WIDTH, HEIGHT, 16)) as file:
        (*_, last) = (each.to_ndarray(format="rgb24") for each in file.decode(video=0))

    assert np.abs(last.astype(int) - colour).max() <= 3


# --- the mark ---


@pytest.mark.parametrize(
    ("composite", "source"), [(False, provenance.TRAINED), (True, provenance.COMPOSITE)]
)
def test_a_video_bears_the_mark_of_generated_media(composite: bool, source: str) -> None:
    video = encode_video(pieces(5), WIDTH, HEIGHT, 16, composite)

    assert provenance.digital_source_type(video.data) == source


def test_the_mark_of_a_video_stands_in_the_box_of_the_xmp_standard() -> None:
    kind, body = list(provenance.mp4_boxes(encoded().data))[-1]

    assert (kind, body[:16].hex()) == (b"uuid", "be7acfcb97a942e89c71999491e3afac")


# --- how it is made ---


def test_the_poster_of_a_video_is_its_first_frame() -> None:
    assert np.array_equal(encoded().poster, frame(0))


@pytest.mark.parametrize(
    "piece",
    [
        np.zeros((1, HEIGHT, WIDTH, 4), np.uint8),
        np.zeros((1, HEIGHT, WIDTH + 2, 3), np.uint8),
        np.zeros((HEIGHT, WIDTH, 3), np.uint8),
        np.zeros((1, HEIGHT, WIDTH, 3), np.float32),
    ],
)
def test_frames_of_another_type_or_shape_are_a_value_error(piece: np.ndarray) -> None:
    with pytest.raises(ValueError, match="frames must be uint8"):
        encode_video([piece], WIDTH, HEIGHT, 16)


def test_a_video_has_at_least_one_frame() -> None:
    with pytest.raises(ValueError, match="at least one frame"):
        encode_video([], WIDTH, HEIGHT, 16)


def test_the_video_encoder_leaves_no_file_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    encoded()
    with pytest.raises(ValueError):
        encode_video([np.zeros((1, 2, 2, 3), np.uint8)], WIDTH, HEIGHT, 16)

    assert list(tmp_path.iterdir()) == []


def peak_bytes(count: int) -> int:
    """The most memory that numpy and Python held while a video of so many frames was encoded."""
    tracemalloc.start()
    encode_video(pieces(count, 192, 160), 192, 160, 16)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_the_memory_of_the_video_encoder_does_not_grow_with_the_frames() -> None:
    few, many = peak_bytes(17), peak_bytes(17 * 8)

    # Beside the file itself, of some hundred kilobytes; the frames alone would be ten megabytes.
    assert many - few < 1_000_000
