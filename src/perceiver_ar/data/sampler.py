"""The sampler: the endless sequence of training windows over a token file, a function of the seed.

Shapes: B batch, T context_length, N num_latents; n is the number of tokens in the file.
"""

from collections.abc import Callable

import numpy as np
import torch

from perceiver_ar.data.token_files import TokenFile
from perceiver_ar.errors import InputError


class TrainingWindows:
    """An endless sequence of training windows. Each is a pure function of its index, so resuming needs only the index.

    The sequence is pass after pass over the tokens x[0..n-1]. In each pass every target x[1..n-1] is in exactly one
    window. Its context is the T tokens before the window's last target, or all of them if there are fewer. A pass cuts
    the targets every N tokens, starting at a random point, and takes the pieces in random order. Both depend on (seed,
    pass) alone, so no list of windows is stored.

    If all documents have `document_length` tokens (pictures), each is cut separately: its first token is not a target,
    and no context reaches beyond its start, so a token has the same place in the context as in the document.

    `augment` (`codec.augment`) may change a window's ids; its randomness depends on (seed, index) alone, too.

    If documents have conditions, a window that starts within a document has that document's conditions in place of its
    first tokens; `forget` (`ConditionedCodec.forget`) may make conditions of the window unknown.
    """

    def __init__(
        self,
        tokens: TokenFile | np.ndarray,
        context_length: int,
        num_latents: int,
        seed: int = 0,
        *,
        document_length: int | None = None,
        augment: Callable[[np.ndarray, np.random.Generator], np.ndarray] | None = None,
        forget: Callable[[np.ndarray, np.random.Generator], np.ndarray] | None = None,
    ):
        """tokens: (n,) ids. Raises `InputError` if there are fewer than T + 1, or documents of another length."""
        length = len(tokens) if document_length is None else document_length
        if not 1 <= num_latents <= context_length:
            raise InputError(f"num_latents {num_latents} is not between 1 and context_length {context_length}")
        if length < context_length + 1:
            raise InputError(
                f"the data holds {length} tokens, but a window takes context_length + 1 = {context_length + 1}; "
                f"give more data or a context_length of at most {max(length - 1, 0)}"
            )
        if document_length is not None and length != context_length + 1:
            raise InputError(
                f"context_length is {context_length}, but it must be one less than the {length} tokens of a document; "
                f"give {length - 1}"
            )
        if len(tokens) % length:
            raise InputError(f"{len(tokens)} tokens are not documents of {length}; prepare the data again")
        self.context_length = context_length
        self.num_latents = num_latents
        self.seed = seed
        self.document_length = document_length
        self._augment, self._forget = augment, forget
        self._data = tokens
        self._length = length
        self._num_documents = len(tokens) // length
        self._firsts = np.zeros(1, dtype=np.int64)  # index of the first window of each pass; grows when needed

    @property
    def num_conditions(self) -> int:
        """Number of conditions at the start of each context."""
        return self._data.conditions[1] if isinstance(self._data, TokenFile) else 0

    def first_window(self, number: int) -> int:
        """The index of the first window of pass `number` (0, 1, ...)."""
        while len(self._firsts) <= number:
            self._extend()
        return int(self._firsts[number])

    def spans(self, first: int, count: int) -> np.ndarray:
        """The targets x[a:b] of windows first..first+count-1: (count, 2) int64 of a, b."""
        indices = np.arange(first, first + count)
        while self._firsts[-1] < first + count:
            self._extend()
        numbers = np.searchsorted(self._firsts, indices, side="right") - 1  # the pass of each window
        places = np.empty(count, dtype=np.int64)  # of each window within its pass, in token order
        for number in np.unique(numbers):
            here = numbers == number
            size = self.first_window(number + 1) - self.first_window(number)
            places[here] = _permute(indices[here] - self._firsts[number], size, _hash(self.seed, 1, number))
        leads = self._leads(numbers)
        documents, pieces = np.divmod(places, self._pieces(leads))
        starts = 1 - leads + pieces * self.num_latents
        ends = np.minimum(starts + self.num_latents, self._length)
        return np.stack([np.maximum(starts, 1), ends], axis=1) + documents[:, None] * self._length

    def batch(self, first: int, count: int, cut: int = 0) -> dict[str, torch.Tensor]:
        """Windows first..first+count-1 as `tokens` (B, T) and `labels` int64 (B, N), both right-aligned.

        Tokens are uint8 if they are stored as uint8, else of a larger signed type (torch hardly supports uint16). The
        last label belongs to the last token. Labels that are not targets of the window are -100. A row with fewer than
        T tokens starts with zeros; only then is there a `mask` bool (B, T), True for real tokens. With
        `document_length`, padding that all rows share is cut from T in quarters (each new shape needs new kernels).
        The first `cut` tokens of each row are left out.
        """
        data = self._data
        size = 8 if self._augment is not None else data.dtype.itemsize
        tokens = np.zeros((count, self.context_length), dtype={1: np.uint8, 2: np.int32}.get(size, np.int64))
        labels = np.full((count, self.num_latents), -100, dtype=np.int64)
        mask = np.ones(tokens.shape, dtype=bool)
        spans = self.spans(first, count).tolist()
        for row, (a, b) in enumerate(spans):
            document = (b - 1) // self._length * self._length
            first_token = max(document, b - 1 - self.context_length)
            # The context and, after it, the last target.
            window = data.read(first_token, b) if isinstance(data, TokenFile) else data[first_token:b]
            if self._augment is not None:
                window = self._augment(window, np.random.default_rng((self.seed % 2**63, 2, first + row)))
            padding = self.context_length - (len(window) - 1)
            tokens[row, padding:] = window[:-1]
            labels[row, self.num_latents - (b - a) :] = window[a - b :]
            mask[row, :padding] = False
        if self.document_length is not None:
            quarter = max(1, self.context_length // 4)
            shared = int((~mask).sum(axis=1).min()) // quarter * quarter
            shared = max(0, min(shared, self.context_length - self.num_latents))
            tokens, mask = tokens[:, shared:], mask[:, shared:]
        arrays = {"tokens": tokens[:, cut:], "labels": labels} | ({} if mask.all() else {"mask": mask[:, cut:]})
        if self.num_conditions > 0:
            for row, (_, b) in enumerate(spans):
                self._add_conditions(arrays["tokens"][row], b - 1, first + row)
        return {name: torch.from_numpy(values) for name, values in arrays.items()}

    def _add_conditions(self, context: np.ndarray, stop: int, index: int) -> None:
        """Changes the context (T,) of window `index`, which ends before token `stop`."""
        assert isinstance(self._data, TokenFile)
        context = context[-min(stop, len(context)) :]  # without padding
        conditions = self._data.conditions_before(stop - len(context))
        context[: len(conditions)] = conditions
        if self._forget is not None:
            context[:] = self._forget(context, np.random.default_rng((self.seed % 2**63, 3, index)))

    def _leads(self, numbers: np.ndarray) -> np.ndarray:
        """Distance from each pass's first cut to its first target: 0..N-1; 0 if one window holds a whole document."""
        if self.document_length is not None and self.num_latents >= self._length - 1:
            return np.zeros(len(numbers), dtype=np.int64)
        return (_hash(self.seed, 0, numbers) % np.uint64(self.num_latents)).astype(np.int64)

    def _pieces(self, leads: np.ndarray) -> np.ndarray:
        """Number of windows into which a pass cuts each document: ceil((length - 1 + lead) / N)."""
        return -((1 - self._length - leads) // self.num_latents)

    def _extend(self) -> None:
        known = len(self._firsts) - 1
        counts = self._num_documents * self._pieces(self._leads(np.arange(known, 2 * known + 16)))
        self._firsts = np.append(self._firsts, self._firsts[-1] + np.cumsum(counts))


def _hash(*parts: int | np.ndarray) -> np.ndarray:
    """Integers, broadcast against each other -> evenly spread uint64: splitmix64's finalizer for each part."""
    state = np.zeros(1, dtype=np.uint64)
    for part in parts:
        part = np.uint64(part & (1 << 64) - 1) if isinstance(part, int) else np.asarray(part).astype(np.uint64)
        state = (state ^ part) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state


def _permute(places: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    """The values at `places` (int64) of a pseudo-random permutation of 0..size-1, given by `key`, without storing it.

    A Feistel network permutes 0..4^half-1; values outside 0..size-1 go through it again until they are inside.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    values = places.astype(np.uint64)
    outside = np.arange(len(values))
    while len(outside):
        left, right = values[outside] >> half, values[outside] & low
        for step in range(8):
            left, right = right, left ^ (_hash(key, step, right) & low)
        values[outside] = (left << half) | right
        outside = outside[values[outside] >= size]
    return values.astype(np.int64)
