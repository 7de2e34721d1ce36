"""The decoder against a second implementation, written out in NumPy, and against itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from blockffn_compile.models.cache import StaticCache
from blockffn_compile.models.modeling import RotaryEmbedding, rotate
from tests.conftest import make_config

TOKENS = torch.tensor([[5, 17, 3, 250, 17, 99, 0, 42, 8, 1, 1, 64]])


def norm(x: np.ndarray, weight: np.ndarray, eps: float = 1e-6) -> np.ndarray:
    return x / np.sqrt((x**2).mean() + eps) * weight


def turn(x: np.ndarray, position: int, theta: float) -> np.ndarray:
    """Rotary embedding of one head, as multiplication of complex numbers."""
    half = len(x) // 2
    angles = position * theta ** (-np.arange(half) / half)
    z = (x[:half] + 1j * x[half:]) * np.exp(1j * angles)
    return np.concatenate((z.real, z.imag))


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def heads_of(c, w: dict[str, np.ndarray], x: np.ndarray, position: int):
    """Queries, keys and values of one token, a list of heads each, keys and values shared."""
    n, theta = c.num_attention_heads, c.rope_theta
    if c.attention_type == "vanilla":
        q = [turn(h, position, theta) for h in (w["q_proj.weight"] @ x).reshape(n, -1)]
        k = [turn(h, position, theta) for h in (w["k_proj.weight"] @ x).reshape(c.kv_heads, -1)]
        v = list((w["v_proj.weight"] @ x).reshape(c.kv_heads, -1))
        group = n // c.kv_heads
        return q, [k[i // group] for i in range(n)], [v[i // group] for i in range(n)]
    nope, rank = c.qk_nope_head_dim, c.kv_lora_rank
    latent_q = norm(w["q_a_proj.weight"] @ x, w["q_a_layernorm.weight"])
    q = [
        np.concatenate((h[:nope], turn(h[nope:], position, theta)))
        for h in (w["q_b_proj.weight"] @ latent_q).reshape(n, -1)
    ]
    compressed = w["kv_a_proj_with_mqa.weight"] @ x
    shared = turn(compressed[rank:], position, theta)
    expand = w["kv_b_proj.weight"] @ norm(compressed[:rank], w["kv_a_layernorm.weight"])
    kv = expand.reshape(n, -1)
    return q, [np.concatenate((h[:nope], shared)) for h in kv], [h[nope:] for h in kv]


def reference_logits(model, tokens: list[int]) -> np.ndarray:
    """Logits [T, vocab] in fp64, one token after the other, one head after the other."""
    c = model.config
    weights = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
    past: list[list[tuple]] = [[] for _ in range(c.num_hidden_layers)]
    residual = c.scale_depth / math.sqrt(c.num_hidden_layers)
    logits = []
    for position, token in enumerate(tokens):
        x = weights["model.embed_tokens.weight"][token] * c.scale_emb
        for i in range(c.num_hidden_layers):
            prefix = f"model.layers.{i}."
            w = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
            attention = {k.removeprefix("self_attn."): v for k, v in w.items()}
            q, k, v = heads_of(c, attention, norm(x, w["input_layernorm.weight"]), position)
            past[i].append((k, v))
            mixed = []
            for h, query in enumerate(q):
                match = np.array([query @ keys[h] for keys, _ in past[i]]) / math.sqrt(len(query))
                share = np.exp(match - match.max())
                share /= share.sum()
                mixed.append(sum(s * values[h] for s, (_, values) in zip(share, past[i])))  # noqa: B905
            x = x + w["self_attn.o_proj.weight"] @ np.concatenate(mixed) * residual
            y = norm(x, w["post_attention_layernorm.weight"])
            scores = np.maximum(w["mlp.router_proj.weight"] @ y, 0)
            scores = norm(scores, w["mlp.router_norm.weight"])
            ffn = sum(
                score * down @ silu(up @ y)
                for score, up, down in zip(
                    scores, w["mlp.up_proj"], w["mlp.down_proj"], strict=True
                )
            )
            x = x + ffn * residual
        x = norm(x, weights["model.norm.weight"]) / (c.hidden_size / c.dim_model_base)
        logits.append(weights["lm_head.weight"] @ x)
    return np.stack(logits)


@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_a_second_implementation(tiny_config, make_model, tied) -> None:
    fields = tiny_config.to_dict() | {"tie_word_embeddings": tied}
    model = make_model(type(tiny_config).from_dict(fields))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.uniform_(0.5, 1.5)
    expected = torch.from_numpy(reference_logits(model, TOKENS[0].tolist()))
    scale = expected.abs().max().item()
    torch.testing.assert_close(model(TOKENS)[0].double(), expected, rtol=0, atol=2e-5 * scale)
    # Norms keep fp32 variance under fp64 too.
    torch.testing.assert_close(model.double()(TOKENS)[0], expected, rtol=0, atol=1e-6 * scale)


@pytest.mark.parametrize("sizes", [[12], [1] * 12, [5, 1, 1, 5], [1, 11]])
def test_cached_decoding_equals_the_full_forward(tiny_config, make_model, sizes) -> None:
    model = make_model(tiny_config)
    expected = model(TOKENS)
    cache = StaticCache(tiny_config, batch=1, max_len=16)
    parts, start = [], 0
    for size in sizes:
        positions = torch.arange(start, start + size)
        parts.append(model(TOKENS[:, positions], positions, cache))
        start += size
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-4, atol=1e-5)


def test_a_rewritten_slot_leaves_no_trace(tiny_config, make_model) -> None:
    model = make_model(tiny_config)
    cache = StaticCache(tiny_config, batch=1, max_len=16)
    model(TOKENS, torch.arange(12), cache)
    model(TOKENS[:, :4].flip(1), torch.arange(6, 10), cache)  # a draft that is then thrown away
    last = model(TOKENS[:, 6:], torch.arange(6, 12), cache)
    torch.testing.assert_close(last, model(TOKENS)[:, 6:], rtol=1e-4, atol=1e-5)


def test_mask_decides_what_a_token_sees(tiny_config, make_model) -> None:
    """Two branches of a tree share a prefix, and slots are not positions in the text."""
    model = make_model(tiny_config)
    tokens = torch.tensor([[5, 17, 3, 9]])  # 5 -> 17 -> 3, and 5 -> 17 -> 9
    positions = torch.tensor([0, 1, 2, 2])
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]], dtype=torch.bool)
    logits = model(tokens, positions, mask=mask)
    for node, path in ((2, [0, 1, 2]), (3, [0, 1, 3])):
        torch.testing.assert_close(logits[:, node], model(tokens[:, path])[:, -1])


def test_batch_rows_are_independent(tiny_config, make_model) -> None:
    model = make_model(tiny_config)
    both = torch.cat((TOKENS, TOKENS.flip(1)))
    torch.testing.assert_close(model(both)[1:], model(TOKENS.flip(1)))


def test_logits_to_keep(tiny_config, make_model) -> None:
    model = make_model(tiny_config)
    torch.testing.assert_close(model(TOKENS, logits_to_keep=2), model(TOKENS)[:, -2:])


def test_a_cache_needs_positions(tiny_config, make_model) -> None:
    cache = StaticCache(tiny_config, batch=1, max_len=16)
    with pytest.raises(ValueError, match="positions are needed"):
        make_model(tiny_config)(TOKENS, cache=cache)


def test_rotary_tables_stay_exact_through_casts_and_meta() -> None:
    rotary = RotaryEmbedding(make_config())
    cos = rotary.cos.clone()
    assert torch.equal(rotary.to(torch.bfloat16).cos, cos)
    assert torch.equal(rotary.to("meta").to_empty(device="cpu").cos, cos)
    assert rotary.state_dict() == {}


def test_rotation_keeps_the_dtype_and_depends_on_distance_only() -> None:
    rotary = RotaryEmbedding(make_config())
    q, k = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    near = rotate(q, rotary(torch.tensor(7))) @ rotate(k, rotary(torch.tensor(4)))
    far = rotate(q, rotary(torch.tensor(107))) @ rotate(k, rotary(torch.tensor(104)))
    assert near.dtype == torch.float64
    torch.testing.assert_close(near, far, rtol=0, atol=1e-5)
    assert rotate(q.bfloat16(), rotary(torch.tensor(7))).dtype == torch.bfloat16


def test_initialisation(tiny_config, make_model) -> None:
    model, again = make_model(tiny_config), make_model(tiny_config)
    assert torch.equal(model(TOKENS), again(TOKENS))
    assert not torch.equal(model(TOKENS), make_model(tiny_config, seed=1)(TOKENS))
    assert torch.equal(model.model.norm.weight, torch.ones(32))
