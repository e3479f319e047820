"""Shards, features and foreign tars that are damaged or lie: found when they are read, and never in silence."""

import errno
import io
import json
import logging
import os
import random
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from osp.data.buckets import TokenRule
from osp.data.features.format import FeatureIdentity, Features, TextIdentity
from osp.data.features.writer import FeatureWriter, feature_report
from osp.data.media.limits import Limits
from osp.data.media.shape import Shape
from osp.data.media.video import ClipError
from osp.data.shards.build import write_rendered, write_shards
from osp.data.shards.entry import LINE_FORM
from osp.data.shards.index import load_index, read_index, read_listing
from osp.data.shards.tar import TarShard
from osp.data.sources import BucketClips, FeatureClips, ShardClips
from osp.errors import DataError, OspError

Reader = Callable[[Path], Any]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of small clips."""
    folder = tmp_path_factory.mktemp("damage") / "shards"
    draw = torch.Generator().manual_seed(0)
    clips = [
        (
            f"clip-{n}",
            torch.randint(0, 256, (3, 2, 16, 16), dtype=torch.uint8, generator=draw),
            {"fps": 8.0, "caption": f"clip {n}"},
        )
        for n in range(4)
    ]
    write_rendered(clips, folder, shard_clips=2)
    return folder


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of small features with text."""
    folder = tmp_path_factory.mktemp("damage") / "features"
    identity = FeatureIdentity("toy", "abc", 4, 8, 2, (0.0, 0.0), (1.0, 1.0), TextIdentity("t5", "def", 3))
    writer = FeatureWriter(folder, identity, clips=4, origin="toys", shard_clips=2, empty={"text": torch.ones(1, 3)})
    draw = torch.Generator().manual_seed(0)
    for number in writer.todo():
        with writer.shard(number) as shard:
            for index in shard.clips:
                latent = torch.randn(2, 2, 2, 2, generator=draw)
                shard.add(index, Features(f"c{index}", Shape(5, 16, 16), latent, latent, ["said"], [torch.ones(2, 3)]))
    return folder


def read_or_refused(read: Callable[[], Any]) -> Any:
    """The value; None where an error of one line comes instead."""
    try:
        return read()
    except OspError as refused:
        error = refused
    assert "\n" not in str(error)
    return None


def read_shards(folder: Path) -> Any:
    """All that a reader and a writer who goes on take of a folder."""
    clips = [(entry.key, dict(entry.record), entry.read()) for entry in read_index(folder)]
    write_rendered([], folder, shard_clips=2)
    return clips, load_index(folder)


def read_features(folder: Path) -> Any:
    source = FeatureClips(folder, sample=False)
    clips = [source.read(index, 0) for index in range(len(source))]
    values = [
        {key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in clip.items()}
        for clip in clips
    ]
    return values, source.empty["text"].tolist(), source.fingerprint(), source.vae_origin, feature_report(folder)


@pytest.mark.parametrize(("kind", "read"), [("shards", read_shards), ("features", read_features)])
@pytest.mark.parametrize("suffix", [".tar", ".jsonl", ".json", ".safetensors"])
def test_a_flipped_bit_is_found_or_changes_nothing_that_is_read(
    kind: str, read: Reader, suffix: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    written: Path = request.getfixturevalue(kind)
    files = sorted(path for path in written.iterdir() if path.suffix == suffix and path.name != "sources.jsonl")
    folder = tmp_path / "copy"
    shutil.copytree(written, folder)
    expected, found, draw = read(folder), 0, random.Random(7)
    for _ in range(50 if files else 0):
        path = folder / draw.choice(files).name
        data = path.read_bytes()
        flipped = bytearray(data)
        flipped[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        values = read_or_refused(lambda: read(folder))
        assert values in (None, expected)
        found += values is None
        path.write_bytes(data)
    assert not files or found


def test_a_damaged_clip_costs_that_clip(shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(shards, folder)
    entry = read_index(folder)[1]
    with open(entry.tar, "r+b") as file:
        file.seek(entry.offset + entry.size // 2)
        byte = file.read(1)[0]
        file.seek(entry.offset + entry.size // 2)
        file.write(bytes([byte ^ 1]))
    source = ShardClips(folder, 2, 16, 16)
    with pytest.raises(ClipError, match=r"clip-1: .*shard-000000\.tar: the bytes of clip-1\.mp4 are damaged"):
        source.read(1, 0)
    assert [source.read(index, 0)["key"] for index in (0, 2, 3)] == ["clip-0", "clip-2", "clip-3"]


def test_folders_without_checksums_are_read_and_gone_on_with(shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    shutil.copytree(shards, folder)
    index = json.loads((folder / "index.json").read_text())
    del index["sha256"]
    for shard in index["shards"]:
        del shard["listing_sha256"]
        listing = (folder / shard["file"]).with_suffix(".jsonl")
        lines = [json.loads(line) for line in listing.read_text().splitlines()]
        listing.write_text(
            "".join(json.dumps({k: v for k, v in line.items() if k != "crc32"}) + "\n" for line in lines)
        )
    (folder / "index.json").write_text(json.dumps(index))
    assert [entry.key for entry in read_index(folder)] == [f"clip-{n}" for n in range(4)]
    more = [(f"clip-{n}", torch.zeros(3, 2, 16, 16, dtype=torch.uint8), {"fps": 8.0}) for n in range(6)]
    assert write_rendered(more, folder, shard_clips=2).new_clips == 2
    assert len([entry.read() for entry in read_index(folder)]) == 6


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8) | st.just(10**300),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


@settings(deadline=None, max_examples=60)
@given(key=st.sampled_from([str(key).rstrip("?") for key in LINE_FORM]), value=ANYTHING)
def test_any_value_in_a_listing_is_read_or_refused_in_one_line(shards: Path, key: str, value: Any) -> None:
    folder = shards.parent / "any"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(shards, folder)
    index = json.loads((folder / "index.json").read_text())
    del index["sha256"], index["shards"][0]["listing_sha256"]
    listing = folder / "shard-000000.jsonl"
    first, second = listing.read_text().splitlines()
    listing.write_text(json.dumps({**json.loads(first), key: value}) + "\n" + second + "\n")
    (folder / "index.json").write_text(json.dumps(index))
    for make in (lambda: ShardClips(folder, 1, 16, 16), lambda: BucketClips(folder, TokenRule(4, 8, size_stride=16))):
        source = read_or_refused(make)
        if source is not None:
            assert source.fingerprint()
            assert source.summary().line()
            read_or_refused(lambda source=source: source.read(0, 0))


@settings(deadline=None, max_examples=60)
@given(
    place=st.sampled_from(
        [
            "clips",
            "shards",
            "settings",
            "sources",
            "skipped",
            "version",
            "format",
            "seconds",
            "shards.0.file",
            "shards.0.clips",
            "shards.0.bytes",
            "sources.bytes",
            "skipped.0",
        ]
    ),
    value=ANYTHING,
)
def test_any_value_in_an_index_is_read_or_refused_in_one_line(shards: Path, place: str, value: Any) -> None:
    folder = shards.parent / "any"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(shards, folder)
    index = json.loads((folder / "index.json").read_text())
    del index["sha256"]
    index["skipped"] = [{"source": "a", "reason": "b"}]
    *path, last = place.split(".")
    inner: Any = index
    for part in path:
        inner = inner[int(part) if part.isdigit() else part]
    inner[int(last) if last.isdigit() else last] = value
    (folder / "index.json").write_text(json.dumps(index))
    for use in (lambda: [entry.read() for entry in read_index(folder)], lambda: write_rendered([], folder)):
        read_or_refused(use)


@pytest.mark.parametrize("key", ["clips", "images", "captioned"])
def test_a_count_below_zero_in_an_index_is_refused(shards: Path, tmp_path: Path, key: str) -> None:
    folder = tmp_path / "shards"
    shutil.copytree(shards, folder)
    index = json.loads((folder / "index.json").read_text())
    del index["sha256"]
    (folder / "index.json").write_text(json.dumps({**index, key: -1}))
    for use in (lambda: read_index(folder), lambda: write_rendered([], folder)):
        with pytest.raises(DataError, match=f"{key}: must be a whole number of at least 0, is -1"):
            use()


@pytest.mark.parametrize("name", ["../shards/shard-000000.tar", "/etc/x.tar", "a\0.tar", "index.json"])
def test_an_index_names_tars_of_its_own_folder_only(shards: Path, tmp_path: Path, name: str) -> None:
    index = json.loads((shards / "index.json").read_text())
    del index["sha256"]
    index["shards"][0]["file"] = name
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="which is no name of a tar in it"):
        read_index(tmp_path)


# --- foreign tars -----------------------------------------------------------------------------------------------------


def header(name: str, size: int, kind: bytes = b"0") -> bytes:
    """A header of 512 bytes that claims a size; negative and huge ones in base 256."""
    block = bytearray(512)
    block[: len(name)] = name.encode("latin-1")
    block[100:124] = b"0000644\0" + b"0000000\0" * 2
    if 0 <= size < 8**11:
        block[124:136] = b"%011o\0" % size
    else:
        block[124:136] = (b"\x80" if size >= 0 else b"\xff") + (size % (1 << 88)).to_bytes(11, "big")
    block[136:148], block[156:157], block[257:265] = b"0" * 11 + b"\0", kind, b"ustar\x0000"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def member(name: str, data: bytes, kind: bytes = b"0") -> bytes:
    return header(name, len(data), kind) + data + bytes(-len(data) % 512)


END = bytes(1024)
GOOD = b"".join(member(f"g{number}.mp4", b"media") for number in range(3))
NESTED = b"[" * 100_000


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (header("h.txt", 1 << 40), "h.txt claims 1099511627776 bytes, where the file has 1024"),
        (header("h.mp4", 1 << 70), "claims 1180591620717411303424 bytes"),
        (header("h.mp4", -512), "claims -512 bytes"),
        (header("", 1 << 33, b"L"), "claims a name of 8589934592 bytes"),
        (header("", -1, b"x"), "claims a name of -1 bytes"),
        (member("", b"30 path=\xff\xfe" + bytes(10), b"x"), "an extended header makes no sense"),
        (member("", b"99999999 size=1\n", b"x"), "an extended header makes no sense"),
        (bytes(100) + b"no header" * 50 + bytes(474), "no tar header at byte 3072"),
        (END + GOOD, "an end mark at byte 3072, and more behind it"),
        (member("g2.json", NESTED), "g2.json: is no JSON (more than 64 levels)"),
        (member("g2.json", b"[1, 2]"), "g2.json: must be a mapping, is a list of 2"),
        (member("g2.json", b'{"caption": 5}'), "g2.json: its caption is not a text"),
        (member("g2.json", b'{"title": "x"}'), "its keys are title"),
        (member("g2.txt", b"word " * 900_000), "has 4500000 bytes, more than the 4194304 that are read"),
        (member("g2.txt", b"caf\xe9"), "g2.txt: is not UTF-8 text (byte 3)"),
        (member("h.mp4", b"", b"2"), "1 members that are links, devices or files with holes: a.tar: h.mp4"),
        (member("h.mp4", b"", b"3"), "links, devices or files with holes"),
        (member("h.mp4", b"media", b"S"), "links, devices or files with holes"),
        (member("h.npy", b"numbers"), "1 samples without a video or image: a.tar: h (.npy)"),
        (member("g2.webm", b"other"), "1 videos of samples that have another one, which is taken: a.tar: g2.mp4"),
    ],
)  # fmt: skip
def test_what_a_tar_holds_before_a_lie_is_used_and_one_line_tells(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, bad: bytes, said: str
) -> None:
    (tmp_path / "a.tar").write_bytes(GOOD + bad + END)
    entries = read_index(tmp_path)
    assert [entry.key for entry in entries] == ["g0", "g1", "g2"]
    assert {entry.read() for entry in entries} <= {b"media", b"other"}
    (line,) = [record.getMessage() for record in caplog.records]
    assert said in line
    assert "a.tar" in line
    assert "\n" not in line


def test_long_names_sizes_and_text_marks_of_honest_tars_are_understood(tmp_path: Path) -> None:
    name = "folder/" * 30 + "人" * 60
    for number, form in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        with tarfile.open(tmp_path / f"{number}.tar", "w", format=form) as archive:
            for suffix, data in (("mp4", b"media"), ("txt", "\ufeffa caption".encode())):
                info = tarfile.TarInfo(f"{name}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    entries = read_index(tmp_path)
    assert [(entry.key, entry.record["caption"], entry.read()) for entry in entries] == [
        (name, "a caption", b"media")
    ] * 2


def test_members_of_a_sample_need_not_stand_together(tmp_path: Path) -> None:
    by_kind = [member(f"{name}.mp4", b"media") for name in "ab"]
    by_kind += [member(f"{name}.json", '\ufeff{"text": "said"}'.encode()) for name in "ab"]
    (tmp_path / "a.tar").write_bytes(b"".join(by_kind) + END)
    assert [(entry.key, entry.record["caption"]) for entry in read_index(tmp_path)] == [("a", "said"), ("b", "said")]


def test_names_in_latin_1_are_read_in_tars_and_folders(tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "a.tar").write_bytes(member("caf\xe9.png", b"media") + END)
    (tmp_path / "plain").mkdir()
    Path(os.fsdecode(os.fsencode(tmp_path / "plain") + b"/caf\xe9.png")).touch()
    for folder in ("tars", "plain"):
        source = ShardClips(tmp_path / folder, 1, 16, 16)
        assert source.fingerprint().startswith("shards")
        assert source.summary().line().isprintable()


def test_members_beyond_the_limit_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.tar").write_bytes(member("a.mp4", b"m" * 2000) + member("b.mp4", b"media") + END)
    listing = read_listing(tmp_path, Limits(member_bytes=1000))
    assert [entry.key for entry in listing.entries] == ["b"]
    assert "1 members of more than limits.member_bytes=1000: a.tar: a.mp4" in caplog.text


def test_tars_in_folders_below_are_read_folder_by_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for place in ("train/b", "train/a", "val"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "0.tar").write_bytes(member(f"{place[-1]}.mp4", b"media") + END)
    (tmp_path / "more.tar.gz").touch()
    listing = read_listing(tmp_path)
    assert [entry.key for entry in listing.entries] == ["a", "b", "l"]
    assert listing.left_out == {"compressed tars, which are not read": 1}
    with pytest.raises(DataError, match=r"no videos or images, but 3 tars \(first: train/a/0\.tar\); tars are shards"):
        write_shards(tmp_path, tmp_path / "out", workers=0)
    (tmp_path / "0.tar").write_bytes(GOOD + END)
    assert len(read_index(tmp_path)) == 3
    assert (
        "4 further tars, compressed or in a folder below, which are not read: more.tar.gz; train/a/0.tar" in caplog.text
    )


def test_compressed_tars_alone_are_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "0.tar.zst").touch()
    with pytest.raises(DataError, match=r"but 1 compressed tars \(first: below/0\.tar\.zst\); decompress them"):
        read_index(tmp_path)


def test_sources_that_are_gone_are_told_and_their_clips_stay(
    tmp_path: Path, make_video: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "videos").mkdir()
    for name in ("a", "b"):
        make_video(tmp_path / "videos" / f"{name}.mp4", frames=3)
    assert write_shards(tmp_path / "videos", tmp_path / "out", workers=0).gone == 0
    (tmp_path / "videos" / "a.mp4").unlink()
    with caplog.at_level(logging.WARNING):
        report = write_shards(tmp_path / "videos", tmp_path / "out", workers=0)
    assert (report.gone, report.clips) == (1, 2)
    assert "videos: 1 of 2 stored sources are gone from it (first: a.mp4); their clips stay" in caplog.text
    kept = [write_shards(tmp_path / "videos", tmp_path / "out", workers=0, drop_gone=drop) for drop in (True, False)]
    assert [report.gone for report in kept] == [1, 1]
    listing = read_listing(tmp_path / "out")
    assert [entry.record["source"] for entry in listing.entries] == ["b.mp4"]
    assert listing.left_out == {"clips of sources that are gone": 1}
    make_video(tmp_path / "videos" / "a.mp4", frames=3)
    write_shards(tmp_path / "videos", tmp_path / "out", workers=0)
    assert len(read_index(tmp_path / "out")) == 2


def test_a_damaged_journal_of_sources_is_refused(tmp_path: Path, make_video: Callable[..., Path]) -> None:
    (tmp_path / "videos").mkdir()
    make_video(tmp_path / "videos" / "a.mp4", frames=3)
    write_shards(tmp_path / "videos", tmp_path / "out", workers=0)
    journal = tmp_path / "out" / "sources.jsonl"
    journal.write_bytes(journal.read_bytes().replace(b'"number": 0', b'"number": 3'))
    with pytest.raises(DataError, match="damaged, it is not as it was written"):
        write_shards(tmp_path / "videos", tmp_path / "out", workers=0)


@pytest.mark.parametrize("kind", ["shards", "features"])
def test_a_full_disk_is_one_line_that_names_the_file_and_leaves_nothing_half_written(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def write() -> None:
        if kind == "shards":
            write_rendered([("a", torch.zeros(3, 2, 16, 16, dtype=torch.uint8), {"fps": 8.0})], tmp_path)
            return
        writer = FeatureWriter(tmp_path, FeatureIdentity("toy", "a", 4, 8, 1, (0.0,), (1.0,)), clips=1, origin="toys")
        for number in writer.todo():
            with writer.shard(number) as shard:
                shard.skip(0, "a", "scratched")

    monkeypatch.setattr(TarShard, "close", full)
    with pytest.raises(DataError, match=r"shard-000000\.tar: cannot be written \(No space left on device\)"):
        write()
    assert {path.name for path in tmp_path.iterdir()} == {"index.json", ".lock"}
    monkeypatch.undo()
    write()
    assert (tmp_path / "shard-000000.tar").exists()
