"""Seeds from parts: all that is random derives from named values, so that any process can draw it again."""

import hashlib

import torch


def stable_seed(*parts: int | str) -> int:
    """A seed below 2^63 made of `parts`; equal in every process and version of Python, unlike `hash`."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seeded(*parts: int | str) -> torch.Generator:
    """A generator on the CPU, seeded by `stable_seed` of the parts."""
    return torch.Generator().manual_seed(stable_seed(*parts))
