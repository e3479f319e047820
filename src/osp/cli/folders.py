"""The folder of a job: made when its work begins, with a log in it, and taken back if nothing came of it."""

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import configure_log
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict, read_write

from osp.configs.texts import escaped
from osp.documents import printable
from osp.errors import DataError

# These write a file or a folder at their end, and no log.
_WITHOUT = ("doctor", "page", "import-weights", "inflate", "export", "export-weights")
_ONE_FOR_ALL = ("cache",)  # the jobs of a multirun work on parts of one folder


@contextmanager
def job_folder(verb: str, cfg: DictConfig) -> Iterator[None]:
    """Within it the folder `output` of a job is there, and its log; in a multirun each job has one of its own.

    `HydraConfig.get().runtime.output_dir` is its absolute path. Folders that were made for it are taken away again if
    they are empty at the end, and after an error also if they hold its log only. Raises DataError if nothing can be
    written into it.
    """
    _set_cwd()
    if verb in _WITHOUT:
        yield
        return
    folder = Path(os.path.abspath(str(cfg.output)))
    job = HydraConfig.get()
    if job.mode is RunMode.MULTIRUN and verb not in _ONE_FOR_ALL:
        folder /= str(job.job.num)
    made = _make(folder)
    log = folder / f"{job.job.name}.log"
    had_log = log.exists()
    _tell_hydra(folder, log)
    failed = True
    try:
        yield
        failed = False
    finally:
        if made:
            if failed and not had_log:
                _drop_log(log)
                _drop_lock(folder)
            for one in reversed(made):
                with suppress(OSError):  # there is something in it
                    one.rmdir()


def _make(folder: Path) -> list[Path]:
    """Make the folder; gives those that were not there, the outermost first."""
    missing = [one for one in (*reversed(folder.parents), folder) if not os.path.lexists(one)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise DataError(f"output={printable(folder)}: is a file; give a folder") from error
    except OSError as error:
        for one in reversed(missing):
            with suppress(OSError):
                one.rmdir()
        name = printable(error.filename or folder)
        raise DataError(f"output={name}: {error.strerror}, so that no folder can be made here") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise DataError(f"output={printable(folder)}: nothing can be written into this folder; give another one")
    return missing


def _set_cwd() -> None:
    hydra: Any = HydraConfig.instance().cfg
    with read_write(hydra.hydra):
        hydra.hydra.runtime.cwd = escaped(os.getcwd())


def _tell_hydra(folder: Path, log: Path) -> None:
    hydra: Any = HydraConfig.instance().cfg
    with read_write(hydra.hydra), open_dict(hydra.hydra):
        settings = hydra.hydra
        settings.runtime.output_dir = escaped(str(folder))
        file = {"class": "osp.cli.logs.LogFile", "formatter": "plain", "filename": escaped(str(log)), "delay": True}
        settings.job_logging.handlers.file = {**file, "encoding": "utf-8", "errors": "backslashreplace"}
        settings.job_logging.root.handlers = ["console", "file"]
        configure_log(settings.job_logging, settings.verbose)


def _drop_lock(folder: Path) -> None:
    """Take away the lock of a folder that holds nothing else, unless another command has it."""
    if [one.name for one in folder.iterdir()] == [".lock"]:
        with suppress(OSError), open(folder / ".lock", "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (folder / ".lock").unlink()


def _drop_log(log: Path) -> None:
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, logging.FileHandler)]:
        if handler.baseFilename == str(log):
            root.removeHandler(handler)
            handler.close()
    log.unlink(missing_ok=True)
