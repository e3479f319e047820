"""`osp shards`: videos, annotations, shards with other captions, or procedural clips -> WebDataset shards."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate, to_absolute_path
from omegaconf import DictConfig

from osp.cli.checks import check_numbers
from osp.cli.plain import plain
from osp.data.shards.annotated import write_annotated
from osp.data.shards.build import write_shards
from osp.data.shards.index import INDEX_NAME
from osp.data.shards.recaption import write_recaptioned
from osp.data.shards.stored import ShardReport
from osp.data.sources.synthetic import write_drawn
from osp.errors import UsageError
from osp.report.progress import shown_progress


def run(cfg: DictConfig) -> dict[str, Any]:
    """Write the shards; gives what the folder holds now. Raises UsageError unless there is one kind of input."""
    least = {"clip_seconds": 0.01, "min_frames": 1, "shard_clips": 1, "shard_bytes": 1, "workers": 0}
    drawn = {"clips": 0, "frames": 1, "height": 1, "width": 1, "fps": 0.01, "seed": 0}
    check_numbers(cfg, least | {f"synthetic.{key}": value for key, value in drawn.items()}, optional=["workers"])
    files = cfg.input is not None or cfg.annotations is not None
    if files == (cfg.synthetic.clips > 0):
        raise UsageError(
            "give either input=DIR, a folder of videos, or annotations=FILE, or synthetic.clips=N, clips to draw"
        )
    output = Path(HydraConfig.get().runtime.output_dir)
    if files:
        report = _store(cfg, output)
    else:
        sizes = {"shard_clips": cfg.shard_clips, "shard_bytes": cfg.shard_bytes}
        report = write_drawn(output, plain(cfg.synthetic), **sizes)
    return {"output": str(output), **asdict(report)}


def _store(cfg: DictConfig, output: Path) -> ShardReport:
    """The shards of files: of a folder, of annotations, or of shards that get other captions."""
    folder, captions, annotations = (
        None if path is None else Path(to_absolute_path(path)) for path in (cfg.input, cfg.captions, cfg.annotations)
    )
    how = {"shard_clips": cfg.shard_clips, "shard_bytes": cfg.shard_bytes, "limits": instantiate(cfg.limits)}
    reading = how | {"workers": cfg.workers, "drop_gone": cfg.drop_gone}
    with shown_progress("reading files") as show:
        if annotations is not None:
            if folder is not None and not folder.is_dir():
                raise UsageError(f"input={cfg.input}: no such folder")
            report = write_annotated(annotations, output, folder=folder, strip=cfg.strip, watch=show, **reading)
        elif captions is not None and folder is not None and (folder / INDEX_NAME).exists():
            report = write_recaptioned(folder, captions, output, watch=show, **how)
        elif folder is not None:
            cutting: dict[str, Any] = {"clip_seconds": cfg.clip_seconds, "min_frames": cfg.min_frames}
            report = write_shards(folder, output, captions=captions, watch=show, **cutting, **reading)
    report.summary(str(cfg.input if annotations is None else cfg.annotations)).log()
    return report
