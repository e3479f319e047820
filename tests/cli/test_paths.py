"""A path is what the shell gives, in every setting that is one, of every verb, whatever its name holds."""

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from osp.cli import VERBS, config_folder
from osp.cli.overrides import prepared
from osp.cli.plain import configuration, instantiate
from osp.configs.groups import groups_of
from osp.configs.meanings import choice_meanings, meanings
from osp.configs.mistakes import parsed
from osp.configs.paths import is_path
from osp.configs.texts import cut, escaped, quoted
from osp.errors import UsageError

CONFIGS = config_folder()
Osp = Callable[..., tuple[int, str, str]]

NAMES = [
    *(
        "视频",
        "café",
        "a b",
        "a=b",
        "a,b",
        "{a,b}",
        "{a: b}",
        "(a)",
        "it's",
        '"a" b',
        "$HOME",
        "${output}",
        "\\${x}",
        "#a",
    ),
    *("1", "20241125", "1e5", "0x10", "1_000", ".5", "-1", "-x", "--help", "true", "No", "inf", "nan", "null.x", "???"),
    *("a\\", "a\\\\", "a\\'", "'a", "a:b", "a@b", "a%s", "%03d", "*", "[a", "a]", "a\nb", "a\tb", " a ", "🎞️", "\udcff"),
    *("x" * 250, "~nobody-of-that-name/x", "choice(a,b)", "+a", "&a", "!a", "a;b", "`a`", "<a>", "null ,x"),
]


def made(verb: str, *arguments: str) -> list[str]:
    return prepared(verb, parsed(arguments), CONFIGS)


def composed(verb: str, *overrides: str) -> Any:
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return compose(verb, made(verb, *overrides))


@pytest.mark.parametrize("name", NAMES)
def test_any_name_is_a_path_as_it_stands(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = made("shards", f"input={name}", f"+output={name}")
    for override in OverridesParser.create().parse_overrides(said):
        value = OmegaConf.create({"x": override.value()}).x
        assert isinstance(value, str)
        assert os.path.normpath(value) == name
    (one,) = OverridesParser.create().parse_overrides(made("eval", "--multirun", f"output={name}"))
    assert not one.is_sweep_override()
    assert OmegaConf.create({"x": one.value()}).x.removeprefix("./") == name


def test_a_list_is_a_list_unless_a_file_has_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["generation=[视频, a b,'c,d',{e}]", "samples=[]", "output=[x]", "vae_run=null", "denoiser_run='null'"]
    cfg = composed("page", *given)
    assert cfg.generation == ["视频", "a b", "c,d", "{e}"]
    assert (cfg.samples, cfg.output, cfg.vae_run, cfg.denoiser_run) == ([], "[x]", None, "null")
    (tmp_path / "[a,b]").mkdir()
    (tmp_path / "null").mkdir()
    cfg = composed("page", "generation=[a,b]", "vae_run=null")
    assert (cfg.generation, cfg.vae_run) == ("[a,b]", "null")


def test_commas_are_a_sweep_in_a_multirun_unless_a_file_has_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(value: str, *more: str) -> list[Any]:
        one = OverridesParser.create().parse_override(made("sample", f"checkpoint={value}", *more)[0])
        return list(one.sweep_string_iterator()) if one.is_sweep_override() else [one.value()]

    monkeypatch.chdir(tmp_path)
    assert said("视,1", "-m") == ["'视'", "'1'"]
    assert said("'a,b',c", "--multirun") == ["'a,b'", "c"]
    assert said("a,b") == ["a,b"]
    (tmp_path / "a,b").touch()
    assert said("a,b", "-m") == ["a,b"]


def test_a_home_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/é")
    monkeypatch.chdir(tmp_path)
    cfg = composed("shards", "input=~/a b", "output=~")
    assert (cfg.input, cfg.output) == ("/home/é/a b", "/home/é")
    (tmp_path / "~").mkdir()
    assert composed("shards", "input=~/x", "output=~").output == "~"


def test_an_empty_path_is_refused() -> None:
    with pytest.raises(UsageError, match="output=: is empty; give a path"):
        made("shards", "output=")


def test_given_frames_and_settings_of_weights_may_be_mappings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cfg = composed("sample", "given={0: 视频.png, -1: 'a, b.png', 8:a b.png}", "prompt=a")
    assert cfg.given == {0: "视频.png", -1: "a, b.png", 8: "a b.png"}
    cfg = composed("import-weights", "config={a: 1, b: [x]}", "kind=a", "source=1", "output=2")
    assert (cfg.config, cfg.source, cfg.output) == ({"a": 1, "b": ["x"]}, "1", "2")
    assert composed("import-weights", "config=20.json", "kind=a", "source=1", "output=2").config == "20.json"


def test_texts_are_cut_outside_of_quotes_and_brackets() -> None:
    assert cut("a,'b,c',[d,e],{f,g},h'i") == ["a", "'b,c'", "[d,e]", "{f,g}", "h'i"]
    assert quoted("runs/a-b_1") == "runs/a-b_1"
    assert OmegaConf.create({"x": escaped("\\${a} ${b} \\\\${c}")}).x == "\\${a} ${b} \\\\${c}"


DRAWN = ["synthetic.clips=1", "synthetic.frames=1", "synthetic.height=16", "synthetic.width=16", "workers=0"]


@pytest.mark.parametrize("name", ["20241125", "视 频", "a${b}", "-x", "it's", "a\\"])
def test_a_verb_works_in_a_folder_of_any_name(name: str, osp: Osp, tmp_path: Path) -> None:
    code, out, said = osp("shards", *DRAWN, f"output={name}")
    assert (code, said) == (0, "")
    assert json.loads(out)["output"] == str(tmp_path / name)
    assert (tmp_path / name / "index.json").is_file()
    assert os.listdir(tmp_path) == [name]


def test_the_jobs_of_a_multirun_have_folders_in_one_of_any_name(osp: Osp, tmp_path: Path) -> None:
    code, _, said = osp("shards", "--multirun", *DRAWN, "output=视,1 ${x}", "synthetic.seed=1,2")
    assert code == 0, said
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("index.json")}
    assert found == {"视,1 ${x}/0/index.json", "视,1 ${x}/1/index.json"}


def test_paths_with_references_in_their_names_are_built_with(tmp_path: Path) -> None:
    cfg = OmegaConf.create({"path": escaped("a\\${b}/x"), "part": {"_target_": "builtins.dict", "p": "${path}/y"}})
    assert instantiate(cfg.part) == {"p": "a\\${b}/x/y"}
    assert configuration({"x": ["${y}"]}).x[0] == "${y}"


def test_a_refused_command_leaves_no_folder(osp: Osp, tmp_path: Path) -> None:
    code, _, said = osp("shards", "output=new/folder")
    assert (code, "give either input=DIR" in said) == (2, True)
    code, _, said = osp("eval", "input=none", "checkpoint=none", "output=other/folder")
    assert code == 1, said
    code, _, said = osp("chain", "chain=tiny", "checkpoint=x", "dry_run=true", "output=third")
    assert code == 0, said
    (tmp_path / "videos").mkdir()
    code, _, said = osp("shards", "input=videos", "output=fourth", "workers=0")
    assert (code, "no videos or images" in said) == (1, True), said
    assert [path.name for path in tmp_path.iterdir()] == ["videos"]
    (tmp_path / "videos").rmdir()
    (tmp_path / "empty").mkdir()
    assert osp("shards", "output=empty/a/b")[0] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_a_folder_that_cannot_be_made_or_written_is_named_in_one_line(
    osp: Osp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for name, message in {"file": "is a file; give a folder", "file/x": "Not a directory"}.items():
        code, _, said = osp("shards", *DRAWN, f"output={name}")
        assert (code, said.count("\n")) == (1, 0)
        assert "output=" in said
        assert message in said
    monkeypatch.setattr("osp.cli.folders.os.access", lambda *_: False)  # as for who may not write; root always may
    (tmp_path / "there").mkdir()
    code, _, said = osp("shards", *DRAWN, "output=there")
    assert (code, said) == (
        1, f"osp shards: output={tmp_path / 'there'}: nothing can be written into this folder; give another one"
    )  # fmt: skip


def path_settings() -> Iterator[tuple[str, str, str]]:
    """Verb, key and meaning of each setting that the configurations have a meaning for."""
    for verb in VERBS:
        yield from ((verb, *entry) for entry in meanings(CONFIGS / f"{verb}.yaml").items())
        for group, names in groups_of(verb, CONFIGS).items():
            for name in names:
                yield from ((verb, *entry) for entry in choice_meanings(CONFIGS, group, name).items())


# Settings whose meaning speaks of files or folders, and that are none.
NO_PATHS = {
    *("format", "overwrite", "resume", "dtype", "clips", "save_videos", "perceptual.download", "stages", "version"),
    *("name", "kind", "prompt", "fps", "after", "checkpoint_every", "data", "text", "vae", "device", "features"),
    *("workers", "key", "media", "member_bytes", "drop_gone", "urls", "attempts", "form", "checkpoint_form"),
    *("folders", "release"),
}  # fmt: skip


def test_every_setting_that_is_a_path_is_known_as_one() -> None:
    says_file = re.compile(r"\b(folders?|files?|checkpoint of|`osp (train|cache|import-weights)`)\b")
    unknown = {
        (verb, key)
        for verb, key, meaning in path_settings()
        if not key.endswith("=") and says_file.search(meaning) and not is_path(verb, key)
    }
    assert not {(verb, key) for verb, key in unknown if key.rpartition(".")[2] not in NO_PATHS}
