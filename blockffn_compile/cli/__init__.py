"""The ``blockffn`` command. One module a command; each loads PyTorch only when it runs."""

import typer

from blockffn_compile.cli import (
    compile,
    demo,
    explain,
    export,
    generate,
    rewrite,
    run,
    sparsity,
    specbench,
    train,
    train_drafter,
)

app = typer.Typer(
    name="blockffn",
    help="Run, inspect and train BlockFFN models with the sparse compiler backend.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
app.command()(demo.demo)
app.command()(generate.generate)
app.command()(explain.explain)
app.command()(export.export)
app.command()(rewrite.rewrite)
app.command("compile")(compile.compile_bundle)
app.command()(run.run)
app.command()(sparsity.sparsity)
app.command()(specbench.specbench)
app.command()(train.train)
app.command()(train_drafter.train_drafter)


def main() -> None:
    """Entry point of the console script."""
    app()
