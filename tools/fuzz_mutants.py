"""The damage that tools/fuzz_files.py does: mutants of a file by their names."""

from __future__ import annotations

import io
import json
import random
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any

from fuzz_crafted import crafted
from fuzz_formats import FORMATS

# What stands where JSON has something else: other types, sizes that no machine has, texts that are no names.
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 0.5, 2**31, 2**63, 10**30, -(10**30), 1e308, float("inf"), float("nan"), "", "0-3",
    "0-999999999999", "größe-名", "\ud800", "../../x", "x" * 10**5, [], [[]], {}, {"": None}, [None] * 1000,
)  # fmt: skip


def mutant(name: str, seed: int = 0) -> bytes:
    """Return the file of a name FORMAT:KIND:NUMBER."""
    kind_of_file, kind, number = name.split(":")
    content = bytearray(FORMATS[kind_of_file].content)
    generator = random.Random(f"{seed}:{name}")
    if kind == "crafted":
        return crafted(kind_of_file)[number]
    if kind == "cut":
        return bytes(content[: _length(len(content), int(number), generator)])
    if kind == "inner":
        return _inner(bytes(content), generator)
    if kind == "value":
        return _with_another_value(bytes(content), generator)
    place = generator.randrange(len(content))
    if kind == "flip":
        content[place] ^= 1 << generator.randrange(8)
    else:
        length = generator.randint(1, 16)
        filler = generator.choice([b"\xff" * length, bytes(length), generator.randbytes(length)])
        content[place : place + length] = filler[: len(content) - place]
    return bytes(content)


def _length(size: int, number: int, generator: random.Random) -> int:
    """Return where a file is cut off: at each kilobyte first, then anywhere."""
    kilobytes = range(0, size, 1024)
    return kilobytes[number] if number < len(kilobytes) else generator.randrange(size)


def _inner(content: bytes, generator: random.Random) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(made, "w") as target:
        names = [name for name in source.namelist() if source.getinfo(name).file_size]
        chosen = generator.choice(names)
        for info in source.infolist():
            record = bytearray(source.read(info))
            if info.filename == chosen:
                record[generator.randrange(len(record))] = generator.randrange(256)
            target.writestr(info, bytes(record))
    return made.getvalue()


def _with_another_value(content: bytes, generator: random.Random) -> bytes:
    """Return JSON in which one entry, anywhere, is missing, is there twice or is something odd."""
    tree = json.loads(content)
    places = list(_places(tree))
    holder, key = generator.choice(places)
    action = generator.randrange(8)
    if action == 0:
        del holder[key]
    elif action == 1 and isinstance(holder, list):
        holder.insert(key, holder[key])
    elif action == 2:
        other, other_key = generator.choice(places)
        holder[key] = json.loads(json.dumps(other[other_key]))
    else:
        holder[key] = generator.choice(ODD)
    return json.dumps(tree).encode()


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (list or dict, position or key) of everything in a tree."""
    for key in tree if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], (dict, list)):
            yield from _places(tree[key])


def names(formats: Sequence[str], flips: int) -> Iterator[str]:
    """Yield the names of all mutants of some formats."""
    for kind_of_file in formats:
        entry = FORMATS[kind_of_file]
        counts = {
            "flip": flips,
            "run": flips // 4,
            "cut": len(entry.content) // 1024 + 1 + flips // 20,
            "inner": flips // 4 if entry.is_zip else 0,
            "value": flips // 4 if entry.is_json else 0,
        }
        for kind, count in counts.items():
            yield from (f"{kind_of_file}:{kind}:{number}" for number in range(count))
        yield from (f"{kind_of_file}:crafted:{number}" for number in crafted(kind_of_file))
