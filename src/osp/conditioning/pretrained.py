"""The text encoders of the published models: T5 for tokens, CLIP for one vector a prompt; never trained here.

v1.3 reads mT5-xxl (4096 wide); v1.5 reads T5-v1.1-XL (2048) and the pooled text of OpenCLIP bigG (1280).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from osp.checks import check_choice
from osp.conditioning.cleaning import RULES, find_cleaning
from osp.conditioning.folders import folder_fingerprint, load_model, load_tokenizer, read_settings
from osp.conditioning.text import EncodedText, LengthCheck, TextEncoder
from osp.data.features.format import TextIdentity
from osp.errors import UsageError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class FrozenText:
    """A model of transformers and its tokenizer, from folders on this machine.

    It is no `nn.Module`, so that it does not become part of what is trained and saved; `to` moves it.

    Args:
        path: folder with `config.json`, safetensors and the tokenizer.
        max_tokens: tokens of a prompt that are read, its end token among them; None: `published_tokens`.
        channels: the width that is expected; None takes any.
        dtype: of the weights and of what comes out.
        tokenizer: its folder, where that is another one.

    Raises UsageError for a folder of something else or of another width, DataError for one that is damaged.
    """

    name: str
    trained = False
    model_types: tuple[str, ...]
    published_tokens: int

    def __init__(
        self,
        path: str | Path,
        max_tokens: int | None = None,
        channels: int | None = None,
        dtype: torch.dtype | str = "bfloat16",
        tokenizer: str | Path | None = None,
    ) -> None:
        max_tokens = self.published_tokens if max_tokens is None else max_tokens
        named = str(dtype).removeprefix("torch.")
        check_choice(f"{self.name}: dtype", named, _DTYPES)
        kind = _DTYPES[named]
        self.check_length = LengthCheck(self.name, max_tokens)
        self.max_tokens = max_tokens
        settings = read_settings(path, self.model_types)
        self.channels = self.width(settings)
        if channels is not None and channels != self.channels:
            raise UsageError(f"{path}: its text is {self.channels} wide, but channels={channels}; give another folder")
        tokenizer = path if tokenizer is None else tokenizer
        self.tokenizer = load_tokenizer(tokenizer)
        self.model: Any = load_model(self.model_class(settings), path, kind)
        self._content = folder_fingerprint(path, tokenizer, max_tokens, str(kind))

    def width(self, settings: dict[str, Any]) -> int:
        """Channels of what comes out, by `config.json`."""
        raise NotImplementedError

    def model_class(self, settings: dict[str, Any]) -> Any:
        """The class of transformers that the weights go into."""
        raise NotImplementedError

    def to(self, device: torch.device | str) -> Self:
        """Move the model, and with it what it gives."""
        self.model.to(device)
        return self

    def networks(self) -> Sequence[nn.Module]:
        """See `TextEncoder.networks`."""
        return [self.model]

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """See `TextEncoder.count_tokens`."""
        return [len(ids) for ids in self.tokenizer(list(prompts), verbose=False).input_ids]

    def fingerprint(self) -> str:
        """A fingerprint of the folder's content and the settings, whatever its path."""
        return f"{self.name} {self._content}"

    def tokenized(self, prompts: Sequence[str], strict: bool, least: int = 0) -> tuple[Tensor, Tensor]:
        """Token ids and mask (bool), both `B L`, padded to the longest prompt and to `least` tokens.

        Padding changes nothing in what a prompt's own tokens become.
        """
        self.check_length(prompts, self.count_tokens(prompts), strict)
        tokens = self.tokenizer(
            list(prompts),
            padding="longest",
            padding_side="right",
            truncation=True,
            max_length=self.max_tokens,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(self.model.device)
        ids, mask = tokens.input_ids, tokens.attention_mask.bool()
        more = max(0, least - ids.shape[1])
        return F.pad(ids, (0, more), value=self.tokenizer.pad_token_id), F.pad(mask, (0, more))


class T5Text(FrozenText, TextEncoder):
    """The encoder of a T5 or mT5 as a `TextEncoder`; see `FrozenText` for the other arguments.

    Args:
        cleaning, prompt_cleaning: of captions and of prompts; see `TextEncoder`.
        cut_to_prompt: the negative prompt has as many tokens as the prompt in sampling, none of them masked: what goes
            beyond is cut, and padding counts as text. v1.0 and v1.1 sample so.

    Weights of a decoder are passed over. T5's values overflow in float16.
    """

    name = "t5"
    model_types = ("t5", "mt5")
    published_tokens = 512
    pooled_channels = None

    def __init__(
        self,
        path: str | Path,
        max_tokens: int | None = None,
        channels: int | None = None,
        dtype: torch.dtype | str = "bfloat16",
        tokenizer: str | Path | None = None,
        cleaning: str = "none",
        prompt_cleaning: str = "none",
        cut_to_prompt: bool = False,
    ) -> None:
        _check_cleanings(self.name, cleaning, prompt_cleaning)
        super().__init__(path, max_tokens, channels, dtype, tokenizer)
        self.cleaning, self.prompt_cleaning, self.cut_to_prompt = cleaning, prompt_cleaning, cut_to_prompt

    def fingerprint(self) -> str:
        """That of the folder and the settings, which changes with the cleaning of captions too."""
        return super().fingerprint() + _mark(self.cleaning)

    def width(self, settings: dict[str, Any]) -> int:
        """The width of the encoder's states."""
        return int(settings.get("d_model", 512))

    def model_class(self, settings: dict[str, Any]) -> Any:
        """The encoder alone."""
        from transformers import MT5EncoderModel, T5EncoderModel

        return {"t5": T5EncoderModel, "mt5": MT5EncoderModel}[settings["model_type"]]

    @torch.no_grad()  # not inference mode: the denoiser's gradient needs the text
    def __call__(self, prompts: Sequence[str], strict: bool = False) -> EncodedText:
        """See `TextEncoder.__call__`."""
        ids, mask = self.tokenized(prompts, strict)
        text = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        return EncodedText(text * mask[..., None], mask)

    @torch.no_grad()
    def with_negative(self, prompts: Sequence[str], negative: str) -> tuple[EncodedText, EncodedText]:
        """See `TextEncoder.with_negative`; with `cut_to_prompt` both have the prompts' mask.

        So each prompt is as if alone, whatever others it is encoded with.
        """
        if not self.cut_to_prompt:
            return super().with_negative(prompts, negative)
        encoded = self(prompts, strict=True)
        length = encoded.text.shape[1]
        ids, mask = self.tokenized([negative], strict=True, least=length)
        against = self.model(input_ids=ids, attention_mask=mask).last_hidden_state[:, :length]
        return encoded, EncodedText(against * encoded.mask[..., None], encoded.mask)


class CLIPPooled(FrozenText):
    """CLIP's one vector for a prompt, in the space that it shares with images; see `FrozenText` for the arguments.

    The folder may hold all of a CLIP; its vision part is passed over.
    """

    name = "clip"
    model_types = ("clip", "clip_text_model")
    published_tokens = 77

    def width(self, settings: dict[str, Any]) -> int:
        """The width of the projection."""
        inner = settings.get("text_config") or {}
        return int(settings.get("projection_dim") or inner.get("projection_dim") or 512)

    def model_class(self, settings: dict[str, Any]) -> Any:
        """The text part with its projection."""
        from transformers import CLIPTextModelWithProjection

        return CLIPTextModelWithProjection

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], strict: bool = False) -> Tensor:
        """Prompts -> `B P`."""
        ids, mask = self.tokenized(prompts, strict)
        return self.model(input_ids=ids, attention_mask=mask).text_embeds


class Pair(TextEncoder):
    """v1.5's text: the tokens of one encoder, the pooled text of another.

    `max_tokens` and the count are those of `tokens`. A prompt that is too long for `pooled` only is cut there without a
    word: its 77 tokens are a summary, and 512 a full description. Both read a caption after `cleaning`, and a prompt
    after `prompt_cleaning`.
    """

    name = "pair"
    trained = False

    def __init__(
        self, tokens: T5Text, pooled: CLIPPooled, cleaning: str = "none", prompt_cleaning: str = "none"
    ) -> None:
        _check_cleanings(self.name, cleaning, prompt_cleaning)
        self.tokens, self.pooled = tokens, pooled
        self.cleaning, self.prompt_cleaning = cleaning, prompt_cleaning
        self.channels, self.pooled_channels = tokens.channels, pooled.channels
        self.max_tokens = tokens.max_tokens
        pooled.check_length.said = True

    def __call__(self, prompts: Sequence[str], strict: bool = False) -> EncodedText:
        """See `TextEncoder.__call__`."""
        encoded = self.tokens(prompts, strict)
        return EncodedText(encoded.text, encoded.mask, self.pooled(prompts))

    def to(self, device: torch.device | str) -> Self:
        """Move both."""
        self.tokens.to(device)
        self.pooled.to(device)
        return self

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """See `TextEncoder.count_tokens`."""
        return self.tokens.count_tokens(prompts)

    def fingerprint(self) -> str:
        """The fingerprints of both encoders."""
        return f"{self.tokens.fingerprint()} + {self.pooled.fingerprint()}{_mark(self.cleaning)}"

    def networks(self) -> Sequence[nn.Module]:
        """See `TextEncoder.networks`."""
        return [*self.tokens.networks(), *self.pooled.networks()]

    def identities(self) -> tuple[TextIdentity | None, TextIdentity | None]:
        """See `TextEncoder.identities`; each has its own."""
        mark = _mark(self.cleaning)
        tokens = TextIdentity(self.tokens.name, self.tokens.fingerprint() + mark, self.tokens.channels)
        return tokens, TextIdentity(self.pooled.name, self.pooled.fingerprint() + mark, self.pooled.channels)


def _check_cleanings(name: str, captions: str, prompts: str) -> None:
    """Raise UsageError for a cleaning that is not known."""
    find_cleaning(captions, f"{name}: cleaning")
    find_cleaning(prompts, f"{name}: prompt_cleaning")


def _mark(cleaning: str) -> str:
    """The end of a fingerprint that says how captions are cleaned; empty where they are not."""
    return "" if cleaning == "none" else f" cleaned {cleaning}.{RULES}"
