"""`osp sample` as a user runs it, with tiny models of random weights."""

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import nn

from osp.cli import config_folder
from osp.cli import sample as sample_verb
from osp.conditioning import WordText
from osp.data.media.pictures import encode_png
from osp.data.media.video import encode_video, probe, read_clip
from osp.denoiser import CrossTransformer, JointTransformer
from osp.diffusion import Flow, Objective, Solver, Velocity
from osp.sampling import VideoGenerator
from osp.sampling.jobs import Batch, Job, Plan
from osp.sampling.outputs import read_settings
from osp.sampling.pictures import PictureFiles
from osp.vae import WFVAE, LatentCodec
from osp.weights import save_pretrained

Osp = Callable[..., tuple[int, str, str]]
STAGES = [{"blocks": 1, "pattern": "dense"}, {"blocks": 1, "pattern": "skiparse", "k": 2}]
TEXT = {"channels": 16, "pooled_channels": 16, "layers": 1, "heads": 2, "max_tokens": 8}
CLIP = {"frames": 5, "height": 16, "width": 32}
FAST = ["solver.steps=2", "device=cpu"]

Run = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE in a folder, an inpainting denoiser in another, and checkpoints of training."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    flows = {"encoder_flow_channels": 4, "decoder_flow_channels": 4, "encoder_blocks": 1, "decoder_blocks": 1}
    for name, channels in (("vae", 4), ("other_vae", 4), ("large_vae", 8)):
        save_pretrained(WFVAE(latent_channels=channels, base_channels=4, level1="2d", **flows), folder / name)
    common = {"channels": 4, "out_channels": 4, "heads": 2, "text_channels": 16, "stages": STAGES}
    inpaint = CrossTransformer(**common, head_dim=12, frame_channels=[4, 4])
    joint = JointTransformer(**common, head_dim=16, pooled_channels=16, modulation_width=16, long_skips=False)
    for parameter in [*inpaint.parameters(), *joint.parameters()]:  # new ones predict zero
        nn.init.normal_(parameter, std=0.1)
    save_pretrained(inpaint, folder / "inpaint")
    for name, model in (("inpaint", inpaint), ("joint", joint)):
        parts = {"denoiser": model, "text": WordText(**TEXT)}
        weights = {f"ema.model.{part}.{key}": v for part in parts for key, v in parts[part].state_dict().items()}
        codec = LatentCodec(instantiate({"_target_": "osp.weights.load_pretrained", "path": str(folder / "vae")}))
        objective = Flow()
        entry = {
            "denoiser": {"model": type(model).__name__, "settings": model.settings},
            "text": {"encoder": "WordText", "settings": TEXT},
            "objective": {"name": "Flow", "settings": asdict(objective)},
            "latent": codec.identity() | {"origin": str(folder / "vae")},
            "fps": 8.0,
            "clip": CLIP,
        }
        torch.save({"state_dict": weights, "generator": entry}, folder / f"{name}.ckpt")
    return folder


@pytest.fixture
def sample(models: Path, osp: Osp) -> Run:
    """Runs `osp sample`: exit code, result, errors."""

    def run(*arguments: str) -> tuple[int, dict[str, Any], str]:
        settings = [argument.replace("MODELS", str(models)) for argument in arguments]
        code, out, err = osp("sample", *FAST, "output=out", *settings)
        return code, json.loads(out.splitlines()[-1]) if out and code == 0 else {}, err

    return run


def made(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*.*")) if file.is_file()}


@pytest.mark.parametrize("kind", ["mp4", "gif", "png"])
def test_a_prompt_becomes_a_file_that_says_how_it_was_made(sample: Run, tmp_path: Path, kind: str) -> None:
    command = ["checkpoint=MODELS/joint.ckpt", "prompt='a red circle, moves left'", f"format={kind}", "seed=3"]
    code, result, err = sample(*command, "hydra.job_logging.root.level=WARN")
    assert code == 0, err
    assert (result["videos"], result["kept"]) == (1, 0)
    stem = "000_a-red-circle-moves-left_seed3"
    file = tmp_path / "out" / (stem if kind == "png" else f"{stem}.{kind}")
    settings = read_settings(file)
    assert settings is not None
    assert settings["prompt"] == "a red circle, moves left"
    assert {key: settings[key] for key in CLIP} == CLIP
    assert settings["solver"] == {"name": "euler", "steps": 2, "shift": None, "options": {}}
    assert (settings["seed"], settings["guidance"], settings["fps"], settings["mode"]) == (3, 4.0, 8.0, "text")
    assert settings["model"]["denoiser"] == "JointTransformer"
    assert settings["model"]["vae"] == "WFVAE"
    first = file / "0000.png" if kind == "png" else file
    assert (probe(first).height, probe(first).width) == (16, 32)
    assert kind == "png" or probe(first).frames == 5
    listed = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert listed == [{"path": file.name, **settings}]


def test_the_same_command_gives_the_same_bytes_elsewhere_and_in_another_process(
    sample: Run, models: Path, tmp_path: Path
) -> None:
    command = ["prompt=a red circle", "batch_size=2", "videos_per_prompt=2", *FAST, "solver.name=euler_ancestral"]
    assert sample(f"checkpoint={models / 'joint.ckpt'}", *command)[0] == 0
    (tmp_path / "elsewhere").mkdir()
    moved = tmp_path / "elsewhere" / "renamed.ckpt"
    moved.write_bytes((models / "joint.ckpt").read_bytes())
    script = "from osp.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", script, "sample", f"checkpoint={moved}", "output=again", *command],
        cwd=tmp_path / "elsewhere",
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    here, there = (
        {k: v for k, v in made(tmp_path / name).items() if k != "sample.log"} for name in ("out", "elsewhere/again")
    )
    assert here == there
    assert sorted(here) == ["000_a-red-circle_seed0.mp4", "001_a-red-circle_seed1.mp4", "samples.jsonl"]
    assert re.search(r"memory: at most \d+ MiB", done.stderr)
    assert "at once, by phase" not in done.stderr  # it is small


def test_a_file_of_prompts_goes_on_where_it_was_cut_off(sample: Run, tmp_path: Path) -> None:
    lines = [
        {"prompt": "a"},
        {"prompt": "b", "seed": 50, "name": "named"},
        {"prompt": "c", "frames": 1, "height": 32, "negative_prompt": "blue"},
        {"prompt": "d"},
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command = ["checkpoint=MODELS/joint.ckpt", "prompts=prompts.jsonl", "batch_size=2", "format=png"]
    code, result, err = sample(*command)
    assert code == 0, err
    assert (result["videos"], result["kept"]) == (4, 0)
    before = made(tmp_path / "out")
    assert {name.split("/")[0] for name in before} >= {
        "000_a_seed0",
        "001_named_seed50",
        "002_c_seed2.png",
        "003_d_seed3",
    }
    assert probe(tmp_path / "out" / "002_c_seed2.png").height == 32
    (tmp_path / "out" / "002_c_seed2.png").unlink()
    for frame in (tmp_path / "out" / "001_named_seed50").iterdir():
        frame.unlink()
    (tmp_path / "out" / "001_named_seed50").rmdir()
    changed = (tmp_path / "out" / "000_a_seed0" / "0000.png").stat().st_mtime_ns
    code, result, _ = sample(*command)
    assert (code, result["videos"], result["kept"]) == (0, 2, 2)
    again = made(tmp_path / "out")
    again.pop("sample.log"), before.pop("sample.log")
    assert again == before
    assert (tmp_path / "out" / "000_a_seed0" / "0000.png").stat().st_mtime_ns == changed
    code, _, err = sample(*command, "guidance=2")
    assert code == 2
    assert "000_a_seed0 is there, made with other settings (guidance differs)" in err
    code, result, _ = sample(*command, "guidance=2", "overwrite=true")
    assert (code, result["videos"]) == (0, 4)
    assert made(tmp_path / "out")["000_a_seed0/0000.png"] != before["000_a_seed0/0000.png"]


def test_low_memory_and_half_precision(sample: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("osp.devices.precision.fast_precision", lambda device: "bf16-mixed")
    clips = {}
    for name, more in {"normal": [], "low": ["memory=low"], "half": ["precision=auto", "memory=low"]}.items():
        code, _, err = sample("checkpoint=MODELS/inpaint.ckpt", "prompt=a", f"output={name}", "format=png", *more)
        assert code == 0, err
        frames = sorted((tmp_path / name / "000_a_seed0").iterdir())
        clips[name] = torch.cat([read_clip(frame, frames=1).float() for frame in frames])
    assert (clips["low"] - clips["normal"]).abs().max() <= 1
    settings = read_settings(tmp_path / "half" / "000_a_seed0")
    assert settings is not None
    assert settings["precision"] == "bf16-mixed"
    assert 0 < (clips["half"] - clips["normal"]).abs().mean() < 20


def test_a_plan_that_does_not_fit_says_what_would(
    sample: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("osp.sampling.memory.available_memory", lambda device: 1000)
    for memory, message in (("normal", "use memory=low, or a smaller clip"), ("low", "; use a smaller clip")):
        with caplog.at_level(logging.WARNING):
            code, _, err = sample("checkpoint=MODELS/joint.ckpt", "prompt=a", f"output={memory}", f"memory={memory}")
        assert code == 0
        assert message in err + caplog.text


def test_frames_are_given_by_files(sample: Run, tmp_path: Path) -> None:
    """Whatever random weights make of it: the files are read, hashed, and change the video."""
    (tmp_path / "light.png").write_bytes(encode_png(torch.full((3, 40, 40), 255, dtype=torch.uint8)))
    (tmp_path / "dark.png").write_bytes(encode_png(torch.zeros(3, 40, 40, dtype=torch.uint8)))
    ramp = torch.arange(0, 200, 20, dtype=torch.uint8).view(1, -1, 1, 1).expand(3, -1, 16, 32)
    (tmp_path / "ramp.mp4").write_bytes(encode_video(ramp, 8.0))
    cases = {
        "text": [],
        "image": ["image=light.png"],
        "transition": ["image=light.png", "last_image=dark.png", "mode=transition"],
        "continuation": ["video=ramp.mp4", "keep_frames=2"],
        "frames": ["given={0: light.png, -1: dark.png, 2: dark.png}"],
    }
    videos = {}
    for mode, arguments in cases.items():
        code, _, err = sample("checkpoint=MODELS/inpaint.ckpt", "prompt=a", f"output={mode}", "format=png", *arguments)
        assert code == 0, err
        settings = read_settings(tmp_path / mode / "000_a_seed0")
        assert settings is not None
        assert settings["mode"] == mode
        assert str(tmp_path) not in json.dumps(settings)
        videos[mode] = (tmp_path / mode / "000_a_seed0" / "0004.png").read_bytes()
    assert len(set(videos.values())) == len(cases)

    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a", "image": "light.png"}\n{"prompt": "b"}\n')
    code, _, err = sample("checkpoint=MODELS/inpaint.ckpt", "prompts=prompts.jsonl", "batch_size=2", "output=mixed")
    assert code == 0, err
    modes = [read_settings(file)["mode"] for file in sorted((tmp_path / "mixed").glob("*.mp4"))]
    assert modes == ["image", "text"]


PUBLISHED = ["denoiser.path=MODELS/inpaint", "denoiser.dtype=float32", "vae.path=MODELS/vae", "text=words"]
WORDS = [f"text.{key}={value}" for key, value in TEXT.items()]


def test_a_generator_from_folders_has_its_published_settings(sample: Run, tmp_path: Path) -> None:
    size = [f"clip.{key}={value}" for key, value in CLIP.items()]
    command = ["generator=opensora_inpaint_v13", *PUBLISHED, *WORDS, *size, "prompt=a", "solver.steps=4"]
    # The toy encoder reads 8 tokens, and the published negative prompt and template have more.
    code, _, err = sample(*command, "usual_negative=''", "template=none")
    assert code == 0, err
    settings = read_settings(tmp_path / "out" / "000_a_seed0.mp4")
    assert settings is not None
    assert settings["solver"] == {"name": "euler_ancestral", "steps": 4, "shift": None, "options": {}}
    assert (settings["guidance"], settings["rescale"], settings["fps"]) == (7.5, 0.0, 18.0)
    assert settings["model"]["scale"] == [0.18215] * 4


@pytest.mark.parametrize(
    ("generator", "objective", "expected"),
    [
        ("opensora_v13", Velocity(), ("euler_ancestral", 100, None, 7.5, 0.0, 16.0, (93, 352, 640))),
        ("opensora_inpaint_v13", Velocity(), ("euler_ancestral", 100, None, 7.5, 0.0, 18.0, (93, 352, 640))),
        ("suv_v15", Flow(), ("euler", 50, 7.0, 8.0, 0.7, 24.0, (121, 576, 1024))),
    ],
)
def test_published_defaults(generator: str, objective: Objective, expected: tuple[Any, ...]) -> None:
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        cfg = compose("sample", ["prompt=a", f"generator={generator}"])
    built = instantiate(cfg.generator.objective)
    assert built == objective
    Solver(built, cfg.solver.name, cfg.solver.steps, cfg.solver.shift, dict(cfg.solver.options)).start(880)
    found = (cfg.solver.name, cfg.solver.steps, cfg.solver.shift, cfg.guidance, cfg.rescale, cfg.generator.fps)
    assert (*found, tuple(cfg.generator.clip.values())) == expected
    assert cfg.generator["_target_"] == f"{VideoGenerator.__module__.rpartition('.')[0]}.VideoGenerator"


EARLY = [
    (["checkpoint=MODELS/joint.ckpt"], 2, "give a prompt, prompt="),
    (["checkpoint=MODELS/joint.ckpt", "prompt=' '"], 2, "the prompt is empty"),
    (["checkpoint=MODELS/joint.ckpt", "prompt=a", "prompts=b.txt"], 2, "give a prompt"),
    (["checkpoint=MODELS/joint.ckpt", "prompts=none.txt"], 1, "none.txt: cannot be read"),
    (["checkpoint=MODELS/joint.ckpt", "prompts=bad.jsonl"], 1, "bad.jsonl, line 2: is no JSON"),
    (["prompt=a"], 2, "give checkpoint=FILE"),
    (["prompt=a", "checkpoint=none.ckpt"], 1, "checkpoint=none.ckpt: no such file; give a checkpoint of `osp train`"),
    (
        ["prompt=a", "checkpoint=x", "generator=opensora_v13", *PUBLISHED[:3], "text.path=x"],
        2,
        "checkpoint=x: nothing reads it here; it is read with generator=trained",
    ),
    (["prompt=a", "checkpoint=x", "text=null"], 2, "text=null: a choice is left out by '~text'"),
    (
        ["prompt=a", "checkpoint=x", "colour=red"],
        2,
        "colour: `osp sample` has no such setting here; `osp sample --help` lists all",
    ),
    (
        ["prompt=a", "generator=suv_v15", "vae.path=x"],
        2,
        "give path=FOLDER text.tokens.path=FOLDER text.pooled",
    ),
    (["checkpoint=MODELS/joint.ckpt", "prompt=a", "solver.name=rk4"], 2, "solver.name=rk4: is not known; choose euler"),
    (
        ["checkpoint=MODELS/joint.ckpt", "prompt=a", "solver.steps=0"],
        2,
        "solver.steps=0: must be a whole number of at least 1",
    ),
    (["checkpoint=MODELS/joint.ckpt", "prompt=a", "guidance=-1"], 2, "guidance=-1: must be a number of at least 0"),
    (["checkpoint=MODELS/joint.ckpt", "prompt=a", "memory=tiny"], 2, "memory=tiny: is not known"),
    (["checkpoint=MODELS/joint.ckpt", "prompt=a", "precision=8"], 2, "precision=8"),
    (["checkpoint=MODELS/joint.ckpt", "prompt=a", "format=avi"], 2, "format=avi: is not known"),
    (["checkpoint=MODELS/joint.ckpt", "prompt=a", "device=tpu"], 2, "device=tpu: is not known"),
    (["checkpoint=MODELS/inpaint.ckpt", "prompt=a", "image=bad.jsonl"], 1, "bad.jsonl: not a readable"),
    (["checkpoint=MODELS/inpaint.ckpt", "prompt=a", "image=none.png"], 1, "none.png: "),
    (["checkpoint=MODELS/inpaint.ckpt", "prompt=a", "mode=transition"], 2, "mode=transition takes image=FILE and"),
    (
        ["checkpoint=MODELS/inpaint.ckpt", "prompt=a", "given={first: a.png}"],
        2,
        "must be files by the numbers of their frames",
    ),
]


@pytest.mark.parametrize(("arguments", "code", "message"), EARLY, ids=[entry[2] for entry in EARLY])
def test_mistakes_are_told_before_a_model_is_read(
    sample: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, message: str
) -> None:
    def load(cfg: Any, **more: Any) -> Any:
        assert cfg["_target_"].endswith(".Limits"), "a model is read"
        return instantiate(cfg, **more)

    monkeypatch.setattr("osp.cli.sample.instantiate", load)
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt"\n')
    found, _, err = sample(*arguments)
    assert (found, message in err, err.count("\n")) == (code, True, 0), err


LATE = [
    (["prompt='a b c d e f g h i'"], "has 10 tokens, and words reads 8"),
    (["clip.frames=18"], "frames=18: must be 1 + a multiple of 4"),
    (["clip.height=20"], "height=20: must be a multiple of 16"),
    (["solver.name=ddim"], "solver: name=ddim cannot integrate Flow"),
    (["solver.options.colour=1"], "solver.options.colour: `osp sample` has no such setting here"),
    (["image=light.png"], "this denoiser was not trained with any"),
    (["vae=pretrained", "vae.path=MODELS/other_vae"], "give that one: vae=trained vae.path=CHECKPOINT"),
    (["vae=pretrained", "vae.path=MODELS/large_vae"], "latent.shift has 4 values; 8 are needed"),
    (["text=words"], "brings the text encoder that was trained along; leave text out"),
]


@pytest.mark.parametrize(("arguments", "message"), LATE, ids=[entry[1] for entry in LATE])
def test_what_only_the_model_knows_is_told_before_sampling(
    sample: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setattr(VideoGenerator, "generate", None)
    (tmp_path / "light.png").write_bytes(encode_png(torch.full((3, 40, 40), 255, dtype=torch.uint8)))
    found, _, err = sample("checkpoint=MODELS/joint.ckpt", "prompt=a", *arguments)
    assert (found, message in err, err.count("\n")) == (2, True, 0), err


def test_the_vae_that_has_moved_and_a_checkpoint_of_the_wrong_kind(sample: Run, models: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "vae_settings": {}}, tmp_path / "vae.ckpt")
    code, _, err = sample("checkpoint=vae.ckpt", "prompt=a")
    assert (code, "vae.ckpt: holds a VAE, where a denoiser is wanted; measure it by `osp eval`" in err) == (1, True)
    (models / "vae").rename(models / "moved")
    try:
        code, _, err = sample("checkpoint=MODELS/joint.ckpt", "prompt=a")
        assert code == 2
        assert "is gone; give vae=trained vae.path=CHECKPOINT, or vae=pretrained vae.path=FOLDER" in err
        code, _, err = sample("checkpoint=MODELS/joint.ckpt", "prompt=a", "vae=trained", "vae.path=MODELS/joint.ckpt")
        assert (code, "joint.ckpt: holds a denoiser, where a VAE is wanted; make videos" in err) == (1, True)
        code, _, err = sample("checkpoint=MODELS/joint.ckpt", "prompt=a", "vae=pretrained", "vae.path=MODELS/moved")
        assert code == 0, err
    finally:
        (models / "moved").rename(models / "vae")


def test_a_given_video_is_read_at_the_rate_of_the_model(sample: Run, tmp_path: Path) -> None:
    ramp = torch.arange(0, 200, 20, dtype=torch.uint8).view(1, -1, 1, 1).expand(3, -1, 16, 32)
    (tmp_path / "ramp.mp4").write_bytes(encode_video(ramp, 8.0))
    frames = []
    for rate in ([], ["fps=2"]):
        given = ["video=ramp.mp4", "keep_frames=2", f"output=rates{len(rate)}", "format=png", *rate]
        code, _, err = sample("checkpoint=MODELS/inpaint.ckpt", "prompt=a", *given)
        assert code == 0, err
        frames.append(
            [read_clip(file, frames=1) for file in sorted((tmp_path / f"rates{len(rate)}/000_a_seed0").iterdir())]
        )
    assert torch.equal(torch.cat(frames[0]), torch.cat(frames[1]))


PROMPTS = [
    "a man's dog, running; 100% é 中文",
    'say "hi" [now] (or) {never}',
    "null",
    "1",
    "a=b & ${x} <y> ~z # \\ \\' \\",
]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("multirun", [[], ["seed=1,2", "--multirun"]])
def test_any_prompt_is_text(multirun: list[str], prompt: str, monkeypatch: pytest.MonkeyPatch, sample: Run) -> None:
    asked = []
    monkeypatch.setattr("osp.cli.sample.run", lambda cfg: asked.append((cfg.prompt, cfg.negative_prompt)))
    code, _, err = sample(f"prompt={prompt}", f"negative_prompt={prompt}", *multirun)
    assert code == 0, err
    assert asked == [(prompt, prompt)] * (2 if multirun else 1)
    assert ("commas in a prompt make no sweep" in err) == bool(multirun and "," in prompt)


def test_each_job_of_a_multirun_has_a_folder_of_its_own(sample: Run, tmp_path: Path) -> None:
    command = ["checkpoint=MODELS/joint.ckpt", "prompt=a", "format=gif"]
    code, _, err = sample(*command, "guidance=2,4", "--multirun")
    assert code == 0, err
    made_by = {}
    for job in ("0", "1"):
        settings = read_settings(tmp_path / "out" / job / "000_a_seed0.gif")
        assert settings is not None
        made_by[job] = settings["guidance"]
        assert (tmp_path / "out" / job / "samples.jsonl").is_file()
    assert made_by == {"0": 2, "1": 4}
    code, _, err = sample(*command, "guidance=4", "output=single")
    assert code == 0, err
    one, other = (tmp_path / name / "000_a_seed0.gif" for name in ("out/1", "single"))
    assert one.read_bytes() == other.read_bytes()
    before = made(tmp_path / "out")
    code, result, err = sample(*command, "guidance=2,4", "--multirun")
    assert (code, result["videos"], result["kept"]) == (0, 0, 1), err
    assert {k: v for k, v in made(tmp_path / "out").items() if not k.endswith("log")} == {
        k: v for k, v in before.items() if not k.endswith("log")
    }


def test_a_prompt_in_quotes_stays_as_it_is(monkeypatch: pytest.MonkeyPatch, sample: Run) -> None:
    asked: list[str] = []
    monkeypatch.setattr("osp.cli.sample.run", lambda cfg: asked.append(cfg.prompt))
    for quoted in ("'a, b'", '"a, b"', r"'it\'s'"):
        assert sample(f"prompt={quoted}")[0] == 0
    assert asked == ["a, b", "a, b", "it's"]


def test_published_parts_that_do_not_fit_together(sample: Run) -> None:
    arguments = ["generator=opensora_inpaint_v13", *PUBLISHED, *WORDS, "prompt=a"]
    code, _, err = sample(*arguments, "vae.path=MODELS/large_vae")
    assert code == 2
    assert "latents of 4 channels" in err
    assert "have 8" in err


def test_words_that_no_caption_had_are_named_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    text = WordText(channels=8, pooled_channels=None, layers=1, heads=2)
    jobs = [Job("", PictureFiles(), {"prompt": f"a red cube\x1b {n}"}) for n in range(12)]
    plan = Plan(SimpleNamespace(text=text), None, None, [Batch(jobs, jobs)], kept=0)  # type: ignore[arg-type]
    sample_verb._warn_of_words(plan)
    assert not caplog.records  # an earlier checkpoint does not tell its words
    text.seen = frozenset({"a", "red", "ball"})
    sample_verb._warn_of_words(plan)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "no caption had these words in training: cube\\x1b, 0, 1, 2, 3, 4, 5, 6, 7, 8 and 3 more;" in line
    text.seen |= {"cube\x1b", *map(str, range(12))}
    sample_verb._warn_of_words(plan)
    assert len(caplog.records) == 1


def test_two_devices_make_the_videos_of_one_also_under_torchrun(sample: Run, models: Path, tmp_path: Path) -> None:
    """Each device has a branch of guidance and some of the tiles; only the first process writes and logs."""
    command = ["prompt=circle", "format=png", "videos_per_prompt=2", "batch_size=2", "tiling={size:16,overlap:8}"]
    command += [f"checkpoint={models / 'joint.ckpt'}", "memory=low"]
    for devices in (1, 2):
        code, result, err = sample(*command, f"devices={devices}", f"output=on_{devices}")
        assert code == 0, err
        assert result["videos"] == 2
        assert err.count("memory: at most") == 1
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    torchrun += ["--rdzv-endpoint", "localhost:0", "-m", "osp.cli", "sample", *FAST, *command]
    done = subprocess.run(
        [*torchrun, "devices=2", "output=torchrun"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["videos"] == 2  # the other process says nothing
    assert done.stderr.count("memory: at most") == 1
    first = made(tmp_path / "on_1")
    for folder in ("on_2", "torchrun"):
        assert first.keys() == made(tmp_path / folder).keys()
        for name in [name for name in first if name.endswith(".png")]:
            one, two = (read_clip(tmp_path / where / name, frames=1, size=(16, 32)) for where in ("on_1", folder))
            assert (one.int() - two.int()).abs().max() <= 1
        assert (tmp_path / folder / "samples.jsonl").read_text() == (tmp_path / "on_1" / "samples.jsonl").read_text()
    settings = json.loads((tmp_path / "on_1" / "samples.jsonl").read_text().splitlines()[0])
    assert settings["tiling"] == {"size": 16, "overlap": 8}
    code, _, err = sample(*command, "devices=0")
    assert (code, err) == (2, "osp sample: devices=0: must be a whole number of at least 1")
    code, _, err = sample(*command, "tiling={size:20,overlap:8}", "overwrite=true")
    assert (code, err) == (2, "osp sample: tiling: size=20: must be a multiple of 8")
