"""Weights of a model as small integers: less to read, for a bounded rounding of the weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from blockffn_compile import ops, step_ops  # noqa: F401  register the operators
from blockffn_compile.layer import BlockFFN, Quantisation, Scheme
from blockffn_compile.schedules.quantisation import EXACT, as_quantisation, quantised, stays

log = logging.getLogger("blockffn_compile")

Model = TypeVar("Model", bound=nn.Module)


class Dequantize(nn.Module):
    """A parametrisation: the weight that integers and scales stand for."""

    def __init__(self, quantisation: Quantisation, dtype: torch.dtype) -> None:
        super().__init__()
        self.quantisation, self.dtype = quantisation, dtype

    def forward(self, values: Tensor, scales: Tensor) -> Tensor:
        if scales.dtype != torch.bfloat16:
            raise ValueError(f"scales are {scales.dtype}; give the model its dtype, then quantise")
        weight: Tensor = torch.ops.blockffn.dequantize(values, scales, self.dtype)
        return weight

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return quantised(weight, self.quantisation)


def quantize(model: Model, scheme: Scheme, group: int = 32, skip: Sequence[str] = EXACT) -> Model:
    """Stores the weights of linear layers and experts as integers, in place.

    A group of weights along the summed axis shares a scale.  The sums stay in floating point: the
    result is that of a model whose weights are the rounded ones.  Compiled with
    ``backend="blockffn"`` on a CPU, kernels read the integers; everywhere else the weights are
    computed from them for each call, which is slow but the same; so are they where gradients are
    needed: run the model under ``torch.no_grad()``.  Inputs above 1e34 may overflow in the kernels.

    Args:
        model: for inference, in the dtype that it is to have; its weights finite.
        scheme: ``int8`` (8.5 bits a weight with the default group) or ``int4`` (4.5 bits).
        group: weights to a scale, a multiple of 32.  Weights that it does not divide stay.
        skip: parts of the names of weights that stay.  Which experts run is decided by the router,
            whose weights are few.

    Returns:
        The model.

    Raises:
        ValueError: an unknown scheme or group, a weight is quantised already or not finite, or
            there is nothing to quantise.
    """
    quantisation = as_quantisation(scheme, group)
    places = [place for place in _places(model) if not stays(place.name, skip)]
    for place in places:
        if parametrize.is_parametrized(place.module, place.attribute):
            raise ValueError(f"{place.name} is parametrised already; quantise a model once")
        if not torch.isfinite(place.weight).all():
            raise ValueError(f"{place.name} has weights that are not finite")
    fitting = [place for place in places if all(depth % group == 0 for depth in place.depths)]
    if not fitting:
        raise ValueError(f"the model has no weights whose summed axis groups of {group} divide")
    for place in places:
        if place not in fitting:
            depths = " and ".join(map(str, place.depths))
            log.warning("%s stays as it is: groups of %d do not divide %s", place[0], group, depths)
    for place in fitting:
        dtype = place.weight.requires_grad_(False).dtype
        parametrize.register_parametrization(
            place.module, place.attribute, Dequantize(quantisation, dtype)
        )
    return model


def is_quantised(model: nn.Module) -> bool:
    """Whether :func:`quantize` was there."""
    return any(isinstance(module, Dequantize) for module in model.modules())


class _Place(NamedTuple):
    """A weight of a model, and how many terms it is summed over, or any that goes with it is."""

    name: str
    module: nn.Module
    attribute: str
    depths: tuple[int, ...]

    @property
    def weight(self) -> Tensor:
        weight: Tensor = getattr(self.module, self.attribute)
        return weight


def _places(model: nn.Module) -> Iterator[_Place]:
    for path, module in model.named_modules():
        attributes: list[str] = []
        depths: tuple[int, ...] = ()
        if isinstance(module, nn.Linear):
            attributes, depths = ["weight"], (module.in_features,)
        elif isinstance(module, BlockFFN):
            attributes = ["up_proj", "down_proj", *(["gate_proj"] if module.spec.gated else [])]
            depths = module.spec.hidden_size, module.spec.expert_size
        for attribute in attributes:
            yield _Place(f"{path}.{attribute}".lstrip("."), module, attribute, depths)
