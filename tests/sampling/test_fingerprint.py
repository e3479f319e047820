"""What videos say of the weights that made them: if it changed, folders of earlier samples would be refused."""

from typing import TypeVar

import torch
from torch import nn

from osp.conditioning import WordText
from osp.denoiser import CrossTransformer, JointTransformer
from osp.sampling.fingerprint import denoiser_fingerprint

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def with_known_weights(model: Model) -> Model:
    for number, (_, value) in enumerate(sorted(model.state_dict().items())):
        value.copy_((torch.arange(value.numel()).reshape(value.shape) % 7 - 3 + number) / 8)
    return model


def test_fingerprints_of_denoisers_are_those_of_earlier_versions() -> None:
    settings = {"channels": 4, "out_channels": 4, "heads": 1, "text_channels": 8, "stages": [{"blocks": 2}]}
    cross = with_known_weights(CrossTransformer(**settings, head_dim=24, frame_channels=[4, 4]))
    joint = with_known_weights(JointTransformer(**settings, head_dim=32, pooled_channels=8, modulation_width=8))
    assert denoiser_fingerprint(cross) == "9987c89b5c3f75a0a925c044411342f2"
    assert denoiser_fingerprint(joint) == "e5bc76253f326ec62cf739b4c173419c"
    assert denoiser_fingerprint(joint.bfloat16()) == "b6af8a860b56fbe9426a327cd7991817"


def test_fingerprint_of_words_is_that_of_earlier_versions() -> None:
    text = with_known_weights(WordText(channels=8, layers=1, heads=1, pooled_channels=4, max_tokens=8))
    assert text.fingerprint() == "words 97baced0a08cc7437ae0ac346b03fd4c"
