"The harness's own front door finds what the model writes and scores; every request counts every token once."

import json
import logging
import math
import os

os.environ.setdefault("TQDM_DISABLE", "1")

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from cola_tutorial.config import GenerationConfig, LikelihoodConfig, data_dir
from cola_tutorial.generation import Generation, generate
from cola_tutorial.harness import HarnessError, HarnessModel, _divided, _request_config
from cola_tutorial.model import ColaDLM
from cola_tutorial.tasks import item_seed
from cola_tutorial.text.stories import Grammar

logging.disable(logging.WARNING)
MODEL, GRAMMAR = ColaDLM.from_pretrained(data_dir() / "pretrained"), Grammar.load()
TOM = "Tom lived near the mill with his sister. One sunny morning, he took a walk. He had often dreamed of dancing."


class Bound:
    "A likelihood, as `score` gives it."

    def __init__(self, value): self.value = value


class Known:
    "A model with simple answers: each token costs its id in nats, the likeliest text is a row of sevens; it remembers what it was asked."

    tokenizer = MODEL.tokenizer
    generation = GenerationConfig(max_length=40, temperature=1.0)

    def __init__(self): self.scored, self.written = [], []

    def score(self, prompts, continuations, ended=True, samples=8, seed=0, batch_size=32):
        assert all(continuations) and len(prompts) == len(continuations)
        self.scored += zip(prompts, continuations)
        self.how = ended, samples, seed, batch_size
        return [Bound(-float(sum(ids))) for ids in continuations]

    def generate(self, prompts, config=None, seeds=None):
        rows = [[]] * prompts if isinstance(prompts, int) else prompts
        assert all(rows) or isinstance(prompts, int)
        self.written += zip(rows, [config] * len(rows), seeds)
        return Generation([str(seed) for seed in seeds], [[7] * config.max_new_tokens] * len(rows), ["length"] * len(rows), [])


def ids(text): return MODEL.tokenizer.encode(text, add_special_tokens=False).ids


def ask(kind, *args): return Instance(kind, {}, args, 0, ("task", 0, 1))


def until(adapter, *asked): return adapter.generate_until([ask("generate_until", *one) for one in asked])


def likely(adapter, *asked): return adapter.loglikelihood([ask("loglikelihood", *one) for one in asked])


# The harness's own way in


def ending(number, other):
    "A story as far as the word that says again who waits at home, that word, and another."
    story = GRAMMAR.story(23, number, "validation")
    right = story.choices["helper"]
    options = [right, other] if number % 2 else [other, right]
    return {"story": story.text[: story.text.rindex(right)].rstrip(), "options": options, "answer": options.index(right)}


ENDINGS = [ending(number, "cousin") for number in range(3)]
COMMON = {"test_split": "test", "dataset_path": "json", "num_fewshot": 0, "doc_to_text": "{{story}}", "metadata": {"version": 1.0}}
MEAN = {"aggregation": "mean", "higher_is_better": True}
FILTER = {"name": "word", "filter": [{"function": "regex", "regex_pattern": r"(\w+)"}, {"function": "take_first"}]}
SETTINGS = {
    "choose": {"output_type": "multiple_choice", "doc_to_choice": "{{options}}", "doc_to_target": "answer", "metric_list": [{"metric": "acc", **MEAN}]},
    "write": {
        "output_type": "generate_until",
        "doc_to_target": "{{options[answer]}}",
        "generation_kwargs": {"until": [" the", "."], "max_gen_toks": 8, "do_sample": False},
        "filter_list": [FILTER],
        "metric_list": [{"metric": "exact_match", **MEAN}],
    },
    "read": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{story}}",
        "metric_list": [{"metric": name} for name in ("word_perplexity", "bits_per_byte")],
    },
}


@pytest.fixture
def tasks(tmp_path):
    "A folder with three tasks as the harness wants them, and a manager that knows no others."
    rows = tmp_path / "endings.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ENDINGS))
    data = {"dataset_kwargs": {"data_files": {"test": str(rows)}, "cache_dir": str(tmp_path / "cache")}}
    for name, own in SETTINGS.items(): (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(COMMON | data | own | {"task": name}))
    return TaskManager(include_path=str(tmp_path), include_defaults=False)


def test_the_harness_scores_what_the_shipped_model_writes(tasks):
    "The filtered first word counts; each text is what generation gives for the request's seed, and ends before the stop strings."
    adapter = HarnessModel(MODEL, batch_size=2)
    found = simple_evaluate(adapter, tasks=["write"], task_manager=tasks, bootstrap_iters=0)
    assert found["results"]["write"]["exact_match,word"] == 1
    told = found["config"]
    assert (told["model_kind"], told["seed"], told["contexts_cut"]) == ("ColaDLM", 0, 0)
    assert told["model_num_parameters"] == sum(MODEL.sizes().values())
    config = _request_config(SETTINGS["write"]["generation_kwargs"], MODEL.generation, 32)
    for row, sample in zip(ENDINGS, found["samples"]["write"], strict=True):
        ((text,),) = sample["resps"]
        assert text == generate(MODEL, [row["story"]], config, [item_seed(0, f"1 {row['story']}")]).texts[0]
        assert text and " the" not in text and "." not in text and sample["filtered_resps"] == [row["options"][row["answer"]]]


def test_the_harness_chooses_by_what_the_model_scores(tasks):
    model = Known()
    found = simple_evaluate(HarnessModel(model, samples=3, seed=4, batch_size=5), tasks=["choose"], task_manager=tasks, bootstrap_iters=0)
    price = lambda word: sum(ids(f" {word}"))
    taken = [min((0, 1), key=lambda at: price(row["options"][at])) for row in ENDINGS]
    assert found["results"]["choose"]["acc,none"] == sum(at == row["answer"] for at, row in zip(taken, ENDINGS)) / 3
    for row, sample in zip(ENDINGS, found["samples"]["choose"], strict=True):
        assert [one[0][0] for one in sample["resps"]] == [-price(word) for word in row["options"]]
    assert model.how == (False, 3, 4, 5)


def test_the_harness_chooses_by_the_bounds_of_the_shipped_model(tasks, monkeypatch):
    "What it is told is what `score` gives for the tokens of context and continuation."
    monkeypatch.setattr(MODEL, "scoring", LikelihoodConfig(solver="euler", steps=4, trace="rademacher"))
    found = simple_evaluate(HarnessModel(MODEL, samples=2, check_greedy=False), tasks=["choose"], task_manager=tasks, bootstrap_iters=0, limit=2)
    assert found["results"]["choose"]["acc,none"] == 1
    pairs = [(ids(row["story"]), ids(f" {word}")) for row in ENDINGS[:2] for word in row["options"]]
    wanted = [one.value for one in MODEL.score(*zip(*pairs), ended=False, samples=2)]
    told = [one[0][0] for sample in found["samples"]["choose"] for one in sample["resps"]]
    assert told == pytest.approx(wanted, abs=1e-3)
    (whole,) = HarnessModel(MODEL, samples=2).loglikelihood_rolling([ask("loglikelihood_rolling", "Tom lived near the mill")])
    (wanted,) = MODEL.score([""], ["Tom lived near the mill"], ended=False, samples=2)
    assert whole == pytest.approx(wanted.value, abs=1e-3)


def test_the_harness_measures_whole_texts(tasks):
    found = simple_evaluate(HarnessModel(Known()), tasks=["read"], task_manager=tasks, bootstrap_iters=0)["results"]["read"]
    nats = sum(sum(ids(row["story"])) for row in ENDINGS)
    assert found["word_perplexity,none"] == pytest.approx(math.exp(nats / sum(len(row["story"].split()) for row in ENDINGS)))
    assert found["bits_per_byte,none"] == pytest.approx(nats / sum(len(row["story"].encode()) for row in ENDINGS) / math.log(2))


def test_the_harness_cache_asks_once(tasks, tmp_path):
    results, asked = [], []
    for _ in range(2):
        model = Known()
        again = {"tasks": list(SETTINGS), "task_manager": tasks, "bootstrap_iters": 0, "use_cache": str(tmp_path / "answers")}
        results.append(simple_evaluate(HarnessModel(model), **again)["results"])
        asked.append(len(model.scored) + len(model.written))
    assert results[0] == results[1] and asked[0] > 0 == asked[1]


# How to write


@pytest.mark.parametrize(
    "given_options, wanted",
    [
        ({}, {"max_new_tokens": 32, "temperature": 0.0, "stop": ()}),
        ({"until": "\n"}, {"stop": ("\n",)}),
        ({"until": ["\n\n", "Q:", ""]}, {"stop": ("\n\n", "Q:")}),
        ({"until": None}, {"stop": ()}),
        ({"max_gen_toks": 5, "max_new_tokens": 6}, {"max_new_tokens": 5}),
        ({"max_gen_toks": None, "max_tokens": 6}, {"max_new_tokens": 6}),
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"temperature": 0.5}, {"temperature": 0.5}),
        ({"temperature": 0.5, "do_sample": False}, {"temperature": 0.0}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 3, "min_p": 0.1}, {"temperature": 0.7, "top_p": 0.9, "top_k": 3, "min_p": 0.1}),
        ({"repetition_penalty": 1.2, "top_k": None}, {"repetition_penalty": 1.2, "top_k": 4}),
    ],
)
def test_options_of_a_request_are_translated(given_options, wanted):
    ours = GenerationConfig(steps=3, temperature=0.9, top_k=4, stop=("old",), stop_tokens=(5,), num_blocks=2)
    config = _request_config(given_options, ours, 32)
    assert (config.steps, config.stop_tokens, config.num_blocks) == (3, (), None)
    for name, value in wanted.items(): assert getattr(config, name) == value


@pytest.mark.parametrize(
    "given_options, words",
    [
        ({"num_beams": 2}, "'num_beams' means nothing here"),
        ({"until": [3]}, "until is [3]"),
        ({"max_gen_toks": 0}, "max_new_tokens is 0"),
        ({"max_gen_toks": 40}, "40 tokens are asked for, but the model's rows have 40"),
        ({"top_p": 2.0}, "top_p is 2.0"),
    ],
)
def test_options_that_mean_nothing_are_named(given_options, words):
    model = Known()
    with pytest.raises(ValueError) as error: until(HarnessModel(model), ("Tom", {}), ("Tom", given_options))
    assert words in str(error.value) and not model.written


def test_a_text_ends_before_every_stop_string():
    "With the same noise, so it is the beginning of the text that nothing stops; without special treatment of any string."
    adapter = HarnessModel(MODEL, new_tokens=40)
    (whole,) = until(adapter, (TOM, {}))
    for stops in (["."], [" a"], ["He", "ing"], ["e", "\n"], [whole[5:9]], ["nowhere in it"]):
        (text,) = until(adapter, (TOM, {"until": stops}))
        assert text == whole[: min([whole.find(stop) for stop in stops if stop in whole], default=len(whole))]


def test_requests_do_not_know_each_other():
    "Any order and batch gives the same texts; the same request, made again, another one; another seed others."
    asked = [(TOM, {"max_gen_toks": 6}), ("Nora lived", {"max_gen_toks": 9}), ("", {"max_gen_toks": 6}), ("Ben", {"until": ["."], "max_gen_toks": 6})]
    texts = until(HarnessModel(MODEL, batch_size=1), *asked)
    assert all(texts) and until(HarnessModel(MODEL, batch_size=8), *reversed(asked)) == texts[::-1]
    model = Known()
    first = until(HarnessModel(model), ("Tom", {}), ("Tom", {}), ("Tom", {"until": "x"}), ("Ben", {}))
    assert len({*first}) == 3 and first[2] == first[0], "other stop strings change no noise"
    assert first == until(HarnessModel(Known()), ("Tom", {}), ("Tom", {}), ("Tom", {"until": "x"}), ("Ben", {}))
    assert not {*first} & {*until(HarnessModel(Known(), seed=1), ("Tom", {}), ("Ben", {}))}


def test_contexts_without_room_are_cut_from_the_left_and_counted():
    model = Known()
    adapter, long = HarnessModel(model), ids(TOM * 3)
    until(adapter, (TOM * 3, {"max_gen_toks": 30}), ("Tom", {}))
    assert [row for row, *_ in model.written] == [long[-10:], ids("Tom")] and adapter.cut == 1
    likely(adapter, (TOM * 3, " sister"), (TOM * 3, " sister in law"))
    assert [prompt for prompt, _ in model.scored] == [long[-40 + len(ids(word)) :] for word in (" sister", " sister in law")]
    assert adapter.get_model_info()["contexts_cut"] == 3
    fits = MODEL.tokenizer.decode(long[:10])
    until(adapter, (fits, {"max_gen_toks": 30}))
    likely(adapter, (MODEL.tokenizer.decode(long[:39]), " sister"))
    assert adapter.cut == 3


# How probable


@given(st.text(max_size=20), st.text(min_size=1, max_size=9))
@settings(max_examples=200, deadline=None)
def test_context_and_continuation_are_the_whole(context, continuation):
    "Together they are the text's own tokens; the continuation has at least its own characters, and the spaces before them."
    before, rest = _divided(HarnessModel(Known()), context, continuation)
    whole = ids(context + continuation)
    assert rest and (before + rest == whole or len(whole) > 40)
    assert MODEL.tokenizer.decode(rest).endswith(continuation) or "\ufffd" in MODEL.tokenizer.decode(rest)


PAIRS = [("Tom lived", " near"), ("Tom lived ", "near"), ("Tom lived  ", " near"), ("", "Tom"), (" ", "Tom"), ("Tom", "")]


@pytest.mark.parametrize("context, continuation", PAIRS)
def test_spaces_belong_to_the_continuation(context, continuation):
    before, rest = _divided(HarnessModel(Known()), context, continuation)
    assert before == ids(context.rstrip()) and before + rest == ids(context + continuation)


def test_an_empty_continuation_is_certain_and_a_long_one_is_refused():
    adapter = HarnessModel(Known())
    assert likely(adapter, ("Tom", ""))[0] == (0.0, True)
    assert likely(adapter, (TOM * 3, ""))[0] == (0.0, True)
    assert likely(adapter) == adapter.loglikelihood_rolling([]) == until(adapter) == []
    with pytest.raises(HarnessError, match="a continuation has 41 tokens, but the model's rows have 40"): likely(adapter, ("", "x" * 41))
    assert likely(adapter, ("", "x" * 40))[0][0] == -40 * ids("x")[0]


def test_greedy_is_what_the_model_writes():
    "From the noise of one seed, in one writing for each context."
    adapter, context = HarnessModel(MODEL, seed=3), f"{TOM} At the mill, his"
    adapter.model = type("Both", (), {"tokenizer": MODEL.tokenizer, "generate": staticmethod(MODEL.generate), "score": Known().score})()
    config = _request_config({"max_gen_toks": 6}, MODEL.generation, 32)
    tokens = generate(MODEL, [context], config, [item_seed(3, tuple(ids(context)))]).tokens[0]
    written = [MODEL.tokenizer.decode(tokens[:n]) for n in (1, 3, 6)]
    assert [greedy for _, greedy in likely(adapter, *[(context, text) for text in [*written, " anvil", written[1] + " anvil"]])] == [True] * 3 + [False] * 2
    model = Known()
    sevens = MODEL.tokenizer.decode([7, 7])
    found = likely(HarnessModel(model), ("Tom", sevens), ("Tom", " lived"), ("Ben", " lived"))
    assert [greedy for _, greedy in found] == [ids(sevens) == [7, 7], False, False]
    assert [(row, config.temperature) for row, config, _ in model.written] == [(ids("Tom"), 0.0), (ids("Ben"), 0.0)]
    model = Known()
    assert likely(HarnessModel(model, check_greedy=False), ("Tom", sevens))[0][1] is False and not model.written


@given(st.integers(1, 200))
@settings(max_examples=50, deadline=None)
def test_a_whole_text_is_scored_once_token_by_token(length):
    "Parts follow each other, each behind what stands before it, and none is longer than a row."
    model = Known()
    text = MODEL.tokenizer.decode([10 + number % 80 for number in range(length)])
    (value,) = HarnessModel(model).loglikelihood_rolling([ask("loglikelihood_rolling", text)])
    whole, at = ids(text), 0
    for prompt, part in model.scored:
        assert part == whole[at : at + len(part)] and prompt == whole[at - len(prompt) : at]
        assert len(prompt) + len(part) <= 40 and (at == 0 or len(prompt) >= 20)
        at += len(part)
    assert at == len(whole) and value == -sum(whole)


def test_what_cannot_be_asked_is_named():
    class Mute(Known):
        score = property()

    class Blind(Known):
        tokenizer = None

    with pytest.raises(HarnessError, match="Mute has no score"): likely(HarnessModel(Mute()), ("Tom", " lived"))
    with pytest.raises(HarnessError, match="no tokenizer"): HarnessModel(Blind())
    for name in ("new_tokens", "batch_size", "samples"):
        with pytest.raises(HarnessError, match=f"{name} is 0"): HarnessModel(Known(), **{name: 0})
