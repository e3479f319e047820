"""What to sample with where nobody says: few steps of a solver that does well with them."""

from osp.diffusion import Flow, Objective, Solver

GUIDANCE = 4.0


def default_solver(objective: Objective) -> Solver:
    """Euler in 30 steps for a flow, DPM-Solver++ (arXiv 2211.01095) in 25 for what is discrete.

    What published models were published with stands in `conf/solver`.
    """
    return Solver(objective, "euler", 30) if isinstance(objective, Flow) else Solver(objective, "dpm++", 25)
