"""Files made by hand for tools/fuzz_files.py: claims of size, bombs, nesting, odd names, code to be run."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from fuzz_formats import FORMATS
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

HUGE = 25_000_000_000  # of four bytes each: 100 GB
ABSURD = 2**62
SIZES: Mapping[str, int] = {"claim": HUGE, "absurd": ABSURD, "negative": -6}


@functools.cache
def crafted(kind_of_file: str) -> dict[str, bytes]:
    """Return what was made by hand for a format, by name."""
    entry = FORMATS[kind_of_file]
    content = entry.content
    found = {
        "empty": b"",
        "text": b"not a model\n" * 100,
        "zeros": bytes(10**6),
        "head": content[:8] + bytes(10**6),
    }
    if entry.is_zip:
        found |= _crafted_zip(content)
    return found | _OF[kind_of_file](content)


def _crafted_zip(content: bytes) -> dict[str, bytes]:
    def beside(name: str, data: bytes) -> list[tuple[str, bytes]]:
        return [(name, data), (_beside(name), bytes(2**28))]

    return {
        "bomb": _zip_with(content, beside, deflate=True),
        "twice": content + content,
        "names": _zip_with(content, lambda name, data: [(name + "-größe-名", data)]),
        "climbing": _zip_with(content, lambda name, data: [(name, data), (f"{name}/../../../x", b"1")]),
    }


def _crafted_exported(content: bytes) -> dict[str, bytes]:
    found = {
        label: _zip_with(content, _replaced(b'"as_int": 6', f'"as_int": {size}'.encode()))
        for label, size in SIZES.items()
    }
    found["deep"] = _zip_with(
        content, lambda name, data: [(name, b"[" * 10**6 if name.endswith(".json") else data)]
    )
    return found


def _crafted_pickle(content: bytes) -> dict[str, bytes]:
    return {label: content.replace(_COUNT, _long(size)) for label, size in SIZES.items()} | {"deep": _DEEP}


def _crafted_zipped_pickle(content: bytes) -> dict[str, bytes]:
    found = {label: _zip_with(content, _replaced(_COUNT, _long(size))) for label, size in SIZES.items()}
    found["deep"] = _zip_with(
        content, lambda name, data: [(name, _DEEP if name.endswith("data.pkl") else data)]
    )
    return found


_COUNT = b"K" + bytes([6 * 3 * 9])
_DEEP = b"\x80\x02" + b"(" * 10**6 + b"l" * 10**6 + b"."


def _long(size: int) -> bytes:
    return b"\x8a\x08" + size.to_bytes(8, "little", signed=True)


def _crafted_safetensors(_: bytes) -> dict[str, bytes]:
    found = {}
    for label, size in SIZES.items():
        entry = f'{{"größe":{{"dtype":"F32","shape":[{size}],"data_offsets":[0,{4 * size}]}}}}'
        found[label] = _safetensors_of(entry.encode())
    found["deep"] = _safetensors_of(b'{"a":' + b"[" * 10**6)
    entry = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    found["twice"] = _safetensors_of(f'{{"a":{entry},"a":{entry}}}'.encode(), bytes(4))
    found["names"] = _safetensors_of(f'{{"größe-名\\u0000":{entry}}}'.encode(), bytes(4))
    found["header"] = (2**63 - 1).to_bytes(8, "little") + b"{" + bytes(100)
    return found


def _zip_with(
    content: bytes, change: Callable[[str, bytes], Sequence[tuple[str, bytes]]], *, deflate: bool = False
) -> bytes:
    """Return an archive with each record replaced by others; those that are new may be compressed."""
    made, names = io.BytesIO(), set()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(made, "w") as target:
        for info in source.infolist():
            for name, data in change(info.filename, source.read(info)):
                if name in names:
                    continue
                names.add(name)
                packed = deflate and name != info.filename
                target.writestr(name, data, zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED)
    return made.getvalue()


def _beside(name: str) -> str:
    """Return one more name, in the folder of code where there is one."""
    root = name.partition("/")[0]
    return f"{root}/code/bomb.py" if "/code/" in name else f"{root}/data/bomb"


def _replaced(old: bytes, new: bytes) -> Callable[[str, bytes], list[tuple[str, bytes]]]:
    return lambda name, data: [(name, data.replace(old, new) if name.endswith((".json", ".pkl")) else data)]


def _safetensors_of(header: bytes, data: bytes = bytes(64)) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def _crafted_onnx(content: bytes) -> dict[str, bytes]:
    def changed(change: Callable[[onnx.ModelProto], object]) -> bytes:
        model = onnx.ModelProto.FromString(content)
        change(model)
        return bytes(model.SerializeToString())

    def rename(model: onnx.ModelProto, name: str) -> None:
        model.graph.output[0].name = model.graph.node[-1].output[0] = name

    def nest(model: onnx.ModelProto) -> None:
        with contextlib.suppress(DecodeError):  # what protobuf itself refuses to write
            for _ in range(90):
                inner, node = onnx.GraphProto(), onnx.NodeProto(op_type="If", output=["y"])
                inner.CopyFrom(model.graph)
                node.attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH, g=inner)
                del model.graph.node[:]
                model.graph.node.append(node)

    found = {label: changed(functools.partial(_resize, size=size)) for label, size in SIZES.items()}
    found["twice"] = changed(lambda model: model.graph.initializer.append(model.graph.initializer[0]))
    found["names"] = changed(lambda model: rename(model, "größe-名 / .."))
    found["deep"] = changed(nest)
    found["input"] = changed(
        lambda model: setattr(model.graph.input[0].type.tensor_type.shape.dim[2], "dim_value", ABSURD)
    )
    return found


def _resize(model: onnx.ModelProto, size: int) -> None:
    model.graph.initializer[0].dims[0] = size


def _crafted_arrays(content: bytes) -> dict[str, bytes]:
    """Return archives of arrays: claims of size, pickles, dtypes without numbers, names, two of one name, bombs."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        array = archive.read("x.npy")

    def given(data: bytes, name: str = "x.npy", *more: tuple[str, bytes]) -> bytes:
        return _zip_of([(name, data), *more])

    found = {label: given(_header(f"({size},)")) for label, size in SIZES.items()}
    found["claimed 8 GB"] = given(_header("(2000000000,)"))
    found["overflow"] = given(_header(f"({2**32}, {2**32})"))
    found["fraction"] = given(_header("(1.5,)"))
    found["no size"] = given(_header("(1000000000000,)", "|S0"))
    found["nothing"] = given(_header(f"(0, {ABSURD})"))
    found["deep"] = given(_header("(" * 4000 + ")" * 4000))
    found["long header"] = given(b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b" " * 1000)
    found["later version"] = given(b"\x93NUMPY\x09\x00" + array[8:])
    found["trailing"] = given(array + bytes(10))
    found["objects"] = given(_npy(np.array([print, None], dtype=object), allow_pickle=True))
    found["code"] = given(_header("(1,)", "|O") + pickle.dumps(np.array([Payload()], dtype=object)))
    found["pickle"] = pickle.dumps(Payload())
    found["texts"] = given(_npy(np.array(["a", "b"])))
    found["dates"] = given(_npy(np.array(["2020-01-01"], dtype="datetime64[D]")))
    found["fields"] = given(_npy(np.zeros(3, dtype=[("a", "<f4"), ("größe", "<i8")])))
    found["long doubles"] = given(_npy(np.zeros((2, 3, 8, 8), dtype=np.longdouble)))
    found["big-endian"] = given(_npy(np.zeros((2, 3, 8, 8), dtype=">f4")))
    found["integers"] = given(_npy(np.zeros((2, 3, 8, 8), dtype=np.int64)))
    found["not a number"] = given(_npy(np.full((2, 3, 8, 8), np.nan, dtype=np.float32)))
    found["infinite"] = given(_npy(np.full((2, 3, 8, 8), np.inf, dtype=np.float32)))
    found["largest"] = given(_npy(np.full((2, 3, 8, 8), 3e38, dtype=np.float32)))
    found["other shape"] = given(_npy(np.zeros((2, 3, 8), dtype=np.float32)))
    found["no examples"] = given(_npy(np.zeros((0, 3, 8, 8), dtype=np.float32)))
    found["single array"] = array
    found["more arrays"] = given(array, "x.npy", ("y.npy", array))
    found["no array"] = _zip_of([])
    found["a text beside"] = given(array, "x.npy", ("README.txt", b"hello"))
    found["a text alone"] = given(b"hello", "x")
    found["a name twice"] = given(array, "x.npy", ("x", array))
    found["a path"] = given(array, "../../x.npy")
    found["a long name"] = given(array, "x" * 60000 + ".npy")
    found["an odd name"] = given(array, "größe\n[bold]\x1b[31m名.npy")
    found["folder"] = given(array, "x.npy", ("folder/", b""))
    found["many"] = _zip_of([(f"x{number}.npy", array[:160]) for number in range(20000)])
    zeros = _header(f"({2**32},)", "|i1") + bytes(2**20)
    found["packed zeros"] = _packed_zeros(_header(f"({2**29},)", "|i1"), 2**29)
    found["packed claim"] = _zip_of([("x.npy", zeros)], compression=zipfile.ZIP_DEFLATED)
    found["packed by others"] = _zip_of([("x.npy", array)], compression=zipfile.ZIP_LZMA)
    found["labels"] = given(array, "x.npy", ("labels.npy", _npy(np.array(["a", "b"]))))
    return found


class Payload:
    """What makes a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("unpickled",))


def _npy(array: Any, *, allow_pickle: bool = False) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, allow_pickle=allow_pickle)
    return file.getvalue()


def _header(shape: str, dtype: str = "<f4") -> bytes:
    """Return the first bytes of an array's file that claims a shape."""
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (-len(text) - 11 % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def _zip_of(records: Sequence[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", compression) as target, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that are there twice
        for name, data in records:
            target.writestr(name, data)
    return made.getvalue()


def _packed_zeros(head: bytes, count: int) -> bytes:
    """Return an archive whose only array really has so many zeros, packed a thousand times smaller."""
    made = io.BytesIO()
    with (
        zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as target,
        target.open("x.npy", "w", force_zip64=True) as record,
    ):
        record.write(head)
        for _ in range(count // 2**24):
            record.write(bytes(2**24))
    return made.getvalue()


def _crafted_recipe(content: bytes) -> dict[str, bytes]:
    """Return recipes that claim, nest, repeat, lie about types or mask what is not there."""
    found = _crafted_json(content)

    def changed(change: Callable[[Any], object]) -> bytes:
        tree = json.loads(content)
        change(tree)
        return json.dumps(tree).encode()

    def layer(key: str, value: Any) -> bytes:
        return changed(lambda tree: tree["layers"][0].__setitem__(key, value))

    def mask(**values: Any) -> bytes:
        return changed(lambda tree: tree["masks"][0].update(values))

    found["many numbers"] = changed(
        lambda tree: tree["layers"][0].update(channels=10**12, dead="0-999999999999")
    )
    found["many times"] = layer("dead", ",".join(["0-5"] * 10**6))
    found["many layers"] = changed(
        lambda tree: tree.update(layers=[{**tree["layers"][0], "channels": 10**6, "dead": "0-999999"}] * 2000)
    )
    found["many masks"] = mask(shape=[2**40, 2**40], axis=0, zeros=f"0-{10**9}")
    found["infinite number"] = content.replace(b'"channels": 6', b'"channels": 1e999')
    found["long number"] = content.replace(b'"channels": 6', b'"channels": ' + b"9" * 10**5)
    found["half"] = layer("channels", 6.5)
    found["a truth"] = layer("kept_number", True)
    found["a list of reasons"] = layer("kept_for", [["a", "0"]])
    found["negative axis"] = mask(axis=-1)
    found["axis beyond"] = mask(axis=7)
    found["flat"] = mask(axis=None, zeros="0-2")
    found["no axes"] = mask(shape=[], axis=None, zeros="0")
    found["huge shape"] = mask(shape=[2**62, 2**62, 2**62], axis=None)
    found["other operand"] = mask(argument=["self", 10**20])
    found["all off"] = mask(axis=None, zeros="0-5")
    found["structure of letters"] = changed(lambda tree: tree.update(structure="".join(tree["structure"])))
    found["long line"] = changed(lambda tree: tree["structure"].__setitem__(1, "y" * 10**6))
    found["lone surrogate"] = changed(lambda tree: tree["structure"].__setitem__(1, "\ud800\n\x1b[31m"))
    found["a later version"] = changed(lambda tree: tree.update(version=2))
    return found


def _crafted_json(content: bytes) -> dict[str, bytes]:
    text = content.decode()
    first = text.index("{") + 1
    key = json.loads(content).keys()
    return {
        "deep": b"[" * 10**6,
        "deep objects": b'{"a":' * 10**6,
        "many lists": b"[" + b"[]," * ((2**25 - 6) // 3) + b"[]]",
        "many texts": b"[" + b'"ab",' * ((2**25 - 6) // 5) + b"1]",
        "many numbers beside": b"[" + b"1.5," * ((2**25 - 6) // 4) + b"1]",
        "many keys": b"{" + b",".join(b'"%d":1' % key for key in range(2 * 10**6)) + b"}",
        "large": b" " * (2**25 + 1),
        "key twice": (text[:first] + f'"{next(iter(key))}": 1, ' + text[first:]).encode(),
        "not a number": b"NaN",
        "a number": b"1",
        "a list": b"[1, 2]",
        "null": b"null",
        "two": content + content,
        "byte order": b"\xef\xbb\xbf" + content,
        "utf-16": text.encode("utf-16"),
        "pickle": pickle.dumps(Payload()),
    }


_OF: Mapping[str, Callable[[bytes], dict[str, bytes]]] = {
    "pt2": _crafted_exported,
    "model-file": _crafted_exported,
    "torchscript": _crafted_zipped_pickle,
    "state-dict": _crafted_zipped_pickle,
    "old-state-dict": _crafted_pickle,
    "safetensors": _crafted_safetensors,
    "onnx": _crafted_onnx,
    "inputs": _crafted_arrays,
    "calibration": _crafted_arrays,
    "recipe": _crafted_recipe,
    "tuning": _crafted_json,
}
