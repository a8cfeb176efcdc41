"""How the tokens of a forward pass belong to samples: padded rows, or real tokens alone.

The encoder works on (N, D) tokens. Padded, N is B x T. On a CPU padding is left out of everything but the attention,
whose products need rectangles: there every micro-batch is as wide as its own longest sample, and no wider. On a GPU,
whose attention takes sequences of any lengths, they are packed one after the other, N of the same few numbers always.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raybert.model.dropout import Noise


@dataclass(frozen=True)
class Block:
    """The samples of one micro-batch among the N tokens."""

    samples: int
    length: int  # T of the rectangle that its attention works on
    start: int  # its first and last + 1 token
    stop: int
    mask: Tensor | None  # (B, T) true where a key may be attended to; None: everywhere
    places: Tensor | None  # (stop - start,) its tokens' places in the B x T rectangle; None: all, in order
    noise: Noise | None  # of its dropout; None: torch's own


@dataclass(frozen=True)
class Layout:
    """All blocks of a forward pass, and where (sample, position) is among the N tokens."""

    blocks: tuple[Block, ...]
    tokens: Tensor | None = None  # (N,) places of the tokens in the (B, T) inputs; None: all
    row_of: Tensor | None = None  # (B x T,) row of a place among the N tokens; None: the place itself

    def pick(self, values: Tensor) -> Tensor:
        """(B, T) inputs -> (N,)"""
        flat = values.reshape(-1)
        return flat if self.tokens is None else flat[self.tokens]

    def rows(self, places: Tensor) -> Tensor:
        """Places in the (B, T) inputs -> rows among the N tokens."""
        return places if self.row_of is None else self.row_of[places]

    def keep(self, width: int, rate: float) -> Tensor | None:
        """A dropout mask of (N, width), each block's part from its own noise; None where torch draws its own."""
        if rate == 0.0 or self.blocks[0].noise is None:
            return None
        parts = [block.noise.keep((block.stop - block.start) * width, rate) for block in self.blocks if block.noise]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def noise_state(self) -> list[Any]:
        """Where each block's noise is, so that the same masks can be drawn again."""
        return [block.noise.state for block in self.blocks if block.noise]

    def set_noise_state(self, state: Sequence[Any]) -> None:
        for noise, own in zip((block.noise for block in self.blocks if block.noise), state, strict=True):
            noise.state = own


@dataclass(frozen=True)
class Packed:
    """Sequences one after the other that fill N tokens; as `raybert.data.packing` makes them."""

    starts: Tensor  # (S + 1,) int32: sequence i is the tokens starts[i] to starts[i + 1], of which there may be none
    longest: int  # no sequence has more tokens
    sequence: Tensor  # (N,) the sequence that each token is in
    positions: Tensor  # (N,) its place there

    @property
    def first(self) -> Tensor:
        """(S,) the first token of each sequence; for a sequence without one another token, not the same for all.

        On the way back a GPU adds up what is gathered from one row one after the other, zeros too.
        """
        starts, count = self.starts.long(), len(self.sequence)
        spread = torch.arange(len(starts) - 1, device=starts.device) % count
        return starts[:-1].where(starts.diff() > 0, spread)

    def keep(self, width: int, rate: float) -> None:
        """torch draws the dropout of packed sequences."""

    def noise_state(self) -> list[Any]:
        """None: torch's own state is kept by torch's checkpoint."""
        return []

    def set_noise_state(self, state: Sequence[Any]) -> None:
        """Nothing to set."""


def packed(starts: Tensor, tokens: int, longest: int) -> Packed:
    """The layout of so many tokens; `starts` as in `Packed`, ending on `tokens`."""
    place = torch.arange(tokens, device=starts.device, dtype=starts.dtype)
    # Of all starts and less one: torch 2.11 and 2.12 compile `starts[1:]` to the whole of `starts` on a GPU.
    sequence = torch.bucketize(place, starts, right=True) - 1
    return Packed(starts, longest, sequence, place.long() - starts.long()[sequence])


def padded(samples: int, length: int, mask: Tensor | None, noise: Noise | None) -> Layout:
    """Every position of (B, T) inputs is a token, padding too."""
    return Layout((Block(samples, length, 0, samples * length, mask, None, noise),))


def unpadded(mask: Tensor, parts: Sequence[tuple[int, Noise | None]]) -> Layout:
    """The real tokens of (B, T) inputs, in parts (micro-batches) of so many samples and their noise.

    Every part is laid out as it would be alone, so what is computed for it does not depend on the others.
    """
    blocks, first, start = [], 0, 0
    for samples, noise in parts:
        own = mask[first : first + samples]
        longest = int(own.any(0).nonzero().max()) + 1 if own.any() else 1
        own = own[:, :longest]
        full = bool(own.all())
        places = None if full else own.reshape(-1).nonzero()[:, 0]
        stop = start + (samples * longest if places is None else len(places))
        blocks.append(Block(samples, longest, start, stop, None if full else own, places, noise))
        first, start = first + samples, stop
    if start == mask.numel():
        return Layout(tuple(blocks))
    flat = mask.reshape(-1)
    return Layout(tuple(blocks), flat.nonzero()[:, 0], flat.cumsum(0) - 1)
