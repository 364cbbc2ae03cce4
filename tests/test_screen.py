"What views share: controls that are checked, wishes that are answered, stills that are kept."

import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import plotly.graph_objects as go
import pytest

from cola_tutorial import screen
from cola_tutorial.screen import Control, Picture, Pointer, Screen, View, add_frames, interactive, page_assets, panels, show, still, still_html
from cola_tutorial.viz import ViewError

ROOT = Path(__file__).resolve().parent.parent
NUMBER = Control("a", "number a", "slider", 3, 0, 50, 1)
NAME = Control("name", "a name", "text", "x")
PRESS = Control("again", "again", "button")


def draw(a: int, name: str = "", again: bool = False) -> Picture:
    "A line whose slope is `a`; refuses 13."
    if a == 13: raise ViewError("13 cannot be drawn: take another")
    figure = panels(["one", "two"])
    figure.add_scatter(x=[*range(20)], y=[a * i for i in range(20)], row=1, col=1)
    figure.add_bar(x=[1, 2], y=[1, 2], row=1, col=2)
    return Picture(figure, f"a = {a}, {name}, {again}")


def view(**changes) -> View:
    "A view with a slider, a text and a button."
    return View(**{"title": "A <test>", "caption": "Move a.", "controls": [NUMBER, NAME, PRESS], "draw": draw} | changes)


def stepped() -> View:
    "A view whose picture has three frames."

    def frames() -> Picture:
        figure = panels([""])
        figure.add_scatter(x=[0.0, 1.0], y=[0.0, 0.0])
        add_frames(figure, [[{"y": [0.0, float(i)]}] for i in range(3)], [0], ["1.0", "0.5", "0.0"])
        return Picture(figure, ["far", "near", "there"], "flow time t", start=2)

    return View("Steps", "Go.", [], frames)


@pytest.mark.parametrize("value", ["3", True, None, 51, -1, float("nan"), float("inf"), [3], {"a": 3}])
def test_a_slider_refuses_what_is_no_number_in_its_range(value: object) -> None:
    "Whatever a message holds, the control takes numbers of its range only."
    with pytest.raises(ViewError, match="from 0 to 50"): NUMBER.read(value)


def test_controls_give_their_own_types() -> None:
    "Whole sliders give int, others float; a choice gives its own value; lists and flags keep their kind."
    assert type(NUMBER.read(3.0)) is int
    assert type(Control("b", "b", "slider", 0.5, 0.0, 1.0, 0.1).read(1)) is float
    assert Control("c", "c", "choice", "u", options=[("UMAP", "u"), ("PCA", "p")]).read("p") == "p"
    assert Control("d", "d", "hidden", []).read([[0, 1]]) == [[0, 1]]
    for kind, wrong in (("text", 3), ("toggle", "yes"), ("button", 1), ("hidden", "no list")):
        with pytest.raises(ViewError): Control("e", "e", kind, {"text": "", "hidden": []}.get(kind, False)).read(wrong)


@pytest.mark.parametrize(
    "wrong, said",
    [
        (dict(kind="dial"), "take one of"),
        (dict(kind="slider", value=1, low=2, high=1), "low < high"),
        (dict(kind="slider", value=5, low=0, high=1), "from 0 to 1"),
        (dict(kind="choice", value="c", options=[("a", "a")]), "not possible"),
    ],
)
def test_a_control_that_cannot_be_moved_is_refused(wrong: dict, said: str) -> None:
    "It says what is wrong before anything is shown."
    with pytest.raises(ViewError, match=said): Control("n", "n", **wrong)


def test_a_pointer_needs_the_controls_that_it_changes() -> None:
    "Kinds, counts and names are checked."
    with pytest.raises(ViewError, match="drag, paint or stroke"): Pointer("push", ("a",), "Push.")
    with pytest.raises(ViewError, match="cannot change"): Pointer("drag", ("a",), "Drag.")
    with pytest.raises(ViewError, match="no control 'b'"): view(pointer=Pointer("drag", ("a", "b"), "Drag."))
    with pytest.raises(ViewError, match="no control 'b'"): view(vary="b")
    with pytest.raises(ViewError, match="same name"): view(controls=[NUMBER, NUMBER])


def test_what_cannot_be_drawn_changes_nothing() -> None:
    "After a refused wish the values are the old ones; a button is pressed once."
    one = view()
    one.picture(a=5)
    with pytest.raises(ViewError, match="13 cannot"): one.picture(a=13)
    with pytest.raises(ViewError, match="no control 'c'"): one.picture(c=1)
    assert one.values == {"a": 5, "name": "x", "again": False}
    assert one.picture(again=True).texts == "a = 5, x, True"
    assert one.picture().texts == "a = 5, x, False"


def test_a_drawing_cannot_spoil_the_values() -> None:
    "A function that changes the list it was given changes its own copy."
    cells = Control("cells", "cells", "hidden", [[0, 0]])

    def spoil(cells: list) -> Picture:
        cells[0][0] += 1
        return Picture(panels([""]), str(cells))

    one = View("t", "c", [cells], spoil)
    assert one.picture().texts == one.picture().texts == "[[1, 0]]"


def test_a_picture_may_change_its_controls() -> None:
    "Other options come with the picture, and count from then on."
    pages = lambda count: Control("page", "page", "choice", 0, options=[(str(i), i) for i in range(count)])

    def write(seed: int, page: int) -> Picture: return Picture(panels([""]), controls=[pages(seed)])

    one = View("t", "c", [Control("seed", "seed", "number", 1, 1, 9), pages(1)], write)
    one.picture(seed=4)
    assert one.values == {"seed": 4, "page": 0}
    assert len(one.controls["page"].options) == 4
    one.picture(page=3)
    with pytest.raises(ViewError): one.picture(page=4)


# What goes to the browser


class Wire:
    "Keeps what a screen sends."

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.sent = []
        monkeypatch.setattr(Screen, "send", lambda _, message, buffers=None: self.sent.append((message, buffers)))

    def answers(self) -> list[dict]:
        "The answers among it."
        return [json.loads(message["answer"]) for message, _ in self.sent if message.get("kind") == "answer"]


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Wire:
    "In the place of a browser."
    return Wire(monkeypatch)


def test_a_wish_is_answered_to_the_one_who_asked(wire: Wire) -> None:
    "The answer names its asker and holds the picture."
    one = view()
    Screen(one).hear({"kind": "ask", "view": "v1", "values": {"a": 7, "name": "y", "again": False}, "pressed": "again"})
    answer = wire.answers()[0]
    assert (answer["view"], answer["error"]) == ("v1", "")
    assert answer["picture"]["texts"] == "a = 7, y, True"


def test_a_refused_wish_is_answered_with_its_reason(wire: Wire) -> None:
    "The reader sees the sentence of the exception, and no picture takes the old one's place."
    Screen(view()).hear({"kind": "ask", "view": "v1", "values": {"a": 13}})
    answer = wire.answers()[0]
    assert answer["error"] == "13 cannot be drawn: take another" and "picture" not in answer


def test_a_fault_is_answered_and_raised(wire: Wire) -> None:
    "The browser does not wait forever for what has failed, and the traceback reaches the log."

    def fail() -> Picture: raise KeyError("lost")

    with pytest.raises(KeyError): Screen(View("t", "c", [], fail)).hear({"kind": "ask", "view": "v1", "values": {}})
    assert "Python's log" in wire.answers()[0]["error"]


def test_the_library_is_sent_when_it_is_asked_for(wire: Wire) -> None:
    "It comes from the installed plotly, in one piece."
    Screen(view()).hear({"kind": "plotly"})
    message, buffers = wire.sent[0]
    assert message == {"kind": "plotly"} and buffers == [page_assets()["plotly.min.js"]]


def test_a_push_reaches_every_open_screen(wire: Wire) -> None:
    "Also those that did not ask; closed ones are forgotten."
    one = view()
    first, second = Screen(one), Screen(one)
    first.close()
    one.push()
    pushed = wire.answers()
    assert len(pushed) == 1 and one.screens == [second]
    assert "view" not in pushed[0]


def test_numbers_keep_five_digits() -> None:
    "Packed or not, a number in a picture is right to five digits, gaps stay gaps, and other lists stay as they are."
    values = [1 / 3, None, 1e-7] + [1e5 + i / 7 for i in range(20)]
    plain = screen._plain(go.Figure(go.Scatter(x=values, y=[1 / 3], text=["a"] * 30)))["data"][0]
    read = np.frombuffer(base64.b64decode(plain["x"]["bdata"]), dtype="<f4")
    assert np.allclose(read, [np.nan if v is None else v for v in values], rtol=1e-5, equal_nan=True)
    assert plain["y"] == [0.33333] and plain["text"] == ["a"] * 30


# Stills


def test_a_still_goes_through_the_values_of_its_control() -> None:
    "Its frames are the pictures of the function, the one where it stood among them; only traces that change are in them."
    one = view(vary="a")
    one.picture(a=8)
    figure = still(one)
    names = [int(frame.name) for frame in figure.frames]
    assert names[0] == 0 and names[-1] == 50 and len(names) <= 14
    for name, frame in zip(names, figure.frames):
        assert frame.traces == (0,)
        assert [*frame.data[0].y] == [name * i for i in range(20)]
    assert one.values["a"] == 8
    about = figure.layout.meta["cola"]
    assert about["texts"][2] == f"a = {names[2]}, x, False" and names[about["start"]] == 8


def test_a_still_keeps_the_frames_of_its_picture() -> None:
    "Frames come with a slider whose names they are, and the one that the picture begins with is drawn."
    figure = still(stepped())
    slider = figure.layout.sliders[0]
    assert [step.label for step in slider.steps] == ["1.0", "0.5", "0.0"] and slider.active == 2
    assert [*figure.data[0].y] == [0.0, 2.0]


def test_a_still_becomes_a_part_of_a_page() -> None:
    "Plotly's own controls are gone, nothing can end the script early, and what is no still is refused."
    kept = screen._plain(still(view(vary="a")))
    page = still_html(kept)
    spec = json.loads(page.split('<script type="application/json">')[1].split("</script>")[0])
    assert spec["title"] == "A <test>" and "<test>" not in page
    assert not {"sliders", "updatemenus", "title"} & spec["picture"]["figure"]["layout"].keys()
    assert spec["picture"]["figure"]["layout"]["height"] == 420
    assert len(spec["picture"]["texts"]) == len(spec["picture"]["figure"]["frames"])
    with pytest.raises(ViewError, match="no still"): still_html({"data": [], "layout": {}})


def test_panels_have_a_second_arrangement() -> None:
    "Side by side they share the width; below one another each has all of it, and no two overlap."
    figure = panels(["a", "b", "c"])
    narrow = figure.layout.meta["narrow"]
    wide = [figure.layout[f"xaxis{i}"].domain for i in ("", 2, 3)]
    assert all(left[1] < right[0] for left, right in zip(wide, wide[1:]))
    assert all(tuple(narrow[f"xaxis{i}"]["domain"]) == (0.0, 1.0) for i in ("", 2, 3))
    tall = [narrow[f"yaxis{i}"]["domain"] for i in ("", 2, 3)]
    assert all(low[1] < high[0] for high, low in zip(tall, tall[1:]))
    with pytest.raises(ViewError): panels([])


# Where it is shown


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list:
    "What `show` displays, in a notebook with a reader."
    outputs = []
    monkeypatch.setattr(screen, "display", lambda *things, **options: outputs.extend(things))
    monkeypatch.setenv("JPY_SESSION_NAME", "a.ipynb")
    monkeypatch.delenv("IN_TEST", raising=False)
    monkeypatch.setattr(screen, "_open", {})
    return outputs


def run_of(monkeypatch: pytest.MonkeyPatch, cell: str, run: str) -> None:
    "From now on, a cell is being run."
    parent = {"metadata": {"cellId": cell}, "header": {"msg_id": run}}
    monkeypatch.setattr(screen, "get_ipython", lambda: SimpleNamespace(get_parent=lambda: parent))


def test_a_cell_that_runs_again_closes_what_it_had_opened(shown: list, monkeypatch: pytest.MonkeyPatch) -> None:
    "One run may show two views; the next run of the same cell closes both, and another cell closes none."
    one = view()
    run_of(monkeypatch, "c1", "r1")
    show(one), show(one)
    assert len(one.screens) == 2
    run_of(monkeypatch, "c2", "r2")
    show(one)
    assert len(one.screens) == 3
    run_of(monkeypatch, "c1", "r3")
    show(one)
    assert len(one.screens) == 2 and len(shown) == 8


def test_the_picture_stands_beside_the_live_view(shown: list, monkeypatch: pytest.MonkeyPatch) -> None:
    "First the still for readers without a kernel, then the live view; without a reader the still alone."
    run_of(monkeypatch, "c1", "r1")
    show(view())
    assert [*shown[0]] == ["application/vnd.plotly.v1+json", "text/plain"] and isinstance(shown[1], Screen)
    monkeypatch.setenv("IN_TEST", "1")
    show(view())
    assert len(shown) == 3


@pytest.mark.parametrize("sign, expected", [("JPY_SESSION_NAME", True), ("VSCODE_PID", True), ("COLAB_RELEASE_TAG", True), ("HOME", False)])
def test_interactive_means_that_a_server_says_so(sign: str, expected: bool) -> None:
    "In a process of its own, whose environment has one sign and no other."
    clean = {name: value for name, value in os.environ.items() if name not in ("IN_TEST", "JPY_SESSION_NAME", "VSCODE_PID", "COLAB_RELEASE_TAG")}
    program = "from cola_tutorial.screen import interactive; print(interactive())"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=clean | {sign: "/x"}, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(expected)
    assert interactive() is False or "IN_TEST" not in os.environ
