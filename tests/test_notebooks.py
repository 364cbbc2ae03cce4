"Every notebook runs from top to bottom within its minute, and carries nothing that does not belong in a commit."

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from walkthrough import NBS, ROOT, Walk, lesson_names, walk

# A lesson has 60 s under test on two free cores; here two share them, one thread each, on a machine that may be busy.
LIMIT = 3 * 60.0
MOST_BYTES = 300_000
MOST_LINES = 40
SHOWN = {"text/plain", "text/html", "text/markdown", "image/png", "application/vnd.plotly.v1+json"}

OURS = (str(ROOT / "cola_tutorial" / "__init__.py"), "1")

every_notebook = pytest.mark.parametrize("name", lesson_names())


def load(name: str) -> dict:
    "A notebook as plain JSON."
    return json.loads((NBS / f"{name}.ipynb").read_text(encoding="utf-8"))


def source(cell: dict) -> str:
    "A cell's text."
    return "".join(cell["source"])


@pytest.fixture(scope="module")
def walks(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, Future[Walk]]]:
    "The chosen notebooks, all started at once in a pool of two."
    tests = [item for item in request.session.items if getattr(item, "originalname", "") == "test_runs"]
    cache = tmp_path_factory.mktemp("datasets")
    with ThreadPoolExecutor(2) as pool:
        chosen = [item.callspec.params["name"] for item in tests]
        yield {name: pool.submit(walk, name, cache, in_test=True, limit=LIMIT) for name in chosen}
        pool.shutdown(cancel_futures=True)


@every_notebook
def test_runs(name: str, walks: dict[str, Future[Walk]], capsys: pytest.CaptureFixture) -> None:
    "It runs to its end, in its own process and folder, with the tests' steps; its time is printed."
    result = walks[name].result()
    with capsys.disabled(): print(f"\n{result}", end=" ")
    assert not result.error, result.error


@pytest.fixture(scope="module")
def cleaned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A copy of all notebooks after nbdev's cleaning."
    folder = tmp_path_factory.mktemp("cleaned")
    shutil.copy(ROOT / "pyproject.toml", folder)
    shutil.copytree(NBS, folder / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    clean = "from nbdev.clean import nbdev_clean; nbdev_clean()"
    subprocess.run([sys.executable, "-c", clean], cwd=folder, check=True)
    return folder / "nbs"


@every_notebook
def test_is_clean(name: str, cleaned: Path) -> None:
    "Cleaning has nothing left to do: no execution counts, no stray metadata, keys in order."
    ours, clean = ((folder / f"{name}.ipynb").read_text(encoding="utf-8") for folder in (NBS, cleaned))
    assert ours == clean, "make clean-notebooks"


@every_notebook
def test_is_small_and_carries_no_widget_state(name: str) -> None:
    "At most 300 KB, and no state of widgets, which nbdev's cleaning keeps."
    path = NBS / f"{name}.ipynb"
    assert path.stat().st_size < MOST_BYTES
    assert "widgets" not in load(name)["metadata"], "make clean-notebooks"
    assert "application/vnd.jupyter.widget-state" not in path.read_text(encoding="utf-8"), "make clean-notebooks"


def outputs(notebook: dict) -> Iterator[tuple[str, dict]]:
    "Every output with the first line of its cell."
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []): yield source(cell).split("\n")[0], output


@every_notebook
def test_outputs_are_pictures_and_text(name: str) -> None:
    "What is shown without a kernel is static: text, tables and PNG pictures, and no traceback."
    for line, output in outputs(load(name)):
        if output["output_type"] == "stream": continue
        assert output["output_type"] in ("execute_result", "display_data"), f"{output['output_type']} after: {line}"
        assert output["data"].keys() <= SHOWN, f"{output['data'].keys() - SHOWN} after: {line}"


@every_notebook
def test_outputs_name_no_folder_of_this_machine(name: str) -> None:
    "An output is the same on every machine: it names neither this clone, nor a home, nor the Python in use."
    here = [str(ROOT), str(Path.home()), sys.prefix]
    for line, output in outputs(load(name)):
        shown = json.dumps(output, ensure_ascii=False)
        assert not [folder for folder in here if folder in shown], f"a path of this machine after: {line}"


@every_notebook
def test_cells_need_no_scrolling(name: str) -> None:
    "At most 40 lines of code that are not blank."
    for cell in load(name)["cells"]:
        if cell["cell_type"] != "code": continue
        lines = [line for line in source(cell).splitlines() if line.strip()]
        assert len(lines) <= MOST_LINES, f"{len(lines)} lines: {lines[0]}"


@every_notebook
def test_opens_with_a_title_and_a_promise(name: str) -> None:
    "The first cell has the lesson's title and, as a quotation, its promise in one line."
    lines = [line for line in source(load(name)["cells"][0]).splitlines() if line.strip()]
    assert lines[0].startswith("# ")
    assert lines[1].startswith("> ") and not lines[2].startswith("> ")


@every_notebook
def test_exercises_are_answered(name: str) -> None:
    "Every exercise has its answer, in a sentence, there or behind the cell that shows it."
    prose = "\n".join(source(cell) for cell in load(name)["cells"] if cell["cell_type"] == "markdown")
    answers = re.findall(r"\(Answer: ([^)]+)", prose)
    assert prose.count("**Try it.**") <= len(answers)
    assert all(len(answer.split()) >= 5 for answer in answers), answers


@pytest.mark.parametrize(
    "code, in_test, limit, wanted",
    [
        (f"import cola_tutorial, os; assert (cola_tutorial.__file__, os.environ['IN_TEST']) == {OURS}", True, 60, ""),
        ("import os; open('made_by_a_lesson', 'w').close(); assert 'IN_TEST' not in os.environ", False, 60, ""),
        ("1 / 0", True, 60, "ZeroDivisionError"),
        ("import os; os.write(2, b'out of cheese'); os._exit(3)", True, 60, "out of cheese"),
        ("while True: pass", True, 4, "did not end within 4 s"),
    ],
)
def test_walk_reports_what_happened(
    code: str,
    in_test: bool,
    limit: float,
    wanted: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    "A notebook gets its settings and this clone's package; a failure, a dead process and a hang are told apart."
    import nbformat.v4 as v4
    import walkthrough

    (tmp_path / "nbs").mkdir()
    cell = v4.new_code_cell(code)
    (tmp_path / "nbs" / "one.ipynb").write_text(json.dumps(v4.new_notebook(cells=[cell])))
    monkeypatch.setattr(walkthrough, "NBS", tmp_path / "nbs")
    monkeypatch.setenv("IN_TEST", "0")
    result = walkthrough.walk("one", tmp_path, in_test=in_test, limit=limit)
    assert (wanted in result.error) if wanted else not result.error, result.error
    assert [path.name for path in (tmp_path / "nbs").iterdir()] == ["one.ipynb"]


def test_walkthrough_fails_if_a_notebook_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    "One line for each notebook, the total, and an exit status that says whether all ran."
    import walkthrough

    def pretend(error: str) -> Callable:
        return lambda name, cache: Walk(name, 1.5, error if name == "06_flow" else "")

    monkeypatch.setattr(walkthrough, "walk", pretend("it broke"))
    assert walkthrough.main(["05_vae", "06_flow.ipynb"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "05_vae               1.5 s",
        "06_flow              1.5 s  FAILED",
        "it broke",
        "2 notebooks         3.0 s",
        "failed: 06_flow",
    ]
    monkeypatch.setattr(walkthrough, "walk", pretend(""))
    assert walkthrough.main(["05_vae", "06_flow"]) == 0
