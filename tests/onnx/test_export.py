"""Exported decoders against PyTorch, and what the file says of itself."""

from __future__ import annotations

import itertools
import json

import numpy as np
import onnx
import pytest
import torch

import blockffn_compile.onnx
from blockffn_compile.layer import BlockFFN, BlockFFNSpec
from blockffn_compile.models.config import BlockFFNConfig
from blockffn_compile.onnx.export import CONFIG, cache_names, cache_shapes
from blockffn_compile.onnx.files import load, save
from tests.conftest import ONNX_DECODERS, make_config
from tests.passes.exporting import export as export_module

TOKENS = (1, 2, 7, 8, 33, 64, 200)


@pytest.fixture(params=ONNX_DECODERS)
def exported(request, onnx_decoder):
    """The model in the exported dtype, the file, the report and the flavour."""
    return *onnx_decoder(request.param), ONNX_DECODERS[request.param][1]


def step(model, session, cache, tokens, positions, mask, slots=None):
    """Logits, features and the new cache."""
    inputs = {
        "tokens": tokens.numpy(),
        "positions": positions.numpy(),
        "slots": (positions if slots is None else slots).numpy(),
        "mask": mask.numpy(),
    }
    layers = model.config.num_hidden_layers
    inputs |= dict(zip(cache_names(layers, "past"), cache, strict=True))
    logits, features, *cache = session.run(None, inputs)
    return logits, features, cache


def new_cache(model, batch, slots):
    kind = np.float16 if model.lm_head.weight.dtype == torch.float16 else np.float32
    return [np.zeros(shape, kind) for shape in cache_shapes(model.config, batch, slots)]


def assert_close(actual, expected):
    limit = 0.03 if expected.dtype == torch.float16 else 2e-5
    error = np.linalg.norm(actual.astype(np.float64) - expected.double().numpy())
    assert error <= limit * expected.double().norm().item()


def test_follows_pytorch(exported):
    """Any number of texts and tokens, in one step and continued."""
    model, path, _, _ = exported
    session = blockffn_compile.onnx.session(path)
    generator = torch.Generator().manual_seed(0)
    for batch, count in ((1, 1), (3, 5), (1, 200)):
        tokens = torch.randint(0, 300, (batch, count), generator=generator)
        positions = torch.arange(count).expand(batch, count)
        slots = count + 3
        mask = torch.arange(slots) <= positions[..., None]
        want, want_features = model(tokens), model.model(tokens)
        logits, features, _ = step(
            model, session, new_cache(model, batch, slots), tokens, positions, mask
        )
        assert_close(logits, want)
        assert_close(features, want_features)
        cache, half = new_cache(model, batch, slots), count // 2
        for part in (slice(0, half), slice(half, count)):
            if part.start < part.stop:
                logits, _, cache = step(
                    model, session, cache, tokens[:, part], positions[:, part], mask[:, part]
                )
        assert_close(logits, want[:, half:])


def test_trees(exported):
    """Two nodes of one parent share a position, and neither sees the other."""
    model, path, _, _ = exported
    session = blockffn_compile.onnx.session(path)
    text, a, b = [5, 17, 3], 9, 11
    tokens = torch.tensor([[*text, a, b]])
    positions, slots = torch.tensor([[0, 1, 2, 3, 3]]), torch.arange(5)[None]
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    mask[4, 3] = False
    logits, _, _ = step(
        model, session, new_cache(model, 1, 5), tokens, positions, mask[None], slots
    )
    for node, token in ((3, a), (4, b)):
        assert_close(logits[0, node], model(torch.tensor([[*text, token]]))[0, -1])


def test_the_file_describes_itself(exported):
    model, path, report, flavour = exported
    onnx.checker.check_model(path, full_check=True)
    stored = load(path)
    assert BlockFFNConfig.from_dict(json.loads(stored.metadata_props[CONFIG])) == model.config
    assert stored.opset_imports[""] >= 20
    names = stored.graph.initializers.keys()
    assert {"model.norm.weight", "model.layers.1.mlp.router_proj.weight"} <= names
    assert "model.layers.0.self_attn.o_proj.weight" in names
    experts = [name for name in names if "up_proj" in name or "down_proj" in name]
    assert all(name.startswith("model.layers.") for name in experts)
    assert len(experts) == 4
    assert [layer.name for layer in report.layers] == (
        ["model.layers.0.mlp", "model.layers.1.mlp"] if flavour == "portable" else []
    )
    assert bool(stored.functions) == (flavour == "portable")


def test_a_dense_export_can_be_rewritten_later(exported, tmp_path):
    model, path, _, flavour = exported
    report = blockffn_compile.onnx.rewrite(path, tmp_path / "out.onnx")
    assert [layer.status for layer in report.layers] == ["rewritten"] * 2 * (flavour == "dense")
    session = blockffn_compile.onnx.session(tmp_path / "out.onnx")
    assert session.flavour == "native"
    tokens = torch.tensor([[5, 17, 3]])
    positions = torch.arange(3)[None]
    mask = torch.ones(1, 3, 3, dtype=torch.bool).tril()
    logits, _, _ = step(model, session, new_cache(model, 1, 3), tokens, positions, mask)
    assert_close(logits, model(tokens))


def test_contrib(onnx_decoder, tmp_path):
    """Exported with quantised weights, and a dense export rewritten to unquantised ones."""
    model, dense, _ = onnx_decoder("dense")
    paths = tmp_path / "int8.onnx", tmp_path / "float32.onnx"
    reports = (
        blockffn_compile.onnx.export(model, paths[0], flavour="contrib", quantize="int8"),
        blockffn_compile.onnx.rewrite(dense, paths[1], flavour="contrib", verify=True),
    )
    tokens = torch.tensor([[5, 17, 3]])
    positions = torch.arange(3)[None]
    mask = torch.ones(1, 3, 3, dtype=torch.bool).tril()
    want = model(tokens)
    errors = []
    for path, report in zip(paths, reports, strict=True):
        assert [layer.status for layer in report.layers] == ["rewritten"] * 2
        session = blockffn_compile.onnx.session(path, threads=1)
        assert session.flavour == "contrib"
        logits, _, _ = step(model, session, new_cache(model, 1, 3), tokens, positions, mask)
        errors.append(((torch.from_numpy(logits) - want).norm() / want.norm()).item())
    assert errors[1] < 2e-5 < errors[0] < 0.03
    assert all(0 < layer.error < 0.03 for layer in reports[0].layers)
    assert paths[0].stat().st_size < paths[1].stat().st_size


def test_without_a_cache(make_model, tmp_path):
    model = make_model(make_config())
    blockffn_compile.onnx.export(model, tmp_path / "model.onnx", with_past=False)
    session = blockffn_compile.onnx.session(tmp_path / "model.onnx")
    assert [v.name for v in session.get_inputs()] == ["tokens", "positions", "mask"]
    assert [v.name for v in session.get_outputs()] == ["logits", "features"]
    tokens = torch.tensor([[5, 17, 3, 8], [1, 2, 3, 4]])
    positions = torch.arange(4).expand(2, 4)
    mask = torch.ones(2, 4, 4, dtype=torch.bool).tril()
    inputs = {"tokens": tokens, "positions": positions, "mask": mask}
    logits, _ = session.run(None, {name: x.numpy() for name, x in inputs.items()})
    assert_close(logits, model(tokens))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flavour": "sparse"}, "flavour is 'sparse'; choose portable or contrib or dense"),
        ({"quantize": "int8"}, "flavour 'portable' has no quantised weights"),
        ({"flavour": "dense", "quantize": "int8"}, "flavour 'dense' has no quantised weights"),
        ({"dtype": torch.bfloat16}, "bfloat16 has no kernels .* dtype=float32 or float16"),
    ],
    ids=["flavour", "weights", "dense", "dtype"],
)
def test_refusals(make_model, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        blockffn_compile.onnx.export(make_model(make_config()), tmp_path / "model.onnx", **change)
    assert not list(tmp_path.iterdir())


# --- Layers from PyTorch's own exporter -----------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("layout", ["block", "block_linear"])
def test_round_trip_of_a_layer(layout, dtype, tmp_path):
    """Export, rewrite, run, for every number of tokens; all experts off, some, and all on."""
    spec = BlockFFNSpec(16, 6, 8, layout=layout, act="gelu", gated=layout == "block")
    layer = BlockFFN(spec).requires_grad_(False).to(dtype)
    example = torch.zeros(3, 16, dtype=dtype)
    save(export_module(layer, (example,), dynamic=True), tmp_path / "layer.onnx")
    report = blockffn_compile.onnx.rewrite(tmp_path / "layer.onnx", tmp_path / "out.onnx")
    assert [la.spec for la in report.layers] == [spec]
    sessions = [
        blockffn_compile.onnx.session(tmp_path / "out.onnx", portable=portable)
        for portable in (True, False)
    ]
    assert [session.flavour for session in sessions] == ["portable", "native"]
    (name,) = (value.name for value in sessions[0].get_inputs())
    directions = layer.router_proj.weight.float().pinverse().sum(1).to(dtype)
    for count, experts in itertools.product(TOKENS, ("off", "some", "on")):
        x = torch.randn(count, 16, generator=torch.Generator().manual_seed(count)).to(dtype)
        if experts != "some":  # every logit is the same number
            x = directions.expand(count, 16) * (1 if experts == "on" else -1)
        active = (layer.scores(layer.router_proj(x)) != 0).float().mean().item()
        assert (active in (0, 1)) == (experts != "some") or count < 7
        exact = copy_of(layer)(x.double())
        limit = 1.5 * (layer(x).double() - exact).norm() + 2e-7 * exact.norm()
        for session in sessions:
            (y,) = session.run(None, {name: x.contiguous().numpy()})
            assert (torch.from_numpy(y).double() - exact).norm() <= limit, session.flavour


def copy_of(layer: BlockFFN) -> BlockFFN:
    """In fp64."""
    copy = BlockFFN(layer.spec).double()
    copy.load_state_dict(layer.state_dict())
    return copy.requires_grad_(False)
