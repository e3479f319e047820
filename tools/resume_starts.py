"""Starts of `osp train` in several processes, for `resume_matrix.py`: their layouts, and what each step had."""

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import osp  # noqa: F401  (before anything imports lightning)

# isort: split
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

from osp.audit.fuzz.media import mp4
from osp.cli import main as command_line
from osp.data.media.video import to_float
from osp.errors import OspError
from osp.files import write_whole
from osp.training import vae_module
from osp.vae import WFVAE
from osp.weights.pretrained import save_pretrained

LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one": (1, ["trainer=cpu"]),
    "ddp 2": (2, ["trainer=ddp_cpu"]),
    "fsdp 2": (2, ["trainer=fsdp_cpu"]),
    "sequence 2": (2, ["trainer=ddp_cpu", "trainer.strategy.sequence=2"]),
    "ddp 4": (4, ["trainer=ddp_cpu", "trainer.devices=4"]),
    "fsdp 4": (4, ["trainer=fsdp_cpu", "trainer.devices=4"]),
    "sequence 4": (4, ["trainer=ddp_cpu", "trainer.devices=4", "trainer.strategy.sequence=4"]),
    "fsdp sequence 4": (4, ["trainer=fsdp_cpu", "trainer.devices=4", "trainer.strategy.sequence=2"]),
}
"""Processes of each layout, and how it is chosen."""

BATCH = 4
"""Clips of all processes at once, where batches have a fixed number of them."""

_SERVER = multiprocessing.get_context("forkserver")  # which has imported all once, for all processes
_SERVER.set_forkserver_preload(["__main__", __name__, "osp.cli.train", "osp.cli.cache", "osp.cli.shards", "hydra"])


class Samples(Callback):
    """Writes the samples of each step, as they come, into a file of each process of each start.

    A file `hold` with a number beside it holds the run in that step of the start, until it is gone.
    """

    def __init__(self) -> None:
        self.begun = 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Add a line."""
        place = Path(os.environ["OSP_SAMPLES"])
        numbers = [f"{key}/{n}" for one in batch for key, n in zip(one["key"], one["sample"].tolist(), strict=True)]
        with open(place / f"{trainer.global_rank}.jsonl", "a") as file:
            file.write(json.dumps([trainer.global_step, trainer.world_size, pl_module.mesh.data_rank, numbers]) + "\n")
        self.begun += 1
        with suppress(FileNotFoundError):
            while self.begun == int((place / "hold").read_text()):
                time.sleep(0.01)


class Start:
    """One start of the command in a layout: its processes, each the leader of a group of its own.

    `double`: weights and clips have double precision, as a VAE's optimiser else makes steps of the rounding of
    gradients that are zero.
    """

    def __init__(
        self, layout: str, arguments: Sequence[str], folder: Path, number: int = 0, *, double: bool = False
    ) -> None:
        count, chosen = LAYOUTS[layout]
        self.layout, self.folder = layout, folder
        self.samples = folder.with_name(f"{folder.name}-samples") / f"{number:03d}"
        self.samples.mkdir(parents=True)
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            port = server.getsockname()[1]
        self.logs = [self.samples / f"{rank}.log" for rank in range(count)]
        command = [*arguments, *chosen, f"output={folder}"]
        if "data.batch_size=null" not in arguments:
            command.append(f"data.batch_size={BATCH // count}")
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "matrix"}
        self.processes = []
        for rank, log in enumerate(self.logs):
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "GROUP_RANK": 0}
            environ = {"OSP_SAMPLES": str(self.samples), **(own | shared if count > 1 else {})}
            self.processes.append(started(command, environ, rank, log, double))

    def steps(self) -> int:
        """How many steps it has begun."""
        return len(self._begun())

    def last_step(self) -> int:
        """The number of the step that it has begun last."""
        return int(json.loads(self._begun()[-1])[0])

    @contextmanager
    def held(self, step: int) -> Iterator[None]:
        """In the block it does not go on from the step that it begins as the so-manieth; asked for before it trains."""
        hold = self.samples / "hold"
        write_whole(hold, str(step))
        try:
            yield
        finally:
            hold.unlink()

    def _begun(self) -> list[str]:
        file = self.samples / "0.jsonl"
        return file.read_text().split("\n")[:-1] if file.exists() else []

    def codes(self) -> list[int | None]:
        """How each process has ended."""
        return [process.exitcode for process in self.processes]

    def has_said(self, process: Any) -> bool:
        """Whether a process has told the others, by a file, that it is there."""
        word = f'"process": {process.pid},'
        return any(word in file.read_text() for file in self.folder.glob(".ranks*/*.json"))

    def send(self, number: int, processes: Sequence[Any]) -> None:
        """Send processes a signal."""
        for process in processes:
            os.kill(process.pid, number)

    def alive(self) -> bool:
        """Whether any process is."""
        return any(process.is_alive() for process in self.processes)

    def kill(self, process: Any) -> None:
        """Kill a process with all that it has started, by the id of its group."""
        if process.is_alive():
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:  # it has not made its group yet
                process.kill()

    def wait(self, seconds: float) -> bool:
        """Whether all end in time; else they are killed."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        late = self.alive()
        for process in self.processes:
            self.kill(process)
            process.join()
        return not late

    def said(self) -> str:
        """The error that the first process tells which tells one; else its last line."""
        lines = [line for log in self.logs for line in log.read_text(errors="replace").strip().splitlines()]
        told = [line for line in lines if line.startswith("osp train: ")]
        return (told or lines[-1:] or ["nothing"])[0][-300:]


def started(
    arguments: Sequence[str], environ: Mapping[str, Any], rank: int, log: Path, double: bool = False
) -> multiprocessing.context.ForkServerProcess:
    """`osp` in a process of its own, which leads a group, with variables of a launcher; its messages go to `log`."""
    process = _SERVER.Process(target=_work, args=(arguments, environ, rank, log, double))
    process.start()
    return process


def _work(arguments: Sequence[str], environ: Mapping[str, Any], rank: int, log: Path, double: bool = False) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background ignores it
    torch.set_num_threads(1)
    os.environ.update({key: str(value) for key, value in environ.items()})
    cast(Any, rank_zero_only).rank = rank  # Lightning has looked when it was imported
    if double:
        torch.set_default_dtype(torch.float64)
        cast(Any, vae_module).to_float = lambda video: to_float(video).double()
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["osp", *arguments]
    code = 0
    try:
        command_line()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:  # noqa: BLE001  (as the interpreter ends)
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads of a process group may hang


def make_features(folder: Path) -> Path:
    """Features of three sizes."""
    (folder / "videos").mkdir()
    for number in range(18):
        (folder / "videos" / f"{number}.mp4").write_bytes(mp4(number, 5 if number % 3 else 9))
        (folder / "videos" / f"{number}.txt").write_text(f"a red circle, number {number}")
    torch.manual_seed(0)
    small = {"encoder_blocks": 1, "decoder_blocks": 1, "encoder_flow_channels": 16, "decoder_flow_channels": 16}
    save_pretrained(WFVAE(latent_channels=4, base_channels=16, level1="2d", **small), folder / "vae")
    shards = ["shards", f"input={folder / 'videos'}", f"output={folder / 'shards'}", "workers=0", "min_frames=1"]
    sizes = [
        "buckets=shapes",
        "buckets.time_stride=4",
        "buckets.space_stride=8",
        "buckets.shapes=[[9,32,32],[5,32,32]]",
    ]
    cache = ["cache", "vae=pretrained", f"path={folder / 'vae'}", f"input={folder / 'shards'}", *sizes]
    for arguments in (shards, [*cache, f"output={folder / 'features'}", "device=cpu", "min_clips=1"]):
        process = started(arguments, {}, 0, folder / "log")
        process.join()
        if process.exitcode:
            raise OspError(f"osp {' '.join(arguments)}: {(folder / 'log').read_text()[-2000:]}")
    return folder / "features"
