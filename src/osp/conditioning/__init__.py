"""Prompts and frames: text encoders, and masks of the frames that are given."""

from osp.conditioning.dropout import draw_dropped, drop_prompts
from osp.conditioning.frames import add_condition_noise, latent_mask, masked_video, spread, with_conditions
from osp.conditioning.given import MODES, GivenFrames, given_by_mode, given_frames
from osp.conditioning.masks import KINDS, MIXES, MaskMix, find_mix, frame_mask
from osp.conditioning.pretrained import CLIPPooled, Pair, T5Text
from osp.conditioning.text import EncodedText, TextEncoder
from osp.conditioning.words import WordText

__all__ = [
    "KINDS",
    "MIXES",
    "MODES",
    "CLIPPooled",
    "EncodedText",
    "GivenFrames",
    "MaskMix",
    "Pair",
    "T5Text",
    "TextEncoder",
    "WordText",
    "add_condition_noise",
    "draw_dropped",
    "drop_prompts",
    "find_mix",
    "frame_mask",
    "given_by_mode",
    "given_frames",
    "latent_mask",
    "masked_video",
    "spread",
    "with_conditions",
]
