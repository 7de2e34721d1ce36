"""Model configuration: the MiniCPM-style ``config.json`` of released BlockFFN checkpoints."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from blockffn_compile.layer import Activation, BlockFFNSpec, RouterNorm


class CheckpointError(ValueError):
    """A checkpoint cannot be loaded; the message names the file and what is wrong in it."""


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        CheckpointError: the file cannot be read or holds something else.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return fields


@dataclass(frozen=True)
class BlockFFNConfig:
    """Architecture of a BlockFFN decoder, field names as in ``config.json``.

    Attributes:
        attention_type: ``vanilla`` (grouped-query attention) or ``mla``.
        v_head_dim: width of one value head under MLA; default: ``qk_nope_head_dim``.
        ffn_type: ``block``, ``block_linear``, or ``vanilla`` (a dense FFN: the twin to compare
            with).
        ffn_gated: gated FFN (``gate_proj``); released BlockFFN experts are not gated.
        intermediate_size: width of the ``vanilla`` FFN, which alone needs it.
        scale_emb: factor on the embeddings.
        scale_depth: every residual branch is scaled by ``scale_depth / sqrt(num_hidden_layers)``.
        dim_model_base: logits are divided by ``hidden_size / dim_model_base``.

    Raises:
        CheckpointError: a field has a value that this package does not implement.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    attention_type: str = "vanilla"
    q_lora_rank: int = 768
    kv_lora_rank: int = 256
    qk_nope_head_dim: int = 64
    qk_rope_head_dim: int = 32
    v_head_dim: int | None = None
    ffn_type: str = "block"
    ffn_gated: bool = False
    intermediate_size: int = 0
    num_experts: int = 40
    expert_size: int = 128
    router_act: str = "relu"
    hidden_act: Activation = "silu"
    norm_after_router: RouterNorm = "rms"
    norm_scale: float = 1.0
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 4096
    scale_emb: float = 1.0
    scale_depth: float = 1.0
    dim_model_base: int = 1
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def __post_init__(self) -> None:
        choices = {
            "attention_type": ("vanilla", "mla"),
            "ffn_type": ("block", "block_linear", "vanilla"),
            "router_act": ("relu",),
            "hidden_act": get_args(Activation),
            "norm_after_router": get_args(RouterNorm),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                value = getattr(self, name)
                raise CheckpointError(f"{name} {value!r} is not one of {', '.join(allowed)}")
        self._check_numbers()
        if self.num_attention_heads % self.kv_heads:
            raise CheckpointError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.attention_type == "vanilla" and self.hidden_size % self.num_attention_heads:
            raise CheckpointError(
                f"hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.rope_dim % 2:
            raise CheckpointError(f"rotary head size {self.rope_dim} is not even")

    def _check_numbers(self) -> None:
        """Every size is a positive integer and every factor a positive number."""
        may_be_zero = {"bos_token_id", "eos_token_id"}
        if self.ffn_type != "vanilla":
            may_be_zero.add("intermediate_size")
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), 0 if field.name in may_be_zero else 1
            if value is None and field.default is None:
                continue
            if field.type in ("int", "int | None") and (type(value) is not int or value < least):
                raise CheckpointError(f"{field.name} {value!r} is not an integer >= {least}")
            if field.type == "float" and not (type(value) in (int, float) and value > 0):
                raise CheckpointError(f"{field.name} {value!r} is not a positive number")
            if field.type == "bool" and type(value) is not bool:
                raise CheckpointError(f"{field.name} {value!r} is not true or false")

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def value_dim(self) -> int:
        """Width of one value head under MLA."""
        return self.v_head_dim or self.qk_nope_head_dim

    @property
    def rope_dim(self) -> int:
        """Width of the rotated part of one head."""
        return self.qk_rope_head_dim if self.attention_type == "mla" else self.head_dim

    @property
    def cache_sizes(self) -> tuple[int, int, int]:
        """Key heads of a layer in the cache, width of a key, width of a value."""
        if self.attention_type == "mla":
            key_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
            return self.num_attention_heads, key_dim, self.value_dim
        return self.kv_heads, self.head_dim, self.head_dim

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """Tokens that end a text."""
        return () if self.eos_token_id is None else (self.eos_token_id,)

    @property
    def ffn_spec(self) -> BlockFFNSpec:
        """Spec of the BlockFFN layers; undefined for ``ffn_type="vanilla"``."""
        return BlockFFNSpec(
            hidden_size=self.hidden_size,
            num_experts=self.num_experts,
            expert_size=self.expert_size,
            layout=self.ffn_type,  # type: ignore[arg-type]
            norm=self.norm_after_router,
            act=self.hidden_act,
            gated=self.ffn_gated,
            norm_scale=self.norm_scale,
            eps=self.rms_norm_eps,
        )

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> BlockFFNConfig:
        """Takes the fields it knows; refuses what would change the computation.

        Raises:
            CheckpointError: a field is missing or has an unsupported value.
        """
        fields = dict(fields)
        # Recent Hugging Face configs keep the rotary base in here.
        rope = fields.get("rope_parameters") or {}
        if rope.get("rope_type", "default") == "default":
            fields.setdefault("rope_theta", rope.get("rope_theta"))
        else:
            fields["rope_scaling"] = rope
        for name in ("rope_scaling", "attention_bias"):
            if fields.get(name):
                raise CheckpointError(f"{name} {fields[name]!r} is not supported")
        if fields.get("attention_type") == "gqa":
            fields["attention_type"] = "vanilla"
        # Released BlockFFN configs carry ffn_gated=true, which speaks of the dense FFN type only.
        if fields.get("ffn_type") in ("block", "block_linear"):
            fields["ffn_gated"] = fields.get("expert_gated", False)
        known = {f.name for f in dataclasses.fields(cls)}
        given = {k: v for k, v in fields.items() if k in known and v is not None}
        missing = [
            f.name
            for f in dataclasses.fields(cls)
            if f.default is dataclasses.MISSING and f.name not in given
        ]
        if missing:
            raise CheckpointError(f"missing field {', '.join(missing)}")
        return cls(**given)

    @classmethod
    def from_file(cls, path: Path) -> BlockFFNConfig:
        """Reads ``config.json``.

        Raises:
            CheckpointError: the file is missing, is not JSON, or has unsupported values.
        """
        fields = read_json(path)
        try:
            return cls.from_dict(fields)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Fields as they stand in ``config.json``."""
        fields = dataclasses.asdict(self)
        if self.ffn_type != "vanilla":
            fields["expert_gated"] = fields["ffn_gated"]
        return {"model_type": "blockffn", **{k: v for k, v in fields.items() if v is not None}}
