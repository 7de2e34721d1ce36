"""FFN layer in ONNX Runtime: chunk-sparse against the fair dense form, at (2048, 48, 128) in fp32.

The fair dense form is two prepacked 2-D products with the scores multiplied in between, several
times faster than what exporters write.  Every subject runs the same stack of layers with different
weights, deep enough that no cache holds them, on the same inputs and the same routing, in one
process, rounds interleaved; the table has the medians of the ratios of each round.  Where packed
weights happen to lie in memory changes the time by up to a tenth, so sessions are built anew
several times, in another order.
Run: ``python -m benchmarks.onnx_layer [--json FILE]``.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import operator
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from rich.console import Console
from rich.table import Table

from benchmarks.first_light import times
from benchmarks.speculative import record
from blockffn_compile.onnx import build_library
from blockffn_compile.passes.onnx_function import DOMAIN, NAME, function

HIDDEN, EXPERTS, SIZE = 2048, 48, 128
OPSET = 20
TOKENS = (1, 2, 7, 8, 33, 64, 200)
#: Active experts; the portable form turns dense between a quarter and two thirds of them.
ACTIVE = (0.1, 0.2, 0.25, 0.35, 0.4, 0.5, 0.6, 0.7, 1.0)
#: What each sparse form is to reach at (tokens, active experts); elsewhere ``FLOOR``.
BARS = {
    "portable": {(1, 0.2): 1.3},
    "native": {(1, 0.2): 3.5, (8, 0.35): 1.8},
}
FLOOR = 0.95
DENSE = """
    up_rows_{i} = Reshape (up_{i}, matrix)
    down_rows_{i} = Reshape (down_{i}, matrix)
    u_{i} = Gemm <transB = 1> (x, up_rows_{i})
    half_{i} = Sigmoid (u_{i})
    a_{i} = Mul (u_{i}, half_{i})
    by_expert_{i} = Reshape (a_{i}, experts)
    score_{i} = Unsqueeze (scores_{i}, last)
    weighted_{i} = Mul (by_expert_{i}, score_{i})
    flat_{i} = Reshape (weighted_{i}, wide)
    y_{i} = MatMul (flat_{i}, down_rows_{i})
"""
SPARSE = f'y_{{i}} = {DOMAIN}.{NAME} <act = "silu"> (x, scores_{{i}}, up_{{i}}, down_{{i}})\n'

Weights = list[tuple[np.ndarray, np.ndarray]]


def make_session(
    body: str, weights: Weights, threads: int, library: Path | None = None
) -> onnxruntime.InferenceSession:
    """Layers side by side on one input; their weights stay where they are in memory."""
    layers = range(len(weights))
    inputs = ", ".join(
        [f"float[t, {HIDDEN}] x", *(f"float[t, {EXPERTS}] scores_{i}" for i in layers)]
    )
    outputs = ", ".join(f"float[t, {HIDDEN}] y_{i}" for i in layers)
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": {OPSET}, "{DOMAIN}": 1]> stack ({inputs}) => '
        f"({outputs}) {{ {''.join(body.format(i=i) for i in layers)} }}"
    )
    model.functions.append(ir.serde.serialize_function(function("silu", False, OPSET)))
    shapes = {
        "matrix": [-1, HIDDEN],
        "experts": [-1, EXPERTS, SIZE],
        "wide": [-1, EXPERTS * SIZE],
        "last": [-1],
    }
    for name, shape in shapes.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(shape), name))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Else the threads of one session wait actively while another one is measured.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if library is not None:
        options.register_custom_ops_library(str(library))
    for i, pair in enumerate(weights):
        for name, array in zip((f"up_{i}", f"down_{i}"), pair, strict=True):
            tensor = model.graph.initializer.add(name=name, dims=array.shape, data_type=1)
            tensor.data_location = onnx.TensorProto.EXTERNAL
            for key, value in (("location", name), ("length", str(array.nbytes))):
                tensor.external_data.add(key=key, value=value)
            value = onnxruntime.OrtValue.ortvalue_from_numpy(array)
            options.add_external_initializers([name], [value])
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def routing(tokens: int, active: float, rng: np.random.Generator) -> np.ndarray:
    """Scores [tokens, EXPERTS]: each token uses 60 % of the active experts, the first one all."""
    scores = np.zeros((tokens, EXPERTS), np.float32)
    experts = rng.permutation(EXPERTS)[: round(active * EXPERTS)]
    used = rng.random((tokens, len(experts))) < 0.6
    used[0] = True
    scores[:, experts] = used * rng.uniform(0.1, 1.1, used.shape)
    return scores


def exact(inputs: dict[str, np.ndarray], weights: Weights) -> np.ndarray:
    """The first layer in fp64."""
    x, scores = inputs["x"].astype(np.float64), inputs["scores_0"].astype(np.float64)
    up, down = (w.astype(np.float64) for w in weights[0])
    u = np.einsum("th,esh->tes", x, up, optimize=True)
    mid = u / (1 + np.exp(-u)) * scores[..., None]
    return mid.reshape(len(x), -1) @ down.reshape(-1, HIDDEN)


def check(calls: dict[str, Callable[[], Any]], want: np.ndarray) -> None:
    """Runs each form twice; ends the program if its error is not close to that of the dense one."""
    errors = {name: np.linalg.norm(call()[0] - want) for name, call in calls.items()}
    for name, error in errors.items():
        if not error <= 1.5 * errors["dense"]:
            raise SystemExit(
                f"{name}: wrong result: error {error:.2e}, dense {errors['dense']:.2e}"
            )
        calls[name]()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write benchmark records here")
    parser.add_argument("--layers", type=int, default=4, help="layers in the stack (0.1 GB each)")
    parser.add_argument("--builds", type=int, default=3, help="times that sessions are built")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds of each build")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    console = Console()
    console.print(f"{options.threads} threads, load {os.getloadavg()[0]:.2f}")
    rng = np.random.default_rng(0)
    shape = (EXPERTS, SIZE, HIDDEN)
    weights: Weights = []
    for _ in range(options.layers):
        up, down = (rng.standard_normal(shape, np.float32) * n**-0.5 for n in (HIDDEN, SIZE))
        weights.append((up.astype(np.float32), down.astype(np.float32)))
    make = functools.partial(make_session, weights=weights, threads=options.threads)
    library = build_library()
    forms: dict[str, Callable[[], onnxruntime.InferenceSession]] = {
        "dense": lambda: make(DENSE),
        "portable": lambda: make(SPARSE),
        "native": lambda: make(SPARSE, library=library),
    }

    cells = list(itertools.product(TOKENS, ACTIVE))
    inputs = [
        {"x": rng.standard_normal((tokens, HIDDEN), np.float32)}
        | {f"scores_{i}": routing(tokens, active, rng) for i in range(options.layers)}
        for tokens, active in cells
    ]
    wanted = [exact(each, weights) for each in inputs]
    spent = [{name: list[float]() for name in forms} for _ in cells]
    for build in range(options.builds):
        names = [*forms][build % len(forms) :] + [*forms][: build % len(forms)]
        sessions = {name: forms[name]() for name in names}
        for each, want, total in zip(inputs, wanted, spent, strict=True):
            calls: dict[str, Callable[[], Any]] = {
                name: functools.partial(sessions[name].run, None, each) for name in forms
            }
            check(calls, want)
            for name, values in times(calls, options.rounds, console).items():
                total[name] += values

    records = []
    table = Table("tokens", "active", *forms, *(f"{name}, bar" for name in BARS))
    for (tokens, active), each, total in zip(cells, inputs, spent, strict=True):
        ms = {name: statistics.median(values) / options.layers for name, values in total.items()}
        # Neighbours in time: a busy machine slows both.
        ratios = {
            name: statistics.median(map(operator.truediv, total["dense"], total[name]))
            for name in BARS
        }
        table.add_row(
            str(tokens),
            f"{active:.0%}",
            *(f"{value:.2f} ms" for value in ms.values()),
            *(
                f"{ratio:.2f}x, >= {BARS[name].get((tokens, active), FLOOR):g}x"
                for name, ratio in ratios.items()
            ),
        )
        pairs = float((each["scores_0"] != 0).mean())
        union = float((each["scores_0"] != 0).any(0).mean())
        facts = {"shape": [HIDDEN, SIZE, EXPERTS], "tokens": tokens, "dtype": "float32",
                 "pair_density": pairs, "union_density": union}  # fmt: skip
        records += [
            record("onnx_ffn", name, "dense", ms[name], ms["dense"]) | facts for name in ratios
        ]
    console.print(table)
    if options.json:
        options.json.write_text(json.dumps(records, indent=2) + "\n")


if __name__ == "__main__":
    main()
