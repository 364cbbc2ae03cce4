"Solvers on an equation with a known answer, times against their law, guidance and the path by arithmetic."

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cola_tutorial.config import ConfigError
from cola_tutorial.flow import bridge, euler_step, guide, heun_step, integrate, renewing_step, sample_times, time_grid

EXAMPLES = settings(max_examples=40, deadline=None, derandomize=True)


def turning(z, t):
    "dz/dt = (1 + 4t^3) z, so z(0) = z(1) exp(-2)."
    return (1 + 4 * t**3) * z


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
def test_half_the_step_divides_the_error_by_two_to_the_order(solver, order):
    z_1 = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    exact = z_1 * math.exp(-2)

    def error(steps):
        return (integrate(turning, z_1, time_grid(steps).double(), solver) - exact).abs().max().item()

    ratio = error(40) / error(80)
    assert ratio == pytest.approx(2**order, rel=0.1)
    assert error(80) < 0.05 / 4 ** (order - 1)


@pytest.mark.parametrize("step", [euler_step, heun_step])
def test_constant_speed_is_exact_in_one_step(step):
    z, t, end = torch.randn(3), torch.tensor(1.0), torch.tensor(0.25)
    torch.testing.assert_close(step(lambda z, t: torch.full_like(z, 2.0), z, t, end), z - 1.5)


def test_heun_asks_at_both_ends_and_euler_at_one():
    asked = []

    def velocity(z, t):
        asked.append(t.item())
        return z

    for solver, times in (("euler", [1.0, 0.5]), ("heun", [1.0, 0.5, 0.5, 0.0])):
        asked.clear()
        integrate(velocity, torch.ones(1), time_grid(2), solver)
        assert asked == times


def test_a_renewing_step_lands_between_the_clean_end_and_new_noise():
    z_0, z_1, new = torch.randn(3, 20, generator=torch.Generator().manual_seed(5))
    t, end = torch.tensor(0.8), torch.tensor(0.3)
    landed = renewing_step(lambda z, t: z_1 - z_0, 0.2 * z_0 + 0.8 * z_1, t, end, lambda clean: new)
    torch.testing.assert_close(landed, 0.7 * z_0 + 0.3 * new)
    still = renewing_step(lambda z, t: torch.zeros_like(z), z_0, t, end, lambda clean: clean)
    assert torch.equal(still, z_0)


@pytest.mark.parametrize("below, renewed", [(0.0, []), (0.25, []), (0.3, [0.25]), (0.6, [0.5, 0.25]), (1.0, [0.75, 0.5, 0.25])])
def test_noise_is_renewed_below_the_time_and_never_at_the_end(below, renewed):
    z_1, new = torch.randn(2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    spread, places = 0.5, []  # Gaussian data, whose clean end is a multiple of z

    def share(t):
        return (1 - t) * spread**2 / ((1 - t) ** 2 * spread**2 + t**2)

    z, grid = z_1, time_grid(4).double()
    for t, end in zip(grid.tolist(), grid.tolist()[1:]):
        clean, old = share(t) * z, (1 - (1 - t) * share(t)) * z / t
        z = (1 - end) * clean + end * (new if end in renewed else old)
    found = integrate(
        lambda z, t: (z - share(t) * z) / t,
        z_1,
        grid,
        visit=lambda step, t, z: places.append(z),
        renew_below=below,
        draw=lambda clean: new,
    )
    torch.testing.assert_close(found, z)
    assert len(places) == 5


def test_every_time_of_the_grid_is_visited_once_and_the_last_is_the_result():
    seen = []
    z_0 = integrate(turning, torch.ones(2), time_grid(4), visit=lambda step, t, z: seen.append((step, t.item(), z)))
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
        (lambda: integrate(turning, torch.ones(1), time_grid(1), "rk4"), "solver is 'rk4'.*euler"),
    ],
)
def test_what_cannot_be_done_is_named(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
