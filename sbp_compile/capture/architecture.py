"""The network that weights are for, built by a factory that the user names: `package.module:factory`."""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from sbp_compile.errors import UsageError

Factory = str | Callable[..., Any] | nn.Module
_SHOWN = 6


def build(factory: Factory, arguments: Mapping[str, Any] | Sequence[Any] = ()) -> nn.Module:
    """Return the network of a factory: a module class or function, its name `package.module:name`, or a module itself.

    `arguments`: keyword arguments, or positional ones. A name is looked up in the current folder, too. Raises
    `UsageError` that names what is missing: the module, the name in it, an argument.
    """
    if isinstance(factory, nn.Module):
        return factory
    name, call = (factory, _found(factory)) if isinstance(factory, str) else (_name(factory), factory)
    keywords = dict(arguments) if isinstance(arguments, Mapping) else {}
    positional = () if isinstance(arguments, Mapping) else tuple(arguments)
    _check_arguments(name, call, positional, keywords)
    try:
        made = call(*positional, **keywords)
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        raise UsageError(f"--arch {name} failed: {type(error).__name__}: {_first_line(error)}") from error
    if not isinstance(made, nn.Module):
        raise UsageError(f"--arch {name} returned a {type(made).__name__}; expected a torch.nn.Module")
    return made


def parse_arguments(text: str) -> dict[str, Any] | list[Any]:
    """Return the factory's arguments from JSON: an object of keyword arguments or an array of positional ones."""
    example = """write them as --arch-args '{"width": 32}'"""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--arch-args {text[:80]!r} is not JSON ({error}); {example}") from error
    if not isinstance(found, (dict, list)):
        raise UsageError(f"--arch-args {text[:80]!r} must be a JSON object or array; {example}")
    return found


@contextmanager
def importing_from_here() -> Iterator[None]:
    """Let imports find the user's code in the current folder, as `python -m` does."""
    here = str(Path.cwd())
    added = not {"", here} & set(sys.path)
    if added:
        sys.path.insert(0, here)
    try:
        yield
    finally:
        if added and here in sys.path:
            sys.path.remove(here)


def _found(name: str) -> Callable[..., Any]:
    module_name, colon, path = name.partition(":")
    if not module_name or not colon or not path:
        raise UsageError(f"--arch {name!r} must be package.module:factory, such as networks.resnet:ResNet")
    if module_name.endswith(".py") or not all(part.isidentifier() for part in module_name.split(".")):
        raise UsageError(
            f"--arch {name}: {module_name!r} is no name of a module, as in an import: package.module for "
            "package/module.py, seen from the current folder"
        )
    with importing_from_here():
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise UsageError(
                f"--arch {name}: there is no module {error.name!r}; run from the folder that it lies in, or add that "
                "folder to PYTHONPATH"
            ) from error
        except (Exception, SystemExit) as error:  # whatever the user's code raises; a script may end itself
            raise UsageError(
                f"--arch {name}: importing {module_name!r} failed: {type(error).__name__}: {_first_line(error)}"
            ) from error
    found: Any = module
    for part in path.split("."):
        if not hasattr(found, part):
            raise UsageError(f"--arch {name}: {module_name!r} has no {path!r}; it has {_offers(module)}")
        found = getattr(found, part)
    if not callable(found):
        raise UsageError(
            f"--arch {name} is a {type(found).__name__}, not a class or function that makes the network"
        )
    return found  # type: ignore[no-any-return]


def _offers(module: Any) -> str:
    """Return the names in a module that may make a network: its module classes, else its functions."""
    own = {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    }
    classes = [
        name for name, value in own.items() if isinstance(value, type) and issubclass(value, nn.Module)
    ]
    names = classes + [name for name, value in own.items() if inspect.isfunction(value)]
    shown = ", ".join(names[:_SHOWN])
    return f"{shown}{', ...' if len(names) > _SHOWN else ''}" if names else "no class or function of its own"


def _check_arguments(
    name: str, call: Callable[..., Any], positional: tuple[Any, ...], keywords: Mapping[str, Any]
) -> None:
    try:
        signature = inspect.signature(call)
    except (TypeError, ValueError):  # built-in callables show none
        return
    try:
        signature.bind(*positional, **keywords)
    except TypeError as error:
        raise UsageError(
            f"--arch {name}{signature.replace(return_annotation=inspect.Signature.empty)}: {error}; give arguments as "
            f"""--arch-args '{{"name": value}}'"""
        ) from error


def _name(factory: Callable[..., Any]) -> str:
    return f"{getattr(factory, '__module__', '?')}:{getattr(factory, '__qualname__', repr(factory))}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["(no message)"])[0]
