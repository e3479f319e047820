"""The solvers that sampling uses by default: few steps of a solver that does well with them."""

from osp.diffusion import Flow, Objective, Solver
from osp.errors import UsageError

GUIDANCE = 4.0


def default_solver(objective: Objective) -> Solver:
    """Euler in 30 steps for a flow, DPM-Solver++ (arXiv 2211.01095) in 25 for what is discrete.

    What published models were published with stands in `conf/solver`.
    """
    return Solver(objective, "euler", 30) if isinstance(objective, Flow) else Solver(objective, "dpm++", 25)


def named_solver(objective: Objective, solver: Solver | str | None) -> Solver:
    """A solver itself, the one of that name in the usual number of steps, or `default_solver` for None.

    Raises UsageError for a name that no solver of the objective has, and for what is neither.
    """
    if solver is None:
        return default_solver(objective)
    if isinstance(solver, str):
        return Solver(objective, solver, default_solver(objective).steps)
    if not isinstance(solver, Solver):
        raise UsageError(f"solver={solver}: must be a Solver, or the name of one")
    return solver
