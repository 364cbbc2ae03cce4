"""The project agrees with itself: settings, pins, generated files, floors, documentation, verbs, what is shipped.

python tests/test_project.py writes README.md from nbs/index.ipynb.
"""

import ast
import importlib
import inspect
import os
import posixpath
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from configparser import ConfigParser
from dataclasses import is_dataclass
from functools import cached_property
from pathlib import Path

import nbformat
import pytest
from fastcore.docments import docments
from nbconvert import MarkdownExporter
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "cola_tutorial"
NOTHING = (None, "None", inspect.Signature.empty)
GENERATED = {"_modidx", "text.__init__", "nn.__init__", "views.__init__"}

# The floors of the house: a module may import modules of lower floors only.
FLOORS = {
    "config": 0,
    "text.stories": 1,
    "text.corpus": 1,
    "nn.attention": 1,
    "processes": 1,
    "text.shards": 2,
    "vae": 2,
    "flow": 2,
    "dit": 2,
    "objectives": 3,
    "costs": 3,
    "model": 3,
    "generation": 4,
    "baselines": 6,
    "checkpoints": 7,
    "training": 8,
    "plain": 5,
    "plain_training": 5,
    "likelihood": 5,
    "evaluation": 5,
    "tasks": 6,
    "harness": 7,
    "editing": 5,
    "verify": 5,
    "story_tasks": 6,
    "report": 6,
    "bench": 6,
    "bench_training": 9,
    "compare": 9,
    "viz": 5,
    "screen": 6,
    "views.field": 7,
    "views.writing": 7,
    "views.latents": 9,
    "views.seeing": 7,
    "views.cockpit": 9,
    "views.app": 10,
    "cli": 11,
    "__init__": 12,
}
# Pictures and the harness need extras, and the command line is a program: the package's front door leads to none of them.
PICTURES = {name for name in FLOORS if name in ("viz", "screen") or name.startswith("views.")}
ROOMS = [name for name in FLOORS if name not in PICTURES | {"harness", "cli", "__init__"}]


def settings() -> ConfigParser:
    "What settings.ini says."
    parser = ConfigParser(delimiters=["="])
    parser.read_string((ROOT / "settings.ini").read_text(encoding="utf-8"))
    return parser


def ours(*skipped: str) -> Iterator[Path]:
    "Every file of the project, not those that tools leave; `skipped` are further folders to leave out."
    leave = {".git", ".venv", "build", "dist", "runs", "_docs", *skipped}
    for folder, folders, files in os.walk(ROOT):
        caches = {name for name in folders if name.endswith((".egg-info", "_cache", "_checkpoints", "__"))}
        folders[:] = sorted({*folders} - leave - caches - {".hypothesis"})
        yield from (Path(folder) / name for name in sorted(files) if name != ".DS_Store")


def modules() -> dict[str, Path]:
    "Dotted name below the package -> file, for each module."
    files = (path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts)
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(files)}


def tree(name: str) -> ast.Module:
    "A module's syntax tree."
    return ast.parse(modules()[name].read_text(encoding="utf-8"))


written = pytest.mark.parametrize("name", [name for name in modules() if name not in GENERATED])


# What is published


def test_every_requirement_is_pinned_to_what_is_installed() -> None:
    "constraints.txt has exactly one version for each requirement, it fits, and it is the one these tests run with."
    from importlib.metadata import version

    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    names = [canonicalize_name(pin.name) for pin in pins]
    assert names == sorted(set(names))
    versions = {name: str(pin.specifier).removeprefix("==") for name, pin in zip(names, pins)}
    told = settings()
    asked = [told["project"]["requirements"], *told["extras"].values()]
    for requirement in map(Requirement, " ".join(asked).split()):
        pinned = versions[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pinned), requirement
        assert version(requirement.name).split("+")[0] == pinned, f"{requirement.name}: make test installs {pinned}"


def test_pins_name_no_build_of_torch_and_no_gpu_library() -> None:
    "The same file serves machines with and without CUDA."
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pins = [line for line in text.splitlines() if not line.startswith("#")]
    assert not [line for line in pins if "+" in line or line.startswith(("nvidia", "cuda", "triton"))]


def test_version_is_the_published_one() -> None:
    "cola_tutorial.__version__ says what settings.ini says."
    import cola_tutorial

    assert cola_tutorial.__version__ == settings()["project"]["version"]


def test_commands_exist() -> None:
    "Each command calls a documented function of the package that needs no argument."
    for command, target in settings()["console_scripts"].items():
        module, name = target.split(":")
        function = getattr(importlib.import_module(module), name)
        needed = [p.name for p in inspect.signature(function).parameters.values() if p.default is p.empty]
        assert function.__doc__ and not needed, f"{command} calls {name}(), which needs {needed}"


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A folder with the wheel and the source distribution, built from a copy."
    copy = tmp_path_factory.mktemp("source")
    for name in ("settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE"): shutil.copy(ROOT / name, copy)
    for name in ("cola_tutorial", "data"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = "from setuptools import build_meta as b; print(b.build_wheel('dist'), b.build_sdist('dist'))"
    run = subprocess.run([sys.executable, "-c", build], cwd=copy, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return copy / "dist"


def test_wheel_has_all_modules_data_and_facts(distributions: Path) -> None:
    "The wheel holds the package, the data folder inside it, the licence, and the facts of settings.ini."
    told = settings()["project"]
    (wheel,) = distributions.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = f"cola_tutorial-{told['version']}.dist-info"
        facts = archive.read(f"{info}/METADATA").decode()
        commands = archive.read(f"{info}/entry_points.txt").decode()
    assert {path.relative_to(ROOT).as_posix() for path in modules().values()} <= names
    data = [path for path in ours() if path.is_relative_to(ROOT / "data") and not path.name.startswith(".")]
    assert {f"cola_tutorial/{path.relative_to(ROOT).as_posix()}" for path in data} <= names
    assert f"{info}/licenses/LICENSE" in names
    assert not [name for name in names if name.startswith(("tests", "nbs", "data"))]
    wanted = {"Name": told["name"], "Version": told["version"], "Summary": told["description"]}
    wanted |= {"Author": told["author"], "Requires-Python": f">={told['min_python']}"}
    for key, value in wanted.items(): assert f"\n{key}: {value}\n" in facts
    assert re.search(rf"^License(-Expression)?: {told['license']}$", facts, re.MULTILINE)
    for requirement in told["requirements"].split(): assert f"\nRequires-Dist: {requirement}\n" in facts
    assert all(f"{name} = {value}" in commands for name, value in settings()["console_scripts"].items())


def test_wheel_finds_its_own_data(distributions: Path, tmp_path: Path) -> None:
    "Unpacked anywhere, the package reads the data folder that travelled with it."
    (wheel,) = distributions.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    ask = "from cola_tutorial.config import data_dir; print(data_dir())"
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", ask], cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert Path(run.stdout.strip()) == tmp_path / "cola_tutorial" / "data"


def test_source_distribution_can_be_built_from(distributions: Path, tmp_path: Path) -> None:
    "It carries the settings that setup.py reads, the data, and so gives the same wheel."
    (archive,) = distributions.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    build = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
    run = subprocess.run([sys.executable, "-c", build], cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    (first,), (second,) = distributions.glob("*.whl"), (folder / "dist").glob("*.whl")
    assert {*zipfile.ZipFile(first).namelist()} == {*zipfile.ZipFile(second).namelist()}


# What is generated


def relink(
    text: str,  # markdown written beside the notebooks
) -> str:  # the same for the folder above
    "Make links and pictures that point to files of nbs/ point there from the folder above it."

    def moved(link: re.Match) -> str:
        if re.match(r"[a-z]+:|#|/", link[2]): return link[0]
        return link[1] + posixpath.normpath(posixpath.join("nbs", link[2])) + link[3]

    return re.sub(r'(\]\(|src=")([^)"\s]+)([)"])', moved, text)


def readme() -> str:
    "README.md as nbs/index.ipynb says it: directives are left out, links start at the project's folder."
    notebook = nbformat.read(ROOT / "nbs" / "index.ipynb", as_version=4)
    for cell in notebook.cells: cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.MULTILINE)
    notebook.cells = [cell for cell in notebook.cells if cell.source.strip()]
    text, resources = MarkdownExporter().from_notebook_node(notebook)
    if resources["outputs"]: raise ValueError("nbs/index.ipynb shows a picture made by code: put a static one in nbs/")
    return relink(re.sub(r"\n{3,}", "\n\n", text).strip() + "\n")


def test_readme_is_the_index_notebook() -> None:
    "README.md is generated, and up to date."
    assert (ROOT / "README.md").read_text(encoding="utf-8") == readme(), "make readme"


def test_readme_links_lead_somewhere() -> None:
    "Every link to a file of the project finds it."
    links = re.findall(r'(?:\]\(|src=")([^)"\s#]+)', (ROOT / "README.md").read_text(encoding="utf-8"))
    local = [link for link in links if not re.match(r"[a-z]+:", link)]
    assert local and not [link for link in local if not (ROOT / link).exists()]


def test_links_move_with_the_text() -> None:
    "From nbs/ to the folder above it: files move, addresses and headings stay."
    beside = '[a](06_flow.ipynb) [b](../LICENSE) ![c](images/x.png) [d](http://b/c) [e](#top) <img src="i.png">'
    above = '[a](nbs/06_flow.ipynb) [b](LICENSE) ![c](nbs/images/x.png) [d](http://b/c) [e](#top) <img src="nbs/i.png">'
    assert relink(beside) == above


def contents(folder: Path) -> dict[str, bytes]:
    "Every file below a folder, read whole, but for what Python and Jupyter leave."
    left = {"__pycache__", ".ipynb_checkpoints"}
    files = (path for path in folder.rglob("*") if path.is_file() and not left & {*path.parts})
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "The notebooks, tracked or not, exported into an empty folder."
    folder = tmp_path_factory.mktemp("exported")
    shutil.copy(ROOT / "pyproject.toml", folder)
    shutil.copytree(ROOT / "nbs", folder / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    env = {name: value for name, value in os.environ.items() if name != "IN_TEST"} | {"XDG_CONFIG_HOME": str(folder)}
    export = "from nbdev.doclinks import nbdev_export; nbdev_export()"
    subprocess.run([sys.executable, "-c", export], cwd=folder, env=env, check=True)
    return folder


def test_package_is_what_the_notebooks_export(exported: Path) -> None:
    "A fresh export gives the package byte by byte, and not a file more or less, untracked ones included."
    fresh, here = contents(exported / "cola_tutorial"), contents(PACKAGE)
    assert here.keys() == fresh.keys(), "make export"
    assert [name for name in fresh if here[name] != fresh[name]] == [], "make export"


def test_export_writes_nothing_else(exported: Path) -> None:
    "Exporting leaves the notebooks and their folder as they were."
    assert contents(exported / "nbs") == contents(ROOT / "nbs")


# How the house stands


def imports(name: str) -> set[str]:
    "Modules of the package that a module imports, wherever in its code."
    here = ["cola_tutorial", *name.split(".")]
    known, found = modules(), set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import): found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            base = ".".join(here[: -node.level] if node.level else []) + ("." if node.level and node.module else "")
            base += node.module or ""
            below = {f"{base}.{alias.name}" for alias in node.names}
            found |= {one if one.removeprefix("cola_tutorial.") in known else base for one in below}
    return {one.removeprefix("cola_tutorial.") for one in found if one.startswith("cola_tutorial.")}


def test_every_module_has_its_floor() -> None:
    "The table names every module, and no module that is not there."
    assert {*modules()} - GENERATED == {*FLOORS}
    assert not any(imports(name) for name in GENERATED & {*modules()})


@written
def test_imports_go_downwards(name: str) -> None:
    "A module imports lower floors only; pictures are asked for by the command line alone."
    assert name in FLOORS, f"{name} has no floor yet"
    upward = {other for other in imports(name) if FLOORS.get(other, 99) >= FLOORS[name]}
    assert not upward, f"{name} (floor {FLOORS[name]}) imports {sorted(upward)}"
    assert not PICTURES & imports(name) or name in PICTURES | {"cli"}


def test_front_door_leads_to_every_room() -> None:
    "Both lists of the package's first file name all rooms, in the order of their floors."
    import cola_tutorial

    assert list(cola_tutorial._rooms) == ROOMS
    stars = [node.module for node in ast.walk(tree("__init__")) if isinstance(node, ast.ImportFrom) and node.level == 0]
    assert [one.removeprefix("cola_tutorial.") for one in stars if one.startswith("cola_tutorial.")] == ROOMS


def test_public_names_are_one_of_a_kind() -> None:
    "No two rooms offer the same name, and no name hides a module."
    owners = Counter(name for room in ROOMS for name in importlib.import_module(f"cola_tutorial.{room}").__all__)
    assert [name for name, count in owners.items() if count > 1] == []
    assert not owners.keys() & {part for module in modules() for part in module.split(".")}


def test_front_door_opens_a_room_only_when_asked() -> None:
    "Importing the package loads no library; a star brings every name; a missing name is an ordinary error."
    light = "import sys, cola_tutorial; assert not {'torch', 'datasets', 'numpy'} & {*sys.modules}"
    star = "from cola_tutorial import *; assert ColaDLM.__name__ == 'ColaDLM' and callable(steps_for)"
    missing = "import cola_tutorial\ntry: from cola_tutorial import NoSuchName\nexcept ImportError: pass\nelse: 1 / 0"
    for program in (light, star, missing):
        run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr


def test_front_door_hands_out_whole_classes() -> None:
    "A class that rooms above its own give methods to opens these rooms, in a fresh Python too."
    import cola_tutorial

    grown: dict[str, set[str]] = {}
    for room in ROOMS:
        module = importlib.import_module(f"cola_tutorial.{room}")
        owned = {name: getattr(module, name) for name in module.__all__}
        owned = {name: owner for name, owner in owned.items() if inspect.isclass(owner) and owner.__module__ == module.__name__}
        for name, owner in owned.items():
            elsewhere = {method.__module__.removeprefix("cola_tutorial.") for _, method in methods(owner)} - {room}
            if elsewhere: grown[name] = elsewhere
    assert grown == {name: {*rooms} for name, rooms in cola_tutorial._grown.items()} and "ColaDLM" in grown
    program = "from cola_tutorial import ColaDLM; ColaDLM.generate, ColaDLM.score"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


# How the code is written


def public(module: str) -> Iterator[tuple[str, object]]:
    "The functions and classes that a module offers."
    loaded = importlib.import_module("cola_tutorial" if module == "__init__" else f"cola_tutorial.{module}")
    for name in ast.literal_eval(next(node.value for node in tree(module).body if is_all(node))):
        value = getattr(loaded, name)
        if inspect.isclass(value) or inspect.isfunction(value): yield name, value


def methods(owner: type) -> Iterator[tuple[str, Callable]]:
    "The public methods and properties that a class defines itself."
    for name, member in vars(owner).items():
        member = getattr(member, "__func__", getattr(member, "fget", member))
        member = member.func if isinstance(member, cached_property) else member
        if inspect.isfunction(member) and not name.startswith("_"): yield f"{owner.__name__}.{name}", member


def docstring(value: object) -> str:
    "What it says of itself: neither what its parent says, nor the signature that a dataclass writes for itself."
    told = (vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__) or ""
    return "" if told.startswith(f"{value.__name__}(") else told


def comments(value: object) -> dict[str, str | None]:
    "Parameter, or `return`, -> the comment behind it; for a class its constructor's, inherited fields included."
    if not inspect.isclass(value):
        told = docments(value, full=True, args_kwargs=True)
        return {name: one.docment for name, one in told.items() if name != "return" or one.anno not in NOTHING}
    found: dict[str, str | None] = {}
    for owner in value.__mro__:
        if "__init__" not in vars(owner) or owner.__module__.split(".")[0] != "cola_tutorial": continue
        told = docments(owner, args_kwargs=True, returns=False)
        found |= {name: comment for name, comment in told.items() if name != "self" and not found.get(name)}
        if not is_dataclass(owner): break
    return found


def is_all(node: ast.stmt) -> bool:
    "Is this the assignment of __all__?"
    return isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"


@written
def test_public_names_are_documented(name: str) -> None:
    "Each has a docstring, its methods too, and a comment behind each parameter and behind what it returns."
    bare = []
    for label, value in public(name):
        parts = [(label, value), *(methods(value) if inspect.isclass(value) else [])]
        bare += [part for part, one in parts if not docstring(one)]
        bare += [f"{label}({parameter})" for parameter, comment in comments(value).items() if not comment]
    assert not bare, f"{name}: no docstring or comment for {bare}"


def faults(node: ast.AST) -> Iterator[str]:
    "What the package must not do: swallow every error, load a pickle, promise work."
    if isinstance(node, ast.ExceptHandler):
        caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        if {ast.unparse(one) if one else "" for one in caught} & {"", "Exception", "BaseException"}:
            yield "catches every error"
    names = {alias.name for alias in node.names} if isinstance(node, ast.Import | ast.ImportFrom) else set()
    names |= {node.module or ""} if isinstance(node, ast.ImportFrom) else set()
    if names & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}: yield "imports a pickle"
    if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.save"): yield ast.unparse(node)
    if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and getattr(node.value, "value", True):
        yield "allows a pickle"
    if isinstance(node, ast.Name) and node.id == "NotImplementedError": yield "is not finished"


@written
def test_package_does_nothing_forbidden(name: str) -> None:
    "No error is swallowed, no pickle read, nothing left to do."
    found = [f"line {node.lineno} {fault}" for node in ast.walk(tree(name)) for fault in faults(node)]
    words = re.findall(r"\b(?:TODO|FIXME|XXX|HACK)\b", modules()[name].read_text(encoding="utf-8"))
    assert not found + words


@pytest.mark.parametrize(
    "code",
    [
        "try: f()\nexcept: pass",
        "try: f()\nexcept Exception: pass",
        "try: f()\nexcept (ValueError, Exception): pass",
        "import pickle",
        "from pickle import loads",
        "torch.load(path)",
        "numpy.load(path, allow_pickle=True)",
        "raise NotImplementedError",
    ],
)
def test_forbidden_code_is_seen(code: str) -> None:
    "The check above finds each fault, and lets ordinary code pass."
    assert [fault for node in ast.walk(ast.parse(code)) for fault in faults(node)]
    plain = "try: f()\nexcept (ValueError, OSError): pass\nnumpy.load(path, allow_pickle=False)"
    assert not [fault for node in ast.walk(ast.parse(plain)) for fault in faults(node)]


def test_ruff_passes() -> None:
    "The linter has nothing to say about the package, the tests and setup.py."
    run = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--no-cache", "cola_tutorial", "nbs/_site", "tests", "setup.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_no_file_names_a_package_registry() -> None:
    "Where packages come from is the machine's business: no file names a registry's host."
    parts = [("pypi", "org"), ("files", "pythonhosted", "org"), ("registry", "npmjs", "org"), ("deb", "debian", "org")]
    hosts = [".".join(part).encode() for part in parts]
    named = [path for path in ours() if path.is_file() and any(host in path.read_bytes() for host in hosts)]
    assert not named


# The verbs


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    "A folder with the Makefile and what its installation depends on, and a Python that only writes down its calls."
    for name in ("Makefile", "settings.ini", "setup.py", "constraints.txt"): shutil.copy(ROOT / name, tmp_path)
    program(
        tmp_path / "python",
        'echo "$@" >> "$RECORD"',
        'case "$*" in',
        '  "-m venv --clear .venv") mkdir -p .venv/bin; cp "$0" .venv/bin/python;;',
        '  "-m pip install"*) exit "${PIP_EXIT:-0}";;',
        "esac",
    )
    return tmp_path


def program(path: Path, *lines: str) -> None:
    "Write a shell program."
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def make(clone: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    "Run make in a clone, as from a terminal."
    # Under `make test`, its own settings are in the environment and must not reach the make that is tested.
    outer = ("MAKE", "MFLAGS", "PYTHON", "PYTEST", "PORT", "LAB_ARGS", "NOTEBOOKS")
    env = {name: value for name, value in os.environ.items() if not name.startswith(outer)}
    env |= {"RECORD": str(clone / "record"), **environment}
    return subprocess.run(["make", *arguments], cwd=clone, env=env, capture_output=True, text=True)


def calls(clone: Path) -> list[str]:
    "What the pretended Python was asked since the last look, but for questions about itself."
    record = clone / "record"
    lines = [line for line in record.read_text().splitlines() if not line.startswith("-c ")]
    record.unlink()
    return lines


PYTHON = "PYTHON=./python"
INSTALL = "-m pip install --quiet --disable-pip-version-check -c constraints.txt -e .[lab,test,docs]"


def test_make_alone_lists_every_verb(clone: Path) -> None:
    "The default verb tells all verbs."
    (line,) = re.findall(r"^\.PHONY: (.+)$", (clone / "Makefile").read_text(), re.MULTILINE)
    listed = re.findall(r"^make ([a-z-]+) +\S", make(clone).stdout, re.MULTILINE)
    assert listed == line.split()
    assert {"lab", "test", "walkthrough", "export", "clean-notebooks", "readme", "docs", "explore", "pretrained", "posterior-lab"} <= {*listed}


def test_make_installs_once(clone: Path) -> None:
    "The first run makes an environment with the tested versions, the second only works, a changed pin installs."
    assert make(clone, "test", PYTHON).returncode == 0
    assert calls(clone) == ["-m venv --clear .venv", INSTALL, "-m pytest"]
    assert make(clone, "test", "PYTEST_ARGS=-x").returncode == 0
    assert calls(clone) == ["-m pytest -x"]
    later = (clone / ".venv" / "ready").stat().st_mtime + 10
    os.utime(clone / "constraints.txt", (later, later))
    assert make(clone, "test").returncode == 0
    assert calls(clone) == [INSTALL, "-m pytest"]


def test_make_takes_up_an_interrupted_installation(clone: Path) -> None:
    "A broken installation leaves no mark: the next run installs again, and does not start from nothing."
    assert make(clone, "test", PYTHON, PIP_EXIT="1").returncode != 0
    assert calls(clone)[-1] == INSTALL
    assert make(clone, "test", PYTHON).returncode == 0
    assert calls(clone) == [INSTALL, "-m pytest"]


def test_make_lab_opens_the_index(clone: Path) -> None:
    "JupyterLab gets the port, the reader's arguments, and the right of root only when root runs it."
    assert make(clone, "lab", PYTHON, "PORT=9123", "LAB_ARGS=--no-browser").returncode == 0
    lab = calls(clone)[-1]
    assert lab.startswith("-m jupyterlab --port=9123") and lab.endswith("--no-browser")
    assert "--LabApp.default_url=/lab/tree/nbs/index.ipynb" in lab and (ROOT / "nbs" / "index.ipynb").exists()
    assert ("--allow-root" in lab) == (os.getuid() == 0)


def test_make_names_a_wrong_python(clone: Path) -> None:
    "No Python of a tested version: say which were tried and how to name one; make nothing."
    run = make(clone, "lab", "PYTHON=false")
    assert run.returncode != 0 and not (clone / ".venv").exists()
    assert "No Python 3.11, 3.12 or 3.13 found. Tried: false." in run.stderr and "make lab PYTHON=" in run.stderr


@pytest.mark.parametrize(
    "version, taken",
    [((3, 10, 14), False), ((3, 11, 0), True), ((3, 12, 9), True), ((3, 13, 1), True), ((3, 14, 0), False)],
)
def test_make_takes_tested_versions_only(version: tuple, taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    "The question that the Makefile puts to a Python accepts 3.11 to 3.13; the lowest is the one that is published."
    (question,) = re.findall(r"-c '(import sys; sys\.exit\(.+?\))' ", (ROOT / "Makefile").read_text(encoding="utf-8"))
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as answer:
        patch.setattr(sys, "version_info", version)
        exec(question)
    assert (not answer.value.code) == taken
    assert settings()["project"]["min_python"] == "3.11"


def test_make_looks_for_a_python_that_works(clone: Path) -> None:
    "A newer name that does not run is passed over."
    for name in ("python3.13", "python3.11"): program(clone / "bin" / name, "exit 127")
    program(clone / "bin" / "python3.12", f'exec "{clone}/python" "$@"')
    assert make(clone, "test", PATH=f"{clone / 'bin'}:{os.environ['PATH']}").returncode == 0
    assert calls(clone)[0] == "-m venv --clear .venv"


def test_make_names_a_missing_venv_module(clone: Path) -> None:
    "A Python without venv, as some systems ship it: say what to install."
    program(clone / "bare", 'case "$*" in *ensurepip*) exit 1;; esac')
    run = make(clone, "test", "PYTHON=./bare")
    assert run.returncode != 0 and "./bare has no venv module" in run.stderr


def test_make_names_a_full_disk(clone: Path) -> None:
    "Under 3 GB: say what is free and what is needed, before anything is downloaded."
    program(clone / "bin" / "df", 'echo "Filesystem 1024-blocks Used Available"; echo "disk 9 8 2048000 1% /"')
    run = make(clone, "test", PYTHON, PATH=f"{clone / 'bin'}:{os.environ['PATH']}")
    assert run.returncode != 0 and not (clone / ".venv").exists()
    assert "Only 2000 MB are free here; the installation needs 3072 MB." in run.stderr


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")
