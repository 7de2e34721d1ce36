"""The Relax pass on every spelling: what it matches, what it leaves, and that the numbers stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import tvm
from torch import Tensor, nn
from torch.export import Dim
from torch.utils.dlpack import from_dlpack
from tvm import relax
from tvm.relax.frontend.torch import from_exported_program

from blockffn_compile.aot.export import CONVERTERS
from blockffn_compile.aot.kernels import CpuKernels, pack
from blockffn_compile.layer import BlockFFN, BlockFFNSpec
from blockffn_compile.passes.recognizer import BlockFFNMatch, Declined
from blockffn_compile.passes.relax import BlockFFNPass, Rewritten, find, rewrite
from blockffn_compile.schedules.tir.tile import Registers
from tests.passes.near_misses import NEAR_MISSES, OTHERS
from tests.passes.spellings import MATCHES, E, H, S, Spelling, T

#: Narrow and of one token a tile: they compile fast.
KERNELS = CpuKernels(Registers(16, 1))
TARGET = tvm.target.Target({"kind": "llvm", "opt-level": 0})
#: Largest difference, relative to the largest output.
LIMITS = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
SYMBOLIC = [s for s in MATCHES if 1 not in s.shape]
#: A bias is an operation of its own here, so the layer before it is rewritten.
SEPARABLE = "down_bias"
MISSES = [s for s in NEAR_MISSES if s.name != SEPARABLE]


class Together(nn.Module):
    """Several modules, each with an input of its own."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(y for part, x in zip(self.parts, inputs, strict=True) for y in part(x))


class Imported:
    """Modules as one Relax function, for the import of a program costs more than its size.

    Attributes:
        mod: with the function ``main``, whose parameters are named as in PyTorch's program.
        weights: of ``main``, by name.
    """

    def __init__(self, modules: Sequence[nn.Module], inputs: Sequence[Tensor], dims: Any = None):
        program = torch.export.export(
            Together(modules), tuple(inputs), dynamic_shapes=None if dims is None else (dims,)
        ).run_decompositions()
        mod = from_exported_program(
            program,
            keep_params_as_input=True,
            run_ep_decomposition=False,
            custom_convert_map=CONVERTERS,
        )
        self.mod, params = relax.frontend.detach_params(mod)
        names = [param.name for param in self.mod["main"].params][len(inputs) :]
        self.weights = dict(zip(names, map(from_dlpack, params["main"]), strict=True))

    def rewrite(self, **options: Any) -> Rewritten:
        self.mod, done = rewrite(self.mod, "main", KERNELS, **options)
        return done

    def run(self, done: Rewritten, inputs: Sequence[Tensor]) -> list[Tensor]:
        if not hasattr(self, "machine"):
            self.machine = machine(self.mod)
        arguments = list(inputs)
        for param in self.mod["main"].params[len(inputs) :]:
            panels = done.panels.get(param.name)
            if panels is None:
                arguments.append(self.weights[param.name])
            else:
                arguments.append(pack(panels, [self.weights[w.name] for w in panels.weights]))
        return run(self.machine, arguments)


def machine(mod: tvm.IRModule) -> relax.VirtualMachine:
    return relax.VirtualMachine(relax.build(mod, TARGET), tvm.cpu())


def run(vm: relax.VirtualMachine, arguments: Sequence[Tensor]) -> list[Tensor]:
    outputs = vm["main"](*(tvm.runtime.from_dlpack(x.contiguous()) for x in arguments))
    return [from_dlpack(y) for y in outputs]


def build(spellings: Sequence[Spelling]) -> tuple[list[nn.Module], list[Tensor]]:
    built = [spelling.build() for spelling in spellings]
    return [module for module, _ in built], [x for _, x in built]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error <= LIMITS[expected.dtype]


def assert_expected(match: Any, expect: dict[str, Any]) -> None:
    assert isinstance(match, BlockFFNMatch), match
    found = {name: getattr(match, name, getattr(match.spec, name, None)) for name in expect}
    assert found == expect
    assert (match.spec.hidden_size, match.spec.num_experts, match.spec.expert_size) == (H, E, S)


def reason(done: Rewritten) -> str:
    """Why the only layer was declined."""
    (declined,) = done.layers
    assert isinstance(declined, Declined)
    return declined.reason


def operations(mod: tvm.IRModule) -> list[str]:
    """Names of what ``main`` calls, in order."""
    names = []
    for block in mod["main"].body.blocks:
        for binding in block.bindings:
            if isinstance(binding.value, relax.Call):
                name = binding.value.op.name
                called = binding.value.args[0]
                names.append(called.name_hint if name == "relax.call_tir" else name)
    return names


# --- The matrix of spellings ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def matches():
    """Results of all spellings, outputs of the rewritten ones, and what PyTorch says."""
    modules, inputs = build(MATCHES)
    imported = Imported(modules, inputs)
    done = imported.rewrite()
    outputs = iter(imported.run(done, inputs))
    pairs = [[(next(outputs), y) for y in m(x)] for m, x in zip(modules, inputs, strict=True)]
    return imported, done, pairs


@pytest.mark.parametrize("index", range(len(MATCHES)), ids=[s.name for s in MATCHES])
def test_match(matches, index):
    _, done, pairs = matches
    assert len(done.layers) == len(MATCHES)
    assert_expected(done.layers[index], MATCHES[index].expect)
    for actual, expected in pairs[index]:
        assert_close(actual, expected)


def test_every_contraction_of_a_match_is_a_call(matches):
    imported, done, _ = matches
    names = operations(imported.mod)
    assert sum(name.startswith("chunk_sparse_ffn") for name in names) == len(MATCHES)
    assert done.linears == sum(name.startswith("panel_linear") for name in names)
    # What is left belongs to routers that are no linear layers of one weight.
    assert names.count("relax.matmul") == len(MATCHES) - done.linears


@pytest.fixture(scope="module")
def symbolic():
    """The same with a symbolic number of tokens, run with two."""
    modules, inputs = build(SYMBOLIC)
    dims = tuple(
        {0: Dim(f"t{i}", min=1, max=64)}
        if x.dim() == 2
        else {0: Dim(f"b{i}", min=1, max=4), 1: Dim(f"t{i}", min=1, max=16)}
        for i, x in enumerate(inputs)
    )
    imported = Imported(modules, inputs, dims)
    done = imported.rewrite()
    more = [torch.cat((x, x.flip(-2)), dim=-2) for x in inputs]
    pairs: list[list[tuple[Tensor, Tensor]]] = [[] for _ in modules]
    for tokens in (inputs, more):
        outputs = iter(imported.run(done, tokens))
        for i, (module, x) in enumerate(zip(modules, tokens, strict=True)):
            pairs[i] += [(next(outputs), y) for y in module(x)]
    return done, pairs


@pytest.mark.parametrize("index", range(len(SYMBOLIC)), ids=[s.name for s in SYMBOLIC])
def test_match_with_symbolic_tokens(symbolic, index):
    done, pairs = symbolic
    assert len(done.layers) == len(SYMBOLIC)
    assert_expected(done.layers[index], SYMBOLIC[index].expect)
    for actual, expected in pairs[index]:
        assert_close(actual, expected)


@pytest.fixture(scope="module")
def near_misses():
    modules, inputs = build(MISSES)
    imported = Imported(modules, inputs)
    before = imported.mod
    return before, imported.rewrite(linears=False), imported.mod


OPERATORS = {"aten.pow": "relax.power", "aten.mul": "relax.multiply", "aten.": "relax."}


@pytest.mark.parametrize(
    ("index", "spelling"),
    list(enumerate(MISSES)),
    ids=lambda v: getattr(v, "name", ""),
)
def test_near_miss(near_misses, index, spelling):
    _, done, _ = near_misses
    assert len(done.layers) == len(MISSES)
    expected = spelling.expect["reason"]
    for name, ours in OPERATORS.items():
        expected = expected.replace(name, ours)
    assert isinstance(done.layers[index], Declined)
    assert expected in done.layers[index].reason


def test_near_misses_stay_as_they_are(near_misses):
    before, _, after = near_misses
    tvm.ir.assert_structural_equal(relax.transform.DeadCodeElimination()(before), after)


def test_a_bias_after_the_down_projection():
    """Added to the fused operation's result."""
    (module,), (x,) = build([s for s in NEAR_MISSES if s.name == SEPARABLE])
    imported = Imported([module], [x])
    done = imported.rewrite()
    assert isinstance(done.layers[0], BlockFFNMatch)
    assert_close(imported.run(done, [x])[0], module(x)[0])


def test_nothing_is_said_about_other_networks():
    imported = Imported(*build(OTHERS))
    assert find(imported.mod["main"]) == []


# --- Parameters and constants ---------------------------------------------------------------------


def layer(**changes: Any) -> tuple[nn.Module, Tensor]:
    spec = BlockFFNSpec(16, 4, 24, **changes)

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ffn = BlockFFN(spec).requires_grad_(False)

        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (self.ffn(x),)

    return Layer(), torch.randn(7, 16)


def test_panels_are_the_last_parameters():
    module, x = layer(gated=True)
    imported = Imported([module], [x])
    before = [param.name for param in imported.mod["main"].params]
    done = imported.rewrite()
    after = {param.name: param.ty.shape for param in imported.mod["main"].params}
    assert list(after) == [before[0], *(n for n in before if "norm" in n), *done.panels]
    (up, *_), (gate, *_), (down, *_), _ = (p.weights for p in done.panels.values())
    assert ["up" in up.name, "gate" in gate.name, "down" in down.name] == [True] * 3
    assert [[int(n) for n in after[name]] for name in done.panels] == [
        [4, 2, 16, 16], [4, 2, 16, 16], [4, 1, 24, 16], [1, 1, 16, 16],
    ]  # fmt: skip
    assert_close(imported.run(done, [x])[0], module(x)[0])


def test_constants_are_packed_on_the_spot():
    module, x = layer()
    mod = from_exported_program(torch.export.export(module, (x,)), custom_convert_map=CONVERTERS)
    rewriting = BlockFFNPass(KERNELS)
    mod = tvm.transform.Sequential([rewriting])(mod)
    assert rewriting.rewritten["main"].panels == {}
    assert isinstance(rewriting.rewritten["main"].layers[0], BlockFFNMatch)
    assert len(mod["main"].params) == 1
    assert "relax.matmul" not in operations(mod)
    assert_close(run(machine(mod), [x])[0], module(x)[0])


def test_a_module_imported_from_onnx(tmp_path):
    from tvm.relax.frontend.onnx import from_onnx

    module, x = layer(layout="block_linear", gated=True)
    module.eval()
    program = torch.onnx.export(module, (x,), dynamo=True, opset_version=20, verbose=False)
    assert program is not None
    mod = from_onnx(program.model_proto)
    mod, done = rewrite(mod, "main", KERNELS)
    assert isinstance(done.layers[0], BlockFFNMatch), done.layers
    assert done.linears == 1
    vm = machine(mod)
    actual = from_dlpack(vm["main"](tvm.runtime.from_dlpack(x)))
    assert_close(actual, module(x)[0])


def test_a_weight_of_two_layers():
    """One set of panels; and the weight itself stays where something else reads it."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(40, 16), requires_grad=False)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return x @ self.w.t(), (x * 2) @ self.w.t(), self.w[3] + 1

    module, x = Shared(), torch.randn(5, 16)
    imported = Imported([module], [x])
    done = imported.rewrite()
    assert done.linears == 2
    assert [list(p.shape) for p in done.panels.values()] == [[1, 3, 16, 16]]
    assert len(imported.mod["main"].params) == 3
    for actual, expected in zip(imported.run(done, [x]), module(x), strict=True):
        assert_close(actual, expected)


def test_bound_parameters_are_refused():
    module, x = layer()
    mod = from_exported_program(torch.export.export(module, (x,)), keep_params_as_input=True)
    with pytest.raises(ValueError, match="detach_params"):
        rewrite(mod, "main", KERNELS)


def test_weights_that_callers_give_stay():
    module, x = layer()
    mod = Imported([module], [x]).mod
    mod["main"] = mod["main"].without_attr("num_input")
    after, done = rewrite(mod, "main", KERNELS)
    assert "inputs of the function" in reason(done)
    assert done.linears == 0
    tvm.ir.assert_structural_equal(after["main"].params, mod["main"].params, True)


# --- Linear layers --------------------------------------------------------------------------------


class Projections(nn.Module):
    """Four of one input, one of them stored the other way round, and one of another."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o, self.t = (
            nn.Parameter(torch.randn(shape), requires_grad=False)
            for shape in ((40, 16), (8, 16), (24, 16), (16, 40), (16, 20))
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        q = x @ self.q.t()
        return q, x @ self.k.t(), x @ self.v.t(), q @ self.o.t(), x @ self.t


@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
def test_products_of_one_input_are_one_call(dtype):
    module, x = Projections().to(dtype), torch.randn(2, 5, 16).to(dtype)
    imported = Imported([module], [x])
    done = imported.rewrite()
    assert done.linears == 5
    assert sum(name.startswith("panel_linear") for name in operations(imported.mod)) == 2
    assert [[w.axes for w in p.weights] for p in done.panels.values()] == [
        ["en,k", "en,k", "en,k", "k,en"],
        ["en,k"],
    ]
    for actual, expected in zip(imported.run(done, [x]), module(x), strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize(("most", "linears"), [(64, 5), (65, 0), (None, 0)])
def test_only_few_tokens_are_rewritten(most, linears):
    dim = Dim("t", min=1, max=most)
    imported = Imported([Projections()], [torch.randn(5, 16)], ({0: dim},))
    assert imported.rewrite().linears == linears


def test_layers_of_many_tokens_are_declined():
    module, x = layer()
    imported = Imported([module], [x], ({0: Dim("t", min=1, max=512)},))
    assert "more than 64 tokens" in reason(imported.rewrite())


def test_linears_can_be_left_alone():
    imported = Imported([Projections()], [torch.randn(5, 16)])
    assert imported.rewrite(linears=False).linears == 0
    assert operations(imported.mod).count("relax.matmul") == 5


# --- Operators that PyTorch's importer does not emit ----------------------------------------------


def handwritten(down: str) -> relax.Function:
    """A layer of ``relax.op.nn`` operators and einsums."""
    builder, params = relax.BlockBuilder(), parameters()
    x, router, gamma, up, w_down = params
    with builder.function("main", params):
        with builder.dataflow():
            scores = relax.op.nn.relu(relax.op.matmul(x, router))
            scores = builder.emit(relax.op.nn.rms_norm(scores, gamma, axes=-1, epsilon=1e-5))
            mid = relax.op.nn.silu(relax.op.einsum((x, up), "th,esh->tes"))
            if down == "einsum":
                y = relax.op.einsum((scores, mid, w_down), "te,tes,ehs->th")
            else:
                each = relax.op.reshape(relax.op.repeat(scores, S, axis=1), (T, E, S))
                mid = relax.op.reshape(relax.op.multiply(mid, each), (T, E * S))
                weight = relax.op.permute_dims(w_down, (0, 2, 1))
                y = relax.op.matmul(mid, relax.op.reshape(weight, (E * S, H)))
            result = builder.emit_output(y)
        builder.emit_func_output(result)
    return builder.get()["main"]


def parameters() -> list[relax.Var]:
    shapes = {"x": (T, H), "router": (H, E), "gamma": (E,), "up": (E, S, H), "down": (E, H, S)}
    return [relax.Var(name, relax.TensorType(shape, "float32")) for name, shape in shapes.items()]


@pytest.mark.parametrize("down", ["einsum", "repeat"])
def test_match_of_relax_operators(down):
    (match,) = find(handwritten(down))
    assert_expected(match, {"norm": "rms", "eps": 1e-5, "router": "relu, rms norm", "act": "silu"})


def test_what_is_written_in_place_is_not_read_later():
    """The fused operation reads x where the layer ended, after the write."""
    builder, params = relax.BlockBuilder(), parameters()
    x, router, _, up, down = params
    clear = tvm.te.create_prim_func([tvm.te.compute((T, H), lambda *_: 0.0, name="zero")])
    with builder.function("main", params, attrs={"num_input": 1}):
        with builder.dataflow():
            scores = builder.emit(relax.op.nn.relu(relax.op.matmul(x, router)))
            mid = builder.emit(relax.op.nn.silu(relax.op.einsum((x, up), "th,esh->tes")))
            kernel = builder.add_func(clear, "clear")
            cleared = builder.emit(relax.op.call_tir_inplace(kernel, (x,), [0], x.ty))
            y = builder.emit(relax.op.einsum((scores, mid, down), "te,tes,ehs->th"))
            result = builder.emit_output(relax.Tuple([y, cleared]))
        builder.emit_func_output(result)
    _, done = rewrite(builder.get(), "main", KERNELS)
    assert "written in place" in reason(done)


@pytest.mark.parametrize("cast", [False, True])
def test_tensors_of_unknown_sizes(cast):
    """Nothing can be said of what is computed from them, until their sizes are asserted."""
    builder, params = relax.BlockBuilder(), parameters()
    known, router, _, up, down = params
    unknown = relax.Var("unknown", relax.TensorType(None, "float32", ndim=2))
    with builder.function("main", [unknown, *params[1:]], attrs={"num_input": 1}):
        with builder.dataflow():
            x = builder.match_cast(unknown, known.ty) if cast else unknown
            scores = builder.emit(relax.op.nn.relu(relax.op.matmul(x, router)))
            mid = builder.emit(relax.op.nn.silu(relax.op.matmul(x, relax.op.reshape(up, (H, -1)))))
            if cast:
                mid = builder.emit(relax.op.nn.silu(relax.op.einsum((x, up), "th,esh->tes")))
                mid = builder.emit(relax.op.einsum((scores, mid, down), "te,tes,ehs->th"))
            result = builder.emit_output(mid)
        builder.emit_func_output(result)
    assert [isinstance(r, BlockFFNMatch) for r in find(builder.get()["main"])] == [True] * cast
