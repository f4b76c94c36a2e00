"""The grammar of the size expressions and operator names that a model file may hold.

torch hands expression strings to `sympy.sympify`, which evaluates them as Python. So a string is parsed here,
every piece of it is looked up in the tables below, and what torch gets is written anew from the parsed tree.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection

import torch

# Functions over integers, as sympy prints them and as one would write them; relations for symbolic booleans.
_FUNCTIONS = frozenset({
    "Add", "Mul", "FloorDiv", "Mod", "PythonMod", "Max", "Min", "Integer",
    "Equality", "Unequality", "StrictLessThan", "StrictGreaterThan", "LessThan", "GreaterThan", "Eq", "Ne",
})  # fmt: skip
_OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod, ast.USub)
_ASSUMPTIONS = frozenset({"integer", "positive", "nonnegative", "nonzero"})
_SYMBOL = re.compile(r"[A-Za-z][A-Za-z_]{0,40}[0-9]{0,6}")
_LONGEST = 4000
_LARGEST = 2**63

_ARITHMETIC = "add sub mul floordiv mod truediv neg pos eq ne lt le gt ge and_ or_"
_PYTHON_TARGETS = frozenset(
    [f"_operator.{name}" for name in _ARITHMETIC.split()]
    + [f"torch.sym_{name}" for name in ("int", "float", "max", "min", "not", "ite")]
    + [f"math.{name}" for name in ("trunc", "ceil", "floor")]
)
_HIGHER_ORDER = frozenset(
    {"cond", "map_impl", "while_loop", "scan", "wrap_with_set_grad_enabled", "wrap_with_autocast"}
)
# Operators that open files, or that index memory without checks.
_DANGEROUS = re.compile(r"from_file|save|_unsafe_(index|masked_index).*|set_?|set_data|resize.*|_test_.*")
_OVERLOAD = re.compile(r"torch\.ops\.([A-Za-z]\w*)\.(\w+)\.(\w+)")
_NAMESPACES = frozenset({"aten", "prims", "torchvision"})
_OpOverload = type(torch.ops.aten.add.Tensor)


class RefusalError(ValueError):
    """Something in a model file that is outside the grammar; the message has no file name."""


def clean_expression(text: str) -> str:
    """Return `text` written anew if it is an expression of the grammar; raise `RefusalError` otherwise.

    Names, integers below 2**63, `+ - * // %`, comparisons, `Mod Max Min FloorDiv ...`, `Symbol('name', ...)`.
    """
    if len(text) > _LONGEST:
        raise RefusalError(f"expression of {len(text)} characters; at most {_LONGEST} are read")
    try:
        tree = ast.parse(text.strip(), mode="eval")
        _check(tree.body)
        return ast.unparse(tree)
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        reason = f" ({error})" if isinstance(error, RefusalError) else ""
        raise RefusalError(f"expression {text[:200]!r} is outside the grammar of sizes{reason}") from None


def clean_symbol(text: str) -> str:
    """Return the name of a symbolic size, such as s77; raise `RefusalError` if it is none."""
    if not _SYMBOL.fullmatch(text):
        raise RefusalError(f"{text[:200]!r} is not the name of a symbolic size")
    return text


def clean_target(text: str, namespaces: Collection[str] = ()) -> str:
    """Return the name of an operator that a graph may call; raise `RefusalError` for every other string.

    Known are aten, prims, torchvision and the operators of `namespaces`, some higher order operators, and
    Python's arithmetic on symbolic sizes.
    """
    if text in _PYTHON_TARGETS or text.removeprefix("torch.ops.higher_order.") in _HIGHER_ORDER:
        return text
    match = _OVERLOAD.fullmatch(text)
    if not match or is_dangerous(match[2]):
        raise RefusalError(f"{text[:200]!r} is not an operator that a model file may call")
    if match[1] not in _NAMESPACES and match[1] not in namespaces:
        raise RefusalError(
            f"operator {text[:200]!r} is not one of torch's own; if you trust the file, import "
            f'the library that defines it and load with namespaces=("{match[1]}",)'
        )
    if not isinstance(_resolve(*match.groups()), _OpOverload):
        raise RefusalError(f"operator {text[:200]!r} is unknown to torch {torch.__version__}")
    return text


def is_dangerous(name: str) -> bool:
    """Whether an operator of that name opens files, or indexes memory without checks."""
    return _DANGEROUS.fullmatch(name) is not None


def _resolve(namespace: str, name: str, overload: str) -> object:
    return getattr(getattr(getattr(torch.ops, namespace), name, None), overload, None)


def _check(node: ast.expr) -> None:
    match node:
        case ast.Constant(value=int(value)) if not isinstance(value, bool):
            if value >= _LARGEST:
                raise RefusalError(f"integer {value} is too large")
        case ast.Name(id=name):
            clean_symbol(name)
        case ast.UnaryOp(op=operator, operand=operand) if isinstance(operator, _OPERATORS):
            _check(operand)
        case ast.BinOp(left=left, op=operator, right=right) if isinstance(operator, _OPERATORS):
            _check(left)
            _check(right)
        case ast.Compare(left=left, comparators=rest):
            for part in (left, *rest):
                _check(part)
        case ast.Call(func=ast.Name(id="Symbol"), args=[ast.Constant(value=str(name))], keywords=keywords):
            clean_symbol(name)
            _check_assumptions(keywords)
        case ast.Call(func=ast.Name(id=name), args=parts, keywords=[]) if name in _FUNCTIONS:
            for part in parts:
                _check(part)
        case _:
            raise RefusalError(f"{ast.unparse(node)[:80]!r}")


def _check_assumptions(keywords: list[ast.keyword]) -> None:
    for keyword in keywords:
        if keyword.arg not in _ASSUMPTIONS or not isinstance(keyword.value, ast.Constant):
            raise RefusalError(f"{keyword.arg!r}")
