"""The command line: `osp VERB key=value ...`.

A verb is a function from a Hydra configuration to a result, which is printed as JSON on the last line of stdout.
"""

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from osp.cli.overrides import check_choices, with_own_groups, with_quoted_prompts
from osp.errors import DataError, OspError, UsageError

VERBS = {
    "shards": "cut a folder of videos and images into WebDataset shards",
    "cache": "encode clips once with a VAE and a text encoder, for training on features",
    "train": "train what an experiment composes",
    "chain": "train the stages of a recipe one after another, each from the one before",
    "eval": "measure what a VAE keeps of videos, or how well a denoiser follows prompts",
    "sample": "make videos of prompts",
    "page": "put what runs left on one HTML page, videos included",
    "bench": "measure speed and memory of a part, as one table and one plot",
    "import-weights": "turn published weights into a folder of ours",
    "export-weights": "turn a model of ours into a folder for the published code",
}


def main() -> None:
    """Run the verb that the command line names; the exit code is 0 only on success and 2 for a usage error."""
    verb, *overrides = sys.argv[1:] or ["--help"]
    if verb in ("-h", "--help", "help"):
        print(_help())
        return
    if verb not in VERBS:
        print(f"osp: there is no verb {verb!r}; choose {', '.join(VERBS)}", file=sys.stderr)
        sys.exit(2)
    try:
        failures = _run(verb, overrides)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if (mended := user_error(error, verb)) is None:
            raise
        failures = [mended]
    for failure in failures:
        print(f"osp {verb}: {failure}", file=sys.stderr)
    if failures:
        sys.exit(failures[0].exit_code)


def config_folder() -> Path:
    """The folder of configurations: inside an installed package, or at the top of a checkout."""
    installed = Path(__file__).parent.parent / "conf"
    return installed if installed.is_dir() else Path(__file__).parents[3] / "conf"


def _run(verb: str, overrides: list[str]) -> list[OspError]:
    """What the user can mend of the jobs that failed; in a multirun the others have run all the same."""
    # Otherwise Hydra prints an exception its own way and hides where it came from.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    import hydra
    from omegaconf import DictConfig

    argv = sys.argv
    failures: list[OspError] = []

    def task(cfg: DictConfig) -> Any:
        sys.argv = argv  # Lightning starts further processes with it
        try:
            result = importlib.import_module(f"osp.cli.{verb.replace('-', '_')}").run(cfg)
        except Exception as error:
            if (mended := user_error(error, verb)) is None:
                raise
            failures.append(mended)  # raised here, Hydra would put a line of its own before it
            return None
        if result is not None:
            print(json.dumps(result), flush=True)
        return result

    overrides = with_own_groups(verb, overrides, config_folder())
    check_choices(overrides, config_folder())
    if verb in ("sample", "eval"):
        overrides, given = with_quoted_prompts(overrides), overrides
        if {"-m", "--multirun"} & {*given} and any("," in one for one in {*given} - {*overrides}):
            print(f"osp {verb}: commas in a prompt make no sweep; for several use prompts=FILE", file=sys.stderr)
    sys.argv = [argv[0], *overrides]  # Hydra reads its overrides from there
    try:
        hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=verb)(task)()
    finally:
        sys.argv = argv
    return failures


def user_error(error: BaseException, verb: str) -> OspError | None:
    """The error of a verb to show in one line, if the user can mend it; None for a bug."""
    from hydra.errors import HydraException, InstantiationException
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, OspError):
        return error
    if isinstance(error, OSError) and error.filename is not None:
        return DataError(f"{error.filename}: {error.strerror}")
    lightning = sys.modules.get("lightning.fabric.utilities.exceptions")  # only what is loaded can have raised
    if lightning is not None and isinstance(error, lightning.MisconfigurationException):
        return UsageError(f"Lightning refuses the settings of trainer: {_one_line(error, verb)}")
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        # What a constructor raises about its arguments; anything else is a bug in it.
        about_arguments = (TypeError, ValueError, ImportError)
        return user_error(error.__cause__, verb) or (
            UsageError(_one_line(error, verb)) if isinstance(error.__cause__, about_arguments) else None
        )
    if isinstance(error, HydraException | OmegaConfBaseException):
        return UsageError(_one_line(error, verb))
    return None


def _one_line(error: BaseException, verb: str) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    # A setting that is not there would have no effect if it were appended.
    hidden = ("full_key:", "object_type=", "See https", "To append to your")
    shown = [line.rstrip(".") for line in lines if line and not line.startswith(hidden)]
    if shown and shown[0].startswith("Could not override"):
        by_target = f"; those of `osp {verb}` depend on target=..." if verb in ("bench", "eval") else ""
        shown.append(f"--help lists the settings{by_target}")
    return "; ".join(shown).replace(":;", ":")


def _help() -> str:
    verbs = "\n".join(f"  {verb:14} {what}" for verb, what in VERBS.items())
    return (
        f"osp VERB key=value ...\n\n{verbs}\n\n"
        "osp VERB --help lists a verb's settings, osp VERB --cfg job prints them composed,\n"
        "osp VERB --multirun key=a,b runs every combination. A prompt=... is one prompt, whatever is in it."
    )
