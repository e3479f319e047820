"""`osp sample`: prompts -> files of videos."""

import logging
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import to_absolute_path
from omegaconf import DictConfig, OmegaConf

from osp.cli.checks import check_generator_source, check_numbers
from osp.cli.plain import instantiate
from osp.cli.settings import read_sampling
from osp.devices import choose_device, choose_kernels
from osp.documents import printable
from osp.errors import UsageError
from osp.parallel.launch import on_devices
from osp.report.progress import shown_progress
from osp.sampling import VideoGenerator
from osp.sampling.jobs import Plan, list_asked, plan_jobs, run_jobs
from osp.sampling.outputs import SampleFolder
from osp.sampling.pictures import PictureFiles
from osp.sampling.requests import Request, read_requests

log = logging.getLogger(__name__)

_NAMED = 10  # words that are unknown


def run(cfg: DictConfig) -> dict[str, Any] | None:
    """Sample as configured; gives how many videos were made, and where they and their list lie.

    Raises UsageError and DataError for what can be known to be wrong before the model is read, and for the rest before
    the first video is made.
    """
    read_sampling(cfg)
    check_numbers(cfg, {"devices": 1})
    check_generator_source(cfg)
    folder = Path(HydraConfig.get().runtime.output_dir)
    return on_devices(cfg.devices, choose_device(cfg.device), _sample, cfg, folder)


def _sample(device: torch.device, cfg: DictConfig, output: Path) -> dict[str, Any]:
    """Sample on a device; where several work together, it is called in a process for each."""
    choose_kernels(cfg.kernels)
    sampling, folder = read_sampling(cfg), SampleFolder(output, cfg.format, cfg.overwrite)
    asked = list_asked(_requests(cfg), sampling, _pictures(cfg))
    generator = instantiate(cfg.generator)
    if not isinstance(generator, VideoGenerator):
        raise UsageError(f"generator is a {type(generator).__name__}; choose one of conf/generator")
    generator.to(device)
    if cfg.devices > 1:
        generator.share(sampling.guidance)
    plan = plan_jobs(generator, sampling, asked, folder)
    _tell(plan)
    if "path" in cfg.generator and (differs := plan.unlike_training()):  # published ones were trained at many sizes
        log.warning("unlike the clips of training: %s; the model may not know how to make such videos", differs)
    _warn_of_words(plan)
    with shown_progress("sampling") as show:
        run_jobs(plan, lambda progress: show(progress.batches_done, progress.batches))
    return {"output": str(folder.folder), "videos": plan.videos, "kept": plan.kept, "list": str(folder.list)}


def _requests(cfg: DictConfig) -> list[Request]:
    if (cfg.prompt is None) == (cfg.prompts is None):
        raise UsageError('give a prompt, prompt="a red circle slides left", or a file of them, prompts=FILE (not both)')
    if cfg.prompts is not None:
        return read_requests(Path(to_absolute_path(cfg.prompts)))
    if not str(cfg.prompt).strip():
        raise UsageError("the prompt is empty; say what the video should show")
    return [Request(str(cfg.prompt))]


def _pictures(cfg: DictConfig) -> PictureFiles:
    """The files of the command, which are for all requests without their own."""
    given = OmegaConf.to_container(cfg.given) if isinstance(cfg.given, DictConfig) else cfg.given or {}
    if not isinstance(given, dict) or not all(type(number) is int for number in given):
        raise UsageError(f"given={given}: must be files by the numbers of their frames, '{{0: a.png}}'")
    numbered = tuple((int(str(number)), Path(to_absolute_path(path))) for number, path in given.items())
    image, last_image, video = (
        None if cfg[key] is None else Path(to_absolute_path(cfg[key])) for key in ("image", "last_image", "video")
    )
    return PictureFiles(image, last_image, video, cfg.keep_frames, numbered, instantiate(cfg.limits))


def _tell(plan: Plan) -> None:
    """Log what is there already and what the largest batch needs; warn if that is more than there is."""
    if plan.kept:
        count = plan.kept + plan.videos
        log.info("%d of %d videos are there already, made with the same settings", plan.kept, count)
    memory = plan.memory()
    for line in memory.lines() if memory else ():
        log.info("memory: %s", line)
    if memory and not memory.fits:
        log.warning("this is more than the device has; use %s", memory.advice)


def _warn_of_words(plan: Plan) -> None:
    """Name the words of the prompts that no caption had in training."""
    if unknown := plan.unknown_words():
        more = f" and {len(unknown) - _NAMED} more" if len(unknown) > _NAMED else ""
        words = printable(", ".join(unknown[:_NAMED])) + more
        log.warning("no caption had these words in training: %s; the model does not know what they mean", words)
