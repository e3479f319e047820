"""`osp eval target=generation`: with a generator that draws what its prompts say, and one that has learned nothing."""

import csv
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from osp.cli import main
from osp.conditioning import GivenFrames, WordText
from osp.data.media.video import encode_video, to_float
from osp.data.procedural.drawing import render
from osp.data.procedural.scene import Scene, backgrounds_for, read_caption
from osp.data.shards.build import write_shards
from osp.denoiser import CrossTransformer
from osp.diffusion import Flow
from osp.errors import UsageError
from osp.sampling import VideoGenerator
from osp.sampling.outputs import SampleFolder
from osp.sampling.progress import Watch, unwatched
from osp.vae import LatentCodec
from osp.vae.lowest_band import LowestBand

Osp = Callable[..., tuple[int, str, str]]
SIZE = {"frames": 9, "height": 32, "width": 32}


def random_generator(path: str | None, takes_frames: bool = False, **_: None) -> VideoGenerator:
    """Parts that fit together, with random weights."""
    torch.manual_seed(0)
    codec = LatentCodec(LowestBand(4), 0.0, 1.0)
    denoiser = CrossTransformer(
        [{"blocks": 1}],
        channels=3,
        out_channels=3,
        frame_channels=[3, 4] if takes_frames else [],
        heads=1,
        head_dim=24,
        text_channels=16,
    )
    text = WordText(16, None, layers=1, heads=1)
    return VideoGenerator(denoiser, text, Flow(), codec, fps=8.0, clip=SIZE)


class Artist(VideoGenerator):
    """Draws the scene of each prompt, with the frames given in their places."""

    def generate(
        self,
        prompts: Sequence[str],
        frames: int,
        height: int,
        width: int,
        *,
        seeds: Sequence[int],
        given: GivenFrames | None = None,
        hold_given: bool = True,
        low_memory: bool = False,
        progress: Watch = unwatched,
        **others: Any,
    ) -> Tensor:
        self.check(prompts, frames, height, width, seeds=seeds, given=given, **others)
        videos = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            asked = read_caption(prompt)
            scene = Scene((asked,), backgrounds_for([asked.colour])[0], variation=seed)
            videos.append(to_float(render(scene, frames, height, width)))
        video = torch.stack(videos)
        return video if given is None else torch.where(given.mask[:, None] == 0, given.video, video)


def artist(path: str, takes_frames: bool = False, **_: None) -> VideoGenerator:
    parts = random_generator(path, takes_frames)
    return Artist(parts.denoiser, parts.text, parts.objective, parts.codec, parts.fps, parts.clip)


@pytest.fixture(autouse=True)
def generators(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What `generator._target_=fake.NAME` finds, and the files that it is said to be read from."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/name/checkpoints").mkdir(parents=True)
    for name in ("x", "x.ckpt", "runs/name/checkpoints/best.ckpt"):
        (tmp_path / name).touch()
    module = ModuleType("fake")
    module.artist, module.random_generator = artist, random_generator  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake", module)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Procedural clips with one object each."""
    folder = tmp_path_factory.mktemp("shards")
    drawn = [f"synthetic.{key}={value}" for key, value in (SIZE | {"height": 64, "width": 64}).items()]
    with pytest.MonkeyPatch.context() as patch:
        one = ["synthetic.clips=12", "synthetic.objects=1", "synthetic.plain=true", "workers=0"]
        patch.setattr(sys, "argv", ["osp", "shards", f"output={folder}", *one, *drawn])
        main()
    return folder


@pytest.fixture
def generation(osp: Osp) -> Osp:
    """Runs `osp eval target=generation`."""
    return lambda *arguments: osp("eval", "target=generation", "device=cpu", *arguments)


def test_a_generator_that_follows_its_prompts_is_right(tmp_path: Path, shards: Path, generation: Osp) -> None:
    model = ["checkpoint=runs/name/checkpoints/best.ckpt", "generator._target_=fake.artist"]
    size = ["clip.height=64", "clip.width=64"]
    arguments = [*model, *size, f"input={shards}", f"output={tmp_path}", "prompts=6", "batch_size=4", "seed=5"]
    code, out, err = generation(*arguments, "solver.steps=2", "save_videos=2")
    assert code == 0, err
    summary, metrics = json.loads(out.splitlines()[-1]), json.loads((tmp_path / "metrics.json").read_text())
    for key in ("accuracy", "frechet", "counts"):
        assert summary[key] == metrics[key]
    assert metrics["accuracy"]["generated"]["all"]["rate"] == 1
    assert metrics["accuracy"]["real"]["all"]["rate"] == 1
    assert metrics["accuracy"]["vae"]["all"]["count"] == 6  # the generator's own
    assert metrics["counts"] == {"generated": 6, "real": 6, "further_real": 6, "skipped": 0}
    assert metrics["model"] == "best"
    assert metrics["settings"]["solver"] == {"name": "euler", "steps": 2, "shift": None}
    assert metrics["settings"]["clip"] == {"frames": 9, "height": 64, "width": 64, "stride": 1, "fps": None}
    assert metrics["settings"]["features"] == "frechet_random3d"
    assert metrics["frechet"]["floor"] > 0
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["seed"] for row in rows] == ["5", "6", "7", "8", "9", "10"]
    assert len(list((tmp_path / "videos").glob("*.mp4"))) == 2
    assert (tmp_path / "contact_sheet.png").stat().st_size > 1000


@pytest.mark.parametrize(("mode", "given"), [("image", [0]), ("transition", [0, 8]), ("continuation", [0, 1, 2])])
def test_given_frames_come_from_the_clip_of_the_prompt(
    mode: str,
    given: list[int],
    tmp_path: Path,
    shards: Path,
    generation: Osp,
) -> None:
    model = ["checkpoint=x.ckpt", "generator._target_=fake.artist", "+generator.takes_frames=true"]
    arguments = [*model, f"input={shards}", f"output={tmp_path}", "prompts=3", "batch_size=2", "save_videos=0"]
    code, out, err = generation(*arguments, f"mode={mode}", "keep_frames=3")
    assert code == 0, err
    about = json.loads(out.splitlines()[-1])["given"]
    assert about["frames"] == given
    assert about["psnr"] == 100  # the artist copies them; the VAE does not
    assert 10 < about["vae_psnr"] < 40
    assert about["loss"] == pytest.approx(about["vae_psnr"] - 100)


def test_a_generator_that_knows_nothing_is_wrong(tmp_path: Path, shards: Path, generation: Osp) -> None:
    model = ["checkpoint=x.ckpt", "generator._target_=fake.random_generator", "+generator.takes_frames=true"]
    arguments = [*model, f"input={shards}", f"output={tmp_path}", "prompts=20", "solver.steps=2", "mode=image"]
    code, out, err = generation(*arguments, "precision=bf16-mixed", "hold_given=false")
    assert code == 0, err
    assert "prompts=20, but" in err
    summary = json.loads(out.splitlines()[-1])
    assert summary["accuracy"]["generated"]["all"]["right"] < 3
    assert summary["counts"] == {"generated": 12, "real": 12, "further_real": 0, "skipped": 0}
    assert summary["frechet"]["floor"] is None
    assert summary["given"]["loss"] > 1
    code, out, err = generation(*arguments, "prompts=2")
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["given"]["loss"] == pytest.approx(0, abs=0.01)  # held, whatever it knows


@pytest.mark.parametrize("kind", ["mp4", "png"])
def test_a_folder_of_samples_is_judged_by_its_own_prompts(
    kind: str, tmp_path: Path, shards: Path, generation: Osp
) -> None:
    folder = SampleFolder(tmp_path / "samples", kind)
    prompts = ["a large red star moves up", "a large blue ring grows", "a large green circle slides left"]
    for number, prompt in enumerate(prompts):
        asked = read_caption(prompts[0] if number == 1 else prompt)  # the second is drawn wrong
        video = to_float(render(Scene((asked,), "black", variation=number), 9, 64, 64))
        folder.write(f"{number:03d}", video, {"prompt": prompt, "seed": number, "fps": 8.0, "frames": 9})
    folder.finish()
    arguments = [f"generated={tmp_path / 'samples'}", f"input={shards}", f"output={tmp_path / 'eval'}"]
    code, out, err = generation(*arguments)
    assert code == 0, err
    summary = json.loads(out.splitlines()[-1])
    rates = summary["accuracy"]["generated"]
    assert {part: rates[part]["right"] for part in rates} == {"all": 2, "colour": 2, "shape": 2, "motion": 2}
    assert summary["accuracy"]["real"]["all"]["right"] == 3
    assert "vae" not in summary["accuracy"]
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert "guidance" not in metrics["settings"]  # not known of a folder
    clips = metrics["clips"]
    assert [clip["prompt"] for clip in clips] == prompts
    assert clips[1]["read"] == {"colour": "red", "shape": "star", "motion": "up"}

    def refused(*more: str) -> tuple[int, str]:
        got, _, said = generation(*arguments, *more)
        assert "\n" not in said
        return got, said

    assert refused("clip.frames=10")[1].endswith("samples have 9; ask for no more")
    assert refused("input=none") == (1, "osp eval: input=none: no such folder; give shards of procedural clips")
    missing = next((tmp_path / "samples").glob("002*"))
    missing.rename(tmp_path / missing.name)
    got, said = refused()
    assert (got, f"{missing}: no such file, but samples.jsonl beside it lists it" in said) == (1, True)
    small = to_float(render(Scene((read_caption(prompts[2]),), "black", variation=2), 9, 32, 32))
    folder.write("002", small, {"prompt": prompts[2], "seed": 2, "fps": 8.0, "frames": 9})
    got, said = refused()
    assert got == 1
    assert re.search(r"is 9x64x64 and 002\S* 9x32x32; videos of one size", said)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "give checkpoint=FILE of `osp train`, or generator=opensora_v13"),
        (["checkpoint=x", "generated=y"], 2, "checkpoint=x: nothing reads it here; .* not generated=DIR"),
        (["checkpoint=none.ckpt"], 1, "checkpoint=none.ckpt: no such file; give a checkpoint of `osp train`"),
        (["checkpoint=x", "input=none"], 1, "input=none: no such folder"),
        (["generator=opensora_v13"], 2, r"give path=FOLDER text\.path=FOLDER"),
        (["generated=none"], 1, r"none/samples\.jsonl: lists no video"),
        (["generated=none", "mode=image"], 2, "mode=image needs checkpoint=FILE"),
        (["checkpoint=x", "prompts=0"], 2, "prompts=0: must be a"),
        (["checkpoint=x", "precision=8-true"], 2, "precision=8-true"),
        (["checkpoint=x", "mode=image"], 2, "this denoiser was not trained with any"),
        (["checkpoint=x", "mode=continuation", "keep_frames=9"], 2, "keep_frames=9: the videos have 9 frames"),
        (["checkpoint=x", "mode=middle"], 2, "mode=middle: is not known"),
        (["checkpoint=x", "clip.height=40"], 2, "height=40: must be a multiple of 16"),
        (["checkpoint=x", "solver.name=magic"], 2, "solver.name=magic: is not known"),
        (["checkpoint=x", "clip.frames=41"], 1, "none of its 12 clips is long enough for frames=41"),
        (["checkpoint=x", "input={tmp}/videos"], 1, "the clip ramp.mp4 has no caption to be judged by"),
        (["checkpoint=x", "input={tmp}/captioned"], 2, "the prompt 'a cat' names no shape that is known"),
        (["checkpoint=x", "target=denoiser"], 2, "target=denoiser: is not known; choose generation, reconstruction"),
    ],
)
def test_what_cannot_be_evaluated_is_said_at_once(
    arguments: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    shards: Path,
    generation: Osp,
) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "ramp.mp4").write_bytes(encode_video(torch.zeros(3, 9, 32, 32), 8.0))
    (tmp_path / "videos" / "captions.jsonl").write_text('{"path": "ramp.mp4", "caption": "a cat"}')
    write_shards(
        tmp_path / "videos", tmp_path / "captioned", captions=tmp_path / "videos" / "captions.jsonl", workers=0
    )
    arguments = [part.format(tmp=tmp_path) for part in arguments]
    if not any(part.startswith("input=") for part in arguments):
        arguments.append(f"input={shards}")
    if not {"target=denoiser", "generated=none"} & {*arguments}:
        arguments += ["generator._target_=fake.artist", "prompts=1"][: 1 if "prompts=0" in arguments else 2]
    got, out, said = generation(*arguments)
    assert got == code, said
    assert re.search(message, said), said
    assert "\n" not in said
    assert not out


def test_the_artist_takes_what_a_generator_takes() -> None:
    with pytest.raises(UsageError, match="frames=8"):
        artist("x").generate(["a red star moves up"], 8, 32, 32, seeds=[0])
