"""Weights as panels, packed once per weight tensor.

A panel holds P outputs side by side with the summed axis streaming: [E, N/P, K, P].  For the up
and gate weights N = S and K = H; for the down weight N = H and K = S.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


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
    """Panels by weight tensor: held weakly, and repacked when the weight was written to.

    In-place writes are seen through the tensor's version counter.  Inference tensors have none;
    they count as constant.
    """

    def __init__(self) -> None:
        # Looked up for every call of a kernel: a plain dict by id is four times as fast as
        # PyTorch's weak dictionary.
        self._packed: dict[
            int, tuple[tuple[weakref.ref[Tensor], ...], tuple[object, ...], Tensor]
        ] = {}

    def __len__(self) -> int:
        return len(self._packed)

    def get(
        self, weight: Tensor, axes: str, sizes: dict[str, int], order: str, panel: int
    ) -> Tensor:
        """Panels of ``weight``, see :func:`unfold` and :func:`to_panels`."""
        key = (_state(weight), axes, order, panel)
        packed = self._packed.get(id(weight))
        if packed is not None and packed[0][0]() is weight and packed[1] == key:
            return packed[2]
        with torch.no_grad():
            panels = to_panels(unfold(weight.detach(), axes, sizes, order), panel)
        return self._keep([weight], key, panels)

    def rows(self, weights: Sequence[Tensor], panel: int) -> Tensor:
        """Panels [1, N/P, K, P] of matrices [Ni, K] below each other, kept with the first."""
        key = (*map(_state, weights), panel)
        packed = self._packed.get(id(weights[0]))
        # Identity too: another tensor or view may have the address of one that is gone.
        if (
            packed is not None
            and packed[1] == key
            and all(ref() is w for ref, w in zip(packed[0], weights, strict=True))
        ):
            return packed[2]
        with torch.no_grad():
            panels = to_panels(torch.cat([w.detach() for w in weights])[None], panel)
        return self._keep(weights, key, panels)

    def _keep(self, weights: Sequence[Tensor], key: tuple[object, ...], panels: Tensor) -> Tensor:
        name = id(weights[0])

        def forget(gone: weakref.ref[Tensor]) -> None:
            # The id may belong to another tensor by now.
            if name in self._packed and self._packed[name][0][0] is gone:
                del self._packed[name]

        refs = (weakref.ref(weights[0], forget), *map(weakref.ref, weights[1:]))
        self._packed[name] = (refs, key, panels)
        return panels


def _state(weight: Tensor) -> tuple[int, int]:
    """Changes when the tensor is written to or gets other memory."""
    return (0 if weight.is_inference() else weight._version, weight.data_ptr())


PANELS = PackCache()
