"""Many processes for one model: strategies of the Trainer, and what is applied to a model from outside."""

from osp.parallel.apply import Parallelism, apply
from osp.parallel.exchange import Exchange
from osp.parallel.sequence import split_sequence
from osp.parallel.shards import local, whole
from osp.parallel.strategy import ReplicatedStrategy, ShardedStrategy

__all__ = [
    "Exchange",
    "Parallelism",
    "ReplicatedStrategy",
    "ShardedStrategy",
    "apply",
    "local",
    "split_sequence",
    "whole",
]
