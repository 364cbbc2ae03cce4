"The comparison of Cola DLM and its rivals: what is equal, what is asked, what is written down, what is drawn."

import json
import math
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from scipy import stats

from cola_tutorial.compare import (
    CompareConfig,
    Measure,
    compare_models,
    cut_at_word,
    entrants,
    last_answers,
    over_seeds,
    paper_and_found,
    read_measures,
    repeated,
    run_unit,
    speed_at_equal_quality,
    train_all,
    true_nats,
    write_comparison,
    write_measures,
)
from cola_tutorial.config import ConfigError, Stage1Config, Stage2Config, data_dir, preset
from cola_tutorial.costs import training_flops
from cola_tutorial.text.corpus import load_tokenizer
from cola_tutorial.text.stories import Grammar

SMALL = dict(dim=32, ffn_dim=64, num_heads=2, encoder_num_blocks=1, decoder_num_blocks=1, emb_dim=32, head_dim=16, num_layers=1, rope_dim=8)
QUICK = CompareConfig(changes=SMALL, seeds=(1, 2), steps1=4, steps2=4, batch_size=4, stories=60, points=2, n=4, scored=2, samples=2)
WORDS = ["the", "small", "boat", "sailed", "over", "a", "quiet", "lake", "and", "came", "home", "late"]


def answer(model: str, seed: int, step: int, name: str, value: float, steps: int = 0, flops: float = 1e12) -> Measure:
    "A result without an interval."
    return Measure(model, seed, step, flops, steps, name, value, value, value, 10)


# What is equal


def test_everybody_may_spend_the_same() -> None:
    "The operations of all steps, counted for each model from its own sizes, differ by less than one step."
    config, cola = CompareConfig(), preset("tiny", vocab_size=860)
    found, tokens = entrants(config, cola, 80), 32 * 80
    run = config.run("cola", 66)
    both = [sum(training_flops(cola, 80, stage).values()) for stage in (run.stage1, run.stage2)]
    budget = tokens * (config.steps1 * both[0] + config.steps2 * both[1])
    for entrant in found.values():
        spent = entrant.spent(entrant.steps, tokens)
        assert abs(spent - budget) <= 0.51 * tokens * entrant.flops_per_token
    assert found["cola"].parameters > found["ar"].parameters and found["ar"].core == found["llada"].core == found["plaid"].core


def test_all_see_the_same_rows_in_the_same_order() -> None:
    "Loops differ in nothing but their steps; seeds change the order too."
    config = CompareConfig()
    loops = [config.run("cola", 66).stage2, *(config.run(kind, 66).rival for kind in ("ar", "llada", "plaid"))]
    for name in ("batch_size", "data_seed", "seed", "optimizer", "schedule", "weight_decay", "beta1", "beta2", "clip_norm", "ema_decay", "warmup_steps"):
        assert len({getattr(loop, name) for loop in loops}) == 1, name
    assert config.run("ar", 67).rival.data_seed != config.run("ar", 66).rival.data_seed


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(models=("cola", "gpt")), "models is"),
        (dict(models=()), "models is"),
        (dict(seeds=(1, 1)), "seeds is"),
        (dict(points=9, steps2=4), "points is 9"),
        (dict(n=0), "n is 0"),
        (dict(scored=True), "scored is True"),
    ],
)
def test_wrong_comparisons_are_named(changes: dict, said: str) -> None:
    "Before anything is trained."
    with pytest.raises(ConfigError, match=said): CompareConfig(**changes)


# What is asked


def test_repetition_is_counted() -> None:
    "Runs of four that stood before, by hand."
    assert repeated([1, 2, 3]) == 0.0
    assert repeated([1, 2, 3, 4, 5, 6]) == 0.0
    assert repeated([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert repeated([7] * 10) == pytest.approx(6 / 7)


def test_rows_are_cut_where_a_word_ends() -> None:
    "What follows begins with white space, and nothing is lost."
    tokenizer = load_tokenizer(data_dir() / "pretrained" / "tokenizer.json")
    row = tokenizer.encode(" ".join(WORDS * 3), add_special_tokens=False).ids
    before, follows = cut_at_word(tokenizer, row)
    assert tokenizer.decode(before) + follows == tokenizer.decode(row)
    assert follows.startswith(" ") and follows.split()[0] in WORDS


def test_the_truth_per_token_is_the_grammars() -> None:
    "The mean of log-probabilities, story by story."
    tokenizer, grammar = load_tokenizer(data_dir() / "pretrained" / "tokenizer.json"), Grammar.load()
    stories = [grammar.story(3, i, "validation").text for i in range(5)]
    each = [-grammar.log_prob(text) / (len(tokenizer.encode(text, add_special_tokens=False).ids) + 1) for text in stories]
    value, low, high, n = true_nats(tokenizer, replace(QUICK, scored=5))
    assert value == pytest.approx(statistics.mean(each)) and n == 5
    assert high - value == pytest.approx(1.96 * statistics.stdev(each) / math.sqrt(5)) == pytest.approx(value - low)


# What is written down


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    "Six digits, and no other loss."
    made = [answer("ar", 1, 5, "parses", 1 / 3), answer("cola", 2, 7, "task: fact, far", 0.25, 16)]
    write_measures(tmp_path / "r.csv", made)
    for one, other in zip(made, read_measures(tmp_path / "r.csv"), strict=True):
        assert (one.model, one.seed, one.step, one.steps, one.name, one.n) == (other.model, other.seed, other.step, other.steps, other.name, other.n)
        assert other.value == pytest.approx(one.value, rel=1e-5)
    (tmp_path / "bad.csv").write_text("model,seed\nar,1\n")
    with pytest.raises(ConfigError, match="bad.csv is no table of results"): read_measures(tmp_path / "bad.csv")


@pytest.mark.parametrize("values", [[0.1, 0.4, 0.3], [1.0, 2.0], [0.5] * 5])
def test_intervals_over_seeds_are_students(values: list[float]) -> None:
    "As another library has them."
    mean, half = over_seeds(values)
    error = statistics.stdev(values) / math.sqrt(len(values))
    assert mean == pytest.approx(statistics.mean(values))
    assert half == pytest.approx(stats.t.ppf(0.975, len(values) - 1) * error, rel=1e-3)
    assert over_seeds([0.3])[1] == math.inf


def test_speed_is_compared_where_all_are_equally_good() -> None:
    "The worst of the best qualities is the measure; the fastest way that reaches it counts."
    told = [("ar", 1, 0.9, 1.0), ("cola", 4, 0.5, 0.2), ("cola", 8, 0.8, 0.4), ("cola", 16, 0.95, 0.8), ("llada", 10, 0.6, 2.0), ("llada", 20, 0.7, 4.0)]
    measures = [m for k, s, q, t in told for m in (answer(k, 1, 5, "parses by steps", q, s), answer(k, 1, 5, "time by steps", t, s))]
    common, best = speed_at_equal_quality(measures)
    assert common == 0.7 and {k: p.steps for k, p in best.items()} == {"ar": 1, "cola": 8, "llada": 20}
    worthless = [m for t, n in ((0.0, "parses by steps"), (0.1, "time by steps")) for m in (answer("plaid", 1, 5, n, t, 16),)]
    assert speed_at_equal_quality(measures + worthless) == (common, best)
    found = paper_and_found([answer(k, 1, 5, "parses", 0.5) for k in ("cola", "ar", "llada", "plaid")] + measures + worthless)
    assert "Plaid not at all" in found[-1][2] and "LLaDA 4.00 times" in found[-1][2]
    assert speed_at_equal_quality(worthless) == (0.0, {})
    with pytest.raises(ConfigError, match="no speeds"): speed_at_equal_quality([])


# A whole comparison


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "All four models, two seeds, a few steps; trained in this process, so that it stays small."
    from cola_tutorial.training import prepare

    out = tmp_path_factory.mktemp("comparison")
    cola, rows, _ = prepare(QUICK.run("cola", 1))
    found = entrants(QUICK, cola.config, len(rows[0]["tokens"]))
    for seed in QUICK.seeds:
        for entrant in found.values(): run_unit(QUICK, entrant, seed, out)
    compare_models(QUICK, out, jobs=1, machine="a test", report=lambda line: None)
    return out


def test_every_model_is_asked_on_the_way_and_at_the_end(compared: Path) -> None:
    "Results of all, the truth among them, in one table."
    measures = read_measures(compared / "results.csv")
    assert {m.model for m in measures} == {"cola", "ar", "llada", "plaid", "truth"}
    for kind in QUICK.models:
        for seed in QUICK.seeds:
            mine = [m for m in measures if (m.model, m.seed) == (kind, seed) and not m.name.endswith("by steps")]
            assert len({m.step for m in mine}) == 2
            last = {m.name: m for m in mine if m.step == max(m.step for m in mine)}
            assert {"parses", "consistent", "nats per token"} < last.keys() and any(name.startswith("task: ") for name in last)
            assert last["nats per token"].value > 0.5 and 0 <= last["parses"].value <= 1
    assert {m.steps for m in measures if m.name == "time by steps" and m.model == "cola"} == {4, 8, 16, 32}
    record = json.loads((compared / "comparison.json").read_text())
    assert record["machine"] == "a test" and record["minutes"] >= 0 and set(record["entrants"]) == set(QUICK.models)


def test_the_page_shows_it_all(compared: Path) -> None:
    "Tables, three figures, the paper's claims; nothing from a network."
    page = (compared / "comparison.html").read_text()
    for names in ("http://www.w3.org", "http://purl.org", "http://creativecommons.org"): page = page.replace(names, "")  # names, not addresses
    assert page.count("<svg") == 3 and "http://" not in page
    for words in ("Who takes part", "Fig. 10", "LLaDA", "the grammar", "a test"): assert words in page
    claims = paper_and_found(read_measures(compared / "results.csv"))
    assert len(claims) == 5 and all("Cola DLM" in found or "steps" in found for *_, found in claims)


def test_what_is_done_is_not_done_again(compared: Path) -> None:
    "A second call trains nothing and gives the same answers; another comparison is refused."
    before = (compared / "ar-1" / "measures.csv").stat().st_mtime_ns
    told = []
    train_all(replace(QUICK, models=("ar",)), compared, jobs=1, report=told.append)
    assert (compared / "ar-1" / "measures.csv").stat().st_mtime_ns == before and told == []
    with pytest.raises(ConfigError, match="n: 4 then, 5 now"): compare_models(replace(QUICK, n=5), compared, jobs=1)
    again = write_comparison(compared, compared / "again.html")
    assert again.read_text().count("<tr>") == (compared / "comparison.html").read_text().count("<tr>")


def test_units_can_be_trained_side_by_side(tmp_path: Path) -> None:
    "Two processes give the numbers that one gives."
    config, told = replace(QUICK, models=("ar",), seeds=(5, 6), n=2, scored=1), []
    train_all(config, tmp_path / "two", jobs=2, report=told.append)
    train_all(config, tmp_path / "one", jobs=1, report=told.append)
    assert len(told) == 4 and sorted(line.split(": ")[1].split(",")[0] for line in told) == ["ar-5", "ar-5", "ar-6", "ar-6"]
    for seed in config.seeds:
        one, two = (read_measures(tmp_path / name / f"ar-{seed}" / "measures.csv") for name in ("one", "two"))
        assert one == two


PARENT = """
import multiprocessing, os, signal
from concurrent.futures import ProcessPoolExecutor
from cola_tutorial.compare import _leave_with_parent
with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _leave_with_parent) as pool:
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(signal.pause).result()
"""


def test_workers_leave_with_their_parent() -> None:
    "A comparison that is killed leaves no training behind: what was printed to ends when the last process has."
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert int(parent.stdout.readline()) != parent.pid
        parent.kill()
        assert parent.communicate(timeout=60)[0] == ""


def test_text_without_a_grammar_is_asked_too(tmp_path: Path) -> None:
    "Rows of any text: probability, first word, repetition."
    text = tmp_path / "text.txt"
    text.write_text(" ".join(WORDS * 1500))
    config = replace(QUICK, source=str(text), models=("ar", "cola"), seeds=(1,), points=1)
    from cola_tutorial.training import prepare

    model, rows, _ = prepare(config.run("cola", 1))
    found = entrants(config, model.config, len(rows[0]["tokens"]))
    for entrant in found.values(): run_unit(config, entrant, 1, tmp_path / "out")
    for kind in config.models:
        answers = {m.name: m for m in read_measures(tmp_path / "out" / f"{kind}-1" / "measures.csv")}
        assert answers.keys() == {"first word", "repeated", "nats per token"}
        assert all(math.isfinite(m.value) and m.low <= m.value <= m.high for m in answers.values())


def test_stage_settings_are_the_shipped_models() -> None:
    "The recipe of the shipped model decides what Cola DLM's stages are."
    run = CompareConfig().run("cola", 66)
    assert isinstance(run.stage1, Stage1Config) and isinstance(run.stage2, Stage2Config)
    assert run.stage1.beta == 3e-5 and run.stage2.time_loc == 1.0


# What is shipped


@pytest.mark.parametrize("name", ["stories", "wikitext-2"])
def test_shipped_comparisons_are_whole(name: str, tmp_path: Path) -> None:
    "Small files; all models with at least three seeds, asked alike and under the same budget; a page that they draw."
    folder = data_dir() / "comparisons" / name
    files = [path for path in folder.iterdir() if path.name != "comparison.html"]  # which a reader may have drawn
    assert {path.name for path in files} == {"comparison.json", "results.csv"}
    assert sum(path.stat().st_size for path in files) < 100_000
    record, measures = json.loads((folder / "comparison.json").read_text(encoding="utf-8")), read_measures(folder / "results.csv")
    config = CompareConfig(**record["config"])
    assert config.models == ("cola", "ar", "llada", "plaid") and len(config.seeds) >= 3
    assert record["machine"] and record["minutes"] > 0 and record["entrants"].keys() == {*config.models}
    last = last_answers(measures)
    for question, by_model in last.items():
        assert {m.seed for answers in by_model.values() for m in answers if m.model != "truth"} == {*config.seeds}, question
        assert {*by_model} - {"truth"} == {*config.models}, question
    ends = {model: {m.flops for m in measures if m.model == model and m.flops} for model in config.models}
    assert max(map(max, ends.values())) / min(map(max, ends.values())) < 1.01
    assert all(m.low <= m.value <= m.high for m in measures)
    page = write_comparison(folder, tmp_path / "page.html")
    assert page.stat().st_size < 2**20 and page.read_text(encoding="utf-8").count("<svg") == 3


def test_a_shipped_autoregressive_model_reaches_the_corpuss_entropy() -> None:
    "Within three percent of what the same stories cost the grammar, with its best seed; and no model claims to know more than the grammar."
    last = last_answers(read_measures(data_dir() / "comparisons" / "stories" / "results.csv"))["nats per token"]
    truth = last["truth"][0].value
    assert min(m.value for m in last["ar"]) < 1.03 * truth
    for model in ("cola", "ar", "llada", "plaid"): assert all(m.value > truth for m in last[model])
    stories = CompareConfig(scored=last["truth"][0].n)
    assert true_nats(load_tokenizer(data_dir() / "pretrained"), stories)[0] == pytest.approx(truth, rel=0.02)
