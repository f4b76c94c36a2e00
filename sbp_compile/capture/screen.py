"""Screening of an exported program's archive before torch sees it.

`torch.export.load` may run code that a file brings along: it unpickles sample inputs, tensors and objects,
loads compiled libraries, evaluates size expressions, and pastes names into Python text. So it is never given
the file itself, only an archive written anew from the records that are known, in which every JSON value was
checked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from typing import Any

import torch

from sbp_compile.capture import file_archive as layout
from sbp_compile.capture.file_archive import Archive, Record
from sbp_compile.capture.file_expressions import RefusalError
from sbp_compile.capture.file_schema import PAYLOADS, Check, program_check
from sbp_compile.errors import ModelFileError

_ALLOWED = re.compile(
    r"archive_(format|version)|byteorder|version|\.data/(version|serialization_id)|\.format_version|\.storage_alignment"
    r"|models/model\.json|data/sample_inputs/model\.pt"
    r"|data/weights/(model_weights_config\.json|weight_\d+)|data/constants/(model_constants_config\.json|tensor_\d+)"
    r"|extra/.*|sbp_compile/(metadata\.json|inputs\.json|inputs\.safetensors)"
)
_REASONS = (
    (r"data/aotinductor/|.*\.(so|dll|dylib|cubin)$", "compiled code, which is never loaded"),
    (r"data/(weights|constants)/.*\.pt$", "pickled weights (an older format of torch)"),
    (r"data/constants/", "a pickled object"),
    (r"models/", "a program under another name than 'model'"),
)
_ADVICE = (
    "where you trust the file: program = torch.export.load(path); program.example_inputs = None; "
    "torch.export.save(program, path)"
)
# torch's numbers of the dtypes that a tensor may have, with their sizes in bytes.
_ITEM_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 2, 7: 4, 8: 8, 9: 4, 10: 8, 11: 16, 12: 1, 13: 2, 28: 2,
               29: 1, 30: 1, 31: 1, 32: 1, 33: 1, 34: 4, 35: 8}  # fmt: skip
_STRIDED = 7


def screen(archive: Archive, namespaces: Collection[str] = ()) -> Iterator[Record]:
    """Yield the records of a clean archive with the same program, tensors one at a time.

    Every check is made before the first record is yielded, except a tensor record's checksum, which is
    verified as it is read. `namespaces`: those of custom operators that are trusted. Raises `ModelFileError`
    that names the record or the place in the program, and what is wrong with it.
    """
    _check_records(archive)
    program = _clean(archive, layout.PROGRAM, program_check(namespaces))
    weights = _clean(archive, layout.WEIGHTS_CONFIG, PAYLOADS)
    constants = _clean(archive, layout.CONSTANTS_CONFIG, PAYLOADS)
    tensors = _check_tensors(archive, layout.WEIGHTS, weights) + _check_tensors(
        archive, layout.CONSTANTS, constants
    )
    return _clean_records(archive, program, weights, constants, tensors)


def _clean_records(
    archive: Archive, program: Any, weights: Any, constants: Any, tensors: list[str]
) -> Iterator[Record]:
    yield layout.FORMAT, b"pt2"
    yield "archive_version", b"0"
    yield ".data/version", b"6\n"
    yield "byteorder", b"little"
    yield layout.PROGRAM, json.dumps(program).encode()
    yield layout.WEIGHTS_CONFIG, json.dumps(weights).encode()
    yield layout.CONSTANTS_CONFIG, json.dumps(constants).encode()
    yield layout.SAMPLE_INPUTS, b""
    for name in tensors:
        yield name, archive.read(name)


def _check_records(archive: Archive) -> None:
    for name in archive.names:
        if not _ALLOWED.fullmatch(name):
            reason = next((why for pattern, why in _REASONS if re.match(pattern, name)), "something unknown")
            raise ModelFileError(f"record {name!r} holds {reason}")
    if archive.size(layout.SAMPLE_INPUTS):
        raise ModelFileError(
            f"record {layout.SAMPLE_INPUTS!r} holds pickled sample inputs, which can run code; {_ADVICE}"
        )
    for name, wanted in ((layout.FORMAT, b"pt2"), ("archive_version", b"0"), ("byteorder", b"little")):
        if archive.size(name) is not None and archive.read(name) != wanted:
            raise ModelFileError(f"record {name!r} (={archive.read(name)[:20]!r}) must be {wanted!r}")


def _clean(archive: Archive, name: str, check: Check) -> Any:
    try:
        return check(json.loads(archive.read(name)))
    except RefusalError as refusal:
        raise ModelFileError(f"{name}: {refusal}") from refusal
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{name} is not the JSON that was expected ({error})") from error


def _check_tensors(archive: Archive, folder: str, payloads: Any) -> list[str]:
    """Return the records of the tensors, each once, after a look at whether the tensors lie inside them."""
    names: dict[str, None] = {}
    for tensor, payload in payloads.get("config", {}).items():
        name = folder + payload.get("path_name", "")
        try:
            _check_tensor(payload["tensor_meta"], archive.size(name))
        except KeyError as error:
            raise ModelFileError(f"tensor {tensor!r} has no {error}") from error
        except RefusalError as refusal:
            raise ModelFileError(f"tensor {tensor!r} {refusal}") from refusal
        names[name] = None
    return list(names)


def _check_tensor(meta: Any, stored: int | None) -> None:
    if stored is None:
        raise RefusalError("has no record in the archive")
    if meta["dtype"] not in _ITEM_SIZES or meta["layout"] != _STRIDED:
        raise RefusalError(f"has dtype {meta['dtype']} and layout {meta['layout']}; expected a dense tensor")
    _check_device(meta["device"])
    sizes, strides = ([extent["as_int"] for extent in meta[key]] for key in ("sizes", "strides"))
    offset = meta["storage_offset"]["as_int"]
    if len(sizes) != len(strides) or min([offset, *sizes, *strides]) < 0:
        raise RefusalError(f"has sizes {sizes}, strides {strides}, offset {offset}")
    last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    needed = 0 if 0 in sizes else (last + 1) * _ITEM_SIZES[meta["dtype"]]
    if needed > stored or stored % _ITEM_SIZES[meta["dtype"]]:
        raise RefusalError(
            f"of sizes {sizes} and strides {strides} needs {needed} bytes; its record has {stored}"
        )


def _check_device(device: Any) -> None:
    kind = device["type"]
    if kind not in {"cpu", "cuda"} or (kind == "cuda" and not torch.cuda.is_available()):
        raise RefusalError(
            f"was saved on device {kind!r}, which this machine does not have; move the model to the CPU first"
        )
