"""The solver that a configuration asks for."""

from omegaconf import DictConfig, OmegaConf

from osp.diffusion import Objective, Solver
from osp.sampling import default_solver


def build_solver(cfg: DictConfig, objective: Objective) -> Solver:
    """The solver of a configuration `solver`, for an objective; where that says null it is as by default."""
    usual = default_solver(objective)
    options = OmegaConf.to_container(cfg.options)
    assert isinstance(options, dict)
    steps = usual.steps if cfg.steps is None else cfg.steps
    return Solver(objective, cfg.name or usual.name, steps, cfg.shift, {str(key): options[key] for key in options})
