"The cockpit: a training that is paused and resumed, pictures that come by themselves, and checkpoints that are opened."

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cola_tutorial.checkpoints import consolidate, saved_checkpoints
from cola_tutorial.config import Stage1Config, Stage2Config, data_dir
from cola_tutorial.generation import read_prompts
from cola_tutorial.model import ColaDLM
from cola_tutorial.report import ReportError, read_metrics
from cola_tutorial.screen import View, still
from cola_tutorial.text.stories import Grammar
from cola_tutorial.training import RunConfig, train
from cola_tutorial.views import cockpit as room
from cola_tutorial.views.cockpit import TrainingProcess, cockpit
from cola_tutorial.viz import ViewError

SHIPPED = data_dir() / "pretrained"
SMALL = dict(dim=32, ffn_dim=64, num_heads=2, encoder_num_blocks=1, decoder_num_blocks=1, emb_dim=32, head_dim=16, rope_dim=12, num_layers=2)
STORIES = [Grammar.load().story(0, i, "validation").text for i in range(4)]

# Counts in a file at each of its steps, and ends as a trainer does; the first argument names the file, the second its last step.
TRAINER = """
import pathlib, signal, sys, threading
asked, path, last = [], pathlib.Path(sys.argv[1]), int(sys.argv[2])
signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
step = int(path.read_text() or 0) if path.exists() else 0
while step < last:
    step += 1
    path.with_suffix(".new").write_text(str(step))
    path.with_suffix(".new").replace(path)
    threading.Event().wait(0.01)
    if asked: sys.exit(143)
"""


def trainer(folder: Path, last: int = 1_000_000) -> TrainingProcess:
    "A process that counts."
    return TrainingProcess([sys.executable, "-c", TRAINER, folder / "count", str(last)])


def counted(folder: Path) -> int:
    "Where the process is."
    return int((folder / "count").read_text()) if (folder / "count").exists() else 0


def entry(step: int, stage: str = "stage1", **values: Any) -> dict:
    "A line of metrics.jsonl."
    return {"stage": stage, "step": step, "loss": 1 / step, "gradient_norm": 2.0 * step} | values


def write(folder: Path, entries: list, name: str = "metrics.jsonl", end: str = "", **settings: Any) -> Path:
    "A run folder with a log, and its settings if any are given."
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(one) + "\n" for one in entries) + end)
    if settings: (folder / "run.json").write_text(json.dumps(settings))
    return folder


class Ear:
    "A screen that only listens."

    def __init__(self, view: View):
        self.told, self.heard = [], asyncio.Event()
        view.screens.append(self)

    def tell(self, answer: dict) -> None:
        "Hear an answer."
        self.told.append(answer)
        self.heard.set()

    async def hears(self, *words: str) -> dict:
        "The first answer from now on that holds all words."
        while True:
            for answer in self.told:
                if all(word in json.dumps(answer, default=str) for word in words): return answer
            self.told.clear()
            self.heard.clear()
            await asyncio.wait_for(self.heard.wait(), 20)


# The lever


def test_a_process_is_paused_resumed_and_ends(tmp_path: Path) -> None:
    "Each state is told; a pause ends a step, and the same command goes on behind it."
    training = trainer(tmp_path)
    assert training.look() == "waiting"
    with pytest.raises(ViewError, match="is waiting, so there is nothing to pause"): training.pause()
    training.start()
    while counted(tmp_path) < 3: assert training.look() == "running"
    with pytest.raises(ViewError, match="running already"): training.start()
    training.pause()
    training.process.wait(20)
    paused = counted(tmp_path)
    assert training.look() == "paused" and training.reason() == "" and paused >= 3
    training.command[-1] = str(paused + 2)
    training.start()
    assert training.process.wait(20) == 0 and training.look() == "finished" and counted(tmp_path) == paused + 2


def test_a_checkpoint_now_is_a_pause_and_a_resumption(tmp_path: Path) -> None:
    "The process that goes on is another one."
    training = trainer(tmp_path)
    training.start()
    while counted(tmp_path) < 1: training.look()
    first = training.process
    training.pause(again=True)
    assert training.look() in ("pausing", "running")
    first.wait(20)
    assert training.look() == "running" and training.process is not first and first.returncode == 143
    before = counted(tmp_path)
    while counted(tmp_path) <= before: training.look()
    training.pause()
    training.process.wait(20)
    assert training.look() == "paused"


def test_a_failure_is_told_with_its_reason(tmp_path: Path) -> None:
    "The last line of the error stream; a command that is none; a process that was started elsewhere."
    training = TrainingProcess([sys.executable, "-c", "import sys; print('first', file=sys.stderr); sys.exit('no such corpus')"])
    training.start()
    training.process.wait(20)
    assert training.look() == "failed" and training.reason() == "no such corpus"
    assert "<b>failed</b>; no such corpus" in cockpit(write(tmp_path, [entry(1)]), training).picture().texts
    with pytest.raises(ViewError, match="cannot be started"): TrainingProcess([tmp_path / "no-such-program"]).start()
    with pytest.raises(ViewError, match="list of its words"): TrainingProcess("cola-train --out x")


def test_buttons_steer(tmp_path: Path) -> None:
    "Pause and resume by the view; a cockpit without a process says what it lacks."
    training = trainer(tmp_path)
    view = cockpit(write(tmp_path / "run", [entry(1)]), training)
    assert "<b>not started yet</b>" in view.picture().texts
    assert "<b>running</b>" in view.picture(resume=True).texts and view.values["resume"] is False
    first = training.process
    view.picture(save=True)
    first.wait(20)
    assert "<b>running</b>" in view.picture().texts and training.process is not first
    view.picture(pause=True)
    training.process.wait(20)
    assert "<b>paused" in view.picture().texts
    watching = cockpit(tmp_path / "run")
    assert not {"pause", "resume", "save"} & {*watching.controls}
    with pytest.raises(ViewError, match="no control 'pause'"): watching.picture(pause=True)


# The picture


def test_curves_are_those_of_the_log() -> None:
    "Losses and a chosen value of the shipped run, in both stages; held-out values are diamonds."
    log, view = read_metrics(SHIPPED), cockpit(SHIPPED)
    for stage in ("stage1", "stage2"):
        for value in ("gradient_norm", "log_snr"):
            picture = view.picture(stage=stage, value=value)
            traces = {trace.name: trace for trace in picture.figure.data}
            steps, values = log.curve(stage, "loss")
            assert (list(traces["loss"].x), list(traces["loss"].y)) == (steps, values)
            assert list(picture.figure.data[-1].y) == log.curve(stage, value)[1]
            assert f"step {log.curve(stage, 'step')[1][-1]:,} of" in picture.texts
    diamonds = traces["held out loss"]
    assert list(diamonds.y) == log.curve("stage2", "held_out_loss")[1] and diamonds.marker.symbol == "diamond" and diamonds.mode == "markers"
    assert "latent_mean" in [value for _, value in view.controls["value"].options]
    view.picture(value="latent_mean")
    assert view.picture(stage="stage1").controls[0].value in log.names("stage1") and "latent_mean" not in [v for _, v in view.controls["value"].options]


def test_a_still_goes_through_the_values() -> None:
    "Without a kernel every value can be chosen."
    view = cockpit(SHIPPED)
    view.picture()
    figure = still(view)
    assert [frame.name for frame in figure.frames] == [name for name, _ in view.controls["value"].options] and len(figure.frames) > 3
    assert len(figure.to_json()) < 250_000


def test_words_are_escaped_and_nothing_logged_is_said(tmp_path: Path) -> None:
    "A run that has not begun; a sample with any characters."
    assert "waiting for the first line" in cockpit(tmp_path / "none").picture().texts
    write(write(tmp_path, [entry(3)], stage1={"steps": 10}), [{"stage": "stage1", "step": 3, "text": "a <b> of Tom"}], "samples.jsonl")
    told = cockpit(tmp_path).picture()
    assert "step 3 of 10" in told.texts and "value='3' max='10'" in told.texts and "a &lt;b&gt; of Tom" in told.texts and "3 steps" in told.alt


@pytest.mark.parametrize("every", [0, -1, float("nan")])
def test_mistakes_are_named(every: float, tmp_path: Path) -> None:
    "Without a pause it would be a busy loop; a broken log is told; no texts are none."
    with pytest.raises(ViewError, match="every is"): cockpit(tmp_path, every=every)
    with pytest.raises(ViewError, match="at least one"): cockpit(tmp_path, texts=[])
    view = cockpit(write(tmp_path, [entry(1)], end="{]\n"))
    with pytest.raises(ReportError, match="line 2 is broken"): view.picture()
    write(tmp_path, [entry(1), entry(2)])
    assert list(view.picture().figure.data[0].y) == [1.0, 0.5]


# By itself


def test_news_are_drawn_where_the_view_is_seen(tmp_path: Path) -> None:
    "One task; lines, a resumption, a broken line and its mending are told, each once; without a screen it ends."
    folder = tmp_path / "run"

    async def session() -> None:
        before, view = asyncio.all_tasks(), cockpit(folder, every=0.05)
        view.picture()
        assert asyncio.all_tasks() == before  # nobody looks
        ear = Ear(view)
        view.picture()
        view.picture(value="learning_rate")
        (task,) = asyncio.all_tasks() - before
        write(folder, [entry(s) for s in (1, 2, 3)], stage1={"steps": 10}, stage2={"steps": 5})
        answer = await ear.hears("step 3 of 10")
        assert list(answer["picture"]["figure"]["data"][0]["y"]) == pytest.approx([1, 0.5, 1 / 3], rel=1e-4)
        write(folder, [entry(s) for s in (1, 2)])
        await ear.hears("step 2 of 10")
        write(folder, [entry(1), entry(2)], end="{]\n")
        assert "picture" not in await ear.hears("line 3 is broken")
        write(folder, [entry(s) for s in (1, 2, 4)])
        await ear.hears("step 4 of 10")
        assert len(ear.told) <= 2 and {task} == asyncio.all_tasks() - before
        view.screens.clear()
        await asyncio.wait_for(task, 20)
        assert task.exception() is None

    asyncio.run(session())


def test_what_code_draws_is_told_to_the_screens_too(tmp_path: Path) -> None:
    "A picture that a cell asks for takes the news away from nobody."
    write(tmp_path, [entry(1)])

    async def session() -> None:
        view = cockpit(tmp_path, every=0.05)
        ear = Ear(view)
        view.picture()
        await ear.hears("step 1")
        write(tmp_path, [entry(1), entry(2)])
        view.picture()
        await ear.hears("step 2")
        view.screens.clear()

    asyncio.run(session())


def test_it_ends_a_while_after_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "The last step is done, or the process has ended, and nothing is new; a press wakes it again."
    monkeypatch.setattr(room, "_QUIET", 2)
    write(tmp_path, [entry(3), entry(5, "stage2", held_out_loss=0.5)], stage1={"steps": 3}, stage2={"steps": 5})

    async def session(view: View) -> None:
        before = asyncio.all_tasks()
        Ear(view)
        view.picture()
        (task,) = asyncio.all_tasks() - before
        await asyncio.wait_for(task, 20)
        view.picture(stage="stage1")
        (again,) = asyncio.all_tasks() - before
        assert again is not task
        await asyncio.wait_for(again, 20)

    asyncio.run(session(cockpit(tmp_path, every=0.05)))
    training = trainer(tmp_path, 1)
    training.start()
    training.process.wait(20)
    asyncio.run(session(cockpit(tmp_path, training, every=0.05)))


# Inside


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A run of a few steps, with checkpoints of both stages."
    folder = tmp_path_factory.mktemp("runs") / "run"
    loop = dict(batch_size=4, log_every=1, save_every=2, warmup_steps=1, keep=3)
    config = RunConfig(changes=SMALL, vocab_size=600, stories=60, stage1=Stage1Config(steps=4, **loop), stage2=Stage2Config(steps=2, **loop))
    train(config, folder, progress=False, cache_dir=folder.parent / "cache")
    return folder


def test_a_checkpoint_is_opened(run: Path, tmp_path: Path) -> None:
    "Latents and read-back tokens are those of the model that the checkpoint makes; it is opened once."
    view = cockpit(run, texts=STORIES)
    picture = view.picture(inside=True, choice="animal")
    model = ColaDLM.from_pretrained(consolidate(saved_checkpoints(run, "stage2")[-1], tmp_path / "model"))
    ids = [model.tokenizer.encode(text).ids[:79] for text in STORIES]
    read = read_prompts(model, ids)
    with torch.no_grad(): found = model.vae.decode(read.latents).argmax(-1).tolist()
    right = [a == b for row, back in zip(ids, found) for a, b in zip(row, back)]
    assert "stage2-0000002" in picture.texts and f"{sum(right) / len(right):.1%} of held-out tokens" in picture.texts
    assert picture.texts.count("<mark>") == sum(a != b for a, b in zip(ids[0], found[0]))
    clouds = picture.figure.data[6:]
    assert sum(len(cloud.x) for cloud in clouds) == len(right) and clouds[0].name == "other words" and len(picture.figure.layout.annotations) == 3
    said = {cloud.name: len(cloud.x) for cloud in clouds[1:]}
    assert said and view.picture(choice="place").figure.data[7].name not in said
    room_of = view.draw.__self__
    opened = room_of.inside
    assert view.picture(value="learning_rate") and room_of.inside is opened


def test_points_stay_on_their_side(run: Path) -> None:
    "From one checkpoint to the next no direction turns round."
    first, second = saved_checkpoints(run, "stage1")[-2:]
    grammar = Grammar.load()
    one = room._look_inside(first, STORIES, grammar, None)
    for signs in ([1, 1], [-1, 1], [1, -1], [-1, -1]):
        turned = room._Inside("", one.points, one.plane, one.flat * torch.tensor(signs), 0.0, "")
        flat = room._look_inside(second, STORIES, grammar, turned).flat
        assert ((flat * turned.flat).sum(0) >= 0).all()


def test_what_cannot_be_opened_is_said(run: Path, tmp_path: Path) -> None:
    "No checkpoint yet; a damaged one; a run on other texts."
    assert "no checkpoint yet" in cockpit(write(tmp_path, [entry(1)]), texts=STORIES).picture(inside=True).texts
    folder = tmp_path / "checkpoints" / "stage1-0000001"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text("{}")
    with pytest.raises(ViewError, match="stage1-0000001 could not be opened"): cockpit(tmp_path, texts=STORIES).picture(inside=True)
    write(tmp_path, [entry(1)], source="book.txt")
    with pytest.raises(ViewError, match="give the cockpit texts"): cockpit(tmp_path).picture(inside=True)
