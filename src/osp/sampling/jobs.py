"""Requests -> jobs -> batches -> files of videos, with progress and a stop: what any face of sampling calls."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from osp import __version__
from osp.conditioning import clean_texts, joined, unknown_words
from osp.data.media.shape import Shape
from osp.devices import autocast_dtype, choose_precision, chosen_kernels
from osp.diffusion import Solver
from osp.sampling.fingerprint import generator_identity
from osp.sampling.generator import VideoGenerator
from osp.sampling.memory import MemoryPlan, plan_memory
from osp.sampling.outputs import SampleFolder
from osp.sampling.pictures import PictureFiles
from osp.sampling.progress import Progress, Watch, unwatched
from osp.sampling.requests import Request, Video, batches, list_videos
from osp.sampling.settings import NO_TEMPLATE, Sampling

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asked:
    """A video that is asked for, and the files of frames that are given for it."""

    video: Video
    pictures: PictureFiles


@dataclass(frozen=True)
class Job:
    """A video to make; `settings` is all that it depends on, as plain values without paths and dates."""

    stem: str
    pictures: PictureFiles
    settings: Mapping[str, Any]

    @property
    def size(self) -> Shape:
        """Frames, height and width."""
        return Shape(*(self.settings[key] for key in Shape._fields))

    @property
    def negative_prompt(self) -> str:
        """The prompt that guidance leads away from."""
        return self.settings["negative_prompt"]


@dataclass(frozen=True)
class Batch:
    """Jobs that are done at once, and those of them whose videos are not there yet."""

    jobs: Sequence[Job]
    missing: Sequence[Job]


@dataclass(frozen=True)
class Plan:
    """The checked batches that are to be made, and how many videos exist already."""

    generator: VideoGenerator
    sampling: Sampling
    folder: SampleFolder
    batches: Sequence[Batch]
    kept: int

    @property
    def videos(self) -> int:
        """How many are to be made."""
        return sum(len(batch.missing) for batch in self.batches)

    @property
    def low_memory(self) -> bool:
        """Whether parts are on the device one after another."""
        return self.sampling.memory == "low"

    def unlike_training(self) -> str:
        """The differences of the videos from the clips of training, as far as these are known; empty without any."""
        trained = dict(self.generator.clip or {})
        differs = []
        for key in Shape._fields:
            asked = {job.settings[key] for batch in self.batches for job in batch.jobs}
            if trained.get(key) is not None and asked - {trained[key]}:
                differs.append(f"{key} {', '.join(map(str, sorted(asked)))} instead of {trained[key]}")
        rates = {job.settings["fps"] for batch in self.batches for job in batch.jobs}
        if rates - {float(self.generator.fps)}:
            differs.append(f"fps {', '.join(f'{rate:g}' for rate in sorted(rates))} instead of {self.generator.fps:g}")
        return "; ".join(differs)

    def unknown_words(self) -> list[str]:
        """Words of the prompts that no caption had in training; empty where a checkpoint does not tell its words."""
        seen = getattr(self.generator.text, "seen", None)
        prompts = (job.settings["prompt"] for batch in self.batches for job in batch.jobs)
        return [] if seen is None else unknown_words(prompts, seen)

    def memory(self) -> MemoryPlan | None:
        """The memory that the largest batch needs; None if there is nothing to make."""
        sizes = [(batch.jobs[0].size, len(batch.jobs)) for batch in self.batches]
        if not sizes:
            return None
        size, videos = max(sizes, key=lambda one: one[1] * torch.Size(one[0]).numel())
        return plan_memory(self.generator, *size, batch=videos, low_memory=self.low_memory, tiling=self.sampling.tiling)


@dataclass(frozen=True)
class RunProgress:
    """How far a run is: `done` batches of `batches`, and how far the next of them is."""

    done: int
    batches: int
    current: Progress

    @property
    def batches_done(self) -> float:
        """The batches that are done, with the part of the current one."""
        return self.done + self.current.part


def list_asked(requests: Sequence[Request], sampling: Sampling, given: PictureFiles) -> list[Asked]:
    """The videos of the requests. Frames are given by a request's own files if it has any, else by `given`.

    Raises UsageError for files that are not those of `sampling.mode`, ClipError for one without a picture.
    """
    asked = []
    for video in list_videos(requests, sampling.seed, sampling.videos_per_prompt):
        own = replace(video.request.pictures(sampling.keep_frames), limits=given.limits)
        asked.append(Asked(video, own if own.files else given))
    for files in {one.pictures for one in asked}:
        files.check(sampling.mode)
    return asked


def plan_jobs(generator: VideoGenerator, sampling: Sampling, asked: Sequence[Asked], folder: SampleFolder) -> Plan:
    """All that is to be done to have the videos in the folder.

    Raises UsageError for what the generator does not take, and for files that are there and were made otherwise.
    """
    solver = sampling.solver.build(generator.objective)
    if sampling.tiling is not None:
        sampling.tiling.check(generator.codec.strides.space)
    jobs = _jobs(generator, sampling, solver, asked)
    todo = []
    for batch in batches(jobs, lambda job: (job.size, job.negative_prompt), sampling.batch_size):
        generator.check(**_arguments(generator, sampling, batch))
        # A batch is made again as it was, or its videos might differ in their last bits.
        if missing := [job for job in batch if not folder.is_made(job.stem, job.settings)]:
            todo.append(Batch(batch, missing))
    kept = len(jobs) - sum(len(batch.missing) for batch in todo)
    return Plan(generator, sampling, folder, todo, kept)


def run_jobs(plan: Plan, watch: Callable[[RunProgress], None] | None = None) -> list[Path]:
    """Make the videos of a plan and write them; gives their files.

    `watch` is told how far it is, as `osp.sampling.progress.Watch` is; what it raises (`osp.errors.Stopped`) ends the
    run. The videos of the batches before are there, and the same plan made anew goes on from there.
    """
    written = []
    for done, batch in enumerate(plan.batches):

        def tell(current: Progress, done: int = done) -> None:
            if watch is not None:
                watch(RunProgress(done, len(plan.batches), current))

        arguments = _arguments(plan.generator, plan.sampling, batch.jobs)
        videos = generate_batch(plan.generator, plan.sampling, arguments, tell)
        for job, video in zip(batch.jobs, videos, strict=True):
            if job in batch.missing and plan.generator.writes:
                written.append(plan.folder.write(job.stem, video, job.settings))
    if plan.generator.writes:
        plan.folder.finish()
    return written


def generate_batch(
    generator: VideoGenerator, sampling: Sampling, arguments: Mapping[str, Any], progress: Watch = unwatched
) -> Tensor:
    """Videos `B 3 T H W` in the precision and memory of the settings; `arguments` are those of `generator.check`."""
    dtype = autocast_dtype(choose_precision(sampling.precision, generator.device))
    generator.codec.vae.tiling = sampling.tiling
    with torch.autocast(generator.device.type, dtype, enabled=dtype is not None):
        return generator.generate(
            **arguments, hold_given=sampling.hold_given, low_memory=sampling.memory == "low", progress=progress
        )


def _arguments(generator: VideoGenerator, sampling: Sampling, batch: Sequence[Job]) -> dict[str, Any]:
    """The arguments of `check` and `generate` for a batch of one size; given videos are read at the generator's fps."""
    with_pictures = batch if any(job.pictures.files for job in batch) else []
    given = [job.pictures.read(*job.size, generator.fps) for job in with_pictures]
    return {
        "prompts": [sampling.worded(job.settings["prompt"]) for job in batch],
        **batch[0].size._asdict(),
        "seeds": [job.settings["seed"] for job in batch],
        **sampling.guiding(generator.objective),
        "negative_prompt": batch[0].negative_prompt,
        "given": joined(given) if given else None,
    }


def _jobs(generator: VideoGenerator, sampling: Sampling, solver: Solver, asked: Sequence[Asked]) -> list[Job]:
    """The jobs with their records, which are written into the files."""
    contents = {files: files.contents() for files in {one.pictures for one in asked}}
    common = {
        "fps": float(generator.fps if sampling.fps is None else sampling.fps),
        "solver": {
            "name": solver.name,
            "steps": solver.steps,
            "shift": solver.shift,
            "options": dict(solver.options),
        },
        "guidance": sampling.guidance,
        "rescale": sampling.rescale,
        "hold_given": sampling.hold_given,
        "precision": choose_precision(sampling.precision, generator.device),
        "device": generator.device.type,
        **({} if chosen_kernels() == "plain" else {"kernels": chosen_kernels()}),
        **({} if sampling.tiling is None else {"tiling": asdict(sampling.tiling)}),
        "model": generator_identity(generator),
        "osp": __version__,
    }
    jobs = []
    for one in asked:
        request = one.video.request
        negative = sampling.negative(request.negative_prompt)
        own = {
            "prompt": request.prompt,
            "negative_prompt": negative,
            **_read(generator, sampling, request.prompt, negative),
            "seed": one.video.seed,
            **replace(sampling.clip, **request.size).filled(generator.clip)._asdict(),
            "mode": one.pictures.mode,
            "given": contents[one.pictures],
        }
        jobs.append(Job(one.video.stem, one.pictures, own | common))
    return jobs


def _read(generator: VideoGenerator, sampling: Sampling, prompt: str, negative: str) -> dict[str, Any]:
    """The template, the cleaning and the texts as the encoder reads them, where they are other than the prompts."""
    template = {} if sampling.template == NO_TEMPLATE else {"template": sampling.template}
    cleaning = generator.text.prompt_cleaning
    if not template and cleaning == "none":
        return {}
    read = clean_texts([sampling.worded(prompt), negative], cleaning)
    return {**template, "cleaning": cleaning, "read": dict(zip(("prompt", "negative_prompt"), read, strict=True))}
