from __future__ import annotations

import re


def test_completes_and_compares(blockffn, checkpoint) -> None:
    options = ["--prompt", "def add(a, b):", "--max-new-tokens", 24, "--repeats", 1]
    result = blockffn("demo", checkpoint, *options)
    assert result.exit_code == 0, result.output
    output = result.stdout
    assert "def add(a, b):" in output
    assert re.search(r"layers rewritten\W+2 of 2", output)
    assert re.search(r"TLS\)\W+\d+\.\d %", output)
    assert re.search(r"CLS_8\)\W+\d+\.\d %", output)
    for backend in ("eager", "inductor", "blockffn"):
        assert re.search(rf"{backend}, tokens/s\W+\d+  \(\d+\.\d\dx eager\)", output)
    assert re.search(r"same tokens\W+yes, 24 of 24", output)


def test_missing_checkpoint(refused, tmp_path) -> None:
    assert "no such directory" in refused("demo", tmp_path / "absent")
