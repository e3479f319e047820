"""Which settings are paths: whatever such a setting is given is the name of a file or folder, as it stands."""

from collections.abc import Mapping

_EVERYWHERE = frozenset(
    {
        *("output", "input", "captions", "checkpoint", "path", "source", "start_from", "scaling_from", "generated"),
        *("trunk", "tokenizer", "save_dir", "dirpath", "folder", "dataset", "cache"),
    }
)
_OF_VERBS: Mapping[str, frozenset[str]] = {
    "sample": frozenset({"prompts", "image", "last_image", "video"}),
    "page": frozenset({"vae_run", "reconstruction", "denoiser_run", "generation", "samples"}),
    "chain": frozenset({"data"}),
    "shards": frozenset({"annotations", "strip"}),
    "import-weights": frozenset({"denoiser", "vae"}),  # folders within the source
}
_OR_MAPPINGS = ("config",)


def is_path(verb: str, key: str) -> bool:
    """Whether a setting of a verb, by its whole name, is a path, or a list of them."""
    name = key.rpartition(".")[2]
    return name in _EVERYWHERE or name in _OF_VERBS.get(verb, ()) or name in _OR_MAPPINGS


def may_be_a_mapping(key: str) -> bool:
    """Whether instead of a path the mapping that its file holds may be given: `config={key: value}`."""
    return key.rpartition(".")[2] in _OR_MAPPINGS


def has_paths_by_number(verb: str, key: str) -> bool:
    """Whether a setting is a mapping from numbers to paths: `given={0: a.png}` of `osp sample`."""
    return verb == "sample" and key == "given"
