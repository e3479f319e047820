"""The text of a batch, as a denoiser takes it in training."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from osp.checks import check_number
from osp.conditioning import EncodedText, SeenWords, TextEncoder, clean_texts, draw_dropped, drop_prompts
from osp.data.features.format import TextIdentity
from osp.data.sources import ClipSource
from osp.errors import UsageError
from osp.parallel import kind_of
from osp.training.encode_features import text_identities
from osp.training.joint import joint_captions
from osp.training.module import Batch


class TextInput:
    """Embeddings that features hold, or captions that an encoder reads.

    Args:
        encoder: of captions; None where the features hold embeddings. One that learns along is handed to `encode`, as
            it has learned, and is not kept here.
        dropout: the part of the samples that lose their text; 1 trains without captions.
        image_text: half of the images have this text instead of their caption; None: none have.
        dropped_text: half of the samples that lose their text have this one; None: all have the empty one.

    Raises UsageError for a dropout outside 0 to 1, and for a text that nobody can encode.
    """

    def __init__(
        self,
        encoder: TextEncoder | None,
        dropout: float,
        image_text: str | None = None,
        dropped_text: str | None = None,
    ) -> None:
        check_number("module.text_dropout", dropout, least=0, most=1)
        if dropped_text is not None and encoder is None:
            raise UsageError("module.dropped_text: needs a text encoder, text=NAME, to be read by; or set it to null")
        self.is_trained = encoder is not None and encoder.trained
        self.frozen = None if self.is_trained else encoder
        self.dropout, self.image_text, self.dropped_text = dropout, image_text, dropped_text
        self.seen = SeenWords(() if self.is_trained else None)
        self._empty: EncodedText | None = None  # of features
        self._made_by: tuple[TextIdentity | None, TextIdentity | None] = (None, None)

    def prepare(self, source: ClipSource) -> None:
        """Take from the training clips what their embeddings are made by, and that of the empty text."""
        self._empty = _empty_text(source)
        self._made_by = text_identities(self.frozen)
        if self.frozen is None and not self.is_trained and source.made_with is not None:
            self._made_by = source.made_with.text, source.made_with.pooled_text

    def draw_dropped(self, generators: Sequence[torch.Generator]) -> Tensor:
        """Which samples lose their text, bool `B`; takes one number of each sample's generator."""
        return draw_dropped(self.dropout, generators)

    def encode(
        self,
        batch: Batch,
        trained: TextEncoder | None,
        dropped: Tensor | None = None,
        generators: Sequence[torch.Generator] = (),
        images: int = 0,
    ) -> EncodedText:
        """The text of a batch. `trained` is the encoder that learns along, if there is one.

        In training some samples are `dropped`, and with generators images and dropped samples may get their other
        text; the words that the encoder reads then are kept in `seen`. In a joint batch with so many `images` a clip,
        captions of their own follow that of their clip, and are dropped with it. Raises UsageError for embeddings where
        there is a text for dropped samples.
        """
        if "text" in batch and not self.is_trained:
            text = EncodedText(batch["text"], batch["text_mask"], batch.get("pooled_text"))
            if dropped is None or not dropped.any():
                return text
            if self.dropped_text is not None:
                raise UsageError(
                    "module.dropped_text: needs captions, and these features hold embeddings; set it to null, or train "
                    "on videos"
                )
            assert self._empty is not None
            return text.replaced(dropped, self._empty.to(text.text.device, text.text.dtype))
        encoder = trained if self.is_trained else self.frozen
        assert encoder is not None
        captions = joint_captions(batch) if images else list(batch["caption"])
        if dropped is not None:
            dropped = dropped.repeat_interleave(len(captions) // len(dropped))
        if generators and self.image_text is not None and batch["video"].shape[2] == 1:
            default = draw_dropped(0.5, generators).tolist()
            captions = [self.image_text if use else text for text, use in zip(captions, default, strict=True)]
        read = captions if dropped is None else drop_prompts(captions, dropped)
        if generators and dropped is not None and self.dropped_text is not None:
            other = draw_dropped(0.5, generators).repeat_interleave(len(read) // len(generators)) & dropped
            read = [self.dropped_text if use else text for text, use in zip(read, other.tolist(), strict=True)]
        if generators:
            self.seen.add(read)
        return encoder(clean_texts(read, encoder.cleaning))

    def entry(self, trained: Any) -> dict[str, Any]:
        """A checkpoint's entry on its text, as plain values: the encoder that learned along, or what made the text."""
        if self.is_trained:
            assert isinstance(trained, nn.Module)
            return {"encoder": kind_of(trained).__name__, "settings": trained.settings}
        return {"encoder": None, "settings": {}, "made_by": [one and asdict(one) for one in self._made_by]}


def _empty_text(source: ClipSource) -> EncodedText | None:
    """The embedding of the empty text in features, if they have it."""
    if "text" not in source.empty:
        return None
    text, pooled = source.empty["text"][None], source.empty.get("pooled_text")
    mask = torch.ones(text.shape[:2], dtype=torch.bool)
    return EncodedText(text, mask, None if pooled is None else pooled[None])
