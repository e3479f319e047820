"""A command that is nearly right is told what was meant; whatever ends a command, one line says so."""

import errno
import io
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from yaml import YAMLError

import osp.cli
from osp import __version__
from osp.cli import VERBS, config_folder, user_error
from osp.cli.composed import check_read
from osp.cli.endings import Terminated, ended, says_when_terminated
from osp.cli.logs import LogFile
from osp.cli.overrides import prepared
from osp.cli.printing import show_result
from osp.configs.examples import EXAMPLES
from osp.configs.keys import nearly
from osp.configs.mistakes import parsed
from osp.errors import DataError, UsageError

Osp = Callable[..., tuple[int, str, str]]
CONFIGS = config_folder()


@pytest.mark.parametrize(
    ("verb", "key", "meant"),
    [
        ("train", "lr", ["module.lr"]),
        ("train", "modle.lr", ["module.lr"]),
        ("train", "trainer.max_stpes", ["trainer.max_steps"]),
        ("train", "batch_size", ["data.batch_size"]),
        ("sample", "steps", ["solver.steps"]),
        ("sample", "promt", ["prompt"]),
        ("sample", "chekpoint", ["checkpoint"]),
        ("eval", "frames", ["clip.frames"]),
        ("bench", "repeat", ["repeats"]),
        ("shards", "out", []),
    ],
)
def test_a_wrong_key_is_told_the_one_that_was_meant(verb: str, key: str, meant: list[str]) -> None:
    assert nearly(verb, key, CONFIGS)[: len(meant)] == meant


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sampel"], "osp: there is no verb 'sampel' (did you mean sample?); choose shards, cache, "),
        (["train", "lr=1"], "osp train: lr: `osp train` has no such setting here; did you mean module.lr?"),
        (["train", "module=vea"], "osp train: module=vea: is not known (did you mean vae?); choose denoiser, vae"),
        (
            ["train", "logger=[csv,tensorbord]"],
            "logger=tensorbord: is not known (did you mean tensorboard?); choose csv,",
        ),
        (["train", "-m", "trainer=cpu,cup"], "trainer=cup: is not known (did you mean cpu?)"),
        (["chain", "chain=tiny", "dry_run"], "osp chain: dry_run: must be KEY=VALUE; give dry_run=VALUE"),
        (
            ["sample", "a red circle"],
            "a red circle: must be KEY=VALUE; a value with spaces needs quotes around all of it",
        ),
        (["sample", "--multirn", "prompt=a"], "--multirn: there is no such option (did you mean --multirun?)"),
        (["train", "--config-dir"], "osp train: --config-dir: needs a value after it"),
        (["train", "--config-dir", "none"], "--config-dir none: no such folder"),
        (["train", "module.lr=["], "osp train: module.lr=[: cannot be read ("),
        (["train", "+new.key=3"], "osp train: +new.key=3: nothing reads it here; leave it out"),
        (["shards"], "osp shards: output=... has to be given: the folder of shards"),
        (["shards", "--help", "nothing=1"], "osp shards: nothing: `osp shards` has no such setting here; "),
    ],
)
def test_a_command_that_is_nearly_right_is_told_in_one_line(arguments: list[str], message: str, osp: Osp) -> None:
    code, out, said = osp(*arguments)
    assert (code, out, said.count("\n")) == (2, "", 0), said
    assert message in said
    assert "provider=" not in said


def test_options_may_stand_anywhere(osp: Osp, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("osp.cli.sample.run", lambda cfg: asked.append((cfg.prompt, cfg.seed)))
    assert osp("sample", "prompt=a", "-m", "seed=1,2")[0] == 0
    assert asked == [("a", 1), ("a", 2)]
    command = parsed(["a=1", "--cfg=job", "-cd", str(CONFIGS), "b=-1", "--resolve"])
    assert command.options == ("--cfg", "job", "--config-dir", str(CONFIGS), "--resolve")
    assert (command.overrides, command.own_configs) == (("a=1", "b=-1"), CONFIGS)


def test_configurations_of_ones_own_are_taken_and_explained(osp: Osp, tmp_path: Path) -> None:
    mine = tmp_path / "my conf" / "experiment" / "mine.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text("# @package _global_\ndefaults:\n  - wfvae_tiny\n  - _self_\nseed: 77\n")
    own = ["--config-dir", str(tmp_path / "my conf"), "experiment=mine"]
    code, out, said = osp("train", *own, "--cfg", "job")
    assert code == 0, said
    assert "seed: 77" in out
    code, out, said = osp("train", "--help", *own)
    assert code == 0, said
    assert "  experiment=mine" in out
    assert "  seed=77" in out
    mine.write_text("# @package _global_\na: [1\nb: 2\n")
    for more in ([], ["--help"]):
        code, out, said = osp("train", *own, *more)
        assert (code, out, said.count("\n")) == (1, "", 0)
        assert f"{mine}:3: is no YAML (" in said


@pytest.mark.parametrize("content", [b"defaults: 3\n", b"defaults: [null]\n", b"defaults: [{a: 1, b: 2}]\n"])
def test_a_configuration_that_cannot_be_composed_ends_in_one_line(content: bytes, osp: Osp, tmp_path: Path) -> None:
    mine = tmp_path / "experiment" / "mine.yaml"
    mine.parent.mkdir()
    mine.write_bytes(b"# @package _global_\n" + content)
    code, _, said = osp("train", "--config-dir", str(tmp_path), "experiment=mine")
    assert code == 2
    assert said.startswith("osp train: the configurations of --config-dir cannot be composed (")
    assert "\n" not in said


@pytest.mark.parametrize(
    "content", [b"- a\n", b"a: \xff\xfe\n", b"a: \x00\n", b"a: *b\n", b"!!python/object:os.x {}\n", b"a: 1\na: 2\n"]
)
def test_a_configuration_that_is_none_ends_in_one_line(content: bytes, osp: Osp, tmp_path: Path) -> None:
    mine = tmp_path / "experiment" / "mine.yaml"
    mine.parent.mkdir()
    mine.write_bytes(content)
    code, _, said = osp("train", "--config-dir", str(tmp_path), "experiment=mine")
    assert (code in (1, 2), said.count("\n"), "mine" in said) == (True, 0, True), said


def test_the_version_is_told(osp: Osp) -> None:
    assert osp("--version")[:2] == (0, f"osp {__version__}\n")
    assert osp("train", "--version")[:2] == (0, f"osp {__version__}\n")


@pytest.mark.parametrize(("verb", "number"), [(verb, n) for verb in VERBS for n in range(len(EXAMPLES[verb]))])
def test_every_example_of_the_help_composes(verb: str, number: int) -> None:
    about, arguments = EXAMPLES[verb][number]
    command = parsed(arguments)
    overrides = prepared(verb, command, CONFIGS)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        single = [one if "," not in one or "[" in one else one.partition(",")[0] for one in overrides]
        cfg = compose(verb, single, return_hydra_config=True)
    choices = cfg.hydra.runtime.choices
    check_read(verb, cfg, single, choices)
    assert about


@pytest.mark.parametrize("verb", VERBS)
def test_help_ends_in_examples(verb: str, osp: Osp) -> None:
    code, out, said = osp(verb, "--help")
    assert code == 0, said
    examples = out.partition("\nExamples:\n")[2]
    assert examples.count(f"osp {verb} ") == len(EXAMPLES[verb]) >= 1
    assert all(len(line) <= 120 for line in examples.splitlines())


@pytest.mark.parametrize("verb", VERBS)
def test_every_line_of_the_help_says_what_it_means(verb: str, osp: Osp) -> None:
    lines = osp(verb, "--help")[1].partition("\nExamples:")[0].splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith("  ") and line[2:3].isalpha() and "=" in line and "${" not in line:
            assert (line[40:].strip() and line[38:40] == "  ") or following.startswith(" " * 40), line


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; make room on the disk of output"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "a/b"), "a/b: Disk quota exceeded; make room within the quota"),
        (OSError(errno.EROFS, "Read-only file system", "a/b"), "a/b: Read-only file system; give an output"),
        (PermissionError(errno.EACCES, "Permission denied", "a"), "a: Permission denied; give an output that you may"),
        (OSError(errno.EFBIG, "File too large"), "File too large; raise the limit to the size of files"),
        (OSError(errno.EMFILE, "Too many open files", "x"), "x: Too many open files; raise the limit to open files"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error; the disk or the network fails"),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", b"caf\xe9"),
            "caf\udce9: No such file or directory",
        ),
        (MemoryError(), "not enough memory (none is left); use fewer workers, a smaller batch"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "not enough memory ("),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "not enough memory (CUDA out of memory"),
        (ImportError("x.so: failed to map segment from shared object"), "not enough memory ("),
        (RuntimeError("can't start new thread"), "can't start new thread; use fewer workers"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "make room on the disk"),
        (RuntimeError("PytorchStreamWriter failed writing file data/3"), "a file could not be written; make room"),
    ],
)
def test_what_a_machine_refuses_is_told_in_one_line(error: Exception, message: str) -> None:
    mended = user_error(error, "train")
    assert isinstance(mended, DataError)
    assert message in str(mended)
    assert "\n" not in str(mended)


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), ValueError("x"), KeyError("x"), OSError("odd")])
def test_a_bug_stays_a_bug(error: Exception) -> None:
    assert user_error(error, "train") is None


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt, 130), (Terminated, 143)])
def test_a_stop_that_an_import_has_made_an_error_of_stays_a_stop(stop: type[BaseException], code: int) -> None:
    def command() -> int:
        try:
            try:
                raise stop
            except KeyboardInterrupt as came:
                raise ImportError("initialization failed") from came
        except ImportError as error:
            user_error(error, "train")
            return 0

    assert ended("train", command) == code


def test_a_stopped_command_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    def stopped() -> int:
        raise KeyboardInterrupt

    def terminated() -> int:
        before = signal.getsignal(signal.SIGTERM)
        try:
            with says_when_terminated("shards"):
                os.kill(os.getpid(), signal.SIGTERM)
                signal.sigtimedwait([signal.SIGUSR1], 5)
        finally:
            assert signal.getsignal(signal.SIGTERM) is before
        return 0

    assert ended("shards", stopped) == 130
    assert capfd.readouterr().err == "osp shards: stopped; the same command goes on\n"
    assert ended("shards", terminated) == 143
    assert capfd.readouterr().err == "osp shards: stopped by SIGTERM; the same command goes on\n"
    assert issubclass(Terminated, KeyboardInterrupt)


def test_a_result_is_json_whatever_it_holds(capfd: pytest.CaptureFixture[str]) -> None:
    show_result({"a": float("nan"), "b": [float("inf"), 1.5], "path": Path("x"), "c": ("é\udcff",)})
    assert json.loads(capfd.readouterr().out) == {"a": None, "b": [None, 1.5], "path": "x", "c": ["é\udcff"]}


@pytest.mark.parametrize("where", ["/dev/full", "pipe"])
def test_a_result_that_nobody_takes_ends_in_one_line(where: str) -> None:
    command = [sys.executable, "-c", "from osp.cli import main; main()", "--help"]
    if where == "pipe":
        read, write = os.pipe()
        os.close(read)
    else:
        write = os.open(where, os.O_WRONLY)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    os.close(write)
    assert done.returncode == 1
    assert done.stderr.startswith("osp: stdout: ")
    assert done.stderr.count("\n") == 1


def test_errors_escape_what_is_not_printable(osp: Osp) -> None:
    code, _, said = osp("shards", "input=\x1b[31mred\nosp shards: all is well\u202e", "output=o")
    assert code == 2
    assert said.count("\n") == 0
    assert "\\x1b[31mred\\nosp shards: all is well\\u202e: no such folder" in said


def test_log_lines_escape_what_is_not_printable(osp: Osp, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a\x1b[31m\n[12:00:00] INFO forged.mp4").write_bytes(b"no video")
    code, _, said = osp("shards", "input=in", "output=out", "workers=0")
    log = (tmp_path / "out" / "shards.log").read_text() if (tmp_path / "out" / "shards.log").exists() else ""
    for text in (said, log):
        assert "\x1b" not in text
        assert not [line for line in text.splitlines() if line.startswith("[12:00:00] INFO forged")]
    assert "a\\x1b[31m\\n[12:00:00] INFO forged.mp4" in said
    assert code == 1


def test_a_log_that_cannot_be_written_is_told_once(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    handler = LogFile("/dev/full", delay=True)
    for number in range(3):
        handler.handle(logging.LogRecord("osp", logging.INFO, "", 0, f"line {number}", None, None))
    said = capfd.readouterr().err
    assert said == "osp: /dev/full: the log cannot be written (No space left on device)\n"
    handler.stream = io.StringIO()
    handler.close()


def test_the_current_folder_is_importable_after_all_others(osp: Osp, tmp_path: Path) -> None:
    osp("--version")
    assert sys.path.index(str(tmp_path)) == len(sys.path) - 1
    sys.path.remove(str(tmp_path))


def test_help_and_refusals_load_no_torch() -> None:
    script = (
        "import sys, osp.cli\n"
        "for words in (['--help'], ['shards', '--help'], ['train', 'lr=1'], ['sampel'], ['train', 'module=vea']):\n"
        "    sys.argv = ['osp', *words]\n"
        "    try: osp.cli.main()\n"
        "    except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=100, capture_output=True).returncode == 0


def test_an_error_of_yaml_names_its_file() -> None:
    assert isinstance(user_error(YAMLError("odd"), "train"), UsageError)
    assert osp.cli.VERBS.keys() == EXAMPLES.keys()
