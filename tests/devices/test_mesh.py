"""Which processes hold different clips: the arithmetic of ranks, and what loaders and averages make of it."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from osp.data.loader import FixedLoader, ResumableLoader
from osp.data.sources import SyntheticClips
from osp.devices.mesh import Mesh
from osp.errors import UsageError

SHARED = [Mesh(data=2, sequence=2, rank=rank) for rank in range(4)]
"""Four processes, of which the first two and the last two share their clips."""


def test_ranks_count_tensor_first_then_sequence_then_data() -> None:
    ranks = [Mesh(data=2, sequence=3, tensor=2, rank=rank) for rank in range(12)]
    assert [mesh.data_rank for mesh in ranks] == [0] * 6 + [1] * 6
    assert {(mesh.processes, mesh.sharing) for mesh in ranks} == {(12, 6)}
    assert (Mesh.single().data_rank, Mesh.single().processes) == (0, 1)
    assert Mesh.of(None) == Mesh.single()
    assert Mesh.of(SimpleNamespace(global_rank=2, world_size=3)) == Mesh(data=3, rank=2)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"data": 0}, r"mesh\.data=0: must be a whole number of at least 1"),
        ({"tensor": 1.5}, r"mesh\.tensor=1\.5"),
        ({"data": 2, "sequence": 2, "rank": 4}, "rank=4: must be a whole number of at least 0 and below 4"),
        ({"rank": -1}, "rank=-1"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(settings: dict, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        Mesh(**settings)


def test_processes_that_share_a_clip_read_the_same_and_count_once() -> None:
    source = SyntheticClips(10, 1, 16, 16)

    def steps(mesh: Mesh) -> list[list[int]]:
        loader = ResumableLoader(source, batch_size=2, seed=0, mesh=mesh)
        assert loader.global_batch == 4
        return [batch["sample"].tolist() for batch in itertools.islice(loader, 2)]

    shared, apart = [steps(mesh) for mesh in SHARED], [steps(Mesh(data=2, rank=rank)) for rank in range(2)]
    assert shared == [apart[0], apart[0], apart[1], apart[1]]
    assert apart[0] != apart[1]
    with pytest.raises(UsageError, match="devices=3: must be a multiple of the 2 devices"):
        ResumableLoader(source, batch_size=2, seed=0, devices=3, mesh=SHARED[0])


def test_validation_over_a_mesh_weighs_each_different_clip_once() -> None:
    passes = [list(FixedLoader(SyntheticClips(5, 1, 16, 16), batch_size=2, mesh=mesh)) for mesh in SHARED]
    samples = [[batch["sample"].tolist() for batch in batches] for batches in passes]
    assert samples[0] == samples[1] != samples[2] == samples[3]
    for copies in (passes[0::2], passes[1::2]):  # one process of each group
        assert float(torch.cat([batch["weight"] for batches in copies for batch in batches]).sum()) == 5
