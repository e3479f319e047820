"""`osp bench`: how fast a part runs, what share of the device's best rate that is, and how much memory it takes."""

import json
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from osp.benchmark.case import Target
from osp.benchmark.denoiser import DENOISER
from osp.benchmark.models import ModelSource
from osp.benchmark.results import markdown
from osp.benchmark.run import Conditions, run_benchmark
from osp.benchmark.vae import VAE
from osp.checks import check_choice, check_number
from osp.cli.plain import instantiate, plain
from osp.devices import choose_device
from osp.errors import UsageError

TARGETS: dict[str, Target] = {"vae": VAE, "denoiser": DENOISER}  # conf/bench/target has the settings of each
# The key that says where weights are, the choice of a model that reads it, and the kind of its value.
_SOURCES = (("checkpoint", "trained", "FILE of `osp train`"), ("path", "pretrained", "FOLDER"))


def run(cfg: DictConfig) -> dict[str, Any]:
    """Measure as configured and print the table; gives where it lies, as `run_benchmark` writes it.

    Raises UsageError, before anything is measured, for settings that make no sense.
    """
    check_number("repeats", cfg.repeats, 1, whole=True)
    check_number("threads", cfg.threads, 1, whole=True, null="torch's choice")
    check_choice("isolate", cfg.isolate, (None, True, False))
    check_choice("target", cfg.target, TARGETS)
    target, device = TARGETS[cfg.target], choose_device(cfg.device)
    source = _source(cfg, cfg.target)  # the group of models is called like the target
    cases, model = target.cases(plain(cfg), source)
    output = Path(HydraConfig.get().runtime.output_dir)
    conditions = Conditions(device, cfg.repeats, cfg.threads, cfg.isolate)
    results = run_benchmark(target, {"target": cfg.target, "model": model}, cases, conditions, output)
    print(markdown(results))
    return {
        "output": str(output),
        **{key: results[key] for key in ("target", "model", "device", "matmul_flops")},
        "rows": len(cases),
        "not_measured": sum(bool(row["note"]) for row in results["rows"]),
    }


def _source(cfg: DictConfig, group: str) -> ModelSource:
    """The model that `group` configures.

    Raises UsageError where it needs a setting that is missing.
    """
    choice = str(HydraConfig.get().runtime.choices[group])
    for key, reader, what in _SOURCES:
        if key in cfg and cfg[key] is None and choice == reader:
            raise UsageError(f"{group}={choice} needs {key}={what}")
    if missing := sorted(OmegaConf.missing_keys(cfg[group])):
        raise UsageError(f"{group}={choice} needs {' and '.join(f'{key}=...' for key in missing)}")
    return ModelSource(choice, json.dumps(plain(cfg[group])), instantiate)
