"""Which processes hold different clips, and which share one.

Nothing here talks to other processes: a mesh is only the arithmetic of ranks.
"""

from dataclasses import dataclass
from typing import Protocol, Self

from osp.checks import check_number
from osp.errors import UsageError


class Processes(Protocol):
    """The processes of a run, as its Trainer describes them."""

    @property
    def global_rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...


@dataclass(frozen=True)
class Mesh:
    """The place of one process among all of a run.

    `data` groups of processes hold different clips. The processes of a group share their clips: `sequence` parts of a
    clip's tokens, each of which is computed by `tensor` processes that split the weights. Ranks count tensor first,
    then sequence, then data. Whatever counts clips or averages over them goes by `data`, never by processes.

    Raises UsageError for sizes below 1 and for a rank outside the mesh.
    """

    data: int = 1
    sequence: int = 1
    tensor: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        for name, size in (("data", self.data), ("sequence", self.sequence), ("tensor", self.tensor)):
            check_number(f"mesh.{name}", size, least=1, whole=True)
        check_number("rank", self.rank, least=0, below=self.processes, whole=True)

    @classmethod
    def single(cls) -> Self:
        """The mesh of one process."""
        return cls()

    @classmethod
    def of(cls, processes: Processes | None) -> Self:
        """The mesh of a Trainer, whose strategy may say how many processes share a clip's tokens (`sequence`).

        Without a Trainer it is the mesh of a single process. Raises UsageError as `split`.
        """
        if processes is None:
            return cls.single()
        sequence = getattr(getattr(processes, "strategy", None), "sequence", 1)
        return cls.split(processes.world_size, sequence, processes.global_rank)

    @classmethod
    def split(cls, processes: int, sequence: int, rank: int = 0) -> Self:
        """The mesh of so many processes, `sequence` of which share a clip. Raises UsageError if that leaves a rest."""
        if processes % sequence:
            raise UsageError(f"trainer.strategy.sequence={sequence}: must divide the {processes} processes of the run")
        return cls(data=processes // sequence, sequence=sequence, rank=rank)

    @property
    def processes(self) -> int:
        """All of them."""
        return self.data * self.sharing

    @property
    def sharing(self) -> int:
        """How many processes share the same clips."""
        return self.sequence * self.tensor

    @property
    def data_rank(self) -> int:
        """The number of this process's clips among the `data` different ones; the same for all that share them."""
        return self.rank // self.sharing
