"""What of an exception a user is shown: one line, if it is theirs to mend."""

import sys

from osp.errors import DataError, OspError, UsageError


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
        from osp.training.former import new_key  # here: it brings the models

        key = shown[0].partition("'")[2].partition("'")[0]
        if (now := new_key(verb, key)) is not None:
            return f"{key} is now called {now}"
        by_target = f"; those of `osp {verb}` depend on target=..." if verb in ("bench", "eval") else ""
        shown.append(f"--help lists the settings{by_target}")
    # A group in the folder of its verb is given without that.
    return "; ".join(shown).replace(":;", ":").replace(f"{verb}/target", "target")
