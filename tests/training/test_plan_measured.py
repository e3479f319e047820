"""A plan's bytes beside those of the tensors that are alive in real steps (`tools/check_plan.py` measures memory)."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from osp.devices.live import LiveBytes

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "cross, recomputed": ("denoiser.heads=4", "denoiser.stages=[{blocks: 2}]", "data.batch_size=32"),
    "VAE with discriminator": ("data.batch_size=2", "module.discriminator.width=16"),
}


@pytest.fixture
def check_plan(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The tool, as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import check_plan

    yield check_plan
    sys.modules.pop("check_plan")


@pytest.mark.filterwarnings("ignore:You called `self.log:UserWarning")
@pytest.mark.parametrize("name", SMALL)
def test_a_plan_is_what_training_takes(name: str, check_plan: Any, tmp_path: Path) -> None:
    check_plan.save_vae(tmp_path / "vae")
    vae = [f"path={tmp_path}/vae"] if "vae=pretrained" in check_plan.CONFIGURATIONS[name] else []
    overrides = [*check_plan.CONFIGURATIONS[name], *SMALL[name], *vae]
    with LiveBytes() as live:
        check_plan.train([*overrides, f"output={tmp_path}/run"], steps=2)
    assert check_plan.predicted(overrides) == pytest.approx(live.peak, rel=0.1)
