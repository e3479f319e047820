import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from osp.documents import (
    MIB,
    DocumentError,
    check_form,
    csv_rows,
    json_lines,
    parse_json,
    parse_yaml,
    printable,
    read_json,
    read_text,
    read_yaml,
)


def refusal(read: Any, *args: Any, **more: Any) -> str:
    with pytest.raises(DocumentError) as found:
        read(*args, **more)
    assert "\n" not in str(found.value)
    return str(found.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_text_is_read_in_utf_8_with_and_without_a_mark_and_in_utf_16_with_one(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.txt").write_bytes("Ein Bär läuft 视频".encode(encoding))
    assert read_text(tmp_path / "a.txt") == "Ein Bär läuft 视频"


def test_text_in_another_encoding_is_refused_by_its_first_byte_that_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("Bär".encode("latin-1"))
    assert refusal(read_text, tmp_path / "a.txt").endswith("a.txt: is not UTF-8 text (byte 1); save it as UTF-8")


def test_a_pipe_a_device_and_a_folder_are_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "folder.txt").mkdir()
    assert "no regular file" in refusal(read_text, tmp_path / "pipe.txt")
    assert "folder.txt" in refusal(read_text, tmp_path / "folder.txt")
    assert "no regular file" in refusal(read_text, Path("/dev/zero"))
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "nothing.txt")


def test_a_file_larger_than_its_limit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"x" * 11)
    assert read_text(tmp_path / "a.txt", most=11) == "x" * 11
    assert "larger than 10 bytes" in refusal(read_text, tmp_path / "a.txt", most=10)
    os.truncate(tmp_path / "a.txt", 1 << 40)  # of holes; nothing of it is read
    assert "larger than 4096 MiB" in refusal(read_text, tmp_path / "a.txt", most=4096 * MIB)


def test_a_high_limit_takes_no_memory_of_a_small_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"x" * (MIB + 1))
    tracemalloc.start()
    assert len(read_text(tmp_path / "a.txt", most=1 << 40)) == MIB + 1
    assert tracemalloc.get_traced_memory()[1] < 8 * MIB
    tracemalloc.stop()


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"a":' * 100_000, "[NaN]", "Infinity", "1" * 5000, "1e999", "{", "", '"\\ud800', '"' + '\\"' * 9],
)
def test_json_that_would_break_a_reader_is_one_line(text: str) -> None:
    assert refusal(parse_json, text, "a.json").startswith("a.json: is no JSON (")


def test_brackets_inside_strings_are_no_levels() -> None:
    text = json.dumps({"caption": '[[{"' * 100, "list": [[1]] * 200})
    assert parse_json(text, "a") == json.loads(text)


def test_a_line_of_jsonl_is_named_by_its_number(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": 1}\r\n\n{"a": "\u2028"}\n{"a": }\n')
    rows = json_lines(file)
    assert [next(rows), next(rows)] == [(f"{file}:1", {"a": 1}), (f"{file}:3", {"a": "\u2028"})]
    assert refusal(next, rows).startswith(f"{file}:4: is no JSON")


def test_a_csv_row_with_more_or_fewer_fields_than_the_header_is_refused_by_line(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text('file,caption\na.mp4,"A dog, brown"\n\nb.mp4,A dog, brown\n')
    rows = csv_rows(file)
    assert next(rows) == (f"{file}:2", {"file": "a.mp4", "caption": "A dog, brown"})
    assert refusal(next, rows).startswith(f"{file}:4: has 3 fields where the header has 2")
    file.write_text("file,caption\na.mp4\n")
    assert ":2: has 1 fields" in refusal(lambda: list(csv_rows(file)))
    file.write_text("file,file\n")
    assert "same name" in refusal(lambda: list(csv_rows(file)))


@pytest.mark.parametrize(
    ("text", "line"), [("a: [1,\nb: 2\n", 3), ("a: 1\nb: 2\n c: 3\n", 3), ("a: &x [1]\nb: *x\n", 2), ("[" * 200, 1)]
)
def test_yaml_is_refused_by_line(tmp_path: Path, text: str, line: int) -> None:
    (tmp_path / "a.yaml").write_text(text)
    assert refusal(read_yaml, tmp_path / "a.yaml").startswith(f"{tmp_path / 'a.yaml'}:{line}: ")


def test_yaml_makes_no_objects() -> None:
    assert "a:1" in refusal(parse_yaml, "!!python/object/apply:os.system ['true']", "a")


FORM = {"file": str, "clips": int, "fps?": (float, None), "shards": [{"bytes": int}], "scores?": {...: float}}


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"file": 3}, "file: must be text, is 3"),
        ({"clips": True}, "clips: must be a whole number, is true"),
        ({"clips": 1.0}, "clips: must be a whole number, is 1.0"),
        ({"fps": "30"}, 'fps: must be a number or null, is "30"'),
        ({"fps": float("nan")}, "fps: must be a number or null, is nan"),
        ({"shards": {}}, "shards: must be a list, is a mapping of 0"),
        ({"shards": [{"bytes": 1}, {}]}, "shards[1]: has no bytes"),
        ({"scores": {"beauty": None}}, "scores.beauty: must be a number, is null"),
        ({"scores": {"a\nb": "x" * 99}}, 'scores.a\\nb: must be a number, is "' + "x" * 59 + "..."),
    ],
)
def test_a_value_that_is_not_of_its_form_is_named_by_its_place(change: dict[str, Any], error: str) -> None:
    right = {"file": "a", "clips": 1, "shards": [{"bytes": 1}], "other": object()}
    check_form(right, FORM, "a.json")
    assert refusal(check_form, right | change, FORM, "a.json") == f"a.json: {error}"


def test_a_form_is_checked_where_a_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": [1, "b"]}')
    assert read_json(tmp_path / "a.json", {"a": list}) == {"a": [1, "b"]}
    assert refusal(read_json, tmp_path / "a.json", {"a": [int]}).endswith('a[1]: must be a whole number, is "b"')


def test_what_a_terminal_would_act_upon_is_escaped() -> None:
    assert printable("Ein Bär 视频 a'b\\c") == "Ein Bär 视频 a'b\\c"
    assert printable("a\x1b[31mb\nc\x9bd\u202ee\udcff") == "a\\x1b[31mb\\nc\\x9bd\\u202ee\\udcff"
