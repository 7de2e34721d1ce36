"""Reading and writing checkpoint directories: ``config.json`` plus safetensors shards.

Nothing in a checkpoint is executed: no pickle, no code.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from blockffn_compile.models.config import BlockFFNConfig, CheckpointError, read_json
from blockffn_compile.models.modeling import BlockFFNForCausalLM, RotaryEmbedding
from blockffn_compile.quantisation import is_quantised

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def _shards(path: Path) -> dict[Path, set[str]]:
    """Shard files of a checkpoint, each with the tensors that the index promises in it."""
    index = path / INDEX
    if not index.exists():
        if (path / SINGLE).exists():
            return {path / SINGLE: set()}
        pickles = sorted(file.name for file in path.glob("pytorch_model*.bin"))
        if pickles:
            raise CheckpointError(
                f"{path / pickles[0]}: pickle files can run code and are not read; "
                f"convert the weights to {SINGLE}"
            )
        raise CheckpointError(f"{path}: neither {SINGLE} nor {INDEX} is there")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map")
    shards: dict[Path, set[str]] = {}
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or file in ("", "..") or Path(file).name != file:
            raise CheckpointError(f"{index}: {tensor}: shard {file!r} is outside the checkpoint")
        shards.setdefault(path / file, set()).add(tensor)
    return shards


def _canonical(name: str, expected: dict[str, Tensor]) -> str:
    """Name of a stored tensor in the model: expert weights come with or without ``.weight``."""
    for candidate in (name, name.removesuffix(".weight"), name + ".weight"):
        if candidate in expected:
            return candidate
    return name


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint directory, whose tensors are read one by one.

    Attributes:
        config: of the model.
        places: file of each tensor, and its name there, by its name in the model.
        dtype: of the embedding.
    """

    config: BlockFFNConfig
    places: dict[str, tuple[Path, str]]
    dtype: torch.dtype

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """The tensor that the model calls ``name``.

        Raises:
            CheckpointError: its file is no longer what it was.
        """
        file, stored = self.places[name]
        with _open(file, device) as shard:
            return shard.get_tensor(stored)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Checks names and shapes in a checkpoint directory, without reading tensors.

    Args:
        path: directory with ``config.json`` and ``model.safetensors`` or an indexed set of shards.

    Raises:
        CheckpointError: a file, field or tensor is missing, unexpected or malformed; the message
            names the file, the tensor and, for a wrong shape, both shapes.
    """
    path = Path(path)
    config = BlockFFNConfig.from_file(path / "config.json")
    with torch.device("meta"):
        expected = dict(BlockFFNForCausalLM(config).state_dict())
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
    places: dict[str, tuple[Path, str]] = {}
    for file, promised in _shards(path).items():
        for name, stored in _names(file, promised, expected).items():
            if name in places:
                raise CheckpointError(f"{file}: tensor {name} is stored twice")
            places[name] = file, stored
    check_complete(path, expected, places)
    file, stored = places["model.embed_tokens.weight"]
    with _open(file) as shard:
        dtype = shard.get_slice(stored)[:0].dtype
    return Checkpoint(config, places, dtype)


def load_model(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> BlockFFNForCausalLM:
    """Loads a BlockFFN checkpoint directory.

    Args:
        path: as for :func:`open_checkpoint`.
        dtype: of the parameters; default: that of the stored embedding.
        device: where the parameters live.

    Returns:
        The model in eval mode.

    Raises:
        CheckpointError: as for :func:`open_checkpoint`.
    """
    checkpoint = open_checkpoint(path)
    config = checkpoint.config
    with torch.device("meta"):
        model = BlockFFNForCausalLM(config)
    # One dtype for all: released checkpoints may keep, say, the norms wider than the rest.
    dtype = dtype or checkpoint.dtype
    state = {name: checkpoint.read(name, device).to(dtype) for name in checkpoint.places}
    model.load_state_dict(state, strict=False, assign=True)
    # Buffers are not stored; they are computed where the model now lives.
    model.model.rotary = RotaryEmbedding(config).to(device)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval().requires_grad_(False)


def check_complete(path: Path, expected: dict[str, Tensor], found: Iterable[str]) -> None:
    """Raises CheckpointError, naming the first of ``expected`` that is not ``found``."""
    missing = sorted(expected.keys() - set(found))
    if missing:
        shape = list(expected[missing[0]].shape)
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{path}: missing tensor {missing[0]} {shape}{more}")


def check_shape(file: Path, name: str, shape: list[int], expected: Tensor | None) -> None:
    """Raises CheckpointError where a stored tensor is not ``expected`` (None) or not so shaped."""
    if expected is None:
        raise CheckpointError(f"{file}: unexpected tensor {name} {shape}")
    wanted = list(expected.shape)
    if shape != wanted:
        raise CheckpointError(
            f"{file}: tensor {name} has shape {shape}, the config asks for {wanted}"
        )


@contextmanager
def _open(file: Path, device: torch.device | str = "cpu") -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt", device=str(device)) as shard:
            yield shard
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a readable safetensors file: {error}") from None


def _names(file: Path, promised: set[str], expected: dict[str, Tensor]) -> dict[str, str]:
    """The stored name of each of the model's tensors in one shard, shapes and types checked."""
    # A tied head is often stored once more, and older checkpoints store rotary tables.
    ignored = {"lm_head.weight"} - expected.keys()
    names: dict[str, str] = {}
    with _open(file) as shard:
        stored = set(shard.keys())
        if absent := promised - stored:
            raise CheckpointError(f"{file}: missing tensor {min(absent)}, which the index lists")
        for name in sorted(stored):
            target = _canonical(name, expected)
            if target in ignored or target.endswith("rotary_emb.inv_freq"):
                continue
            part = shard.get_slice(name)
            check_shape(file, name, part.get_shape(), expected.get(target))
            if target in names:
                raise CheckpointError(f"{file}: tensor {target} is stored twice")
            if not part[:0].is_floating_point():
                raise CheckpointError(f"{file}: tensor {name} is {part[:0].dtype}, not a float")
            names[target] = name
    return names


def save_model(
    model: BlockFFNForCausalLM, path: str | Path, dtype: torch.dtype | None = None
) -> None:
    """Writes ``config.json`` and ``model.safetensors`` into a directory.

    Args:
        dtype: of the stored tensors; default: as they are.

    Raises:
        ValueError: the model is quantised.
    """
    if is_quantised(model):
        raise ValueError("the model is quantised; save the original, and quantise what is loaded")
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    write_checkpoint(path, model.config.to_dict(), state, dtype)


def write_checkpoint(
    path: str | Path, fields: dict[str, Any], state: dict[str, Tensor], dtype: torch.dtype | None
) -> None:
    """Writes ``fields`` as ``config.json`` and ``state`` as ``model.safetensors``.

    Args:
        dtype: of the stored floating-point tensors; default: as they are.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
        for name, tensor in state.items()
    }
    # Renamed into place: an interrupted save leaves the previous weights whole.
    temporary = path / f".{SINGLE}.tmp"
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.replace(path / SINGLE)
    (path / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
