"""A key or a group that nothing reads is refused; what the documents and recipes give is read."""

import re
import shlex
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from osp.cli import VERBS, config_folder
from osp.cli.composed import check_read
from osp.cli.overrides import prepared
from osp.configs.mistakes import parsed
from osp.errors import UsageError

Osp = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).parents[2]
PAGES = [
    "Makefile",
    *(path.relative_to(ROOT).as_posix() for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("*/*.md")])),
]


def composed(verb: str, overrides: Sequence[str]) -> None:
    """Compose a command's configuration; raises UsageError as the command would."""
    overrides = prepared(verb, parsed(overrides), config_folder())
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        cfg: DictConfig = compose(verb, overrides, return_hydra_config=True)
    choices = cfg.hydra.runtime.choices
    OmegaConf.set_struct(cfg, False)
    cfg.pop("hydra")
    check_read(verb, cfg, overrides, choices)


def commands(page: str) -> list[list[str]]:
    """The commands of a page's blocks of code, each as a list: the verb and its overrides."""
    if page == "Makefile":
        targets = ["demo", "bench-vae", "bench-denoiser", "sweep", "train-vae"]
        text = subprocess.run(
            ["make", "--dry-run", *targets], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout
    else:
        text = (ROOT / page).read_text()
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines()]
    found = [shlex.split(line, comments=True)[1:] for line in lines if re.match(r"(\S+/)?osp [a-z-]+ [^|]*=", line)]
    # Those with files of a user's own are composed by tests/test_extend.py, which has the files.
    return [command for command in found if "..." not in " ".join(command) and "--config-dir" not in command]


def test_pages_have_commands() -> None:
    with_commands = ["README.md", "README.zh.md", "Makefile", "data/README.md", "docs/training.md", "docs/sampling.md"]
    assert all(commands(page) for page in with_commands)
    assert {*with_commands} <= {*PAGES}
    assert {command[0] for page in PAGES for command in commands(page)} == {*VERBS}


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_is_read_whole(page: str) -> None:
    for verb, *overrides in commands(page):
        composed(verb, [re.sub(r"^([\w.]+=\w+),.*", r"\1", one) for one in overrides if not one.startswith("-")])


WRONG = [
    (["train", "text=words"], "text=words: nothing reads it here; it is read with module=denoiser"),
    (["train", "clipping=norm"], "module=denoiser"),
    (["train", "objective=flow"], "module=denoiser"),
    (["train", "denoiser=cross_tiny"], "module=denoiser"),
    (["train", "latent.scale=2"], "module=denoiser on clips"),
    (["train", "buckets=shapes"], "data=buckets"),
    (["train", "path=x"], "vae=pretrained or denoiser=pretrained"),
    (["train", "checkpoint=x"], "vae=trained"),
    (["train", "+colour=red"], "leave it out"),
    (["train", "++colour=red"], "leave it out"),
    (["train", "experiment=wfvae_tiny", "perceptual=alex"], "module.loss.perceptual=null stands where it would be"),
    (["train", "experiment=t2v_tiny", "perceptual=alex"], "module=vae"),
    (["train", "experiment=t2v_tiny", "clip.frames=5"], "data=shards or data=stream or data=synthetic"),
    (["train", "experiment=t2v_tiny", "latent.scale=2"], "on clips, not on features"),
    (["bench", "checkpoint=x"], "vae=trained"),
    (["bench", "target=denoiser", "path=x"], "denoiser=pretrained"),
    (["eval", "input=x", "checkpoint=y", "path=x"], "vae=pretrained"),
    (["eval", "target=generation", "input=x", "generated=y", "guidance=2"], "not generated=DIR"),
    (["eval", "target=generation", "input=x", "generated=y", "checkpoint=z"], "not generated=DIR"),
    (["sample", "prompt=a", "generator=opensora_v13", "checkpoint=x"], "generator=trained"),
    (["cache", "input=x", "output=y", "min_clips=2"], "buckets=tokens or buckets=shapes"),
    (["cache", "input=x", "output=y", "buckets=tokens", "clip.fps=8", "clip.frames=9"], "not with buckets"),
    (["shards", "input=x", "output=y", "synthetic=plain"], "synthetic.clips=N and no input and no annotations"),
    (["shards", "synthetic.clips=1", "output=y", "captions=x"], "input=DIR"),
]


@pytest.mark.parametrize(("arguments", "told"), WRONG)
def test_what_nothing_reads_is_refused(arguments: list[str], told: str) -> None:
    with pytest.raises(UsageError, match=f"nothing reads it here; .*{re.escape(told.split('; ')[-1])}") as refused:
        composed(arguments[0], arguments[1:])
    assert any(str(refused.value).startswith(f"{argument}: ") for argument in arguments)


READ = [
    ["train", "~perceptual"],
    ["train", "checkpoint=null", "path=null"],
    ["train", "module.lr=1", "vae.latent_channels=4", "clip.fps=8", "data=shards", "data.train.path=x"],
    ["train", "clip={frames: 5, height: 8, width: 8, stride: 1, fps: null}"],
    ["train", "+trainer.gradient_clip_val=1", "++seed=3", "++clip.frames=5", "hydra.job.num=1"],
    ["train", "vae=pretrained", "++vae.path=y"],
    ["train", "+words=7", "module.seed=${words}"],
    [
        "train",
        "experiment=t2v_tiny",
        "debug=limit",
        "checkpoint=x",
        "text.layers=2",
        "clipping.max_norm=1",
        "clipping=norm",
    ],
    ["cache", "input=x", "output=y", "clip.frames=9"],
    ["cache", "input=x", "output=y", "buckets=tokens", "clip.stride=2"],
    ["bench", "++half=decode", "target=vae", "vae=trained", "checkpoint=x"],
    ["sample", "generator=opensora_v13", "vae.path=x", "solver.steps=3", "prompt=a, ${b}"],
    ["eval", "target=generation", "checkpoint=x", "vae=trained", "vae.path=y", "solver=suv_v15"],
]


@pytest.mark.parametrize("arguments", READ, ids=" ".join)
def test_what_is_read_is_taken(arguments: list[str]) -> None:
    composed(arguments[0], arguments[1:])


def test_every_group_that_an_experiment_chooses_is_read() -> None:
    for path in sorted((config_folder() / "experiment").glob("*.yaml")):
        chosen: dict[str, str] = {}
        file = path
        while file:  # an experiment goes on from at most one other
            entries = yaml.safe_load(file.read_text()).get("defaults", [])
            for entry in [entry for entry in entries if isinstance(entry, dict)]:
                ((group, name),) = entry.items()
                chosen.setdefault(group.removeprefix("override /"), name)
            file = next((file.with_name(f"{entry}.yaml") for entry in entries if isinstance(entry, str)), None)
        composed("train", [f"experiment={path.stem}", *(f"{group}={name}" for group, name in chosen.items())])


def test_each_run_of_a_sweep_and_each_stage_of_a_chain_is_checked_before_its_work(tmp_path: Path, osp: Osp) -> None:
    code, out, said = osp("train", "--multirun", "clipping=norm,adaptive", f"output={tmp_path / 'sweep'}")
    assert (code, out) == (2, "")
    assert len(re.findall("clipping=.*: nothing reads it here", said)) == 2
    assert not [*tmp_path.glob("sweep/*/checkpoints")]
    code, out, said = osp("chain", "chain=tiny", "checkpoint=x", "overrides=['buckets=shapes']", f"output={tmp_path}")
    assert (code, out) == (2, "")
    assert said == "osp chain: stage images: buckets=shapes: nothing reads it here; it is read with data=buckets"


def test_what_a_recipe_says_and_nothing_reads_is_left_out_and_what_the_user_says_is_not(osp: Osp) -> None:
    chain = ["chain", "chain=tiny", "checkpoint=x", "dry_run=true"]
    assert "checkpoint=" in osp(*chain)[1].splitlines()[0]
    code, out, _ = osp(*chain, "overrides=['vae=pretrained','path=y']")
    assert code == 0
    assert all("vae=pretrained path=y" in line and " 'checkpoint=" not in line for line in out.splitlines()[:-1])
    code, _, said = osp(*chain, "stages.sparse.overrides=['buckets=shapes']")
    assert (code, said.startswith("osp chain: stage sparse: buckets=shapes: nothing reads it here")) == (2, True)
