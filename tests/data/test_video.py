"""Decoding against plain full decodes and plain arithmetic; encoding against decoding."""

import io
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from osp.data.media.container import Decoded
from osp.data.media.video import ClipError, encode_video, probe, read_clip, to_float, to_uint8, write_video
from osp.errors import UsageError

MakeVideo = Callable[..., Path]
GOOD = {  # name: (frames, fps, width, height)
    "av1_video.mkv": (125, 25.0, 640, 360),
    "bt601_full_range.mp4": (60, 30.0, 320, 240),
    "flipping_a_pancake.mkv": (310, 30.0, 426, 240),
    "h264_10bits.mp4": (30, 30.0, 200, 200),
    "man_in_street.mp4": (129, 24.0, 832, 480),
    "nasa_13013.mp4": (325, 25.0, 320, 180),
    "nasa_13013_rotated.mp4": (17, 30000 / 1001, 270, 480),
    "test_non_zero_start.mp4": (12, 30.0, 200, 112),
    "testsrc2_odd_height_and_width_vp9.mp4": (25, 25.0, 321, 241),
}
SHORT_GOP = {"g": "6", "bf": "2"}


def smooth(frames: int, height: int, width: int) -> Tensor:
    """A smooth random clip, uint8 `C T H W`."""
    coarse = torch.rand(1, 3, 3, 4, 5, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return to_uint8(torch.nn.functional.interpolate(coarse, size=(frames, height, width), mode="trilinear")[0])


def times(path: Path) -> list[float]:
    with av.open(str(path)) as container:
        stamps = [float(frame.pts * frame.time_base) for frame in container.decode(video=0)]
    return [stamp - stamps[0] for stamp in stamps]


# --- probing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOOD)
def test_probe_of_real_clips_is_the_same_with_and_without_decoding(shared: Path, name: str) -> None:
    path = shared / "clips" / "good" / name
    info = probe(path)
    assert info == probe(path.read_bytes(), decode=True)
    frames, fps, width, height = GOOD[name]
    assert (info.frames, info.width, info.height, info.kind) == (frames, width, height, "video")
    assert info.fps == pytest.approx(fps, rel=1e-6)
    assert info.duration == pytest.approx(frames / fps, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("corrupted.mp4", "damaged after 28 decoded frames"),
        ("empty.mp4", "the file is empty"),
        ("text.mp4", "not a readable video"),
        ("truncated.mp4", "not a readable video"),
    ],
)
def test_broken_clips_are_told_in_one_line(shared: Path, name: str, reason: str) -> None:
    path = shared / "clips" / "broken" / name
    with pytest.raises(ClipError) as error:
        probe(path, decode=True)
    assert str(error.value).startswith(f"{name}: {reason}")
    assert "\n" not in str(error.value)


def test_a_missing_file_is_a_clip_error(tmp_path: Path) -> None:
    with pytest.raises(ClipError, match=r"gone\.mp4: cannot be opened"):
        read_clip(tmp_path / "gone.mp4", frames=1)


def test_a_playlist_named_mp4_opens_no_other_file(tmp_path: Path, make_video: MakeVideo) -> None:
    make_video(tmp_path / "real.mp4")
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile real.mp4\n")
    with pytest.raises(ClipError, match="not a readable video"):
        probe(tmp_path / "list.mp4")


def test_damage_that_the_decoder_conceals_is_found(shared: Path) -> None:
    data = bytearray((shared / "clips" / "good" / "flipping_a_pancake.mkv").read_bytes())
    data[100_000:100_400] = bytes(range(200)) * 2
    with pytest.raises(ClipError, match="damaged"):
        probe(bytes(data), "scratched", decode=True)


# --- which frames -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["nasa_13013.mp4", "testsrc2_odd_height_and_width_vp9.mp4", "av1_video.mkv", "test_non_zero_start.mp4"]
)
def test_seeking_gives_the_frames_of_a_full_decode(shared: Path, name: str) -> None:
    path = shared / "clips" / "good" / name
    frames = GOOD[name][0]
    full = read_clip(path, frames=frames, size=(36, 48))
    stamps = times(path)
    assert len(stamps) == frames
    for first in range(0, frames - 4, max(frames // 6, 1)):
        window = read_clip(path.read_bytes(), frames=3, stride=2, start=stamps[first], size=(36, 48), threads=1)
        assert torch.equal(window, full[:, first : first + 5 : 2])


@pytest.mark.parametrize(
    ("name", "codec", "settings"),
    [
        ("h264.mp4", "libx264", {"options": SHORT_GOP}),
        ("h264.mkv", "libx264", {"options": SHORT_GOP}),
        ("open_gop.mkv", "libx265", {"options": {"x265-params": "keyint=6:open-gop=1:log-level=none"}}),
        ("vp9.webm", "libvpx-vp9", {"options": {"g": "6", "cpu-used": "8", "lag-in-frames": "4"}}),
        ("mpeg4.avi", "mpeg4", {"options": SHORT_GOP}),
        ("h264.avi", "libx264", {"options": SHORT_GOP}),
        ("animation.gif", "gif", {"pixels": "rgb8"}),
    ],
)
def test_any_start_of_any_kind_gives_the_frames_of_a_full_decode(
    tmp_path: Path, make_video: MakeVideo, name: str, codec: str, settings: dict[str, object]
) -> None:
    path = make_video(tmp_path / name, codec, frames=20, **settings)
    with av.open(str(path)) as container:
        count = sum(1 for _ in container.decode(video=0))
    full = read_clip(path, frames=count)
    for first in range(count - 1):
        assert torch.equal(read_clip(path, frames=2, start=first / 20), full[:, first : first + 2])


def test_late_windows_are_not_decoded_from_the_start(shared: Path) -> None:
    before = Decoded.frames
    read_clip(shared / "clips" / "good" / "nasa_13013.mp4", frames=5, start=8.2)  # keyframes at 0 and 8.08 s
    assert Decoded.frames - before < 15


def test_fps_takes_the_nearest_frames_of_a_variable_rate(tmp_path: Path, make_video: MakeVideo) -> None:
    ticks = [0, 15, 30, 120, 135, 240, 360, 375, 480, 600, 615, 720]  # 1/600 s
    path = make_video(tmp_path / "vfr.mp4", frames=len(ticks), ticks=ticks)
    full = read_clip(path, frames=len(ticks))
    taken = read_clip(path, frames=6, fps=5.0)  # at 0, 120, 240, ...
    assert torch.equal(taken, full[:, [0, 3, 5, 6, 8, 9]])
    counted = read_clip(path, frames=6, stride=2)
    assert torch.equal(counted, full[:, ::2])
    assert probe(path).fps == pytest.approx(11 / 1.2)
    later = read_clip(path, frames=2, fps=2.5, start=0.4)  # at 240 and 480
    assert torch.equal(later, full[:, [5, 8]])
    same_rate = read_clip(path, frames=12, fps=11 / 1.2)
    assert same_rate.shape[1] == 12


def test_a_faster_rate_than_the_file_repeats_frames(tmp_path: Path, make_video: MakeVideo) -> None:
    path = make_video(tmp_path / "slow.mp4", frames=4)  # 20 fps
    assert torch.equal(read_clip(path, frames=7, fps=40.0)[:, ::2], read_clip(path, frames=4))


def test_the_generator_draws_all_windows_and_the_same_seed_the_same_one(tmp_path: Path, make_video: MakeVideo) -> None:
    path = make_video(tmp_path / "clip.mp4", frames=8)
    full = read_clip(path, frames=8)
    seen = set()
    for seed in range(40):
        window = read_clip(path, frames=3, stride=2, generator=torch.Generator().manual_seed(seed))
        again = read_clip(path, frames=3, stride=2, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(window, again)
        seen |= {first for first in range(4) if torch.equal(window, full[:, first : first + 5 : 2])}
    assert seen == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frames": 25}, "has 24 frames, 25 needed"),
        ({"frames": 9, "stride": 3}, "has 24 frames, 9 frames with stride 3 need 25"),
        ({"frames": 9, "start": 1.0}, "has 4 frames from 1 s on, 9 needed"),
        ({"frames": 13, "fps": 10.0}, "has 12 frames at 10 fps, 13 needed"),
        ({"frames": 9, "fps": 10.0, "start": 1.0}, "has 2 frames at 10 fps from 1 s on, 9 needed"),
    ],
)
def test_a_clip_that_is_too_short_says_what_it_has_and_needs(
    tmp_path: Path, make_video: MakeVideo, settings: dict[str, float], message: str
) -> None:
    path = make_video(tmp_path / "short.mp4", frames=24)
    with pytest.raises(ClipError) as error:
        read_clip(path, **settings)  # type: ignore[arg-type]
    assert str(error.value) == f"short.mp4: {message}"


@pytest.mark.parametrize("settings", [{"frames": 0}, {"frames": 2, "stride": 0}, {"frames": 2, "fps": -1.0}])
def test_impossible_settings_are_a_usage_error(settings: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=": must be"):
        read_clip(b"x", **settings)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="exclude each other"):
        read_clip(b"x", frames=2, stride=2, fps=8.0)


# --- pixels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "red", "blue", "full"),
    [
        ("bt601_full_range.mp4", 0.299, 0.114, True),
        ("nasa_13013.mp4", 0.2126, 0.0722, False),
        ("av1_video.mkv", 0.2126, 0.0722, False),
        ("man_in_street.mp4", 0.299, 0.114, False),  # untagged and smaller than HD
    ],
)
def test_colours_are_those_of_the_matrix_and_range_that_the_file_names(
    shared: Path, name: str, red: float, blue: float, full: bool
) -> None:
    path = shared / "clips" / "good" / name
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        planes = [
            np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width].astype(np.float64)
            for plane in frame.planes
        ]
    luma, *chroma = planes
    cb, cr = (plane.repeat(2, 0).repeat(2, 1) - 128 for plane in chroma)
    if not full:
        luma, cb, cr = (luma - 16) * 255 / 219, cb * 255 / 224, cr * 255 / 224
    r, b = luma + 2 * (1 - red) * cr, luma + 2 * (1 - blue) * cb
    g = (luma - red * r - blue * b) / (1 - red - blue)
    expected = np.stack([r, g, b]).clip(0, 255)
    ours = read_clip(path, frames=1)[:, 0].numpy()
    # Nearest chroma here, interpolated there: they differ at edges only.
    assert np.median(np.abs(ours - expected)) < 1.0
    assert np.abs(ours - expected).mean() < 3.0


def test_ten_bits_are_read_like_eight(tmp_path: Path, make_video: MakeVideo) -> None:
    eight = read_clip(make_video(tmp_path / "8.mp4", frames=3, options={"crf": "1"}), frames=3).float()
    ten = read_clip(make_video(tmp_path / "10.mp4", frames=3, options={"crf": "1"}, pixels="yuv420p10le"), frames=3)
    assert (eight - ten.float()).abs().mean() < 1.0


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("turns", [1, 2, 3])
def test_rotation_by_metadata_is_applied(tmp_path: Path, make_video: MakeVideo, turns: int, suffix: str) -> None:
    plain = make_video(tmp_path / f"plain{suffix}", frames=3)
    # FFmpeg's rotation is counter-clockwise, like rot90 from rows to columns reversed.
    turned = make_video(tmp_path / f"turned{suffix}", frames=3, rotation=90.0 * turns)
    with av.open(str(turned)) as container:
        said = next(container.decode(video=0)).rotation
    assert said % 360 == 90 * turns
    expected = torch.rot90(read_clip(plain, frames=3), turns, (2, 3))
    assert torch.equal(read_clip(turned, frames=3), expected)
    info = probe(turned)
    assert (info.height, info.width) == tuple(expected.shape[2:])


def test_mirroring_by_metadata_is_applied(tmp_path: Path, make_video: MakeVideo) -> None:
    plain = make_video(tmp_path / "plain.mp4", frames=2)
    data = bytearray(plain.read_bytes())
    track = data.index(b"tkhd")
    at = data.index((0x10000).to_bytes(4, "big") + bytes(12) + (0x10000).to_bytes(4, "big"), track)
    data[at : at + 4] = (-0x10000).to_bytes(4, "big", signed=True)
    assert torch.equal(read_clip(bytes(data), frames=2), read_clip(plain, frames=2).flip(-1))


@pytest.mark.parametrize("rotation", [0, 90])
@pytest.mark.parametrize("size", [(16, 16), (40, 20), (20, 40), (96, 100)])
def test_size_covers_keeps_the_aspect_and_crops_the_centre(
    tmp_path: Path, make_video: MakeVideo, size: tuple[int, int], rotation: int
) -> None:
    path = make_video(tmp_path / "clip.mp4", frames=2, rotation=rotation, options={"crf": "1"})
    full = read_clip(path, frames=2)
    height, width = full.shape[2:]
    scale = max(size[0] / height, size[1] / width)
    scaled = torch.nn.functional.interpolate(
        full.transpose(0, 1).float(),
        (max(size[0], round(height * scale)), max(size[1], round(width * scale))),
        mode="bicubic",
        antialias=True,
    ).transpose(0, 1)
    top, left = (scaled.shape[2] - size[0]) // 2, (scaled.shape[3] - size[1]) // 2
    expected = scaled[:, :, top : top + size[0], left : left + size[1]]
    ours = read_clip(path, frames=2, size=size)
    assert ours.shape == (3, 2, *size)
    assert (ours.float() - expected).abs().mean() < 4.0


def test_shrinking_is_antialiased(tmp_path: Path) -> None:
    lines = torch.zeros(3, 1, 256, 256, dtype=torch.uint8)
    lines[..., ::2] = 255
    data = encode_video(lines, 8.0, lossless=True)
    small = read_clip(data, frames=1, size=(32, 32)).float()
    assert (small - 127.5)[..., 2:-2].abs().max() < 2  # without: stripes of 0 and 255


def test_a_frame_size_that_changes_needs_a_size(tmp_path: Path, make_video: MakeVideo) -> None:
    path = tmp_path / "two.ts.mp4"  # MPEG-TS may be concatenated
    parts = []
    for height in (48, 64):
        stream = make_video(tmp_path / f"{height}.ts", frames=4, height=height)
        parts.append(stream.read_bytes())
    path.write_bytes(b"".join(parts))
    with pytest.raises(ClipError, match="frame size changes"):
        read_clip(path, frames=8)
    assert read_clip(path, frames=8, size=(32, 32)).shape == (3, 8, 32, 32)


# --- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "bmp"])
def test_images_are_clips_of_one_frame(tmp_path: Path, kind: str) -> None:
    pixels = smooth(1, 30, 41)
    path = tmp_path / f"image.{kind}"
    Image.fromarray(pixels[:, 0].permute(1, 2, 0).numpy()).save(path, quality=95)
    info = probe(path)
    assert (info.frames, info.width, info.height, info.kind, info.duration) == (1, 41, 30, "image", 0.0)
    clip = read_clip(path.read_bytes(), frames=1)
    assert (clip.float() - pixels.float()).abs().mean() < (0.1 if kind in ("png", "bmp") else 4.0)
    assert read_clip(path, frames=1, size=(20, 20)).shape == (3, 1, 20, 20)
    with pytest.raises(ClipError, match="is an image, 2 frames needed"):
        read_clip(path, frames=2)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ClipError, match="not a readable image"):
        read_clip(path, frames=1)


def test_an_image_is_turned_as_its_exif_tag_says() -> None:
    image = Image.fromarray(smooth(1, 24, 40)[:, 0].permute(1, 2, 0).numpy())
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    file = io.BytesIO()
    image.save(file, "png", exif=exif)
    expected = torch.rot90(torch.from_numpy(np.array(image)).permute(2, 0, 1), -1, (1, 2))
    assert torch.equal(read_clip(file.getvalue(), frames=1)[:, 0], expected)
    assert (probe(file.getvalue()).width, probe(file.getvalue()).height) == (24, 40)


# --- writing ----------------------------------------------------------------------------------------------------------


def test_values_survive_the_way_to_float_and_back() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    floats = to_float(values)
    assert floats.dtype == torch.float32
    assert (floats.min(), floats.max()) == (-1.0, 1.0)
    assert torch.equal(to_uint8(floats), values)
    assert torch.equal(to_uint8(torch.tensor([-1.5, -1.0, 0.001, 1.0, 7.0])), torch.tensor([0, 0, 128, 255, 255]))


@pytest.mark.parametrize("size", [(48, 64), (33, 45), (1, 1), (17, 64)])
@pytest.mark.parametrize("fps", [8.0, 30000 / 1001])
def test_what_is_written_is_read_back(tmp_path: Path, size: tuple[int, int], fps: float) -> None:
    video = smooth(7, *size)
    write_video(tmp_path / "exact.mp4", video, fps, lossless=True)
    assert torch.equal(read_clip(tmp_path / "exact.mp4", frames=7), video)
    write_video(tmp_path / "near.mp4", to_float(video), fps)
    info = probe(tmp_path / "near.mp4", decode=True)
    assert (info.frames, info.height, info.width, info.codec) == (7, *size, "h264")
    assert info.fps == pytest.approx(fps, rel=1e-6)
    assert (read_clip(tmp_path / "near.mp4", frames=7).float() - video.float()).abs().mean() < 4.0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exact.mp4", "near.mp4"]


def test_lossy_colours_are_right_and_tagged() -> None:
    for colour in [(255, 0, 0), (0, 255, 0), (0, 0, 255), (128, 128, 128), (250, 200, 10)]:
        video = torch.tensor(colour, dtype=torch.uint8)[:, None, None, None].expand(3, 5, 32, 32)
        data = encode_video(video, 8.0)
        assert (read_clip(data, frames=5).float() - video.float()).abs().max() <= 3
        with av.open(io.BytesIO(data)) as container:
            frame = next(container.decode(video=0))
            assert (frame.colorspace, frame.color_range) == (1, 1)  # BT.709, limited


def test_encoding_is_deterministic_and_a_bad_shape_is_refused() -> None:
    video = smooth(5, 48, 64)
    assert len({encode_video(video, 8.0, threads=1) for _ in range(30)}) == 1
    with pytest.raises(UsageError, match="3 T H W"):
        encode_video(video[0], 8.0)
    with pytest.raises(UsageError, match="positive rate"):
        encode_video(video, 0.0)
