"""Rewriting the BlockFFN layers of ONNX files."""

from __future__ import annotations

from pathlib import Path

from blockffn_compile.layer import Scheme
from blockffn_compile.onnx.files import ModelError, Progress, load, save
from blockffn_compile.passes import onnx as passes
from blockffn_compile.passes.onnx import Flavour
from blockffn_compile.report import Report, report


def rewrite(
    path: str | Path,
    out: str | Path,
    *,
    flavour: Flavour = "portable",
    quantize: Scheme | None = None,
    verify: bool = False,
    progress: Progress = lambda done, total: None,
) -> Report:
    """Rewrites the BlockFFN layers of a model file.

    Everything that is not of a layer stays as it is; weights that were in data files are in
    ``OUT.data`` then.

    Args:
        path: any ONNX model.
        out: the file to write, another one than ``path``.
        flavour: ``portable``, to ``com.blockffn::ChunkSparseFFN``, which comes with a function body
            in standard operators, so that the new file runs wherever the old one did; or
            ``contrib``, to ONNX Runtime's ``com.microsoft::MoE``.
        quantize: ``int8`` or ``int4``, to ``com.microsoft::QMoE``; the report says what it costs.
        verify: run both sides of every rewrite on random inputs and compare.
        progress: called with the weights written so far and their number, if they go to a file of
            their own.

    Returns:
        One entry per layer, in the order of the graph.

    Raises:
        ValueError: an unknown flavour or type of weights.
        ModelError: a file cannot be read or written; the message says what is wrong.
        VerificationError: ``verify`` found a difference.
    """
    path, out = Path(path), Path(out)
    if out.resolve() == path.resolve():
        raise ModelError(f"{out}: this is the model itself; write to another file")
    model = load(path)
    results = passes.rewrite(model, flavour=flavour, quantize=quantize, verify=verify)
    save(model, out, progress)
    return report(results)
