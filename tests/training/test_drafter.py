from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from blockffn_compile.models.cache import StaticCache
from blockffn_compile.models.eagle import EagleHead, eagle_config, load_eagle
from blockffn_compile.training import corpus
from blockffn_compile.training.config import DrafterConfig
from blockffn_compile.training.drafter import (
    DrafterTrainer,
    frequency_map,
    unroll,
    unrolled_mask,
)
from tests.conftest import make_config

CONFIG = DrafterConfig(steps=6, batch=2, context=16, save_every=2)
MODEL = make_config(eos_token_id=0)

pytestmark = pytest.mark.usefixtures("tiny_corpus")


@pytest.fixture
def uncompiled(monkeypatch) -> None:
    """Skips the compiler, which takes far longer than these runs."""
    monkeypatch.setattr(torch, "compile", lambda function: function)


@pytest.fixture
def make_trainer(make_model, tiny_corpus):
    tokenizer = corpus.train_tokenizer(300)

    def make(out, config: DrafterConfig = CONFIG, model=MODEL) -> DrafterTrainer:
        return DrafterTrainer(make_model(model), tokenizer, config, out)

    return make


def ignore(step: int, losses: dict[str, float]) -> None:
    pass


class StopError(Exception):
    pass


def run_until(trainer: DrafterTrainer, last: int) -> None:
    def stop(step: int, losses: dict[str, float]) -> None:
        if step == last:
            raise StopError

    with pytest.raises(StopError):
        trainer.run(stop)


def same_weights(a: DrafterTrainer, b: DrafterTrainer) -> bool:
    pairs = zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs) and a.step == b.step


# Frequency-ranked vocabulary


@pytest.mark.parametrize("coverage", [0.5, 0.9, 0.95, 0.999, 1.0])
def test_frequency_map_covers_with_as_few_as_will_do(coverage) -> None:
    generator = np.random.default_rng(0)
    tokens = np.minimum(generator.geometric(0.01, 20000), 999).astype(np.uint16)
    ranked = frequency_map(tokens, 1000, coverage)
    assert ranked.dtype == torch.int64
    counts = np.bincount(tokens, minlength=1000)
    listed = counts[ranked.numpy()]
    assert (np.diff(listed) <= 0).all()
    assert len(ranked.unique()) == len(ranked)
    assert listed.min() >= np.delete(counts, ranked.numpy()).max(initial=0)
    assert listed.sum() >= coverage * len(tokens)
    assert len(ranked) % 64 == 0 or len(ranked) == 1000
    assert listed[:-64].sum() < coverage * len(tokens)


def test_frequency_map_of_one_token_and_of_a_small_vocabulary() -> None:
    assert frequency_map(np.array([5, 5, 5]), 10, 1.0).tolist() == [5, 0, 1, 2, 3, 4, 6, 7, 8, 9]
    assert frequency_map(np.array([70] * 3), 128, 1.0)[0] == 70
    assert len(frequency_map(np.array([70] * 3), 128, 1.0)) == 64


# Unrolling


@pytest.mark.parametrize(("length", "step"), [(1, 0), (5, 0), (5, 1), (5, 2), (5, 4)])
def test_unrolled_mask(length, step) -> None:
    """Each key is a (step, position) pair; a draft sees text, then its own path."""
    keys = [(m, j) for m in range(step + 1) for j in range(m, length)]
    mask = unrolled_mask(length, step)
    assert mask.shape == (length - step, len(keys))
    for row, position in zip(mask.tolist(), range(step, length), strict=True):
        start = position - step
        visible = [(0, j) for j in range(start + 1)]
        visible += [(m, start + m) for m in range(1, step + 1)]
        assert [key for key, seen in zip(keys, row, strict=True) if seen] == visible


def test_unrolled_is_drafted() -> None:
    """Every unrolled prediction is what drafting over a cache gives, position by position."""
    torch.manual_seed(0)
    head = EagleHead(eagle_config(MODEL)).requires_grad_(False)
    embeddings, features = torch.randn(2, 7, 32), torch.randn(2, 7, 32)
    predicted = unroll(head, embeddings, features, 3)
    assert [p.shape[1] for p in predicted] == [7, 6, 5]

    def advance(embedding, feature, positions, cache):
        mask = torch.arange(8) <= positions[:, None]
        return head(embedding, feature, positions, cache, mask)[:, -1:]

    for step, at_step in enumerate(predicted):
        for row in range(7 - step):
            cache, known = StaticCache(head.config, 2, 8), torch.arange(row + 1)
            draft = advance(embeddings[:, known], features[:, known], known, cache)
            for position in range(row + 1, row + 1 + step):
                at = torch.tensor([position])
                draft = advance(embeddings[:, at], draft, at, cache)
            torch.testing.assert_close(at_step[:, row], draft[:, 0])


# Trainer


@pytest.mark.usefixtures("uncompiled")
def test_loss_is_the_formula(make_trainer, tmp_path) -> None:
    trainer = make_trainer(tmp_path)
    tokens, target = trainer.batch(0), trainer.target
    features = target.model(tokens)
    logits = target(tokens)
    embeddings = target.model.embed_tokens(tokens[:, 1:]) * MODEL.scale_emb
    cross_entropy, distance = [], []
    for step, predicted in enumerate(unroll(trainer.model, embeddings, features[:, :-1], 3)):
        # From the feature of token step and those before, the feature and logits of step + 1.
        wanted = features[:, step + 1 :]
        drafted = target.lm_head(predicted * target.logit_scale).flatten(0, 1)
        soft = logits[:, step + 1 :].softmax(-1).flatten(0, 1)
        cross_entropy.append(F.cross_entropy(drafted, soft))
        distance.append(F.smooth_l1_loss(predicted, wanted))
    parts = trainer._loss(tokens)
    torch.testing.assert_close(parts, (sum(cross_entropy) / 3, sum(distance) / 3))
    loss, named = trainer.total(parts)
    assert loss == parts[0] + 0.1 * parts[1]
    assert (named["ce"], named["feature"]) == parts


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("last", [1, 4])
def test_a_run_stopped_between_steps_goes_on_bit_for_bit(make_trainer, tmp_path, last) -> None:
    whole = make_trainer(tmp_path / "whole")
    whole.run(ignore)
    stopped = make_trainer(tmp_path / "stopped")
    run_until(stopped, last)
    stopped.save()
    resumed = make_trainer(tmp_path / "stopped")
    assert resumed.step == last
    resumed.run(ignore)
    assert same_weights(resumed, whole)


@pytest.mark.usefixtures("uncompiled")
def test_training_learns_and_leaves_a_loadable_head(make_trainer, tmp_path) -> None:
    config = DrafterConfig(steps=60, batch=4, context=16, save_every=30, learning_rate=1e-2)
    trainer = make_trainer(tmp_path, config)
    before = [p.clone() for p in trainer.target.parameters()]
    first = trainer.evaluate(None)
    seen: list[float] = []
    result = trainer.run(lambda step, losses: seen.append(losses["ce"]))
    assert len(seen) == 60
    assert seen[-1] < seen[0]
    assert all(result[f"agreement_{d}"] > first[f"agreement_{d}"] + 0.1 for d in (1, 2, 3))
    assert all(map(torch.equal, before, trainer.target.parameters()))
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == [30, 60]
    assert log[-1] == result
    head = load_eagle(tmp_path, trainer.target)
    for name, tensor in trainer.model.state_dict().items():
        torch.testing.assert_close(head.state_dict()[name], tensor, rtol=0.01, atol=1e-3)
    counts = np.bincount(trainer.train_tokens)
    assert head.token_map is not None
    assert head.token_map[0] == counts.argmax()


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("limit", [None, 40, 34, 5, 4])
def test_agreement_is_counted_along_the_text(make_trainer, tmp_path, limit) -> None:
    """Windows of 17 tokens; one of 3 or fewer has no draft three deep."""
    trainer = make_trainer(tmp_path)
    # A head that repeats the last feature: its answers are those of the text some tokens before.
    trainer.model.forward = lambda embeddings, features, *_: features
    result = trainer.evaluate(limit)
    hits, count = [0, 0, 0], 0
    for window in trainer.held_out(limit).split(17):
        best = trainer.target(window[None])[0].argmax(-1).tolist()
        for position in range(3, len(window)):
            count += 1
            for d in (1, 2, 3):
                hits[d - 1] += best[position - d] == best[position]
    expected = {f"agreement_{d}": hits[d - 1] / count for d in (1, 2, 3)}
    assert result == pytest.approx(expected)
    assert len(set(expected.values())) > 1 or limit in (4, 5)


@pytest.mark.usefixtures("uncompiled")
def test_a_finished_run_only_reports(make_trainer, tmp_path) -> None:
    make_trainer(tmp_path).run(ignore)
    result = make_trainer(tmp_path).run(lambda step, losses: pytest.fail("trained on"))
    assert set(result) == {"agreement_1", "agreement_2", "agreement_3"}


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    ("config", "model"),
    [
        (DrafterConfig(steps=6, batch=2, context=16, save_every=2, seed=1), MODEL),
        (CONFIG, make_config(eos_token_id=0, num_experts=5)),
    ],
    ids=["training", "target"],
)
def test_a_folder_with_other_settings_is_refused(make_trainer, tmp_path, config, model) -> None:
    make_trainer(tmp_path).save()
    with pytest.raises(ValueError, match="other settings; choose another folder"):
        make_trainer(tmp_path, config, model)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depth": 0}, "depth 0"),
        ({"depth": 16, "context": 16}, "depth 16"),
        ({"coverage": 0.0}, "coverage 0.0"),
        ({"coverage": 1.5}, "coverage 1.5"),
    ],
)
def test_settings_out_of_range(fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        DrafterConfig(**fields)


def test_the_compiled_loss_and_its_gradients_are_the_eager_ones(make_trainer, tmp_path) -> None:
    """The same through the compiler, which real runs use."""
    trainer = make_trainer(tmp_path)
    gradients = []
    for function in (trainer._compiled_loss, trainer._loss):
        parts = function(trainer.batch(0))
        trainer.model.zero_grad()
        trainer.total(parts)[0].backward()
        gradients.append((*parts, *(p.grad.clone() for p in trainer.model.parameters())))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)
