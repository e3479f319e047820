"""One picture that shows how a model reconstructs: input, reconstruction and error of a few frames of each clip."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

ERROR_GAIN = 5  # the error line is brightest at 255 / 5 = 51 grey levels of error and above
STRIP_FRAMES = 6

_CELL = 192  # pixels: a frame is scaled into a square of this side
_NAMES = 84  # width of the column where the three lines of a clip are named
_GAP = 4  # between cells
_MARGIN = 28
_MIN_WIDTH = 800  # of a clip, so that its heading has room beside a strip of one frame
_TITLE, _TEXT, _SMALL = 36, 22, 17  # font sizes
_BACKGROUND, _INK, _FAINT, _RULE = (250, 250, 250), (25, 25, 25), (100, 100, 100), (205, 205, 205)
# matplotlib's "inferno" (Smith & van der Walt, CC0) at nine even steps: perceptually even, dark is no error
_INFERNO = np.array(
    [
        (0, 0, 4),
        (31, 12, 72),
        (85, 15, 109),
        (136, 34, 106),
        (186, 54, 85),
        (227, 89, 51),
        (249, 140, 10),
        (249, 201, 50),
        (252, 255, 164),
    ]
)


@dataclass(frozen=True)
class SheetClip:
    """A few frames of a clip and of its reconstruction: uint8 `C T H W` on the CPU, and what is written above them."""

    key: str
    numbers: str
    video: Tensor
    reconstruction: Tensor
    frame_numbers: tuple[int, ...]

    @classmethod
    def choose(cls, key: str, numbers: str, video: Tensor, reconstruction: Tensor) -> "SheetClip":
        """Keep evenly spaced frames, the first and the last among them, of two uint8 clips `C T H W`."""
        frames = video.shape[1]
        chosen = torch.linspace(0, frames - 1, min(frames, STRIP_FRAMES)).round().int().tolist()
        return cls(key, numbers, video[:, chosen].cpu(), reconstruction[:, chosen].cpu(), tuple(chosen))

    @property
    def cell(self) -> tuple[int, int]:
        """Height and width of a frame on the sheet: small ones enlarged by a whole factor, large ones shrunk."""
        height, width = self.video.shape[-2:]
        side = max(height, width)
        if side <= _CELL:
            return height * (_CELL // side), width * (_CELL // side)
        return max(1, round(height * _CELL / side)), max(1, round(width * _CELL / side))

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of all that is drawn for the clip."""
        height, width = self.cell
        strip = _NAMES + len(self.frame_numbers) * (width + _GAP) - _GAP
        return _line(_TEXT) + _line(_SMALL) + 3 * (height + _GAP) - _GAP, max(_MIN_WIDTH, strip)


def draw_contact_sheet(clips: Sequence[SheetClip], title: str, headline: Sequence[str] = ()) -> Image.Image:
    """Clips below each other, in two columns from four clips on; `headline` stands under the title.

    A clip is a strip of frames in three lines: input, output, absolute error times 5. Frames are shrunk, or enlarged
    by a whole factor without smoothing, into cells of 192 px. Text too long for its place is cut in the middle with
    an ellipsis. `clips` must not be empty.
    """
    columns = 1 if len(clips) < 4 else 2
    rows = [clips[i : i + columns] for i in range(0, len(clips), columns)]
    heights = [max(clip.size[0] for clip in row) for row in rows]
    column_width = max(clip.size[1] for clip in clips)
    width = columns * (column_width + _MARGIN) + _MARGIN
    lines = _wrapped(headline, width - 2 * _MARGIN)
    header = _MARGIN + _line(_TITLE) + len(lines) * _line(_TEXT) + _line(_SMALL) + _MARGIN
    sheet = Image.new("RGB", (width, header + sum(height + _MARGIN for height in heights)), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    _draw_header(sheet, draw, title, lines)
    top = header
    for row, height in zip(rows, heights, strict=True):
        draw.line((_MARGIN, top - _MARGIN // 2, width - _MARGIN, top - _MARGIN // 2), fill=_RULE)
        for column, clip in enumerate(row):
            _draw_clip(sheet, draw, clip, (_MARGIN + column * (column_width + _MARGIN), top), column_width)
        top += height + _MARGIN
    return sheet


def error_map(video: Tensor, reconstruction: Tensor) -> NDArray[np.uint8]:
    """Absolute error of two clips `C T H W` with values 0..255, mean over C, times 5, as colours `T H W 3`."""
    error = (video.float() - reconstruction.float()).abs().mean(dim=0).numpy() * ERROR_GAIN / 255
    steps = np.linspace(0, 1, len(_INFERNO))
    return np.stack([np.interp(error, steps, _INFERNO[:, i]) for i in range(3)], axis=-1).round().astype(np.uint8)


def _draw_header(sheet: Image.Image, draw: ImageDraw.ImageDraw, title: str, lines: Sequence[str]) -> None:
    room = sheet.width - 2 * _MARGIN
    y = _MARGIN - 8
    for text, size in ((title, _TITLE), *((line, _TEXT) for line in lines)):
        _text(draw, (_MARGIN, y), text, size, _INK, room)
        y += _line(size)
    y += 2
    x = _MARGIN + _text(draw, (_MARGIN, y), f"error x{ERROR_GAIN}:   0", _SMALL, _FAINT, room) + 8
    levels = torch.linspace(0, 255 / ERROR_GAIN, 160).expand(3, 1, 12, 160)  # the scale, drawn as an error itself
    sheet.paste(Image.fromarray(error_map(levels, torch.zeros_like(levels))[0]), (x, y + 4))
    _text(draw, (x + 168, y), f"{255 // ERROR_GAIN} or more of 255 grey levels", _SMALL, _FAINT, room)


def _draw_clip(sheet: Image.Image, draw: ImageDraw.ImageDraw, clip: SheetClip, at: tuple[int, int], room: int) -> None:
    left, top = at
    numbers_width = round(_font(_SMALL).getlength(clip.numbers))
    used = _text(draw, (left, top), clip.key, _TEXT, _INK, room - numbers_width - 24)
    draw.text((left + used + 24, top + _TEXT), clip.numbers, font=_font(_SMALL), fill=_FAINT, anchor="ls")
    height, width = clip.cell
    frames_top = top + _line(_TEXT)
    first = frames_top + _line(_SMALL)
    for i, number in enumerate(clip.frame_numbers):
        text = f"frame {number}" if width > 60 else str(number)
        draw.text((left + _NAMES + i * (width + _GAP), frames_top), text, font=_font(_SMALL), fill=_FAINT)
    lines = {
        "input": clip.video.permute(1, 2, 3, 0).numpy(),
        "output": clip.reconstruction.permute(1, 2, 3, 0).numpy(),
        f"error x{ERROR_GAIN}": error_map(clip.video, clip.reconstruction),
    }
    for i, (name, frames) in enumerate(lines.items()):
        y = first + i * (height + _GAP)
        draw.text((left, y + height // 2), name, font=_font(_SMALL), fill=_FAINT, anchor="lm")
        for j, frame in enumerate(frames):
            sheet.paste(_scaled(Image.fromarray(frame), height, width), (left + _NAMES + j * (width + _GAP), y))


def _scaled(frame: Image.Image, height: int, width: int) -> Image.Image:
    smoothing = Image.Resampling.NEAREST if height >= frame.height else Image.Resampling.LANCZOS
    return frame.resize((width, height), smoothing)


def _wrapped(parts: Sequence[str], room: int) -> list[str]:
    """The parts in as few lines as they fit into, none of them broken."""
    lines: list[str] = []
    for part in parts:
        longer = f"{lines[-1]}     {part}" if lines else part
        if lines and _font(_TEXT).getlength(longer) <= room:
            lines[-1] = longer
        else:
            lines.append(part)
    return lines


def _text(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, size: int, colour: tuple[int, int, int], room: int
) -> int:
    """Draw text shortened to `room` pixels; its width."""
    font = _font(size)
    keep = len(text)
    shown = text
    while keep > 1 and font.getlength(shown) > room:
        keep -= 1
        shown = f"{text[: (keep + 1) // 2]}…{text[len(text) - keep // 2 :]}"
    draw.text(at, shown, font=font, fill=colour)
    return round(font.getlength(shown))


def _line(size: int) -> int:
    """Height of a line of text of this font size."""
    return round(size * 1.5)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
