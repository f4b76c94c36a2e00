"""What the JSON of an exported program may hold: a table of checks that rebuild what they accept.

The tables follow torch's own schema (torch/_export/serde/schema.py, version 8), less what can carry code:
custom objects, guards, tokens, metadata other than the module each node came from. A check takes a parsed
JSON value and
returns a clean one, so that torch only ever sees what was looked at; fields it would ignore are left out.
"""

from __future__ import annotations

import json
import keyword
import re
from collections.abc import Callable, Collection
from typing import Any

from sbp_compile.capture.file_expressions import RefusalError, clean_expression, clean_symbol, clean_target

Check = Callable[[Any], Any]

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_UNQUOTED = re.compile(r"[^\"'\\\x00-\x1f\x7f]*")  # torch pastes these into the Python text of a graph
_DEVICE = re.compile(r"[a-z]{1,20}")
_CONTAINERS = frozenset({"builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"})
_INFINITE = frozenset({"Infinity", "-Infinity", "NaN"})


def instance(*types: type) -> Check:
    """Accept values of exactly these types (a bool is no int)."""
    wanted = " or ".join(kind.__name__ for kind in types)

    def check(value: Any) -> Any:
        if type(value) not in types:
            raise RefusalError(f"expected {wanted}, found {type(value).__name__} {str(value)[:80]!r}")
        return value

    return check


def record(**fields: Check) -> Check:
    """Accept an object; keep the fields named here, each checked, and leave the others out."""

    def check(value: Any) -> Any:
        _object(value)
        return {name: _inside(name, field, value[name]) for name, field in fields.items() if name in value}

    return check


def union(**cases: Check) -> Check:
    """Accept an object with exactly one field, which is one of these."""

    def check(value: Any) -> Any:
        if len(_object(value)) != 1 or next(iter(value)) not in cases:
            raise RefusalError(
                f"expected one of {', '.join(cases)}, found {', '.join(map(str, value))[:200]}"
            )
        [(name, content)] = value.items()
        return {name: _inside(name, cases[name], content)}

    return check


def items(element: Check) -> Check:
    """Accept a list of such elements."""

    def check(value: Any) -> Any:
        return [_inside(str(i), element, item) for i, item in enumerate(_LIST(value))]

    return check


def table(key: Check, content: Check) -> Check:
    """Accept an object of any length with such keys and such contents."""

    def check(value: Any) -> Any:
        return {key(name): _inside(name, content, item) for name, item in _object(value).items()}

    return check


def optional(content: Check) -> Check:
    """Accept None, or such a value."""
    return lambda value: None if value is None else content(value)


def empty(what: str) -> Check:
    """Accept an empty object or list; `what` names what a filled one would hold."""

    def check(value: Any) -> Any:
        if value:
            raise RefusalError(f"holds {what}")
        return value

    return check


def text(accepts: Callable[[str], object], what: str) -> Check:
    """Accept a string for which `accepts` is true."""

    def check(value: Any) -> Any:
        if not accepts(_STRING(value)):
            raise RefusalError(f"{value[:80]!r} is not {what}")
        return value

    return check


def _object(value: Any) -> dict[str, Any]:
    mapping: dict[str, Any] = instance(dict)(value)
    return mapping


def _inside(name: str, check: Check, value: Any) -> Any:
    try:
        return check(value)
    except RefusalError as refusal:
        raise RefusalError(
            f"{name}.{refusal}" if _PLACED.match(str(refusal)) else f"{name}: {refusal}"
        ) from None


_PLACED = re.compile(r"[\w.]+: ")
_LIST, _STRING, _BOOL, _INT = instance(list), instance(str), instance(bool), instance(int)


def _size(value: Any) -> int:
    """Accept an integer that fits 64 bits."""
    if not -(2**63) <= _INT(value) < 2**63:
        raise RefusalError(f"integer {str(value)[:40]} does not fit 64 bits")
    return int(value)


def _number(value: Any) -> Any:
    """Accept a float, as torch writes it: infinities are strings."""
    return value if isinstance(value, str) and value in _INFINITE else instance(float, int)(value)


def _specification(value: Any) -> str:
    """Accept the structure of outputs, a JSON text inside the JSON; rebuild it."""
    try:
        protocol, tree = json.loads(_STRING(value))
    except ValueError as error:
        raise RefusalError(f"structure {str(value)[:80]!r} is not understood") from error
    return json.dumps([_INT(protocol), _structure(tree)])


def _call_specification(value: Any) -> str:
    """Accept the structure of (args, kwargs); torch pastes the keywords into Python text."""
    specification = _specification(value)
    children = json.loads(specification)[1]["children_spec"]
    if len(children) != 2 or children[1]["type"] != "builtins.dict":
        raise RefusalError("structure is not that of a call: a tuple and a dict")
    items(NAME)(json.loads(_STRING(children[1]["context"])))
    return specification


def _structure(node: Any) -> dict[str, Any]:
    kind, context = _object(node).get("type"), node.get("context")
    if kind is not None and kind not in _CONTAINERS:
        raise RefusalError(f"structure of type {str(kind)[:80]!r}; expected tuples, lists and dicts")
    if context is not None:
        keys = optional(items(instance(str, int)))(json.loads(_STRING(context)))
        context = json.dumps(keys)
    children = items(_structure)(node.get("children_spec", []))
    return {"type": kind, "context": context, "children_spec": children}


def _metadata(value: Any) -> dict[str, str]:
    """Keep the module that a node came from; the rest is for debugging and can name things to import."""
    stack = _object(value).get("nn_module_stack")
    return {"nn_module_stack": stack} if isinstance(stack, str) and stack.isprintable() else {}


NAME = text(lambda s: _NAME.fullmatch(s) and not keyword.iskeyword(s), "a plain name")
PATH = text(_UNQUOTED.fullmatch, "a name without quotes")
EXPRESSION = record(expr_str=lambda v: clean_expression(_STRING(v)), hint=optional(
    union(as_int=_size, as_bool=_BOOL, as_float=_number)))  # fmt: skip
DEVICE = record(type=text(_DEVICE.fullmatch, "a device"), index=optional(_size))
SYM_INT = union(as_expr=EXPRESSION, as_int=_size)
SYM_FLOAT = union(as_expr=EXPRESSION, as_float=_number)
SYM_BOOL = union(as_expr=EXPRESSION, as_bool=_BOOL)
TENSOR = record(name=NAME)
TENSOR_META = record(
    dtype=_size,
    sizes=items(SYM_INT),
    requires_grad=_BOOL,
    device=DEVICE,
    strides=items(SYM_INT),
    storage_offset=SYM_INT,
    layout=_size,
)
_STATIC = union(as_int=_size)
PAYLOAD = record(
    path_name=text(re.compile(r"(weight|tensor)_\d+").fullmatch, "a tensor's record (a pickled object?)"),
    is_param=_BOOL,
    use_pickle=empty("a pickled tensor"),
    tensor_meta=record(
        dtype=_size,
        sizes=items(_STATIC),
        requires_grad=_BOOL,
        device=DEVICE,
        strides=items(_STATIC),
        storage_offset=_STATIC,
        layout=_size,
    ),
)
PAYLOADS = record(config=table(PATH, PAYLOAD))


def _argument(target: Check) -> tuple[Check, Check]:
    """Return the checks of an operator's argument and of a graph; each may hold the other."""
    sym_int, sym_float = union(as_name=NAME, as_int=_size), union(as_name=NAME, as_float=_number)
    sym_bool, maybe = union(as_name=NAME, as_bool=_BOOL), union(as_tensor=TENSOR, as_none=_BOOL)
    cases: dict[str, Check] = {
        "as_none": _BOOL,
        "as_tensor": TENSOR,
        "as_tensors": items(TENSOR),
        "as_nested_tensors": items(items(TENSOR)),
        "as_optional_tensor": maybe,
        "as_optional_tensors": items(maybe),
        "as_int": _size,
        "as_ints": items(_size),
        "as_int_lists": items(items(_size)),
        "as_float": _number,
        "as_floats": items(_number),
        "as_float_lists": items(items(_number)),
        "as_bool": _BOOL,
        "as_bools": items(_BOOL),
        "as_string": _STRING,
        "as_strings": items(_STRING),
        "as_complex": record(real=_number, imag=_number),
        "as_sym_int": sym_int,
        "as_sym_ints": items(sym_int),
        "as_sym_float": sym_float,
        "as_sym_floats": items(sym_float),
        "as_sym_bool": sym_bool,
        "as_sym_bools": items(sym_bool),
        "as_scalar_type": _size,
        "as_memory_format": _size,
        "as_layout": _size,
        "as_device": DEVICE,
        "as_operator": target,
    }
    argument: Check = lambda value: union(**cases)(value)  # noqa: E731 - tied into a knot below
    graph = _graph(argument, target)
    cases["as_graph"] = record(name=NAME, graph=graph)
    cases["as_string_to_argument"] = table(_STRING, argument)
    return argument, graph


def _graph(argument: Check, target: Check) -> Check:
    named = record(
        name=text(lambda s: not s or _NAME.fullmatch(s), "an argument's name"),
        arg=argument,
        kind=optional(_size),
    )
    node = record(
        target=target,
        inputs=items(named),
        outputs=items(argument),
        metadata=_metadata,
        is_hop_single_tensor_return=optional(_BOOL),
        name=optional(NAME),
    )
    return record(
        inputs=items(argument),
        outputs=items(argument),
        nodes=items(node),
        tensor_values=table(NAME, TENSOR_META),
        sym_int_values=table(NAME, SYM_INT),
        sym_float_values=table(NAME, SYM_FLOAT),
        sym_bool_values=table(NAME, SYM_BOOL),
        custom_obj_values=empty("custom objects"),
        is_single_tensor_return=_BOOL,
    )


def _signature(argument: Check) -> Check:
    constant = union(as_none=_BOOL, as_int=_size, as_float=_number, as_string=_STRING, as_bool=_BOOL)
    inputs = union(
        user_input=record(arg=argument),
        parameter=record(arg=TENSOR, parameter_name=PATH),
        buffer=record(arg=TENSOR, buffer_name=PATH, persistent=_BOOL),
        tensor_constant=record(arg=TENSOR, tensor_constant_name=PATH),
        constant_input=record(name=NAME, value=constant),
    )
    outputs = union(
        user_output=record(arg=argument),
        buffer_mutation=record(arg=TENSOR, buffer_name=PATH),
        parameter_mutation=record(arg=TENSOR, parameter_name=PATH),
        user_input_mutation=record(arg=TENSOR, user_input_name=NAME),
    )
    return record(input_specs=items(inputs), output_specs=items(outputs))


def program_check(namespaces: Collection[str] = ()) -> Check:
    """Return the check of a whole exported program whose graph may also call operators of `namespaces`."""
    argument, graph = _argument(lambda value: clean_target(_STRING(value), namespaces))
    call = record(
        inputs=items(argument),
        outputs=items(argument),
        in_spec=_call_specification,
        out_spec=_specification,
        forward_arg_names=optional(items(NAME)),
    )
    module = record(
        graph=graph,
        signature=_signature(argument),
        module_call_graph=items(record(fqn=PATH, signature=optional(call))),
    )
    bounds = record(min_val=optional(_size), max_val=optional(_size))
    return record(
        graph_module=module,
        opset_version=table(NAME, _size),
        range_constraints=table(lambda s: clean_symbol(_STRING(s)), bounds),
        schema_version=record(major=_size, minor=_size),
        verifiers=items(NAME),
        torch_version=_STRING,
    )
