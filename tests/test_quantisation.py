"""Quantised models: what changes, what does not, and which kernels run."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor import config

import blockffn_compile
from blockffn_compile import ops, schedules
from blockffn_compile.engines.torch_engine import TorchEngine
from blockffn_compile.generation import generate
from blockffn_compile.layer import BlockFFN, BlockFFNSpec
from blockffn_compile.models.checkpoint import save_model
from blockffn_compile.passes.fx import BlockFFNGraphPass
from blockffn_compile.quantisation import is_quantised, quantize
from blockffn_compile.schedules import reference
from blockffn_compile.schedules.quantisation import dequantised
from blockffn_compile.speculative.generator import Generator
from blockffn_compile.speculative.loop import decode
from blockffn_compile.speculative.ngram import NGramDrafter
from tests.buckets import few_buckets
from tests.conftest import make_config
from tests.engines.contract import LENGTH, ROWS, BitsOfPlainDecoding, chain
from tests.engines.test_torch_engine import entries
from tests.quantised import SIZES, exact
from tests.speculative.tables import Always

PROMPT = [5, 17, 3, 250, 17, 99, 4, 61, 12]
schemes = pytest.mark.parametrize("scheme", ["int8", "int4"])


@pytest.fixture
def model(make_model, request):
    attention = getattr(request, "param", "gqa")
    return make_model(make_config(attention, **SIZES))


def error(y: Tensor, want: Tensor) -> float:
    return ((y.double() - want).norm() / want.norm()).item()


# --- What is quantised ----------------------------------------------------------------------------


@schemes
def test_every_product_but_the_router(model, scheme):
    before = {name: p.nbytes for name, p in model.named_parameters()}
    assert quantize(model, scheme) is model
    assert is_quantised(model)
    after = dict(model.named_parameters())
    stays = {name for name in before if name in after}
    assert all("norm" in name or "router" in name or "embed" in name for name in stays)
    for name in before.keys() - stays:
        path, _, attribute = name.rpartition(".")
        values, scales = (after[f"{path}.parametrizations.{attribute}.original{i}"] for i in (0, 1))
        bits = 8 if scheme == "int8" else 4
        assert values.dtype == (torch.int8 if bits == 8 else torch.uint8)
        assert values.nbytes == before[name] // 4 * bits // 8
        assert scales.nbytes == before[name] // 4 // 32 * 2
        assert not values.requires_grad


def test_gated_experts_and_other_models():
    """Any module with linear layers, and a layer of its own."""
    torch.manual_seed(0)
    spec = BlockFFNSpec(64, 4, 32, gated=True)
    model = nn.Sequential(nn.Linear(64, 64), BlockFFN(spec), nn.LayerNorm(64))
    model.requires_grad_(False)
    x = torch.randn(70, 64)
    want = model(x)
    quantize(model, "int8")
    names = [name for name, _ in model.named_parameters() if name.endswith("original0")]
    assert len(names) == 4
    assert error(model(x), want.double()) < 0.05
    with torch.no_grad():
        fast = torch.compile(model, backend="blockffn")
        assert error(fast(x), exact(model)(x.double())) < 1e-6


def test_what_groups_do_not_divide_stays(make_model, caplog):
    model = make_model(make_config(**SIZES | {"expert_size": 48}))
    with caplog.at_level(logging.WARNING, "blockffn_compile"):
        quantize(model, "int8")
    assert len(caplog.records) == 4
    assert caplog.messages[1] == (
        "model.layers.0.mlp.down_proj stays as it is: groups of 32 do not divide 64 and 48"
    )
    assert not is_quantised(model.model.layers[1].mlp)
    tokens = torch.tensor([PROMPT])
    with torch.no_grad():
        fast = torch.compile(model, backend="blockffn")
        assert error(fast(tokens), exact(model)(tokens)) < 2e-6


def test_skip(model):
    quantize(model, "int8", skip=("router", "lm_head", "layers.1."))
    assert type(model.lm_head) is nn.Linear
    assert not is_quantised(model.model.layers[1])
    assert is_quantised(model.model.layers[0])


def test_a_tied_embedding_stays(make_model):
    model = make_model(make_config(**SIZES, tie_word_embeddings=True))
    before = model.model.embed_tokens.weight.clone()
    quantize(model, "int4")
    assert torch.equal(model.model.embed_tokens.weight, before)
    assert not torch.equal(model.lm_head.weight, before)


def test_wrong_arguments(model):
    unknown: list[Any] = ["int2", "INT8", None]
    for scheme in unknown:
        with pytest.raises(ValueError, match="choose int8 or int4"):
            quantize(model, scheme)
    for group in (0, 16, 40):
        with pytest.raises(ValueError, match="a multiple of 32"):
            quantize(model, "int8", group)
    with pytest.raises(ValueError, match="no weights whose summed axis groups of 4096 divide"):
        quantize(model, "int8", 4096)
    with pytest.raises(ValueError, match="no weights"):
        quantize(nn.LayerNorm(64), "int8")
    model.model.layers[1].mlp.up_proj[0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj has weights that are not"):
        quantize(model, "int8")
    assert not is_quantised(model)
    model.model.layers[1].mlp.up_proj[0, 0, 0] = 0
    quantize(model, "int8")
    with pytest.raises(ValueError, match="quantise a model once"):
        quantize(model, "int8")


def test_quantised_models_are_not_converted(model, tmp_path):
    quantize(model, "int8")
    with pytest.raises(ValueError, match="build from the original, with quantize="):
        blockffn_compile.aot.build(model, "native", tmp_path / "bundle")
    with pytest.raises(ValueError, match="export the original"):
        blockffn_compile.onnx.export(model, tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="save the original"):
        save_model(model, tmp_path)
    with pytest.raises(ValueError, match="give the model its dtype, then quantise"):
        model.float().half()(torch.tensor([PROMPT]))
    assert not list(tmp_path.iterdir())


# --- What runs ------------------------------------------------------------------------------------


@schemes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model", ["gqa", "mla"], indirect=True)
def test_compiled_models_are_as_exact_as_eager_ones(model, dtype, scheme):
    model = quantize(model.to(dtype), scheme)
    report = blockffn_compile.explain(model, torch.tensor([PROMPT]))
    assert [layer.status for layer in report.layers] == ["rewritten"] * 2
    reference, fast = exact(model), torch.compile(model, backend="blockffn")
    errors = []
    with torch.no_grad():
        for seed in range(9):
            tokens = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(seed))
            want = reference(tokens)
            errors.append([error(run(tokens), want) for run in (fast, model)])
    # The median: where rounding turns a score on, by either side, the error is that of an expert.
    ours, eager = torch.tensor(errors).median(dim=0).values
    assert ours <= 1.5 * eager


def test_no_weight_is_made_of_the_integers(model):
    """The graphs of a step and of a prompt read them as they are."""
    quantize(model, "int4")
    engine = TorchEngine(model)

    def run() -> None:
        engine.prefill(0, PROMPT * 9)
        engine.verify({0: chain([3, 4])})

    run()
    with torch.profiler.profile() as profile:
        run()
    names = {event.key for event in profile.key_averages()}
    assert any("embedding" in name or "triton" in name or "aten" in name for name in names)
    assert not [name for name in names if "dequantize" in name]


@schemes
def test_verification_runs_quantised_kernels(model, scheme, monkeypatch):
    quantize(model, scheme)
    wrong: list[Tensor] = []

    def run() -> None:
        torch._dynamo.reset()
        with torch.no_grad():
            fast = torch.compile(model, backend="blockffn", options={"verify": True})
            fast(torch.tensor([PROMPT]))

    run()

    def halved(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        wrong.append(values)
        return dequantised(values, scales, dtype) / 2

    monkeypatch.setattr(reference, "dequantised", halved)
    monkeypatch.setattr(schedules, "SCHEDULES", (reference.schedule,))
    ops._kernel.cache_clear()
    with pytest.raises(BackendCompilerFailed, match=r"layers\.0\.mlp"):
        run()
    assert wrong
    ops._kernel.cache_clear()


def test_weights_stored_along_another_axis_are_made_first():
    """Groups along the outputs of the up projection fit no kernel."""

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router, self.up = nn.Linear(64, 4, bias=False), nn.Linear(128, 64, bias=False)
            self.down = nn.Parameter(torch.randn(64, 128) / 11)

        def forward(self, x: Tensor) -> Tensor:
            scores = self.router(x).relu()
            mid = torch.nn.functional.silu(x @ self.up.weight).unflatten(-1, (4, 32))
            return (mid * scores[..., None]).flatten(-2) @ self.down.T

    torch.manual_seed(0)
    model = quantize(Turned().requires_grad_(False), "int8")
    x = torch.randn(9, 64)
    with torch.no_grad():
        fast = torch.compile(model, backend="blockffn")
        assert error(fast(x), model(x).double()) < 1e-6


@pytest.mark.parametrize(("size", "group"), [(48, 32), (80, 64)])
def test_groups_that_reach_into_the_next_expert_are_made_first(size, group):
    """They divide all experts together, but not each."""

    class Linears(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router, self.up = nn.Linear(64, 4, bias=False), nn.Linear(64, 4 * size, bias=False)
            self.down = nn.Linear(4 * size, 64, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            scores = self.router(x).relu()
            mid = torch.nn.functional.silu(self.up(x)).unflatten(-1, (4, size))
            return self.down((mid * scores[..., None]).flatten(-2))

    torch.manual_seed(0)
    model = quantize(Linears().requires_grad_(False), "int8", group)
    x = torch.randn(9, 64)
    report = blockffn_compile.explain(model, x)
    assert [layer.status for layer in report.layers] == ["rewritten"]
    with torch.no_grad():
        fast = torch.compile(model, backend="blockffn")
        assert error(fast(x), model(x).double()) < 1e-6


def test_the_graph_pass_alone():
    model = quantize(nn.Sequential(nn.Linear(64, 32)).requires_grad_(False), "int8")
    x = torch.randn(3, 64)
    with torch.no_grad(), config.patch(joint_custom_pre_pass=BlockFFNGraphPass()):
        assert error(torch.compile(model)(x), model(x).double()) < 1e-6


def test_training_graphs_take_the_plain_way(model):
    quantize(model, "int8")
    norm = model.model.norm.weight.requires_grad_()
    tokens = torch.tensor([PROMPT])
    want = torch.autograd.grad(model(tokens).square().sum(), norm)[0]
    got = torch.autograd.grad(
        torch.compile(model, backend="blockffn")(tokens).square().sum(), norm
    )[0]
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


# --- Decoding -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(make_model):
    model = quantize(make_model(make_config(**SIZES)).bfloat16(), "int4")
    return TorchEngine(model, ROWS, LENGTH)


class TestBits(BitsOfPlainDecoding):
    """A token's bits in any company."""

    entries = staticmethod(entries)


@schemes
def test_drafts_change_nothing(model, scheme):
    quantize(model, scheme)
    with few_buckets(1, 8):
        engine = TorchEngine(model)
        plain = [token for step in decode(engine, [PROMPT], 60) for token in step.tokens]
        drafting = decode(engine, [PROMPT], 60, drafters=lambda: [NGramDrafter()], policy=Always(8))
        steps = list(drafting)
    assert [token for step in steps for token in step.tokens] == plain
    assert any(step.drafted for step in steps)
    assert plain == list(generate(model, PROMPT, 60, backend="eager"))


def test_costs_are_measured_anew(model, monkeypatch, tmp_path):
    monkeypatch.setenv("BLOCKFFN_CACHE_DIR", str(tmp_path))
    measured = []

    def measure(engine: TorchEngine) -> dict[int, float]:
        measured.append(engine)
        return {1: 1.0, 8: 2.0}

    monkeypatch.setattr("blockffn_compile.speculative.cost.measure", measure)
    with few_buckets(1, 8):
        Generator(model, "ngram")
        Generator(quantize(copy.deepcopy(model), "int8"), "ngram")
        Generator(quantize(copy.deepcopy(model), "int4"), "ngram")
        Generator(quantize(copy.deepcopy(model), "int4"), "ngram")
    assert len(measured) == 3
