"""Which linear layers are hidden: those whose output goes through pointwise functions into other linear layers only.

That is the first layer of a perceptron or of a transformer's feed-forward block, and both halves of a gated one:
where a unit that is switched off takes a row of this layer and a column of the next with it. A layer whose
output is added to a residual stream, normalised over its features, split into heads or returned is not one.

The model runs once, and the tensors that carry a layer's units are followed from function to function.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sbp_compile.capture.export import evaluating
from sbp_compile.nn.layout import run_once

# Functions under which a unit that is 0 for every input stays apart from the others, by the name torch gives them.
_POINTWISE_NAMES = """
    relu relu_ relu6 gelu silu silu_ mish elu elu_ selu celu leaky_relu leaky_relu_ prelu hardswish hardswish_
    hardtanh hardtanh_ hardsigmoid sigmoid sigmoid_ tanh tanh_ softplus softsign log_sigmoid threshold erf exp
    square pow __pow__ abs neg __neg__ sqrt dropout dropout_ alpha_dropout batch_norm clone contiguous detach
    to type type_as float half bfloat16 double
"""
_PRODUCT_NAMES = "mul mul_ multiply __mul__ __rmul__ __imul__ div __truediv__ true_divide"
_SUM_NAMES = "add add_ __add__ __radd__ __iadd__ sub sub_ __sub__ __rsub__ __isub__"
_POINTWISE, _PRODUCTS, _SUMS = (
    frozenset(names.split()) for names in (_POINTWISE_NAMES, _PRODUCT_NAMES, _SUM_NAMES)
)


def hidden_linears(
    module: nn.Module,
    example_inputs: Tensor | tuple[Any, ...],
    *,
    kwargs: Mapping[str, Any] | None = None,
    kinds: type[nn.Module] | tuple[type[nn.Module], ...] = nn.Linear,
) -> tuple[str, ...]:
    """Names of the hidden linear layers of `module`, in its own order, for `insert_noise(module, where=...)`.

    `example_inputs`, `kwargs`: one call's arguments; the model runs once on them, in eval mode, without gradients.
    `kinds`: the module classes that count as linear; with `nn.Conv2d` among them convolutions do, too.
    Layers whose weights the model reads without calling them (torch's attention) are not seen. Raises InputError
    where the model does not take the arguments.
    """
    names = {part: name for name, part in module.named_modules() if isinstance(part, kinds)}
    with evaluating(module), torch.no_grad(), _Followed(names) as followed:
        followed.leaks(run_once(module, example_inputs, kwargs or {}))
    hidden = followed.consumed - followed.leaked
    return tuple(name for part, name in names.items() if part in hidden)


class _Followed(TorchFunctionMode):
    """Keeps for every tensor the layers whose units it carries; `consumed` by another layer, `leaked` elsewhere."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.consumed: set[nn.Module] = set()
        self.leaked: set[nn.Module] = set()
        self._carried: dict[
            int, tuple[Tensor, frozenset[nn.Module]]
        ] = {}  # holds the tensor: ids stay its own
        self._inside = 0
        self._handles = [
            handle
            for layer in layers
            for handle in (
                layer.register_forward_pre_hook(self._enter, with_kwargs=True),
                layer.register_forward_hook(self._leave),
            )
        ]

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._inside and _has_tensor(result):
            self._follow(getattr(func, "__name__", ""), (args, kwargs or {}), result)
        return result

    def leaks(self, values: Any) -> None:
        """Whatever layer's units the tensors among `values` carry: it is not hidden."""
        for tensor in _tensors(values):
            self.leaked |= self._carries(tensor)

    def _follow(self, name: str, operands: Any, result: Any) -> None:
        tensors = _tensors(operands)
        carried: frozenset[nn.Module] = frozenset().union(*map(self._carries, tensors))
        if not carried:
            return
        alone = all(
            self._carries(tensor) or isinstance(tensor, nn.Parameter) or not tensor.ndim for tensor in tensors
        )
        passes = name in _POINTWISE or name in _PRODUCTS or (name in _SUMS and alone)
        if passes and isinstance(result, Tensor):
            self._carried[id(result)] = result, carried
        else:
            self.leaked |= carried

    def _carries(self, tensor: Tensor) -> frozenset[nn.Module]:
        held = self._carried.get(id(tensor))
        return frozenset() if held is None else held[1]

    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._inside += 1
        for tensor in _tensors((args, kwargs)):
            self.consumed |= self._carries(tensor)

    def _leave(self, layer: nn.Module, _: tuple[Any, ...], output: Any) -> None:
        self._inside -= 1
        self._carried[id(output)] = output, frozenset({layer})


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in _tensors(item)]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in _tensors(item)]
    return []


def _has_tensor(value: Any) -> bool:
    return bool(_tensors(value))
