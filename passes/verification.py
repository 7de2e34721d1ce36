"""What adapters report and check in the same way."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from blockffn_compile.passes.recognizer import BlockFFNMatch, Result

#: Why a layer that :func:`placeable` refuses is declined.
SIZES = "the token axes of the output are symbolic and cannot be read off those of the input"

log = logging.getLogger("blockffn_compile")

#: Largest error of a verified rewrite, relative to the largest output, by element type.
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}


class VerificationError(RuntimeError):
    """A rewritten layer computes something else than the original one."""


@dataclass(frozen=True)
class QuantisedMatch(BlockFFNMatch):
    """A layer that was rewritten with weights of fewer bits.

    Attributes:
        weights: their type.
        error: largest difference of an output on random inputs, relative to the largest output.
    """

    weights: str
    error: float


def placeable(match: BlockFFNMatch) -> bool:
    """Whether the shape of the output can be told: all its sizes but one, or from those of x."""
    symbolic = [size for size in match.output.value.shape if not isinstance(size, int)]
    return len(symbolic) <= 1 or set(symbolic) <= set(match.x.value.shape)


def log_results(results: Iterable[Result]) -> None:
    for result in results:
        if isinstance(result, BlockFFNMatch):
            log.info("%s: rewritten: %s, scores: %s", result.name, result.spec, result.router)
        else:
            log.info("%s: declined: %s", result.name, result.reason)


def check_error(match: BlockFFNMatch, error: float, evidence: str) -> None:
    """Compares the error of a rewrite, relative to the largest output, with the tolerance.

    Args:
        evidence: what a report of the failure should come with.

    Raises:
        VerificationError: it is too large, or NaN; the message names the layer and the error.
    """
    limit = TOLERANCE[match.x.value.dtype]
    if not error <= limit:
        raise VerificationError(
            f"{match.name}: the rewritten layer differs from the original one by {error:.2e} of "
            f"its largest output (allowed: {limit:.0e}); please report it with {evidence}"
        )
