"""Folders of published text encoders, as transformers writes them: read from the disk alone, without running code."""

import hashlib
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from osp.checks import is_finite
from osp.documents import DocumentError, check_form, printable, read_json
from osp.errors import DataError, UsageError
from osp.files import no_weights

_WORDS = ("red", "left", "it")  # that any vocabulary tells apart
_SMALL = ("*.json", "*.txt", "*.model")
_FORM = {"d_model?": int, "projection_dim?": int, "text_config?": ({"projection_dim?": int}, None)}
_PROBES, _PROBE = 64, 4096  # pieces of a weight file that go into its fingerprint, and their bytes
# The errors of transformers, tokenizers and safetensors for folders that are incomplete, damaged or of another kind.
_UNREADABLE = (SafetensorError, OSError, ValueError, RuntimeError, ImportError, LookupError, TypeError, AttributeError)


def read_settings(path: str | Path, model_types: Sequence[str]) -> dict[str, Any]:
    """The settings in the folder's `config.json`.

    Raises UsageError for a folder that is missing, holds no model, one of a type that is not wanted, or pickles only.
    """
    folder = Path(path)
    config = folder / "config.json"
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; give one with a text encoder's config.json and safetensors")
    if not config.is_file():
        raise UsageError(f"{folder}: holds no config.json, so it is no folder of a text encoder")
    try:
        settings = read_json(config)
    except DocumentError as error:
        # A pointer or a web page stands where a configuration should.
        told = None if _begins_as_json(config) else no_weights(config)
        raise DataError(f"{config}: {told or f'cannot be read ({error})'}") from error
    if not isinstance(settings, dict) or settings.get("model_type") not in model_types:
        found = settings.get("model_type") if isinstance(settings, dict) else None
        raise UsageError(f"{config}: model_type is {found!r}; a folder of {' or '.join(model_types)} is wanted")
    check_form(settings, _FORM, str(config))
    if not weight_files(folder):
        pickled = next(iter(sorted([*folder.glob("*.bin"), *folder.glob("*.pt")])), None)
        what = f"only pickled weights ({pickled.name})" if pickled else "no weights"
        raise UsageError(
            f"{folder}: holds {what}; model.safetensors is wanted, which save_pretrained of transformers writes"
        )
    return settings


def _begins_as_json(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(64).lstrip().startswith(b"{")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors of a model, one file or the parts that its index names; none if they are not there."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return []
    names = sorted(set(read_json(index, {"weight_map": {...: str}})["weight_map"].values()))
    if odd := [name for name in names if name in ("", ".", "..") or "\\" in name or Path(name).name != name]:
        raise DataError(f"{index}: names the weight file {printable(odd[0])[:60]}; it must lie beside its index")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{folder}: {len(missing)} of {len(names)} weight files are missing (first: {missing[0]})")
    return [folder / name for name in names]


def load_model(model_class: Any, path: str | Path, dtype: torch.dtype) -> Any:
    """The model of a folder, frozen, in eval mode. Raises DataError for weights that are damaged or incomplete."""
    for file in weight_files(Path(path)):
        if told := no_weights(file):
            raise DataError(f"{file}: {told}")
    try:
        with _quiet():
            model, report = model_class.from_pretrained(
                path,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # they are reported below, in one line
                output_loading_info=True,
            )
    except _UNREADABLE as error:
        raise DataError(f"{path}: its weights cannot be read ({_first_line(error)})") from error
    # transformers fills what is missing with random numbers.
    wrong = sorted({*report["missing_keys"], *(str(entry[0]) for entry in report["mismatched_keys"])})
    if wrong:
        raise DataError(f"{path}: {len(wrong)} weights are missing or of another shape (first: {wrong[0]})")
    if broken := [name for name, value in model.state_dict().items() if not is_finite(value)]:
        raise DataError(f"{path}: {broken[0]} holds numbers that are not finite (NaN or infinity)")
    return model.eval().requires_grad_(False)


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a folder. Raises DataError if there is none that can be read."""
    from transformers import AutoTokenizer

    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
            tokens = [tuple(ids) for ids in tokenizer(list(_WORDS)).input_ids]
    except _UNREADABLE as error:
        raise DataError(f"{path}: its tokenizer cannot be read ({_first_line(error)})") from error
    # If its files are missing, transformers makes a tokenizer without a vocabulary, which takes all words for the same.
    if len(set(tokens)) < len(_WORDS):
        raise DataError(f"{path}: its tokenizer has no vocabulary; add its files, or give their folder as tokenizer")
    return tokenizer


def folder_fingerprint(path: str | Path, tokenizer: str | Path, *settings: Any) -> str:
    """A hash of the settings and of both folders: small files whole, of weights the header and pieces of the rest.

    To read 20 GB of weights for it would take longer than to load them; other weights differ everywhere.
    """
    content = hashlib.sha256(repr(settings).encode())
    for folder in {Path(path): None, Path(tokenizer): None}:
        for file in sorted(file for pattern in _SMALL for file in folder.glob(pattern)):
            content.update(file.name.encode() + b"\0" + file.read_bytes())
    for file in weight_files(Path(path)):
        size = file.stat().st_size
        with open(file, "rb") as opened:
            (header,) = struct.unpack("<Q", opened.read(8))
            content.update(f"{file.name} {size} ".encode() + opened.read(header))
            for probe in range(_PROBES):
                opened.seek(8 + header + (size - 8 - header) * probe // _PROBES)
                content.update(opened.read(_PROBE))
    return content.hexdigest()[:32]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' reports of what it passed over: decoders, vision towers."""
    from transformers.utils import logging as messages

    before = messages.get_verbosity()
    messages.set_verbosity_error()
    try:
        yield
    finally:
        messages.set_verbosity(before)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
