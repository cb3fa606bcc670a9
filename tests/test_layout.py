"""The house keeps its shape: imports go one way, exports are in step with notebooks, and notebooks read as agreed."""

import ast
import importlib
import inspect
import io
import re
import subprocess
import sys
import tokenize
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from execnb.nbio import nb2str, read_nb
from nbdev.clean import clean_nb
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from project import (
    EXPORTS,
    LIB,
    NBS,
    ROOT,
    code_cells,
    directives,
    floors,
    imports,
    module_file,
    module_of,
    name,
    notebooks,
    requirements,
    tree_of,
)

MODELS_MAY = {"torch", "numpy", "safetensors", "huggingface_hub"}
TRAINING_FLOOR, TRAINING_ONLY = 12, {"pytorch_lightning", "lightning", "hydra", "omegaconf"}
# Used by a library on our behalf, under no name of ours: pandas writes with pyarrow, huggingface_hub with safetensors.
UNSEEN = {"pyarrow", "safetensors"}
DEVELOPMENT = {"dev", "notebooks"}
each_notebook = pytest.mark.parametrize("path", notebooks(), ids=name)
each_module = pytest.mark.parametrize("module", floors())


# Modules


@each_module
def test_imports_go_down(module):
    floor = floors()
    up = {m for m in imports(module_file(module)) if floor.get(m, -1) >= floor[module]}
    assert not up, f"{module} (floor {floor[module]}) imports {up}: only lower-numbered notebooks may be imported"


@each_module
def test_imports_are_declared(module):
    "A user has what is in `requirements`; an optional dependency belongs to an extra, not to `dev`."
    wanted = {r for extra, reqs in requirements().items() if extra not in DEVELOPMENT for r in reqs}
    wanted = {canonicalize_name(Requirement(r).name) for r in wanted}
    tops = {m.partition(".")[0] for m in imports(module_file(module))} - sys.stdlib_module_names - {"gp2vec"}
    known = packages_distributions()
    missing = {t for t in tops if not {canonicalize_name(d) for d in known.get(t, [t])} & wanted}
    assert not missing, f"{module} imports {missing}, which settings.ini does not require"


def test_requirements_are_used():
    known = packages_distributions()
    tops = {m.partition(".")[0] for module in floors() for m in imports(module_file(module))}
    used = {canonicalize_name(d) for t in tops for d in known.get(t, [t])} | UNSEEN
    unused = {Requirement(r).name for r in requirements()[""] if canonicalize_name(Requirement(r).name) not in used}
    assert not unused, f"required in settings.ini, imported nowhere: {unused}"


@pytest.mark.parametrize("module", [m for m in floors() if m.startswith("gp2vec.models.")])
def test_models_need_little(module):
    found = imports(module_file(module))
    ours = {m for m in found if m.startswith("gp2vec") and not m.startswith("gp2vec.models")}
    theirs = {m.partition(".")[0] for m in found} - sys.stdlib_module_names - MODELS_MAY - {"gp2vec"}
    assert not ours | theirs, f"{module} imports {ours | theirs}; gp2vec.models may import {sorted(MODELS_MAY)} only"


@pytest.mark.parametrize("module", [m for m, floor in floors().items() if floor < TRAINING_FLOOR])
def test_training_stays_upstairs(module):
    found = {m.partition(".")[0] for m in imports(module_file(module))} & TRAINING_ONLY
    assert not found, f"{module} imports {found}: below notebook {TRAINING_FLOOR} that is not to be needed"


@pytest.mark.parametrize(
    ("prefix", "unwanted"),
    [
        ("gp2vec.", "nbdev fastcore execnb IPython pytest hypothesis"),
        ("gp2vec.models.", "obspy pandas s3fs webdataset pytorch_lightning hydra matplotlib sklearn"),
        ("gp2vec.data.", "pytorch_lightning hydra"),
    ],
)
def test_importing_loads_only(prefix, unwanted):
    "What the sources say is one thing; what Python loads is another."
    modules = [m for m in floors() if m.startswith(prefix)]
    assert modules, f"no notebook exports {prefix}*"
    code = f"import sys, {', '.join(modules)}; print(*({unwanted.split()!r} & sys.modules.keys()))".replace(
        "[", "{"
    ).replace("]", "}")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stdout.split(), f"importing {prefix}* loads {done.stdout}"


def test_exports_are_in_step(tmp_path):
    "Exporting all notebooks afresh gives the package that is there, file by file."
    (tmp_path / "gp2vec").mkdir()
    for path in [*notebooks(), ROOT / "settings.ini", LIB / "__init__.py"]:
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    done = subprocess.run(
        [sys.executable, "-c", "import nbdev; nbdev.nbdev_export()"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr

    def package(root: Path) -> dict[str, str]:
        files = (p for p in sorted((root / "gp2vec").rglob("*.py")) if p.read_text() or p.name != "__init__.py")
        return {p.relative_to(root).as_posix(): p.read_text(encoding="utf-8") for p in files}

    fresh, ours = package(tmp_path), package(ROOT)
    assert ours.keys() - fresh.keys() == set(), "in gp2vec/, but exported by no notebook"
    stale = [f for f in fresh if fresh[f] != ours.get(f)]
    assert not stale, f"not what the notebooks export: {stale}; run nbdev_export"


# Documentation of public names


def comments_of(source: str) -> dict[int, str]:
    "Comments by line."
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {
        t.start[0]: t.string.lstrip("#").strip() for t in tokens if t.type == tokenize.COMMENT and t.string.strip("# ")
    }


def parameters(node: ast.FunctionDef) -> list[tuple[ast.arg, int, int]]:
    "Parameters without `self`, with their first and last line."
    a = node.args
    plain = [*a.posonlyargs, *a.args]
    pairs = [*zip(plain, [None] * (len(plain) - len(a.defaults)) + a.defaults, strict=True)]
    pairs += [*zip(a.kwonlyargs, a.kw_defaults, strict=True), *((x, None) for x in (a.vararg, a.kwarg) if x)]
    return [
        (p, p.lineno, max(p.end_lineno, d.end_lineno if d else 0)) for p, d in pairs if p.arg not in ("self", "cls")
    ]


def docment(first: int, last: int, comments: dict[int, str], lines: list[str]) -> str | None:
    "The comment beside lines `first` to `last`, or alone on the line before."
    beside = [comments[i] for i in range(first, last + 1) if i in comments]
    above = comments.get(first - 1) if lines[first - 2].strip().startswith("#") else None
    return " ".join(beside) or above


def undocumented(
    node: ast.FunctionDef, what: str, comments: dict[int, str], lines: list[str], returns=True
) -> list[str]:
    "What a reader of the signature is not told."
    bad, params, doc = [], parameters(node), ast.get_docstring(node) or ""
    told = doc if re.search(r"^\s*(Parameters|Args)\b", doc, re.MULTILINE) else ""
    # A comment on a line that two parameters or the return share cannot say which it means.
    shared = [i for _, first, last in params for i in range(first, last + 1)] + [getattr(node.returns, "end_lineno", 0)]
    for p, first, last in params:
        text = None if shared.count(last) > 1 else docment(first, last, comments, lines)
        if text is None and re.search(rf"\b{p.arg}\b", told):
            continue
        bad += (
            [f"{what}: parameter `{p.arg}` has no docment"]
            if text is None
            else shapeless(text, p.annotation, f"{what}: `{p.arg}`")
        )
    if not returns:
        return bad
    if node.returns is None:
        return [*bad, f"{what}: no return annotation"]
    if ast.unparse(node.returns) in ("None", "'None'"):
        return bad
    text = comments.get(node.returns.end_lineno)
    return bad + (
        [f"{what}: the return has no docment"] if text is None else shapeless(text, node.returns, f"{what}: the return")
    )


def shapeless(text: str, annotation: ast.expr | None, what: str) -> list[str]:
    "An array without a shape, such as `(B, C, N)`; one that may be a number, or is not used, needs none."
    kind = ast.unparse(annotation) if annotation else ""
    array = re.search(r"\b(Tensor|ndarray)\b", kind) and not re.search(r"\b(float|int)\b", kind)
    told = re.search(r"\(.*\)|scalar|shape|^not ", text)
    return [f"{what} is an array and tells no shape: {text}"] if array and not told else []


def foreign(cls: type, method: str) -> bool:
    "Whether a method fills in what a library asks for, whose documentation tells the parameters (`forward` is ours)."
    return method != "forward" and any(
        method in vars(c) for c in cls.__mro__[1:] if not c.__module__.startswith("gp2vec")
    )


def findings(module: str) -> list[str]:
    "Everything public in a module that is not documented."
    live, source = importlib.import_module(module), module_file(module).read_text(encoding="utf-8")
    comments, lines, bad = comments_of(source), source.splitlines(), []
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.parse(source).body:
        if not isinstance(node, (*functions, ast.ClassDef)) or node.name not in live.__all__:
            continue
        if not ast.get_docstring(node):
            bad.append(f"`{node.name}` has no docstring")
        if isinstance(node, functions):
            bad += undocumented(node, node.name, comments, lines)
            continue
        cls = getattr(live, node.name)
        for item in node.body:
            if (
                isinstance(item, ast.AnnAssign)
                and hasattr(cls, "__match_args__")
                and "ClassVar" not in ast.unparse(item.annotation)
            ):
                field = f"{node.name}.{item.target.id}"
                text = docment(item.lineno, item.end_lineno, comments, lines)
                if item.target.id.startswith("_"):
                    continue
                bad += [f"field `{field}` has no docment"] if text is None else shapeless(text, item.annotation, field)
            if not isinstance(item, functions):
                continue
            what, special = f"{node.name}.{item.name}", item.name in ("__init__", "__call__")
            if item.name.startswith("_") and not special:
                continue
            if not special and not ast.get_docstring(item):
                bad.append(f"`{what}` has no docstring")
            accessor = any(
                ast.unparse(d).split(".")[-1] in ("property", "cached_property", "setter", "overload")
                for d in item.decorator_list
            )
            if accessor or foreign(cls, item.name) and not special:
                continue
            bad += undocumented(item, what, comments, lines, returns=item.name != "__init__")
    return bad


@each_module
def test_public_names_are_documented(module):
    bad = findings(module)
    assert not bad, "\n".join([module, *bad])


# Notebooks


@each_notebook
def test_notebook_opens_with_title_and_sentence(path):
    "nbdev turns the first cell into the head of the page: whatever else it holds would be missing from the docs."
    first = read_nb(path).cells[0]
    alone = first.cell_type == "markdown" and re.fullmatch(r"# \S.*\n+> \S.*\s*", first.source)
    assert alone, (
        f"the first cell is to be `# Title` and `> one sentence` on one line, and no more: {first.source[:200]}"
    )


@each_notebook
def test_module_is_named_as_its_notebook(path):
    module, number = module_of(path), re.match(r"(\d+[a-z]?)_(.+)", path.stem)
    assert bool(module) == bool(number), "a numbered notebook exports its module; others export nothing"
    if module:
        assert module == f"gp2vec.{number[2]}"


@each_notebook
def test_export_cells_are_short(path):
    for source in (c["source"] for c in code_cells(path) if directives(c["source"]) & EXPORTS):
        lines = [line for line in source.splitlines() if line.strip() and not line.startswith("#|")]
        assert len(lines) <= 60, f"an export cell of {len(lines)} lines: {lines[0]}"


@each_notebook
def test_imports_stand_alone(path):
    "The page build runs import cells without the cells before them; a star hides where a name comes from."
    for source in (c["source"] for c in code_cells(path)):
        if "nbdev_export()" in source:
            continue
        tree = tree_of(source)
        kinds = {isinstance(n, (ast.Import, ast.ImportFrom)) for n in tree.body}
        assert len(kinds) < 2, f"imports share a cell with other code:\n{source[:300]}"
        stars = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.names[0].name == "*"]
        assert not stars, f"star import from {stars}"


@each_notebook
def test_notebook_is_clean(path):
    "Outputs are committed, metadata and execution counts are not: nbdev_clean would change nothing."
    text, nb = path.read_text(encoding="utf-8"), read_nb(path)
    for cell in nb.cells:
        assert not cell.metadata, f"metadata in a cell: {cell.metadata}"
        assert cell.get("execution_count") is None, "an execution count"
        assert cell.id, "a cell without an id: exported comments would change at every save"
        for output in cell.get("outputs", []):
            assert output.get("execution_count") is None, "an execution count in an output"
    clean_nb(nb)
    assert nb2str(nb) == text, "run nbdev_clean"


@each_notebook
def test_outputs_are_of_no_one_machine(path):
    for cell in code_cells(path):
        for output in cell["outputs"]:
            text = "".join(output.get("text", [])) + "".join(
                "".join(v) for k, v in output.get("data", {}).items() if k.startswith("text")
            )
            found = re.search(r".*(/home/|/root/|/tmp/|/Users/|site-packages|0x[0-9a-f]{8,}).*", text)
            assert not found, f"an output holds a path or an address: {found[0]}"


@pytest.mark.parametrize("path", [p for p in notebooks() if module_of(p) or p.stem == "index"], ids=name)
def test_notebook_has_figure_and_contract(path):
    cells = code_cells(path)
    assert any(k.startswith("image/") for c in cells for o in c["outputs"] for k in o.get("data", {})), "no figure"
    if not module_of(path):
        return
    checks = (c["source"] for c in cells if not directives(c["source"]) & EXPORTS)
    assert any(re.search(r"^\s*assert\b|pytest\.raises|assert_\w+\(", s, re.MULTILINE) for s in checks), "no contract"


def test_rooms_are_listed():
    "The table of rooms in CONTRIBUTING.md names every notebook and its module, in order, and none that is not there."
    rows = re.findall(
        r"^\| `([^`]+)` \| (?:`([^`]+)`|–) \|", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    rooms = [(n, m or None) for n, m in rows if (NBS / f"{n}.ipynb").parent == NBS]
    ours = [(name(p), module_of(p)) for p in notebooks() if p.parent == NBS]
    assert rooms == sorted(ours, key=lambda room: (room[1] is not None, room))


def test_no_source_is_hidden():
    "Every module is importable from the folder under test, not from another copy."
    for module in floors():
        assert Path(inspect.getfile(importlib.import_module(module))).resolve() == module_file(module)
