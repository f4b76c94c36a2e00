"""Pickles looked at without running them: what they would import, and whether their tensors lie inside their storages.

torch's readers are C++ in part and were written for files that one trusts; what they are given was checked here first.
"""

from __future__ import annotations

import collections
import io
import math
import pickle
import pickletools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any

import torch

from sbp_compile.errors import ModelFileError

# What torch.save imports for tensors in dicts and lists; anything else is somebody's class.
_TENSOR_GLOBAL = re.compile(
    r"torch\.(_utils|storage|nn\.parameter|serialization)\..*|torch\.\w*Storage|torch\.\w*[0-9]|torch\.(device|Size)"
    r"|torch\.bool|collections\.OrderedDict|(__builtin__|builtins)\.(set|dict|list|int|float|bool|complex)"
    r"|_codecs\.encode"
)
_MOST_OPCODES = 2_000_000
_MOST_NESTED = 200
_OLD_PICKLES = 4  # a magic number, the version, the system, the content
_LARGEST_EXPANDED = 2**28
_STORAGE = re.compile(r"(\w+)Storage")
_STORAGE_DTYPES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128, "Untyped": torch.uint8,
    "QInt8": torch.qint8, "QUInt8": torch.quint8, "QInt32": torch.qint32,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a pickle describes it; the numbers are in it, the values in a record."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def foreign_classes(file: IO[bytes]) -> list[str]:
    """Return the dotted names that the pickles at the file's position import, but for those of plain tensors."""
    return list(dict.fromkeys(name for name in imported_names(file) if not _TENSOR_GLOBAL.fullmatch(name)))


def imported_names(file: IO[bytes]) -> Iterator[str]:
    """Yield the dotted names that the pickles at the file's position would import, without running them."""
    for _ in range(8):  # torch's older format is several pickles in a row
        try:
            yield from _imported_by_one(file)
        except Exception:  # pickletools raises many kinds of error on what is no pickle
            return


def check_tensors(content: bytes, size_of: Callable[[str], int | None]) -> Any:
    """Return a pickle's content with `StoredTensor` for its tensors and inert stand-ins for every class.

    `size_of`: the bytes of the record with a storage's key, None where there is none. Nothing is imported or called.
    Raises `ModelFileError` for a tensor that does not lie inside its storage, a storage larger than its record, and
    what is no pickle.
    """
    try:
        _check_opcodes(content)
        found = _Inspector(io.BytesIO(content), size_of).load()
    except ModelFileError:
        raise
    except Exception as error:  # pickle documents no closed list of what it raises on damaged data
        raise ModelFileError(f"its pickle is damaged ({error})") from error
    _check_depth(found)
    return found


def check_old_tensors(file: IO[bytes]) -> None:
    """Do the same for torch's older format, pickles in a row with the storages behind them; from its start.

    Torch makes a storage as large as it says before it reads it, so all together may claim no more than the file has.
    """
    size = file.seek(0, 2)
    file.seek(0)
    try:
        for _ in range(_OLD_PICKLES):
            start = file.tell()
            _check_opcodes(file)
            end = file.tell()
            file.seek(start)
            inspector = _Inspector(file, lambda _: size)
            _check_depth(inspector.load())
            if sum(inspector.claimed.values()) > size:
                raise ModelFileError(
                    f"its storages claim more bytes than the file has ({size}); is it truncated?"
                )
            if file.seek(end) == size:
                return
    except ModelFileError:
        raise
    except Exception as error:  # as above
        raise ModelFileError(f"its pickle is damaged ({error})") from error


class Inert:
    """Stands in for an object of any class: keeps whatever a pickle hands to it in `held`, and does nothing."""

    held: list[Any]

    def __new__(cls, *args: Any, **_: Any) -> Inert:
        """Make one without a call of `__init__`, as NEWOBJ does."""
        made = super().__new__(cls)
        made.held = list(args)
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any) -> Inert:
        """Stand in for what a call would give."""
        return Inert(self, *args)

    def __setstate__(self, state: Any) -> None:
        self.held.append(state)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.held += [key, value]

    def append(self, item: Any) -> None:
        """Take an item of a list."""
        self.held.append(item)

    def extend(self, items: Any) -> None:
        """Take items of a list."""
        self.held.extend(items)


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    count: int


class _Inspector(pickle.Unpickler):
    """Unpickles numbers, strings and containers; every global is one of ours."""

    def __init__(self, file: IO[bytes], size_of: Callable[[str], int | None]) -> None:
        super().__init__(file, encoding="utf-8")
        self._size_of = size_of
        self.claimed: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) in {("torch._utils", "_rebuild_tensor"), ("torch._utils", "_rebuild_tensor_v2")}:
            return _rebuilt
        if (module, name) in {
            ("torch._utils", "_rebuild_parameter"),
            ("torch.jit._pickle", "restore_type_tag"),
        }:
            return _first
        match = _STORAGE.fullmatch(name)
        if module in {"torch", "torch.storage"} and match and match[1] in _STORAGE_DTYPES:
            return _STORAGE_DTYPES[match[1]]
        return Inert

    def persistent_load(self, identity: Any) -> Any:
        if identity[0] == "module":  # a class with its source, in the older format
            return identity[1]
        kind, dtype, key, _location, count, *_ = identity
        if kind != "storage" or not isinstance(dtype, torch.dtype) or type(count) is not int or count < 0:
            raise ModelFileError(f"its pickle refers to {str(identity)[:100]!r}, which is no storage")
        stored, needed = self._size_of(str(key)), count * dtype.itemsize
        if stored is None or needed > stored:
            have = "is missing" if stored is None else f"has {stored}"
            raise ModelFileError(f"storage {str(key)[:100]!r} needs {needed} bytes; its record {have}")
        self.claimed[str(key)] = needed
        return _Storage(dtype, count)


def _rebuilt(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> StoredTensor:
    shape, strides = tuple(shape), tuple(strides)
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, _Storage) or not all(
        type(number) is int and number >= 0 for number in numbers
    ):
        raise ModelFileError(f"its pickle describes a tensor by {str(numbers)[:200]}")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    count = math.prod(shape)
    if count and (last >= storage.count or count > max(storage.count, _LARGEST_EXPANDED)):
        raise ModelFileError(
            f"a tensor of shape {list(shape)} and strides {list(strides)} does not fit its storage of {storage.count}"
        )
    return StoredTensor(storage.dtype, shape)


def _first(value: Any, *_: Any) -> Any:
    return value


def _check_opcodes(content: bytes | IO[bytes]) -> None:
    """Refuse what would take memory out of proportion to the file."""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        if opcode.name in {"PUT", "BINPUT", "LONG_BINPUT"} and int(argument or 0) > count:
            raise ModelFileError(f"its pickle remembers value {argument} after {count} steps")
        if count > _MOST_OPCODES:
            raise ModelFileError(f"its pickle has over {_MOST_OPCODES} steps")


def _check_depth(root: Any) -> None:
    """Refuse what nests so deeply, or in a circle, that the stack of a reader in C++ would not hold it."""
    layer = {id(root): root}
    for _ in range(_MOST_NESTED):
        layer = {id(child): child for value in layer.values() for child in _children(value)}
        if not layer:
            return
    raise ModelFileError(f"its pickle nests more than {_MOST_NESTED} levels")


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value, *value.values()]
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(value)
    return value.held if isinstance(value, Inert) else []


def _imported_by_one(file: IO[bytes]) -> Iterator[str]:
    strings: list[str] = []
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if opcode.name in {"GLOBAL", "INST"}:
            yield str(argument).replace(" ", ".")
        elif opcode.name == "STACK_GLOBAL" and len(strings) > 1:
            yield ".".join(strings[-2:])
        elif isinstance(argument, str):
            strings.append(argument)
        if count > _MOST_OPCODES:
            return
