"""Control flow that depends on data: an operator whose branches are graphs of their own.

A call of one stands in a Program's graph as any other call: its target is the operator together with its branches, its
arguments are the operator's own with None in the place of each branch. To the passes it is opaque: every operand stays
whole, and nothing is looked at inside.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

COND = torch.ops.higher_order.cond
WHILE_LOOP = torch.ops.higher_order.while_loop
SUPPORTED = (COND, WHILE_LOOP)


class ControlFlow:
    """`operator` (one of SUPPORTED) with its branches, in the order in which the operator takes them.

    cond(predicate, None, None, operands) and while_loop(None, None, carried, further operands) return tuples, as the
    branches do.
    """

    def __init__(self, operator: Any, branches: tuple[fx.GraphModule, ...]) -> None:
        self.operator = operator
        self.branches = branches
        self.__name__ = self.__qualname__ = str(operator)

    def __repr__(self) -> str:
        return self.__name__

    def filled(self, args: tuple[Any, ...], branches: tuple[Any, ...]) -> tuple[Any, ...]:
        """The operator's own arguments, with `branches` in their places."""
        given = iter(branches)
        return tuple(next(given) if argument is None else argument for argument in args)

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        """Compute the results; on meta tensors their sizes, with ValueError where they depend on the data."""
        if any(value.is_meta for value in _tensors(args)):
            return self._sizes(args)
        if self.operator is COND:
            return tuple(self.branches[0 if bool(args[0]) else 1](*args[3]))
        condition, body = self.branches
        carried, further = args[2:]
        while bool(condition(*carried, *further)[0]):
            carried = body(*carried, *further)
        return tuple(carried)

    def _sizes(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """What each way through the branches gives, if all of them give the same."""
        if self.operator is COND:
            first, second = (tuple(branch(*args[3])) for branch in self.branches)
        else:
            first, second = tuple(args[2]), tuple(self.branches[1](*args[2], *args[3]))
        for one, other in zip(first, second, strict=True):
            if not _is_like(one, other):
                raise ValueError(
                    f"{self.__name__}: the branches differ in the sizes or dtypes of their results"
                )
        return second


def _is_like(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype
    return type(one) is type(other) and not isinstance(one, Tensor)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
