"The web site is built without a warning, is whole, shows what the notebooks and the code say, and asks nothing of a network."

import json
import re
from collections import Counter
from collections.abc import Iterator
from configparser import ConfigParser
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from conftest import FIGURE, FIGURE_LESSON
from test_project import FLOORS, comments, docstring, methods, public
from walkthrough import NBS, ROOT, lesson_names

from cola_tutorial.screen import page_assets

SITE = NBS / "_site"
LARGEST = 40_000_000
LESSONS = [name for name in lesson_names() if name != "index"]
MODULES = [name for name in FLOORS if name != "__init__"]
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
CODE = {"pre", "code", "script", "style", "math"}


class Page(HTMLParser):
    "What a page of the site holds."

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.open: list[tuple[str, str, bool]] = []  # elements around what comes: tag, anchor, is it an output
        self.anchors: set[str] = set()
        self.links: list[str] = []  # where a reader may go
        self.loaded: list[str] = []  # what the browser fetches by itself
        self.images: list[dict[str, str]] = []
        self.formulas: list[str] = []  # their source
        self.prose: list[str] = []  # text outside code, outputs and formulas
        self.text: list[tuple[tuple[str, ...], str]] = []  # anchors of the elements around it, and a piece of text
        self.styles: list[str] = []
        self.next, self.entry = "", ""  # the page that follows; the entry whose description comes next
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, given: list[tuple[str, str | None]]) -> None:
        "Note what an element says of itself."
        attributes = {name: value or "" for name, value in given}
        name = attributes.get("id", "")
        self.anchors.add(name)
        if tag == "a" and "href" in attributes:
            self.links.append(attributes["href"])
            if "right-next" in attributes.get("class", ""): self.next = attributes["href"]
        elif tag != "a": self.loaded += [attributes[name] for name in ("href", "src", "data", "action", "poster") if attributes.get(name)]
        self.loaded += [one.split()[0] for one in attributes.get("srcset", "").split(",") if one.strip()]
        self.styles.append(attributes.get("style", ""))
        if tag == "img": self.images.append(attributes)
        if tag == "dd" and self.entry: name, self.entry = self.entry, ""
        if tag not in VOID: self.open.append((tag, name, "cell_output" in attributes.get("class", "")))

    def handle_endtag(self, tag: str) -> None:
        "Close an element, and those left open inside it."
        while any(one[0] == tag for one in self.open):
            closed, anchor, _ = self.open.pop()
            if closed == "dt": self.entry = anchor
            if closed == tag: return

    def handle_data(self, data: str) -> None:
        "Note a piece of text with where it stands."
        tags = {tag for tag, _, _ in self.open}
        if "annotation" in tags: self.formulas.append(data)
        if "style" in tags: self.styles.append(data)
        if not tags & CODE and not any(output for _, _, output in self.open): self.prose.append(data)
        if not tags & {"script", "style"}: self.text.append((tuple(name for _, name, _ in self.open if name), data))

    def within(self, anchor: str) -> str:
        "All text of the element with this anchor; of an entry of the reference, its description too."
        if not hasattr(self, "entries"):
            self.entries: dict[str, list[str]] = {}
            for names, data in self.text:
                for name in names: self.entries.setdefault(name, []).append(data)
        return plain("".join(self.entries.get(anchor, [])))


def plain(text: str) -> str:
    "Text with its backticks dropped and its white space made one blank."
    return " ".join(text.replace("`", "").split())


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Page]:
    "Every page by its place in the site."
    return {path.relative_to(site).as_posix(): Page(path) for path in sorted(site.rglob("*.html")) if "_static" not in path.parts}


# Whole, and by itself


def faults(pages: dict[str, Page], site: Path) -> Iterator[str]:
    "Links that lead nowhere, and what a browser would fetch from elsewhere."
    for name, page in pages.items():
        for link in page.links + page.loaded:
            parts = urlsplit(link)
            if parts.scheme == "data": continue
            if parts.scheme or parts.netloc:
                if link in page.loaded or parts.scheme not in ("http", "https"): yield f"{name} needs {link}"
                continue
            target = (page.path.parent / unquote(parts.path)).resolve() if parts.path else page.path
            if not target.is_file(): yield f"{name} leads to {link}, which is no file"
            elif parts.fragment and target.suffix == ".html":
                there = pages.get(target.relative_to(site.resolve()).as_posix())
                if there is None or unquote(parts.fragment) not in there.anchors: yield f"{name} leads to {link}, which has no such place"
        for style in page.styles:
            yield from (f"{name} needs {link}" for link in outside(style))


def outside(css: str) -> list[str]:
    "What a style sheet fetches from elsewhere."
    links = re.findall(r"url\(\s*['\"]?([^'\")]+)", css) + re.findall(r"@import\s+['\"]([^'\"]+)", css)
    return [link for link in links if re.match(r"(?:[a-z]+:)?//", link)]


def test_every_link_leads_somewhere(site: Path, pages: dict[str, Page]) -> None:
    "Every page, picture, script and heading that is named exists, and nothing is fetched from elsewhere."
    assert list(faults(pages, site)) == []


def test_styles_fetch_nothing_from_elsewhere(site: Path) -> None:
    "Fonts and pictures of the style sheets lie in the site."
    sheets = [path for path in site.rglob("*.css")]
    assert sheets and not [(path.name, link) for path in sheets for link in outside(path.read_text(encoding="utf-8"))]
    for path in sheets:
        named = re.findall(r"url\(\s*['\"]?([^'\")]+)", path.read_text(encoding="utf-8"))
        files = [link.partition("?")[0].partition("#")[0] for link in named if not link.startswith(("data:", "#"))]
        assert not [name for name in files if not (path.parent / name).is_file()], path.name


@pytest.mark.parametrize(
    "body, seen",
    [
        ('<a href="other.html">', "no file"),
        ('<a href="#there">', "no such place"),
        ('<a href="page.html#there">', "no such place"),
        ('<img src="https://elsewhere/x.png">', "needs"),
        ('<script src="//elsewhere/x.js"></script>', "needs"),
        ('<link rel="stylesheet" href="http://elsewhere/x.css">', "needs"),
        ("<style>@import 'https://elsewhere/x.css'</style>", "needs"),
        ('<p style="background: url(https://elsewhere/x.png)">', "needs"),
        ('<a href="https://elsewhere">, <a href="#here" id="here">, <a href="page.html">', ""),
    ],
)
def test_faults_are_seen(body: str, seen: str, tmp_path: Path) -> None:
    "The check above finds each fault, and lets ordinary links pass."
    (tmp_path / "page.html").write_text(body)
    found = list(faults({"page.html": Page(tmp_path / "page.html")}, tmp_path))
    assert bool(found) == bool(seen) and seen in " ".join(found)


def test_site_is_small(site: Path) -> None:
    "At most 40 MB, and no folder of what Sphinx needs for itself."
    assert sum(path.stat().st_size for path in site.rglob("*") if path.is_file()) < LARGEST
    assert not [path.name for path in site.rglob("*") if path.name in (".doctrees", ".buildinfo", "_sources")]


def test_only_pages_with_a_view_load_what_draws_it(site: Path, pages: dict[str, Page]) -> None:
    "The still's JSON comes through whole; scripts are those of the package, and loaded where they are needed."
    html = (site / f"{FIGURE_LESSON}.html").read_text(encoding="utf-8")
    held = re.findall(r'<div class="cola-still"><script type="application/json">(.*?)</script>', html, re.DOTALL)
    assert any(json.loads(one)["picture"]["figure"]["data"] == FIGURE["data"] and json.loads(one)["title"] == "</script>" for one in held)
    loading = {name for name, page in pages.items() if any("plotly.min.js" in link for link in page.loaded)}
    holding = {name for name, page in pages.items() if "cola-still" in page.path.read_text(encoding="utf-8")}
    assert loading == holding and f"{FIGURE_LESSON}.html" in loading and "index.html" not in loading
    for name, content in page_assets().items(): assert (site / "_static" / name).read_bytes() == content


# Lessons


def prose(stem: str) -> str:
    "The markdown of a notebook without its code."
    cells = json.loads((NBS / f"{stem}.ipynb").read_text(encoding="utf-8"))["cells"]
    text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`]*`", "", re.sub(r"^    .*$", "", text, flags=re.MULTILINE))


def test_lessons_follow_each_other(pages: dict[str, Page]) -> None:
    "From the first page, `next` leads through all lessons in the order of the table."
    rows = re.findall(r"^\| \[[^]]+\]\((\w+)\.ipynb\)", prose("index"), re.MULTILINE)
    assert sorted(rows) == sorted(LESSONS)
    walked, here = [], "index.html"
    while len(walked) < len(rows): walked.append(here := pages[here].next)
    assert walked == [f"{stem}.html" for stem in rows]


@pytest.mark.parametrize("stem", LESSONS)
def test_lesson_is_shown(stem: str, pages: dict[str, Page]) -> None:
    "Its page says how to run it and what it becomes, describes its pictures, and shows no directive."
    page, notebook = pages[f"{stem}.html"], json.loads((NBS / f"{stem}.ipynb").read_text(encoding="utf-8"))
    text = plain(" ".join(data for _, data in page.text))
    assert f"open nbs/{stem}.ipynb there" in text and f"make walkthrough NOTEBOOKS={stem} " in text
    sources = ["".join(cell["source"]) for cell in notebook["cells"]]
    (room,) = re.findall(r"^#\| default_exp (\S+)", "\n".join(sources), re.MULTILINE) or [""]
    if room: assert any(f"#module-cola_tutorial{'' if room == '__init__' else '.' + room}" in link for link in page.links)
    shown = [image["alt"] for image in page.images]
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    assert len(shown) == sum("image/png" in output.get("data", {}) for output in outputs)
    assert all(re.match(r"Picture in “.+”", words) for words in shown), shown
    assert "#|" not in text


@pytest.mark.parametrize("stem", ["index", *LESSONS])
def test_every_formula_is_drawn(stem: str, pages: dict[str, Page]) -> None:
    "The page has the formulas of its notebook as MathML, each once, and no dollar sign is left in its text."
    text = prose(stem)
    wanted = re.findall(r"\$\$(.+?)\$\$", text, re.DOTALL)
    wanted += re.findall(r"\$([^$\n]+)\$", re.sub(r"\$\$.+?\$\$", "", text, flags=re.DOTALL))
    page = pages[f"{stem}.html"]
    assert Counter(map(plain, page.formulas)) == Counter(map(plain, wanted))
    assert not re.search(r"\$|\\[(\[a-z]", "".join(page.prose))
    assert "merror" not in page.path.read_text(encoding="utf-8")


# What one looks up


@pytest.mark.parametrize("name", MODULES)
def test_reference_says_what_the_code_says(name: str, pages: dict[str, Page]) -> None:
    "Each public name has its entry, with docstring and the comment of each parameter and return; each method too."
    page, place = pages[f"reference/{name}.html"], f"cola_tutorial.{name}"
    missing = []
    for label, value in public(name):
        parts = {label: value} | dict(methods(value) if isinstance(value, type) else [])
        missing += [part for part in parts if f"{place}.{part}" not in page.anchors]
        text, said = page.within(f"{place}.{label}"), [*map(docstring, parts.values()), *comments(value).values()]
        missing += [f"{label}: {words}" for words in said if words and plain(words) not in text]
    assert not missing
    import importlib

    constants = [one for one in importlib.import_module(place).__all__ if f"{place}.{one}" not in page.anchors]
    assert not constants


def test_reference_leads_to_lessons(pages: dict[str, Page]) -> None:
    "Each module leads to a lesson, and the reference's first page to each module."
    front = {link.partition("#")[0] for link in pages["reference/index.html"].links}
    assert {f"{name}.html" for name in MODULES} <= front
    for name in MODULES: assert {f"../{stem}.html" for stem in LESSONS} & {*pages[f"reference/{name}.html"].links}


def entries(page: Page) -> dict[str, str]:
    "Glossary: term -> the HTML of what it means."
    html = page.path.read_text(encoding="utf-8")
    return dict(re.findall(r'<dt id="term-[^"]+">(.+?)(?:<a class="headerlink.+?)?</dt><dd>(.+?)</dd>', html, re.DOTALL))


def test_glossary_leads_to_lessons_and_code(pages: dict[str, Page]) -> None:
    "Some fifty terms in alphabetical order; each leads to a lesson and to an entry of the reference."
    terms = entries(pages["glossary.html"])
    assert 50 <= len(terms) <= 80 and [*terms] == sorted(terms, key=str.lower)
    for term, meaning in terms.items():
        assert re.search(r'href="\d\w+\.html"', meaning), f"{term} leads to no lesson"
        assert re.search(r'href="reference/[\w.]+\.html#cola_tutorial\.', meaning), f"{term} leads to no code"


def test_symbols_are_those_of_the_code() -> None:
    "Each row has a name that the package uses, and leads to where it is used."
    rows = re.findall(r"^\| (?!symbol|---)(.+) \|$", (SITE / "symbols.md").read_text(encoding="utf-8"), re.MULTILINE)
    known = set(re.findall(r"\w+", "".join(path.read_text(encoding="utf-8") for path in (ROOT / "cola_tutorial").rglob("*.py"))))
    offered = {label for name in MODULES for label, _ in public(name)}
    assert len(rows) > 40
    for row in rows:
        *_, names, where = row.split(" | ")
        used = re.findall(r"`(\w+)(?:\.(\w+))?`", names)
        assert all({*filter(None, one)} <= known for one in used), row
        assert {*re.findall(r"`([\w.]+)`", where)} <= offered and "`" in where, row


def test_citations_agree() -> None:
    "CITATION.cff, the BibTeX of the citation page and settings.ini tell the same."
    told = ConfigParser(delimiters=["="])
    told.read_string((ROOT / "settings.ini").read_text(encoding="utf-8"))
    project, cited = told["project"], yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (cited["title"], str(cited["version"]), cited["license"]) == (project["name"], project["version"], project["license"])
    assert [one["name"] for one in cited["authors"]] == [project["author"]]
    text = (SITE / "citation.md").read_text(encoding="utf-8")
    software, paper = (dict(re.findall(r"^ +(\w+) += \{(.*?)\},?$", one, re.MULTILINE)) for one in re.findall(r"@\w+\{.+?\n\}", text, re.DOTALL))
    assert software == {"title": cited["title"], "author": f"{{{project['author']}}}", "version": project["version"], "license": cited["license"]}
    (reference,) = cited["references"]
    names = " and ".join(f"{one['family-names']}, {one['given-names']}" for one in reference["authors"])
    assert (paper["title"], paper["author"], int(paper["year"])) == (reference["title"], names, reference["year"])
    assert paper["url"] == reference["url"] and reference["identifiers"][0]["value"] == f"arXiv:{paper['eprint']}"


def test_changes_end_with_this_version(pages: dict[str, Page]) -> None:
    "The newest entry of the change log is the published version, and the site shows it."
    told = ConfigParser(delimiters=["="])
    told.read_string((ROOT / "settings.ini").read_text(encoding="utf-8"))
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == told["project"]["version"]
    assert headings[0] in plain(" ".join(data for _, data in pages["changelog.html"].text))


def test_search_has_every_page(site: Path, pages: dict[str, Page]) -> None:
    "The index that the search page reads knows all lessons and modules; it is a script, so that no server is needed."
    index = (site / "searchindex.js").read_text(encoding="utf-8")
    known = json.loads(re.fullmatch(r"Search\.setIndex\((.*)\)", index, re.DOTALL)[1])["docnames"]
    assert {*LESSONS, "index", "glossary", "symbols", *(f"reference/{name}" for name in MODULES)} <= {*known}
    assert any("searchindex.js" in link for link in pages["search.html"].loaded)
