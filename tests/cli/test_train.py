from __future__ import annotations

import inspect
import json
import os
import signal
from dataclasses import fields

import pytest
import torch

from blockffn_compile.cli.train import train
from blockffn_compile.models.checkpoint import load_model
from blockffn_compile.training.config import TrainConfig
from blockffn_compile.training.presets import BUNDLED, dense_twin
from blockffn_compile.training.trainer import Trainer
from tests.conftest import make_config
from tests.training.conftest import tiny_corpus

__all__ = ["tiny_corpus"]
pytestmark = pytest.mark.usefixtures("tiny_corpus")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No compiler, and the process's own signal handlers afterwards."""
    monkeypatch.setattr(torch, "compile", lambda function: function)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def options(tmp_path) -> list[object]:
    config = tmp_path / "model.json"
    config.write_text(json.dumps(make_config(eos_token_id=0).to_dict()))
    options = ["train", "--out", tmp_path / "run", "--config", config, "--device", "cpu"]
    return [*options, "--steps", 6, "--batch", 2, "--context", 16, "--chunk", 8]


def test_every_setting_is_an_option_with_the_same_default() -> None:
    parameters = inspect.signature(train).parameters
    for field in fields(TrainConfig):
        assert parameters[field.name].default == field.default


def test_trains_to_the_end(blockffn, options, tmp_path) -> None:
    result = blockffn(*options)
    assert result.exit_code == 0, result.output
    assert "6/6" in result.stdout
    assert "lambda" in result.stdout
    assert "perplexity" in result.stdout
    assert load_model(tmp_path / "run").config == make_config(eos_token_id=0)


def test_interrupted_and_resumed(blockffn, options, tmp_path, monkeypatch) -> None:
    step = Trainer.train_step

    def interrupting(self):
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", interrupting)
        result = blockffn(*options)
    assert result.exit_code == 130, result.output
    assert "saved at step 3" in result.stdout
    assert "Traceback" not in result.output
    again = blockffn(*options)
    assert again.exit_code == 0, again.output
    assert "at step 3" in again.stdout
    assert "6/6" in again.stdout


def test_bundled_architecture_and_dense_twin(blockffn, tmp_path, monkeypatch) -> None:
    seen = []

    def record(self, model_config, *_):
        seen.append(model_config)
        raise ValueError("enough")

    monkeypatch.setattr(Trainer, "__init__", record)
    blockffn("train", "--out", tmp_path)
    blockffn("train", "--out", tmp_path, "--dense")
    assert seen == [BUNDLED, dense_twin(BUNDLED)]


def test_user_errors(refused, blockffn, options, tmp_path) -> None:
    assert "is not a multiple of chunk 64" in refused("train", "--out", tmp_path, "--context", 100)
    message = refused("train", "--out", tmp_path, "--config", tmp_path / "absent.json")
    assert "absent.json: no such file" in message
    assert "exceeds the model's 128" in refused(*options, "--context", 256)
    assert blockffn(*options).exit_code == 0
    assert "other settings; choose another folder" in refused(*options, "--seed", 5)
    (tmp_path / "file").touch()
    assert "file" in refused(*options, "--out", tmp_path / "file")
