"Several processes compute what one computes, and what is interrupted, refused or damaged loses nothing: the real thing each time."

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import test_training
import torch
from test_training import LOOP, PIECES, STAGE1, metrics, rows, small, text  # noqa: F401 (fixtures)

from cola_tutorial.checkpoints import CheckpointError, consolidate, saved_checkpoints
from cola_tutorial.config import ConfigError, ScaleConfig
from cola_tutorial.model import ColaDLM
from cola_tutorial.objectives import WATCHED
from cola_tutorial.processes import ALONE, Processes, join, own_part
from cola_tutorial.training import BatchMemoryError, Trainer

CHILD = Path(__file__).resolve().parent / "processes_child.py"


def start(processes, source, out, cache, **asked):
    "A training in so many processes of its own."
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    command = [sys.executable, *launch, str(CHILD), str(source), str(out), str(cache), json.dumps(asked)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})


def finish(process, code=0):
    "Its messages, when it has ended as it should."
    _, errors = process.communicate(b"", timeout=240)
    assert process.returncode == code, errors.decode()[-3000:]
    return errors.decode()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def alone(tmp_path_factory, text, cache):  # noqa: F811
    "A run of both stages by one process."
    out = tmp_path_factory.mktemp("alone") / "run"
    finish(start(1, text, out, cache))
    return out


def assert_same_losses(one, other):
    "All values but those that are watched on the rows at hand, to rounding."
    ours, theirs = metrics(one), metrics(other)
    assert [(line["stage"], line["step"]) for line in ours] == [(line["stage"], line["step"]) for line in theirs]
    for mine, its in zip(ours, theirs):
        compared = {name: value for name, value in mine.items() if not name.endswith(WATCHED) and name != "stage"}
        assert compared == pytest.approx({name: its[name] for name in compared}, rel=2e-4, abs=1e-6)


def test_two_processes_and_one_continue_each_other_with_the_losses_of_one(alone, text, cache, tmp_path):  # noqa: F811
    "Two sharing the weights are stopped behind stage 1; two with copies go on to step 3; one finishes."
    out = tmp_path / "run"
    finish(start(2, text, out, cache, stages=["stage1"], scale={"shards": 2, "micro_batch_size": 1}))
    assert {path.name for path in saved_checkpoints(out, "stage1")[-1].iterdir()} >= {PIECES, "pieces-00001.safetensors", "state.json"}
    finish(start(2, text, out, cache, scale={"shards": 1}))
    assert_same_losses(out, alone)
    shutil.rmtree(saved_checkpoints(out, "stage2")[-1])  # as if killed behind step 4
    finish(start(1, text, out, cache))
    assert_same_losses(out, alone)
    ours, theirs = (ColaDLM.from_pretrained(folder / "model").state_dict() for folder in (out, alone))
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=2e-3)


def test_parts_of_a_batch_add_up(alone, text, cache, tmp_path):  # noqa: F811
    finish(start(1, text, tmp_path / "run", cache, scale={"micro_batch_size": 3, "recompute": True, "async_save": True}))
    assert_same_losses(tmp_path / "run", alone)
    assert [path.name for path in saved_checkpoints(tmp_path / "run", "stage2")] == ["stage2-0000004", "stage2-0000006"]


def test_sigterm_saves_the_step_and_ends(alone, text, cache, tmp_path):  # noqa: F811
    "The child shows a sample behind step 2 and waits; it is asked to end there, and does so behind step 3."
    out = tmp_path / "run"
    process = start(1, text, out, cache, wait=True, stage2={"sample_every": 2})
    while not any((line["stage"], line["step"]) == ("stage2", 2) for line in (metrics(out) if (out / "metrics.jsonl").exists() else [])):
        assert process.poll() is None, process.stderr.read().decode()
    process.send_signal(signal.SIGTERM)
    assert "stage2 step 3, which is saved" in finish(process, code=143)
    assert saved_checkpoints(out, "stage2")[-1].name == "stage2-0000003"
    finish(start(1, text, out, cache))
    ours, theirs = (ColaDLM.from_pretrained(folder / "model").state_dict() for folder in (out, alone))
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_rows_that_do_not_divide_are_named():
    with pytest.raises(ConfigError, match="batch_size is 5.*multiple of the 2"):
        Processes(0, 2).share(5)
    assert [Processes(rank, 4).share(8) for rank in range(4)] == [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8)]
    with pytest.raises(ConfigError, match="shards is 2"), join(shards=2):
        pass
    with join() as (processes, device):
        assert processes == ALONE and device == torch.device("cpu")


def test_an_own_part_of_a_whole_tensor_is_all_of_it():
    part, first, writes = own_part(torch.arange(6.0).view(3, 2))
    assert part.shape == (3, 2) and first == 0 and writes


def test_a_full_disk_leaves_the_older_checkpoint(rows, tmp_path):  # noqa: F811
    "A real one of 200 KB, where this machine lets us mount it; a limit on the size of files, which no save can pass, elsewhere."
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)], capture_output=True).returncode == 0
    try:
        trainer = Trainer(small(), rows, replace(STAGE1, keep=9), disk)
        trainer.run(until=2, progress=False)
        filler = disk / "filler"
        if mounted:
            with pytest.raises(OSError), filler.open("wb", buffering=0) as file:
                while True: file.write(b"0" * 4096)
        else:
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        trainer.train_step()
        try:
            with pytest.raises(CheckpointError, match="no checkpoint was written.*older ones are untouched"):
                trainer.save()
        finally:
            if not mounted: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert [path.name for path in (disk / "checkpoints").iterdir()] == ["stage1-0000002"]
        filler.unlink(missing_ok=True)
        second = Trainer(small(), rows, replace(STAGE1, keep=9), disk)
        assert second.resume() and second.step == 2
    finally:
        if mounted: subprocess.run(["umount", str(disk)], check=True)


def test_going_back_to_an_older_checkpoint_must_be_asked_for(rows, tmp_path):  # noqa: F811
    Trainer(small(), rows, STAGE1, tmp_path).run(until=4, progress=False)
    path = saved_checkpoints(tmp_path, "stage1")[-1] / PIECES
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="damaged.*--older"):
        Trainer(small(), rows, STAGE1, tmp_path).resume()
    third = Trainer(small(), rows, STAGE1, tmp_path)
    assert third.resume(older=True) and third.step == 2


def test_a_foreign_or_missing_piece_is_named(rows, tmp_path):  # noqa: F811
    Trainer(small(), rows, STAGE1, tmp_path).run(until=2, progress=False)
    folder = saved_checkpoints(tmp_path, "stage1")[-1]
    (folder / PIECES).rename(folder / "elsewhere")
    with pytest.raises(CheckpointError, match=f"{PIECES} is missing"):
        consolidate(tmp_path, tmp_path / "model")
    (folder / "state.json").write_text('{"format": "another"}')
    with pytest.raises(CheckpointError, match="format 'another'"):
        consolidate(tmp_path, tmp_path / "model")


def test_milestones_stay(rows, tmp_path):  # noqa: F811
    Trainer(small(), rows, replace(STAGE1, save_every=1, keep=1, keep_every=3), tmp_path).run(progress=False)
    assert [path.name for path in saved_checkpoints(tmp_path, "stage1")] == ["stage1-0000003", "stage1-0000006"]


MEMORY = """
import resource, sys
sys.path[:0] = sys.argv[1:3]
import test_training, torch
from datasets import Dataset
from dataclasses import replace
from cola_tutorial.training import BatchMemoryError, Trainer
torch.set_num_threads(1)
tokens = torch.randint(2, 13, (512, 256)).tolist()
rows = Dataset.from_dict({"tokens": tokens, "document": [[0] * 256] * 512}).with_format("torch")
trainer = Trainer(test_training.small(), rows, replace(test_training.STAGE1, batch_size=512))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 600_000_000,) * 2)
before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
try: trainer.train_step()
except BatchMemoryError as error: print(error)
assert trainer.step == 0 and all(torch.equal(v, before[k]) for k, v in trainer.model.state_dict().items())
"""


def test_a_batch_that_does_not_fit_is_told_what_would():
    "A process that may not have more memory asks for too many rows at once."
    here = Path(__file__).resolve().parent
    command, own = [sys.executable, "-c", MEMORY, str(here.parent), str(here)], os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=own)
    assert done.returncode == 0, done.stderr
    assert "512 rows at once do not fit into memory" in done.stdout, done.stdout
    assert int(done.stdout.split("micro_batch_size=")[1].split()[0]) in (1, 2, 4, 8, 16, 32, 64, 128, 256), done.stdout


def test_muon_takes_the_matrices_of_the_blocks_and_learns(rows):  # noqa: F811
    trainer = Trainer(small(dropout=0.0), rows, replace(STAGE1, optimizer="muon", steps=40, learning_rate=2e-2))
    adamw, muon = trainer.optimizers
    inner = {id(p) for name, p in trainer.parts.named_parameters() if "blocks." in name and p.ndim == 2}
    assert {id(p) for group in muon.param_groups for p in group["params"]} == inner
    every = [id(p) for one in (adamw, muon) for group in one.param_groups for p in group["params"]]
    assert len(every) == len(set(every)) == len(list(trainer.parts.parameters()))
    history = trainer.run(progress=False)
    assert history[-1]["loss"] < history[0]["loss"] - 0.1


def test_by_turns_the_vae_moves_in_its_steps_only(rows):  # noqa: F811
    config = replace(test_training.JOINT, joint_period=3, joint_steps=1, ema_decay=0.0)
    trainer = Trainer(small(), rows, config)
    for step in range(6):
        before = {k: v.clone() for k, v in trainer.model.vae.state_dict().items()}
        trainer.train_step()
        moved = any(not torch.equal(v, before[k]) for k, v in trainer.model.vae.state_dict().items())
        assert moved == (step % 3 == 0), step


def test_flex_attention_on_a_cpu_is_refused(rows):  # noqa: F811
    with pytest.raises(ConfigError, match="scale.flex"):
        Trainer(small(), rows, replace(STAGE1, **LOOP), scale=ScaleConfig(flex=True))


def test_memory_errors_are_memory_errors():
    assert issubclass(BatchMemoryError, MemoryError)
