"""The real command line: shards, training, evaluation, sweeps, and what a wrong command says."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from osp.cli import VERBS
from osp.data.media.video import encode_video
from osp.training.checkpoints import load_trained_vae
from osp.weights import load_pretrained, load_published

Osp = Callable[..., tuple[int, str, str]]
GOLDEN = Path(__file__).parent.parent / "golden"

TINY = [
    "experiment=wfvae_tiny",
    "vae.base_channels=4",
    "vae.latent_channels=4",
    "vae.encoder_flow_channels=4",
    "vae.decoder_flow_channels=4",
    "clip.frames=5",
    "clip.height=16",
    "clip.width=16",
    "data.workers=0",
    "data.batch_size=2",
    "trainer.accelerator=cpu",
    "module.decay_until=null",  # so that a run may go on for longer than was said first
]

BENCH = ["vae=wfvae_tiny", "frames=5", "sizes=16x16", "device=cpu"]


def _command(*arguments: str) -> list[str]:
    """`osp` in a process of its own."""
    return [sys.executable, "-c", "from osp.cli import main; main()", *arguments]


@pytest.fixture
def works(osp: Osp) -> Callable[..., tuple[str, str]]:
    """Runs `osp`, which must succeed; gives stdout and stderr."""

    def run(*arguments: str) -> tuple[str, str]:
        code, out, said = osp(*arguments)
        assert code == 0, said[-2000:]
        return out, said

    return run


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three small videos with moving content and one that is none."""
    folder = tmp_path_factory.mktemp("videos")
    steps = torch.arange(12)[:, None, None]
    for index in range(3):
        ramp = (torch.arange(32)[None, None, :] * (index + 3) + torch.arange(24)[None, :, None] * 5 + steps * 8) % 256
        video = torch.stack([ramp, 255 - ramp, ramp // 2]).to(torch.uint8)
        (folder / f"clip {index}.mp4").write_bytes(encode_video(video, 8.0))
        (folder / f"clip {index}.txt").write_text(f"ramp number {index}")
    (folder / "broken.mp4").write_bytes(b"no video")
    return folder


def test_videos_to_shards_to_a_trained_and_evaluated_vae(
    tmp_path: Path, videos: Path, works: Callable[..., tuple[str, str]]
) -> None:
    command = _command("shards", f"input={videos}", f"output={tmp_path / 'shards'}", "workers=1")
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert (report["clips"], report["captioned"]) == (3, 3)
    assert [name for name, _ in report["skipped"]] == ["broken.mp4"]
    assert len(re.findall(r"broken\.mp4", done.stderr)) == 1

    train = [*TINY, "data=shards", f"data.train.path={tmp_path / 'shards'}", f"output={tmp_path / 'run'}"]
    train += ["trainer.max_steps=6", "trainer.val_check_interval=3", "checkpoint_every=2"]
    out, _ = works("train", *train)
    result = json.loads(out.splitlines()[-1])
    assert result["steps"] == 6
    assert result == json.loads((tmp_path / "run" / "result.json").read_text())
    assert (tmp_path / "run" / "tensorboard").is_dir()

    checkpoint = tmp_path / "run" / "checkpoints" / "best.ckpt"
    size = ["clip.frames=5", "clip.height=24", "clip.width=32", "perceptual.download=false", "device=cpu"]
    out, err = works("eval", f"checkpoint={checkpoint}", f"input={videos}", f"output={tmp_path / 'eval'}", *size)
    summary = json.loads(out.splitlines()[-1])
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert summary["mean"] == metrics["mean"]
    assert metrics["model"] == "wfvae_tiny best"
    assert metrics["counts"] == {"clips": 3, "frames": 15, "skipped": 1}
    assert metrics["psnr_gain"]["lowest_haar_band"] == pytest.approx(
        metrics["mean"]["psnr"] - metrics["baselines"]["lowest_haar_band"]["psnr"]
    )
    assert "lpips_random_trunk" in metrics["mean"]
    assert "lpips" not in metrics["mean"]
    assert len(re.findall("no trunk weights for LPIPS", err)) == 1
    assert [step for step, _ in metrics["settings"]["training_val_psnr"]] == [3, 6]
    assert (tmp_path / "eval" / "contact_sheet.png").stat().st_size > 1000
    assert len(list((tmp_path / "eval" / "reconstructions").glob("*.mp4"))) == 3


def test_a_killed_run_goes_on_with_the_same_command(tmp_path: Path, works: Callable[..., tuple[str, str]]) -> None:
    settings = [*TINY, "trainer.val_check_interval=1000", "checkpoint_every=5", "module.discriminator_start=3"]
    settings += ["module.discriminator.width=4", "module.discriminator.layers=2"]
    run = ["train", *settings, f"output={tmp_path / 'killed'}", "trainer.max_steps=100000"]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # as here, for the same sums to the bit
    nowhere = subprocess.DEVNULL
    process = subprocess.Popen(_command(*run), env=os.environ | threads, stdout=nowhere, stderr=nowhere)
    last = tmp_path / "killed" / "checkpoints" / "last.ckpt"
    waited = time.monotonic() + 120
    while not last.exists() and time.monotonic() < waited:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    stopped = torch.load(last, weights_only=True)["global_step"]
    assert stopped >= 5

    end = f"trainer.max_steps={stopped + 7}"
    out, err = works("train", *settings, f"output={tmp_path / 'killed'}", end)
    assert f"continuing from step {stopped} of" in err
    result = json.loads(out.splitlines()[-1])
    assert result["steps"] == stopped + 7
    assert result["best_val_psnr"] == result["val/psnr"]  # validated at the end, as the interval is longer than the run
    works("train", *settings, f"output={tmp_path / 'whole'}", end)
    ours, theirs = (
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True) for name in ("killed", "whole")
    )
    assert ours["global_step"] == theirs["global_step"]
    for key, value in ours["state_dict"].items():
        assert torch.equal(value, theirs["state_dict"][key]), key


def test_a_sweep_ends_in_one_table_also_if_a_run_fails(tmp_path: Path, osp: Osp) -> None:
    sweep = ["train", "--multirun", *TINY, "debug=limit", f"output={tmp_path}", "vae.decoder_blocks=1,0,2"]
    code, out, said = osp(*sweep)
    assert code == 2
    assert said.splitlines()[-1] == "osp train: decoder_blocks=0: must be a whole number of at least 1"
    header, *rows = csv.reader((tmp_path / "comparison.csv").read_text().splitlines())
    assert {row[0] for row in rows} == {"vae.decoder_blocks=1", "vae.decoder_blocks=2"}
    scores = [float(row[header.index("best_val_psnr")]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert json.loads(out.splitlines()[-1]) == {"runs": 2, "comparison": str(tmp_path / "comparison.csv")}


def test_a_finished_run_does_nothing_and_another_model_is_refused(tmp_path: Path, osp: Osp) -> None:
    run = ["train", *TINY, "debug=limit", f"output={tmp_path}"]
    first = osp(*run)
    again = osp(*run)
    assert (first[0], again[0]) == (0, 0)
    assert json.loads(again[1].splitlines()[-1]) == json.loads(first[1].splitlines()[-1])
    assert osp(*run, "data.workers=1", "trainer.max_steps=5")[0] == 0
    code, _, said = osp(*run, "vae.decoder_blocks=2")
    assert code == 2
    assert "holds a run with vae.decoder_blocks=1, not 2" in said
    # A command that cannot start leaves the old run alone.
    code, _, _ = osp(*run, "resume=false", "data=shards", f"data.train.path={tmp_path / 'none'}")
    assert code == 1
    assert (tmp_path / "checkpoints" / "last.ckpt").exists()
    assert osp(*run, "vae.decoder_blocks=2", "resume=false")[0] == 0


def test_published_weights_are_imported_evaluated_trained_on_and_exported(
    tmp_path: Path, videos: Path, osp: Osp
) -> None:
    def run(*arguments: str) -> dict:
        code, out, said = osp(*arguments)
        assert code == 0, said
        return json.loads(out.splitlines()[-1])

    golden = GOLDEN / "wfvae_v13" / "d_nearest_noattn_main"
    stored = load_file(golden.with_suffix(".safetensors"))
    weights = {key.removeprefix("weights/"): v.float() for key, v in stored.items() if key.startswith("weights/")}
    Path("published").mkdir()
    save_file(weights, "published/diffusion_pytorch_model.safetensors")
    settings = json.loads(golden.with_suffix(".json").read_text())["config"] | {"scale": [0.5] * 4}
    Path("published/config.json").write_text(json.dumps(settings))

    result = run("import-weights", "kind=wfvae_v13", "source=published", "output=ours")
    assert result["kind"] == "wfvae_v13"
    assert result["settings"]["latent_channels"] == 4
    assert result["parameters"] == sum(p.numel() for p in load_pretrained("ours").parameters())
    Path("settings.json").write_text(json.dumps(settings))
    file = "source=published/diffusion_pytorch_model.safetensors"
    assert run("import-weights", "kind=wfvae_v13", file, "output=b", "config=settings.json")["published"] == {
        "scale": [0.5] * 4
    }

    size = ["clip.frames=5", "clip.height=16", "clip.width=16"]
    evaluation = ["vae=pretrained", "path=ours", f"input={videos}", "perceptual.download=false", "save_videos=0"]
    assert run("eval", *evaluation, "output=eval", "device=cpu", *size)["model"] == "VAE ours"

    training = ["vae=pretrained", "path=ours", "module.loss.perceptual=null", "debug=limit", "trainer.accelerator=cpu"]
    assert run("train", *training, "data.workers=0", "output=run", *size)["steps"] == 4
    trained = load_trained_vae("run/checkpoints/last.ckpt")
    assert trained.settings == load_pretrained("ours").settings
    change = trained.decoder.conv_out.weight - load_pretrained("ours").decoder.conv_out.weight
    assert 0 < change.abs().max() < 1e-3

    exported = run("export-weights", "source=ours", "output=back")["settings"]
    assert {key: exported[key] for key in settings} == settings
    back = load_file("back/diffusion_pytorch_model.safetensors")
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[key], value) for key, value in weights.items())
    run("export-weights", "source=run/checkpoints/last.ckpt", "output=back")
    again = load_published("wfvae_v13", "back")
    assert all(torch.equal(value, trained.state_dict()[key]) for key, value in again.state_dict().items())
    assert {path.name for path in tmp_path.iterdir()} <= {
        *("published", "ours", "settings.json", "b", "eval", "run", "back")
    }


WRONG = [
    (["trian"], 2, r"there is no verb 'trian' \(did you mean train\?\); choose shards, "),
    (
        ["train", *TINY, "vae.base_chanels=8"],
        2,
        "vae.base_chanels: .* no such setting here; did you mean vae.base_channels",
    ),
    (["train", "experiment=wfvae_tny"], 2, "wfvae_tny.*wfvae_tiny"),
    (["train", *TINY, "clip.frames=abc"], 2, "clip.frames=abc: must be a"),
    (["train", *TINY, "data.val.frames=0"], 2, "data.val.frames=0: must be a"),
    (["train", *TINY, "data.val=null"], 2, "data.val=null"),
    (["train", *TINY, "seed=-1"], 2, "seed=-1: must be a"),
    (["train", *TINY, "output={tmp}/file/run"], 1, "file/run: Not a directory"),
    (["train", *TINY, "module.warmup_steps=soon"], 2, "module.warmup_steps=soon: must be a whole number"),
    (["train", *TINY, "clip.height=20"], 2, "height=20: must be a multiple of 8.*; use 16 or 24"),
    (["train", *TINY, "data=shards"], 2, r"data\.train\.path=\.\.\. has to be given: "),
    (["train", *TINY, "data=shards", "data.train.path={tmp}/none"], 1, "none: no such folder"),
    (["train", *TINY, "data=shards", "data.train.path={tmp}"], 1, "no videos or images in it"),
    (["train", *TINY, "data.batch_size=0"], 2, "batch_size=0"),
    (["train", *TINY, "module.lr=fast"], 2, r"module\.lr=fast"),
    (["train", *TINY, "trainer.precision=float7"], 2, "Precision 'float7'"),
    (["train", *TINY, "trainer.devices=0"], 2, "Lightning refuses the settings of trainer"),
    (["train", *TINY, "checkpoint_every=0"], 2, "checkpoint_every=0"),
    (["shards", "output={tmp}/s"], 2, "give either input=DIR"),
    (["shards", "input={tmp}/none", "output={tmp}/s"], 2, "no such folder"),
    (["shards", "input={tmp}", "output={tmp}/s"], 1, "no videos or images"),
    (["shards", "input={tmp}"], 2, "output=... has to be given: "),
    (["shards", "input={tmp}", "output={tmp}/s", "shard_bytes=1GB"], 2, "shard_bytes=1GB: must be a"),
    (["shards", "output={tmp}/s", "synthetic.clips=many"], 2, "synthetic.clips=many: must be a"),
    (["eval", "input={tmp}", "vae=wfvae_tiny", "max_memory=much"], 2, "max_memory=much: must be an amount of memory"),
    (["eval", "input={tmp}", "vae=wfvae_tiny", "max_memory=1MB"], 2, "max_memory=1MB is too little: for 64 pixels"),
    (["eval", "input={tmp}", "batch_size=all"], 2, "batch_size=all: must be a"),
    (["eval", "checkpoint={tmp}/file", "input={tmp}", "device=gpu"], 2, "device=gpu: is not known"),
    (["eval", "checkpoint={tmp}/file", "input={tmp}"], 1, "file: .*not a checkpoint"),
    (["eval", "input={tmp}"], 2, "give checkpoint=FILE"),
    (
        ["eval", "checkpoint={tmp}/none.ckpt", "input={tmp}"],
        1,
        "checkpoint=.*none.ckpt: no such file; give a checkpoint",
    ),
    (
        ["eval", "checkpoint=x", "input={tmp}", "frames=3"],
        2,
        "frames: `osp eval` has no such setting here; did you mean clip.frames",
    ),
    (["eval", "vae=pretrained", "input={tmp}"], 2, "vae=pretrained path=FOLDER"),
    (["eval", "vae=pretrained", "path={tmp}", "input={tmp}"], 1, r"has no config\.json"),
    (["train", "vae=pretrained"], 2, "give path=FOLDER"),
    (
        ["train", "vae=causalvae_v11", "vae.base_channels=32", "module.loss.perceptual=null"],
        2,
        "wavelet_weight",
    ),
    (["bench", *BENCH, "target=oven"], 2, "target=oven: is not known; choose denoiser, vae"),
    (["bench", *BENCH, "sizes=64"], 2, "sizes=64: must be HEIGHTxWIDTH, for example 256x256"),
    (["bench", *BENCH, "sizes=[64x64,64x60]"], 2, "width=60: must be a multiple of 8.*; use 56 or 64"),
    (["bench", *BENCH, "sizes=[]"], 2, r"sizes=\[\]: leaves nothing"),
    (["bench", *BENCH, "frames=[5,0]"], 2, "frames=0: must be a whole number of at least 1"),
    (["bench", *BENCH, "frames=some"], 2, "frames=some: must be a whole number of at least 1"),
    (["bench", *BENCH, "chunk_frames=0"], 2, "chunk_frames=0: must be a whole number of at least 1, or null"),
    (["bench", *BENCH, "precision=fp8"], 2, "precision=fp8: is not known; choose 32-true"),
    (["bench", *BENCH, "mode=[whole,half]"], 2, "mode=half: is not known; choose whole, pieces or stream"),
    (["bench", *BENCH, "compile=maybe"], 2, "compile=maybe: is not known; choose false or true"),
    (["bench", *BENCH, "tiling=256"], 2, "tiling=256: must be null or like {size: 256"),
    (["bench", *BENCH, "tiling=[{{size:100,overlap:8}}]"], 2, "tiling: size=100: must be a multiple of 8"),
    (["bench", *BENCH, "device=cuda:99"], 2, "device=cuda:99: this machine has"),
    (["bench", *BENCH, "repeats=0"], 2, "repeats=0: must be a whole number of at least 1"),
    (["bench", "target=denoiser", "checkpoint_every=1"], 2, "checkpoint_every is now called recompute_every"),
    (
        ["train", "module=denoiser", "denoiser=cross_tiny", "denoiser.condition_channels=[16,4]"],
        2,
        "denoiser.condition_channels is now called denoiser.frame_channels of a CrossTransformer or "
        "denoiser.modulation_width of a JointTransformer",
    ),
    (["bench", *BENCH, "threads=0"], 2, "threads=0: must be a whole number of at least 1, or null"),
    (["bench", *BENCH, "isolate=often"], 2, "isolate=often: is not known; choose null, true or false"),
    (["bench", *BENCH, "checkpoint=x"], 2, "checkpoint=x: nothing reads it here; it is read with vae=trained"),
    (["bench", "vae=pretrained"], 2, "vae=pretrained needs path=FOLDER"),
    (["bench", "vae=published"], 2, r"vae=published needs vae\.kind=\.\.\. and vae\.source="),
    (["bench", "vae=trained", "checkpoint={tmp}/none.ckpt"], 1, r"none\.ckpt: no such file"),
    (["import-weights", "source={tmp}", "output={tmp}/o"], 2, "give kind=KIND for one model, or release=NAME"),
    (
        ["import-weights", "kind=wfvae", "source={tmp}", "output={tmp}/o"],
        2,
        "kind=wfvae: is not known; choose wfvae_v13",
    ),
    (["import-weights", "kind=causalvae", "source={tmp}", "output={tmp}/o"], 1, "holds no weights"),
    (["import-weights", "kind=causalvae", "source={tmp}/file", "output={tmp}/o"], 1, "file: .*not a checkpoint"),
    (["import-weights", "kind=causalvae", "source={tmp}/none", "output={tmp}/o"], 1, "none: no such file or folder"),
    (["import-weights", "kind=causalvae", "source={tmp}", "output={tmp}/o", "config=3"], 1, "3: No such file"),
    (["import-weights", "kind=causalvae", "source={tmp}", "output={tmp}/o", "config={tmp}/no.json"], 1, r"no\.json"),
    (["export-weights", "source={tmp}"], 2, "output=... has to be given: "),
    (["export-weights", "source={tmp}", "output={tmp}/o"], 1, r"has no config\.json"),
    (["export-weights", "source={tmp}/none.ckpt", "output={tmp}/o"], 1, r"none\.ckpt: no such file"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), WRONG)
def test_a_wrong_command_is_told_in_one_line(
    arguments: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    osp: Osp,
) -> None:
    (tmp_path / "empty").mkdir()
    if any("/file" in part for part in arguments):
        (tmp_path / "empty" / "file").touch()
    arguments = [part.format(tmp=tmp_path / "empty") for part in arguments]
    got, out, said = osp(*arguments)
    assert got == code, said
    assert re.search(message, said), said
    assert said.startswith("osp")
    assert "\n" not in said
    assert not out


def test_verbs_that_run_no_training_step_start_without_lightning() -> None:
    modules = ", ".join(f"osp.cli.{verb.replace('-', '_')}" for verb in VERBS if verb not in ("train", "plan"))
    script = f"import sys, {modules}; sys.exit('lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=100).returncode == 0


def test_help_names_every_verb(osp: Osp) -> None:
    code, out, _ = osp()
    assert code == 0
    assert {*VERBS} <= {line.split()[0] for line in out.splitlines() if line.startswith(" ")}


def test_one_batch_of_shards_is_learnt_by_heart(tmp_path: Path, osp: Osp) -> None:
    size = ["synthetic.frames=5", "synthetic.height=16", "synthetic.width=16"]
    assert osp("shards", f"output={tmp_path / 'shards'}", "synthetic.clips=6", *size, "workers=0")[0] == 0
    run = [
        *TINY,
        "data=shards",
        f"data.train.path={tmp_path / 'shards'}",
        "debug=overfit",
        f"output={tmp_path / 'run'}",
    ]
    code, _, _ = osp("train", *run, "trainer.max_steps=60", "trainer.val_check_interval=30")
    assert code == 0
    curve = _psnr_curve(tmp_path / "run")
    assert list(curve) == [30, 60]
    assert curve[60] > curve[30]


def _psnr_curve(run: Path) -> dict[int, float]:
    from osp.report.curves import read_curves

    return dict(read_curves(run)["val/psnr"])
