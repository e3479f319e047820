"""How far apart attention leaves the tokens of a denoiser that is compared with others."""

from osp.denoiser import Denoiser, Grid
from osp.denoiser.patterns import Dense, average_attention_distance


def attention_distance(model: Denoiser, grid: Grid) -> float:
    """The average number of attentions from a token to another by the model's sparse blocks; 1 where all are dense.

    Dense blocks are left out of a sparse schedule: one of them would make every distance 1. Infinite where some tokens
    never hear of each other. Raises UsageError where counting would take minutes.
    """
    sparse = [pattern for pattern in model.schedule if pattern != Dense()]
    return average_attention_distance(sparse or model.schedule, grid)
