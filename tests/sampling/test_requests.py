"""Files of prompts, names of files, and batches."""

import os
from pathlib import Path

import pytest

from osp.errors import DataError
from osp.sampling.requests import Request, batches, list_videos, read_requests, slug


def test_a_text_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa red circle\r\n\n  größer: ein Würfel \u2028 still\n".encode())
    assert [request.prompt for request in read_requests(file)] == ["a red circle", "größer: ein Würfel \u2028 still"]


def test_an_object_says_what_is_its_own(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a", "seed": 3, "frames": 9, "image": "one.png", "name": "first"}\n\n{"prompt": "b"}\n')
    first, second = read_requests(file)
    assert first == Request("a", seed=3, frames=9, image=tmp_path / "one.png", name="first")
    assert second == Request("b")


def test_the_suffix_of_a_file_of_prompts_may_be_in_capitals(tmp_path: Path) -> None:
    file = tmp_path / "PROMPTS.JSONL"
    file.write_text('{"prompt": "a"}\n')
    assert read_requests(file) == [Request("a")]


def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "folder.txt").mkdir()
    os.mkfifo(tmp_path / "fifo.txt")
    for name in ("folder.txt", "fifo.txt"):
        with pytest.raises(DataError, match=f"{name}: (is no regular file|cannot be read)"):
            read_requests(tmp_path / name)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON (more than 64 levels)"),
        ('{"prompt": "a", "seed": 1e999}', "is no JSON"),
        ("3", "must be an object"),
        ('{"seed": 3}', "has no prompt"),
        ('{"prompt": " "}', "has no prompt"),
        ('{"prompt": 4}', "prompt=4: must be text"),
        ('{"prompt": null}', "prompt=null: must be text"),
        ('{"prompt": "a", "seed": "3"}', "seed=3: must be a whole number of at least 0"),
        ('{"prompt": "a", "seed": true}', "seed=true: must be a whole number of at least 0"),
        ('{"prompt": "a", "frames": 0}', "frames=0: must be a whole number of at least 1"),
        ('{"prompt": "a", "frame": 9}', "key=frame: is not known; choose prompt, seed, frames"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n' + line + "\n")
    with pytest.raises(DataError) as caught:
        read_requests(file)
    assert str(caught.value).startswith(f"{file}, line 2: {message}")


def test_files_without_prompts_are_refused(tmp_path: Path) -> None:
    for content in (b"\n \n", b"\xff\xfe\xfa"):
        file = tmp_path / "prompts.txt"
        file.write_bytes(content)
        with pytest.raises(DataError, match=r"prompts\.txt: "):
            read_requests(file)
    with pytest.raises(DataError, match="cannot be read"):
        read_requests(tmp_path / "none.txt")


def test_videos_count_seeds_and_names_on() -> None:
    requests = [Request("A red circle!"), Request("b", seed=7, name="my b"), Request("c")]
    videos = list_videos(requests, seed=100, per_prompt=2)
    assert [video.stem for video in videos] == [
        "000_a-red-circle_seed100",
        "001_a-red-circle_seed101",
        "002_my-b_seed7",
        "003_my-b_seed8",
        "004_c_seed104",
        "005_c_seed105",
    ]


def test_names_are_plain_and_short() -> None:
    assert slug("../A b/c?") == "a-b-c"
    assert slug("一个红色的球滚动") == "一个红色的球滚动"
    assert slug("Größer, ﬁne_x") == "größer-fine-x"
    assert slug("लाल घोड़ा, दौड़ता") == "लाल-घोड़ा-दौड़ता"
    assert slug("?!") == "video"
    assert len(slug("𠀀" * 100).encode()) <= 200
    assert slug("word " * 20) == "word-word-word-word-word-word-word-word"
    assert slug("x" * 100) == "x" * 40


def test_batches_keep_the_order_and_one_key() -> None:
    assert batches([1, 3, 5, 2, 4, 7], lambda number: number % 2, 2) == [[1, 3], [5], [2, 4], [7]]
