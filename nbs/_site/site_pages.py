"""Pages of the web site, made from the notebooks and from the package's own comments.

python nbs/_site/site_pages.py [_docs] [html or linkcheck] builds the site.
"""

import ast
import html
import importlib
import inspect
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, is_dataclass
from functools import cache, cached_property
from importlib.resources import as_file, files
from itertools import groupby
from pathlib import Path

import nbformat
from docutils.nodes import SkipNode, Text, make_id
from fastcore.docments import docments
from math_core import LatexError, LatexToMathML
from nbdev import processors
from nbdev.process import NBProcessor
from sphinx.cmd.build import main as sphinx_build
from sphinx.util.logging import getLogger
from sphinx.util.typing import stringify_annotation

SITE = Path(__file__).resolve().parent
NBS, ROOT = SITE.parent, SITE.parent.parent
PACKAGE = ROOT / "cola_tutorial"
sys.path.insert(0, str(ROOT))  # the package beside these sources is described, wherever another one is installed

from cola_tutorial.screen import page_assets, still_html  # noqa: E402

PLOTLY = "application/vnd.plotly.v1+json"
# A group of lessons takes all from its number up to the next group's.
GROUPS = {0: "Beginnings", 2: "Text", 4: "Model", 9: "Generation", 10: "Training", 11: "Evaluation", 14: "Views", 15: "Tools", 17: "Measuring"}
MOST_SHOWN, LONGEST = 12, 60  # parameters in a signature; characters of a default
PAGES = {"glossary": "Glossary", "symbols": "Symbols", "citation": "Citation", "changelog": "Changes"}


# Lessons


@dataclass(frozen=True)
class Lesson:
    "A row of the table in the index."

    stem: str  # file name without its ending
    title: str  # with its number

    @property
    def group(self) -> str:
        "The heading under which the side bar lists it."
        number = int(re.match(r"\d+", self.stem)[0])
        return next(name for first, name in reversed(GROUPS.items()) if number >= first)


def source(cell: dict) -> str:
    "A cell's text, whether or not it is stored in lines."
    return "".join(cell["source"])


@cache
def notebook(stem: str) -> dict:
    "A committed notebook, read once; not to be changed."
    return json.loads((NBS / f"{stem}.ipynb").read_text(encoding="utf-8"))


@cache
def lessons() -> tuple[Lesson, ...]:
    "All lessons in the order of the table in the index; raises ValueError if the table and the folder differ."
    table = "\n".join(source(cell) for cell in notebook("index")["cells"] if cell["cell_type"] == "markdown")
    found = tuple(Lesson(stem, title) for title, stem in re.findall(r"^\| \[([^]]+)\]\((\w+)\.ipynb\) \|", table, re.MULTILINE))
    named, there = {lesson.stem for lesson in found}, {path.stem for path in NBS.glob("*.ipynb")} - {"index"}
    if named != there: raise ValueError(f"the table in nbs/index.ipynb and the folder differ in {sorted(named ^ there)}: give each lesson its row")
    return found


class Shown(processors.FilterDefaults):
    "nbdev's processing for readers. Exported code stays where it is taught; the reference has pages of its own."

    def base_procs(self) -> list:
        "Which of nbdev's processors run, in order."
        names = "populate_language strip_ansi hide_line filter_stream_ rm_header_dash hide_ ai_magics clean_magics strip_hidden_metadata"
        return [getattr(processors, name) for name in names.split()]

    def nb_proc(self, nb: dict) -> NBProcessor:
        "The processor of one notebook, which leaves no directive behind."
        return NBProcessor(nb=nb, procs=self.procs(), rm_directives=True)


def lesson_page(
    stem: str,  # the notebook's file name without its ending
) -> dict:  # the notebook as the site shows it
    "A notebook with its directives carried out, its names linked, its pictures described; needs the project's folder as working folder."
    processor = Shown().nb_proc(processors.read_nb(NBS / f"{stem}.ipynb"))
    processor.process()
    page, heading = processor.nb, ""
    page.cells = [cell for cell in page.cells if cell.source.strip()]
    for cell in page.cells:
        if cell.cell_type == "markdown":
            heading = (re.findall(r"^#+ (.+)", cell.source, re.MULTILINE) or [heading])[-1]
            cell.source = linked(cell.source)
            continue
        if cell.directives_.keys() & {"export", "exports"}: cell.metadata["tags"] = ["exported"]
        words = picture_words(cell.source, heading)
        cell.metadata["mystnb"] = {"image": {"alt": words}}
        for output in cell.outputs:
            if PLOTLY in output.get("data", {}): output["data"] = {"text/html": still_html(output["data"][PLOTLY])}
    if stem != "index": page.cells.insert(1, processors.mk_cell(run_hint(stem), "markdown"))
    return json.loads(json.dumps(page, default=str))


def run_hint(stem: str) -> str:
    "How the reader runs this lesson, and what it becomes."
    rooms = [f"{{py:mod}}`{dotted(name)}`" for name, stems in built_in().items() if stem in stems]
    hint = f"In a clone of the project, `make lab` opens JupyterLab; open `nbs/{stem}.ipynb` there."
    hint += f" Or, without a browser: `make walkthrough NOTEBOOKS={stem}` runs it and says how long it took."
    if rooms: hint += f" The cells with a coloured edge become the module {' and '.join(rooms)}."
    return f"```{{admonition}} Run it yourself\n:class: tip\n{hint}\n```"


def picture_words(
    code: str,  # the cell that draws
    heading: str,  # of the section it stands in
) -> str:  # one line
    "What a picture shows: the section, what the plotting functions of the package say of themselves, and titles and axes that the code names."
    try: tree = ast.parse(code)
    except SyntaxError: tree = ast.parse("")
    said: dict[str, list[str]] = {"title": [], "xlabel": [], "ylabel": []}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call): continue
        name = getattr(node.func, "attr", getattr(node.func, "id", "")).removeprefix("set_")
        if name.startswith("plot_") and name in says(): said["title"].append(says()[name].rstrip("."))
        pairs = [(word.arg, word.value) for word in node.keywords] + [(name.replace("suptitle", "title"), one) for one in node.args[:1]]
        for kind, value in pairs:
            if kind in said and isinstance(value, ast.Constant) and isinstance(value.value, str): said[kind].append(value.value)
    axes = [f"{axis}: {', '.join(dict.fromkeys(said[kind]))}" for axis, kind in (("across", "xlabel"), ("up", "ylabel")) if said[kind]]
    return re.sub(r"[`$\s]+", " ", "; ".join([f"Picture in “{heading}”", *dict.fromkeys(said["title"]), *axes])).strip()


def linked(
    text: str,  # markdown of a notebook, or of a page in this folder
) -> str:  # the same, for the site
    "Names in backticks lead to the reference, and files of the project to a copy that the site carries."
    lines, fenced = [], False
    for line in text.split("\n"):
        fenced ^= line.lstrip().startswith("```")
        if not (fenced or line.startswith(("#", "    ", "```"))):  # neither code nor a heading
            role = lambda name: f"{{py:obj}}`{name[1]} <{places()[name[1]]}>`" if name[1] in places() else name[0]
            line = re.sub(r"(?<![`\[}])`([\w.]+)`(?![`\]])", role, line)
            line = re.sub(r"\]\(\.\./([^)#\s]+)\)", r"](\1)", line)
        lines.append(line)
    return "\n".join(lines)


# The reference


def rooms() -> dict[str, ast.Module]:
    "Dotted name below the package -> syntax tree, for each module with a lesson; the package's own file is `__init__`."
    paths = {name: PACKAGE / f"{name.replace('.', '/')}.py" for name in built_in()}
    return {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in paths.items()}


@cache
def built_in() -> dict[str, list[str]]:
    "Module -> the lessons that write it, in reading order."
    found: dict[str, list[str]] = {}
    for lesson in lessons():
        for cell in notebook(lesson.stem)["cells"]:
            if cell["cell_type"] != "code": continue
            for name in re.findall(r"^#\| *(?:default_exp|export) +([\w.]+)$", source(cell), re.MULTILINE):
                if lesson.stem not in found.setdefault(name, []): found[name].append(lesson.stem)
    return found


def public(tree: ast.Module) -> list[str]:
    "What a module offers, in the order of its file."
    assigned = (node for node in tree.body if isinstance(node, ast.Assign))
    offered = next(ast.literal_eval(node.value) for node in assigned if getattr(node.targets[0], "id", "") == "__all__")
    lines = {name: node.lineno for node in tree.body for name in named(node)}
    return sorted(offered, key=lambda name: lines[name])


def named(node: ast.stmt) -> list[str]:
    "The names that a statement at the top of a module gives."
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef): return [node.name]
    if not isinstance(node, ast.Assign): return []
    return [one.id for target in node.targets for one in ast.walk(target) if isinstance(one, ast.Name)]


def dotted(room: str, name: str = "") -> str:
    "A module, or a name in it, as Python calls it."
    return ".".join(part for part in ("cola_tutorial", room, name) if part not in ("", "__init__"))


@cache
def places() -> dict[str, str]:
    "Public name, or method of a public class -> where it stands, dotted and whole; of two names the one of the earlier lesson."
    found: dict[str, str] = {}
    for room, tree in rooms().items():
        offered = public(tree)
        for name in offered: found.setdefault(name, dotted(room, name))
        for owner in tree.body:
            if not isinstance(owner, ast.ClassDef) or owner.name not in offered: continue
            names = [f"{owner.name}.{one.name}" for one in owner.body if isinstance(one, ast.FunctionDef) and one.name[0] != "_"]
            found |= {name: dotted(room, name) for name in names}
    return found


@cache
def taught() -> dict[str, tuple[str, str]]:
    "Name, dotted and whole -> the lesson whose cell exports it, and the heading above that cell."
    found: dict[str, tuple[str, str]] = {}
    for lesson in lessons():
        heading, home = "", next((name for name, stems in built_in().items() if stems[0] == lesson.stem), "")
        for cell in notebook(lesson.stem)["cells"]:
            text = source(cell)
            if cell["cell_type"] == "markdown": heading = (re.findall(r"^#+ (.+)", text, re.MULTILINE) or [heading])[-1]
            elif marked := re.match(r"#\| *export *([\w.]*)", text):
                names = [name for node in ast.parse(text).body for name in named(node)]
                found |= {dotted(marked[1] or home, name): (lesson.stem, heading) for name in names}
    return found


@cache
def says() -> dict[str, str]:
    "Public function -> the first line of its docstring."
    nodes = [node for tree in rooms().values() for node in tree.body if isinstance(node, ast.FunctionDef)]
    return {node.name: (ast.get_docstring(node) or "").partition("\n")[0] for node in nodes if node.name in places()}


def reference_page(room: str, tree: ast.Module) -> str:
    "One module: what it says of itself, its lessons, and every public name."
    lines = [f"{room}\n{'=' * len(room)}", f".. automodule:: {dotted(room)}"]
    titles = {lesson.stem: lesson.title for lesson in lessons()}
    lines.append("Built in " + " and ".join(f":doc:`{titles[stem]} </{stem}>`" for stem in built_in()[room]) + ".")
    module = importlib.import_module(dotted(room))
    for name in public(tree):
        value = getattr(module, name)
        if inspect.isclass(value):
            shown = f"\n   :members: {', '.join(members(value))}" if members(value) else ""
            shown += "\n   :show-inheritance:" if value.__bases__ != (object,) else ""
            lines.append(f".. autoclass:: {dotted(room, name)}{shown}")
        elif inspect.isfunction(value) or hasattr(value, "__wrapped__"): lines.append(f".. autofunction:: {dotted(room, name)}")
        else: lines.append(constant(room, name))
    return "\n\n".join(lines) + "\n"


def members(owner: type) -> list[str]:
    "Public methods and properties that a class defines itself, those that a later cell adds included; fields stand among its parameters."
    kinds = (classmethod, staticmethod, property, cached_property)
    fields = getattr(owner, "__dataclass_fields__", {})
    called = lambda one: isinstance(one, kinds) or inspect.isroutine(getattr(one, "__func__", one))
    return [name for name, one in vars(owner).items() if name[0] != "_" and name not in fields and called(one)]


def constant(room: str, name: str) -> str:
    "A constant with its value, if that is short, and the comment that stands behind it."
    module = importlib.import_module(dotted(room))
    text = Path(module.__file__).read_text(encoding="utf-8")
    node = next(node for node in ast.parse(text).body if name in named(node))
    value = getattr(module, name)
    value = ast.unparse(node.value) if "0x" in repr(value) or "functools" in repr(value) else repr(value)
    first, last = (text.splitlines()[at - 1].partition("  # ")[2] for at in (node.lineno, node.end_lineno))
    says = [f"   {escaped(comment)}" for comment in [first or last] if comment]
    shown = [f"   :value: {value}"] if len(value) < 100 else []
    return "\n".join([f".. py:data:: {name}", *shown, "", *says, "", f"   {lesson_of(dotted(room, name))}"])


def reference_index() -> str:
    "All modules, from the ground up, with what each says of itself."
    rows = [f"   * - :doc:`{name}`\n     - {escaped(ast.get_docstring(tree).partition(chr(10))[0])}" for name, tree in rooms().items() if name != "__init__"]
    front = ":doc:`/" + built_in()["__init__"][0] + "`"
    table = ".. list-table::\n   :widths: 20 80\n\n" + "\n".join(rows)
    tree = ".. toctree::\n   :hidden:\n\n" + "\n".join(f"   {name}" for name in rooms() if name != "__init__")
    title = "Reference\n========="
    why = f"Every public name can be imported from ``cola_tutorial`` itself, those of pictures and commands from their modules; {front} says how."
    return "\n\n".join([title, ".. automodule:: cola_tutorial", why, table, tree]) + "\n"


def escaped(text: str) -> str:
    "Plain words with names in backticks, as reStructuredText; a public name leads to its entry."
    parts = re.split(r"`([^`]+)`", text)
    for i, part in enumerate(parts):
        where = places().get(part)
        if i % 2: parts[i] = f":py:obj:`{part} <{where}>`" if where else f"``{part}``"
        else: parts[i] = re.sub(r"([\\*_|`])", r"\\\1", part)
    return "".join(parts)


def lesson_of(place: str) -> str:
    "A line that leads from a name to the section which builds it."
    if place not in taught(): return ""  # a method: its class says it
    stem, heading = taught()[place]
    return f"Built in `{re.sub(r'([`<>])', '', heading)} <../{stem}.html#{make_id(heading)}>`__."


# What autodoc asks


def told(
    value: object,  # a function, method, property or class
) -> dict[str, dict]:  # parameter or `return` -> its comment, annotation and default
    "What the code says of each parameter; of a class, its constructor's, inherited fields included."
    value = getattr(value, "fget", None) or getattr(value, "func", None) or value
    if not inspect.isclass(value): return {k: v for k, v in docments(value, full=True, args_kwargs=True).items() if k not in ("self", "cls")}
    found: dict[str, dict] = {}
    for owner in value.__mro__:
        if "__init__" not in vars(owner) or owner.__module__.split(".")[0] != "cola_tutorial": continue
        for name, one in docments(owner, full=True, args_kwargs=True, returns=False).items():
            if name != "self" and not (found.get(name) or {}).get("docment"): found[name] = one
        if not is_dataclass(owner): break
    return found


def default_text(value: object) -> str:
    "A default as one would write it."
    if value in (inspect.Parameter.empty, MISSING): return ""
    if isinstance(value, type) or inspect.isroutine(value): return value.__qualname__ if value.__module__ == "builtins" else value.__name__
    if repr(value) == "<factory>": return "..."
    if is_dataclass(value) and len(repr(value)) > LONGEST: return f"{type(value).__name__}(...)"
    return repr(value)


def signature(app, what: str, name: str, value: object, options, given, returned) -> tuple[str, None] | None:
    "Names and defaults only, and few of them: the list below has all, with types and meanings."
    if given is None or what not in ("function", "method", "class"): return None
    parts, stars = [], {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    keyword_only = False
    for parameter, one in told(value).items():
        if parameter == "return": continue
        kind = one["kind"] if "kind" in one else inspect.Parameter.POSITIONAL_OR_KEYWORD
        if kind is inspect.Parameter.KEYWORD_ONLY and not keyword_only: parts.append("*")
        keyword_only |= kind in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_POSITIONAL)
        default = default_text(one["default"])
        parts.append(stars.get(kind, "") + parameter + (f"={default}" if default else ""))
    return f"({', '.join(parts) if len(parts) <= MOST_SHOWN else '...'})", None


def describe(app, what: str, name: str, value: object, options, lines: list[str]) -> None:
    "Turn a docstring of plain words, and the comments behind the parameters, into what Sphinx lays out."
    own = "\n".join(lines).strip()
    if what == "class" and own.startswith(f"{value.__name__}("): own = ""
    lines[:] = [*escaped(own).split("\n"), ""]
    if what == "module": return
    for parameter, one in told(value).items():
        kind = stringify_annotation(one["anno"], "smart") if one["anno"] not in (None, inspect.Parameter.empty) else ""
        comment = escaped(one["docment"] or "")
        if parameter == "return":
            if comment: lines.append(f":returns: {comment}")
            if kind and (kind != "None" or comment): lines.append(f":rtype: {kind}")
            continue
        default = f" (default ``{default_text(one['default'])}``)" if default_text(one["default"]) else ""
        lines.append(f":param {parameter}: {comment}{default}")
        if kind: lines.append(f":type {parameter}: {kind}")
    if lesson := lesson_of(name): lines += ["", lesson]
    lines.append("")


def dashes(app, document, page: str) -> None:
    "Set a real dash where Sphinx puts two hyphens between a parameter and its meaning; ours elsewhere are meant as they are."
    for text in [*document.findall(Text)]:
        if text == " -- ": text.parent.replace(text, Text(" – "))


# Formulas


def mathml(node, display: bool) -> str:
    "A formula as MathML, which browsers draw without a script. One that is not understood is warned of, and shown as it was written."
    latex = node.astext()
    try: return LatexToMathML(annotation=True, fancy_error=False).convert_with_local_state(latex, displaystyle=display)
    except LatexError as error: getLogger(__name__).warning("formula %r is not understood: %s", latex, error, location=node)
    return html.escape(latex)


def inline_math(writer, node) -> None:
    "Write a formula that stands in a line, and go on behind it."
    writer.body.append(mathml(node, False))
    raise SkipNode


def display_math(writer, node) -> None:
    "Write a formula that stands alone, and go on behind it."
    writer.body.append(f'<div class="formula">{mathml(node, True)}</div>')
    raise SkipNode


# The whole


def anchor(title: str) -> str:
    "The anchor of a heading as Jupyter makes it, so that one link serves both."
    return title.replace(" ", "-")


def toctrees() -> Iterator[str]:
    "The side bar: lessons in their groups, then what one looks up."
    for group, members in groupby(lessons(), key=lambda lesson: lesson.group):
        entries = "\n".join(f"{lesson.title} <{lesson.stem}>" for lesson in members)
        yield f"```{{toctree}}\n:hidden:\n:caption: {group}\n\n{entries}\n```"
    entries = "\n".join(f"{title} <{page}>" for page, title in PAGES.items())
    yield f"```{{toctree}}\n:hidden:\n:caption: To look up\n\nReference <reference/index>\n{entries}\n```"


def stage(
    folder: Path,  # empty; is filled with the pages' sources
) -> None:
    "Write every source of the site: lessons, reference, and what is written by hand."
    shown = {stem: lesson_page(stem) for stem in ["index", *(lesson.stem for lesson in lessons())]}
    last = nbformat.v4.new_markdown_cell("\n\n".join(toctrees()), id="sidebar")
    shown["index"]["cells"].append(last)
    for stem, page in shown.items(): (folder / f"{stem}.ipynb").write_text(json.dumps(page), encoding="utf-8")
    (folder / "reference").mkdir()
    (folder / "reference" / "index.rst").write_text(reference_index(), encoding="utf-8")
    for room in rooms(): importlib.import_module(dotted(room))  # all of them: those above give methods to classes of those below
    for room, tree in rooms().items():
        if room != "__init__": (folder / "reference" / f"{room}.rst").write_text(reference_page(room, tree), encoding="utf-8")
    for name in ("CHANGELOG.md", "CITATION.cff", "LICENSE"): shutil.copy(ROOT / name, folder)
    for path in SITE.glob("*.md"): (folder / path.name).write_text(linked(path.read_text(encoding="utf-8")), encoding="utf-8")
    made = folder / "_made"
    made.mkdir()
    with as_file(files("ziamath") / "fonts" / "STIXTwoMath-Regular.ttf") as font: shutil.copy(font, made / "math.ttf")
    if any("cola-still" in json.dumps(page) for page in shown.values()):
        for name, content in page_assets().items(): (made / name).write_bytes(content)


def build(
    out: Path,  # where the pages go; what was there is replaced
    builder: str = "html",  # html, or linkcheck to try the links that leave the site
) -> int:  # 0: no warning
    "Build the site; every warning is an error."
    with tempfile.TemporaryDirectory() as work:
        sources, pages = Path(work) / "sources", Path(work) / "pages"
        sources.mkdir()
        stage(sources)
        static = f"html_static_path={SITE / '_static'},{sources / '_made'}"
        how = ["-q", "-W", "--keep-going", "-c", str(SITE), "-b", builder, "-d", f"{work}/trees", "-D", static]
        if status := sphinx_build([*how, str(sources), str(pages)]): return status
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(pages, out, ignore=shutil.ignore_patterns(".buildinfo*", "_sources"))
    return 0


if __name__ == "__main__":
    out = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "_docs").resolve()
    status = build(out, *sys.argv[2:3])
    if not status: print(f"The site is in {out}: open {out / 'index.html'} in a browser.")
    sys.exit(status)
