"""The page on parts of one's own: its files are written, its Python is run, and its commands are composed."""

import itertools
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from osp.cli import VERBS, config_folder
from osp.cli.composed import check_read
from osp.cli.overrides import prepared
from osp.configs.mistakes import parsed
from osp.denoiser import Denoiser
from osp.denoiser.patterns import registry as patterns
from osp.diffusion import objective as objectives
from osp.evaluation import metrics
from osp.extensions import VARIABLE, import_modules
from osp.vae import VideoVAE
from osp.weights.families import FAMILIES

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extend.md").read_text()
SECTIONS: dict[str, str] = dict(re.findall(r"^## ([^\n]*)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
PARTS = [title for title in SECTIONS if title != "A verb"]


def blocks(section: str) -> list[tuple[str, str, str]]:
    """The blocks of a section: language, the file that the first line names (empty: none), and text."""
    found = re.findall(r"^```(\w*)\n(?:# (\S+\.(?:py|yaml))\n)?(.*?)^```$", SECTIONS[section], re.MULTILINE | re.DOTALL)
    return [(language, file, code) for language, file, code in found]


def commands(section: str) -> list[list[str]]:
    """The commands of a section, each as a list without `osp`."""
    text = "".join(code for language, _, code in blocks(section) if not language).replace("\\\n", " ")
    return [shlex.split(line)[1:] for line in text.splitlines()]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's folder with all files of the page, and nothing of it left in this process."""
    for _, file, code in itertools.chain.from_iterable(blocks(section) for section in SECTIONS):
        if file:
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(path for path in sys.path if path)])
    registries = (patterns._ENTRIES, objectives._OBJECTIVES, metrics._REGISTERED, FAMILIES)
    kept, modules = [dict(entries) for entries in registries], {*sys.modules}
    yield tmp_path
    for entries, before in zip(registries, kept, strict=True):
        entries.clear()
        entries.update(before)  # type: ignore[arg-type]
    for name in {*sys.modules} - modules:
        if name.startswith("my_"):
            del sys.modules[name]


def composed(command: list[str], configs: Path) -> DictConfig:
    """The configuration of a command; raises UsageError as the command would."""
    verb, *arguments = command
    given = parsed(arguments)
    overrides = prepared(verb, given, configs)
    own = [] if given.own_configs is None else [f"hydra.searchpath=['file://{given.own_configs.absolute()}']"]
    with initialize_config_dir(str(configs), version_base="1.3"):
        cfg = compose(verb, [*overrides, *own], return_hydra_config=True)
    choices = cfg.hydra.runtime.choices
    OmegaConf.set_struct(cfg, False)
    cfg.pop("hydra")
    check_read(verb, cfg, overrides, choices)
    return cfg


@pytest.mark.parametrize("section", PARTS)
def test_python_of_a_section_runs(section: str, folder: Path) -> None:
    for language, file, code in blocks(section):
        if language == "python" and not file:
            exec(compile(code, f"docs/extend.md: {section}", "exec"), {})


COMMANDS = [(section, command) for section in PARTS for command in commands(section)]


@pytest.mark.parametrize(("section", "command"), COMMANDS, ids=[" ".join(command[:3]) for _, command in COMMANDS])
def test_a_command_of_the_page_composes_and_finds_the_part(section: str, command: list[str], folder: Path) -> None:
    (module,) = [file.removesuffix(".py") for language, file, _ in blocks(section) if language == "python" and file]
    assert module not in sys.modules
    cfg = composed(command, config_folder())
    import_modules(cfg.get("imports", ()))
    for group in ("objective", "data", "vae", "denoiser"):
        if module in str(OmegaConf.to_container(cfg).get(group)):  # type: ignore[union-attr]
            instantiate(cfg[group])
    if any(argument.startswith("denoiser.stages=") for argument in command):
        instantiate(cfg.denoiser)
    assert module in sys.modules


def test_the_page_has_a_section_and_a_row_for_each_part() -> None:
    rows = re.findall(r"^\| \[([^]]+)\]\(#([\w-]+)\) \|", PAGE, re.MULTILINE)
    assert [anchor for _, anchor in rows] == [title.lower().replace(" ", "-") for title in SECTIONS]
    assert len(rows) == 8
    for test in re.findall(r"`(tests/\S+?\.py)`", PAGE):
        assert (ROOT / test).exists(), test
    for place in re.findall(r"`((?:src/)?osp/\S+?\.py)`", PAGE):
        is_new = place == "src/osp/cli/count.py"
        assert (ROOT / "src" / place.removeprefix("src/")).exists() != is_new, place


def test_families_of_the_page_are_of_both_kinds(folder: Path) -> None:
    import_modules(["my_vae", "my_denoiser"])
    added = [family.model for name, family in FAMILIES.items() if name in ("patches", "plain")]
    assert [issubclass(added[0], VideoVAE), issubclass(added[1], Denoiser)] == [True, True]


def test_a_verb_of_the_page_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files lie in a copy of those of OSP."""
    (entry,) = re.findall(r'`("count": ".*?")`', " ".join(SECTIONS["A verb"].split()))
    monkeypatch.setitem(VERBS, *next(iter(yaml.safe_load(f"{{{entry}}}").items())))
    shutil.copytree(config_folder(), folder / "conf", dirs_exist_ok=True)
    (folder / "clips").mkdir()
    for number in range(3):
        Image.new("RGB", (16, 16)).save(folder / "clips" / f"{number}.png")
    monkeypatch.setattr("osp.cli.composed.config_folder", lambda: folder / "conf")
    cfg = composed(["count", f"input={folder / 'clips'}"], folder / "conf")
    module: dict[str, object] = {}
    exec(compile((folder / "src/osp/cli/count.py").read_text(), "count.py", "exec"), module)
    assert callable(run := module["run"])
    assert run(cfg) == {"clips": 3}
    assert os.getcwd() == str(folder)
