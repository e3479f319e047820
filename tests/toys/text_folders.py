"""Folders of text encoders as transformers writes them, of a few thousand weights."""

from pathlib import Path

import torch
import transformers

T5_SHAPE = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 384}
CLIP_SHAPE = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def save_t5(folder: Path, kind: str = "t5", **settings: object) -> Path:
    torch.manual_seed(0)
    config = {"t5": transformers.T5Config, "mt5": transformers.MT5Config}[kind]
    model = {"t5": transformers.T5EncoderModel, "mt5": transformers.MT5EncoderModel}[kind]
    model(config(**T5_SHAPE, feed_forward_proj="gated-gelu", **settings)).save_pretrained(folder)
    transformers.ByT5Tokenizer().save_pretrained(folder)
    return folder


def clip_tokenizer(folder: Path) -> None:
    """Single letters, with CLIP's marks around them."""
    letters = [chr(code) for code in range(33, 127)]
    entries = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(exist_ok=True)
    vocab = {entry: i for i, entry in enumerate(entries)}
    transformers.CLIPTokenizer(vocab=vocab, merges=[]).save_pretrained(folder)


def save_clip(folder: Path, whole: bool = False) -> Path:
    torch.manual_seed(1)
    clip_tokenizer(folder)
    ends = {"bos_token_id": 188, "eos_token_id": 189, "pad_token_id": 189}
    text = {**CLIP_SHAPE, **ends, "vocab_size": 190, "max_position_embeddings": 77, "projection_dim": 20}
    if whole:
        vision = {**CLIP_SHAPE, "image_size": 16, "patch_size": 8}
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)
        transformers.CLIPModel(config).save_pretrained(folder)
    else:
        transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**text)).save_pretrained(folder)
    return folder
