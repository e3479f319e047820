"""The sources of clips: shards and folders, arrays, datasets of Hugging Face, drawings, features."""

from osp.data.sources.arrays import ArrayClips
from osp.data.sources.datasets import DatasetClips
from osp.data.sources.features import FeatureClips
from osp.data.sources.joint import JointClips
from osp.data.sources.own_size import OwnSizeClips
from osp.data.sources.shards import BucketClips, ShardClips, clip_size
from osp.data.sources.source import ClipSource, FirstClips
from osp.data.sources.synthetic import SyntheticClips

__all__ = [
    "ArrayClips",
    "BucketClips",
    "ClipSource",
    "DatasetClips",
    "FeatureClips",
    "FirstClips",
    "JointClips",
    "OwnSizeClips",
    "ShardClips",
    "SyntheticClips",
    "clip_size",
]
