"""`osp sample`: prompts -> files of videos."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate, to_absolute_path
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from osp import __version__
from osp.cli.checks import check_generator_source, check_numbers
from osp.cli.solver import build_solver
from osp.conditioning import joined
from osp.devices import autocast_dtype, choose_device, choose_precision
from osp.diffusion import Flow, Solver, Velocity, solvers
from osp.errors import UsageError
from osp.report.progress import shown_progress
from osp.sampling import VideoGenerator
from osp.sampling.fingerprint import generator_identity
from osp.sampling.memory import plan_memory
from osp.sampling.outputs import SampleFolder
from osp.sampling.pictures import PictureFiles
from osp.sampling.progress import Progress
from osp.sampling.requests import Request, Video, batches, list_videos, read_requests

log = logging.getLogger(__name__)

_MEMORY = ("normal", "low")
_SIZE = ("frames", "height", "width")


def run(cfg: DictConfig) -> dict[str, Any]:
    """Sample as configured; gives how many videos were made, and where they and their list lie.

    Raises UsageError and DataError for what can be known to be wrong before the model is read, and for the rest before
    the first video is made.
    """
    _check(cfg)
    folder = SampleFolder(Path(to_absolute_path(cfg.output)), cfg.format, cfg.overwrite)
    videos = list_videos(_requests(cfg), cfg.seed, cfg.videos_per_prompt)
    pictures = {video: _pictures(cfg, video.request) for video in videos}
    for files in set(pictures.values()):
        files.check(cfg.mode)
    generator = _generator(cfg)
    solver = build_solver(cfg.solver, generator.objective)
    jobs = _jobs(cfg, generator, solver, pictures)
    todo = []
    for batch in batches(jobs, lambda job: (job.size, job.negative_prompt), cfg.batch_size):
        generator.check(**_arguments(cfg, batch, solver, generator.fps))
        # A batch is made again as it was, or its videos might differ in their last bits.
        if missing := [job for job in batch if not folder.is_made(job.stem, job.settings)]:
            todo.append((batch, missing))
    count = sum(len(missing) for _, missing in todo)
    kept = len(jobs) - count
    if kept:
        log.info("%d of %d videos are there already, made with the same settings", kept, len(jobs))
    if todo:
        _tell_memory(generator, [batch for batch, _ in todo], low=cfg.memory == "low")
    with shown_progress("sampling", len(todo)) as show:
        for done, (batch, missing) in enumerate(todo):
            made = _generate(cfg, generator, _arguments(cfg, batch, solver, generator.fps), show, done)
            for job, video in zip(batch, made, strict=True):
                if job in missing:
                    folder.write(job.stem, video, job.settings)
    return {"output": str(folder.folder), "videos": count, "kept": kept, "list": str(folder.finish())}


@dataclass(frozen=True)
class Job:
    """A video to make; `settings` is all that it depends on, as plain values without paths and dates."""

    stem: str
    pictures: PictureFiles
    settings: Mapping[str, Any]

    @property
    def size(self) -> tuple[int, int, int]:
        """Frames, height and width."""
        return self.settings["frames"], self.settings["height"], self.settings["width"]

    @property
    def negative_prompt(self) -> str:
        """What guidance leads away from."""
        return self.settings["negative_prompt"]


def _jobs(
    cfg: DictConfig, generator: VideoGenerator, solver: Solver, pictures: Mapping[Video, PictureFiles]
) -> list[Job]:
    contents = {files: files.contents() for files in set(pictures.values())}
    common = {
        "fps": float(generator.fps if cfg.fps is None else cfg.fps),
        "solver": {
            "name": solver.name,
            "steps": solver.steps,
            "shift": solver.shift,
            "options": dict(solver.options),
        },
        "guidance": cfg.guidance,
        "rescale": cfg.rescale,
        "hold_given": cfg.hold_given,
        "precision": _precision(cfg),
        "device": generator.device.type,
        "model": generator_identity(generator),
        "osp": __version__,
    }
    jobs = []
    for video, files in pictures.items():
        request = video.request
        own = {
            "prompt": request.prompt,
            "negative_prompt": cfg.negative_prompt if request.negative_prompt is None else request.negative_prompt,
            "seed": video.seed,
            **_size(cfg, generator, request),
            "mode": files.mode,
            "given": contents[files],
        }
        jobs.append(Job(video.stem, files, own | common))
    return jobs


def _arguments(cfg: DictConfig, batch: Sequence[Job], solver: Solver, fps: float) -> dict[str, Any]:
    """What `check` and `generate` are given for a batch of one size; given videos are read at the generator's `fps`."""
    with_pictures = batch if any(job.pictures.files for job in batch) else []
    given = [job.pictures.read(*job.size, fps) for job in with_pictures]
    return {
        "prompts": [job.settings["prompt"] for job in batch],
        **dict(zip(_SIZE, batch[0].size, strict=True)),
        "seeds": [job.settings["seed"] for job in batch],
        "solver": solver,
        "guidance": cfg.guidance,
        "rescale": cfg.rescale,
        "negative_prompt": batch[0].negative_prompt,
        "given": joined(given) if given else None,
    }


def _generate(
    cfg: DictConfig, generator: VideoGenerator, arguments: Mapping[str, Any], show: Callable[[float], None], before: int
) -> Tensor:
    """The batch's videos; `show` is told how many batches are done, with the `before` that came first."""

    def progress(progress: Progress) -> None:
        show(before + progress.part)

    dtype = autocast_dtype(_precision(cfg))
    with torch.autocast(generator.device.type, dtype, enabled=dtype is not None):
        low = cfg.memory == "low"
        return generator.generate(**arguments, hold_given=cfg.hold_given, low_memory=low, progress=progress)


def _check(cfg: DictConfig) -> None:
    """Raise UsageError for settings that make no sense, whatever the model is."""
    sizes = {f"clip.{key}": 1 for key in _SIZE}
    least = {"seed": 0, "videos_per_prompt": 1, "batch_size": 1, "keep_frames": 1, "guidance": 0.0, "rescale": 0.0}
    check_numbers(cfg, {**sizes, **least, "solver.steps": 1, "fps": 0.001}, optional=[*sizes, "solver.steps", "fps"])
    choose_device(cfg.device)
    _precision(cfg)
    if cfg.memory not in _MEMORY:
        raise UsageError(f"memory={cfg.memory} is not known; choose {', '.join(_MEMORY)}")
    names = dict.fromkeys([*solvers(Flow()), *solvers(Velocity())])
    if cfg.solver.name is not None and cfg.solver.name not in names:
        raise UsageError(f"solver.name={cfg.solver.name} is not known; choose {', '.join(names)}")
    check_generator_source(cfg)


def _precision(cfg: DictConfig) -> str:
    """The configured one; `auto` is what is fast on the device."""
    return choose_precision(cfg.precision, choose_device(cfg.device))


def _requests(cfg: DictConfig) -> list[Request]:
    if (cfg.prompt is None) == (cfg.prompts is None):
        raise UsageError('give a prompt, prompt="a red circle slides left", or a file of them, prompts=FILE (not both)')
    if cfg.prompts is not None:
        return read_requests(Path(to_absolute_path(cfg.prompts)))
    if not str(cfg.prompt).strip():
        raise UsageError("the prompt is empty; say what the video should show")
    return [Request(str(cfg.prompt))]


def _pictures(cfg: DictConfig, request: Request) -> PictureFiles:
    """Those of the request itself if it has any, else those of the command."""
    if request.image or request.last_image or request.video:
        return PictureFiles(request.image, request.last_image, request.video, cfg.keep_frames)
    given = OmegaConf.to_container(cfg.given) if isinstance(cfg.given, DictConfig) else cfg.given or {}
    if not isinstance(given, dict) or not all(type(number) is int for number in given):
        raise UsageError(f"given={given} makes no sense; give files by the numbers of their frames: '{{0: a.png}}'")
    numbered = tuple((int(str(number)), Path(to_absolute_path(path))) for number, path in given.items())
    image, last_image, video = (
        None if cfg[key] is None else Path(to_absolute_path(cfg[key])) for key in ("image", "last_image", "video")
    )
    return PictureFiles(image, last_image, video, cfg.keep_frames, numbered)


def _generator(cfg: DictConfig) -> VideoGenerator:
    generator = instantiate(cfg.generator)
    if not isinstance(generator, VideoGenerator):
        raise UsageError(f"generator is a {type(generator).__name__}; choose one of conf/generator")
    return generator.to(choose_device(cfg.device))


def _size(cfg: DictConfig, generator: VideoGenerator, request: Request) -> dict[str, int]:
    """Frames, height and width: the request's own, else the command's, else those that the model was trained at."""
    size: dict[str, int] = {}
    for key in _SIZE:
        choices = getattr(request, key), cfg.clip[key], (generator.clip or {}).get(key)
        chosen = next((choice for choice in choices if choice is not None), None)
        if chosen is None:
            raise UsageError(f"clip.{key} is not known for this model; give clip.{key}=NUMBER")
        size[key] = chosen
    return size


def _tell_memory(generator: VideoGenerator, todo: Sequence[Sequence[Job]], low: bool) -> None:
    """Log what the largest batch needs, and warn if it is more than there is."""
    largest = max(todo, key=lambda batch: len(batch) * torch.Size(batch[0].size).numel())
    plan = plan_memory(generator, *largest[0].size, batch=len(largest), low_memory=low)
    for line in plan.lines():
        log.info("memory: %s", line)
    if not plan.fits:
        smaller = "a smaller clip" if len(largest) == 1 else "a smaller batch_size or clip"
        log.warning("this is more than the device has; use %s", smaller if low else f"memory=low, or {smaller}")
