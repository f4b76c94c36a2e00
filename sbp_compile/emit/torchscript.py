"""The small network as TorchScript: traced, frozen, with dynamic sizes that stay dynamic."""

from __future__ import annotations

import inspect
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from passes.ir import schema
from sbp_compile.capture.call import Call
from sbp_compile.errors import UnsupportedModelError

aten = torch.ops.aten


@dataclass(frozen=True)
class TracedCall:
    """How the arguments of the original's call become those of the traced module.

    It takes the arguments that hold tensors, in the original's order, each under its name; what else the original
    takes (numbers, None) was fixed at capture.
    """

    call: Call
    names: tuple[str, ...]

    @classmethod
    def of(cls, call: Call, examples: Sequence[Tensor]) -> TracedCall:
        """Return the traced call for the tensors of an example call."""
        args, kwargs = call.nest_arguments(examples)
        named = [*zip(call.positional, args, strict=True), *kwargs.items()]
        return cls(call, tuple(name for name, tree in named if _holds_tensor(tree)))

    def arguments(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Return the traced module's arguments for a call of the original."""
        given = dict(zip(self.call.positional, args, strict=False)) | kwargs
        return tuple(given[name] for name in self.names)

    def tensors(self, arguments: Sequence[Any], template: Sequence[Any]) -> list[Any]:
        """Return the flat tensors of the traced module's arguments; `template`: flat values for the fixed ones."""
        args, kwargs = self.call.nest_arguments(template)
        given = dict(zip(self.names, arguments, strict=True))
        positional = tuple(
            given.get(name, value) for name, value in zip(self.call.positional, args, strict=True)
        )
        return self.call.tensors(positional, {name: given.get(name, value) for name, value in kwargs.items()})


def torchscript_bytes(network: fx.GraphModule, traced: TracedCall, examples: Sequence[Tensor]) -> bytes:
    """Return the archive of an emitted network, traced on one call's tensors and frozen; torch alone runs it.

    Raises `UnsupportedModelError` for what TorchScript cannot express.
    """
    module = _traceable(network, traced, examples)
    args, kwargs = traced.call.nest_arguments(examples)
    buffer = io.BytesIO()
    try:
        with torch.no_grad(), _quiet_torchscript():
            script = torch.jit.trace(  # type: ignore[no-untyped-call]  # as torch leaves it
                module, traced.arguments(*args, **kwargs), strict=False, check_trace=False
            )
            torch.jit.save(torch.jit.freeze(script.eval()), buffer)
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UnsupportedModelError(
            f"TorchScript cannot express the network ({reason}); write .pt2 or .onnx instead"
        ) from error
    return buffer.getvalue()


def load_torchscript(path: Path) -> torch.jit.ScriptModule:
    """Return the module of an archive that was just written."""
    with _quiet_torchscript(), path.open("rb") as file:
        module: torch.jit.ScriptModule = torch.jit.load(file, map_location="cpu")  # type: ignore[no-untyped-call]
    return module


def refuse_frozen_sizes(
    script: torch.jit.ScriptModule,
    network: fx.GraphModule,
    traced: TracedCall,
    feeds: Sequence[Sequence[Tensor]],
) -> None:
    """Run the archive at other sizes than those it was traced at, and compare shapes with the network's own.

    Raises `UnsupportedModelError` where a size was frozen. Feeds that the network itself refuses are left out.
    """
    for feed in feeds:
        try:
            with torch.no_grad():
                wanted = [value.shape for value in network(*feed) if isinstance(value, Tensor)]
        except Exception:  # whatever the operators of the user's model raise
            continue
        shapes = [list(value.shape) for value in feed]
        args, kwargs = traced.call.nest_arguments(feed)
        try:
            with torch.no_grad(), _quiet_torchscript():
                results = traced.call.flat_results(script(*traced.arguments(*args, **kwargs)))
        except Exception as error:
            raise UnsupportedModelError(_frozen(shapes)) from error
        if [value.shape for value in results if isinstance(value, Tensor)] != wanted:
            raise UnsupportedModelError(_frozen(shapes))


def _frozen(shapes: list[list[int]]) -> str:
    return (
        f"tracing froze a size: the TorchScript module fails on inputs of shapes {shapes}; write .pt2 or .onnx "
        "instead, or compile with a fixed batch"
    )


def _holds_tensor(tree: Any) -> bool:
    if isinstance(tree, Tensor):
        return True
    items = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return any(_holds_tensor(item) for item in items)


def _traceable(network: fx.GraphModule, traced: TracedCall, examples: Sequence[Tensor]) -> nn.Module:
    """Return a module whose `forward` shows the traced call's parameters, from which the trace takes their names."""
    template = list(examples)

    class Traceable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, *arguments: Any) -> Any:
            tensors = traced.tensors(arguments, template)
            return traced.call.nest_results(TrackingSizes(self.network).run(*tensors))

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind) for name in ("self", *traced.names)]
    Traceable.forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return Traceable().eval()


class TrackingSizes(fx.Interpreter):
    """Runs a network with every use of a run-time size spelled as Python does: the tracer records only those."""

    def __init__(self, network: fx.GraphModule) -> None:
        super().__init__(network, garbage_collect_values=True)
        self._sizes: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        """Compute one value; what is computed from sizes is a size itself."""
        if n.op != "call_function":
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.target is aten.sym_size.int:
            self._sizes.add(n)
            return args[0].size(args[1])
        if self._sizes.isdisjoint(n.all_input_nodes):
            return super().run_node(n)
        if not schema.is_overload(n.target):
            self._sizes.add(n)
            return super().run_node(n)
        return _python_function(n.target)(*args, **kwargs)


def _python_function(target: Any) -> Callable[..., Any]:
    """Return the method of a tensor, or else the function of torch, that an operator of ATen has beside it."""
    name = target.overloadpacket.__name__
    found: Callable[..., Any] = getattr(Tensor, name, None) or getattr(torch, name, None) or target
    return found


@contextmanager
def _quiet_torchscript() -> Iterator[None]:
    """Silence torch's notes that TorchScript is old and that a trace fixes what does not depend on tensors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]  # documented as this
        warnings.filterwarnings("ignore", message=r".*torch\.jit", category=DeprecationWarning)
        yield
