"""Pixels -> the files of still and of moving pictures, with a comment inside."""

import io

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor


def animated_gif(video: Tensor, fps: float, comment: str = "") -> bytes:
    """uint8 `C T H W` -> the bytes of a GIF that loops; an image has 0 frames a second."""
    frames = [_picture(frame) for frame in video.unbind(1)]
    file, duration = io.BytesIO(), 1000 / (fps or 1.0)
    frames[0].save(
        file, "GIF", save_all=True, append_images=frames[1:], duration=duration, loop=0, comment=comment.encode()
    )
    return file.getvalue()


def encode_png(picture: Tensor, comment: str = "") -> bytes:
    """uint8 `C H W` -> the bytes of a PNG, with the comment as its text `Comment`."""
    file, text = io.BytesIO(), PngInfo()
    if comment:
        text.add_text("Comment", comment)
    _picture(picture).save(file, "PNG", pnginfo=text)
    return file.getvalue()


def _picture(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())
