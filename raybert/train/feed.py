"""A step's micro-batches on the worker's device: as they are, or joined and packed; copied beside the step before.

Nothing in a step waits for a GPU, so the host is at the next step while the device still computes one. Copies of the
next step then run on a stream of their own, from memory that the device can read without the host.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from raybert.data.block import Columns
from raybert.data.packing import Packing, packing_for
from raybert.data.spec import SampleSpec
from raybert.data.tensors import empty_to_torch, packed_to_torch, to_torch
from raybert.model import varlen

PADDED = "Sequences are padded instead of packed, which costs speed but does not change results"


def choose_packing(
    setting: Literal["auto"] | bool,
    *,
    micro_batch: int,
    seq_len: int,
    spec: SampleSpec,
    device: torch.device,
    dtype: torch.dtype,
    head_size: int,
) -> tuple[Packing | None, str]:
    """Whether micro-batches are packed, and how; and the sentence for a GPU on which padding is computed instead.

    By itself a CPU packs nothing: there padding is left out in another way, which is faster.

    Args:
        setting: `train.packing`.
        dtype: of the matrix products.
    """
    if setting is False or (setting == "auto" and device.type == "cpu"):
        return None, ""
    if device.type == "cuda" and (reason := varlen.why_not(device, dtype, head_size)):
        return None, f"{PADDED}: {reason}."
    return packing_for(micro_batch, seq_len, spec), ""


class Feed:
    """Columns -> tensors. Counts the shapes that the model saw, and how much of their room was filled."""

    def __init__(self, device: torch.device, spec: SampleSpec, packing: Packing | None) -> None:
        self._device, self._spec, self._packing = device, spec, packing
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._shapes: set[tuple[int, ...]] = set()
        self._tokens = self._places = 0

    def __call__(self, parts: Sequence[Columns]) -> list[dict[str, Tensor]]:
        """The micro-batches of a step, or the groups that they are packed into, for `raybert.train.step`."""
        groups = self.send(parts)
        self._shapes |= {tuple(group["input_ids"].shape) for group in groups}
        self._tokens += sum(int(part["length"].sum()) for part in parts)
        self._places += sum(group["input_ids"].numel() for group in groups)
        return groups

    def send(self, parts: Sequence[Columns]) -> list[dict[str, Tensor]]:
        """The same, not counted: of what is not a step."""
        return self._beside(lambda: self._made(parts))

    def rungs(self) -> list[dict[str, Tensor]]:
        """A packed group without a sample for every shape that there can be; none where nothing is packed."""
        packing = self._packing
        if packing is None:
            return []
        return self._beside(lambda: empty_to_torch(self._device, packing))

    def _beside(self, make: Callable[[], list[dict[str, Tensor]]]) -> list[dict[str, Tensor]]:
        """Made on the side stream, and then the step's."""
        if self._side is None:
            return make()
        with torch.cuda.stream(self._side):
            groups = make()
        step = torch.cuda.current_stream(self._device)
        step.wait_stream(self._side)
        for tensor in (tensor for group in groups for tensor in group.values()):
            tensor.record_stream(step)  # so that its memory is not used again before the step is through
        return groups

    def _made(self, parts: Sequence[Columns]) -> list[dict[str, Tensor]]:
        if self._packing is None:
            return [to_torch(part, self._device, self._spec) for part in parts]
        return packed_to_torch(parts, self._device, self._packing)

    def lap(self) -> dict[str, float]:
        """Of packed micro-batches since the last lap: `filled`, the share of the tokens computed that were text, and
        `shapes`, how many different ones there were since the start."""
        found = {"filled": self._tokens / self._places, "shapes": len(self._shapes)} if self._places else {}
        self._tokens = self._places = 0
        return found if self._packing is not None else {}
