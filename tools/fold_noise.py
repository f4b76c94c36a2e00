"""Fold noise layers and batch norms into the layers around them, as users of pruning tools do by hand.

A factor m of a noise layer (0 where it is masked) goes into the layer in front of it:

- convolution, linear: W' = m W, b' = m b; batch norm: gamma' = m gamma, beta' = m beta;
- through what lies between them if f(m x) = m f(x) for m >= 0 (relu, max and average pooling);
- through f with f(0) = 0 (GELU, SiLU, hard swish): the masked rows in front become 0, and m goes into the columns of
  the layers behind. Where that is not possible the factor stays as a multiplication.

Then biases that are added behind a layer become the layer's own, and batch norms behind a convolution go into it. So
the result has a zero filter for every masked channel, which is what the tools look for. In the network's own dtype.
"""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from sbp_compile.nn import LogNormalNoise

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LAYERS = (*CONVOLUTIONS, nn.Linear)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
NOTHING = (nn.Identity, nn.Dropout)
POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
HOMOGENEOUS = (nn.ReLU, nn.LeakyReLU, *NOTHING, *POOLS)
HOMOGENEOUS_CALLS = (
    F.relu,
    torch.relu,
    F.leaky_relu,
    F.max_pool2d,
    F.avg_pool2d,
    F.adaptive_avg_pool2d,
    "relu",
)
ZERO_AT_ZERO = (nn.GELU, nn.SiLU, nn.Hardswish, nn.ReLU6, nn.Tanh)
ZERO_AT_ZERO_CALLS = (F.gelu, F.silu, F.hardswish, F.relu6, torch.tanh)


class Scale(nn.Module):
    """A factor that could not be folded."""

    factor: Tensor

    def __init__(self, factor: Tensor):
        super().__init__()
        self.register_buffer("factor", factor)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, LogNormalNoise) or super().is_leaf_module(module, name)


def fold_noise(network: nn.Module, example: Sequence[Tensor]) -> fx.GraphModule:
    """Return a copy with every noise layer folded; raises what `torch.fx` raises if it cannot be traced."""
    network = copy.deepcopy(network).eval()
    graph = fx.GraphModule(network, _Tracer().trace(network))
    with torch.no_grad():
        ShapeProp(graph).propagate(*example)
        _Folder(graph).fold()
    graph.delete_all_unused_submodules()
    graph.recompile()
    return graph


class _Folder:
    """One network's folding."""

    def __init__(self, graph: fx.GraphModule):
        self.graph = graph
        self.modules = dict(graph.named_modules())
        calls = Counter(node.target for node in graph.graph.nodes if node.op == "call_module")
        owners = Counter(
            id(value) for module in graph.modules() for value in module.parameters(recurse=False)
        )
        self.own = {
            name
            for name, module in self.modules.items()
            if calls[name] == 1 and all(owners[id(value)] == 1 for value in module.parameters(recurse=False))
        }

    def fold(self) -> None:
        for step in (self._drop, self._noise, self._bias, self._norm, self._noise, self._bias):
            for node in list(self.graph.graph.nodes):
                step(node)
        for node in self.graph.graph.nodes:
            if node.op == "call_module" and isinstance(self.modules[node.target], LogNormalNoise):
                self._replace(node, Scale(spread(self.modules[str(node.target)], _rank(node))))

    def _drop(self, node: fx.Node) -> None:
        if isinstance(self._module(node), NOTHING):
            self._remove(node)

    def _noise(self, node: fx.Node) -> None:
        """Fold a noise layer into what is in front of it."""
        layer = self._module(node)
        if not isinstance(layer, LogNormalNoise):
            return
        front, between = self._in_front(node)
        if front is None or not self._matches(node, front):
            return
        factor = _factor(layer)
        if not between:
            self._scale_rows(front, factor)
            self._remove(node)
            return
        self._scale_rows(front, (factor != 0).to(factor.dtype))
        behind = [user for user in node.users if self._takes(user, node)]
        if len(behind) == len(node.users):
            for user in behind:
                self._scale_columns(user, factor)
            self._remove(node)

    def _in_front(self, node: fx.Node) -> tuple[fx.Node | None, bool]:
        """Return the layer in front of a noise layer, and whether only zeros pass through what lies between."""
        only_zeros = False
        while True:
            before = node.args[0]
            if not isinstance(before, fx.Node) or len(before.users) != 1:
                return None, only_zeros
            if isinstance(self._module(before), (*LAYERS, *BATCH_NORMS)):
                return (before if before.target in self.own else None), only_zeros
            if self._is(before, ZERO_AT_ZERO, ZERO_AT_ZERO_CALLS):
                only_zeros = True
            elif not self._is(before, HOMOGENEOUS, HOMOGENEOUS_CALLS):
                return None, only_zeros
            node = before

    def _bias(self, node: fx.Node) -> None:
        """layer(x) + parameter becomes the layer's own bias."""
        if node.op != "call_function" or node.target not in (operator.add, torch.add) or len(node.args) != 2:
            return
        front, bias = node.args
        if not isinstance(front, fx.Node) or not isinstance(bias, fx.Node) or bias.op != "get_attr":
            return
        layer, value = self._module(front), self._attribute(str(bias.target))
        if not isinstance(layer, LAYERS) or front.target not in self.own or len(front.users) != 1:
            return
        trailing = 0 if isinstance(layer, nn.Linear) else len(layer.kernel_size)
        if tuple(value.shape) != (layer.weight.shape[0], *[1] * trailing):
            return
        old = 0 if layer.bias is None else layer.bias
        layer.bias = nn.Parameter(value.detach().flatten() + old)
        self._remove(node)

    def _norm(self, node: fx.Node) -> None:
        """A batch norm goes into the layer in front of it."""
        norm, front = self._module(node), node.args[0] if node.args else None
        if not isinstance(norm, BATCH_NORMS) or not isinstance(front, fx.Node) or len(front.users) != 1:
            return
        layer = self._module(front)
        if front.target not in self.own or node.target not in self.own or norm.running_mean is None:
            return
        if isinstance(layer, CONVOLUTIONS):
            fused: nn.Module = fuse_conv_bn_eval(layer, norm)
        elif isinstance(layer, nn.Linear) and _rank(node) == 2:
            fused = fuse_linear_bn_eval(layer, norm)
        else:
            return
        self._set(str(front.target), fused)
        self._remove(node)

    def _matches(self, node: fx.Node, front: fx.Node) -> bool:
        """Whether the noise lies along the layer's output channels."""
        layer, noise = self._module(front), self._module(node)
        assert isinstance(noise, LogNormalNoise)
        axis = _rank(node) - 1 if isinstance(layer, nn.Linear) else 1
        return noise.dim % _rank(node) == axis and _rank(front) == _rank(node)

    def _takes(self, user: fx.Node, node: fx.Node) -> bool:
        """Whether a factor of `node` can go into the columns of a layer behind it."""
        layer, noise = self._module(user), self._module(node)
        assert isinstance(noise, LogNormalNoise)
        if user.target not in self.own or not isinstance(layer, LAYERS):
            return False
        if isinstance(layer, nn.Linear):
            return noise.dim % _rank(node) == _rank(node) - 1
        return layer.groups == 1 and noise.dim % _rank(node) == 1

    def _scale_rows(self, node: fx.Node, factor: Tensor) -> None:
        layer: Any = self._module(node)
        layer.weight.copy_(layer.weight * _along(factor, layer.weight, 0))
        if layer.bias is not None:
            layer.bias.copy_(layer.bias * factor)

    def _scale_columns(self, node: fx.Node, factor: Tensor) -> None:
        layer: Any = self._module(node)
        layer.weight.copy_(layer.weight * _along(factor, layer.weight, 1))

    def _is(
        self, node: fx.Node, kinds: tuple[type, ...], calls: tuple[Callable[..., Any] | str, ...]
    ) -> bool:
        if node.op == "call_module":
            return isinstance(self._module(node), kinds)
        return node.target in calls

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.modules.get(str(node.target)) if node.op == "call_module" else None

    def _attribute(self, name: str) -> Tensor:
        value: Tensor = operator.attrgetter(name)(self.graph)
        return value

    def _remove(self, node: fx.Node) -> None:
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
        self.graph.graph.erase_node(node)

    def _replace(self, node: fx.Node, module: nn.Module) -> None:
        self._set(str(node.target), module)

    def _set(self, name: str, module: nn.Module) -> None:
        parent, _, leaf = name.rpartition(".")
        setattr(self.graph.get_submodule(parent), leaf, module)
        self.modules[name] = module


def spread(layer: Any, rank: int) -> Tensor:
    """Return a noise layer's factor, shaped for an input of this rank."""
    return _factor(layer).view([-1 if axis == layer.dim % rank else 1 for axis in range(rank)]).detach()


def _factor(layer: LogNormalNoise) -> Tensor:
    return torch.where(layer.mask(), layer.mean(), 0.0)


def _along(factor: Tensor, weight: Tensor, axis: int) -> Tensor:
    return factor.view([-1 if position == axis else 1 for position in range(weight.ndim)])


def _rank(node: fx.Node) -> int:
    return len(node.meta["tensor_meta"].shape)


def with_factors(network: nn.Module, example: Sequence[Tensor]) -> nn.Module:
    """Return a copy in which each noise layer is a multiplication by its factor."""
    network = copy.deepcopy(network).eval()
    ranks: dict[str, int] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: ranks.update({name: inputs[0].ndim}))
        for name, module in network.named_modules()
        if isinstance(module, LogNormalNoise)
    ]
    with torch.no_grad():
        network(*example)
    for handle in handles:
        handle.remove()
    for name, rank in ranks.items():
        parent, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(parent), leaf, Scale(spread(network.get_submodule(name), rank)))
    return network
