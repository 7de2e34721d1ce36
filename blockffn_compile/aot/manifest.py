"""What a bundle says of itself; the format is that of :mod:`blockffn_compile.aot.bundle`."""

from __future__ import annotations

import json
import re
import stat
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

FORMAT = 2
MANIFEST, CODE, WEIGHTS, TOKENIZER = (
    "manifest.json",
    "model.so",
    "weights.safetensors",
    "tokenizer.json",
)
FILES = frozenset({MANIFEST, CODE, WEIGHTS, TOKENIZER})
#: Most bytes of a manifest, and of the header of the weights.
LARGEST_HEADER = 1 << 24


class BundleError(ValueError):
    """A bundle cannot be used; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class Manifest:
    """What a bundle says of itself.

    Attributes:
        format: of the bundle, ``FORMAT``.
        target: name of what it was built for.
        architecture: that the machine must have, as ``platform.machine()`` says.
        cpu_features: that the CPU must have, in the words of ``/proc/cpuinfo``.
        compute_capability: of the NVIDIA GPU that runs it, such as ``8.7``; empty for the CPU.
        llvm: TVM's description of the CPU.
        dtype: of features, logits, cache and, but for rotary tables and what is quantised, weights.
        vocab_size: V.
        hidden_size: H.
        max_length: longest text, prompt and new tokens together.
        max_tokens: most tokens of one call.
        layers: of the model.
        heads: key heads of a layer.
        key_dim: width of a key.
        value_dim: width of a value.
        stop_tokens: that end a text.
        trunk_weights: names of the weights of ``trunk``, in order.
        head_weights: names of the weights of ``head``, in order.
        versions: of the software that built it, by package.
        sizes: in bytes, of every other file.
        sha256: of every other file, hexadecimal.
    """

    format: int
    target: str
    architecture: str
    cpu_features: list[str]
    compute_capability: str
    llvm: dict[str, Any]
    dtype: str
    vocab_size: int
    hidden_size: int
    max_length: int
    max_tokens: int
    layers: int
    heads: int
    key_dim: int
    value_dim: int
    stop_tokens: list[int]
    trunk_weights: list[str]
    head_weights: list[str]
    versions: dict[str, str]
    sizes: dict[str, int]
    sha256: dict[str, str]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    @staticmethod
    def from_json(text: str) -> Manifest:
        """Checks every field.

        Raises:
            BundleError: a field is missing, unknown, or not of its type or range.
        """
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BundleError(f"not valid JSON: {error}") from None
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            known = found.get("format") if isinstance(found, dict) else None
            raise BundleError(f"format {known!r}, this version reads format {FORMAT}")
        names = {field.name for field in fields(Manifest)}
        if found.keys() != names:
            wrong = sorted(found.keys() ^ names)[0]
            raise BundleError(f"field {wrong!r} is {'unknown' if wrong in found else 'missing'}")
        for field in fields(Manifest):
            if not _is_a(str(field.type), found[field.name]):
                raise BundleError(f"field {field.name!r} is not {field.type}, within its range")
        manifest = Manifest(**found)
        manifest._check()
        return manifest

    def _check(self) -> None:
        named = self.sizes.keys()
        if not {CODE, WEIGHTS} <= named <= FILES - {MANIFEST} or named != self.sha256.keys():
            raise BundleError(
                f"files are not {CODE}, {WEIGHTS} and {TOKENIZER}, each with its size and hash"
            )
        if not all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in self.sha256.values()):
            raise BundleError("a hash is not 64 hexadecimal digits")
        if not re.fullmatch(r"(\d+\.\d)?", self.compute_capability):
            raise BundleError(f"compute capability {self.compute_capability!r} is not like 8.7")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise BundleError(f"dtype {self.dtype!r} is not one of float32, bfloat16, float16")
        if any(token >= self.vocab_size for token in self.stop_tokens):
            raise BundleError("a stop token is not in the vocabulary")


def _is_a(kind: str, value: Any) -> bool:
    """Whether a JSON value is of the type of a field: a text, a count, or several of them."""
    if kind == "str":
        return type(value) is str
    if kind == "int":
        return type(value) is int and 0 < value < 2**63
    if kind == "list[int]":
        return type(value) is list and all(type(v) is int and v >= 0 for v in value)
    if kind == "list[str]":
        return type(value) is list and all(type(v) is str for v in value)
    inner = {"dict[str, str]": str, "dict[str, int]": int, "dict[str, Any]": object}[kind]
    return type(value) is dict and all(isinstance(v, inner) for v in value.values())


def read_manifest(path: Path) -> Manifest:
    """The checked manifest of a bundle.

    Raises:
        BundleError: it is missing, too large, or wrong in a field.
    """
    file = path / MANIFEST
    if check_file(file, None) > LARGEST_HEADER:
        raise BundleError(f"{file}: larger than {LARGEST_HEADER} bytes")
    try:
        return Manifest.from_json(file.read_text(encoding="utf-8"))
    except BundleError as error:
        raise BundleError(f"{file}: {error}") from None
    except (OSError, UnicodeError) as error:
        raise BundleError(f"{file}: cannot be read: {error}") from None


def check_file(file: Path, size: int | None) -> int:
    """The size of a file, checked where one is given.

    Raises:
        BundleError: there is none, it is not a regular one, or of another size.
    """
    try:
        status = file.lstat()
    except OSError:
        raise BundleError(f"{file}: no such file") from None
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(f"{file}: not a regular file")
    if size is not None and status.st_size != size:
        raise BundleError(f"{file}: {status.st_size} bytes, the manifest says {size}")
    return status.st_size
