"""`osp export-weights`: a model of ours -> a folder for the published code, as `osp export form=published`."""

from functools import partial

from osp.cli import export

run = partial(export.run, form="published")
