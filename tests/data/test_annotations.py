"""Annotations as published become shards; crop and cut give the pixels of cutting and cropping by hand."""

import io
import json
import logging
import pickle
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from osp.data.buckets import TokenRule
from osp.data.media.part import Part
from osp.data.media.shape import Shape, Strides
from osp.data.media.video import ClipError, encode_video, read_clip
from osp.data.media.whole import stream_video
from osp.data.shards.annotated import write_annotated
from osp.data.shards.index import read_index
from osp.data.shards.stored import ShardReport
from osp.data.sources import BucketClips, OwnSizeClips, ShardClips
from osp.data.streaming import RemoteShards
from osp.errors import DataError, UsageError

HEIGHT, WIDTH, FRAMES, FPS = 48, 64, 40, 24.0
RESOLUTION = {"height": HEIGHT, "width": WIDTH}
GOOD = {"path": "a.mp4", "cap": ["first", "second"], "resolution": RESOLUTION, "num_frames": 20, "fps": FPS}
PART = {"cut": [12, 32], "crop": [5, 40, 3, 34]}  # odd places and sizes, which 4:2:0 alone could not hold


def moving(seed: int) -> Tensor:
    """Blobs that differ in each frame, `3 T H W`."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.randint(0, 255, (FRAMES, 3, 6, 8), generator=generator).float()
    large = torch.nn.functional.interpolate(small, (HEIGHT, WIDTH), mode="bilinear")
    return large.permute(1, 0, 2, 3).to(torch.uint8)


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder `media` of two videos, a picture, and a file that is none of them."""
    folder = tmp_path_factory.mktemp("annotated") / "media"
    folder.mkdir()
    for seed, name in enumerate(("a.mp4", "b.mp4")):
        (folder / name).write_bytes(encode_video(moving(seed), FPS, threads=1))
    rows = torch.arange(40 * 60).reshape(40, 60).remainder(251).to(torch.uint8)
    Image.fromarray(rows.unsqueeze(-1).expand(-1, -1, 3).numpy()).save(folder / "p.jpg", quality=95)
    (folder / "broken.mp4").write_bytes(b"no video at all")
    return folder


def store(media: Path, records: Sequence[Any], output: Path, **settings: Any) -> ShardReport:
    """The shards of records, by a list of one line."""
    (output.parent / "anno.json").write_text(json.dumps(records))
    listed = output.parent / "data.txt"
    listed.write_text(f"\n{media},{output.parent / 'anno.json'}\n\n")
    return write_annotated(listed, output, workers=0, **settings)


def by_hand(path: Path) -> NDArray[np.uint8]:
    """All frames of a file, `T H W C`, as the reader converts them."""
    frames = read_clip(path, frames=FRAMES)
    with av.open(str(path)) as container:
        count = sum(1 for _ in container.decode(video=0))
    assert count == FRAMES
    return frames.permute(1, 2, 3, 0).numpy()


# --- pixels -----------------------------------------------------------------------------------------------------------


def test_crop_and_cut_give_the_pixels_of_cutting_and_cropping_by_hand(media: Path, tmp_path: Path) -> None:
    store(media, [GOOD | PART], tmp_path / "s")
    (entry,) = read_index(tmp_path / "s")
    assert {key: entry.record[key] for key in ("frames", "height", "width", "cut", "crop")} == {
        "frames": 20, "height": 31, "width": 35, "cut": [12, 32], "crop": [5, 40, 3, 34],
    }  # fmt: skip
    assert entry.read() == (media / "a.mp4").read_bytes()
    expected = by_hand(media / "a.mp4")[12:32, 3:34, 5:40]
    clip = ShardClips(tmp_path / "s", 20, 31, 35, random_start=False).read(0, 0)
    assert np.array_equal(clip["video"].permute(1, 2, 3, 0).numpy(), expected)
    strided = ShardClips(tmp_path / "s", 7, 31, 35, stride=3, random_start=False).read(0, 0)["video"]
    assert np.array_equal(strided.permute(1, 2, 3, 0).numpy(), expected[:19:3])


def test_frames_decoded_by_pyav_and_cropped_by_numpy_are_the_clip(media: Path) -> None:
    """The decoder's own frames in RGB, without any of this project's code between."""
    video = encode_video(moving(5), FPS, lossless=True, threads=1)
    with av.open(io.BytesIO(video)) as container:
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    part = Part((9, 21), (1, 24, 7, 40))
    clip = read_clip(video, frames=12, part=part)
    assert np.array_equal(clip.permute(1, 2, 3, 0).numpy(), decoded[9:21, 7:40, 1:24])


def test_scaling_comes_after_cropping(media: Path) -> None:
    cropped = read_clip(media / "a.mp4", frames=1, part=Part((4, 5), (0, 32, 0, 32)))
    again = encode_video(cropped, FPS, lossless=True, threads=1)
    scaled = read_clip(media / "a.mp4", frames=1, size=(16, 16), part=Part((4, 5), (0, 32, 0, 32)))
    assert (scaled.int() - read_clip(again, frames=1, size=(16, 16)).int()).abs().max() <= 1


def test_training_windows_begin_anywhere_in_the_cut_and_nowhere_else(media: Path, tmp_path: Path) -> None:
    store(media, [GOOD | PART], tmp_path / "s")
    whole = by_hand(media / "a.mp4")[:, 3:34, 5:40]
    clips = ShardClips(tmp_path / "s", 15, 31, 35)
    starts = set()
    for draw in range(60):
        video = clips.read(0, draw)["video"].permute(1, 2, 3, 0).numpy()
        starts.add(next(n for n in range(FRAMES - 14) if np.array_equal(whole[n : n + 15], video)))
    assert starts == {*range(12, 18)}
    timed = ShardClips(tmp_path / "s", 10, 31, 35, fps=12.0)
    for draw in range(40):
        first = timed.read(0, draw)["video"][:, 0].permute(1, 2, 0).numpy()
        assert any(np.array_equal(first, frame) for frame in whole[12:15])


def test_pieces_of_own_sizes_are_those_of_the_part(media: Path, tmp_path: Path) -> None:
    store(media, [GOOD | PART], tmp_path / "s")
    clip = OwnSizeClips(tmp_path / "s", Strides(4, 1)).read(0, 0)
    pieces = torch.cat([*clip["pieces"]], dim=1).permute(1, 2, 3, 0).numpy()
    assert (clip["height"], clip["width"], clip["expected"]) == (31, 35, 20)
    assert np.array_equal(pieces, by_hand(media / "a.mp4")[12:32, 3:34, 5:40])
    with pytest.raises(ClipError, match="no part of 40 frames"):
        list(stream_video(media / "a.mp4", "a", size=(8, 8), part=Part((30, 41))))


def test_images_are_cropped_too(media: Path, tmp_path: Path) -> None:
    store(media, [{"path": "p.jpg", "cap": "lines", "resolution": RESOLUTION, "crop": [7, 30, 2, 21]}], tmp_path / "s")
    clip = ShardClips(tmp_path / "s", 1, 19, 23, random_start=False).read(0, 0)["video"]
    with Image.open(media / "p.jpg") as picture:
        assert np.array_equal(clip[:, 0].permute(1, 2, 0).numpy(), np.asarray(picture.convert("RGB"))[2:21, 7:30])


def test_buckets_count_sizes_after_the_crop(media: Path, tmp_path: Path) -> None:
    store(media, [GOOD | PART | {"crop": [0, 32, 0, 32]}, GOOD | {"num_frames": FRAMES}], tmp_path / "s")
    clips = BucketClips(tmp_path / "s", TokenRule(4, 8, 2, max_tokens=1000, size_stride=16))
    assert {bucket.shape for bucket in clips.buckets()} == {Shape(17, 32, 32), Shape(37, 48, 64)}


@pytest.mark.parametrize("place", ["folder", "tars"])
def test_shards_from_elsewhere_are_cut_and_cropped_alike(media: Path, tmp_path: Path, place: str) -> None:
    """Also without the index: the tars alone tell which clips share a file, and which parts they are."""
    records = [GOOD | PART, GOOD | {"cut": [0], "crop": [0, 10, 0, 10]}, GOOD | {"path": "b.mp4", "num_frames": FRAMES}]
    store(media, records, tmp_path / "s")
    urls = str(tmp_path / "s") if place == "folder" else str(tmp_path / "s" / "shard-000000.tar")
    there = ShardClips(RemoteShards(urls, cache=tmp_path / "cache"), 5, 31, 35, random_start=False)
    here = ShardClips(tmp_path / "s", 5, 31, 35, random_start=False)
    assert [entry.key for entry in there.entries] == [entry.key for entry in here.entries]
    for index in range(3):
        assert torch.equal(there.read(index, 0)["video"], here.read(index, 0)["video"])


# --- records ----------------------------------------------------------------------------------------------------------

BAD: dict[str, list[Any]] = {
    "records without a caption": [GOOD | {"cap": None}, GOOD | {"cap": [""]}, {"path": "a.mp4", "resolution": {}}],
    "records whose caption is no text, nor a list of texts": [GOOD | {"cap": [3]}],
    "records without a resolution above 0": [
        {key: value for key, value in GOOD.items() if key != "resolution"},
        *(GOOD | {"resolution": said} for said in (None, {"height": 0, "width": 64}, {"height": 48, "width": -1})),
    ],
    "records of files that are neither .mp4 nor .jpg": [GOOD | {"path": "a.avi"}, GOOD | {"path": "a"}],
    "records whose file does not exist": [GOOD | {"path": "gone.mp4"}],
    "records without a path": [GOOD | {"path": ""}, GOOD | {"path": 3}, GOOD | {"path": "a\0.mp4"}],
    "records whose path leads out of their folder (strip=PREFIX shortens absolute ones)": [
        GOOD | {"path": "../a.mp4"},
        GOOD | {"path": "/etc/a.mp4"},
    ],
    "records whose fps is no number above 0": [GOOD | {"fps": said} for said in (0, -24, "fast", [24])],
    "records whose num_frames or duration is no number above 0": [GOOD | {"num_frames": said} for said in (0, -1, "x")],
    "records whose cut is no list that begins with a frame's number": [
        GOOD | {"cut": said} for said in (7, [], [-1], ["0"], [1.5])
    ],
    "records whose crop is no list x0, x1, y0, y1 of pixels": [GOOD | {"crop": said} for said in ("all", [0, 8, 0])],
    "records whose crop lies outside the frame": [
        GOOD | {"crop": said} for said in ([0, 65, 0, 8], [0, 8, 0, 49], [8, 8, 0, 8], [-1, 8, 0, 8], [9, 8, 0, 8])
    ],
    "records whose cut or num_frames goes beyond the end of the file": [
        GOOD | {"cut": [21]},
        GOOD | {"cut": [40], "num_frames": 1},
        GOOD | {"num_frames": 41},
    ],
    "records of files that cannot be read": [GOOD | {"path": "broken.mp4"}],
    "records that are no objects": [7, None, "a.mp4", [GOOD]],
}


def test_each_kind_of_bad_record_is_counted_by_its_reason_and_costs_nothing_else(
    media: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = [GOOD, *(record for bad in BAD.values() for record in bad), GOOD | PART]
    with caplog.at_level(logging.WARNING):
        report = store(media, records, tmp_path / "s")
        report.summary("here").log()
    assert report.left_out == {reason: len(bad) for reason, bad in BAD.items()}
    assert report.clips == 2
    assert "4 records without a resolution above 0" in caplog.messages[-1]
    again = store(media, records, tmp_path / "s")  # counts of what is stored already come from the journal
    assert (again.left_out, again.new_clips) == (report.left_out, 0)


def test_a_file_with_many_records_is_stored_once(media: Path, tmp_path: Path) -> None:
    store(media, [GOOD | {"cut": [first]} for first in range(10)], tmp_path / "s", shard_clips=3)
    entries = read_index(tmp_path / "s")
    assert len({entry.offset for entry in entries}) == 1
    assert len({entry.key for entry in entries}) == len(entries) == 10
    with tarfile.open(tmp_path / "s" / "shard-000000.tar") as tar:
        names = tar.getnames()
    assert [name for name in names if name.endswith(".mp4")] == ["000000-a-00.mp4"]
    assert len(names) == 11


@pytest.mark.parametrize(
    ("said", "part"),
    [
        ({"frame_idx": "5:20"}, [5, 20]),  # v1.1
        ({"frame_idx": "5:20", "num_frames": 9}, [5, 14]),
        ({"frame_idx": "30:95"}, [30, 40]),  # its end is not to be trusted
        ({"frame_idx": None}, None),
        ({"fps": 24, "duration": 0.9, "resolution": RESOLUTION}, [0, 21]),  # v1.2: int(fps * duration)
        ({"fps": 24, "duration": 9.0, "resolution": RESOLUTION}, None),
        ({"fps": 24, "num_frames": 40, "cut": [0, 40], "resolution": RESOLUTION}, None),  # v1.3
        ({"fps": 24, "num_frames": 7, "cut": [3, 99, 1], "resolution": RESOLUTION}, [3, 10]),
        ({"num_frames": 7, "cut": [33.0], "resolution": RESOLUTION}, [33, 40]),
        ({}, None),  # v1.0
    ],
)
def test_each_version_says_in_its_own_way_which_frames(
    media: Path, tmp_path: Path, said: dict[str, Any], part: list[int] | None
) -> None:
    store(media, [{"path": "a.mp4", "cap": ["text"]} | said], tmp_path / "s")
    (entry,) = read_index(tmp_path / "s")
    assert entry.record.get("cut") == part


def test_the_resized_file_of_v11_is_preferred(media: Path, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    for name, seed in (("c.mp4", 0), ("c_resize_1080p.mp4", 1)):
        (tmp_path / "m" / name).write_bytes(encode_video(moving(seed)[:, :6], FPS, threads=1))
    store(tmp_path / "m", [{"path": "c.mp4", "cap": "x", "frame_idx": "0:5"}], tmp_path / "s")
    assert read_index(tmp_path / "s")[0].read() == (tmp_path / "m" / "c_resize_1080p.mp4").read_bytes()


def test_absolute_paths_of_another_machine_are_stripped(media: Path, tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(json.dumps([{"path": "/their/data/a.mp4", "cap": ["first", "second"]}]))
    report = write_annotated(tmp_path / "one.json", tmp_path / "s", folder=media, strip="/their/data", workers=0)
    (entry,) = read_index(tmp_path / "s")
    assert (report.clips, entry.record["source"], entry.record["captions"]) == (1, "a.mp4", ["first", "second"])


def test_scores_come_along_and_aes_is_called_aesthetic(media: Path, tmp_path: Path) -> None:
    said = {"aes": 5.5, "motion": 0.01, "duration": 1.0, "tags": ["x"], "good": True}
    store(media, [GOOD | said], tmp_path / "s")
    assert read_index(tmp_path / "s")[0].record["scores"] == {"aesthetic": 5.5, "motion": 0.01}


# --- other files ------------------------------------------------------------------------------------------------------


def test_a_pickle_is_refused_in_one_line_and_not_run(media: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "anno.pkl").write_bytes(pickle.dumps([Trap()]))
    (tmp_path / "data.txt").write_text(f"{media},anno.pkl\n")
    for path in (tmp_path / "anno.pkl", tmp_path / "data.txt"):
        with pytest.raises(UsageError, match=r"anno\.pkl: is a pickle, and reading it would run code") as error:
            write_annotated(path, tmp_path / "s", workers=0)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{media}\n", r"data\.txt:1: must be FOLDER,ANNOTATION"),
        ("\n{media},a,b\n", r"data\.txt:2: must be FOLDER,ANNOTATION"),
        ("{media},gone.json\n", r"data\.txt:1: gone\.json does not exist"),
        ("gone,anno.json\n", r"data\.txt:1: gone is no folder"),
        ("{media},data.txt\n", r"data\.txt: must be a \.json"),
        ("\n \n", r"data\.txt: is empty"),
    ],
)
def test_a_bad_line_of_a_list_is_named(media: Path, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "anno.json").write_text("[]")
    (tmp_path / "data.txt").write_text(content.format(media=media))
    with pytest.raises((DataError, UsageError), match=message):
        write_annotated(tmp_path / "data.txt", tmp_path / "s", workers=0)


def test_the_csv_of_the_other_open_sora_is_read(media: Path, tmp_path: Path) -> None:
    header = "path,text,num_frames,fps,height,width,aspect_ratio,resolution,aes,flow\n"
    row = f'{media}/a.mp4,"a dog, brown",39,24.0,48,64,0.75,3072,5.1,0.7\n'
    (tmp_path / "meta.csv").write_text(header + row + f"{media}/b.mp4,,39,24.0,48,64,0.75,3072,,\n")
    report = write_annotated(tmp_path / "meta.csv", tmp_path / "s", folder=media, workers=0)
    (entry,) = read_index(tmp_path / "s")
    assert report.left_out == {"records without a caption": 1}
    assert (entry.record["caption"], entry.record["frames"]) == ("a dog, brown", FRAMES)
    assert entry.record["scores"] == {"aesthetic": 5.1, "flow": 0.7}


@pytest.mark.parametrize("form", ["metadata.jsonl", "metadata.csv", "prompts.txt"])
def test_folders_of_finetrainers_are_read(media: Path, tmp_path: Path, form: str) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for name in ("a.mp4", "b.mp4"):
        (folder / name).symlink_to(media / name)
    if form == "metadata.jsonl":
        rows = [{"file_name": f"{name}.mp4", "caption": f"clip {name}"} for name in "ab"]
        (folder / form).write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif form == "metadata.csv":
        (folder / form).write_text("file_name,caption\na.mp4,clip a\nb.mp4,clip b\n")
    else:
        (folder / form).write_text("clip a\nclip b\n")
        (folder / "videos.txt").write_text("a.mp4\nb.mp4\n")
    write_annotated(folder, tmp_path / "s", workers=0)
    said = {entry.record["source"]: entry.record["caption"] for entry in read_index(tmp_path / "s")}
    assert said == {"a.mp4": "clip a", "b.mp4": "clip b"}


def test_a_second_run_adds_what_is_new_and_refuses_what_has_changed(media: Path, tmp_path: Path) -> None:
    store(media, [GOOD | PART], tmp_path / "s")
    report = store(media, [GOOD | PART, GOOD | {"path": "b.mp4"}], tmp_path / "s")
    assert (report.clips, report.new_clips) == (2, 1)
    with pytest.raises(UsageError, match=r"other records than the annotations now say \(first: .*a\.mp4\)"):
        store(media, [GOOD | PART | {"crop": None}], tmp_path / "s")


def test_damaged_parts_of_a_listing_are_refused(media: Path, tmp_path: Path) -> None:
    store(media, [GOOD | PART], tmp_path / "s")
    listing = tmp_path / "s" / "shard-000000.jsonl"
    line = json.loads(listing.read_text())
    index = json.loads((tmp_path / "s" / "index.json").read_text())
    del index["sha256"], index["shards"][0]["listing_sha256"]
    (tmp_path / "s" / "index.json").write_text(json.dumps(index))
    for wrong in ({"cut": [5, 5]}, {"cut": [1]}, {"crop": [0, 8, 4, 2]}, {"crop": [1, 2, 3]}, {"cut": "x"}):
        listing.write_text(json.dumps(line | wrong) + "\n")
        with pytest.raises(DataError, match=r"jsonl:1: (cut|crop)"):
            read_index(tmp_path / "s")
    listing.write_text(json.dumps(line | {"crop": [0, 65, 0, 8]}) + "\n")
    with pytest.raises(ClipError, match="is no part of frames 64 wide and 48 high"):
        ShardClips(tmp_path / "s", 5, 8, 8).read(0, 0)
