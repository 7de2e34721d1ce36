from __future__ import annotations


def test_shows_every_layer(blockffn, checkpoint) -> None:
    result = blockffn("explain", checkpoint)
    assert result.exit_code == 0, result.output
    rows = [line for line in result.stdout.splitlines() if "rewritten" in line]
    assert len(rows) == 3  # two layers and the summary
    assert "6 experts of 8, hidden 32, silu, block" in rows[0]
    assert rows[-1] == "2 of 2 layers rewritten"


def test_missing_checkpoint(refused, tmp_path) -> None:
    assert "no such directory" in refused("explain", tmp_path / "absent")
