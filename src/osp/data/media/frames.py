"""Decoded frames -> pixels as displayed: one field of two, over white, in square pixels, turned, at the asked size."""

import struct
from fractions import Fraction
from typing import cast

import av
import av.filter
import numpy as np
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter
from numpy.typing import NDArray

from osp.data.media.errors import ClipError, told
from osp.data.media.limits import DEFAULT_LIMITS, Limits
from osp.data.media.part import WHOLE, Part

SCALING = (
    Interpolation.BICUBIC  # its kernel widens with the scale when it shrinks: antialiased
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.FULL_CHR_H_INP
    | Interpolation.ACCURATE_RND
    | Interpolation.BITEXACT  # the same pixels on every CPU
)
BACKGROUND = 255  # white: what shows where a picture is transparent
# AVColorSpace values that swscale converts as they are tagged; BT.2020 constant luminance (10) is close to 9.
_TAGGED_MATRICES = frozenset({1, 4, 5, 6, 7, 9})
_BT2020_CONSTANT_LUMINANCE = 10


class Display:
    """How the frames of one file are shown.

    Args:
        name: what errors call the file.
        aspect: width of a pixel by its height.
        size: (height, width) to cover; None: the displayed size of each frame.
        part: of which the rectangle is shown; it is cropped first, and then scaled.
    """

    def __init__(
        self,
        name: str,
        aspect: Fraction = Fraction(1),
        size: tuple[int, int] | None = None,
        limits: Limits = DEFAULT_LIMITS,
        part: Part = WHOLE,
    ) -> None:
        self.name, self.aspect, self.size, self.limits, self.part = name, aspect, size, limits, part
        self._reformatter, self._scaler = VideoReformatter(), VideoReformatter()
        self._fields = _Fields()

    def shown_size(self, frame: av.VideoFrame) -> tuple[int, int]:
        """(height, width) of a frame in square pixels, after rotation. Raises ClipError beyond the limits."""
        height, width = frame.height, max(1, round(frame.width * self.aspect))
        self.limits.check_pixels(self.name, width, height, "its frames are shown as")
        return (width, height) if _orientation(frame)[0] else (height, width)

    def pixels(self, frame: av.VideoFrame) -> NDArray[np.uint8]:
        """One frame, `H W C`: one field where it is interlaced, over white, converted, scaled, cropped, turned.

        Raises ClipError for a pixel format that cannot be converted, a part that is not there, and beyond the limits.
        """
        if self.part.crop is None:
            picture = self._converted(frame, self._covering(self.shown_size(frame)))
        else:
            picture = self.part.cropped(self._converted(frame, self.shown_size(frame)), self.name)
            picture = self._scaled(picture, self._covering((picture.shape[0], picture.shape[1])))
        return picture if self.size is None else crop(picture, self.size)

    def _covering(self, shown: tuple[int, int]) -> tuple[int, int]:
        """The (height, width) that pictures of a size are scaled to."""
        height, width = shown if self.size is None else cover(shown, self.size)
        self.limits.check_pixels(self.name, width, height, f"covering {self.size} its frames are")
        return height, width

    def _scaled(self, picture: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
        """A picture `H W 3` in another (height, width)."""
        if picture.shape[:2] == size:
            return picture
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        scaled = self._scaler.reformat(
            frame, width=size[1], height=size[0], format="rgb24", interpolation=SCALING, threads=1
        )
        return cast(NDArray[np.uint8], scaled.to_ndarray())

    def _converted(self, frame: av.VideoFrame, size: tuple[int, int]) -> NDArray[np.uint8]:
        """The whole of a frame as it is shown, in a (height, width)."""
        swap, flip_rows, flip_columns = _orientation(frame)
        height, width = size
        coded_height, coded_width = (width, height) if swap else (height, width)
        try:
            matrix = _matrix(frame)
            if frame.interlaced_frame and frame.height > 1:
                frame = self._fields.first(frame)
            if any(component.is_alpha for component in frame.format.components) or frame.format.has_palette:
                frame = self._opaque(frame, matrix)
            converted = self._reformatter.reformat(
                frame,
                width=coded_width,
                height=coded_height,
                format="rgb24",
                src_colorspace=None if frame.format.is_rgb else matrix,
                interpolation=SCALING,
                threads=1,
            )
            picture = cast(NDArray[np.uint8], converted.to_ndarray())
        except (av.FFmpegError, ValueError) as error:
            reason = f"pixel format {frame.format.name} cannot be converted ({told(error)})"
            raise ClipError(self.name, reason) from error
        if swap:
            picture = picture.transpose(1, 0, 2)
        if flip_rows:
            picture = picture[::-1]
        if flip_columns:
            picture = picture[:, ::-1]
        return picture

    def _opaque(self, frame: av.VideoFrame, matrix: Colorspace | None) -> av.VideoFrame:
        """The frame itself if all of it is opaque, else its pixels laid over white."""
        converted = VideoReformatter().reformat(
            frame, format="rgba", src_colorspace=matrix, interpolation=SCALING, threads=1
        )
        rgba = cast(NDArray[np.uint8], converted.to_ndarray())
        if rgba[..., 3].min() == 255:
            return frame
        return av.VideoFrame.from_ndarray(over_background(rgba), format="rgb24")


class _Fields:
    """Takes frames apart into their fields, lines of two moments; made anew where size or format change."""

    def __init__(self) -> None:
        self._kind: tuple[int, int, str] | None = None
        self._graph: av.filter.Graph | None = None

    def first(self, frame: av.VideoFrame) -> av.VideoFrame:
        """The upper lines of an interlaced frame, half as high: all of one moment, whatever frames came before."""
        kind = (frame.width, frame.height, frame.format.name)
        if self._graph is None or kind != self._kind:
            graph = av.filter.Graph()
            source = graph.add_buffer(
                width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 1000)
            )
            field, sink = graph.add("field", "type=top"), graph.add("buffersink")
            source.link_to(field)
            field.link_to(sink)
            graph.configure()
            self._graph, self._kind = graph, kind
        self._graph.push(frame)
        return cast(av.VideoFrame, self._graph.pull())


def over_background(rgba: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """`H W 3` of `H W 4` with straight alpha, laid over white."""
    alpha = rgba[..., 3:].astype(np.uint16)
    blended = (rgba[..., :3] * alpha + BACKGROUND * (255 - alpha) + 127) // 255
    return blended.astype(np.uint8)


def cover(displayed: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """The (height, width) that covers `size` and keeps the aspect."""
    scale = max(size[0] / displayed[0], size[1] / displayed[1])
    return max(size[0], round(displayed[0] * scale)), max(size[1], round(displayed[1] * scale))


def crop(picture: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """The middle of a picture `H W C`."""
    top, left = (picture.shape[0] - size[0]) // 2, (picture.shape[1] - size[1]) // 2
    return picture[top : top + size[0], left : left + size[1]]


def _orientation(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """(swap rows and columns, then flip rows, then flip columns) by the frame's display matrix.

    The matrix maps a pixel (x, y) to (a x + c y, b x + d y); angles between the right ones do not occur in practice
    and are taken to the nearest.
    """
    side_data = frame.side_data.get("DISPLAYMATRIX")
    if side_data is None:
        return False, False, False
    a, b, _, c, d = struct.unpack("=5i", bytes(cast(bytes, side_data))[:20])
    if abs(a) >= abs(b):
        return False, d < 0, a < 0
    return True, b < 0, c < 0


def _matrix(frame: av.VideoFrame) -> Colorspace | None:
    """The YUV matrix to assume, None for the frame's own. Untagged video is BT.709 from HD sizes on, as in players."""
    if frame.format.is_rgb or frame.colorspace in _TAGGED_MATRICES:
        return None
    if frame.colorspace == _BT2020_CONSTANT_LUMINANCE:
        return Colorspace.BT2020
    return Colorspace.ITU709 if frame.width >= 1280 or frame.height > 576 else Colorspace.ITU601
