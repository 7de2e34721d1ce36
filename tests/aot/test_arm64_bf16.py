"""Code for ``bfdot``, emulated: its error, the same bits in any company, and its refusal."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor
from tvm.support import cc

from blockffn_compile.aot import build
from blockffn_compile.aot.targets import get_target
from blockffn_compile.layer import experts_reference
from blockffn_compile.models import bundled_path
from blockffn_compile.models.checkpoint import load_model
from blockffn_compile.schedules.packing import to_panels
from blockffn_compile.schedules.tir.build import compiled
from blockffn_compile.schedules.tir.cpu import chunk_sparse_ffn
from blockffn_compile.schedules.tir.linear import panel_linear
from blockffn_compile.schedules.tir.tile import Tiling
from tests.aot.running import EMULATOR, PROMPT, assert_refused, new_tokens, run

TARGET = get_target("arm64-bf16")
HIDDEN, EXPERTS, SIZE, TOKENS = 96, 5, 40, 13


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels for that target."""
    registers = TARGET.registers
    assert registers.dot
    ffn = chunk_sparse_ffn(
        HIDDEN, EXPERTS, SIZE, "bfloat16", "silu", True, Tiling(16, 16, registers)
    )
    linear = panel_linear(HIDDEN, SIZE, "bfloat16", 16, registers)
    odd = panel_linear(SIZE - 1, SIZE, "bfloat16", 16, registers)
    path = tmp_path_factory.mktemp("kernels") / "kernels.so"
    link = cc.cross_compiler(TARGET.linker, options=["-shared", "-fPIC"])
    functions = [ffn, linear, odd.with_attr("global_symbol", "odd_linear")]
    compiled(functions, TARGET.tvm).export_library(str(path), fcompile=link)
    return path


@pytest.fixture(scope="module")
def call(arm_runner: Path, library: Path, tmp_path_factory: pytest.TempPathFactory):
    """Calls a kernel with tensors; the last argument is the result, which is returned."""
    folder, wheels = tmp_path_factory.mktemp("call"), arm_runner.parents[1] / "build/wheels"
    program = folder / "kernel"
    subprocess.run(
        [
            *("aarch64-linux-gnu-g++", "-std=c++17", "-O1", Path(__file__).with_name("kernel.cc")),
            *(f"-I{wheels / package}/include" for package in ("tvm", "tvm_ffi")),
            *("-Wl,--no-as-needed", f"-L{arm_runner.parent}", "-ltvm_ffi", "-ltvm_runtime"),
            *(f"-Wl,-rpath,{arm_runner.parent}", "-o", program),
        ],
        check=True,
    )

    def call(name: str, *tensors: Tensor) -> Tensor:
        command = [*EMULATOR, str(program), str(library), name]
        for i, tensor in enumerate(tensors):
            file = folder / str(i)
            file.write_bytes(tensor.contiguous().view(torch.uint8).numpy().tobytes())
            command += [",".join(map(str, tensor.shape)), str(file)]
        subprocess.run(command, check=True)
        data = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.bfloat16)
        return data.view(tensors[-1].shape)

    return call


def random(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16()


def check(y: Tensor, exact: Tensor, eager: Tensor) -> None:
    """The error is at most 1.5 times that of PyTorch."""
    errors = [(value.double() - exact).norm() for value in (y, eager)]
    assert errors[0] <= 1.5 * errors[1]


def ffn_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x, scores = random(TOKENS, HIDDEN), random(TOKENS, EXPERTS).relu()
    scores[4] = 0
    up, gate = random(EXPERTS, SIZE, HIDDEN), random(EXPERTS, SIZE, HIDDEN)
    return x, scores, up, gate, random(EXPERTS, HIDDEN, SIZE)


def test_ffn(call):
    x, scores, up, gate, down = ffn_inputs()
    panels = [to_panels(weight, 16) for weight in (up, gate, down)]
    y = call("chunk_sparse_ffn", x, scores, *panels, torch.full_like(x, torch.nan))
    exact = experts_reference(
        x.double(), scores.double(), up.double(), down.double(), "silu", gate.double()
    )
    check(y, exact, experts_reference(x, scores, up, down, "silu", gate))
    assert not y[4].any()
    for rows in ([7], [12, 3, 7], [*range(5, 12)]):
        part = call("chunk_sparse_ffn", x[rows], scores[rows], *panels, torch.zeros_like(x[rows]))
        assert torch.equal(part, y[rows]), rows


def test_non_finite_values_stay_in_their_row(call):
    x, scores, *weights = ffn_inputs()
    panels = [to_panels(weight, 16) for weight in weights]
    clean = call("chunk_sparse_ffn", x, scores, *panels, x)
    x[2, 5] = torch.nan
    x[4, 1] = torch.nan  # has no expert
    y = call("chunk_sparse_ffn", x, scores, *panels, x)
    bad = torch.zeros(TOKENS, dtype=torch.bool)
    bad[[2, 4]] = True
    assert y[bad].isnan().all()
    assert torch.equal(y[~bad], clean[~bad])


@pytest.mark.parametrize("inputs", [HIDDEN, SIZE - 1], ids=["even", "odd"])
def test_linear(call, inputs):
    torch.manual_seed(1)
    name = "panel_linear" if inputs == HIDDEN else "odd_linear"
    x, weight = random(TOKENS, inputs), random(SIZE, inputs)
    panels = to_panels(weight[None], 16)
    y = call(name, x, panels, torch.full((TOKENS, SIZE), torch.nan).bfloat16())
    check(y, x.double() @ weight.double().T, x @ weight.T)
    for rows in ([5], [12, 0, 5, 1, 2]):
        part = call(name, x[rows], panels, torch.zeros(len(rows), SIZE).bfloat16())
        assert torch.equal(part, y[rows]), rows


# --- The bundled model ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(
        bundled_path(),
        TARGET.name,
        tmp_path_factory.mktemp("bundle") / "bf16",
        dtype=torch.bfloat16,
    )


def test_tokens_are_the_most_probable_within_the_error_of_eager(arm_runner, bundle):
    """Of each new token, the exact logit is at most 3 of eager's largest errors below the best."""
    command = [*EMULATOR, arm_runner, bundle]
    tokens = new_tokens(run(command, PROMPT, "-n", "24"))
    assert new_tokens(run(command, PROMPT, "-n", "24", "--speculate")) == tokens
    model = load_model(bundled_path(), dtype=torch.bfloat16).eval()
    text = torch.tensor([[*PROMPT, *tokens[:-1]]])
    with torch.no_grad():
        eager = model(text)[0].double()
        exact = model.double()(text)[0]
    error = (eager - exact).abs().max()
    logits = exact[len(PROMPT) - 1 :]
    chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    assert (logits.amax(1) - chosen).max() <= 3 * error


def test_hot_kernels_use_the_instruction(bundle):
    code = subprocess.run(
        ["aarch64-linux-gnu-objdump", "-d", bundle / "model.so"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert code.count("\tbfdot\t") > 500
    assert "\tfmla\t" in code  # attention


def test_cpus_without_it_are_refused(arm_runner, bundle):
    command = [EMULATOR[0], "-cpu", "cortex-a72", *EMULATOR[1:], arm_runner, bundle]
    assert_refused(
        run(command, PROMPT), "built for arm64-bf16 (aarch64); this CPU lacks bf16: build"
    )
