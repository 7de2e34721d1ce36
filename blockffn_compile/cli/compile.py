"""``blockffn compile``: a checkpoint as a bundle that runs without PyTorch."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from blockffn_compile.cli.common import (
    CheckpointArgument,
    DType,
    DTypeOption,
    GroupOption,
    QuantizeOption,
    checkpoint_path,
    reporting,
)


class TargetName(StrEnum):
    native = "native"
    x86_64_v3 = "x86-64-v3"
    x86_64_v4 = "x86-64-v4"
    arm64 = "arm64"
    arm64_bf16 = "arm64-bf16"
    cuda_sm87 = "cuda-sm87"
    cuda_sm90 = "cuda-sm90"


def compile_bundle(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The bundle to write.")],
    checkpoint: CheckpointArgument = None,
    target: Annotated[
        TargetName, typer.Option(help="What it runs on; native is exactly this CPU.")
    ] = TargetName.native,
    dtype: DTypeOption = DType.stored,
    quantize: QuantizeOption = None,
    group: GroupOption = 32,
) -> None:
    """Compile a checkpoint with TVM to a bundle: native code, packed weights, tokenizer.

    A bundle runs with `blockffn run`, which needs TVM and NumPy but no PyTorch, or from C++. Its
    kernels run only the experts that are on. Code for Arm is linked by aarch64-linux-gnu-g++;
    arm64-bf16 is for Arm CPUs with bf16 instructions, which it uses in bfloat16. The targets
    cuda-sm87 (Jetson Orin) and cuda-sm90 (H100 in an x86-64 machine) need no GPU to build, and
    `pip install blockffn-compile[cuda]`.

    Examples:

    - `blockffn compile -o bundle`

    - `blockffn compile path/to/checkpoint --target arm64 --dtype bfloat16 -o bundle`

    - `blockffn compile path/to/checkpoint --target arm64 --quantize int4 -o bundle`
    """
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("loading", total=None)
        import torch

        from blockffn_compile.aot.compiler import build

        # CheckpointError is a ValueError, too.
        with reporting(ValueError, RuntimeError):
            build(
                checkpoint_path(checkpoint),
                target,
                out,
                dtype=None if dtype is DType.stored else getattr(torch, dtype),
                quantize=quantize.value if quantize else None,
                group=group,
                progress=lambda stage, done, total: bar.update(
                    task, description=stage, completed=done, total=total if done else None
                ),
            )
    size = sum(file.stat().st_size for file in out.iterdir())
    console.print(
        f"{out}: {size / 1e6:.1f} MB for {target}; run it: blockffn run {out} --prompt ..."
    )
