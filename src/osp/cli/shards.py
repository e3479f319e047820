"""`osp shards`: videos or procedural clips -> WebDataset shards."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate, to_absolute_path
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from osp.cli.checks import check_numbers
from osp.data.shards.build import ShardReport, write_rendered, write_shards
from osp.data.sources import SyntheticClips
from osp.errors import UsageError
from osp.report.progress import shown_progress


def run(cfg: DictConfig) -> dict[str, Any]:
    """Write the shards; gives what the folder holds now. Raises UsageError unless there is one kind of input."""
    least = {"clip_seconds": 0.01, "min_frames": 1, "shard_clips": 1, "shard_bytes": 1, "workers": 0}
    drawn = {"clips": 0, "frames": 1, "height": 1, "width": 1, "fps": 0.01, "seed": 0}
    check_numbers(cfg, least | {f"synthetic.{key}": value for key, value in drawn.items()}, optional=["workers"])
    if (cfg.input is None) == (cfg.synthetic.clips == 0):
        raise UsageError("give either input=DIR, a folder of videos, or synthetic.clips=N, a number of clips to draw")
    output = Path(HydraConfig.get().runtime.output_dir)
    if cfg.input is None:
        report = _draw(cfg, output)
    else:
        with shown_progress("reading files") as show:
            report = write_shards(
                Path(to_absolute_path(cfg.input)),
                output,
                captions=None if cfg.captions is None else Path(to_absolute_path(cfg.captions)),
                clip_seconds=cfg.clip_seconds,
                min_frames=cfg.min_frames,
                shard_clips=cfg.shard_clips,
                shard_bytes=cfg.shard_bytes,
                workers=cfg.workers,
                limits=instantiate(cfg.limits),
                watch=show,
                drop_gone=cfg.drop_gone,
            )
        report.summary(str(cfg.input)).log()
    return {"output": str(output), **asdict(report)}


def _draw(cfg: DictConfig, output: Path) -> ShardReport:
    drawn: Any = OmegaConf.to_container(cfg.synthetic, resolve=True)
    clips = SyntheticClips(**drawn)
    del drawn["clips"]

    def rendered() -> Iterator[tuple[str, Tensor, Mapping[str, Any]]]:
        for index in range(len(clips)):
            clip = clips.read(index, 0)
            yield f"{index:06d}", clip["video"], {"fps": clip["fps"], "caption": clip["caption"], "source": clip["key"]}

    return write_rendered(
        rendered(),
        output,
        settings={"synthetic": drawn},
        lossless=True,
        shard_clips=cfg.shard_clips,
        shard_bytes=cfg.shard_bytes,
    )
