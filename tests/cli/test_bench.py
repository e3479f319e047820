"""`osp bench`: every row that was asked for, as table, files and plot."""

import csv
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from osp.cli import bench_case, bench_vae, main
from osp.vae import WFVAE

TINY = {"base_channels": 4, "latent_channels": 4, "encoder_flow_channels": 4, "decoder_flow_channels": 4}
Bench = Callable[..., tuple[str, dict[str, Any]]]


@pytest.fixture
def bench(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Runs `osp bench` on a tiny VAE; gives stdout and results.json."""
    monkeypatch.setattr("osp.cli.bench.matmul_peak", lambda *_: 1e11)  # it has its own test, and takes a second

    def run(*settings: str) -> tuple[str, dict[str, Any]]:
        tiny = ["vae=wfvae_tiny", *(f"vae.{key}={value}" for key, value in TINY.items())]
        common = ["repeats=1", "device=cpu", "isolate=false", f"output={tmp_path}"]
        monkeypatch.setattr(sys, "argv", ["osp", "bench", *tiny, *common, *settings])
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
        main()
        return capsys.readouterr().out, json.loads((tmp_path / "results.json").read_text())

    return run


def test_every_combination_is_a_row(bench: Bench, tmp_path: Path) -> None:
    out, results = bench("frames=[1,6]", "sizes=[16x16]", "chunk_frames=[null,1]")
    rows = results["rows"]
    hows = [("whole", None), ("pieces", "auto"), ("pieces", 1), ("stream", "auto"), ("stream", 1)]
    assert [tuple(row[key] for key in ("half", "size", "frames", "mode", "chunk_frames")) for row in rows] == [
        (half, "16x16", frames, *how) for half in ("encode", "decode") for frames in (1, 6) for how in hows
    ]
    for row in rows:
        assert row["frames_per_second"] == pytest.approx(row["frames"] / row["seconds"])
        assert row["share_of_peak"] == pytest.approx(row["flops"] / row["seconds"] / 1e11)
        assert (row["time_ratio"] == 1) >= (row["mode"] == "whole")
        assert row["peak_bytes"] > 1e7
        assert not row["note"]
    per_clip = {(row["half"], row["frames"]): row["flops"] for row in rows}
    assert len(set(per_clip.values())) == len(per_clip)

    *printed, last = out.splitlines()
    assert "\n".join(printed) == (tmp_path / "table.md").read_text().rstrip("\n")
    assert sum(line.startswith("|") for line in printed) == 2 + len(rows)
    assert json.loads(last)["rows"] == len(rows)
    with open(tmp_path / "results.csv") as file:
        assert [float(row["seconds"]) for row in csv.DictReader(file)] == [row["seconds"] for row in rows]
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_single_values_half_precision_and_tiles(bench: Bench, tmp_path: Path) -> None:
    out, results = bench(
        *("frames=5", "sizes=[16x24]", "mode=[stream,whole]", "half=decode", "precision=[bf16-true,bf16-mixed]"),
        "tiling=[null,{size:16,overlap:8}]",
    )
    rows = results["rows"]
    assert [(row["precision"], row["mode"], row["tiles"]) for row in rows] == [
        (precision, mode, tiles)
        for precision in ("bf16-true", "bf16-mixed")
        for mode in ("stream", "whole")
        for tiles in (None, "16/8")
    ]
    # Compared with the whole clip in whole frames, wherever that comes.
    assert [row["time_ratio"] == 1 for row in rows] == [False, False, True, False] * 2
    assert "half decode, size 16x24, frames 5, compiled no" in out


def test_a_row_of_its_own_process(bench: Bench) -> None:
    _, results = bench("frames=5", "sizes=16x16", "mode=stream", "half=decode", "isolate=true", "threads=1")
    (row,) = results["rows"]
    assert row["seconds"] > 0
    assert "time_ratio" not in row  # without a row of the whole clip
    assert (results["threads"], results["isolate"]) == (1, True)


def test_what_cannot_be_measured_is_a_row_that_says_so(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    group = ["+vae.norm=group", *(f"vae.{key}=32" for key in TINY if key != "latent_channels")]
    clip = ["frames=5", "sizes=16x16", "half=encode"]
    _, results = bench(*group, *clip, "mode=[whole,pieces]")
    assert [row["note"] for row in results["rows"]] == ["", "cannot stream"]
    assert (tmp_path / "plot.png").exists()

    def too_much(*_: Any) -> None:
        torch.empty(1 << 60, dtype=torch.uint8)

    monkeypatch.setattr(bench_vae.VAECase, "run", too_much)
    out, results = bench(*clip, "mode=whole")
    assert [row["note"] for row in results["rows"]] == ["out of memory"]
    assert json.loads(out.splitlines()[-1])["not_measured"] == 1
    assert not (tmp_path / "plot.png").exists()

    def broken(*_: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(bench_vae.VAECase, "run", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        bench(*clip, "mode=whole")


def test_the_best_run_counts_and_the_first_does_not(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([9.0, 3.0, 2.0, 4.0])
    monkeypatch.setattr(bench_case, "_seconds", lambda *_: next(seconds))
    _, results = bench("frames=5", "sizes=16x16", "half=encode", "mode=whole", "repeats=3")
    (row,) = results["rows"]
    assert (row["first_seconds"], row["all_seconds"], row["seconds"]) == (9.0, [3.0, 2.0, 4.0], 2.0)


@pytest.mark.parametrize(("frames", "chunk", "lengths"), [(1, 1, [1]), (9, 1, [2, 1]), (29, 2, [3, 2, 2, 1])])
def test_a_stream_is_as_long_as_the_clip(
    frames: int, chunk: int, lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = WFVAE(**TINY)
    fed: dict[str, list[int]] = {}

    def fake(name: str) -> Callable[..., Iterator[None]]:
        def stream(_: WFVAE, pieces: Iterator[torch.Tensor], *__: Any) -> Iterator[None]:
            fed[name] = [piece.shape[2] for piece in pieces]
            yield

        return stream

    for half in ("encode", "decode"):
        monkeypatch.setattr(bench_vae, f"stream_{half}", fake(half))
        case = bench_vae.VAECase("", half, frames, 16, 16, "stream", chunk, None, "32-true", False, flops=0)
        case.run(vae, case.inputs(vae))
    assert fed["decode"] == lengths
    first, *others = lengths
    assert fed["encode"] == [1 + 4 * (first - 1), *(4 * length for length in others)]
