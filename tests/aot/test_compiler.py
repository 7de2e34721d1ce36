"""Bundles as they are built."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from blockffn_compile.aot.bundle import ALIGNMENT
from blockffn_compile.aot.compiler import build
from blockffn_compile.aot.manifest import read_manifest
from blockffn_compile.layer import Quantisation
from blockffn_compile.models.checkpoint import save_model
from blockffn_compile.schedules.quantisation import quantised
from tests.conftest import make_config
from tests.quantised import SIZES


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


def test_arm64_code_uses_fused_vector_instructions(model, tmp_path):
    """Built on any machine; an ELF file for AArch64 whose sums are ``fmla`` of four lanes."""
    out = build(model, "arm64", tmp_path / "arm64")
    manifest = read_manifest(out)
    assert (manifest.architecture, manifest.cpu_features) == ("aarch64", ["asimd"])
    command = ["aarch64-linux-gnu-objdump", "-d", str(out / "model.so")]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "file format elf64-littleaarch64" in code
    assert len(re.findall(r"\tfmla\tv\d+\.4s", code)) > 100
    # Only the instructions that every such CPU has.
    assert not re.findall(r"\t(?:bfdot|bfmmla|fmla\tz\d+|sdot)", code)


@pytest.mark.parametrize(
    ("target", "has", "lacks"),
    [("x86-64-v3", "vfmadd", "%zmm"), ("x86-64-v4", "%zmm", "vdpbf16ps")],
)
def test_x86_levels(model, tmp_path, target, has, lacks):
    out = build(model, target, tmp_path / target)
    command = ["objdump", "-d", str(out / "model.so")]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert has in code
    assert lacks not in code
    manifest = read_manifest(out)
    assert ("avx512f" in manifest.cpu_features) == (target == "x86-64-v4")


def test_the_same_model_gives_the_same_bytes(model, bundle, tmp_path):
    """From a checkpoint as well, and in the place of an older bundle."""
    save_model(model, tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "tokenizer.json").write_text("{}")
    out = tmp_path / "bundles" / "again"
    shutil.copytree(bundle, out)
    (out / "model.so").write_bytes(b"old")
    build(tmp_path / "checkpoint", "native", out)
    assert [path.name for path in out.parent.iterdir()] == ["again"]
    assert (out / "tokenizer.json").read_text() == "{}"
    for name in ("model.so", "weights.safetensors"):
        assert (out / name).read_bytes() == (bundle / name).read_bytes(), name
    manifests = [json.loads((path / "manifest.json").read_text()) for path in (bundle, out)]
    for manifest in manifests:
        for files in (manifest["sizes"], manifest["sha256"]):
            files.pop("tokenizer.json", None)
    assert manifests[0] == manifests[1]


def test_other_folders_are_not_replaced(model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="something else than a bundle"):
        build(model, "native", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_unknown_targets_and_models(make_model, model, tmp_path):
    with pytest.raises(ValueError, match="unknown target 'sparc'; known are native, x86-64-v3"):
        build(model, "sparc", tmp_path / "out")
    with pytest.raises(ValueError, match="key heads of 8: bundles need a multiple of 16"):
        build(make_model(make_config("gqa")), "native", tmp_path / "out")


def test_quantised_weights_have_scales(make_model, tmp_path, caplog):
    model = make_model(make_config(**SIZES, tie_word_embeddings=False)).bfloat16()
    out = build(model, "native", tmp_path / "out", quantize="int4")
    tensors = load_file(out / "weights.safetensors")
    for name, rows in (("model.layers.1.mlp.up_proj", 64), ("model.layers.1.mlp.down_proj", 32)):
        values, scales = tensors[f"{name}.panels"], tensors[f"{name}.scales"]
        experts, number, depth, width = scales.shape
        assert values.shape == (experts, number, rows // 2, width)
        assert (depth, values.dtype, scales.dtype) == (rows // 32, torch.uint8, torch.bfloat16)
        wanted = quantised(model.get_parameter(name), Quantisation(4, 32))
        for stored, want in zip((values, scales), wanted, strict=True):
            rows_of = stored.transpose(2, 3).flatten(1, 2)[:, : want.shape[1]]
            assert torch.equal(rows_of, want)
    # Routers and what is not summed stay.
    for name in ("model.layers.1.mlp.router_proj.weight.panels", "model.embed_tokens.weight"):
        assert tensors[name].dtype == torch.bfloat16
    assert tensors["lm_head.weight.panels"].dtype == torch.uint8
    assert not [message for message in caplog.messages if "stays" in message]
    weights = read_manifest(out).head_weights
    assert weights == ["lm_head.weight.panels", "lm_head.weight.scales"]


def test_what_groups_do_not_divide_stays(model, tmp_path, caplog):
    """The experts of 16 have no group of 32, so their layers stay whole."""
    out = build(model, "native", tmp_path / "out", quantize="int8")
    tensors = load_file(out / "weights.safetensors")
    assert tensors["model.layers.0.mlp.up_proj.panels"].dtype == torch.bfloat16
    assert tensors["model.layers.0.self_attn.o_proj.weight.panels"].dtype == torch.int8
    stays = [message for message in caplog.messages if "stays as it is" in message]
    assert len(stays) == 4
    assert "model.layers.0.mlp.up_proj stays as it is: groups of 32 do not divide it" in stays


def test_wrong_ways_to_quantise(model, tmp_path):
    with pytest.raises(ValueError, match="cuda-sm87: the kernels for GPUs take no quantised"):
        build(model, "cuda-sm87", tmp_path / "out", quantize="int8")
    with pytest.raises(ValueError, match="group is 48; it must be a multiple of 32"):
        build(model, "native", tmp_path / "out", quantize="int8", group=48)
    spoiled = copy.deepcopy(model)
    spoiled.model.layers[1].self_attn.o_proj.weight[3, 5] = torch.nan
    with pytest.raises(ValueError, match="layers_1_self_attn_o_proj_weight: weights that are not"):
        build(spoiled, "native", tmp_path / "out", quantize="int8")
    wrong: Any = "int3"
    with pytest.raises(ValueError, match="choose int8 or int4"):
        build(model, "native", tmp_path / "out", quantize=wrong)
    assert not list(tmp_path.iterdir())


def test_a_linker_that_is_missing(model, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"no linker for arm64 \(aarch64-linux-gnu-g\+\+\)"):
        build(model, "arm64", tmp_path / "out")
    assert not list(tmp_path.iterdir())


MEASURE = """
import sys
from pathlib import Path
from blockffn_compile.aot import build

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

def progress(stage, done, total):
    global before
    if stage == "packing" and not done:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = status("VmRSS")

build(sys.argv[1], "native", sys.argv[2], progress=progress)
print(status("VmHWM") - before)
"""


def test_weights_are_never_in_memory_together(make_model, tmp_path):
    """Packing a checkpoint of four large tensors needs room for about one."""
    changes = {"hidden_size": 512, "num_experts": 256, "expert_size": 64}
    save_model(make_model(make_config("gqa", **changes)), tmp_path / "checkpoint")
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "checkpoint"), str(tmp_path / "out")]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    size = (tmp_path / "checkpoint" / "model.safetensors").stat().st_size
    assert size > 128e6
    assert grown < 0.6 * size
