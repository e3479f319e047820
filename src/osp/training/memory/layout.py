"""The spreading of a run over devices, as its settings say, and the bytes that devices exchange."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from osp.checks import check_number
from osp.errors import UsageError

Kind = Literal["one", "ddp", "fsdp"]


@dataclass(frozen=True)
class Layout:
    """The processes of a run, one a device, and what each holds of model and clips.

    `one` and `ddp`: all of the model; `fsdp`: a part of it, of `replicas` whole copies. The devices lie in `nodes`
    machines, neighbours in one. `sequence` processes share a
    clip's tokens. `prefetch` and `reshards`: see `osp.parallel.ShardedStrategy`; `on_cpu`: weights, gradients and the
    optimisers' state lie in the memory of the CPU. Raises UsageError for sizes that do not divide the devices.
    """

    devices: int = 1
    kind: Kind = "one"
    sequence: int = 1
    replicas: int = 1
    prefetch: int = 1
    reshards: bool = True
    on_cpu: bool = False
    nodes: int = 1

    def __post_init__(self) -> None:
        check_number("devices", self.devices, least=1, whole=True)
        for name, size in (("sequence", self.sequence), ("replicas", self.replicas)):
            check_number(f"trainer.strategy.{name}", size, least=1, whole=True)
            if self.devices % size:
                raise UsageError(f"trainer.strategy.{name}={size}: must divide the {self.devices} devices")

    @classmethod
    def of(cls, trainer: Mapping[str, Any], devices: int | None, here: int) -> Self:
        """The layout that settings of `trainer` mean, on so many devices; None: those that they say.

        `here` are the devices of a machine.
        """
        nodes = int(trainer.get("num_nodes") or 1)
        if devices is not None:
            nodes = max(nodes, -(-devices // here))
        else:
            said = trainer.get("devices", 1)
            one_node = here if said in (-1, "-1", "auto") else len(said) if isinstance(said, list) else int(said)
            devices = nodes * one_node
        strategy = trainer.get("strategy", "auto")
        if not isinstance(strategy, Mapping):
            return cls(devices, "one" if devices == 1 else "ddp", nodes=nodes)
        sequence = int(strategy.get("sequence") or 1)
        if not str(strategy.get("_target_")).endswith("ShardedStrategy"):
            return cls(devices, "ddp" if devices > 1 else "one", sequence, nodes=nodes)
        replicas = int(strategy.get("replicas") or nodes)
        prefetch, reshards = int(strategy.get("prefetch", 1)), bool(strategy.get("reshard_after_forward", True))
        on_cpu = bool(strategy.get("offload_optimizer", False))
        return cls(devices, "fsdp", sequence, replicas, prefetch, reshards, on_cpu, nodes)

    @property
    def shards(self) -> int:
        """The parts that a weight is split into."""
        return self.devices // self.replicas if self.kind == "fsdp" else 1

    @property
    def data(self) -> int:
        """The groups of devices that hold different clips."""
        return self.devices // self.sequence

    def sharded(self) -> Self:
        """The same devices with a part of the model on each, and a whole copy in each machine."""
        return replace(self, kind="fsdp", replicas=self.nodes if self.devices % self.nodes == 0 else 1)

    def buffers(self, weights: int, largest: int, parts: int) -> int:
        """Bytes of weights and gradients under way, of a model with so many bytes of weights.

        Its `parts` are gathered one after another; `largest` are the bytes of the largest.
        """
        if self.devices == 1:
            return 0
        if self.kind != "fsdp":
            return weights  # the buckets that gradients are averaged in
        gathered = (1 + self.prefetch) * largest if self.reshards else parts * largest
        # One more that is under way; and in the backward pass a part's own gradient, and its copy to be reduced.
        return min(gathered, parts * largest) + 3 * largest

    def sent(self, weights: int, accumulate: int) -> tuple[float, float]:
        """Bytes of weights and gradients that a device sends in one step of so many batches.

        The first number is what goes to devices of its machine, the second what goes to other machines. What a group
        of devices gathers or averages is taken to go from device to device within each machine first.
        """
        if self.kind != "fsdp":
            return _around(2 * weights, self.devices, self.nodes)
        passes = (2 if self.reshards else 1) * accumulate
        copies = min(self.replicas, self.nodes)  # machines that a weight's copies lie in
        within = _around(weights * (passes + accumulate), self.shards, -(-self.nodes // self.replicas))
        between = _around(2 * weights / self.shards, self.replicas, copies)
        return within[0] + between[0], within[1] + between[1]


def _around(size: float, devices: int, machines: int) -> tuple[float, float]:
    """Bytes that each of so many devices sends, in its machine and out of it, for a sum or a whole of this size."""
    each = devices / machines
    return size * (each - 1) / each, size / each * (machines - 1) / machines
