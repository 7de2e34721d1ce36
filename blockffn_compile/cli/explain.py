"""``blockffn explain``: which layers the backend rewrites, and why not the others."""

from __future__ import annotations

from blockffn_compile.cli.common import CheckpointArgument, load_model


def explain(checkpoint: CheckpointArgument = None) -> None:
    """Show for each layer what was recognised, or why it was declined.

    Examples:

    - `blockffn explain`

    - `blockffn explain path/to/checkpoint`
    """
    import torch
    from rich.console import Console
    from rich.table import Table

    from blockffn_compile.explain import explain as explain_model

    model = load_model(checkpoint)
    report = explain_model(model, torch.zeros(1, 8, dtype=torch.long))
    table = Table("layer", "status", "what, or why not")
    for layer in report.layers:
        style = "green" if layer.status == "rewritten" else "yellow"
        table.add_row(layer.name, f"[{style}]{layer.status}[/]", layer.description)
    console = Console()
    console.print(table)
    rewritten = sum(layer.status == "rewritten" for layer in report.layers)
    console.print(f"{rewritten} of {len(report.layers)} layers rewritten")
