from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from blockffn_compile.models.checkpoint import load_model
from blockffn_compile.training.config import TrainConfig
from blockffn_compile.training.presets import dense_twin
from blockffn_compile.training.trainer import Trainer, perplexity
from tests.conftest import make_config

CONFIG = TrainConfig(steps=8, batch=2, context=16, chunk=8, save_every=3, lambda_cs=0.1)
MODEL = make_config(initializer_range=0.1, eos_token_id=0)

pytestmark = pytest.mark.usefixtures("tiny_corpus")


@pytest.fixture
def uncompiled(monkeypatch) -> None:
    """Skips the compiler, which takes far longer than these runs."""
    monkeypatch.setattr(torch, "compile", lambda function: function)


def ignore(step: int, losses: dict[str, float]) -> None:
    pass


def same_state(a: Trainer, b: Trainer) -> bool:
    tensors_a = [*a.model.state_dict().values(), *moments(a)]
    tensors_b = [*b.model.state_dict().values(), *moments(b)]
    equal = all(torch.equal(x, y) for x, y in zip(tensors_a, tensors_b, strict=True))
    return equal and a.factor == b.factor and a.step == b.step


def moments(trainer: Trainer) -> list[torch.Tensor]:
    states = trainer.optimizer.state_dict()["state"].values()
    return [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]


class StopError(Exception):
    pass


def run_until(trainer: Trainer, last: int) -> None:
    def stop(step: int, losses: dict[str, float]) -> None:
        if step == last:
            raise StopError

    with pytest.raises(StopError):
        trainer.run(stop)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("last", [1, 3, 5])
def test_a_run_stopped_between_steps_goes_on_bit_for_bit(tmp_path, last) -> None:
    whole = Trainer(MODEL, CONFIG, tmp_path / "whole")
    whole.run(ignore)
    stopped = Trainer(MODEL, CONFIG, tmp_path / "stopped")
    run_until(stopped, last)
    stopped.save()
    resumed = Trainer(MODEL, CONFIG, tmp_path / "stopped")
    assert resumed.step == last
    resumed.run(ignore)
    assert same_state(resumed, whole)


@pytest.mark.usefixtures("uncompiled")
def test_a_killed_run_goes_on_from_its_last_save(tmp_path) -> None:
    whole = Trainer(MODEL, CONFIG, tmp_path / "whole")
    whole.run(ignore)
    run_until(Trainer(MODEL, CONFIG, tmp_path / "killed"), 5)
    resumed = Trainer(MODEL, CONFIG, tmp_path / "killed")
    assert resumed.step == 3
    resumed.run(ignore)
    assert same_state(resumed, whole)


def test_the_compiled_loss_is_the_eager_one_and_resumes_bit_for_bit(tmp_path) -> None:
    """The same through the compiler, which real runs use."""
    config = TrainConfig(steps=3, batch=1, context=16, chunk=8, save_every=1)
    whole = Trainer(MODEL, config, tmp_path / "whole")
    compiled, eager = whole._compiled_loss(whole.batch(0)), whole._loss(whole.batch(0))
    torch.testing.assert_close(compiled, eager)
    whole.run(ignore)
    run_until(Trainer(MODEL, config, tmp_path / "killed"), 2)
    resumed = Trainer(MODEL, config, tmp_path / "killed")
    assert resumed.step == 1
    resumed.run(ignore)
    assert same_state(resumed, whole)


@pytest.mark.usefixtures("uncompiled")
def test_training_learns_and_leaves_a_loadable_model(tmp_path) -> None:
    config = TrainConfig(steps=60, batch=4, context=16, chunk=8, save_every=30, lambda_cs=0.05)
    seen: list[float] = []
    trainer = Trainer(MODEL, config, tmp_path)
    result = trainer.run(lambda step, losses: seen.append(losses["lm"]))
    assert len(seen) == 60
    assert seen[-1] < 0.7 * seen[0]
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == [30, 60]
    assert log[-1] == result
    assert result["lambda_cs"] == trainer.factor.value
    assert 0 <= result["cls_8"] <= result["tls"] <= 1
    model = load_model(tmp_path, dtype=torch.float32)
    tokens = torch.from_numpy(trainer.held_out_tokens.astype(np.int64))
    assert perplexity(model, tokens, 16) == pytest.approx(result["perplexity"], rel=0.02)


@pytest.mark.usefixtures("uncompiled")
def test_a_finished_run_only_reports(tmp_path) -> None:
    Trainer(MODEL, CONFIG, tmp_path).run(ignore)
    again = Trainer(MODEL, CONFIG, tmp_path)
    result = again.run(lambda step, losses: pytest.fail("trained on"))
    assert again.step == 8
    assert result["perplexity"] > 1


@pytest.mark.usefixtures("uncompiled")
def test_the_dense_twin_trains_without_sparsity_figures(tmp_path) -> None:
    result = Trainer(dense_twin(MODEL), CONFIG, tmp_path).run(ignore)
    assert result["al"] == result["cs"] == 0
    assert "tls" not in result


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    ("model", "config"),
    [
        (MODEL, TrainConfig(steps=8, batch=2, context=16, chunk=8, seed=1)),
        (make_config(num_experts=5), CONFIG),
    ],
    ids=["training", "model"],
)
def test_a_folder_with_other_settings_is_refused(tmp_path, model, config) -> None:
    trainer = Trainer(MODEL, CONFIG, tmp_path)
    trainer.save()
    before = (tmp_path / "state.pt").read_bytes()
    with pytest.raises(ValueError, match="other settings; choose another folder"):
        Trainer(model, config, tmp_path)
    assert (tmp_path / "state.pt").read_bytes() == before


@pytest.mark.usefixtures("uncompiled")
def test_an_interrupted_save_leaves_the_previous_state(tmp_path, monkeypatch) -> None:
    trainer = Trainer(MODEL, CONFIG, tmp_path)
    trainer.train_step()
    trainer.save()

    def crash(state, path) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    trainer.train_step()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", crash)
        with pytest.raises(OSError, match="disk full"):
            trainer.save()
    assert Trainer(MODEL, CONFIG, tmp_path).step == 1


@pytest.mark.usefixtures("uncompiled")
def test_batches_are_windows_in_shuffled_order(tmp_path) -> None:
    trainer = Trainer(MODEL, CONFIG, tmp_path)
    windows = (len(trainer.train_tokens) - 1) // 16
    steps = windows // 2
    starts = [tuple(row.tolist()) for step in range(steps) for row in trainer.batch(step)]
    expected = {tuple(trainer.train_tokens[i * 16 : i * 16 + 17].tolist()) for i in range(windows)}
    assert set(starts) <= expected
    assert len(starts) == 2 * steps
    assert torch.equal(trainer.batch(3), trainer.batch(3))
    assert not torch.equal(trainer.batch(0), trainer.batch(steps + 1))


def test_perplexity_is_the_exponential_of_the_mean_loss(make_model) -> None:
    model, tokens = make_model(MODEL), torch.arange(1, 41)
    losses = []
    for start in (0, 16, 32):
        window = tokens[start : start + 17]
        log_probabilities = model(window[None, :-1])[0].log_softmax(-1)
        losses += [-log_probabilities[i, t].item() for i, t in enumerate(window[1:])]
    assert len(losses) == 39
    expected = math.exp(sum(losses) / len(losses))
    assert perplexity(model, tokens, 16) == pytest.approx(expected, rel=1e-5)
