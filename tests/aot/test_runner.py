"""The C++ runner, on this machine and, emulated, on 64-bit Arm."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from blockffn_compile.aot import build, load
from blockffn_compile.engines.tvm_engine import TvmEngine
from blockffn_compile.models import bundled_path
from blockffn_compile.models.modeling import BlockFFNForCausalLM
from blockffn_compile.speculative.acceptance import accept
from blockffn_compile.speculative.loop import decode
from blockffn_compile.speculative.ngram import NGramDrafter
from blockffn_compile.speculative.sampling import Sampler
from tests.aot.running import EMULATOR, PROMPT, assert_refused, make_runner, new_tokens, run
from tests.conftest import make_config
from tests.quantised import SIZES

TINY = [(11 * i * i + 5) % 300 for i in range(100)]  # more than one chunk


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_runner(tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The bundled model, in fp32, for a target."""
    folder = tmp_path_factory.mktemp("bundled")

    def make(target: str) -> Path:
        if not (folder / target).exists():
            build(bundled_path(), target, folder / target, dtype=torch.float32)
        return folder / target

    return make


@pytest.fixture(scope="module")
def small(make_model: Callable[..., BlockFFNForCausalLM]) -> BlockFFNForCausalLM:
    """A model that can be quantised."""
    return make_model(make_config(**SIZES))


def greedy(bundle: Path, prompt: Sequence[int], count: int) -> list[int]:
    """What the package's own loop decodes."""
    loaded = load(bundle)
    engine, stop = TvmEngine(loaded), loaded.manifest.stop_tokens
    return [t for step in decode(engine, [prompt], count, stop_tokens=stop) for t in step.tokens]


# --- This machine ---------------------------------------------------------------------------------


def test_tokens_are_those_of_the_engine(runner, bundled):
    bundle = bundled("native")
    expected = greedy(bundle, PROMPT, 100)
    assert len(expected) == 100
    plain = run([runner, bundle], PROMPT, "-n", "100")
    assert new_tokens(plain) == expected
    assert "99 tokens" in plain.stderr
    assert "1.00 tokens a step" in plain.stderr
    assert new_tokens(run([runner, bundle], PROMPT, "-n", "100", "--speculate")) == expected


def test_drafts_are_those_of_the_drafter(runner, bundled):
    """As many steps as with the same trees in Python."""
    bundle, count = bundled("native"), 100
    engine, drafter = TvmEngine(load(bundle)), NGramDrafter()
    sampler, text, steps = Sampler(), list(PROMPT), 0
    text.append(sampler.choose(engine.prefill(0, PROMPT).logits[-1], text, len(text)))
    drafter.observe(PROMPT)
    while (left := len(PROMPT) + count - len(text)) > 0:
        tree = drafter.propose(text[-1], min(8, left))
        logits = engine.verify({0: tree})[0].logits
        path, tokens = accept(tree, logits, sampler, text, len(text))
        engine.commit(0, path)
        drafter.observe([text[-1], *tokens[:-1]])
        text, steps = text + tokens, steps + 1
    result = run([runner, bundle], PROMPT, "-n", str(count), "--speculate")
    assert new_tokens(result) == text[len(PROMPT) :]
    (pace,) = re.findall(r"([\d.]+) tokens a step", result.stderr)
    assert pace == f"{(count - 1) / steps:.2f}"
    assert float(pace) > 1.5


def test_half_precision_and_several_chunks(runner, model, bundle, tmp_path):
    half = build(model, "native", tmp_path / "half", dtype=torch.float16)
    for path in (bundle, half):  # the first has bfloat16
        expected = greedy(path, TINY, 20)
        for options in ([], ["--speculate"]):
            assert new_tokens(run([runner, path], TINY, "-n", "20", *options)) == expected


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantised_weights(runner, arm_runner, small, tmp_path, scheme):
    """On this machine and, emulated, on Arm."""
    dtype = torch.bfloat16 if scheme == "int8" else torch.float32
    native = build(small, "native", tmp_path / "native", dtype=dtype, quantize=scheme)
    expected = greedy(native, TINY, 20)
    assert new_tokens(run([runner, native], TINY, "-n", "20", "--speculate")) == expected
    arm = build(small, "arm64", tmp_path / "arm64", dtype=dtype, quantize=scheme)
    assert new_tokens(run([*EMULATOR, arm_runner, arm], TINY, "-n", "20")) == expected


def test_the_text_ends_where_the_context_does(runner, bundle):
    """128 tokens, prompt and new ones."""
    expected = greedy(bundle, TINY, 1000)
    assert len(expected) == 28
    for options in ([], ["--speculate"]):
        assert new_tokens(run([runner, bundle], TINY, "-n", "1000", *options)) == expected
    assert run([runner, bundle], [*TINY, *expected]).stdout == "\n"
    result = run([runner, bundle], [*TINY, *expected, 1])
    assert (result.returncode, result.stdout) == (1, "")
    assert "129 tokens, the model takes 128" in result.stderr


def test_a_stop_token_ends_the_text(runner, bundle, tmp_path):
    expected = greedy(bundle, TINY, 28)
    stop = expected[7]
    changed = copied(bundle, tmp_path, stop_tokens=[stop])
    for options in ([], ["--speculate"]):
        tokens = run([runner, changed], TINY, *options).stdout.strip().split(",")
        assert tokens == [str(token) for token in expected[: expected.index(stop)]]


# --- What can be wrong ----------------------------------------------------------------------------


def copied(bundle: Path, folder: Path, **changes: object) -> Path:
    """A copy of a bundle with other entries in its manifest."""
    copy = Path(shutil.copytree(bundle, folder / "copy"))
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | changes))
    return copy


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


def replace_by_folder(bundle: Path) -> None:
    (bundle / "model.so").unlink()
    (bundle / "model.so").mkdir()


def swap_header(bundle: Path) -> None:
    """A header of the same length with a tensor beyond the end of the file."""
    file = bundle / "weights.safetensors"
    data = file.read_bytes()
    text = re.sub(rb'(\[\d+,\d+,\d+,\d+\],"data_offsets":\[)\d', rb"\g<1>9", data, count=1)
    assert text != data
    file.write_bytes(text)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no directory": (shutil.rmtree, "no such directory"),
    "no manifest": (lambda b: (b / "manifest.json").unlink(), "manifest.json: no such file"),
    "no code": (lambda b: (b / "model.so").unlink(), "model.so: no such file"),
    "no weights": (lambda b: (b / "weights.safetensors").unlink(), "safetensors: no such file"),
    "cut manifest": (lambda b: cut(b / "manifest.json", 100), "manifest.json: not valid JSON"),
    "empty manifest": (lambda b: cut(b / "manifest.json", 0), "manifest.json: empty"),
    "a list": (lambda b: (b / "manifest.json").write_text("[1]"), "not a JSON object"),
    "brackets": (
        lambda b: (b / "manifest.json").write_text("[" * 10**6),
        "manifest.json: not valid JSON: nested too deeply",
    ),
    "cut code": (lambda b: cut(b / "model.so", 1000), "model.so: 1000 bytes, the manifest says"),
    "cut weights": (lambda b: cut(b / "weights.safetensors", 9), "safetensors: 9 bytes"),
    "flipped code": (lambda b: flip(b / "model.so", 5000), "model.so: damaged"),
    "directory": (replace_by_folder, "model.so: not a regular file"),
    "header": (lambda b: flip(b / "weights.safetensors", 9), "safetensors: not valid JSON"),
    "length": (lambda b: flip(b / "weights.safetensors", 7), "header is longer than the file"),
    "offsets": (swap_header, "outside of the file"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_bundles(runner, bundle, tmp_path, damage):
    spoil, message = DAMAGES[damage]
    copy = copied(bundle, tmp_path)
    spoil(copy)
    assert_refused(run([runner, copy], TINY), message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 1}, "format 1, this version reads format 2"),
        ({"format": "1"}, "field 'format' is not of its type"),
        ({"architecture": "riscv64"}, "this machine is"),
        ({"cpu_features": ["warp"]}, "this CPU lacks warp"),
        ({"versions": {"apache-tvm": "0.26.1"}}, "built with apache-tvm 0.26.1, this runner has"),
        ({"versions": {}}, "of unknown version"),
        ({"vocab_size": 0}, "field 'vocab_size' is out of range"),
        ({"max_tokens": 65}, "field 'max_tokens' is out of range"),
        ({"heads": 2.5}, "field 'heads' is not of its type"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"compute_capability": "8.7"}, "built for an NVIDIA GPU of compute capability 8.7; "),
        ({"trunk_weights": ["a"]}, "missing tensor a"),
        ({"trunk_weights": 3}, "field 'trunk_weights' is not of its type"),
        ({"sizes": {}}, "no size or hash of model.so"),
        ({"layers": 3}, "error: "),
        ({"heads": 2**31 - 1, "key_dim": 2**31 - 1}, "error: "),
    ],
    ids=str,
)
def test_wrong_manifests(runner, bundle, tmp_path, changes, message):
    assert_refused(run([runner, copied(bundle, tmp_path, **changes)], TINY), message)


def test_a_missing_field(runner, bundle, tmp_path):
    copy = copied(bundle, tmp_path)
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["layers"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert_refused(run([runner, copy], TINY), "field 'layers' is missing")


def test_verify_hashes_the_weights(runner, bundle, tmp_path):
    copy = copied(bundle, tmp_path)
    assert new_tokens(run([runner, copy], TINY, "--verify"))
    flip(copy / "weights.safetensors", -1)
    assert_refused(run([runner, copy], TINY, "--verify"), "weights.safetensors: damaged")


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        ([], [], "--tokens: '' is not an integer >= 0"),
        ([300], [], "300 is outside the vocabulary 0..299"),
        ([-1], [], "'-1' is not an integer >= 0"),
        ([1], ["-n", "0"], "'0' is not an integer >= 1"),
        ([1], ["--threads", "many"], "'many' is not an integer >= 1"),
        ([1], ["another"], "give one bundle"),
        ([1], ["--fast"], "see blockffn-run --help"),
    ],
    ids=str,
)
def test_wrong_options(runner, bundle, tokens, options, message):
    assert_refused(run([runner, bundle], tokens, *options), message)


# --- Arm ------------------------------------------------------------------------------------------


def test_arm_tokens_are_those_of_the_host(arm_runner, bundled):
    expected = greedy(bundled("native"), PROMPT, 24)
    command = [*EMULATOR, arm_runner, bundled("arm64")]
    for options in ([], ["--speculate"]):
        assert new_tokens(run(command, PROMPT, "-n", "24", *options)) == expected


def test_arm_kernels_multiply_and_add_vectors(bundled):
    code = subprocess.run(
        ["aarch64-linux-gnu-objdump", "-d", bundled("arm64") / "model.so"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert len(re.findall(r"\tfmla\tv\d+\.4s", code)) > 500
    assert not re.findall(r"\tfmadd\t", code)  # one at a time


def test_other_machines_are_refused(runner, arm_runner, bundled):
    assert_refused(run([runner, bundled("arm64")], PROMPT), "built for arm64 (aarch64), this")
    command = [*EMULATOR, arm_runner, bundled("native")]
    assert_refused(run(command, PROMPT), "this machine is aarch64")


def test_the_arm_runner_is_small(arm_runner):
    names = ["blockffn-run", "libtvm_ffi.so", "libtvm_runtime.so", "libtvm_runtime_cuda.so"]
    assert sorted(file.name for file in arm_runner.parent.iterdir()) == names
    assert sum(file.stat().st_size for file in arm_runner.parent.iterdir()) < 8e6
