"""The training text: sources of the Python standard library that runs this process."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"

#: Folders that not every installation has, or that hold tables rather than programs.
EXCLUDED = {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data",
    "__pycache__", "lib2to3", "turtledemo",
}  # fmt: skip
HELD_OUT_PERCENT = 5


def is_held_out(relative_path: str) -> bool:
    """Whether a file belongs to the held-out text; depends on its path alone."""
    digest = hashlib.sha256(relative_path.encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


def source_files() -> list[tuple[str, Path]]:
    """(path relative to the library, file), sorted, for every source used."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(
        (path.relative_to(root).as_posix(), path)
        for path in root.rglob("*.py")
        if not EXCLUDED.intersection(path.relative_to(root).parts)
    )


def texts(held_out: bool) -> Iterator[str]:
    """Source texts of one side of the split."""
    for name, path in source_files():
        if is_held_out(name) == held_out:
            yield path.read_text(encoding="utf-8", errors="replace")


def train_tokenizer(vocab_size: int = 4096) -> Tokenizer:
    """Byte-level BPE over the held-in text; digits and runs of spaces stay separable."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(held_out=False), trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, held_out: bool) -> np.ndarray:
    """All tokens of one side of the split, uint16, documents separated by END_OF_TEXT."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    assert end is not None
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(list(texts(held_out))):
        ids += [*encoding.ids, end]
    return np.asarray(ids, dtype=np.uint16)
