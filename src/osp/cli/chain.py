"""`osp chain`: the stages of a recipe one after another, each a run of `osp train` in a process of its own."""

import logging
import shlex
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from osp.checks import check_number
from osp.cli import config_folder, user_error
from osp.cli.composed import check_read
from osp.cli.overrides import prepared
from osp.cli.plain import plain
from osp.configs.mistakes import Command
from osp.configs.references import missing_keys
from osp.configs.texts import quoted
from osp.errors import UsageError
from osp.report.tables import as_texts, print_table
from osp.training.chain import COLUMNS, TABLE, Stage, first_to_run, run_stages
from osp.training.runs import TrainingRun

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> dict[str, Any]:
    """Train all stages that are not finished, in order; gives what each has come to, which is also in `chain.csv`.

    Every stage begins with the averaged weights in the last checkpoint of the one before. All stages are composed, and
    compared with what is in their folders, before the first one runs.

    Raises UsageError before any work for stages that do not compose, or folders that hold other runs, and RunError
    with the line and the exit code of a stage that fails.
    """
    output = Path(HydraConfig.get().runtime.output_dir)
    stages = _stages(cfg)
    names = [stage.name for stage in stages]
    if cfg.dry_run:
        for stage in stages:
            print(shlex.join(["osp", "train", *stage.overrides]))
        return {"output": str(output), "stages": names}
    first = first_to_run(stages)
    for stage in stages[:first]:
        log.info("stage %s: finished, in %s", stage.name, stage.run.folder)
    rows = run_stages(stages, first, output)
    print_table(f"{len(stages)} stages in {output}", COLUMNS, as_texts(rows))
    return {
        "output": str(output),
        "table": str(output / TABLE),
        "checkpoint": str(stages[-1].run.last),
        "finished_before": names[:first],
        "stages": rows,
    }


def _stages(cfg: DictConfig) -> list[Stage]:
    """The stages of the configuration, with the overrides of each stage's command. Raises UsageError as `run`."""
    if not cfg.stages:
        choices = sorted(path.stem for path in (config_folder() / "chain").glob("*.yaml"))
        raise UsageError(f"choose chain=NAME: {', '.join(choices)}")
    job, output, before = HydraConfig.get(), Path(cfg.output), cfg.start_from
    if job.mode is RunMode.MULTIRUN:
        output /= str(job.job.num)  # as conf/chain.yaml says, and as short as the user gave it
    given = {override.partition("=")[0] for override in job.overrides.task}
    stages: list[Stage] = []
    for name, said in cfg.stages.items():
        folder = output / name
        overrides = [f"experiment={said.experiment}", *cfg.shared, *said.overrides]
        overrides += [] if said.steps is None else [f"trainer.max_steps={said.steps}"]
        overrides += [] if said.data is None else [f"data.train.path={quoted(said.data)}"]
        overrides += [*cfg.overrides, f"output={quoted(folder)}"]
        overrides += [] if before is None else [f"start_from={quoted(before)}"]
        parts = {"shared": cfg.shared, f"stages.{name}.overrides": said.overrides}
        recipe = [override for key, part in parts.items() if key not in given for override in part]
        settings, unread = _composed(name, overrides, recipe)
        overrides = [override for override in overrides if override not in unread]
        missing = sorted(missing_keys(OmegaConf.to_container(settings)))
        if missing and not cfg.dry_run:
            listed = ",".join(f"'{key}=...'" for key in missing)
            raise UsageError(
                f"stage {name} needs {', '.join(missing)}: give overrides=[{listed}], "
                f"or stages.{name}.data=FOLDER for its clips"
            )
        run = TrainingRun(folder)
        stages.append(Stage(name, said.experiment, run, tuple(overrides), {} if cfg.dry_run else plain(settings)))
        before = run.last
    return stages


def _composed(name: str, overrides: Sequence[str], recipe: Sequence[str]) -> tuple[DictConfig, Collection[str]]:
    """The configuration of `osp train` with these overrides, and those of the recipe's that nothing reads in it.

    These are of no use once others take their place, as a folder does that of a checkpoint. Raises UsageError naming
    the stage, also if nothing reads another one.
    """
    loader = GlobalHydra.instance().config_loader()
    try:
        overrides = prepared("train", Command((), tuple(overrides)), config_folder())
        settings = loader.load_configuration("train", overrides=overrides, run_mode=RunMode.RUN)
        choices = settings.hydra.runtime.choices
        OmegaConf.set_struct(settings, False)
        settings.pop("hydra")
        unread = check_read("train", settings, overrides, choices, free=recipe)
        check_number("trainer.max_steps", settings.trainer.max_steps, 1, whole=True)
    except Exception as error:
        if (mended := user_error(error, "train")) is None:
            raise
        raise UsageError(f"stage {name}: {mended}") from error
    return settings, unread
