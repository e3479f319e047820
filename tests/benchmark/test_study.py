"""The study of sparse against dense attention: its variants, and what it makes of finished runs."""

import csv
import importlib.util
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from osp.benchmark import study_costs, study_results, study_runs
from osp.benchmark.study import Study, run_study
from osp.denoiser import CrossTransformer, Denoiser, Grid, Stage
from osp.denoiser.patterns import Spatial, register_pattern
from osp.errors import DataError, UsageError

TOOL = Path(__file__).resolve().parents[2] / "tools" / "study.py"
FEATURES = Path("/data/a = {b}")


@pytest.fixture(scope="module")
def composed() -> Callable[..., dict[str, Any]]:
    """As the tool composes the settings of `osp train`."""
    spec = importlib.util.spec_from_file_location("study", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.composed


@pytest.fixture(scope="module")
def models(composed: Callable[..., dict[str, Any]]) -> dict[str, Denoiser]:
    """Each variant as `osp train` would build it, without memory."""
    made = {}
    for name, variant in study_runs.variants(study_runs.BLOCKS).items():
        cfg = composed(study_runs.train_overrides(variant, FEATURES))
        assert cfg["data"]["train"]["path"] == str(FEATURES)
        with torch.device("meta"):
            made[name] = instantiate(cfg["denoiser"])
        assert made[name].stages == variant.stages
    return made


def test_variants_have_the_same_width_and_number_of_blocks(models: dict[str, Denoiser]) -> None:
    assert set(models) == set(study_runs.NAMES)
    assert len({(len(model.blocks), model.config.width) for model in models.values()}) == 1
    assert {name for name, model in models.items() if model.video_skips} == {"suv", "dense_u"}  # type: ignore[arg-type]


def test_a_variant_differs_from_its_reference_only_in_attention(models: dict[str, Denoiser]) -> None:
    for name, variant in study_runs.variants(6).items():
        shapes = [
            {key: value.shape for key, value in models[one].state_dict().items()} for one in (name, variant.reference)
        ]
        assert shapes[0] == shapes[1]
    assert len(models["dense_u"].video_skips) == 2  # type: ignore[arg-type]


def test_patterns_fill_the_grid_without_padding(models: dict[str, Denoiser]) -> None:
    study_costs.check_filling(models, Grid(5, 4, 4))
    with pytest.raises(UsageError, match=r"skiparse_k4: .*k=4.* 32 places for 20 tokens"):
        study_costs.check_filling({"skiparse_k4": models["skiparse_k4"]}, Grid(5, 2, 2))


@pytest.mark.parametrize("blocks", [5, 6, 7, 8, 13])
def test_any_number_of_blocks_makes_a_u(blocks: int) -> None:
    for variant in study_runs.variants(blocks).values():
        assert sum(stage.blocks for stage in variant.stages) == blocks
    u = study_runs.variants(blocks)["suv"].stages
    assert [stage.blocks for stage in u] == [stage.blocks for stage in reversed(u)]
    with pytest.raises(UsageError, match="4 blocks"):
        study_runs.variants(4)


def test_the_u_of_eight_blocks_is_the_configured_one(composed: Callable[..., dict[str, Any]]) -> None:
    configured = composed(["denoiser=joint_tiny"])["denoiser"]["stages"]
    assert study_runs.variants(8)["suv"].stages == tuple(Stage(**stage) for stage in configured)


def test_costs_are_those_of_a_step() -> None:
    settings: dict[str, Any] = {"channels": 4, "out_channels": 4, "heads": 1, "head_dim": 24, "text_channels": 8}
    sparse = [Stage(1), Stage(2, "skiparse", 2), Stage(1)]
    models = {"dense": CrossTransformer([Stage(4)], **settings), "skiparse_k2": CrossTransformer(sparse, **settings)}
    inputs = {"latent": torch.randn(2, 4, 2, 4, 4), "time": torch.rand(2), "text": torch.randn(2, 3, 8)}
    seconds = study_costs.time_steps(models, inputs, torch.device("cpu"), None, rounds=3)
    assert [len(values) for values in seconds.values()] == [3, 3]
    assert min(map(min, seconds.values())) > 0
    cost = study_costs.costs(models, inputs, {"dense": [3.0, 9.0, 4.0], "skiparse_k2": [2.0, 1.0, 2.0]})
    assert cost["dense"]["step_seconds"] == 4
    assert cost["dense"]["attention_distance"] == 1
    assert 1 < cost["skiparse_k2"]["attention_distance"] < 2  # its dense blocks are not counted
    assert cost["skiparse_k2"]["flops"] < cost["dense"]["flops"]
    assert cost["skiparse_k2"]["parameters"] == cost["dense"]["parameters"]


def leave(folder: Path, loss: float, right: int) -> None:
    """What a trained and judged run has in its folder."""
    (folder / "eval").mkdir(parents=True)
    rates = {name: {"all": {"rate": n / 64, "count": 64}} for name, n in (("generated", right), ("vae", 62))}
    (folder / "result.json").write_text(json.dumps({"steps": 10, "val/loss": loss}))
    metrics = {"accuracy": rates | {"chance": {"all": 1 / 560}}, "settings": {"prompts": 64, "input": "/held out"}}
    (folder / "eval" / "metrics.json").write_text(json.dumps(metrics))


def test_the_table_of_finished_runs(tmp_path: Path) -> None:
    made_up = {
        "dense": [(0.50, 32), (0.52, 40)],
        "skiparse_k2": [(0.51, 32), (0.55, 36)],
        "suv": [(0.4, 64), (0.4, 64)],
    }
    folders = {name: [tmp_path / name / str(seed) for seed in range(2)] for name in made_up}
    for name, runs in made_up.items():
        for folder, outcome in zip(folders[name], runs, strict=True):
            leave(folder, *outcome)
    cost = {
        name: {"parameters": 1234567, "attention_distance": 1.25, "step_seconds": seconds, "flops": flops}
        for name, seconds, flops in (
            *(("dense", 0.2, 100), ("skiparse_k2", 0.15, 90)),
            *(("suv", 0.5, 300), ("dense_u", 1.0, 400)),
        )
    }
    chosen = [study_runs.variants(6)[name] for name in made_up]
    rows = {row["variant"]: row for row in study_results.make_rows(chosen, study_results.collect(folders), cost)}

    sparse = rows["skiparse_k2"]
    assert (sparse["time_ratio"], sparse["flops_ratio"]) == pytest.approx((0.75, 0.9))
    assert (sparse["val_loss"], sparse["val_loss_sd"]) == pytest.approx((0.53, 0.04 / math.sqrt(2)))
    assert (sparse["accuracy"], sparse["accuracy_sd"]) == pytest.approx((34 / 64, 4 / 64 / math.sqrt(2)))
    # Seed by seed: +0.01 and +0.03
    assert (sparse["val_loss_change"], sparse["val_loss_change_sd"]) == pytest.approx((0.02, 0.02 / math.sqrt(2)))
    assert rows["dense"]["val_loss_change"] is None
    assert rows["suv"]["time_ratio"] == pytest.approx(0.5)  # to the dense one, although that was not trained
    assert rows["suv"]["accuracy_change"] is None

    output = tmp_path / "out"
    output.mkdir()
    study_results.write(output, {"rows": list(rows.values()), "notes": ["10 steps"]})
    table = re.sub(" +", " ", (output / "table.md").read_text())  # which is aligned
    assert "| skiparse_k2 | 1,234,567 | 1.25 | 0.5300 ± 0.0283 | +0.0200 ± 0.0141 | 53.1 ± 4.4 |" in table
    assert table.endswith("\n\n- 10 steps\n")
    with (output / "results.csv").open() as file:
        read = {row["variant"]: row for row in csv.DictReader(file)}
    assert float(read["suv"]["accuracy"]) == 1
    assert read["dense"]["val_loss_change"] == ""
    assert json.loads((output / "results.json").read_text())["rows"][0]["runs"][1]["val_loss"] == 0.52
    figure = study_results.draw(list(rows.values()))
    assert [len(axes.containers) for axes in figure.axes] == [3, 3]  # a point with an error bar each
    assert {text.get_text() for text in figure.axes[0].texts} == set(made_up)
    assert (output / "plot.png").read_bytes().startswith(b"\x89PNG")

    (folders["suv"][1] / "eval" / "metrics.json").unlink()
    with pytest.raises(DataError, match=r"suv/1/eval/metrics\.json"):
        study_results.collect(folders)


def test_one_seed_has_no_deviation() -> None:
    run = {"val_loss": 0.5, "accuracy": 0.25, "chance": 0.0, "reconstructions": 1.0}
    cost = {"dense": {"parameters": 1, "attention_distance": 1.0, "step_seconds": 1.0, "flops": 1}}
    (row,) = study_results.make_rows([study_runs.variants(6)["dense"]], {"dense": [run]}, cost)
    assert row["accuracy_sd"] is None
    table = re.sub(" +", " ", study_results.markdown({"rows": [row], "notes": []}))
    assert "| dense | 1 | 1.00 | 0.5000 | - | 25.0 | - | 1.0000 | 1.00 | 1.00 |" in table
    study_results.draw([row])


def test_finished_runs_are_kept_and_others_go_on(composed: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    def run(steps: int, prompts: int = 64, **others: Any) -> Any:
        train = [f"experiment={study_runs.EXPERIMENT}", f"trainer.max_steps={steps}", "data.train.path=/data"]
        train += [f"{key}={value}" for key, value in others.items()]
        return study_runs.Run("dense", 0, tmp_path / "0", train, steps, ("input='/held out'", f"prompts={prompts}"))

    assert [command[0] for command in run(10).commands()] == ["train", "eval"]
    leave(tmp_path / "0", 0.5, 32)
    assert run(10).commands() == []
    assert [command[0] for command in run(10, prompts=32).commands()] == ["eval"]

    def check(asked: Any) -> None:
        asked.check(composed(asked.overrides))

    check(run(10))
    OmegaConf.save(composed(run(10).overrides), tmp_path / "0" / "config.yaml")
    check(run(10))
    with pytest.raises(UsageError, match="=10, not 20"):
        check(run(20))
    with pytest.raises(UsageError, match=r"seed=0, not 1"):
        check(run(10, seed=1))

    # Trained further since: it is judged again.
    later = (tmp_path / "0" / "eval" / "metrics.json").stat().st_mtime + 5
    os.utime(tmp_path / "0" / "result.json", (later, later))
    assert [command[0] for command in run(10).commands()] == ["eval"]


def test_any_denoiser_and_any_registered_pattern_make_variants(composed: Callable[..., dict[str, Any]]) -> None:
    register_pattern("study_frames", Spatial)
    known = study_runs.variants(6, "cross_tiny", has_skips=False, names=["dense", "study_frames", "skiparse_2d_k2"])
    assert not {"suv", "dense_u"} & set(known)
    assert known["skiparse_2d_k2"].stages == (Stage(1), Stage(4, "skiparse_2d", 2), Stage(1))
    variant = known["study_frames"]
    assert (variant.reference, variant.stages[1]) == ("dense", Stage(4, "study_frames"))
    denoiser = composed(study_runs.train_overrides(variant, FEATURES))["denoiser"]
    assert denoiser["_target_"] == "osp.denoiser.CrossTransformer"
    assert denoiser["stages"][1] == {"blocks": 4, "pattern": "study_frames", "k": 1}
    for name in ("suv", "unheard", "unheard_k2", "skiparse_kx"):
        with pytest.raises(UsageError, match=f"--variants={name}: is not known; choose .*study_frames.*PATTERN_kN"):
            study_runs.variants(6, "cross_tiny", has_skips=False, names=[name])


def test_a_study_of_a_denoiser_without_long_skips_has_no_sparse_u(composed: Callable[..., dict[str, Any]]) -> None:
    none = Path("/none")
    asked = Study(none, none, none, none, compose=composed, build=instantiate, denoiser="cross_tiny")
    with pytest.raises(UsageError, match="--variants=suv: is not known"):
        run_study(replace(asked, variants=["suv"]))
    with pytest.raises(DataError, match="/none"):  # where the features should lie
        run_study(asked)
