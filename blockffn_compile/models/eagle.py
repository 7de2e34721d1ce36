"""The EAGLE draft head: one decoder layer that extrapolates the target's own features.

EAGLE (arXiv 2401.15077) as in its released heads for BlockFFN; the reduced vocabulary is that of
FR-Spec (arXiv 2502.14856). Nothing in a checkpoint is executed: pickle files are read as weights
only.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from blockffn_compile.layer import RMSNorm
from blockffn_compile.models.checkpoint import (
    SINGLE,
    check_complete,
    check_shape,
    write_checkpoint,
)
from blockffn_compile.models.config import BlockFFNConfig, CheckpointError, read_json
from blockffn_compile.models.modeling import BlockFFNForCausalLM, DecoderLayer, RotaryEmbedding

PICKLED = "pytorch_model.bin"

#: Whatever the target is, the head's layer is a Llama layer: grouped-query attention, a gated
#: dense FFN, residual branches not scaled.
LLAMA = {
    "attention_type": "vanilla",
    "ffn_type": "vanilla",
    "ffn_gated": True,
    "scale_emb": 1.0,
    "scale_depth": 1.0,
}

#: Tensors that a head may have or not; a checkpoint has them if they are stored.
OPTIONAL = {
    "fc_bias": ("fc.bias",),
    "input_norms": ("input_norm1.weight", "input_norm2.weight"),
    "layer_norm": ("layers.0.input_layernorm.weight",),
}


def eagle_config(target: BlockFFNConfig, intermediate_size: int | None = None) -> BlockFFNConfig:
    """Architecture of a new head for ``target``.

    Args:
        intermediate_size: width of the head's FFN; default: three times the hidden size.
    """
    return dataclasses.replace(
        target,
        num_hidden_layers=1,
        intermediate_size=intermediate_size or 3 * target.hidden_size,
        **LLAMA,  # type: ignore[arg-type]
    )


class EagleHead(nn.Module):
    """Predicts the target's next feature from its last one and the token that followed.

    ``feature[i + 1] ~ layer(fc([norm1(embedding(token[i + 1])), norm2(feature[i])]))``, where
    features are outputs of the target's final norm, and embeddings those that its first layer
    sees. The target's head turns the prediction into logits of token i + 2:
    ``target.lm_head(predicted * target.logit_scale)``.

    Attributes:
        config: one layer; serves to make the head's :class:`StaticCache`.
        token_map: [D] int64, the target's tokens that drafts are made of, most frequent first;
            None for the whole vocabulary.
    """

    token_map: Tensor | None

    def __init__(
        self,
        config: BlockFFNConfig,
        token_map: Tensor | None = None,
        *,
        fc_bias: bool = False,
        input_norms: bool = True,
        layer_norm: bool = False,
    ) -> None:
        """Makes a head with PyTorch's initial weights.

        Args:
            fc_bias: ``fc`` adds a bias.
            input_norms: embeddings and features are RMS-normalised first, as in the heads
                released for BlockFFN.
            layer_norm: the layer has an ``input_layernorm``; released heads have none.
        """
        super().__init__()
        self.config = config
        width = config.hidden_size

        def norm(present: bool) -> nn.Module:
            return RMSNorm(width, config.rms_norm_eps) if present else nn.Identity()

        self.input_norm1, self.input_norm2 = norm(input_norms), norm(input_norms)
        self.fc = nn.Linear(2 * width, width, bias=fc_bias)
        layer = DecoderLayer(config, 0)
        if not layer_norm:
            layer.input_layernorm = nn.Identity()  # type: ignore[assignment]
        self.layers = nn.ModuleList([layer])
        self.rotary = RotaryEmbedding(config)
        self.register_buffer("token_map", token_map)

    def forward(
        self, embeddings: Tensor, features: Tensor, positions: Tensor, *attention_args: Any
    ) -> Tensor:
        """Predicted features, of the position after each.

        Args:
            embeddings: [batch, T, H], of the token after each feature:
                ``target.model.embed_tokens(tokens) * scale_emb``.
            features: [batch, T, H], of the target or earlier outputs of this head.
            positions: [T] int64, of the features.
            attention_args: what :class:`DecoderLayer` takes after the positions: cache, mask.

        Returns:
            [batch, T, H].
        """
        pair = (self.input_norm1(embeddings), self.input_norm2(features))
        x = self.fc(torch.cat(pair, dim=-1))
        return self.layers[0](x, self.rotary(positions), positions, *attention_args)


def save_eagle(head: EagleHead, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Writes ``config.json`` and ``model.safetensors`` into a directory.

    Args:
        dtype: of the stored weights; default: as they are. The token map is int64.
    """
    fields = head.config.to_dict() | {"model_type": "eagle"}
    write_checkpoint(path, fields, dict(head.state_dict()), dtype)


def load_eagle(
    path: str | Path, target: BlockFFNForCausalLM, dtype: torch.dtype | None = None
) -> EagleHead:
    """Loads a draft head: one that :func:`save_eagle` wrote, or a released one.

    Reads ``config.json`` and ``model.safetensors`` or ``pytorch_model.bin``. Which norms and
    biases the head has is seen from the stored tensors. A reduced vocabulary is ``token_map``
    (``token_id_remap`` in released heads) among them, or a file ``freq_*.pt`` beside them.

    Args:
        path: the directory.
        target: the model to draft for.
        dtype: of the parameters; default: the target's.

    Returns:
        The head in eval mode, on the target's device, with the target's context length.

    Raises:
        CheckpointError: a file, field or tensor is missing, unexpected or malformed, or the head
            does not fit the target; the message names the file and the tensor, and for a wrong
            shape both shapes.
    """
    path = Path(path)
    config = _read_config(path / "config.json", target.config)
    file, state = _read_weights(path)
    token_map = _read_token_map(path, file, state, config.vocab_size)
    present = {name: not state.keys().isdisjoint(keys) for name, keys in OPTIONAL.items()}
    with torch.device("meta"):
        head = EagleHead(config, None, **present)
    expected = dict(head.state_dict())
    for name, tensor in state.items():
        check_shape(file, name, list(tensor.shape), expected.get(name))
        if not tensor.is_floating_point():
            raise CheckpointError(f"{file}: tensor {name} is {tensor.dtype}, not a float")
    check_complete(path, expected, state)
    weight = target.lm_head.weight
    head.load_state_dict(
        {name: tensor.to(weight.device, dtype or weight.dtype) for name, tensor in state.items()},
        assign=True,
    )
    # Buffers do not come with the weights; they live where the head now does.
    head.rotary = RotaryEmbedding(config).to(weight.device)
    head.token_map = None if token_map is None else token_map.to(weight.device)
    return head.eval().requires_grad_(False)


def _read_config(file: Path, target: BlockFFNConfig) -> BlockFFNConfig:
    """The head's architecture, checked against the target's."""
    fields = read_json(file)
    fitting = {
        "num_hidden_layers": (1, "a draft head has"),
        "hidden_size": (target.hidden_size, "the target has"),
        "vocab_size": (target.vocab_size, "the target has"),
    }
    for name, (wanted, whose) in fitting.items():
        if fields.get(name, wanted) != wanted:
            raise CheckpointError(f"{file}: {name} is {fields[name]!r}, {whose} {wanted}")
    # The head follows the target through all of its context.
    context = {"max_position_embeddings": target.max_position_embeddings}
    try:
        return BlockFFNConfig.from_dict(fields | LLAMA | context)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from None


def _read_weights(path: Path) -> tuple[Path, dict[str, Tensor]]:
    """The file of the weights and its tensors, without those that the target has too."""
    file = path / SINGLE
    if file.exists():
        try:
            state = load_file(file)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: not a readable safetensors file: {error}") from None
    elif (file := path / PICKLED).exists():
        state = _read_pickled(file)
        if not isinstance(state, dict) or not all(map(torch.is_tensor, state.values())):
            raise CheckpointError(f"{file}: does not hold named tensors")
    else:
        raise CheckpointError(f"{path}: neither {SINGLE} nor {PICKLED} is there")
    shared = ("embed_tokens.weight", "rotary_emb.inv_freq")
    return file, {name: t for name, t in state.items() if not name.endswith(shared)}


def _read_pickled(file: Path) -> Any:
    """What ``torch.save`` wrote, if it is tensors and plain containers."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch each raise their own
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{file}: not readable as weights only: {reason}") from None


def _read_token_map(
    path: Path, file: Path, state: dict[str, Tensor], vocab_size: int
) -> Tensor | None:
    """Takes the token map out of ``state``, or reads it from its own file; [D] int64 or None."""
    name = next((name for name in ("token_map", "token_id_remap") if name in state), None)
    if name is not None:
        ids: Any = state.pop(name)
    else:
        files = sorted(path.glob("freq_*.pt"))
        if not files:
            return None
        if len(files) > 1:
            raise CheckpointError(f"{path}: has {len(files)} token maps freq_*.pt; leave one")
        [file] = files
        ids = _read_pickled(file)
    try:
        token_map = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError):
        raise CheckpointError(f"{file}: the token map is not a list of token ids") from None
    integers = token_map.dtype in (torch.int32, torch.int64)
    if token_map.dim() != 1 or not len(token_map) or not integers:
        found = f"{token_map.dtype} {list(token_map.shape)}"
        raise CheckpointError(f"{file}: the token map is {found}, not a list of token ids")
    if token_map.min() < 0 or token_map.max() >= vocab_size:
        raise CheckpointError(f"{file}: the token map has ids outside 0..{vocab_size - 1}")
    if len(token_map.unique()) < len(token_map):
        raise CheckpointError(f"{file}: the token map has an id twice")
    return token_map.long()
