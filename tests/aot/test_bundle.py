"""Loading is a trust boundary: damage and mistakes give one clear error, and run nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import blockffn_compile.aot.bundle as bundles
from blockffn_compile.aot.bundle import file_hash, load, read_header
from blockffn_compile.aot.machine import cpu_features, instruction_sets
from blockffn_compile.aot.manifest import BundleError, read_manifest
from tests.aot.conftest import edit


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


FILES = ("model.so", "weights.safetensors")


# --- Files ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_no_code")
@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_missing_files(copy, name):
    (copy / name).unlink()
    with pytest.raises(BundleError, match=f"{name}: no such file"):
        load(copy)


@pytest.mark.usefixtures("_no_code")
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", [-1, 1])
def test_files_of_another_size(copy, name, change):
    os.truncate(copy / name, (copy / name).stat().st_size + change)
    with pytest.raises(BundleError, match=rf"{name}: \d+ bytes, the manifest says"):
        load(copy)


@pytest.mark.usefixtures("_no_code")
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_flipped_bits(copy, name, place):
    """Anywhere, in the weights' header as well."""
    file = copy / name
    flip(file, int(place * (file.stat().st_size - 1)))
    with pytest.raises(BundleError, match=f"{name}: damaged"):
        load(copy)


@pytest.mark.usefixtures("_no_code")
def test_files_of_another_bundle(copy):
    """Weights of the same names, shapes and sizes."""
    file = copy / "weights.safetensors"
    weights = load_file(file)
    save_file({name: tensor.flip(0) for name, tensor in weights.items()}, tmp := copy / "other")
    data = tmp.read_bytes()[-file.stat().st_size + 4096 :]
    file.write_bytes(file.read_bytes()[: -len(data)] + data)
    tmp.unlink()
    with pytest.raises(BundleError, match=r"weights\.safetensors: damaged or of another bundle"):
        load(copy)


@pytest.mark.usefixtures("_no_code")
@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_links_out_of_the_bundle(copy, bundle, name):
    (copy / name).unlink()
    (copy / name).symlink_to(bundle / name)
    with pytest.raises(BundleError, match=f"{name}: not a regular file"):
        load(copy)


def test_a_damaged_library_with_the_right_hash(copy):
    """What TVM says of it is an error of the bundle, not a crash."""
    (copy / "model.so").write_bytes(b"no library")
    edit(
        copy,
        sizes=read_manifest(copy).sizes | {"model.so": 10},
        sha256=read_manifest(copy).sha256 | {"model.so": file_hash(copy / "model.so")},
    )
    with pytest.raises(BundleError, match=r"model\.so: TVM cannot load it"):
        load(copy)


def test_no_directory(tmp_path):
    with pytest.raises(BundleError, match="no such directory"):
        load(tmp_path / "none")


# --- Hashing the weights --------------------------------------------------------------------------


@pytest.fixture
def hashed(monkeypatch, tmp_path) -> list[str]:
    """Names of files that loading hashed."""
    monkeypatch.setenv("BLOCKFFN_CACHE_DIR", str(tmp_path / "cache"))
    names: list[str] = []
    original = bundles.check_hash

    def note(file: Path, digest: str) -> None:
        names.append(file.name)
        original(file, digest)

    monkeypatch.setattr(bundles, "check_hash", note)
    return names


def test_weights_are_hashed_once_and_when_they_change(copy, hashed):
    weights = copy / "weights.safetensors"
    load(copy)
    assert hashed == ["model.so", "weights.safetensors"]
    load(copy)
    assert hashed[2:] == ["model.so"]
    load(copy, verify=True)
    assert hashed[3:] == ["model.so", "weights.safetensors"]
    weights.write_bytes(weights.read_bytes())
    load(copy)
    assert hashed[5:] == ["model.so", "weights.safetensors"]
    status = weights.stat()
    flip(weights, 100_000)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))  # its time of change tells
    with pytest.raises(BundleError, match="damaged"):
        load(copy)


def test_without_a_place_for_stamps(copy, hashed, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BLOCKFFN_CACHE_DIR", str(tmp_path / "file"))
    for _ in range(2):
        load(copy)
    assert hashed == ["model.so", "weights.safetensors"] * 2


# --- The machine ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("_no_code")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "riscv64"}, r"built for native \(riscv64\), this machine is"),
        ({"cpu_features": ["asimd", "bf16"], "target": "arm64-bf16"}, "this CPU lacks asimd, bf16"),
        ({"versions": {"apache-tvm": "0.26.1"}}, r"built with apache-tvm 0\.26\.1, this is"),
        ({"versions": {}}, "of unknown version"),
    ],
)
def test_other_machines_and_releases(copy, changes, message):
    edit(copy, **changes)
    with pytest.raises(BundleError, match=message):
        load(copy)


def test_features_that_every_core_has(tmp_path):
    file = tmp_path / "cpuinfo"
    file.write_text("flags\t: avx2 fma sse2\nmodel\t: x\nflags\t: fma sse2 avx512f\n")
    assert cpu_features(file) == {"fma", "sse2"}
    file.write_text("processor : 0\nFeatures\t: fp asimd bf16\n")
    assert instruction_sets(cpu_features(file)) == ("asimd", "bf16", "fp")
    assert cpu_features(tmp_path / "none") == frozenset()
    assert instruction_sets(frozenset({"avx2", "fpu", "hypervisor", "sse2"})) == ("avx2", "sse2")


# --- The header of the weights --------------------------------------------------------------------


def memory(header: object, data: int = 128) -> np.ndarray:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return np.frombuffer(len(text).to_bytes(8, "little") + text + bytes(data), np.uint8)


def entry(**changes: object) -> dict[str, object]:
    return {"t": {"dtype": "F32", "shape": [4, 8], "data_offsets": [0, 128]} | changes}


def test_a_right_header():
    start = len(memory(entry())) - 128
    padding = {"padding.1": {"dtype": "U8", "shape": [1], "data_offsets": [7, 8]}}
    found = read_header(Path("f"), memory(entry() | {"__metadata__": {"a": "b"}}))
    assert found["t"][:2] == ("float32", [4, 8])
    assert read_header(Path("f"), memory(entry() | padding)).keys() == {"t"}
    assert read_header(Path("f"), memory(entry()))["t"][2:] == (start, start + 128)


@pytest.mark.parametrize(
    "header",
    [
        b"no JSON",
        b"\xff\xfe",
        b"[" * 10**6,
        [1],
        {"t": 1},
        {"t": {}},
        entry(dtype="F64"),
        entry(dtype=[1]),
        entry(shape=[4, 9]),
        entry(shape=[-4, -8]),
        entry(shape=[4.0, 8]),
        entry(shape="48"),
        entry(data_offsets=[64, 192]),
        entry(data_offsets=[-64, 64]),
        entry(data_offsets=[4, 132]),
        entry(data_offsets=[128, 0]),
        entry(data_offsets=[0]),
        entry(data_offsets=["0", "128"]),
    ],
    ids=lambda header: str(header)[:40],
)
def test_wrong_headers(header):
    with pytest.raises(BundleError, match="its header is wrong"):
        read_header(Path("f"), memory(header))


@pytest.mark.parametrize("data", [b"", b"\x00" * 7, b"\xff" * 16], ids=["empty", "short", "long"])
def test_files_that_are_no_weights(data):
    with pytest.raises(BundleError, match="its header is wrong"):
        read_header(Path("f"), np.frombuffer(data, np.uint8))
