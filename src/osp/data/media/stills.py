"""Files that Pillow reads: still pictures, and animations of WebP, PNG and AVIF. Pixels are RGB, as displayed.

Transparent pictures are laid over white. Grey of 16 bits is scaled to 8, not cut off.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from osp.data.media.errors import ClipError, told
from osp.data.media.frames import BACKGROUND, cover, crop
from osp.data.media.limits import DEFAULT_LIMITS, Limits
from osp.data.media.part import WHOLE, Part

# `Limits.frame_pixels` takes the place of Pillow's own limit, which no setting could raise.
Image.MAX_IMAGE_PIXELS = None

# JPEG brings MPO along. No others: some of Pillow's readers start programs (EPS).
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000")
_MAGIC = (
    b"\xff\xd8\xff",  # JPEG
    b"\x89PNG\r\n",
    b"BM",
    b"II*\0",  # TIFF
    b"MM\0*",
    b"\0\0\0\x0cjP  \r\n\x87\n",  # JPEG 2000
    b"\xff\x4f\xff\x51",
)
_AVIF = (b"avif", b"avis")
_HEIF = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_ANIMATED = frozenset({"WEBP", "PNG", "AVIF"})
_NO_DURATION = 100.0  # milliseconds of a frame that has none, as browsers show it
_WEBP_ANIMATION = 2  # a flag of its header
_SUBFILE_TYPE, _BITS_PER_SAMPLE = 254, 258  # tags of TIFF


def is_picture(source: Path | bytes, name: str) -> bool:
    """Whether Pillow reads it, by the first bytes: JPEG, PNG, WebP, BMP, TIFF, AVIF, JPEG 2000; animations too.

    Raises ClipError for a file that cannot be opened, and for HEIC.
    """
    try:
        head = source[:32] if isinstance(source, bytes) else _head(source)
    except OSError as error:
        raise ClipError(name, f"cannot be opened ({error.strerror})") from error
    if head[4:8] == b"ftyp":
        if head[8:12] in _HEIF and not any(brand in head[16:] for brand in _AVIF):
            raise ClipError(name, "is a HEIC picture, which cannot be read; convert it to JPEG, PNG or AVIF")
        return head[8:12] in _AVIF or head[8:12] in _HEIF
    return head.startswith(_MAGIC) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def _head(path: Path) -> bytes:
    if not path.is_file() and path.exists():
        raise OSError(0, "no regular file")
    with open(path, "rb") as file:
        return file.read(32)


@contextmanager
def _opened(source: Path | bytes, name: str, limits: Limits) -> Iterator[Image.Image]:
    """The picture, of which no more than the header is read; what Pillow raises within comes out as ClipError."""
    try:
        with Image.open(source if isinstance(source, Path) else io.BytesIO(source), formats=_FORMATS) as image:
            limits.check_pixels(name, *image.size, "is a picture of")
            yield image
    except ClipError:
        raise
    except Exception as error:
        raise ClipError(name, f"not a readable image ({told(error)})") from error


# --- animations -------------------------------------------------------------------------------------------------------


def is_animation(source: Path | bytes, name: str, limits: Limits = DEFAULT_LIMITS) -> bool:
    """Whether a file that Pillow reads has several frames in time. Raises ClipError if it is unreadable."""
    head = source[:32] if isinstance(source, bytes) else _head(source)
    if head[:4] == b"RIFF" and not (head[12:16] == b"VP8X" and any(flag & _WEBP_ANIMATION for flag in head[20:21])):
        return False  # Pillow would read the whole file to tell
    with _opened(source, name, limits) as image:
        return _moving_frames(image) > 1


def animation(
    source: Path | bytes, name: str, limits: Limits = DEFAULT_LIMITS
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """(Milliseconds after the first, `H W 4`) of each frame of an animation. Raises ClipError at damage."""
    with _opened(source, name, limits) as image:
        first = _default_pictures(image)
        limits.check_frames(name, _moving_frames(image))
        at = 0.0
        for index in range(first, _frames(image)):
            image.seek(index)
            yield round(at), np.asarray(image.convert("RGBA"))
            at += max(float(image.info.get("duration", 0)), 0) or _NO_DURATION


def _frames(image: Image.Image) -> int:
    return int(getattr(image, "n_frames", 1)) if image.format in _ANIMATED else 1


def _default_pictures(image: Image.Image) -> int:
    """1 for a PNG with a picture before its animation, for viewers that show none; else 0."""
    return int(image.format == "PNG" and _frames(image) > 1 and bool(image.info.get("default_image")))


def _moving_frames(image: Image.Image) -> int:
    return _frames(image) - _default_pictures(image)


# --- stills -----------------------------------------------------------------------------------------------------------


def open_still(source: Path | bytes, name: str, limits: Limits = DEFAULT_LIMITS) -> tuple[Image.Image, str]:
    """The decoded picture, turned as its EXIF tag says, RGB, and its format's name.

    Raises ClipError if it is unreadable, too large, or has several pages.
    """
    with _opened(source, name, limits) as image:
        codec = (image.format or "").lower()
        _check_pages(image, name)
        depth = _depth(image)
        return _rgb(ImageOps.exif_transpose(image), depth, name), codec


def still_pixels(
    image: Image.Image, size: tuple[int, int] | None, name: str, limits: Limits, part: Part = WHOLE
) -> Tensor:
    """uint8 `C H W` of the part of an RGB picture, scaled to cover `size` and cropped. Raises ClipError beyond it."""
    if part.cut is not None:
        part.taken([0], name)
    if part.crop is not None:
        part.size((image.height, image.width), name)
        x0, x1, y0, y1 = part.crop
        image = image.crop((x0, y0, x1, y1))
    if size is not None:
        height, width = cover((image.height, image.width), size)
        limits.check_pixels(name, width, height, f"covering {size} it is")
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    return torch.from_numpy((pixels if size is None else crop(pixels, size)).transpose(2, 0, 1).copy())


def _check_pages(image: Image.Image, name: str) -> None:
    """Raise ClipError for a TIFF of several pages; smaller versions of the first page are none."""
    if image.format != "TIFF":
        return
    try:
        image.seek(1)
    except EOFError:
        return
    reduced = int(image.tag_v2.get(_SUBFILE_TYPE, 0)) & 1  # type: ignore[attr-defined]
    image.seek(0)
    if not reduced:
        raise ClipError(name, "is a TIFF of several pages; save each as a file of its own")


def _depth(image: Image.Image) -> int:
    """Bits of a grey picture's whole numbers."""
    if image.format == "TIFF":
        bits = image.tag_v2.get(_BITS_PER_SAMPLE, (16,))  # type: ignore[attr-defined]
        return int(bits[0] if isinstance(bits, tuple) else bits)
    return 16


def _rgb(image: Image.Image, depth: int, name: str) -> Image.Image:
    """A picture of any mode as RGB, 8 bits, over white."""
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_grey(np.asarray(image), depth, name)).convert("RGB")
    if image.has_transparency_data:
        background = Image.new("RGBA", image.size, (BACKGROUND,) * 3 + (255,))
        return Image.alpha_composite(background, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _grey(values: NDArray[np.generic], depth: int, name: str) -> NDArray[np.uint8]:
    """Grey of more than 8 bits as 8: whole numbers by their depth, floating ones from 0 to 1."""
    numbers = values.astype(np.float64)
    white = 1.0 if np.issubdtype(values.dtype, np.floating) else 2.0**depth - 1
    if not (np.isfinite(numbers).all() and numbers.min() >= 0 and numbers.max() <= white):
        raise ClipError(
            name, f"has grey values from {numbers.min():g} to {numbers.max():g}, which should lie from 0 to {white:g}"
        )
    return np.rint(numbers * (255 / white)).astype(np.uint8)
