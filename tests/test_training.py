"A run that was stopped, killed or refused: what continues is bit for bit what would have been."

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset, disable_progress_bars
from safetensors.torch import load_file

from cola_tutorial.config import ColaConfig, ConfigError, DiTConfig, LoopConfig, ScaleConfig, Stage1Config, Stage2Config, VAEConfig
from cola_tutorial.checkpoints import CheckpointError, saved_checkpoints
from cola_tutorial.costs import training_flops
from cola_tutorial.model import ColaDLM, ModelFileError
from cola_tutorial.text.corpus import CorpusError, documents, train_tokenizer
from cola_tutorial.text.shards import open_shards, write_shards
from cola_tutorial.training import (
    RunWriter,
    NonFiniteError,
    RunConfig,
    Terminated,
    Trainer,
    learning_rate,
    prepare,
    read_run,
    step_generator,
    train,
)

disable_progress_bars()
PIECES = "pieces-00000.safetensors"
LOOP = dict(steps=6, batch_size=4, warmup_steps=2, learning_rate=1e-2, log_every=1, save_every=2)
STAGE1 = Stage1Config(**LOOP, ema_decay=0.9)
STAGE2 = Stage2Config(**LOOP, ema_decay=0.9)
JOINT = replace(STAGE2, vae_lr_ratio=0.5, lambda_ref=1.0)
EVERY = pytest.mark.parametrize(
    "config", [STAGE1, STAGE2, JOINT, replace(JOINT, ema_decay=0.0)], ids=["stage1", "stage2", "joint", "joint-plain"]
)


def small(**vae):
    "A model that trains in milliseconds; dropout, so that the random state matters."
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=13,
        dim=16,
        ffn_dim=16,
        num_heads=2,
        encoder_num_blocks=1,
        decoder_num_blocks=1,
        latent_dim=4,
        block_size=2,
    )
    dit = DiTConfig(
        latent_dim=4, dim=16, emb_dim=8, num_heads=2, head_dim=8, expand_ratio=2, num_layers=1, rope_dim=4, block_size=2
    )
    return ColaDLM(ColaConfig(VAEConfig(**sizes | dict(dropout=0.1) | vae), dit))


@pytest.fixture(scope="module")
def rows():
    "Ten packed rows, some of them padded."
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 13, (10, 8), generator=generator)
    document = torch.zeros(10, 8, dtype=torch.long)
    document[::3, 5:] = -1
    return Dataset.from_dict({"tokens": tokens.tolist(), "document": document.tolist()}).with_format("torch")


def snapshot(trainer):
    "Everything that a step leaves behind."
    parts = {f"weights.{k}": v for k, v in trainer.model.state_dict().items()}
    if trainer.average:
        parts |= {f"average.{k}": v for k, v in trainer.average.items()}
    if trainer.reference:
        parts |= {f"reference.{k}": v for k, v in trainer.reference.state_dict().items()}
    for number, optimizer in enumerate(trainer.optimizers):
        for at, state in optimizer.state_dict()["state"].items():
            parts |= {f"optimizer.{number}.{at}.{k}": v for k, v in state.items()}
    return {k: v.clone() for k, v in parts.items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "Sums depend on how many threads share them: this process and its children use one."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def metrics(out):
    "metrics.jsonl without what the clock decides."
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


@EVERY
@pytest.mark.parametrize("stop", [2, 4, 5])
def test_a_stopped_run_continues_bit_for_bit(tmp_path, rows, config, stop):
    whole = Trainer(small(), rows, config, tmp_path / "whole", rows)
    whole.run(progress=False)
    first = Trainer(small(), rows, config, tmp_path / "parts", rows)
    first.run(until=stop, progress=False)
    torch.manual_seed(12345)
    second = Trainer(small(), rows, config, tmp_path / "parts", rows)
    assert second.resume() and second.step == stop // 2 * 2
    second.run(progress=False)
    assert second.step == 6
    assert_same(snapshot(whole), snapshot(second))
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")


def test_until_zero_trains_nothing(rows, tmp_path):
    trainer = Trainer(small(), rows, STAGE1, tmp_path)
    assert trainer.run(until=0, progress=False) == [] and trainer.step == 0


def test_a_resumed_reference_is_the_stage_one_vae_not_the_moving_one(tmp_path, rows):
    first = Trainer(small(), rows, JOINT, tmp_path)
    before = {k: v.clone() for k, v in first.reference.state_dict().items()}
    first.run(until=4, progress=False)
    assert_same(before, first.reference.state_dict())
    second = Trainer(first.model, rows, JOINT, tmp_path)
    assert second.resume()
    assert_same(before, second.reference.state_dict())


def test_metrics_are_one_history(tmp_path, rows):
    Trainer(small(), rows, STAGE1, tmp_path).run(progress=False)
    Trainer(small(), rows, STAGE2, tmp_path).run(until=5, progress=False)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "stage2", "st')  # killed while writing
    third = Trainer(small(), rows, STAGE2, tmp_path)
    third.resume()
    third.run(progress=False)
    assert [(line["stage"], line["step"]) for line in metrics(tmp_path)] == [
        (s, n) for s in ("stage1", "stage2") for n in range(1, 7)
    ]


def test_lines_behind_the_resumed_step_are_dropped(tmp_path):
    lines = [{"stage": "stage1", "step": n} for n in (1, 2)] + [{"stage": "stage2", "step": n} for n in (1, 2, 3, 4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    RunWriter(tmp_path, "stage2", 3)
    assert metrics(tmp_path) == lines[:5]


def test_only_the_newest_two_checkpoints_of_a_stage_stay(tmp_path, rows):
    Trainer(small(), rows, STAGE1, tmp_path).run(progress=False)
    Trainer(small(), rows, replace(STAGE2, save_every=4), tmp_path).run(progress=False)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["stage1-0000004", "stage1-0000006", "stage2-0000004", "stage2-0000006"]


@pytest.mark.parametrize(
    "change",
    [dict(learning_rate=2e-2), dict(batch_size=5), dict(seed=1), dict(steps=8), dict(beta=1.0), dict(ema_decay=0.5)],
)
def test_other_settings_are_refused_by_name(tmp_path, rows, change):
    Trainer(small(), rows, STAGE1, tmp_path).run(until=2, progress=False)
    name = next(iter(change))
    with pytest.raises(ConfigError, match=f"other settings.*{name}: .* then, {change[name]} now"):
        Trainer(small(), rows, replace(STAGE1, **change), tmp_path).resume()
    assert Trainer(small(), rows, replace(STAGE1, log_every=7, save_every=3, sample_every=2), tmp_path).resume()


def test_half_written_folders_are_not_checkpoints(tmp_path, rows):
    trainer = Trainer(small(), rows, STAGE1, tmp_path)
    assert not Trainer(small(), rows, STAGE1, tmp_path).resume() and not Trainer(small(), rows, STAGE1).resume()
    trainer.run(until=2, progress=False)
    for name in (".stage1-0000004.x7", "stage1-0000004.part", "stage1-9", "stage2-0000006"):
        shutil.copytree(tmp_path / "checkpoints" / "stage1-0000002", tmp_path / "checkpoints" / name)
    assert [path.name for path in saved_checkpoints(tmp_path, "stage1")] == ["stage1-0000002"]
    second = Trainer(small(), rows, STAGE1, tmp_path)
    assert second.resume() and second.step == 2


def test_a_cut_checkpoint_is_named_and_not_loaded(tmp_path, rows):
    Trainer(small(), rows, STAGE1, tmp_path).run(until=2, progress=False)
    path = tmp_path / "checkpoints" / "stage1-0000002" / PIECES
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=f"{PIECES} is damaged: .* bytes, not"):
        Trainer(small(), rows, STAGE1, tmp_path).resume()


def test_a_checkpoint_with_a_flipped_bit_is_not_loaded(tmp_path, rows):
    Trainer(small(), rows, STAGE1, tmp_path).run(until=2, progress=False)
    path = tmp_path / "checkpoints" / "stage1-0000002" / PIECES
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{PIECES} is damaged: its sha256"):
        Trainer(small(), rows, STAGE1, tmp_path).resume()


def test_a_broken_state_is_named(tmp_path, rows):
    Trainer(small(), rows, STAGE1, tmp_path).run(until=2, progress=False)
    (tmp_path / "checkpoints" / "stage1-0000002" / "state.json").write_text('{"step": ')
    with pytest.raises(CheckpointError, match="state.json"):
        Trainer(small(), rows, STAGE1, tmp_path).resume()


@pytest.mark.parametrize("where", ["loss", "gradient"])
@EVERY
def test_a_step_that_is_not_finite_is_named_and_not_taken(rows, config, where):
    trainer = Trainer(small(), rows, config)
    trainer.run(until=3, progress=False)
    weight = next(trainer.parts["vae" if "vae" in trainer.parts else "dit"].parameters())
    if where == "gradient":
        weight.register_hook(lambda gradient: gradient * math.inf)
    else:
        trainer.terms = lambda *args: {"loss": weight.sum() * math.nan}
    before = snapshot(trainer)
    with pytest.raises(NonFiniteError, match=f"{trainer.stage} step 3: .*{where}.* not finite \\(batch rows"):
        trainer.train_step()
    assert_same(before, snapshot(trainer))
    assert trainer.step == 3


def test_learning_rate_is_a_ramp_and_half_a_cosine():
    config = LoopConfig(steps=101, warmup_steps=10, learning_rate=3.0e-3, final_learning_rate=1.0e-3)
    assert [learning_rate(step, config) for step in (0, 4, 9)] == pytest.approx([3e-4, 1.5e-3, 3e-3])
    assert [learning_rate(step, config) for step in (10, 55, 100, 500)] == pytest.approx([3e-3, 2e-3, 1e-3, 1e-3])
    assert learning_rate(25, config) == pytest.approx(2e-3 + 1e-3 * math.cos(math.pi / 6))
    short = LoopConfig(steps=1, warmup_steps=0)
    assert learning_rate(0, short) == short.learning_rate


def test_the_optimizer_uses_the_schedule_and_the_vaes_share(rows):
    trainer = Trainer(small(), rows, replace(JOINT, vae_lr_ratio=0.25))
    for step in range(4):
        values = trainer.train_step()
        assert values["learning_rate"] == learning_rate(step, JOINT)
        rates = {group["share"]: group["lr"] for group in trainer.optimizers[0].param_groups}
        assert rates == {1.0: learning_rate(step, JOINT), 0.25: 0.25 * learning_rate(step, JOINT)}


def test_only_matrices_decay(rows):
    trainer = Trainer(small(), rows, STAGE1)
    for group in trainer.optimizers[0].param_groups:
        assert all((p.ndim > 1) == (group["weight_decay"] > 0) for p in group["params"])
    counted = sum(len(group["params"]) for group in trainer.optimizers[0].param_groups)
    assert counted == len(list(trainer.model.vae.parameters()))


def test_a_small_share_moves_the_vae_little(rows):
    def travelled(ratio):
        trainer = Trainer(small(), rows, replace(STAGE2, vae_lr_ratio=ratio))
        before = snapshot(trainer)
        trainer.run(progress=False)
        after = snapshot(trainer)
        return tuple(
            sum((after[k] - before[k]).abs().sum().item() for k in before if k.startswith(f"weights.{part}"))
            for part in ("vae", "dit")
        )

    fixed, little, full = (travelled(ratio) for ratio in (0.0, 0.01, 1.0))
    assert fixed[0] == 0 < little[0] < 0.05 * full[0]
    assert min(fixed[1], little[1]) > 0.5 * full[1]


@EVERY
def test_a_stage_moves_what_it_trains_and_nothing_else(rows, config):
    trainer = Trainer(small(), rows, config)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer.run(progress=False)
    moved = {k.split(".")[0] for k, v in trainer.model.state_dict().items() if not torch.equal(v, before[k])}
    assert (
        moved
        == {
            "stage1": {"vae"},
            "stage2": {"dit", "vae"} if config.__class__ is Stage2Config and config.vae_lr_ratio else {"dit"},
        }[trainer.stage]
    )


def test_the_average_is_the_exponential_one_and_lent_for_evaluation_only(rows):
    trainer = Trainer(small(), rows, STAGE2)
    name, history = "dit.txt_in.proj.weight", []
    for _ in range(4):
        trainer.train_step()
        history.append(trainer.parts.state_dict()[name].clone())
    expected = history[0]
    for weights in history[1:]:
        expected = 0.9 * expected + 0.1 * weights
    before = snapshot(trainer)
    with trainer.averaged():
        torch.testing.assert_close(trainer.parts.state_dict()[name], expected)
        assert not trainer.parts.training
    assert trainer.parts.training
    assert_same(before, snapshot(trainer))


def test_a_fixed_vae_does_not_drop_anything_out(rows):
    config = replace(STAGE2, ema_decay=0.0)
    wild, calm = (Trainer(small(dropout=rate), rows, config) for rate in (0.5, 0.0))
    assert_same(
        {k: torch.tensor(v) for k, v in calm.train_step().items()},
        {k: torch.tensor(v) for k, v in wild.train_step().items()},
    )


def test_held_out_terms_are_the_same_whenever_asked(rows):
    trainer = Trainer(small(), rows, STAGE1, held_out=rows)
    trainer.run(until=2, progress=False)
    assert trainer.held_out_terms() == trainer.held_out_terms() and "held_out_loss" in trainer.held_out_terms()


def test_every_epoch_sees_every_row_once(rows):
    trainer, seen = Trainer(small(), rows, STAGE1), []
    known = {tuple(row["tokens"].tolist()): at for at, row in enumerate(rows)}
    original = trainer.terms
    trainer.terms = lambda tokens, *more: seen.extend(known[tuple(row)] for row in tokens.tolist()) or original(tokens, *more)
    trainer.run(until=5, progress=False)
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]


def test_every_step_has_noise_of_its_own():
    def draw(seed, step):
        return torch.randn(4, generator=step_generator(seed, step)).tolist()

    assert draw(1, 5) == draw(1, 5)
    assert len({tuple(draw(seed, step)) for seed in range(3) for step in range(-1, 20)}) == 63


def run_config(text):
    "A whole run on a text file in a second."
    stage1, stage2 = Stage1Config(**LOOP | dict(steps=4)), replace(JOINT, sample_every=5)
    changes = dict(
        dim=16, ffn_dim=16, num_heads=2, head_dim=8, rope_dim=4, emb_dim=8, num_layers=1, latent_dim=4, block_size=4
    )
    changes |= dict(encoder_num_blocks=1, decoder_num_blocks=1)
    return RunConfig(source=str(text), changes=changes, vocab_size=270, length=16, stage1=stage1, stage2=stage2)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "tyger.txt"
    path.write_text("Tyger Tyger, burning bright, in the forests of the night.\n" * 40)
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory, text):
    "The folder of a run that nothing disturbed."
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(run_config(text), out, sample=lambda model: "", progress=False, cache_dir=out.parent / "cache")
    return out


def test_a_text_file_becomes_a_model(finished):
    model = ColaDLM.from_pretrained(finished / "model")
    assert model.tokenizer.get_vocab_size() == 270 == model.config.vae.vocab_size and model.generation.max_length == 16
    steps = [("stage1", n) for n in range(1, 5)] + [("stage2", n) for n in range(1, 7)]
    assert [(line["stage"], line["step"]) for line in metrics(finished)] == steps
    stage1 = [line["loss"] for line in metrics(finished) if line["stage"] == "stage1"]
    assert stage1[-1] < stage1[0] and all(
        "held_out_loss" in line for line in metrics(finished) if line["step"] % 2 == 0
    )
    stored = load_file(saved_checkpoints(finished, "stage2")[-1] / PIECES)
    last = {k.removeprefix("average."): v for k, v in stored.items() if k.startswith("average.")}
    assert_same(last, {k: v for k, v in model.state_dict().items() if k in last})
    assert {"run.json", "metrics.jsonl", "samples.jsonl", "checkpoints", "model"} == {path.name for path in finished.iterdir()}


def test_a_finished_run_is_only_read_again(finished, text, tmp_path):
    again = shutil.copytree(finished, tmp_path / "again")
    train(run_config(text), again, progress=False, cache_dir=finished.parent / "cache")
    assert metrics(again) == metrics(finished)
    assert_same(ColaDLM.from_pretrained(again / "model").state_dict(), ColaDLM.from_pretrained(finished / "model").state_dict())


def test_a_folder_of_another_run_is_refused(finished, text):
    with pytest.raises(ConfigError, match="holds another run.*vocab_size: 270 then, 280 now"):
        train(replace(run_config(text), vocab_size=280), finished, progress=False, cache_dir=finished.parent / "cache")


def files(folder):
    "Content of every file below a folder."
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("stages", [("stage1", "stage2"), ("stage1",)])
def test_the_same_command_leaves_a_finished_model_as_it_is(finished, text, tmp_path, stages):
    again = shutil.copytree(finished, tmp_path / "again")
    train(run_config(text), again, stages, progress=False, cache_dir=finished.parent / "cache")
    assert files(again / "model") == files(finished / "model")


def test_a_refused_run_changes_nothing(finished, text, tmp_path):
    again = shutil.copytree(finished, tmp_path / "again")
    run = run_config(text)
    longer = replace(run, stage2=replace(run.stage2, steps=99))
    with pytest.raises(ConfigError, match="other settings.*steps: 6 then, 99 now"):
        train(longer, again, progress=False, cache_dir=finished.parent / "cache")
    assert files(again) == files(finished)


def test_a_changed_text_is_noticed(text, tmp_path):
    own = tmp_path / "own.txt"
    own.write_text(text.read_text())
    train(run_config(own), tmp_path / "run", progress=False, cache_dir=tmp_path / "cache")
    before = files(tmp_path / "run")
    own.write_text(text.read_text() + "What immortal hand or eye could frame thy fearful symmetry?\n")
    with pytest.raises(ConfigError, match="another text or tokenizer"):
        train(run_config(own), tmp_path / "run", progress=False, cache_dir=tmp_path / "cache")
    assert files(tmp_path / "run") == before


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(length=15), "length=15"),
        (dict(vocab_size=20), "vocab_size=20"),
        (dict(source="nowhere.txt"), "nowhere.txt: cannot be read"),
        (dict(changes=dict(dimm=16)), "dimm"),
    ],
)
def test_a_run_that_cannot_begin_leaves_no_folder(text, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        train(replace(run_config(text), **change), tmp_path / "run", progress=False, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(stories=0), "stories is 0"),
        (dict(stories=2e5), "stories is 200000.0"),
        (dict(length=0), "length is 0"),
        (dict(length="80"), "length is '80'"),
        (dict(vocab_size=True), "vocab_size is True"),
        (dict(source=""), "source is ''"),
        (dict(text_column=3), "text_column is 3"),
        (dict(changes="abc"), "changes is 'abc'"),
        (dict(changes=dict(vocab_size=300)), "vocab_size"),
        (dict(init="model", vocab_size=300), "init brings its own.*vocab_size"),
        (dict(tokenizer="tokenizer.json", vocab_size=300), "leave it out beside tokenizer"),
    ],
)
def test_settings_of_a_run_that_cannot_be_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        RunConfig(**change)


@pytest.mark.parametrize("stages", [(), ("stage3",), ("stage1", "")])
def test_unknown_stages_are_named(text, tmp_path, stages):
    with pytest.raises(ConfigError, match="may hold stage1 and stage2"):
        train(run_config(text), tmp_path / "run", stages, progress=False)


def test_other_files_in_the_models_place_are_named_and_kept(text, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "thesis.tex").write_text("dear")
    with pytest.raises(ModelFileError, match="holds other files"):
        train(run_config(text), tmp_path, progress=False, cache_dir=tmp_path / "cache")
    assert (tmp_path / "model" / "thesis.tex").read_text() == "dear" and not (tmp_path / "run.json").exists()


def test_going_on_from_a_model_wants_its_tokenizer(finished, text, tmp_path):
    folder = shutil.copytree(finished / "model", tmp_path / "model")
    run = replace(run_config(text), init=str(folder), vocab_size=None, changes={})
    assert train(run, tmp_path / "run", progress=False, cache_dir=tmp_path / "cache").tokenizer is not None
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="has no tokenizer.json"):
        train(run, tmp_path / "other", progress=False, cache_dir=tmp_path / "cache")


def test_rows_that_are_no_whole_blocks_are_named(rows):
    short = rows.map(lambda row: {"tokens": row["tokens"][:7], "document": row["document"][:7]})
    with pytest.raises(ConfigError, match="10 rows of 7 tokens.*multiple of 2"):
        Trainer(small(), short, STAGE1)


def test_a_recipe_that_is_none_is_named(tmp_path):
    path = tmp_path / "run.json"
    for content, error in ((b"[]", ModelFileError), (b"{", ModelFileError), (b'{"stepz": 3}', ConfigError), (b'{"stage1": {"steps": 0}}', ConfigError)):
        path.write_bytes(content)
        with pytest.raises(error, match="run.json|steps is 0"):
            read_run(path)
    path.write_text(json.dumps(asdict(RunConfig(source="book.txt", stories=7))))
    assert read_run(path) == RunConfig(source="book.txt", stories=7)


def test_stage_two_alone_wants_a_trained_vae(text, tmp_path, finished):
    with pytest.raises(ConfigError, match="run stage 1"):
        train(run_config(text), tmp_path, stages=("stage2",), progress=False, cache_dir=finished.parent / "cache")


CHILD = """
import sys
sys.path[:0] = sys.argv[1:3]
import test_training
from pathlib import Path
text, out, cache = map(Path, sys.argv[3:6])
wait = lambda model: sys.stdin.read()
test_training.train(test_training.run_config(text), out, sample=wait, progress=False, cache_dir=cache)
"""


def child(code, *paths):
    "A process of its own that runs `code`."
    here = Path(__file__).resolve().parent
    command = [sys.executable, "-c", code, str(here.parent), str(here), *map(str, paths)]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_a_killed_process_continues_bit_for_bit_in_another(finished, text, tmp_path):
    "The child stops of itself behind step 5 of stage 2, between two checkpoints, and is killed there."
    out, process = tmp_path / "killed", child(CHILD, text, tmp_path / "killed", finished.parent / "cache")
    deadline = time.monotonic() + 120

    def reached():
        return (out / "metrics.jsonl").exists() and any((m["stage"], m["step"]) == ("stage2", 5) for m in metrics(out))

    while time.monotonic() < deadline and process.poll() is None and not reached():
        try:
            process.wait(timeout=0.05)
        except subprocess.TimeoutExpired:
            continue
    if process.poll() is not None:
        pytest.fail(process.stderr.read().decode())
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert [path.name for path in saved_checkpoints(out, "stage2")] == ["stage2-0000002", "stage2-0000004"]
    process = child(CHILD, text, out, finished.parent / "cache")
    _, errors = process.communicate(b"", timeout=120)
    assert process.returncode == 0, errors.decode()
    assert_same(ColaDLM.from_pretrained(out / "model").state_dict(), ColaDLM.from_pretrained(finished / "model").state_dict())
    for ours, theirs in zip(saved_checkpoints(out, "stage2"), saved_checkpoints(finished, "stage2")):
        assert_same(load_file(ours / PIECES), load_file(theirs / PIECES))
    lines = [line for line in metrics(out) if line["stage"] == "stage2"]
    assert lines == [line for line in metrics(finished) if line["stage"] == "stage2"]


# At each stage of a save a fork of the child kills itself; the parent, still alive, goes on to the next.
SAVING = """
import os, shutil, signal, sys
sys.path[:0] = sys.argv[1:3]
import test_training
from cola_tutorial import checkpoints
from datasets import Dataset
from pathlib import Path
rows, out = Dataset.load_from_disk(sys.argv[3]).with_format("torch"), Path(sys.argv[4])
first = test_training.Trainer(test_training.small(), rows, test_training.STAGE1, out / "start")
first.run(until=5, progress=False)
first.train_step()
die = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
save_file, replace, rmtree = checkpoints.save_file, os.replace, shutil.rmtree
def cut(tensors, path):
    save_file(tensors, path)
    os.truncate(path, os.path.getsize(path) // 2)
    die()
def late(*args, **kwargs): die()  # the pieces are there, the list of them is not
def moved(source, target): replace(source, target); die()
stages = [(checkpoints, "save_file", cut), (checkpoints, "digest", late)]
stages += [(os, "replace", die), (os, "replace", moved), (shutil, "rmtree", die)]
for number, (module, name, fatal) in enumerate(stages):
    folder = shutil.copytree(out / "start", out / str(number))
    first.out = first.saver.out = folder
    if (pid := os.fork()) == 0:
        setattr(module, name, fatal)
        first.save()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL, number
"""


def test_a_process_killed_at_any_stage_of_a_save_leaves_a_run_that_continues(rows, tmp_path):
    rows.save_to_disk(tmp_path / "rows")
    process = child(SAVING, tmp_path / "rows", tmp_path)
    _, errors = process.communicate(b"", timeout=120)
    assert process.returncode == 0, errors.decode()
    whole = Trainer(small(), rows, STAGE1, tmp_path / "whole")
    whole.run(progress=False)
    for number, step in enumerate([4, 4, 4, 6, 6]):
        trainer = Trainer(small(), rows, STAGE1, tmp_path / str(number))
        assert trainer.resume() and trainer.step == step
        trainer.run(progress=False)
        assert_same(snapshot(whole), snapshot(trainer))
        assert saved_checkpoints(tmp_path / str(number), "stage1")[-1].name == "stage1-0000006"


def test_a_signal_in_the_last_step_is_heard(rows, tmp_path):
    trainer = Trainer(small(), rows, STAGE1, tmp_path)
    step = trainer.train_step

    def disturbed():
        if trainer.step == LOOP["steps"] - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step()

    trainer.train_step = disturbed
    with pytest.raises(Terminated, match="stage1 step 6, which is saved"):
        trainer.run(progress=False)
    assert saved_checkpoints(tmp_path, "stage1")[-1].name == "stage1-0000006"


def test_workers_read_the_same_rows(rows, tmp_path):
    "Also where a run is taken up in the middle."
    expected = Trainer(small(), rows, STAGE2).run(progress=False)
    first = Trainer(small(), rows, STAGE2, tmp_path, scale=ScaleConfig(workers=2))
    found = first.run(until=4, progress=False)
    second = Trainer(small(), rows, STAGE2, tmp_path, scale=ScaleConfig(workers=1))
    assert second.resume() and second.step == 4
    losses = lambda history: [(line["step"], line["loss"], line["gradient_norm"]) for line in history]
    assert losses(found + second.run(progress=False)) == losses(expected)


def test_the_share_of_the_ceiling_follows_from_the_speed(rows, tmp_path, monkeypatch):
    "A machine whose products run at 1000 operations a second."
    monkeypatch.setattr("cola_tutorial.training.matrix_rates", lambda shapes, *_: dict.fromkeys(shapes, 1000.0))
    trainer = Trainer(small(), rows, STAGE1, tmp_path, scale=ScaleConfig(ceiling=True))
    operations = sum(training_flops(trainer.model.config, 8, STAGE1, rows=4).values())
    for line in trainer.run(progress=False):
        assert line["share_of_ceiling"] == pytest.approx(line["tokens_per_second"] * operations / 1000)


def test_tensorboard_reads_what_was_measured(rows, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    first = Trainer(small(), rows, STAGE1, tmp_path, scale=ScaleConfig(tensorboard=True))
    first.run(until=4, progress=False)
    second = Trainer(small(), rows, STAGE1, tmp_path, scale=ScaleConfig(tensorboard=True))
    second.resume()
    second.run(progress=False)
    found = accumulator.EventAccumulator(str(tmp_path / "tensorboard" / "stage1")).Reload()
    lines = metrics(tmp_path)
    assert len(lines) == 6 and {"loss", "kl", "gradient_norm"} <= set(found.Tags()["scalars"])
    for name in ("loss", "gradient_norm", "learning_rate"):
        assert [(event.step, event.value) for event in found.Scalars(name)] == [(line["step"], pytest.approx(line[name])) for line in lines]


@pytest.fixture(scope="module")
def shards(tmp_path_factory, text):
    "A folder as cola-shards leaves it: shards packed by best fit, and the tokenizer."
    pages = tmp_path_factory.mktemp("pages") / "pages.jsonl"
    pages.write_text("".join(json.dumps({"text": text.read_text()[: 20 + 7 * n]}) + "\n" for n in range(60)))
    tokenizer = train_tokenizer([pages.read_text()], 270)
    folder = pages.with_name("shards")
    write_shards(documents(pages, cache_dir=pages.with_name("cache")), tokenizer, folder, 16, multiple_of=4)
    return folder


def test_training_reads_token_shards(shards, text, tmp_path):
    "Rows, tokenizer and length come from the folder; documents of a row may be kept apart."
    config = replace(run_config(text), source=str(shards), vocab_size=None, length=None)
    config = replace(config, stage2=replace(config.stage2, within_documents=True), scale=ScaleConfig(workers=1))
    _, rows, held_out = prepare(config)
    whole = open_shards(shards)
    assert len(rows) + len(held_out) == len(whole) and max(row["document"].max() for row in whole) > 0
    model = train(config, tmp_path / "out", progress=False)
    assert model.config.vae.vocab_size == 270 and model.generation.max_length == 16
    assert ColaDLM.from_pretrained(tmp_path / "out" / "model").tokenizer.get_vocab_size() == 270
    assert {line["stage"] for line in metrics(tmp_path / "out")} == {"stage1", "stage2"}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"length": 32}, "length is 16 there and 32 here"),
        ({"changes": {"block_size": 8}}, "multiples of 4 tokens there, blocks have 8 here"),
        ({"tokenizer": "other"}, "another tokenizer"),
    ],
    ids=str,
)
def test_shards_of_another_kind_are_named(shards, text, tmp_path, change, message):
    config = run_config(text)
    if "tokenizer" in change:
        train_tokenizer([text.read_text()[:30]], 262).save(str(tmp_path / "tokenizer.json"))
        change = {"tokenizer": str(tmp_path / "tokenizer.json")}
    changes = config.changes | change.get("changes", {})
    config = replace(config, **{"source": str(shards), "vocab_size": None, "length": None} | change | {"changes": changes})
    with pytest.raises((ConfigError, CorpusError), match=message):
        train(config, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
