from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from blockffn_compile.cli import specbench
from blockffn_compile.generation import generate
from blockffn_compile.models.checkpoint import load_model
from blockffn_compile.models.eagle import EagleHead, eagle_config, save_eagle
from tests.buckets import few_buckets

QUESTIONS: list[dict[str, Any]] = [
    {"question_id": 1, "category": "code", "turns": ["def add", "def sub"], "reference": []},
    {"question_id": "two", "category": "text", "turns": ["x\u2028class Stack"]},
    {"question_id": 3, "category": "code", "turns": ["return a"]},
]


@pytest.fixture(scope="module", autouse=True)
def quick():
    with few_buckets(1, 8):
        yield


def write(path: Path, *lines: object) -> Path:
    """A file of questions, of anything else that JSON can say, and of broken lines."""
    encoded = [
        line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines
    ]
    path.write_text("\n".join(encoded) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def file(tmp_path) -> Path:
    return write(tmp_path / "question.jsonl", QUESTIONS[0], "", *QUESTIONS[1:])


def rows(output: str) -> dict[str, list[str]]:
    """The cells of the table's rows, by category."""
    cells = [[c.strip() for c in line.split("│")[1:-1]] for line in output.splitlines()]
    return {row[0]: row[1:] for row in cells if row}


def test_measures_each_category(blockffn, checkpoint, file, tmp_path) -> None:
    options = ["--json", tmp_path / "records.json", "--plot", tmp_path / "plot.png"]
    result = blockffn("specbench", file, checkpoint, "-n", 20, *options)
    assert result.exit_code == 0, result.output
    table = rows(result.stdout)
    assert list(table) == ["code", "text", "overall"]
    assert [row[0] for row in table.values()] == ["3", "1", "4"]
    assert all(row[-1] == "yes" for row in table.values())
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")

    records = json.loads((tmp_path / "records.json").read_text())
    assert [record["work"] for record in records] == [f"question.jsonl: {name}" for name in table]
    for record, row in zip(records, table.values(), strict=True):
        assert record["gate"] is True
        assert record["dtype"] == "float32"
        assert record["subject"] == "speculate=auto"
        assert record["ratio"] == pytest.approx(record["peer_ms"] / record["subject_ms"])
        assert row[1] == f"{1e3 / record['peer_ms']:.1f}"
        assert row[2] == f"{1e3 / record['subject_ms']:.1f}"
        assert row[3] == f"{record['ratio']:.2f}x"
        assert row[4] == f"{record['accepted_length']:.2f}"
        assert row[5] == f"{record['tree_size']:.1f}"
        assert 1 <= record["accepted_length"] <= record["tree_size"] <= 8
    code, text, overall = records
    assert overall["tokens"] == code["tokens"] + text["tokens"] == 80
    assert overall["prompts"] == 4


def test_later_turns_go_on_from_the_answers(blockffn, checkpoint, file, monkeypatch) -> None:
    prompts: list[list[int]] = []
    answer = specbench.answer

    def spy(generator, prompt, max_new_tokens):
        prompts.append(list(prompt))
        return answer(generator, prompt, max_new_tokens)

    monkeypatch.setattr(specbench, "answer", spy)
    assert blockffn("specbench", file, checkpoint, "-n", 6, "--limit", 1).exit_code == 0
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    first = tokenizer.encode("def add").ids
    written = list(generate(load_model(checkpoint), first, 6, backend="eager"))
    second = [*first, *written, *tokenizer.encode("\ndef sub").ids]
    third = tokenizer.encode("x\u2028class Stack").ids
    timed = prompts[2:]  # without the two that warm up
    assert timed == [first, first, second, second, third, third]


def test_one_token_has_no_steps(blockffn, checkpoint, file) -> None:
    result = blockffn("specbench", file, checkpoint, "-n", 1, "--speculate", "ngram")
    assert result.exit_code == 0, result.output
    assert rows(result.stdout)["overall"][4:6] == ["0.00", "0.0"]


def test_drafts_with_the_head_beside_the_model(
    blockffn, refused, checkpoint, file, tmp_path
) -> None:
    model = load_model(checkpoint)
    options = ["specbench", file, checkpoint, "-n", 4, "--speculate", "eagle"]
    assert "needs a draft head" in refused(*options)
    torch.manual_seed(0)
    save_eagle(EagleHead(eagle_config(model.config, 24)), tmp_path / "head")
    result = blockffn(*options, "--drafter", tmp_path / "head")
    assert result.exit_code == 0, result.output
    assert "eagle" in result.stdout
    assert "head/config.json" in refused(*options, "--drafter", tmp_path / "no" / "head")


def test_a_long_prompt_loses_its_beginning(blockffn, checkpoint, tmp_path) -> None:
    long = {"question_id": 1, "category": "code", "turns": ["a b " * 200, "def f"]}
    result = blockffn("specbench", write(tmp_path / "q", long), checkpoint, "-n", 28)
    assert result.exit_code == 0, result.output
    assert "of 2 prompts only the last 100 tokens fit" in result.stdout


def test_different_tokens_fail_the_gate(blockffn, checkpoint, file, tmp_path, monkeypatch) -> None:
    answer = specbench.answer
    calls = []

    def drifting(generator, prompt, max_new_tokens):
        calls.append(prompt)
        result = answer(generator, prompt, max_new_tokens)
        if len(calls) == 8:  # two to warm up, four for question 1: the drafting one of "two"
            result.tokens[-1] ^= 1
        return result

    monkeypatch.setattr(specbench, "answer", drifting)
    records = tmp_path / "records.json"
    result = blockffn("specbench", file, checkpoint, "-n", 3, "--json", records)
    assert result.exit_code == 1, result.output
    assert "the tokens differ in questions: two" in result.stdout
    assert [r["gate"] for r in json.loads(records.read_text())] == [True, False, False]


GOOD = QUESTIONS[0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ([1, 2], "is [1, 2], not a JSON object"),
        (GOOD | {"question_id": None}, "question_id must be a number or a string, got None"),
        (GOOD | {"category": 3}, "category must be a string"),
        (GOOD | {"category": "overall"}, "category must be a string"),
        (GOOD | {"turns": "def"}, "turns must be a list of strings"),
        (GOOD | {"turns": []}, "turns must be a list of strings"),
        (GOOD | {"turns": ["a", ""]}, "turns must be a list of strings"),
        (GOOD | {"turns": ["a", 1]}, "turns must be a list of strings"),
        ({"question_id": 1, "category": "code"}, "turns must be a list of strings"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_wrong_line_is_named(refused, checkpoint, tmp_path, line, message) -> None:
    path = write(tmp_path / "question.jsonl", GOOD, "", line)
    error = refused("specbench", path, checkpoint)
    assert f"{path}: line 3: " in error
    assert message in error


def test_user_errors(refused, checkpoint, file, tmp_path) -> None:
    assert "absent: No such file" in refused("specbench", tmp_path / "absent", checkpoint)
    assert "Is a directory" in refused("specbench", tmp_path, checkpoint)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8 text" in refused("specbench", tmp_path / "binary", checkpoint)
    assert "has no questions" in refused("specbench", write(tmp_path / "empty", ""), checkpoint)
    assert "no such directory" in refused("specbench", file, tmp_path / "absent")
    message = refused("specbench", file, checkpoint, "-n", 128)
    assert "--max-new-tokens 128 leaves no room in the context of 128" in message


def test_the_sample_is_well_formed() -> None:
    path = Path(__file__).parents[2] / "benchmarks" / "questions.jsonl"
    questions = specbench.read_questions(path, None)
    assert len({question.id for question in questions}) == len(questions) >= 16
    assert len(specbench.read_questions(path, 1)) == 4
