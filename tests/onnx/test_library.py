"""The custom-op library in ONNX Runtime: numbers, bits, bad models, and other machines."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

from blockffn_compile.onnx import headers, library
from blockffn_compile.onnx.headers import HeadersError, find_headers
from blockffn_compile.onnx.library import LibraryError, build_library
from tests.onnx.operators import Problem, initializer, make_model, make_node, open_session, run

PROBLEMS = [
    Problem(128, 8, 64, torch.float32, "silu", False),
    Problem(52, 5, 24, torch.float32, "gelu", True),
    Problem(128, 8, 64, torch.float16, "silu", True),
    Problem(52, 5, 24, torch.float16, "relu", False),
    Problem(128, 8, 64, torch.bfloat16, "gelu", False),
    Problem(52, 5, 24, torch.bfloat16, "silu", True),
    Problem(17, 1, 3, torch.float32, "silu", False),
]
problems = pytest.mark.parametrize("problem", PROBLEMS, ids=str)
TOKENS = [1, 2, 7, 8, 33, 64, 200]
COMPILER = "aarch64-linux-gnu-g++"


@pytest.fixture(scope="module")
def built() -> Path:
    return build_library()


@pytest.fixture(scope="module")
def sessions(built):
    """One for each problem and number of threads."""
    opened: dict[tuple[Problem, int], onnxruntime.InferenceSession] = {}

    def session(problem: Problem, threads: int = 1) -> onnxruntime.InferenceSession:
        key = problem, threads
        if key not in opened:
            opened[key] = open_session(problem.model(), built, threads)
        return opened[key]

    return session


def error(y: Tensor, want: Tensor) -> float:
    return ((y.double() - want).norm() / want.norm()).item()


# --- Numbers --------------------------------------------------------------------------------------


@problems
@pytest.mark.parametrize("threads", [1, 2])
def test_error_is_within_eager(sessions, problem, threads):
    for tokens in TOKENS:
        ours, eager = [], []
        for seed in range(max(1, 32 // tokens)):
            x, scores = problem.inputs(tokens, 0.4, seed)
            scores[0, 0] = 1.0  # at least one pair, or there is nothing to be wrong about
            want = problem.plain(x, scores, torch.float64)
            ours.append(error(run(sessions(problem, threads), x, scores), want))
            eager.append(error(problem.plain(x, scores, problem.dtype), want))
        assert torch.tensor(ours).norm() <= 1.5 * torch.tensor(eager).norm(), tokens


@problems
@pytest.mark.parametrize("active", ["none", "one", "all"])
def test_active_sets(sessions, problem, active):
    x, _ = problem.inputs(7, 1.0)
    scores = torch.zeros(7, problem.experts, dtype=problem.dtype)
    if active == "none":
        assert torch.equal(run(sessions(problem), x, scores), torch.zeros_like(x))
        return
    scores[:, slice(0, 1) if active == "one" else slice(None)] = 0.5
    want = problem.plain(x, scores, torch.float64)
    tolerance = 8 * torch.finfo(problem.dtype).eps
    assert error(run(sessions(problem), x, scores), want) < tolerance


@problems
def test_a_row_has_the_same_bits_among_any_others(sessions, problem):
    x, scores = problem.inputs(300, 0.4)
    alone = torch.cat([run(sessions(problem), x[i : i + 1], scores[i : i + 1]) for i in range(300)])
    for tokens in (*TOKENS, 300):
        for threads in (1, 2):
            y = run(sessions(problem, threads), x[:tokens], scores[:tokens])
            assert torch.equal(y, alone[:tokens]), (tokens, threads)


def test_no_tokens(sessions):
    problem = PROBLEMS[0]
    x, scores = problem.inputs(0, 1.0)
    assert run(sessions(problem), x, scores).shape == (0, problem.hidden)


def test_nan_and_inf_stay_in_their_token(sessions):
    problem = PROBLEMS[0]
    x, scores = problem.inputs(5, 0.5)
    scores[4] = 0.0
    clean = run(sessions(problem), x, scores)
    scores[1, 2] = x[3, 0] = x[4, 1] = torch.nan
    y = run(sessions(problem), x, scores)
    assert y[[1, 3, 4]].isnan().all()
    assert torch.equal(y[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("shift", [1, 3])
def test_memory_of_any_alignment(sessions, shift):
    """Inputs and output of the caller that start anywhere."""
    problem = PROBLEMS[0]
    x, scores = problem.inputs(9, 0.5)
    session = sessions(problem)

    def shifted(tensor: Tensor) -> np.ndarray:
        buffer = np.full(tensor.numel() + 64, np.nan, np.float32)
        start = (-buffer.ctypes.data // 4) % 16 + shift
        view = buffer[start : start + tensor.numel()].reshape(tensor.shape)
        view[:] = tensor.numpy()
        return view

    values = {"x": shifted(x), "scores": shifted(scores), "y": shifted(torch.zeros_like(x))}
    binding = session.io_binding()
    for name, array in values.items():
        bind = binding.bind_output if name == "y" else binding.bind_input
        bind(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
    session.run_with_iobinding(binding)
    assert torch.equal(torch.from_numpy(values["y"]), run(session, x, scores))


def test_workspace_is_bounded(built):
    """So many experts that a call takes fewer tokens than there are."""
    problem = Problem(16, 4096, 16, torch.float32, "silu", False)
    x, scores = problem.inputs(150, 0.01)
    want = problem.plain(x, scores, torch.float64)
    assert error(run(open_session(problem.model(), built), x, scores), want) < 1e-6


def test_several_sessions_and_threads_at_once(built):
    opened = [open_session(problem.model(), built, 2) for problem in PROBLEMS[:3]]
    work = [problem.inputs(33, 0.5) for problem in PROBLEMS[:3]]
    want = [run(session, *inputs) for session, inputs in zip(opened, work, strict=True)]
    with ThreadPoolExecutor(6) as pool:
        results = [(i % 3, pool.submit(run, opened[i % 3], *work[i % 3])) for i in range(60)]
    assert all(torch.equal(result.result(), want[i]) for i, result in results)


# --- Registering ----------------------------------------------------------------------------------


def test_registering_twice_is_as_good_as_once(built, tmp_path):
    copy = tmp_path / "copy.so"
    shutil.copyfile(built, copy)
    options = onnxruntime.SessionOptions()
    for path in (built, built, copy):
        options.register_custom_ops_library(str(path))
    problem = PROBLEMS[0]
    session = onnxruntime.InferenceSession(problem.model().SerializeToString(), options)
    x, scores = problem.inputs(3, 0.5)
    assert error(run(session, x, scores), problem.plain(x, scores, torch.float64)) < 1e-6


class ApiBase(ctypes.Structure):
    """OrtApiBase of the C API."""

    _fields_ = (
        ("get_api", ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)),
        ("get_version", ctypes.CFUNCTYPE(ctypes.c_void_p)),
    )


def test_an_older_runtime_is_refused(built):
    folder = Path(onnxruntime.__file__).with_name("capi")
    runtime = ctypes.CDLL(str(next(folder.glob("libonnxruntime.so.*"))))
    runtime.OrtGetApiBase.restype = ctypes.POINTER(ApiBase)
    real = runtime.OrtGetApiBase().contents
    version = ctypes.create_string_buffer(b"1.16.3")
    old = ApiBase(
        ApiBase._fields_[0][1](lambda version: real.get_api(version) if version <= 16 else None),
        ApiBase._fields_[1][1](lambda: ctypes.addressof(version)),
    )
    register = ctypes.CDLL(str(built)).RegisterCustomOps
    register.restype = ctypes.c_void_p
    status = register(None, ctypes.byref(old))
    api = ctypes.cast(real.get_api(16), ctypes.POINTER(ctypes.c_void_p))
    get_message = ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_void_p)(api[2])
    message = get_message(status)
    assert message == b"the BlockFFN library needs ONNX Runtime 1.21 or newer; this is 1.16.3"


# --- Bad models -----------------------------------------------------------------------------------


GOOD = {"up": (3, 4, 8), "down": (3, 4, 8), "gate": (3, 4, 8)}
INPUTS = ["x_typed", "scores_typed", "up", "down"]


def bad_model(
    inputs=INPUTS, act="silu", x=("t", 8), scores=("s", 3), dtypes=None, **shapes
) -> onnx.ModelProto:
    dtypes = dtypes or {}
    initializers = [
        initializer(name, torch.zeros(shape, dtype=dtypes.get(name, torch.float32)))
        for name, shape in (GOOD | shapes).items()
        if name in inputs
    ]
    attributes = {} if act is None else {"act": act}
    return make_model(make_node(inputs, **attributes), initializers, list(x), list(scores))


def test_the_good_one_of_the_bad_models(built):
    y = run(open_session(bad_model(), built), torch.zeros(2, 8), torch.zeros(2, 3))
    assert torch.equal(y, torch.zeros(2, 8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act": "tanh"}, "node 'ffn': act is 'tanh' and must be one of silu, relu, gelu"),
        ({"act": ""}, "act is '' and"),
        ({"act": None}, "node 'ffn': it needs the attribute act, a string"),
        ({"act": 3}, "it needs the attribute act, a string"),
        ({"inputs": [*INPUTS[:2], "x_typed", "down"]}, "up must be a constant initializer"),
        ({"inputs": [*INPUTS[:3], "x_typed"]}, "down must be a constant initializer"),
        ({"inputs": [*INPUTS, "x_typed"]}, "gate must be a constant initializer"),
        (
            {"up": (12, 8)},
            r"up must be \[experts, size, hidden\], all at least 1, and is \[12, 8\]",
        ),
        ({"up": ()}, r"and is \[\]"),
        ({"up": (0, 4, 8), "down": (0, 4, 8)}, r"and is \[0, 4, 8\]"),
        ({"up": (3, 0, 8), "down": (3, 0, 8)}, r"and is \[3, 0, 8\]"),
        ({"up": (3, 4, 0), "down": (3, 4, 0)}, r"and is \[3, 4, 0\]"),
        ({"down": (3, 8, 4)}, r"down is \[3, 8, 4\] where up is \[3, 4, 8\]"),
        ({"inputs": [*INPUTS, "gate"], "gate": (3, 4, 9)}, r"gate is \[3, 4, 9\] where up is"),
        ({"inputs": INPUTS[:3]}, "input size 3"),
        ({"inputs": [*INPUTS, "gate", "gate"]}, "input size 6"),
        ({"inputs": ["x_typed", "scores_typed", "", "down"]}, "input 2 is marked single"),
        ({"dtypes": {"up": torch.float16}}, "no kernel def match"),
        ({"dtypes": {"up": torch.bfloat16, "down": torch.bfloat16}}, "no kernel def match"),
    ],
    ids=str,
)
def test_a_wrong_model_is_refused(built, changes, message):
    with pytest.raises(Exception, match=message):
        open_session(bad_model(**changes), built)


def test_too_large_weights_are_refused(built, tmp_path):
    """2**31 elements, in a sparse file that is never read."""
    shape = (2**11, 2**10, 2**10)
    model = bad_model(x=("t", 2**10), scores=("s", 2**11))
    del model.graph.initializer[:]
    with (tmp_path / "zeros").open("wb") as file:
        file.truncate(4 * 2**31)
    for name in ("up", "down"):
        tensor = onnx.TensorProto(name=name, data_type=onnx.TensorProto.FLOAT, dims=shape)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="zeros")
        model.graph.initializer.append(tensor)
    onnx.save(model, tmp_path / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(built))
    with pytest.raises(Exception, match=r"weights of \[2048, 1024, 1024\] are too large"):
        onnxruntime.InferenceSession(tmp_path / "model.onnx", options)


@pytest.mark.parametrize(
    ("changes", "x", "scores", "message"),
    [
        ({"x": ("t", "h")}, (2, 9), (2, 3), r"x must be \[tokens, 8\] and is \[2, 9\]"),
        ({"x": ("b", "t", 8)}, (1, 2, 8), (2, 3), r"x must be \[tokens, 8\] and is \[1, 2, 8\]"),
        ({"scores": ("s", "e")}, (2, 8), (2, 4), r"scores must be \[tokens, 3\] and is \[2, 4\]"),
        ({}, (2, 8), (3, 3), "x has 2 tokens and scores 3"),
    ],
    ids=["width", "rank", "experts", "tokens"],
)
def test_a_wrong_input_is_refused(built, changes, x, scores, message):
    session = open_session(bad_model(**changes), built)
    with pytest.raises(Exception, match=message):
        run(session, torch.zeros(x), torch.zeros(scores))


# --- Building -------------------------------------------------------------------------------------


def test_built_once(built):
    written = built.stat().st_mtime_ns
    assert build_library() == built
    assert built.stat().st_mtime_ns == written


def test_needs_no_library_but_the_system_s(built):
    out = subprocess.run(["ldd", built], capture_output=True, text=True, check=True).stdout
    assert "tvm" not in out
    assert "onnxruntime" not in out.replace(built.name, "")


def test_unknown_target():
    with pytest.raises(ValueError, match="unknown target 'vax'"):
        build_library("vax")


def test_no_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(tmp_path / "c++"))
    with pytest.raises(LibraryError, match=r"there is no C\+\+ compiler .*set CXX"):
        build_library(headers=find_headers())
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("BLOCKFFN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(library, "find_headers", lambda path: tmp_path)
    with pytest.raises(LibraryError, match=re.escape(f"no C++ compiler {COMPILER}; install it")):
        build_library("arm64")


def test_a_compiler_that_fails(tmp_path, monkeypatch):
    monkeypatch.setenv("BLOCKFFN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(library, "_kernels", lambda registers: [])
    (tmp_path / headers.HEADER).write_text("#error not this one\n")
    with pytest.raises(LibraryError, match="#error not this one"):
        build_library(headers=tmp_path)
    assert not list(tmp_path.glob("*.so"))


def test_headers_given_by_argument_and_environment(tmp_path, monkeypatch):
    for name in ("argument", "variable", "empty"):
        (tmp_path / name).mkdir()
        if name != "empty":
            (tmp_path / name / headers.HEADER).touch()
    monkeypatch.setenv(headers.VARIABLE, str(tmp_path / "variable"))
    assert find_headers() == tmp_path / "variable"
    assert find_headers(tmp_path / "argument") == tmp_path / "argument"
    with pytest.raises(HeadersError, match=r"there is no onnxruntime_cxx_api\.h in this folder"):
        find_headers(tmp_path / "empty")


@pytest.mark.parametrize("lack", ["apt", "network"])
def test_headers_that_cannot_be_had(lack, tmp_path, monkeypatch):
    monkeypatch.delenv(headers.VARIABLE, raising=False)
    monkeypatch.setenv("BLOCKFFN_CACHE_DIR", str(tmp_path / "cache"))
    if lack == "apt":
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        monkeypatch.setattr(headers, "_MIRROR", f"file://{tmp_path}/nowhere")
    with pytest.raises(HeadersError, match=f"cannot be had .* set {headers.VARIABLE} to a folder"):
        find_headers()
    assert not list((tmp_path / "cache").iterdir())


# --- Arm ------------------------------------------------------------------------------------------


#: ONNX Runtime looks at the CPU when it is loaded, and the emulator shows the host's.
CPU = """processor : {}
Features : fp asimd evtstrm crc32 cpuid
CPU implementer : 0x41
CPU architecture: 8
CPU variant : 0x0
CPU part : 0xd08
CPU revision : 3

"""


@pytest.fixture(scope="module")
def arm(tmp_path_factory):
    """Runs models on an emulated Arm machine, with the ONNX Runtime of its Python package."""
    work = tmp_path_factory.mktemp("arm")
    version = onnxruntime.__version__
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    system = ["--platform", "manylinux_2_28_aarch64", "--dest", str(work)]
    subprocess.run([*pip, *system, f"onnxruntime=={version}"], check=True)
    (wheel,) = work.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        runtime = archive.extract(f"onnxruntime/capi/libonnxruntime.so.{version}", work)
    driver = work / "driver"
    source = Path(__file__).with_name("driver.cc")
    options = ["-std=c++17", f"-I{find_headers()}", "-o", str(driver), "-ldl"]
    subprocess.run([COMPILER, str(source), *options], check=True)
    (work / "lib").symlink_to("/usr/aarch64-linux-gnu/lib")
    (work / "proc").mkdir()
    (work / "proc/cpuinfo").write_text("".join(map(CPU.format, range(2))))
    emulator = ["qemu-aarch64-static", "-L", str(work), str(driver), runtime]

    def run(threads: int, cases: list[tuple[int, Path]]) -> None:
        arguments = [str(part) for case in cases for part in case]
        command = [*emulator, str(build_library("arm64")), str(threads), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    return run


@pytest.mark.parametrize("threads", [1, 2])
def test_arm(arm, tmp_path, threads):
    cases = []
    for problem in PROBLEMS:
        x, scores = problem.inputs(33, 0.5)
        scores[0, 0] = 1.0
        for tokens in (33, 1):
            folder = tmp_path / f"{problem}-{tokens}"
            folder.mkdir()
            onnx.save(problem.model(), folder / "model.onnx")
            x.float()[:tokens].numpy().tofile(folder / "x.bin")
            scores.float()[:tokens].numpy().tofile(folder / "scores.bin")
            cases.append((tokens, folder))
    arm(threads, cases)
    for problem, (_, chunk), (_, alone) in zip(PROBLEMS, cases[::2], cases[1::2], strict=True):
        x, scores = problem.inputs(33, 0.5)
        scores[0, 0] = 1.0
        y = torch.from_numpy(np.fromfile(chunk / "y.bin", np.float32)).view(x.shape)
        assert error(y, problem.plain(x, scores, torch.float64)) < 2 * torch.finfo(x.dtype).eps
        assert np.array_equal(y[0].numpy(), np.fromfile(alone / "y.bin", np.float32))
