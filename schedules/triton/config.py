"""Launch configurations: tuned ones by GPU and shape, safe ones by architecture.

``schedules/tuned/`` has one JSON file a target: ``sm_90.json`` for an architecture, or a name like
``nvidia-h100-80gb-hbm3.json`` for a GPU that was tuned.  A file maps a shape (``default`` or the
name of :func:`shape_name`) to a table, and a table maps ``up 8`` to ``down 64``, ``prefill up`` and
``prefill down`` to the fields of :class:`Config`; the number is the most tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path

from blockffn_compile.schedules.plan import Problem

TUNED = Path(__file__).parents[1] / "tuned"
BUCKETS = (8, 16, 32, 64)
KERNELS = (*(f"{k} {n}" for k in ("up", "down") for n in BUCKETS), "prefill up", "prefill down")
#: Partial sums of an output in decode and chunk: a lane of the up projection has a part of H, a
#: lane of the down projection every eighth expert.  Each is one warp's chain of products.
LANES = 8
#: Kilobytes of shared memory that a program can have, by compute capability.  What is not here
#: is taken for the smallest.
SHARED = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}


@dataclass(frozen=True)
class Config:
    """How one kernel is launched.

    Attributes:
        tokens: tokens of a work item.
        rows: rows of weights of a work item, at least 16.
        depth: length of a product in the summed axis, at least 16.
        stages: software pipeline stages.  In the down projection a stage in two fetches the
            numbers of the experts, whose weights the other fetches.
        warps: LANES except in prefill.
        programs: most programs on a multiprocessor at once.  Where a program loops over work
            items, no more are launched.
    """

    tokens: int
    rows: int
    depth: int
    stages: int
    warps: int = LANES
    programs: int = 4

    @property
    def registers(self) -> int:
        """Most registers of a thread with which the programs are on a multiprocessor at once.

        Left to itself, the assembler aims for more programs than shared memory holds, and spills.
        """
        return min(255, 65536 // (32 * self.warps * self.programs) // 8 * 8)

    def options(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        return {
            "TOKENS": self.tokens,
            "ROWS": self.rows,
            "DEPTH": self.depth,
            "num_stages": self.stages,
            "num_warps": self.warps,
        }


Table = dict[str, Config]


@dataclass(frozen=True)
class Gpu:
    """What launches depend on.

    Attributes:
        table: configurations for the problem.
        processors: multiprocessors.
        cache: bytes of the level 2 cache.
        follows: whether a kernel is launched while the one before it still runs, and waits for it
            itself (programmatic dependent launch, from compute capability 9.0): the launch then
            takes no time of its own.
    """

    table: Table
    processors: int
    cache: int = 0
    follows: bool = False


def bucket(tokens: int) -> int:
    """The fewest tokens, of :data:`BUCKETS`, that a table has a configuration for."""
    return next(size for size in BUCKETS if size >= tokens)


def shape_name(problem: Problem) -> str:
    """``2048x128x128 bfloat16 gated``: H, E and S of a problem, its dtype and whether gated."""
    shape = f"{problem.hidden_size}x{problem.num_experts}x{problem.expert_size}"
    name = f"{shape} {str(problem.dtype).removeprefix('torch.')}"
    return f"{name} gated" if problem.gated else name


def gpu_name(name: str) -> str:
    """File name of a GPU: ``NVIDIA H100 80GB HBM3`` is ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def load_table(gpu: str, capability: tuple[int, int], problem: Problem) -> Table:
    """Configurations for a problem on a GPU.

    Args:
        gpu: its name, as the driver gives it.
        capability: its compute capability.
        problem: what to run.
    """
    tuned = _read(gpu_name(gpu)).get(shape_name(problem))
    if tuned is not None:
        return tuned
    file = "sm_{}{}".format(*capability)
    safe = _read(file) or _read("sm_86")
    limit = shared_bytes(capability)
    return {name: fit(name, c, problem, limit) for name, c in safe["default"].items()}


def shared_bytes(capability: tuple[int, int]) -> int:
    """Shared memory that a program can have."""
    return 1024 * SHARED.get(10 * capability[0] + capability[1], min(SHARED.values()))


@functools.cache
def _read(name: str) -> dict[str, Table]:
    path = TUNED / f"{name}.json"
    if not path.exists():
        return {}
    shapes = json.loads(path.read_text())
    return {
        shape: {kernel: Config(**fields) for kernel, fields in table.items()}
        for shape, table in shapes.items()
    }


def fit(name: str, config: Config, problem: Problem, limit: int) -> Config:
    """Cuts a configuration down to a problem and to ``limit`` bytes of shared memory."""
    outputs, summed = problem.expert_size, problem.hidden_size
    tiles, lanes = (2 if problem.gated else 1), LANES
    if "down" in name:
        outputs, summed, tiles = summed, outputs, 1
    if "prefill" in name:
        lanes = 1
    elif "up" in name:
        summed = -(-summed // lanes)
    rows, depth = (
        min(wanted, max(16, 1 << (axis - 1).bit_length()))
        for wanted, axis in ((config.rows, outputs), (config.depth, summed))
    )
    stage = 2 * lanes * depth * (tiles * rows + config.tokens)
    # One is filled while another is at work.
    while 2 * stage > limit and depth > 16:
        depth, stage = depth // 2, stage // 2
    # Stages but the one at work, or every other of them (see Config.stages), have a buffer.
    share = 2 if "down" in name else 1
    stages = min(config.stages, 1 + share * max(1, limit // stage))
    buffers = max(1, (stages - 1) // share) * stage
    programs = min(config.programs, max(1, limit // buffers))
    return dataclasses.replace(config, rows=rows, depth=depth, stages=stages, programs=programs)
