"""The package as others get it: the import, the wheel, and the set-up commands."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import blockffn_compile
from tests.conftest import ROOT

COMPILE_A_LAYER = """
import torch
from blockffn_compile.layer import BlockFFN, BlockFFNSpec
assert {root!r} not in BlockFFN.forward.__code__.co_filename
layer = BlockFFN(BlockFFNSpec(64, 8, 16)).requires_grad_(False)
x = torch.randn(3, 64)
torch.testing.assert_close(torch.compile(layer, backend="blockffn", fullgraph=True)(x), layer(x))
"""


def run(*command: object, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], text=True, capture_output=True, check=False, **options
    )


def test_public_names_are_functions_whatever_was_imported_first() -> None:
    code = (
        "import blockffn_compile.explain, blockffn_compile.generation, blockffn_compile as b\n"
        "from blockffn_compile import explain, generate, load_model\n"
        "assert all(map(callable, (b.explain, explain, generate, load_model)))"
    )
    result = run(sys.executable, "-c", code)
    assert result.returncode == 0, result.stderr
    assert {"explain", "generate", "load_model"} <= set(blockffn_compile.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        blockffn_compile.nonsense  # noqa: B018


def test_import_costs_little_and_no_compiler() -> None:
    code = (
        "import torch, time, sys; start = time.process_time(); import blockffn_compile\n"
        "assert time.process_time() - start < 1\n"
        "assert not {'torch._dynamo', 'tvm', 'transformers'} & set(sys.modules)"
    )
    result = run(sys.executable, "-c", code)
    assert result.returncode == 0, result.stderr


def test_wheel_contents(wheel) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for path in (
        "blockffn_compile/py.typed",
        "blockffn_compile/onnx/native/chunk_sparse_ffn.cc",
        "blockffn_compile/passes/fx.py",
        "blockffn_compile/schedules/plan.py",
        *(
            f"blockffn_compile/models/bundled/{file}"
            for file in ("config.json", "model.safetensors", "tokenizer.json")
        ),
    ):
        assert path in names
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"blockffn_compile"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_installed_wheel_compiles_a_layer_without_the_repository(wheel, tmp_path) -> None:
    result = run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    assert result.returncode == 0, result.stderr
    python = tmp_path / "venv" / "bin" / "python"
    site = Path(run(python, "-c", "import site; print(site.getsitepackages()[0])").stdout.strip())
    options = ["--no-deps", "--no-index", "--quiet", "--ignore-installed", "--prefix"]
    result = run(sys.executable, "-m", "pip", "install", *options, tmp_path / "venv", wheel)
    assert result.returncode == 0, result.stderr
    # The dependencies come from this environment. As a plain entry of sys.path behind the venv's
    # own, its .pth files are not run, so its editable install of the repository stays out.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    code = COMPILE_A_LAYER.format(root=str(ROOT / "blockffn_compile"))
    result = run(python, "-c", code, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr
    result = run(tmp_path / "venv" / "bin" / "blockffn", "--help", cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["compiler", "CXX=no-such-compiler"], "no C++ compiler (no-such-compiler)"),
        ([".venv/.ready", "PATH={tools}"], "no Python >= 3.11"),
        (["arm", "PATH={tools}"], "the tests need cmake; install"),
    ],
    ids=["compiler", "python", "arm"],
)
def test_what_is_missing_is_said_in_one_line(tmp_path, arguments, reason) -> None:
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "tools").mkdir()
    make = shutil.which("make")
    assert make
    arguments = [argument.format(tools=tmp_path / "tools") for argument in arguments]
    # Not a sub-make of the `make test` that may run this: its messages have another prefix.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    result = run(make, "--no-print-directory", "-C", tmp_path, *arguments, env=environment)
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if not line.startswith("make: ***")]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: {reason}")
