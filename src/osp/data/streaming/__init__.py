"""Shards that lie elsewhere, on servers, in object stores or on slow disks: read in sequence, through a local cache."""

from osp.data.streaming.fetching import ShardFetchError
from osp.data.streaming.shards import RemoteShards

__all__ = ["RemoteShards", "ShardFetchError"]
