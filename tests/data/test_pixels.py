"""Pictures as displayed: depth, transparency, the aspect of pixels, interlacing, animations."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from osp.data.media.clips import Clip, CutSettings, clips_of, examine
from osp.data.media.video import ClipError, probe, read_clip

MakeVideo = Callable[..., Path]
Pixels = NDArray[np.uint8]
GREEN, WHITE = (0, 200, 0), (255, 255, 255)


def written(
    path: Path,
    pictures: list[Pixels],
    codec: str = "libx264",
    pixels: str = "yuv420p",
    options: dict[str, str] | None = None,
    aspect: Fraction | None = None,
    rotation: float = 0,
) -> Path:
    """A video of RGB or RGBA pictures at 25 fps."""
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    given = "rgba" if pictures[0].shape[-1] == 4 else "rgb24"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pixels
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if rotation:
            stream.set_display_rotation(rotation)
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format=given).reformat(format=pixels)
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def cut(path: Path, seconds: float) -> list[Clip]:
    settings = CutSettings(seconds, 1)
    clips = [*clips_of(path, examine(path, settings), settings)]
    assert all(isinstance(clip, Clip) for clip in clips), clips
    return [clip for clip in clips if isinstance(clip, Clip)]


def see_through() -> Pixels:
    """Opaque green in the middle of transparent magenta."""
    picture = np.zeros((48, 64, 4), np.uint8)
    picture[...] = (255, 0, 255, 0)
    picture[12:36, 16:48] = (*GREEN, 255)
    return picture


# --- depth ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_grey_of_16_bits_is_scaled_to_8(tmp_path: Path, suffix: str) -> None:
    ramp = np.linspace(0, 65535, 64 * 96).round().astype(np.uint16).reshape(64, 96)
    Image.fromarray(ramp).save(tmp_path / f"ramp.{suffix}")
    read = read_clip(tmp_path / f"ramp.{suffix}", frames=1)[:, 0].numpy()
    assert np.abs(read - ramp / 257).max() <= 0.5
    assert (read == read[:1]).all()


def test_floating_grey_lies_between_0_and_1_or_is_refused(tmp_path: Path) -> None:
    ramp = np.linspace(0, 1, 48, dtype=np.float32).reshape(6, 8)
    Image.fromarray(ramp).save(tmp_path / "unit.tiff")
    assert np.abs(read_clip(tmp_path / "unit.tiff", frames=1)[0, 0].numpy() - ramp * 255).max() <= 0.5
    for name, values in (("wide", ramp * 300), ("nan", np.full_like(ramp, np.nan))):
        Image.fromarray(values).save(tmp_path / f"{name}.tiff")
        with pytest.raises(ClipError, match=r"grey values from .* should lie from 0 to 1"):
            read_clip(tmp_path / f"{name}.tiff", frames=1)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_every_mode_of_a_still_is_read(tmp_path: Path, mode: str) -> None:
    picture = Image.new("RGB", (24, 16), (255, 255, 255))
    picture.paste((0, 0, 0), (0, 0, 12, 16))
    path = tmp_path / "still.tiff"
    picture.convert(mode).save(path)
    read = read_clip(path, frames=1)[:, 0]
    assert read[:, :, :12].max() <= 1
    assert read[:, :, 12:].min() >= 254


# --- transparency -----------------------------------------------------------------------------------------------------


def test_transparent_stills_are_laid_over_white(tmp_path: Path) -> None:
    rgba = Image.fromarray(see_through())
    rgba.save(tmp_path / "rgba.png")
    rgba.save(tmp_path / "rgba.webp", lossless=True, exact=True)
    rgba.quantize(8).save(tmp_path / "palette.png", transparency=0)
    rgba.convert("RGB").save(tmp_path / "key.png", transparency=(255, 0, 255))
    for name in ("rgba.png", "rgba.webp", "palette.png", "key.png"):
        read = read_clip(tmp_path / name, frames=1)[:, 0]
        assert tuple(read[:, 0, 0].tolist()) == WHITE, name
        assert tuple(read[:, 24, 32].tolist()) == GREEN, name
    ramp = np.broadcast_to(np.arange(96) * 2, (64, 96))
    Image.fromarray(np.stack([np.zeros((64, 96)), ramp], -1).astype(np.uint8), "LA").save(tmp_path / "grey.png")
    assert read_clip(tmp_path / "grey.png", frames=1)[0, 0, 0, ::32].tolist() == [255, 191, 127]


@pytest.mark.parametrize(
    ("name", "codec", "pixels"),
    [
        ("vp9.webm", "libvpx-vp9", "yuva420p"),
        ("vp8.webm", "libvpx", "yuva420p"),
        ("prores.mov", "prores_ks", "yuva444p10le"),
        ("png.mov", "png", "rgba"),
        ("ffv1.mkv", "ffv1", "yuva420p"),
    ],
)
def test_transparent_videos_are_laid_over_white(tmp_path: Path, name: str, codec: str, pixels: str) -> None:
    options = {"auto-alt-ref": "0"} if "vpx" in codec else {}
    path = written(tmp_path / name, [see_through()] * 6, codec, pixels, options)
    for source in (path, *(clip.data for clip in cut(path, 0.12))):
        read = read_clip(source, frames=2).int()
        assert (read[:, :, 0, 0] - 255).abs().max() <= 2
        assert (read[:, 0, 24, 32] - torch.tensor(GREEN)).abs().max() <= 3


def test_a_gif_is_laid_over_white(tmp_path: Path) -> None:
    pictures = [Image.fromarray(see_through()) for _ in range(3)]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], disposal=2, duration=100)
    read = read_clip(tmp_path / "a.gif", frames=probe(tmp_path / "a.gif").frames)
    assert tuple(read[:, 0, 0, 0].tolist()) == WHITE
    assert tuple(read[:, 0, 24, 32].tolist()) == GREEN


# --- the aspect of pixels ---------------------------------------------------------------------------------------------


def disc(aspect: float) -> Pixels:
    """A disc that is round, 60 pixels high, where pixels are so wide."""
    rows, columns = np.mgrid[:96, :72]
    inside = ((columns - 36) * aspect) ** 2 + (rows - 48) ** 2 < 30**2
    return (inside[..., None] * np.full(3, 255)).astype(np.uint8)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts", ".avi"])
@pytest.mark.parametrize(("aspect", "rotation"), [((16, 9), 0), ((8, 9), 0), ((4, 3), 90)])
def test_pixels_that_are_not_square_become_square(
    tmp_path: Path, suffix: str, aspect: tuple[int, int], rotation: int
) -> None:
    if rotation and suffix not in (".mp4", ".mkv"):
        pytest.skip("this container has no rotation")
    ratio = Fraction(*aspect)
    path = written(
        tmp_path / f"disc{suffix}", [disc(float(ratio))] * 12, options={"g": "4"}, aspect=ratio, rotation=rotation
    )
    shown = (round(72 * ratio), 96)
    clips = cut(path, 0.2)
    assert len(clips) > 1
    for source in (path, *(clip.data for clip in clips)):
        info = probe(source)
        assert (info.width, info.height) == (shown[::-1] if rotation else shown)
        lit = read_clip(source, frames=1)[0, 0] > 128
        wide, high = int(lit.any(0).sum()), int(lit.any(1).sum())
        assert abs(wide - high) <= 2
        small = read_clip(source, frames=1, size=(32, 32))[0, 0] > 128
        assert abs(int(small.any(0).sum()) - int(small.any(1).sum())) <= 2


@pytest.mark.parametrize("aspect", [(1, 40), (40, 1)])
def test_an_aspect_that_cannot_be_meant_is_square_and_told(tmp_path: Path, aspect: tuple[int, int]) -> None:
    path = written(tmp_path / "a.mp4", [disc(1)] * 3, aspect=Fraction(*aspect))
    assert (probe(path).width, probe(path).height) == (72, 96)
    assert (
        examine(path, CutSettings(10, 1)).note == f"pixels of {aspect[0]}:{aspect[1]} cannot be meant, read as square"
    )


# --- interlacing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.mp4", "a.ts"])
def test_of_interlaced_frames_one_field_is_shown(tmp_path: Path, name: str) -> None:
    pictures = []
    for number in range(8):
        picture = np.zeros((64, 96, 3), np.uint8)
        for field in range(2):  # the bar moves between the fields of a frame
            picture[field::2, 4 * (2 * number + field) :][:, :8] = 255
        pictures.append(picture)
    path = written(tmp_path / name, pictures, options={"x264-params": "tff=1:interlaced=1", "crf": "4"})
    video = read_clip(path, frames=8)
    assert video.shape == (3, 8, 64, 96)
    for number in range(8):
        lit = video[0, number] > 128
        assert set(lit.sum(1).tolist()) == {8}  # no combs
        assert lit[0, 8 * number : 8 * number + 8].all()
    assert torch.equal(read_clip(path, frames=3, start=4 / 25), video[:, 4:7])


# --- animations -------------------------------------------------------------------------------------------------------


def animated(path: Path, durations: list[int], **settings: object) -> list[Pixels]:
    pictures = [np.full((32, 48, 3), 20 * number, np.uint8) for number in range(len(durations))]
    frames = [Image.fromarray(picture) for picture in pictures]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, **settings)
    return pictures


@pytest.mark.parametrize("name", ["a.webp", "a.png", "a.avif"])
def test_animations_are_videos_with_their_durations(tmp_path: Path, name: str) -> None:
    durations = [100, 50, 50, 200, 100, 100, 40, 60, 100]
    settings = {"lossless": True} if name.endswith("webp") else {"quality": 100} if name.endswith("avif") else {}
    pictures = animated(tmp_path / name, durations, **settings)
    info = probe(tmp_path / name, decode=True)
    assert (info.frames, info.width, info.height, info.kind) == (9, 48, 32, "video")
    assert info.fps == pytest.approx(8 / 0.7)
    full = read_clip(tmp_path / name, frames=9)
    assert np.abs(full[0, :, 16, 24].int().numpy() - [20 * number for number in range(9)]).max() <= 2
    assert torch.equal(read_clip(tmp_path / name, frames=2, start=0.4), full[:, 4:6])
    clips = cut(tmp_path / name, 0.3)
    assert [clip.suffix for clip in clips] == ["mp4"] * len(clips)
    assert sum(clip.info.frames for clip in clips) == len(pictures)
    assert torch.equal(torch.cat([read_clip(clip.data, frames=clip.info.frames) for clip in clips], 1), full)


def test_an_animation_of_one_frame_is_a_still(tmp_path: Path) -> None:
    for name in ("a.webp", "a.png"):
        animated(tmp_path / name, [100])
        assert probe(tmp_path / name).kind == "image"


def test_pages_and_heic_are_refused_in_one_line(tmp_path: Path) -> None:
    pages = [Image.new("RGB", (8, 8), (number, 0, 0)) for number in range(2)]
    pages[0].save(tmp_path / "pages.tiff", save_all=True, append_images=pages[1:])
    with pytest.raises(ClipError, match="is a TIFF of several pages; save each"):
        read_clip(tmp_path / "pages.tiff", frames=1)
    (tmp_path / "phone.jpg").write_bytes(b"\0\0\0\x18ftypheic" + bytes(64))
    with pytest.raises(ClipError, match="is a HEIC picture, which cannot be read; convert it"):
        probe(tmp_path / "phone.jpg")


def test_a_webp_that_ends_in_its_header_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.webp"
    file.write_bytes(b"RIFF\x08\0\0\0WEBPVP8X")
    with pytest.raises(ClipError, match="not a readable image"):
        probe(file)
