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
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from plotly.io.json import to_json_plotly

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None: pytest.skip("no Chromium is installed (Debian: apt install chromium): nothing was tried in a browser", allow_module_level=True)

from playwright.sync_api import Browser, Locator, Page, TimeoutError, sync_playwright  # noqa: E402

from cola_tutorial.screen import Control, Picture, Pointer, View, add_frames, page_assets, panels  # noqa: E402
from cola_tutorial.viz import ViewError  # noqa: E402

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
# A view whose Python waits as long as it is told to, and which notes what it is asked.
SLOW = """
import time
from cola_tutorial.screen import Control, Picture, View, panels
asked = []
def draw(a, word):
    while Path("hold").exists(): time.sleep(0.02)
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


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    "Chromium, closed behind these tests: its driver keeps an event loop running in this thread."
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


in_lab = pytest.mark.parametrize("desk", ["jupyterlab"], indirect=True)  # where the place makes no difference
NAMELESS = """view => [...view.querySelectorAll('input, select, button')].filter(
    one => !(one.labels?.length || one.textContent.trim() || one.getAttribute('aria-label'))).map(one => one.outerHTML)"""
UNLABELLED = """view => { const layout = view.querySelector('.cola-plot')._fullLayout;
    return Object.keys(layout).filter(key => /^[xy]axis\\d*$/.test(key) && layout[key].visible && !layout[key].title.text); }"""


@in_lab
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


@in_lab
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
    "While Python is at work, all moves become one wish: for the value on which the slider rests."
    write(desk, "slow", "import json\nfrom pathlib import Path", SLOW, COUNT)
    watched = desk.open(browser, "slow")
    run_all(watched.page)
    view = watched.view("Slow")
    view.wait_for(timeout=MINUTE)
    settled(view)
    slider = view.get_by_role("slider", name="the number a")
    (desk.folder / "hold").touch()
    try: drag(slider, watched.page)
    finally: (desk.folder / "hold").unlink()
    settled(view)
    assert slider.input_value() == "100" and view.locator(".cola-text").inner_text() == "a is 100"
    run_cell(watched, 2)
    watched.page.wait_for_function("document.querySelectorAll('.jp-CodeCell')[2].querySelector('.jp-InputPrompt').textContent.match(/[4-9]/)")
    asked = json.loads((desk.folder / "asked.json").read_text())
    moves = asked[len(asked) - asked[::-1].index(3) :]
    assert len(moves) == 2 and moves[-1] == 100, moves
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
        assert paused > before and (desk.folder / "run" / "checkpoints" / f"stage1-{paused:07d}").is_dir()
        shot(view, f"{desk.kind} cockpit")
        view.get_by_role("button", name="Start or resume").press("Enter")
        words.filter(has_text="running").wait_for(timeout=MINUTE)
        moved(paused)
        assert step() > paused
    finally:
        view.get_by_role("button", name="Pause").press("Enter")
        words.filter(has_text="paused").wait_for(timeout=MINUTE)
    watched.check()


# A view on an empty page, whose Python is the test: it answers when the order of things is right


STAGE = """([spec, source, plotly]) => {
    const heard = {};
    window.sent = [];
    window.tell = (name, ...parts) => [...(heard[name] ?? [])].forEach(act => act(...parts));
    window.model = () => ({
        get: name => ({ spec: JSON.stringify(spec), _esm: source, _css: "" })[name],
        on: (name, act) => (heard[name] = heard[name] ?? new Set()).add(act),
        off: (name, act) => heard[name]?.delete(act),
        send: message => sent.push(structuredClone(message)),
    });
    window.say = answer => tell("msg:custom", { kind: "answer", answer: JSON.stringify(answer) });
    window.give = () => tell("msg:custom", { kind: "plotly" }, [new TextEncoder().encode(plotly)]);
    window.begin = () => { const el = document.body.appendChild(document.createElement("main")); return cola.render({ model: model(), el }); };
}"""


@dataclass
class Stage:
    "A page with one view, and its Python."

    page: Page
    view: View  # which answers when the test says so
    errors: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        files = {name: content.decode() for name, content in page_assets().items()}
        self.page.set_content(f"<!doctype html><html lang='en'><head><style>{files['view.css']}</style></head><body></body></html>")
        self.page.add_script_tag(content=files["view.js"])
        self.page.evaluate(STAGE, [self.view.spec(), files["view.js"] + "\nexport default { render: cola.render };\n", files["plotly.min.js"]])

    def begin(self) -> None:
        "Show the view, with the library and its first picture."
        self.page.evaluate("() => { begin(); give(); }")
        assert self.wishes()[0] == {"kind": "plotly"}
        self.answer()

    def wishes(self) -> list[dict]:
        "What the browser has sent."
        return self.page.evaluate("sent")

    def answer(self, wish: dict | None = None) -> None:
        "Answer a wish, the last one if no other is given."
        wish = wish or self.wishes()[-1]
        self.say(self.view.answer(wish) | {"view": wish["view"]})

    def say(self, answer: dict) -> None:
        "Send an answer; without a view it is a push."
        self.page.evaluate("say", json.loads(to_json_plotly(answer)))

    def drawn(self) -> None:
        "Wait until the view is drawn and has no wish left."
        settled(self.page.locator(".cola-view"))
        assert not self.errors

    def status(self) -> str: return self.page.locator(".cola-status").inner_text()


def narrowing(top: int, bottom: int, word: str, kind: str, one: bool = False, two: bool = False) -> Picture:
    "A line; the picture says its own word on the controls `bottom` and `kind`, which has as many options as `top` says."
    if top == 13: raise ViewError("13 cannot be drawn")
    figure = panels([""]).add_scatter(x=[0, 1], y=[0, top])
    kinds = [Control("kind", "kind", "choice", kind, options=[(name, name) for name in "abcdefgh"[: 2 + top // 20]])]
    return Picture(figure, f"{top}, {bottom}, {one}, {two}", controls=[Control("bottom", "bottom", "slider", bottom, 0, 50), *kinds])


@contextmanager
def on_stage(browser: Browser, view: View) -> Iterator[Stage]:
    "A view that is drawn, with nothing on its way; in the end nothing has gone wrong."
    stage = Stage(browser.new_page(viewport={"width": 900, "height": 900}), view)
    stage.begin()
    stage.drawn()
    yield stage
    assert not stage.errors
    stage.page.close()


@pytest.fixture
def stage(browser: Browser) -> Iterator[Stage]:
    "A view with controls of each kind."
    controls = [Control("top", "top", "slider", 5, 0, 100), Control("bottom", "bottom", "slider", 5, 0, 50), Control("word", "word", "text", "x")]
    controls += [Control("kind", "kind", "choice", "a", options=[("a", "a"), ("b", "b")]), Control("one", "one", "button"), Control("two", "two", "button")]
    with on_stage(browser, View("Narrow", "Look.", controls, narrowing)) as stage: yield stage


def frames(count: int) -> Picture:
    "So many steps, and words in which no script must end."
    figure = panels([""]).add_scatter(x=[0.0, 1.0], y=[0.0, 0.0])
    add_frames(figure, [[{"y": [0.0, float(i)]}] for i in range(count)], [0], [*map(str, range(count))])
    return Picture(figure, [f"<b>{i}</b></script><!--<script>" for i in range(count)], "step", start=1)


def stepped() -> View:
    "A view with nine steps, or fewer."
    return View("A </script> & more", "<!--", [Control("count", "count", "slider", 9, 2, 9)], frames)


def moved(stage: Stage, name: str, value: object) -> None:
    "Move a slider."
    stage.page.get_by_role("slider", name=name).fill(str(value))


def test_every_button_pressed_while_waiting_is_told_once(stage: Stage) -> None:
    "In the order of the last presses, one at a time, each with the newest values."
    before = len(stage.wishes())
    moved(stage, "top", 10)
    for name in ("one", "two", "one", "one"): stage.page.get_by_role("button", name=name).click()
    moved(stage, "top", 20)
    assert len(stage.wishes()) == before + 1
    for _ in range(3): stage.answer()
    told = [(wish["values"]["top"], wish["pressed"]) for wish in stage.wishes()[before:]]
    assert told == [(10, None), (20, "two"), (20, "one")]
    stage.drawn()


def test_an_answer_keeps_what_was_moved_meanwhile(stage: Stage) -> None:
    "A picture's word on a control is older than the reader's: the wish that follows has the reader's value, and so has the slider."
    moved(stage, "bottom", 10)
    moved(stage, "bottom", 30)
    stage.page.get_by_label("kind").select_option("b")
    stage.answer()
    assert stage.wishes()[-1]["values"] | {"bottom": 30, "kind": "b"} == stage.wishes()[-1]["values"]
    assert stage.page.get_by_role("slider", name="bottom").input_value() == "30"
    stage.answer()
    stage.drawn()
    assert stage.view.values["bottom"] == 30 and stage.page.locator(".cola-text").inner_text().startswith("5, 30")


def test_what_is_no_longer_possible_gives_way(stage: Stage) -> None:
    "If an answer takes away the option that was chosen meanwhile, the choice is the picture's."
    moved(stage, "top", 60)
    stage.answer()
    stage.page.get_by_label("kind").select_option("b")
    stage.answer()
    moved(stage, "top", 0)
    stage.page.get_by_label("kind").select_option("e")
    stage.answer()
    assert stage.wishes()[-1]["values"]["kind"] == "b" and stage.page.get_by_label("kind").locator("option").count() == 2
    stage.answer()
    stage.drawn()


def test_an_answer_takes_nothing_out_of_the_readers_hands(stage: Stage) -> None:
    "While a slider is dragged, a list is open or a word is half written, answers leave the element, the focus and the word."
    page, sliders, kind = stage.page, stage.page.get_by_role("slider", name="bottom"), stage.page.get_by_label("kind")
    old = [sliders.element_handle(), kind.element_handle()]
    box = sliders.bounding_box()
    page.mouse.move(box["x"] + 20, box["y"] + box["height"] / 2)
    page.mouse.down()
    wish = stage.wishes()[-1]
    value = sliders.input_value()
    assert wish["values"]["bottom"] == int(value)
    other = {"name": "bottom", "label": "bottom", "kind": "slider", "value": 7, "low": 0, "high": 49, "step": 1, "options": [], "hint": ""}
    told = json.loads(to_json_plotly(stage.view.answer(wish)))
    told["picture"]["controls"][0] = other
    stage.say(told | {"view": wish["view"]})
    assert page.evaluate("old => old.every(one => one.isConnected)", old) and sliders.input_value() == value
    page.mouse.up()
    assert sliders.get_attribute("max") == "49" and sliders.input_value() == value
    assert page.evaluate("document.activeElement.name") == "bottom"
    word = page.get_by_label("word")
    word.fill("half a wo")
    stage.say({"picture": told["picture"], "error": ""})
    assert word.input_value() == "half a wo" and old[1].evaluate("one => one.isConnected")
    stage.drawn()


def test_a_push_is_older_than_a_wish_on_its_way(stage: Stage) -> None:
    "What comes unasked neither ends the waiting nor moves a control back; without a wish on its way it moves it."
    pushed = stage.view.answer({})
    moved(stage, "bottom", 40)
    stage.say(pushed)
    slider = stage.page.get_by_role("slider", name="bottom")
    assert slider.input_value() == "40" and stage.page.locator(".cola-view[aria-busy]").count()
    stage.answer()
    stage.drawn()
    stage.say(pushed)
    assert slider.input_value() == "5"


def test_a_push_leaves_what_an_answer_has_said(stage: Stage) -> None:
    "A refusal stays until the next answer; a fault that was pushed goes with the next push."
    pushed = stage.view.answer({})
    moved(stage, "top", 13)
    stage.answer()
    stage.say(pushed)
    assert stage.status() == "13 cannot be drawn"
    moved(stage, "top", 14)
    stage.answer()
    assert not stage.status()
    stage.say({"error": "the file is gone"})
    assert stage.status() == "the file is gone"
    stage.say(pushed)
    assert not stage.status()


def test_a_saved_page_shows_what_was_seen(browser: Browser, tmp_path: Path) -> None:
    "It opens at the step at which it was saved, without a server, whatever the words in it are."
    with on_stage(browser, stepped()) as stage:
        scrub = stage.page.get_by_role("slider", name="step")
        assert scrub.input_value() == "1"
        scrub.fill("3")
        stage.page.wait_for_selector("[data-cola-drawn='3']")
        with stage.page.expect_download() as saved: stage.page.get_by_role("button", name="Save HTML").click()
        saved.value.save_as(tmp_path / "saved.html")
    watched = Watched(browser.new_page(viewport={"width": 900, "height": 900}))
    watched.page.goto((tmp_path / "saved.html").as_uri())
    view = watched.page.locator(".cola-view")
    settled(view)
    assert view.get_attribute("data-cola-drawn") == "3" and view.locator(".cola-text b").inner_text() == "3"
    assert view.locator(".cola-title").inner_text() == watched.page.title() == "A </script> & more"
    watched.check()
    watched.page.close()


def test_playing_ends_where_a_new_picture_ends(browser: Browser) -> None:
    "Also if it has fewer steps than the one before; while it plays, screen readers are spared the texts."
    with on_stage(browser, stepped()) as stage:
        stage.page.clock.install()
        stage.page.get_by_role("button", name="Play").click()
        pause, words = stage.page.get_by_role("button", name="Pause"), stage.page.locator(".cola-text")
        assert pause.count() == 1 and words.get_attribute("aria-live") == "off"
        stage.page.clock.run_for(700)
        assert stage.page.get_by_role("slider", name="step").input_value() == "3"
        moved(stage, "count", 4)
        stage.answer()
        stage.page.clock.run_for(3000)
        assert pause.count() == 0 and words.get_attribute("aria-live") == "polite"
        stage.page.wait_for_selector("[data-cola-drawn='3']")
        assert words.locator("b").inner_text() == "3"


def test_the_library_comes_though_the_first_to_ask_has_gone(browser: Browser) -> None:
    "Of two views the first asks for both; closed before the library is here, it leaves the asking to the second."
    stage = Stage(browser.new_page(), View("Plain", "Look.", [], lambda: Picture(panels([""]).add_scatter(y=[1, 2]))))
    asked = lambda: [wish for wish in stage.wishes() if wish.get("kind") == "plotly"]
    stage.page.evaluate("() => { window.close = begin(); begin(); }")
    stage.answer(stage.wishes()[-1])
    assert len(asked()) == 1
    wish = stage.wishes()[-1]
    stage.page.evaluate("() => { window.close(); document.querySelector('main').remove(); }")
    stage.page.wait_for_function("sent.filter(one => one.kind === 'plotly').length === 2")
    stage.page.evaluate("give()")
    stage.answer(wish)
    stage.drawn()
    stage.page.close()


def painted(cells: list) -> Picture:
    "A sheet of cells, and the picture's own word on them."
    figure = panels([""]).add_heatmap(z=[[float(one) for one in row] for row in cells], zmin=0, zmax=1)
    return Picture(figure, str(cells), controls=[Control("cells", "cells", "hidden", cells)])


def test_cells_painted_while_python_draws_stay_painted(browser: Browser) -> None:
    "The answer for the first cell does not wipe the second; without a kernel nothing is painted any more."
    begin = [[0] * 4 for _ in range(4)]
    view = View("Cells", "Paint.", [Control("cells", "cells", "hidden", begin)], painted, pointer=Pointer("paint", ("cells",), "Paint."))
    with on_stage(browser, view) as stage:
        plot = stage.page.locator(".cola-plot")
        at = "([plot, x, y]) => { const { xaxis: a, yaxis: b } = plot._fullLayout; const box = plot.getBoundingClientRect();"
        at += " return [box.left + a._offset + a.d2p(x), box.top + b._offset + b.d2p(y)]; }"
        place = lambda x, y: stage.page.evaluate(at, [plot.element_handle(), x, y])
        stage.page.mouse.move(*place(0, 0))
        stage.page.mouse.down()
        stage.page.mouse.move(*place(1, 0))
        stage.answer()
        stage.page.mouse.move(*place(2, 0))
        stage.answer()
        stage.page.mouse.up()
        stage.answer()
        stage.drawn()
        assert view.values["cells"][0] == [1, 1, 1, 0]
        assert stage.page.locator(".cola-spoken").text_content() == "row 0, column 2: on"
        stage.page.evaluate("tell('comm_live_update')")
        count = len(stage.wishes())
        stage.page.mouse.click(*place(3, 3))
        plot.press("Enter")
        assert len(stage.wishes()) == count and "Run this cell again" in stage.status()


def test_a_stroke_that_is_broken_off_draws_nothing(browser: Browser) -> None:
    "Escape, or a browser that takes the gesture for scrolling; the next stroke counts."
    line = lambda strokes: Picture(panels([""]).add_scatter(x=[0, 1], y=[0, 1]), str(len(strokes)))
    view = View("Arrows", "Draw.", [Control("strokes", "arrows", "hidden", [])], line, pointer=Pointer("stroke", ("strokes",), "Draw."))
    with on_stage(browser, view) as stage:
        mouse, plot = stage.page.mouse, stage.page.locator(".cola-plot")
        box = plot.bounding_box()
        middle = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        count = len(stage.wishes())
        for end in (lambda: plot.press("Escape"), lambda: plot.dispatch_event("pointercancel"), None):
            mouse.move(*middle)
            mouse.down()
            mouse.move(middle[0] + 30, middle[1] + 30)
            assert plot.locator(".cola-stroke line").count() == 1
            if end:
                end()
                mouse.move(middle[0] + 60, middle[1])
                assert plot.locator(".cola-stroke").count() == 0
            mouse.up()
            assert len(stage.wishes()) == count + (end is None)
        assert len(stage.wishes()[-1]["values"]["strokes"]) == 1
        stage.answer()
        stage.drawn()


def test_numbers_are_shown_with_the_digits_of_their_step(browser: Browser) -> None:
    "A slider in quarters shows quarters; a number that was given twice is told once; a complaint goes when its cause goes."
    controls = [Control("a", "in quarters", "slider", 0.25, 0.0, 1.0, 0.25), Control("n", "whole", "number", 2, 0, 9)]
    with on_stage(browser, View("Digits", "Look.", controls, lambda a, n: Picture(panels([""]).add_scatter(y=[a, n])))) as stage:
        assert stage.page.locator("output").first.inner_text() == "0.25"
        number, count = stage.page.get_by_label("whole"), len(stage.wishes())
        number.fill("3")
        number.press("Enter")
        number.press("Tab")
        stage.answer()
        assert len(stage.wishes()) == count + 1
        number.fill("30")
        number.press("Enter")
        assert stage.status().startswith("whole: ")
        number.fill("3")
        number.press("Enter")
        assert not stage.status() and len(stage.wishes()) == count + 1
        stage.drawn()


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
    "Each of them, for a text of the reader's own; of a text that is too long it says so, the view stays, and the next text is taken."
    page = explorer.page
    page.get_by_label("your text").fill("Emma had a brother.")
    page.get_by_label("your text").press("Enter")
    opened(explorer)
    looks, titles = page.get_by_role("combobox", name="view", exact=True), set()
    names = looks.locator("option").all_text_contents()
    for name in names:
        looks.select_option(label=name)
        view = opened(explorer)
        titles.add(view.locator(".cola-title").text_content())
        assert not view.locator(".cola-status").inner_text() and not page.locator(".cola-app > .cola-status").inner_text()
        assert not view.get_by_label("prompt", exact=True).count()
        shot(page, f"explorer {name}")
    assert len(titles) == len(names) >= 9
    explorer.check()
    page.get_by_label("your text").fill("Emma had a brother. " * 60)
    page.get_by_role("button", name="Read it").click()
    page.wait_for_function("document.querySelector('.cola-app > .cola-status').textContent.includes('tokens')", timeout=MINUTE)
    assert opened(explorer).locator(".main-svg").count()
    page.get_by_label("your text").fill("Emma had a brother.")
    page.get_by_label("your text").press("Enter")
    page.wait_for_function("!document.querySelector('.cola-app > .cola-status').textContent", timeout=MINUTE)
    view = opened(explorer)
    assert view.locator(".main-svg").count() and not page.locator(".cola-app > .cola-status").inner_text()


# The site


@pytest.mark.parametrize("width, scheme", [(375, "dark"), (1280, "light")])
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


def test_a_figure_of_a_served_site_can_be_saved_as_a_page(browser: Browser, site: Path, tmp_path: Path) -> None:
    "Where a server hands out the site, the files that a page of its own needs are found; opened as a file, that page draws the figure."
    path = next(path for path in sorted(site.rglob("*.html")) if "cola-still" in path.read_text(encoding="utf-8"))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=site)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        watched = Watched(browser.new_page())
        watched.page.goto(f"http://127.0.0.1:{server.server_port}/{path.relative_to(site).as_posix()}")
        view = watched.views().first
        settled(view)
        with watched.page.expect_download() as saved: view.get_by_role("button", name="Save HTML").click()
        saved.value.save_as(tmp_path / "saved.html")
        server.shutdown()
    watched.page.goto((tmp_path / "saved.html").as_uri())
    settled(watched.views().first)
    watched.check()
    watched.page.close()
