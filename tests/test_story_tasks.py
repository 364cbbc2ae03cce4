"""Story tasks, held against a list of all stories of a small grammar, against dice, and against readers whose marks are known beforehand."""

import math
import re
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import pairwise, product
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cola_tutorial.config import data_dir
from cola_tutorial.generation import generate
from cola_tutorial.model import ColaDLM
from cola_tutorial.story_tasks import (
    STORY_TASKS,
    GrammarModel,
    StoryAnswer,
    StoryItem,
    StoryTaskError,
    ask_by_generation,
    ask_by_likelihood,
    recall_by_distance,
    story_answer_score,
    story_items,
    story_task_scores,
    word_fit,
)
from cola_tutorial.text.stories import Grammar

# Values of unequal weight, one that ends with another, pronouns, and a choice that selects sentences: after a hint only memory knows what *The* begins.
SMALL = {
    "choices": {
        "hero": {"Mia": {"weight": 3, "of": "her"}, "Tom": {"weight": 1, "of": "his"}, "Ben": {"weight": 1, "of": "his"}},
        "colour": {"red": 2, "dark red": 1, "blue": 1},
        "end": {"good": 2, "bad": 1},
    },
    "local": {"weather": {"sunny": 2, "rainy": 1}, "speed": {"quickly": 1, "slowly": 3}},
    "slots": [
        {"name": "opening", "templates": {"{hero} had a {colour} kite.": 1, "A {colour} kite came to {hero}.": 2}},
        {"name": "middle", "templates": {"It was {weather}.": 1, "{hero} {speed} ran.": 3}},
        {"name": "hint", "by": "end", "templates": {"good": {"All went well.": 1}, "bad": {"A storm came.": 1}}},
        {"name": "end", "by": "end", "templates": {
            "good": {"{Hero.of} kite flew.": 1, "The {colour} kite flew.": 1}, "bad": {"It tore {speed}.": 1, "The wind took it.": 2}}},
        {"name": "last", "templates": {"The {colour} kite pleased {hero}.": 1, "Near {hero} lay {hero.of} kite.": 1}},
    ],
}


@pytest.fixture(scope="module")
def small():
    return Grammar.from_dict(SMALL)


@pytest.fixture(scope="module")
def listed(small):
    "Every story of the small grammar with its probability, cut into its sentences."
    return [(tuple(re.split(r"(?<=\.) ", text)), p) for text, p in small.enumerate()]


@pytest.fixture(scope="module")
def few(small):
    return {task: story_items(task, 80, 3, small, split=None) for task in STORY_TASKS}


@pytest.fixture(scope="module")
def items():
    return {task: story_items(task, 150) for task in STORY_TASKS}


@pytest.fixture(scope="module")
def model():
    return ColaDLM.from_pretrained(data_dir() / "pretrained")


def begins(listed, text):
    "Probability that a story begins with these characters."
    return math.fsum(p for sentences, p in listed if " ".join(sentences).startswith(text))


# Items


@pytest.mark.parametrize("task", STORY_TASKS)
def test_options_are_stories_where_they_are_right_and_only_there(few, listed, task):
    stories = {" ".join(sentences) for sentences, _ in listed}
    for item in few[task]:
        assert [item.prompt + option in stories for option in item.options] == [n in item.right for n in range(len(item.options))]
        assert item.own in item.right and len(set(item.options)) == len(item.options) == len(item.answers) == len(item.law)
        assert all(answer in option for answer, option in zip(item.answers, item.options))


@pytest.mark.parametrize("task", ["fact", "word"])
def test_laws_agree_with_the_list_of_all_stories(few, listed, task):
    for item in few[task]:
        after = item.options[item.own].removeprefix(" " + item.answers[item.own])[0]
        total = begins(listed, item.prompt)
        exact = [begins(listed, f"{item.prompt} {answer}{after}") / total for answer in item.answers]
        assert item.law == pytest.approx(exact, abs=1e-12)
        assert item.ideal == pytest.approx(1)


def test_chance_of_facts_agrees_with_the_list_of_all_stories(few, listed):
    "The share of stories that say the right value, among those in which this sentence begins as it does here."
    for item in few["fact"]:
        before = item.prompt.count(". ") + item.prompt.endswith(".")
        begun = "" if item.prompt.endswith(".") else re.split(r"(?<=\.) ", item.prompt)[-1] + " "
        fitting = [(sentences[before], p) for sentences, p in listed if sentences[before].startswith(begun)]
        right = math.fsum(p for sentence, p in fitting if re.match(rf"{item.answers[item.own]}\W", sentence[len(begun) :]))
        assert all(re.match(rf"({'|'.join(item.answers)})\W", sentence[len(begun) :]) for sentence, _ in fitting)  # some value has to come
        assert item.chance == pytest.approx(right / math.fsum(p for _, p in fitting))
    assert {item.fact for item in few["fact"]} == {"hero", "colour"}


def test_chance_of_words_is_their_share_of_all_words_in_places(few, listed):
    words = ["dark red", "red", "blue", "Mia", "Tom", "Ben", "Her", "His", "her", "his", "sunny", "rainy", "quickly", "slowly"]
    counts = Counter()
    for sentences, p in listed:
        for word in re.findall("|".join(rf"\b{word}\b" for word in words), " ".join(sentences)): counts[word] += p
    for item in few["word"]:
        assert item.chance == pytest.approx(math.fsum(counts[item.answers[n]] for n in item.right) / math.fsum(counts.values()))
    assert {item.fact for item in few["word"]} == {"weather", "speed"}


def test_chance_of_endings_is_that_of_a_strangers(few, listed):
    stories = {sentences for sentences, _ in listed}
    for item in few["ending"][:25]:
        begun = tuple(re.split(r"(?<=\.) ", item.prompt))
        assert len(begun) == 3
        exact = math.fsum(p for sentences, p in listed if begun + sentences[3:] in stories)
        assert 0 < item.chance < 1 and item.chance == pytest.approx(exact)


def test_contradictions_differ_in_one_value_that_is_as_frequent(items):
    grammar = Grammar.load()
    for item in items["contradiction"]:
        right, wrong = item.options[item.own], item.options[1 - item.own]
        here = [(a, b) for a, b in zip(right.split(), wrong.split()) if a != b]
        assert len(right.split()) == len(wrong.split()) and len(here) == 1
        found = next(c for c in grammar.contradictions(item.prompt + wrong) if c.name == item.fact)
        law = grammar.choice_distribution(item.fact)
        assert found.first.value != found.second.value and law[found.first.value] == law[found.second.value]
    assert 50 < sum(item.own for item in items["contradiction"]) < 100


def test_distances_agree_with_the_claims(items):
    "How far back a fact was named, by the reader of facts; how many words and marks, by counting."
    grammar = Grammar.load()
    for item in items["fact"] + items["contradiction"]:
        text = item.prompt + item.options[item.own]
        claims = [c for c in grammar.claims(text) if c.name == item.fact and len(c.possible) == 1]
        asked = next(c for c in reversed(claims) if text[c.start : c.end] == item.answers[item.own] and c is not claims[0])
        if item.task == "fact": assert asked.start == len(item.prompt) + 1
        between = text[claims[0].end : asked.start - 1]
        tokens = sum(word.strip('.,"') != "" for word in between.split()) + sum(map(between.count, '.,"'))
        assert (item.distance, item.tokens) == (asked.sentence - claims[0].sentence, tokens)
    assert {item.distance for item in items["fact"]} == {2, 3, 4, 6}
    assert {item.fact for item in items["fact"]} == {"hero", "place", "helper", "wish", "thing", "colour", "animal"}


@pytest.mark.parametrize("task", STORY_TASKS)
def test_items_are_of_the_validation_split_and_stay_as_they_are(items, task):
    grammar = Grammar.load()
    for number, item in enumerate(items[task]):
        (story,) = grammar.parse(item.prompt + item.options[item.own])
        assert grammar.split_of(story.choices) == "validation" and story == grammar.story(7, number, "validation")
    assert story_items(task, 20) == items[task][:20]
    assert story_items(task, 20, seed=8) != items[task][:20]


@pytest.mark.parametrize("task", STORY_TASKS)
def test_prompt_and_option_give_the_tokens_of_the_whole(items, model, task):
    cut = lambda text: model.tokenizer.encode(text, add_special_tokens=False).ids
    for item in items[task]:
        begun = cut(item.prompt)
        assert 0 < len(begun) < model.generation.max_length and item.prompt == item.prompt.strip()
        for option in item.options: assert begun + cut(option) == cut(item.prompt + option), (item.prompt, option)


def test_fewer_wrong_options_and_chosen_facts():
    for item in story_items("fact", 30, wrong=2, facts=("colour", "wish")):
        assert item.fact in ("colour", "wish") and len(item.options) == 3 and item.uniform == 1 / 3
    for item in story_items("word", 30, wrong=1, facts=("mood",)): assert item.uniform == len(item.right) / (len(item.right) + 1) == 8 / 9
    for item in story_items("ending", 10, wrong=1): assert item.uniform == 0.5
    colours = story_items("fact", 5, facts=("colour",))
    assert all(len(item.options) == 8 for item in colours)


def test_the_right_option_stands_anywhere(items):
    for task, places in (("fact", 3), ("ending", 4)):
        assert len(Counter(item.own for item in story_items(task, 50, wrong=3))) >= places


# Asking, with readers whose answers are known


class Writes:
    "A model that writes the same text after every prompt."

    def __init__(self, text): self.text = text

    def generate(self, prompts, config=None, seeds=None): return SimpleNamespace(texts=[self.text] * len(prompts))


class Scores:
    "A model that gives the options of any items these values, in turn."

    def __init__(self, *values): self.values = values

    def score(self, prompts, continuations, **options):
        turn = [self.values[n % len(self.values)] for n in range(len(prompts))]
        return [SimpleNamespace(value=value) for value in turn]


@pytest.mark.parametrize("text, said", [
    (" red kite tore.", "red"), (" dark red kite", "dark red"), (" dark red", "dark red"), (" reddish kite", ""), ("red kite", ""),
    ("  red", ""), (" darkred", ""), ("", ""), (" green kite", ""), (" red-brown", "red"), (" Red", ""), (" the red kite", ""),
])
def test_answers_are_read_off_at_the_gap(small, text, said):
    colours = [i for i in story_items("fact", 20, 3, small, split=None, facts=("colour",))]
    for answer in ask_by_generation(Writes(text), colours, grammar=small):
        assert answer.said == said and answer.credit == (said == answer.item.answers[answer.item.own])
        assert answer.text == text and answer.chance == answer.item.chance


def test_any_fitting_word_is_right(small):
    words = story_items("word", 20, 3, small, split=None, facts=("weather",))
    for said, credit in (("sunny", 1), ("rainy", 1), ("slowly", 0), ("Mia", 0)):
        assert {a.credit for a in ask_by_generation(Writes(f" {said}."), words)} == {credit}


def test_an_ending_is_right_if_the_whole_is_a_story(few, small):
    for item in few["ending"][:20]:
        for option in item.options:
            (answer,) = ask_by_generation(Writes(option), [item], grammar=small)
            assert answer.credit == small.is_story(item.prompt + option) and answer.said == option.strip()
        assert ask_by_generation(Writes(item.options[item.own][:-1]), [item], grammar=small)[0].credit == 0


ITEM = StoryItem("word", "It was", (" a.", " b.", " c.", " d."), tuple("abcd"), 0, (0, 1), (0.5, 0.5, 0.0, 0.0), 0.1, "weather")


@pytest.mark.parametrize("values, credit, said", [
    ((-1, -2, -3, -4), 1, "a"), ((-3, -2, -1, -4), 0, "c"), ((-1, -1, -2, -2), 1, ""), ((-1, -2, -1, -2), 0.5, ""), ((-1, -1, -1, -5), 2 / 3, ""),
    ((-1, -1, -1, -1), 0.5, ""), ((-math.inf,) * 4, 0.5, ""), ((-math.inf, -9, -math.inf, -math.inf), 1, "b"), ((-1, -1 + 1e-9, -1, -2), 2 / 3, ""),
])
def test_the_most_probable_option_counts_and_equals_share(values, credit, said):
    (answer,) = ask_by_likelihood(Scores(*values), [ITEM])
    assert (answer.credit, answer.said, answer.values, answer.chance) == (pytest.approx(credit), said, tuple(map(float, values)), 0.5)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from([-3.0, -2.0, -1.0]), min_size=4, max_size=4), st.permutations(range(4)))
def test_credit_does_not_depend_on_the_order_of_options(values, order):
    place = {old: new for new, old in enumerate(order)}
    options, answers = (tuple(part[n] for n in order) for part in (ITEM.options, ITEM.answers))
    moved = replace(ITEM, options=options, answers=answers, right=(place[0], place[1]), own=place[0])
    (before,), (after,) = ask_by_likelihood(Scores(*values), [ITEM]), ask_by_likelihood(Scores(*(values[n] for n in order)), [moved])
    assert before.credit == after.credit and before.said == after.said


@pytest.mark.parametrize("task", STORY_TASKS)
def test_equal_scores_get_exactly_chance(items, task):
    score = story_answer_score(ask_by_likelihood(Scores(-5.0), items[task]))
    assert score.value == pytest.approx(score.chance) == pytest.approx(sum(i.uniform for i in items[task]) / 150)
    assert score.low < score.value < score.high and score.n == 150


@pytest.mark.parametrize("task", STORY_TASKS)
def test_a_list_of_all_stories_gets_everything_right(few, listed, task):
    "A scorer that shares no code with the grammar's own probabilities: log p(prompt + option) - log p(prompt) by looking through the list."
    whole = {" ".join(sentences): p for sentences, p in listed}

    class Looks:
        def score(self, prompts, continuations, **options):
            logs = [math.log(whole[p + c] / begins(listed, p)) if p + c in whole else -math.inf for p, c in zip(prompts, continuations)]
            return [SimpleNamespace(value=log) for log in logs]

    part = few[task][:30]
    answers = ask_by_likelihood(Looks(), part)
    assert story_answer_score(answers).value == 1
    exact = ask_by_likelihood(GrammarModel(Grammar.from_dict(SMALL)), part)
    for a, b in zip(answers, exact): assert a.values == pytest.approx(b.values)


# The grammar as a model


@pytest.mark.parametrize("memory", [0, 1, 3, None])
def test_scores_with_any_memory_agree_with_the_list_of_all_stories(small, listed, memory):
    "log p(sentence | the k before it), where every probability is a sum over the list."
    window = 5 if memory is None else memory

    def share(first, sentences):  # probability that these sentences stand from slot `first` on; the last may be a beginning
        *done, last = sentences
        fits = lambda s: s[first : first + len(done)] == tuple(done) and s[first + len(done)].startswith(last)
        return math.fsum(p for s, p in listed if fits(s))

    sentences = [sorted({s[slot] for s, _ in listed}) for slot in range(5)]
    tails = list(product(*sentences[2:]))
    for begun in ("Tom had a dark red kite. It was", "A blue kite came to Mia. Mia", "Ben had a red kite. Ben"):
        slot = begun.count(". ")
        unfinished = begun.split(". ")[-1]
        rests = sorted({s.removeprefix(unfinished) for s in sentences[1] if s.startswith(unfinished)})
        texts = [" ".join([rest, *tail]) for rest in rests for tail in tails]
        told = GrammarModel(small, memory).score([begun] * len(texts), texts)
        assert math.fsum(math.exp(one.value) for one in told) == pytest.approx(1)
        for text, one in zip(texts[::29], told[::29]):
            parts = re.split(r"(?<=\.) ", begun + text)
            exact = 1.0
            for s in range(slot, 5):
                first = max(0, s - window)
                given = parts[first:s] + [unfinished if s == slot else ""]
                base = share(first, given)
                exact *= share(first, parts[first:s] + [parts[s]]) / base if exact and base else 0
            assert math.exp(one.value) == pytest.approx(exact, abs=1e-12), text


@pytest.mark.parametrize("memory", [0, 1, None])
def test_texts_come_as_often_as_they_are_scored(small, memory):
    reader, size, prompt = GrammarModel(small, memory), 3000, "Mia had a red kite. It was"
    written = Counter(reader.generate([prompt] * size, seeds=range(size)).texts)
    probs = [math.exp(one.value) for one in reader.score([prompt] * len(written), list(written))]
    chi = sum((count - size * p) ** 2 / (size * p) for count, p in zip(written.values(), probs))
    assert chi + size * (1 - sum(probs)) < len(written) + 5 * math.sqrt(2 * len(written)) + 1


def test_text_that_goes_on_is_more_probable_than_text_that_ends(small):
    reader = GrammarModel(small)
    ended, open_end = (reader.score(["Mia had a red kite."], [" It was rai"], ended=ended)[0].value for ended in (True, False))
    assert ended == -math.inf and open_end == pytest.approx(math.log(1 / 4 * 1 / 3))
    for memory in (0, 1, None): assert GrammarModel(small, memory).score(["", "Mia"], ["Mia", ""], ended=False)[0].value == pytest.approx(math.log(0.6 / 3))
    assert reader.score(["Mia had a red kite."], [" It was snowy."])[0].value == -math.inf


@pytest.mark.parametrize("task", STORY_TASKS)
def test_the_ideal_reader_gets_everything_right(items, task):
    for form in (ask_by_likelihood, ask_by_generation)[: 1 + (task != "contradiction")]:
        assert {answer.credit for answer in form(GrammarModel(), items[task][:40])} == {1.0}


def test_words_of_the_ideal_reader_follow_the_law(items):
    item = next(item for item in items["word"] if item.fact == "mood")
    said = Counter(a.said for a in ask_by_generation(GrammarModel(), [item] * 600))
    chi = sum((said[answer] - 600 * p) ** 2 / (600 * p) for answer, p in zip(item.answers, item.law) if p)
    assert sum(said.values()) == 600 and said[""] == 0 and chi < 8 + 5 * 4


def test_a_reader_without_memory_is_at_chance_for_facts_and_perfect_for_words(items):
    "By generation within four standard errors of the exact chance; pairs of contradictions are a coin, to the last bit."
    reader = GrammarModel(memory=0)
    facts = story_items("fact", 400)
    score = story_answer_score(ask_by_generation(reader, facts))
    assert abs(score.value - score.chance) < 4 * math.sqrt(score.chance * (1 - score.chance) / 400)
    assert {a.credit for form in (ask_by_generation, ask_by_likelihood) for a in form(reader, items["word"][:60])} == {1.0}
    assert {a.credit for a in ask_by_likelihood(reader, items["contradiction"][:60])} == {0.5}
    fit = word_fit(ask_by_likelihood(reader, items["word"][:60]))
    assert (fit.fitting, fit.distance) == (pytest.approx(1), pytest.approx(0, abs=1e-9))


def test_recall_falls_where_memory_ends(items):
    answers = ask_by_generation(GrammarModel(memory=3), items["fact"])
    scores = recall_by_distance(answers)
    assert [*scores] == [2, 3, 4, 6] and sum(s.n for s in scores.values()) == 150
    assert scores[2].value == scores[3].value == 1 and scores[4].low < 0.4 and scores[6].value < 0.3
    by_tokens = recall_by_distance(answers, "tokens", 20)
    assert all(far % 20 == 0 for far in by_tokens) and all(a < b for a, b in pairwise(by_tokens))
    groups = defaultdict(list)
    for a in answers: groups[a.item.tokens // 20 * 20].append(a)
    assert by_tokens == {far: story_answer_score(groups[far]) for far in by_tokens}


def test_word_fit_agrees_with_its_definition():
    q = [0.1, 0.4, 0.3, 0.2]
    fit = word_fit(ask_by_likelihood(Scores(*(math.log(p) - 100 for p in q)), [ITEM, ITEM]))
    assert (fit.n, fit.chance) == (2, 0.5) and fit.fitting == pytest.approx(0.5)
    assert fit.distance == pytest.approx(0.5 * (0.4 + 0.1 + 0.3 + 0.2))
    assert word_fit(ask_by_likelihood(Scores(-math.inf), [ITEM])).fitting == 0.5


# The shipped model


def test_the_shipped_model_remembers_and_fits(model):
    scores = story_task_scores(model, 20, tasks=("fact", "word"))
    assert set(scores) == {"fact", "word"} and all(s.value >= 0.9 and s.n == 20 for s in scores.values())
    assert scores["fact"].chance == pytest.approx(sum(i.chance for i in story_items("fact", 20)) / 20)
    endings = story_task_scores(model, 6, tasks=("ending",))
    assert endings["ending"].value >= 0.8


def test_short_answers_are_the_beginnings_of_long_ones(model, items):
    "Writing no more than an answer needs, or in smaller batches, changes no answer."
    part = items["fact"][:6] + items["word"][:6]
    short, long = ask_by_generation(model, part, batch_size=5), ask_by_generation(model, part, model.generation)
    assert [a.said for a in short] == [a.said for a in long]
    for a, b in zip(short, long): assert b.text.startswith(a.text.rstrip()) and len(a.text) < len(b.text) or len(b.text.split()) < 6
    texts = generate(model, [part[2].prompt], seeds=[2]).texts
    assert long[2].text == texts[0]


def test_memory_and_choice_of_words_come_apart(model, items):
    "Shown two sentences, the model keeps its words and loses the facts; given one step, it is the other way round."

    class LastSentences:
        tokenizer, generation = model.tokenizer, model.generation

        def generate(self, prompts, config, seeds): return generate(model, [". ".join(p.split(". ")[-2:]) for p in prompts], config, seeds=seeds)

    one_step = replace(model.generation, steps=1, renew_below=0.0, max_new_tokens=4)
    share = lambda answers: story_answer_score(answers).value
    cut = [share(ask_by_generation(LastSentences(), items[task][:60])) for task in ("fact", "word")]
    hasty = [share(ask_by_generation(model, items[task][:60], one_step)) for task in ("fact", "word")]
    assert cut[0] < 0.3 and cut[1] > 0.9 and hasty[0] > 0.9 and hasty[1] < 0.8


# What cannot be asked


@pytest.mark.parametrize("asked, message", [
    (lambda: story_items("cloze", 3), "task 'cloze' is unknown: take one of fact"),
    (lambda: story_items("fact", 0), "n is 0"),
    (lambda: story_items("fact", True), "n is True"),
    (lambda: story_items("fact", 2.0), "n is 2.0"),
    (lambda: story_items("fact", 3, wrong=0), "wrong is 0"),
    (lambda: story_items("fact", 3, facts=("wether",)), "'wether' stands nowhere"),
    (lambda: story_items("fact", 3, facts=("weather",)), "none of 100 stories has a place for the task 'fact' about weather"),
    (lambda: ask_by_generation(GrammarModel(), []), "there are no items"),
    (lambda: ask_by_generation(GrammarModel(), story_items("contradiction", 1)), "use ask_by_likelihood"),
    (lambda: ask_by_generation(GrammarModel(), [ITEM], batch_size=0), "batch_size is 0"),
    (lambda: ask_by_generation(Scores(0), [ITEM]), "a Scores has no generate"),
    (lambda: ask_by_likelihood(Writes(""), [ITEM]), "a Writes has no score"),
    (lambda: ask_by_likelihood(Scores(-1.0, math.nan), [ITEM]), "item 0 is nan"),
    (lambda: ask_by_likelihood(Scores(math.inf), [ITEM]), "item 0 is inf"),
    (lambda: ask_by_likelihood(SimpleNamespace(score=lambda *a, **k: []), [ITEM]), "0 scores for 4 options"),
    (lambda: ask_by_generation(SimpleNamespace(generate=lambda *a, **k: SimpleNamespace(texts=["a", "b"])), [ITEM]), "2 texts for 1 prompts"),
    (lambda: ask_by_generation(SimpleNamespace(tokenizer=None, generate=None), [ITEM]), "no tokenizer"),
    (lambda: ask_by_likelihood(SimpleNamespace(tokenizer=None, score=None), [ITEM]), "no tokenizer"),
    (lambda: story_answer_score([]), "no answers"),
    (lambda: recall_by_distance([StoryAnswer(ITEM, "a", 1.0)]), "no answer is about a fact"),
    (lambda: recall_by_distance([], "words"), "unit is 'words'"),
    (lambda: recall_by_distance([], width=0), "width is 0"),
    (lambda: word_fit([StoryAnswer(ITEM, "a", 1.0)]), "no answer is about a word by likelihood"),
    (lambda: story_task_scores(GrammarModel(), 1, "spoken"), "form is 'spoken'"),
    (lambda: GrammarModel(memory=-1), "memory is -1"),
    (lambda: GrammarModel().generate(["Once upon a time"]), "no story has a part that begins 'Once upon"),
    (lambda: GrammarModel(memory=0).score(["Once upon a time"], [" there"]), "no story has a part that begins 'Once upon"),
    (lambda: GrammarModel().generate(["Anna lived near the lake with his"]), "begins 'Anna lived near the lake with his"),
])
def test_what_cannot_be_asked_is_named(asked, message):
    with pytest.raises(StoryTaskError, match=re.escape(message)):
        asked()


def test_a_model_without_tokenizer_is_named(model):
    bare = ColaDLM(model.config)
    with pytest.raises(StoryTaskError, match="no tokenizer"):
        ask_by_generation(bare, [ITEM])
