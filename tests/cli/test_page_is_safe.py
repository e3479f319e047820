"""Nothing that a file holds acts in the page: it is text there, and only files of the shown folders are in it."""

import json
import os
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from osp.data.media.pictures import encode_png
from osp.data.media.video import encode_video
from osp.errors import DataError
from osp.report import html, page
from osp.report.html import Shown, charts, clips, section, table, tiles
from osp.report.markup import Html, joined, tag
from osp.report.page import Content, html_page
from osp.report.records import GENERATION, RECONSTRUCTION, RESULT, SAMPLE, check_record, inside

HOSTILE = (
    "</title></style>\"'><script>document.title='ran'</script><img src=x onerror=document.title='ran'>&amp;${title}"
)
RATE = {"rate": 0.5, "low": 0.1, "high": 0.9}


class Parsed(HTMLParser):
    """The tags and attributes of a page, and its text outside the style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(key, value or "") for key, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def safe(text: str) -> Parsed:
    """The parsed page, of which nothing can act."""
    parsed = Parsed(text)
    assert not parsed.tags & {"script", "iframe", "object", "embed", "link", "base", "form", "a"}
    for key, value in parsed.attributes:
        assert not key.startswith("on")
        assert key not in ("style", "href", "srcset")
        if key == "src":
            assert re.match(r"data:(image/(png|gif)|video/mp4);base64,[A-Za-z0-9+/=]+$", value)
    return parsed


def hostile(value: Any) -> Any:
    """The value with every text in it replaced, keys too."""
    if isinstance(value, dict):
        return {f"{key}{HOSTILE}": hostile(inner) for key, inner in value.items()}
    return HOSTILE if isinstance(value, str) else value


@pytest.fixture
def media(tmp_path: Path) -> Path:
    """A folder with a picture and a video."""
    (tmp_path / "a.png").write_bytes(encode_png(torch.zeros(3, 4, 4, dtype=torch.uint8)))
    (tmp_path / "a.mp4").write_bytes(encode_video(torch.zeros(3, 2, 16, 16, dtype=torch.uint8), 8.0))
    return tmp_path


def test_every_part_of_an_element_is_escaped_whatever_its_type() -> None:
    assert tag("b", "<i>", 3, None, ["<"], Html("<br>"), class_='"x"') == (
        '<b class="&quot;x&quot;">&lt;i&gt;3None[&#x27;&lt;&#x27;]<br></b>'
    )
    assert joined("&", Html("&amp;"), between="-") == "&amp;-&amp;"
    assert tag("line", x1=1) == '<line x1="1"/>'
    for made in (
        section(HOSTILE, HOSTILE),
        tiles([(HOSTILE, HOSTILE, HOSTILE)]),
        table([HOSTILE, f"{HOSTILE}2"], [[HOSTILE, f"{HOSTILE}\n{HOSTILE}"]]),
        charts({HOSTILE: [(0, 1.0), (1, 2.0)]}),
    ):
        assert HOSTILE in safe(made).text


def test_no_markup_is_written_by_hand() -> None:
    for module in (html, page):
        code = Path(str(module.__file__)).read_text().replace('"<style>"', "").replace('"</style>"', "")
        assert not re.findall(r"""["'{]</?[a-z]""", code), module


def generation(media: Path) -> dict[str, Any]:
    """The record of an evaluation whose texts are all hostile."""
    rates = {"all": RATE, HOSTILE: RATE}
    return {
        "model": HOSTILE,
        "settings": {"mode": HOSTILE, "checkpoint": HOSTILE, "input": [HOSTILE], "seed": HOSTILE, "device": HOSTILE}
        | {"solver": {HOSTILE: HOSTILE, "x": [HOSTILE]}, "guidance": {"a": HOSTILE}},
        "accuracy": {"generated": rates, "chance": {"all": 0.1, HOSTILE: 0.2}, HOSTILE: {HOSTILE: 0.1}, "vae": {}},
        "frechet": {HOSTILE: 1.0, "floor": 0.5},
        "given": None,
        "counts": {"generated": 1},
        "clips": [{"prompt": HOSTILE, "file": "a.mp4", "read": {HOSTILE: HOSTILE}, "right": {"all": True}}],
    }


def test_hostile_texts_are_text_in_the_whole_page(media: Path) -> None:
    record = generation(media)
    check_record(record, GENERATION, "here")
    mean = {"psnr": 30.0, HOSTILE: 1.0}
    pairs = {"counts": {"clips": 1}, "mean": mean, "psnr_gain": {HOSTILE: 1.0}, "clips": [{"key": HOSTILE}]}
    check_record(pairs, RECONSTRUCTION, "here")
    result = {"name": HOSTILE, "steps": 3, "parameters": 4, "seconds": 5.0}
    check_record(result, RESULT, "here")
    sample = {"prompt": HOSTILE, "seed": 1, "fps": 8.0}
    check_record(sample, SAMPLE, "here")
    content = Content(
        generations=[(media, record), (media, record | {"given": {"psnr": 20.0, "loss": 1.0}})],
        samples=[(media, {"a.png": sample})],
        reconstructions=[([media / "a.mp4"], pairs)],
        trainings=[(HOSTILE, result, {HOSTILE: [(0, 1.0)], "val/loss": [(0, 1.0), (1, float("nan")), (2, 2.0)]})],
    )
    text = html_page(HOSTILE, content, 4)
    parsed = safe(text)
    assert parsed.text.count(HOSTILE) > 20
    assert "nan" not in re.findall(r'points="[^"]*"', text)[0]
    (policy,) = (value for key, value in parsed.attributes if key == "content" and "default-src" in value)
    assert policy.startswith("default-src 'none'; img-src data:; media-src data:; style-src 'sha256-")
    assert "script" not in policy
    assert "unsafe" not in policy


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        (SAMPLE, {"seed": "<script>"}, "seed: must be a whole number or null"),
        (SAMPLE, {"prompt": {"a": 1}}, "prompt: must be text"),
        (SAMPLE, {"prompt": ["<b>"]}, "prompt: must be text"),
        (SAMPLE, {"fps": "8"}, "fps: must be a number or null"),
        (SAMPLE, {"seed": 10**300}, "too large a number"),
        (RESULT, {"steps": "3"}, "steps: must be a whole number"),
        (RESULT, {"seconds": None}, "seconds: must be a number"),
        (RESULT, {"name": {}}, "name: must be"),
    ],
)
def test_a_record_of_another_form_is_refused_with_its_place(form: Any, change: dict[str, Any], message: str) -> None:
    right = {"prompt": "a", "seed": 1, "fps": 8.0, "name": "a", "steps": 1, "parameters": 1, "seconds": 1.0}
    check_record(right, form, "record")
    with pytest.raises(DataError, match=message):
        check_record(right | change, form, "record")


@pytest.mark.parametrize(
    "change", [{"clips": [{"prompt": 1}]}, {"accuracy": {}}, {"given": 3}, {"frechet": {"a": "b"}}]
)
def test_metrics_of_another_form_are_refused(media: Path, change: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="record: "):
        check_record(generation(media) | change, GENERATION, "record")


@pytest.mark.parametrize(
    "name", ["../x.png", "{tmp}/x.png", "out", "out/x.png", "a/../../x.png", "/etc/passwd", "loop"]
)
def test_only_files_of_the_folder_are_shown(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "x.png").write_bytes(encode_png(torch.zeros(3, 4, 4, dtype=torch.uint8)))
    (folder / "out").symlink_to(tmp_path)
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "own.png").symlink_to("there.png")
    assert inside(folder, "own.png") == folder / "own.png"
    with pytest.raises(DataError, match="is no file in it, and only those are shown"):
        inside(folder, name.format(tmp=tmp_path))
    content = Content(samples=[(folder, {name.format(tmp=tmp_path): {"prompt": "a"}})])
    with pytest.raises(DataError, match="is no file in it"):
        html_page("x", content, 4)


def test_a_folder_of_frames_shows_no_links_out_of_it(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(encode_png(torch.zeros(3, 4, 4, dtype=torch.uint8)))
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "0.png").symlink_to(tmp_path / "x.png")
    with pytest.raises(DataError, match=r"0\.png is no file in it"):
        clips([Shown(tmp_path / "frames", "a")])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.png", b"<svg onload=alert(1)>", "is no PNG file"),
        ("a.gif", b"\x89PNG\r\n\x1a\n", "is no GIF file"),
        ("a.mp4", b"#EXTM3U\nfile:///etc/passwd\n", "is no MP4 file"),
        ("a.svg", b"<svg/>", "is none of .png, .gif, .mp4"),
        ("a.html", b"<script>", "is none of"),
        ("a", b"text", "is none of"),
    ],
)
def test_only_pictures_and_videos_are_shown(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        clips([Shown(tmp_path / name, "a")])


def test_a_file_that_never_ends_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(DataError, match="is no regular file"):
        clips([Shown(tmp_path / "a.png", "a")])


def test_hostile_records_end_the_command_in_one_line(
    tmp_path: Path, osp: Callable[..., tuple[int, str, str]], media: Path
) -> None:
    for number, record in enumerate(
        [{"path": "a.png", "prompt": {"<script>": 1}}, {"path": "../a.png", "prompt": "a"}, {"path": "a.png"}]
    ):
        (media / "samples.jsonl").write_text(json.dumps(record) + "\n")
        code, _, said = osp("page", f"samples={media}", f"output={tmp_path / 'page.html'}")
        assert (code, said.count("\n"), said.startswith("osp page: ")) == (1, 0, True), (number, said)
        assert not (tmp_path / "page.html").exists()
