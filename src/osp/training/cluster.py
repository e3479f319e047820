"""Who starts the processes of a run: torchrun, SLURM's srun, or the run's first process on each node."""

import os
import re
import subprocess
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Self

from lightning.fabric.plugins.environments import ClusterEnvironment, LightningEnvironment, SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_only

from osp.errors import UsageError


@dataclass(frozen=True)
class SlurmStep:
    """The step of a SLURM job that a process belongs to.

    `is_by_srun` is False in the script of a job itself, which runs once, on the first node. `tasks` and `nodes` are
    those of the step, or of the job where there is no step.
    """

    is_by_srun: bool
    tasks: int
    nodes: int

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Self | None:
        """The step by its variables; None outside SLURM, and in a shell that SLURM was asked for."""
        if "SLURM_NTASKS" not in environ or environ.get("SLURM_JOB_NAME") in ("bash", "interactive"):
            return None
        by_srun = any(key.startswith("SLURM_STEP") for key in environ)
        tasks = environ.get("SLURM_STEP_NUM_TASKS", environ["SLURM_NTASKS"])
        nodes = environ.get("SLURM_STEP_NUM_NODES", environ.get("SLURM_NNODES", "1"))
        return cls(by_srun, int(tasks), int(nodes))

    @property
    def has_all_processes(self) -> bool:
        """Whether each task is to be one process of a run; else a node's task starts the others itself."""
        return self.is_by_srun and self.tasks > self.nodes


def starts_processes(devices: Any, nodes: int, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a run on so many devices a node, in Lightning's words, may start further processes itself."""
    one = devices in (1, "1") or (isinstance(devices, list | tuple) and len(devices) == 1)
    step = SlurmStep.of(environ)
    by_others = "LOCAL_RANK" in environ or (step is not None and step.has_all_processes)
    return not by_others and not (one and nodes == 1)


def cluster_environment(environ: MutableMapping[str, str] = os.environ) -> ClusterEnvironment | None:
    """The environment that a Trainer is given under SLURM; None: Lightning finds torchrun and all others itself."""
    step = None if "TORCHELASTIC_RUN_ID" in environ else SlurmStep.of(environ)
    if step is None:
        return None
    if step.has_all_processes:
        return _Tasks()
    if step.is_by_srun and step.nodes > 1:
        nodes = environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_NODELIST", ""))
        environ.setdefault("NODE_RANK", environ.get("SLURM_NODEID", "0"))
        environ.setdefault("MASTER_ADDR", SLURMEnvironment.resolve_root_node_address(nodes))
        environ.setdefault("MASTER_PORT", str(15000 + int(re.sub(r"\D", "", environ.get("SLURM_JOB_ID", "0"))[-4:])))
    return _OneTaskANode(step)


def cluster_plugins() -> list[ClusterEnvironment]:
    """The environment as a Trainer's plugins: at most one."""
    environment = cluster_environment()
    return [] if environment is None else [environment]


class _Tasks(SLURMEnvironment):
    """One process a task. Signals, and what becomes of the job after them, are ours (`osp.training.endings`)."""

    def __init__(self) -> None:
        super().__init__(auto_requeue=False)

    @staticmethod
    def _validate_srun_variables() -> None:
        """Lightning wants --ntasks-per-node, and --ntasks does as well."""

    @staticmethod
    def _validate_srun_used() -> None:
        """It is used."""

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Raise UsageError if the tasks are not the processes of the run."""
        step = SlurmStep.of(os.environ)
        assert step is not None
        if (step.tasks, step.nodes) != (num_devices * num_nodes, num_nodes):
            raise UsageError(
                f"srun has started {step.tasks} tasks on {step.nodes} nodes, and trainer.devices={num_devices} "
                f"trainer.num_nodes={num_nodes} are {num_devices * num_nodes} processes on {num_nodes}; let "
                "--ntasks-per-node be the devices of a node and --nodes the nodes"
            )


class _OneTaskANode(LightningEnvironment):
    """One task a node, which starts the processes of its node itself."""

    def __init__(self, step: SlurmStep) -> None:
        super().__init__()
        self.step = step

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Raise UsageError if the run would wait for nodes on which nothing was started."""
        if num_nodes != 1 and not (self.step.is_by_srun and self.step.nodes == num_nodes):
            began = f"srun has started it on {self.step.nodes}" if self.step.is_by_srun else "srun did not start it"
            raise UsageError(
                f"trainer.num_nodes={num_nodes}: needs a process on each node, and {began}; put `srun` before the "
                f"command, with --nodes={num_nodes}"
            )


def tell_rank_of_node(nodes: int, environ: Mapping[str, str] = os.environ) -> None:
    """Let no process on a further node take itself for the first one, before the Trainer has numbered them all."""
    node = environ.get("NODE_RANK", environ.get("GROUP_RANK", environ.get("SLURM_NODEID", "0")))
    if nodes > 1 and "RANK" not in environ and node != "0":
        setattr(rank_zero_only, "rank", max(1, getattr(rank_zero_only, "rank", 0)))  # noqa: B010  (its type hides it)


def requeued(environ: Mapping[str, str] = os.environ) -> str | None:
    """Put this process's SLURM job into the queue again; gives in words what came of it, None outside SLURM."""
    if (job := environ.get("SLURM_ARRAY_JOB_ID")) is not None:
        job = f"{job}_{environ.get('SLURM_ARRAY_TASK_ID', '')}"
    elif (job := environ.get("SLURM_JOB_ID")) is None:
        return None
    try:
        done = subprocess.run(
            ["scontrol", "requeue", job], capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"SLURM job {job} could not be queued again ({error})"
    if done.returncode:
        reason = " ".join(done.stderr.split())[:200] or f"exit code {done.returncode}"
        return f"SLURM job {job} could not be queued again (scontrol: {reason})"
    return f"SLURM job {job} is queued again"
