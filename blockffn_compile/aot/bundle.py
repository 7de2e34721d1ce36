"""Bundles: directories that hold a compiled model, and their loading without PyTorch.

**A bundle contains native code, which loading it executes.** The checks here catch damage and
mistakes: they cannot tell whether the code is harmless, for whoever can write ``model.so`` can
write its hash.  Load bundles that you built, or that came from someone you would let run programs
on the machine, by a channel that shows who sent them.

A bundle holds these files and needs no other:

``manifest.json``
    The fields of :class:`~blockffn_compile.aot.manifest.Manifest`, in JSON (UTF-8).
``model.so``
    A shared library for the manifest's target, with the functions below as the executable of
    TVM's Relax virtual machine (TVM 0.27: load the module, call its function
    ``vm_load_executable``, and on the result ``vm_initialization`` with the three integers
    device type 1, device id 0, allocator 2; with a GPU, the integers 2, 0, 2, 1, 0, 2).
``weights.safetensors``
    Every weight, at a multiple of 64 bytes from the start of the file, so that the file can be
    mapped to memory.  Tensors named ``padding.N`` are there for that.  A name that ends in
    ``.panels`` is for panels [E, ceil(N/P), K, P] (``schedules/packing.py``) of the weights named
    before, joined by ``+``.  Those of int8, and of uint8 with K/2 rows of four bits, are integers
    (``schedules/quantisation.py``), and the tensor with the same name but ``.scales`` has what to
    multiply them by: bfloat16 [E, ceil(N/P), K/group, P].
``tokenizer.json``
    For the ``tokenizers`` library, as in the checkpoint; absent where that had none.

``trunk(tokens, positions, rows, context, slots, ancestors, cache, weights)``
    Runs T tokens, 1 to ``max_tokens``: nodes of draft trees, a chunk of a prompt (a chain), or one
    token.  Returns features [T, hidden_size].

    - ``tokens`` .. ``ancestors``: six tensors int64 [T].  Of each token: its id; its position in
      its text; the text, a row of the cache; how many cache slots of the text lie before the tree
      (``context``); the slot that its key and value go to, ``context + i`` for the i-th node of
      its tree; and the nodes it sees, bit j for node j, itself included.
    - ``cache``: an array of ``2 * layers`` tensors, keys and values of each layer in turn:
      [rows, heads, length, key_dim] and [rows, heads, length, value_dim].  They are written in
      place.  Rows and length are the caller's choice, the same for all; what no token has
      written is never read.
    - ``weights``: an array of the tensors that ``trunk_weights`` names, in that order.

    The function checks shapes and types, not values: an id that is not in the vocabulary, or a
    slot or position outside of the cache, is undefined behaviour.

``head(features, weights)``
    Logits [N, vocab_size] of features [N, hidden_size], N from 1 to ``max_tokens``; ``weights`` as
    ``head_weights`` names them.

``move(rows, sources, slots, cache)``
    Copies cache entries, each of the row ``rows[i]`` from the slot ``sources[i]`` to ``slots[i]``,
    one after the other; three tensors int64 [n].  To keep only some nodes of a tree, a caller moves
    their entries together, behind the context.

All tensors are contiguous, at addresses that are multiples of 64, on the CPU or, where the manifest
has a ``compute_capability``, on an NVIDIA GPU of that.  Calls only add to what the GPU has to do.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import mmap
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from blockffn_compile.aot.gpu import CudaError, load_runtime
from blockffn_compile.aot.machine import cpu_features
from blockffn_compile.aot.manifest import (
    CODE,
    LARGEST_HEADER,
    WEIGHTS,
    BundleError,
    Manifest,
    check_file,
    read_manifest,
)
from blockffn_compile.paths import cache_dir

if TYPE_CHECKING:
    import tvm

ALIGNMENT = 64
#: Element types of safetensors in the words of TVM, and their sizes.
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "I8": "int8", "U8": "uint8"}
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "uint8": 1}


class Bundle(NamedTuple):
    """A loaded bundle.

    Attributes:
        path: its directory.
        manifest: checked.
        trunk: the function.
        head: the function.
        move: the function.
        trunk_weights: its last argument.
        head_weights: its last argument.
        device: where all tensors are.
    """

    path: Path
    manifest: Manifest
    trunk: Any
    head: Any
    move: Any
    trunk_weights: Any
    head_weights: Any
    device: tvm.runtime.Device


def load(path: str | Path, *, verify: bool = False) -> Bundle:
    """Checks a bundle and loads it; see the module's text for whom to trust.

    Nothing of it runs before the manifest, the machine and the hash of the code were checked.  The
    weights, which are mapped to memory, or copied to the GPU, are hashed when the file has changed
    since it last was, or is new on this machine: gigabytes take seconds.

    Args:
        path: the directory.
        verify: hash the weights in any case.

    Raises:
        BundleError: a file is missing, damaged or not the manifest's, or this machine or TVM is
            not what the bundle was built for.
    """
    path = Path(path)
    if not path.is_dir():
        raise BundleError(f"{path}: no such directory; give a bundle made by blockffn compile")
    manifest = read_manifest(path)
    check_machine(path, manifest)
    for name, size in manifest.sizes.items():
        check_file(path / name, size)
    for name in manifest.sizes.keys() - {WEIGHTS}:
        check_hash(path / name, manifest.sha256[name])
    tensors = _map_weights(path / WEIGHTS, manifest, verify)
    for name in (*manifest.trunk_weights, *manifest.head_weights):
        if name not in tensors:
            raise BundleError(f"{path / WEIGHTS}: missing tensor {name}")

    import tvm
    import tvm_ffi
    from tvm.runtime.vm import VirtualMachine

    check_version(path, manifest, tvm.__version__)
    device = tvm.cpu()
    if manifest.compute_capability:
        check_gpu(path, manifest)
        device = tvm.cuda()
    try:
        machine = VirtualMachine(tvm.runtime.load_module(str(path / CODE)), device)
        trunk, head, move = (machine[name] for name in ("trunk", "head", "move"))
    except Exception as error:  # whatever TVM raises for code that is none of its own
        raise BundleError(f"{path / CODE}: TVM cannot load it: {error}") from None
    if manifest.compute_capability:
        tensors = {name: weight.copyto(device) for name, weight in tensors.items()}
    trunk_weights, head_weights = (
        tvm_ffi.Array([tensors[name] for name in names])
        for names in (manifest.trunk_weights, manifest.head_weights)
    )
    return Bundle(path, manifest, trunk, head, move, trunk_weights, head_weights, device)


def check_machine(path: Path, manifest: Manifest) -> None:
    """Raises BundleError where this machine is not what the bundle was built for."""
    here = platform.machine()
    if here != manifest.architecture:
        raise BundleError(
            f"{path}: built for {manifest.target} ({manifest.architecture}), this machine is {here}"
        )
    if lacking := sorted(set(manifest.cpu_features) - cpu_features()):
        raise BundleError(
            f"{path}: built for {manifest.target}; this CPU lacks {', '.join(lacking)}: build the "
            "bundle for another target (blockffn compile --target)"
        )


def check_gpu(path: Path, manifest: Manifest) -> None:
    """Raises BundleError where TVM finds no GPU that the bundle was built for."""
    import tvm

    built = f"{path}: built for an NVIDIA GPU of compute capability {manifest.compute_capability}"
    try:
        load_runtime()
    except CudaError as error:
        raise BundleError(
            f"{built}; CUDA cannot be used here: {error}. It needs NVIDIA's driver and the "
            "package nvidia-cuda-runtime, version 13"
        ) from None
    gpu = tvm.cuda()
    if not gpu.exist:
        raise BundleError(f"{built}; there is none here")
    if gpu.compute_version != manifest.compute_capability:
        raise BundleError(
            f"{built}; this one has {gpu.compute_version}: build the bundle for another target "
            "(blockffn compile --target)"
        )


def check_version(path: Path, manifest: Manifest, version: str) -> None:
    """Raises BundleError where TVM is not of the release that built the bundle."""
    built = manifest.versions.get("apache-tvm", "")
    if built.split(".")[:2] != version.split(".")[:2]:
        raise BundleError(
            f"{path}: built with apache-tvm {built or 'of unknown version'}, this is {version}; "
            "install that release or build the bundle anew"
        )


def file_hash(file: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_hash(file: Path, digest: str) -> None:
    """Raises BundleError where the SHA-256 of a file is another one."""
    if file_hash(file) != digest:
        raise BundleError(
            f"{file}: damaged or of another bundle: its SHA-256 is not the manifest's"
        )


# --- Weights --------------------------------------------------------------------------------------


def _map_weights(file: Path, manifest: Manifest, verify: bool) -> dict[str, tvm.runtime.Tensor]:
    """All tensors, in memory that is read from the file when it is needed."""
    status = file.stat()
    identity = (
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )
    seen = " ".join(map(str, identity))
    stamp = cache_dir() / f"weights-{manifest.sha256[WEIGHTS][:32]}"
    known = None
    with contextlib.suppress(OSError):
        known = stamp.read_text()
    if verify or known != seen:
        check_hash(file, manifest.sha256[WEIGHTS])
        with contextlib.suppress(OSError):  # no place for stamps: hashed every time
            stamp.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            stamp.write_text(seen)
    with file.open("rb") as stream:
        # Private and writable, as DLPack wants it; nothing is ever written.
        memory = np.frombuffer(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY), np.uint8)
    return {
        name: tensor(memory[start:end], shape, dtype)
        for name, (dtype, shape, start, end) in read_header(file, memory).items()
    }


def read_header(
    file: Path, memory: NDArray[np.uint8]
) -> dict[str, tuple[str, list[int], int, int]]:
    """Element type, shape, first and last byte of every tensor but the padding.

    Raises:
        BundleError: the header is no such description of the file.
    """
    try:
        length = int(memory[:8].view("<u8")[0])
        if length > min(LARGEST_HEADER, len(memory) - 8):
            raise ValueError("it is longer than the file")
        header = json.loads(bytes(memory[8 : 8 + length]))
        tensors = {}
        for name, entry in header.items():
            if name == "__metadata__" or name.startswith("padding."):
                continue
            dtype = DTYPES[entry["dtype"]]
            shape, (start, end) = entry["shape"], entry["data_offsets"]
            start, end = start + 8 + length, end + 8 + length
            sizes = [n for n in shape if type(n) is int and n > 0]
            if len(sizes) != len(shape) or math.prod(sizes) * DTYPE_BYTES[dtype] != end - start:
                raise ValueError(f"{name} does not have the size of its shape")
            if not 8 + length <= start <= end <= len(memory) or start % ALIGNMENT:
                raise ValueError(f"{name} is outside of the file, or not aligned")
            tensors[name] = (dtype, shape, start, end)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(f"{file}: its header is wrong: {error}") from None
    return tensors


def tensor(data: NDArray[np.uint8], shape: Sequence[int], dtype: str) -> tvm.runtime.Tensor:
    """The same bytes as a tensor of TVM."""
    import tvm

    return tvm.runtime.from_dlpack(data)._create_view(shape, dtype)
