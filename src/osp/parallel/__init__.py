"""Many processes for one model: strategies of the Trainer, and what is applied to a model from outside."""

from typing import TYPE_CHECKING, Any

from osp.parallel.adamw import AdamW
from osp.parallel.apply import Parallelism, Sharding, apply
from osp.parallel.drawing import drawn_weights
from osp.parallel.exchange import Exchange
from osp.parallel.muon import Muon
from osp.parallel.sequence import split_sequence
from osp.parallel.shards import fill_model, kind_of, local, passing_through, whole

if TYPE_CHECKING:
    from osp.parallel.strategy import ReplicatedStrategy, ShardedStrategy

__all__ = [
    "AdamW",
    "Exchange",
    "Muon",
    "Parallelism",
    "ReplicatedStrategy",
    "ShardedStrategy",
    "Sharding",
    "apply",
    "drawn_weights",
    "fill_model",
    "kind_of",
    "local",
    "passing_through",
    "split_sequence",
    "whole",
]

_STRATEGIES = ("ReplicatedStrategy", "ShardedStrategy")


def __getattr__(name: str) -> Any:
    """The strategies, which bring Lightning, where somebody asks for them; sampling does without."""
    if name in _STRATEGIES:
        from osp.parallel import strategy

        return getattr(strategy, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
