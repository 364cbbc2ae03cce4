"The story grammar, held against brute force: small grammars are spelled out by a few lines that share no code with it."

import hashlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from copy import deepcopy
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cola_tutorial.config import data_dir
from cola_tutorial.text.stories import Grammar, GrammarError

TINY = {
    "choices": {
        "hero": {"Mia": {"weight": 3, "subject": "she"}, "Tom": {"weight": 1, "subject": "he"}},
        "colour": {"red": 1, "dark red": 1, "blue": 2},
        "ending": {"good": 2, "bad": 1},
    },
    "local": {"weather": {"sunny": 2, "rainy": 1}},
    "slots": [
        {"name": "opening", "templates": {"{hero} had a {colour} kite.": 1}},
        {"name": "middle", "templates": {"{Hero.subject} ran. It was {weather}.": 1, "{Weather} was the day.": 3}},
        {"name": "end", "by": "ending", "templates": {"good": {"All was well.": 1}, "bad": {"It tore.": 1, "Rip!": 2}}},
        {"name": "last", "templates": {"The {colour} kite was gone.": 1}},
    ],
}
REFERENCE = re.compile(r"\{(\w+)\.?(\w*)\}")


def row_of(spec: dict, name: str, value: str) -> dict:
    row = spec["choices"][name][value]
    return row if isinstance(row, dict) else {"weight": row}


def spell(spec: dict, template: str, choices: dict[str, str] | None) -> list[tuple[str, float]]:
    "All ways to fill a template, with probabilities; with choices None, every reference takes every form."
    texts = [("", 1.0)]
    at = 0
    for found in REFERENCE.finditer(template):
        name, attribute = found[1], found[2]
        plain = name[0].lower() + name[1:]
        if plain in spec.get("local", {}):
            table = spec["local"][plain]
            options = [(word, weight / sum(table.values())) for word, weight in table.items()]
        else:
            values = [choices[plain]] if choices else list(spec["choices"][plain])
            forms = [row_of(spec, plain, value)[attribute] if attribute else value for value in values]
            options = [(form, 1.0) for form in dict.fromkeys(forms)]
        if name != plain:
            options = [(form[0].upper() + form[1:], p) for form, p in options]
        fixed = template[at : found.start()]
        texts = [(text + fixed + form, p * q) for text, p in texts for form, q in options]
        at = found.end()
    return [(text + template[at:], p) for text, p in texts]


def spell_all(spec: dict) -> list[tuple[str, float, dict]]:
    "Every derivation of a small grammar: text, probability, choices."
    every = []
    names = list(spec["choices"])
    for values in itertools.product(*(spec["choices"][name] for name in names)):
        choices = dict(zip(names, values))
        prob = 1.0
        for name, value in choices.items():
            weights = {v: row_of(spec, name, v)["weight"] for v in spec["choices"][name]}
            prob *= weights[value] / sum(weights.values())
        sentences = []
        for slot in spec["slots"]:
            table = slot["templates"][choices[slot["by"]]] if "by" in slot else slot["templates"]
            total = sum(table.values())
            sentences.append([(s, p * w / total) for t, w in table.items() for s, p in spell(spec, t, choices)])
        for parts in itertools.product(*sentences):
            every.append((" ".join(s for s, _ in parts), prob * math.prod(p for _, p in parts), choices))
    return every


def spell_freely(spec: dict) -> list[str]:
    "Every text with nothing remembered, once per way to write it."
    sentences = []
    for slot in spec["slots"]:
        tables = slot["templates"].values() if "by" in slot else [slot["templates"]]
        sentences.append([s for table in tables for t in table for s, _ in spell(spec, t, None)])
    return [" ".join(parts) for parts in itertools.product(*sentences)]


@st.composite
def small_specs(draw) -> dict:
    "Small grammars over few letters, so that two readings of one text are common."
    weight = st.integers(1, 4)
    words = st.sampled_from(["a", "b", "ab", "ba", "c"])
    choices = {}
    for name in ("one", "two"):
        values = draw(st.lists(words, min_size=1, max_size=3, unique=True))
        choices[name] = {v: {"weight": draw(weight), "as": draw(st.sampled_from(["p", "q"]))} for v in values}
    local = {"word": draw(st.dictionaries(words, weight, min_size=1, max_size=2))}
    piece = st.sampled_from(["a", "b", "x", " ", "{one}", "{two}", "{word}", "{one.as}", "{Two}", "{Word}"])
    template = st.lists(piece, min_size=1, max_size=3).map("".join)
    table = st.dictionaries(template, weight, min_size=1, max_size=2)
    slots = [{"name": f"slot{n}", "templates": draw(table)} for n in range(draw(st.integers(0, 2)))]
    if draw(st.booleans()):
        slots.append({"name": "by", "by": "one", "templates": {value: draw(table) for value in choices["one"]}})
    slots.append({"name": "telling", "templates": {"<{one}|{two}>.": 1}})
    return {"choices": choices, "local": local, "slots": slots}


@pytest.fixture(scope="module")
def stories() -> Grammar:
    return Grammar.load()


@pytest.fixture(scope="module")
def sample(stories) -> list:
    rng = Random(20)
    return [stories.sample(rng) for _ in range(3000)]


def check_against_brute_force(spec: dict) -> None:
    grammar, every = Grammar.from_dict(spec), spell_all(spec)
    listed = list(grammar.enumerate())
    assert Counter(text for text, _ in listed) == Counter(text for text, _, _ in every)
    assert grammar.count() == len(every) == len({text for text, _, _ in every})
    assert math.isclose(sum(p for _, p in listed), 1, rel_tol=1e-9)
    assert math.isclose(grammar.entropy(), -sum(p * math.log(p) for _, p, _ in every), rel_tol=1e-9, abs_tol=1e-9)
    for text, p, choices in every[:40]:
        (story,) = grammar.parse(text)
        assert story.choices == choices and math.isclose(story.log_prob, math.log(p), abs_tol=1e-9)
        assert grammar.contradictions(text) == []
    for begun in {text[:cut] for text, _, _ in every[:: max(1, len(every) // 5)] for cut in range(len(text) + 1)}:
        listed = math.fsum(p for text, p, _ in every if text.startswith(begun))
        assert math.isclose(math.exp(grammar.prefix_log_prob(begun)), listed, rel_tol=1e-9), begun
        assert grammar.prefix_log_prob(begun + "?") == -math.inf
    spaces = [text.count(" ") + 1 for text, _, _ in every]
    assert grammar.word_range() == (min(spaces), max(spaces))
    held_out = sum(p for _, p, choices in every if grammar.split_of(choices) == "validation")
    assert math.isclose(grammar.split_probability("validation"), held_out, abs_tol=1e-9)
    assert math.isclose(grammar.split_probability("train"), 1 - held_out, abs_tol=1e-9)


def test_tiny_grammar_agrees_with_brute_force():
    check_against_brute_force(TINY)


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(small_specs())
def test_accepted_exactly_when_every_free_text_has_one_reading(spec):
    free = spell_freely(spec)
    if len(free) == len(set(free)):
        check_against_brute_force(spec)
    else:
        with pytest.raises(GrammarError, match="ambiguous"):
            Grammar.from_dict(spec)


def test_the_error_quotes_a_text_with_two_readings():
    spec = deepcopy(TINY)
    spec["slots"][1]["templates"]["Rainy was the day."] = 1
    with pytest.raises(GrammarError) as caught:
        Grammar.from_dict(spec)
    quoted = re.search(r"the text ['\"](.*)['\"] can", str(caught.value))[1]
    assert Counter(spell_freely(spec))[quoted] == 2


def test_conditional_distributions_agree_with_brute_force():
    grammar, every = Grammar.from_dict(TINY), spell_all(TINY)
    for split, known in itertools.product((None, "train", "validation"), ({}, {"hero": "Tom"}, {"ending": "bad"})):
        mass = defaultdict(float)
        for _, p, choices in every:
            if split in (None, grammar.split_of(choices)) and known.items() <= choices.items():
                mass[choices["colour"]] += p
        if not mass:
            with pytest.raises(ValueError, match="no story"):
                grammar.choice_distribution("colour", known, split)
            continue
        got = grammar.choice_distribution("colour", known, split)
        assert got == pytest.approx({v: mass[v] / sum(mass.values()) for v in got})
    assert grammar.choice_distribution("colour", {"colour": "red"}) == {"red": 1, "dark red": 0, "blue": 0}


def test_samples_follow_the_probabilities():
    grammar, rng, size = Grammar.from_dict(TINY), Random(3), 20_000
    seen = Counter(grammar.sample(rng).text for _ in range(size))
    probs = {text: p for text, p, _ in spell_all(TINY)}
    assert set(seen) <= set(probs)
    chi = sum((seen[text] - size * p) ** 2 / (size * p) for text, p in probs.items())
    assert chi < len(probs) + 5 * math.sqrt(2 * len(probs))


@pytest.mark.parametrize("slot", [1, 3, 4])
def test_a_part_that_begins_later_agrees_with_brute_force(slot):
    "What came before is forgotten: the part is a story of a grammar that has only the later slots."
    grammar, later = Grammar.from_dict(TINY), spell_all(TINY | {"slots": TINY["slots"][slot:]}) if slot < 4 else [("", 1.0, {})]
    for begun in {text[:cut] for text, _, _ in later for cut in range(len(text) + 1)}:
        listed = math.fsum(p for text, p, _ in later if text.startswith(begun))
        assert math.isclose(math.exp(grammar.prefix_log_prob(begun, slot)), listed, rel_tol=1e-9), begun


def test_beliefs_agree_with_brute_force():
    grammar, every = Grammar.from_dict(TINY), spell_all(TINY)
    for begun in ("", "M", "Tom had a dar", "Tom had a red kite. ", "Mia had a blue kite. She ran. It was ", "Tom had a red kite. Rainy was the day. R"):
        fitting = [(p, choices) for text, p, choices in every if text.startswith(begun)]
        total = sum(p for p, _ in fitting)
        for name, law in grammar.beliefs(begun).items():
            assert law == pytest.approx({v: sum(p for p, choices in fitting if choices[name] == v) / total for v in law}), (begun, name)


BEGINNINGS = [("", 0), ("T", 0), ("Mia had a dar", 0), ("Mia had a red kite. ", 0), ("Mia had a red kite.", 0), ("She ran. It was ", 1), ("R", 2), ("", 3)]


@pytest.mark.parametrize("begun, slot", BEGINNINGS)
def test_completions_follow_the_conditional_probabilities(begun, slot):
    grammar, rng, size = Grammar.from_dict(TINY), Random(5), 6_000
    probs = defaultdict(float)
    for text, p, _ in spell_all(TINY | {"slots": TINY["slots"][slot:]}): probs[text] += p * text.startswith(begun)
    total = sum(probs.values())
    probs = {text: p / total for text, p in probs.items() if p}
    seen = Counter(begun + "".join(grammar.complete(begun, rng, slot)) for _ in range(size))
    assert set(seen) <= set(probs)
    chi = sum((seen[text] - size * p) ** 2 / (size * p) for text, p in probs.items())
    assert chi < len(probs) + 5 * math.sqrt(2 * len(probs))


def test_a_completion_comes_slot_by_slot(stories, sample):
    rng = Random(6)
    for story in sample[:60]:
        begun = story.text[: int(rng.random() * len(story.text))]
        parts = stories.complete(begun, rng)
        assert stories.is_story(begun + "".join(parts)) and all(part.startswith(" ") and part.endswith(".") for part in parts[1:])
    assert stories.complete(story.text, rng) == [""]
    last = stories.complete(story.text[: story.text.rindex(".")], rng)
    assert last == ["."]


def test_a_beginning_of_no_story_is_named(stories):
    with pytest.raises(ValueError, match="no story begins with 'Once'"):
        stories.complete("Once", Random(0))
    with pytest.raises(ValueError, match="no story begins with 'Once'"):
        stories.beliefs("Once")
    for slot in (-1, 8):
        with pytest.raises(ValueError, match="slot"):
            stories.prefix_log_prob("", slot)


def test_shipped_stories_are_read_back_exactly(stories, sample):
    for story in sample[:1500]:
        assert stories.parse(story.text) == [story]
        assert stories.log_prob(story.text) == story.log_prob
        for broken in (story.text[:-1], story.text + " ", story.text.replace(" ", "  ", 1), story.text.lower()):
            assert not stories.is_story(broken) and stories.log_prob(broken) == -math.inf


def test_shipped_story_with_a_fact_changed_is_no_story(stories, sample):
    for story in sample[:100]:
        assert not stories.is_story(swap_last(story, "colour", "red" if story.choices["colour"] != "red" else "blue"))


def test_shipped_beginnings_multiply_to_the_whole(stories, sample):
    "By the chain rule the surprises of all words of a story add up to its own; a changed fact has probability zero."
    for story in sample[:20]:
        words = [0, *(found.start() for found in re.finditer(" ", story.text)), len(story.text)]
        logs = [stories.prefix_log_prob(story.text[:end]) for end in words]
        assert logs[0] == 0 and all(b <= a + 1e-9 for a, b in itertools.pairwise(logs))
        assert math.isclose(logs[-1], story.log_prob, rel_tol=1e-9)
        other = next(value for value in stories.choices[5].values.items if value != story.choices["colour"])
        place = story.text.rindex(story.choices["colour"])
        assert stories.prefix_log_prob(story.text[:place] + other) == -math.inf


def test_shipped_entropy_is_the_mean_surprise(stories, sample):
    surprise = [-story.log_prob for story in sample]
    mean = sum(surprise) / len(surprise)
    error = math.sqrt(sum((s - mean) ** 2 for s in surprise)) / len(surprise)
    assert abs(mean - stories.entropy()) < 4 * error < 0.2


def test_shipped_sizes(stories, sample):
    low, high = stories.word_range()
    assert 40 <= low <= high <= 90
    assert {len(story.text.split()) for story in sample} <= set(range(low, high + 1))
    least, most = stories.token_range()
    lengths = [len(re.findall(r"\w+|[^\w\s]", story.text)) for story in sample]
    assert least <= min(lengths) <= min(lengths) + 2 and max(lengths) <= most <= 78
    assert stories.count() >= 10**12
    assert len({word for story in sample for word in re.findall(r"\w+", story.text)}) <= 350


def test_shipped_words_of_choices_are_not_used_otherwise(stories):
    spec = json.loads((data_dir() / "stories.json").read_text())
    fixed = " ".join(word for table in spec["local"].values() for word in table)
    for slot in spec["slots"]:
        tables = slot["templates"].values() if "by" in slot else [slot["templates"]]
        fixed += " ".join(REFERENCE.sub(" ", template) for table in tables for template in table) + " "
    fixed_words = set(re.findall(r"\w+", fixed.lower()))
    for name in set(spec["choices"]) - {"ending"}:
        for value in spec["choices"][name]:
            forms = [value, *(form for form in row_of(spec, name, value).values() if isinstance(form, str))]
            assert not fixed_words & {form.lower() for form in forms}


def test_shipped_choices_return_far_from_their_first_mention(stories, sample):
    for story in sample[:500]:
        where = defaultdict(list)
        for claim in stories.claims(story.text):
            if claim.value == story.choices[claim.name]:
                where[claim.name].append(claim.sentence)
        for name in set(story.choices) - {"ending"}:
            assert where[name][-1] - where[name][0] >= 2, (name, story.text)


def test_a_prompt_of_twenty_tokens_leaves_the_rest_open(stories, sample):
    for story in sample[:500]:
        words = list(re.finditer(r"\w+|[^\w\s]", story.text))
        known = {claim.name for claim in stories.claims(story.text[: words[19].end()] + " ")}
        assert {"hero", "place", "helper"} == known


def test_splits_share_no_combination_and_every_value(stories):
    combinations, values = {}, {}
    for split in ("train", "validation"):
        drawn = [stories.story(5, index, split).choices for index in range(1500)]
        assert all(stories.split_of(choices) == split for choices in drawn)
        combinations[split] = {tuple(choices.values()) for choices in drawn}
        values[split] = {item for choices in drawn for item in choices.items()}
    assert not combinations["train"] & combinations["validation"]
    assert values["train"] == values["validation"]


def test_split_frequency(stories, sample):
    share = sum(stories.split_of(story.choices) == "validation" for story in sample) / len(sample)
    exact = stories.split_probability("validation")
    assert math.isclose(exact, 0.1, abs_tol=1e-9)
    assert abs(share - exact) < 4 * math.sqrt(exact * (1 - exact) / len(sample))
    assert math.isclose(exact + stories.split_probability("train"), 1) and stories.split_probability(None) == 1


def digest(grammar: Grammar) -> str:
    texts = [grammar.story(7, index, split).text for split in (None, "train", "validation") for index in (0, 1, 10**9)]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def test_story_number_is_pinned(stories):
    assert digest(stories) == "e52010d5b3fb8e6875498a7bd3b1c6d5824573b29f6ff0c443e1487e058297ca"


def test_story_is_the_same_in_another_process_and_order(stories):
    code = (
        "import hashlib; from cola_tutorial.text.stories import Grammar; g = Grammar.load();"
        "print([hashlib.sha256(g.story(1, i, 'train').text.encode()).hexdigest() for i in (9, 3, 5)])"
    )
    environment = os.environ | {"PYTHONHASHSEED": "123"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    here = {i: hashlib.sha256(stories.story(1, i, "train").text.encode()).hexdigest() for i in (3, 5, 9)}
    assert run.stdout.strip() == str([here[9], here[3], here[5]])


def test_stories_with_other_numbers_differ(stories):
    keys = [(seed, index, split) for seed in range(3) for index in range(20) for split in (None, "train", "validation")]
    assert len({stories.story(*key).text for key in keys}) == len(keys)


def test_true_stories_do_not_contradict_themselves(stories, sample):
    assert all(not stories.contradictions(story.text) for story in sample)


def test_beginnings_of_stories_do_not_contradict_themselves(stories, sample):
    for story in sample[:20]:
        assert all(not stories.contradictions(story.text[:length]) for length in range(len(story.text)))


def swap_last(story, name: str, value: str) -> str:
    "The story with the last mention of one choice's value replaced."
    head, tail = story.text.rsplit(story.choices[name], 1)
    return head + value + tail


@pytest.mark.parametrize("name", ["hero", "place", "helper", "thing", "colour", "animal", "wish"])
def test_a_changed_fact_is_found(stories, sample, name):
    for number, story in enumerate(sample[:60]):
        others = [value for value in stories.choice_distribution(name) if value != story.choices[name]]
        last = [c for c in stories.claims(story.text) if c.name == name and c.value == story.choices[name]][-1]
        other = others[number % len(others)]
        forged = story.text[: last.start] + other + story.text[last.end :]
        found = stories.contradictions(forged)
        assert found and {c.name for c in found} == {name}
        at_fault = [c.second for c in found if c.second.start == last.start]
        assert at_fault and at_fault[0].value == other and forged[at_fault[0].start : at_fault[0].end] == other


def test_a_changed_fact_is_found_in_a_broken_sentence(stories, sample):
    for story in sample[:60]:
        other = "green" if story.choices["colour"] != "green" else "red"
        forged = swap_last(story, "colour", other).replace(" the ", " the the ")
        assert [(c.name, c.second.value) for c in stories.contradictions(forged)] == [("colour", other)]


def test_a_wrong_pronoun_is_found(stories):
    (found,) = stories.contradictions("Mia lived near the lake with her aunt. One cold morning, he went out.")
    assert (found.name, found.first.value, found.second.value) == ("hero", "Mia", "he")
    assert set(found.second.possible) == {"Ben", "Tom", "Leo", "Finn", "Peter", "Noah", "Oscar", "Felix"}
    assert stories.contradictions("Mia lived near the lake with her aunt. One cold morning, she went out.") == []


def test_a_caller_can_tell_who_is_to_blame(stories):
    prompt = "Mia lived near the lake with her aunt."
    (found,) = stories.contradictions(prompt + " Near the mill, her aunt drew the red kite of the fox.")
    assert found.name == "place" and found.first.end <= len(prompt) < found.second.start


def test_two_endings_contradict(stories):
    found = stories.contradictions("But it did not like singing. It taught her to sing at once.")
    assert [(c.name, c.first.value, c.second.value) for c in found] == [("ending", "hope", "granted")]


def test_a_sentence_with_two_readings_claims_what_both_say():
    spec = deepcopy(TINY)
    spec["slots"].append({"name": "after", "templates": {"It tore. So {hero} wept over it.": 1}})
    claims = Grammar.from_dict(spec).claims("It tore.")
    assert claims == []
    assert [c.value for c in Grammar.from_dict(TINY).claims("It tore.")] == ["bad"]


def test_a_cut_form_claims_nothing():
    grammar = Grammar.from_dict(TINY)
    assert grammar.contradictions("Mia had a dark red kite. The blue kite was gone.")[0].first.value == "dark red"
    assert [c.value for c in grammar.claims("Mia had a blue")] == ["Mia"]
    assert [c.value for c in grammar.claims("Mia had a blue ")] == ["Mia", "blue"]


def test_a_cut_form_is_not_taken_for_a_shorter_one():
    spec = {
        "choices": {"colour": {"dark": 1, "dark red": 1}},
        "slots": [
            {"name": "first", "templates": {"A {colour} kite flew.": 1}},
            {"name": "last", "templates": {"It was {colour}": 1}},
        ],
    }
    grammar = Grammar.from_dict(spec)
    for text, _ in grammar.enumerate():
        assert all(not grammar.contradictions(text[:length]) for length in range(len(text) + 1))
    (found,) = grammar.contradictions("A dark kite flew. A dark red kite flew.")
    assert (found.first.value, found.second.value) == ("dark", "dark red")


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_text_can_be_asked(stories, sample, data):
    pieces = st.sampled_from([s for story in sample[:5] for s in re.split(r"(?<=[ .])", story.text)])
    text = "".join(data.draw(st.lists(st.one_of(st.text(max_size=8), pieces), max_size=12)))
    found = stories.claims(text)
    assert found == sorted(found, key=lambda claim: claim.start)
    for claim in found:
        assert 0 <= claim.start < claim.end <= len(text)
        assert claim.value in claim.possible or claim.value == text[claim.start : claim.end].lower()
    for pair in stories.contradictions(text):
        assert pair.first in found and pair.second in found and pair.first.start <= pair.second.start
        assert not set(pair.first.possible) & set(pair.second.possible)
    assert len(stories.parse(text)) <= 1


STRANGE = ["", " ", "\n", "\x00", "." * 20_000, '"' * 5000, " " * 20_000, ". " * 2000, "ß. É!", "\ud800."]


@pytest.mark.parametrize("text", STRANGE, ids=range(len(STRANGE)))
def test_strange_texts(stories, text):
    assert stories.claims(text) == [] and stories.contradictions(text) == [] and stories.parse(text) == []


def changed(path: tuple, value: object) -> dict:
    "TINY with one entry replaced, or removed where the value is None."
    spec = deepcopy(TINY)
    part = spec
    for key in path[:-1]:
        part = part[key]
    if value is None:
        del part[path[-1]]
    else:
        part[path[-1]] = value
    return spec


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (changed(("slots", 0, "templates"), {"{hero} and {colour} and {nobody}.": 1}), "unknown reference {nobody}"),
        (changed(("slots", 0, "templates"), {"{hero.shoe} {colour}.": 1}), "unknown reference {hero.shoe}"),
        (changed(("slots", 0, "templates"), {"{weather.x} {hero} {colour}.": 1}), "unknown reference {weather.x}"),
        (changed(("slots", 0, "templates"), {"{hero {colour}.": 1}), "braces"),
        (changed(("slots", 0, "templates"), {}), "non-empty"),
        (changed(("local", "weather"), {}), "non-empty"),
        (changed(("choices", "colour"), {}), "non-empty"),
        (changed(("choices", "colour"), {"red": 0}), "weight of 'red'"),
        (changed(("choices", "colour"), {"red": -1}), "weight of 'red'"),
        (changed(("choices", "colour"), {"red": math.nan}), "weight of 'red'"),
        (changed(("choices", "colour"), {"red": math.inf}), "weight of 'red'"),
        (changed(("choices", "colour"), {"red": True}), "weight of 'red'"),
        (changed(("choices", "colour"), {"red": 10**400}), "weight of 'red'"),
        (changed(("local", "weather"), {"sunny": "1"}), "weight of 'sunny'"),
        (changed(("slots", 1, "templates"), {"So.": 0}), "weight of 'So.'"),
        (changed(("choices", "hero", "Tom"), {"weight": 1}), "value 'Tom'"),
        (changed(("choices", "hero", "Tom"), {"weight": 1, "subject": ""}), "'subject'"),
        (changed(("choices", "Hero"), {"a": 1}), "lower-case"),
        (changed(("local", "hero"), {"a": 1}), "both a choice and a local"),
        (changed(("slots", 2, "by"), "weather"), "unknown choice 'weather'"),
        (changed(("slots", 2, "templates", "bad"), None), "values"),
        (changed(("slots", 2, "templates", "ugly"), {"Hm.": 1}), "values"),
        (changed(("slots", 2, "templates", "bad"), {"All was well.": 1}), "ambiguous"),
        (changed(("slots", 0, "templates"), {"Someone had a {colour} kite.": 1}), "choice 'hero' is ambiguous"),
        (changed(("slots", 1, "weights"), [1]), "keys"),
        (changed(("slots",), []), "slots"),
        (changed(("slots",), {"a": 1}), "slots"),
        (changed(("slots", 0), "hello"), "slot 0"),
        (changed(("choices",), None), "choices"),
        (changed(("local", "weather"), {"rain": 1, "Rain": 1}), "capital"),
        ([], "grammar"),
        (None, "grammar"),
    ],
)
def test_a_broken_grammar_is_named(spec, message):
    with pytest.raises(GrammarError, match=re.escape(message)):
        Grammar.from_dict(spec)


def test_a_broken_file_is_named(tmp_path):
    good = json.dumps(TINY)
    broken = {
        "cut.json": good[:-5].encode(),
        "latin.json": good.replace("Mia", "Zoé").encode("latin-1") + b"\xe9",
        "twice.json": good.replace('"red": 1', '"red": 1, "red": 2').encode(),
        "deep.json": b"[" * 100_000,
        "empty.json": b"",
    }
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(GrammarError, match=name):
            Grammar.load(tmp_path / name)
    for name in ("missing.json", "."):
        with pytest.raises(GrammarError, match="cannot be read"):
            Grammar.load(tmp_path / name)
    (tmp_path / "good.json").write_text(good)
    assert dict(Grammar.load(tmp_path / "good.json").enumerate()) == dict(Grammar.from_dict(TINY).enumerate())


def test_bad_questions_are_named(stories):
    story = stories.story(0, 0)
    with pytest.raises(ValueError, match="split"):
        stories.story(0, 0, "test")
    with pytest.raises(ValueError, match="split"):
        stories.split_probability("test")
    for index in (-1, 1.5, "1", None):
        with pytest.raises(ValueError, match="index"):
            stories.story(0, index)
    with pytest.raises(ValueError, match="missing: \\['colour'\\]"):
        stories.split_of({name: value for name, value in story.choices.items() if name != "colour"})
    with pytest.raises(ValueError, match="unknown choice 'weather'"):
        stories.split_of(story.choices | {"weather": "sunny"})
    with pytest.raises(ValueError, match="no value 'beige'"):
        stories.choice_distribution("place", {"colour": "beige"})
    with pytest.raises(ValueError, match="unknown choice 'weather'"):
        stories.choice_distribution("weather")


def test_an_empty_split_is_named():
    spec = {"choices": {"hero": {"Mia": 1}}, "slots": [{"name": "only", "templates": {"{hero} ran.": 1}}]}
    grammar = Grammar.from_dict(spec)
    assert grammar.story(0, 0, "validation").text == "Mia ran."
    with pytest.raises(ValueError, match="empty"):
        grammar.story(0, 0, "train")
