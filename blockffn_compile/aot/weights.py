"""Writing the weights of a bundle, one tensor at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from blockffn_compile.aot.bundle import ALIGNMENT, DTYPES
from blockffn_compile.aot.kernels import parts
from blockffn_compile.passes.relax_emit import Panels

#: Reads a weight of the model by its name.
Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class Weight:
    """A tensor of a bundle.

    Attributes:
        shape: as stored.
        dtype: element type.
        sources: names of the model's weights that it is made of.
        panels: how, for panels; None for a plain copy of the only source.
    """

    shape: tuple[int, ...]
    dtype: str
    sources: tuple[str, ...]
    panels: Panels | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * getattr(torch, self.dtype).itemsize

    def make(self, read: Read) -> Iterator[Tensor]:
        """Its elements in order, in pieces."""
        tensors = [read(name) for name in self.sources]
        if self.panels is not None:
            yield from parts(self.panels, tensors)
        else:
            for rows in tensors[0].split(1024):
                yield rows.to(getattr(torch, self.dtype))


def write(path: Path, weights: Mapping[str, Weight], read: Read) -> Iterator[int]:
    """Writes a safetensors file; yields the bytes of each tensor when it is written.

    Tensors begin at multiples of ``ALIGNMENT`` bytes.  The format allows no gaps, so what lies
    between is tensors as well, named ``padding.N``.
    """
    codes = {name: code for code, name in DTYPES.items()}
    header: dict[str, dict[str, object]] = {}
    end = 0
    for name, weight in weights.items():
        if gap := -end % ALIGNMENT:
            place = [end, end + gap]
            header[f"padding.{len(header)}"] = {
                "dtype": "U8",
                "shape": [gap],
                "data_offsets": place,
            }
            end += gap
        start, end = end, end + weight.nbytes
        header[name] = {
            "dtype": codes[weight.dtype],
            "shape": list(weight.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for weight in weights.values():
            file.write(bytes(-file.tell() % ALIGNMENT))
            start = file.tell()
            for part in weight.make(read):
                file.write(part.contiguous().view(-1).view(torch.uint8).numpy().data)
            assert file.tell() == start + weight.nbytes
            yield weight.nbytes
