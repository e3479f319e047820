"""The processes that other tests here take."""

import pytest
import torch
import torch.distributed as dist
from processes import Processes


def sum_of_ranks(offset: float) -> float:
    """All ranks, added up by the group."""
    value = torch.tensor(dist.get_rank() + offset)
    dist.all_reduce(value)
    return float(value)


def fails_at_one() -> None:
    """An error in one process, for which the others wait."""
    if dist.get_rank() == 1:
        raise ValueError("rank one will not")
    dist.barrier()


def test_processes_answer_by_rank_in_groups_of_any_size(processes: Processes) -> None:
    assert processes.run(2, sum_of_ranks, 0.5) == [2.0, 2.0]
    assert processes.run(3, sum_of_ranks, 0.0) == [3.0, 3.0, 3.0]


def test_an_error_of_one_process_is_told_and_others_go_on_after_it(processes: Processes) -> None:
    with pytest.raises(AssertionError, match="rank one will not"):
        processes.run(2, fails_at_one)
    assert processes.run(2, sum_of_ranks, 0.0) == [1.0, 1.0]
