"""One layer's keys and values: the first few tokens and the latest in floating point, all between in few bits.

    tokens   | sinks |  block 0  |  block 1  | ... |  recent, window to window + G - 1  |
               float    packed      packed            float

A forward sees everything that was packed before it, decoded, and then what is in float, its own tokens included. Only
afterwards is the oldest block of G recent tokens packed, while at least `window` stay: what a token sees does not
depend on whether it comes alone or as the last of G tokens, and a prompt is read in float (KIVI, arXiv:2402.02750).
The first tokens draw attention from everywhere and are large (StreamingLLM, arXiv:2309.17453): they stay in float.

A layer with a sliding window returns no more than transformers' own: window - 1 tokens and the new ones. What slid out
is dropped, a whole block at a time.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from lowbit.cache.blocks import PackedBlocks
from lowbit.cache.scheme import CacheScheme
from lowbit.errors import InputError


class QuantizedLayer(DynamicLayer):
    """A cache layer of transformers. self.keys and self.values [b, h, T, D] are the recent tokens in float."""

    is_croppable = False  # a block that was packed comes back rounded
    keys: Tensor  # type: ignore[assignment]
    values: Tensor  # type: ignore[assignment]

    def __init__(self, scheme: CacheScheme, sliding_window: int | None = None) -> None:
        super().__init__()
        self.scheme, self.sliding_window = scheme, sliding_window
        self.is_sliding = sliding_window is not None
        self.record_past = False
        self._clear()

    def _clear(self) -> None:
        self.seen = 0  # tokens, those that slid out included
        self.dropped = 0  # tokens that slid out
        self.sinks: tuple[Tensor, Tensor] | None = None  # keys, values [b, h, T, D]
        # keys [b, h, n, D, G] (token_keys: as values), values [b, h, n, G, D]
        self.packed: tuple[PackedBlocks, PackedBlocks] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take new keys and values [b, h, T, D] in; all that the new tokens may attend to, [b, h, all, D] each."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = torch.cat([self.keys, key_states], dim=-2)
        self.values = torch.cat([self.values, value_states], dim=-2)
        new = key_states.shape[-2]
        visible = self.get_mask_sizes(new)[0]
        self.seen += new
        keys, values = self._decoded()
        if not self.record_past:
            self._settle()
        return keys[..., -visible:, :], values[..., -visible:, :]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of what `update` will return for so many new tokens."""
        past = self.seen if self.sliding_window is None else min(self.seen, self.sliding_window - 1)
        return past + query_length, self.seen - past

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1 if self.sliding_window is None else self.sliding_window

    def activate_past_recording(self) -> None:
        """Pack and drop nothing until `crop` is called, which may take tokens back (assisted decoding)."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -tokens_to_remove tokens. Those of packed blocks come back to the float window, rounded."""
        if tokens_to_remove > 0:
            raise InputError(f"crop({tokens_to_remove}) names a length; give the number of tokens to remove, negative")
        if not self.is_initialized:
            return
        remove = min(-tokens_to_remove, self.seen)
        needed = 0 if self.sliding_window is None else max(self.seen - remove - self.sliding_window + 1, 0)
        if needed < self.dropped:
            raise InputError(
                f"{remove} tokens can't be taken back, since the window slid on; call activate_past_recording before "
                "they come"
            )
        while remove > self.keys.shape[-2] and self.packed is not None:
            self._unpack_last()
        kept = self.keys.shape[-2] - remove
        if kept < 0 and self.sinks is not None:
            self.sinks = (self.sinks[0][..., :kept, :], self.sinks[1][..., :kept, :])
        kept = max(kept, 0)
        self.keys, self.values = self.keys[..., :kept, :], self.values[..., :kept, :]
        self.seen -= remove
        self._settle()

    def reset(self) -> None:
        self.keys = self.values = None  # type: ignore[assignment]
        self.is_initialized = False
        self._clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._change_batch(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change_batch(lambda part: part.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change_batch(lambda part: part[indices, ...])

    def offload(self) -> None:
        self._change_batch(lambda part: part.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.is_initialized:
            self._change_batch(lambda part: part.to(self.device, non_blocking=True))

    @property
    def nbytes(self) -> int:
        """Bytes of everything kept: codes, scales, offsets, and what is in float."""
        if not self.is_initialized:
            return 0
        floats = [self.keys, self.values, *(self.sinks or ())]
        return sum(part.nbytes for part in floats) + sum(blocks.nbytes for blocks in self.packed or ())

    @property
    def float_nbytes(self) -> int:
        """Bytes of the same tokens in the model's dtype."""
        if not self.is_initialized:
            return 0
        a_token = sum(part.nbytes // max(part.shape[-2], 1) for part in self._decoded())
        return a_token * (self.seen - self.dropped)

    def _decoded(self) -> tuple[Tensor, Tensor]:
        """All keys and values, [b, h, T, D] each."""
        keys, values = [self.keys], [self.values]
        if self.packed is not None:
            keys.insert(0, self.scheme.decode_keys(self.packed[0], self.dtype))
            values.insert(0, self.scheme.decode_values(self.packed[1], self.dtype))
        if self.sinks is not None:
            keys.insert(0, self.sinks[0])
            values.insert(0, self.sinks[1])
        return torch.cat(keys, dim=-2), torch.cat(values, dim=-2)

    def _settle(self) -> None:
        """Move the first tokens to the sinks, pack what left the float window, drop what slid out."""
        scheme, tokens = self.scheme, self.keys.shape[-2]
        missing = scheme.sinks - (self.sinks[0].shape[-2] if self.sinks is not None else 0)
        if missing > 0 and self.packed is None and not self.dropped and tokens:
            first = self._take(min(missing, tokens))
            self.sinks = first if self.sinks is None else _joined(self.sinks, first)
        if (blocks := (self.keys.shape[-2] - scheme.window) // scheme.group) > 0:
            self._pack(blocks)
        if self.sliding_window is not None:
            self._drop(self.seen - self.sliding_window + 1 - self.dropped)

    def _take(self, tokens: int) -> tuple[Tensor, Tensor]:
        """The oldest recent tokens' keys and values, removed from the recent ones."""
        first = self.keys[..., :tokens, :].clone(), self.values[..., :tokens, :].clone()
        self.keys, self.values = self.keys[..., tokens:, :].clone(), self.values[..., tokens:, :].clone()
        return first

    def _pack(self, blocks: int) -> None:
        """Pack the oldest blocks of the recent tokens."""
        keys, values = self._take(blocks * self.scheme.group)
        new = self.scheme.encode_keys(keys), self.scheme.encode_values(values)
        for name, part in zip(("keys", "values"), new, strict=True):
            if not (part.scale.isfinite().all() and part.low.isfinite().all()):
                raise InputError(
                    f"some {name} are NaN, infinite or beyond 65504, so this cache can't hold them; use "
                    "transformers.DynamicCache with this model"
                )
        self.packed = new if self.packed is None else (self.packed[0].then(new[0]), self.packed[1].then(new[1]))

    def _unpack_last(self) -> None:
        """The newest packed block, back among the recent tokens."""
        assert self.packed is not None
        keys, values = self.packed
        last = keys.count - 1
        tail = self.scheme.decode_keys(keys.between(last, last + 1), self.dtype)
        self.keys = torch.cat([tail, self.keys], dim=-2)
        tail = self.scheme.decode_values(values.between(last, last + 1), self.dtype)
        self.values = torch.cat([tail, self.values], dim=-2)
        self.packed = (keys.between(0, last), values.between(0, last)) if last else None

    def _drop(self, tokens: int) -> None:
        """Drop at most `tokens` of the oldest tokens: all sinks, then whole blocks, then recent ones."""
        if self.sinks is not None and 0 < self.sinks[0].shape[-2] <= tokens:
            dropped = self.sinks[0].shape[-2]
            self.sinks, self.dropped, tokens = None, self.dropped + dropped, tokens - dropped
        if self.sinks is None and self.packed is not None and tokens >= self.scheme.group:
            keys, values = self.packed
            blocks = min(tokens // self.scheme.group, keys.count)
            left = blocks < keys.count
            self.packed = (keys.between(blocks, keys.count), values.between(blocks, keys.count)) if left else None
            self.dropped, tokens = self.dropped + blocks * self.scheme.group, tokens - blocks * self.scheme.group
        if self.sinks is None and self.packed is None and tokens > 0:
            self._take(tokens)
            self.dropped += tokens

    def _change_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        if not self.is_initialized:
            return
        self.keys, self.values = change(self.keys), change(self.values)
        if self.sinks is not None:
            self.sinks = (change(self.sinks[0]), change(self.sinks[1]))
        if self.packed is not None:
            self.packed = (self.packed[0].of_each(change), self.packed[1].of_each(change))


def _joined(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return torch.cat([first[0], second[0]], dim=-2), torch.cat([first[1], second[1]], dim=-2)
