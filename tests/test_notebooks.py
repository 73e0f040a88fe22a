"The notebooks are the source: layered, clean, valid, exported, parameterized, and free of traces of the machine that ran them."
import ast, io, json, re, shutil, subprocess, sys, tokenize
from importlib.util import resolve_name
from pathlib import Path

import nbformat, pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbformat.validator import iter_validate

ROOT = Path(__file__).parents[1]
LIB = ROOT/"mmu_study"
NOTEBOOKS = sorted(p for p in (ROOT/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
STUDIES = [p for p in NOTEBOOKS if p.parent.name == "studies"]
MODULES = sorted(p for p in LIB.rglob("*.py") if p.name not in ("__init__.py", "_modidx.py"))

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.relative_to(ROOT/"nbs").as_posix())
each_study = pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
each_module = pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(LIB).as_posix())

def read(path): return nbformat.read(path, as_version=4)
def code_cells(path): return [c for c in read(path).cells if c.cell_type == "code"]
def source(cell): return TransformerManager().transform_cell(cell.source)  # `!ls` and `%magic` as Python
def directives(cell): return {name for name in re.findall(r"^#\| *([\w-]+)", cell.source, re.M)}

# Layers

def module_of(path: Path) -> str | None:
    "Full name of the module that a notebook exports, if any."
    for cell in code_cells(path):
        if found := re.search(r"^#\| *default_exp +(\S+)", cell.source, re.M): return f"mmu_study.{found[1]}"

def layer_of(path: Path) -> tuple:
    "Place of a notebook in the order of reading: by its number; of equal numbers, the one directly in nbs/ first."
    return int(path.name.split("_")[0]), path.parent != ROOT/"nbs"

def layers() -> dict[str, tuple]: return {module_of(p): layer_of(p) for p in NOTEBOOKS if module_of(p)}

def name_of(path: Path) -> str: return ".".join(path.relative_to(ROOT).with_suffix("").parts)

def imported(path: Path) -> set[str]:
    "Every name below mmu_study that a module imports or reaches, at its top or inside a function; the package's own `__version__` and `__file__` do not count."
    package, names = name_of(path).rpartition(".")[0], set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import): names |= {a.name for a in node.names}
        if isinstance(node, ast.ImportFrom):
            start = resolve_name("."*node.level + (node.module or ""), package) if node.level else node.module
            names |= {f"{start}.{a.name}" for a in node.names}
        if isinstance(node, ast.Attribute): names.add(ast.unparse(node))
    return {n for n in names if n.startswith("mmu_study.") and not n.startswith("mmu_study.__")}

def modules_in(name: str, known) -> set[str]:
    "The modules that importing `name` (a module, a package or something in one) brings in; a package stands for all it holds."
    return {m for m in known if name == m or name.startswith(f"{m}.")} or {m for m in known if m.startswith(f"{name}.")}

def test_notebooks_have_a_place_of_their_own():
    ordered = [layer_of(p) for p in NOTEBOOKS if module_of(p)]
    assert len(ordered) == len(set(ordered))

def test_every_module_has_its_notebook(): assert {name_of(p) for p in MODULES} == set(layers())

def test_packages_hold_no_code():
    assert [p for p in LIB.rglob("__init__.py") if p.parent != LIB and p.read_text().strip()] == []
    assert re.fullmatch(r'__version__ = "[\w.]+"\n', (LIB/"__init__.py").read_text())

@each_module
def test_module_imports_only_lower_layers(path):
    order = layers()
    for name in imported(path):
        brought_in = modules_in(name, order)
        assert brought_in, f"{name} is in no module"
        assert [m for m in brought_in if order[m] >= order[name_of(path)]] == [], f"{name} is not below {name_of(path)}"

# Form

@each_notebook
def test_notebook_is_valid(path):
    nb = json.loads(path.read_text())  # nbformat.read would mend some faults in silence
    assert [e.message for e in iter_validate(nb)] == []
    assert len({c["id"] for c in nb["cells"]}) == len(nb["cells"]), "cell ids must differ"
    assert {"name", "language"} <= set(nb["metadata"].get("kernelspec", {}))
    assert {key for c in nb["cells"] for key in c["metadata"]} <= {"tags"}

@each_notebook
def test_notebook_shows_results_and_no_errors(path):
    cells = code_cells(path)
    assert [o for c in cells for o in c.outputs if o.output_type == "error"] == []
    assert not cells or any(c.outputs for c in cells if not directives(c) & {"hide", "hide_output"}), "no visible output; run it and save"

@each_notebook
def test_notebook_starts_with_a_title(path):
    first = read(path).cells[0]
    assert first.cell_type == "markdown" and re.match(r"# .+\n\n> .+", first.source), "start with `# title` and a `> subtitle`"

# nbdev

@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    "A copy of the project in which every module was exported anew and every notebook cleaned."
    copy = tmp_path_factory.mktemp("fresh")
    for name in ("pyproject.toml", "settings.ini"): shutil.copy(ROOT/name, copy)
    shutil.copytree(ROOT/"nbs", copy/"nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    (copy/"mmu_study").mkdir()
    shutil.copy(LIB/"__init__.py", copy/"mmu_study")
    for command in ("nbdev-export", "nbdev-clean"): subprocess.run([Path(sys.executable).parent/command], cwd=copy, check=True)
    return copy

def test_modules_are_what_the_notebooks_export(fresh):
    ours, theirs = ({p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.py")} for folder in (LIB, fresh/"mmu_study"))
    assert [n for n in sorted(ours | theirs) if ours.get(n) != theirs.get(n)] == [], "run `make export`"

@each_notebook
def test_notebook_is_clean(path, fresh):
    is_clean = path.read_bytes() == (fresh/path.relative_to(ROOT)).read_bytes()
    assert is_clean, "run `make clean-notebooks`"

# Studies

def test_there_are_studies(): assert STUDIES

@each_study
def test_study_has_one_cell_of_parameters(path):
    [cell] = [c for c in code_cells(path) if "parameters" in c.metadata.get("tags", [])]
    commented = {t.start[0] for t in tokenize.generate_tokens(io.StringIO(cell.source).readline) if t.type == tokenize.COMMENT}
    statements = ast.parse(cell.source).body
    assert statements
    for s in statements:
        assert isinstance(s, ast.AnnAssign) and s.value, f"`{ast.unparse(s)}` must read `name: type = default  # meaning`"
        assert s.end_lineno in commented, f"`{s.target.id}` has no comment"
        ast.literal_eval(s.value)

@each_study
def test_study_exports_nothing(path):
    assert [c.source for c in code_cells(path) if any(d.startswith("export") or d == "default_exp" for d in directives(c))] == []

# Traces

def tracked() -> list[Path]:
    "The files of the project as git sees them: tracked, or new and not ignored."
    listed = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [p for name in listed.split("\0") if name and (p := ROOT/name).is_file()]

MACHINE = re.compile(r"(?<![\w.~})-])/(?:work|tmp|home|root|Users)/\S*")

def texts(path: Path) -> list[str]:
    "The text of a file (of a binary one what can be read, its metadata for instance); of a notebook, its sources and outputs."
    if path.suffix != ".ipynb": return [path.read_bytes().decode(errors="ignore")]
    nb = read(path)
    outputs = [o for c in nb.cells for o in c.get("outputs", [])]
    return [c.source for c in nb.cells] + [o.get("text", "") for o in outputs] + [str(v) for o in outputs for v in o.get("data", {}).values()]

def test_no_paths_of_one_machine():
    assert {p.relative_to(ROOT).as_posix(): found for p in tracked() if (found := [f for t in texts(p) for f in MACHINE.findall(t)])} == {}

def swallowed(code: str) -> list[int]:
    "Lines of handlers that catch everything without naming it, or catch every exception and do nothing."
    def silent(h): return all(isinstance(s, (ast.Pass, ast.Continue)) or isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant) for s in h.body)
    def broad(h): return isinstance(h.type, ast.Name) and h.type.id in ("Exception", "BaseException")
    return [h.lineno for h in ast.walk(ast.parse(code)) if isinstance(h, ast.ExceptHandler) and (h.type is None or broad(h) and silent(h))]

@pytest.mark.parametrize("path", [*sorted((ROOT/"tests").rglob("*.py")), *MODULES], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_code_swallows_no_errors(path): assert swallowed(path.read_text()) == []

@each_notebook
def test_notebook_swallows_no_errors(path): assert [c.source for c in code_cells(path) if swallowed(source(c))] == []
