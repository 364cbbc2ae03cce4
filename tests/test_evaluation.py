"""The story scores: intervals, the chi-square test and the judge, each against something independent."""

import json
from pathlib import Path
from random import Random

import pytest
import torch
from scipy import stats

from cola_tutorial.config import ConfigError, data_dir
from cola_tutorial.evaluation import (
    Continuation,
    chi_square_p,
    choice_fit,
    contradicts_prompt,
    evaluate_stories,
    holm,
    story_prompt,
    story_scores,
    wilson,
)
from cola_tutorial.model import ColaDLM
from cola_tutorial.text.stories import Grammar


@pytest.fixture(scope="module")
def grammar():
    return Grammar.load()


def told(grammar, n, split="validation"):
    stories = [grammar.story(3, i, split) for i in range(n)]
    return [Continuation(story_prompt(s.text), s.text[len(story_prompt(s.text)) :]) for s in stories]


@pytest.mark.parametrize("hits, n", [(0, 7), (3, 10), (480, 500), (500, 500)])
def test_wilson_agrees_with_scipy(hits, n):
    theirs = stats.binomtest(hits, n).proportion_ci(0.95, method="wilson")
    assert wilson(hits, n, stats.norm.ppf(0.975)) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


def test_wilson_refuses_no_trials():
    with pytest.raises(ConfigError, match="n is 0"):
        wilson(0, 0)


def test_chi_square_agrees_with_scipy():
    rng = Random(1)
    for size in (2, 4, 10):
        weights = torch.tensor([rng.random() + 0.1 for _ in range(size)]).double()
        p, counts = weights / weights.sum(), torch.tensor([float(rng.randint(1, 60)) for _ in range(size)]).double()
        theirs = stats.chisquare(counts.numpy(), (p * counts.sum()).numpy()).pvalue
        assert chi_square_p(counts, p) == pytest.approx(theirs, rel=1e-9)


def test_holm_is_stricter_for_the_smallest():
    assert holm({"a": 0.004, "b": 0.004, "c": 0.9}, 0.01) == []
    assert holm({"a": 0.003, "b": 0.004, "c": 0.9}, 0.01) == ["a", "b"]


def test_true_stories_get_full_marks_and_strangers_do_not(grammar):
    scores = story_scores(grammar, told(grammar, 60))
    assert scores["parses"].value == scores["consistent"].value == 1.0
    assert scores["parses"].chance < 0.2 and scores["consistent"].chance < 0.5


def test_a_changed_helper_contradicts_the_prompt(grammar):
    for number in range(30):
        story = grammar.story(5, number, "validation")
        other = "uncle" if story.choices["helper"] != "uncle" else "aunt"
        prompt = story_prompt(story.text)
        rest = story.text[len(prompt) :]
        assert not contradicts_prompt(grammar, Continuation(prompt, rest))
        assert contradicts_prompt(grammar, Continuation(prompt, rest.replace(story.choices["helper"], other)))


def test_open_choices_of_the_grammar_fit_and_a_favourite_does_not(grammar):
    fits = choice_fit(grammar, told(grammar, 400, None))
    assert holm({name: fit.p_value for name, fit in fits.items()}) == []
    foxes = [c for c in told(grammar, 800, None) if "fox" in c.text or "goat" in c.text]
    assert "animal" in holm({name: fit.p_value for name, fit in choice_fit(grammar, foxes).items()})


def test_the_shipped_evaluation_can_be_repeated_in_part():
    shipped = json.loads((data_dir() / "pretrained" / "evaluation.json").read_text())
    assert {"value", "low", "high", "n"} <= set(shipped["reconstruction"])
    assert shipped["parses"]["n"] == shipped["consistent"]["n"] == shipped["reconstruction"]["n"] == 500
    assert shipped["reconstruction"]["value"] >= 0.99 and shipped["parses"]["value"] >= 0.95 and shipped["consistent"]["value"] >= 0.9
    assert shipped["rejected"] == []
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    assert f"{shipped['parses']['value']:.1%} of its continuations are stories" in readme
    few = evaluate_stories(ColaDLM.from_pretrained(data_dir() / "pretrained"), n=40)
    for name in ("reconstruction", "parses", "consistent"):
        assert few[name]["high"] >= shipped[name]["low"] and few[name]["low"] <= shipped[name]["high"], name
