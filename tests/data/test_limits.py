"""Files that promise more than they hold or may cost, and damage that the decoder conceals, cost that clip alone."""

import io
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from osp.data.media.clips import Clip, CutSettings, clips_of, examine
from osp.data.media.container import Decoded
from osp.data.media.folder import kind_of, media_files
from osp.data.media.limits import Limits
from osp.data.media.video import ClipError, encode_video, probe, read_clip
from osp.data.shards.build import write_shards
from osp.data.summary import Tally
from osp.errors import DataError

MakeVideo = Callable[..., Path]


def gif(width: int, height: int, frames: int) -> bytes:
    frame = b"\x21\xf9\x04\0\x0a\0\0\0\x2c\0\0\0\0\1\0\1\0\0\x02\x02\x44\x01\0"
    return b"GIF89a" + struct.pack("<HH", width, height) + b"\x80\0\0\0\0\0\xff\xff\xff" + frame * frames + b";"


def png(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says that it is so large."""
    header = struct.pack(">II5B", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 10)), (b"IEND", b""))
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def bmp(width: int, height: int) -> bytes:
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + info + bytes(64)


@pytest.mark.parametrize("data", [gif(16000, 16000, 9), png(30000, 30000), bmp(40000, 20000)])
def test_a_header_with_too_many_pixels_is_refused_by_size_limit_and_setting(data: bytes) -> None:
    for read in (lambda: probe(data), lambda: read_clip(data, frames=1)):
        with pytest.raises(ClipError, match=r"\d+ x \d+, \d+ pixels, more than limits.frame_pixels=67108864; raise"):
            read()


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".ts", ".gif"])
def test_each_container_keeps_to_the_limits(tmp_path: Path, make_video: MakeVideo, suffix: str) -> None:
    kind = {"codec": "gif", "pixels": "rgb8"} if suffix == ".gif" else {}
    path = make_video(tmp_path / f"clip{suffix}", frames=20, **kind)  # 64 x 48
    assert probe(path, limits=Limits(frame_pixels=64 * 48, frames=20, seconds=1.0)).frames == 20
    for limits, told in (
        (Limits(frame_pixels=3000), "frame_pixels=3000"),
        (Limits(frames=19), "frames=19"),
        (Limits(seconds=0.5), "seconds=0.5"),
    ):
        for read in (
            lambda limits=limits: probe(path, decode=True, limits=limits),
            lambda limits=limits: read_clip(path.read_bytes(), frames=2, limits=limits),
        ):
            with pytest.raises(ClipError, match=f"more than limits.{told}|larger than limits.{told}"):
                read()
        assert told in examine(path, CutSettings(0.2, 1, limits)).reason


def test_a_frame_that_grows_on_the_way_is_refused(tmp_path: Path, make_video: MakeVideo) -> None:
    parts = [make_video(tmp_path / f"{height}.ts", frames=4, height=height).read_bytes() for height in (48, 128)]
    (tmp_path / "two.ts").write_bytes(b"".join(parts))
    with pytest.raises(ClipError, match=r"limits.frame_pixels=4000|damaged after \d"):
        read_clip(tmp_path / "two.ts", frames=8, size=(16, 16), limits=Limits(frame_pixels=4000))


def test_a_picture_that_would_become_huge_by_covering_a_size_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (60000, 1)).save(tmp_path / "line.png")
    with pytest.raises(ClipError, match=r"covering \(256, 256\) it is 15360000 x 256, .* limits.frame_pixels"):
        read_clip(tmp_path / "line.png", frames=1, size=(256, 256))


def test_text_of_a_png_that_swells_is_no_way_to_take_memory(tmp_path: Path) -> None:
    text = PngInfo()
    text.add_text("Comment", "a" * (8 << 20), zip=True)
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG", pnginfo=text)
    with pytest.raises(ClipError, match="not a readable image"):
        read_clip(file.getvalue(), frames=1)


@pytest.mark.parametrize("table", [b"stsz", b"stts"])
def test_an_mp4_promises_no_more_samples_than_it_has_bytes(table: bytes) -> None:
    data = bytearray(encode_video(torch.zeros(3, 9, 32, 32, dtype=torch.uint8), 8.0, threads=1))
    at = data.index(table) + 4
    if table == b"stsz":
        data[at + 4 : at + 12] = struct.pack(">II", 1, 1 << 30)  # all of one byte
    else:
        data[at + 8 : at + 12] = struct.pack(">I", 1 << 30)
    with pytest.raises(ClipError, match=r"promises 1073741\d+ samples, more than it has bytes"):
        probe(bytes(data))


def box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", 8 + len(content)) + kind + content


def test_edits_may_not_repeat_a_video_without_end() -> None:
    edits = box(b"edts", box(b"elst", struct.pack(">II", 0, 4) + struct.pack(">IiI", 100, 0, 1 << 16) * 4))
    table = box(b"stbl", box(b"stsz", struct.pack(">III", 0, 1, 9)))
    movie = box(b"moov", box(b"trak", edits + box(b"mdia", box(b"minf", table))))
    with pytest.raises(ClipError, match=r"repeats its 9 samples in 4 edits, more than 16 times limits.frames=2;"):
        probe(box(b"ftyp", b"isom") + movie, limits=Limits(frames=2))


# --- damage -----------------------------------------------------------------------------------------------------------


def test_a_flipped_bit_is_refused_or_changes_nothing_that_the_decoder_notices() -> None:
    generator = torch.Generator().manual_seed(0)
    picture = torch.nn.functional.interpolate(torch.rand(3, 1, 8, 8, generator=generator) * 255, size=(64, 64))
    video = torch.cat([picture.roll(3 * number, -1) for number in range(9)], 1).byte()
    data, draw = encode_video(video, 8.0, threads=1), random.Random(0)
    whole = read_clip(data, frames=9, threads=1)
    first = data.index(b"mdat") + 8
    refused = other = 0
    for _ in range(60):
        changed = bytearray(data)
        changed[draw.randrange(first, len(data) - 8)] ^= 1 << draw.randrange(8)
        try:
            read = read_clip(bytes(changed), frames=9, threads=1)
        except ClipError:
            refused += 1
            continue
        with_decode = probe(bytes(changed), decode=True, threads=1)
        assert with_decode.frames == 9  # what is read is also written
        other += not torch.equal(read, whole)
    assert refused > 2 * other


def test_videos_cut_out_of_streams_are_no_damage(tmp_path: Path, make_video: MakeVideo) -> None:
    path = make_video(
        tmp_path / "open.mkv", "libx265", frames=40, options={"x265-params": "keyint=6:open-gop=1:log-level=none"}
    )
    full = read_clip(path, frames=40)
    for start in (0.3, 0.65, 1.5):
        assert torch.equal(read_clip(path, frames=2, start=start), full[:, round(start * 20) :][:, :2])


# --- long sources -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("one_gop.mp4", "libx264", {"g": "5000", "sc_threshold": "0", "preset": "ultrafast"}),
        ("long.avi", "mpeg4", {"g": "12"}),
        ("long.ts", "libx264", {"g": "12", "preset": "ultrafast"}),
    ],
)
def test_a_long_source_is_decoded_once_whatever_its_keyframes(
    tmp_path: Path, make_video: MakeVideo, name: str, codec: str, options: dict[str, str]
) -> None:
    (tmp_path / "videos").mkdir()
    path = make_video(tmp_path / "videos" / name, codec, frames=600, height=16, width=16, options=options)
    before = Decoded.frames
    report = write_shards(tmp_path / "videos", tmp_path / "shards", clip_seconds=1.0, workers=0)
    assert report.clips == 30
    assert Decoded.frames - before < 1.2 * 600
    settings = CutSettings(1.0, 1)
    examined = examine(path, settings)
    later = [*clips_of(path, examined, settings, after=27)]
    assert [clip.data for clip in later if isinstance(clip, Clip)] == [
        clip.data for clip in [*clips_of(path, examined, settings)][27:] if isinstance(clip, Clip)
    ]


def test_a_gif_of_many_frames_is_decoded_once(tmp_path: Path) -> None:
    (tmp_path / "a.gif").write_bytes(gif(16, 16, 3000))
    before, settings = Decoded.frames, CutSettings(10.0, 1)
    clips = [*clips_of(tmp_path / "a.gif", examine(tmp_path / "a.gif", settings), settings)]
    assert len(clips) == 30
    assert Decoded.frames - before < 1.2 * 3000


# --- folders ----------------------------------------------------------------------------------------------------------


def test_more_kinds_are_taken_and_the_others_counted_by_suffix(tmp_path: Path, make_video: MakeVideo) -> None:
    for name in ("a.ts", "b.FLV", "c.3gp", "d.MP4"):
        make_video(tmp_path / name, frames=3)
    Image.new("RGB", (8, 8)).save(tmp_path / "e.TIFF", "TIFF")
    for name in ("._d.mp4", "f.heic", "g.heic", "h.pdf", "a.txt"):
        (tmp_path / name).write_bytes(b"x")
    tally = Tally()
    found = media_files(tmp_path, tally=tally)
    assert [path.name for path in found] == ["a.ts", "b.FLV", "c.3gp", "d.MP4", "e.TIFF"]
    assert tally.counts == {".heic files": 2, ".pdf files": 1, "hidden videos and images": 1}
    assert [kind_of(path) for path in found] == ["video"] * 4 + ["image"]
    report = write_shards(tmp_path, tmp_path / "shards", workers=0)
    assert (report.clips, report.images, report.skipped) == (5, 1, ())
    assert report.left_out[".heic files"] == 2


def test_a_folder_of_other_files_alone_says_which_there_are(tmp_path: Path) -> None:
    (tmp_path / "a.heic").write_bytes(b"x")
    with pytest.raises(DataError, match=r"no videos or images in it .*; there are 1 \.heic files"):
        media_files(tmp_path)


def test_an_animation_in_a_plain_folder_is_a_video(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), (90 * number, 0, 0)) for number in range(3)]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], duration=50)
    frames[0].save(tmp_path / "b.webp")
    assert [kind_of(tmp_path / name) for name in ("a.webp", "b.webp")] == ["video", "image"]
