"""Captions of files and side-cars as other programs write them, and what is said of those that cannot be used."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from osp.data.media.limits import Limits
from osp.data.shards.build import write_shards
from osp.data.shards.captions import Caption, SideCars, caption_of, read_captions
from osp.data.shards.index import read_index
from osp.data.sources import ShardClips
from osp.data.summary import Summary
from osp.errors import DataError

MakeVideo = Callable[..., Path]
NAMES = ("one", "two", "three")


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Files that nobody decodes here."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in NAMES:
        (folder / f"{name}.mp4").touch()
    return folder


def texts(file: Path, videos: Path) -> dict[str, tuple[str, ...]]:
    found = read_captions(file, videos)
    captions = {name: found.find(videos / f"{name}.mp4") for name in NAMES}
    return {name: caption.texts for name, caption in captions.items() if caption is not None}


@pytest.mark.parametrize("key", ["caption", "captions", "text", "cap", "prompt"])
@pytest.mark.parametrize("many", [False, True])
def test_a_text_is_read_under_the_names_that_other_trainers_give_it(videos: Path, key: str, many: bool) -> None:
    said = ["A dog runs.", " ", "A brown dog runs over grass. "] if many else "A dog runs."
    file = videos.parent / "captions.jsonl"
    file.write_text("".join(json.dumps({"path": f"{name}.mp4", key: said}) + "\n" for name in NAMES))
    expected = ("A dog runs.", "A brown dog runs over grass.") if many else ("A dog runs.",)
    assert texts(file, videos) == dict.fromkeys(NAMES, expected)


def test_published_annotation_files_are_read_as_they_are(videos: Path) -> None:
    plan = [
        {"path": f"{name}.mp4", "cap": [f"A {name}.", "More."], "resolution": {"height": 64, "width": 96}, "fps": 16.0}
        for name in NAMES
    ]
    (videos.parent / "annotation.json").write_text(json.dumps(plan, indent=1))
    assert texts(videos.parent / "annotation.json", videos)["two"] == ("A two.", "More.")
    (videos.parent / "kohya.json").write_text(json.dumps({"one.mp4": "A one.", "two.mp4": {"caption": "A two."}}))
    assert texts(videos.parent / "kohya.json", videos) == {"one": ("A one.",), "two": ("A two.",)}
    rows = "".join(f"{name}.mp4,A {name} thing.,17,64,96\n" for name in NAMES)
    (videos.parent / "table.csv").write_text("path,text,num_frames,height,width\n" + rows)
    assert texts(videos.parent / "table.csv", videos)["three"] == ("A three thing.",)
    (videos / "metadata.csv").write_text("file_name,text\none.mp4,A one.\n")
    assert texts(videos / "metadata.csv", videos) == {"one": ("A one.",)}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.csv", "file,caption\none.mp4,A dog, brown\n", r"c\.csv:2: has 3 fields where the header has 2; put text"),
        ("c.csv", "file,caption\none.mp4,x\ntwo.mp4\n", r"c\.csv:3: has 1 fields where the header has 2"),
        ("c.csv", "file,caption\n", "holds no captions"),
        (
            "c.jsonl",
            '{"file": "one.mp4", "title": "x", "id": 5}',
            r"1: has no text under .*; its keys are file, title, id",
        ),
        ("c.json", '[{"path": "one.mp4", "description": "x"}]', r"entry 1: has no text under .* are path, description"),
        ("c.json", '"text"', "must be a list of objects"),
        ("c.json", "[" * 100_000, "more than 64 levels"),
        ("c.jsonl", '{"file": "one.mp4", "text": {"en": "x"}}', "its text is not a text, nor a list of texts"),
        ("c.jsonl", '{"file": {"a": 1}, "text": "x"}', "names no file under"),
    ],
)
def test_a_row_that_would_lose_its_text_is_refused_by_line(videos: Path, name: str, content: str, message: str) -> None:
    (videos.parent / name).write_text(content)
    with pytest.raises(DataError, match=message) as refused:
        read_captions(videos.parent / name, videos)
    assert "\n" not in str(refused.value)


def test_captions_that_are_too_long_are_passed_over_with_one_line(
    videos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = videos.parent / "c.jsonl"
    file.write_text(
        "".join(
            json.dumps({"file": f"{n}.mp4", "text": "word " * size}) + "\n"
            for n, size in zip(NAMES, (1, 900, 9), strict=True)
        )
    )
    found = read_captions(file, videos, Limits(caption_characters=100))
    assert found.find(videos / "two.mp4") == Caption()
    assert found.find(videos / "three.mp4") == Caption((("word " * 9).strip(),))
    found.side_cars.passed_over.warn(videos)
    assert [record.getMessage() for record in caplog.records] == [
        f"{videos}: 1 captions that are passed over: {file}:2: has a caption of 4499 characters, "
        "more than limits.caption_characters=100"
    ]


def test_halves_of_characters_do_not_reach_a_tokenizer() -> None:
    caption = caption_of({"text": json.loads('"a \\ud83d b \\ud83d\\ude00"')}, "here")
    assert caption.text == "a � b 😀"


def test_side_cars_are_found_in_capitals(videos: Path, caplog: pytest.LogCaptureFixture) -> None:
    (videos / "CLIP.MP4").touch()
    (videos / "CLIP.TXT").write_text("in capitals")
    (videos / "one.Json").write_text('{"text": "mixed", "aesthetic": 5}')
    (videos / "two.TXT").write_text("large")
    (videos / "two.txt").write_text("small")
    cars = SideCars()
    assert cars.find(videos / "CLIP.MP4") == Caption(("in capitals",))
    assert cars.find(videos / "one.mp4") == Caption(("mixed",), {"aesthetic": 5.0})
    assert cars.find(videos / "two.mp4") == Caption(("small",))
    cars.passed_over.warn("here")
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == "here: 1 side-cars in a second spelling: two.TXT beside two.txt, which is read"


def test_side_cars_that_cannot_be_used_are_told_and_passed_over(videos: Path, caplog: pytest.LogCaptureFixture) -> None:
    (videos / "one.json").write_text("[" * 100_000)
    (videos / "one.txt").write_text("the text counts all the same")
    os.mkfifo(videos / "two.txt")
    (videos / "three.txt").write_text("word " * 4_000_000)
    for name, content in (("four", b'{"title": "x", "score": 4}'), ("five", b"[1]"), ("six", b"caf\xe9")):
        (videos / f"{name}.mp4").touch()
        (videos / f"{name}.{'txt' if name == 'six' else 'json'}").write_bytes(content)
    cars = SideCars()
    found = {name: cars.find(videos / f"{name}.mp4") for name in (*NAMES, "four", "five", "six")}
    assert found.pop("one") == Caption(("the text counts all the same",))
    assert found.pop("four") == Caption((), {"score": 4.0})
    assert set(found.values()) == {None}
    assert cars.passed_over.counts == {"side-cars that are passed over": 5, "side-cars without a text": 1}
    cars.passed_over.warn(videos)
    passed, textless = [record.getMessage() for record in caplog.records]
    for name, reason in (("one.json", "64 levels"), ("two.txt", "no regular file"), ("three.txt", "larger than 4 MiB")):
        assert name in passed
        assert reason in passed
    assert textless.endswith("its keys are title, score")


def test_videos_read_directly_have_the_captions_that_they_have_through_shards(
    tmp_path: Path, make_video: MakeVideo, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "plain"
    folder.mkdir()
    for name in ("a", "b", "c"):
        make_video(folder / f"{name}.mp4", frames=5)
    (folder / "a.TXT").write_text("\ufeffcaption a")
    (folder / "b.json").write_text(json.dumps({"cap": ["first", "second"], "aesthetic": 5}))
    report = write_shards(folder, tmp_path / "shards", workers=0)
    keys = ("source", "caption", "captions", "scores")

    def said(path: Path) -> list[list[object]]:
        records = [entry.record for entry in read_index(path)]
        return [[record.get(key) or None for key in keys] for record in records]

    assert said(folder) == said(tmp_path / "shards")
    assert said(folder)[1] == ["b.mp4", "first", ["first", "second"], {"aesthetic": 5.0}]
    assert (report.captioned, report.clips) == (2, 3)
    source = ShardClips(folder, 5, 16, 16)
    assert source.summary().line() == f"{folder}: 3 clips; 1 of 3 clips has no caption"
    with caplog.at_level(logging.INFO):
        source.summary().log()
    assert caplog.records[-1].levelname == "WARNING"


def test_of_several_captions_training_draws_one_and_validation_takes_the_first(
    tmp_path: Path, make_video: MakeVideo
) -> None:
    make_video(tmp_path / "a.mp4", frames=5)
    (tmp_path / "a.json").write_text(json.dumps({"cap": ["first", "second", "third"]}))
    training, validation = (ShardClips(tmp_path, 5, 16, 16, random_start=start) for start in (True, False))
    drawn = [training.read(0, draw)["caption"] for draw in range(24)]
    assert set(drawn) == {"first", "second", "third"}
    assert drawn == [training.read(0, draw)["caption"] for draw in range(24)]
    assert {validation.read(0, draw)["caption"] for draw in range(9)} == {"first"}
    assert validation.read(0, 0)["captions"] == ["first", "second", "third"]


@pytest.mark.parametrize(
    ("clips", "captioned", "line"),
    [
        (1, 0, "a: 1 clip without a caption"),
        (1, 1, "a: 1 clip, with a caption"),
        (1, None, "a: 1 clip"),
        (0, 0, "a: 0 clips"),
        (4, 0, "a: 4 clips; none has a caption"),
        (4, 2, "a: 4 clips; 2 of 4 clips have no caption"),
        (4, 3, "a: 4 clips; 1 of 4 clips has no caption"),
    ],
)
def test_the_line_of_a_summary_is_a_sentence_for_any_number(clips: int, captioned: int | None, line: str) -> None:
    assert Summary("a", clips, captioned=captioned).line() == line
