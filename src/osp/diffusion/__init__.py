"""Objectives, which say what a denoiser predicts, and solvers and guidance, which integrate its predictions."""

from osp.diffusion.discrete import Epsilon, Velocity
from osp.diffusion.flow import Flow
from osp.diffusion.guidance import Predict, guided, guided_prediction, held_prediction
from osp.diffusion.loss import squared_error
from osp.diffusion.noise import Generators, draw_normal
from osp.diffusion.objective import Objective, find_objective, register_objective
from osp.diffusion.sampling import Progress, sample
from osp.diffusion.solver import Integration, Solver, solvers

__all__ = [
    "Epsilon",
    "Flow",
    "Generators",
    "Integration",
    "Objective",
    "Predict",
    "Progress",
    "Solver",
    "Velocity",
    "draw_normal",
    "find_objective",
    "guided",
    "guided_prediction",
    "held_prediction",
    "register_objective",
    "sample",
    "solvers",
    "squared_error",
]

for _kind in (Epsilon, Velocity, Flow):
    register_objective(_kind)
