"""``torch.compile(backend="blockffn")``, through Inductor, on models of each kind."""

from __future__ import annotations

import dataclasses
import logging
import os
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torch._inductor.utils import fresh_cache, run_and_get_code

from blockffn_compile.backend import blockffn
from blockffn_compile.layer import BlockFFN, BlockFFNSpec
from blockffn_compile.models.cache import StaticCache
from blockffn_compile.passes import fx as passes
from blockffn_compile.passes.recognizer import BlockFFNMatch, recognise
from tests.conftest import make_config
from tests.passes.near_misses import NEAR_MISSES
from tests.passes.spellings import MATCHES

#: Called by compiled code: the kernels with and without a gate.
CALLS = ("extern_kernels.blockffn_ffn(", "extern_kernels.blockffn_gated_ffn(")
SPEC = BlockFFNSpec(16, 4, 8)
VERIFY = {"verify": True}


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return BlockFFN(SPEC).requires_grad_(False)


def compiled(model, **kwargs):
    return torch.compile(model, backend="blockffn", fullgraph=True, **kwargs)


def calls(code: list[str]) -> int:
    """Fused layers in generated code."""
    return sum(text.count(call) for text in code for call in CALLS)


# --- What compiles, and to what -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)]
)
@pytest.mark.parametrize("layout", ["block", "block_linear"])
def test_layer(layout, dtype, limit):
    spec = dataclasses.replace(SPEC, layout=layout, act="gelu", gated=True, norm="sum")
    layer, x = BlockFFN(spec).to(dtype).requires_grad_(False), torch.randn(2, 5, 16).to(dtype)
    y, code = run_and_get_code(compiled(layer, options=VERIFY), x)
    assert calls(code) == 1
    torch.testing.assert_close(y, layer(x), atol=limit, rtol=limit)


COMPILED = ("einsum_of_three", "tokens_last", "scores_after_down", "router_masked_softmax")


@pytest.mark.parametrize("name", COMPILED)
def test_other_spellings(name):
    (spelling,) = (s for s in MATCHES if s.name == name)
    module, x = spelling.build()
    y, code = run_and_get_code(compiled(module, options=VERIFY), x)
    assert calls(code) == 1
    torch.testing.assert_close(y, module(x), atol=1e-5, rtol=1e-5)


DECLINED = (
    "softmax",
    "bias_after_relu",
    "unequal_experts",
    "weights_cast",
    "intermediate_returned",
)


@pytest.mark.parametrize("name", DECLINED)
def test_declined_layers_are_left_to_inductor(name, caplog):
    (spelling,) = (s for s in NEAR_MISSES if s.name == name)
    module, x = spelling.build()
    with caplog.at_level(logging.INFO, "blockffn_compile"), fresh_cache():
        y, code = run_and_get_code(compiled(module), x)
    assert calls(code) == 0
    assert spelling.expect["reason"] in caplog.text
    limit = 2e-2 if name == "weights_cast" else 1e-5
    torch.testing.assert_close(y, module(x), atol=limit, rtol=limit)


def test_a_graph_without_layers_compiles_as_inductor_compiles_it():
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x):
            return self.down(F.silu(self.up(x)) * F.gelu(self.up(x)))

    model, x = Dense().requires_grad_(False), torch.randn(5, 16)
    codes = []
    for backend in ("blockffn", "inductor"):
        with fresh_cache():
            _, code = run_and_get_code(torch.compile(model, backend=backend), x)
        codes.append([line for text in code for line in text.splitlines() if "AOT ID" not in line])
    assert codes[0] == codes[1] != []


def test_modes(layer):
    x = torch.randn(3, 16)
    for mode in ("default", "max-autotune-no-cudagraphs"):
        torch._dynamo.reset()
        y, code = run_and_get_code(compiled(layer, mode=mode), x)
        assert calls(code) == 1
        torch.testing.assert_close(y, layer(x))


def test_freezing(layer):
    x = torch.randn(3, 16)
    with torch.no_grad():
        y, code = run_and_get_code(compiled(layer, options={**VERIFY, "freezing": True}), x)
        torch.testing.assert_close(y, layer(x))
    assert calls(code) == 1


def test_dynamic_tokens_compile_once(layer):
    fast = compiled(layer, dynamic=True, options=VERIFY)
    fast(torch.randn(5, 16))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (2, 3, 64, 200):
            x = torch.randn(tokens, 16)
            torch.testing.assert_close(fast(x), layer(x))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_parameters_with_gradients_in_inference(mode):
    layer, x = BlockFFN(SPEC), torch.randn(5, 16)
    with mode():
        y, code = run_and_get_code(compiled(layer, options=VERIFY), x)
        torch.testing.assert_close(y, layer(x))
    assert calls(code) == 1


def test_training_falls_back(caplog):
    layer, x = BlockFFN(SPEC), torch.randn(5, 16, requires_grad=True)
    with caplog.at_level(logging.INFO, "blockffn_compile"), fresh_cache():
        y, code = run_and_get_code(compiled(layer), x)
    assert calls(code) == 0
    assert "declined: gradients are needed" in caplog.text
    tensors = [x, *layer.parameters()]
    actual = torch.autograd.grad(y.square().sum(), tensors)
    expected = torch.autograd.grad(layer(x).square().sum(), tensors)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("attention", ["gqa", "mla"])
def test_decoding_does_not_recompile(attention, make_model, caplog):
    """A prompt, then tokens one by one, with a cache: two graphs, no breaks, the same logits."""
    model = make_model(make_config(attention))
    caches = [StaticCache(model.config, 1, 32) for _ in range(2)]
    fast = compiled(model, options=VERIFY)
    tokens = torch.randint(0, 300, (1, 20), generator=torch.Generator().manual_seed(0))

    def step(start: int, end: int) -> None:
        part, positions = tokens[:, start:end], torch.arange(start, end)
        y = fast(part, positions, caches[0])
        expected = model(part, positions, caches[1])
        torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)

    with torch.inference_mode(), caplog.at_level(logging.INFO, "blockffn_compile"):
        step(0, 7)
        step(7, 8)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for start in range(8, 20):
                step(start, start + 1)
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    for layer in range(model.config.num_hidden_layers):
        assert caplog.text.count(f"model.layers.{layer}.mlp: rewritten") == 2


# --- Options --------------------------------------------------------------------------------------


def test_unknown_option(layer):
    with pytest.raises(Exception, match="Unexpected optimization option velocity"):
        compiled(layer, options={"velocity": 2})(torch.randn(5, 16))


def test_inductor_options_apply(layer):
    seen = []
    options = {
        "joint_custom_pre_pass": lambda graph: seen.append(
            "blockffn.chunk_sparse_ffn" in str(graph)
        )
    }
    compiled(layer, options=options)(torch.randn(5, 16))
    assert seen == [True]  # the user's own pass runs, after ours


def test_configured_passes_run_too(layer):
    seen = []
    with inductor_config.patch(
        joint_custom_pre_pass=lambda graph: seen.append("blockffn.chunk_sparse_ffn" in str(graph))
    ):
        compiled(layer)(torch.randn(5, 16))
    assert seen == [True]


def test_verify(layer, monkeypatch):
    def misread(values):
        return [
            dataclasses.replace(m, name="model.mlp", spec=m.spec.replace(act="relu"))
            for m in recognise(values)
            if isinstance(m, BlockFFNMatch)
        ]

    monkeypatch.setattr(passes, "recognise", misread)
    with pytest.raises(Exception, match=r"VerificationError: model\.mlp: .* differs"):
        compiled(layer, options=VERIFY)(torch.randn(5, 16))


def test_dump(layer, tmp_path):
    compiled(layer, options={"dump_graph": str(tmp_path)})(torch.randn(5, 16))
    assert "blockffn.chunk_sparse_ffn" not in (tmp_path / "graph0.before.txt").read_text()
    assert "blockffn.chunk_sparse_ffn" in (tmp_path / "graph0.after.txt").read_text()


# --- Caches ---------------------------------------------------------------------------------------


def compile_again(layer, x, **kwargs) -> tuple[torch.Tensor, int, dict[str, int]]:
    """Compiles with empty in-memory caches; the output, passes run, and the caches' counters."""
    torch._dynamo.reset()
    counters.clear()
    ran = []

    def counted(graph, **options):
        ran.append(graph)
        return rewrite(graph, **options)

    rewrite = passes.rewrite
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "rewrite", counted)
        y = torch.compile(layer, fullgraph=True, **kwargs)(x)
    stats = {**counters["inductor"], **counters["aot_autograd"]}
    return y, len(ran), stats


@pytest.fixture
def _disk_cache():
    with fresh_cache():
        yield


@pytest.mark.usefixtures("_disk_cache")
def test_cached_graphs_are_reused_and_right(layer):
    x = torch.randn(5, 16)
    for attempt, hits in enumerate((0, 1)):
        y, ran, stats = compile_again(layer, x, backend="blockffn")
        assert stats.get("autograd_cache_hit", 0) == hits
        assert ran == 1 - hits, attempt
        torch.testing.assert_close(y, layer(x))


@pytest.mark.usefixtures("_disk_cache")
def test_plain_inductor_and_ours_share_nothing(layer):
    x = torch.randn(5, 16)
    for backend in ("blockffn", "inductor", "blockffn", "inductor"):
        torch._dynamo.reset()
        _, code = run_and_get_code(torch.compile(layer, backend=backend), x)
        if code:  # empty when it comes from the cache
            assert calls(code) == (backend == "blockffn")
    _, _, stats = compile_again(layer, x, backend="inductor")
    assert stats["autograd_cache_hit"] == 1


@pytest.mark.usefixtures("_disk_cache")
def test_changed_options_never_meet_a_stale_graph(layer, tmp_path):
    x = torch.randn(5, 16)
    compile_again(layer, x, backend="blockffn")
    for options in (VERIFY, {"dump_graph": str(tmp_path)}):
        for _ in range(2):  # what was asked for happens every time
            _, ran, stats = compile_again(layer, x, backend="blockffn", options=options)
            assert (ran, stats.get("autograd_cache_hit", 0)) == (1, 0)
    assert len(list(tmp_path.glob("*.after.txt"))) == 2


@pytest.mark.usefixtures("_disk_cache")
def test_changed_sources_never_meet_a_stale_graph(layer, monkeypatch):
    x = torch.randn(5, 16)
    compile_again(layer, x, backend="blockffn")
    monkeypatch.setattr(passes, "_sources_hash", lambda: b"another version of the passes")
    _, ran, stats = compile_again(layer, x, backend="blockffn")
    assert (ran, stats.get("autograd_cache_hit", 0)) == (1, 0)


def test_another_process_finds_the_backend_the_cache_and_the_log(tmp_path):
    script = textwrap.dedent("""
        import torch
        from torch._dynamo.utils import counters
        from blockffn_compile.layer import BlockFFN, BlockFFNSpec

        torch.manual_seed(0)
        layer, x = BlockFFN(BlockFFNSpec(16, 4, 8)).requires_grad_(False), torch.randn(5, 16)
        y = torch.compile(layer, backend="blockffn", fullgraph=True)(x)
        torch.testing.assert_close(y, layer(x))
        print("hits", counters["aot_autograd"]["autograd_cache_hit"])
    """)
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
        "TORCH_LOGS": "+blockffn_compile",
    }
    runs = [
        subprocess.run(
            [sys.executable, "-c", script],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        for _ in range(2)
    ]
    assert [run.stdout.strip() for run in runs] == ["hits 0", "hits 1"]
    assert "layer 0: rewritten" in runs[0].stderr


def test_entry_point():
    assert "blockffn" in torch.compiler.list_backends()
    assert torch._dynamo.lookup_backend("blockffn") is blockffn
