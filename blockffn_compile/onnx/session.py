"""ONNX Runtime sessions for models with sparse layers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import onnxruntime

from blockffn_compile.onnx.files import ModelError, load
from blockffn_compile.onnx.headers import HeadersError
from blockffn_compile.onnx.library import LibraryError, build_library
from blockffn_compile.passes import onnx_contrib
from blockffn_compile.passes.onnx_function import DOMAIN, NAME

log = logging.getLogger("blockffn_compile")


class Session(onnxruntime.InferenceSession):
    """A session of ONNX Runtime that knows how its sparse layers run.

    Attributes:
        flavour: ``native``: by the kernels of our library; ``portable``: by the body of their
            function; ``contrib``: by ONNX Runtime's own; ``dense``: there are none.
    """

    flavour: Literal["native", "portable", "contrib", "dense"]


def session(
    path: str | Path,
    *,
    library: str | Path | None = None,
    portable: bool = False,
    threads: int | None = None,
) -> Session:
    """Opens a model on the CPU.

    Args:
        path: any ONNX model.
        library: our custom-op library; default: the one that :func:`build_library` makes, if it
            can here, and else none, as the log then says.
        portable: let the function bodies of sparse layers run, as elsewhere.
        threads: for the work within an operator; default: one for each core.

    Raises:
        ModelError: the model cannot be read, or ONNX Runtime refuses it or the library.
    """
    model = load(path)
    operators = {(node.domain, node.op_type) for node in model.graph}
    sparse = (DOMAIN, NAME) in operators
    if sparse and not portable and library is None:
        try:
            library = build_library()
        except (LibraryError, HeadersError, ImportError) as error:
            log.warning("sparse layers run without our kernels: %s", error)
    native = sparse and not portable and library is not None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3  # it warns of every initializer that only one branch reads
    # Else its threads go on waiting actively, in the way of whatever follows a step.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        if native:
            options.register_custom_ops_library(str(library))
        opened = Session(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own have no base of theirs
        raise ModelError(f"{path}: ONNX Runtime refuses it: {error}") from error
    opened.flavour = "native" if native else "portable" if sparse else "dense"
    if not operators.isdisjoint(onnx_contrib.OPERATORS):
        opened.flavour = "contrib"
    return opened
