"""Checkpoints that many processes write, each its own rows, and any number of processes read."""

from pathlib import Path

import torch
import torch.distributed as dist
from processes import Processes
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from osp.parallel.pieces import fill, is_finite_here, is_sharded, read_like
from osp.parallel.shards import whole
from osp.training.sharded import checkpoint_of, entries_of, parameter_names, pieces_of
from osp.weights.sharded import open_sharded, write_index, write_shard


def model(replicas: int, *, fills: float | None = None) -> nn.Module:
    """Sharded over all processes, in so many copies; 7 and 3 rows divide by nothing here."""
    torch.manual_seed(3)
    made = nn.Sequential(nn.Linear(4, 7), nn.Linear(7, 3), nn.BatchNorm1d(3))
    if fills is not None:
        for value in made.state_dict().values():
            value.fill_(fills)
    sizes = (replicas, dist.get_world_size() // replicas)
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "shard"))
    fully_shard(made, mesh=mesh if replicas > 1 else mesh["shard"])
    return made


def trained(made: nn.Module) -> torch.optim.AdamW:
    """After a step on the same clips in all processes, which all take."""
    optimizer = torch.optim.AdamW(made.parameters(), 0.1)
    torch.manual_seed(4)
    made(torch.randn(5, 4)).square().mean().backward()
    optimizer.step()
    return optimizer


def write(folder: str, replicas: int) -> dict[str, Tensor]:
    """Write it; gives the whole weights and the whole state of the optimiser."""
    made = model(replicas)
    optimizer = trained(made)
    checkpoint = {
        "global_step": 12,
        "loops": {"fit_loop": {"done": 3}},
        "score": float("inf"),
        "state_dict": {**made.state_dict(), "clipping._extra_state": {"mean": 0.1}},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [object()],
    }
    rank, ranks = dist.get_rank(), dist.get_world_size()
    write_shard(Path(folder), rank, pieces_of(checkpoint, parameter_names(made, [optimizer]), rank == 0))
    dist.barrier()
    if rank == 0:
        write_index(Path(folder), ranks, entries_of(checkpoint))
    moments = {f"exp_avg {name}": optimizer.state[one]["exp_avg"] for name, one in made.named_parameters()}
    return {key: whole(value) for key, value in (made.state_dict() | moments).items()}


def read(folder: str, replicas: int) -> dict[str, Tensor]:
    """What `write` gave, from the folder, by other processes; each reads what it holds."""
    made = model(replicas, fills=0.0)
    checkpoint = checkpoint_of(open_sharded(Path(folder)))
    for key, value in made.state_dict().items():
        fill(value, checkpoint["state_dict"][key])
        assert is_finite_here(value)
    (state,) = checkpoint["optimizer_states"]
    moments = {
        f"exp_avg {name}": read_like(one, state["state"][name]["exp_avg"]) for name, one in made.named_parameters()
    }
    assert all(map(is_sharded, moments.values()))
    return {key: whole(value) for key, value in (made.state_dict() | moments).items()}


def test_any_number_of_processes_reads_what_any_other_number_has_written(processes: Processes, tmp_path: Path) -> None:
    for ranks, replicas in ((3, 1), (4, 2), (1, 1)):
        folder = tmp_path / f"{ranks}-{replicas}"
        folder.mkdir()
        written = processes.run(ranks, write, str(folder), replicas)[0]
        assert len(list(folder.iterdir())) == ranks + 1
        for readers, copies in ((2, 1), (4, 1), (4, 2)):
            for found in processes.run(readers, read, str(folder), copies):
                assert found.keys() == written.keys()
                assert all(torch.equal(found[key], value) for key, value in written.items())


def test_a_process_alone_reads_what_four_have_written(processes: Processes, tmp_path: Path) -> None:
    written = processes.run(4, write, str(tmp_path), 1)[0]
    checkpoint = checkpoint_of(open_sharded(tmp_path))
    assert checkpoint["global_step"] == 12
    assert checkpoint["loops"] == {"fit_loop": {"done": 3}}
    assert checkpoint["score"] is None
    assert "lr_schedulers" not in checkpoint
    assert checkpoint["state_dict"].pop("clipping._extra_state") == {"mean": 0.1}
    assert all(torch.equal(stored.read(), written[key]) for key, stored in checkpoint["state_dict"].items())
    (state,) = checkpoint["optimizer_states"]
    for name, values in state["state"].items():
        assert torch.equal(values["exp_avg"].read(), written[f"exp_avg {name}"])
        assert values["step"].read() == 1
