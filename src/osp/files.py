"""Files that are written whole or not at all, and digests of what is in them."""

import fcntl
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file under a temporary name, then rename it: whatever happens, there is all of it or the old one.

    What is not UTF-8 in a string (a file name may hold it) is escaped.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as file:
            file.write(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)
            sync(file)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        if error.filename is None or error.filename == str(part):
            error.filename = str(path)  # a full disk names no file, and the temporary one is nobody's
        raise


def put_in_place(part: Path, place: Path, before: Path | None = None) -> None:
    """Give a file or folder that is written whole its place; at any moment `whole_at(place)` finds it or the old one.

    The old one is deleted, or kept as `before`, whose own old one is deleted then.
    """
    aside = _aside(place)
    os.lstat(part)  # or the old one would leave its place for nothing
    if os.path.lexists(place):
        discard(aside)
        if before is None and place.is_file() and part.is_file():
            os.replace(part, place)
            return
        os.rename(place, aside)
    os.rename(part, place)
    if os.path.lexists(aside):
        if before is None:
            discard(aside)
            return
        discard(before)
        os.rename(aside, before)


def whole_at(place: Path) -> Path:
    """Where the file or folder of a place lies: there, or aside, if a process was killed while it was replaced."""
    aside = _aside(place)
    return aside if not os.path.lexists(place) and os.path.lexists(aside) else place


def discard(path: Path) -> None:
    """Delete a file, a link or a whole folder, if it is there; a folder that is half deleted has the name of a part."""
    if path.is_dir() and not path.is_symlink():
        part = path if path.name.endswith(".part") else path.with_name(f".{path.name.lstrip('.')}.part")
        if part != path:
            discard(part)
            os.rename(path, part)
        shutil.rmtree(part)
    else:
        path.unlink(missing_ok=True)


def _aside(place: Path) -> Path:
    return place.with_name(f".{place.name}.before")


def sync(file: BinaryIO | io.BufferedWriter) -> None:
    """Bring what was written to the disk."""
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def folder_lock(folder: Path, name: str = ".lock", wait: bool = True) -> Iterator[int]:
    """Make the folder, and keep other processes out of the same block until this one has left it, or is gone.

    Gives the lock's file descriptor; a child that inherits it holds the lock too. Without `wait`, BlockingIOError says
    that another has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / name, "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        _locks.add(lock)
        try:
            yield lock.fileno()
        finally:
            _locks.discard(lock)


_locks: set[BinaryIO] = set()


def _leave_locks() -> None:
    """A forked process gives up the locks that it has inherited, or they would outlive the process that took them."""
    for lock in _locks:
        lock.close()
    _locks.clear()


os.register_at_fork(after_in_child=_leave_locks)


def write_json(path: Path, value: Any) -> None:
    """Write plain values as a JSON file, as a whole."""
    write_whole(path, json.dumps(value, indent=1))


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_digest(about: str, weights: Mapping[str, Tensor]) -> str:
    """32 hexadecimal digits that change with `about` (what the tensors alone do not say) and with any value.

    Neither the order of the keys, nor the device, nor the precision in which equal values are held counts.
    """
    content = hashlib.sha256(about.encode())
    for key, value in sorted(weights.items()):
        content.update(key.encode() + value.detach().float().cpu().contiguous().numpy().tobytes())
    return content.hexdigest()[:32]


def exact_digest(about: str, labelled: Iterable[tuple[str, Tensor]]) -> str:
    """32 hexadecimal digits that change with `about`, with a label, with any bit of a tensor, and with their order."""
    content = hashlib.sha256(about.encode())
    for label, value in labelled:
        content.update(label.encode())
        content.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return content.hexdigest()[:32]


def no_weights(path: Path) -> str | None:
    """The kind of a file that stands in the place of weights, and how to get the weights; None if it may be weights."""
    with open(path, "rb") as file:
        start = file.read(512).removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith((b"version https://git-lfs.github.com/spec/", b"version https://hawser.")):
        return (
            "is a Git LFS pointer, not the weights themselves; fetch them with `git lfs install` and `git lfs pull` in "
            "its folder, or download the file itself"
        )
    if start[:15].lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<error")):
        return "is a web page, not weights; the download went wrong (a login may be needed). Download the file itself"
    # A safetensors file begins with the length of its header, whose eight bytes are no JSON.
    if start.startswith(b"{") and b"\0" not in start[:8] and start[1:2] in b'"\r\n\t }':
        return "is JSON text, not weights; it may be the answer of a server that refused the download"
    return None
