"""Many processes for one model: strategies of the Trainer, and what is applied to a model from outside."""

from osp.parallel.apply import Parallelism, Sharding, apply
from osp.parallel.drawing import drawn_weights
from osp.parallel.exchange import Exchange
from osp.parallel.sequence import split_sequence
from osp.parallel.shards import fill_model, kind_of, local, passing_through, whole
from osp.parallel.strategy import ReplicatedStrategy, ShardedStrategy

__all__ = [
    "Exchange",
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
