"""Damage model files at random, load each, and see that nothing but a network or an error of ours comes of it.

    python tools/fuzz_files.py --flips 1000 --seed 0 [--format F]... [--json FILE] [--write]
    python tools/fuzz_files.py --name onnx:flip:17

Each mutant has a name, FORMAT:KIND:NUMBER, that makes it again:

flip    one bit is flipped
run     up to 16 bytes are overwritten, by ones, zeros or random bytes
cut     the file is cut off: at every kilobyte, and at random lengths
inner   one byte inside of a record of a zip archive changes, and the checksums with it
crafted made by hand (NUMBER is its name): 100 GB claimed, bombs, absurd sizes, odd names, deep nesting, other files

Each is read in a process of its own, forked from one that has torch loaded: ONNX files up to a module, weights without
the network that they are for, the others up to an exported program. One in 40, and every crafted one, goes through the
command line and all of the compiler.
A defect is an exception of another kind than ours, an exit code that is not documented, a new file after a refusal, a
signal, more than 10 s, or more than 2 GB (of the whole process). Exit code 1 if there was one.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import io
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
import safetensors.torch
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone works without being installed

import sbp_compile
import sbp_compile.compiler  # so that no mutant's process has to import it
from sbp_compile.capture import load_model
from sbp_compile.capture.from_onnx import load_onnx, onnx_network
from sbp_compile.cli import main as command_line
from sbp_compile.errors import CompileError, UsageError

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "docs" / "results" / "fuzz-files.md"
SECONDS = 10.0
MEMORY = 2 * 10**9
HARD_MEMORY = 12 * 2**30  # of address space: the machine's other work goes on
DOCUMENTED = frozenset({0, 2, 3, 4, 5})
EVERY = 40  # how many mutants are loaded for one that is compiled
DEFECT = 99
HEADING = """# Damaged files

    python tools/fuzz_files.py --flips {flips} --seed {seed} --write

Mutants of one small network in every format that is read (what each kind does stands in tools/fuzz_files.py). *Read*:
the damage left a network, another or the same. *Refused*: by an error of ours, with the exit code that is documented
and nothing written. *Defects*: anything else, a signal, more than 10 s, or more than 2 GB. Memory is that of the whole
process, torch and onnxruntime included; {base:.2f} GB of it are there before a file is opened.

"""


class Subject(nn.Module):
    """A convolution with a mask, a pool and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.last = nn.Linear(6, 4)
        self.register_buffer("mask", torch.tensor([1.0, 0, 1, 0, 0.5, 0])[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        features = torch.relu(self.stem(x) * self.mask)
        return self.last(features.mean((2, 3)))  # type: ignore[no-any-return]


def subject() -> Subject:
    """Return the network, in eval mode, with the same weights each time."""
    torch.manual_seed(0)
    return Subject().eval()


def example() -> Tensor:
    """Return its example input."""
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


# The formats: what makes each


def _exported(file: io.BytesIO) -> None:
    batch = torch.export.Dim("batch")
    program = torch.export.export(subject(), (example(),), dynamic_shapes=({0: batch},))
    program.example_inputs = None
    torch.export.save(program, file)


def _own(file: io.BytesIO) -> None:
    with tempfile.TemporaryDirectory() as folder:
        sbp_compile.save_model(subject(), example(), Path(folder) / "net")
        file.write((Path(folder) / "net").read_bytes())


def _traced(file: io.BytesIO) -> None:
    torch.jit.save(torch.jit.trace(subject(), example()), file)  # type: ignore[no-untyped-call]


def _state(file: io.BytesIO) -> None:
    torch.save({"state_dict": subject().state_dict(), "epoch": 3}, file)


def _old_state(file: io.BytesIO) -> None:
    torch.save(subject().state_dict(), file, _use_new_zipfile_serialization=False)


def _safetensors(file: io.BytesIO) -> None:
    file.write(safetensors.torch.save(subject().state_dict(), metadata={"format": "pt"}))


def _onnx(file: io.BytesIO) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    net (float[N, 3, 8, 8] x) => (float[N, 4] y) {
        c = Conv <pads = [1, 1, 1, 1]> (x, stem_weight, stem_bias)
        m = Mul(c, mask)
        r = Relu(m)
        p = ReduceMean <axes = [2, 3], keepdims = 0> (r)
        y = Gemm <transB = 1> (p, last_weight, last_bias)
    }"""
    model = onnx.parser.parse_model(text)
    for name, value in subject().state_dict().items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(value.numpy(), name.replace(".", "_")))
    file.write(model.SerializeToString())


@dataclass(frozen=True)
class Format:
    """How a format is written, what is given beside it, and whether it is a zip archive."""

    write: Callable[[io.BytesIO], None]
    is_zip: bool = False
    needs_arch: bool = False
    needs_input: bool = True

    @functools.cached_property
    def content(self) -> bytes:
        """The file, undamaged."""
        file = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.write(file)
        return file.getvalue()


FORMATS = {
    "pt2": Format(_exported, is_zip=True),
    "model-file": Format(_own, is_zip=True, needs_input=False),
    "torchscript": Format(_traced, is_zip=True),
    "state-dict": Format(_state, is_zip=True, needs_arch=True),
    "old-state-dict": Format(_old_state, needs_arch=True),
    "safetensors": Format(_safetensors, needs_arch=True),
    "onnx": Format(_onnx, needs_input=False),
}


# The mutants


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


HUGE = 25_000_000_000  # of four bytes each: 100 GB
ABSURD = 2**62


@functools.cache
def crafted(kind_of_file: str) -> dict[str, bytes]:
    """Return what was made by hand for a format, by name."""
    content = FORMATS[kind_of_file].content
    found = {
        "empty": b"",
        "text": b"not a model\n" * 100,
        "zeros": bytes(10**6),
        "head": content[:8] + bytes(10**6),
    }
    if FORMATS[kind_of_file].is_zip:
        found["bomb"] = _zip_with(
            content, lambda name, data: [(name, data), (_beside(name), bytes(2**28))], deflate=True
        )
        found["twice"] = content + content
        found["names"] = _zip_with(content, lambda name, data: [(name + "-größe-名", data)])
        found["climbing"] = _zip_with(
            content, lambda name, data: [(name, data), (f"{name}/../../../x", b"1")]
        )
    if kind_of_file in {"pt2", "model-file"}:
        for label, size in (("claim", HUGE), ("absurd", ABSURD), ("negative", -6)):
            found[label] = _zip_with(content, _replaced(b'"as_int": 6', f'"as_int": {size}'.encode()))
        found["deep"] = _zip_with(
            content, lambda name, data: [(name, b"[" * 10**6 if name.endswith(".json") else data)]
        )
    elif kind_of_file in {"torchscript", "state-dict", "old-state-dict"}:
        count = b"K" + bytes([6 * 3 * 9])
        for label, size in (("claim", HUGE), ("absurd", ABSURD), ("negative", -6)):
            larger = b"\x8a\x08" + size.to_bytes(8, "little", signed=True)
            change = _replaced(count, larger)
            zipped = FORMATS[kind_of_file].is_zip
            found[label] = _zip_with(content, change) if zipped else content.replace(count, larger)
        deep = b"\x80\x02" + b"(" * 10**6 + b"l" * 10**6 + b"."
        is_zip = FORMATS[kind_of_file].is_zip
        found["deep"] = (
            _zip_with(content, lambda name, data: [(name, deep if name.endswith("data.pkl") else data)])
            if is_zip
            else deep
        )
    elif kind_of_file == "safetensors":
        for label, size in (("claim", HUGE), ("absurd", ABSURD), ("negative", -6)):
            entry = f'{{"größe":{{"dtype":"F32","shape":[{size}],"data_offsets":[0,{4 * size}]}}}}'
            found[label] = _safetensors_of(entry.encode())
        found["deep"] = _safetensors_of(b'{"a":' + b"[" * 10**6)
        entry = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
        found["twice"] = _safetensors_of(f'{{"a":{entry},"a":{entry}}}'.encode(), bytes(4))
        found["names"] = _safetensors_of(f'{{"größe-名\\u0000":{entry}}}'.encode(), bytes(4))
        found["header"] = (2**63 - 1).to_bytes(8, "little") + b"{" + bytes(100)
    else:
        found |= _crafted_onnx(content)
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

    found = {
        label: changed(functools.partial(_resize, size=size))
        for label, size in (("claim", HUGE), ("absurd", ABSURD), ("negative", -6))
    }
    found["twice"] = changed(lambda model: model.graph.initializer.append(model.graph.initializer[0]))
    found["names"] = changed(lambda model: rename(model, "größe-名 / .."))
    found["deep"] = changed(nest)
    found["input"] = changed(
        lambda model: setattr(model.graph.input[0].type.tensor_type.shape.dim[2], "dim_value", ABSURD)
    )
    return found


def _resize(model: onnx.ModelProto, size: int) -> None:
    model.graph.initializer[0].dims[0] = size


def names(formats: Sequence[str], flips: int) -> Iterator[str]:
    """Yield the names of all mutants of some formats."""
    for kind_of_file in formats:
        entry = FORMATS[kind_of_file]
        counts = {
            "flip": flips,
            "run": flips // 4,
            "cut": len(entry.content) // 1024 + 1 + flips // 20,
            "inner": flips // 4 if entry.is_zip else 0,
        }
        for kind, count in counts.items():
            yield from (f"{kind_of_file}:{kind}:{number}" for number in range(count))
        yield from (f"{kind_of_file}:crafted:{number}" for number in crafted(kind_of_file))


# One mutant in a process of its own


@dataclass(frozen=True)
class Outcome:
    """What became of a file: an exit code or a defect, with its first line, seconds and peak memory in bytes."""

    name: str
    code: int
    defect: str
    message: str
    seconds: float
    memory: int

    @property
    def is_read(self) -> bool:
        """Whether a network was made of it."""
        return self.code == 0


def judged(name: str, content: bytes, *, seed: int = 0, whole: bool | None = None) -> Outcome:
    """Load a file of a format (the name's first part) in a forked process, or compile it if `whole`."""
    kind_of_file = name.partition(":")[0]
    if whole is None:
        whole = ":crafted:" in name or random.Random(f"whole {seed} {name}").randrange(EVERY) == 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.bin"
        path.write_bytes(content)
        run = functools.partial(_compile if whole else _load, kind_of_file, path)
        found = in_a_process(name, run)
        left = sorted(entry.name for entry in Path(folder).iterdir())
        wanted = ["model.bin", "small.onnx"] if whole and found.code == 0 else ["model.bin"]
        if not found.defect and left != wanted:
            return Outcome(name, found.code, f"it left {left}", found.message, found.seconds, found.memory)
    return found


def in_a_process(name: str, run: Callable[[], tuple[int, str]]) -> Outcome:
    """Run something that gives (exit code, message) in a forked process, and watch its time and memory."""
    reading, writing = os.pipe()
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # of forks of processes with threads: they are idle
        child = os.fork()
    if not child:
        _in_the_child(run, writing)
    os.close(writing)
    status, usage = _ended(child, start + SECONDS)
    seconds = time.perf_counter() - start
    with open(reading, "rb") as pipe:  # noqa: PTH123  # a descriptor
        text = pipe.read().decode(errors="replace")
    code, memory = os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024
    message = text.strip().splitlines()[-1] if text.strip() else ""
    defect = ""
    if seconds >= SECONDS:
        defect = f"more than {SECONDS:.0f} s"
    elif code < 0:
        defect = f"signal {-code}"
    elif code not in DOCUMENTED:
        defect = f"exit code {code}"
    elif code and "\n" in text.strip():
        defect = "more than one line of error"
    elif memory > MEMORY:
        defect = f"{memory / 1e9:.1f} GB"
    return Outcome(name, code, defect, message, seconds, memory)


def _in_the_child(run: Callable[[], tuple[int, str]], writing: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (HARD_MEMORY, HARD_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    code, text = DEFECT, "no result"
    with open(os.devnull, "w") as null:  # noqa: PTH123
        os.dup2(null.fileno(), 1)
        os.dup2(null.fileno(), 2)
    try:
        code, text = run()
    except BaseException as error:
        text = f"{type(error).__name__}: {error}".replace("\n", " ")
    with contextlib.suppress(OSError):
        os.write(writing, text[-4000:].encode(errors="replace"))
    os._exit(code)


def _ended(child: int, until: float) -> tuple[int, resource.struct_rusage]:
    """Wait for a child's end, and end it when its time is over."""
    pause = 0.002
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            return status, usage
        if time.perf_counter() > until:
            os.kill(child, signal.SIGKILL)
            _, status, usage = os.wait4(child, 0)
            return status, usage
        time.sleep(pause)
        pause = min(pause * 1.2, 0.05)


def _load(kind_of_file: str, path: Path) -> tuple[int, str]:
    entry = FORMATS[kind_of_file]
    options: dict[str, Any] = {}
    if entry.needs_input:
        options["example_inputs"] = example()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if kind_of_file == "onnx":
                onnx_network(load_onnx(path))
            else:
                load_model(path, **options)
        except UsageError as error:
            without_network = entry.needs_arch and "weights without a network" in str(error)
            return (0, "") if without_network else (error.exit_code, str(error))
        except CompileError as error:
            return error.exit_code, str(error)
    return 0, ""


def _compile(kind_of_file: str, path: Path) -> tuple[int, str]:
    entry = FORMATS[kind_of_file]
    arguments = [str(path), "-o", str(path.with_name("small.onnx")), "--quiet"]
    if entry.needs_input:
        arguments += ["--input", "2x3x8x8"]
    if entry.needs_arch:
        arguments += ["--arch", f"{__name__}:Subject"]
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        code = command_line(arguments)
    return code, errors.getvalue() if code else ""


# The run


def base_memory() -> int:
    """Return the peak memory of a process that opens no file."""
    return in_a_process("nothing", lambda: (0, "")).memory


def fuzz(chosen: Sequence[str], seed: int, console: Console, found: list[Outcome]) -> None:
    """Judge the mutants of some names, and add what became of them to `found`."""
    for name in track(chosen, "files", console=console, transient=True):
        outcome = judged(name, mutant(name, seed), seed=seed)
        found.append(outcome)
        if outcome.defect:
            console.print(f"{name}: {outcome.defect}: {outcome.message}", markup=False, soft_wrap=True)


def table(outcomes: Sequence[Outcome]) -> str:
    """Return counts, worst seconds and worst memory for each format and kind, as Markdown."""
    groups: dict[tuple[str, str], list[Outcome]] = collections.defaultdict(list)
    for outcome in outcomes:
        kind_of_file, kind, _ = outcome.name.split(":")
        groups[kind_of_file, kind].append(outcome)
    lines = [
        "| format | damage | files | read | refused | defects | longest, s | largest, GB |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (kind_of_file, kind), group in groups.items():
        defects = sum(bool(outcome.defect) for outcome in group)
        read = sum(outcome.is_read and not outcome.defect for outcome in group)
        cells = [kind_of_file, kind, len(group), read, len(group) - read - defects, defects]
        cells += [f"{max(o.seconds for o in group):.1f}", f"{max(o.memory for o in group) / 1e9:.2f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--flips", type=int, default=1000, help="random flips of each format (1000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--format", action="append", choices=FORMATS, help="only this one; may be repeated")
    parser.add_argument("--name", action="append", help="only this mutant; may be repeated")
    parser.add_argument("--json", type=Path, help="keep the outcomes here, and go on from what is there")
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.relative_to(ROOT)}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    chosen = options.name or list(names(options.format or list(FORMATS), options.flips))
    outcomes: list[Outcome] = []
    if options.json and options.json.exists():
        outcomes = [Outcome(**entry) for entry in json.loads(options.json.read_text())]
    done = {outcome.name for outcome in outcomes}
    interrupted = False
    try:
        fuzz([name for name in chosen if name not in done], options.seed, console, outcomes)
    except KeyboardInterrupt:  # the next run goes on from here
        interrupted = True
    if options.json:
        options.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes]))
    if interrupted:
        return 130
    text = table(outcomes)
    console.print(text, markup=False, soft_wrap=True)
    if options.write:
        heading = HEADING.format(flips=options.flips, seed=options.seed, base=base_memory() / 1e9)
        RESULT.write_text(heading + text + "\n", encoding="utf-8")
    return int(any(outcome.defect for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
