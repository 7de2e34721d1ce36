from __future__ import annotations

import numpy as np

from blockffn_compile.training import corpus


def test_the_split_depends_on_the_path_alone() -> None:
    """A file never changes sides: the figures of the bundled model rest on it."""
    held_out = ["ast.py", "email/parser.py", "typing.py", "xmlrpc/server.py"]
    held_in = ["argparse.py", "calendar.py", "json/decoder.py", "zipfile.py"]
    assert [name for name in held_out + held_in if corpus.is_held_out(name)] == held_out


def test_sources_are_sorted_programs_of_the_library() -> None:
    files = corpus.source_files()
    names = [name for name, _ in files]
    assert names == sorted(names)
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert not any("test" in name.split("/") or "site-packages" in name for name in names)
    share = sum(map(corpus.is_held_out, names)) / len(names)
    assert 0.02 < share < 0.08


def test_the_two_sides_share_no_text() -> None:
    inside, outside = (sum(1 for _ in corpus.texts(side)) for side in (False, True))
    assert inside + outside == len(corpus.source_files())


def test_tokenizer_and_encoding(tiny_corpus) -> None:
    tokenizer = corpus.train_tokenizer(300)
    text = "def größe(x):\n\treturn 'ж' + x\r\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.token_to_id(corpus.END_OF_TEXT) == 0
    tokens = corpus.encode(tokenizer, held_out=True)
    assert tokens.dtype == np.uint16
    documents = np.split(tokens, np.flatnonzero(tokens == 0) + 1)
    assert [tokenizer.decode(d[:-1].tolist()) for d in documents[:-1]] == list(corpus.texts(True))
    assert documents[-1].size == 0
