"""Tensors that several processes have written in pieces are read by any rows, and only if they are what was written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from osp.weights import WeightImportError, sharded
from osp.weights.folders import sealed
from osp.weights.lazy import Stored
from osp.weights.sharded import INDEX, Piece, open_sharded, shards_missing, write_index, write_shard

ENTRIES = {"step": 12, "rate": 0.1, "words": ["a", "b"], "none": None}


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "matrix": torch.randn(7, 3),
        "a.half": torch.randn(5, 2, 2).bfloat16(),
        "a.step": torch.tensor(3.0),
        "counts": torch.arange(4),
        "none": torch.zeros(0, 3),
        "broken@x": torch.tensor([float("nan"), 1.0]),
    }


def write(folder: Path, ranks: int = 3) -> Path:
    """The tensors, the rows of each cut as `torch.chunk` does; scalars by the first process."""
    folder.mkdir()
    for rank in range(ranks):
        pieces = []
        for key, value in tensors().items():
            chunk = -(-len(value) // ranks) if value.ndim else 0
            own = value[rank * chunk : (rank + 1) * chunk] if value.ndim else value
            if rank == 0 or (value.ndim and len(own)):
                pieces.append(Piece(key, Stored.of(own), tuple(value.shape), rank * chunk))
        assert shards_missing(folder, ranks) == [*range(rank, ranks)]
        write_shard(folder, rank, pieces)
    write_index(folder, ranks, ENTRIES)
    return folder


@pytest.mark.parametrize("largest_piece", [1, 30, 1 << 20])
def test_any_rows_are_read_from_the_pieces_of_any_number_of_processes(
    largest_piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharded, "_PIECE", largest_piece)
    for ranks in (1, 3, 8):
        found = open_sharded(write(tmp_path / str(ranks), ranks))
        assert found.entries == ENTRIES
        assert found.weights.keys() == tensors().keys()
        for key, value in tensors().items():
            stored = found.weights.stored[key]
            assert (stored.shape, stored.dtype) == (tuple(value.shape), value.dtype)
            assert torch.equal(stored.read().nan_to_num(7.0), value.nan_to_num(7.0))
        for begin in range(8):
            for end in range(begin, 8):
                assert torch.equal(found.weights.stored["matrix"].rows(begin, end), tensors()["matrix"][begin:end])
        names = sorted(path.name for path in (tmp_path / str(ranks)).iterdir())
        assert names == [INDEX, *(f"rank-{rank:05d}.safetensors" for rank in range(ranks))]


def shorten(folder: Path) -> None:
    path = folder / "rank-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def flip(folder: Path) -> None:
    path = folder / "rank-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def forge(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Another index, with the digest that belongs to it."""

    def forged(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        del index["sha256"]
        change(index)
        (folder / INDEX).write_text(json.dumps(sealed(index)))

    return forged


def pieces(index: dict[str, Any], rank: int) -> dict[str, Any]:
    found: dict[str, Any] = index["files"][f"rank-{rank:05d}.safetensors"]["pieces"]
    return found


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda folder: (folder / "rank-00002.safetensors").unlink(), r"rank-00002\.safetensors: is gone"),
        (lambda folder: (folder / INDEX).unlink(), r"has no index\.json, so it was not written to its end"),
        (lambda folder: (folder / INDEX).write_text("{"), "is no JSON"),
        (lambda folder: (folder / INDEX).write_text("{}"), "has no format"),
        (shorten, "bytes, not .*cut short"),
        (flip, "is not what was written; its checksum is another"),
        (
            lambda folder: (folder / INDEX).write_text((folder / INDEX).read_text().replace('"step":12', '"step":13')),
            r"index\.json: is not what was written",
        ),
        (forge(lambda index: pieces(index, 1).pop("matrix@3")), "matrix is not whole"),
        (forge(lambda index: pieces(index, 2).update({"matrix@2": {"rows": 1, "crc32": ""}})), "matrix is not whole"),
        (
            forge(lambda index: pieces(index, 2).update({"other@0": {"rows": 1, "crc32": ""}})),
            "is a piece of no tensor",
        ),
        (
            forge(lambda index: pieces(index, 2).update({"matrix@x": {"rows": 1, "crc32": ""}})),
            "matrix@x is a piece of no tensor",
        ),
        (forge(lambda index: index["files"].update({"../x": index["files"].popitem()[1]})), "is no file of pieces"),
        (
            forge(lambda index: index["files"]["rank-00001.safetensors"]["tensors"]["matrix"].update(shape=[7, 4])),
            "matrix is of two kinds",
        ),
        (
            forge(lambda index: [one["tensors"]["matrix"].update(dtype="F64") for one in index["files"].values()]),
            "not what the index says",
        ),
    ],
)
def test_a_folder_that_is_not_what_was_written_is_refused_in_one_line(
    harm: Callable[[Path], object], told: str, tmp_path: Path
) -> None:
    harm(write(tmp_path / "folder"))
    with pytest.raises(WeightImportError, match=told) as refused:
        dict(open_sharded(tmp_path / "folder").weights)
    assert "\n" not in str(refused.value)


def test_pieces_that_are_missing_are_no_checkpoint(tmp_path: Path) -> None:
    half = Piece("x", Stored.of(torch.zeros(2, 2)), (4, 2))
    write_shard(tmp_path, 0, [half])
    with pytest.raises(WeightImportError, match="x is not whole"):
        write_index(tmp_path, 1, {})
    assert not (tmp_path / INDEX).exists()
