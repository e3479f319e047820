"""Files that are written whole or not at all, locks of folders, digests."""

import hashlib
import multiprocessing
import os
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from osp.files import exact_digest, file_digest, folder_lock, weights_digest, write_json, write_whole


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
