"""The pages say what is so: their links lead somewhere, their code is real, the two READMEs are one."""

import ast
import importlib
import re
import runpy
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from PIL import Image

import osp
from osp.cli import VERBS
from osp.data.media.limits import DEFAULT_LIMITS
from osp.data.media.video import write_video
from osp.data.procedural.scene import COLOURS, MOTION_PHRASES, SHAPES
from osp.data.shards.captions import FILE_KEYS, TEXT_KEYS
from osp.evaluation.reconstruction import PAIRS
from osp.sampling.outputs import SampleFolder
from osp.weights.families import FAMILIES

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "osp"
READMES = ("README.md", "README.zh.md")
PAGES = [*READMES, "data/README.md", "conf/README.md", "notebooks/README.md"]
PAGES += [f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))]
PICTURE = 1_500_000
"""Bytes of a picture at most: a README is read on phones too."""


def text(page: str) -> str:
    return (ROOT / page).read_text()


def blocks(page: str) -> list[tuple[str, str]]:
    """The blocks of code of a page: language and text."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text(page), re.MULTILINE | re.DOTALL)


def prose(page: str) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", text(page), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """What `#` of a link to this page may be: its headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES)
def test_code_of_a_page_imports_what_there_is(page: str) -> None:
    for language, code in blocks(page):
        for node in ast.walk(ast.parse(code if language == "python" else "")):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("osp"):
                module = importlib.import_module(str(node.module))
                assert not [name.name for name in node.names if not hasattr(module, name.name)], node.module


def test_both_readmes_have_the_same_code_links_and_pictures() -> None:
    def parts(page: str) -> list[tuple[str, str]]:
        return [(language, re.sub(r" *# .*", "", code)) for language, code in blocks(page)]

    def targets(page: str) -> list[str]:
        return sorted(link for link in re.findall(r"\]\(([^)]+)\)", text(page)) if link not in READMES)

    english, chinese = READMES
    assert parts(chinese) == parts(english)
    assert targets(chinese) == targets(english)
    assert f"]({chinese})" in text(english)
    assert f"]({english})" in text(chinese)
    for mark in ("## ", "### ", "| "):  # the same sections and rows
        assert len(re.findall(f"^{re.escape(mark)}", prose(chinese), re.MULTILINE)) == len(
            re.findall(f"^{re.escape(mark)}", prose(english), re.MULTILINE)
        ), mark


def test_the_readme_has_the_two_commands() -> None:
    assert re.search(r"^```\nmake demo +#.*\nmake test +#.*\n```$", text("README.md"), re.MULTILINE)


def test_pictures_of_pages_are_small() -> None:
    pictures = [path for path in (ROOT / "docs" / "images").iterdir() if path.is_file()]
    assert pictures
    assert not [path.name for path in pictures if path.stat().st_size > PICTURE]
    named = {Path(link).name for page in PAGES for link in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text(page))}
    assert named == {path.name for path in pictures}


def test_the_citation_names_this_version() -> None:
    assert f"version = {{{osp.__version__}}}" in text("README.md")


def test_the_page_of_the_demo_has_the_words_of_its_captions() -> None:
    page = text("docs/demo.md")
    for kind, words in (("colours", COLOURS), ("shapes", SHAPES)):
        assert f"| {kind} | {', '.join(words)} |" in page
    readme = text("README.md").replace("\n", " ")
    assert f"({', '.join(COLOURS)})" in readme
    assert f"({', '.join(SHAPES)})" in readme
    for phrases in MOTION_PHRASES.values():
        quoted = ", ".join(f'"{phrase}"' for phrase in phrases)
        assert f"| {quoted} |" in page


def test_the_page_of_the_demo_has_the_numbers_of_the_makefile() -> None:
    makefile, page = text("Makefile"), text("docs/demo.md").replace("\n", " ")
    for name in ("DEMO_CLIPS", "DEMO_VAE", "DEMO_DENOISER"):
        for number in (
            re.search(rf"^{name} \?= (\d+)", makefile, re.MULTILINE),
            re.search(rf" {name}=(\d+)", makefile),
        ):
            assert number is not None
            assert re.search(rf"\b{int(number[1]):,}\b", page), number[0]


def test_the_page_of_the_command_line_has_every_verb() -> None:
    rows = re.findall(r"^\| (`osp .*?) \|", text("docs/command-line.md"), re.MULTILINE)
    assert re.findall(r"`osp ([\w-]+)`", " ".join(rows)) == list(VERBS)


def test_the_page_of_weights_has_every_kind() -> None:
    rows = re.findall(r"^\| `(\w+)` \| [^|]* \|$", text("docs/weights.md"), re.MULTILINE)
    assert {*rows} - {"kind"} == {kind for family in FAMILIES.values() for kind in family.kinds}


def test_the_pictures_of_the_readme_are_drawn_from_folders_of_the_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sampled, measured, drawn = (tmp_path / name for name in ("samples", "eval", "pictures"))
    draw = runpy.run_path(str(ROOT / "tools" / "readme_pictures.py"))["main"]
    monkeypatch.setattr(sys, "argv", ["", str(sampled), str(measured), str(drawn)])
    assert draw() == 1
    assert capsys.readouterr().err == f"{sampled}: holds no MP4 files of `osp`\n"
    sampled.mkdir()
    (measured / PAIRS).mkdir(parents=True)
    rising = torch.linspace(0, 1, 3).view(1, 3, 1, 1).expand(3, 3, 16, 32)
    for number, prompt in enumerate(("a red circle", "a long sentence about a large blue square that stays still")):
        settings = {"prompt": prompt, "frames": 3, "height": 16, "width": 16, "fps": 8.0}
        SampleFolder(sampled, "mp4").write(f"00{number}", rising[..., :16], settings)
    write_video(measured / PAIRS / "000.mp4", (255 * rising).byte(), 8.0)
    assert draw() == 0
    for name in ("samples", "reconstructions"):
        with Image.open(drawn / f"{name}.gif") as picture:
            assert picture.n_frames >= 3  # type: ignore[attr-defined]


def test_the_page_of_formats_has_the_keys_of_captions() -> None:
    page = " ".join(text("data/README.md").split())
    for *names, last in (FILE_KEYS, TEXT_KEYS):
        assert f"{', '.join(f'`{name}`' for name in names)} or `{last}`" in page


def test_the_page_of_the_architecture_has_the_layers_of_the_contract() -> None:
    contracts = tomllib.loads(text("pyproject.toml"))["tool"]["importlinter"]["contracts"]
    (layers,) = [one["layers"] for one in contracts if one["name"] == "Rooms import downwards only"]
    (said,) = re.findall(r"`(cli > .*?)`", text("docs/architecture.md").replace("\n", " "))
    found = [re.findall(r"\bosp\.(\w+)", layer) for layer in layers]
    there = [{name for name in layer if any((ROOT / "src" / "osp").glob(f"{name}*"))} for layer in found]
    assert [{*layer.split(", ")} for layer in said.split(" > ")] == [
        layer - {"_torchvision"} for layer in there if layer
    ]


def test_the_page_of_formats_has_the_limits() -> None:
    page, limits = " ".join(text("data/README.md").split()), DEFAULT_LIMITS
    numbers = (limits.frame_pixels, limits.frames, limits.caption_characters)
    sizes = [
        *(f"{number:,}" for number in numbers),
        f"{limits.seconds / 3600:g} hours",
        f"{limits.member_bytes >> 30} GiB",
    ]
    assert not [size for size in sizes if f" {size}" not in page]
