"""Pixels -> MP4 files of H.264, near transparent or without loss."""

import io
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from numpy.typing import NDArray
from torch import Tensor

from osp.data.media.frames import SCALING
from osp.data.media.tensors import to_uint8
from osp.errors import UsageError
from osp.files import write_whole


def write_video(path: Path, video: Tensor, fps: float, *, lossless: bool = False) -> None:
    """Writes `C T H W` (uint8, or float in [-1, 1]) to `path` as MP4; the file appears whole or not at all.

    See `encode_video` for the encoding.
    """
    write_whole(path, encode_video(video, fps, lossless=lossless))


def encode_video(video: Tensor, fps: float, *, lossless: bool = False, threads: int = 0, comment: str = "") -> bytes:
    """Encodes `C T H W` (uint8, or float in [-1, 1]) as H.264 in MP4, with a comment in the container if there is one.

    Lossy is near transparent (CRF 14), BT.709, 4:2:0 for even sizes and 4:4:4 for odd ones, which 4:2:0 cannot hold.
    Lossless is H.264 RGB: the same values come back. The same input, with `threads` 1, gives the same bytes anywhere.

    Raises:
        UsageError: not three channels, no frame, or a rate that is not positive.
    """
    if video.ndim != 4 or video.shape[0] != 3 or 0 in video.shape or not fps > 0:
        raise UsageError(f"a video to write must be 3 T H W at a positive rate, not {tuple(video.shape)} at fps={fps}")
    pixels = (to_uint8(video) if video.is_floating_point() else video).permute(1, 2, 3, 0).contiguous().cpu().numpy()
    rate = Fraction(fps).limit_denominator(1001)
    return encode_pictures(enumerate(pixels), rate, 1 / rate, lossless=lossless, threads=threads, comment=comment)


def encode_pictures(
    pictures: Iterable[tuple[int, NDArray[np.uint8]]],
    rate: Fraction,
    time_base: Fraction,
    *,
    lossless: bool = False,
    threads: int = 0,
    comment: str = "",
) -> bytes:
    """`encode_video` for a stream of (timestamp in `time_base`, `H W C`), which is never held as a whole."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        if comment:
            container.metadata["comment"] = comment
        # Without mbtree: its vector code reads past the end of small pictures, and the bytes then differ by chance.
        codec, options = "libx264", {"crf": "14", "preset": "medium", "mbtree": "0"}
        if lossless:
            codec, options = "libx264rgb", {"qp": "0", "preset": "veryfast"}
        stream = cast(av.VideoStream, container.add_stream(codec, rate=rate, options=options))
        stream.codec_context.time_base = time_base
        stream.codec_context.thread_count = threads
        reformatter = VideoReformatter()
        opened = False
        for timestamp, picture in pictures:
            if not opened:
                opened = True
                stream.height, stream.width = picture.shape[:2]
                even = stream.height % 2 == stream.width % 2 == 0
                stream.pix_fmt = "rgb24" if lossless else "yuv420p" if even else "yuv444p"
                if not lossless:
                    stream.codec_context.colorspace = Colorspace.ITU709
                    stream.codec_context.color_range = ColorRange.MPEG
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if not lossless:
                frame = reformatter.reformat(
                    frame,
                    format=stream.pix_fmt,
                    dst_colorspace=Colorspace.ITU709,
                    dst_color_range=ColorRange.MPEG,
                    interpolation=SCALING,
                    threads=1,
                )
            frame.pts, frame.time_base = timestamp, time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()
