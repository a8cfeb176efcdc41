"""How the tokens of a forward pass belong to samples: padded rows, or real tokens alone.

The encoder works on (N, D) tokens. Padded, N is B x T. On a CPU padding is left out of everything but the attention,
whose products need rectangles: there every micro-batch is as wide as its own longest sample, and no wider.
"""

from collections.abc import Sequence
from dataclasses import dataclass

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
