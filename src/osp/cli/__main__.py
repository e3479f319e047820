"""`python -m osp.cli` is `osp`: also for processes that start others of their kind."""

from osp.cli import main

main()
