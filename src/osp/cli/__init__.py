"""The command line: `osp VERB key=value ...`.

A verb is a function from a Hydra configuration to a result, which is printed as JSON on the last line of stdout.
"""

import importlib
import os
import sys
from typing import Any

from osp import __version__
from osp.cli.endings import ended, says_when_terminated
from osp.cli.overrides import config_folder, is_prompt_with_commas, prepared
from osp.cli.printing import say, show, show_result
from osp.cli.user_errors import user_error
from osp.configs.mistakes import Command, parsed, unknown_verb
from osp.errors import OspError, UsageError
from osp.extensions import import_modules

__all__ = ["VERBS", "config_folder", "main", "user_error"]

VERBS = {
    "shards": "cut a folder of videos and images into WebDataset shards",
    "cache": "encode clips once with a VAE and a text encoder, for training on features",
    "train": "train what an experiment composes",
    "plan": "say whether a training run fits its devices, and what time and money it takes",
    "chain": "train the stages of a recipe one after another, each from the one before",
    "eval": "measure what a VAE keeps of videos, or how well a denoiser follows prompts",
    "sample": "make videos of prompts",
    "page": "put what runs left on one HTML page, videos included",
    "bench": "measure speed and memory of a part, as one table and one plot",
    "doctor": "ask a new machine what a week of training would find out",
    "export": "write what a run has trained as a folder of weights",
    "inflate": "make a video VAE of an image VAE's weights",
    "import-weights": "turn published weights into a folder of ours",
    "export-weights": "turn a model of ours into a folder for the published code",
}


def main() -> None:
    """Run the verb that the command line names.

    The exit code is 0 only on success, 2 for a usage error, 1 for files and the machine, 130 for ^C, 143 for SIGTERM.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # modules of the user's own, as `python -m` finds them
    verb, *arguments = sys.argv[1:] or ["--help"]
    if code := ended(verb, lambda: _main(verb, arguments)):
        sys.exit(code)


def _main(verb: str, arguments: list[str]) -> int:
    """The exit code of a command; a failure that the user can mend has been told."""
    if verb in ("-h", "--help", "help"):
        show(_help())
        return 0
    if verb == "--version" or "--version" in arguments:
        show(f"osp {__version__}")
        return 0
    if verb not in VERBS:
        say(f"osp: {unknown_verb(verb, VERBS)}")
        return 2
    failures = _run(verb, arguments)
    for failure in failures:
        say(f"osp {verb}: {failure}")
    return failures[0].exit_code if failures else 0


def _run(verb: str, arguments: list[str]) -> list[OspError]:
    """The errors of failed jobs, which the user can mend; in a multirun the other jobs run all the same."""
    try:
        command = parsed(arguments)
        overrides = prepared(verb, command, config_folder())
        if command.has("--help"):
            from osp.cli.composed import help_of  # here: it brings Hydra

            show(help_of(verb, command))
            return []
        with says_when_terminated(verb):
            return _composed(verb, command, overrides)
    except Exception as error:
        if (mended := user_error(error, verb)) is None:
            raise
        return [mended]


def _composed(verb: str, command: Command, overrides: list[str]) -> list[OspError]:
    """Compose the configurations of a command and run its jobs; gives the failures of these."""
    # Otherwise Hydra prints an exception its own way and hides where it came from.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import DictConfig

    from osp.cli.composed import check_read
    from osp.cli.folders import job_folder
    from osp.training.own_process import refuse_several_processes

    argv, process = sys.argv, os.getpid()
    failures: list[OspError] = []

    begun = False

    def task(cfg: DictConfig) -> Any:
        nonlocal begun
        begun = True
        sys.argv = argv  # Lightning starts further processes with it
        try:
            chosen = HydraConfig.get()
            check_read(verb, cfg, chosen.overrides.task, chosen.runtime.choices)
            import_modules(cfg.get("imports") or ())
            if "kernels" in cfg:
                importlib.import_module("osp.devices").choose_kernels(cfg.kernels)
            with job_folder(verb, cfg):
                result = importlib.import_module(f"osp.cli.{verb.replace('-', '_')}").run(cfg)
            if result is not None:
                show_result(result)
        except Exception as error:
            if (mended := user_error(error, verb)) is None:
                raise
            if os.getpid() != process:  # a launcher's, which brings the error back
                raise mended from error
            failures.append(mended)  # raised here, Hydra would put a line of its own before it
            return None
        return result

    if verb == "chain" or (verb == "train" and command.has("--multirun")):
        refuse_several_processes("a chain" if verb == "chain" else "a sweep")
    sys.argv = [argv[0], *command.options, *overrides]  # Hydra reads its overrides from there
    if command.has("--multirun") and is_prompt_with_commas(command.overrides):
        say(f"osp {verb}: commas in a prompt make no sweep; for several use prompts=FILE")
    try:
        hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=verb)(task)()
    except Exception as error:
        if begun or not command.has("--config-dir") or user_error(error, verb) is not None:
            raise
        # Hydra raises all kinds of errors about a user's own files before it gives a configuration.
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UsageError(f"the configurations of --config-dir cannot be composed ({reason})") from error
    finally:
        sys.argv = argv
    return failures


def _help() -> str:
    verbs = "\n".join(f"  {verb:14} {what}" for verb, what in VERBS.items())
    return (
        f"osp VERB key=value ...\n\n{verbs}\n\n"
        "osp VERB --help             a verb's settings, with their meanings and examples\n"
        "osp VERB --cfg job          its settings as they are composed\n"
        "osp VERB --multirun k=a,b   a run for every combination\n"
        "osp VERB --config-dir DIR   configurations of your own too, such as DIR/experiment/mine.yaml\n"
        "osp --version               the version\n\n"
        "A prompt=... is one prompt, whatever is in it, and a path is the file or folder of that name. Modules in the\n"
        "current folder can be imported: _target_: my_module.MyClass."
    )
