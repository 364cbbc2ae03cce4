"Solvers on an equation with a known answer, times against their law, guidance and the path by arithmetic."

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cola_tutorial.config import SOLVER_NAMES, ConfigError
from cola_tutorial.flow import (
    SOLVERS,
    Paint,
    bridge,
    guidance_at,
    guide,
    integrate,
    renewing_step,
    renoise,
    sample_times,
    time_grid,
    walk,
)

EXAMPLES = settings(max_examples=40, deadline=None, derandomize=True)


def turning(z, t):
    "dz/dt = (1 + 4t^3) z, so z(0) = z(1) exp(-2)."
    return (1 + 4 * t**3) * z


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2), ("midpoint", 2), ("rk4", 4)])
def test_half_the_step_divides_the_error_by_two_to_the_order(solver, order):
    z_1 = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    exact = z_1 * math.exp(-2)

    def error(steps):
        return (integrate(turning, z_1, time_grid(steps).double(), solver) - exact).abs().max().item()

    ratio = error(40) / error(80)
    assert ratio == pytest.approx(2**order, rel=0.1)
    assert error(80) < 0.05 / 4 ** (order - 1)


def test_configuration_knows_the_solvers_by_name():
    assert tuple(SOLVERS) == SOLVER_NAMES


@EXAMPLES
@given(st.sampled_from(SOLVER_NAMES), st.integers(1, 6))
def test_a_solver_is_its_tableau_on_a_line(solver, degree):
    "A velocity t^(degree - 1) is integrated exactly up to the order of the quadrature rule."
    exact = {"euler": 1, "heun": 2, "midpoint": 2, "rk4": 4}[solver]
    z = integrate(lambda z, t: torch.full_like(z, degree * t ** (degree - 1)), torch.ones(1).double(), [1.0, 0.0], solver)
    assert (abs(z.item()) < 1e-12) == (degree <= exact)


@pytest.mark.parametrize("solver", SOLVER_NAMES)
def test_constant_speed_is_exact_in_one_step(solver):
    z = torch.randn(3)
    landed = SOLVERS[solver].step(lambda z, t: torch.full_like(z, 2.0), z, 1.0, 0.25)
    torch.testing.assert_close(landed, z - 1.5)


def test_when_each_solver_asks():
    asked = []

    def velocity(z, t):
        asked.append(t)
        return z

    quarters = [1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25, 0.0]
    for solver, times in (("euler", [1.0, 0.5]), ("heun", [1.0, 0.5, 0.5, 0.0]), ("midpoint", [1.0, 0.75, 0.5, 0.25]), ("rk4", quarters)):
        asked.clear()
        integrate(velocity, torch.ones(1), time_grid(2), solver)
        assert asked == times


def test_a_renewing_step_lands_between_the_clean_end_and_new_noise():
    z_0, z_1, new = torch.randn(3, 20, generator=torch.Generator().manual_seed(5))
    t, end = 0.8, 0.3
    landed = renewing_step(lambda z, t: z_1 - z_0, 0.2 * z_0 + 0.8 * z_1, t, end, lambda clean: new)
    torch.testing.assert_close(landed, 0.7 * z_0 + 0.3 * new)
    still = renewing_step(lambda z, t: torch.zeros_like(z), z_0, t, end, lambda clean: clean)
    assert torch.equal(still, z_0)


@pytest.mark.parametrize("below, renewed", [(0.0, []), (0.25, []), (0.3, [0.25]), (0.6, [0.5, 0.25]), (1.0, [0.75, 0.5, 0.25])])
def test_noise_is_renewed_below_the_time_and_never_at_the_end(below, renewed):
    z_1, new = torch.randn(2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    spread = 0.5  # Gaussian data, whose clean end is a multiple of z

    def share(t):
        return (1 - t) * spread**2 / ((1 - t) ** 2 * spread**2 + t**2)

    z, grid = z_1, time_grid(4).double()
    for t, end in zip(grid.tolist(), grid.tolist()[1:]):
        clean, old = share(t) * z, (1 - (1 - t) * share(t)) * z / t
        z = (1 - end) * clean + end * (new if end in renewed else old)
    found = integrate(lambda z, t: (z - share(t) * z) / t, z_1, grid, renew_below=below, draw=lambda clean: new)
    torch.testing.assert_close(found, z)


def test_every_time_of_the_grid_is_visited_once_and_the_last_is_the_result():
    z_0, seen = integrate(turning, torch.ones(2), time_grid(4)), list(walk(turning, torch.ones(2), time_grid(4)))
    assert [step for step, _, _ in seen] == [0, 1, 2, 3, 4] and [t for _, t, _ in seen] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert torch.equal(seen[0][2], torch.ones(2)) and torch.equal(seen[-1][2], z_0)


@EXAMPLES
@given(st.integers(1, 40))
def test_grid_goes_from_one_to_zero_in_equal_steps(steps):
    assert time_grid(steps).tolist() == pytest.approx([1 - k / steps for k in range(steps + 1)], abs=1e-6)


@EXAMPLES
@given(st.sampled_from(["logit_normal", "uniform"]), st.floats(-2, 2), st.floats(0.3, 2))
def test_times_have_the_quantiles_of_their_law(law, loc, scale):
    times = sample_times(40_000, law, loc, scale, torch.Generator().manual_seed(0))
    assert times.shape == (40_000,) and 0 <= times.min() and times.max() <= 1
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    normal = torch.distributions.Normal(0.0, 1.0).icdf(levels)
    quantiles = levels if law == "uniform" else 1 / (1 + torch.exp(-loc - scale * normal))
    below = torch.stack([(times < quantile).float().mean() for quantile in quantiles])
    torch.testing.assert_close(below, levels, atol=0.012, rtol=0)


def test_times_come_from_the_generator():
    def draw(seed):
        return sample_times(5, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_a_shifted_grid_moves_the_middle(shift):
    grid = time_grid(8, shift=shift)
    assert grid[0] == 1 and grid[-1] == 0 and (grid.diff() < 0).all()
    odds = grid[1:-1] / (1 - grid[1:-1])  # the shift multiplies the odds of every time
    plain = time_grid(8)[1:-1]
    torch.testing.assert_close(odds, shift * plain / (1 - plain))


def test_renoised_samples_have_the_law_of_the_noisier_time():
    generator = torch.Generator().manual_seed(2)
    z_0 = 2 + 0.5 * torch.randn(200_000, generator=generator, dtype=torch.float64)
    noise, more = torch.randn(2, 200_000, generator=generator, dtype=torch.float64)
    for t, s in ((0.0, 0.4), (0.3, 0.7), (0.5, 1.0), (0.6, 0.6)):
        z = renoise((1 - t) * z_0 + t * noise, t, s, more)
        assert z.mean().item() == pytest.approx((1 - s) * 2, abs=0.01)
        assert z.var().item() == pytest.approx(((1 - s) * 0.5) ** 2 + s**2, abs=0.01)


def painted(t_repeats, fraction, steps=4):
    "A walk whose velocity is 1 everywhere, so that each part of it can be counted; noise is all ones."
    asked = []

    def velocity(z, t):
        asked.append((t, z.clone()))
        return torch.ones_like(z)

    where, rows = torch.tensor([[True, False], [False, False]]), torch.tensor([[True], [False]])
    paint = Paint(torch.tensor([5.0, 0.0]), where, rows, t_repeats, fraction, torch.ones_like)
    return asked, integrate(velocity, torch.zeros(2, 2), time_grid(steps), draw=torch.ones_like, paint=paint)


@pytest.mark.parametrize("repeats, fraction, times", [
    (1, 0.0, [1.0, 0.75, 0.5, 0.25]),
    (1, 1.0, [1.0, 0.75, 0.5, 0.25]),
    (2, 0.5, [1.0, 1.0, 0.75, 0.75, 0.5, 0.25]),
    (3, 0.25, [1.0, 1.0, 1.0, 0.75, 0.5, 0.25]),
])
def test_repaint_takes_the_first_steps_again_and_paints_what_is_known(repeats, fraction, times):
    asked, z_0 = painted(repeats, fraction)
    assert [t for t, _ in asked] == times
    for number, (t, z) in enumerate(asked):
        if number < repeats * math.ceil(fraction * 4): assert z[0, 0].item() == pytest.approx((1 - t) * 5 + t)
    assert z_0[0, 0] == 5.0  # in the end the known value itself stands there
    free = 0.0
    for step in range(4):  # by hand: the unknown place is taken back with new noise before each repetition
        t, end = 1 - step / 4, 1 - (step + 1) / 4
        for again in range(repeats if step < math.ceil(fraction * 4) else 1):
            if again:
                share = (1 - t) / (1 - end)
                free = share * free + math.sqrt(t**2 - (share * end) ** 2)
            free -= 0.25
    assert z_0[0, 1].item() == pytest.approx(free, abs=1e-6)
    assert z_0[1].tolist() == pytest.approx([-1.0, -1.0])  # a sample of which nothing is known takes each step once


@EXAMPLES
@given(st.floats(0, 1))
def test_a_schedule_is_linear_between_its_knots(t):
    import numpy

    knots = [(0.9, 2.0), (0.5, 6.0), (0.1, 1.0)]
    expected = numpy.interp(t, [k[0] for k in knots[::-1]], [k[1] for k in knots[::-1]])
    assert guidance_at(t, knots) == pytest.approx(float(expected), abs=1e-9)


@EXAMPLES
@given(st.floats(-5, 5), st.floats(-5, 5), st.floats(0, 10))
def test_guidance_by_arithmetic(without, given_history, scale):
    found = guide(torch.tensor([without]), torch.tensor([given_history]), scale).item()
    assert found == pytest.approx((1 - scale) * without + scale * given_history, abs=1e-4)


@EXAMPLES
@given(st.integers(1, 3), st.integers(1, 4), st.booleans())
def test_bridge_position_by_position(rows, n, own_times):
    generator = torch.Generator().manual_seed(rows + 10 * n)
    z_0, z_1 = torch.randn(2, rows, n, 2, generator=generator)
    t = torch.rand(rows, n, generator=generator) if own_times else torch.rand(rows, generator=generator)
    z_t, velocity = bridge(z_0, z_1, t)
    for b in range(rows):
        for i in range(n):
            time = (t[b, i] if own_times else t[b]).item()
            torch.testing.assert_close(z_t[b, i], z_0[b, i] + time * (z_1[b, i] - z_0[b, i]))
    torch.testing.assert_close(velocity, z_1 - z_0)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: sample_times(3, "normal"), "time_law is 'normal'.*logit_normal or uniform"),
        (lambda: time_grid(0), "steps is 0"),
        (lambda: time_grid(-3), "steps is -3"),
        (lambda: integrate(turning, torch.ones(1), time_grid(1), "rk5"), "solver is 'rk5'.*euler"),
    ],
)
def test_what_cannot_be_done_is_named(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
