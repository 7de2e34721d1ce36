"""Models of one ``com.blockffn::ChunkSparseFFN`` node, and what they must compute."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper
from torch import Tensor

from blockffn_compile.layer import Activation, experts_reference

TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
}


@dataclass(frozen=True)
class Problem:
    """A node and the seed of its weights."""

    hidden: int
    experts: int
    size: int
    dtype: torch.dtype
    act: Activation
    gated: bool

    def __str__(self) -> str:
        parts = (self.hidden, self.experts, self.size, str(self.dtype)[6:], self.act)
        return "-".join(map(str, parts)) + ("-gated" if self.gated else "")

    def weights(self) -> dict[str, Tensor]:
        """up, down and gate, [E, S, H] each."""
        g = torch.Generator().manual_seed(0)
        shape = (self.experts, self.size, self.hidden)
        scale = {"up": self.hidden, "down": self.size * self.experts, "gate": self.hidden}
        names = ["up", "down", "gate"] if self.gated else ["up", "down"]
        return {
            name: (torch.randn(shape, generator=g) * scale[name] ** -0.5).to(self.dtype)
            for name in names
        }

    def inputs(self, tokens: int, density: float, seed: int = 0) -> tuple[Tensor, Tensor]:
        """x [T, H] and scores [T, E]."""
        g = torch.Generator().manual_seed(seed)
        active = torch.rand(tokens, self.experts, generator=g) < density
        scores = torch.randn(tokens, self.experts, generator=g) * active
        return torch.randn(tokens, self.hidden, generator=g).to(self.dtype), scores.to(self.dtype)

    def plain(self, x: Tensor, scores: Tensor, dtype: torch.dtype) -> Tensor:
        """All experts, in PyTorch, in ``dtype``."""
        w = {name: weight.to(dtype) for name, weight in self.weights().items()}
        down = w["down"].transpose(1, 2)
        x, scores = x.to(dtype), scores.to(dtype)
        return experts_reference(x, scores, w["up"], down, self.act, w.get("gate"))

    def model(self) -> onnx.ModelProto:
        weights = self.weights()
        node = make_node(["x_typed", "scores_typed", *weights], act=self.act)
        initializers = [initializer(name, weight) for name, weight in weights.items()]
        x: list[int | str] = ["tokens", self.hidden]
        scores: list[int | str] = ["tokens", self.experts]
        return make_model(node, initializers, x, scores, self.dtype)


def initializer(name: str, weight: Tensor) -> onnx.TensorProto:
    data = weight.flatten().view(torch.uint8).numpy().tobytes()
    return helper.make_tensor(name, TYPES[weight.dtype], weight.shape, data, raw=True)


def make_node(inputs: list[str], **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(
        "ChunkSparseFFN", inputs, ["y_typed"], name="ffn", domain="com.blockffn", **attributes
    )


def make_model(
    node: onnx.NodeProto,
    initializers: list[onnx.TensorProto],
    x: list[int | str],
    scores: list[int | str],
    dtype: torch.dtype = torch.float32,
) -> onnx.ModelProto:
    """x, scores -> y of these shapes in float32, cast to and from ``dtype`` around the node.

    The Python API has no bfloat16; casts from float32 to itself are optimised away.
    """
    to, float32 = TYPES[dtype], TensorProto.FLOAT
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["x"], ["x_typed"], to=to),
            helper.make_node("Cast", ["scores"], ["scores_typed"], to=to),
            node,
            helper.make_node("Cast", ["y_typed"], ["y"], to=float32),
        ],
        "graph",
        [
            helper.make_tensor_value_info("x", float32, x),
            helper.make_tensor_value_info("scores", float32, scores),
        ],
        [helper.make_tensor_value_info("y", float32, None)],
        initializers,
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.blockffn", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def open_session(
    model: onnx.ModelProto, library: Path, threads: int = 1
) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def run(session: onnxruntime.InferenceSession, x: Tensor, scores: Tensor) -> Tensor:
    feeds = {"x": x.float().numpy(), "scores": scores.float().numpy()}
    (y,) = session.run(None, feeds)
    return torch.from_numpy(y).to(x.dtype)
