"""`osp bench`: every row that was asked for, as table, files and plot."""

import csv
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate

from osp.benchmark import case as bench_case
from osp.benchmark import denoiser as bench_denoiser
from osp.benchmark import vae as bench_vae
from osp.benchmark.models import ModelSource
from osp.cli import config_folder
from osp.cli import eval as eval_verb
from osp.cli.bench import TARGETS
from osp.denoiser import CrossTransformer, Denoiser, JointTransformer, Stage
from osp.denoiser.flops import denoiser_flops
from osp.vae import WFVAE
from osp.weights.pretrained import save_pretrained

Osp = Callable[..., tuple[int, str, str]]
TINY = {"base_channels": 4, "latent_channels": 4, "encoder_flow_channels": 4, "decoder_flow_channels": 4}
# Small enough for a test, with every kind of attention
SPARSE = "denoiser.stages=[{blocks:1},{blocks:2,pattern:skiparse,k:2},{blocks:1}]"
DENOISER = ["target=denoiser", SPARSE, "denoiser.heads=2", "denoiser.text_channels=8", "text_tokens=3"]
JOINT = ["denoiser=joint_tiny", "denoiser.head_dim=16", "denoiser.pooled_channels=4"]
CROSS = ["denoiser=cross_tiny", "denoiser.head_dim=12"]
Bench = Callable[..., tuple[str, dict[str, Any]]]


@pytest.fixture
def command(tmp_path: Path, osp: Osp, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Runs `osp bench`; gives stdout and results.json."""
    monkeypatch.setattr("osp.benchmark.run.matmul_peak", lambda *_: 1e11)  # it has its own test, and takes a second

    def run(*settings: str) -> tuple[str, dict[str, Any]]:
        common = ["repeats=1", "device=cpu", "isolate=false", f"output={tmp_path}"]
        code, out, said = osp("bench", *common, *settings)
        assert code == 0, said
        return out, json.loads((tmp_path / "results.json").read_text())

    return run


@pytest.fixture
def bench(command: Bench) -> Bench:
    """`osp bench` on a tiny VAE."""
    return lambda *settings: command(
        "vae=wfvae_tiny", *(f"vae.{key}={value}" for key, value in TINY.items()), *settings
    )


@pytest.fixture
def small() -> JointTransformer:
    """A denoiser of two kinds of blocks."""
    torch.manual_seed(0)
    widths = {"heads": 2, "head_dim": 16, "text_channels": 8, "pooled_channels": 4, "modulation_width": 8}
    model = JointTransformer(stages=[Stage(1), Stage(2, "skiparse", 2), Stage(1)], channels=4, out_channels=4, **widths)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


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
        table = list(csv.DictReader(file))
    assert [float(row["seconds"]) for row in table] == [row["seconds"] for row in rows]
    assert not {"flops_ratio", "tokens_per_second"} & set(table[0])  # as all do the same work, and no tokens
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


@pytest.mark.parametrize("model", [CROSS, JOINT], ids=["cross", "joint"])
def test_a_denoiser_is_measured_sparse_and_dense(command: Bench, model: list[str], tmp_path: Path) -> None:
    out, results = command(*DENOISER, *model, "latents=[1x4x4,2x4x8]", "batch=2", "recompute_every=[0,1]")
    rows = results["rows"]
    hows = [("forward", None), ("train", None), ("train", 1)]
    keys = ("latent", "tokens", "pass", "recompute_every", "schedule")
    assert [tuple(row[key] for key in keys) for row in rows] == [
        (latent, tokens, *how, schedule)
        for latent, tokens in (("1x4x4", 4), ("2x4x8", 16))
        for how in hows
        for schedule in ("sparse", "dense")
    ]
    for sparse, dense in zip(rows[::2], rows[1::2], strict=True):
        assert not sparse["note"] + dense["note"]
        assert dense["time_ratio"] == dense["flops_ratio"] == dense["attention_distance"] == 1
        assert 1 < sparse["attention_distance"] < 2  # of its sparse blocks
        assert sparse["time_ratio"] == pytest.approx(sparse["seconds"] / dense["seconds"])
        assert sparse["flops_ratio"] == sparse["flops"] / dense["flops"] != 1
        assert sparse["tokens_per_second"] == pytest.approx(2 * sparse["tokens"] / sparse["seconds"])
    forward, train, checkpointed = rows[:6:2]
    assert 2.5 * forward["flops"] < train["flops"] < 3.5 * forward["flops"]
    assert train["flops"] == checkpointed["flops"]  # nominal
    assert "text tokens 3, batch 2" in out
    assert "| FLOP ratio |" in out
    assert "| attention distance |" in out
    with open(tmp_path / "results.csv") as file:
        assert [float(row["flops_ratio"]) for row in csv.DictReader(file)] == [row["flops_ratio"] for row in rows]
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_ratios_are_to_the_dense_row_of_the_same_pass(command: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([9.0, 3.0, 9.0, 4.0, 9.0, 6.0, 9.0, 12.0])  # the first of each row does not count
    monkeypatch.setattr(bench_case, "_seconds", lambda *_: next(seconds))
    _, results = command(*DENOISER, *CROSS, "latents=2x4x8")
    assert [row["time_ratio"] for row in results["rows"]] == [0.75, 1, 0.5, 1]
    with torch.device("meta"):
        stages = [Stage(1), Stage(2, "skiparse", 2), Stage(1)]
        widths = {"heads": 2, "head_dim": 12, "text_channels": 8, "channels": 16, "out_channels": 16}
        models = CrossTransformer(stages=stages, **widths), CrossTransformer(stages=[Stage(4)], **widths)
    sparse, dense = (denoiser_flops(model, (2, 4, 8), 3) for model in models)
    assert [row["flops"] for row in results["rows"]] == [
        *(sparse.forward, dense.forward),
        *(sparse.forward + sparse.backward, dense.forward + dense.backward),
    ]


def test_a_dense_denoiser_is_one_row(command: Bench) -> None:
    out, results = command(*DENOISER, *CROSS, "denoiser.stages=[{blocks:2}]", "latents=1x4x4", "pass=forward")
    assert [row["schedule"] for row in results["rows"]] == ["dense"]
    assert "| FLOP ratio |" not in out


def test_a_denoiser_of_a_folder_in_half_precision(command: Bench, small: JointTransformer, tmp_path: Path) -> None:
    save_pretrained(small, tmp_path / "ours")
    given = ["denoiser=pretrained", f"path={tmp_path / 'ours'}", "latents=1x4x4", "text_tokens=3"]
    _, results = command("target=denoiser", *given, "precision=[bf16-true,bf16-mixed]", "pass=train")
    assert [row["note"] for row in results["rows"]] == [""] * 4
    assert results["model"].startswith(f"JointTransformer of {tmp_path / 'ours'}, ")
    _, alone = command("target=denoiser", *given, "precision=bf16-true", "pass=train", "schedule=dense", "isolate=true")
    assert [row["note"] for row in alone["rows"]] == [""]


def test_a_denoiser_is_made_in_the_precision_and_place_it_runs_in(monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.dumps({"_target_": "osp.denoiser.CrossTransformer", "heads": 2, "head_dim": 12})
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *_: self)  # so that nothing moves later
    made = bench_denoiser._build(ModelSource("cross", config, instantiate), torch.device("meta"), torch.bfloat16)
    assert {(parameter.device.type, parameter.dtype) for parameter in made.parameters()} == {("meta", torch.bfloat16)}
    assert torch.get_default_dtype() == torch.float32


def test_the_dense_denoiser_is_the_same_but_for_its_attention(small: JointTransformer) -> None:
    dense = bench_denoiser._scheduled(small, "dense")
    settings = small.settings | {"stages": [Stage(1), Stage(2), Stage(1)]}
    assert dense.settings == JointTransformer(**settings).settings
    pairs = zip(small.parameters(), dense.parameters(), strict=True)
    assert all(a.data_ptr() == b.data_ptr() for a, b in pairs)
    inputs = bench_denoiser.DenoiserCase("", (2, 4, 8), 3, 1, "forward", "dense", "32-true", False, 0, 16, 0).inputs(
        small
    )
    with torch.no_grad():
        as_it_was = bench_denoiser._scheduled(small, "sparse")(**inputs)
        assert torch.equal(as_it_was, small(**inputs))
        assert not torch.allclose(as_it_was, dense(**inputs))


def test_training_reaches_every_weight_and_leaves_no_gradients(
    small: JointTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = bench_denoiser.DenoiserCase("", (1, 4, 4), 3, 2, "train", "sparse", "32-true", False, 0, 4, 0)
    reached: list[bool] = []
    clear = Denoiser.zero_grad

    def look(model: Denoiser) -> None:
        reached.extend(parameter.grad is not None for parameter in model.parameters())
        clear(model)

    monkeypatch.setattr(Denoiser, "zero_grad", look)
    case.run(small, case.inputs(small))
    assert all(reached)
    assert len(reached) == len(list(small.parameters()))
    assert all(parameter.grad is None for parameter in small.parameters())


def test_every_target_has_its_settings() -> None:
    for verb, targets in (("bench", TARGETS), ("eval", eval_verb.TARGETS)):
        assert {path.stem for path in (config_folder() / verb / "target").glob("*.yaml")} == {*targets}


WRONG = [
    (["latents=8x8"], "latents=8x8: must be FRAMESxHEIGHTxWIDTH, for example 8x64x64"),
    (["latents=[1x4x4,1x3x4]"], "latent height 3 is no multiple of the patch size 2"),
    (["latents=0x4x4"], "latents=0x4x4: must be FRAMES"),
    (["text_tokens=0"], "text_tokens=0: must be a whole number of at least 1"),
    (["batch=all"], "batch=all: must be a whole number of at least 1"),
    (["pass=back"], "pass=back: is not known; choose forward or train"),
    (["schedule=random"], "schedule=random: is not known; choose sparse or dense"),
    (["denoiser=opensora_v12", "schedule=sparse"], "all blocks of this denoiser are dense"),
    (["recompute_every=-1"], "recompute_every=-1: must be a whole number of at least 0"),
    (["compile=[]"], r"compile=\[\]: leaves nothing"),
    (["denoiser.head_dim=15"], "head_dim=15"),
    (["half=decode"], "half: `osp bench` has no such setting here"),  # a setting of another target
    (["vae=wfvae_tiny"], "vae: `osp bench` has no such setting here"),
    (["denoiser=pretrained"], "denoiser=pretrained needs path=FOLDER"),
    (["denoiser=published"], r"denoiser=published needs denoiser\.kind=\.\.\. and denoiser\.source="),
    (["path=x"], "path=x: nothing reads it here; it is read with denoiser=pretrained"),
    (["denoiser=pretrained", "path={vae}"], "denoiser is a WFVAE, which is none; give weights of a denoiser"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG)
def test_a_wrong_setting_of_a_denoiser_is_told_in_one_line(
    settings: list[str],
    message: str,
    tmp_path: Path,
    osp: Osp,
) -> None:
    if "path={vae}" in settings:
        save_pretrained(WFVAE(**TINY), tmp_path / "vae")
    settings = [setting.format(vae=tmp_path / "vae") for setting in settings]
    code, out, said = osp("bench", "target=denoiser", "device=cpu", *settings)
    assert code == 2
    assert re.search(message, said), said
    assert "\n" not in said
    assert not out
