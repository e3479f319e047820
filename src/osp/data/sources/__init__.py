"""Where clips come from: shards and folders, drawings, features."""

from osp.data.sources.features import FeatureClips
from osp.data.sources.shards import BucketClips, ShardClips, clip_size
from osp.data.sources.source import ClipSource, FirstClips
from osp.data.sources.synthetic import SyntheticClips

__all__ = ["BucketClips", "ClipSource", "FeatureClips", "FirstClips", "ShardClips", "SyntheticClips", "clip_size"]
