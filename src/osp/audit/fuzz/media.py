"""Videos and images of every container, as they are fuzzed: what each verb that reads one asks of it."""

import io
import itertools
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import cast

import av
import numpy as np
from PIL import Image
from torch import Tensor

from osp.audit.fuzz.subject import Reading, Subject
from osp.data.media.clips import CutSettings, clips_of, examine
from osp.data.media.pictures import animated_gif, encode_png
from osp.data.media.video import encode_video, probe, read_clip
from osp.data.sources import SyntheticClips
from osp.sampling.pictures import PictureFiles

FRAMES, SIDE = 12, 32
_SIZE = (24, 24)  # that clips are read at


def drawn(number: int, frames: int = FRAMES) -> Tensor:
    """A procedural clip, uint8 `C T H W`."""
    video: Tensor = SyntheticClips(64, frames, SIDE, SIDE, objects=1, plain=True).read(number, 0)["video"]
    return video


def mp4(number: int = 0, frames: int = FRAMES) -> bytes:
    """A procedural clip as MP4."""
    return encode_video(drawn(number, frames), 8.0, threads=1)


def encoded(container: str, codec: str, number: int = 1, **options: str) -> bytes:
    """A procedural clip in any container and codec of FFmpeg, with a keyframe every fourth frame."""
    file = io.BytesIO()
    with av.open(file, "w", format=container, options={"fflags": "+bitexact"}) as output:
        stream = cast(av.VideoStream, output.add_stream(codec, rate=Fraction(8), options={"g": "4", **options}))
        stream.width = stream.height = SIDE
        stream.pix_fmt, stream.codec_context.thread_count = "yuv420p", 1
        for at, picture in enumerate(drawn(number).permute(1, 2, 3, 0).contiguous().numpy()):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = at, Fraction(1, 8)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


def still(kind: str) -> bytes:
    """A procedural picture as JPEG or WebP, or a ramp as PNG of 16 bits."""
    file = io.BytesIO()
    if kind == "PNG16":
        Image.fromarray(np.linspace(0, 65535, SIDE * SIDE, dtype=np.uint16).reshape(SIDE, SIDE)).save(file, "PNG")
    else:
        Image.fromarray(drawn(2, 1)[:, 0].permute(1, 2, 0).contiguous().numpy()).save(file, kind)
    return file.getvalue()


def animation() -> bytes:
    """A procedural clip as an animated WebP."""
    frames = [Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy()) for frame in drawn(3, 4).unbind(1)]
    file = io.BytesIO()
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:], duration=125)
    return file.getvalue()


def read_media(folder: Path, reading: Reading) -> None:
    """A file as `osp shards` examines and cuts it, as training and evaluation decode it, and as a given picture."""
    (path,) = folder.iterdir()
    reading(probe, path)
    reading(probe, path, decode=True, threads=1)
    reading(read_clip, path, frames=1, size=_SIZE, threads=1)
    reading(read_clip, path.read_bytes(), frames=3, size=_SIZE, fps=5.0, name="clip", threads=1)
    cutting = CutSettings(0.6, 1)
    examined = reading(examine, path, cutting)
    for clip in reading(lambda: [*itertools.islice(clips_of(path, examined, cutting), 3)]) or ():
        if isinstance(clip, str):
            reading.refused.append("a piece is left out")
    if examined.reason:
        reading.refused.append(examined.reason)
    reading(PictureFiles(image=path).read, 5, *_SIZE, 8.0)


def _write(name: str, make: Callable[[], bytes], folder: Path) -> None:
    (folder / name).write_bytes(make())


_MEDIA: dict[str, Callable[[], bytes]] = {
    "h264.mp4": mp4,
    "h264.mkv": partial(encoded, "matroska", "libx264"),
    "vp8.webm": partial(encoded, "webm", "libvpx"),
    "mpeg4.avi": partial(encoded, "avi", "mpeg4"),
    "h264.mov": partial(encoded, "mov", "libx264", bf="2"),
    "mpeg2.ts": partial(encoded, "mpegts", "mpeg2video"),
    "flv1.flv": partial(encoded, "flv", "flv1"),
    "animation.gif": lambda: animated_gif(drawn(4, 6), 8.0),
    "animation.webp": animation,
    "8bit.png": lambda: encode_png(drawn(5, 1)[:, 0], "a comment"),
    "16bit.png": partial(still, "PNG16"),
    "still.jpg": partial(still, "JPEG"),
    "still.webp": partial(still, "WEBP"),
    "still.bmp": partial(still, "BMP"),
}

SUBJECTS = [Subject(name, partial(_write, name, make), read_media) for name, make in _MEDIA.items()]
