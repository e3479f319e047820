"""`osp eval`: what a VAE keeps of videos, or how well a denoiser follows its prompts."""

from collections.abc import Callable, Mapping
from typing import Any

from omegaconf import DictConfig

from osp.cli.eval_generation import generation
from osp.cli.eval_reconstruction import reconstruction
from osp.errors import UsageError

# conf/eval/target has the settings of each
TARGETS: Mapping[str, Callable[[DictConfig], dict[str, Any]]] = {
    "reconstruction": reconstruction,
    "generation": generation,
}


def run(cfg: DictConfig) -> dict[str, Any]:
    """Evaluate the target as configured; gives what counts of the results, and where they lie."""
    if cfg.target not in TARGETS:
        raise UsageError(f"target={cfg.target} is none of `osp eval`; choose {', '.join(TARGETS)}")
    return TARGETS[cfg.target](cfg)
