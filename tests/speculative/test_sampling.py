from __future__ import annotations

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from blockffn_compile.speculative.sampling import Sampler, best_tokens

SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.0, "top_k": 10**6},
    {"temperature": 1.0, "top_p": 0.6},
    {"temperature": 1.0, "top_p": 1e-6},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 1.0, "min_p": 1.0},
    {"temperature": 1.0, "repetition_penalty": 1.7},
    {"temperature": 1.3, "repetition_penalty": 0.6},
    {"temperature": 0.8, "top_k": 12, "top_p": 0.7, "min_p": 0.1, "repetition_penalty": 1.3},
    {"temperature": 1.5, "top_k": 30, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.3},
]
HISTORY = [3, 0, 3, 11, 49]


def hugging_face(settings: dict, logits: torch.Tensor) -> torch.Tensor:
    made = LogitsProcessorList()
    if "repetition_penalty" in settings:
        made.append(RepetitionPenaltyLogitsProcessor(settings["repetition_penalty"]))
    made.append(TemperatureLogitsWarper(settings["temperature"]))
    if "top_k" in settings:
        made.append(TopKLogitsWarper(settings["top_k"]))
    if "top_p" in settings:
        made.append(TopPLogitsWarper(settings["top_p"]))
    if "min_p" in settings:
        made.append(MinPLogitsWarper(settings["min_p"]))
    return made(torch.tensor([HISTORY]), logits[None])[0].softmax(-1)  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_distribution_is_that_of_hugging_face(settings) -> None:
    generator = torch.Generator().manual_seed(0)
    for scale in (0.2, 1, 4):
        logits = scale * torch.randn(50, generator=generator, dtype=torch.float64)
        probs = Sampler(**settings).distribution(logits, HISTORY)
        expected = hugging_face(settings, logits)
        assert torch.equal(probs > 0, expected > 0)
        torch.testing.assert_close(probs, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_distribution_is_fp32_at_least(dtype) -> None:
    logits = torch.randn(20).to(dtype)
    sampler = Sampler(temperature=0.7, top_p=0.9)
    probs = sampler.distribution(logits, [])
    assert probs.dtype == torch.float32
    torch.testing.assert_close(probs, sampler.distribution(logits.float(), []))


def test_equal_tokens_at_the_top_k_border_stay() -> None:
    probs = Sampler(temperature=1.0, top_k=2).distribution(torch.tensor([1.0, 2.0, 1.0, 0.0]), [])
    assert (probs > 0).tolist() == [True, True, True, False]


def test_the_penalty_counts_a_token_once_whatever_its_sign() -> None:
    logits = torch.tensor([2.0, -2.0, 0.5])
    probs = Sampler(temperature=1.0, repetition_penalty=2.0).distribution(logits, [0, 1, 0])
    torch.testing.assert_close(probs, torch.tensor([1.0, -4.0, 0.5]).softmax(-1))
    assert logits.tolist() == [2.0, -2.0, 0.5]


def test_greedy() -> None:
    logits = torch.tensor([0.0, 2.0, 2.0, -1.0])
    assert Sampler().choose(logits, [], 0) == 1
    assert Sampler().distribution(logits, []).tolist() == [0, 1, 0, 0]
    penalised = Sampler(repetition_penalty=1.5)
    assert penalised.choose(logits, [1], 0) == 2
    assert penalised.distribution(logits, [1]).tolist() == [0, 0, 1, 0]
    assert Sampler().is_argmax
    assert not penalised.is_argmax
    assert not Sampler(temperature=1.0).is_argmax


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_best_tokens_are_the_first_of_the_largest(dtype) -> None:
    logits = torch.randint(-3, 3, (7, 9)).to(dtype).requires_grad_()
    expected = [row.index(max(row)) for row in logits.tolist()]
    assert best_tokens(logits) == expected


def test_best_tokens_tell_apart_what_fp32_cannot() -> None:
    assert best_tokens(torch.tensor([[1.0, 1.0 + 1e-12]], dtype=torch.float64)) == [1]


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([0.5, -torch.inf, 2.0, 1.0, -3.0, 0.0])
    sampler = Sampler(temperature=0.9, top_k=4, seed=3)
    draws = [sampler.choose(logits, [], position) for position in range(8000)]
    counts = torch.bincount(torch.tensor(draws), minlength=6).double()
    expected = 8000 * sampler.distribution(logits.double(), [])
    assert (counts[expected == 0] == 0).all()
    kept = expected > 0
    chi_square = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    assert chi_square < 16.3  # 3 degrees of freedom, p = 0.001


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(0))

    def draws(seed: int, positions) -> list[int]:
        sampler = Sampler(temperature=2.0, seed=seed)
        return [sampler.choose(logits, [], position) for position in positions]

    forth, back = draws(5, range(20)), draws(5, reversed(range(20)))
    assert forth == back[::-1]
    assert len(set(forth)) > 10
    assert draws(6, range(20)) != forth


def test_without_a_seed_runs_differ_but_follow_the_global_generator() -> None:
    torch.manual_seed(0)
    first, second = Sampler(), Sampler()
    torch.manual_seed(0)
    assert first.seed == Sampler().seed
    assert first.seed != second.seed


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_draw_possible_tokens(monkeypatch, number) -> None:
    monkeypatch.setattr(Sampler, "_uniform", lambda *_: number)
    sampler = Sampler(temperature=1.0)
    for size in (1, 2, 7, 5000):
        logits = torch.randn(size + 2, generator=torch.Generator().manual_seed(size))
        logits[0] = logits[-1] = -torch.inf
        token = sampler.choose(logits, [], 0)
        assert token == (1 if number == 0 else size)


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_nothing_to_sample_from(value) -> None:
    with pytest.raises(ValueError, match="nothing to sample from"):
        Sampler(temperature=1.0).choose(torch.full((4,), value), [], 0)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("nan")},
        {"seed": -1},
        {"seed": 2**64},
    ],
    ids=str,
)
def test_bad_settings_are_refused(settings) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        Sampler(**settings)
