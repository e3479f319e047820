"""`osp chain`: stages that begin where the last one ended, a chain that goes on after it was ended, and its errors."""

import csv
import fcntl
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from osp.cli import config_folder
from osp.vae import WFVAE
from osp.weights.pretrained import save_pretrained

Osp = Callable[..., tuple[int, str, str]]

SMALL = [
    *("denoiser.heads=1", "denoiser.head_dim=12", "denoiser.text_channels=8", "text.channels=8", "text.layers=1"),
    *("denoiser.channels=4", "denoiser.out_channels=4", "text.heads=2", "clip.height=32", "clip.width=32"),
    *("data.batch_size=2", "data.workers=0", "data.val.clips=2", "logged_clips=0", "trainer.accelerator=cpu"),
    *("trainer.val_check_interval=1000", "checkpoint_every=1", "vae=pretrained"),
    *("module.muon_lr=null", "module.decay_until=null"),
]
STEPS = ["stages.images.steps=2", "stages.videos.steps=20", "stages.sparse.steps=2"]


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small VAE with random weights."""
    folder = tmp_path_factory.mktemp("world") / "vae"
    torch.manual_seed(0)
    blocks = {"encoder_blocks": 1, "decoder_blocks": 1, "encoder_flow_channels": 4, "decoder_flow_channels": 4}
    save_pretrained(WFVAE(latent_channels=4, level1="2d", base_channels=4, **blocks), folder)
    return folder


def test_a_chain_that_is_ended_goes_on_and_stages_begin_with_averaged_weights(
    vae: Path, osp: Osp, tmp_path: Path
) -> None:
    settings = ",".join(f"'{override}'" for override in [*SMALL, f"path={vae}"])
    chain = ["chain=tiny", "checkpoint=unused", "output=runs", f"overrides=[{settings}]", "~stages.i2v", *STEPS]
    chain.append("stages.sparse.overrides=['module.lr=0']")  # so that its weights stay those it begins with
    commands = osp("chain", *chain, "dry_run=true")[1].splitlines()
    assert osp("train", *shlex.split(commands[0])[2:])[0] == 0  # as a stage of the chain that is finished
    command = [sys.executable, "-m", "osp.cli", "chain", *chain]
    with open("said.txt", "w") as said, subprocess.Popen(command, stderr=said, stdout=said) as running:
        videos = Path("runs/videos/checkpoints/last.ckpt")
        limit = time.monotonic() + 100
        while not videos.exists() and running.poll() is None and time.monotonic() < limit:
            time.sleep(0.05)
        running.send_signal(signal.SIGTERM)
        assert running.wait(30) == 128 + signal.SIGTERM, Path("said.txt").read_text()
    assert not Path("runs/videos/result.json").exists()
    images = Path("runs/images/result.json").stat().st_mtime_ns
    code, out, err = osp("chain", *chain)
    assert code == 0, err
    assert "stage images: finished" in err
    assert "stage videos (2 of 3) continues" in err
    assert re.search(r"continuing from step \d+ of", err)
    assert re.search(r"starting from runs/videos/checkpoints/last\.ckpt", err)
    result = json.loads(out.splitlines()[-1])
    assert result["finished_before"] == ["images"]
    assert [(stage["stage"], stage["steps"]) for stage in result["stages"]] == [
        ("images", 2),
        ("videos", 20),
        ("sparse", 2),
    ]
    assert result["checkpoint"] == "runs/sparse/checkpoints/last.ckpt"
    with open(result["table"]) as table:
        rows = list(csv.DictReader(table))
    assert [row["stage"] for row in rows] == ["images", "videos", "sparse"]
    assert all(float(row["val/loss"]) > 0 for row in rows)
    assert Path("runs/images/result.json").stat().st_mtime_ns == images

    before, after = (
        torch.load(f"runs/{name}/checkpoints/last.ckpt", weights_only=True) for name in ("videos", "sparse")
    )
    assert before["generator"]["denoiser"]["settings"]["stages"] != after["generator"]["denoiser"]["settings"]["stages"]
    assert before["generator"]["latent"] == after["generator"]["latent"]
    for part in ("denoiser", "text"):
        averaged, trained, started = (
            {key.removeprefix(prefix): value for key, value in held["state_dict"].items() if key.startswith(prefix)}
            for held, prefix in ((before, f"ema.model.{part}."), (before, f"model.{part}."), (after, f"model.{part}."))
        )
        assert averaged.keys() == started.keys()
        assert all(torch.equal(averaged[key], started[key]) for key in averaged)
        assert any(not torch.equal(averaged[key], trained[key]) for key in averaged)

    code, out, err = osp("chain", *chain)
    assert code == 0, err
    assert json.loads(out.splitlines()[-1]) == result | {"finished_before": ["images", "videos", "sparse"]}
    refused = [
        (["stages.images.steps=3"], "stage images is not finished, but runs/videos holds a run that began after it"),
        (
            ["stages.sparse.overrides=['module.lr=1']"],
            r"stage sparse: runs/sparse holds a run with module\.lr=0, not 1; del",
        ),
    ]
    for change, message in refused:
        code, out, err = osp("chain", *chain, *change)
        assert code == 2
        assert re.search(message, err)
        assert "\n" not in err


def test_a_stage_that_fails_ends_the_chain_with_its_line_and_code(osp: Osp) -> None:
    code, out, err = osp("chain", "chain=tiny", "checkpoint=none.ckpt", "output=runs")
    assert code == 1
    assert err.splitlines()[-1] == (
        "osp chain: stage images: checkpoint=none.ckpt: no such file; give a checkpoint of `osp train`"
    )
    assert "Traceback" not in err
    assert not out
    assert not Path("runs/videos").exists()


WRONG = [
    ([], "choose chain=NAME: tiny, v10, v11, v12, v12_i2v, v13, v13_inpaint, v15"),
    (["chain=tiny"], "checkpoint=... has to be given"),
    (["chain=v13_inpaint"], "start_from=... has to be given"),
    (
        ["chain=tiny", "checkpoint=x", "stages.i2v.overrides=['module.speed=1']"],
        "stage i2v: module.speed: `osp train` has no such",
    ),
    (["chain=tiny", "checkpoint=x", "overrides=['text=null']"], "text=null: a choice is left out by '~text'"),
    (["chain=tiny", "checkpoint=x", "stages.sparse.steps=0"], r"stage sparse: trainer\.max_steps=0: must be a whole"),
    (["chain=v13"], r"stage stage1 needs data\.train\.path, text\.path: give overrides=\['data\.train\.path=\.\.\.'"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_a_wrong_chain_is_refused_before_any_stage(arguments: list[str], message: str, osp: Osp) -> None:
    code, out, err = osp("chain", *arguments, "output=runs")
    assert code == 2
    assert re.search(message, err), err
    assert err.startswith("osp chain: ")
    assert "\n" not in err
    assert not out


def test_two_chains_do_not_share_a_folder(osp: Osp) -> None:
    Path("runs").mkdir()
    with open("runs/.lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, _, err = osp("chain", "chain=tiny", "checkpoint=x", "output=runs")
    assert code == 2
    assert "runs: another `osp chain`, or a stage that it began, is still running" in err


CHAINS = {  # what each needs, and how many stages it has
    "v10": ([], 3),
    "v11": ([], 2),
    "v12": ([], 6),
    "v12_i2v": (["start_from=it's there"], 1),
    "v13": ([], 3),
    "v13_inpaint": (["start_from=it's there"], 8),
    "v15": ([], 10),
    "tiny": (["checkpoint=x"], 4),
}


def test_no_chain_is_left_out() -> None:
    assert {*CHAINS} == {path.stem for path in (config_folder() / "chain").glob("*.yaml")}


@pytest.mark.parametrize(("name", "needs", "stages"), [(name, *rest) for name, rest in CHAINS.items()])
def test_each_stage_begins_with_what_it_is_meant_for(name: str, needs: list[str], stages: int, osp: Osp) -> None:
    quoted = [need.replace("it's there", "'it\\'s there'") for need in needs]
    code, out, err = osp("chain", f"chain={name}", *quoted, "dry_run=true", "output=runs")
    assert code == 0, err
    *commands, result = out.splitlines()
    assert len(json.loads(result)["stages"]) == len(commands) == stages
    last = None
    for command in commands:
        osp_, train, *overrides = shlex.split(command)
        assert (osp_, train) == ("osp", "train")
        with initialize_config_dir(str(config_folder()), version_base="1.3"):
            cfg = compose("train", overrides)
        experiment = overrides[0].removeprefix("experiment=")
        start = f"{last[1]}/checkpoints/last.ckpt" if last else "it's there" if needs and name != "tiny" else None
        assert cfg.start_from == start
        if last and name != "tiny" and experiment != last[0]:
            assert cfg.after == last[0]
        last = experiment, cfg.output
    assert not list(Path("runs").glob("*/"))
