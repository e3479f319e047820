"""Other captions for shards that exist, and captions that are drawn or get words for their scores."""

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from osp.data.shards.annotated import write_annotated
from osp.data.shards.build import write_rendered
from osp.data.shards.index import read_index
from osp.data.shards.recaption import write_recaptioned
from osp.data.sources import ShardClips
from osp.data.sources.words import SENTENCES, with_aesthetic_words
from osp.errors import DataError, UsageError
from osp.seeds import seeded


def clip(number: int, **more: Any) -> tuple[str, torch.Tensor, dict[str, Any]]:
    video = torch.full((3, 3, 16, 16), 30 * number, dtype=torch.uint8)
    record = {"fps": 8.0, "caption": f"old {number}", "scores": {"aesthetic": 6.0, "motion": 0.5}}
    return f"clip{number}", video, record | more


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five clips in shards of two; the last two come from one source."""
    folder = tmp_path_factory.mktemp("recaption") / "shards"
    clips = [clip(number) for number in range(3)] + [clip(number, source="film.mp4") for number in (3, 4)]
    write_rendered(clips, folder, shard_clips=2)
    return folder


ROWS = [
    {"file": "clip0", "caption": ["new", "newer"], "aesthetic": 4.0},
    {"file": "film.mp4", "text": "of the film"},
    {"file": "clip4", "text": "its own"},
    {"file": "clip2", "caption": "old 2", "flow": 1.0},
]


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    path = tmp_path / "new.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_captions_change_and_videos_stay_byte_for_byte(shards: Path, captions: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in shards.iterdir()}
    report = write_recaptioned(shards, captions, tmp_path / "new", shard_clips=2)
    assert {path.name: path.read_bytes() for path in shards.iterdir()} == before
    assert (report.clips, report.changed, report.captions_missing) == (5, 4, 0)
    old, new = read_index(shards), read_index(tmp_path / "new")
    assert [entry.record["caption"] for entry in new] == ["new", "old 1", "old 2", "of the film", "its own"]
    assert [entry.record.get("captions") for entry in new] == [["new", "newer"], None, None, None, None]
    assert [bool(entry.record.get("recaptioned")) for entry in new] == [True, False, False, True, True]
    assert new[0].record["scores"] == {"aesthetic": 4.0, "motion": 0.5}
    assert new[2].record["scores"] == {"aesthetic": 6.0, "motion": 0.5, "flow": 1.0}
    for mine, its in zip(new, old, strict=True):
        assert (mine.key, mine.crc32, mine.read()) == (its.key, its.crc32, its.read())
    with tarfile.open(tmp_path / "new" / "shard-000000.tar") as tar:
        record = tar.extractfile("clip0.json")
        assert record is not None
        assert json.load(record)["captions"] == ["new", "newer"]


def test_clips_that_share_a_file_still_do(tmp_path: Path) -> None:
    video = [clip(1)]
    write_rendered(video, tmp_path / "s")
    (tmp_path / "a.mp4").write_bytes(read_index(tmp_path / "s")[0].read())
    rows = [{"path": "a.mp4", "cap": f"part {first}", "cut": [first], "num_frames": 1} for first in range(3)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    write_annotated(tmp_path / "a.json", tmp_path / "parts", workers=0)
    (tmp_path / "new.jsonl").write_text('{"file": "000000-a-01", "caption": "the middle"}\n')
    write_recaptioned(tmp_path / "parts", tmp_path / "new.jsonl", tmp_path / "new")
    entries = read_index(tmp_path / "new")
    assert len({entry.offset for entry in entries}) == 1
    assert [entry.record["caption"] for entry in entries] == ["part 0", "the middle", "part 2"]
    assert [entry.part for entry in entries] == [entry.part for entry in read_index(tmp_path / "parts")]


def test_readers_refuse_the_folder_until_it_is_whole_and_the_same_command_ends_it(
    shards: Path, captions: Path, tmp_path: Path
) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, clips: int) -> None:
        if done == 4:
            raise Stop

    with pytest.raises(Stop):
        write_recaptioned(shards, captions, tmp_path / "new", shard_clips=2, watch=stop)
    with pytest.raises(DataError, match="is not complete, it has 2 of 5 clips; run the command that writes it once"):
        read_index(tmp_path / "new")
    write_recaptioned(shards, captions, tmp_path / "new", shard_clips=2)
    write_recaptioned(shards, captions, tmp_path / "whole", shard_clips=2)
    contents = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("new", "whole")]
    assert contents[0] == contents[1]


def test_runs_and_features_of_the_former_captions_are_told_apart(shards: Path, captions: Path, tmp_path: Path) -> None:
    """The fingerprint is what a resumed run and a folder of features compare."""
    write_recaptioned(shards, captions, tmp_path / "new")
    (tmp_path / "same.jsonl").write_text('{"file": "clip0", "caption": "old 0", "motion": 1.0}\n')
    write_recaptioned(shards, tmp_path / "same.jsonl", tmp_path / "same")
    first, new, same = (ShardClips(folder, 3, 16, 16) for folder in (shards, tmp_path / "new", tmp_path / "same"))
    assert first.fingerprint() != new.fingerprint()
    assert first.fingerprint() == same.fingerprint()


def test_what_cannot_be_is_refused(shards: Path, captions: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is the folder whose captions are changed; give a new one"):
        write_recaptioned(shards, captions, shards)
    with pytest.raises(UsageError, match=r"has no index\.json"):
        write_recaptioned(tmp_path, captions, tmp_path / "new")
    write_recaptioned(shards, captions, tmp_path / "new")
    captions.write_text('{"file": "clip0", "caption": "others"}\n')
    with pytest.raises(UsageError, match=r"were written with captions_of=\w+, now captions_of=\w+"):
        write_recaptioned(shards, captions, tmp_path / "new")
    captions.write_text('{"file": "elsewhere.mp4", "caption": "others"}\n')
    with pytest.raises(UsageError, match=r"new\.jsonl: names no clip of"):
        write_recaptioned(shards, captions, tmp_path / "other")


# --- several captions, and words --------------------------------------------------------------------------------------


def test_one_of_several_captions_is_drawn_by_the_read_alone_and_validation_takes_the_first(
    shards: Path, captions: Path, tmp_path: Path
) -> None:
    write_recaptioned(shards, captions, tmp_path / "new")
    training = ShardClips(tmp_path / "new", 3, 16, 16)
    said = [training.read(0, draw)["caption"] for draw in range(40)]
    assert {*said} == {"new", "newer"}
    assert said == [ShardClips(tmp_path / "new", 3, 16, 16).read(0, draw)["caption"] for draw in range(40)]
    fixed = ShardClips(tmp_path / "new", 3, 16, 16, random_start=False)
    assert {fixed.read(0, draw)["caption"] for draw in range(20)} == {"new"}


@pytest.mark.parametrize("kind", ["video", "image"])
@pytest.mark.parametrize(
    ("score", "level"), [(5.75, "high"), (9.0, "high"), (5.74, None), (4.26, None), (4.25, "low"), (-1.0, "low")]
)
def test_high_and_low_scores_become_one_of_ten_sentences_before_or_after_the_caption(
    kind: str, score: float, level: str | None
) -> None:
    record = {"kind": kind, "scores": {"aesthetic": score}}
    said = {with_aesthetic_words("a dog", record, seeded("x", draw)) for draw in range(400)}
    if level is None:
        assert said == {"a dog"}
        return
    sentences = SENTENCES[kind, level]
    assert len({*sentences}) == 10
    assert all(kind in sentence for sentence in sentences)
    assert said == {text for one in sentences for text in (f"{one} a dog", f"a dog {one}")}


def test_words_are_an_option_of_the_reading_and_follow_from_the_read(shards: Path) -> None:
    plain, worded = (ShardClips(shards, 3, 16, 16, aesthetic_words=said) for said in (False, True))
    assert plain.read(1, 5)["caption"] == "old 1"
    said = [worded.read(1, draw)["caption"] for draw in range(10)]
    assert said == [worded.read(1, draw)["caption"] for draw in range(10)]
    assert len({*said}) > 3
    assert all("old 1" in text and text != "old 1" for text in said)
    assert plain.fingerprint() != worded.fingerprint()
    assert with_aesthetic_words("", {"scores": {"aes": 9.0}}, seeded("x")) == ""
    assert with_aesthetic_words("a dog", {"scores": {"aes": 9.0}}, seeded("x")) != "a dog"
