"""Files that are written whole or not at all, locks of folders, digests."""

import hashlib
import multiprocessing
import os
import shutil
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from osp.files import (
    discard,
    exact_digest,
    file_digest,
    folder_lock,
    put_in_place,
    weights_digest,
    whole_at,
    write_json,
    write_whole,
)


def test_a_file_is_there_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    write_whole(file, "one")
    write_json(file, {"two": [2]})
    assert file.read_text() == '{\n "two": [\n  2\n ]\n}'

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(file, "three")
    assert file.read_text().startswith('{\n "two"')
    assert os.listdir(tmp_path) == ["file"]


def hold(folder: Path, told: Connection) -> None:
    with folder_lock(folder):
        told.send("held")
        told.recv()


def test_a_lock_keeps_another_process_out_until_it_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    mine, theirs = multiprocessing.Pipe()
    other = multiprocessing.get_context("fork").Process(target=hold, args=(folder, theirs))
    other.start()
    assert mine.recv() == "held"
    with pytest.raises(BlockingIOError), folder_lock(folder, wait=False):
        pass
    with folder_lock(folder, ".another", wait=False):
        pass
    other.kill()
    other.join()
    with folder_lock(folder, wait=False) as number:
        assert os.fstat(number)


def test_digests_change_with_what_counts_only(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    assert file_digest(tmp_path / "file") == hashlib.sha256(b"content").hexdigest()

    weights = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[3.0]])}
    digest = weights_digest("about", weights)
    assert digest == weights_digest("about", dict(reversed(weights.items())))
    assert digest == weights_digest("about", {key: value.bfloat16() for key, value in weights.items()})
    for about, changed in (("other", {}), ("about", {"a": torch.tensor([1.0, 2.1])}), ("about", {"c": torch.ones(1)})):
        assert weights_digest(about, weights | changed) != digest

    exact = exact_digest("about", weights.items())
    assert exact != exact_digest("about", reversed(weights.items()))
    assert exact != exact_digest("about", [(key, value.bfloat16()) for key, value in weights.items()])


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("is_folder", [(True, True), (False, True), (True, False), (False, False)])
@pytest.mark.parametrize("keeps", [False, True])
def test_wherever_a_process_is_killed_the_old_or_the_new_one_is_whole(
    is_folder: tuple[bool, bool], keeps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, part, before = tmp_path / "last", tmp_path / ".last.part", tmp_path / "kept" if keeps else None

    def make(path: Path, name: str, folder: bool) -> None:
        if folder:
            path.mkdir()
        (path / "content" if folder else path).write_text(name)

    def content(path: Path) -> str:
        return (path / "content" if path.is_dir() else path).read_text()

    left = 0

    def counted(work: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: Any, **options: Any) -> object:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return work(*arguments, **options)

        return call

    with monkeypatch.context() as patched:
        for module, name in ((os, "rename"), (os, "replace"), (os, "unlink"), (shutil, "rmtree")):
            patched.setattr(module, name, counted(getattr(module, name)))
        make(place, "0", is_folder[0])
        for number in range(1, 9):
            left = 99
            discard(part)
            make(part, str(number), is_folder[number % 2])
            left = number - 1  # calls that the process survives
            try:
                put_in_place(part, place, before)
            except Killed:
                assert content(whole_at(place)) in (str(number - 1), str(number))
                left = 99
                put_in_place(part, place, before) if part.exists() else None
            assert content(whole_at(place)) == str(number)
            if before is not None and before.exists():
                assert int(content(before)) < number
    left = 99
    make(part, "end", folder=True)
    put_in_place(part, place)
    left_over = {path.name for path in tmp_path.iterdir() if not path.name.endswith(".part")}
    assert left_over <= {"last", "kept"}
