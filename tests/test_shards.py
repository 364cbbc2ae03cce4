"Shards: packing against plain rules, files under SIGKILL and damage, an order that is computed, and loaders with workers."

import itertools
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import tracemalloc
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from cola_tutorial.config import END, PAD
from cola_tutorial.text import corpus, shards
from cola_tutorial.text.corpus import (
    CorpusError,
    batch_indices,
    documents,
    documents_from,
    pack,
    shuffled,
    split_rows,
    token_batch,
    train_tokenizer,
)
from cola_tutorial.text.shards import SHARD_LAYOUTS, batches, best_fit, open_shards, write_shards

EXAMPLES = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
WORDS = "the tiger burns bright in forests of the night and what immortal hand or eye could frame it".split()
OPTIONS = {"multiple_of": 4, "window": 8, "shard_tokens": 600}


def made_texts(count, seed=0):
    "Texts of 1 to 60 words."
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS, draw.integers(1, 60))) for _ in range(count)]


@pytest.fixture(scope="module")
def tokenizer():
    "A small tokenizer."
    return train_tokenizer(made_texts(20), 280)


@pytest.fixture(scope="module")
def tales(tmp_path_factory):
    "80 documents in a cache of their own."
    return documents_from(lambda: made_texts(80), "80 texts", cache_dir=tmp_path_factory.mktemp("tales"))


@pytest.fixture(scope="module")
def whole(tales, tokenizer, tmp_path_factory):
    "A folder with their shards, never disturbed and never changed."
    folder = tmp_path_factory.mktemp("shards") / "whole"
    rows = write_shards(tales, tokenizer, folder, 64, **OPTIONS)
    assert len(rows.shards) >= 5
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    "A copy that may be damaged."
    return shutil.copytree(whole, tmp_path / "copy")


def contents(folder):
    "Every file of a folder with its bytes."
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


# Packing


def slow_best_fit(sizes, capacity):
    "Best fit decreasing by looking at every row: the room left in each, sorted."
    rooms = []
    for size in sorted(sizes, reverse=True):
        fitting = [row for row, room in enumerate(rooms) if room >= size]
        row = min(fitting, key=lambda row: rooms[row]) if fitting else len(rooms)
        rooms += [capacity] * (row == len(rooms))
        rooms[row] -= size
    return sorted(rooms)


@given(st.integers(1, 40).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), min_size=1, max_size=60))))
@EXAMPLES
def test_best_fit_is_the_rule_and_its_bounds_hold(drawn):
    capacity, sizes = drawn
    rows = best_fit(np.array(sizes), capacity)
    used = np.bincount(rows, sizes).astype(int)
    assert (used > 0).all() and used.max() <= capacity
    assert sorted(capacity - used) == slow_best_fit(sizes, capacity)
    assert len(used) <= len(sizes)
    assert len(used) == 1 or np.sort(used)[:2].sum() > capacity  # no two rows could have been one
    assert len(used) <= -(-11 * -(-sum(sizes) // capacity) // 9) + 1 or max(sizes) > capacity / 2


IDS = st.lists(st.lists(st.integers(2, 90), min_size=1, max_size=40), min_size=1, max_size=25)


@given(IDS, st.integers(1, 5), st.integers(1, 6), st.integers(1, 4), st.integers(1, 9))
@EXAMPLES
def test_every_token_is_packed_once_and_in_order(texts, multiple, blocks, window, cut):
    length = multiple * blocks
    texts = [[1000 * number + token for token in ids] for number, ids in enumerate(texts, 1)]  # tells whose token it is
    encoded = [
        (np.array(ids[at : at + cut], np.int32), at + cut >= len(ids)) for ids in texts for at in range(0, len(ids), cut)
    ]
    packed = list(shards._best_fit_blocks(encoded, length, multiple, window, 0, 1))
    tokens, document = (np.concatenate(part) for part in zip(*packed, strict=True))
    assert tokens.shape == document.shape == (len(tokens), length)
    assert (tokens[document < 0] == 0).all() and (tokens[document >= 0] > 0).all()
    pieces = {}
    for row, owner in zip(tokens, document, strict=True):
        starts = [int(np.flatnonzero(owner == number)[0]) for number in range(owner.max() + 1)]
        assert starts[0] == 0 and starts == sorted(starts) and not any(start % multiple for start in starts)
        for number, start in enumerate(starts):
            places = np.flatnonzero(owner == number)
            assert places.tolist() == list(range(start, start + len(places)))
            pieces.setdefault(int(row[start]) // 1000, []).append(row[places].tolist())
    for number, ids in enumerate(texts, 1):
        ending = [1] if len(ids) % length else []
        wanted = [[*ids, *ending][at : at + length] for at in range(0, len(ids), length)]
        found = pieces.pop(number)
        assert Counter(map(tuple, found)) == Counter(map(tuple, wanted))  # a row's order is not the documents'
    assert not pieces
    assert len(tokens) <= sum(-(-len(ids) // length) for ids in texts)  # never more than one document a row


@given(IDS, st.integers(1, 5), st.integers(1, 6), st.integers(1, 12))
@EXAMPLES
def test_rows_do_not_depend_on_how_documents_are_cut(texts, multiple, blocks, cut):
    whole = [(np.array(ids, np.int32), True) for ids in texts]
    parts = [(np.array(ids[at : at + cut], np.int32), at + cut >= len(ids)) for ids in texts for at in range(0, len(ids), cut)]
    options = {"length": multiple * blocks, "multiple_of": multiple, "window": 1000, "pad": 0, "end": 1}
    for layout in SHARD_LAYOUTS:
        first, second = (list(shards._blocks(encoded, {**options, "layout": layout})) for encoded in (whole, parts))
        assert all(np.array_equal(a, b) for a, b in zip(itertools.chain(*first), itertools.chain(*second), strict=True))


@given(st.lists(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 3)), min_size=1, max_size=6), min_size=1, max_size=6))
@EXAMPLES
def test_document_numbers_come_back_from_their_counts(drawn):
    length = max(sum(map(sum, row)) for row in drawn)
    document = np.full((len(drawn), length), -1)
    for row, pairs in enumerate(drawn):
        at = 0
        for number, (size, gap) in enumerate(pairs):
            document[row, at : at + size] = number
            at += size + gap
    runs, counts = shards._runs(document)
    assert counts.tolist() == list(map(len, drawn)) and runs[:, 0].tolist() == [size for row in drawn for size, _ in row]
    assert np.array_equal(shards._unrolled(runs, counts, length), document)


def test_windows_are_full(tokenizer):
    "Many small documents: at most two rows of each window stay badly filled, whatever the borders."
    texts = made_texts(3000, seed=5)
    encoded = [(ids, True) for ids in corpus.encode_pieces(tokenizer, texts)]
    sizes = np.array([len(ids) + 1 for ids, _ in encoded])
    for multiple in (1, 16):
        document = np.concatenate([d for _, d in shards._best_fit_blocks(encoded, 2048, multiple, 64, 0, 1)])
        fewest = (-(-sizes // multiple) * multiple).sum() / 2048
        assert fewest <= len(document) <= fewest * (1 + 2 / 64) + 1


# What is written


@pytest.mark.parametrize("layout", ["document", "stream"])
def test_a_shard_is_what_pack_makes_of_its_documents(tales, tokenizer, tmp_path, layout):
    rows = write_shards(tales, tokenizer, tmp_path / "s", 32, layout=layout, shard_tokens=500)
    done, at = 0, 0
    for shard in rows.shards:
        expected = pack(tales.select(range(done, done + shard["pieces"])), tokenizer, 32, layout=layout, cache_dir=tmp_path)
        found = rows[at : at + shard["rows"]]
        for name in ("tokens", "document"):
            assert torch.equal(found[name], expected[name][:])
        done, at = done + shard["pieces"], at + shard["rows"]
    assert (done, at) == (len(tales), len(rows)) and len(rows.shards) > 3


def test_shards_hold_every_document(whole, tokenizer, tales):
    rows = open_shards(whole, tokenizer=tokenizer, verify=True)
    assert all(shard["tokens"] < 600 + 400 for shard in rows.shards)
    tokens, document = rows[:]["tokens"], rows[:]["document"]
    assert rows.efficiency == (document >= 0).double().mean().item()
    pieces = [row[owner == n].tolist() for row, owner in zip(tokens, document, strict=True) for n in range(int(owner.max()) + 1)]
    wanted = []
    for text in tales["text"]:
        ids = tokenizer.encode(text).ids
        ids += [1] if len(ids) % 64 else []
        wanted += [tuple(ids[at : at + 64]) for at in range(0, len(ids), 64)]
    assert Counter(map(tuple, pieces)) == Counter(wanted)
    assert len(rows) < len(wanted)  # the naive layout: one piece a row


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("processes", [2, 3])
def test_files_do_not_depend_on_the_processes(tales, tokenizer, whole, tmp_path, processes, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "given")
    monkeypatch.setattr(corpus, "PIECE", 1000)  # so that there are many groups to hand out
    assert len(list(corpus.piece_groups(tales))) > 10
    write_shards(tales, tokenizer, tmp_path / "s", 64, processes=processes, **OPTIONS)
    assert contents(tmp_path / "s") == contents(whole)
    assert os.environ.get("TOKENIZERS_PARALLELISM") == "given"


def killed(write, times):
    "Run `write` in a process that kills itself before the disk gets its n-th order; tells whether it came so far."
    child = os.fork()
    if not child:
        counted = itertools.count(1)

        def killing(name, real):
            def call(*arguments):
                if next(counted) == times:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments)

            setattr(os, name, call)

        try:
            for name in ("fsync", "replace"):
                killing(name, getattr(os, name))
            write()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_killed_at_every_moment(tales, tokenizer, tmp_path):
    "Before each fsync and each rename of the whole run: the next run goes on, and nothing tells that there was a kill."
    few, written = tales.select(range(30)), []
    write = lambda: write_shards(few, tokenizer, folder, 64, **OPTIONS)
    folder = tmp_path / "0"
    count = len(write().shards)
    undisturbed = contents(folder)
    for times in itertools.count(1):
        folder = tmp_path / str(times)
        if not killed(write, times):
            break
        whole_ones = [name for name, data in contents(folder).items() if undisturbed.get(name) == data and name != "index.json"]
        before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
        if times % 4 == 2:  # one more kill, on the way back
            killed(write, 3)
        rows = write()
        assert contents(folder) == undisturbed, times
        after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
        written.append(sum(before[name] == after[name] for name in whole_ones))
        assert len(rows) == len(open_shards(folder, verify=True))
    assert count >= 3 and times == 3 * (2 * count + 3) + 1  # a file, its name, its folder: tokenizer, index twice, and with each shard
    assert max(written) == count + 1  # what was whole was not written again


KILLED = """
import os, signal, sys
from tokenizers import Tokenizer
from cola_tutorial.text.corpus import documents
from cola_tutorial.text.shards import write_shards
source, tokenizer, folder = sys.argv[1:]
stop = lambda shard: os.kill(os.getpid(), signal.SIGKILL)
options = {"fingerprint": "x", "shard_tokens": 50_000}
write_shards(documents(source, streaming=True), Tokenizer.from_file(tokenizer), folder, 64, processes=2, report=stop, **options)
"""


def test_workers_of_a_killed_process_end_and_hold_nothing(tokenizer, tmp_path):
    "The next run begins at once, while they may still live; and their end of the pipe is closed when they are dead."
    texts = [text * 40 for text in made_texts(200)]  # many large messages are on the way, one of them perhaps by half
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    command = [sys.executable, "-c", KILLED, *(str(tmp_path / name) for name in ("a.jsonl", "tokenizer.json", "s"))]
    root = Path(__file__).resolve().parent.parent
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root) as process:
        assert process.wait(60) == -signal.SIGKILL
        found = documents(tmp_path / "a.jsonl", streaming=True)
        for folder in ("s", "t"):
            write_shards(found, tokenizer, tmp_path / folder, 64, fingerprint="x", shard_tokens=50_000)
        process.communicate(timeout=30)
    assert contents(tmp_path / "s") == contents(tmp_path / "t")


def test_every_prefix_of_a_file_may_be_left(tales, tokenizer, whole, copy):
    "The process died while it wrote: what is left of the last shard does not matter."
    index = json.loads((copy / "index.json").read_bytes())
    index |= {"complete": False, "shards": index["shards"][:2]}
    (copy / "index.json").write_text(json.dumps(index))
    for number in range(3, 9):
        (copy / f"shard-{number:05d}.bin").unlink(missing_ok=True)
    (copy / "shard-00003.bin.part").write_bytes(b"half")
    (copy / "index.json.part").write_bytes(b"{")
    seen = []
    write_shards(tales, tokenizer, copy, 64, report=seen.append, **OPTIONS)
    assert contents(copy) == contents(whole)
    assert seen == json.loads((whole / "index.json").read_bytes())["shards"][2:]


def test_finished_shards_are_not_written_again(tales, tokenizer, whole, monkeypatch):
    monkeypatch.setattr(shards, "_encoded_by", None)
    assert len(write_shards(tales, tokenizer, whole, 64, **OPTIONS)) == len(open_shards(whole))


def test_streamed_documents_and_going_on_with_them(tokenizer, tmp_path):
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in made_texts(80)))
    once, streamed = documents(source, cache_dir=tmp_path / "cache"), documents(source, streaming=True)
    with pytest.raises(CorpusError, match="fingerprint="):
        write_shards(streamed, tokenizer, tmp_path / "s", 64, **OPTIONS)
    assert not (tmp_path / "s").exists()
    write_shards(once, tokenizer, tmp_path / "t", 64, fingerprint="tales", **OPTIONS)

    def stop(shard):
        raise KeyboardInterrupt

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            write_shards(streamed, tokenizer, tmp_path / "s", 64, fingerprint="tales", report=stop, processes=2, **OPTIONS)
    write_shards(streamed, tokenizer, tmp_path / "s", 64, fingerprint="tales", **OPTIONS)
    assert contents(tmp_path / "s") == contents(tmp_path / "t")


def test_a_fault_in_the_text_stops_with_its_line(tokenizer, tmp_path):
    "Shards written before stay; with the line mended, the same call goes on."
    source = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": text}) for text in made_texts(80)]
    good = "\n".join(lines)
    lines[70] = lines[70][:-3] + "   "
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "PIECE", 1000)
        source.write_text("\n".join(lines))
        for processes in (1, 2):
            with pytest.raises(CorpusError, match=r"a\.jsonl, line 71: broken line"):
                write_shards(documents(source, streaming=True), tokenizer, tmp_path / "s", 64, fingerprint="x", processes=processes, **OPTIONS)
        assert not [name for name in contents(tmp_path / "s") if name.endswith(".part")]
        with pytest.raises(CorpusError, match="not finished, [3-9] shards so far"):
            open_shards(tmp_path / "s")
        source.write_text(good)
        for folder in ("s", "t"):
            write_shards(documents(source, streaming=True), tokenizer, tmp_path / folder, 64, fingerprint="x", **OPTIONS)
    assert contents(tmp_path / "s") == contents(tmp_path / "t")


def test_long_document_goes_on_in_the_next_shard(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "PIECE", 300)
    text = " ".join(made_texts(40))
    found = documents_from(lambda: [text, "tiger"], "long", cache_dir=tmp_path)
    rows = write_shards(found, tokenizer, tmp_path / "s", 16, layout="stream", shard_tokens=500)
    assert len(rows.shards) > 2
    tokens, document = rows[:]["tokens"], rows[:]["document"]
    assert tokenizer.decode(tokens[(document >= 0) & (tokens != 1)].tolist()) == text + "tiger"
    assert (tokens == 1).sum() == 2


def test_large_vocabulary_takes_four_bytes(tmp_path):
    many = Tokenizer(models.BPE({PAD: 0, END: 1, "a": 2, "b": 70_000}, []))
    many.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    few = Tokenizer(models.BPE({PAD: 0, END: 1, "a": 2, "b": 65_535}, []))
    few.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found = documents_from(lambda: ["ab" * 50, "bb"], "ab", cache_dir=tmp_path)
    sizes = []
    for name, tokenizer, b in (("many", many, 70_000), ("few", few, 65_535)):
        rows = write_shards(found, tokenizer, tmp_path / name, 8)
        sizes.append(rows.shards[0]["bytes"])
        assert rows[0]["tokens"].tolist() == [2, b] * 4 and len(rows) == 13
    assert sizes[0] - sizes[1] == 13 * 8 * 2


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "length=0"),
        ({"length": 30}, "length=30: must be a positive multiple of 4"),
        ({"layout": "rows"}, "layout='rows': must be 'best_fit' or 'document' or 'stream'"),
        ({"window": 0}, "window=0"),
        ({"shard_tokens": 0}, "shard_tokens=0"),
        ({"processes": 0}, "processes=0"),
        ({"pad": "[PAD]"}, r"no token \[PAD\]"),
    ],
)
def test_wrong_options_write_nothing(tales, tokenizer, tmp_path, options, message):
    with pytest.raises(CorpusError, match=message):
        write_shards(tales, tokenizer, tmp_path / "s", **{"length": 64, **OPTIONS, **options})
    assert not (tmp_path / "s").exists()
    with pytest.raises(CorpusError, match="pack takes what documents"):
        write_shards(tales.remove_columns("last"), tokenizer, tmp_path / "s", 64)


def test_nothing_is_written_over(tales, tokenizer, copy, tmp_path):
    before = contents(copy)
    other = train_tokenizer(made_texts(20), 270)
    for change, message in (
        ({"length": 32}, r"of another kind \(length 64, now 32\)"),
        ({"layout": "stream"}, "layout 'best_fit', now 'stream'"),
        ({"tokenizer": other}, "vocabulary 280, now 270"),
        ({"documents": tales.select(range(9))}, "documents '"),
    ):
        with pytest.raises(CorpusError, match=message):
            write_shards(**{"documents": tales, "tokenizer": tokenizer, "folder": copy, "length": 64, **OPTIONS, **change})
    assert contents(copy) == before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(CorpusError, match=r"notes: holds 'mine.txt', but no shards"):
        write_shards(tales, tokenizer, tmp_path / "notes", 64)
    with pytest.raises(CorpusError, match=r"mine.txt: cannot be written \(File exists"):
        write_shards(tales, tokenizer, tmp_path / "notes" / "mine.txt", 64)
    assert contents(tmp_path / "notes") == {"mine.txt": b"mine"}


def test_two_writers_of_one_folder(tales, tokenizer, tmp_path):
    def again(shard):
        with pytest.raises(CorpusError, match="another process is writing here"):
            write_shards(tales, tokenizer, tmp_path / "s", 64, **OPTIONS)
        seen.append(shard)

    seen = []
    rows = write_shards(tales, tokenizer, tmp_path / "s", 64, report=again, **OPTIONS)
    assert len(seen) == len(rows.shards)


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_forked_process_holds_no_lock(tales, tokenizer, whole, tmp_path, how):
    "A process that writes forks another and is killed, or stops; the other lives on."
    (wait, release), (ready, tell), (over, end) = os.pipe(), os.pipe(), os.pipe()

    def fork(shard):
        if not os.fork():
            os.write(tell, b"ready")
            os.read(wait, 1)  # until the test lets go
            os._exit(0)
        os.read(ready, 5)
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise KeyboardInterrupt

    writer = os.fork()
    if not writer:
        try:
            os.close(release)
            with pytest.raises(KeyboardInterrupt):
                write_shards(tales, tokenizer, tmp_path / "s", 64, report=fork, **OPTIONS)
            os.write(end, b"stopped")
            os.read(wait, 1)
        finally:
            os._exit(0)
    if how == "killed":
        assert os.WIFSIGNALED(os.waitpid(writer, 0)[1])
    else:
        assert os.read(over, 7) == b"stopped"
    try:
        write_shards(tales, tokenizer, tmp_path / "s", 64, **OPTIONS)
    finally:
        for handle in (wait, release, ready, tell, over, end):
            os.close(handle)
    if how == "stopped":
        os.waitpid(writer, 0)
    assert contents(tmp_path / "s") == contents(whole)


def test_disk_that_takes_no_more(tales, tokenizer, whole, tmp_path):
    "The kernel refuses: a named error, nothing half left, and with room again the same call goes on."
    index = json.loads((whole / "index.json").read_bytes())["shards"]
    room = max(shard["bytes"] for shard in index[:2])
    assert any(shard["bytes"] > room for shard in index[2:])

    def interrupt(shard):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # the tokenizer, which is larger than a shard, is there already
        write_shards(tales, tokenizer, tmp_path / "s", 64, report=interrupt, **OPTIONS)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(CorpusError, match=r"shard-0000\d.bin: cannot be written \(File too large\)"):
            write_shards(tales, tokenizer, tmp_path / "s", 64, **OPTIONS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    left = contents(tmp_path / "s")
    assert len(left) >= 3 and all(left[name] == data for name, data in contents(whole).items() if name in left and name != "index.json")
    assert not [name for name in left if name.endswith(".part")]
    write_shards(tales, tokenizer, tmp_path / "s", 64, **OPTIONS)
    assert contents(tmp_path / "s") == contents(whole)


def test_no_tokens(tales, tokenizer, tmp_path):
    with pytest.raises(CorpusError, match="No tokens to pack"):
        write_shards(tales.select([]), tokenizer, tmp_path / "s", 64)


# Damage


@pytest.mark.parametrize("size", [0, 10, 64, -1, -100])
def test_truncated_shard(copy, size):
    path = copy / "shard-00002.bin"
    data = path.read_bytes()
    for left in (data[:size], data + b"more"):
        path.write_bytes(left)
        with pytest.raises(CorpusError, match=r"shard-00002\.bin: [\d,]+ bytes, but the index says .*cut short or foreign.*Copy it again"):
            open_shards(copy)


def test_missing_and_foreign_shards(copy, tales, tokenizer, tmp_path):
    path = copy / "shard-00001.bin"
    data = path.read_bytes()
    path.unlink()
    with pytest.raises(CorpusError, match=r"shard-00001\.bin: cannot be read \(No such file"):
        open_shards(copy)
    path.mkdir()
    with pytest.raises(CorpusError, match=r"shard-00001\.bin: cannot be read \(Is a directory"):
        open_shards(copy)
    path.rmdir()
    path.write_bytes(b"x" * len(data))
    with pytest.raises(CorpusError, match=r"shard-00001\.bin: a foreign file, not shard 1 of this set"):
        open_shards(copy)
    path.write_bytes(data[:64].replace(b" 1 ", b" 2 ", 1) + data[64:])
    with pytest.raises(CorpusError, match="foreign"):
        open_shards(copy)
    write_shards(tales, tokenizer, tmp_path / "other", 64, fingerprint="another name", **OPTIONS)
    shutil.copy(tmp_path / "other" / "shard-00001.bin", path)
    assert path.stat().st_size == len(data)
    with pytest.raises(CorpusError, match="foreign"):
        open_shards(copy)
    with pytest.raises(CorpusError, match="foreign"):
        write_shards(tales, tokenizer, copy, 64, **OPTIONS)  # and it is not gone on with, either


def test_changed_places_of_shards(copy):
    first, second = (copy / f"shard-0000{number}.bin" for number in (0, 1))
    first.rename(copy / "x")
    second.rename(first)
    (copy / "x").rename(second)
    with pytest.raises(CorpusError, match=r"shard-00000\.bin: "):
        open_shards(copy)


@given(st.data())
@settings(EXAMPLES, max_examples=150)
def test_one_flipped_bit(whole, data):
    number = data.draw(st.integers(0, 2))
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(whole, Path(folder) / "copy"))
        path = copy / f"shard-{number:05d}.bin"
        content = bytearray(path.read_bytes())
        shard = json.loads((copy / "index.json").read_bytes())["shards"][number]
        begins = [0, 64, len(content) - 4 * shard["segments"] - 8 * (shard["rows"] + 1), len(content) - 4 * shard["segments"], len(content)]
        part = data.draw(st.integers(0, 3))  # head, tokens, offsets, counts
        content[data.draw(st.integers(begins[part], begins[part + 1] - 1))] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(content)
        with pytest.raises(CorpusError, match=rf"shard-{number:05d}\.bin: "):
            open_shards(copy, verify=True)
        try:  # unverified, a row is read or the file is named: nothing else happens, and nothing out of range comes out
            rows = open_shards(copy)
            for row in range(len(rows) if part == 2 else 0):  # each alone: what the row before it says is not looked at
                rows[row]
            read = rows[:]
            assert read["tokens"].shape == read["document"].shape == (len(rows), 64)
            assert 0 <= read["tokens"].min() and read["tokens"].max() < 280 and read["document"].min() >= -1
        except CorpusError as error:
            assert path.name in str(error)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "", "not the index of shards"),
        (lambda text: text[:-30], "not the index of shards"),
        (lambda text: "[]", "not the index of shards"),
        (lambda text: '{"format": 3}', "format 3, but this version reads"),
        (lambda text: text.replace('"rows"', '"lines"', 1), "not the index of shards"),
        (lambda text: text.replace('"rows": ', '"rows": 1', 1), "damaged, its numbers do not agree"),
        (lambda text: text.replace('"length": 64', '"length": 65'), "damaged, its numbers"),
        (lambda text: text.replace('"window": 8', '"window": 9'), "foreign file"),
        (lambda text: text.replace('"complete": true', '"complete": false'), "not finished"),
    ],
)
def test_broken_index(copy, change, message):
    path = copy / "index.json"
    text = path.read_text()
    assert change(text) != text
    path.write_text(change(text))
    with pytest.raises(CorpusError, match=message):
        open_shards(copy)


def test_no_index(tmp_path, copy):
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(CorpusError, match=r"index\.json: missing. Give a folder"):
            open_shards(folder)
    (copy / "index.json").unlink()
    (copy / "index.json").mkdir()
    with pytest.raises(CorpusError, match="cannot be read"):
        open_shards(copy)


def test_another_tokenizer_is_told(whole, tokenizer):
    raw = Tokenizer.from_str(tokenizer.to_str())
    raw.enable_padding(length=7)  # which reading does not use
    assert len(open_shards(whole, tokenizer=raw))
    with pytest.raises(CorpusError, match="written with another tokenizer"):
        open_shards(whole, tokenizer=train_tokenizer(made_texts(20), 281))


def test_unreadable_shards(copy):
    refused_to(copy, lambda: open_shards(copy), "index.json: cannot be read")


# Reading


def test_rows_by_number(whole):
    rows = open_shards(whole)
    every = rows[:]
    assert {value.dtype for value in every.values()} == {torch.int64} and every["tokens"].shape == (len(rows), 64)
    for index in (0, 3, len(rows) - 1, -1, np.int64(5)):
        for name, value in rows[index].items():
            assert value.shape == (64,) and torch.equal(value, every[name][index])
    mixed = np.random.default_rng(0).integers(-len(rows), len(rows), 50)
    for index in (mixed, mixed.tolist(), torch.from_numpy(mixed), range(4), slice(2, None, 7), slice(-3, None), []):
        for name, value in rows[index].items():
            wanted = every[name][index if isinstance(index, slice) else np.asarray(index, np.int64)]
            assert torch.equal(value, wanted)
    for wrong in (len(rows), -len(rows) - 1, [0, len(rows)]):
        with pytest.raises(IndexError, match=f"there are {len(rows)} rows"):
            rows[wrong]
    assert sum(1 for _ in rows) == len(rows)


def test_rows_go_where_those_of_pack_go(whole):
    rows = open_shards(whole)
    tokens, document = token_batch(rows, np.array([9, 0, 9]))
    assert torch.equal(tokens[0], rows[9]["tokens"]) and torch.equal(document[1], rows[0]["document"])
    train, held_out = split_rows(rows, 5)
    assert len(train) + len(held_out) == len(rows)
    assert torch.equal(train[4]["tokens"], rows[5]["tokens"]) and torch.equal(held_out[0]["tokens"], rows[4]["tokens"])
    assert torch.equal(train.select([4, 5])[-1]["tokens"], rows[6]["tokens"])


def read_elsewhere(rows, indices):
    "What another process reads, as plain lists."
    return rows[indices]["tokens"].tolist()


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_rows_are_sent_to_other_processes(whole, start, monkeypatch):
    monkeypatch.chdir(whole.parent)
    rows = open_shards(whole.name)  # a relative name, which must not depend on where the other process stands
    expected = rows[[3, -1]]["tokens"].tolist()
    assert len(pickle.dumps(rows)) < 3000  # a name and the index, and no row, though some have been read
    monkeypatch.chdir("/")
    with ProcessPoolExecutor(1, mp_context=get_context(start)) as pool:
        assert pool.submit(read_elsewhere, rows, [3, -1]).result() == expected
        assert pool.submit(read_elsewhere, rows.select([3]), [0]).result() == expected[:1]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are counted in /proc")
def test_mapped_shards_keep_no_file_open(whole):
    rows = open_shards(whole)
    before = len(os.listdir("/proc/self/fd"))
    rows[:]
    assert len(rows._maps) == len(rows.shards) and len(os.listdir("/proc/self/fd")) == before


def test_a_shard_taken_away_while_in_use(copy):
    rows = open_shards(copy)
    (copy / "shard-00000.bin").unlink()
    with pytest.raises(CorpusError, match=r"shard-00000\.bin: cannot be mapped any more"):
        rows[0]


# Order


@pytest.mark.parametrize("rows", [*range(1, 40), 99, 100, 101, 1000, 4099])
def test_computed_order_is_a_permutation(rows):
    orders = [shuffled(np.arange(rows), rows, seed=seed, epoch=epoch) for seed, epoch in ((0, 0), (0, 1), (2**70, 3))]
    assert all(sorted(order) == list(range(rows)) for order in orders)
    if rows > 20:
        assert all(not np.array_equal(a, b) for a, b in itertools.combinations(orders, 2))


@given(st.integers(1, 2**62), st.integers(0, 2**70), st.integers(0, 2**40), st.data())
@EXAMPLES
def test_a_place_of_the_order_is_computed_alone(rows, seed, epoch, data):
    places = np.array(data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=20, unique=True)))
    found = shuffled(places, rows, seed=seed, epoch=epoch)
    assert found.dtype == np.int64 and 0 <= found.min() and found.max() < rows and len(set(found.tolist())) == len(places)
    for place, row in zip(places, found, strict=True):
        assert shuffled(np.array([place]), rows, seed=seed, epoch=epoch)[0] == row


def test_computed_order_looks_like_chance():
    "Against what chance gives: rows of a batch, neighbours, fixed points and agreement of two epochs."
    rows, places = 10**9, np.arange(200_000)
    first, second = (shuffled(places, rows, seed=7, epoch=epoch) for epoch in (0, 1))
    for values in (first, second, (second - first) % rows, np.diff(first) % rows, (first[::2] + second[1::2]) % rows):
        counts = np.bincount(values * 100 // rows, minlength=100)
        assert 55 < ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 155  # chi square, 99 degrees: 3.5 sigma
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 0.01 and abs(np.corrcoef(first, second)[0, 1]) < 0.01
    small = np.stack([shuffled(np.arange(7), 7, seed=seed, epoch=0) for seed in range(7000)])
    for place in range(7):  # each row is as often at each place
        assert abs(np.bincount(small[:, place], minlength=7) - 1000).max() < 130
    pairs = np.bincount(small[:, 0] * 7 + small[:, 1], minlength=49).reshape(7, 7)
    assert (np.diag(pairs) == 0).all() and abs(pairs[~np.eye(7, dtype=bool)] - 7000 / 42).max() < 60


def test_computed_order_is_the_same_on_every_machine():
    assert shuffled(np.arange(8), 8, seed=6198, epoch=3).tolist() == [0, 2, 1, 4, 3, 7, 6, 5]
    assert shuffled(np.array([0, 10**17]), 10**18, seed=6198, epoch=0).tolist() == [563873313862633810, 954515349356353675]


def test_places_that_are_none():
    for rows, places in ((0, []), (3, [3]), (3, [-1]), (2**62 + 1, [0])):
        with pytest.raises(CorpusError, match=f"rows={rows}"):
            shuffled(np.array(places, np.int64), rows, seed=0, epoch=0)


@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 2**40), st.integers(0, 2**40))
@EXAMPLES
def test_batches_of_many_rows_are_computed(rows, batch_size, seed, step):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "LARGEST_TABLE", 0)
        patch.setattr(corpus, "_order", None)
        steps = -(-3 * rows // batch_size)
        seen = np.concatenate([batch_indices(rows, batch_size, seed=seed, step=each) for each in range(steps)])
        assert all(sorted(seen[epoch * rows :][:rows]) == list(range(rows)) for epoch in range(3))
        halves = [batch_indices(rows, batch_size, seed=seed, step=2 * step + half) for half in (0, 1)]
        assert np.array_equal(np.concatenate(halves), batch_indices(rows, 2 * batch_size, seed=seed, step=step))


def test_a_trillion_rows_need_no_table():
    tracemalloc.start()
    found = batch_indices(10**12, 512, seed=0, step=10**15)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(found.tolist())) == 512 and found.max() < 10**12 and peak < 1 << 20


# Loading


def as_lists(loaded):
    "Batches as plain lists."
    return [(step, tokens.tolist(), document.tolist()) for step, tokens, document in loaded]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_batches_are_those_of_the_order(whole):
    rows = open_shards(whole)
    expected = []
    for step in range(3, 9):
        tokens, document = token_batch(rows, batch_indices(len(rows), 12, seed=5, step=step))
        expected.append((step, tokens.tolist(), document.tolist()))
    for workers in (0, 1, 3):
        assert as_lists(batches(rows, 12, seed=5, start_step=3, stop_step=9, workers=workers)) == expected
    endless = batches(rows, 12, seed=5, start_step=3, workers=2)
    assert as_lists(itertools.islice(endless, 6)) == expected
    shares = [as_lists(batches(rows, 12, seed=5, start_step=3, stop_step=9, share=(rank, 3), workers=rank)) for rank in range(3)]
    for number, (step, tokens, document) in enumerate(expected):
        parts = [share[number] for share in shares]
        assert {part[0] for part in parts} == {step} and {len(part[1]) for part in parts} == {4}
        assert sum((part[1] for part in parts), []) == tokens and sum((part[2] for part in parts), []) == document


def test_batches_of_packed_rows(tales, tokenizer, tmp_path):
    rows = pack(tales, tokenizer, 32, cache_dir=tmp_path)
    first, second = (as_lists(batches(rows, 4, seed=0, stop_step=4, workers=workers)) for workers in (0, 2))
    assert first == second and len(first) == 4


def test_loading_draws_no_random_number(whole):
    rows = open_shards(whole)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for workers in (0, 1):
        assert len(list(batches(rows, 4, seed=0, stop_step=2, workers=workers))) == 2
    assert torch.equal(torch.get_rng_state(), before)


def test_damage_is_named_by_a_worker(copy):
    rows = open_shards(copy)
    (copy / "shard-00000.bin").unlink()
    with pytest.raises(CorpusError, match=r"shard-00000\.bin"):
        list(batches(rows, len(rows), seed=0, stop_step=1, workers=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": (2, 2)}, r"share=\(2, 2\)"),
        ({"share": (-1, 2)}, r"share=\(-1, 2\)"),
        ({"share": (0, 5)}, "rows that can be divided"),
        ({"workers": -1}, "workers=-1"),
        ({"start_step": -1}, "step=-1"),
        ({"seed": -1}, "seed=-1"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_batches_that_cannot_be(whole, options, message):
    with pytest.raises(CorpusError, match=message):  # at once, not when the first batch is asked for
        batches(open_shards(whole), **{"batch_size": 8, "seed": 0, **options})


# Memory


def test_memory_does_not_grow_with_the_text(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "PIECE", 5000)
    peaks = []
    for count in (300, 1500):
        path = tmp_path / f"{count}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in made_texts(count)))
        tracemalloc.start()
        rows = write_shards(
            documents(path, streaming=True), tokenizer, tmp_path / str(count), 64, multiple_of=4, window=64, shard_tokens=20_000, fingerprint="x"
        )
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert rows.shards[-1]["rows"] > 0 and len(rows.shards) > 3
    assert peaks[1] < 1.3 * peaks[0], peaks


# Faults of text files, by the real thing


def refused_to(path, read, message):
    "A real refusal by the system: nobody may read `path`, and we are nobody."
    mode, user = path.stat().st_mode, os.geteuid()
    path.chmod(0)
    try:
        if not user:
            os.seteuid(65534)
        with pytest.raises(CorpusError, match=message):
            read()
    finally:
        os.seteuid(user)
        path.chmod(mode)


@pytest.fixture
def open_folder():
    "A folder that others may enter, which those of pytest are not."
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_file_that_the_system_refuses(open_folder, name):
    path = open_folder / name
    path.write_text('{"text": "a"}')
    found = documents(path, streaming=True)
    refused_to(path, lambda: list(found), rf"{name}: cannot be read \(.*Permission denied")


def test_folder_that_the_system_refuses(open_folder):
    inner = open_folder / "inner"
    inner.mkdir()
    (inner / "a.txt").write_text("a")
    refused_to(inner, lambda: documents(open_folder, streaming=True), r"inner: this folder cannot be read \(Permission denied")


def test_a_line_of_a_hundred_megabytes(tmp_path):
    "jsonl must be parsed by the line, so such a line is refused by its number, and never held whole."
    path = tmp_path / "a.jsonl"
    with open(path, "w") as file:
        file.write('{"text": "good"}\n{"text": "')
        file.writelines("x" * 1_000_000 for _ in range(100))
        file.write('"}\n{"text": "also good"}\n')
    tracemalloc.start()
    with pytest.raises(CorpusError, match=r"a\.jsonl, line 2: longer than 33,554,432 bytes.*\.txt"):
        list(documents(path, streaming=True))
    with pytest.warns(UserWarning, match="1 broken"):
        texts = [row["text"] for row in documents(path, streaming=True, broken="skip")]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert texts == ["good", "also good"] and peak < 2.5 * corpus.LONGEST_LINE, peak
