"""Benchmarks of plain settings and a model's configuration, without the command line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys

for name in ("hydra", "omegaconf", "lightning"):
    sys.modules[name] = None  # cannot be imported
import json
from pathlib import Path

import torch

from osp.benchmark import run, vae
from osp.benchmark.models import ModelSource
from osp.vae import WFVAE

run.matmul_peak = lambda *_: 1e11  # it takes a second
widths = {"base_channels": 4, "latent_channels": 4, "encoder_flow_channels": 4, "decoder_flow_channels": 4}
source = ModelSource("tiny", json.dumps(widths), lambda settings: WFVAE(**settings))
settings = {"half": "encode", "mode": ["whole", "pieces"], "precision": "32-true", "compile": False}
settings |= {"sizes": "16x16", "frames": 5, "chunk_frames": None, "tiling": None}
cases, model = vae.cases(settings, source)
torch.set_num_threads(2)
how = run.Conditions(torch.device("cpu"), repeats=1, threads=1, isolate=False)
run.run_benchmark(vae.VAE, {"model": model}, cases, how, Path(sys.argv[1]))
"""


@pytest.mark.timeout(200)
def test_a_benchmark_needs_neither_hydra_nor_lightning(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], check=True, timeout=180)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["model"].startswith("tiny with random weights, ")
    assert (results["threads"], results["device"].rpartition(", ")[2]) == (1, "1 thread")
    assert [row["mode"] for row in results["rows"]] == ["whole", "pieces"]
    assert all(row["seconds"] > 0 for row in results["rows"])
    assert {path.name for path in tmp_path.iterdir()} == {"table.md", "results.json", "results.csv", "plot.png"}
