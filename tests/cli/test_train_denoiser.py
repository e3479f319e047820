"""`osp train` with a denoiser: from clips by way of features to a generator, on from there, and what is refused."""

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from osp.data.shards.build import write_rendered
from osp.data.sources import SyntheticClips
from osp.training.checkpoints import load_trained_generator
from osp.training.denoiser_module import DenoiserModule
from osp.vae import WFVAE
from osp.weights.pretrained import save_pretrained

Osp = Callable[..., tuple[int, str, str]]

SMALL = [
    *("denoiser.heads=1", "denoiser.head_dim=12", "denoiser.text_channels=8", "text.channels=8", "text.layers=1"),
    *("denoiser.channels=4", "denoiser.out_channels=4", "text.heads=2"),
    *("data.batch_size=2", "data.workers=0", "data.val_clips=4", "logged_clips=2", "trainer.accelerator=cpu"),
    *("trainer.max_steps=4", "trainer.val_check_interval=2", "trainer.log_every_n_steps=1", "checkpoint_every=2"),
    "module.decay_until=null",
]
T2V = ["train", "experiment=t2v_tiny", *SMALL]
SIZE = ["clip.frames=9", "clip.height=32", "clip.width=32"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, and a VAE in a folder."""
    folder = tmp_path_factory.mktemp("world")
    drawn = SyntheticClips(8, frames=9, height=32, width=32, objects=1, plain=True)
    clips = [drawn.read(index, 0) for index in range(8)]
    rendered = [(f"{i:03d}", clip["video"], {"fps": 8.0, "caption": clip["caption"]}) for i, clip in enumerate(clips)]
    write_rendered(rendered, folder / "shards", lossless=True)
    silent = [(key, video, {"fps": 8.0}) for key, video, _ in rendered]
    write_rendered(silent, folder / "silent", lossless=True)
    small = {"base_channels": 4, "encoder_blocks": 1, "decoder_blocks": 1}
    flow = {"encoder_flow_channels": 4, "decoder_flow_channels": 4}
    for name, channels in (("vae", 4), ("wide", 8)):
        torch.manual_seed(0)
        save_pretrained(WFVAE(latent_channels=channels, level1="2d", **small, **flow), folder / name)
    return folder


def result(ran: tuple[int, str, str]) -> dict:
    code, out, said = ran
    assert code == 0, said
    return json.loads(out.splitlines()[-1])


def test_features_to_a_generator_and_on_to_given_frames(world: Path, osp: Osp, tmp_path: Path) -> None:
    vae = ["vae=pretrained", f"path={world / 'vae'}"]
    result(osp("cache", *vae, f"input={world / 'shards'}", "output=features", *SIZE, "device=cpu"))
    run = [*T2V, "data.train.path=features", "output=t2v"]
    first = result(osp(*run))
    assert first["steps"] == 4
    assert first["mode"] == "min"
    assert first["best_val_loss"] <= first["val/loss"] == json.loads(Path("t2v/result.json").read_text())["val/loss"]
    assert result(osp(*run)) == first
    code, _, said = osp(*run, "trainer.max_steps=6", "data.workers=1")
    assert code == 0
    assert "continuing from step 4" in said
    code, _, said = osp(*run, "objective=velocity_v13")
    assert code == 2
    assert re.search(r"t2v holds a run with objective\._target_=osp\.diffusion\.Flow", said)

    events = EventAccumulator("t2v/tensorboard", size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    assert {"val/clip_0", "val/clip_1"} <= set(events.Tags()["images"])  # by the VAE that the features name
    scalars = set(events.Tags()["scalars"])
    assert {"train/loss", "train/lr", "train/gradient_norm", "train/clips_per_second", "data/broken"} <= scalars
    assert {"val/loss", "val/loss_time_3"} <= scalars
    assert [event.step for event in events.Scalars("val/loss")] == [2, 4, 6]
    generator = load_trained_generator("t2v/checkpoints/best.ckpt")
    assert generator.clip == {"frames": 9, "height": 32, "width": 32}
    assert generator.codec.origin == str(world / "vae")

    clips = ["data=shards", f"data.train.path={world / 'shards'}", "data.train.flip=false", *SIZE, *vae]
    given = ["denoiser=cross_inpaint_tiny", "denoiser.frame_channels=[4,4]", "module.masks=stage2"]
    more = [*T2V, *clips, *given, "start_from=t2v/checkpoints/best.ckpt", "output=i2v"]
    code, _, said = osp(*more, "output=t2v", "resume=false")
    assert code == 2
    assert "resume=false deletes" in said
    assert result(osp(*more))["steps"] == 4
    ours, theirs = (torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True) for run in ("i2v", "t2v"))
    assert ours["generator"]["latent"] == theirs["generator"]["latent"]  # scaling and all
    assert load_trained_generator("i2v/checkpoints/last.ckpt").takes_frames
    code, _, said = osp(*more, "trainer.max_steps=6")
    assert code == 0
    assert "starting from" not in said


def test_a_run_that_is_told_to_stop_is_no_success(world: Path, osp: Osp, monkeypatch: pytest.MonkeyPatch) -> None:
    clips = ["data=shards", f"data.train.path={world / 'shards'}", "data.train.flip=false", *SIZE]
    run = [*T2V, *clips, "vae=pretrained", f"path={world / 'vae'}", "checkpoint_every=1", "output=told"]
    with monkeypatch.context() as patched:
        take_step = DenoiserModule.take_step

        def told(self: DenoiserModule, *args: Any, **kwargs: Any) -> Any:
            if self.trainer.global_step == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return take_step(self, *args, **kwargs)

        patched.setattr(DenoiserModule, "take_step", told)
        code, out, said = osp(*run)
    assert (code, out) == (143, "")
    assert "ended by SIGTERM at step 2 of 4: the same command goes on from" in said
    assert not Path("told/result.json").exists()
    assert result(osp(*run))["steps"] == 4


def test_a_sweep_of_denoisers_is_sorted_by_its_loss(world: Path, osp: Osp) -> None:
    clips = ["data=shards", f"data.train.path={world / 'shards'}", "data.train.flip=false", *SIZE]
    clips += ["vae=pretrained", f"path={world / 'vae'}"]
    verb, *settings = [*T2V, *clips]
    code, _, said = osp(verb, "--multirun", *settings, "trainer.max_steps=2", "module.lr=0,0.1", "output=sweep")
    assert code == 0, said
    header, *rows = [line.split(",") for line in Path("sweep/comparison.csv").read_text().splitlines()]
    losses = [float(row[header.index("best_val_loss")]) for row in rows]
    assert losses == sorted(losses)


WRONG = [
    (["data.train.path={world}/none"], 1, "none: no folder of features"),
    ([], 2, r"data\.train\.path=\.\.\. has to be given: "),
    (["data.train.path={world}/shards"], 1, "shards.*not an index of features.*make one with `osp cache`"),
    (["data=synthetic"], 2, "there is no VAE to encode them; give vae=trained checkpoint=FILE"),
    (["data=synthetic", "checkpoint={world}/none.ckpt"], 1, r"checkpoint=\S*none\.ckpt: no such file; give a checkp"),
    (["data=synthetic", "vae=pretrained", "path={world}/wide"], 2, r"have 8 channels, but denoiser\.channels=4; set"),
    (["data=synthetic", "vae=pretrained", "path={world}/vae", "clip.height=24"], 2, "height=24 makes 3 latent pixels"),
    (["data=synthetic", "vae=pretrained", "path={world}/vae", "clip.width=20"], 2, "width=20: must be a multiple of 8"),
    (
        [
            "data=shards",
            "data.train.path={world}/silent",
            "data.train.flip=false",
            "vae=pretrained",
            "path={world}/vae",
            *SIZE,
        ],
        2,
        r"data\.train have no captions",
    ),
    (
        ["data=shards", "data.train.path={world}/shards", "vae=pretrained", "path={world}/vae", *SIZE],
        2,
        r"captions say left and right; set data\.train\.flip=false",
    ),
    (["text=null"], 2, "text=null: a choice is left out by '~text'"),
    (
        ["module.xylophone=1"],
        2,
        "module.xylophone: `osp train` has no such setting here; `osp train --help` lists all$",
    ),
    (
        ["data=synthetic", "vae=pretrained", "path={world}/vae", "start_from=none.ckpt"],
        1,
        r"start_from=none\.ckpt: no such file",
    ),
    (
        ["data=synthetic", "vae=pretrained", "path={world}/vae", "start_from={world}/vae"],
        2,
        "holds a WFVAE, not a CrossTransformer",
    ),
    (["data=buckets", "data.train.path={world}/shards"], 2, "choose buckets=tokens or buckets=shapes"),
    (
        ["data=buckets", "data.train.path={world}/shards", "buckets=tokens"],
        2,
        r"data\.train\.rule\.\w+=\.\.\. has to be given",
    ),
    (["data.train.path=x", "global_batch=0"], 2, "global_batch=0: must be a"),
    (["data=synthetic", "vae=pretrained", "path={world}/vae", "global_batch=3"], 2, "=3 is no multiple of the 2 clips"),
    (["data=synthetic", "after=t2v_tiny"], 2, "begins with the weights of t2v_tiny: give start_from=CHECKPOINT"),
    (["data=synthetic", "vae=pretrained", "path={world}/vae", "module.masks=step9"], 2, "masks=step9: is not known"),
    (["data=synthetic", "vae=pretrained", "path={world}/vae", "clipping.decay=2"], 2, "decay=2: must be"),
    (
        ["data=synthetic", "vae=pretrained", "path={world}/vae", "trainer.accelerator=tpu"],
        2,
        "device=tpu: is not known",
    ),
]


@pytest.mark.parametrize(("arguments", "code", "message"), WRONG)
def test_a_wrong_command_is_told_in_one_line(
    arguments: list[str], code: int, message: str, world: Path, osp: Osp
) -> None:
    got, out, said = osp(*T2V, *(part.format(world=world) for part in arguments))
    assert got == code, said
    assert re.search(message, said), said
    assert said.startswith("osp train: ")
    assert "\n" not in said
    assert not out


def test_a_vae_and_a_denoiser_want_what_is_theirs(world: Path, osp: Osp) -> None:
    code, _, said = osp("train", "module=denoiser", "data.workers=0")
    assert (code, said.count("\n")) == (2, 0)
    assert "module=denoiser needs denoiser=NAME" in said
    code, _, said = osp("train", "experiment=wfvae_tiny", "start_from=x")
    assert (code, said.count("\n")) == (2, 0)
    assert "start_from=x is for module=denoiser" in said
