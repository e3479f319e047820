"""`osp VERB --help` and conf/README.md say what there is to set, and what it means."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from osp.cli import VERBS, config_folder
from osp.cli.composed import fields_of
from osp.configs.groups import groups_of
from osp.configs.meanings import choice_meanings, heading, meanings
from osp.configs.references import reached_from, references

Osp = Callable[..., tuple[int, str, str]]
CONFIGS = config_folder()


def words(text: str) -> str:
    """The text in one line."""
    return " ".join(text.split())


def test_the_page_of_groups_says_what_is_there_and_who_reads_it() -> None:
    rows = re.findall(r"^\| `([\w/]+)` \| (.+?) \| (.+?) \|$", (CONFIGS / "README.md").read_text(), re.MULTILINE)
    said = {group: re.findall(r"`([\w-]+)`", verbs) for group, _, verbs in rows}
    folders = {path.parent.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*/*.yaml")}
    assert said.keys() == {folder for folder in folders if not folder.startswith("hydra/")}
    assert list(said) == sorted(said)
    assert said == {group: [verb for verb in VERBS if group in groups_of(verb, CONFIGS)] for group in said}


@pytest.mark.parametrize("verb", VERBS)
def test_help_lists_every_setting_with_its_meaning(verb: str, osp: Osp) -> None:
    code, out, said = osp(verb, "--help")
    assert (code, said) == (0, "")
    assert "hydra" not in re.sub(r"\$\{hydra:\S+", "", out)
    assert out.startswith(heading(CONFIGS / f"{verb}.yaml")[:60])
    listed = dict(re.findall(r"^  ([\w./]+)[=:]((?:.*\n)(?:   .*\n)*)", out + "\n", re.MULTILINE))
    groups = groups_of(verb, CONFIGS)
    comments = meanings(CONFIGS / f"{verb}.yaml")
    for key in yaml.safe_load((CONFIGS / f"{verb}.yaml").read_text()).keys() - {"defaults", "hydra"}:
        assert key in listed or f"{key}." in out, key
        if key not in groups:
            assert words(comments.get(key, "")) in words(listed.get(key, "")), key
    for group in [group for group in groups if f"{group}=" in comments]:
        about = words(listed[group.removeprefix(f"{verb}/")])
        assert words(comments[f"{group}="]) in about
        assert ", ".join(groups[group]) in about
    foreign = {group for other in VERBS for group in groups_of(other, CONFIGS)} - groups.keys()
    assert not foreign & {*re.findall(r"^  ([\w/]+)=", out.partition("Settings:")[0], re.MULTILINE)}


@pytest.mark.parametrize("verb", VERBS)
def test_every_group_of_a_verb_has_its_meaning_in_the_file(verb: str) -> None:
    comments = meanings(CONFIGS / f"{verb}.yaml")
    for target in (CONFIGS / verb).rglob("*.yaml"):
        comments |= meanings(target)
    here = {key for key in comments if key.endswith("=")}
    listed = yaml.safe_load((CONFIGS / f"{verb}.yaml").read_text())["defaults"]
    named = {next(iter(entry)) for entry in listed if isinstance(entry, dict)}
    assert {f"{group}=" for group in named if not group.startswith("override")} <= here


def settings(value: object, path: str) -> Iterator[str]:
    """The paths of what a file sets itself: not the classes, nor what refers to another setting."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from settings(inner, f"{path}{key}.")
    elif "${" not in str(value) and not path.endswith("_target_."):
        yield path.removesuffix(".")


# What these choose are settings that are explained elsewhere.
CHOICES_OF_OTHERS = ("experiment", "chain", "debug", "solver/opensora_v13", "solver/suv_v15", "data/synthetic_plain")


@pytest.mark.parametrize("verb", VERBS)
def test_every_setting_of_a_verb_and_of_its_groups_has_a_meaning(verb: str) -> None:
    for group, names in {"": (verb,), **groups_of(verb, CONFIGS)}.items():
        for name in names:
            file = CONFIGS / group / f"{name}.yaml"
            if f"{group}/{name}".startswith(CHOICES_OF_OTHERS):
                continue
            content = {key: value for key, value in yaml.safe_load(file.read_text()).items() if key != "defaults"}
            said = choice_meanings(CONFIGS, group, name) if group else meanings(file)
            target = {"eval/target": name, "solver": "generation", "generator": "generation"}.get(group, "")
            said = fields_of(verb, {"target": target}) | said
            places = () if not group or file.read_text().startswith("# @package _global_") else (f"{group}.",)
            chosen = {"hydra", "target", *groups_of(verb, CONFIGS)} if not places else set()
            own = {key: value for key, value in content.items() if key not in chosen}
            for path in settings(own, "".join(places)):
                assert said.keys() & {path, path.rpartition(".")[0]}, f"{file.relative_to(CONFIGS)}: {path}"


def test_help_follows_what_is_chosen(osp: Osp) -> None:
    plain, denoiser = (osp("train", *given, "--help")[1] for given in ([], ["experiment=t2v_tiny", "seed=3"]))
    assert "  module.loss.pixel=l1" in plain
    assert "  perceptual.net=vgg" in plain
    assert "  clipping.warmup" not in plain
    assert "  latent.shift" not in plain
    assert re.search(r"  clipping\.warmup=20 +norms at the beginning", denoiser)
    assert re.search(r"  denoiser=cross_tiny +the denoiser", denoiser)
    assert "  seed=3 " in denoiser
    assert "  perceptual.net" not in denoiser
    assert "  half=" in osp("bench", "-h")[1]
    assert "  schedule=" in osp("bench", "target=denoiser", "--help")[1]
    assert "  keep_frames=5" in osp("eval", "--help", "target=generation")[1]
    code, out, said = osp("train", "experiment=none", "--help")
    assert (code, out) == (2, "")
    assert said.startswith("osp train: ")


def test_a_comment_belongs_to_its_key(tmp_path: Path) -> None:
    file = tmp_path / "conf" / "part" / "one.yaml"
    file.parent.mkdir(parents=True)
    file.with_name("base.yaml").write_text("a: 1  # from the base\nb: 2\n")
    file.write_text(
        "# What this is,\n# in two lines.\ndefaults:\n  - base\n  - /other: x  # another\n\n"
        "a: '# no comment'\nb: {c: 1, d: '#'}  # of all\ne:  # of the mapping\n  f: 1  # inside\n"
        "  # above\n  # it\n  g:\n    - 1\n\n# far away\n\nh: 3\n# how:\n#   one  thing\ni: 4\n"
    )
    assert heading(file) == "What this is, in two lines."
    assert choice_meanings(tmp_path / "conf", "part", "one") == {
        "part.a": "from the base",
        "other=": "another",
        "part.b": "of all",
        "part.e": "of the mapping",
        "part.e.f": "inside",
        "part.e.g": "above it",
        "part.i": "how:\n  one  thing",
    }


def test_references_are_followed_wherever_they_stand() -> None:
    text = "${a.b} and ${oc.select:c,null} or \\${d} ${hydra:runtime.cwd} ${e[0].f}"
    assert [name for _, name in references(text, "x")] == ["a.b", "c", "e.0.f"]
    assert [*references({"y": ["${.z}", "${..w}"]}, "x")] == [("x.y.0", "x.y.z"), ("x.y.1", "x.w")]
    config = {"root": {"one": "${part.deep.x}"}, "part": {"deep": "${other}"}, "other": {"x": "${end}"}, "end": 1}
    assert {"other.x", "end"} - reached_from(config, ["root"]) == {"other.x"}
    assert "unrelated" not in reached_from(config | {"unrelated": "${root}"}, ["root"])
