"Seeing a run: logs read, followed through kills and resumptions, and compared on one page."

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from cola_tutorial import report
from cola_tutorial.config import data_dir
from cola_tutorial.model import ColaDLM
from cola_tutorial.report import Follower, ReportError, plot_runs, read_metrics, run_names, smoothed, summary, thinned, write_report

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = data_dir() / "pretrained"


def entry(step: int, stage: str = "stage1", **values: Any) -> dict:
    "A line of metrics.jsonl."
    return {"stage": stage, "step": step, "loss": 1 / step, "tokens_per_second": 100.0 * step} | values


def write(folder: Path, entries: list, name: str = "metrics.jsonl", end: str = "", **settings: Any) -> Path:
    "A run folder with a log, and its settings if any are given."
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(one) + "\n" for one in entries) + end)
    if settings: (folder / "run.json").write_text(json.dumps(settings))
    return folder


# Reading


def test_a_whole_log_is_read(tmp_path: Path) -> None:
    "Entries, settings and samples as they were written, and nothing to note."
    entries, samples = [entry(1), entry(5), entry(3, "stage2")], [{"stage": "stage2", "step": 3, "text": "Älter\n<b>"}]
    write(write(tmp_path, entries, size="tiny"), samples, "samples.jsonl")
    log = read_metrics(tmp_path)
    assert (log.entries, log.samples, log.settings, log.notes) == (entries, samples, {"size": "tiny"}, [])
    assert log.stages() == ["stage1", "stage2"] and log.names("stage1") == ["loss", "tokens_per_second"]
    assert log.curve("stage1", "loss") == ([1, 5], [1.0, 0.2]) and log.curve("stage2", "no_such") == ([], [])


def test_the_shipped_log_is_read_as_pandas_reads_it() -> None:
    "An independent reader finds the same curves."
    log, table = read_metrics(SHIPPED), pd.read_json(SHIPPED / "metrics.jsonl", lines=True)
    for stage, name in (("stage1", "kl"), ("stage2", "latent_std"), ("stage2", "held_out_loss")):
        theirs = table[(table.stage == stage) & table[name].notna()]
        steps, values = log.curve(stage, name)
        assert steps == theirs.step.tolist()
        np.testing.assert_allclose(values, theirs[name], rtol=1e-12)


@pytest.mark.parametrize("cut", range(1, 60))
def test_a_log_cut_anywhere_loses_its_last_line_only(cut: int, tmp_path: Path) -> None:
    "Whatever byte the run was killed at, in the middle of a letter too."
    raw = "".join(json.dumps(entry(step, word="Ä" * 3), ensure_ascii=False) + "\n" for step in (1, 2)).encode()
    tmp_path.joinpath("metrics.jsonl").write_bytes(raw[:-cut])
    log = read_metrics(tmp_path)
    ignored = [note for note in log.notes if "1 line cut" in note]
    assert len(log.entries) == (2 if cut == 1 else 1) and len(ignored) == (cut > 1)


@pytest.mark.parametrize(
    "line, words",
    [
        ('{"stage": "stage1", "st', "line 2 is broken"),
        ("\0" * 20, "line 2 is broken"),
        ("[1, 2]", "line 2 lacks"),
        ('{"step": 3}', "line 2 lacks"),
        ('{"stage": "stage1", "step": 2.5}', "line 2 lacks"),
        ('{"stage": "stage1", "step": true}', "line 2 lacks"),
    ],
)
def test_a_damaged_line_is_named(line: str, words: str, tmp_path: Path) -> None:
    "A broken line in the middle, or a whole one that is none of a training, is an error with file and number."
    write(tmp_path, [entry(1)], end=f"{line}\n{json.dumps(entry(3))}\n")
    with pytest.raises(ReportError, match=f"metrics.jsonl {words}"): read_metrics(tmp_path)
    write(tmp_path, [entry(1)], end='{"step": 3}')
    with pytest.raises(ReportError, match="metrics.jsonl line 2 lacks"): read_metrics(tmp_path)  # whole, so it was not cut
    write(tmp_path, [entry(1)])
    write(tmp_path, [{"stage": "stage2", "step": 1}, {"stage": "stage2", "step": 2, "text": ""}], "samples.jsonl")
    with pytest.raises(ReportError, match="samples.jsonl line 1 lacks"): read_metrics(tmp_path)


def test_what_cannot_be_drawn_is_counted(tmp_path: Path) -> None:
    "Values that are not finite or no numbers leave gaps that are told; null is no value at all."
    write(tmp_path, [entry(1, kl=math.nan, device="cpu"), entry(2, kl=-math.inf, share=None), entry(3, kl=2, flag=True)], size="tiny")
    log = read_metrics(tmp_path)
    assert log.curve("stage1", "kl") == ([3], [2])
    assert log.notes == [
        "device: 1 value not a number, not drawn",
        "flag: 1 value not a number, not drawn",
        "kl: 2 values not finite, not drawn",
    ]


def test_a_step_that_goes_back_voids_what_was_beyond(tmp_path: Path) -> None:
    "Two histories in one file: the later one holds, for its stage alone."
    write(tmp_path, [entry(s) for s in (1, 2, 3, 4)] + [entry(9, "stage2")] + [entry(3, loss=7.0), entry(4, loss=8.0)], size="tiny")
    log = read_metrics(tmp_path)
    assert log.curve("stage1", "loss") == ([1, 2, 3, 3, 4], [1.0, 0.5, 1 / 3, 7.0, 8.0]) and log.curve("stage2", "loss")[0] == [9]
    assert log.notes == ["metrics.jsonl: 1 line beyond a step to which the run went back, ignored"]


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    "And a log without a line is a run that has logged nothing yet."
    with pytest.raises(ReportError, match="metrics.jsonl is missing"): read_metrics(tmp_path)
    assert read_metrics(write(tmp_path, [])).notes == ["run.json is missing, so the settings are unknown", "metrics.jsonl has no complete line yet"]


# Following

CHILD = """
import json, sys
from pathlib import Path
from cola_tutorial.training import RunWriter
log = RunWriter(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
print("ready", flush=True)
for line in sys.stdin:
    order, step = line.split()
    whole = {"stage": sys.argv[2], "step": int(step), "loss": 1.0, "by": sys.argv[4]}
    if order == "write": log.write(whole)
    if order == "half":
        with log.paths[0].open("a") as file: file.write(json.dumps(whole)[:20])
    print("done", flush=True)
"""


class Training:
    "A process that logs as the trainer does, a line at each order."

    def __init__(self, folder: Path, stage: str, step: int, name: str):
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(folder), stage, str(step), name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )
        assert self.process.stdout.readline() == "ready\n"

    def order(self, what: str, *steps: int) -> None:
        "Let it write, and wait until it has."
        for step in steps:
            self.process.stdin.write(f"{what} {step}\n")
            self.process.stdin.flush()
            assert self.process.stdout.readline() == "done\n"

    def kill(self) -> None:
        "End it without a warning."
        self.process.kill()
        self.process.communicate()


def test_a_follower_sees_a_training_begin_die_and_go_on(tmp_path: Path) -> None:
    "A real process, killed in the middle of a line and resumed further back: each line once, and one word of the rewriting."
    folder = tmp_path / "run"
    follower = Follower(folder)
    steps = lambda news: [(one["step"], one["by"]) for one in news.entries]
    assert follower.new() == report.News([], [], False)
    first = Training(folder, "stage1", 0, "a")
    try:
        assert follower.new() == report.News([], [], False)
        first.order("write", 10, 20)
        assert steps(follower.new()) == [(10, "a"), (20, "a")] and follower.new().entries == []
        first.order("write", 30)
        assert steps(follower.new()) == [(30, "a")]
        first.order("half", 40)
        assert follower.new() == report.News([], [], False)
    finally: first.kill()
    assert read_metrics(folder).notes[0].startswith("metrics.jsonl: 1 line cut")
    second = Training(folder, "stage1", 20, "b")
    try:
        second.order("write", 30, 40, 50)  # already beyond what the follower has read
        news = follower.new()
        assert news.rewritten and steps(news) == [(10, "a"), (20, "a"), (30, "b"), (40, "b"), (50, "b")]
        second.order("write", 60)
        news = follower.new()
        assert not news.rewritten and steps(news) == [(60, "b")]
    finally: second.kill()


def replace_file(path: Path, text: str) -> None:
    "As the trainer does: another file takes its place."
    path.with_suffix(".part").write_text(text)
    os.replace(path.with_suffix(".part"), path)


LINES = [json.dumps(entry(step, by=by)) + "\n" for step in (1, 2, 3, 4, 5, 6) for by in ("a", "b")]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["append", "replace", "truncate", "remove", "half"]), st.lists(st.sampled_from(LINES), max_size=4)), max_size=8))
def test_following_gives_the_file_whatever_happens_to_it(tmp_path_factory: pytest.TempPathFactory, changes: list) -> None:
    "News, put together as told, is at each look what the file's complete lines say."
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    follower, seen = Follower(path.parent), []
    for kind, lines in changes:
        if kind == "append" and path.exists(): path.open("a").writelines(lines)
        elif kind == "remove": path.unlink(missing_ok=True)
        elif kind == "half" and path.exists() and path.read_text().endswith("}\n"): path.open("a").write('{"stage": "stage1", ')
        elif kind == "truncate": path.write_text("".join(lines))
        elif kind == "replace": replace_file(path, "".join(lines))
        if path.exists() and '1", {' in path.read_text(): return  # glued to half a line: broken, as the next test has it
        news = follower.new()
        seen = news.entries if news.rewritten else seen + news.entries
        whole = path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []
        assert seen == [json.loads(line) for line in whole]


def test_a_replacement_by_the_same_history_is_none(tmp_path: Path) -> None:
    "A run that goes on exactly where it was drops nothing, so nothing is told twice."
    path = write(tmp_path, [entry(1), entry(2)]) / "metrics.jsonl"
    follower = Follower(tmp_path)
    follower.new()
    replace_file(path, path.read_text() + json.dumps(entry(3)) + "\n")
    assert follower.new() == report.News([entry(3)], [], False)


def test_only_new_bytes_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "A look at a log that has not grown parses no line, and one that has grown by a line parses one."
    parsed = []
    monkeypatch.setattr(report, "_entry", lambda raw, path, line: parsed.append(line) or json.loads(raw))
    follower = Follower(write(tmp_path, [entry(s) for s in range(1, 50)]))
    follower.new()
    parsed.clear()
    follower.new()
    assert parsed == []
    with (tmp_path / "metrics.jsonl").open("a") as file: file.write(json.dumps(entry(50)) + "\n")
    assert follower.new().entries == [entry(50)] and parsed == [50]


def test_samples_and_settings_are_followed_too(tmp_path: Path) -> None:
    "They may come later; a rewritten log gives both logs anew; a broken line is told until it is mended, and nothing is lost."
    follower, sample = Follower(tmp_path), {"stage": "stage2", "step": 1, "text": "Tom"}
    write(tmp_path, [entry(1), entry(2)])
    assert follower.new().samples == [] and follower.settings == {}
    write(write(tmp_path, [sample], "samples.jsonl", size="tiny"), [entry(1)])
    assert follower.new() == report.News([entry(1)], [sample], True) and follower.settings == {"size": "tiny"}
    write(tmp_path, [sample], "samples.jsonl", end="x\n")
    with (tmp_path / "metrics.jsonl").open("a") as file: file.write(json.dumps(entry(2)) + "\n")
    for _ in range(2):
        with pytest.raises(ReportError, match="samples.jsonl line 2 is broken"): follower.new()
    write(tmp_path, [sample, sample], "samples.jsonl")
    assert follower.new() == report.News([entry(2)], [sample], False)


# What a picture of a log needs to know


def test_news_make_the_history_that_a_whole_file_gives(tmp_path: Path) -> None:
    "Look by look, through a resumption, and with samples: always what reading the file anew gives."
    follower, log = Follower(tmp_path), report.RunHistory(tmp_path, {}, [], [], [])
    sample = {"stage": "stage1", "step": 2, "text": "Tom"}
    for entries in ([entry(1)], [entry(1), entry(2), entry(3)], [entry(1), entry(2)], [entry(1), entry(2), entry(3), entry(1, "stage2")]):
        write(write(tmp_path, entries, stage1={"steps": 3}), [sample], "samples.jsonl")
        log, whole = log.with_news(follower.new(), follower.settings), read_metrics(tmp_path)
        assert (log.entries, log.samples, log.settings) == (whole.entries, whole.samples, whole.settings)


@pytest.mark.parametrize("settings, steps", [({}, None), ({"stage1": 5}, None), ({"stage1": {"steps": 0}}, None), ({"stage1": {"steps": 7}}, 7)])
def test_planned_steps_are_those_of_the_settings(settings: dict, steps: int | None) -> None:
    "Unknown where the settings do not say."
    assert report.planned_steps(settings, "stage1") == steps and report.planned_steps(settings, "stage2") is None


def test_values_have_names_and_axes() -> None:
    "Words for screens; a logarithmic axis for what changes tenfold and has no scale of its own."
    assert report.value_label("tokens_per_second") == "tokens per second" and "SNR" in report.value_label("log_snr")
    assert (report.stage_label("stage2"), report.stage_label("other")) == ("stage 2", "other")
    told = [report.is_logarithmic(*case) for case in (("loss", [1, 10]), ("loss", [1, 9]), ("loss", [0, 10]), ("loss", []), ("learning_rate", [1, 10]))]
    assert told == [True, False, False, False, False]


# Curves


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=80), st.sampled_from([0.03, 0.1, 0.5, 1.0]))
def test_smoothing_is_pandas_centred_mean(values: list[float], share: float) -> None:
    "The running mean of another library, with the window that the share asks for."
    window = 2 * max(1, round(share * len(values)) // 2) + 1
    theirs = [pd.Series(values[max(0, i - window // 2) : i + window // 2 + 1]).mean() for i in range(len(values))]
    np.testing.assert_allclose(smoothed(values, share), theirs, rtol=1e-9, atol=1e-6)
    np.testing.assert_allclose(smoothed(values, share), pd.Series(values).rolling(window, center=True, min_periods=1).mean(), rtol=1e-6, atol=1e-3)
    assert smoothed(values, 0) == values


@given(st.integers(0, 500), st.integers(1, 50))
def test_thinning_keeps_both_ends_and_the_order(count: int, most: int) -> None:
    "Every n-th point and the last, never many more than asked for."
    steps, values = thinned(range(count), range(count), most)
    assert steps == values == sorted({*steps}) and len(steps) <= most + 1
    if count: assert steps[0] == 0 and steps[-1] == count - 1


def test_still_pictures_show_the_curves() -> None:
    "A panel for each value; the logged curve, its mean and the held-out points are the log's own."
    log = read_metrics(SHIPPED)
    figure = plot_runs([log], "stage2", ["loss", "learning_rate"])
    raw, mean, held = figure.axes[0].lines
    assert list(raw.get_ydata()) == log.curve("stage2", "loss")[1] and list(mean.get_ydata()) == smoothed(list(raw.get_ydata()))
    assert list(held.get_xdata()) == log.curve("stage2", "held_out_loss")[0]
    assert len(figure.axes[1].lines) == 2 and figure.axes[0].get_yscale() == "linear"
    assert plot_runs([log], "stage1", ["loss"]).axes[0].get_yscale() == "log"
    plt.close("all")


# The page


def page_of(path: Path) -> tuple[str, dict[str, tuple[list, dict]]]:
    "A page without its library, and its figures: id -> traces and layout."
    text = path.read_text(encoding="utf-8")
    library = re.search(r"<script>(?!\s*\n?for ).*?</script>", text, re.DOTALL).group(0)
    assert len(library) > 1_000_000
    text, figures, reader = text.replace(library, "", 1), {}, json.JSONDecoder()
    for call in re.finditer(r'Plotly\.newPlot\(\s*"([\w-]+)",\s*', text):
        data, end = reader.raw_decode(text, call.end())
        figures[call.group(1)] = data, reader.raw_decode(text, re.compile(r",\s*").match(text, end).end())[0]
    return text, figures


def numbers(values: Any) -> list[float]:
    "A list, or plotly's packed array, as numbers."
    if not isinstance(values, dict): return list(values)
    import base64

    return np.frombuffer(base64.b64decode(values["bdata"]), values["dtype"]).tolist()


def two_runs(tmp_path: Path) -> list[Path]:
    "Two runs that differ in one setting, the second with a stage more, held-out values, samples and an unknown value."
    one = write(tmp_path / "a", [entry(s, odd_number=s * s) for s in range(1, 31)], end='{"sta', size="tiny", stage1={"steps": 40, "learning_rate": 0.1})
    entries = [entry(s, held_out_loss=2.0) if s % 10 == 0 else entry(s) for s in range(1, 31)] + [entry(1, "stage2", flow_matching=3.0)]
    two = write(tmp_path / "b", entries, size="tiny", stage1={"steps": 40, "learning_rate": 0.2})
    write(two, [{"stage": "stage2", "step": step, "text": f"</pre><script>{step}"} for step in range(1, 6)], "samples.jsonl")
    return [one, two]


def test_the_page_holds_every_curve_of_every_run(tmp_path: Path) -> None:
    "Each value of each run and stage, held-out ones beside it, in the figure of its group; unknown values too."
    runs = two_runs(tmp_path)
    text, figures = page_of(write_report(runs, tmp_path / "out" / "report.html", smoothing=0))
    assert figures.keys() == {"figure-losses", "figure-speed", "figure-others"}
    drawn = {(t["legendgroup"], tuple(numbers(t["x"])), tuple(numbers(t["y"]))) for traces, _ in figures.values() for t in traces}
    wanted = set()
    for number, log in enumerate(map(read_metrics, runs)):
        wanted |= {(f"run{number}", *map(tuple, log.curve(stage, name))) for stage in log.stages() for name in log.names(stage)}
    assert drawn == wanted and len(wanted) == 9
    titles = {note["text"] for _, layout in figures.values() for note in layout["annotations"]}
    assert {"stage 1: loss", "stage 2: flow matching", "stage 1: odd number"} <= titles
    assert sum(axis.get("type") == "log" for axis in figures["figure-losses"][1].values() if isinstance(axis, dict)) == 1


def test_the_page_stands_alone_and_says_what_it_did(tmp_path: Path) -> None:
    "One library, no address to fetch, everything from a log escaped, cut lines told, smoothing stated; the same bytes each time."
    runs = two_runs(tmp_path)
    path = write_report(runs, tmp_path / "report.html")
    text, figures = page_of(path)
    assert not re.search(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=|@import|url\(", text)
    assert text.count("&lt;/pre&gt;&lt;script&gt;") == 5 and "</pre><script>" not in text and "2 earlier steps" in text
    assert "a: metrics.jsonl: 1 line cut at the end" in text and "10% of the curve" in text
    assert len([t for t in figures["figure-losses"][0] if "smoothed" in t["hovertemplate"]]) == 2
    assert path.read_bytes() == write_report(runs, tmp_path / "again.html").read_bytes()


def test_names_from_a_log_cannot_end_the_page(tmp_path: Path) -> None:
    "A run, a stage and a value with markup in their names are shown, not run."
    evil = "</script><img src=x>"
    write(tmp_path / "<b>x", [entry(1, evil, **{evil: 1.0})], **{evil: evil})
    text, figures = page_of(write_report([tmp_path / "<b>x"], tmp_path / "report.html"))
    assert "<img" not in text and "<b>x" not in text and len(figures["figure-others"][0]) == 1


def test_the_table_says_what_differs_and_where_each_run_is(tmp_path: Path) -> None:
    "Differing settings apart from the same ones; last values with held-out ones; the median speed; parameters from the model's files."
    tables = summary([read_metrics(run) for run in two_runs(tmp_path)])
    assert tables["Settings that differ"] == [("stage1.learning_rate", ["0.1", "0.2"])]
    assert tables["Settings that are the same"] == [("size", ["tiny"]), ("stage1.steps", ["40"])]
    stage1 = dict(tables["Stage 1, last values (held out)"])
    assert stage1["step"] == ["30 of 40"] * 2 and stage1["loss"] == ["0.03333", "0.03333 (2)"] and stage1["odd number"] == ["900", ""]
    assert stage1["tokens per second, median"] == ["1,550"] * 2
    assert dict(tables["Stage 2, last values (held out)"])["step"] == ["", "1"]
    assert {name: int(cells[0].replace(",", "")) for name, cells in summary([read_metrics(SHIPPED)])["Parameters"]} == ColaDLM.from_pretrained(SHIPPED).sizes()


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    "By as much of their folders as it takes; the same run twice is a mistake."
    logs = [read_metrics(write(tmp_path / one / "run", [entry(1)])) for one in ("a", "b")]
    assert run_names(logs) == ["a/run", "b/run"] and run_names(logs[:1]) == ["run"]
    with pytest.raises(ReportError, match="given twice"): run_names([logs[0], logs[0]])


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "What cannot be read leaves the old page as it was, and no part of a new one."
    path, good = tmp_path / "report.html", write(tmp_path / "good", [entry(1)])
    path.write_text("old")
    broken = write(tmp_path / "broken", [], end="{\n{}\n")
    for runs, words in (([good, broken], "line 1 is broken"), ([], "no run is given"), ([write(tmp_path / "none", [])], "no run has logged")):
        with pytest.raises(ReportError, match=words): write_report(runs, path)
    with pytest.raises(ReportError, match="is a folder"): write_report([good], tmp_path)
    with pytest.raises(ReportError, match="smoothing is 2"): write_report([good], path, smoothing=2)
    monkeypatch.setattr(Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"): write_report([good], path)
    assert path.read_text() == "old" and sorted(p.name for p in tmp_path.iterdir()) == ["broken", "good", "none", "report.html"]


# The command, and what it needs


def test_the_command_writes_a_page_or_one_line(tmp_path: Path) -> None:
    "cola-report RUN RUN --out PAGE; a mistake ends with status 2 and one line."
    (tmp_path / "report.py").write_text("import sys; sys.argv[0] = 'cola-report'; from cola_tutorial.cli import report; report()")
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    call = lambda *args: subprocess.run([sys.executable, "report.py", *map(str, args)], cwd=tmp_path, env=env, capture_output=True, text=True)
    done = call(*two_runs(tmp_path), "--out", "page.html")
    assert (done.returncode, done.stdout, done.stderr) == (0, "page.html\n", "") and (tmp_path / "page.html").stat().st_size > 1e6
    done = call(tmp_path)
    assert done.returncode == 2 and re.fullmatch(r"cola-report: .*metrics\.jsonl is missing: .*\n", done.stderr)


def test_a_log_is_read_without_any_plotting_library(tmp_path: Path) -> None:
    "Plots and widgets are loaded where they are used, and named where they are missing."
    program = (
        "import sys\n"
        "for name in ('plotly', 'ipywidgets', 'matplotlib'): sys.modules[name] = None\n"
        "from cola_tutorial.report import *\n"
        f"read_metrics({str(SHIPPED)!r}); Follower({str(SHIPPED)!r}).new()\n"
        f"try: write_report([{str(SHIPPED)!r}], 'x.html')\n"
        "except ReportError as error: assert 'cola_tutorial[lab]' in str(error)\n"
        "else: raise SystemExit('no error')\n"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
