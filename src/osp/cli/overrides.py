"""The overrides of a command line, before Hydra reads them."""

import re
from collections.abc import Sequence
from pathlib import Path

from osp.configs.groups import groups_of_several
from osp.errors import UsageError

# Whatever these are, they are text: Hydra's own grammar takes `null` and `1` for values, and commas for a sweep.
_TEXTS = ("prompt", "negative_prompt")
_QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)


def config_folder() -> Path:
    """The folder of configurations: inside an installed package, or at the top of a checkout."""
    installed = Path(__file__).parent.parent / "conf"
    return installed if installed.is_dir() else Path(__file__).parents[3] / "conf"


def quoted(value: object) -> str:
    """A value as Hydra and OmegaConf read it back, whatever characters it has."""
    if re.fullmatch(r"[\w./-]+", str(value), re.ASCII):
        return str(value)
    return _in_quotes(str(value))


def with_quoted_prompts(overrides: Sequence[str]) -> list[str]:
    """The overrides with prompts in quotes, unless they are in quotes already."""
    prepared = []
    for override in overrides:
        key, equals, value = override.partition("=")
        is_bare = equals and key in _TEXTS and not _QUOTED.fullmatch(value.strip())
        prepared.append(f"{key}={_in_quotes(value)}" if is_bare else override)
    return prepared


def prepared(verb: str, overrides: Sequence[str], configs: Path) -> list[str]:
    """The overrides of a verb as Hydra takes them; `configs` is the folder of all configurations.

    Raises UsageError for one that Hydra takes for something else than is meant.
    """
    overrides = with_own_groups(verb, overrides, configs)
    check_choices(verb, overrides, configs)
    return with_quoted_prompts(overrides) if verb in ("sample", "eval") else overrides


def is_prompt_with_commas(overrides: Sequence[str]) -> bool:
    """Whether a prompt among the overrides has commas that might be meant for a sweep, and stands in no quotes."""
    return any("," in one for one in {*overrides} - {*with_quoted_prompts(overrides)})


def with_own_groups(verb: str, overrides: Sequence[str], configs: Path) -> list[str]:
    """The overrides with a verb's own groups by their full name: `target=vae` of bench is `bench/target=vae`."""
    own = {path.name for path in (configs / verb).glob("*/")}
    return [f"{verb}/{override}" if override.partition("=")[0] in own else override for override in overrides]


def check_choices(verb: str, overrides: Sequence[str], configs: Path) -> None:
    """Raise UsageError for a group in `configs` of which nothing is chosen in a way that Hydra does not take."""
    several = groups_of_several(verb, configs)
    for override in overrides:
        key, _, value = override.partition("=")
        if (group := key.lstrip("~+/")) in several and (value == "null" or key.startswith("~")):
            raise UsageError(f"{override}: several may be chosen of this group, and {group}=[] chooses none")
        if value == "null" and (configs / key.partition("@")[0].lstrip("+/")).is_dir():
            raise UsageError(f"{override}: a choice is left out by '~{key.lstrip('+')}', in quotes")


def _in_quotes(text: str) -> str:
    text = text.replace("${", "\\${")  # no interpolation
    # In quotes a backslash is itself, except before a quote and at the end.
    return "'" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), text) + "'"
