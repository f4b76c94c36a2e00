"""Crafted files run no code: what torch.export.load would run is refused, or never reaches it."""

import copy
import io
import json
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sbp_compile.capture import load_model
from sbp_compile.capture.file_archive import CONSTANTS_CONFIG, PROGRAM, SAMPLE_INPUTS, WEIGHTS_CONFIG
from sbp_compile.capture.file_expressions import RefusalError, clean_expression, clean_target
from sbp_compile.errors import ModelFileError

Records = dict[str, Any]  # parsed JSON where it is JSON, else bytes


class Payload:
    """Touches a marker file when it is unpickled."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (Path(self.marker),)


class Affine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.layer(x))


@pytest.fixture(scope="module")
def benign() -> Records:
    """The records of a plain, loadable file; a linear layer and a symbolic batch."""
    program = torch.export.export(Affine(), (torch.ones(2, 3),), dynamic_shapes=({0: torch.export.Dim("b")},))
    program.example_inputs = None
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    with zipfile.ZipFile(buffer) as archive:
        records = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    return {name: json.loads(data) if name.endswith(".json") else data for name, data in records.items()}


def write(records: Records, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            archive.writestr("archive/" + name, data)
    return path


def graph(records: Records) -> Any:
    return records[PROGRAM]["graph_module"]["graph"]


def rename(records: Records, old: str, new: str) -> None:
    text = json.dumps(records[PROGRAM]).replace(json.dumps(old), json.dumps(new))
    records[PROGRAM] = json.loads(text)


def touch(marker: str) -> str:
    return f"__import__('pathlib').Path({marker!r}).touch()"


def with_pickled_inputs(records: Records, marker: str) -> None:
    buffer = io.BytesIO()
    torch.save(((Payload(marker),), {}), buffer)
    records[SAMPLE_INPUTS] = buffer.getvalue()


def with_evaluated_size(records: Records, marker: str) -> None:
    graph(records)["tensor_values"]["x"]["sizes"][0]["as_expr"]["expr_str"] = touch(marker)


def with_pickled_weight(records: Records, marker: str) -> None:
    buffer = io.BytesIO()
    torch.save(Payload(marker), buffer)
    records["data/weights/weight_0"] = buffer.getvalue()
    records[WEIGHTS_CONFIG]["config"]["layer.weight"]["use_pickle"] = True


def with_guard(records: Records, marker: str) -> None:
    records[PROGRAM]["guards_code"] = [f"{touch(marker)} is None"]


def with_code_as_input_name(records: Records, marker: str) -> None:
    rename(records, "x", f"x={touch(marker)}")


def with_file_operator(records: Records, marker: str) -> None:
    arguments = {"filename": {"as_string": marker}, "shared": {"as_bool": True}, "size": {"as_int": 4}}
    node = graph(records)["nodes"][0]
    node["target"] = "torch.ops.aten.from_file.default"
    node["inputs"] = [{"name": name, "arg": value, "kind": 1} for name, value in arguments.items()]


EXPLOITS = {
    "pickled sample inputs": (with_pickled_inputs, "pickled sample inputs"),
    "size expression": (with_evaluated_size, "tensor_values.x.sizes.0.*outside the grammar of sizes"),
    "pickled weight": (with_pickled_weight, "layer.weight.use_pickle: holds a pickled tensor"),
    "code as a name": (with_code_as_input_name, "is not a plain name"),
    "file operator": (
        with_file_operator,
        "nodes.0.target: 'torch.ops.aten.from_file.default' is not an operator",
    ),
    "guard": (with_guard, None),
}
CONTROL = """
import sys, torch
for path in sys.argv[1:]:
    try:
        program, x = torch.export.load(path), torch.ones(2, 3)
        program.example_inputs = ((x,), {})  # torch looks at guards only then
        program.module()(x)
    except Exception:
        pass
"""


@pytest.fixture(scope="module")
def exploits(benign: Records, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """For each exploit its file and its marker, after torch alone has loaded and run them elsewhere."""
    folder = tmp_path_factory.mktemp("exploits")
    files = {}
    for number, (name, (craft, _)) in enumerate(EXPLOITS.items()):
        records, marker = copy.deepcopy(benign), folder / f"marker_{number}"
        craft(records, str(marker))
        files[name] = (write(records, folder / f"exploit_{number}.pt2"), marker)
    paths = [str(path) for path, _ in files.values()]
    subprocess.run([sys.executable, "-c", CONTROL, *paths], check=True, capture_output=True, timeout=300)
    return files


@pytest.mark.parametrize("name", EXPLOITS)
def test_an_exploit_that_works_on_torch_does_nothing_here(
    exploits: dict[str, tuple[Path, Path]], name: str
) -> None:
    path, marker = exploits[name]
    assert marker.exists(), "the exploit no longer works on plain torch: this test proves nothing"
    marker.unlink()
    message = EXPLOITS[name][1]
    if message is None:
        program, x = load_model(path).exported_program, torch.ones(2, 3)
        program.example_inputs = ((x,), {})
        program.module()(x)
    else:
        with pytest.raises(ModelFileError, match=message):
            load_model(path)
    assert not marker.exists()


def test_the_file_that_the_exploits_start_from_is_loaded(benign: Records, tmp_path: Path) -> None:
    loaded = load_model(write(benign, tmp_path / "m"))
    assert loaded.exported_program.module()(torch.ones(5, 3)).shape == (5, 2)
    assert len(loaded.exported_program.range_constraints) == 1


INJECTED = "x:\n  import os\n  #"


def add(name: str, content: Any) -> Callable[[Records], None]:
    return lambda records: records.__setitem__(name, content)


def put(value: Any, *keys: Any) -> Callable[[Records], None]:
    """Return an edit that sets the value at the end of a chain of keys."""

    def edit(records: Any) -> None:
        for key in keys[:-1]:
            records = records[key]
        records[keys[-1]] = value

    return edit


def structure(kind: Any, context: Any, *children: Any) -> Any:
    return {"type": kind, "context": json.dumps(context), "children_spec": list(children)}


def call(**keywords: Any) -> str:
    leaf: dict[str, Any] = {"type": None, "context": None, "children_spec": []}
    arguments = structure("builtins.tuple", None, leaf)
    return json.dumps([1, structure("builtins.tuple", None, arguments, structure(**keywords))])


ENUM = {"__enum__": True, "fqn": "antigravity:x", "name": "y"}
SPEC = (PROGRAM, "graph_module", "module_call_graph", 0, "signature", "in_spec")
NODE = (PROGRAM, "graph_module", "graph", "nodes", 0)
META = (WEIGHTS_CONFIG, "config", "layer.weight", "tensor_meta")
SHELL = {"target": "torch.os.system", "inputs": [], "outputs": [], "metadata": {}}
REFUSED: dict[str, tuple[Callable[[Records], object], str]] = {
    "compiled library": (add("data/aotinductor/model/a.so", b"\x7fELF"), "compiled code"),
    "legacy weights": (add("data/weights/model.pt", pickle.dumps(1)), "pickled weights"),
    "custom object": (add("data/constants/custom_obj_0", b"x"), "a pickled object"),
    "opaque object": (
        put({"k": {"path_name": "opaque_obj_0"}}, CONSTANTS_CONFIG, "config"),
        "path_name: 'opaque_obj_0' is not a tensor's record",
    ),
    "second program": (add("models/other.json", {}), "under another name"),
    "unknown record": (add("data/run_me", b""), "something unknown"),
    "traversal": (add("../../etc/passwd", b""), "not a plain path"),
    "backslashes": (add("..\\..\\x", b""), "not a plain path"),
    "big endian": (put(b"big", "byteorder"), "'byteorder' .* must be b'little'"),
    "node name": (lambda records: rename(records, "linear", INJECTED), "is not a plain name"),
    "input name": (lambda records: rename(records, "x", INJECTED), "is not a plain name"),
    "keyword name": (lambda records: rename(records, "linear", "lambda"), "is not a plain name"),
    "parameter name": (lambda records: rename(records, "layer.weight", 'w")+f("'), "name without quotes"),
    "import in a structure": (
        put(call(kind="builtins.dict", context=[ENUM]), *SPEC),
        "in_spec.*expected str or int, found dict",
    ),
    "factory in a structure": (
        put(call(kind="collections.defaultdict", context={"a": "system"}), *SPEC),
        "structure of type",
    ),
    "code in a keyword": (put(call(kind="builtins.dict", context=[INJECTED]), *SPEC), "is not a plain name"),
    "no call": (put(json.dumps([1, structure(None, None)]), *SPEC), "not that of a call"),
    "no keywords": (put(call(kind="builtins.dict", context=None), *SPEC), "expected list"),
    "broken structure": (put("[1", *SPEC), "is not understood"),
    "custom objects": (
        put({"a": {}}, PROGRAM, "graph_module", "graph", "custom_obj_values"),
        "holds custom objects",
    ),
    "object argument": (
        put({"as_custom_obj": {}}, *NODE, "inputs", 0, "arg"),
        "arg: expected one of .*found as_custom_obj",
    ),
    "operator argument": (
        put({"as_operator": "torch.hub.load"}, *NODE, "inputs", 0, "arg"),
        "'torch.hub.load' is not an oper",
    ),
    "shell command": (put(SHELL, *NODE), "nodes.0.target: 'torch.os.system' is not an operator"),
    "symbol": (put({"u99999999999": {}}, PROGRAM, "range_constraints"), "is not the name of a symbolic size"),
    "huge size": (put(10**30, *META, "sizes", 0, "as_int"), "does not fit 64 bits"),
    "size beyond the record": (put(10**9, *META, "sizes", 0, "as_int"), "needs 12000000000 bytes"),
    "offset beyond the record": (put(1, *META, "storage_offset", "as_int"), "needs 28 bytes"),
    "negative stride": (put(-1, *META, "strides", 0, "as_int"), "has sizes"),
    "no strides": (put([], *META, "strides"), "has sizes"),
    "odd dtype": (put(99, *META, "dtype"), "has dtype 99"),
    "sparse layout": (put(1, *META, "layout"), "expected a dense tensor"),
    "odd device": (put("tpu", *META, "device", "type"), "device 'tpu', which this machine"),
    "no metadata": (put({"path_name": "weight_0"}, WEIGHTS_CONFIG, "config", "layer.weight"), "tensor_meta"),
    "missing record": (lambda records: records.pop("data/weights/weight_0"), "has no record in the archive"),
    "missing program": (lambda records: records.pop(PROGRAM), "'models/model.json' is missing"),
    "no JSON": (put(b"{", PROGRAM), "models/model.json is not the JSON"),
    "deep JSON": (put(b"[" * 200_000, PROGRAM), "models/model.json is not the JSON"),
    "empty program": (put({}, PROGRAM), "cannot load the program"),
    "graph without its inputs": (
        put([], PROGRAM, "graph_module", "graph", "inputs"),
        "cannot load the program",
    ),
    "other schema": (put(7, PROGRAM, "schema_version", "major"), "schema version"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_model_does_not_need_is_refused_by_name(benign: Records, tmp_path: Path, name: str) -> None:
    edit, message = REFUSED[name]
    records = copy.deepcopy(benign)
    edit(records)
    with pytest.raises(ModelFileError, match=message):
        load_model(write(records, tmp_path / "m"))


def test_compressed_records_are_refused(benign: Records, tmp_path: Path) -> None:
    write(benign, tmp_path / "m")
    with zipfile.ZipFile(tmp_path / "m", "a") as archive:
        archive.writestr("archive/extra/bomb", bytes(10**6), compress_type=zipfile.ZIP_DEFLATED)
    with pytest.raises(ModelFileError, match="'archive/extra/bomb' is compressed"):
        load_model(tmp_path / "m")


def test_a_record_that_is_there_twice_is_refused(benign: Records, tmp_path: Path) -> None:
    write(benign, tmp_path / "m")
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "m", "a") as archive:
        archive.writestr("archive/" + PROGRAM, b"{}")
    with pytest.raises(ModelFileError, match="is there twice"):
        load_model(tmp_path / "m")


def test_records_that_overlap_are_refused(benign: Records, tmp_path: Path) -> None:
    path = write(benign, tmp_path / "m")
    with zipfile.ZipFile(path, "a") as archive:
        for number in range(30):
            info = copy.copy(archive.getinfo("archive/" + PROGRAM))
            info.filename = f"archive/extra/{number}"
            archive.filelist.append(info)
        archive._didModify = True  # type: ignore[attr-defined]
    with pytest.raises(ModelFileError, match=r"the records claim .* bytes, but the file has"):
        load_model(path)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("s0", "s0"),
        ("2*s0 + 1", "2 * s0 + 1"),
        ("Max(1, s0 // 2)", "Max(1, s0 // 2)"),
        ("Symbol('s77', positive=True, integer=True)", "Symbol('s77', positive=True, integer=True)"),
        ("Mod(Symbol('u0', integer=True), Integer(8))", "Mod(Symbol('u0', integer=True), Integer(8))"),
        ("-s0 % 3 <= 4", "-s0 % 3 <= 4"),
    ],
)
def test_size_expressions_are_written_anew(text: str, clean: str) -> None:
    assert clean_expression(text) == clean


@pytest.mark.parametrize(
    "text",
    [
        *("__import__('os')", "exec('x')", "s0.__class__", "s0[0]", "[s0 for s0 in s1]", "lambda: 1"),
        *("'s0'", "1.5", "True", "_s0", "", "s0 := 1", "2**s0", "f(s0)", "s0 if s1 else s2", "s0 and s1"),
        *("Symbol('s0; x')", "Symbol('s0', cls=1)", "Symbol(s0)", "Max(*s0)", "Max(s0, key=s1)"),
        *("9" * 40, "(" * 300, "s" * 5000, "s0\nimport os"),
    ],
)
def test_everything_else_is_no_size_expression(text: str) -> None:
    with pytest.raises(RefusalError):
        clean_expression(text)


@pytest.mark.parametrize(
    "target",
    [
        "torch.ops.aten.conv2d.default",
        "torch.ops.aten.__and__.Tensor",
        "torch.ops.higher_order.cond",
        "_operator.floordiv",
        "torch.sym_max",
    ],
)
def test_operators_of_the_dialect_are_known(target: str) -> None:
    assert clean_target(target) == target


@pytest.mark.parametrize(
    "target",
    [
        *("", "builtins.eval", "math.factorial", "_operator.call", "#custom:op"),
        *("torch.load", "torch.os.system", "torch.hub.load"),
        *("torch.ops.load_library", "torch.ops.load_library.a.b", "torch.ops.higher_order.aoti_x"),
        *("torch.ops.aten.from_file.default", "torch.ops.aten.save.default"),
        "torch.ops.aten.nothing.default",
        *("torch.ops.aten.conv2d", "torch.ops.aten.conv2d.__class__"),
        "torch.ops.aten.conv2d.default.__call__",
    ],
)
def test_other_targets_are_refused(target: str) -> None:
    with pytest.raises(RefusalError):
        clean_target(target)


def test_no_operator_that_takes_a_file_name_is_known() -> None:
    """Reads torch's whole registry, which has no public listing: a new operator must be noticed."""
    schemas = torch._C._jit_get_all_schemas()
    takes_files = [s for s in schemas if any("file" in a.name for a in s.arguments)]
    assert {"aten::from_file", "aten::save"} <= {schema.name for schema in takes_files}
    for schema in takes_files:
        with pytest.raises(RefusalError):
            clean_target(f"torch.ops.{schema.name.replace('::', '.')}.{schema.overload_name or 'default'}")


def test_custom_operators_are_taken_only_from_namespaces_that_are_trusted() -> None:
    library = torch.library.Library("screen_test", "DEF")  # type: ignore[no-untyped-call]
    library.define("double(Tensor x) -> Tensor")  # type: ignore[no-untyped-call]
    target = "torch.ops.screen_test.double.default"
    with pytest.raises(RefusalError, match=r'load with namespaces=\("screen_test",\)'):
        clean_target(target)
    assert clean_target(target, ("screen_test",)) == target
