"Densities have closed forms, bounds keep their side, and a row is what it would be alone."

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.autograd.functional import jacobian
from torch.distributions import MultivariateNormal, Normal

from cola_tutorial import likelihood
from cola_tutorial.config import ColaConfig, ConfigError, DiTConfig, LikelihoodConfig, VAEConfig, data_dir
from cola_tutorial.flow import SOLVERS, integrate, time_grid
from cola_tutorial.generation import PromptError, read_prompts
from cola_tutorial.likelihood import (
    Likelihood,
    LogWeights,
    SolveError,
    against_truth,
    block_velocity,
    difference_scores,
    draw_probes,
    elbo,
    flow_log_prob,
    iwae,
    log_weights,
    perplexity,
    rank_options,
    ratio_estimate,
    student_quantile,
    velocity_and_trace,
)
from cola_tutorial.model import ColaDLM
from cola_tutorial.text.stories import Grammar

EXAMPLES = settings(max_examples=20, deadline=None, derandomize=True)
VOCABULARY, END_ID = 11, 10
FINE = LikelihoodConfig(solver="rk4", steps=64, time_shift=1.0, start=0.0)


def small(size=2, latent_dim=3, patch_size=1, strength=0.25, smooth=False, **vae):
    "A model whose every weight matters, so that a wrong neighbour is felt."
    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCABULARY, dim=16, ffn_dim=16, num_heads=2, encoder_num_blocks=1, decoder_num_blocks=1, init_std=0.3)
    both = dict(latent_dim=latent_dim, block_size=size)
    dit = DiTConfig(dim=16, emb_dim=8, num_heads=2, head_dim=8, expand_ratio=2, num_layers=2, rope_dim=4, **both)
    model = ColaDLM(ColaConfig(VAEConfig(**sizes | both | {"patch_size": patch_size} | vae), dit, pad_id=0, end_id=END_ID))
    with torch.no_grad():
        for weight in model.dit.parameters(): weight.add_(strength * torch.randn_like(weight))
        model.vae.decoder.in_layer.bias.normal_()  # or the norm behind it would make a jump of z = 0
        if smooth: model.dit.emb_in.proj_in.weight.view(-1, 2, 128)[..., :96] = 0.0  # without the fast waves few steps suffice
    return model.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def shipped() -> ColaDLM:
    "The shipped model."
    return ColaDLM.from_pretrained(data_dir() / "pretrained")


@pytest.fixture(scope="module")
def stories() -> tuple[list[str], list[float]]:
    "Unseen stories, and their true log-probabilities."
    grammar = Grammar.load()
    texts = [grammar.story(5, i, "validation").text for i in range(6)]
    return texts, [grammar.log_prob(text) for text in texts]


def gaussian(dim, seed=0):
    "A normal law with correlations, and the field of the flow that leads to it: E[z_1 - z_0 | z_t]."
    generator = torch.Generator().manual_seed(seed)
    mean, root = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((dim,), (dim, dim)))
    cov = 0.3 * root @ root.T + 0.2 * torch.eye(dim)

    def velocity(z, t):
        middle = z.flatten(1) - (1 - t) * mean
        at_t = (1 - t) ** 2 * cov + t**2 * torch.eye(dim)
        return (-mean + middle @ torch.linalg.solve(at_t, t * torch.eye(dim) - (1 - t) * cov)).view_as(z)

    return MultivariateNormal(mean, cov), velocity


# The density of a flow


def test_density_of_a_gaussian_flow_is_the_gaussians() -> None:
    "Correlated over latents and channels; the noise is where the flow came from."
    law, velocity = gaussian(6)
    torch.manual_seed(1)
    z = law.sample((5,)).view(5, 3, 2)
    found = flow_log_prob(velocity, z, FINE)
    torch.testing.assert_close(found.log_prob[:, 0], law.log_prob(z.flatten(1)), atol=1e-5, rtol=0)
    back = integrate(velocity, found.noise, time_grid(64).double(), "rk4")
    torch.testing.assert_close(back, z, atol=1e-5, rtol=0)
    assert found.log_prob.shape == (5, 1) and found.error is None and found.steps.tolist() == [64] * 5


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2), ("midpoint", 2), ("rk4", 4)])
def test_solvers_converge_at_their_order(solver: str, order: int) -> None:
    "Twice the steps, 2^-order of the error."
    law, velocity = gaussian(4)
    z = law.sample((8,)).view(8, 2, 2)
    misses = []
    for steps in (8, 16):
        found = flow_log_prob(velocity, z, replace(FINE, solver=solver, steps=steps))
        misses.append((found.log_prob[:, 0] - law.log_prob(z.flatten(1))).abs().mean().item())
    assert 0.7 * order < math.log2(misses[0] / misses[1]) < 2.2 * order


@given(st.floats(0.0, 0.5), st.floats(0.2, 3.0), st.integers(0, 99))
@EXAMPLES
def test_a_later_start_is_the_density_of_what_is_reached_there(start: float, shift: float, seed: int) -> None:
    "z_start / (1 - start) for a Gaussian flow is Gaussian again."
    law, velocity = gaussian(4, seed)
    z = law.sample((3,)).view(3, 2, 2)
    found = flow_log_prob(velocity, z, replace(FINE, start=start, time_shift=shift)).log_prob[:, 0]
    cov = law.covariance_matrix + (start / (1 - start)) ** 2 * torch.eye(4)
    torch.testing.assert_close(found, MultivariateNormal(law.mean, cov).log_prob(z.flatten(1)), atol=2e-3, rtol=0)


def test_given_latents_make_it_a_conditional_density() -> None:
    "The free ones of a correlated pair, whose field knows the given ones and not where those stand at time t."
    torch.manual_seed(0)
    rho, z = 0.8, torch.randn(6, 4, 1, dtype=torch.float64)
    pinned = torch.tensor([True, False, True, False]).expand(6, 4)

    def velocity(z, t):  # each latent is N(rho * its left neighbour, 1 - rho^2)
        mean, cov = rho * z.roll(1, 1), 1 - rho**2
        return -mean + (t - (1 - t) * cov) / ((1 - t) ** 2 * cov + t**2) * (z - (1 - t) * mean)

    found = flow_log_prob(velocity, z, FINE, block_size=2, free=~pinned)
    torch.testing.assert_close(found.log_prob, Normal(rho * z[:, ::2, 0], (1 - rho**2) ** 0.5).log_prob(z[:, 1::2, 0]), atol=1e-5, rtol=0)
    assert torch.equal(found.noise[pinned], z[pinned])
    offset = flow_log_prob(velocity, z, replace(FINE, start=0.2), block_size=2, free=~pinned)
    wide = (1 - rho**2 + 0.25**2) ** 0.5
    torch.testing.assert_close(offset.log_prob, Normal(rho * z[:, ::2, 0], wide).log_prob(z[:, 1::2, 0]), atol=1e-5, rtol=0)
    none = flow_log_prob(velocity, z, FINE, block_size=2, free=torch.zeros_like(pinned))
    assert none.log_prob.eq(0).all() and torch.equal(none.noise, z)


def test_steps_are_doubled_row_by_row() -> None:
    "A row keeps the result of its own last doubling, whatever its neighbours need."
    law, velocity = gaussian(4)
    z = (law.mean + torch.tensor([0.0, 1.0, 3.0])[:, None] * torch.ones(4)).view(3, 2, 2)
    config = replace(FINE, solver="heun", steps=4, tolerance=3e-3)
    found = flow_log_prob(velocity, z, config)
    assert found.steps.unique().numel() > 1 and (found.error <= 3e-3).all()
    for row in range(3):
        alone = flow_log_prob(velocity, z[row : row + 1], config)
        assert alone.steps == found.steps[row]
        torch.testing.assert_close(alone.log_prob, found.log_prob[row : row + 1])
        twice = [flow_log_prob(velocity, z[row : row + 1], replace(config, tolerance=None, steps=int(found.steps[row]) // k)).log_prob for k in (1, 2)]
        torch.testing.assert_close(twice[0], alone.log_prob)
        torch.testing.assert_close((twice[0] - twice[1]).abs()[0, 0], found.error[row])
    reported = flow_log_prob(velocity, z, replace(config, tolerance=math.inf))
    assert reported.steps.tolist() == [4] * 3 and (reported.error > 3e-3).any()


def test_what_cannot_be_solved_is_named() -> None:
    "The row, the time or the doublings, and what to do."
    law, velocity = gaussian(4)
    z = law.sample((3,)).view(3, 2, 2)
    lost = lambda z, t: torch.where((torch.arange(3) == 1)[:, None, None] & (t > 0.5), torch.nan, velocity(z, t))
    with pytest.raises(SolveError, match=r"row 41 left all bounds at t = 0\.\d+: take more steps"): flow_log_prob(lost, z, FINE, names=[40, 41, 42])
    with pytest.raises(SolveError, match="row 1 left"): flow_log_prob(lost, z, replace(FINE, trace="rademacher"))
    with pytest.raises(SolveError, match="row 0 left"): flow_log_prob(lambda z, t: z.square() * 1e30, z, FINE)
    with pytest.raises(SolveError, match=r"row 7 changes by .+ between 8 and 16 steps, more than tolerance 0: raise"):
        flow_log_prob(velocity, z, replace(FINE, steps=4, tolerance=0.0, most_steps=16), names=[7, 8, 9])
    with pytest.raises(ConfigError, match="4 latents are not whole blocks of 3"): velocity_and_trace(velocity, z.view(3, 4, 1), 0.5, 3)


# The trace


def test_trace_is_that_of_the_dense_jacobian() -> None:
    "By block, over the free latents alone, one vector at a time or many, of the prior in the 2L layout."
    model, size = small(size=3), 3
    torch.manual_seed(2)
    z_0, z = torch.randn(2, 2, 6, 3)
    free = torch.tensor([[True] * 6, [False, True, True, False, False, True]])
    velocity = lambda z, t: model.dit.two_copy_velocity(z_0, z, torch.full((len(z),), t), ~free)
    dense = jacobian(lambda z: velocity(z, 0.4), z)  # (B, N, d, B, N, d)
    wanted = torch.zeros(2, 2)
    for row in range(2):
        for latent in range(6):
            if free[row, latent]: wanted[row, latent // size] += dense[row, latent, :, row, latent].trace()
    for at_once in (1, 4, 100):
        v, trace = velocity_and_trace(velocity, z, 0.4, size, free, at_once=at_once)
        torch.testing.assert_close(trace, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(v, velocity(z, 0.4) * free[..., None])
    _, whole = velocity_and_trace(velocity, z, 0.4, None, free)
    torch.testing.assert_close(whole[:, 0], wanted.sum(1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_probes_are_right_on_average(kind: str) -> None:
    "The mean over many probes is the trace, block by block and for free latents alone; signs have no spread where the Jacobian is diagonal."
    torch.manual_seed(3)
    matrix, z, free = torch.randn(8, 8), torch.randn(1, 4, 2), torch.tensor([[True, True, False, True]])
    blocks = torch.block_diag(torch.ones(4, 4), torch.ones(4, 4))
    velocity = lambda z, t: (z.flatten(1) @ (matrix * blocks).T).view_as(z)
    _, exact = velocity_and_trace(velocity, z, 0.5, 2, free)
    probes = draw_probes(kind, 4000, 1, 4, 2, generator=torch.Generator().manual_seed(4))
    each = torch.stack([velocity_and_trace(velocity, z, 0.5, 2, free, probe[None])[1] for probe in probes])
    error = each.std(0) / len(probes) ** 0.5
    assert ((each.mean(0) - exact).abs() < 4 * error).all()
    torch.testing.assert_close(velocity_and_trace(velocity, z, 0.5, 2, free, probes, at_once=1000)[1], each.mean(0), atol=1e-3, rtol=1e-3)
    elsewhere = torch.where(free[..., None], probes, 100.0)  # what a probe holds where nothing moves does not matter
    torch.testing.assert_close(velocity_and_trace(velocity, z, 0.5, 2, free, elsewhere[:9])[1], each[:9].mean(0), atol=1e-3, rtol=1e-3)
    diagonal = lambda z, t: z * matrix.diagonal().view(1, 4, 2)
    one = velocity_and_trace(diagonal, z, 0.5, 2, None, probes[:1])[1]
    assert torch.allclose(one, velocity_and_trace(diagonal, z, 0.5, 2)[1]) == (kind == "rademacher")


def test_probed_density_is_right_on_average() -> None:
    "One fixed probe per solve; the mean of log p over probes is log p."
    law, velocity = gaussian(6)
    z, config = law.sample((1,)).view(1, 3, 2), replace(FINE, steps=8, trace="rademacher")
    exact = flow_log_prob(velocity, z, replace(FINE, steps=8)).log_prob.item()
    many = torch.tensor([flow_log_prob(velocity, z, replace(config, seed=seed)).log_prob.item() for seed in range(300)])
    assert abs(many.mean().item() - exact) < 4 * many.std().item() / 300**0.5 and many.std() > 1e-3


def test_constant_fields_have_no_divergence() -> None:
    "A field that does not know z: with weights that ask for gradients, and without."
    z, push = torch.randn(2, 2, 2), torch.ones(2, requires_grad=True)
    for velocity in (lambda z, t: torch.ones_like(z), lambda z, t: push.expand(2, 2, 2)): assert velocity_and_trace(velocity, z, 0.5)[1].eq(0).all()


# The prior


@pytest.mark.parametrize("first", [0, 4])
def test_the_clean_copy_is_read_once(first: int) -> None:
    "The same velocities as in the 2L layout, with and without pinned latents, of all blocks or of the later ones."
    model = small()
    torch.manual_seed(5)
    z_0, z = torch.randn(2, 3, 8, 3)
    pinned = torch.rand(3, 8) < 0.4
    for where in (None, pinned):
        noisy = z if where is None else torch.where(where[..., None], z_0, z)
        velocity = block_velocity(model.dit, z_0, where, first)
        for t in (0.3, 0.9):
            wanted = model.dit.two_copy_velocity(z_0, noisy, torch.full((3,), t), where)[:, first:]
            torch.testing.assert_close(velocity(noisy[:, first:], t), wanted, atol=1e-5, rtol=1e-5)


def test_density_of_blocks_is_that_of_the_sampler() -> None:
    "Block after block with the cache that generation uses; together they are the density of all at once."
    model = small()
    z_0 = torch.randn(1, 6, 3, generator=torch.Generator().manual_seed(6))
    config = replace(FINE, steps=8)
    together = flow_log_prob(block_velocity(model.dit, z_0), z_0, config, block_size=2).log_prob
    whole = flow_log_prob(block_velocity(model.dit, z_0), z_0, config).log_prob  # one large block: the Jacobian is block diagonal
    cache = model.dit.new_cache(1, 6)
    for block in range(3):
        part = z_0[:, 2 * block : 2 * block + 2]
        history = z_0[:, : 2 * block]

        def velocity(z, t, history=history):  # a cache of its own each time: writing into one would break the gradient
            both, times = torch.cat([history, z], 1), torch.cat([torch.zeros(1, history.shape[1]), torch.full((1, 2), t)], 1)
            return model.dit(both, times)[:, -2:]

        alone = flow_log_prob(velocity, part, config).log_prob
        torch.testing.assert_close(alone[:, 0], together[:, block], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model.dit(part, torch.full((1,), 0.7), cache=cache), velocity(part, 0.7), atol=1e-5, rtol=1e-5)
        model.dit(part, torch.zeros(1), cache=cache)
        cache.commit(2)
    torch.testing.assert_close(whole[:, 0], together.sum(1), atol=1e-4, rtol=1e-4)


# Bounds


def toy(count, quality, seed=0):
    "log w of z ~ N(0, 1), x | z ~ N(z, 1/2) at x = 1, by a proposal between the prior (quality 0) and the posterior (1); and log p(x)."
    mean, scale = quality * 2 / 3, 1 + quality * (3**-0.5 - 1)
    q = Normal(torch.tensor(mean).double(), scale)
    z = mean + scale * torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    parts = Normal(z, 0.5**0.5).log_prob(torch.tensor(1.0)), Normal(torch.tensor(0.0).double(), 1.0).log_prob(z), -q.log_prob(z)
    return LogWeights(*(part[:, None] for part in parts), tokens=1), Normal(0.0, 1.5**0.5).log_prob(torch.tensor(1.0).double()).item()


def test_the_true_posterior_makes_every_bound_exact() -> None:
    "All weights are p(x)."
    weights, truth = toy(5, quality=1.0)
    for bound in (elbo(weights), iwae(weights)):
        assert bound.value == pytest.approx(truth, abs=1e-6) and bound.high - bound.low < 1e-6
    assert weights.effective == pytest.approx(5)


def test_bounds_rise_with_samples_and_stay_below() -> None:
    "On average: ELBO = IWAE of one sample < IWAE of 4 < IWAE of 64 < log p."
    weights, truth = toy(64 * 500, quality=0.0)
    cut = lambda k: [LogWeights(*(part[i : i + k] for part in (weights.reconstruction, weights.prior, weights.entropy)), 1) for i in range(0, 32000, k)]
    means = {k: torch.tensor([iwae(part).value for part in cut(k)[:2000]]) for k in (4, 64)}
    bound = elbo(weights)
    error = lambda values: 4 * values.std().item() / len(values) ** 0.5
    assert bound.low < bound.value < bound.high < means[4].mean() - error(means[4])
    assert means[4].mean() + error(means[4]) < means[64].mean() - error(means[64]) < truth
    assert means[64].mean().item() == pytest.approx(truth, abs=0.02)


def test_elbo_misses_by_the_divergence_from_the_posterior() -> None:
    "log p - ELBO = KL(q || posterior), here of two Gaussians."
    weights, truth = toy(200_000, quality=0.3)
    mean, scale = 0.2, 1 + 0.3 * (3**-0.5 - 1)
    kl = torch.distributions.kl_divergence(Normal(mean, scale), Normal(2 / 3, 3**-0.5)).item()
    bound = elbo(weights)
    assert bound.low < truth - kl < bound.high


def test_intervals_keep_their_promise() -> None:
    "The ELBO's covers its mean in 95 of 100 cases; the IWAE's nearly, where many samples carry it."
    count, k = 1000, 8
    total = 0.7 * torch.randn(count, k, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    none, mean, target = torch.zeros(k, 1), total.mean().item(), (total.logsumexp(1) - math.log(k)).mean().item()
    cases = [LogWeights(one[:, None], none, none, 1) for one in total]
    covered = lambda bound, value: sum(bound(case).low <= value <= bound(case).high for case in cases) / count
    assert 0.93 < covered(elbo, mean) < 0.97
    assert 0.90 < covered(iwae, target) < 0.97


def test_one_sample_promises_nothing() -> None:
    "No spread, no interval."
    weights, _ = toy(1, quality=0.5)
    for bound in (elbo(weights), iwae(weights)): assert (bound.low, bound.high) == (-math.inf, math.inf) and bound.value == weights.total.item()


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 15, 31, 200])
def test_student_quantile(degrees: int) -> None:
    "Against another library."
    assert student_quantile(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=2e-3)
    assert student_quantile(0) == math.inf


# A model small enough to integrate


def grid_density(model, z_0, where, config):
    "log p of the last block's latents `where` (N,) as they take all values of a grid, the others as in `z_0` (N, 1)."
    line = torch.linspace(-8.0, 8.0, 641) if where.sum() == 1 else torch.linspace(-6.0, 6.0, 121)
    axes = torch.cartesian_prod(*[line] * int(where.sum())).view(-1, int(where.sum()))
    z = z_0.repeat(len(axes), 1, 1)
    z[:, where, 0] = axes
    free = where.expand(len(axes), -1)
    found = []
    for part, moves in zip(z.split(4000), free.split(4000)):
        found.append(flow_log_prob(block_velocity(model.dit, part, ~moves), part, config, model.config.dit.block_size, moves).log_prob[:, -1])
    return z, torch.cat(found), (line[1] - line[0]).item() ** int(where.sum())


def near(weights, wanted):
    "Whether the IWAE of many samples is within about four standard errors of log p, and sure enough for that to mean something."
    found = iwae(weights)
    return found.high - found.low < 0.5 and abs(found.value - wanted) < found.high - found.low


TINY = dict(latent_dim=1, encoder_last_ln=False, strength=0.1, smooth=True)
ROUGH = LikelihoodConfig(samples=2000, steps=6, time_shift=1.0, start=0.1, posterior_scale=2.0)  # a wide proposal misses nothing


def test_bounds_reach_the_integral() -> None:
    "Blocks of one latent with one channel: log p(end | nothing) and log p(token, end) by adding up over a grid; all tokens together have probability 1."
    model = small(size=1, **TINY)
    z, log_p, step = grid_density(model, torch.zeros(1, 1), torch.tensor([True]), ROUGH)
    probabilities = (log_p.exp()[:, None] * model.vae.decode(z)[:, 0].softmax(-1)).sum(0) * step  # of each token
    assert probabilities.sum().item() == pytest.approx(1, abs=2e-3)
    (weights,) = log_weights(model, [""], [[]], config=ROUGH, batch_size=2000)
    assert near(weights, math.log(probabilities[END_ID]))
    assert elbo(weights).value < iwae(weights).value and weights.tokens == 1
    (weights,) = log_weights(model, [""], [[4]], ended=False, config=ROUGH, batch_size=2000)
    assert near(weights, math.log(probabilities[4]))


def test_a_text_that_goes_on_leaves_its_block_open() -> None:
    "A token in a block of two: the other latent is added up over too."
    model = small(size=2, **TINY)
    z, log_p, step = grid_density(model, torch.zeros(2, 1), torch.tensor([True, True]), ROUGH)
    assert log_p.exp().sum().item() * step == pytest.approx(1, abs=4e-3)
    wanted = math.log((log_p.exp() * model.vae.decode(z)[:, 0].softmax(-1)[:, 4]).sum().item() * step)
    (weights,) = log_weights(model, [""], [[4]], ended=False, config=ROUGH, batch_size=2000)
    assert near(weights, wanted) and weights.tokens == 1
    (weights,) = log_weights(model, [""], [[4]], config=ROUGH, batch_size=2000)  # ended: the second is the end token
    both = math.log((log_p.exp() * model.vae.decode(z).softmax(-1)[:, [0, 1], [4, END_ID]].prod(-1)).sum().item() * step)
    assert near(weights, both)


@pytest.mark.parametrize("history", ["mean", "sample"])
def test_a_prompt_may_end_inside_a_block(history: str) -> None:
    "Its latents are pinned, as in generation: the conditional is an integral over the free one."
    model = small(size=2, **TINY)
    config = replace(ROUGH, history=history)
    (weights,) = log_weights(model, [[3, 5, 7]], [[]], config=config, batch_size=2000)
    told = model.vae.encode(torch.tensor([[3, 5, 7, 0]]))
    values = []
    noises = torch.zeros(1, 4, 1) if history == "mean" else torch.randn(16, 4, 1, generator=torch.Generator().manual_seed(0))
    for noise in noises:
        given = told.sample(noise=noise[None])[0]
        z, log_p, step = grid_density(model, given, torch.tensor([False, False, False, True]), config)
        values.append((log_p.exp() * model.vae.decode(z)[:, 3].softmax(-1)[:, END_ID]).sum().item() * step)
    spread = 4 * torch.tensor(values).std().item() / len(values) ** 0.5 if history == "sample" else 0.0
    wanted, found = sum(values) / len(values), iwae(weights)
    assert found.high - found.low < 0.2 and abs(math.exp(found.value) - wanted) < spread + wanted * (found.high - found.low)
    assert weights.reconstruction[:, 0].eq(0).all() and weights.prior[:, 0].eq(0).all() and weights.entropy[:, 0].eq(0).all()


def test_joint_is_prefix_times_rest() -> None:
    "With the same latents, and a border of blocks: log w of a text = log w of its beginning + log w of the rest."
    model = small(latent_dim=16, strength=0.1)
    config = LikelihoodConfig(samples=1, steps=4, history="sample")
    whole, start, rest = ([4, 5, 6, 7, 8, 9, 3, 2], [4, 5, 6, 7], [8, 9, 3, 2])
    (joint,), (prefix,) = (log_weights(model, [""], [text], ended=False, config=config) for text in (whole, start))
    (more,) = log_weights(model, [start], [rest], ended=False, config=config)
    for name in ("reconstruction", "prior", "entropy"):
        both = torch.cat([getattr(prefix, name), getattr(more, name)[:, 2:]], 1)
        torch.testing.assert_close(getattr(joint, name), both, atol=1e-4, rtol=1e-4)
    (difference,) = difference_scores(model, [start], [rest], ended=False, config=config)
    assert difference.value == pytest.approx(joint.total.item() - prefix.total.item(), abs=1e-4)
    assert difference.kind == "difference" and difference.tokens == 4 and difference.low == -math.inf


def test_difference_approaches_the_conditional() -> None:
    "Both forms, with many samples, where the history hardly matters to what follows it."
    model = small(size=2, **TINY)
    config = replace(ROUGH, history="sample")
    (form,) = difference_scores(model, [[3]], [[5]], config=config, batch_size=2000)
    (joint,), (prefix,) = (log_weights(model, [""], [text], ended=ended, config=config, batch_size=2000) for text, ended in (([3, 5], True), ([3], False)))
    assert form.value == pytest.approx(iwae(joint).value - iwae(prefix).value, abs=1e-6)
    assert form.low < form.value < form.high


# Rows


@given(
    lengths=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), min_size=1, max_size=4),
    patch_size=st.sampled_from([1, 2]),
    ended=st.booleans(),
)
@EXAMPLES
def test_each_token_is_scored_once(lengths: list, patch_size: int, ended: bool) -> None:
    "A decoder that knows nothing gives -log V for each: the continuation's, the end token, and the padding of its last block."
    lengths = [(before, more) for before, more in lengths if more or ended] or [(0, 1)]
    model = small(patch_size=patch_size)
    model.vae.decoder.final_layer.weight.zero_()
    model.vae.decoder.final_layer.bias.zero_()
    prompts, texts = ([[4] * n for n in part] for part in zip(*lengths))
    found = log_weights(model, prompts, texts, ended, LikelihoodConfig(samples=1, steps=1, solver="euler"))
    for (before, more), weights in zip(lengths, found):
        length, whole = before + more + ended, 2 * patch_size
        counted = (math.ceil(length / whole) * whole if ended else length) - before
        assert weights.reconstruction.sum().item() == pytest.approx(-counted * math.log(VOCABULARY), rel=1e-5)
        assert weights.tokens == more + ended and weights.prior.shape == (1, math.ceil(length / whole))


@given(
    lengths=st.lists(st.tuples(st.integers(0, 6), st.integers(1, 6)), min_size=2, max_size=4),
    attention=st.sampled_from(["block_causal", "causal", "bidirectional"]),
    trace=st.sampled_from(["exact", "rademacher"]),
    ended=st.booleans(),
    history=st.sampled_from(["mean", "sample"]),
    batch_size=st.sampled_from([1, 3, 32]),
)
@EXAMPLES
def test_a_row_does_not_depend_on_its_neighbours(lengths, attention, trace, ended, history, batch_size) -> None:
    "Nor on how many solves run side by side: alone with its own seed it gives the same weights."
    model = small(attention=attention, log_snr=1.0)
    config = LikelihoodConfig(samples=2, steps=2, trace=trace, history=history, seed=20)
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(1, END_ID, (n,), generator=generator).tolist()
    prompts, texts = ([draw(n) for n in part] for part in zip(*lengths))
    together = log_weights(model, prompts, texts, ended, config, batch_size)
    for row, weights in enumerate(together):
        (alone,) = log_weights(model, [prompts[row]], [texts[row]], ended, replace(config, seed=20 + row))
        for name in ("reconstruction", "prior", "entropy"):
            torch.testing.assert_close(getattr(weights, name), getattr(alone, name), atol=2e-3, rtol=1e-4)


def test_samples_are_nested_and_seeded() -> None:
    "The first of five samples are the two that two samples give; another seed gives others."
    model, text = small(), [[4, 5, 6]]
    config = LikelihoodConfig(samples=2, steps=2, trace="rademacher")
    two, five, other = (log_weights(model, [""], text, False, replace(config, **new))[0].total for new in ({}, {"samples": 5}, {"seed": 1}))
    torch.testing.assert_close(five[:2], two, atol=1e-3, rtol=1e-4)
    assert not torch.isclose(two, other).any()


def test_every_use_has_a_stream_of_its_own() -> None:
    "Of every row and seed, beyond 32 bits too: none repeats another's numbers."
    streams = [source for seed in (0, 1, 2, 2**40 + 1) for source in likelihood._sources_of(seed).values()]
    assert len({torch.randn(1, generator=source).item() for source in streams}) == 16


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_entropy_is_that_of_what_the_prior_sees(scale: float) -> None:
    "-log q of the scaled and shifted latents, by another library; the sampled latents have the posterior's spread times the factor."
    model = small(latent_dim=3, scaling_factor=scale, shifting_factor=0.3)
    config = LikelihoodConfig(posterior_scale=0.7)
    rows = likelihood.scored_rows(model, [""] * 400, [[4, 5, 6, 7]] * 400, False)
    batch = likelihood._Batch(model, rows)
    z, entropy = batch.latents_of(config, [likelihood._sources_of(row) for row in range(400)])
    told = model.vae.encode(torch.tensor([[4, 5, 6, 7]]))
    law = Normal(scale * (told.mean - 0.3), scale * 0.7 * (0.5 * told.logvar).exp())
    torch.testing.assert_close(entropy, -law.log_prob(z).sum(-1), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(z.std(0), law.scale[0], rtol=0.2, atol=0.0)


@pytest.mark.parametrize("history", ["mean", "sample"])
def test_known_latents_come_from_the_prompt_alone(history: str) -> None:
    "As generation reads it: what follows in the same block does not change them; the others come from the whole text."
    model, config = small(size=4), LikelihoodConfig(history=history)
    prompt, texts = [4, 5, 6, 7, 8, 9], [[1, 2], [9, 9]]
    batch = likelihood._Batch(model, likelihood.scored_rows(model, [prompt] * 2, texts, False))
    z, entropy = batch.latents_of(config, [likelihood._sources_of(3)] + [likelihood._sources_of(3)])
    known = batch.known[0]
    assert known.tolist() == [True] * 6 + [False] * 2 and torch.equal(z[0, known], z[1, known]) and not torch.isclose(z[0, ~known], z[1, ~known]).any()
    if history == "mean": torch.testing.assert_close(z[:1, known], read_prompts(model, [prompt]).latents[:, known])
    assert entropy[:, known].eq(0).all() and entropy[:, ~known].ne(0).all()


def test_open_latents_have_the_density_that_is_charged() -> None:
    "The flow, asked where they came from, names the noise that was drawn; all others stay as they are."
    model, config = small(size=4), replace(FINE, steps=48, start=0.2)
    rows = likelihood.scored_rows(model, [[], [4, 5]], [[4, 5, 6], [7, 8, 9, 4, 5]], False)
    batch, sources = likelihood._Batch(model, rows), [likelihood._sources_of(row) for row in range(2)]
    z, entropy = batch.latents_of(config, sources)
    before, paid = z.clone(), entropy.clone()
    batch.fill_open(z, entropy, config, sources)
    assert batch.open.tolist() == [[False] * 3 + [True] + [False] * 4, [False] * 7 + [True]]
    assert torch.equal(z[~batch.open], before[~batch.open])
    found = flow_log_prob(block_velocity(model.dit, z, ~batch.open), z, config, 4, batch.open)
    drawn = batch.draw([likelihood._sources_of(row) for row in range(2)], "open")
    torch.testing.assert_close(found.noise[batch.open], drawn[batch.open], atol=2e-3, rtol=1e-3)
    torch.testing.assert_close((paid - entropy).view(2, 2, 4).sum(-1), found.log_prob, atol=1e-3, rtol=1e-3)


def test_error_of_the_solver_is_told() -> None:
    "By sample, as half the steps would change it; none where it is not asked."
    model, config = small(), LikelihoodConfig(samples=2, steps=4, tolerance=math.inf)
    (told,), (half,) = (log_weights(model, [""], [[4, 5]], config=c) for c in (config, replace(config, steps=2, tolerance=None)))
    torch.testing.assert_close(told.error, (told.total - half.total).abs(), atol=1e-3, rtol=1e-3)
    assert half.error is None
    model.dit.txt_out["proj"].bias.fill_(math.nan)
    with pytest.raises(SolveError, match="row 1 left"): log_weights(model, [[4, 5], [4]], [[7, 7, 7], []], config=replace(config, tolerance=None), batch_size=1)


@pytest.mark.parametrize(
    "prompts, texts, ended, told",
    [
        (["", ""], [[4]], True, "2 prompts for 1 continuations"),
        ([[4]], [[]], False, "pair 0 has no token to score"),
        ([[4], []], [[4], [4, 99]], True, "continuations: prompt 1 holds token id 99"),
        ([[4]], [[4] * 12], True, "pair 0 has 14 tokens, the end token included, but rows of this model have 12"),
        (["Tom"], [[4]], True, "no tokenizer"),
        ("Tom", [[4]], True, "prompts are 'Tom'"),
        ([None], [[4]], True, "prompts: prompt 0 is neither"),
        ([[]], [["a"]], True, "neither a text nor whole numbers"),
    ],
)
def test_bad_pairs_are_refused(prompts, texts, ended: bool, told: str) -> None:
    "What is wrong, and with which."
    model = small()
    model.generation = replace(model.generation, max_length=12)
    with pytest.raises(PromptError, match=told): model.score(prompts, texts, ended)


def test_bad_settings_are_refused() -> None:
    "No sample, no batch, no sense."
    model = small()
    with pytest.raises(ConfigError, match="samples is 0"): model.score([""], [[4]], samples=0)
    with pytest.raises(ConfigError, match="batch_size is 0"): model.score([""], [[4]], batch_size=0)
    with pytest.raises(PromptError, match="seed"): log_weights(model, ["", ""], [[4], [5]], config=LikelihoodConfig(seed=2**63 - 1))
    for wrong in (dict(trace="half"), dict(history="none"), dict(start=1.0), dict(tolerance=-1.0), dict(solver="exact"), dict(steps=1, tolerance=1.0)):
        with pytest.raises(ConfigError, match=next(iter(wrong))): LikelihoodConfig(**wrong)
    assert model.score([], []) == []


# Over texts


def exact(value, tokens):
    "What a model without latents would say."
    return Likelihood(value, value, value, "exact", 0, tokens)


class Counter:
    "A model that likes many fours, and says what it was asked."

    def __init__(self):
        self.asked = []

    def score(self, prompts, continuations, ended=True, samples=8, seed=0, batch_size=32):
        self.asked.append((list(prompts), list(continuations), ended, samples, seed, batch_size))
        return [exact(float(list(text).count(4)) - 9, len(text) + ended) for text in continuations]


def test_options_are_ranked() -> None:
    "Equal ones are scored once and keep their order; the first of the best wins."
    scorer = Counter()
    found = rank_options(scorer, [1], [[4, 5, 6], [4, 4], [5], [4, 4], [4, 7]], ended=False, samples=3, seed=9, batch_size=2)
    assert found.best == 1 and found.order == (1, 3, 0, 4, 2) and found.scores[1] == found.scores[3]
    assert found.values == (-8.0, -7.0, -9.0, -7.0, -8.0)
    assert scorer.asked == [([[1]] * 4, [(4, 5, 6), (4, 4), (5,), (4, 7)], False, 3, 9, 2)]
    assert rank_options(scorer, [], [[5]]).order == (0,)
    assert rank_options(scorer, [], [[4, 4], [4, 5, 5, 5, 5, 5]], per="token").best == 1
    for none in ([], (), "Tom"):
        with pytest.raises(PromptError, match="options are"): rank_options(scorer, [], none)
    with pytest.raises(ConfigError, match="per is 'word'"): rank_options(scorer, [], [[4]], per="word")
    with pytest.raises(ConfigError, match="per is byte"): rank_options(scorer, [], [[4]], per="byte")


def test_ranking_with_a_model_repeats_itself(shipped: ColaDLM) -> None:
    "The true ending before a foreign one; equal options get equal scores, though each row draws its own noise."
    text = Grammar.load().story(5, 0, "validation").text
    prompt, ending = (part + "." if part[-1] != "." else part for part in text.rsplit(". ", 1))
    options = [" " + ending, " Soap and cat the, kite of.", " " + ending]
    found = rank_options(shipped, prompt, options, samples=2)
    assert found.order == (0, 2, 1) and found.values[0] == found.values[2] > found.values[1] + 10


def test_perplexity_counts_units() -> None:
    "A model that is as unsure as a fair die has perplexity 6, by token, word or byte."
    texts = ["one two", "three four five"]
    die = [exact(-n * math.log(6), n) for n in (3, 8)]
    assert perplexity(die).value == pytest.approx(6) and perplexity(die).high == pytest.approx(6)
    nats = 11 * math.log(6)
    assert perplexity(die, "word", texts).value == pytest.approx(math.exp(nats / 5))
    assert perplexity(die, "byte", texts).value == pytest.approx(math.exp(nats / 22))
    one = perplexity([exact(-2.0, 2)])
    assert (one.value, one.low, one.high) == (pytest.approx(math.e), 0.0, math.inf)
    with pytest.raises(ConfigError, match="unit is 'page'"): perplexity(die, "page")
    with pytest.raises(ConfigError, match="unit is word"): perplexity(die, "word", texts[:1])
    with pytest.raises(ConfigError, match="at least one text"): perplexity([])


def test_ratio_estimate_is_the_mean_and_its_interval() -> None:
    "Of equal units: Student's, by another library; of unequal ones it covers the ratio in 95 of 100 cases."
    values = [1.0, 4.0, 2.5, 3.0]
    found = ratio_estimate(values, [1] * 4)
    wanted = stats.t.interval(0.95, 3, loc=sum(values) / 4, scale=stats.sem(values))
    assert found.value == pytest.approx(2.625) and (found.low, found.high) == pytest.approx(wanted, rel=1e-2)
    generator, kept = torch.Generator().manual_seed(0), 0
    for _ in range(400):
        units = 1 + 9 * torch.rand(60, generator=generator)
        told = ratio_estimate((2 * units + torch.randn(60, generator=generator) * units).tolist(), units.tolist())
        kept += told.low <= 2 <= told.high
    assert 0.91 < kept / 400 < 0.98


def test_gap_to_the_truth_adds_up() -> None:
    "truth - value = reading + rate - gain, per text and per token; a model without terms has a gap alone."
    weights = [toy(8, 0.2, seed)[0] for seed in range(5)]
    truths = [-1.0 - seed for seed in range(5)]
    found = against_truth([iwae(one) for one in weights], truths)
    for part in found.values():
        assert part["truth"].value - part["value"].value == pytest.approx(part["gap"].value)
        assert part["gap"].value == pytest.approx(part["reading"].value + part["rate"].value - part["gain"].value)
    assert found["per_text"]["gain"].value > 0
    assert against_truth([elbo(one) for one in weights], truths)["per_text"]["gain"].value == pytest.approx(0, abs=1e-9)
    assert against_truth([exact(-4.0, 2)], [-3.0])["per_token"].keys() == {"value", "truth", "gap"}
    assert against_truth([exact(-4.0, 2), exact(-2.0, 2)], [-3.0, -1.0])["per_token"]["gap"].value == pytest.approx(0.5)
    with pytest.raises(ConfigError, match="text 1 has the true log-probability -inf"): against_truth([exact(-1.0, 1)] * 2, [-1.0, -math.inf])
    with pytest.raises(ConfigError, match="1 truths for 2"): against_truth([exact(-1.0, 1)] * 2, [-1.0])


# The shipped model


def test_shipped_bounds_are_on_their_side(shipped: ColaDLM, stories) -> None:
    "ELBO < IWAE < truth over unseen stories; a narrower proposal lowers the bound of the same model."
    texts, truths = stories
    config = LikelihoodConfig(samples=3, trace="rademacher")
    weights = log_weights(shipped, [""] * len(texts), texts, config=config)
    low, high = (against_truth([bound(one) for one in weights], truths)["per_text"] for bound in (elbo, iwae))
    assert low["gap"].low > 0 and low["value"].value < high["value"].value
    assert high["gap"].value > 0 and low["gap"].value < 60
    assert low["reading"].value < 0.3
    narrow = log_weights(shipped, [""] * len(texts), texts, config=replace(config, samples=1, posterior_scale=0.7))
    assert sum(elbo(one).value for one in narrow) < sum(elbo(one).value for one in weights) - 100


def test_shipped_scores_know_what_was_said(shipped: ColaDLM, stories) -> None:
    "A prompt makes its own ending likelier than another story's does; the estimate says what it is."
    texts, _ = stories
    cut = [text.rindex(". ", 0, -1) + 1 for text in texts[:2]]
    prompts, endings = [text[:at] for text, at in zip(texts, cut)], [text[at:] for text, at in zip(texts, cut)]
    own, foreign = (shipped.score(prompts, part, samples=1) for part in (endings, endings[::-1]))
    assert all(a.value > b.value for a, b in zip(own, foreign))
    assert own[0].kind == "iwae" and own[0].samples == 1 and own[0].tokens == len(shipped.tokenizer.encode(endings[0]).ids) + 1


def test_wide_blocks_are_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    "Beyond MOST_EXACT channels `score` takes the probed trace, unless the model has settings of its own."
    model, asked = small(), []
    monkeypatch.setattr(likelihood, "log_weights", lambda *args: asked.append(args[4].trace) or [])
    model.score([], [])
    monkeypatch.setattr(likelihood, "MOST_EXACT", 5)
    model.score([], [])
    model.scoring = LikelihoodConfig(trace="gaussian")
    model.score([], [])
    assert asked == ["exact", "rademacher", "gaussian"]


def test_every_solver_is_offered() -> None:
    "The settings name the solvers there are."
    law, velocity = gaussian(2)
    for solver in SOLVERS: assert torch.isfinite(flow_log_prob(velocity, law.sample((1,)).view(1, 1, 2), LikelihoodConfig(solver=solver)).log_prob).all()
