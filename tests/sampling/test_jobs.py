"""Requests to files of videos: what any face of sampling calls, without the command line."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from osp.data.media.shape import Shape
from osp.errors import Stopped, UsageError
from osp.sampling import VideoGenerator
from osp.sampling.jobs import Plan, RunProgress, list_asked, plan_jobs, run_jobs
from osp.sampling.outputs import SampleFolder, read_made, read_settings
from osp.sampling.pictures import PictureFiles
from osp.sampling.progress import STEPS
from osp.sampling.requests import Request
from osp.sampling.settings import ClipSize, Sampling, SolverSettings

Make = Callable[..., VideoGenerator]
REQUESTS = [Request("a red circle"), Request("b", frames=1), Request("c", seed=70)]
SETTINGS = Sampling(clip=ClipSize(5, 16, 32), solver=SolverSettings(steps=2), batch_size=2)

# Everything in it runs in a process of its own, in which a server's machine has no more than the package needs.
SERVER = """
import json, sys
from importlib.abc import MetaPathFinder
from pathlib import Path

class Without(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("hydra", "omegaconf", "lightning", "pytorch_lightning"):
            raise ImportError(f"{name} is not there")

sys.meta_path.insert(0, Without())
folder, tests = map(Path, sys.argv[1:])
sys.path.insert(0, str(tests))
import torch
from conftest import build_codec, build_denoiser, build_text
from osp.diffusion import Flow
from osp.errors import Stopped
from osp.sampling import VideoGenerator
from osp.sampling.jobs import list_asked, plan_jobs, run_jobs
from osp.sampling.outputs import SampleFolder
from osp.sampling.progress import STEPS
from osp.sampling.pictures import PictureFiles
from osp.sampling.requests import Request
from osp.sampling.settings import ClipSize, Sampling, SolverSettings

torch.manual_seed(0)
generator = VideoGenerator(build_denoiser("joint"), build_text(), Flow(), build_codec())
sampling = Sampling(clip=ClipSize(9, 32, 32), solver=SolverSettings(steps=3))
asked = list_asked([Request("a red circle"), Request("b")], sampling, PictureFiles())

def run(name, stop_at=None):
    told = []
    def watch(progress):
        told.append((progress.done, progress.current.step, progress.current.done, progress.current.total))
        if (progress.done, progress.current.step, progress.current.done) == stop_at:
            raise Stopped(progress.current.step)
    plan = plan_jobs(generator, sampling, asked, SampleFolder(folder / name, "mp4"))
    try:
        run_jobs(plan, watch)
    except Stopped as stopped:
        return {"told": told, "stopped": str(stopped), "kept": plan.kept}
    return {"told": told, "stopped": None, "kept": plan.kept}

report = {"whole": run("whole")}
for step in STEPS:
    # In the second batch, so that the first one's video is there already.
    report[step] = [run(step, (1, step, 1 if step != "decode" else 0)), run(step)]
assert not [name for name in sys.modules if name.partition(".")[0] in ("hydra", "omegaconf", "lightning")]
print(json.dumps(report))
"""


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_jobs_run_with_progress_and_a_stop_in_each_step_without_hydra_and_lightning(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SERVER, str(tmp_path), str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    whole = [tuple(one) for one in report["whole"]["told"]]
    for batch in (0, 1):
        assert [one[2:] for one in whole if one[:2] == (batch, "encode")] == [(0, 1), (1, 1)]
        assert [one[2:] for one in whole if one[:2] == (batch, "denoise")] == [(0, 3), (1, 3), (2, 3), (3, 3)]
        assert [one[2:] for one in whole if one[:2] == (batch, "decode")] == [(0, 9), (9, 9)]
    assert report["whole"]["stopped"] is None
    wanted = files(tmp_path / "whole")
    assert sorted(wanted) == ["000_a-red-circle_seed0.mp4", "001_b_seed1.mp4", "samples.jsonl"]
    for step in STEPS:
        stopped, again = report[step]
        assert stopped["stopped"] == step
        assert len(stopped["told"]) < len(whole)
        assert again["kept"] == 1  # the first batch's
        assert again["stopped"] is None
        assert files(tmp_path / step) == wanted


def plan(generator: VideoGenerator, folder: Path, sampling: Sampling = SETTINGS) -> Plan:
    return plan_jobs(generator, sampling, list_asked(REQUESTS, sampling, PictureFiles()), SampleFolder(folder, "png"))


def test_a_plan_says_in_what_it_is_unlike_training(make_generator: Make, tmp_path: Path) -> None:
    generator = make_generator("joint", clip={"frames": 9, "height": 16, "width": 32}, fps=8.0)
    said = plan(generator, tmp_path).unlike_training()
    assert said == "frames 1, 5 instead of 9"
    other = Sampling(clip=ClipSize(9, 32, 32), solver=SolverSettings(steps=2), fps=12.0)
    assert "height 32 instead of 16; fps 12 instead of 8" in plan(generator, tmp_path, other).unlike_training()
    assert plan(make_generator("joint", fps=8.0), tmp_path).unlike_training() == ""


def test_a_plan_says_what_is_to_be_done_and_what_is_there(make_generator: Make, tmp_path: Path) -> None:
    generator = make_generator("joint", clip={"frames": 9, "height": 32, "width": 32})
    first = plan(generator, tmp_path)
    assert [[job.stem for job in batch.jobs] for batch in first.batches] == [
        ["000_a-red-circle_seed0"],
        ["001_b_seed1"],  # of another size
        ["002_c_seed70"],
    ]
    assert (first.videos, first.kept) == (3, 0)
    memory = first.memory()
    assert memory is not None
    assert memory.parts["video"] == 2 * 3 * 5 * 16 * 32 * 4  # of the largest batch
    written = run_jobs(first)
    assert [path.name for path in written] == ["000_a-red-circle_seed0", "001_b_seed1.png", "002_c_seed70"]
    record = read_settings(written[0])
    assert record is not None
    assert (record["frames"], record["solver"]["steps"], record["mode"]) == (5, 2, "text")
    second = plan(generator, tmp_path)
    assert (second.videos, second.kept, second.memory()) == (0, 3, None)
    with pytest.raises(UsageError, match="rescale differs"):
        plan(generator, tmp_path, Sampling(clip=SETTINGS.clip, solver=SETTINGS.solver, batch_size=2, rescale=0.5))


def test_sizes_that_nobody_says_are_those_of_training_or_are_asked_for(make_generator: Make, tmp_path: Path) -> None:
    sampling = Sampling(clip=ClipSize(height=16), solver=SETTINGS.solver)
    known = make_generator("joint", clip={"frames": 9, "height": 32, "width": 32})
    assert [batch.jobs[0].size for batch in plan(known, tmp_path, sampling).batches] == [
        (9, 16, 32),
        (1, 16, 32),
        (9, 16, 32),
    ]
    with pytest.raises(UsageError, match=r"clip\.frames is not known for this model; give clip\.frames=NUMBER"):
        plan(make_generator("joint"), tmp_path, sampling)


def test_what_was_made_before_a_stop_is_listed(make_generator: Make, tmp_path: Path) -> None:
    def stop(progress: RunProgress) -> None:
        assert progress.batches == 3
        if progress.batches_done >= 1.5:
            raise Stopped

    with pytest.raises(Stopped):
        run_jobs(plan(make_generator("joint"), tmp_path), stop)
    assert list(SampleFolder(tmp_path, "png").listed) == ["000_a-red-circle_seed0"]


def test_a_record_says_the_template_and_what_the_encoder_read(make_generator: Make, tmp_path: Path) -> None:
    generator = make_generator()
    generator.text.prompt_cleaning = "twice"
    framed = Sampling(
        clip=SETTINGS.clip, solver=SETTINGS.solver, template="(fine), {}.", usual_negative="jpeg, bad", guidance=2.0
    )
    made = plan(generator, tmp_path, framed)
    (first, _, _) = [job.settings for batch in made.batches for job in batch.jobs]
    assert (first["prompt"], first["negative_prompt"]) == ("a red circle", "jpeg, bad")
    assert (first["template"], first["cleaning"]) == ("(fine), {}.", "twice")
    assert first["read"] == {"prompt": "fine , a red circle.", "negative_prompt": "bad"}
    assert "read" not in plan(make_generator(), tmp_path / "plain").batches[0].jobs[0].settings
    (alone, *_) = run_jobs(made)
    # The same words without template and cleaning make the same video.
    said = Sampling(clip=SETTINGS.clip, solver=SETTINGS.solver, negative_prompt="bad", guidance=2.0)
    asked = list_asked([Request("fine , a red circle.")], said, PictureFiles())
    (same,) = run_jobs(plan_jobs(make_generator(), said, asked, SampleFolder(tmp_path / "same", "png")))
    videos = [read_made(path, Shape(5, 16, 32)).int() for path in (same, alone)]
    assert (videos[0] - videos[1]).abs().max() <= 1


def test_a_prompt_of_which_the_cleaning_leaves_nothing_is_refused(make_generator: Make, tmp_path: Path) -> None:
    generator = make_generator()
    generator.text.prompt_cleaning = "twice"
    asked = list_asked([Request("IMG_1234.jpg")], SETTINGS, PictureFiles())
    with pytest.raises(UsageError, match=r"prompt_cleaning=twice\) leaves nothing of 'IMG_1234.jpg'"):
        plan_jobs(generator, SETTINGS, asked, SampleFolder(tmp_path, "mp4"))
