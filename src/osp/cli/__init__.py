"""The command line: `osp VERB key=value ...`.

A verb is a function from a Hydra configuration to a result, which is printed as JSON on the last line of stdout.
"""

import importlib
import json
import os
import sys
from typing import Any

from osp.cli.overrides import config_folder, is_prompt_with_commas, prepared
from osp.cli.user_errors import user_error
from osp.errors import OspError
from osp.extensions import import_modules

__all__ = ["VERBS", "config_folder", "main", "user_error"]

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


def _run(verb: str, overrides: list[str]) -> list[OspError]:
    """What the user can mend of the jobs that failed; in a multirun the others have run all the same."""
    # Otherwise Hydra prints an exception its own way and hides where it came from.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import DictConfig

    from osp.cli.composed import check_read, help_of
    from osp.cli.folders import job_folder

    if {"-h", "--help"} & {*overrides}:
        print(help_of(verb, [override for override in overrides if not override.startswith("-")]))
        return []

    argv = sys.argv
    failures: list[OspError] = []

    def task(cfg: DictConfig) -> Any:
        sys.argv = argv  # Lightning starts further processes with it
        try:
            chosen = HydraConfig.get()
            check_read(verb, cfg, chosen.overrides.task, chosen.runtime.choices)
            import_modules(cfg.get("imports") or ())
            with job_folder(verb, cfg):
                result = importlib.import_module(f"osp.cli.{verb.replace('-', '_')}").run(cfg)
        except Exception as error:
            if (mended := user_error(error, verb)) is None:
                raise
            failures.append(mended)  # raised here, Hydra would put a line of its own before it
            return None
        if result is not None:
            print(json.dumps(result), flush=True)
        return result

    sys.argv = [argv[0], *prepared(verb, overrides, config_folder())]  # Hydra reads its overrides from there
    if {"-m", "--multirun"} & {*overrides} and is_prompt_with_commas(overrides):
        print(f"osp {verb}: commas in a prompt make no sweep; for several use prompts=FILE", file=sys.stderr)
    try:
        hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=verb)(task)()
    finally:
        sys.argv = argv
    return failures


def _help() -> str:
    verbs = "\n".join(f"  {verb:14} {what}" for verb, what in VERBS.items())
    return (
        f"osp VERB key=value ...\n\n{verbs}\n\n"
        "osp VERB --help lists a verb's settings, osp VERB --cfg job prints them composed,\n"
        "osp VERB --multirun key=a,b runs every combination. A prompt=... is one prompt, whatever is in it."
    )
