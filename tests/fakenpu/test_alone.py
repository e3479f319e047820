"""The plugin without OSP: its folder copied under another name, in processes that cannot import OSP."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PLUGIN = Path(__file__).parents[2] / "src" / "osp" / "devices" / "npu"

PREPARED = """
import sys  # OSP may be installed to be edited
sys.path[:] = [path for path in sys.path if not path.rstrip("/").endswith("src")]
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
import torch
from torch import library
if not hasattr(torch.ops.torchvision, "nms"):  # as torchvision for CUDA needs beside torch for the CPU
    missing = library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        missing.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
try:
    import osp.devices
except ImportError:
    pass
else:
    raise SystemExit("OSP can be imported here")
import ascend
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="npu")
"""

ONE = (
    PREPARED
    + """
class Model(BoringModel):
    def on_train_end(self):
        print(self.device, Trainer.__module__)

before = BoringModel().layer.weight.detach().clone()
model = Model()
Trainer(**quiet, devices=1, strategy="npu", precision="bf16-mixed", max_steps=4, default_root_dir="run").fit(model)
assert not torch.equal(before, model.layer.weight.detach().cpu())
resumed = Model()
path = Trainer(**quiet, devices=1, strategy="npu", max_steps=6, default_root_dir="run")
import glob
path.fit(resumed, ckpt_path=glob.glob("run/checkpoints/*.ckpt")[0], weights_only=True)
print("steps", path.global_step)
"""
)

SHARDED = (
    PREPARED
    + """
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

class Model(BoringModel):
    def configure_model(self):
        fully_shard(self, mesh=self.device_mesh["data_parallel"])
    def on_train_end(self):
        weight = self.layer.weight
        about = weight.device, isinstance(weight, DTensor), weight.to_local().shape[0], self.trainer.world_size
        print(" ".join(map(str, about)) + chr(10), end="", flush=True)  # at once: two processes write to one pipe

Trainer(**quiet, devices=2, strategy="npu_fsdp2", max_steps=2, limit_val_batches=1, enable_checkpointing=False).fit(
    Model()
)
torch.distributed.destroy_process_group()  # or its threads may outlive the interpreter
"""
)


def run(folder: Path, code: str) -> list[str]:
    """The lines that a process prints that finds the copied plugin and torch-npu, and nothing of OSP."""
    shutil.copytree(PLUGIN, folder / "ascend", ignore=shutil.ignore_patterns("__pycache__"))
    script = folder / "script.py"
    script.write_text(code)
    site = Path(__file__).parent / "site"
    environment = os.environ | {"PYTHONPATH": str(site), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script.name],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        start_new_session=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_boring_model_trains_and_resumes_on_one_device_in_bfloat16(tmp_path: Path) -> None:
    lines = run(tmp_path, ONE)
    assert [line for line in lines if line.startswith(("npu", "steps"))] == [
        "npu:0 lightning.pytorch.trainer.trainer",
        "npu:0 lightning.pytorch.trainer.trainer",
        "steps 6",
    ]


@pytest.mark.parametrize("strategy", ["npu_fsdp2"])
def test_boring_model_is_sharded_over_two_devices(tmp_path: Path, strategy: str) -> None:
    lines = run(tmp_path, SHARDED)
    assert sorted(re.findall(r"npu:\d True \d \d", "\n".join(lines))) == ["npu:0 True 1 2", "npu:1 True 1 2"]
