from __future__ import annotations

import pytest

from blockffn_compile.training import corpus

WORDS = [
    "def",
    "class",
    "return",
    "import",
    "for",
    "in",
    "if",
    "else",
    "self",
    "None",
    "with",
    "as",
]


@pytest.fixture
def tiny_corpus(monkeypatch) -> None:
    """Some thousand tokens of made-up text in place of the standard library."""

    def texts(held_out: bool) -> list[str]:
        step = 7 if held_out else 3
        return [
            " ".join(WORDS[(step * i * i + n * i) % len(WORDS)] for i in range(400))
            for n in range(2 if held_out else 6)
        ]

    monkeypatch.setattr(corpus, "texts", texts)
