"""Bundles as they are built."""

from __future__ import annotations

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from blockffn_compile.aot.build import build
from blockffn_compile.aot.bundle import ALIGNMENT, read_manifest


def test_the_same_model_gives_the_same_bytes(model, bundle, tmp_path):
    again = build(model, "native", tmp_path / "again")
    names = sorted(path.name for path in bundle.iterdir())
    assert names == ["manifest.json", "model.so", "weights.safetensors"]
    for name in names:
        assert (again / name).read_bytes() == (bundle / name).read_bytes(), name


def test_weights_are_aligned_and_named(model, bundle):
    path = bundle / "weights.safetensors"
    tensors = load_file(path)
    manifest = read_manifest(bundle)
    padding = {name for name in tensors if name.startswith("padding.")}
    assert tensors.keys() - padding == {*manifest.trunk_weights, *manifest.head_weights}
    size = int.from_bytes(path.read_bytes()[:8], "little")
    assert (8 + size) % ALIGNMENT == 0
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(tensors)
    assert torch.equal(tensors["model.norm.weight"], model.model.norm.weight)
    assert tensors["model.rotary.cos"].dtype == torch.float32
    up = tensors["model.layers.1.mlp.up_proj.panels"]  # [E, S / P, H, P]
    expected = model.model.layers[1].mlp.up_proj  # [E, S, H]
    assert torch.equal(up[:, 0].transpose(1, 2), expected)
