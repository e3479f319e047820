"""Videos to judge, made by a generator or read from a folder of samples, and the real clips beside them."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from osp.conditioning import GivenFrames, given_by_mode, joined
from osp.conditioning.given import frame_numbers
from osp.data.media.limits import DEFAULT_LIMITS, Limits
from osp.data.media.shape import Shape
from osp.data.media.video import ClipError, to_float
from osp.data.sources import ShardClips
from osp.diffusion import Solver
from osp.errors import DataError, UsageError
from osp.evaluation.generation import GeneratedClip
from osp.evaluation.prompt_accuracy import truth
from osp.sampling.generator import VideoGenerator
from osp.sampling.jobs import generate_batch
from osp.sampling.outputs import SAMPLES, SampleFolder, made_size, read_made
from osp.sampling.settings import ClipSize, Sampling
from osp.vae import VideoVAE

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RealClips:
    """Where real clips are, and how they are read: sizes that are null as the videos', every `stride`th or at `fps`."""

    path: Path
    size: ClipSize
    stride: int = 1
    fps: float | None = None
    limits: Limits = DEFAULT_LIMITS

    def open(self, known: Mapping[str, int] | None) -> ShardClips:
        """The clips, in the `known` size of the videos where their own is null."""
        size = self.size.filled(known)
        rate: dict[str, Any] = {"stride": self.stride, "fps": self.fps}
        return ShardClips(self.path, **size._asdict(), **rate, random_start=False, limits=self.limits)


@dataclass(frozen=True)
class ToJudge:
    """Videos to judge, made or read one by one, and the real clips that they are compared with.

    `given` are the numbers of the frames that were given from each prompt's clip. `vae` and `solver` are those of the
    generator; None: not known.
    """

    name: str
    clips: Iterator[GeneratedClip]
    prompts: Sequence[str]
    real: ShardClips
    given: Sequence[int] = ()
    vae: VideoVAE | None = None
    solver: Solver | None = None

    def check_prompts(self) -> None:
        """Raise UsageError for a prompt or a caption beside it that cannot be judged."""
        for prompt in dict.fromkeys([*self.prompts, *_captions(self.real, len(self.prompts))]):
            truth(prompt)


def videos_to_make(
    generator: VideoGenerator, name: str, real_clips: RealClips, sampling: Sampling, prompts: int
) -> ToJudge:
    """A video of each of the first so many captions of the real clips; they are made when they are asked for.

    Raises UsageError for what the generator does not take, DataError for clips without captions.
    """
    real = real_clips.open(generator.clip)
    asked = _captions(real, prompts)
    if len(asked) < prompts:
        log.warning("prompts=%d, but %s has %d clips: as many prompts", prompts, real.path, len(asked))
    mode = sampling.mode or "text"
    count = {"text": 0, "image": 1, "transition": 2}.get(mode, sampling.keep_frames)
    if count >= real.shape.frames:
        raise UsageError(f"keep_frames={count}: the videos have {real.shape.frames} frames; leave one to generate")
    given = frame_numbers(mode, count, real.shape.frames)
    blank = torch.zeros(3, *real.shape)
    guiding = sampling.guiding(generator.objective)
    generator.check(
        [sampling.worded(prompt) for prompt in asked],
        *real.shape,
        seeds=range(sampling.seed, sampling.seed + len(asked)),
        negative_prompt=sampling.negative(),
        given=_given(mode, given, [blank]),
        **guiding,
    )
    clips = _make(generator, sampling, real, asked, mode, given)
    return ToJudge(name, clips, asked, real, given, generator.codec.vae, guiding["solver"])


def _make(
    generator: VideoGenerator,
    sampling: Sampling,
    real: ShardClips,
    prompts: Sequence[str],
    mode: str,
    given: Sequence[int],
) -> Iterator[GeneratedClip]:
    """A video of each prompt; the prompt of a clip whose frames are needed and cannot be read is left out."""
    for start in range(0, len(prompts), sampling.batch_size):
        numbers = range(start, min(start + sampling.batch_size, len(prompts)))
        clips = dict.fromkeys(numbers) if not given else _readable(real, numbers)
        if not clips:
            continue
        sources = [to_float(clip) for clip in clips.values() if clip is not None]
        arguments: dict[str, Any] = {
            "prompts": [sampling.worded(prompts[number]) for number in clips],
            **real.shape._asdict(),
            "seeds": [sampling.seed + number for number in clips],
            "negative_prompt": sampling.negative(),
            "given": _given(mode, given, sources),
            **sampling.guiding(generator.objective),
        }
        videos = generate_batch(generator, sampling, arguments)
        for video, (number, clip) in zip(videos, clips.items(), strict=True):
            seed = sampling.seed + number
            yield GeneratedClip(real.entries[number].key, prompts[number], video, generator.fps, seed, clip)
        log.info("%d of %d prompts", numbers.stop, len(prompts))


def _readable(real: ShardClips, numbers: Sequence[int]) -> dict[int, Tensor | None]:
    clips: dict[int, Tensor | None] = {}
    for number in numbers:
        try:
            clips[number] = real.read(number, 0)["video"]
        except ClipError as error:
            log.warning("prompt skipped: %s", error)
    return clips


def _given(mode: str, numbers: Sequence[int], clips: Sequence[Tensor]) -> GivenFrames | None:
    """These frames of each clip `3 T H W`, for a batch of as many videos."""
    if not numbers:
        return None
    each = [given_by_mode(mode, [clip[:, number] for number in numbers], *clip.shape[1:]) for clip in clips]
    return joined(each)


def videos_to_read(folder: Path, real_clips: RealClips) -> ToJudge:
    """The videos of a folder that `osp sample` wrote, with the prompts that they were made of.

    Raises DataError for a folder without videos, of videos of several sizes, or of which the prompts are not known.
    """
    samples = SampleFolder(folder, "mp4").listed
    if not samples:
        raise DataError(f"{folder / SAMPLES}: lists no video; give generated=DIR that `osp sample` wrote")
    if unknown := [name for name, sample in samples.items() if not isinstance(sample.get("prompt"), str)]:
        raise DataError(f"{folder / SAMPLES}: does not say the prompt of {unknown[0]}; make the videos by `osp sample`")
    size = _one_size(folder, {name: made_size(folder / name) for name in samples})
    frames = real_clips.size.frames
    if frames is not None and frames > size.frames:
        raise UsageError(f"clip.frames={frames}: the videos in {folder} have {size.frames}; ask for no more")
    real = real_clips.open(size._asdict())
    clips = (
        GeneratedClip(
            Path(name).stem,
            sample["prompt"],
            read_made(folder / name, real.shape),
            sample.get("fps") or 1.0,
            sample.get("seed"),
        )
        for name, sample in samples.items()
    )
    return ToJudge(folder.name, clips, [sample["prompt"] for sample in samples.values()], real)


def _one_size(folder: Path, sizes: Mapping[str, Shape]) -> Shape:
    name, size = next(iter(sizes.items()))
    if other := next((other for other in sizes if sizes[other] != size), None):
        raise DataError(
            f"{folder}: {name} is {size} and {other} {sizes[other]}; videos of one size are judged together, "
            "so keep those of each size in a folder of their own"
        )
    return size


def _captions(real: ShardClips, count: int) -> list[str]:
    captions = [str(entry.record.get("caption") or "") for entry in real.entries[:count]]
    for entry, caption in zip(real.entries, captions, strict=False):
        if not caption.strip():
            raise DataError(
                f"{real.path}: the clip {entry.key} has no caption to be judged by; give input=DIR of procedural "
                "clips, as `osp shards synthetic.objects=1` makes them"
            )
    return captions
