"""The inputs that ask for a video: text encoders, and conditions beside the text, such as given frames."""

from osp.conditioning.condition import (
    Condition,
    ConditionInputs,
    call_denoiser,
    denoiser_inputs,
    with_conditions,
)
from osp.conditioning.dropout import draw_dropped, drop_prompts
from osp.conditioning.frames import add_condition_noise, latent_mask, masked_video, spread
from osp.conditioning.given import MODES, GivenFrames, frame_channels, given_by_mode, given_frames, joined
from osp.conditioning.masks import KINDS, MIXES, MaskMix, find_mix, frame_mask
from osp.conditioning.pretrained import CLIPPooled, Pair, T5Text
from osp.conditioning.seen import SeenWords, unknown_words
from osp.conditioning.text import EncodedText, TextEncoder, clean_texts
from osp.conditioning.words import WordText

__all__ = [
    "KINDS",
    "MIXES",
    "MODES",
    "CLIPPooled",
    "Condition",
    "ConditionInputs",
    "EncodedText",
    "GivenFrames",
    "MaskMix",
    "Pair",
    "SeenWords",
    "T5Text",
    "TextEncoder",
    "WordText",
    "add_condition_noise",
    "call_denoiser",
    "clean_texts",
    "denoiser_inputs",
    "draw_dropped",
    "drop_prompts",
    "find_mix",
    "frame_channels",
    "frame_mask",
    "given_by_mode",
    "given_frames",
    "joined",
    "latent_mask",
    "masked_video",
    "spread",
    "unknown_words",
    "with_conditions",
]
