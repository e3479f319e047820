"""Something that is read, as it is fuzzed: how its files are made, and what all is read of them."""

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from osp.audit.fuzz.containers import change_file
from osp.errors import DataError, OspError


class Unsafe(Exception):
    """A reader gave out what it must not."""


def told_of(error: BaseException) -> OspError | None:
    """The one line that a user is shown of an error; None for a bug. A verb adds more, see `osp.cli.user_errors`."""
    if isinstance(error, OspError):
        return error
    if isinstance(error, OSError) and error.filename is not None:
        return DataError(f"{error.filename}: {error.strerror}")
    return None


@dataclass
class Reading:
    """The result of reading a subject's files: a digest of each part, and the text of each refusal.

    Everything that is neither a value nor an error to tell is raised.
    """

    told: Callable[[BaseException], OspError | None] = told_of
    parts: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def __call__(self, call: Callable[..., Any], *arguments: Any, **settings: Any) -> Any:
        """The value of the call, noted as a part; None, noted as a refusal, if the call ends with an error to tell."""
        try:
            value = call(*arguments, **settings)
        except Exception as error:
            if (mended := self.told(error)) is None:
                raise
            self.refused.append(str(mended) or type(mended).__name__)
            self.parts.append("refused")
            return None
        self.parts.append(digest(value))
        return value


@dataclass(frozen=True)
class Subject:
    """Small files that are read together.

    Args:
        name: of the subject, and of the folder that its files lie in.
        make: writes valid files into an empty folder, always the same.
        read: reads all of them.
        changed: patterns of those that are changed; of several one at a time.
        weight: how often it has its turn among those of its kind.
    """

    name: str
    make: Callable[[Path], Any]
    read: Callable[[Path, Reading], Any]
    changed: Sequence[str] = ("**/*",)
    weight: int = 1

    def files(self, folder: Path) -> list[Path]:
        """The files that may be changed."""
        found = {path for pattern in self.changed for path in folder.glob(pattern)}
        return sorted(path for path in found if path.is_file() and path.stat().st_size)


def fresh_copy(original: Path, place: Path) -> Path:
    """The original files in a folder of their own, in the place of what was there before."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(original, place, symlinks=True)
    return place


def damage(draw: Random, subject: Subject, folder: Path) -> Path:
    """Change one file of a subject; gives which."""
    path = draw.choice(subject.files(folder))
    change_file(draw, path)
    return path


def digest(value: Any) -> str:
    """A hash of a value: of tensors and arrays their bytes, of folders of values all of them."""
    content = hashlib.sha256()
    _digest(value, content.update)
    return content.hexdigest()[:16]


def _digest(value: Any, update: Callable[[bytes], None]) -> None:
    if isinstance(value, Tensor):
        update(f"{value.dtype} {value.layout} {tuple(value.shape)}".encode())
        if value.layout == torch.strided and value.numel() and not value.is_meta:
            update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray):
        update(f"{value.dtype} {value.shape}".encode() + value.tobytes())
    elif isinstance(value, bytes | bytearray):
        update(bytes(value))
    elif isinstance(value, Mapping):
        update(f"{type(value).__name__} {len(value)}".encode())
        for key, item in value.items():
            _digest(key, update)
            _digest(item, update)
    elif isinstance(value, list | tuple | set | frozenset):
        update(f"{type(value).__name__} {len(value)}".encode())
        for item in value:
            _digest(item, update)
    elif is_dataclass(value) and not isinstance(value, type):
        _digest(asdict(value), update)
    elif value is None or isinstance(value, str | int | float | bool | Path):
        update(f"{type(value).__name__} {value!r}".encode("utf-8", "backslashreplace"))
    else:
        update(type(value).__name__.encode())
