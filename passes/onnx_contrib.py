"""BlockFFN layers as the mixture-of-experts operators that ONNX Runtime has.

``com.microsoft::MoE`` weighs experts by the softmax of its router's input: with the logarithms of
the scores that makes each score's share of their sum, by which the result is multiplied.
``QMoE``, whose weights have 8 or 4 bits, takes the scores as they are, and leaves out experts whose
score is zero.  Neither knows negative scores: an expert that has such gets the sign into its down
projection.  Both run the ``k`` experts of the highest scores, so ``k`` is the number of all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from blockffn_compile.layer import Scheme
from blockffn_compile.passes.onnx_emit import Emitter, Weight, weights
from blockffn_compile.passes.recognizer import BlockFFNMatch
from blockffn_compile.passes.signs import column_signs

DOMAIN, VERSION = "com.microsoft", 1
OPERATORS = {(DOMAIN, "MoE"), (DOMAIN, "QMoE")}

#: Each row of a projection of ``QMoE`` has its own scale; with ``int4`` so many elements of a row
#: have, if H and S are multiples of that.  Activations are not quantised.
BLOCK = 32

#: Takes the place of zero in the logarithm: its share of the sum is nothing beside any score's.
_TINY = 1e-37


class ContribEmitter(Emitter):
    """Replaces layers by ``MoE`` or, if weights are to be quantised, by ``QMoE``."""

    def __init__(self, model: ir.Model, quantize: Scheme | None) -> None:
        super().__init__(model)
        self.quantize = quantize

    def refusal(self, match: BlockFFNMatch) -> str | None:
        spec, dtype = match.spec, match.x.value.dtype
        exact = ("float32", "float16") if self.quantize else ("float32",)
        if spec.act == "gelu":
            return "com.microsoft's operators approximate GELU by tanh; take the portable flavour"
        if spec.gated and spec.act != "silu":
            return f"com.microsoft's operators gate by silu, not by {spec.act}"
        if dtype not in exact:
            return f"com.microsoft's operators route {dtype} less exactly; convert to float32"
        if self.quantize == "int4" and (spec.hidden_size % 2 or spec.expert_size % 2):
            return "rows of an odd number of int4 weights do not end with a byte; take int8"
        if _expert_signs(match) is None:
            return "com.microsoft's operators ignore negative scores, and some may be negative"
        return None

    def experts(self, match: BlockFFNMatch, x: ir.Value, scores: ir.Value) -> ir.Value:
        self.model.opset_imports[DOMAIN] = VERSION
        spec, sign = match.spec, _expert_signs(match)
        assert sign is not None
        if (sign < 0).any():
            scores = self.op("Abs", scores)
        attributes: dict[str, Any] = {"k": spec.num_experts, "activation_type": spec.act}
        up, down, *gate = weights(match)
        if gate:  # swiglu, with nothing of what else it can do
            attributes |= {"activation_type": "swiglu", "swiglu_fusion": 1}
            attributes |= {"activation_alpha": 1.0, "activation_beta": 0.0}
        fc1 = _Projection((*gate, up), "esh", np.ones(1))
        fc2 = _Projection((down,), "ehs", sign)
        if self.quantize is None:
            tiny = self.constant(_TINY, match.x.value.dtype)
            logarithms = self.op("Log", self.op("Max", scores, tiny))
            plain = self._plain(fc1), None, self._plain(fc2)
            y = self.op("MoE", x, logarithms, *plain, domain=DOMAIN, **attributes)
            return self.op("Mul", y, self.op("ReduceSum", scores, self.constant([-1])))
        bits, block = int(self.quantize.removeprefix("int")), None
        if bits == 4 and spec.hidden_size % BLOCK == spec.expert_size % BLOCK == 0:
            attributes["block_size"] = block = BLOCK
        attributes |= {"expert_weight_bits": bits, "weights_prepacked": 0}
        quantised = (self._quantised(projection, bits, block) for projection in (fc1, fc2))
        (codes1, scales1), (codes2, scales2) = quantised
        inputs = (codes1, scales1, None, codes2, scales2, *(None,) * 7, scores)
        y = self.op("QMoE", x, scores, *inputs, domain=DOMAIN, **attributes)
        # A NaN is no score that it takes an expert for; so it is added, as zero times whatever is.
        zero = self.constant(0.0, match.x.value.dtype)
        for value in (x, scores):
            nothing = self.op("Mul", value, zero)
            y = self.op("Add", y, self.op("ReduceSum", nothing, self.constant([-1])))
        return y

    def _plain(self, projection: _Projection) -> ir.Value:
        (first, *others), shape = projection.weights, projection.shape
        if not others and (projection.sign > 0).all():
            return self.stored(first, projection.order)
        kind, read = first.tensor.dtype, projection.read
        return self.initializer(projection.name, shape, kind, read, projection.key)

    def _quantised(
        self, projection: _Projection, bits: int, block: int | None
    ) -> tuple[ir.Value, ir.Value]:
        """Codes [E, N, K * bits / 8] and scales [E, N], or [E, N, K / block]."""
        e, n, k = projection.shape
        name, key = f"{projection.name}.int{bits}", projection.key
        codes = self.initializer(
            name,
            (e, n, k * bits // 8),
            ir.DataType.UINT8,
            lambda: quantise(projection.read(), bits, block)[0],
            key,
        )
        scales = self.initializer(
            f"{name}.scales",
            (e, n, k // block) if block else (e, n),
            ir.DataType.FLOAT,
            lambda: quantise(projection.read(), bits, block)[1],
            key,
        )
        return codes, scales


@dataclass(frozen=True)
class _Projection:
    """Weights of one product as the operators want them, [E, N, K] for N sums of K terms.

    Attributes:
        weights: their outputs alternate.
        order: of the axes.
        sign: 1 or -1 for each expert or all, a factor.
    """

    weights: tuple[Weight, ...]
    order: str
    sign: np.ndarray

    @property
    def name(self) -> str:
        return f"{self.weights[-1].source.name}.moe"

    @property
    def key(self) -> object:
        stored = tuple((weight.source, weight.axes) for weight in self.weights)
        return stored, self.sign.tobytes()

    @property
    def shape(self) -> tuple[int, int, int]:
        e, n, k = (self.weights[0].sizes[letter] for letter in self.order)
        return e, n * len(self.weights), k

    def read(self) -> np.ndarray:
        arrays = [weight.read(self.order) for weight in self.weights]
        return (
            np.stack(arrays, axis=2).reshape(self.shape)
            * self.sign.astype(arrays[0].dtype)[:, None, None]
        )


def quantise(weight: np.ndarray, bits: int, block: int | None) -> tuple[np.ndarray, np.ndarray]:
    """``weight`` [E, N, K], rounded to nearest, symmetrically: (code - 2 ** (bits - 1)) * scale.

    Args:
        bits: 8, or 4: two codes a byte, the first one low.
        block: elements of a row that have a scale; default: all.

    Returns:
        Codes [E, N, K * bits / 8], uint8, and scales [E, N, K / block] or [E, N], float32.
    """
    e, n, k = weight.shape
    half = 1 << (bits - 1)
    groups = weight.astype(np.float32).reshape(e, n, -1, block or k)
    scales = np.abs(groups).max(-1) / np.float32(half - 1)
    steps = np.where(scales > 0, scales, 1)[..., None]
    codes: np.ndarray = (np.rint(groups / steps) + half).astype(np.uint8).reshape(e, n, k)
    if bits == 4:
        codes = codes[..., ::2] | codes[..., 1::2] << 4
    return codes, scales if block else scales[..., 0]


def _expert_signs(match: BlockFFNMatch) -> np.ndarray | None:
    """The sign [E] of each expert's scores; None where they may have both."""
    sign = np.full(match.spec.num_experts, np.sign(match.scale))
    for matrix in match.scores:
        factor = column_signs(matrix)
        if factor is None:
            return None
        sign = sign * factor
    return None if np.isnan(sign).any() else np.where(sign < 0, -1, 1)
