"""From a folder of files to shards: what is stored, what is left out, and what survives kills and second runs."""

import hashlib
import itertools
import json
import logging
import multiprocessing
import os
import random
import shutil
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from osp.data.media.clips import Clip, CutSettings, clips_of, examine
from osp.data.media.video import probe, read_clip
from osp.data.shards.build import write_rendered, write_shards
from osp.data.shards.index import ClipEntry, read_index
from osp.data.shards.workers import Crashed, Workers
from osp.errors import DataError, UsageError

MakeVideo = Callable[..., Path]
SHORT_GOP = {"g": "6", "bf": "2"}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def check_folder(folder: Path) -> list[ClipEntry]:
    """Every promise of the format about a shard folder; its clips."""
    index = json.loads((folder / "index.json").read_text())
    entries = read_index(folder)
    listed = {name for shard in index["shards"] for name in (shard["file"], shard["file"].replace(".tar", ".jsonl"))}
    assert {path.name for path in folder.iterdir()} == listed | {"index.json", "sources.jsonl", ".lock"}
    assert len({entry.key for entry in entries}) == len(entries) == index["clips"]
    for shard in index["shards"]:
        data = (folder / shard["file"]).read_bytes()
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (shard["sha256"], shard["bytes"])
        own = [entry for entry in entries if entry.tar.name == shard["file"]]
        assert len(own) == shard["clips"]
        with tarfile.open(folder / shard["file"]) as tar:
            members = tar.getmembers()
            assert {(member.mtime, member.uid, member.gid, member.uname) for member in members} == {(0, 0, 0, "")}
            expected = [name for entry in own for name in (f"{entry.key}.json", entry.member)]
            assert [member.name for member in members] == expected
            for entry in own:
                assert "." not in entry.key
                assert "/" not in entry.key
                file, record = tar.extractfile(entry.member), tar.extractfile(f"{entry.key}.json")
                assert file is not None
                assert record is not None
                assert entry.read() == file.read()
                assert json.load(record) == entry.record
    for entry in entries:
        info = probe(entry.read(), entry.key, decode=True)
        record = entry.record
        assert (record["frames"], record["width"], record["height"]) == (info.frames, info.width, info.height)
        assert record["kind"] == info.kind
        assert record["fps"] == pytest.approx(info.fps, abs=1e-6)
        assert record["duration"] == pytest.approx(info.duration, abs=1e-6)
    return entries


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory, make_video: MakeVideo) -> Path:
    """A tree of small files: two to cut, one broken, one image, names that need care."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    make_video(folder / "long.mp4", frames=60, options=SHORT_GOP)
    make_video(folder / "deep" / "turned.mkv", frames=44, options=SHORT_GOP, rotation=90)
    for index in range(5):
        make_video(folder / "deep" / f"short {index}.mp4", frames=8 + index)
    make_video(folder / "deep" / "er" / "人 #1.v2.MP4", frames=9)
    make_video(folder / ".hidden" / "ghost.mp4")
    (folder / "._long.mp4").write_bytes(b"resource fork")
    (folder / "broken.mp4").write_bytes(b"no video at all")
    (folder / "notes.doc").write_bytes(b"not a medium")
    Image.fromarray(np.full((20, 30, 3), 90, np.uint8)).save(folder / "deep" / "still.bmp")
    return folder


SETTINGS: Mapping[str, Any] = {"clip_seconds": 1.0, "min_frames": 5, "shard_clips": 3, "workers": 0}


@pytest.fixture(scope="module")
def undisturbed(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one run without incident."""
    output = tmp_path_factory.mktemp("undisturbed") / "shards"
    write_shards(videos, output, **SETTINGS)
    return output


# --- what is stored ---------------------------------------------------------------------------------------------------


def test_real_clips_are_stored_and_broken_ones_told_once(
    shared: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clips = shared / "clips"
    with caplog.at_level(logging.WARNING):
        report = write_shards(clips, tmp_path, captions=clips / "captions.jsonl", workers=2, min_frames=5)
    entries = check_folder(tmp_path)
    reasons = dict(report.skipped)
    assert reasons["broken/corrupted.mp4"].startswith("damaged after 28 decoded frames")
    assert reasons["broken/empty.mp4"] == "the file is empty"
    assert reasons["broken/testsrc2_mpeg4.mp4"] == "too short: 1 frames, min_frames=5"
    assert reasons["broken/unordered.mov"] == "too short: 4 frames, min_frames=5"
    assert reasons["broken/text.mp4"].startswith("not a readable video")
    assert reasons["broken/truncated.mp4"].startswith("not a readable video")
    assert len(reasons) == 6
    told = [record.getMessage() for record in caplog.records]
    assert sorted(line.split(":")[0] for line in told) == sorted(reasons)
    assert (report.clips, report.new_clips, report.shards, report.images) == (11, 11, 1, 0)
    assert (report.captioned, report.captions_missing) == (6, 0)
    by_source: dict[str, list[ClipEntry]] = {}
    for entry in entries:
        by_source.setdefault(entry.record["source"], []).append(entry)
    assert sorted(by_source) == sorted(f"good/{path.name}" for path in (clips / "good").iterdir())
    for source, own in by_source.items():
        original = clips / source
        frames = probe(original).frames
        assert sum(entry.record["frames"] for entry in own) == frames
        if len(own) == 1:
            assert own[0].read() == original.read_bytes()
            continue
        full = read_clip(original, frames=frames, size=(64, 64))
        cut = [read_clip(entry.read(), frames=entry.record["frames"], size=(64, 64)) for entry in own]
        assert torch.equal(torch.cat(cut, dim=1), full)
    assert [entry.record["start"] for entry in by_source["good/nasa_13013.mp4"]] == [0.0, 8.08]
    rotated = by_source["good/nasa_13013_rotated.mp4"][0].record
    assert (rotated["width"], rotated["height"], rotated["frames"]) == (270, 480, 17)
    assert by_source["good/man_in_street.mp4"][0].record["caption"].startswith("An elderly man")


def test_a_tree_of_files_in_small_shards(undisturbed: Path, videos: Path) -> None:
    entries = check_folder(undisturbed)
    index = json.loads((undisturbed / "index.json").read_text())
    assert [shard["clips"] for shard in index["shards"]] == [3, 3, 3, 3, 2]
    assert [entry["source"] for entry in index["skipped"]] == ["broken.mp4"]
    assert [entry.record["source"] for entry in entries] == (
        ["deep/er/人 #1.v2.MP4"]
        + [f"deep/short {index}.mp4" for index in range(5)]
        + ["deep/still.bmp"]
        + ["deep/turned.mkv"] * 3
        + ["long.mp4"] * 4
    )
    assert entries[0].member.endswith("-_1_v2-00.mp4")
    still = entries[6]
    assert (still.member[-4:], still.record["kind"], still.record["fps"]) == (".png", "image", 0.0)
    assert read_clip(still.read(), frames=1).unique().tolist() == [90]
    full = read_clip(videos / "deep" / "turned.mkv", frames=44)
    cut = [read_clip(entry.read(), frames=entry.record["frames"]) for entry in entries[7:10]]
    assert full.shape[2:] == (64, 48)
    assert torch.equal(torch.cat(cut, dim=1), full)


def test_the_webdataset_library_reads_the_shards(undisturbed: Path) -> None:
    tars = sorted(str(path) for path in undisturbed.glob("*.tar"))
    samples = list(webdataset.WebDataset(tars, shardshuffle=False))
    entries = read_index(undisturbed)
    assert [sample["__key__"] for sample in samples] == [entry.key for entry in entries]
    for sample, entry in zip(samples, entries, strict=True):
        assert json.loads(sample["json"]) == entry.record
        assert sample[entry.member.rpartition(".")[2]] == entry.read()


def test_worker_processes_give_the_same_bytes(videos: Path, undisturbed: Path, tmp_path: Path) -> None:
    write_shards(videos, tmp_path, **{**SETTINGS, "workers": 3})
    assert content(tmp_path) == content(undisturbed)


@pytest.mark.parametrize("limit", [1, 4000, 10**9])
def test_shard_bytes_limits_the_media_of_a_shard(videos: Path, tmp_path: Path, limit: int) -> None:
    write_shards(videos, tmp_path, clip_seconds=1.0, shard_bytes=limit, workers=0)
    shards: dict[Path, list[int]] = {}
    for entry in check_folder(tmp_path):
        shards.setdefault(entry.tar, []).append(entry.size)
    assert all(sum(sizes) <= limit or len(sizes) == 1 for sizes in shards.values())
    assert (len(shards) == 1) == (limit == 10**9)


# --- cutting ----------------------------------------------------------------------------------------------------------

CASES: Mapping[str, tuple[str, Mapping[str, Any], str]] = {
    "h264.mp4": ("libx264", {"options": SHORT_GOP}, "copied"),
    "h264.mov": ("libx264", {"options": SHORT_GOP}, "copied"),
    "h264.mkv": ("libx264", {"options": SHORT_GOP}, "copied"),
    "h265.mp4": ("libx265", {"options": {"x265-params": "keyint=6:open-gop=0:log-level=none"}}, "copied"),
    "vp9.webm": ("libvpx-vp9", {"options": {"g": "6", "cpu-used": "8", "lag-in-frames": "4"}}, "copied"),
    "av1.mp4": (
        "libsvtav1",
        {"options": {"g": "6", "preset": "12", "svtav1-params": "lp=1"}, "height": 66, "width": 98},
        "copied",
    ),
    "ten_bits.mp4": ("libx264", {"options": SHORT_GOP, "pixels": "yuv420p10le"}, "copied"),
    "odd.mkv": ("libvpx-vp9", {"options": {"g": "6", "cpu-used": "8"}, "height": 49, "width": 65}, "copied"),
    "turned.mp4": ("libx264", {"options": SHORT_GOP, "rotation": 90}, "copied"),
    "variable.mp4": ("libx264", {"options": {"g": "4"}}, "copied"),
    "one_keyframe.mp4": ("libx264", {"options": {"g": "500", "crf": "4"}, "rotation": 270}, "first copied"),
    "mpeg4.avi": ("mpeg4", {"options": SHORT_GOP | {"qscale": "2"}}, "encoded"),
    "animation.gif": ("gif", {"pixels": "rgb8"}, "lossless"),
}


@pytest.mark.parametrize("name", CASES)
def test_cuts_miss_no_frame_and_copy_where_they_can(tmp_path: Path, make_video: MakeVideo, name: str) -> None:
    codec, settings, way = CASES[name]
    ticks = list(itertools.accumulate(random.Random(1).choices([15, 30, 60], k=50))) if name == "variable.mp4" else None
    path = make_video(tmp_path / name, codec, frames=50, ticks=ticks, **settings)
    count = probe(path, decode=True).frames
    examined = examine(path, CutSettings(1.0, 5))
    assert examined.reason == ""
    clips = [*clips_of(path, examined, CutSettings(1.0, 5))]
    assert len(clips) >= 3
    full, first = read_clip(path, frames=count), 0
    for number, clip in enumerate(clips):
        assert isinstance(clip, Clip)
        assert clip.info.duration <= 1.11
        pictures = read_clip(clip.data, frames=clip.info.frames)
        expected = full[:, first : first + clip.info.frames]
        if way in ("copied", "lossless") or (way == "first copied" and number == 0):
            assert torch.equal(pictures, expected)
        else:
            assert (pictures.float() - expected.float()).abs().mean() < 5.0
            assert pictures.shape == expected.shape
        if way == "copied":
            assert clip.suffix == path.suffix[1:]
            assert clip.info.codec == probe(path).codec
        if ticks is not None:
            times = np.array(ticks[first : first + clip.info.frames]) / 600
            assert clip.info.fps == pytest.approx((clip.info.frames - 1) / (times[-1] - times[0]), rel=5e-3)
        first += clip.info.frames
    assert first == count


def test_a_rest_shorter_than_min_frames_stays_with_the_last_clip(tmp_path: Path, make_video: MakeVideo) -> None:
    path = make_video(tmp_path / "clip.mp4", frames=44, options={"g": "20", "sc_threshold": "0"})
    assert [piece.frames for piece in examine(path, CutSettings(1.0, 4)).pieces] == [20, 20, 4]
    assert [piece.frames for piece in examine(path, CutSettings(1.0, 5)).pieces] == [20, 24]
    assert examine(path, CutSettings(1.0, 45)).reason == "too short: 44 frames, min_frames=45"
    whole = examine(path, CutSettings(2.2, 5)).clip
    assert whole is not None
    assert whole.data == path.read_bytes()


def test_damage_in_a_long_video_costs_the_clip_it_is_in(
    tmp_path: Path, make_video: MakeVideo, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "videos").mkdir()
    path = make_video(tmp_path / "videos" / "long.mp4", frames=80, options={"g": "20"}, height=128, width=128)
    data = bytearray(path.read_bytes())
    examined = examine(path, CutSettings(1.0, 5))
    pieces, second = examined.pieces, [*clips_of(path, examined, CutSettings(1.0, 5))][1]
    assert isinstance(second, Clip)
    at = data.index(second.data[second.data.index(b"mdat") + 4 :][200:260])
    data[at : at + 400] = os.urandom(400)
    path.write_bytes(data)
    report = write_shards(tmp_path / "videos", tmp_path / "shards", clip_seconds=1.0, workers=0)
    starts = [entry.record["start"] for entry in check_folder(tmp_path / "shards")]
    assert starts == [piece.start for piece in pieces if piece is not pieces[1]]
    assert report.skipped[0][1].startswith("1 of its 4 clips left out (at 1.0 s: damaged")
    warned = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert [message.split(":")[0] for message in warned] == ["long.mp4"]
    os.utime(path)  # copied again, say: the same content needs no second look
    again = write_shards(tmp_path / "videos", tmp_path / "shards", clip_seconds=1.0, workers=0)
    assert (again.new_clips, again.clips) == (0, 3)


def test_line_separators_in_captions_and_names(tmp_path: Path, make_video: MakeVideo) -> None:
    (tmp_path / "videos").mkdir()
    path = make_video(tmp_path / "videos" / "one\u2028two.mp4", frames=9)
    path.with_suffix(".txt").write_text("a\u2029b\x85c", encoding="utf-8")
    for _ in range(2):
        report = write_shards(tmp_path / "videos", tmp_path / "shards", workers=0)
    assert (report.clips, report.new_clips) == (1, 0)
    (entry,) = check_folder(tmp_path / "shards")
    assert entry.record["source"] == path.name


# --- running again, kills, crashes ------------------------------------------------------------------------------------


def test_a_second_run_writes_nothing_and_new_files_are_appended(
    videos: Path, undisturbed: Path, tmp_path: Path, make_video: MakeVideo, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, output = tmp_path / "videos", tmp_path / "shards"
    shutil.copytree(videos, inputs)
    write_shards(inputs, output, **SETTINGS)
    assert content(output).keys() == content(undisturbed).keys()
    before = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr("osp.data.shards.build.examine", None)  # nothing may be read
        report = write_shards(inputs, output, **SETTINGS)
    assert (report.clips, report.new_clips) == (14, 0)
    assert {path: path.stat().st_mtime_ns for path in output.iterdir()} == before

    make_video(inputs / "added.mp4", frames=7)
    make_video(inputs / "broken.mp4", frames=6)  # mended
    os.utime(inputs / "long.mp4", ns=(1, 1))  # same content
    report = write_shards(inputs, output, **SETTINGS)
    entries = check_folder(output)
    assert [entry.record["source"] for entry in entries[14:]] == ["added.mp4", "broken.mp4"]
    assert (report.new_clips, report.shards, report.skipped) == (2, 6, ())
    for path, stamp in before.items():
        if path.name.startswith("shard-"):
            assert path.stat().st_mtime_ns == stamp
    assert write_shards(inputs, output, **SETTINGS).new_clips == 0


def test_a_changed_source_is_added_again_with_a_warning(
    tmp_path: Path, make_video: MakeVideo, caplog: pytest.LogCaptureFixture
) -> None:
    inputs, output = tmp_path / "videos", tmp_path / "shards"
    inputs.mkdir()
    make_video(inputs / "clip.mp4", frames=8)
    write_shards(inputs, output, workers=0)
    make_video(inputs / "clip.mp4", frames=9)
    write_shards(inputs, output, workers=0)
    assert [entry.record["frames"] for entry in check_folder(output)] == [8, 9]
    assert "has changed since it was stored" in caplog.text


def test_killed_at_any_moment_the_end_is_the_same(videos: Path, undisturbed: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    draw = random.Random(0)
    expected = content(undisturbed)
    kills = 0
    for attempt in range(14):
        output = tmp_path / f"shards{attempt % 2}"  # two folders, so that some are killed again and again
        settings = {**SETTINGS, "workers": 2 if attempt < 4 else 0}
        process = context.Process(target=write_shards, args=(videos, output), kwargs=settings)
        process.start()
        begin = time.monotonic()
        while not (output / ".lock").exists() and time.monotonic() - begin < 30:
            time.sleep(0.002)
        time.sleep(draw.uniform(0.0, 0.25))
        process.kill()
        process.join()
        kills += process.exitcode == -9
        index = output / "index.json"
        if index.exists() and json.loads(index.read_text())["shards"]:
            for entry in read_index(output):  # what a reader takes is whole
                assert len(entry.read()) == entry.size
    assert kills >= 5
    for number in range(2):
        write_shards(videos, tmp_path / f"shards{number}", **SETTINGS)
        assert content(tmp_path / f"shards{number}") == expected


@pytest.mark.parametrize("name", ["replace", "fsync"])
def test_cut_off_before_any_step_of_a_commit_the_end_is_the_same(
    videos: Path, undisturbed: Path, name: str, cut_off: Callable[..., Iterator[Path]]
) -> None:
    """Every rename and every flush is once the last thing that does not happen any more."""
    folders = list(cut_off(name, lambda folder: write_shards(videos, folder, **SETTINGS)))
    assert len(folders) > 8 + 1
    for folder in folders:
        assert content(folder) == content(undisturbed)


def test_a_decoder_crash_costs_its_source_only(
    videos: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "crashing_decoder.py").write_text(
        "import os, signal\n"
        "from osp.data.media.clips import examine as real\n"
        "def examine(path, *arguments):\n"
        "    if path.name == 'short 2.mp4':\n"
        "        os.kill(os.getpid(), signal.SIGSEGV)\n"
        "    return real(path, *arguments)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import crashing_decoder

    monkeypatch.setattr("osp.data.shards.build.examine", crashing_decoder.examine)
    report = write_shards(videos, tmp_path / "shards", **{**SETTINGS, "workers": 2})
    assert dict(report.skipped)["deep/short 2.mp4"] == "the decoder crashed on it"
    stored = [entry.record["source"] for entry in check_folder(tmp_path / "shards")]
    expected = [entry.record["source"] for entry in read_index(undisturbed)]
    assert stored == [source for source in expected if source != "deep/short 2.mp4"]
    assert write_shards(videos, tmp_path / "shards", **{**SETTINGS, "workers": 2}).new_clips == 0


def test_calls_that_kill_their_process_cost_their_own_result_only() -> None:
    calls: list[tuple[Any, ...]] = [(os.path.basename, f"/x/{number}") for number in range(9)]
    calls[2], calls[6] = (os._exit, 1), (os.abort,)
    with Workers(2) as workers:
        results = list(workers.in_order(calls))
    assert [isinstance(result, Crashed) for result in results] == [number in (2, 6) for number in range(9)]
    assert [result for result in results if not isinstance(result, Crashed)] == list("0134578")


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_two_writers_in_one_folder_are_refused(videos: Path, tmp_path: Path) -> None:
    def clips() -> Iterator[tuple[str, torch.Tensor, dict[str, Any]]]:
        with pytest.raises(UsageError, match="another run is writing shards here"):
            write_shards(videos, tmp_path, workers=0)
        yield "only", torch.zeros(3, 5, 16, 16, dtype=torch.uint8), {"fps": 8.0}

    assert write_rendered(clips(), tmp_path).clips == 1


@pytest.mark.parametrize(("name", "value"), [("clip_seconds", 2.0), ("min_frames", 9)])
def test_other_settings_are_refused_by_name(
    videos: Path, undisturbed: Path, tmp_path: Path, name: str, value: float
) -> None:
    output = tmp_path / "shards"
    shutil.copytree(undisturbed, output)
    with pytest.raises(UsageError, match=rf"written with {name}=.*, now {name}={value}; give {name}="):
        write_shards(videos, output, **{**SETTINGS, name: value})
    assert content(output) == content(undisturbed)
    write_shards(videos, output, **{**SETTINGS, "shard_clips": 7})  # this changes no clip


def test_bad_arguments_are_told_before_anything_is_written(videos: Path, tmp_path: Path) -> None:
    output = tmp_path / "shards"
    for settings, message in [
        ({"clip_seconds": 0.0}, "clip_seconds=0.0"),
        ({"min_frames": 0}, "min_frames=0"),
        ({"shard_clips": 0}, "shard_clips=0"),
        ({"workers": -1}, "workers=-1"),
        ({"captions": videos / "gone.jsonl"}, r"gone\.jsonl: cannot be read"),
        ({"captions": videos / "notes.doc"}, r"must be a \.jsonl, \.json or \.csv file"),
    ]:
        with pytest.raises(UsageError, match=message):
            write_shards(videos, output, **settings)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="gone: no such folder"):
        write_shards(tmp_path / "gone", output)
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="none: no videos or images in it"):
        write_shards(tmp_path / "none", output)
    assert not output.exists()


def test_nothing_readable_is_an_error_with_the_first_reason(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").touch()
    (tmp_path / "videos" / "b.mp4").write_text("text")
    for _ in range(2):
        with pytest.raises(
            DataError, match=r"none of its 2 files could be stored \(first, a\.mp4: the file is empty\)"
        ):
            write_shards(tmp_path / "videos", tmp_path / "shards", workers=0)


def test_foreign_tars_are_neither_mixed_with_nor_deleted(videos: Path, tmp_path: Path) -> None:
    (tmp_path / "shard-000000.tar").write_bytes(b"precious")
    with pytest.raises(UsageError, match="holds tars that OSP did not write"):
        write_shards(videos, tmp_path, **SETTINGS)
    assert (tmp_path / "shard-000000.tar").read_bytes() == b"precious"


# --- captions ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def four(tmp_path: Path, make_video: MakeVideo) -> Path:
    folder = tmp_path / "four"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.mp4", "b.mp4", "sub/c.mp4", "sub/d.mp4"):
        make_video(folder / name, frames=6)
    return folder


def captions_of(output: Path) -> dict[str, tuple[str, dict[str, float]]]:
    return {entry.record["source"]: (entry.record["caption"], entry.record["scores"]) for entry in read_index(output)}


def test_captions_from_jsonl_csv_and_side_cars(four: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        {"file": "four/a.mp4", "caption": "一只猫 ", "aesthetic": 5.5, "id": "0012", "good": True, "motion": 3},
        {"file": "sub/c.mp4", "caption": "old"},
        {"file": "sub/c.mp4", "caption": "new"},
        {"file": "gone.mp4", "caption": "nothing"},
    ]
    jsonl = tmp_path / "captions.jsonl"
    jsonl.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    (four / "b.txt").write_text("from a text\n")
    (four / "a.txt").write_text("the captions file goes first")
    (four / "sub" / "d.json").write_text(json.dumps({"caption": "from JSON", "motion": 0.5}))
    report = write_shards(four, tmp_path / "one", captions=jsonl, workers=0)
    assert captions_of(tmp_path / "one") == {
        "a.mp4": ("一只猫", {"aesthetic": 5.5, "motion": 3.0}),
        "b.mp4": ("from a text", {}),
        "sub/c.mp4": ("new", {}),
        "sub/d.mp4": ("from JSON", {"motion": 0.5}),
    }
    assert (report.captioned, report.captions_missing) == (4, 1)
    assert "1 of the 3 files it names do not exist (first: gone.mp4)" in caplog.text

    table = four / "captions.csv"
    table.write_text('\ufeffpath,caption,aesthetic,label\na.mp4,"one, two",4.25,x\nsub/d.mp4,three,,7\n')
    write_shards(four, tmp_path / "two", captions=table, workers=0)
    found = captions_of(tmp_path / "two")
    assert found["a.mp4"] == ("one, two", {"aesthetic": 4.25})
    assert found["sub/d.mp4"] == ("three", {"label": 7.0})
    assert found["b.mp4"] == ("from a text", {})


def test_captions_that_came_later_are_not_silently_lost(four: Path, tmp_path: Path) -> None:
    write_shards(four, tmp_path / "shards", workers=0)
    (four / "b.txt").write_text("late")
    with pytest.raises(UsageError, match=r"1 of its 4 sources are stored with other captions.*\(first: b\.mp4\)"):
        write_shards(four, tmp_path / "shards", workers=0)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.jsonl", '{"file": "a.mp4", "caption": "x"}\n{"file":', r"c\.jsonl:2: is no JSON"),
        ("c.jsonl", "[1]", r"c\.jsonl:1: not an object"),
        ("c.jsonl", '{"caption": "x"}', r"c\.jsonl:1: names no file"),
        ("c.jsonl", '{"file": "a.mp4", "caption": [5]}', r"c\.jsonl:1: its caption is not a text"),
        ("c.csv", "name,text\na,b\n", r"c\.csv:2: names no file under file, .*; its keys are name, text"),
    ],
)
def test_a_captions_file_that_makes_no_sense_is_told_by_line(
    four: Path, tmp_path: Path, name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        write_shards(four, tmp_path / "shards", captions=tmp_path / name, workers=0)


# --- rendered clips ---------------------------------------------------------------------------------------------------


class Rendered(list[tuple[str, torch.Tensor, dict[str, Any]]]):
    """Clips that count how often they are rendered."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        for number in range(count):
            video = torch.randint(0, 256, (3, 5, 18, 22), dtype=torch.uint8, generator=generator)
            record = {"fps": 8.0, "caption": f"clip {number}", "scores": {"shapes": 2.0}, "shapes": ["disc"]}
            self.append((f"clip-{number:04d}", video, record))
        self.rendered: list[int] = []

    def __getitem__(self, number: Any) -> Any:
        self.rendered.append(number)
        return super().__getitem__(number)


@pytest.mark.parametrize("lossless", [True, False])
def test_rendered_clips_go_on_after_the_last_shard(tmp_path: Path, lossless: bool) -> None:
    settings: Mapping[str, Any] = {"settings": {"seed": 3, "size": (18, 22)}, "lossless": lossless, "shard_clips": 2}
    clips = Rendered(7)
    write_rendered(clips, tmp_path / "whole", **settings)

    def cut_off() -> Iterator[Any]:
        yield from (clips[number] for number in range(5))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_rendered(cut_off(), tmp_path / "resumed", **settings)
    clips.rendered.clear()
    report = write_rendered(clips, tmp_path / "resumed", **settings)
    assert clips.rendered == [4, 5, 6]
    assert (report.clips, report.new_clips, report.captioned) == (7, 3, 7)
    assert write_rendered(iter(clips), tmp_path / "resumed", **settings).new_clips == 0
    whole, resumed = content(tmp_path / "whole"), content(tmp_path / "resumed")
    assert whole == resumed
    for (key, video, record), entry in zip(clips, read_index(tmp_path / "whole"), strict=True):
        assert entry.key == key
        assert entry.record.items() >= (record | {"frames": 5, "height": 18, "width": 22, "kind": "video"}).items()
        assert torch.equal(read_clip(entry.read(), frames=5), video) == lossless
    with pytest.raises(UsageError, match="seed=3, now seed=4"):
        write_rendered(clips, tmp_path / "whole", **{**settings, "settings": {"seed": 4, "size": (18, 22)}})
    with pytest.raises(UsageError, match="shards of another kind"):
        write_shards(tmp_path, tmp_path / "whole", workers=0) if (tmp_path / "x.mp4").write_bytes(b"") == 0 else None


@pytest.mark.parametrize("key", ["a.b", "a/b", "", "again"])
def test_keys_that_would_break_a_shard_are_refused(tmp_path: Path, key: str) -> None:
    video = torch.zeros(3, 5, 16, 16, dtype=torch.uint8)
    with pytest.raises(UsageError, match="key"):
        write_rendered([("again", video, {"fps": 8.0}), (key, video, {"fps": 8.0})], tmp_path)


# --- reading ----------------------------------------------------------------------------------------------------------


def test_foreign_shards_are_listed_by_their_headers(tmp_path: Path, make_video: MakeVideo) -> None:
    video = make_video(tmp_path / "clip.mp4", frames=6).read_bytes()
    with webdataset.TarWriter(str(tmp_path / "00000.tar")) as writer:
        writer.write({"__key__": "00000_1", "mp4": video, "json": {"caption": "from JSON", "fps": "?", "frames": 6}})
        writer.write({"__key__": "00000_2", "mp4": video, "txt": "from a text\n", "jpg": b"thumbnail"})
        writer.write({"__key__": "00000_3", "txt": "no video"})
        writer.write({"__key__": "00000_4", "png": b"\x89PNG"})
    entries = read_index(tmp_path)
    assert [(entry.key, entry.member) for entry in entries] == [
        ("00000_1", "00000_1.mp4"),
        ("00000_2", "00000_2.mp4"),
        ("00000_4", "00000_4.png"),
    ]
    assert entries[0].record == {"kind": "video", "caption": "from JSON", "frames": 6}
    assert entries[1].record == {"kind": "video", "caption": "from a text"}
    assert entries[2].record == {"kind": "image"}
    assert entries[1].read() == video


def test_a_foreign_tar_cut_short_keeps_its_first_clips(
    tmp_path: Path, make_video: MakeVideo, caplog: pytest.LogCaptureFixture
) -> None:
    video = make_video(tmp_path / "clip.mp4", frames=6).read_bytes()
    with webdataset.TarWriter(str(tmp_path / "0.tar")) as writer:
        for number in range(4):
            writer.write({"__key__": f"k{number}", "mp4": video})
    data = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(data[: data.index(b"k2.mp4") + 700])
    entries = read_index(tmp_path)
    assert [entry.key for entry in entries][:2] == ["k0", "k1"]
    assert entries[1].read() == video
    for entry in entries[2:]:
        with pytest.raises(DataError, match="ends inside"):
            entry.read()


def test_folders_that_cannot_be_read_say_why(undisturbed: Path, tmp_path: Path) -> None:
    for folder, message in [(tmp_path / "gone", "no such folder"), (tmp_path, "no videos or images in it")]:
        with pytest.raises(DataError, match=message):
            read_index(folder)
    broken = tmp_path / "shards"
    shutil.copytree(undisturbed, broken)
    tar = broken / "shard-000001.tar"
    data = tar.read_bytes()
    tar.write_bytes(data[:-1])
    with pytest.raises(DataError, match=r"shard-000001\.tar: has \d+ bytes"):
        read_index(broken)
    tar.unlink()
    with pytest.raises(DataError, match=r"shard-000001\.tar: index\.json needs it"):
        read_index(broken)
    (broken / "index.json").write_text("{")
    with pytest.raises(DataError, match="not a readable index"):
        read_index(broken)
