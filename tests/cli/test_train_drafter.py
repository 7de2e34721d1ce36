from __future__ import annotations

import inspect
import os
import shutil
import signal
from dataclasses import fields

import pytest

from blockffn_compile import load_model
from blockffn_compile.cli.train_drafter import train_drafter
from blockffn_compile.models import bundled_path
from blockffn_compile.models.eagle import load_eagle
from blockffn_compile.training.config import DrafterConfig
from blockffn_compile.training.drafter import DrafterTrainer
from tests.cli.test_train import quick
from tests.training.conftest import tiny_corpus

__all__ = ["quick", "tiny_corpus"]
pytestmark = pytest.mark.usefixtures("tiny_corpus")


@pytest.fixture
def options(checkpoint, tmp_path) -> list[object]:
    options = ["train-drafter", checkpoint, "--out", tmp_path / "run", "--device", "cpu"]
    return [*options, "--steps", 4, "--batch", 2, "--context", 16]


def test_every_setting_is_an_option_with_the_same_default() -> None:
    parameters = inspect.signature(train_drafter).parameters
    for field in fields(DrafterConfig):
        assert parameters[field.name].default == field.default


def test_trains_to_the_end(blockffn, options, checkpoint, tmp_path) -> None:
    result = blockffn(*options, "--lr", 1e-3)
    assert result.exit_code == 0, result.output
    assert "4/4" in result.stdout
    assert "feature" in result.stdout
    assert "agreement_3" in result.stdout
    assert load_eagle(tmp_path / "run", load_model(checkpoint)).token_map is not None


def test_interrupted_and_resumed(blockffn, options, monkeypatch) -> None:
    step = DrafterTrainer.train_step

    def interrupting(self):
        if self.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(DrafterTrainer, "train_step", interrupting)
        result = blockffn(*options)
    assert result.exit_code == 130, result.output
    assert "saved at step 2" in result.stdout
    again = blockffn(*options)
    assert again.exit_code == 0, again.output
    assert "at step 2" in again.stdout
    assert "4/4" in again.stdout


def test_the_bundled_model_is_the_default_target(blockffn, tmp_path, monkeypatch) -> None:
    seen = []

    def record(self, target, tokenizer, config, *_):
        seen.append((target.config, tokenizer.get_vocab_size(), config))
        raise ValueError("enough")

    monkeypatch.setattr(DrafterTrainer, "__init__", record)
    blockffn("train-drafter", "--out", tmp_path)
    assert seen == [(load_model(bundled_path()).config, 4096, DrafterConfig())]


def test_user_errors(refused, blockffn, options, checkpoint, tmp_path) -> None:
    assert "is not below the model's 128" in refused(*options, "--context", 128)
    assert "depth 16 is not within" in refused(*options, "--depth", 16)
    absent = refused("train-drafter", tmp_path / "absent", "--out", tmp_path / "run")
    assert "no such directory" in absent
    bare = tmp_path / "bare"
    shutil.copytree(checkpoint, bare)
    (bare / "tokenizer.json").unlink()
    assert "copy the model's tokenizer.json" in refused("train-drafter", bare, "--out", tmp_path)
    assert blockffn(*options).exit_code == 0
    assert "other settings; choose another folder" in refused(*options, "--seed", 5)
