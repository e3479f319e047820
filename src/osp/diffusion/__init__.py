"""What a denoiser predicts and how predictions are integrated: objectives, solvers, guidance."""

from osp.diffusion.discrete import Epsilon, Velocity
from osp.diffusion.flow import Flow
from osp.diffusion.guidance import Predict, guided, guided_prediction, held_prediction
from osp.diffusion.loss import squared_error
from osp.diffusion.noise import Generators, draw_normal
from osp.diffusion.objective import Objective
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
    "guided",
    "guided_prediction",
    "held_prediction",
    "sample",
    "solvers",
    "squared_error",
]
