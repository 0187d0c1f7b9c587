"""The cache for generation by Hugging Face transformers: a decoder behind the interface of their caches.

Shapes: B batch, T columns of input_ids, V vocabulary.
"""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils as transformers_caches
from transformers.modeling_outputs import CausalLMOutputWithPast

from perceiver_ar.errors import InputError, require
from perceiver_ar.generation import prompt_rows
from perceiver_ar.generation.decoder import Decoder, Recomputing
from perceiver_ar.generation.rows import Row
from perceiver_ar.network.model import PerceiverAR

CACHE = next(name for name in ("cache", "past_key_values") if name in CausalLMOutputWithPast.__annotations__)
"""The name of the cache in outputs of transformers: `past_key_values` up to 5.23."""


class PerceiverARCache(transformers_caches.Cache):
    """Holds a `Decoder`, so that windows, refills and reuse are those of `generate`.

    Rows depend neither on each other nor on their padding. The first call reads prompts, (B, T) with any left padding;
    further tokens continue the rows as if they had been drawn.
    """

    def __init__(self, max_length: int | None = None) -> None:
        """max_length: columns with room from the beginning; None: a whole context. Further ones take more memory."""
        super().__init__(layers=[])
        self.max_length, self.length = max_length, 0
        self.decoder: Decoder | Recomputing | None = None

    def read(self, network: PerceiverAR, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Appends tokens (B, T); returns the logits after each of them (B, T, V), or after the last one of prompts
        (B, 1, V).

        mask: (B, columns so far + T), 0 for padding, as in transformers.

        Raises:
            InputError: padding to the right of a token, rows of padding alone, another network or other rows than
                before, a mask that does not fit.
        """
        require(
            tokens.ndim == 2 and 0 not in tokens.shape,
            f"input_ids have shape {tuple(tokens.shape)} after {self.length} cached columns: give (B, T), at least "
            "one new token for each row",
        )
        B, T = tokens.shape
        total = self.length + T
        require(
            mask is None or mask.shape == (B, total),
            f"attention_mask has shape {None if mask is None else tuple(mask.shape)}: give {(B, total)}, for "
            f"{self.length} cached columns and {T} new ones",
        )
        real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask[:, -T:].bool()
        if self.decoder is None:
            require(
                bool(real[:, -1].all()),
                "rows are padded on the right, so that their next token would follow padding: pad them on the left "
                "(tokenizer.padding_side = 'left') and give attention_mask",
            )
            prompts = prompt_rows(
                [row[keep] for row, keep in zip(tokens, real, strict=True)], network.config.vocab_size
            )
            room = network.config.context_length if self.max_length is None else max(self.max_length - T, 0) + 1
            rows = [Row(r, row, network.config) for r, row in enumerate(prompts)]
            # Beams and samples of one prompt are equal neighbouring rows: the prompt is read once.
            sizes = [n for n in range(1, B + 1) if B % n == 0]
            copies = max(n for n in sizes if all(torch.equal(prompts[r], prompts[r - r % n]) for r in range(B)))
            if network.config.cacheable:
                self.decoder = Decoder(network, rows, copies, room)
            else:
                self.decoder = Recomputing(network, rows)
            logits = [self.decoder.next_logits()]
        else:
            rows = self.decoder.rows
            require(self.decoder.model is network, "the cache was filled by another network: begin a new one")
            require(len(rows) == B, f"tokens have {B} rows for {len(rows)} in the cache: continue every row")
            require(bool(real.all()), "new tokens are masked as padding: continue every row, or give attention_mask")
            counts = [row.num_tokens for row in rows]
            found = counts if mask is None else mask[:, : self.length].bool().sum(1).tolist()
            require(
                found == counts,
                f"attention_mask has {found} real tokens in cached columns, the cache {counts}: give it as before",
            )
            if isinstance(self.decoder, Decoder):
                self.decoder.reserve(max(counts) + T)
            logits = []
            for column in prompt_rows(tokens.T, network.config.vocab_size):
                self.decoder.add(column.tolist())
                logits.append(self.decoder.next_logits())
        self.length = total
        return torch.stack(logits, dim=1)

    def require_same(self, tokens: Tensor, mask: Tensor | None) -> None:
        """Raises InputError unless tokens (B, columns so far or more), with their mask, begin with those read."""
        rows = [] if self.decoder is None else self.decoder.rows
        for r, row in enumerate(rows if len(rows) == len(tokens) else []):
            before = tokens[r, : self.length]
            before = before if mask is None else before[mask[r, : self.length].bool()]
            require(
                before[-len(row.ids) :].tolist() == list(row.ids),
                f"row {r} of input_ids does not begin with the {row.num_tokens} tokens that the cache has read: give "
                "all of them and what follows, or a new cache",
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> "PerceiverARCache":
        """For prompts that share a beginning: copies the rows and their cache, but not the network."""
        new = copy.copy(self)
        if self.decoder is not None:
            new.decoder = copy.copy(self.decoder)
            new.decoder.reorder(range(len(self.decoder.rows)))
        return new

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns read, padding included, as transformers count."""
        return self.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        order = beam_idx.tolist()
        if self.decoder is not None and order != list(range(len(self.decoder.rows))):
            self.decoder.reorder(order)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.decoder is not None:
            self.decoder.reorder([r for r in range(len(self.decoder.rows)) for _ in range(repeats)])

    def reset(self) -> None:
        self.decoder, self.length = None, 0

    def crop(self, tokens_to_remove: int) -> None:
        raise InputError("tokens cannot be taken out of this cache again: begin a new one")

    @property
    def is_croppable(self) -> bool:
        return False

    @property
    def is_linear(self) -> list[bool]:
        return [False]  # what was read is not to be given again


def only_cache(cache: PerceiverARCache | None, past_key_values: PerceiverARCache | None) -> PerceiverARCache | None:
    """The cache under either name. Raises InputError if both are given."""
    require(cache is None or past_key_values is None, "cache and past_key_values are two names of one: leave one out")
    return past_key_values if cache is None else cache
