"Masked diffusion against loops, enumerations of all orders and sets, and a little language whose conditionals are known."

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from cola_tutorial.baselines import Baseline, LLaDA, _hidden_losses, open_model
from cola_tutorial.config import BaselineConfig, BaselineTraining, ConfigError, GenerationConfig, data_dir
from cola_tutorial.generation import PromptError, seed_source
from cola_tutorial.objectives import Noise
from cola_tutorial.text.corpus import load_tokenizer
from cola_tutorial.training import Trainer

V, MASK = 40, 40
SMALL = dict(kind="llada", dim=32, num_heads=2, head_dim=16, num_layers=2, ffn_dim=48)


def made(vocab_size: int = V, scale: float = 4.0, **changes) -> LLaDA:
    "A small model with random weights that are not tiny, so that its guesses differ."
    torch.manual_seed(5)
    model = Baseline.make(BaselineConfig(vocab_size=vocab_size, **SMALL | changes)).eval()
    with torch.no_grad():
        for p in model.parameters(): p.mul_(scale if p.ndim > 1 else 1.0)
    return model


@pytest.fixture(scope="module")
def model() -> LLaDA:
    "Shared by tests that change nothing in it."
    return made()


def sources(rows: int, first: int = 0) -> list[torch.Generator]:
    "A generator for each row."
    return [torch.Generator().manual_seed(first + row) for row in range(rows)]


@torch.no_grad()
def log_p(model: LLaDA, row: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    "Dense log-probabilities (L, V) of one row, some of it hidden, from a sequence with masks in it."
    shown = torch.tensor([MASK if h else t for t, h in zip(row.tolist(), hidden.tolist())])
    x = model.net.wte(shown) + torch.cat([model.net.wte.weight[[model.config.end_id]], torch.zeros(len(row) - 1, 32)])
    return model.net.final_layer(model.net.states(x[None], model.net.sight(len(row), "bidirectional")))[0].log_softmax(-1)


# The network


def test_what_is_hidden_is_not_seen(model: LLaDA) -> None:
    "Other tokens under the same masks change nothing; one token in sight changes every position."
    torch.manual_seed(0)
    tokens, hidden = torch.randint(2, V, (3, 9)), torch.rand(3, 9) < 0.6
    hidden[:, 4] = False
    other, seen = torch.where(hidden, torch.randint(2, V, (3, 9)), tokens), tokens.clone()
    seen[:, 4] = (seen[:, 4] + 1) % V
    states = model.states(tokens, hidden)
    assert torch.equal(model.states(other, hidden), states)
    assert ((model.states(seen, hidden) - states).abs().amax(-1) > 1e-4).all()


def test_a_row_of_masks_knows_its_places(model: LLaDA) -> None:
    "All positions differ, and without the mark of the beginning none does."
    tokens, hidden = torch.zeros(1, 9, dtype=torch.long), torch.ones(1, 9, dtype=torch.bool)
    states = model.states(tokens, hidden)[0]
    assert min((a - b).abs().max().item() for a, b in itertools.combinations(states, 2)) > 1e-4
    blind = made()
    with torch.no_grad(): blind.net.wte.weight[1] = 0
    assert blind.states(tokens, hidden)[0].std(0).max() < 1e-5


def test_documents_may_be_kept_apart(model: LLaDA) -> None:
    "With documents given, each is computed as if it were alone at the beginning of a row: rotary angles tell distances only."
    torch.manual_seed(0)
    tokens, hidden = torch.randint(2, V, (1, 10)), torch.rand(1, 10) < 0.5
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1, 1]])
    found = model.states(tokens, hidden, documents)
    for part in (slice(0, 4), slice(4, 10)):
        torch.testing.assert_close(found[:, part], model.states(tokens[:, part], hidden[:, part]), atol=1e-4, rtol=1e-4)


# Loss


def test_each_t_is_uniform_and_the_batch_is_evenly_spread(model: LLaDA) -> None:
    "Kolmogorov-Smirnov for a single row (99.99% point), equal steps between rows, tokens hidden as often as t says."
    source, count = torch.Generator().manual_seed(1), 3000
    drawn = [model.draw(8, 200, source) for _ in range(count)]
    for row in (0, 5):
        t = torch.stack([noise.t[row] for noise in drawn]).sort().values
        assert t.min() >= 1e-3 and t.max() < 1
        assert (t - torch.arange(1, count + 1) / count).abs().max() < 2.23 / math.sqrt(count)
    for noise in drawn[:50]: torch.testing.assert_close(noise.t.sort().values.diff(), torch.full((7,), 0.999 / 8), atol=1e-5, rtol=0)
    off = torch.stack([(noise.hidden.float().mean(1) - noise.t) / (noise.t * (1 - noise.t) / 200).sqrt() for noise in drawn])
    assert abs(off.mean().item()) < 0.05 and off.std().item() == pytest.approx(1, abs=0.05)


def test_loss_is_a_loop_over_hidden_tokens(model: LLaDA) -> None:
    "Padding counts like all else; one row has nothing hidden."
    torch.manual_seed(0)
    tokens, document = torch.randint(0, V, (4, 7)), torch.zeros(4, 7, dtype=torch.long)
    document[1, 4:] = -1
    noise = Noise(t=torch.tensor([0.1, 0.5, 0.9, 0.002]), hidden=torch.rand(4, 7) < torch.tensor([[0.3], [0.5], [0.9], [0.0]]))
    cost, right = 0.0, 0.0
    for row, hidden, t in zip(tokens, noise.hidden, noise.t):
        found = log_p(model, row, hidden)
        for i in hidden.nonzero()[:, 0].tolist(): cost, right = cost - found[i, row[i]].item() / t.item(), right + found[i, row[i]].exp().item()
    terms = model.terms(tokens, document, noise, model.totals(document, noise))
    assert terms["loss"].item() == pytest.approx(cost / 28, rel=1e-5)
    assert terms["guessed"].item() == pytest.approx(right / noise.hidden.sum().item(), rel=1e-4)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=4), st.integers(0, 1000))
def test_parts_of_a_batch_add_up(parts: list[int], seed: int) -> None:
    "Every term is a sum over the parts."
    model, rows = made(), sum(parts)
    source = torch.Generator().manual_seed(seed)
    tokens, document = torch.randint(0, V, (rows, 6), generator=source), torch.zeros(rows, 6, dtype=torch.long)
    noise = model.draw(rows, 6, source)
    totals = model.totals(document, noise)
    whole, first, added = model.terms(tokens, document, noise, totals), 0, {"loss": 0.0, "guessed": 0.0}
    for size in parts:
        part, first = slice(first, first + size), first + size
        for name, value in model.terms(tokens[part], document[part], noise[part], totals).items(): added[name] += value.item()
    assert added == pytest.approx({name: value.item() for name, value in whole.items()}, rel=1e-4, abs=1e-6)


def test_nothing_hidden_costs_nothing() -> None:
    "No division by zero, and gradients that are zero."
    model = made().train()
    tokens, document = torch.randint(0, V, (2, 6)), torch.zeros(2, 6, dtype=torch.long)
    noise = Noise(t=torch.full((2,), 1e-3), hidden=torch.zeros(2, 6, dtype=torch.bool))
    terms = model.terms(tokens, document, noise, model.totals(document, noise))
    terms["loss"].backward()
    assert {name: value.item() for name, value in terms.items()} == {"loss": 0.0, "guessed": 0.0}
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_logits_may_be_made_in_parts(model: LLaDA) -> None:
    "A few rows of logits at a time: the same losses and gradients as with all of them, hidden tokens weighed differently."
    torch.manual_seed(0)
    tokens, hidden, weight = torch.randint(0, V, (5, 7)), torch.rand(5, 7) < 0.5, torch.rand(5, 7)
    found = []
    for most in (2**27, 3 * V):
        net, states = made().net, torch.randn(5, 7, 32, generator=torch.Generator().manual_seed(2)).requires_grad_()
        losses = _hidden_losses(net.final_layer.weight, states, tokens, hidden, most)
        (losses * weight).sum().backward()
        found.append((losses.detach(), states.grad, net.final_layer.weight.grad))
    for a, b in zip(*found): torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    dense = F.cross_entropy(made().net.final_layer(states.detach()).flatten(0, 1), tokens.flatten(), reduction="none").view(5, 7)
    torch.testing.assert_close(found[0][0], dense.detach() * hidden, atol=1e-5, rtol=1e-4)


def test_half_precision_changes_little(model: LLaDA) -> None:
    "Under bf16 autocast the loss is a 32-bit number near the other."
    tokens, document = torch.randint(0, V, (8, 20), generator=torch.Generator().manual_seed(0)), torch.zeros(8, 20, dtype=torch.long)
    noise = model.draw(8, 20, torch.Generator().manual_seed(0))
    totals = model.totals(document, noise)
    exact = model.terms(tokens, document, noise, totals)["loss"]
    with torch.autocast("cpu", torch.bfloat16): rough = model.terms(tokens, document, noise, totals)["loss"]
    assert rough.dtype == torch.float32 and rough.item() == pytest.approx(exact.item(), rel=0.03)


def test_loss_has_the_mean_of_the_bound(model: LLaDA) -> None:
    "Weights 1 / t and weights M / l are two ways to the same number (but for t below its floor)."
    row, document = torch.randint(2, V, (1, 4), generator=torch.Generator().manual_seed(3)), torch.zeros(1, 4, dtype=torch.long)
    noise = model.draw(60_000, 4, torch.Generator().manual_seed(4))
    many, owner = row.expand(60_000, 4), document.expand(60_000, 4)
    with torch.no_grad(): loss = model.terms(many, owner, noise, model.totals(owner, noise))["loss"].item() * 4
    assert loss == pytest.approx(-bound_by_orders(model, row[0], [], [0, 1, 2, 3]), rel=0.02)


# The bound


def bound_by_orders(model: LLaDA, row: torch.Tensor, given: list[int], scored: list[int]) -> float:
    "The chain rule, in every order of the scored positions; what is neither given nor scored is never in sight."
    totals = []
    for order in itertools.permutations(scored):
        total = 0.0
        for k, place in enumerate(order):
            hidden = torch.tensor([i not in (*given, *order[:k]) for i in range(len(row))])
            total += log_p(model, row, hidden)[place, row[place]].item()
        totals.append(total)
    return sum(totals) / len(totals)


def bound_by_sets(model: LLaDA, row: torch.Tensor, given: list[int], scored: list[int]) -> float:
    "Every set of hidden tokens with its chance 1 / (M choose l) / M and its weight M / l."
    total, m = 0.0, len(scored)
    for l in range(1, m + 1):
        for chosen in itertools.combinations(scored, l):
            hidden = torch.tensor([i in chosen or i not in (*given, *scored) for i in range(len(row))])
            found = log_p(model, row, hidden)
            total += sum(found[i, row[i]].item() for i in chosen) / l / math.comb(m, l)
    return total


SPLITS = [([], [0, 1, 2, 3]), ([0], [1, 2, 3]), ([1, 3], [0, 2]), ([2], [0, 4]), ([0, 1, 2, 4], [3]), ([], [4])]


@pytest.mark.parametrize("given_at, scored_at", SPLITS, ids=str)
def test_draws_are_unbiased(model: LLaDA, given_at: list[int], scored_at: list[int]) -> None:
    "All orders, all sets, and the mean of many draws agree; and the draws are as even as they claim."
    row = torch.randint(2, V, (5,), generator=torch.Generator().manual_seed(7))
    exact = bound_by_orders(model, row, given_at, scored_at)
    assert bound_by_sets(model, row, given_at, scored_at) == pytest.approx(exact, abs=1e-4)
    given, scored = (torch.tensor([[i in places for i in range(5)]]) for places in (given_at, scored_at))
    means = torch.stack([model.log_weights(row[None], given, scored, 5, sources(1, seed)).mean() for seed in range(200)])
    assert abs(means.mean().item() - exact) < 4.5 * means.std().item() / math.sqrt(200) + 1e-4


def test_draws_hide_what_they_should(model: LLaDA, monkeypatch: pytest.MonkeyPatch) -> None:
    "Given tokens never, unknown ones always, each number of scored ones equally often, each set of a number too; and the value follows."
    row = torch.randint(2, V, (6,), generator=torch.Generator().manual_seed(7))
    given, scored = torch.tensor([[True, False, False, False, True, False]]), torch.tensor([[False, True, True, True, False, False]])
    seen, states = [], LLaDA.states
    monkeypatch.setattr(LLaDA, "states", lambda self, tokens, hidden, documents=None: seen.append(hidden.clone()) or states(self, tokens, hidden, documents))
    found = model.log_weights(row[None], given, scored, 3000, sources(1), at_once=600)[:, 0]
    hidden = torch.cat(seen)
    assert len(seen) == 30 and hidden.shape == (3000, 6)
    assert not hidden[:, [0, 4]].any() and hidden[:, 5].all()
    assert hidden[:, 1:4].sum(1).bincount().tolist() == [0, 1000, 1000, 1000]
    sets = (hidden[:, 1:4] * torch.tensor([1, 2, 4])).sum(1).bincount(minlength=8)
    for alike in ([1, 2, 4], [3, 5, 6]): assert ((sets[alike] - 1000 / 3) ** 2 / (1000 / 3)).sum() < 18.4  # chi-square, 2 degrees, 99.99%
    seen.clear()
    for seed in range(900): model.log_weights(row[None], given, scored, 1, sources(1, seed))  # a single draw is as even
    counts = torch.cat(seen)[:, 1:4].sum(1).bincount(minlength=4)[1:]
    assert ((counts - 300) ** 2 / 300).sum() < 18.4
    monkeypatch.undo()
    for at in (0, 1, 777, 2999):
        asked = (hidden[at] & scored[0]).nonzero()[:, 0].tolist()
        p = log_p(model, row, hidden[at])
        assert found[at].item() == pytest.approx(3 / len(asked) * sum(p[i, row[i]].item() for i in asked), abs=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.sampled_from("gsu"), min_size=6, max_size=6), min_size=1, max_size=4), st.integers(1, 9), st.integers(1, 60))
def test_a_score_depends_on_nothing_else(roles: list[list[str]], samples: int, at_once: int) -> None:
    "Not on other rows, not on how many are computed at once, not on the tokens of unknown places; and no score is above 0."
    model, source = made(), torch.Generator().manual_seed(0)
    tokens = torch.randint(2, V, (len(roles), 6), generator=source)
    given, scored = (torch.tensor([[role == kind for role in row] for row in roles]) for kind in "gs")
    found = model.log_weights(tokens, given, scored, samples, sources(len(roles)))
    assert found.shape == (samples, len(roles)) and (found <= 0).all()
    assert not found[:, ~scored.any(1)].any()
    other = torch.where(given | scored, tokens, 3)
    parts = model.log_weights(other, given, scored, samples, sources(len(roles)), at_once)
    alone = [model.log_weights(tokens[[r]], given[[r]], scored[[r]], samples, sources(1, r))[:, 0] for r in range(len(roles))]
    for again in (parts, torch.stack(alone, 1)): torch.testing.assert_close(again, found, atol=1e-4, rtol=1e-4)


def test_a_model_without_an_opinion_scores_exactly() -> None:
    "-M log V in each draw."
    model = made()
    with torch.no_grad(): model.net.final_layer.weight.zero_()
    scored = torch.tensor([[True] * 7, [True, False] * 3 + [True]])
    found = model.log_weights(torch.zeros(2, 7, dtype=torch.long), ~scored, scored, 10, sources(2))
    torch.testing.assert_close(found, torch.tensor([[-7 * math.log(V), -4 * math.log(V)]]).expand(10, 2), atol=1e-4, rtol=1e-5)


def test_what_is_given_cannot_be_asked_for(model: LLaDA) -> None:
    "The place is named."
    both = torch.tensor([[False] * 4, [False, False, True, False]])
    with pytest.raises(PromptError, match=r"\[1, 2\] is given and scored"): model.log_weights(torch.zeros(2, 4, dtype=torch.long), both, both, 1, sources(2))


# A language of three tokens, whose ids are 2 and 3

JOINT = torch.tensor([0.02, 0.30, 0.05, 0.13, 0.24, 0.01, 0.20, 0.05])
TEXTS = torch.tensor(list(itertools.product((2, 3), repeat=3)))


class Oracle(LLaDA, kind="llada"):
    "Knows every conditional; positions behind the third are the end."

    def states(self, tokens: torch.Tensor, hidden: torch.Tensor, documents: torch.Tensor | None = None) -> torch.Tensor:
        "Log-probabilities, which the last layer passes on."
        fits = ((tokens[:, None, :3] == TEXTS) | hidden[:, None, :3]).all(2).float()
        found = torch.einsum("bt,t,tiv->biv", fits, JOINT, F.one_hot(TEXTS, 4).float())
        end = F.one_hot(torch.ones(len(tokens), tokens.shape[1] - 3, dtype=torch.long), 4)
        return (torch.cat([found / found.sum(-1, keepdim=True), end], 1) + 1e-30).log()


Baseline.kinds["llada"] = LLaDA  # the oracle does not take its place


def oracle() -> Oracle:
    "With a last layer that changes nothing."
    model = Oracle(BaselineConfig(vocab_size=4, **SMALL | dict(dim=4))).eval()
    with torch.no_grad(): model.net.final_layer.weight.copy_(torch.eye(4))
    return model


def frequencies(found: list[list[int]]) -> torch.Tensor:
    "How often each text was written."
    return torch.tensor([sum(ids == text for ids in found) for text in TEXTS.tolist()])


def test_a_bound_of_exact_conditionals_is_the_probability() -> None:
    "For whole texts, and for a part of one given another."
    model, all_of_it = oracle(), torch.ones(8, 3, dtype=torch.bool)
    found = model.log_weights(TEXTS, ~all_of_it, all_of_it, 1500, sources(8)).mean(0)
    torch.testing.assert_close(found, JOINT.log(), atol=0.15, rtol=0)
    given, scored = (torch.tensor([[i == place for i in range(3)]]).expand(8, 3) for place in (2, 0))
    last = [JOINT[TEXTS[:, 2] == text[2]].sum() for text in TEXTS]
    pair = [JOINT[(TEXTS[:, [0, 2]] == text[[0, 2]]).all(1)].sum() for text in TEXTS]
    torch.testing.assert_close(model.log_weights(TEXTS, given, scored, 1, sources(8))[0], (torch.stack(pair) / torch.stack(last)).log(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("options", [dict(steps=4), dict(steps=9), dict(steps=4, block_size=1), dict(steps=2, block_size=2)], ids=str)
def test_one_token_after_another_is_the_exact_law(options: dict) -> None:
    "In random order, and from left to right: chi-square of 3000 texts below its 99.99% point; all end."
    config = GenerationConfig(max_length=4, temperature=1.0, remasking="random", **options)
    found = oracle().generate(3000, config, range(3000))
    counts = frequencies(found.tokens)
    assert set(found.reasons) == {"end"} and counts.sum() == 3000
    assert ((counts - 3000 * JOINT) ** 2 / (3000 * JOINT)).sum() < 29.9


def test_tokens_of_one_step_do_not_know_of_each_other() -> None:
    "A single step draws from the product of the marginals."
    counts = frequencies(oracle().generate(3000, GenerationConfig(max_length=4, temperature=1.0, remasking="random", steps=1), range(3000)).tokens)
    ones = torch.stack([JOINT[TEXTS[:, i] == 3].sum() for i in range(3)])
    law = torch.where(TEXTS == 3, ones, 1 - ones).prod(1)
    assert ((counts - 3000 * law) ** 2 / (3000 * law)).sum() < 29.9
    assert ((counts - 3000 * JOINT) ** 2 / (3000 * JOINT)).sum() > 300


def test_a_prompt_is_kept_to() -> None:
    "What follows a first token has the probabilities that the language gives it."
    config = GenerationConfig(max_length=4, temperature=1.0, remasking="random", steps=9)
    counts = frequencies([[3, *ids] for ids in oracle().generate([[3]] * 3000, config, range(3000)).tokens])
    law = JOINT[4:] / JOINT[4:].sum()
    assert ((counts[4:] - 3000 * law) ** 2 / (3000 * law)).sum() < 21.1 and not counts[:4].any()  # 3 degrees of freedom


# Writing


def written_plainly(model: LLaDA, prompt: list[int], config: GenerationConfig, seed: int) -> list[int]:
    "One row, one mask at a time, with sorted lists: greedy choices only."
    source, start, end = seed_source(seed), len(prompt), min(config.max_length, len(prompt) + config.max_new_tokens)
    row = prompt + [MASK] * (config.max_length - len(prompt))
    while start < end and 1 not in row[len(prompt) : start]:
        size = min(config.block_size or end, end - start)
        chance = torch.rand(size, generator=source).tolist() if config.remasking == "random" else None
        steps = min(config.steps, size)
        for step in range(steps):
            guesses = {}
            for i in range(start, start + size):
                if row[i] != MASK: continue
                p = log_p(model, torch.tensor(row), torch.tensor([token == MASK for token in row]))[i]
                guesses[i] = (chance[i - start] if chance else p.max().item(), p.argmax().item())
            stay = size * (step + 1) // steps - size * step // steps
            for i in sorted(guesses, key=lambda i: -guesses[i][0])[:stay]: row[i] = guesses[i][1]
            if not chance: torch.rand(len(guesses), generator=source)  # for choices that greed does not need
        start += size
    out = row[len(prompt) : start]
    return out[: out.index(1)] if 1 in out else out


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(2, 39), max_size=5),
    st.integers(1, 9),
    st.integers(1, 12),
    st.sampled_from([None, 1, 3, 4]),
    st.sampled_from(["confidence", "random"]),
    st.integers(0, 2**40),
)
def test_greedy_writing_is_that_of_a_plain_loop(prompt: list[int], new: int, steps: int, block_size: int | None, remasking: str, seed: int) -> None:
    "Any prompt, number of tokens, steps, blocks and order."
    block_size = block_size if remasking == "confidence" else None  # random numbers of a second block come after those of the choices
    config = GenerationConfig(max_length=10, max_new_tokens=new, steps=steps, block_size=block_size, remasking=remasking)
    model = made()
    assert model.generate([prompt] if prompt else 1, config, [seed]).tokens == [written_plainly(model, prompt, config, seed)]


WAYS = st.fixed_dictionaries(
    {
        "steps": st.integers(1, 8),
        "block_size": st.sampled_from([None, 1, 3]),
        "remasking": st.sampled_from(["confidence", "random"]),
        "temperature": st.sampled_from([0.0, 0.9]),
        "repetition_penalty": st.sampled_from([1.0, 2.0]),
        "stop_tokens": st.sampled_from([(), (7, 9)]),
    }
)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(2, 39), min_size=1, max_size=7), min_size=2, max_size=4), WAYS, st.integers(0, 2**40))
def test_a_row_never_depends_on_its_neighbours(prompts: list[list[int]], ways: dict, seed: int) -> None:
    "Prompts of any lengths together, in reverse, and alone."
    model, config, seeds = made(), GenerationConfig(max_length=12, max_new_tokens=8, **ways), [seed + i for i in range(len(prompts))]
    together = model.generate(prompts, config, seeds)
    reverse = model.generate(prompts[::-1], config, seeds[::-1])
    alone = [model.generate([p], config, [s]) for p, s in zip(prompts, seeds)]
    assert together.tokens == reverse.tokens[::-1] == [one.tokens[0] for one in alone]
    assert together.reasons == reverse.reasons[::-1] == [one.reasons[0] for one in alone]


@pytest.mark.parametrize(
    "options, forwards",
    [(dict(steps=3), 3), (dict(steps=99), 8), (dict(steps=2, block_size=3), 6), (dict(steps=9, block_size=3), 8)],
    ids=str,
)
def test_steps_are_forwards_of_a_whole_row(monkeypatch: pytest.MonkeyPatch, options: dict, forwards: int) -> None:
    "For each block as many as asked for, at most one for a mask; what lies behind the limit stays masked."
    model, shapes, states = made(), [], LLaDA.states
    with torch.no_grad(): model.net.final_layer.weight[1] = 0  # never the end, or hardly
    watched = lambda self, tokens, hidden: shapes.append((tokens.shape, hidden[0, 10:].all().item())) or states(self, tokens, hidden)
    monkeypatch.setattr(LLaDA, "states", watched)
    written = model.generate([[3, 4]], GenerationConfig(max_length=15, max_new_tokens=8, **options), [0])
    assert shapes == [((1, 15), True)] * forwards
    assert len(written.tokens[0]) == 8 and written.reasons == ["length"]


def test_steps_share_the_masks_evenly(model: LLaDA) -> None:
    "What is written stays; ten masks in four steps fall as 2, 3, 2, 3, in rows with different spans at once."
    canvas = torch.full((2, 16), MASK)
    canvas[1, :3] = torch.tensor([5, 6, 7])
    config, left, before = GenerationConfig(steps=4, temperature=1.0), [], canvas
    for after in model.unmask(canvas, [0, 3], [10, 5], config, sources(2)):
        assert torch.equal(after[before != MASK], before[before != MASK])
        left.append((after == MASK).sum(1).tolist())
        before = after
    assert left == [[14, 12], [11, 11], [9, 11], [6, 11]]
    assert (before[0, :10] < V).all() and (before[0, 10:] == MASK).all() and (before[1, 5:] == MASK).all()


def test_blocks_end_with_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    "Rows that have come to their end leave, and when the last has, nothing more is computed."
    rows, model = [], oracle()
    states = Oracle.states
    monkeypatch.setattr(Oracle, "states", lambda self, tokens, hidden, documents=None: rows.append(len(tokens)) or states(self, tokens, hidden))
    written = model.generate([[2, 3, 2], [2, 3], [2]], GenerationConfig(max_length=30, block_size=1), range(3))
    assert rows == [3, 2, 1] and written.reasons == ["end"] * 3 and [len(ids) for ids in written.tokens] == [0, 1, 2]


def test_the_penalty_is_for_words_already_written(model: LLaDA) -> None:
    "A heavy penalty leaves no token twice, without it some are; padding is no word, and is never worn."
    repeats = lambda ids: sum(ids.count(token) > 1 for token in set(ids) - {0})
    free, worn = (model.generate(6, GenerationConfig(max_length=16, repetition_penalty=r)).tokens for r in (1.0, 100.0))
    steps = model.generate(6, GenerationConfig(max_length=16, repetition_penalty=100.0, block_size=1)).tokens
    assert any(map(repeats, free)) and not any(map(repeats, steps)) and worn != free
    padded, likely = oracle(), torch.tensor([0.9, 0.0, 0.1, 0.0]).clamp(min=1e-30).log()
    padded.states = lambda tokens, hidden: likely.expand(*tokens.shape, 4)
    config, seen = GenerationConfig(steps=6, repetition_penalty=100.0), torch.zeros(1, 5, dtype=torch.bool)
    *_, canvas = padded.unmask(torch.full((1, 6), 4), [0], [6], config, sources(1), seen)
    assert not canvas.any()


def test_texts_end_where_they_are_told_to() -> None:
    "At a stop string, at the limit of new tokens, at that of the row."
    tokenizer = load_tokenizer(data_dir() / "pretrained" / "tokenizer.json")
    torch.manual_seed(1)
    model = Baseline.make(BaselineConfig(vocab_size=860, **SMALL), tokenizer).eval()
    with torch.no_grad(): model.net.final_layer.weight.zero_()
    free = model.generate(["Anna lived"], GenerationConfig(max_length=40, max_new_tokens=7, temperature=1.0), [3])
    assert free.reasons == ["length"] and len(free.tokens[0]) == 7
    word = free.texts[0][4:7]
    cut = model.generate(["Anna lived"], GenerationConfig(max_length=40, max_new_tokens=7, temperature=1.0, stop=(word,)), [3])
    assert cut.reasons == ["stop"] and cut.texts[0] == free.texts[0][: free.texts[0].index(word)]
    limit = model.generate(["Anna lived"], GenerationConfig(max_length=5, max_new_tokens=70, temperature=1.0), [3])
    assert len(limit.tokens[0]) == 5 - len(tokenizer.encode("Anna lived", add_special_tokens=False).ids)


@pytest.mark.parametrize(
    "asked, config, error",
    [
        ([], {}, PromptError),
        ([[]], {}, PromptError),
        ([[MASK]], {}, PromptError),
        ([[3] * 20], dict(max_length=20), PromptError),
        ([[3]], dict(num_blocks=2), ConfigError),
    ],
    ids=str,
)
def test_what_cannot_be_written_is_named(model: LLaDA, asked: list, config: dict, error: type) -> None:
    "The mask is no token that a prompt may hold."
    with pytest.raises(error): model.generate(asked, GenerationConfig(**config))


def test_an_unknown_order_is_named() -> None:
    "With what there is."
    with pytest.raises(ConfigError, match="^remasking is 'left'.*confidence, random"): GenerationConfig(remasking="left")


# Files and training


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    "Weights, the mask's row among them, and settings; a shipped record that knows no remasking is read too."
    model = made()
    model.generation = GenerationConfig(max_length=12, remasking="random")
    read = open_model(model.save_pretrained(tmp_path / "m"))
    assert type(read) is LLaDA and read.generation == model.generation and read.net.wte.weight.shape == (V + 1, 32)
    assert all(torch.equal(a, b) for a, b in zip(read.state_dict().values(), model.state_dict().values(), strict=True))
    assert read.generate(2).tokens == model.generate(2).tokens
    assert open_model(data_dir() / "pretrained").generation.remasking == "confidence"


def repeating() -> Dataset:
    "Eight rows, all alike, with padding."
    row = [5, 3, 9, 2, 4, 9, 8, 3, 1, 0, 0, 0]
    return Dataset.from_dict({"tokens": [row] * 8, "document": [[0] * 9 + [-1] * 3] * 8}).with_format("torch")


def test_a_repeating_text_is_learned_and_written() -> None:
    "From nothing but masks, end and padding included; its bound says that nothing is left to chance."
    torch.manual_seed(0)
    model = Baseline.make(BaselineConfig(vocab_size=12, rope_theta=100.0, **SMALL))
    history = Trainer(model, repeating(), BaselineTraining(steps=250, batch_size=8, learning_rate=1e-2, warmup_steps=5)).run(progress=False)
    assert history[0]["loss"] > 1.5 and history[-1]["loss"] < 0.2 and history[-1]["guessed"] > 0.8
    row = repeating()[0]["tokens"][None]
    assert model.log_weights(row, row < 0, row >= 0, 32, sources(1)).mean() > -2
    written = model.generate(3, GenerationConfig(max_length=12, steps=12, remasking="random", temperature=0.3))
    assert written.tokens == [row[0, :8].tolist()] * 3 and written.reasons == ["end"] * 3


@pytest.mark.parametrize("within", [False, True])
def test_micro_batches_train_alike(within: bool) -> None:
    "One row at a time or eight, with documents kept apart or not: the same weights."
    found = []
    for size in (0, 1):
        torch.manual_seed(0)
        model, config = Baseline.make(BaselineConfig(vocab_size=12, **SMALL)), BaselineTraining(steps=3, batch_size=8, warmup_steps=1, within_documents=within)
        trainer = Trainer(model, repeating(), config)
        trainer.scale = replace(trainer.scale, micro_batch_size=size)
        values = [trainer.train_step() for _ in range(3)]
        found.append((values[-1]["loss"], values[-1]["guessed"], *(p.detach().clone() for p in model.parameters())))
    for a, b in zip(*found, strict=True): torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)
