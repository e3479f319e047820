"""Prompt -> video: the generator, what it needs of memory, and how videos are kept."""

from osp.sampling.defaults import default_solver
from osp.sampling.generator import VideoGenerator

__all__ = ["VideoGenerator", "default_solver"]
