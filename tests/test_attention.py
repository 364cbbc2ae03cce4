"Masks against loops, rotations against complex numbers, and a cache against attention without one."

import cmath
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cola_tutorial.config import ATTENTION_KINDS, ConfigError
from cola_tutorial.nn.attention import (
    KVCache,
    Sight,
    attend,
    attention_mask,
    rotary_turns,
    rotate_halves,
    rotate_pairs,
    two_copy_mask,
)

EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True)


def sees(kind, row, column, size):
    "Who sees whom, for one pair."
    return {"bidirectional": True, "causal": column <= row, "block_causal": column // size <= row // size}[kind]


def plain_attention(q, k, v, mask):
    "softmax(q k^T / sqrt(D)) v in double precision: (N, D), (M, D), (M, D), nested lists of bool."
    scores = q.double() @ k.double().T / math.sqrt(q.shape[-1])
    return (scores.masked_fill(~torch.tensor(mask), -math.inf).softmax(-1) @ v.double()).float()


@EXAMPLES
@given(st.sampled_from(ATTENTION_KINDS), st.integers(1, 14), st.integers(1, 6))
def test_mask_is_the_rule_pair_by_pair(kind, n, size):
    expected = [[sees(kind, row, column, size) for column in range(n)] for row in range(n)]
    assert attention_mask(kind, n, size).tolist() == expected


@EXAMPLES
@given(st.integers(1, 10), st.integers(1, 5))
def test_two_copy_mask_is_the_rule_pair_by_pair(n, size):
    def rule(row, column):
        mine, theirs = row % n // size, column % n // size
        if column < n:
            return theirs <= mine if row < n else theirs < mine
        return row >= n and theirs == mine

    assert two_copy_mask(n, size).tolist() == [[rule(row, column) for column in range(2 * n)] for row in range(2 * n)]


def test_unknown_kind_is_named():
    with pytest.raises(ConfigError, match="'sideways'.*block_causal"):
        attention_mask("sideways", 4, 2)


@EXAMPLES
@given(st.sampled_from([2, 4, 8]), st.integers(0, 5000), st.sampled_from([100.0, 500_000.0]), st.booleans())
def test_rotation_is_multiplication_by_a_complex_number(dim, position, base, halves):
    x = torch.randn(1, 1, 1, dim, generator=torch.Generator().manual_seed(position))
    turns = rotary_turns(torch.tensor([position]), dim, base)
    turned = (rotate_halves if halves else rotate_pairs)(x, turns)[0, 0, 0]
    for j in range(dim // 2):
        real, imaginary = (j, j + dim // 2) if halves else (2 * j, 2 * j + 1)
        number = complex(x[..., real].item(), x[..., imaginary].item()) * cmath.exp(
            1j * position * base ** (-2 * j / dim)
        )
        found = complex(turned[real].item(), turned[imaginary].item())
        assert abs(number - found) < 1e-3 * abs(number)  # angles of thousands of radians in fp32


def test_rotated_products_depend_on_distance_only_and_the_rest_passes():
    q, k = torch.randn(2, 1, 1, 1, 10, generator=torch.Generator().manual_seed(0))

    def turn(x, position):
        return rotate_pairs(x, rotary_turns(torch.tensor([position]), 6, width=10))

    products = [(turn(q, m) * turn(k, m - 3)).sum().item() for m in (3, 10, 57)]
    assert products == pytest.approx([products[0]] * 3, abs=1e-4)
    assert (turn(q, 3) * turn(k, 1)).sum().item() != pytest.approx(products[0], abs=1e-3)
    assert torch.equal(turn(q, 9)[..., 6:], q[..., 6:])


def test_rows_with_positions_of_their_own_turn_alone():
    x, positions = torch.randn(2, 3, 4, 6), torch.tensor([[0, 1, 2, 3], [7, 8, 9, 10]])
    for rotate in (rotate_halves, rotate_pairs):
        together = rotate(x, rotary_turns(positions, 6))
        alone = [rotate(x[r : r + 1], rotary_turns(positions[r], 6)) for r in range(2)]
        assert torch.equal(together, torch.cat(alone))
        assert rotate(x.bfloat16(), rotary_turns(positions, 6)).dtype == torch.bfloat16


def test_attend_is_softmax_over_what_is_seen():
    q, k, v = torch.randn(3, 2, 3, 7, 4, generator=torch.Generator().manual_seed(1))
    mask = [[sees("block_causal", row, column, 3) for column in range(7)] for row in range(7)]
    out = attend(q, k, v, torch.tensor(mask))
    for b in range(2):
        for h in range(3):
            torch.testing.assert_close(out[b, h], plain_attention(q[b, h], k[b, h], v[b, h], mask))


@pytest.mark.parametrize("masked", [False, True])
def test_many_short_rows_on_several_threads_are_attended_to_alike(masked):
    threads = torch.get_num_threads()
    q, k, v = torch.randn(3, 16, 2, 5, 4, generator=torch.Generator().manual_seed(3))
    mask = [[not masked or sees("causal", row, column, 1) for column in range(5)] for row in range(5)]
    try:
        torch.set_num_threads(2)
        with torch.no_grad():
            out = attend(q, k, v, torch.tensor(mask) if masked else None)
    finally:
        torch.set_num_threads(threads)
    for b in range(16):
        for h in range(2):
            torch.testing.assert_close(out[b, h], plain_attention(q[b, h], k[b, h], v[b, h], mask))


@EXAMPLES
@given(
    st.sampled_from(ATTENTION_KINDS),
    st.lists(st.integers(0, 3), min_size=1, max_size=4),
    st.integers(1, 3),
    st.integers(1, 3),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_cache_with_histories_of_any_lengths_is_attention_over_each_rows_own_past(kind, blocks, size, rounds, everywhere, random):
    generator = torch.Generator().manual_seed(sum(blocks) + 10 * size)
    most, rows, heads, dim = max(blocks) * size, len(blocks), 2, 4
    starts = [most - count * size for count in blocks]

    def draw(n):
        return torch.randn(3, rows, heads, n, dim, generator=generator)

    cache = KVCache(1, rows, heads, dim, most + (rounds + 1) * size, starts=starts)
    past = draw(most)  # before a row's own history this is rubbish that nobody may see
    if most:
        first = attend(past[0], *cache.write(0, *past[1:]), cache.mask(most, kind, size))
        assert first.isfinite().all()  # nobody is left without anything to see
        cache.commit(most)
    keys, values = ([past[i, r, :, starts[r] :] for r in range(rows)] for i in (1, 2))
    for _ in range(rounds):
        cache.write(0, *draw(size)[1:])  # a trial that is not committed must leave no trace
        q, k, v = draw(size)
        slots = torch.arange(cache.length, cache.length + size) if everywhere else None
        out = attend(q, *cache.write(0, k, v, slots), cache.mask(size, kind, size, capacity=everywhere))
        positions = cache.positions(size).expand(rows, size)
        for r in range(rows):
            old = keys[r].shape[1]
            keys[r], values[r] = torch.cat([keys[r], k[r]], 1), torch.cat([values[r], v[r]], 1)
            mask = [
                [column < old or sees(kind, row, column - old, size) for column in range(old + size)]
                for row in range(size)
            ]
            assert positions[r].tolist() == list(range(old, old + size))
            for h in range(heads):
                expected = plain_attention(q[r, h], keys[r][h], values[r][h], mask)
                torch.testing.assert_close(out[r, h], expected, atol=1e-5, rtol=1e-5)
        cache.commit(size)
        if random.random() < 0.5 and rows > 1:  # some rows are done
            left = random.sample(range(rows), rows - 1)
            cache.keep(left)
            keys, values, rows = [keys[r] for r in left], [values[r] for r in left], rows - 1


@EXAMPLES
@given(st.integers(0, 2), st.integers(1, 3), st.booleans())
def test_the_last_positions_may_stand_alone(blocks, size, remembers):
    generator = torch.Generator().manual_seed(blocks + 10 * size)
    q, k, v = torch.randn(3, 2, 1, 2 * size, 4, generator=generator)
    cache = KVCache(1, 2, 1, 4, (blocks + 1) * size) if remembers else None
    old_k, old_v = torch.randn(2, 2, 1, blocks * size, 4, generator=generator)
    if cache:
        cache.write(0, old_k, old_v)
        cache.commit(blocks * size)
    else:
        old_k, old_v = old_k[:, :, :0], old_v[:, :, :0]
    out = Sight(rotary_turns(torch.arange(2 * size), 4), cache=cache, alone=size).attend(0, q, k, v)  # (B, N, H * D), one head
    out = out[:, None]
    first = attend(q[:, :, :size], torch.cat([old_k, k[:, :, :size]], 2), torch.cat([old_v, v[:, :, :size]], 2))
    torch.testing.assert_close(out[:, :, :size], first)
    torch.testing.assert_close(out[:, :, size:], attend(q[:, :, size:], k[:, :, size:], v[:, :, size:]))


def test_full_cache_says_how_much_is_needed():
    cache = KVCache(1, 2, 1, 2, 5)
    part = torch.zeros(2, 1, 3, 2)
    cache.write(0, part, part)
    cache.commit(3)
    with pytest.raises(ConfigError, match="holds 5 positions, but 6 are needed"):
        cache.write(0, part, part)


def test_no_mask_is_made_where_nothing_is_hidden():
    cache = KVCache(1, 2, 1, 2, 12)
    assert cache.mask(4, "block_causal", 4) is None and cache.mask(8, "block_causal", 4) is not None
    assert cache.mask(4, "causal", 4) is not None and cache.mask(9, "bidirectional", 4) is None
    assert KVCache(1, 2, 1, 2, 12, starts=[0, 4]).mask(4, "block_causal", 4) is not None


@EXAMPLES
@given(st.integers(1, 13), st.integers(1, 5), st.integers(0, 3), st.booleans(), st.booleans())
def test_copies_in_halves_see_what_the_whole_table_shows(n, size, border, both, apart):
    "Any border of blocks may be the cut, even one that leaves a single block to a side."
    generator = torch.Generator().manual_seed(5)
    q, k, v = torch.randn(3, 2, 1, 2 * n, 6, generator=generator)
    documents = (torch.arange(n) >= n // 3)[None].expand(2, n).long() if apart else None
    mask = two_copy_mask(n, size, documents=documents)
    cut = border * size if border * size < n else 0
    asking = q if both else q[:, :, n:]
    found = Sight(rotary_turns(torch.arange(n).repeat(2), 6), mask, clean=n, cut=cut).attend(0, asking, k, v)
    rows = mask.expand(2, 1, 2 * n, 2 * n)[:, 0].tolist()
    expected = torch.stack([plain_attention(*(x[row, 0] for x in (q, k, v)), rows[row]) for row in range(2)])
    torch.testing.assert_close(found, expected[:, -asking.shape[2] :], atol=1e-5, rtol=1e-5)
