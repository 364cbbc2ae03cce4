"All blocks at once against block by block with a memory; who influences whom; and where gradients may go."

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cola_tutorial.config import ConfigError, DiTConfig
from cola_tutorial.dit import DiT, gelu_tanh, look_up, time_waves
from cola_tutorial.nn.attention import Sight, attention_mask

SIZE, WIDTH = 3, 4


def tiny(**changes):
    "A DiT whose every weight matters."
    sizes = dict(
        latent_dim=WIDTH,
        dim=16,
        emb_dim=12,
        num_heads=2,
        head_dim=8,
        expand_ratio=2,
        num_layers=2,
        rope_dim=6,
        block_size=SIZE,
    )
    torch.manual_seed(0)
    dit = DiT(DiTConfig(**sizes | changes)).eval()
    with torch.no_grad():
        for weight in dit.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return dit


@pytest.fixture(scope="module")
def dit():
    return tiny()


def latents(rows, n, seed=1):
    return torch.randn(2, rows, n, WIDTH, generator=torch.Generator().manual_seed(seed))


def block_by_block(dit, z_0, z_t, t, pinned=None):
    "The velocity of every block as generation asks for it: clean history in a memory, nothing else in sight."
    rows, n = z_0.shape[:2]
    cache, parts = dit.new_cache(rows, n), []
    for start in range(0, n, SIZE):
        here = slice(start, start + SIZE)
        times = t[:, None].expand(rows, SIZE)
        if pinned is not None:
            times = torch.where(pinned[:, here], 0.0, times)
        parts.append(dit(z_t[:, here], times, cache=cache))
        dit(z_0[:, here], torch.zeros(rows), cache=cache)
        cache.commit(SIZE)
    return torch.cat(parts, 1)


@torch.no_grad()
@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(1, 3), st.integers(1, 4), st.booleans(), st.integers(0, 1000))
def test_two_copies_are_generation_block_by_block(rows, blocks, with_prefix, seed):
    dit, n = tiny(), blocks * SIZE
    z_0, z_t = latents(rows, n, seed)
    generator = torch.Generator().manual_seed(seed)
    t, pinned = torch.rand(rows, generator=generator), None
    if with_prefix:
        lengths = torch.randint(0, SIZE, (rows, blocks, 1), generator=generator)
        pinned = (torch.arange(SIZE) < lengths).flatten(1)
        z_t = torch.where(pinned[..., None], z_0, z_t)
    at_once = dit.two_copy_velocity(z_0, z_t, t, pinned)
    torch.testing.assert_close(at_once, block_by_block(dit, z_0, z_t, t, pinned), atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_a_pinned_latent_carries_time_zero(dit):
    z_0, z_t = latents(1, SIZE)
    pinned = torch.tensor([[True, False, False]])
    one, other = (dit.two_copy_velocity(z_0, z_t, torch.tensor([0.7]), p) for p in (pinned, None))
    assert (one - other).abs().max() > 1e-3


@torch.no_grad()
def test_memory_with_rows_of_different_histories(dit):
    z, _ = latents(2, 3 * SIZE)
    cache = dit.new_cache(2, 3 * SIZE, starts=[0, SIZE])
    dit(torch.stack([z[0, : 2 * SIZE], torch.roll(z[1, : 2 * SIZE], SIZE, 0)]), torch.zeros(2), cache=cache)
    cache.commit(2 * SIZE)
    noisy, t = torch.randn(2, SIZE, WIDTH), torch.tensor([0.4, 0.9])
    together = dit(noisy, t, cache=cache)
    for row, history in enumerate((2 * SIZE, SIZE)):
        whole = torch.cat([z[row : row + 1, :history], noisy[row : row + 1]], 1)
        times = torch.cat([torch.zeros(1, history), t[row].expand(1, SIZE)], 1)
        torch.testing.assert_close(together[row], dit(whole, times)[0, history:], atol=2e-5, rtol=2e-5)


def test_no_gradient_reaches_the_clean_history(dit):
    z_0, z_t = (z.clone().requires_grad_() for z in latents(2, 3 * SIZE))
    dit.two_copy_velocity(z_0, z_t, torch.tensor([0.3, 0.8])).pow(2).sum().backward()
    assert z_0.grad is None or not z_0.grad.any()
    assert z_t.grad.abs().amax(-1).min() > 0


@torch.no_grad()
def test_influence_in_two_copies(dit):
    z_0, z_t = latents(1, 3 * SIZE)
    t = torch.tensor([0.5])
    before = dit.two_copy_velocity(z_0, z_t, t)

    def moved(clean, noisy):
        return ((dit.two_copy_velocity(clean, noisy, t) - before)[0].abs().amax(-1) > 1e-5).tolist()

    for at in range(3 * SIZE):
        push = torch.zeros_like(z_0)
        push[0, at] = 1.0
        assert moved(z_0 + push, z_t) == [i // SIZE > at // SIZE for i in range(3 * SIZE)]
        assert moved(z_0, z_t + push) == [i // SIZE == at // SIZE for i in range(3 * SIZE)]


@torch.no_grad()
def test_modulations_looked_up_are_modulations_computed(dit):
    z, _ = latents(2, 2 * SIZE)
    times = torch.tensor([0.0, 0.25, 1.0])
    row = torch.randint(0, 3, (2, 2 * SIZE), generator=torch.Generator().manual_seed(0))
    sight = Sight(dit.turns(torch.arange(2 * SIZE)), attention_mask("block_causal", 2 * SIZE, SIZE))
    looked_up = dit.denoise(z, look_up(dit.modulations(times), row), sight)
    torch.testing.assert_close(looked_up, dit(z, times[row]), atol=1e-5, rtol=1e-5)
    shared = dit.denoise(z, look_up(dit.modulations(times), torch.tensor([[2], [1]])), sight)
    torch.testing.assert_close(shared, dit(z, times[[2, 1]][:, None].expand(2, 2 * SIZE)), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_rows_of_a_batch_do_not_meet(dit):
    z_0, z_t = latents(4, 2 * SIZE)
    t = torch.tensor([0.1, 0.5, 0.9, 0.3])
    together = dit.two_copy_velocity(z_0, z_t, t)
    order = [2, 0, 3, 1]
    torch.testing.assert_close(
        dit.two_copy_velocity(z_0[order], z_t[order], t[order]), together[order], atol=1e-5, rtol=1e-5
    )
    for row in range(4):
        alone = dit.two_copy_velocity(*(x[row : row + 1] for x in (z_0, z_t, t)))
        torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=1e-5)


def test_a_new_network_stands_still():
    torch.manual_seed(0)
    config = DiTConfig(
        latent_dim=WIDTH, dim=16, emb_dim=12, num_heads=2, head_dim=8, num_layers=1, rope_dim=6, block_size=SIZE
    )
    assert not DiT(config)(torch.randn(2, 6, WIDTH), torch.tensor([0.2, 0.8])).any()


def test_every_weight_learns():
    dit = tiny()
    z_0, z_t = latents(2, 2 * SIZE)
    dit.two_copy_velocity(z_0, z_t, torch.tensor([0.3, 0.8])).pow(2).sum().backward()
    assert [name for name, weight in dit.named_parameters() if weight.grad is None or not weight.grad.any()] == []


def test_time_waves_one_by_one():
    waves = time_waves(torch.tensor([[0.0, 0.37]]), 8)
    assert waves.shape == (1, 2, 8)
    for j in range(4):
        angle = 370 * 10_000 ** (-j / 4)
        assert waves[0, 1, [j, j + 4]].tolist() == pytest.approx([math.sin(angle), math.cos(angle)], abs=1e-4)
    assert waves[0, 0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("shape", [(3,), (2, 5), (2, 6, 1), ()])
def test_times_of_another_shape_are_refused(dit, shape):
    with pytest.raises(ConfigError, match="t has shape .*must be \\(B,\\) or \\(B, N\\)"):
        dit(torch.zeros(2, 6, WIDTH), torch.zeros(shape))


def test_documents_in_one_row_are_as_rows_of_their_own():
    "Rotary positions are relative, so a document does not notice where in a row it stands."
    dit, (z_0, z_t), t = tiny(block_size=2), latents(2, 12), torch.tensor([0.3, 0.8])
    documents = torch.tensor([[0] * 4 + [1] * 8]).expand(2, -1)
    together = dit.two_copy_velocity(z_0, z_t, t, documents=documents)
    apart = [dit.two_copy_velocity(z_0[:, part], z_t[:, part], t) for part in (slice(0, 4), slice(4, 12))]
    torch.testing.assert_close(together, torch.cat(apart, 1), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(together, dit.two_copy_velocity(z_0, z_t, t), atol=1e-3)


def test_blocks_of_another_size_are_those_of_a_model_of_that_size():
    dit, (z_0, z_t), t = tiny(block_size=2), latents(2, 12), torch.tensor([0.3, 0.8])
    other = tiny(block_size=4)
    other.load_state_dict(dit.state_dict())
    torch.testing.assert_close(dit.two_copy_velocity(z_0, z_t, t, block_size=4), other.two_copy_velocity(z_0, z_t, t))
    assert not torch.allclose(dit.two_copy_velocity(z_0, z_t, t, block_size=4), dit.two_copy_velocity(z_0, z_t, t), atol=1e-3)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_tiles_see_what_the_mask_shows():
    dit, (z_0, z_t), t = tiny(block_size=2), latents(2, 12), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        dense = dit.two_copy_velocity(z_0, z_t, t)
        dit.flex = True
        torch.testing.assert_close(dit.two_copy_velocity(z_0, z_t, t), dense, atol=1e-5, rtol=1e-5)


def test_activations_made_anew_give_the_same_gradients():
    found = []
    for recompute in (False, True):
        dit, (z_0, z_t), t = tiny(block_size=2), latents(2, 12), torch.tensor([0.3, 0.8])
        dit.recompute = recompute
        dit.two_copy_velocity(z_0, z_t, t).pow(2).sum().backward()
        found.append({name: weight.grad for name, weight in dit.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name])


def test_gelu_and_its_gradient_are_the_tanh_form_in_double_precision():
    x = torch.cat([torch.linspace(-30, 30, 301), torch.randn(200, generator=torch.Generator().manual_seed(2))]).requires_grad_()
    exact = x.detach().double().requires_grad_()
    u = math.sqrt(2 / math.pi) * (exact + 0.044715 * exact**3)
    (slope,) = torch.autograd.grad((expected := exact * (1 + u.tanh()) / 2).sum(), exact)
    torch.testing.assert_close(gelu_tanh(x).double(), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(gelu_tanh(x).sum(), x)[0].double(), slope, atol=3e-6, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(gelu_tanh(x).double(), expected, atol=1e-6, rtol=1e-5)
    several = torch.autograd.grad(gelu_tanh(x), x, torch.eye(len(x)), is_grads_batched=True)[0]
    torch.testing.assert_close(several.diagonal().double(), slope, atol=3e-6, rtol=1e-5)
    both = (gelu_tanh, x), (partial(F.gelu, approximate="tanh"), exact)
    derived = [torch.autograd.grad(f(y), y, torch.ones_like(y), create_graph=True)[0] for f, y in both]
    again, expected = (torch.autograd.grad(first.pow(2).sum(), y)[0] for first, y in zip(derived, (x, exact)))
    torch.testing.assert_close(again.double(), expected, atol=1e-5, rtol=1e-4)  # a derivative of the derivative
