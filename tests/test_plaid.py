"Diffusion of embeddings against loops, closed forms, and a little language whose posterior is known."

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
from torch import Tensor

from cola_tutorial.baselines import Baseline, Plaid, _expected, _hidden_losses, open_model
from cola_tutorial.config import BaselineConfig, BaselineTraining, ConfigError, GenerationConfig, data_dir
from cola_tutorial.generation import PromptError
from cola_tutorial.objectives import Noise
from cola_tutorial.text.corpus import load_tokenizer
from cola_tutorial.training import Trainer

V, D = 40, 6
SMALL = dict(kind="plaid", dim=32, num_heads=2, head_dim=16, num_layers=2, ffn_dim=48, embedding_dim=D)


def made(vocab_size: int = V, scale: float = 4.0, **changes) -> Plaid:
    "A small model with random weights that are not tiny, so that its guesses differ."
    torch.manual_seed(5)
    model = Baseline.make(BaselineConfig(vocab_size=vocab_size, **SMALL | changes)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters(): p.mul_(scale if p.ndim > 1 and "points" not in name else 1.0)
    return model


@pytest.fixture(scope="module")
def model() -> Plaid:
    "Shared by tests that change nothing in it."
    return made()


def sources(rows: int, first: int = 0) -> list[torch.Generator]:
    "A generator for each row."
    return [torch.Generator().manual_seed(first + row) for row in range(rows)]


@torch.no_grad()
def log_p(model: Plaid, z: Tensor, gamma: Tensor, given: Tensor, row: Tensor) -> Tensor:
    "Dense log-probabilities (L, V) of one row, position by position, from the formulas of the lesson."
    points = torch.stack([e / e.norm() * D**0.5 for e in model.net.points.weight])
    inputs, evidence = [], []
    for i in range(len(row)):
        variance = 1 / (1 + math.exp(-gamma[i].item()))
        evidence.append(points @ z[i] * math.sqrt(1 - variance) / variance)
        p = evidence[i].double().exp().div(evidence[i].double().exp().sum()).float()
        soft = sum(share * word for share, word in zip(p, model.net.wte.weight[:V])) + model.net.wte.weight[V]
        inputs.append(model.net.wte.weight[row[i]] if given[i] else soft)
    inputs[0] = inputs[0] + model.net.wte.weight[model.config.end_id]
    h = model.net.states(torch.stack(inputs)[None], model.net.sight(len(row), "bidirectional"))
    return (model.net.final_layer(h)[0] + torch.stack(evidence)).log_softmax(-1)


def a_row(length: int = 5, seed: int = 7) -> tuple[Tensor, Tensor]:
    "Tokens and the noise of their points."
    source = torch.Generator().manual_seed(seed)
    return torch.randint(2, V, (length,), generator=source), torch.randn(length, D, generator=source)


# Points and levels


def test_points_lie_on_a_sphere(model: Plaid) -> None:
    "However long the weights are; and what drifts has the same size in the mean at every level."
    assert torch.allclose(model.points.norm(dim=-1), torch.full((V,), D**0.5), atol=1e-5)
    noise = torch.randn(V, 4000, D, generator=torch.Generator().manual_seed(0))
    for gamma in (-3.0, 0.0, 2.0, 9.0):
        z = model.drifted(model.points.detach()[:, None], torch.tensor(gamma), noise)
        assert z.square().mean().item() == pytest.approx(1, abs=0.02)
        signal = (z * model.points.detach()[:, None]).sum(-1).mean() / D
        assert signal.item() == pytest.approx(math.sqrt(1 / (1 + math.exp(gamma))), abs=0.01)


def test_levels_follow_a_logistic_law(model: Plaid) -> None:
    "Ends, monotony, the law's own distribution function, and the slope as autograd finds it."
    t = torch.linspace(0, 1, 501, dtype=torch.float64).requires_grad_()
    gamma, slope = model.levels(t)
    assert gamma[0].item() == pytest.approx(-3, abs=1e-6) and gamma[-1].item() == pytest.approx(9, abs=1e-6)
    assert (gamma.diff() > 0).all()
    torch.testing.assert_close(torch.autograd.grad(gamma.sum(), t)[0], slope.detach(), rtol=1e-6, atol=1e-6)
    law = lambda x: 1 / (1 + torch.exp(-(x - 1.5)))
    ends = law(torch.tensor([-3.0, 9.0], dtype=torch.float64))
    torch.testing.assert_close((law(gamma) - ends[0]) / (ends[1] - ends[0]), t, rtol=1e-6, atol=1e-6)


def test_the_vocabulary_is_attended_to() -> None:
    "A softmax written out."
    source = torch.Generator().manual_seed(0)
    queries, keys, values = (torch.randn(*shape, generator=source) for shape in ((2, 3, 4), (7, 4), (7, 5)))
    wanted = (queries @ keys.T).softmax(-1) @ values
    torch.testing.assert_close(_expected(queries, keys, values), wanted)


# The network


@pytest.mark.parametrize("level", [-3.0, 0.5, 3.0, 9.0])
def test_states_are_the_formula(model: Plaid, level: float) -> None:
    "Against the loop, with some tokens given and levels that differ from place to place."
    row, noise = a_row()
    gamma, known = torch.tensor([level, level, 2.0, level, 9.0]), torch.tensor([True, False, False, True, False])
    z = model.drifted(model.points[row], gamma, noise)
    found = (model.states(z[None], gamma[None], known[None], row[None]) @ model.head().T)[0].log_softmax(-1)
    torch.testing.assert_close(found, log_p(model, z, gamma, known, row), atol=1e-4, rtol=1e-4)


def test_what_is_known_is_not_read_from_the_fog(model: Plaid) -> None:
    "The drifted point of a given token changes no other place; the number of a token that is not given changes none at all."
    row, noise = a_row()
    gamma, known = torch.zeros(1, 5), torch.tensor([[True, False, True, False, False]])
    z = model.drifted(model.points[row][None], gamma, noise[None])
    states = model.states(z, gamma, known, row[None])
    assert torch.equal(model.states(z, gamma, known, torch.where(known, row, 3)), states)
    moved = model.states(torch.where(known[..., None], z + 1, z), gamma, known, row[None])
    assert torch.equal(moved[..., :-D], states[..., :-D])
    other = model.states(z, gamma, known, torch.where(torch.arange(5) == 2, (row + 1) % V, row)[None])
    assert ((other - states).abs().amax(-1) > 1e-4).all()


def test_documents_may_be_kept_apart(model: Plaid) -> None:
    "With documents given, each is computed as if it were alone at the beginning of a row: rotary angles tell distances only."
    row, noise = a_row(10)
    gamma, known = torch.full((1, 10), 1.0), torch.arange(10)[None] % 3 == 1
    z, documents = model.drifted(model.points[row][None], gamma, noise[None]), torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1, 1]])
    found = model.states(z, gamma, known, row[None], documents)
    for part in (slice(0, 4), slice(4, 10)):
        alone = model.states(z[:, part], gamma[:, part], known[:, part], row[None, part])
        torch.testing.assert_close(found[:, part], alone, atol=1e-4, rtol=1e-4)


# Loss


def test_what_is_drawn(model: Plaid) -> None:
    "Times evenly spread, noise normal, a beginning given in a quarter of the rows, of any length."
    source = torch.Generator().manual_seed(1)
    drawn = [model.draw(8, 20, source) for _ in range(2000)]
    for noise in drawn[:50]: torch.testing.assert_close(noise.t.sort().values.diff(), torch.full((7,), 1 / 8), atol=1e-5, rtol=0)
    t = torch.stack([noise.t[3] for noise in drawn]).sort().values
    assert (t - torch.arange(1, 2001) / 2000).abs().max() < 2.23 / math.sqrt(2000)
    eps = torch.stack([noise.z_1 for noise in drawn])
    assert eps.shape == (2000, 8, 20, D) and abs(eps.mean().item()) < 0.01 and eps.std().item() == pytest.approx(1, abs=0.01)
    known = torch.stack([noise.pinned for noise in drawn]).flatten(0, 1)
    assert (known[:, :-1] | ~known[:, 1:]).all()  # a beginning, without gaps
    lengths = known.sum(1)
    assert (lengths > 0).float().mean().item() == pytest.approx(0.25, abs=0.015)
    assert lengths.max() == 20 and lengths[lengths > 0].float().mean().item() == pytest.approx(10.5, abs=0.5)


def test_loss_is_a_loop_over_tokens(model: Plaid) -> None:
    "Padding counts like all else; what is given does not."
    torch.manual_seed(0)
    tokens, document = torch.randint(0, V, (3, 6)), torch.zeros(3, 6, dtype=torch.long)
    document[1, 4:] = -1
    noise = Noise(t=torch.tensor([0.1, 0.5, 0.9]), z_1=torch.randn(3, 6, D), pinned=torch.arange(6) < torch.tensor([[0], [2], [5]]))
    cost, right, count = 0.0, 0.0, 0
    for r in range(3):
        gamma = model.levels(noise.t[r])[0].expand(6)
        found = log_p(model, model.drifted(model.points[tokens[r]], gamma, noise.z_1[r]), gamma, noise.pinned[r], tokens[r])
        for i in (~noise.pinned[r]).nonzero()[:, 0].tolist():
            p = found[i, tokens[r, i]].item()
            cost, right, count = cost - p, right + math.exp(p), count + 1
    terms = model.terms(tokens, document, noise, model.totals(document, noise))
    assert count == 11 and terms["loss"].item() == pytest.approx(cost / 11, rel=1e-4)
    assert terms["guessed"].item() == pytest.approx(right / 11, rel=1e-4)


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


def test_a_row_that_is_given_whole_costs_nothing() -> None:
    "No division by zero, and gradients that are zero."
    model = made().train()
    tokens, document = torch.randint(0, V, (2, 6)), torch.zeros(2, 6, dtype=torch.long)
    noise = Noise(t=torch.tensor([0.3, 0.8]), z_1=torch.randn(2, 6, D), pinned=torch.ones(2, 6, dtype=torch.bool))
    terms = model.terms(tokens, document, noise, model.totals(document, noise))
    terms["loss"].backward()
    assert {name: value.item() for name, value in terms.items()} == {"loss": 0.0, "guessed": 0.0}
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_every_weight_learns() -> None:
    "Points through the evidence, words through the soft masks, and all blocks; given words too."
    model = made().train()
    tokens, document = torch.arange(V).view(4, 10), torch.zeros(4, 10, dtype=torch.long)
    noise = Noise(t=torch.full((4,), 0.5), z_1=torch.randn(4, 10, D), pinned=torch.arange(10) < torch.tensor([[0], [2], [5], [9]]))
    model.terms(tokens, document, noise, model.totals(document, noise))["loss"].backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters())


def test_logits_may_be_made_in_parts(model: Plaid) -> None:
    "A few rows of logits at a time, points beside the weights."
    states, tokens = torch.randn(3, 5, 32 + D, generator=torch.Generator().manual_seed(2)), torch.randint(0, V, (3, 5))
    hidden = torch.rand(3, 5) < 0.7
    few = _hidden_losses(model.head(), states, tokens, hidden, most_logits=3 * V)
    dense = F.cross_entropy((states @ model.head().T).flatten(0, 1), tokens.flatten(), reduction="none").view(3, 5) * hidden
    torch.testing.assert_close(few, dense, atol=1e-5, rtol=1e-4)


def test_half_precision_changes_little(model: Plaid) -> None:
    "Under bf16 autocast the loss is a 32-bit number near the other."
    tokens, document = torch.randint(0, V, (8, 20), generator=torch.Generator().manual_seed(0)), torch.zeros(8, 20, dtype=torch.long)
    noise = model.draw(8, 20, torch.Generator().manual_seed(0))
    totals = model.totals(document, noise)
    exact = model.terms(tokens, document, noise, totals)["loss"]
    with torch.autocast("cpu", torch.bfloat16): rough = model.terms(tokens, document, noise, totals)["loss"]
    assert rough.dtype == torch.float32 and rough.item() == pytest.approx(exact.item(), rel=0.03)


# The bound

TEXTS = torch.tensor(list(itertools.product((0, 1), repeat=3)))
JOINT = torch.tensor([0.05, 0.30, 0.02, 0.13, 0.21, 0.04, 0.16, 0.09])


class Oracle(Plaid, kind="plaid oracle"):
    "Knows the probability of each of three bits, given all drifted points, by Bayes' rule over the eight texts."

    def __init__(self):
        torch.nn.Module.__init__(self)
        self.config = BaselineConfig(vocab_size=2, **SMALL)
        self.generation = GenerationConfig()

    points = torch.tensor([[1.0] * D, [-1.0] * D])
    device = torch.device("cpu")

    def states(self, z: Tensor, gamma: Tensor, given: Tensor, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        "Logits (B, 3, 2)."
        variance = gamma.sigmoid()[..., None]
        each = ((z * (1 - variance).sqrt() / variance) @ self.points.T).masked_fill(given[..., None] & (F.one_hot(tokens, 2) == 0), -1e4)
        together = (JOINT.log() + each[:, [0, 1, 2], TEXTS].sum(-1)).softmax(-1)
        return torch.einsum("bt,tiv->biv", together, F.one_hot(TEXTS, 2).float()).clamp(min=1e-30).log()

    def head(self) -> Tensor:
        "States are logits already."
        return torch.eye(2)


del Baseline.kinds["plaid oracle"]


def true_log_p(x: Tensor, given: Tensor, scored: Tensor) -> float:
    "log p(scored | given), the rest summed out."
    agrees = lambda places: ((TEXTS == x) | ~places).all(1)
    return math.log(JOINT[agrees(given | scored)].sum() / JOINT[agrees(given)].sum())


@pytest.mark.parametrize("roles", ["sss", "gss", "sgs", "ssg", "ggs", "sss", "uss", "gsu", "sug"])
def test_with_exact_guesses_the_bound_is_the_probability(roles: str) -> None:
    "For every text: what is given is given, what is neither is summed out (it stays in the fog)."
    given, scored = (torch.tensor([role == kind for role in roles]) for kind in "gs")
    for name, x in enumerate(TEXTS):
        draws = Oracle().log_weights(x[None], given[None], scored[None], 20_000, sources(1, name))[:, 0]
        doubt = draws.std().item() / math.sqrt(len(draws))
        assert draws.mean().item() == pytest.approx(true_log_p(x, given, scored), abs=4.5 * doubt + 0.01)


def test_wrong_guesses_bound_from_below() -> None:
    "An oracle that takes the bits for independent loses what they tell of each other, on the mean over texts."
    class Blind(Oracle, kind="blind"):
        def states(self, z, gamma, given, tokens, documents=None):
            variance = gamma.sigmoid()[..., None]
            alone = torch.einsum("t,tiv->iv", JOINT, F.one_hot(TEXTS, 2).float())
            return (z * (1 - variance).sqrt() / variance) @ self.points.T + alone.log()

    del Baseline.kinds["blind"]
    scored = torch.ones(1, 3, dtype=torch.bool)
    found = [Blind().log_weights(x[None], ~scored, scored, 20_000, sources(1))[:, 0].mean().item() for x in TEXTS]
    alone = torch.einsum("t,tiv->iv", JOINT, F.one_hot(TEXTS, 2).float()).log()
    wanted = [alone[range(3), x].sum().item() for x in TEXTS]
    assert found == pytest.approx(wanted, abs=0.35)
    assert (JOINT * torch.tensor(found)).sum() < (JOINT * JOINT.log()).sum() - 0.05


def test_a_draw_is_the_formula(model: Plaid) -> None:
    "One draw of a row, from its own random numbers, by a loop."
    row, _ = a_row()
    given, scored = torch.tensor([True, False, False, False, False]), torch.tensor([False, True, True, False, True])
    found = model.log_weights(row[None], given[None], scored[None], 2, sources(1))[:, 0]
    source = torch.Generator().manual_seed(0)
    t = (torch.rand(1, generator=source) + torch.tensor([0.0, 0.5])) % 1
    drift, last = (torch.randn(2, 5, D, generator=source) for _ in range(2))
    points = model.points.detach()
    for k in range(2):
        gamma, slope = model.levels(t[k])
        levels = torch.where(given | scored, gamma, 9.0)
        z = torch.stack([e if i == 3 else model.drifted(points[row[i]], gamma, e) for i, e in enumerate(drift[k])])
        p, total = log_p(model, z, levels, given, row).exp(), 0.0
        for i in scored.nonzero()[:, 0].tolist():
            e = points[row[i]]
            total += 0.5 * math.exp(-gamma) * slope.item() * (e - p[i] @ points).square().sum().item()
            v0, v1 = (1 / (1 + math.exp(-x)) for x in (-3.0, 9.0))
            fog = torch.distributions.Normal(math.sqrt(1 - v1) * e, math.sqrt(v1))
            total += torch.distributions.kl_divergence(fog, torch.distributions.Normal(torch.zeros(D), torch.ones(D))).sum().item()
            z0 = math.sqrt(1 - v0) * e + math.sqrt(v0) * last[k, i]
            laws = torch.stack([torch.distributions.Normal(math.sqrt(1 - v0) * q, math.sqrt(v0)).log_prob(z0).sum() for q in points])
            total -= laws.log_softmax(-1)[row[i]].item()
        assert found[k].item() == pytest.approx(-total, rel=1e-3, abs=1e-3)


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
    for again in (parts, torch.stack(alone, 1)): torch.testing.assert_close(again, found, atol=1e-3, rtol=1e-4)


def test_what_is_given_cannot_be_asked_for(model: Plaid) -> None:
    "Named, with the place."
    both = torch.tensor([[False, True]])
    with pytest.raises(PromptError, match=r"\[0, 1\] is given and scored"): model.log_weights(torch.zeros(1, 2, dtype=torch.long), both, both, 1, sources(1))


def test_a_score_is_a_bound_of_the_row() -> None:
    "The interface of all rivals: values, intervals, tokens; a longer continuation costs more."
    tokenizer = load_tokenizer(data_dir() / "pretrained" / "tokenizer.json")
    torch.manual_seed(1)
    model = Baseline.make(BaselineConfig(vocab_size=860, **SMALL), tokenizer, GenerationConfig(max_length=24)).eval()
    short, long = model.score(["Anna", "Anna"], [" lived", " lived near the mill with her mother"], ended=False, samples=4)
    assert short.kind == "elbo" and short.low < short.value < short.high and short.samples == 4
    assert long.value < short.value < 0 and long.tokens > short.tokens


# Writing


def test_a_step_is_the_posterior_of_a_known_point() -> None:
    "Mean and variance of q(z_s | z_t, x), from the product of two normal laws."
    model, gammas = Oracle(), torch.tensor([2.0, 0.5])
    vt, vs = gammas.sigmoid().double()
    at, as_ = (1 - vt).sqrt(), (1 - vs).sqrt()
    ratio, extra = at / as_, vt - (at / as_) ** 2 * vs  # q(z_t | z_s) = N(ratio z_s, extra)
    precision = 1 / vs + ratio**2 / extra
    z_t, x = 0.7, 1.0
    mean = (as_ * x / vs + ratio * z_t / extra) / precision
    c = -torch.expm1(gammas[1] - gammas[0]).double()
    assert (as_ / at * (1 - c) * z_t + as_ * c * x).item() == pytest.approx(mean.item(), rel=1e-6)
    assert (vs * c).item() == pytest.approx(1 / precision.item(), rel=1e-6)
    # and the sampler takes that step: all bits known to be 0, so that the guess is the point
    sure = torch.ones(4000, 3, dtype=torch.bool)
    seen = []
    Sure = type("Sure", (Oracle,), {"states": lambda self, z, gamma, given, tokens: seen.append(z) or Oracle.states(self, z, gamma, sure, tokens)}, kind="sure")
    del Baseline.kinds["sure"]
    model, times = Sure(), (1.0, 0.6)
    list(model.clear(torch.zeros(4000, 3, dtype=torch.long), ~sure, GenerationConfig(times=(1.0, 0.6, 0.0)), sources(4000)))
    gamma = model.levels(torch.tensor(times))[0].double()
    vt, vs = gamma.sigmoid()
    c = -torch.expm1(gamma[1] - gamma[0])
    off = seen[1].double() - ((1 - vs) / (1 - vt)).sqrt() * (1 - c) * seen[0].double() - (1 - vs).sqrt() * c
    assert off.mean().abs() < 0.01 and off.std().item() == pytest.approx((vs * c).sqrt().item(), rel=0.02)


def test_exact_guesses_write_the_true_frequencies() -> None:
    "Of whole texts, and of what follows a given bit."
    config, count = GenerationConfig(steps=100), 3000
    *_, logits = Oracle().clear(torch.zeros(count, 3, dtype=torch.long), torch.zeros(count, 3, dtype=torch.bool), config, sources(count))
    shares = torch.stack([(logits.argmax(-1) == x).all(1).float().mean() for x in TEXTS])
    assert (shares - JOINT).abs().max() < 4 * math.sqrt(0.25 / count)
    given = torch.tensor([[True, False, False]]).expand(count, 3)
    *_, logits = Oracle().clear(torch.ones(count, 3, dtype=torch.long), given, config, sources(count))
    shares = torch.stack([(logits.argmax(-1) == x)[:, 1:].all(1).float().mean() for x in TEXTS[4:]])
    assert (shares - JOINT[4:] / JOINT[4:].sum()).abs().max() < 4 * math.sqrt(0.25 / count)


WAYS = st.fixed_dictionaries(
    {
        "steps": st.integers(1, 6),
        "time_shift": st.sampled_from([1.0, 3.0]),
        "temperature": st.sampled_from([0.0, 0.9]),
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


def test_steps_are_forwards_of_a_whole_row(monkeypatch: pytest.MonkeyPatch) -> None:
    "One for each step and a last look; times may be given instead."
    model, asked, states = made(), [], Plaid.states
    monkeypatch.setattr(Plaid, "states", lambda self, z, gamma, *rest: asked.append((z.shape[:2], gamma.unique().item())) or states(self, z, gamma, *rest))
    model.generate([[3, 4], [5]], GenerationConfig(max_length=15, steps=4), [0, 1])
    assert [shape for shape, _ in asked] == [(2, 15)] * 5
    gammas = [gamma for _, gamma in asked]
    assert gammas == sorted(gammas, reverse=True) and gammas[0] == pytest.approx(9, abs=1e-2) and gammas[-1] == pytest.approx(-3, abs=1e-2)
    asked.clear()
    model.generate(1, GenerationConfig(max_length=15, times=(1.0, 0.25, 0.0)), [0])
    assert [gamma for _, gamma in asked] == pytest.approx(model.levels(torch.tensor([1.0, 0.25, 0.0]))[0].tolist(), abs=1e-4)


def test_texts_end_where_they_are_told_to() -> None:
    "At a stop string, at the limit of new tokens, at that of the row."
    tokenizer = load_tokenizer(data_dir() / "pretrained" / "tokenizer.json")
    torch.manual_seed(1)
    model = Baseline.make(BaselineConfig(vocab_size=860, **SMALL), tokenizer).eval()
    ways = dict(steps=3, temperature=1.0)
    free = model.generate(["Anna lived"], GenerationConfig(max_length=40, max_new_tokens=7, **ways), [3])
    assert free.reasons == ["length"] and len(free.tokens[0]) == 7
    word = free.texts[0][4:7]
    cut = model.generate(["Anna lived"], GenerationConfig(max_length=40, max_new_tokens=7, stop=(word,), **ways), [3])
    assert cut.reasons == ["stop"] and cut.texts[0] == free.texts[0][: free.texts[0].index(word)]
    limit = model.generate(["Anna lived"], GenerationConfig(max_length=5, max_new_tokens=70, **ways), [3])
    assert len(limit.tokens[0]) == 5 - len(tokenizer.encode("Anna lived", add_special_tokens=False).ids)


@pytest.mark.parametrize(
    "asked, config, error",
    [
        ([], {}, PromptError),
        ([[]], {}, PromptError),
        ([[V]], {}, PromptError),
        ([[3] * 20], dict(max_length=20), PromptError),
        ([[3]], dict(num_blocks=2), ConfigError),
    ],
    ids=str,
)
def test_what_cannot_be_written_is_named(model: Plaid, asked: list, config: dict, error: type) -> None:
    "The mask is no token that a prompt may hold."
    with pytest.raises(error): model.generate(asked, GenerationConfig(**config))


# Files and training


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    "Weights, points and mask among them, and settings."
    model = made()
    model.generation = GenerationConfig(max_length=12, steps=5)
    read = open_model(model.save_pretrained(tmp_path / "m"))
    assert type(read) is Plaid and read.generation == model.generation and read.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(read.state_dict().values(), model.state_dict().values(), strict=True))
    assert read.generate(2).tokens == model.generate(2).tokens


def repeating() -> Dataset:
    "Eight rows, all alike, with padding."
    row = [5, 3, 9, 2, 4, 9, 8, 3, 1, 0, 0, 0]
    return Dataset.from_dict({"tokens": [row] * 8, "document": [[0] * 9 + [-1] * 3] * 8}).with_format("torch")


def test_a_repeating_text_is_learned_and_written() -> None:
    "From the fog, end and padding included; its bound says that little is left to chance."
    torch.manual_seed(0)
    model = Baseline.make(BaselineConfig(vocab_size=12, rope_theta=100.0, **SMALL))
    history = Trainer(model, repeating(), BaselineTraining(steps=300, batch_size=8, learning_rate=1e-2, warmup_steps=5)).run(progress=False)
    assert history[0]["loss"] > 1.5 and history[-1]["loss"] < 0.05 and history[-1]["guessed"] > 0.95
    row = repeating()[0]["tokens"][None]
    assert model.eval().log_weights(row, row < 0, row >= 0, 32, sources(1)).mean() > -0.5
    written = model.generate(3, GenerationConfig(max_length=12, steps=32))
    assert written.tokens == [row[0, :8].tolist()] * 3 and written.reasons == ["end"] * 3


@pytest.mark.parametrize("within", [False, True])
def test_micro_batches_train_alike(within: bool) -> None:
    "One row at a time or eight, with documents kept apart or not: the same weights. AdamW, since Muon makes much of rounding where gradients are small."
    found = []
    for size in (0, 1):
        torch.manual_seed(0)
        model = Baseline.make(BaselineConfig(vocab_size=12, **SMALL))
        config = BaselineTraining(steps=3, batch_size=8, warmup_steps=1, within_documents=within, optimizer="adamw")
        trainer = Trainer(model, repeating(), config)
        trainer.scale = replace(trainer.scale, micro_batch_size=size)
        values = [trainer.train_step() for _ in range(3)]
        found.append((values[-1]["loss"], values[-1]["guessed"], *(p.detach().clone() for p in model.parameters())))
    for a, b in zip(*found, strict=True): torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)
