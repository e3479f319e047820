"""What `osp eval target=generation` evaluates: whether generated videos show what their prompts say."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate, to_absolute_path
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from osp.cli.checks import check_generator_source, check_numbers
from osp.cli.eval_input import model_name, read_clips
from osp.cli.solver import build_solver
from osp.conditioning import GivenFrames, given_by_mode, joined
from osp.conditioning.given import frame_numbers
from osp.data.media.shape import Shape
from osp.data.media.video import ClipError, to_float
from osp.data.sources import ShardClips
from osp.devices import autocast_dtype, choose_device, choose_precision
from osp.diffusion import Solver
from osp.errors import DataError, UsageError
from osp.evaluation.frechet import video_features
from osp.evaluation.generation import GeneratedClip, evaluate_generation
from osp.evaluation.prompt_accuracy import truth
from osp.sampling import VideoGenerator
from osp.sampling.outputs import SAMPLES, SampleFolder, made_size, read_made
from osp.vae import VideoVAE

log = logging.getLogger(__name__)

_SIZES = ("frames", "height", "width")
_MAKING = (
    *("prompts", "seed", "guidance", "rescale", "negative_prompt", "solver", "generator"),
    *("mode", "keep_frames", "hold_given"),
)


@dataclass(frozen=True)
class _Work:
    """Videos to judge, which are made or read one by one, and the real clips that they are compared with."""

    name: str
    clips: Iterator[GeneratedClip]
    prompts: Sequence[str]
    real: ShardClips
    given: Sequence[int] = ()
    vae: VideoVAE | None = None
    solver: Solver | None = None


def generation(cfg: DictConfig) -> dict[str, Any]:
    """Generate and judge as configured; gives the rates, the distances and where the results lie.

    Raises UsageError or DataError before any compute for settings that do not fit, clips without captions, and prompts
    that cannot be judged.
    """
    least = {"prompts": 1, "batch_size": 1, "contact_sheet_clips": 0, "save_videos": 0, "seed": 0, "keep_frames": 1}
    sizes = {f"clip.{name}": 1 for name in _SIZES}
    check_numbers(cfg, least | sizes | {"clip.stride": 1}, optional=["save_videos", *sizes])
    if cfg.generated is None:
        check_generator_source(cfg)
    elif cfg.checkpoint is not None:
        raise UsageError("checkpoint=FILE and generated=DIR exclude each other; leave one of them out")
    if not Path(to_absolute_path(cfg.input)).exists():
        raise DataError(f"input={cfg.input}: no such folder; give shards of procedural clips")
    device = choose_device(cfg.device)
    cfg.precision = choose_precision(cfg.precision, device)
    features = video_features("random3d" if cfg.features.path is None else "i3d", cfg.features.path)
    work = _to_generate(cfg, device) if cfg.generated is None else _to_read(cfg)
    for prompt in dict.fromkeys([*work.prompts, *_captions(work.real, len(work.prompts))]):
        truth(prompt)
    output = HydraConfig.get().runtime.output_dir
    results = evaluate_generation(
        work.clips,
        read_clips(work.real, len(work.real)),
        output=output,
        model_name=work.name,
        features=features,
        vae=work.vae,
        given=work.given,
        device=device,
        precision=cfg.precision,
        contact_sheet_clips=cfg.contact_sheet_clips,
        save_videos=cfg.save_videos,
        settings=_settings(cfg, work),
    )
    keys = ("model", "counts", "accuracy", "frechet", "given")
    return {"output": output, **{key: results[key] for key in keys}}


def _to_generate(cfg: DictConfig, device: torch.device) -> _Work:
    generator: VideoGenerator = instantiate(cfg.generator).to(device)
    real = _real_clips(cfg, generator.clip)
    prompts = _captions(real, cfg.prompts)
    if len(prompts) < cfg.prompts:
        log.warning("prompts=%d, but %s has %d clips: as many prompts", cfg.prompts, cfg.input, len(prompts))
    count = {"text": 0, "image": 1, "transition": 2}.get(cfg.mode, cfg.keep_frames)
    if count >= real.shape.frames:
        raise UsageError(f"keep_frames={count}: the videos have {real.shape.frames} frames; leave one to generate")
    given = frame_numbers(cfg.mode, count, real.shape.frames)
    settings = {key: cfg[key] for key in ("guidance", "rescale", "negative_prompt")}
    settings["solver"] = build_solver(cfg.solver, generator.objective)
    blank = torch.zeros(3, *real.shape)
    generator.check(
        prompts,
        *real.shape,
        seeds=range(cfg.seed, cfg.seed + len(prompts)),
        given=_given(cfg.mode, given, [blank]),
        **settings,
    )
    clips = _generate(generator, real, prompts, given, cfg, settings)
    name = model_name(cfg) if cfg.checkpoint is not None else Path(cfg.denoiser.path).name
    return _Work(name, clips, prompts, real, given, generator.codec.vae, settings["solver"])


def _generate(
    generator: VideoGenerator,
    real: ShardClips,
    prompts: Sequence[str],
    given: Sequence[int],
    cfg: DictConfig,
    settings: Mapping[str, Any],
) -> Iterator[GeneratedClip]:
    """A video of each prompt; the prompt of a clip whose frames are needed and cannot be read is left out."""
    autocast = autocast_dtype(cfg.precision)
    for start in range(0, len(prompts), cfg.batch_size):
        numbers = range(start, min(start + cfg.batch_size, len(prompts)))
        clips = dict.fromkeys(numbers) if not given else _readable(real, numbers)
        if not clips:
            continue
        sources = [to_float(clip) for clip in clips.values() if clip is not None]
        with torch.autocast(generator.device.type, dtype=autocast, enabled=autocast is not None):
            videos = generator.generate(
                [prompts[number] for number in clips],
                *real.shape,
                seeds=[cfg.seed + number for number in clips],
                given=_given(cfg.mode, given, sources),
                hold_given=cfg.hold_given,
                **settings,
            )
        for video, (number, clip) in zip(videos, clips.items(), strict=True):
            seed = cfg.seed + number
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


def _to_read(cfg: DictConfig) -> _Work:
    if cfg.mode != "text":
        raise UsageError(
            f"mode={cfg.mode} needs checkpoint=FILE: which frames were given is not known of generated=DIR"
        )
    folder = Path(to_absolute_path(cfg.generated))
    samples = SampleFolder(folder, "mp4").listed
    if not samples:
        raise DataError(f"{folder / SAMPLES}: lists no video; give generated=DIR that `osp sample` wrote")
    if unknown := [name for name, sample in samples.items() if not isinstance(sample.get("prompt"), str)]:
        raise DataError(f"{folder / SAMPLES}: does not say the prompt of {unknown[0]}; make the videos by `osp sample`")
    sizes = {name: made_size(folder / name) for name in samples}
    name, size = next(iter(sizes.items()))
    if other := next((other for other in sizes if sizes[other] != size), None):
        raise DataError(
            f"{folder}: {name} is {_by(size)} and {other} {_by(sizes[other])}; videos of one size are judged together, "
            "so keep those of each size in a folder of their own"
        )
    if cfg.clip.frames is not None and cfg.clip.frames > size.frames:
        raise UsageError(f"clip.frames={cfg.clip.frames}: the videos in {folder} have {size.frames}; ask for no more")
    real = _real_clips(cfg, size._asdict())
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
    return _Work(folder.name, clips, [sample["prompt"] for sample in samples.values()], real)


def _by(size: Shape) -> str:
    return "x".join(map(str, size))


def _real_clips(cfg: DictConfig, known: Mapping[str, int] | None) -> ShardClips:
    """The clips of `input` in the size of `clip`, or where that is null in the one that is known."""
    size: dict[str, Any] = {
        name: cfg.clip[name] if cfg.clip[name] is not None else (known or {}).get(name) for name in _SIZES
    }
    for name, value in size.items():
        if value is None:
            raise UsageError(f"clip.{name} is not known from the checkpoint; give clip.{name}=NUMBER")
    rate = {"stride": cfg.clip.stride, "fps": cfg.clip.fps}
    return ShardClips(to_absolute_path(cfg.input), **size, **rate, random_start=False)


def _captions(real: ShardClips, count: int) -> list[str]:
    captions = [str(entry.record.get("caption") or "") for entry in real.entries[:count]]
    for entry, caption in zip(real.entries, captions, strict=False):
        if not caption.strip():
            raise DataError(
                f"{real.path}: the clip {entry.key} has no caption to be judged by; give input=DIR of procedural "
                "clips, as `osp shards synthetic.objects=1` makes them"
            )
    return captions


def _settings(cfg: DictConfig, work: _Work) -> dict[str, Any]:
    """What was used: sizes and solver as they are known now, and of a folder nothing about how it was made."""
    plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    settings = {str(key): value for key, value in plain.items()}
    settings["clip"] = {**settings["clip"], **work.real.shape._asdict()}
    if work.solver is not None:
        return settings | {"solver": {key: getattr(work.solver, key) for key in ("name", "steps", "shift")}}
    return {key: value for key, value in settings.items() if key not in _MAKING}
