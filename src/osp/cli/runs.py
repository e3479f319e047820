"""Folders of `osp train`: what a run leaves there, and whether another can go on with it."""

from typing import Any

from omegaconf import DictConfig, OmegaConf

RESULT = "result.json"
"""What a run leaves in its folder, and a sweep's table is made of."""

# What a run cannot change half-way. The rest (steps, devices, intervals) may differ when it is continued.
_FIXED = ("vae", "module", "latent", "data", "clip", "seed", "global_batch")
# What of it may: the loader itself refuses another global batch, and a denoiser another VAE.
_FREE = (
    *("data.workers", "data.batch_size", "data.batch_tokens", "data.val_batch_size", "data.devices"),
    *("vae.path", "module.vae.path", "latent.vae.path"),
)


def is_first_process() -> bool:
    """Whether this is the run's first process, as far as its launcher has said yet."""
    from lightning.pytorch.utilities import rank_zero_only  # here: what only reads runs needs none of it

    return getattr(rank_zero_only, "rank", 0) == 0


def other_setting(before: Any, cfg: DictConfig) -> str | None:
    """Why a run with settings `before` cannot go on with those of `cfg`: "KEY=BEFORE, not NOW"; None if it can."""
    for part in _FIXED:
        old, new = (_flat(_plain(config).get(part), part) for config in (before, cfg))
        for key in sorted(old.keys() | new.keys()):
            if key not in _FREE and old.get(key) != new.get(key):
                return f"{key}={old.get(key)}, not {new.get(key)}"
    return None


def _plain(config: Any) -> dict[str, Any]:
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _flat(value: Any, key: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return {name: leaf for part, inner in value.items() for name, leaf in _flat(inner, f"{key}.{part}").items()}
    return {key: value}
