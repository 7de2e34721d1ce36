"""Reading and writing checkpoint directories: ``config.json`` plus safetensors shards.

Nothing in a checkpoint is executed: no pickle, no code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from blockffn_compile.models.config import BlockFFNConfig, CheckpointError, read_json
from blockffn_compile.models.modeling import BlockFFNForCausalLM, RotaryEmbedding

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


def load_model(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> BlockFFNForCausalLM:
    """Loads a BlockFFN checkpoint directory.

    Args:
        path: directory with ``config.json`` and ``model.safetensors`` or an indexed set of shards.
        dtype: of the parameters; default: that of the stored embedding.
        device: where the parameters live.

    Returns:
        The model in eval mode.

    Raises:
        CheckpointError: a file, field or tensor is missing, unexpected or malformed; the message
            names the file, the tensor and, for a wrong shape, both shapes.
    """
    path = Path(path)
    config = BlockFFNConfig.from_file(path / "config.json")
    with torch.device("meta"):
        model = BlockFFNForCausalLM(config)
    expected = dict(model.state_dict())
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
    state: dict[str, Tensor] = {}
    for file, promised in _shards(path).items():
        for name, tensor in _read_shard(file, promised, expected, device).items():
            if name in state:
                raise CheckpointError(f"{file}: tensor {name} is stored twice")
            state[name] = tensor
    check_complete(path, expected, state)
    # One dtype for all: released checkpoints may keep, say, the norms wider than the rest.
    dtype = dtype or state["model.embed_tokens.weight"].dtype
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    model.load_state_dict(state, strict=False, assign=True)
    # Buffers are not stored; they are computed where the model now lives.
    model.model.rotary = RotaryEmbedding(config).to(device)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval().requires_grad_(False)


def check_complete(path: Path, expected: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """Raises CheckpointError, naming the first of ``expected`` that ``state`` lacks."""
    missing = sorted(expected.keys() - state.keys())
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


def _read_shard(
    file: Path,
    promised: set[str],
    expected: dict[str, Tensor],
    device: torch.device | str,
) -> dict[str, Tensor]:
    """Tensors of one shard under the model's names, their shapes checked before they are read."""
    # A tied head is often stored once more, and older checkpoints store rotary tables.
    ignored = {"lm_head.weight"} - expected.keys()
    state: dict[str, Tensor] = {}
    try:
        with safe_open(file, framework="pt", device=str(device)) as shard:
            stored = set(shard.keys())
            if absent := promised - stored:
                raise CheckpointError(
                    f"{file}: missing tensor {min(absent)}, which the index lists"
                )
            for name in sorted(stored):
                target = _canonical(name, expected)
                if target in ignored or target.endswith("rotary_emb.inv_freq"):
                    continue
                check_shape(file, name, shard.get_slice(name).get_shape(), expected.get(target))
                if target in state:
                    raise CheckpointError(f"{file}: tensor {target} is stored twice")
                tensor = shard.get_tensor(name)
                if not tensor.is_floating_point():
                    raise CheckpointError(f"{file}: tensor {name} is {tensor.dtype}, not a float")
                state[target] = tensor
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a readable safetensors file: {error}") from None
    return state


def save_model(
    model: BlockFFNForCausalLM, path: str | Path, dtype: torch.dtype | None = None
) -> None:
    """Writes ``config.json`` and ``model.safetensors`` into a directory.

    Args:
        dtype: of the stored tensors; default: as they are.
    """
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
