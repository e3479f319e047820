"""`osp plan` says whether a run fits, and takes the settings of `osp train`."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from osp.cli import config_folder

Osp = Callable[..., tuple[int, str, str]]
TINY = (
    "module=denoiser", "denoiser=cross_tiny", "text=words", "objective=flow_tiny", "vae=wfvae_tiny", "trainer=cpu",
    "clip.frames=5", "device=h100", "denoiser.stages=[{blocks: 2, pattern: dense}]",
)  # fmt: skip


def test_it_has_all_settings_of_training() -> None:
    plan, train = (yaml.safe_load((config_folder() / f"{verb}.yaml").read_text()) for verb in ("plan", "train"))
    assert plan["defaults"] == train["defaults"]
    own = {"device", "devices", "peak_tflops", "memory_gb", "mfu", "price"}
    assert plan.keys() - train.keys() == own
    assert {key: value for key, value in plan.items() if key not in own | {"hydra"}} == {
        key: value for key, value in train.items() if key != "hydra"
    }


def test_a_run_that_fits_ends_with_code_0(osp: Osp) -> None:
    code, out, said = osp("plan", *TINY, "price=2")
    assert code == 0, said
    found = json.loads(out.splitlines()[-1])
    assert found["fits"]
    assert found["peak"] == max(found["phases"].values()) < found["available"]
    assert found["parts"]["optimiser"] == 2 * found["parts"]["weights"]
    assert found["cost"] == pytest.approx(2 * found["device_hours"])
    assert "kept for the backward pass" in said


def test_a_run_that_does_not_fit_ends_with_code_1_and_what_to_change(osp: Osp) -> None:
    code, out, said = osp("plan", *TINY, "memory_gb=0.085", "devices=8")
    assert code == 1
    found = json.loads(out.splitlines()[-1])
    assert not found["fits"]
    assert found["advice"][0]["settings"] == ["module.recompute_every=1"]
    assert found["advice"][1]["settings"] == ["module.recompute_every=1", "trainer=fsdp"]
    assert "does not fit: each device needs" in said.splitlines()[-1]


def test_a_device_is_read_from_a_file(osp: Osp, tmp_path: Path) -> None:
    numbers = {"name": "mine", "memory_gb": 1, "bf16_tflops": 1, "fp32_tflops": 1, "bandwidth_gbs": 1, "link_gbs": 1}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(numbers))
    code, out, _ = osp("plan", *TINY, f"device={tmp_path / 'mine.yaml'}")
    assert (code, json.loads(out.splitlines()[-1])["device"]) == (0, "mine")
    code, _, said = osp("plan", *TINY, "device=h1000")
    assert code == 2
    assert "device=h1000: is not known; choose h100" in said
