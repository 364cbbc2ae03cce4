"A step's arithmetic is counted right, all ways of doing it agree before one is timed, and who disagrees gets no time. No test looks at a time."

import json
import sys
import types
from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch
from test_cli import run
from test_generation import small
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cola_tutorial import bench_training as room
from cola_tutorial.bench import DisagreementError
from cola_tutorial.bench_training import CHECKED, TrainBenchConfig, check_losses, measure_training, package_loss, watch_step
from cola_tutorial.config import ConfigError, Stage1Config, Stage2Config
from cola_tutorial.costs import training_flops
from cola_tutorial.objectives import draw_stage1, draw_stage2
from cola_tutorial.plain_training import NO_TRAINING_WASTE, PlainTrainer, TrainingWaste, plain_loss, training_ladder

CPU = torch.device("cpu")
QUICK = TrainBenchConfig(batches=(1, 2), length=8, repeats=2)
BARE = replace(QUICK, batches=(2,), ladder=False, loader=False)
OWN = ["the package's step", "+ its loader, in the step", "+ its loader, ahead"]
STAGES = {"stage1": Stage1Config(), "prior": Stage2Config(), "joint": Stage2Config(vae_lr_ratio=1.0, lambda_ref=0.0)}
quiet = partial(measure_training, report=lambda line: None, edges=(16,))


@pytest.mark.parametrize("waste", [TrainingWaste(), NO_TRAINING_WASTE], ids=["all", "none"])
@pytest.mark.parametrize("stage", STAGES)
def test_arithmetic_of_a_step_is_that_of_its_plain_products(stage, waste):
    "Attention in its plain form is a few products, which torch's counter knows without being told."
    model, config, rows = small(), STAGES[stage], 3
    tokens, document = torch.zeros(rows, 16, dtype=torch.long), torch.zeros(rows, 16, dtype=torch.long)
    noise = (draw_stage1 if stage == "stage1" else draw_stage2)(config, model.config.vae, rows, 16)
    trainer = PlainTrainer(model, config, partial(plain_loss, waste=waste))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        trainer.step(tokens, document, noise)
    assert watch_step(lambda: trainer.step(tokens, document, noise), CPU)[0] == counter.get_total_flops() > 0


@pytest.mark.parametrize("stage", STAGES)
def test_every_rung_is_there_and_the_file_is_json(stage, tmp_path):
    said, path, model = [], tmp_path / "result.json", small()
    first = deepcopy(model.state_dict())
    result = measure_training(model, replace(QUICK, stage=stage), report=said.append, path=path, edges=(16,), machine="this one")
    refuse = lambda word: pytest.fail(f"{word} is no JSON")
    assert json.loads(path.read_text(), parse_constant=refuse) == json.loads(json.dumps(result)) and result["machine"] == "this one"
    names = [*dict(training_ladder(stage != "stage1", stage != "prior")), *OWN]
    assert [one["batch"] for one in result["batches"]] == [1, 2] and result["options"]["stage"] == stage
    for one in result["batches"]:
        assert [row["name"] for row in one["rows"]] == names
        parts = training_flops(model.config, 8, replace(QUICK, stage=stage).training(one["batch"]))
        flops = [row["step_flops"] for row in one["rows"]]
        assert one["needed_step_flops"] == 8 * one["batch"] * sum(parts.values()) and one["rows"][0]["ratio"] == 1.0
        assert flops[: -len(OWN)] == sorted(flops[: -len(OWN)], reverse=True) and len({*flops[-len(OWN) :]}) == 1
        assert flops[0] > flops[-1] > 0.95 * one["needed_step_flops"] or stage == "stage1"
        for row in one["rows"]:
            assert row["difference"] < 1e-5 and row["tokens_per_s"] > 0 and row["step_bytes"] > 0 and row["share_of_ceiling"] > 0
            assert row["loss"] == pytest.approx(one["rows"][0]["loss"], rel=1e-5)
    text = "\n".join(said)
    assert "fp32 products: at most" in text and "batch 2" in text and all(name in text for name in names)
    assert all(torch.equal(weight, first[name]) for name, weight in model.state_dict().items())  # the model is given back as it was


def test_rows_that_are_asked_for_and_those_that_are_not():
    names = lambda config: [row["name"] for row in quiet(small(), replace(config, batches=(2,)))["batches"][0]["rows"]]
    assert names(replace(QUICK, ladder=False, loader=False)) == ["without waste", OWN[0]]
    rows = quiet(small(), replace(QUICK, batches=(2,), ladder=False, dtype="bf16"))["batches"][0]["rows"]
    assert [row["name"] for row in rows] == ["without waste", *OWN, "+ bf16"]
    assert [row["dtype"] for row in rows] == ["fp32"] * 4 + ["bf16"] and 0 < rows[-1]["difference"] < 0.1


def test_flex_and_compiled_blocks_are_used_and_put_back(monkeypatch):
    "The compiler here is a function that counts its calls."
    called, model = [], small()
    monkeypatch.setattr(torch, "compile", lambda forward, dynamic: lambda *given, **more: called.append(forward) or forward(*given, **more))
    rows = quiet(model, replace(QUICK, batches=(2,), ladder=False, loader=False, compile=True))["batches"][0]["rows"]
    blocks = [*model.vae.encoder.blocks, *model.dit.blocks]
    assert rows[-1]["name"] == "+ compile" and rows[-1]["step_bytes"] is None and rows[-1]["difference"] < 1e-5
    assert len(called) == len(blocks) * (CHECKED + 1 + 2) and not any("forward" in vars(block) for block in blocks)
    seen = []
    room.tiled_loss(model, lambda model: seen.append(model.dit.flex))(model)
    assert seen == [True] and model.dit.flex is False


def test_a_weight_that_is_not_moved_is_noticed():
    "The losses after an update tell a step with half its optimizer from a whole one."
    ground = room._Ground(small(), 2, QUICK)
    whole, *_ = room.step_candidates(ground)
    step = whole.make()
    expected = [float(step(i)) for i in range(CHECKED)]
    ground.reset()
    lazy = PlainTrainer(ground.model, ground.training)
    lazy.optimizer.param_groups[0]["lr"] = 0.0
    found = [float(lazy.step(*ground.given[i])) for i in range(CHECKED)]
    with pytest.raises(DisagreementError, match="^lazy: loss .* of step 1"):
        check_losses("lazy", found, expected)
    again = whole.make()
    assert [float(again(i)) for i in range(CHECKED)] == pytest.approx(expected, rel=1e-6)  # and it always starts anew


def test_a_loss_that_is_no_number_agrees_with_nothing():
    nan = float("nan")
    with pytest.raises(DisagreementError, match="^x: loss nan of step 0"):
        check_losses("x", [nan, 1.0], [1.0, 1.0])
    assert check_losses("x", [1.0, nan], [1.0, 1.0], later=False) == 0.0
    assert check_losses("x", [1.5, 1.0], [1.0, 1.0], exact=False) == 0.5


@pytest.fixture
def adapters(monkeypatch):
    "Functions that Python finds in a module `borrowed`; they train at a rate of their own."

    def made(change=lambda loss: loss, ask=lambda noise: noise):
        def make(model, device, dtype):
            assert device == CPU and dtype == torch.float32
            trainer = PlainTrainer(model, replace(QUICK.training(2), learning_rate=3e-3), package_loss)
            return types.SimpleNamespace(step=lambda tokens, document, noise: change(trainer.step(tokens, document, ask(noise))))

        return make

    module = types.ModuleType("borrowed")
    module.right = made()
    module.number = made(float)
    module.near = made(lambda loss: loss * (1 + 1e-4))
    module.unknown = made(lambda loss: loss * float("nan"))
    module.unpinned = made(ask=lambda noise: replace(noise, pinned=~noise.pinned))
    monkeypatch.setitem(sys.modules, "borrowed", module)


@pytest.mark.parametrize("name", ["right", "number"])
def test_an_adapter_that_agrees_is_a_row(name, adapters):
    model = small()
    rows = quiet(model, BARE, adapter=f"borrowed:{name}")["batches"][-1]["rows"]
    assert rows[-1]["name"] == f"borrowed:{name}" and rows[-1]["step_flops"] == rows[-2]["step_flops"] and rows[-1]["difference"] < 1e-5
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), small().parameters()))  # it has a model of its own


@pytest.mark.parametrize("name", ["near", "unknown", "unpinned"])
def test_an_adapter_that_disagrees_gets_no_time(name, adapters, monkeypatch):
    monkeypatch.setattr(room, "time_in_turns", lambda *_: pytest.fail("something was timed"))
    with pytest.raises(DisagreementError, match=f"^borrowed:{name}: loss .* of step 0 is not"):
        quiet(small(), BARE, adapter=f"borrowed:{name}")


def test_memory_of_a_step_is_the_most_that_is_held_at_once():
    before = torch.ones(1000)

    def step():
        a = torch.zeros(1000)  # 4000 bytes
        b = a.view(10, 100) + 1  # and as many; the view is none
        del a
        c = torch.cat([b, b])  # 8000: with b the most
        before.add_(1)
        del b
        return c.sum()

    assert watch_step(step, CPU) == (0, 12_000)


def test_all_logits_at_once_are_seen_in_memory():
    config = replace(QUICK, batches=(4,), length=32, stage="stage1", loader=False)
    rows = {row["name"]: row["step_bytes"] for row in quiet(small(vocab_size=4000), config)["batches"][0]["rows"]}
    assert rows["straightforward"] > 2 * 4 * 32 * 4000 * 4 > 0  # logits and their gradient, fp32


@pytest.mark.parametrize(
    "change",
    [{"batches": ()}, {"batches": (1, 0)}, {"length": 0}, {"repeats": 0}, {"repeats": 2.5}, {"dtype": "fp8"}, {"stage": "stage3"}, {"flex": True}],
    ids=str,
)
def test_options_out_of_range_are_named(change):
    with pytest.raises(ConfigError, match=f"^{next(iter(change)).replace('batches', 'batch')} is "):
        replace(QUICK, **({"stage": "stage1"} | change))


@pytest.mark.parametrize(
    "model, config, words",
    [({}, {"length": 6}, "^length is 6, but must be a multiple of 4"), ({}, {"flex": True}, "^flex is True"), ({"dropout": 0.1}, {}, "dropout")],
)
def test_what_cannot_be_compared_is_refused(model, config, words):
    with pytest.raises(ConfigError, match=words):
        quiet(small(**model), replace(QUICK, **config))


def test_the_command_measures_a_model_against_an_adapter(tmp_path):
    small().save_pretrained(tmp_path / "model")
    (tmp_path / "borrowed.py").write_text(
        "from cola_tutorial.bench_training import TrainBenchConfig, package_loss\nfrom cola_tutorial.plain_training import PlainTrainer\n"
        "def make(model, device, dtype): return PlainTrainer(model, TrainBenchConfig().training(2), package_loss)\n"
    )
    options = "--batch 2 --length 8 --repeats 2 --threads 1 --adapter borrowed:make --json out.json"
    done = run("bench", "training", "--model", "model", *options.split(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert [row["name"] for row in result["batches"][0]["rows"]] == [*dict(training_ladder(words=False)), *OWN, "borrowed:make"]
    assert result["environment"]["torch"] == torch.__version__ and "borrowed:make" in done.stdout and "first s" in done.stdout
