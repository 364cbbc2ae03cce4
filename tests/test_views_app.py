"The explorer: one text and seed for all looks, answered in a notebook or by a server that talks to its own page alone."

import json
import socket
import threading
from collections.abc import Iterator
from http.client import HTTPConnection
from typing import Any

import pytest

from cola_tutorial.config import data_dir
from cola_tutorial.model import ColaDLM
from cola_tutorial.screen import Control, Picture, View, page_assets, panels
from cola_tutorial.views.app import App, AppServer, explorer
from cola_tutorial.viz import ViewError

TEXT, JSON = "a little fox", {"Content-Type": "application/json"}


def lengths(text: str, seed: int) -> View:
    "A look at the lengths of words; refuses no text when it is made, one word and the power 3 when it is drawn."
    if not text: raise ViewError("the text is empty: write something")

    def draw(prompt: str, seed: int, power: int) -> Picture:
        if " " not in prompt: raise ViewError("one word is too little: write more")
        if power == 3: raise ViewError("3 is too much: take less")
        return Picture(panels([""]).add_scatter(y=[len(word) ** power for word in prompt.split()]), f"{prompt}, {seed}, {power}")

    controls = [Control("prompt", "p", "text", text), Control("seed", "s", "number", seed, 0, 99), Control("power", "n", "slider", 1, 1, 3)]
    return View("Lengths", "Move it.", controls, draw)


def broken(text: str, seed: int) -> View:
    "A look whose drawing has a fault."

    def draw() -> Picture: raise KeyError("lost")

    return View("Broken", "Nothing.", [], draw)


@pytest.fixture
def app() -> App:
    "Two looks around one text."
    return App("Words & <more>", "Write.", [("lengths", "lengths of words", lengths), ("broken", "a fault", broken)], TEXT, 7)


def opened(app: App, look: str = "lengths", text: str = TEXT, seed: int = 7) -> dict:
    "What opening a look answers."
    return app.answer({"open": look, "text": text, "seed": seed})


def wish(look: str = "lengths", text: str = TEXT, seed: int = 7, **values) -> dict:
    "A message of the view that is open."
    return {"view": "v", "look": look, "text": text, "seed": seed, "values": values, "pressed": None}


# Messages


def test_what_the_app_asks_for_is_not_asked_again(app: App) -> None:
    "Controls for the text and the seed are left out of a look, but have the app's values."
    spec = opened(app, text="one three", seed=5)["spec"]
    assert spec["picture"]["texts"] == "one three, 5, 1"
    assert [control["name"] for control in spec["controls"]] == ["power"]
    assert app.answer(wish(text="one three", seed=5, power=2))["picture"]["texts"] == "one three, 5, 2"


def test_a_look_is_made_once_for_a_text_and_a_seed(app: App) -> None:
    "The same text finds it as it was left; another text or another seed makes it anew."
    first = app.open("lengths", TEXT, 7)
    app.answer(wish(power=2))
    assert app.open("lengths", TEXT, 7) is first and first.values["power"] == 2
    assert app.open("lengths", TEXT, 8) is not first
    assert app.open("lengths", "another one", 8).values == {"prompt": "another one", "seed": 8, "power": 1}


@pytest.mark.parametrize("other", [{"text": "another one"}, {"seed": 8}])
def test_a_view_of_another_text_is_not_answered(app: App, other: dict) -> None:
    "With the page open twice, the views of one text do not answer for those of the other."
    opened(app)
    assert "picture" in app.answer(wish())
    opened(app, **other)
    stale = app.answer(wish())
    assert "no longer here" in stale["error"] and "picture" not in stale
    assert "picture" in app.answer(wish(**other))


@pytest.mark.parametrize("text, said", [("", "the text is empty: write something"), ("word", "one word is too little: write more")])
def test_a_look_that_cannot_be_drawn_leaves_the_old_one(app: App, text: str, said: str) -> None:
    "After a text that is refused, the view that is still to be seen still answers."
    opened(app)
    assert opened(app, text=text) == {"error": said}
    assert (app.text, app.seed) == (TEXT, 7)
    assert app.answer(wish(power=2))["picture"]["texts"] == f"{TEXT}, 7, 2"


@pytest.mark.parametrize(
    "message, said",
    [
        ({"open": "nothing", "text": "x", "seed": 0}, "take one of lengths, broken"),
        ({"open": "lengths", "seed": 0}, "give a string"),
        ({"open": "lengths", "text": ["x"], "seed": 0}, "give a string"),
        ({"open": "lengths", "text": "x"}, "whole number"),
        ({"open": "lengths", "text": "x", "seed": -1}, "whole number"),
        ({"open": "lengths", "text": "x", "seed": 2**32}, "whole number"),
        ({"open": "lengths", "text": "x", "seed": 1.0}, "whole number"),
        ({"open": "lengths", "text": "x", "seed": True}, "whole number"),
        (wish(), "no longer here"),
        ({}, "no longer here"),
    ],
)
def test_a_message_that_cannot_be_met_is_answered_with_its_reason(app: App, message: dict, said: str) -> None:
    "The reader sees a sentence."
    answer = app.answer(message)
    assert said in answer["error"] and answer.keys() == {"error"}


def test_the_reason_of_a_look_is_passed_on(app: App) -> None:
    "What a view refuses, the app refuses with the view's words."
    opened(app)
    assert app.answer(wish(power=3)) == {"error": "3 is too much: take less"}
    assert "from 1 to 3" in app.answer(wish(power=4))["error"]


def test_the_explorer_needs_a_tokenizer() -> None:
    "Without one it cannot read a text, and says so."
    model = ColaDLM.from_pretrained(data_dir() / "pretrained")
    model.tokenizer = None
    with pytest.raises(ViewError, match="no tokenizer"): explorer(model)


# The server


@pytest.fixture
def server(app: App) -> Iterator[AppServer]:
    "The app, served."
    with AppServer(app) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try: yield server
        finally:
            server.shutdown()
            thread.join()


def ask(server: AppServer, method: str, path: str, body: bytes | None = None, **headers) -> tuple[int, str, bytes]:
    "Status, type and content of what the server sends."
    connection = HTTPConnection("127.0.0.1", server.server_port)
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, response.getheader("Content-Type"), response.read()
    finally: connection.close()


def post(server: AppServer, message: Any, **headers) -> tuple[int, bytes]:
    "Status and content of the answer to a message; bytes are sent as they are."
    body = message if isinstance(message, bytes) else json.dumps(message).encode()
    status, _, content = ask(server, "POST", "/ask", body, **{**JSON, **headers})
    return status, content


def test_the_page_and_its_files_are_handed_out(server: AppServer) -> None:
    "The page with what the browser must know, in which nothing ends the script early, and each file with its type."
    status, kind, page = ask(server, "GET", "/")
    assert status == 200 and kind == "text/html; charset=utf-8"
    told = page.decode().split("cola.serve(")[1].split("</script>")[0]
    spec = json.loads(told.partition(", ")[2].removesuffix(");"))
    assert spec == json.loads(json.dumps(server.app.spec())) and "<more>" not in told
    for name, kind in (("view.css", "text/css"), ("view.js", "text/javascript"), ("plotly.min.js", "text/javascript")):
        assert ask(server, "GET", f"/{name}?v=1") == (200, f"{kind}; charset=utf-8", page_assets()[name])
    for path in ("/other", "/../settings.ini", "/views/view.js"): assert ask(server, "GET", path)[0] == 404


def test_a_message_is_answered_to_its_view(server: AppServer) -> None:
    "Opened and moved through the server as in a notebook."
    status, content = post(server, {"view": "a", "open": "lengths", "text": "one three", "seed": 0})
    assert status == 200 and json.loads(content)["view"] == "a"
    answer = json.loads(post(server, wish(text="one three", seed=0, power=2))[1])
    assert answer["view"] == "v" and answer["picture"]["figure"]["data"][0]["y"] == [9, 25]


@pytest.mark.parametrize("headers", [{"Host": "elsewhere.example"}, {"Host": "127.0.0.1:1"}, {"Origin": "http://elsewhere.example"}, {"Origin": "null"}])
def test_other_pages_are_refused(server: AppServer, headers: dict) -> None:
    "Neither under a foreign name nor from a foreign page does anybody get an answer, or the page."
    assert post(server, {"open": "lengths", "text": "x y", "seed": 0}, **headers)[0] == 403
    assert ask(server, "GET", "/", **headers)[0] == 403
    assert server.app.text == TEXT


def test_our_own_page_may_ask_under_both_names(server: AppServer) -> None:
    "A browser names the page that asks, by the name in its address."
    for host in (f"127.0.0.1:{server.server_port}", f"localhost:{server.server_port}"):
        assert post(server, {"open": "lengths", "text": "x y", "seed": 0}, Host=host, Origin=f"http://{host}")[0] == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_what_a_foreign_page_could_send_unasked_is_refused(server: AppServer, kind: str) -> None:
    "Forms and plain text go to any address without a question; JSON does not."
    assert post(server, {"open": "lengths", "text": "x y", "seed": 0}, **{"Content-Type": kind})[0] == 403


@pytest.mark.parametrize(
    "message, headers, status",
    [
        (b"no json", {}, 400),
        (b"\xff\xfe\xff", {}, 400),
        (b"[" * 200_000, {}, 400),
        ([1], {}, 400),
        (b"", {"Content-Length": str((1 << 20) + 1)}, 413),
        (b"", {"Content-Length": "-1"}, 411),
        (b"", {"Content-Length": "\xb2"}, 411),
    ],
)
def test_what_is_no_message_is_refused(server: AppServer, message: Any, headers: dict, status: int) -> None:
    "It says what is wrong, and the server goes on."
    refused, said = post(server, message, **headers)
    assert refused == status and b"the message" in said
    assert post(server, {"open": "lengths", "text": "x y", "seed": 0})[0] == 200


def test_a_fault_is_answered_and_logged(server: AppServer, capfd: pytest.CaptureFixture) -> None:
    "The page hears of it, the traceback stands in the terminal, and the next message is answered."
    logged = threading.Event()
    server.handle_error = lambda *about: (AppServer.handle_error(server, *about), logged.set())
    status, content = post(server, {"view": "v", "open": "broken", "text": TEXT, "seed": 7})
    answer = json.loads(content)
    assert status == 200 and answer["view"] == "v" and "Python's log" in answer["error"]
    assert logged.wait(60) and "KeyError: 'lost'" in capfd.readouterr().err
    assert "spec" in json.loads(post(server, {"open": "lengths", "text": "x y", "seed": 0})[1])


def test_a_reader_who_leaves_disturbs_nobody(server: AppServer, capfd: pytest.CaptureFixture) -> None:
    "A connection that is cut while Python draws is no fault: no traceback, and others are answered."
    asked, left, over = threading.Event(), threading.Event(), threading.Event()

    def answer(message: dict) -> dict:
        asked.set()
        assert left.wait(60)
        return {"error": "x" * 10_000_000}

    server.app.answer = answer
    finish = server.shutdown_request
    server.shutdown_request = lambda request: (finish(request), over.set())
    gone = socket.create_connection(("127.0.0.1", server.server_port))
    gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")  # cut off, not closed
    gone.sendall(f"POST /ask HTTP/1.0\r\nHost: 127.0.0.1:{server.server_port}\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{{}}".encode())
    assert asked.wait(60)
    gone.close()
    left.set()
    assert over.wait(60) and not capfd.readouterr().err
    assert post(server, {})[0] == 200
