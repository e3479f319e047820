"""Checkpoints in ranks are the whole model again, bit for bit, and what is missing is told."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from osp.weights import WeightImportError, load_published
from osp.weights.folders import read_weights
from osp.weights.megatron import iteration_folder, read_ranks

GOLDEN = Path(__file__).parent.parent / "golden"
Writer = Callable[..., Path]
V13 = ("opensora_v13", "f_eps_sensitive")
V15 = ("ummdit_v15", "b_n1_2_4_2_1")


def golden(kind: str, case: str) -> tuple[dict, dict[str, Tensor]]:
    config = json.loads((GOLDEN / kind / f"{case}.json").read_text())["config"]
    stored = load_file(GOLDEN / kind / f"{case}.safetensors").items()
    return config, {key.removeprefix("weights/"): value for key, value in stored if key.startswith("weights/")}


def same(weights: Any, other: Any) -> bool:
    return weights.keys() == other.keys() and all(torch.equal(weights[key], value) for key, value in other.items())


LAYOUTS = [
    (*V13, 2, ()),
    (*V13, 4, ()),
    (*V13, 2, (1, 3)),
    (*V13, 1, (1, 2, 1)),
    ("ummdit_v15", "a_n2", 2, ()),
    ("ummdit_v15", "a_n2", 4, ()),
    ("ummdit_v15", "a_n2", 2, (2, 4)),  # a cut between stages
    ("ummdit_v15", "a_n2", 2, (3, 3)),  # and inside one
    ("ummdit_v15", "a_n2", 1, (1, 2, 3)),
    ("ummdit_v15", "a_n2", 1, (5, 1)),
    (*V15, 1, (4, 6)),
    (*V15, 1, (1, 6, 3)),
    ("opensora_inpaint_v13", "a_6l", 2, (2, 4)),
]


@pytest.mark.parametrize(("kind", "case", "tensor", "pipeline"), LAYOUTS)
def test_ranks_are_the_whole_model(
    kind: str, case: str, tensor: int, pipeline: Sequence[int], write_ranks: Writer, tmp_path: Path
) -> None:
    config, weights = golden(kind, case)
    write_ranks(weights, tmp_path / "iter_0000007", tensor, pipeline)
    merged = read_weights(tmp_path, config["num_layers"])
    assert merged.shapes == {key: tuple(value.shape) for key, value in weights.items()}
    assert {key: part.dtype for key, part in merged.stored.items()} == {k: v.dtype for k, v in weights.items()}
    assert same(merged, weights)
    model, whole = load_published(kind, tmp_path, config), load_published(kind, weights, config)
    assert same(model.state_dict(), whole.state_dict())


def test_averaged_weights_come_first(write_ranks: Writer, tmp_path: Path) -> None:
    config, weights = golden(*V13)

    def entries(part: dict[str, Tensor]) -> dict[str, Any]:
        return {"model": {"a": torch.ones(1)}, "ema_model": {f"module.{key}": value for key, value in part.items()}}

    write_ranks(weights, tmp_path / "averaged", 2, (2, 2), entries)
    assert same(read_ranks(tmp_path / "averaged", config["num_layers"]), weights)
    for number, empty in enumerate(({}, None, {"x._extra_state": None})):
        folder = tmp_path / str(number)
        write_ranks(weights, folder, 2, (2, 2), lambda part, empty=empty: {"model": part, "ema_model": empty})
        assert same(read_ranks(folder, config["num_layers"]), weights)


def test_one_rank_may_be_named_too(write_ranks: Writer, tmp_path: Path) -> None:
    weights = golden(*V13)[1]
    write_ranks(weights, tmp_path / "release")
    for source in (".", "release", "release/mp_rank_00", "release/mp_rank_00/model_optim_rng.pt"):
        assert same(read_weights(tmp_path / source), weights)


def test_the_iteration_is_chosen(tmp_path: Path) -> None:
    assert iteration_folder(tmp_path) is None
    for name in ("release", "iter_0000900", "iter_0001000", "iter_0002000"):
        (tmp_path / name).mkdir()
        if name != "iter_0002000":  # which was begun only
            (tmp_path / name / "mp_rank_00").mkdir()
    (tmp_path / "iter_0000001").touch()
    latest = tmp_path / "latest_checkpointed_iteration.txt"
    assert iteration_folder(tmp_path) == tmp_path / "iter_0001000"
    assert iteration_folder(tmp_path / "iter_0000900") == tmp_path / "iter_0000900"
    for text, name in (("900\n", "iter_0000900"), (" release", "release"), ("1000", "iter_0001000")):
        latest.write_text(text)
        assert iteration_folder(tmp_path) == tmp_path / name
    for text in ("2000", "", "-1", "x" * 9999, "9" * 9999, "\udc80"):
        latest.write_text(text, errors="surrogateescape")
        with pytest.raises(
            WeightImportError, match=r"latest_checkpointed_iteration\.txt: names .*iter_0000900"
        ) as caught:
            iteration_folder(tmp_path)
        assert len(str(caught.value)) < 999
    latest.unlink()
    shutil.rmtree(tmp_path / "iter_0000900")
    shutil.rmtree(tmp_path / "iter_0001000")
    assert iteration_folder(tmp_path) == tmp_path / "release"


def test_what_is_missing_is_named(write_ranks: Writer, tmp_path: Path) -> None:
    config, weights = golden(*V13)
    write_ranks(weights, tmp_path, 2, (2, 2))
    shutil.move(tmp_path / "mp_rank_01_001", tmp_path / "elsewhere")
    with pytest.raises(WeightImportError, match=r"mp_rank_01_001: no such folder"):
        read_ranks(tmp_path, 4)
    (tmp_path / "mp_rank_01_001").mkdir()
    with pytest.raises(WeightImportError, match=r"mp_rank_01_001/model_optim_rng\.pt: no such file"):
        read_ranks(tmp_path, 4)
    (tmp_path / "mp_rank_01_001" / "model_optim_rng.pt").write_bytes(b"PK")
    with pytest.raises(WeightImportError, match=r"mp_rank_01_001/model_optim_rng\.pt: "):
        load_published(V13[0], tmp_path, config)
    shutil.rmtree(tmp_path / "mp_rank_01_001")
    shutil.rmtree(tmp_path / "mp_rank_01_000")
    (tmp_path / "mp_rank_00").mkdir()
    with pytest.raises(WeightImportError, match="beside it is the same rank"):
        read_ranks(tmp_path, 4)
    (tmp_path / "mp_rank_00").rename(tmp_path / "mp_rank_99999999999")
    with pytest.raises(WeightImportError, match="mp_rank_01_000: no such folder"):
        read_ranks(tmp_path, 4)


def test_a_missing_rank_without_pipeline_is_named_as_the_others(write_ranks: Writer, tmp_path: Path) -> None:
    write_ranks(golden(*V13)[1], tmp_path, 3)
    shutil.rmtree(tmp_path / "mp_rank_01")
    with pytest.raises(WeightImportError, match=r"mp_rank_01: no such folder"):
        read_weights(tmp_path)


def change(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    checkpoint = torch.load(path / "model_optim_rng.pt", weights_only=False)
    edit(checkpoint)
    torch.save(checkpoint, path / "model_optim_rng.pt")


WRONG = [
    (lambda c: c["model"].pop("proj_out.bias"), r"mp_rank_01_001: only it or mp_rank_00_001 holds proj_out\.bias"),
    (
        lambda c: c["model"].update({"proj_out.bias": torch.ones(3)}),
        r"mp_rank_01_001: proj_out\.bias is \(3,\), which does not go with \(16,\) of mp_rank_00_001",
    ),
    (
        lambda c: c["model"].update({"transformer_blocks.0.attn1.to_q.weight": torch.ones(12, 23)}),
        r"mp_rank_01_001: .*to_q\.weight is \(12, 23\)",
    ),
    (
        lambda c: c["model"].update({"transformer_blocks.0.ff.net.2.weight": torch.ones(24)}),
        r"net\.2\.weight is \(24,\)",
    ),
    (lambda c: c.pop("model"), r"mp_rank_01_001/model_optim_rng\.pt: holds no weights under model or ema_model"),
    (lambda c: c.update(model=None), "holds no weights under model or ema_model"),
    (
        lambda c: c.update(ema_model=c["model"]),
        r"mp_rank_00_000/model_optim_rng\.pt: holds no weights under ema_model, as other ranks do",
    ),
]


@pytest.mark.parametrize(("edit", "message"), WRONG)
def test_parts_that_make_no_whole_are_refused(
    edit: Callable[[dict[str, Any]], None], message: str, write_ranks: Writer, tmp_path: Path
) -> None:
    write_ranks(golden(*V13)[1], tmp_path, 2, (2, 2))
    change(tmp_path / "mp_rank_01_001", edit)
    with pytest.raises(WeightImportError, match=message):
        read_ranks(tmp_path, 4)


def test_another_number_of_blocks_is_told(write_ranks: Writer, tmp_path: Path) -> None:
    config, weights = golden("ummdit_v15", "a_n2")
    write_ranks(weights, tmp_path, 1, (3, 3))
    with pytest.raises(WeightImportError, match=r"2 pipeline ranks hold 6 blocks, but num_layers=\[2, 4, 2\] makes 8"):
        load_published("ummdit_v15", tmp_path, config | {"num_layers": [2, 4, 2], "sparse_n": [1, 2, 1]})
    with pytest.raises(WeightImportError, match=r"hold 6 blocks, but num_layers=\[2, 4, 6, 8, 6, 4, 2\] makes 32"):
        load_published("ummdit_v15", tmp_path)
    for num_layers in (None, "6", [2, "2", 2]):
        with pytest.raises(WeightImportError, match="2 pipeline ranks, which need num_layers"):
            read_ranks(tmp_path, num_layers)


def test_nothing_is_put_together_before_it_is_asked_for(
    write_ranks: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = golden(*V13)[1]
    write_ranks(weights, tmp_path, 2, (2, 2))
    made = []
    join = torch.cat
    monkeypatch.setattr(torch, "cat", lambda parts, dim: made.append(dim) or join(parts, dim))
    merged = read_ranks(tmp_path, 4)
    assert not made
    key = "transformer_blocks.3.ff.net.2.weight"
    assert torch.equal(merged[key], weights[key])
    assert made == [1]
