"""`osp page`: what runs left in their folders, on one HTML page that can be sent as it is."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.utils import to_absolute_path
from omegaconf import DictConfig

from osp.checks import check_number
from osp.documents import printable
from osp.errors import DataError, UsageError
from osp.evaluation.output import METRICS
from osp.evaluation.reconstruction import PAIRS
from osp.files import write_whole
from osp.report.page import Content, html_page
from osp.report.records import GENERATION, RECONSTRUCTION, RESULT, SAMPLE, check_record, read_record
from osp.sampling.outputs import SAMPLES, SampleFolder
from osp.training.runs import TrainingRun

log = logging.getLogger(__name__)

_LARGE = 20_000_000  # bytes; mail servers refuse more
_FOLDERS = ("vae_run", "reconstruction", "denoiser_run", "generation", "samples")
_TRAINED = {"denoiser_run": "denoiser", "vae_run": "VAE"}


def run(cfg: DictConfig) -> dict[str, Any]:
    """Write the page; gives where it lies.

    Raises UsageError if no folder is given, DataError for one without the results that it should hold.
    """
    check_number("clips", cfg.clips, 0, whole=True)
    folders = {name: _paths(cfg[name]) for name in _FOLDERS}
    if not any(folders.values()):
        raise UsageError(
            f"there is nothing to show; give at least one of {', '.join(f'{name}=DIR' for name in _FOLDERS)}"
        )
    content = Content(
        generations=[(path, _metrics(path, GENERATION)) for path in folders["generation"]],
        samples=[(path, _samples(path)) for path in folders["samples"]],
        reconstructions=[
            (sorted((path / PAIRS).glob("*.*")), _metrics(path, RECONSTRUCTION)) for path in folders["reconstruction"]
        ],
        trainings=[
            (called, _result(run), run.curves())
            for name, called in _TRAINED.items()
            for run in map(TrainingRun, folders[name])
        ],
    )
    page = html_page(str(cfg.title), content, cfg.clips)
    output = Path(to_absolute_path(cfg.output))
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, page)
    if len(page) > _LARGE:
        log.warning("%s is %.0f MB; show fewer clips=%d of each folder to mail it", output, len(page) / 1e6, cfg.clips)
    return {"output": str(output), "bytes": output.stat().st_size}


def _paths(given: Any) -> list[Path]:
    listed = [] if given is None else [given] if isinstance(given, str) else list(given)
    return [Path(to_absolute_path(str(path))) for path in listed]


def _metrics(folder: Path, form: Any) -> Mapping[str, Any]:
    return read_record(folder / METRICS, form, "give the folder of an evaluation that has ended")


def _samples(folder: Path) -> Mapping[str, Mapping[str, Any]]:
    listed = SampleFolder(folder, "mp4").listed
    if not listed:
        raise DataError(f"{folder / SAMPLES}: lists no video; give samples=DIR that `osp sample` wrote")
    for name, settings in listed.items():
        check_record(settings, SAMPLE, f"{folder / SAMPLES}: {printable(name)}")
    return listed


def _result(run: TrainingRun) -> Mapping[str, Any]:
    return read_record(run.result_file, RESULT, "give the folder of a run that has ended")
