"""Building bundles; the format is that of :mod:`blockffn_compile.aot.bundle`."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import tvm
from tvm import ir, relax, topi
from tvm.support import cc

from blockffn_compile import __version__
from blockffn_compile.aot.bundle import file_hash
from blockffn_compile.aot.export import MOVE_INPUTS, STEP_INPUTS, export
from blockffn_compile.aot.gpu import load_runtime_for_building
from blockffn_compile.aot.kernels import CpuKernels, CudaKernels
from blockffn_compile.aot.manifest import (
    CODE,
    FILES,
    FORMAT,
    MANIFEST,
    TOKENIZER,
    WEIGHTS,
    Manifest,
)
from blockffn_compile.aot.targets import Gpu, Target, get_target
from blockffn_compile.aot.weights import Read, Weight, write
from blockffn_compile.layer import CHUNK_TOKENS, Quantisation, Scheme
from blockffn_compile.models.checkpoint import open_checkpoint
from blockffn_compile.models.config import BlockFFNConfig
from blockffn_compile.models.modeling import BlockFFNForCausalLM, RotaryEmbedding
from blockffn_compile.passes.recognizer import Declined
from blockffn_compile.passes.relax import rewrite
from blockffn_compile.passes.relax_emit import Panels
from blockffn_compile.quantisation import is_quantised
from blockffn_compile.schedules.quantisation import as_quantisation, stays
from blockffn_compile.schedules.tir import build as cpu
from blockffn_compile.schedules.tir.cuda import compile as cuda

log = logging.getLogger("blockffn_compile")

#: Told what is done, and how much of it: (stage, done, total).
Progress = Callable[[str, int, int], None]


def build(
    model: BlockFFNForCausalLM | str | Path,
    target: str,
    out: str | Path,
    *,
    dtype: torch.dtype | None = None,
    quantize: Scheme | None = None,
    group: int = 32,
    tokenizer: str | Path | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Path:
    """Compiles a model to a bundle.

    The weights of a checkpoint are read and written tensor by tensor.  The same model, options and
    software give the same bytes.

    Args:
        model: a model, or the directory of a checkpoint.
        target: ``native``, ``x86-64-v3``, ``x86-64-v4``, ``arm64``, ``arm64-bf16``,
            ``cuda-sm87`` or ``cuda-sm90``.
        out: the directory to make; one that is there must be empty, or a bundle to replace.
        dtype: of weights and cache; default: as stored.
        quantize: ``int8`` or ``int4``: stores linear layers and experts so, see
            :func:`blockffn_compile.quantize`; for CPUs only.
        group: weights to a scale, a multiple of 32.
        tokenizer: ``tokenizer.json`` to put in; default: the checkpoint's.
        progress: told how far it is.

    Returns:
        ``out``.

    Raises:
        ValueError: the target is unknown, or takes no quantised weights; ``out`` holds something
            else; the model has a form that bundles do not support, or is quantised itself.
        CheckpointError: the checkpoint cannot be read.
        RuntimeError: a compiler or the linker is missing, or failed.
    """
    kind, out = get_target(target), Path(out)
    quantisation = None if quantize is None else as_quantisation(quantize, group)
    if quantisation is not None and kind.gpu is not None:
        raise ValueError(f"{target}: the kernels for GPUs take no quantised weights")
    if out.exists() and not (out.is_dir() and _replaceable(out)):
        raise ValueError(f"{out}: holds something else than a bundle; choose another directory")
    if isinstance(model, BlockFFNForCausalLM):
        if is_quantised(model):
            raise ValueError("the model is quantised; build from the original, with quantize=")
        config, read = model.config, model.state_dict().__getitem__
        stored = model.lm_head.weight.dtype
    else:
        checkpoint = open_checkpoint(model)
        config, read, stored = checkpoint.config, checkpoint.read, checkpoint.dtype
        beside = Path(model) / TOKENIZER
        tokenizer = tokenizer or (beside if beside.is_file() else None)
    dtype = dtype or stored

    progress("exporting", 0, 1)
    with torch.device("meta"):  # its form is all that is needed
        form = BlockFFNForCausalLM(config).to(dtype).eval().requires_grad_(False)
    gpu = kind.gpu
    kernels = CpuKernels(kind.registers, quantisation) if gpu is None else CudaKernels(gpu.programs)
    mod, names = export(form, kernels)
    progress("rewriting", 0, 1)
    functions: dict[str, dict[str, Weight]] = {}
    for name in ("trunk", "head"):
        mod, done = rewrite(mod, name, kernels)
        for layer in done.layers:
            if isinstance(layer, Declined):
                log.warning("%s runs every expert: %s", layer.name, layer.reason)
        if quantisation is not None:
            _say_what_stays(done.panels, names, quantisation)
        functions[name] = _weights(mod[name], names, done.panels)
        mod[name] = _with_arrays(mod[name], len(STEP_INPUTS) if name == "trunk" else 1)
    mod["move"] = _with_arrays(mod["move"], len(MOVE_INPUTS))

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        made = Path(folder) / out.name
        made.mkdir()
        progress("compiling", 0, 1)
        _compile(mod, kind, made / CODE)
        weights = functions["trunk"] | functions["head"]
        total, written = sum(weight.nbytes for weight in weights.values()), 0
        progress("packing", written, total)
        for size in write(made / WEIGHTS, weights, _with_rotary(config, read)):
            written += size
            progress("packing", written, total)
        if tokenizer is not None:
            shutil.copyfile(tokenizer, made / TOKENIZER)
        manifest = _manifest(config, dtype, kind, functions, made)
        (made / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        if out.exists():
            shutil.rmtree(out)
        made.rename(out)
    return out


def _replaceable(out: Path) -> bool:
    names = {path.name for path in out.iterdir()}
    return not names or MANIFEST in names <= FILES


# --- Functions ------------------------------------------------------------------------------------


def _weights(
    function: relax.Function, names: dict[str, str], panels: dict[str, Panels]
) -> dict[str, Weight]:
    """What the parameters of a function hold that are weights, in order, by name."""
    weights = {}
    for param in list(function.params)[int(function.attrs["num_input"]) :]:
        shape = tuple(int(size) for size in param.ty.shape.values)
        dtype = str(param.ty.dtype.dtype)
        made = panels.get(param.name)
        if made is None:
            weights[names[param.name]] = Weight(shape, dtype, (names[param.name],))
        else:
            sources = tuple(names[weight.name] for weight in made.weights)
            weights["+".join(sources) + made.suffix] = Weight(shape, dtype, sources, made)
    return weights


def _say_what_stays(
    panels: dict[str, Panels], names: dict[str, str], quantisation: Quantisation
) -> None:
    for made in panels.values():
        for weight in made.weights:
            name = names[weight.name]
            if made.quantisation is None and not stays(name):
                group = quantisation.group
                log.warning("%s stays as it is: groups of %d do not divide it", name, group)


def _with_arrays(function: relax.Function, inputs: int) -> relax.Function:
    """The same with its parameters after the first ``inputs`` in arrays: cache, if any; weights."""
    params, weights = list(function.params), int(function.attrs["num_input"])
    groups = {"cache": params[inputs:weights], "weights": params[weights:]}
    arrays, bindings = [], []
    for name, members in groups.items():
        if members:
            array = relax.Var(name, relax.TupleType([member.ty for member in members]))
            arrays.append(array)
            bindings += [
                relax.VarBinding(member, relax.TupleGetItem(array, i))
                for i, member in enumerate(members)
            ]
    body = relax.SeqExpr([relax.BindingBlock(bindings), *function.body.blocks], function.body.body)
    return relax.Function(
        [*params[:inputs], *arrays], body, function.ret_ty, function.is_pure, function.attrs
    ).without_attr("num_input")


def _compile(mod: tvm.IRModule, target: Target, path: Path) -> None:
    linker = target.linker or cc.get_cc()
    if linker is None or shutil.which(linker) is None:
        raise RuntimeError(f"no linker for {target.name} ({linker}); install it")
    # Without a build id, which would depend on temporary names.
    link = cc.cross_compiler(linker, options=["-shared", "-fPIC", "-s", "-Wl,--build-id=none"])
    with contextlib.nullcontext() if target.gpu is None else _for(target.gpu):
        executable(mod, target.tvm).export_library(str(path), fcompile=link)


@contextlib.contextmanager
def _for(gpu: Gpu) -> Iterator[None]:
    """Within it, TVM compiles for a GPU, which need not be there."""
    cuda.compiler()  # before the minutes that it takes to come to it
    load_runtime_for_building()
    with cuda.compiling(gpu.architecture):
        yield


def executable(mod: tvm.IRModule, target: tvm.target.Target) -> relax.VMExecutable:
    """What TVM's default pipeline makes of a module, with squares as products."""
    mod = relax.transform.LegalizeOps({"relax.power": _power})(mod)
    with cuda.context() if target.kind.name == "cuda" else cpu.context():
        # As bytecode: a call costs 60 ns more than in compiled form, which is one function for the
        # whole model and takes minutes to compile.
        return relax.build(mod, target, relax_pipeline=relax.get_default_pipeline(target))


def _power(builder: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    """The power function costs a hundred times as much as a product."""
    x, exponent = call.args
    if isinstance(exponent, ir.GenericConst) and (exponent.value.numpy() == 2).all():
        return builder.call_te(topi.multiply, x, x)
    return builder.call_te(topi.power, x, exponent)


# --- Files ----------------------------------------------------------------------------------------


def _with_rotary(config: BlockFFNConfig, read: Read) -> Read:
    """Reads weights, and the rotary tables, which checkpoints do not hold."""
    rotary = RotaryEmbedding(config)
    tables = {f"model.rotary.{name}": table for name, table in rotary.named_buffers()}
    return lambda name: tables[name] if name in tables else read(name)


def _manifest(
    config: BlockFFNConfig,
    dtype: torch.dtype,
    target: Target,
    functions: dict[str, dict[str, Weight]],
    folder: Path,
) -> Manifest:
    heads, key_dim, value_dim = config.cache_sizes
    files = sorted(folder.iterdir())
    packages = ("apache-tvm", "apache-tvm-ffi")
    return Manifest(
        format=FORMAT,
        target=target.name,
        architecture=target.architecture,
        cpu_features=list(target.features),
        compute_capability=target.gpu.capability if target.gpu else "",
        llvm=target.llvm,
        dtype=str(dtype).removeprefix("torch."),
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        max_length=config.max_position_embeddings,
        max_tokens=CHUNK_TOKENS,
        layers=config.num_hidden_layers,
        heads=heads,
        key_dim=key_dim,
        value_dim=value_dim,
        stop_tokens=list(config.stop_tokens),
        trunk_weights=list(functions["trunk"]),
        head_weights=list(functions["head"]),
        versions={
            "blockffn-compile": __version__,
            **{name: importlib.metadata.version(name) for name in packages},
        },
        sizes={file.name: file.stat().st_size for file in files},
        sha256={file.name: file_hash(file) for file in files},
    )
