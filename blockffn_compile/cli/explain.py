"""``blockffn explain``: which layers the backend rewrites, and why not the others."""

from __future__ import annotations

from blockffn_compile.cli.common import CheckpointArgument, load_model, show_report


def explain(checkpoint: CheckpointArgument = None) -> None:
    """Show for each layer what was recognised, or why it was declined.

    Examples:

    - `blockffn explain`

    - `blockffn explain path/to/checkpoint`
    """
    import torch

    from blockffn_compile.explain import explain as explain_model

    model = load_model(checkpoint)
    show_report(explain_model(model, torch.zeros(1, 8, dtype=torch.long)))
