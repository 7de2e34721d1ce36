"""Finds BlockFFN layers in a graph and proves that they are what they look like.

A layer is one sum of products over named axes (T tokens, H hidden, E experts, S expert size):

    y[t, h] = sum_es  act(sum_k x[t, k] up[e, s, k]) * scores[t, e] * down[e, s, h]

A gated layer has ``act(sum_k x[t, k] gate[e, s, k])`` and one more factor,
``sum_k x[t, k] up[e, s, k]``.  The recogniser starts at every activation of a contraction and
follows the product forward, whatever the order and spelling of its multiplications and sums, until
the axes that the activation got from its weight are summed away.  What then stands there is
compared with the formula axis by axis: which axes are E, S and H, and that every factor depends on
those it may depend on and on no other.  The scores, finally, must have provable zeros
(:mod:`blockffn_compile.passes.zeros`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import get_args

from blockffn_compile.layer import Activation, BlockFFNSpec
from blockffn_compile.passes.products import Contraction, Product, contraction, starts, step
from blockffn_compile.passes.view import (
    TRANSPARENT,
    Axis,
    Dims,
    Factor,
    Value,
    ancestors,
    flat,
    leaves,
    strip,
)
from blockffn_compile.passes.zeros import Router, router, zeros

#: Operations followed from one activation before giving up; a layer has about ten.
MAX_STEPS = 1000

#: Element types that the fused operation takes.
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Matrix:
    """How a value is read as a matrix: ``permute(perm)``, then ``reshape(shape)``.

    Attributes:
        value: in the graph, of any rank.
        perm: order of its dimensions, those of the rows first.
        shape: -1 stands for the tokens; 1 where the value does not depend on an axis.
    """

    value: Value
    perm: tuple[int, ...]
    shape: tuple[int, int]


@dataclass(frozen=True)
class BlockFFNMatch:
    """A proved BlockFFN layer.

    Attributes:
        name: path of the module it came from, or ``layer N``.
        spec: what it computes.  For a router other than the published ones ``spec.norm`` is
            ``none``; ``router`` says what it is.
        router: what makes the scores sparse and how they are normalised, in words.
        x: [T, H].
        scores: their product is [T, E]; the first one alone has that shape.
        scale: a number that multiplies the scores.
        w_up: an input or constant of the graph, laid out as ``up_axes`` says.
        w_down: the same, laid out as ``down_axes`` says.
        w_gate: the weight inside the activation of a gated layer, laid out like ``w_up``.
        up_axes: stored dimensions of ``w_up``, separated by commas: ``e,s,h``, or ``es,h`` when
            E and S are merged into one dimension, row-major.
        down_axes: the same for ``w_down``: ``e,h,s``, ``h,es``, ...
        output: [T, H], what the fused operation replaces.
    """

    name: str
    spec: BlockFFNSpec
    router: str
    x: Matrix
    scores: tuple[Matrix, ...]
    scale: float
    w_up: Value
    w_down: Value
    w_gate: Value | None
    up_axes: str
    down_axes: str
    output: Matrix

    @property
    def operands(self) -> tuple[Value, ...]:
        """Everything that the fused operation reads."""
        gate = () if self.w_gate is None else (self.w_gate,)
        return (self.x.value, *(m.value for m in self.scores), self.w_up, self.w_down, *gate)


@dataclass(frozen=True)
class Declined:
    """A layer that looks like BlockFFN but stays as it is.

    Attributes:
        name: as in :class:`BlockFFNMatch`.
        reason: one clause that a person can act on.
    """

    name: str
    reason: str


Result = BlockFFNMatch | Declined


class _DeclineError(Exception):
    """Carries the reason once a computation is known to look like a BlockFFN layer."""


@dataclass(frozen=True)
class _LoneExpert:
    """One expert of a layer that computes its experts one at a time.

    Attributes:
        scores: all experts' scores, of which this expert takes a column.
        size: its expert size.
    """

    scores: Value
    size: int


def _ordered(axes: Iterable[Axis], dims: Dims) -> tuple[Axis, ...]:
    wanted = frozenset(axes)
    return tuple(axis for axis in flat(dims) if axis in wanted)


def _size(axes: tuple[Axis, ...]) -> int:
    size = 1
    for axis in axes:
        if not isinstance(axis.size, int):
            raise _DeclineError("the sizes of the experts are not known when compiling")
        size *= axis.size
    return size


def _letters(dims: Dims, **groups: tuple[Axis, ...]) -> str:
    """``dims`` in letters, one for each group of axes: ``e,s,h``, ``es,h``."""
    words = []
    for dim in dims:
        rest, word = leaves(dim), ""
        while rest:
            fits = (g for g, axes in groups.items() if axes and rest[: len(axes)] == axes)
            letter = next(fits, None)
            if letter is None:
                raise _DeclineError("a weight is stored in a layout other than permuted e, s and h")
            word, rest = word + letter, rest[len(groups[letter]) :]
        words.append(word)
    if not all(words):
        raise _DeclineError("a weight is stored with a dimension of size one")
    return ",".join(words)


def _matrix(factor: Factor, rows: tuple[Axis, ...], columns: tuple[Axis, ...]) -> Matrix:
    """The plainest reading of ``factor`` as a matrix [rows, columns]."""
    rows, columns = (tuple(a for a in axes if a in factor.axes) for axes in (rows, columns))
    shape = (-1 if rows else 1, _size(columns))
    readings = []
    for value, dims in factor.path:
        if frozenset(flat(dims)) != factor.axes or value.source is None:
            continue  # it repeats elements along an axis that is neither, or is not in the graph
        top = [i for i, dim in enumerate(dims) if not set(leaves(dim)) & set(columns)]
        perm = top + [i for i in range(len(dims)) if i not in top]
        if flat(tuple(dims[i] for i in perm)) == rows + columns:
            readings.append(Matrix(value, tuple(perm), shape))
    if not readings:
        raise _DeclineError("tokens are ordered differently in the input, the scores or the output")
    dtype = readings[0].value.dtype
    return min(
        readings,
        key=lambda m: (m.value.dtype != dtype, list(m.perm) != sorted(m.perm), len(m.perm) != 2),
    )


def _weight(factor: Factor, role: str) -> tuple[Value, Dims]:
    """The stored tensor behind a weight and its axes."""
    value, dims = next((step for step in factor.path if step[0].op == "cast"), factor.path[-1])
    if value.op not in ("input", "constant"):
        how = "a cast" if value.op == "cast" else value.name or value.op
        raise _DeclineError(
            f"weights are computed in the graph ({role} projection: {how}); store them in the "
            "form that the layer uses"
        )
    return value, dims


@dataclass(frozen=True)
class _Layer:
    """A product that has the form of a BlockFFN layer.

    Attributes:
        at: the product.
        x: input of the projections.
        up: weight inside the activation.
        down: weight of the down projection.
        gate: the second projection of a gated layer.
        scores: what depends on tokens and experts alone.
        t, e, s, h: the axes; ``o`` are those of the output that are not tokens.
    """

    at: Product
    x: Factor
    up: Factor
    down: Factor
    gate: Contraction | None
    scores: tuple[Factor, ...]
    t: frozenset[Axis]
    e: frozenset[Axis]
    s: frozenset[Axis]
    h: frozenset[Axis]
    o: frozenset[Axis]


def _as_layer(at: Product, weight: int) -> _Layer | None:
    """Compares a finished product with the formula, axis by axis."""
    up, x, h = at.up.factors[weight], at.up.factors[1 - weight], at.up.inner
    experts, t = up.axes - h, x.axes - h
    o = frozenset(flat(at.dims)) - t
    down = [f for f in at.factors if f.axes & o]
    others = [f for f in at.factors if not f.axes & o]
    gates, scores = [], []
    for factor in others:
        second = contraction(factor.root, factor.dims) if factor.axes >= experts else None
        if second is None:
            scores.append(factor)
        else:
            gates.append(second)
    if (
        experts & t
        or not h <= up.axes & x.axes
        or experts != frozenset(leaves(at.summed))
        or [f.axes for f in down] != [experts | o]
        or any(f.axes - t - experts for f in others)
        or len(gates) > 1
        or not scores
    ):
        return None
    e = frozenset(axis for f in scores for axis in f.axes & experts)
    gate = gates[0] if gates else None
    return _Layer(at, x, up, down[0], gate, tuple(scores), t, e, experts - e, h, o)


def _lone_expert(layer: _Layer) -> _LoneExpert | None:
    for factor in layer.scores:
        if factor.root.op == "slice":
            column = strip(factor.root.inputs[0])
            if zeros(column).proved:
                return _LoneExpert(column, _size(tuple(layer.s)))
    return None


def _prove(layer: _Layer) -> BlockFFNMatch | None:
    """The match, once everything that the axes do not say has been checked.

    Raises:
        _DeclineError: it is a layer with routing scores, but not one that can be rewritten.
    """
    at = layer.at
    proofs = [
        (zeros(*f.path[0], over=layer.e), f)
        for f in sorted(layer.scores, key=lambda f: not f.axes & layer.e)
    ]
    proof, main = next((p for p in proofs if p[0].proved), proofs[0])
    if not layer.s:
        if proof.proved and any(f.root.op == "gather" for f in layer.scores):
            raise _DeclineError("experts have unequal sizes: scores are gathered column by column")
        return None
    if not proof.proved:
        raise _DeclineError(proof.text)

    w_up, up_dims = _weight(layer.up, "up")
    w_down, down_dims = _weight(layer.down, "down")
    t, h = _ordered(layer.t, layer.x.dims), _ordered(layer.h, layer.x.dims)
    e, s = _ordered(layer.e, up_dims), _ordered(layer.s, up_dims)
    o = _ordered(layer.o, down_dims)
    up_axes, down_axes = _letters(up_dims, e=e, s=s, h=h), _letters(down_dims, e=e, s=s, h=o)
    w_gate = None
    if layer.gate is not None:  # the weight inside the activation is the one called gate
        second, second_h = _second_projection(layer)
        w_gate, (w_up, up_dims) = w_up, _weight(second, "up")
        if _letters(up_dims, e=e, s=s, h=second_h) != up_axes:
            raise _DeclineError("gate and up projections are stored in different layouts")
    full = layer.t | layer.e
    ordered = sorted(layer.scores, key=lambda f: f.axes != full)
    if ordered[0].axes != full:
        raise _DeclineError("no factor of the scores depends on both token and expert")

    if at.value.source is None:
        raise _DeclineError("the down projection has a bias")
    if at.problems:
        raise _DeclineError(at.problems[0])
    if at.act not in get_args(Activation):
        name = "the tanh approximation of GELU" if at.act == "gelu_tanh" else at.act
        raise _DeclineError(
            f"the activation is {name}, not one of {', '.join(get_args(Activation))}"
        )
    if _size(o) != _size(h):
        raise _DeclineError("the output is not as wide as the input")

    norm = router(main.path[0][0])
    known = norm or Router()
    spec = BlockFFNSpec(
        hidden_size=_size(h),
        num_experts=_size(e),
        expert_size=_size(s),
        layout="block" if up_axes.count(",") == 2 else "block_linear",
        norm=known.norm,
        act=at.act,  # type: ignore[arg-type]
        gated=w_gate is not None,
        norm_scale=known.norm_scale,
        eps=known.eps,
    )
    described = {"none": "", "sum": ", sum norm", "rms": ", rms norm"}[known.norm]
    match = BlockFFNMatch(
        name=_scope(at),
        spec=spec,
        router=proof.text + (described if norm else ", another norm"),
        x=_matrix(layer.x, t, h),
        scores=tuple(_matrix(f, t, e) for f in ordered),
        scale=at.scale,
        w_up=w_up,
        w_down=w_down,
        w_gate=w_gate,
        up_axes=up_axes,
        down_axes=down_axes,
        output=_matrix(Factor(((at.value, at.dims),)), t, o),
    )
    dtypes = {v.dtype for v in (match.x.value, w_up, w_down, w_gate) if v is not None}
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        found, needed = ", ".join(sorted(dtypes)), ", ".join(DTYPES)
        raise _DeclineError(f"the input and the weights are {found}; one of {needed} is needed")
    _check_users(match, layer)
    return match


def _second_projection(layer: _Layer) -> tuple[Factor, tuple[Axis, ...]]:
    """Weight of the projection outside the activation and its axes of H, ordered as in x."""
    gate, x, t = layer.gate, layer.x, layer.t
    assert gate is not None
    for weight, other in (gate.factors, gate.factors[::-1]):
        if (
            other.root is x.root
            and other.axes == t | gate.inner
            and gate.inner <= weight.axes
            and [_ordered(t, (d,)) for d in other.dims] == [_ordered(t, (d,)) for d in x.dims]
        ):
            return weight, _ordered(gate.inner, other.dims)
    raise _DeclineError("gate and up projections read different inputs")


def _check_users(match: BlockFFNMatch, layer: _Layer) -> None:
    """Whether all that the rewrite makes superfluous is used by this layer alone."""
    output = layer.at.value
    region = ancestors(output, frozenset(match.operands))
    projections = {layer.at.up.value, layer.gate.value if layer.gate else None}
    inside = set(region)
    intermediate: set[Value] = set()
    for value in region:
        if value in projections or intermediate.intersection(value.inputs):
            intermediate.add(value)
    for value in intermediate - {output}:
        if not inside.issuperset(value.users):
            raise _DeclineError("the intermediate activations have a second user")


def _scope(at: Product) -> str:
    """The innermost module that holds both the first projection and the output."""
    common = ""
    for a, b in zip(at.up.value.scope, at.value.scope, strict=False):
        if a != b:
            break
        common = a
    return common


def recognise(values: Sequence[Value]) -> list[Result]:
    """Finds all BlockFFN layers and near misses.

    Args:
        values: the graph, operands before users, its outputs included (op ``output``).

    Returns:
        One result per layer, in the order of the graph.
    """
    found: dict[Value, BlockFFNMatch | Declined] = {}
    lone: dict[Value, dict[Value, tuple[str, int]]] = {}
    for start in starts(values):
        stack = [(start, False)]
        for _ in range(MAX_STEPS):
            if not stack:
                break
            at, finished = stack.pop()
            weight = at.weight()
            layer = None if weight is None else _as_layer(at, weight)
            if layer is not None:
                try:
                    if not layer.e:
                        expert = _lone_expert(layer)
                        if expert is not None:
                            experts = lone.setdefault(expert.scores, {})
                            experts[at.value] = (_scope(at), expert.size)
                    elif (match := _prove(layer)) is not None:
                        found[at.value] = match
                except _DeclineError as declined:
                    found.setdefault(at.value, Declined(_scope(at), str(declined)))
                continue
            finished |= weight is not None
            for user in at.value.users:
                if not finished or user.op in TRANSPARENT or user.op == "mul":
                    following = step(at, user)
                    if following is not None:
                        stack.append((following, finished))
    for experts in lone.values():
        name, _ = next(iter(experts.values()))
        sizes = sorted({size for _, size in experts.values()})
        reason = (
            f"experts have unequal sizes ({', '.join(map(str, sizes))})"
            if len(sizes) > 1
            else "experts are computed one at a time; stack their weights to [E, S, H]"
        )
        found[next(reversed(experts))] = Declined(name, reason)
    order = {value: i for i, value in enumerate(values)}
    results = [found[value] for value in sorted(found, key=order.__getitem__)]
    return [
        result if result.name else dataclasses.replace(result, name=f"layer {i}")
        for i, result in enumerate(results)
    ]
