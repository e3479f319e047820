"""One picture of many clips, a few frames of each: what a model reconstructs, or what it generates."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from osp.files import write_whole

ERROR_GAIN = 5  # the error line is brightest at 255 / 5 = 51 grey levels of error and above
ERROR = f"error x{ERROR_GAIN}"
STRIP_FRAMES = 6

_CELL = 192  # pixels: a frame is scaled into a square of this side
_NAMES = 84  # width of the column where the lines of a clip are named, if they are
_GAP = 4  # between cells
_MARGIN = 28
_MIN_WIDTH = 800  # of a clip, so that its heading has room beside a strip of one frame
_TITLE, _TEXT, _SMALL = 36, 22, 17  # font sizes
_RIGHT, _WRONG = (30, 140, 60), (200, 40, 40)
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
    """A few frames of a clip, in one line or several, and what is written above them.

    `lines` are uint8 `T H W 3`, all of one shape, by the name before each; a single line may be named "". With `right`
    a green tick or a red cross stands before the key.
    """

    key: str
    numbers: str
    lines: Mapping[str, NDArray[np.uint8]]
    frame_numbers: tuple[int, ...]
    right: bool | None = None

    @classmethod
    def compare(cls, key: str, numbers: str, video: Tensor, reconstruction: Tensor) -> "SheetClip":
        """Input, output and error in evenly spaced frames, first and last among them, of two uint8 clips `C T H W`."""
        chosen = _chosen(video)
        pair = video[:, chosen].cpu(), reconstruction[:, chosen].cpu()
        lines = {"input": _pictures(pair[0]), "output": _pictures(pair[1]), ERROR: error_map(*pair)}
        return cls(key, numbers, lines, chosen)

    @classmethod
    def show(cls, key: str, numbers: str, video: Tensor, right: bool | None = None) -> "SheetClip":
        """Evenly spaced frames, first and last among them, of one uint8 clip `C T H W`."""
        chosen = _chosen(video)
        return cls(key, numbers, {"": _pictures(video[:, chosen].cpu())}, chosen, right)

    @property
    def cell(self) -> tuple[int, int]:
        """Height and width of a frame on the sheet: small ones enlarged by a whole factor, large ones shrunk."""
        height, width = next(iter(self.lines.values())).shape[1:3]
        side = max(height, width)
        if side <= _CELL:
            return height * (_CELL // side), width * (_CELL // side)
        return max(1, round(height * _CELL / side)), max(1, round(width * _CELL / side))

    @property
    def names(self) -> int:
        """Width of the column of names."""
        return _NAMES if any(self.lines) else 0

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of all that is drawn for the clip."""
        height, width = self.cell
        strip = self.names + len(self.frame_numbers) * (width + _GAP) - _GAP
        return _line(_TEXT) + _line(_SMALL) + len(self.lines) * (height + _GAP) - _GAP, max(_MIN_WIDTH, strip)


def draw_contact_sheet(clips: Sequence[SheetClip], title: str, headline: Sequence[str] = ()) -> Image.Image:
    """Clips below each other, in two columns from four clips on; `headline` stands under the title.

    A clip is a strip of frames in as many lines as it has. Frames are shrunk, or enlarged by a whole factor without
    smoothing, into cells of 192 px. Text too long for its place is cut in the middle with an ellipsis. `clips` must not
    be empty.
    """
    columns = 1 if len(clips) < 4 else 2
    rows = [clips[i : i + columns] for i in range(0, len(clips), columns)]
    heights = [max(clip.size[0] for clip in row) for row in rows]
    column_width = max(clip.size[1] for clip in clips)
    width = columns * (column_width + _MARGIN) + _MARGIN
    lines = _wrapped(headline, width - 2 * _MARGIN)
    errors = any(ERROR in clip.lines for clip in clips)
    header = _MARGIN + _line(_TITLE) + len(lines) * _line(_TEXT) + errors * _line(_SMALL) + _MARGIN
    sheet = Image.new("RGB", (width, header + sum(height + _MARGIN for height in heights)), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    _draw_header(sheet, draw, title, lines, errors)
    top = header
    for row, height in zip(rows, heights, strict=True):
        draw.line((_MARGIN, top - _MARGIN // 2, width - _MARGIN, top - _MARGIN // 2), fill=_RULE)
        for column, clip in enumerate(row):
            _draw_clip(sheet, draw, clip, (_MARGIN + column * (column_width + _MARGIN), top), column_width)
        top += height + _MARGIN
    return sheet


def write_sheet(path: Path, sheet: Image.Image) -> None:
    """Write a contact sheet as PNG, as a whole."""
    png = io.BytesIO()
    sheet.save(png, format="PNG")
    write_whole(path, png.getvalue())


def error_map(video: Tensor, reconstruction: Tensor) -> NDArray[np.uint8]:
    """Absolute error of two clips `C T H W` with values 0..255, mean over C, times 5, as colours `T H W 3`."""
    error = (video.float() - reconstruction.float()).abs().mean(dim=0).numpy() * ERROR_GAIN / 255
    steps = np.linspace(0, 1, len(_INFERNO))
    return np.stack([np.interp(error, steps, _INFERNO[:, i]) for i in range(3)], axis=-1).round().astype(np.uint8)


def _chosen(video: Tensor) -> tuple[int, ...]:
    frames = video.shape[1]
    return tuple(torch.linspace(0, frames - 1, min(frames, STRIP_FRAMES)).round().int().tolist())


def _pictures(video: Tensor) -> NDArray[np.uint8]:
    return video.permute(1, 2, 3, 0).numpy()


def _draw_header(sheet: Image.Image, draw: ImageDraw.ImageDraw, title: str, lines: Sequence[str], errors: bool) -> None:
    room = sheet.width - 2 * _MARGIN
    y = _MARGIN - 8
    for text, size in ((title, _TITLE), *((line, _TEXT) for line in lines)):
        _text(draw, (_MARGIN, y), text, size, _INK, room)
        y += _line(size)
    if not errors:
        return
    y += 2
    x = _MARGIN + _text(draw, (_MARGIN, y), f"{ERROR}:   0", _SMALL, _FAINT, room) + 8
    levels = torch.linspace(0, 255 / ERROR_GAIN, 160).expand(3, 1, 12, 160)  # the scale, drawn as an error itself
    sheet.paste(Image.fromarray(error_map(levels, torch.zeros_like(levels))[0]), (x, y + 4))
    _text(draw, (x + 168, y), f"{255 // ERROR_GAIN} or more of 255 grey levels", _SMALL, _FAINT, room)


def _draw_clip(sheet: Image.Image, draw: ImageDraw.ImageDraw, clip: SheetClip, at: tuple[int, int], room: int) -> None:
    left, top = at
    numbers_width = round(_font(_SMALL).getlength(clip.numbers))
    mark = 0 if clip.right is None else _TEXT + 8
    if clip.right is not None:
        _draw_mark(draw, (left, top + 5), clip.right)
    used = mark + _text(draw, (left + mark, top), clip.key, _TEXT, _INK, room - mark - numbers_width - 24)
    draw.text((left + used + 24, top + _TEXT), clip.numbers, font=_font(_SMALL), fill=_FAINT, anchor="ls")
    height, width = clip.cell
    frames_top = top + _line(_TEXT)
    first = frames_top + _line(_SMALL)
    for i, number in enumerate(clip.frame_numbers):
        text = f"frame {number}" if width > 60 else str(number)
        draw.text((left + clip.names + i * (width + _GAP), frames_top), text, font=_font(_SMALL), fill=_FAINT)
    for i, (name, frames) in enumerate(clip.lines.items()):
        y = first + i * (height + _GAP)
        draw.text((left, y + height // 2), name, font=_font(_SMALL), fill=_FAINT, anchor="lm")
        for j, frame in enumerate(frames):
            sheet.paste(_scaled(Image.fromarray(frame), height, width), (left + clip.names + j * (width + _GAP), y))


def _draw_mark(draw: ImageDraw.ImageDraw, at: tuple[int, int], right: bool) -> None:
    """A tick or a cross on a disc: told apart by its form too, not by colour alone."""
    x, y = at
    draw.ellipse((x, y, x + _TEXT, y + _TEXT), fill=_RIGHT if right else _WRONG)
    strokes = [((5, 12), (9, 16), (17, 7))] if right else [((6, 6), (16, 16)), ((6, 16), (16, 6))]
    for stroke in strokes:
        draw.line([(x + dx, y + dy) for dx, dy in stroke], fill=_BACKGROUND, width=3)


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
