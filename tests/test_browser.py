"Every view in a real browser: drawn, touched, run twice, left without a kernel; in JupyterLab, in Notebook 7, as the explorer, and on the site."

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None: pytest.skip("no Chromium is installed (Debian: apt install chromium): nothing was tried in a browser", allow_module_level=True)

from playwright.sync_api import Browser, Locator, Page, TimeoutError, sync_playwright  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SHOTS = ROOT / "runs" / "screenshots"  # kept, to be looked at
MINUTE = 60_000  # milliseconds

SETUP = """
import json
from pathlib import Path
from cola_tutorial.config import data_dir
from cola_tutorial.model import ColaDLM
from cola_tutorial.text.stories import Grammar
from cola_tutorial.viz import story_points
model, grammar = ColaDLM.from_pretrained(data_dir() / "pretrained"), Grammar.load()
stories = [grammar.story(0, i, "validation").text for i in range(30)]
PROMPT = "Anna lived near the river with her brother."
"""
# A view whose Python is slow, and which counts how often it is asked.
SLOW = """
import time
from cola_tutorial.screen import Control, Picture, View, panels
asked = []
def draw(a, word):
    time.sleep(0.1)
    asked.append(a)
    figure = panels(["line", "bars"], height=300)
    figure.add_scatter(x=[0, 1], y=[0, a], row=1, col=1).add_bar(x=[1], y=[a], row=1, col=2)
    return Picture(figure, f"a is {a}")
slow = View("Slow", "Move a.", [Control("a", "the number a", "slider", 3, 0, 100, 1), Control("word", "a word", "text", "x")], draw, vary="a")
slow
"""
COUNT = 'Path("asked.json").write_text(json.dumps(asked))'
# Title -> the cell that shows the view.
VIEWS = {
    "Words crystallise": "from cola_tutorial.views.writing import *\ncrystallisation(model, PROMPT)",
    "A block goes back to noise": "renoising(model, stories[0], block=2)",
    "Flow theatre": "flow_theatre(model, story_points(model, stories, grammar).thin(600), PROMPT)",
    "Be the field": "from cola_tutorial.views.field import *\nbe_the_field()",
    "Guidance, taken apart": "guidance_dissector(model, PROMPT)",
    "Step bench": "step_bench(model, PROMPT)",
    "Basins of words": "from cola_tutorial.views.latents import *\nbasin_map(model)",
    "Noise and schedule": "noise_schedule(model)",
    "Posterior lab": "posterior_lab()",
    "Who may see whom": "from cola_tutorial.views.seeing import *\nmask_painter()",
    "Where the prior looks": "attention_map(model)",
    "What the cache holds": "cache_view(model, PROMPT)",
}
# Said by Jupyter itself: about a picture whose kernel is gone, and about an extension that Notebook does not have.
NOT_OURS = ("widget model not found", "Failed to load resource: the server responded with a status of 404", "reading 'schema'")


def free_text(shown: str) -> re.Pattern:
    "A menu's entry, whose dots may be one character or three."
    return re.compile(f"^{re.escape(shown)}(…|\\.\\.\\.)?$")


@dataclass
class Watched:
    "A page, and what went wrong on it."

    page: Page
    errors: list[str] = field(default_factory=list)  # of the console, and exceptions
    requests: list[str] = field(default_factory=list)  # addresses outside this machine

    def __post_init__(self):
        self.page.on("console", lambda one: self.errors.append(one.text) if one.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda one: self.requests.append(one.url) if re.match(r"(https?|wss?)://(?!localhost|127\.0\.0\.1)", one.url) else None)

    def check(self) -> None:
        "Nothing went wrong that is ours, and nothing was asked of another machine."
        ours = [error for error in self.errors if not any(part in error for part in NOT_OURS)]
        assert not ours and not self.requests, (ours, self.requests)

    def views(self) -> Locator: return self.page.locator(".cola-view")

    def view(self, title: str) -> Locator:
        "A view by its title."
        return self.page.get_by_role("group", name=title, exact=True)


def settled(view: Locator) -> None:
    "Wait until a view is drawn and has no wish left."
    view.scroll_into_view_if_needed()
    view.page.wait_for_function("view => view.dataset.colaDrawn !== undefined && !view.hasAttribute('aria-busy')", arg=view.element_handle(), timeout=MINUTE)


def shot(target: Locator | Page, name: str) -> None:
    "Keep a picture of it."
    SHOTS.mkdir(parents=True, exist_ok=True)
    target.screenshot(path=SHOTS / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.png")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    "Chromium."
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def program(*command: str | Path, until: str, cwd: Path, env: dict[str, str] | None = None) -> Iterator[str]:
    "A server, from the line in which it says where it is to the end of the test; yields that line."
    child = subprocess.Popen([*command], cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        said = []
        for line in child.stdout:
            said.append(line)
            if until in line: break
        else: pytest.fail("the server ended: " + "".join(said)[-3000:])
        with subprocess.Popen(["cat"], stdin=child.stdout, stdout=subprocess.DEVNULL):  # takes its further words, or it would wait for a reader
            try: yield line
            finally: child.terminate()
    finally:
        child.wait(60)


@dataclass
class Desk:
    "A Jupyter server with a folder of notebooks."

    kind: str  # jupyterlab or notebook
    address: str
    folder: Path

    def open(self, browser: Browser, name: str, **options) -> Watched:
        "A notebook in a page of its own."
        watched = Watched(browser.new_page(viewport={"width": 1100, "height": 1500}, **options))
        place = f"lab/workspaces/{name}/tree" if self.kind == "jupyterlab" else "notebooks"  # a workspace of its own: no other tab comes back
        watched.page.goto(f"{self.address}/{place}/{name}.ipynb")
        watched.page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=MINUTE)
        return watched


def menu(page: Page, *names: str) -> None:
    "Choose from the menus."
    page.locator(".lm-MenuBar-itemLabel").get_by_text(names[0], exact=True).click(timeout=5000)
    for name in names[1:]: page.locator(".lm-Menu-itemLabel").get_by_text(free_text(name)).click(timeout=5000)


def run_all(page: Page) -> None:
    "Run all cells, as soon as a kernel is there to do it: before, the menu does nothing."
    for _ in range(20):
        page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status='idle']", timeout=MINUTE)  # it may say so too early
        try:
            menu(page, "Run", "Run All Cells")
            return page.wait_for_function("!/\\[ \\]/.test(document.querySelector('.jp-CodeCell .jp-InputPrompt').textContent)", timeout=3000)
        except TimeoutError: page.keyboard.press("Escape")  # a question for a kernel that was still on its way
    pytest.fail("no kernel has come")


def write(desk: Desk, name: str, *cells: str) -> None:
    "A notebook."
    notebook = new_notebook(cells=[new_code_cell(cell.strip()) for cell in cells])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
    nbformat.write(notebook, desk.folder / f"{name}.ipynb")


@pytest.fixture(scope="module", params=["jupyterlab", "notebook"])
def desk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    "JupyterLab, then Notebook 7, as a reader starts them."
    home = tmp_path_factory.mktemp(request.param)
    places = {name: str(home / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR", "JUPYTER_RUNTIME_DIR")}
    quiet = home / "jupyterlab_settings_dir" / "@jupyterlab" / "apputils-extension"
    quiet.mkdir(parents=True)
    (quiet / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
    env = {name: value for name, value in os.environ.items() if name != "IN_TEST"} | places | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    options = ["--no-browser", "--allow-root", "--IdentityProvider.token=", "--ServerApp.port=0", f"--ServerApp.root_dir={home}"]
    with program(sys.executable, "-m", request.param, *options, until="http://localhost:", cwd=home, env=env) as line:
        yield Desk(request.param, re.search(r"http://localhost:\d+", line)[0], home)


@pytest.fixture(scope="module")
def everything(desk: Desk, browser: Browser) -> Watched:
    "A notebook with all views, run from top to bottom."
    write(desk, "views", SETUP, *VIEWS.values())
    watched = desk.open(browser, "views")
    run_all(watched.page)
    failed = "document.querySelector('[data-mime-type=\"application/vnd.jupyter.error\"]')"
    watched.page.wait_for_function(f"{failed} || document.querySelectorAll('.cola-view').length === {len(VIEWS)}", timeout=5 * MINUTE)
    assert not watched.page.evaluate(f"{failed}?.textContent")
    for title in VIEWS: settled(watched.view(title))
    return watched


@pytest.mark.parametrize("title", VIEWS)
def test_a_view_is_drawn(everything: Watched, desk: Desk, title: str) -> None:
    "It stands in its cell with its caption, and nothing complains."
    view = everything.view(title)
    settled(view)
    assert view.locator(".main-svg").count() and view.locator(".cola-caption").inner_text()
    assert not view.locator(".cola-status").inner_text()
    shot(view, f"{desk.kind} {title}")
    everything.check()


NAMELESS = """view => [...view.querySelectorAll('input, select, button')].filter(
    one => !(one.labels?.length || one.textContent.trim() || one.getAttribute('aria-label'))).map(one => one.outerHTML)"""
UNLABELLED = """view => { const layout = view.querySelector('.cola-plot')._fullLayout;
    return Object.keys(layout).filter(key => /^[xy]axis\\d*$/.test(key) && layout[key].visible && !layout[key].title.text); }"""


@pytest.mark.parametrize("title", VIEWS)
def test_everything_in_a_view_has_a_name(everything: Watched, title: str) -> None:
    "Controls have names for screen readers, the figure is described, axes have titles."
    view = everything.view(title)
    assert view.evaluate(NAMELESS) == []
    assert view.evaluate(UNLABELLED) == []
    described = view.locator(".cola-plot").get_attribute("aria-label")
    assert described and len(described) > len(title)


def press(control: Locator) -> None:
    "Move a control with the keys that its kind knows."
    control.focus()
    tag, kind = control.evaluate("one => [one.tagName, one.type]")
    if tag == "BUTTON": control.press("Enter")
    elif tag == "SELECT": control.press("ArrowDown")
    elif kind == "checkbox": control.press("Space")
    elif kind == "text": control.press("Enter")
    else: control.press("ArrowRight" if control.evaluate("one => Number(one.value) < Number(one.max)") else "ArrowLeft")
    if kind == "number": control.press("Tab")


@pytest.mark.parametrize("title", VIEWS)
def test_every_control_is_moved_with_the_keyboard(everything: Watched, desk: Desk, title: str) -> None:
    "Each one takes the focus, answers its keys, and the view comes to rest without a complaint."
    view = everything.view(title)
    for group in ("Controls", "Steps"):
        for control in view.get_by_role("group", name=group).locator("input, select, button").all():
            if not control.is_visible() or control.evaluate("one => one.textContent === 'Play'"): continue
            press(control)
            settled(view)
            assert not view.locator(".cola-status").inner_text(), control.evaluate("one => one.outerHTML")
    shot(view, f"{desk.kind} {title} moved")
    everything.check()


@pytest.mark.parametrize("title", VIEWS)
def test_a_view_stays_legible_in_the_dark(everything: Watched, desk: Desk, title: str) -> None:
    "With the dark theme the paper is dark, and the figure's letters are light."
    page, view = everything.page, everything.view(title)
    page.evaluate("document.body.dataset.jpThemeLight = 'false'")
    try:
        page.wait_for_function("view => view.dataset.colaTheme === 'dark'", arg=view.element_handle())
        settled(view)
        paper, ink = view.evaluate("view => { const l = view.querySelector('.cola-plot')._fullLayout; return [l.paper_bgcolor, l.font.color]; }")
        assert int(paper[1:3], 16) < 64 and int(ink[1:3], 16) > 192
        shot(view, f"{desk.kind} {title} dark")
    finally: page.evaluate("document.body.dataset.jpThemeLight = 'true'")


def drag(slider: Locator, page: Page) -> None:
    "From its left end to its right end, fast, in many small moves."
    slider.scroll_into_view_if_needed()
    box = slider.bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 9, middle)
    page.mouse.down()
    for i in range(61): page.mouse.move(box["x"] + 9 + (box["width"] - 9) * i / 60, middle)
    page.mouse.up()


def test_a_slider_dragged_fast_ends_on_its_last_value(desk: Desk, browser: Browser) -> None:
    "Python is asked much less often than the slider moves, never after it has rested, and last for the value on which it rests."
    write(desk, "slow", "import json\nfrom pathlib import Path", SLOW, COUNT)
    watched = desk.open(browser, "slow")
    run_all(watched.page)
    view = watched.view("Slow")
    view.wait_for(timeout=MINUTE)
    settled(view)
    slider = view.get_by_role("slider", name="the number a")
    drag(slider, watched.page)
    settled(view)
    assert slider.input_value() == "100" and view.locator(".cola-text").inner_text() == "a is 100"
    run_cell(watched, 2)
    watched.page.wait_for_function("document.querySelectorAll('.jp-CodeCell')[2].querySelector('.jp-InputPrompt').textContent.match(/[4-9]/)")
    asked = json.loads((desk.folder / "asked.json").read_text())
    moves = asked[asked.index(3) + 1 :]
    assert asked[-1] == 100 and len(asked) < 14 + 30, moves
    watched.check()


def run_cell(watched: Watched, number: int) -> None:
    "Run one cell again."
    watched.page.locator(".jp-Notebook .jp-CodeCell").nth(number).locator(".jp-InputPrompt").click()
    watched.page.keyboard.press("Control+Enter")


def test_a_second_run_doubles_nothing(everything: Watched, desk: Desk) -> None:
    "Each cell, run again, shows one view, and the kernel has one screen for it."
    page = everything.page
    for number, title in enumerate(VIEWS, 1):
        old = everything.view(title).get_attribute("data-cola-view")
        run_cell(everything, number)
        page.wait_for_function("old => !document.querySelector(`[data-cola-view='${old}']`)", arg=old, timeout=MINUTE)
        everything.view(title).wait_for(timeout=MINUTE)
        settled(everything.view(title))
    assert everything.views().count() == len(VIEWS)
    everything.check()


def test_without_a_kernel_there_is_a_picture(everything: Watched, desk: Desk, browser: Browser) -> None:
    "When the kernel restarts, each view says what to do; saved and opened again, the notebook shows its pictures."
    page = everything.page
    menu(page, "Kernel", "Restart Kernel")
    page.locator(".jp-Dialog-button.jp-mod-accept").click()
    for title in VIEWS:
        everything.view(title).locator(".cola-status").filter(has_text="Run this cell again").wait_for(timeout=MINUTE)
        assert everything.view(title).locator(".main-svg").count()
    shot(everything.view(next(iter(VIEWS))), f"{desk.kind} restarted")
    menu(page, "File", "Save Notebook")
    page.wait_for_function("!document.querySelector('.jp-mod-dirty')")
    page.close()
    again = desk.open(browser, "views")
    pictures = again.page.locator(".jp-OutputArea-output").locator("img, .main-svg")
    for i in range(len(VIEWS)): again.page.locator(".jp-Notebook .jp-CodeCell").nth(i + 1).scroll_into_view_if_needed()
    pictures.nth(len(VIEWS) - 1).wait_for(timeout=MINUTE)
    assert again.views().count() == 0
    shot(again.page, f"{desk.kind} reopened")
    again.check()


TRAINING = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from cola_tutorial.config import Stage1Config, Stage2Config
from cola_tutorial.training import RunConfig
from cola_tutorial.views.cockpit import TrainingProcess, cockpit
small = dict(dim=32, ffn_dim=64, num_heads=2, encoder_num_blocks=1, decoder_num_blocks=1, emb_dim=32, head_dim=16, rope_dim=12, num_layers=1)
loop = dict(batch_size=4, log_every=2, save_every=100000, warmup_steps=10)
run = RunConfig(changes=small, vocab_size=600, stories=100, stage1=Stage1Config(steps=100000, **loop), stage2=Stage2Config(steps=10, **loop))
Path("recipe.json").write_text(json.dumps(asdict(run)))
training = TrainingProcess([Path(sys.executable).with_name("cola-train"), "--recipe", "recipe.json", "--out", "run"])
cockpit("run", training, every=0.3)
"""
GONE = "([words, old]) => !words.textContent.includes(old)"


def test_a_training_is_paused_and_resumed_from_the_cockpit(desk: Desk, browser: Browser) -> None:
    "Its lines arrive by themselves; Pause ends the process with a checkpoint; Resume goes on behind it."
    write(desk, "cockpit", TRAINING)
    watched = desk.open(browser, "cockpit")
    run_all(watched.page)
    view = watched.view("A training at work")
    view.wait_for(timeout=MINUTE)
    settled(view)
    words = view.locator(".cola-text")
    step = lambda: int(re.search(r"step ([\d,]+)", words.text_content())[1].replace(",", ""))
    try:
        view.get_by_role("button", name="Start or resume").press("Enter")
        words.filter(has_text=re.compile(r"running.*step [\d,]+")).wait_for(timeout=2 * MINUTE)
        moved = lambda old: watched.page.wait_for_function(GONE, arg=[words.element_handle(), f"step {old:,} "], timeout=2 * MINUTE)
        before = step()
        moved(before)
        view.get_by_role("button", name="Pause").press("Enter")
        words.filter(has_text="paused").wait_for(timeout=MINUTE)
        paused = step()
        assert paused > before and [*(desk.folder / "run" / "stage1").rglob(f"*{paused}*")], sorted((desk.folder / "run").rglob("*"))
        shot(view, f"{desk.kind} cockpit")
        view.get_by_role("button", name="Start or resume").press("Enter")
        words.filter(has_text="running").wait_for(timeout=MINUTE)
        moved(paused)
        assert step() > paused
    finally:
        view.get_by_role("button", name="Pause").press("Enter")
        words.filter(has_text="paused").wait_for(timeout=MINUTE)
    watched.check()


# The explorer, as a page of this machine


@pytest.fixture(scope="module")
def explorer(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    "cola-explore, and its page."
    command = "import sys; sys.argv = ['cola-explore', '--no-browser']; from cola_tutorial.cli import explore; explore()"
    script = tmp_path_factory.mktemp("explorer") / "explore.py"
    script.write_text(command)
    with program(sys.executable, script, until="The explorer is at", cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}) as line:
        watched = Watched(browser.new_page(viewport={"width": 1100, "height": 1200}))
        watched.page.goto(re.search(r"http://\S+/", line)[0])
        yield watched


def opened(watched: Watched) -> Locator:
    "The view that the explorer shows, at rest."
    watched.page.wait_for_function("!document.querySelector('.cola-app').hasAttribute('aria-busy')", timeout=MINUTE)
    view = watched.page.locator(".cola-panel .cola-view")
    view.wait_for(timeout=MINUTE)
    settled(view)
    return view


def test_the_explorer_shows_every_look_of_a_text(explorer: Watched) -> None:
    "Each of them, for a text of the reader's own; of a text that is too long it says so, shows no view of another, and takes the next."
    page = explorer.page
    page.get_by_label("your text").fill("Emma had a brother.")
    page.get_by_label("your text").press("Enter")
    opened(explorer)
    looks = page.locator(".cola-app > form select")
    assert looks.locator("option").count() == 9
    for look in looks.locator("option").all():
        name = look.inner_text()
        looks.select_option(label=name)
        view = opened(explorer)
        assert not view.locator(".cola-status").inner_text() and not page.locator(".cola-app > .cola-status").inner_text()
        assert not view.get_by_label("prompt", exact=True).count()
        shot(page, f"explorer {name}")
    explorer.check()
    page.get_by_label("your text").fill("Emma had a brother. " * 60)
    page.get_by_role("button", name="Read it").click()
    page.wait_for_function("[...document.querySelectorAll('.cola-app .cola-status')].some((one) => one.textContent.includes('tokens'))", timeout=MINUTE)
    looks.select_option(label="basins of words")
    page.wait_for_function("document.querySelector('.cola-app > .cola-status').textContent.includes('tokens')", timeout=MINUTE)
    assert not page.locator(".cola-panel .cola-view").count()
    page.get_by_label("your text").fill("Emma had a brother.")
    page.get_by_label("your text").press("Enter")
    view = opened(explorer)
    assert view.locator(".main-svg").count() and not page.locator(".cola-app > .cola-status").inner_text()


# The site


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1280])
def test_figures_of_the_site_live_without_a_kernel(browser: Browser, site: Path, scheme: str, width: int) -> None:
    "Opened as files: every still becomes a view, fits the page, follows the theme, goes through its frames with the keyboard, and asks nothing of a network."
    watched = Watched(browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme))
    stills = 0
    for path in sorted(site.rglob("*.html")):
        if "cola-still" not in path.read_text(encoding="utf-8"): continue
        watched.page.goto(path.as_uri())
        for i in range(watched.page.locator(".cola-still").count()):
            view = watched.views().nth(i)
            settled(view)
            stills += 1
            assert view.get_attribute("data-cola-theme") == scheme
            assert view.evaluate("view => view.scrollWidth <= view.clientWidth + 1"), path.name
            slider = view.get_by_role("group", name="Steps").get_by_role("slider")
            if slider.is_visible():
                drawn = view.get_attribute("data-cola-drawn")
                press(slider)
                watched.page.wait_for_function("([view, old]) => view.dataset.colaDrawn !== old", arg=[view.element_handle(), drawn])
            shot(view, f"site {path.stem} {i} {width} {scheme}")
        assert watched.page.evaluate("document.documentElement.scrollWidth <= innerWidth + 1"), path.name
    assert stills >= 12
    watched.check()
