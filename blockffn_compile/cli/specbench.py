"""``blockffn specbench``: speculative against plain decoding on a file of questions."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blockffn_compile.cli.common import (
    CheckpointArgument,
    DrafterOption,
    DType,
    DTypeOption,
    NewTokensOption,
    fail,
    load_head,
    load_model,
    load_tokenizer,
    make_generator,
    reporting,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table
    from tokenizers import Tokenizer

    from blockffn_compile.models.modeling import BlockFFNForCausalLM
    from blockffn_compile.speculative.generator import Generator
    from blockffn_compile.speculative.loop import Step

#: The row that sums up all categories.
OVERALL = "overall"


class Drafting(StrEnum):
    auto = "auto"
    eagle = "eagle"
    ngram = "ngram"


@dataclass(frozen=True)
class Question:
    """One line of a Spec-Bench file (arXiv 2401.07851)."""

    id: int | str
    category: str
    turns: list[str]


@dataclass(frozen=True)
class Answer:
    """One prompt's continuation."""

    tokens: list[int]
    seconds: float
    steps: list[Step]


@dataclass
class Tally:
    """Sums over the prompts of a category."""

    prompts: int = 0
    tokens: int = 0
    steps: int = 0  # of speculative decoding, without the prompts' own
    step_tokens: int = 0
    nodes: int = 0
    plain_s: float = 0.0
    speculative_s: float = 0.0
    same: bool = True

    def add(self, plain: Answer, speculative: Answer) -> None:
        self.prompts += 1
        self.tokens += len(plain.tokens)
        for step in speculative.steps[1:]:
            self.steps += 1
            self.step_tokens += len(step.tokens)
            self.nodes += step.nodes
        self.plain_s += plain.seconds
        self.speculative_s += speculative.seconds
        self.same &= plain.tokens == speculative.tokens

    @property
    def accepted(self) -> float:
        """Mean accepted length: tokens a step, without each prompt's first token."""
        return self.step_tokens / self.steps if self.steps else 0.0

    @property
    def tree(self) -> float:
        """Mean number of nodes verified in a step."""
        return self.nodes / self.steps if self.steps else 0.0

    @property
    def speedup(self) -> float:
        return self.plain_s / self.speculative_s


def specbench(
    file: Annotated[Path, typer.Argument(help="Spec-Bench style questions, one JSON a line.")],
    checkpoint: CheckpointArgument = None,
    speculate: Annotated[Drafting, typer.Option(help="Who drafts.")] = Drafting.auto,
    max_new_tokens: NewTokensOption = 128,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each category.")] = None,
    drafter: DrafterOption = None,
    dtype: DTypeOption = DType.stored,
    record: Annotated[
        Path | None, typer.Option("--json", help="Write benchmark records into this file.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw it into this PNG file.")] = None,
) -> None:
    """Measure what drafting gains over plain sparse decoding, both greedy, and that it is lossless.

    Each line of FILE has `question_id`, `category` and `turns`; a later turn starts on a new line
    behind the answer to the one before. Times include the prompts. Exit code 1 if the two ways of
    decoding ever choose different tokens.

    Examples:

    - `blockffn specbench benchmarks/questions.jsonl`

    - `blockffn specbench question.jsonl path/to/checkpoint --speculate eagle --limit 10`

    - `blockffn specbench benchmarks/questions.jsonl --json records.json --plot specbench.png`
    """
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    questions = read_questions(file, limit)
    model, tokenizer = load_model(checkpoint, dtype), load_tokenizer(checkpoint)
    context = model.config.max_position_embeddings
    room = context - max_new_tokens
    if room < 1:
        fail(f"--max-new-tokens {max_new_tokens} leaves no room in the context of {context}")
    head = None
    if speculate is not Drafting.ngram:
        head = load_head(checkpoint, drafter, model)
    with reporting(ValueError):
        fast = make_generator(model, speculate, head, context)
    plain = make_generator(model, "off", None, context)
    for generator in (plain, fast):  # the prompts' graph compiles at their first call
        answer(generator, [0, 0], 2)

    console = Console()
    comparison = Comparison()
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        for question in progress.track(questions, description="answering"):
            comparison.ask(question, plain, fast, tokenizer, room, max_new_tokens)

    tallies = comparison.tallies
    console.print(tabulate(tallies, speculate))
    if comparison.shortened:
        note = f"of {comparison.shortened} prompts only the last {room} tokens fit the context"
        console.print(f"note: {note}", style="dim")
    if record is not None:
        write_records(record, file, tallies, model, speculate)
        console.print(f"records written to {record}")
    if plot is not None:
        draw(tallies, speculate, plot)
        console.print(f"plot written to {plot}")
    if comparison.differing:
        different = ", ".join(map(str, comparison.differing))
        console.print(f"the tokens differ in questions: {different}", style="red")
        raise typer.Exit(1)


def answer(generator: Generator, prompt: Sequence[int], max_new_tokens: int) -> Answer:
    """Continues a prompt greedily, up to the end-of-text token."""
    stop_tokens = generator.engine.model.config.stop_tokens
    start = time.perf_counter()
    steps = list(generator([prompt], max_new_tokens, stop_tokens=stop_tokens))
    seconds = time.perf_counter() - start
    tokens = [token for step in steps for token in step.tokens]
    return Answer(tokens, seconds, steps)


@dataclass
class Comparison:
    """Both ways of decoding on the same prompts.

    Attributes:
        shortened: how many prompts were too long, and lost their beginning.
        differing: ids of the questions that they answered differently.
    """

    shortened: int = 0
    differing: list[int | str] = field(default_factory=list)
    _categories: dict[str, Tally] = field(default_factory=dict)
    _overall: Tally = field(default_factory=Tally)

    def ask(
        self,
        question: Question,
        plain: Generator,
        fast: Generator,
        tokenizer: Tokenizer,
        room: int,
        max_new_tokens: int,
    ) -> None:
        """Answers all turns of a question; of a prompt, the last ``room`` tokens are kept."""
        text: list[int] = []
        same = True
        for i, turn in enumerate(question.turns):
            part = turn if i == 0 else "\n" + turn
            text += tokenizer.encode(part, add_special_tokens=i == 0).ids
            if not text:
                fail(f"question {question.id} has no tokens in this model's vocabulary")
            self.shortened += len(text) > room
            one, other = (answer(way, text[-room:], max_new_tokens) for way in (plain, fast))
            self._categories.setdefault(question.category, Tally()).add(one, other)
            self._overall.add(one, other)
            same &= one.tokens == other.tokens
            text += one.tokens
        if not same:
            self.differing.append(question.id)

    @property
    def tallies(self) -> dict[str, Tally]:
        """By category, and of all of them together."""
        return self._categories | {OVERALL: self._overall}


def tabulate(tallies: dict[str, Tally], speculate: Drafting) -> Table:
    from rich.table import Table

    speeds = ("plain\ntokens/s", f"{speculate}\ntokens/s", "speedup")
    table = Table("category", "prompts", *speeds, "accepted\nlength", "tree\nsize", "same")
    for name, tally in tallies.items():
        if name == OVERALL:
            table.add_section()
        table.add_row(
            name,
            str(tally.prompts),
            f"{tally.tokens / tally.plain_s:.1f}",
            f"{tally.tokens / tally.speculative_s:.1f}",
            f"{tally.speedup:.2f}x",
            f"{tally.accepted:.2f}",
            f"{tally.tree:.1f}",
            "yes" if tally.same else "no",
        )
    return table


def read_questions(file: Path, limit: int | None) -> list[Question]:
    """The questions of a file, at most ``limit`` of each category; there is at least one."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        fail(f"{file}: {reason}; give a file of questions, one JSON object a line")
    questions: list[Question] = []
    seen = Counter[str]()
    # Not splitlines: JSON strings may hold other line separators.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        question = parse_question(line, f"{file}: line {number}")
        seen[question.category] += 1
        if limit is None or seen[question.category] <= limit:
            questions.append(question)
    if not questions:
        fail(f"{file}: has no questions; give one JSON object a line")
    return questions


def parse_question(line: str, where: str) -> Question:
    try:
        fields = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        fail(f"{where}: not JSON: {error}")
    if not isinstance(fields, dict):
        fail(f"{where}: is {json.dumps(fields)[:40]}, not a JSON object")
    identity, category, turns = (fields.get(k) for k in ("question_id", "category", "turns"))
    if not isinstance(identity, int | str):
        fail(f"{where}: question_id must be a number or a string, got {identity!r}")
    if not isinstance(category, str) or category in ("", OVERALL):
        fail(f"{where}: category must be a string, not empty nor {OVERALL!r}, got {category!r}")
    texts = isinstance(turns, list) and all(isinstance(turn, str) and turn for turn in turns)
    if not turns or not texts:
        fail(f"{where}: turns must be a list of strings, none empty, got {turns!r}")
    return Question(identity, category, turns)


def write_records(
    path: Path,
    file: Path,
    tallies: dict[str, Tally],
    model: BlockFFNForCausalLM,
    speculate: Drafting,
) -> None:
    """Writes a benchmark record for each category; milliseconds are per new token."""
    records: list[dict[str, Any]] = [
        {
            "work": f"{file.name}: {name}",
            "prompts": tally.prompts,
            "tokens": tally.tokens,
            "dtype": str(model.lm_head.weight.dtype).removeprefix("torch."),
            "subject": f"speculate={speculate}",
            "peer": "speculate=off",
            "subject_ms": tally.speculative_s * 1e3 / max(tally.tokens, 1),
            "peer_ms": tally.plain_s * 1e3 / max(tally.tokens, 1),
            "ratio": tally.speedup,
            "accepted_length": tally.accepted,
            "tree_size": tally.tree,
            "gate": tally.same,
        }
        for name, tally in tallies.items()
    ]
    try:
        path.write_text(json.dumps(records, indent=2) + "\n")
    except OSError as error:
        fail(f"{path}: {error.strerror}; choose another file for --json")


def draw(tallies: dict[str, Tally], speculate: Drafting, path: Path) -> None:
    """Plots tokens/s of both ways for each category, with the speedup above."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        fail("--plot needs matplotlib; pip install 'blockffn-compile[plots]'")

    figure = Figure(figsize=(max(4.0, 1.5 + 1.2 * len(tallies)), 4), layout="constrained")
    axes = figure.add_subplot(ylabel="tokens/s")
    places = range(len(tallies))
    plain = [tally.tokens / tally.plain_s for tally in tallies.values()]
    fast = [tally.tokens / tally.speculative_s for tally in tallies.values()]
    axes.bar([i - 0.2 for i in places], plain, 0.4, color="0.75", label="plain")
    bars = axes.bar(
        [i + 0.2 for i in places], fast, 0.4, color="C0", label=f"drafted ({speculate})"
    )
    axes.bar_label(bars, [f"{tally.speedup:.2f}x" for tally in tallies.values()])
    axes.set_xticks(places, labels=list(tallies), rotation=20 if len(tallies) > 5 else 0)
    axes.margins(y=0.15)
    axes.legend()
    try:
        figure.savefig(path, dpi=150, format="png")
    except OSError as error:
        fail(f"{path}: {error.strerror}; choose another file for --plot")
