"Text files with every fault, lossless tokens, rows against plain lists, and an order without state."

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from cola_tutorial.config import END, PAD
from cola_tutorial.text import corpus
from cola_tutorial.text.corpus import (
    CorpusError,
    batch_indices,
    documents,
    documents_from,
    load_tokenizer,
    needed_vocabulary,
    pack,
    special_ids,
    split_rows,
    token_batch,
    train_tokenizer,
)

VERSE = "Tyger Tyger, burning bright,\nIn the forests of the night;\nWhat immortal hand or eye\nCould frame it?\n"
EXAMPLES = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@pytest.fixture(scope="session")
def tokenizer():
    "A small tokenizer."
    return train_tokenizer([VERSE], 300)


@pytest.fixture
def read(tmp_path):
    "Reads a source with a cache of its own and joins the pieces: a list of texts."

    def texts_of(source, **options):
        found = documents(source, cache_dir=tmp_path / "cache", **options)
        texts = []
        for row in found:
            texts += [""] * (row["document"] == len(texts))
            texts[row["document"]] += row["text"]
        return texts

    return texts_of


def written(path, content):
    "`path` with `content` in it."
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def table(path, **columns):
    "A parquet file."
    parquet.write_table(pa.table(columns), path)
    return path


# Tokenizer


@given(st.text())
@EXAMPLES
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize("text", ["  two  spaces ", "\r\n\t\n", "naïve 漢字 🐅", "\0\x07", " .", "it 's", "e\u0301"])
def test_awkward_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@given(st.lists(st.sampled_from([PAD, END, " ", "a", "<|", "|>", "endoftext"])).map("".join))
@EXAMPLES
def test_names_of_special_tokens_in_a_text_are_text(tokenizer, text):
    ids = tokenizer.encode(text).ids
    assert not {0, 1} & set(ids)
    assert tokenizer.decode(ids) == text


def test_ids_and_alphabet():
    tokenizer = train_tokenizer(["a"], 258)
    assert (tokenizer.get_vocab_size(), special_ids(tokenizer)) == (258, (0, 1))
    assert len(tokenizer.encode("é🐅").ids) == 2 + 4  # one token per byte of UTF-8


def test_same_texts_same_tokenizer():
    texts = [VERSE, VERSE.upper(), VERSE[::-1]]
    assert train_tokenizer(iter(texts), 400).to_str() == train_tokenizer(iter(texts), 400).to_str()


def test_first_text_is_learned_too():
    assert len(train_tokenizer(iter(["tiger " * 9]), 300).encode("tiger").ids) == 1


@pytest.mark.parametrize(
    ("texts", "size", "message"), [(["a"], 257, "at least 258"), ([], 300, "empty"), ("abc", 300, "list of texts")]
)
def test_tokenizer_cannot_be_trained(texts, size, message):
    with pytest.raises(CorpusError, match=message):
        train_tokenizer(texts, size)


def test_tokenizer_loads_from_file_and_folder(tokenizer, tmp_path):
    other = Tokenizer.from_str(tokenizer.to_str())
    other.enable_truncation(2)
    other.enable_padding(length=9)
    other.save(str(tmp_path / "tokenizer.json"))
    text = VERSE + END
    for path in (tmp_path, tmp_path / "tokenizer.json", str(tmp_path)):
        assert load_tokenizer(path).encode(text).ids == tokenizer.encode(text).ids


@pytest.mark.parametrize("content", [b"", b"{}", b"{", b"\xff\xfe", b'{"model": 3}', b"[]"])
def test_no_tokenizer(tmp_path, content):
    with pytest.raises(CorpusError, match=r"x\.json: not a tokenizer"):
        load_tokenizer(written(tmp_path / "x.json", content))


def test_missing_tokenizer(tmp_path):
    for path in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(CorpusError, match="cannot be read"):
            load_tokenizer(path)


def test_a_given_tokenizer_gets_the_special_tokens_that_it_lacks(tmp_path):
    other = Tokenizer(models.BPE({"a": 0, "b": 1, END: 7}, []))
    other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    other.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path, add=True)
    pad, end = special_ids(loaded)
    assert end == 7 and pad not in (0, 1, 7) and loaded.encode("ab").ids == [0, 1]
    assert needed_vocabulary(loaded) == max(pad, end) + 1 > loaded.get_vocab_size()


def test_tokenizer_with_other_names(tmp_path):
    other = Tokenizer(models.BPE({"<pad>": 0, "</s>": 1, "a": 2}, []))
    other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    other.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CorpusError, match=r"tokenizer\.json.*no token <\|pad\|> and no <\|endoftext\|>.*pad="):
        load_tokenizer(tmp_path)
    loaded = load_tokenizer(tmp_path, pad="<pad>", end="</s>")
    assert special_ids(loaded, pad="<pad>", end="</s>") == (0, 1)
    rows = pack(documents_from(lambda: ["aa"], "aa", cache_dir=tmp_path), loaded, 4, pad="<pad>", end="</s>")
    assert rows["tokens"][:].tolist() == [[2, 2, 1, 0]]


# Good files


def test_kinds_of_files(read, tmp_path):
    written(tmp_path / "b.txt", "one text\nof two lines\n")
    written(tmp_path / "a.jsonl", '{"text": "first"}\n{"text": "second", "more": [1]}')
    folder = tmp_path / "in"
    folder.mkdir()
    table(folder / "c.PARQUET", text=["third", "fourth"])
    written(tmp_path / ".hidden.txt", "hidden")
    written(tmp_path / "notes.md", "no text file")
    expected = ["first", "second", "one text\nof two lines\n", "third", "fourth"]
    assert read(tmp_path) == expected
    assert read([tmp_path / "b.txt", str(folder)]) == expected[2:]
    assert [row["text"] for row in documents(str(tmp_path), streaming=True)] == expected


def test_column_can_be_named(read, tmp_path):
    written(tmp_path / "a.jsonl", '{"story": "first"}')
    table(tmp_path / "b.parquet", story=pa.array(["second"], pa.large_string()), text=["no"])
    assert read(tmp_path, text_column="story") == ["first", "second"]


def test_line_ends_become_newlines(read, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "BLOCK", 3)  # so that a block ends between \r and \n
    text = "\ufeffa\r\nb\r\n\r\nc\rd\n"
    written(tmp_path / "a.txt", text)
    written(tmp_path / "b.jsonl", json.dumps({"text": text[1:]}) + "\r\n")
    table(tmp_path / "c.parquet", text=[text[1:]])
    assert read(tmp_path) == ["a\nb\n\nc\nd\n"] * 3


def test_changed_file_is_read_again(read, tmp_path):
    path = written(tmp_path / "a.txt", "before")
    assert read(path) == ["before"]
    assert read(written(path, "after!")) == ["after!"]


def test_same_file_is_not_read_again(tmp_path, monkeypatch):
    path = written(tmp_path / "a.txt", VERSE)
    documents(path, cache_dir=tmp_path)
    monkeypatch.setattr(corpus, "_decoded", None)
    assert documents(path, cache_dir=tmp_path)["text"][:] == [VERSE]


def test_parquet_in_small_groups(read, tmp_path):
    texts = [f"text {number}" for number in range(100)]
    parquet.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=7, data_page_size=16)
    assert read(tmp_path) == texts


WORDS = ["Tyger", "burning", " the", " night", " of", " bright,", "\n", "  ", " 1", "'s", " Ä", " In the forests"]


@given(st.lists(st.sampled_from(WORDS), max_size=60), st.data())
@EXAMPLES
def test_pieces_join_to_the_document_and_change_no_token(tokenizer, words, data):
    text, size = "".join(words), data.draw(st.integers(24, 60))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    blocks = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    pieces = list(corpus._cut(blocks, size))
    assert [last for _, last in pieces] == [False] * (len(pieces) - 1) + [True] * bool(pieces)
    assert all(len(piece) <= size for piece, _ in pieces)
    joined = "".join(piece for piece, _ in pieces)
    assert bool(pieces) == bool(text.strip())
    if pieces:
        assert text.endswith(joined) and text[: len(text) - len(joined)].strip() == ""
    runs = re.findall(r"\s+|\S+", text)
    if max(map(len, runs), default=0) <= size // 2 - 1:  # what is longer than a piece must be cut inside
        parts = [token for piece, _ in pieces for token in tokenizer.encode(piece).ids]
        assert parts == tokenizer.encode(joined).ids


def test_long_document_in_pieces(tmp_path):
    text = VERSE * 8000
    found = documents(written(tmp_path / "a.txt", text), cache_dir=tmp_path)
    assert "".join(found["text"]) == text
    assert found["last"][:] == [False] * (len(found) - 1) + [True]
    assert set(found["document"]) == {0} and max(map(len, found["text"])) <= 1 << 20


# Faults


FAULTY_TEXTS = {
    "bad UTF-8": (b"good\r\nline \xff\n", "line 2: not UTF-8"),
    "cut UTF-8": (b"one\ntwo\n\xf0\x9f", "line 3: not UTF-8"),
    "NUL": (b"a\nb\nc\0\n", "line 3: a NUL"),
    "UTF-16": ("text".encode("utf-16-le"), "line 1: a NUL"),
}


@pytest.mark.parametrize(("content", "message"), FAULTY_TEXTS.values(), ids=FAULTY_TEXTS)
@pytest.mark.parametrize("block", [1, 4, 1 << 18])
def test_broken_text_file(read, tmp_path, monkeypatch, content, message, block):
    monkeypatch.setattr(corpus, "BLOCK", block)
    path = written(tmp_path / "a.txt", content)
    with pytest.raises(CorpusError, match=f"a.txt, {message}"):
        read(path)
    with pytest.raises(CorpusError, match=f"a.txt, {message}"):
        list(documents(path, streaming=True))
    written(tmp_path / "b.txt", "good")
    with pytest.warns(UserWarning, match=rf"0 empty and 1 broken \(the first: .*{message}.*; 1 remain"):
        assert read(tmp_path, broken="skip") == ["good"]


def test_nothing_of_a_broken_text_is_kept(read, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "BLOCK", 8)
    monkeypatch.setattr(corpus, "PIECE", 8)
    written(tmp_path / "a.txt", VERSE.encode() + b"\xff")
    written(tmp_path / "b.txt", "good")
    with pytest.warns(UserWarning, match="1 broken"):
        assert read(tmp_path, broken="skip") == ["good"]


FAULTY_LINES = {
    "no JSON": (b'{"text": "cut', "broken line"),
    "no object": (b'["text"]', "a list, where an object"),
    "bad UTF-8": (b'{"text": "\xff"}', "broken line, not UTF-8"),
    "nested too deep": (b"[" * 100_000, "broken line"),
    "no such column": (b'{"story": "a"}', r"no column 'text', only \['story'\].*text_column="),
    "number": (b'{"text": 3}', "the text is of type int"),
    "NUL": (b'{"text": "a\\u0000b"}', "a NUL"),
    "half a pair": (b'{"text": "\\ud800"}', "half of a surrogate"),
    "UTF-16": ('{"text": "a"}'.encode("utf-16-le"), "broken line"),
}


@pytest.mark.parametrize(("content", "message"), FAULTY_LINES.values(), ids=FAULTY_LINES)
def test_broken_line(read, tmp_path, content, message):
    path = written(tmp_path / "a.jsonl", b'{"text": "good"}\n\n' + content + b'\n{"text": "also good"}\n')
    with pytest.raises(CorpusError, match=f"a.jsonl, line 3: {message}"):
        read(path)
    with pytest.warns(UserWarning, match=rf"1 empty and 1 broken \(the first: .*line 3: {message}.*; 2 remain"):
        assert read(path, broken="skip") == ["good", "also good"]


def test_line_that_is_too_long(read, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "LONGEST_LINE", 40)  # the line end counts
    lines = [json.dumps({"text": "a" * size}) for size in (27, 28, 500, 3)]
    path = written(tmp_path / "a.jsonl", "\n".join(lines))
    with pytest.raises(CorpusError, match=r"line 2: longer than 40 bytes.*\.txt"):
        read(path)
    with pytest.warns(UserWarning, match="2 broken"):
        assert read(path, broken="skip") == ["a" * 27, "aaa"]


@pytest.mark.parametrize("keep", [3, 100, 0.5, -5])
def test_truncated_parquet(read, tmp_path, keep):
    path = table(tmp_path / "a.parquet", text=[f"text {number}" for number in range(1000)])
    content = path.read_bytes()
    written(path, content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    for broken in ("raise", "skip"):
        with pytest.raises(CorpusError, match=r"a\.parquet: not a whole parquet file"):
            read(path, broken=broken)


def test_parquet_with_spoiled_page(read, tmp_path):
    path = tmp_path / "a.parquet"
    texts = [f"{number} " * 50 for number in range(3000)]
    parquet.write_table(pa.table({"text": texts}), path, row_group_size=1000, compression="zstd", use_dictionary=False)
    content = bytearray(path.read_bytes())
    for place in range(len(content) // 2, len(content) // 2 + 64):
        content[place] ^= 0xFF
    written(path, bytes(content))
    with pytest.raises(CorpusError, match=r"a\.parquet: not a whole parquet file; broken after row 1000"):
        read(path)


def test_parquet_row_that_is_no_text(read, tmp_path):
    raw = pa.array([b"good", b"\xff"], pa.binary()).view(pa.string())
    with pytest.raises(CorpusError, match="a.parquet, row 2: not UTF-8"):
        read(table(tmp_path / "a.parquet", text=raw))
    with pytest.raises(CorpusError, match="b.parquet, row 2: a NUL"):
        read(table(tmp_path / "b.parquet", text=["a", "b\0"]))
    with pytest.raises(CorpusError, match="c.parquet, row 1: the text is of type int"):
        read(table(tmp_path / "c.parquet", text=[1]))
    with pytest.raises(CorpusError, match=r"d.parquet: no column 'text', only \['story'\]"):
        read(table(tmp_path / "d.parquet", story=["a"]))


@pytest.mark.parametrize("content", ["", " \n\t\n", "\ufeff"])
def test_empty_text_is_left_out_and_counted(read, tmp_path, content):
    path = written(tmp_path / "a.txt", content)
    with pytest.raises(CorpusError, match="No text is left in .*: 1 empty"):
        read(path)
    written(tmp_path / "b.txt", "good")
    with pytest.warns(UserWarning, match="1 empty and 0 broken documents; 1 remain"):
        assert read(tmp_path) == ["good"]


def test_empty_rows_are_left_out_and_counted(read, tmp_path):
    written(tmp_path / "a.jsonl", '{"text": "good"}\n\n{"text": " "}\n{"text": null}\n')
    written(tmp_path / "b.jsonl", "")
    table(tmp_path / "c.parquet", text=["", None, "good too"])
    table(tmp_path / "d.parquet", text=pa.array([], pa.string()))
    with pytest.warns(UserWarning, match="7 empty and 0 broken documents; 2 remain"):
        assert read(tmp_path) == ["good", "good too"]


def test_good_text_gives_no_warning(read, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(written(tmp_path / "a.txt", VERSE)) == [VERSE]


def test_a_mile_of_white_space_before_the_text(read, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "PIECE", 8)
    assert read(written(tmp_path / "a.txt", " " * 20 + "words")) == [" " * 4 + "words"]


def test_nothing_to_read(read, tmp_path):
    for path, message in [
        (tmp_path / "none.txt", r"none\.txt: cannot be read"),
        ([tmp_path / "none.jsonl"], r"none\.jsonl: cannot be read"),
        (tmp_path / "no folder", "no folder: cannot be read"),
        ("a\0b", "cannot be read"),
        ([], "empty list"),
        (written(tmp_path / "a.pdf", "%PDF"), r"a\.pdf: not one of \.txt"),
        (tmp_path, "a folder without text"),
    ]:
        for streaming in (False, True):
            with pytest.raises(CorpusError, match=message):
                documents(path, streaming=streaming, cache_dir=tmp_path / "cache")


def test_what_cannot_be_opened(read, tmp_path):
    (tmp_path / "x.txt").mkdir()
    with pytest.raises(CorpusError, match="x.txt: a folder without text"):
        read(tmp_path / "x.txt")
    written(tmp_path / "x.txt" / "y.txt", "good")
    assert read(tmp_path) == ["good"]
    (tmp_path / "lost.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CorpusError, match=r"lost\.txt: cannot be read"):
        read(tmp_path)
    with pytest.raises(CorpusError, match="null: not an ordinary file"):
        read("/dev/null")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_unreadable_file(read, tmp_path, monkeypatch, name):
    path = written(tmp_path / name, "text")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(corpus, "open", refuse, raising=False)
    monkeypatch.setattr(corpus.parquet, "ParquetFile", refuse)
    with pytest.raises(CorpusError, match=f"{name}: .*Permission denied"):
        read(path)


def test_unreadable_folder(read, tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(corpus.os, "scandir", refuse)
    with pytest.raises(CorpusError, match=r"folder cannot be read \(Permission denied"):
        read(tmp_path)


def test_unknown_choice_for_broken(read, tmp_path):
    with pytest.raises(CorpusError, match="broken='ignore'"):
        read(written(tmp_path / "a.txt", "a"), broken="ignore")


def test_after_an_error_nothing_half_is_kept(read, tmp_path):
    path = written(tmp_path / "a.jsonl", '{"text": "good"}\n' * 3 + "{")
    for _ in range(2):
        with pytest.raises(CorpusError, match="line 4"):
            read(path)


def test_settings_of_datasets_stay_as_they_were(tmp_path):
    for switch, shown in ((datasets.enable_progress_bars, True), (datasets.disable_progress_bars, False)):
        switch()
        with pytest.raises(CorpusError):
            documents(written(tmp_path / "a.txt", ""), cache_dir=tmp_path)
        assert datasets.are_progress_bars_disabled() is not shown
    datasets.enable_progress_bars()


def test_no_progress_bar_is_shown(tmp_path, tokenizer, capfd):
    found = documents(written(tmp_path / "a.txt", VERSE), cache_dir=tmp_path)
    split_rows(pack(found, train_tokenizer([VERSE], 300), 8, cache_dir=tmp_path))
    assert capfd.readouterr() == ("", "")


# Hub datasets


@pytest.fixture
def hub(monkeypatch):
    "A hub with one dataset; notes what was asked for."
    asked = []

    def load_dataset(path, name=None, *, split, streaming):
        asked.append((path, name, split, streaming))
        if path != "org/tales":
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset {path!r} doesn't exist on the Hub")
        rows = datasets.Dataset.from_dict({"text": ["first", " ", "second\r\n"], "id": [1, 2, 3]})
        return rows.to_iterable_dataset() if streaming else rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_dataset(hub, tmp_path, streaming):
    with pytest.warns(UserWarning, match="1 empty"):
        rows = list(documents("org/tales:old", split="test", streaming=streaming, cache_dir=tmp_path))
    assert hub == [("org/tales", "old", "test", streaming)]
    assert rows == [
        {"text": "first", "document": 0, "last": True},
        {"text": "second\n", "document": 1, "last": True},
    ]


def test_hub_dataset_that_cannot_be_had(hub, tmp_path):
    with pytest.raises(CorpusError, match="org/none: no file or folder here, and not to be had"):
        documents("org/none")
    with pytest.raises(CorpusError, match=r"no column 'story', only \['id', 'text'\]"):
        documents("org/tales", text_column="story")
    with pytest.raises(CorpusError, match="row 1: the text is of type int"):
        documents("org/tales", text_column="id", cache_dir=tmp_path)


def test_a_folder_here_goes_before_the_hub(hub, read, tmp_path, monkeypatch):
    (tmp_path / "org" / "tales").mkdir(parents=True)
    written(tmp_path / "org" / "tales" / "a.txt", "here")
    monkeypatch.chdir(tmp_path)
    assert read("org/tales") == ["here"] and hub == []
    with pytest.raises(CorpusError, match="none.txt: cannot be read"):
        read("org/none.txt")


def test_texts_that_are_made(tmp_path):
    calls = []

    def texts():
        calls.append(1)
        yield from ["one", "", "two"]

    with pytest.warns(UserWarning, match="1 empty"):
        first = documents_from(texts, "1, 2", cache_dir=tmp_path)
    second = documents_from(texts, "1, 2", cache_dir=tmp_path)
    assert first[:] == second[:] == {"text": ["one", "two"], "document": [0, 1], "last": [True, True]}
    assert len(calls) == 1
    with pytest.raises(CorpusError, match="text 1: the text is of type int"):
        documents_from(lambda: [3], "3", cache_dir=tmp_path)
    with pytest.raises(CorpusError, match="No text is left"):
        documents_from(list, "none", cache_dir=tmp_path)


# Rows


def plain_rows(texts, tokenizer, length, layout):
    "Rows by plain lists: every document to its end, cut, filled up."
    streams = [[]]
    for number, text in enumerate(texts):
        ids = tokenizer.encode(text).ids
        if layout == "stream":
            streams[0] += [(token, number) for token in [*ids, 1]]
        else:
            streams.append([(token, number) for token in (ids if len(ids) % length == 0 else [*ids, 1])])
    tokens, owners = [], []
    for stream in streams:
        for start in range(0, len(stream), length):
            row = stream[start : start + length]
            names = sorted({number for _, number in row})
            gap = length - len(row)
            tokens.append([token for token, _ in row] + [0] * gap)
            owners.append([names.index(number) for _, number in row] + [-1] * gap)
    return tokens, owners


TEXTS = st.lists(st.text("ab, Ä\n", min_size=1, max_size=30).filter(str.strip), min_size=1, max_size=8)


@given(TEXTS, st.integers(1, 12), st.sampled_from(["stream", "document"]), st.integers(10, 40))
@settings(EXAMPLES, max_examples=200)
def test_rows_are_those_of_plain_lists(tokenizer, texts, length, layout, piece):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "PIECE", piece)  # how many texts are encoded together
        pieces = [{"text": text, "last": True} for text in texts]
        rows = list(corpus._packed(pieces, tokenizer, length, layout, 0, 1))
    tokens, owners = plain_rows(texts, tokenizer, length, layout)
    assert [row["tokens"].tolist() for row in rows] == tokens
    assert [row["document"].tolist() for row in rows] == owners


@pytest.mark.parametrize("length", [1, 7, 64])
@pytest.mark.parametrize("layout", ["stream", "document"])
def test_stored_rows_are_those_of_plain_lists(tokenizer, tmp_path, length, layout):
    texts = [VERSE[start:] for start in range(0, 40, 3)]
    found = documents_from(lambda: texts, "texts", cache_dir=tmp_path)
    rows = pack(found, tokenizer, length, layout=layout, cache_dir=tmp_path)
    tokens, owners = plain_rows(texts, tokenizer, length, layout)
    assert rows["tokens"][:].tolist() == tokens
    assert rows["document"][:].tolist() == owners


def test_warning_names_the_line_that_asked(tmp_path):
    with pytest.warns(UserWarning, match="1 empty") as told:
        documents_from(lambda: ["a", ""], "a and nothing", cache_dir=tmp_path)
    assert told[0].filename == __file__


@pytest.mark.parametrize("layout", ["stream", "document"])
def test_document_in_many_pieces(tokenizer, tmp_path, monkeypatch, layout):
    texts = [VERSE, "a", VERSE * 3]
    found = documents_from(lambda: texts, "texts", cache_dir=tmp_path)
    whole = pack(found, tokenizer, 16, layout=layout, cache_dir=tmp_path)
    monkeypatch.setattr(corpus, "PIECE", 32)
    found = documents_from(lambda: texts, "texts", cache_dir=tmp_path)
    rows = pack(found, tokenizer, 16, layout=layout, cache_dir=tmp_path)
    assert len(found) > 12
    for name in ("tokens", "document"):
        assert torch.equal(rows[name][:], whole[name][:])


def test_small_rows_by_hand(tmp_path):
    tokenizer = train_tokenizer(["a"], 258)
    a, b = (tokenizer.token_to_id(letter) for letter in "ab")
    found = documents_from(lambda: ["aaa", "bb", "aaaaa"], "hand", cache_dir=tmp_path)
    stream, single = (pack(found, tokenizer, 4, layout=layout, cache_dir=tmp_path) for layout in ("stream", "document"))
    assert stream["tokens"][:].tolist() == [[a, a, a, 1], [b, b, 1, a], [a, a, a, a], [1, 0, 0, 0]]
    assert stream["document"][:].tolist() == [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0], [0, -1, -1, -1]]
    assert single["tokens"][:].tolist() == [[a, a, a, 1], [b, b, 1, 0], [a, a, a, a], [a, 1, 0, 0]]
    assert single["document"][:].tolist() == [[0, 0, 0, 0], [0, 0, 0, -1], [0, 0, 0, 0], [0, 0, -1, -1]]


def test_end_alone_makes_no_row(tmp_path, tokenizer):
    tokenizer = train_tokenizer(["a"], 258)
    found = documents_from(lambda: ["aaaa", "bb"], "exact", cache_dir=tmp_path)
    rows = pack(found, tokenizer, 4, layout="document", cache_dir=tmp_path)
    assert (rows["tokens"][:] == 1).sum(1).tolist() == [0, 1]


def test_text_cannot_end_a_document(tmp_path):
    text = f"one{END}two{PAD}"
    tokenizer = Tokenizer.from_str(train_tokenizer([text], 300).to_str())  # a fresh one reads names as special tokens
    assert tokenizer.encode(END).ids == [1]
    rows = pack(documents_from(lambda: [text], text, cache_dir=tmp_path), tokenizer, 64, cache_dir=tmp_path)
    tokens, document = rows["tokens"][0], rows["document"][0]
    assert (tokens[document == 0] == 1).sum() == 1 and (tokens[document == 0] == 0).sum() == 0
    assert tokenizer.encode(END).ids == [1]  # the caller's tokenizer is as it was


def test_padding_and_cutting_of_the_tokenizer_are_off(tmp_path, tokenizer):
    other = Tokenizer.from_str(tokenizer.to_str())
    other.enable_padding(length=50)
    other.enable_truncation(3)
    found = documents_from(lambda: [VERSE, "a"], "verse", cache_dir=tmp_path)
    rows = [pack(found, each, 8, cache_dir=tmp_path)["tokens"][:] for each in (tokenizer, other)]
    assert torch.equal(*rows)


def test_what_the_tokenizer_puts_around_a_text_is_left_out(tmp_path, tokenizer):
    other = Tokenizer.from_str(tokenizer.to_str())
    other.post_processor = processors.TemplateProcessing(single=f"{END} $A {END}", special_tokens=[(END, 1)])
    found = documents_from(lambda: [VERSE, "a"], "verse", cache_dir=tmp_path)
    rows = [pack(found, each, 8, cache_dir=tmp_path)["tokens"][:] for each in (tokenizer, other)]
    assert torch.equal(*rows)


def test_rows_come_from_the_cache(tmp_path, tokenizer, monkeypatch):
    found = documents_from(lambda: [VERSE], "verse", cache_dir=tmp_path)
    rows = pack(found, tokenizer, 8, cache_dir=tmp_path)
    larger = train_tokenizer([VERSE], 310)
    assert len(pack(found, larger, 8, cache_dir=tmp_path)) != len(rows)
    assert pack(found, tokenizer, 4, cache_dir=tmp_path)["tokens"][:].shape[1] == 4
    monkeypatch.setattr(corpus, "_encoded", None)
    assert pack(found, tokenizer, 8, cache_dir=tmp_path)._fingerprint == rows._fingerprint
    assert str(tmp_path) in rows.cache_files[0]["filename"]


def test_streamed_documents_give_the_same_rows(tmp_path, tokenizer, monkeypatch):
    path = written(tmp_path / "a.txt", VERSE * 20)
    rows = pack(documents(path, cache_dir=tmp_path), tokenizer, 32, cache_dir=tmp_path)["tokens"][:]
    streamed = documents(path, streaming=True)
    for name in (None, "verse"):
        assert torch.equal(pack(streamed, tokenizer, 32, fingerprint=name, cache_dir=tmp_path)["tokens"][:], rows)
    monkeypatch.setattr(corpus, "_encoded", None)
    pack(streamed, tokenizer, 32, fingerprint="verse", cache_dir=tmp_path)


def test_kinds_of_columns(tmp_path, tokenizer):
    rows = pack(documents_from(lambda: [VERSE], "verse", cache_dir=tmp_path), tokenizer, 8, cache_dir=tmp_path)
    assert {str(field.type) for field in rows.data.schema} == {"fixed_size_list<item: int32>[8]"}
    assert rows[0]["tokens"].dtype == rows[0]["document"].dtype == torch.int64


@pytest.mark.parametrize(
    ("length", "options", "message"),
    [
        (0, {}, "length=0"),
        (-4, {}, "length=-4"),
        (10, {"multiple_of": 4}, "length=10: must be a positive multiple of 4"),
        (4, {"multiple_of": 0}, "positive multiple of 0"),
        (4, {"layout": "rows"}, "layout='rows'"),
        (4, {"pad": "[PAD]"}, r"no token \[PAD\]"),
    ],
)
def test_rows_cannot_be_made(tmp_path, tokenizer, length, options, message):
    found = documents_from(lambda: ["a"], "a", cache_dir=tmp_path)
    with pytest.raises(CorpusError, match=message):
        pack(found, tokenizer, length, cache_dir=tmp_path, **options)


def test_nothing_to_pack(tmp_path, tokenizer):
    found = documents_from(lambda: ["a"], "a", cache_dir=tmp_path)
    with pytest.raises(CorpusError, match="No tokens"):
        pack(found.select([]), tokenizer, 8, cache_dir=tmp_path)
    with pytest.raises(CorpusError, match="pack takes what documents"):
        pack(found.remove_columns("last"), tokenizer, 8, cache_dir=tmp_path)


# Split and order


@given(st.integers(2, 200), st.integers(2, 40))
@EXAMPLES
def test_split_is_whole_and_disjoint(count, every):
    train, validation = split_rows(datasets.Dataset.from_dict({"number": range(count)}), every)
    held_out = [n for n in range(count) if (n + 1) % every == 0] or [count - 1]
    assert list(validation["number"]) == held_out
    assert sorted([*train["number"], *held_out]) == list(range(count))


def test_rows_cannot_be_split():
    for count in (0, 1):
        with pytest.raises(CorpusError, match=f"{count} rows cannot"):
            split_rows(datasets.Dataset.from_dict({"number": range(count)}))
    with pytest.raises(CorpusError, match="every=1"):
        split_rows(datasets.Dataset.from_dict({"number": range(9)}), 1)


@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 2**40))
@EXAMPLES
def test_each_epoch_is_a_permutation(rows, batch_size, seed):
    steps = -(-3 * rows // batch_size)
    seen = np.concatenate([batch_indices(rows, batch_size, seed=seed, step=step) for step in range(steps)])
    assert all(sorted(seen[epoch * rows :][:rows]) == list(range(rows)) for epoch in range(3))


@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 2**40), st.integers(0, 2**40))
@EXAMPLES
def test_a_batch_needs_only_seed_and_step(rows, batch_size, seed, step):
    corpus._order.cache_clear()
    alone = batch_indices(rows, batch_size, seed=seed, step=step)
    assert alone.shape == (batch_size,) and alone.dtype == np.int64
    for other in (step + 1, 0, step):
        again = batch_indices(rows, batch_size, seed=seed, step=other)
    assert np.array_equal(alone, again)
    halves = [batch_indices(rows, batch_size, seed=seed, step=2 * step + half) for half in (0, 1)]
    double = batch_indices(rows, 2 * batch_size, seed=seed, step=step)
    assert np.array_equal(np.concatenate(halves), double)  # the order does not depend on the size of a batch


def test_order_changes_with_seed_and_epoch():
    first, second = (batch_indices(100, 100, seed=1, step=step) for step in (0, 1))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, batch_indices(100, 100, seed=2, step=0))


def test_order_is_the_same_on_every_machine():
    assert batch_indices(8, 8, seed=6198, step=3).tolist() == [4, 7, 5, 0, 3, 6, 2, 1]


def test_a_batch_may_be_changed():
    batch = batch_indices(10, 10, seed=0, step=0)
    batch[:] = 0
    assert sorted(batch_indices(10, 10, seed=0, step=0)) == list(range(10))


@pytest.mark.parametrize("wrong", [{"rows": 0}, {"batch_size": 0}, {"seed": -1}, {"step": -1}])
def test_batch_cannot_be_drawn(wrong):
    right = {"rows": 3, "batch_size": 2, "seed": 0, "step": 0}
    with pytest.raises(CorpusError, match=rf"{next(iter(wrong))}=.*at least"):
        batch_indices(**{**right, **wrong})


def test_batch_of_tokens(tmp_path, tokenizer):
    rows = pack(documents_from(lambda: [VERSE] * 3, "verses", cache_dir=tmp_path), tokenizer, 8, cache_dir=tmp_path)
    indices = np.array([4, 0, 4])
    tokens, document = token_batch(rows, indices)
    assert tokens.shape == document.shape == (3, 8) and tokens.dtype == document.dtype == torch.int64
    assert torch.equal(tokens, torch.stack([rows[int(index)]["tokens"] for index in indices]))
    assert torch.equal(document, torch.stack([rows[int(index)]["document"] for index in indices]))
    train, _ = split_rows(rows, 2)
    assert torch.equal(token_batch(train, [1])[0][0], rows[2]["tokens"])


# Memory

MEASURE = """
import re, sys
from cola_tutorial.text.corpus import documents, pack, train_tokenizer
# getrusage would count the peak of the process that started this one
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) // 1024
cache, short, *paths = sys.argv[1:]
start = peak()
for path in paths:
    print(sum(len(row["text"]) for row in documents(path, streaming=True)), peak() - start)
print(sum(len(row["text"]) for row in documents(paths[0], cache_dir=cache)), peak() - start)
tokenizer = train_tokenizer(["some words to learn from"], 270)
print(len(pack(documents(short, cache_dir=cache), tokenizer, 512, cache_dir=cache)), peak() - start)
"""


def measured(*paths):
    "What MEASURE prints in a process of its own: pairs of a length and how far memory has grown by then in MiB."
    command = [sys.executable, "-c", MEASURE, *map(str, paths)]
    root = Path(__file__).resolve().parent.parent
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    return [tuple(map(int, line.split())) for line in result.stdout.splitlines()]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_stays_small(tmp_path):
    names = ("words.txt", "letters.txt", "rows.jsonl", "rows.parquet", "short.txt")
    words, letters, lines, table_path, short = (tmp_path / name for name in names)
    for path, word, size in ((words, "word ", 100), (letters, "x", 100), (short, "word", 5)):
        with open(path, "w") as file:
            file.writelines(word * (1_000_000 // len(word)) for _ in range(size))
    texts = [f"{number} " * (100_000 // len(f"{number} ")) for number in range(1000, 2000)]
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    parquet.write_table(pa.table({"text": texts}), table_path, write_batch_size=10)
    results = measured(tmp_path / "cache", short, words, letters, lines, table_path)
    assert [size for size, _ in results[:5]] == [100_000_000] * 5
    growths = [growth for _, growth in results]
    assert max(growths[:2]) < 60 and max(growths[2:4]) < 100, growths
    assert max(growths) < 300, growths  # the mapped file of 100 MB counts too
