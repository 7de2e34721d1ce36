"""Weights as panels, packed once per weight tensor.

A panel holds P outputs side by side with the summed axis streaming: [E, N/P, K, P].  For the up
and gate weights N = S and K = H; for the down weight N = H and K = S.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


def unfold(weight: Tensor, axes: str, sizes: dict[str, int], order: str) -> Tensor:
    """View of a stored weight with one axis per letter, in ``order``.

    Args:
        weight: stored tensor.
        axes: its dims, comma-separated; letters that share a dim are merged row-major, as in
            ``"es,h"`` for [E*S, H].
        sizes: length of every letter.
        order: letters of the result, e.g. ``"esh"``.

    Raises:
        ValueError: ``axes`` does not describe the tensor.
    """
    dims = axes.split(",")
    lengths = [math.prod(sizes[letter] for letter in dim) for dim in dims]
    letters = "".join(dims)
    if list(weight.shape) != lengths or sorted(letters) != sorted(order):
        raise ValueError(
            f"weight of shape {list(weight.shape)} is not laid out as {axes!r}, "
            f"which means {lengths}"
        )
    split = weight.reshape([sizes[letter] for letter in letters])
    return split.permute([letters.index(letter) for letter in order])


def panel_width(n: int, widest: int = 64) -> int:
    """Widest panel (a multiple of 16, at most ``widest``) among those that pad n least."""
    widths = range(16, widest + 1, 16)
    return min(widths, key=lambda width: (-(-n // width) * width, -width))


def to_panels(weight: Tensor, panel: int) -> Tensor:
    """[E, N, K] to contiguous [E, ceil(N/panel), K, panel], padded with zeros."""
    experts, n, k = weight.shape
    padded = F.pad(weight, (0, 0, 0, -n % panel))
    return padded.reshape(experts, -1, panel, k).transpose(2, 3).contiguous()


class PackCache:
    """Panels by weight tensor: held weakly, and repacked when the weight was written to."""

    def __init__(self) -> None:
        self._packed = WeakTensorKeyDictionary()

    def __len__(self) -> int:
        return len(self._packed)

    def get(
        self, weight: Tensor, axes: str, sizes: dict[str, int], order: str, panel: int
    ) -> Tensor:
        """Panels of ``weight``, see :func:`unfold` and :func:`to_panels`.

        In-place writes are seen through the tensor's version counter.  Inference tensors have
        none; they count as constant.
        """
        key = (0 if weight.is_inference() else weight._version, axes, order, panel)
        entry = self._packed.get(weight)
        if entry is None or entry[0] != key or entry[1] != weight.data_ptr():
            with torch.no_grad():
                panels = to_panels(unfold(weight.detach(), axes, sizes, order), panel)
            entry = (key, weight.data_ptr(), panels)
            self._packed[weight] = entry
        return entry[2]


PANELS = PackCache()
