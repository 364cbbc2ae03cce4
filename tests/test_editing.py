"What is not to be changed stays; what is written anew is the recipe without any memory; what cannot be done is refused by name."

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_generation import END_ID, MODELS, PLAIN, SIZE, WAYS, endless, prompt, small

from cola_tutorial.config import ConfigError, data_dir
from cola_tutorial.editing import interpolate, rewrite_span, shake_block
from cola_tutorial.generation import PromptError, generate, in_blocks_of
from cola_tutorial.model import ColaDLM
from cola_tutorial.text.stories import Grammar

EXAMPLES = settings(max_examples=25, deadline=None, derandomize=True)
SCALES = st.sampled_from([0.0, 1.0, 3.0])
CLOSE = dict(atol=5e-4, rtol=5e-4)  # float32: guidance by 3 multiplies the rounding of every step


@st.composite
def spans(draw, longest=19):
    "Length of a text, and a span in it."
    length = draw(st.integers(1, longest))
    start = draw(st.integers(0, length - 1))
    return length, start, draw(st.integers(start + 1, length))


def latents_of(model, ids):
    "Latents of one text, filled up to whole blocks."
    padded = torch.tensor([ids + [model.config.pad_id] * (-len(ids) % model.config.tokens_per_block)])
    return model.vae.to_latents(model.vae.encode(padded).mean)


def by_hand(model, ids, blocks, free, seed, scale, t=1.0, steps=PLAIN.steps):
    "Latents of `blocks`, and their tokens, without a cache: the text so far goes through the prior at every step. Latents not `free` are pinned."
    text, generator = latents_of(model, ids), torch.Generator().manual_seed(seed)
    for block in blocks:
        before, here = text[:, : block * SIZE], slice(block * SIZE, (block + 1) * SIZE)
        pinned = torch.tensor([n not in free for n in range(here.start, here.stop)])[None]
        z = (1 - t) * text[:, here] + t * torch.randn(SIZE, 4, generator=generator)
        z[pinned] = text[:, here][pinned]
        for step in range(steps):
            time = torch.full((1, SIZE), t * (1 - step / steps)).masked_fill(pinned, 0.0)
            with_history = model.dit(torch.cat([before, z], 1), torch.cat([torch.zeros(1, block * SIZE), time], 1))[:, block * SIZE :]
            without = model.dit(z, time)
            z = z - t / steps * (without + scale * (with_history - without)).masked_fill(pinned[..., None], 0.0)
        text[:, here] = z
        torch.rand(model.config.tokens_per_block, generator=generator)  # drawn for the choice of words
    written = slice(blocks[0] * SIZE, (blocks[-1] + 1) * SIZE)
    patch = model.config.vae.patch_size
    tokens = model.vae.decode(text[:, : written.stop])[0, written.start * patch :].argmax(-1)
    return text[0, written], tokens.tolist()


@EXAMPLES
@given(spans(), MODELS, SCALES)
def test_a_rewritten_span_is_the_recipe_without_any_memory(span, vae, scale):
    (length, start, stop), model = span, small(**vae)
    patch, per_block, ids = model.config.vae.patch_size, model.config.tokens_per_block, prompt(length)
    free = {token // patch for token in range(start, stop)} | set(range(math.ceil(length / patch), 99))  # the filling is not the text's
    blocks = range(start // per_block, (stop - 1) // per_block + 1)
    found = rewrite_span(model, ids, start, stop, replace(PLAIN, guidance_scale=scale), seeds=[3, 4])
    for row, seed in enumerate([3, 4]):
        latents, tokens = by_hand(model, ids, blocks, free, seed, scale)
        torch.testing.assert_close(found.latents[row], latents, **CLOSE)
        begin = blocks[0] * per_block
        assert found.tokens[row] == ids[:start] + tokens[start - begin : stop - begin] + ids[stop:]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(spans(), MODELS, WAYS)
def test_a_span_is_all_that_changes_and_pinned_latents_do_not_move(span, vae, ways):
    (length, start, stop), model = span, endless(**vae)
    patch, ids, seeds = model.config.vae.patch_size, prompt(length), range(5)
    found = rewrite_span(model, ids, start, stop, replace(PLAIN, steps=2, **ways), seeds=seeds)
    first = start // model.config.tokens_per_block * SIZE
    old = latents_of(model, ids)[0]
    assert found.texts == [""] * 5 and len(found.latents) == 5
    for new, latents in zip(found.tokens, found.latents):
        assert len(new) == length and new[:start] == ids[:start] and new[stop:] == ids[stop:]
        for n, latent in enumerate(latents, first):
            inside = n * patch < stop and (n + 1) * patch > start
            if inside: assert (latent - old[n]).abs().max() > 1e-3
            elif n * patch < length: torch.testing.assert_close(latent, old[n], atol=1e-5, rtol=1e-5)


def test_each_seed_writes_its_own_version_and_the_same_in_any_company():
    model, ids = endless(), prompt(14)
    for edit in (lambda seeds: rewrite_span(model, ids, 2, 11, PLAIN, seeds), lambda seeds: shake_block(model, ids, 1, 0.8, PLAIN, seeds, 2)):
        together = edit([5, 6, 7, 5])
        assert together.tokens[0] == together.tokens[3] and len({tuple(row) for row in together.tokens}) == 3
        for row, seed in enumerate([5, 6, 7]):
            alone = edit([seed])
            assert alone.tokens == [together.tokens[row]]
            torch.testing.assert_close(alone.latents[0], together.latents[row], atol=1e-5, rtol=1e-5)


@st.composite
def shaken(draw):
    "Blocks of a text, the first one to shake, how many, and how many tokens the last block lacks."
    last = draw(st.integers(1, 4))
    block = draw(st.integers(0, last - 1))
    return last, block, draw(st.integers(1, last - block)), draw(st.integers(0, SIZE - 1))


@EXAMPLES
@given(shaken(), MODELS, SCALES, st.floats(0.05, 1.0))
def test_shaken_blocks_are_the_recipe_without_any_memory(where, vae, scale, t):
    (last, block, blocks, lacking), model = where, small(**vae)
    per_block = model.config.tokens_per_block
    ids, begin = prompt(last * per_block - lacking), block * per_block
    found = shake_block(model, ids, block, t, replace(PLAIN, guidance_scale=scale), [9], blocks)
    latents, tokens = by_hand(model, ids, range(block, block + blocks), set(range(99)), 9, scale, t)
    torch.testing.assert_close(found.latents[0], latents, **CLOSE)
    assert found.tokens == [(ids[:begin] + tokens + ids[begin + blocks * per_block :])[: len(ids)]]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(shaken(), MODELS, WAYS)
def test_shaken_from_pure_noise_a_block_is_generated_after_its_prefix(where, vae, ways):
    (last, block, blocks, lacking), model = where, endless(**vae)
    config, per_block = replace(PLAIN, steps=2, **ways | {"num_blocks": blocks, "stop_tokens": ()}), model.config.tokens_per_block
    ids, begin = prompt(last * per_block - lacking), block * per_block
    found = shake_block(model, ids, block, 1, config, [4, 5], blocks)
    prefix = [ids[:begin]] * 2 if block else 2
    anew = generate(model, prefix, config, seeds=[4, 5])
    for row in range(2):
        assert found.tokens[row] == (ids[:begin] + anew.tokens[row] + ids[begin + blocks * per_block :])[: len(ids)]
        torch.testing.assert_close(found.latents[row], anew.latents[row], atol=1e-5, rtol=1e-5)


def test_almost_no_noise_leaves_the_latents_and_a_good_model_the_text():
    model, ids = small(), prompt(14)
    found = shake_block(model, ids, 1, 1e-6, PLAIN, [1], 2)
    torch.testing.assert_close(found.latents[0], latents_of(model, ids)[0, SIZE : 3 * SIZE], **CLOSE)
    pretrained, story = ColaDLM.from_pretrained(data_dir() / "pretrained"), Grammar.load().story(3, 0, "validation").text
    assert shake_block(pretrained, story, 4, 0.2, seeds=[0, 1], blocks=5).texts == [story] * 2
    assert story not in shake_block(pretrained, story, 4, 1.0, seeds=[0, 1], blocks=5).texts


@pytest.mark.parametrize("attention", ["block_causal", "causal", "bidirectional"])
@pytest.mark.parametrize("lengths, patch_size", [((5, 11), 1), ((8, 3), 1), ((8, 8), 1), ((7, 9), 2)])
def test_the_ends_of_a_path_are_the_texts_themselves(lengths, patch_size, attention):
    model = small(patch_size=patch_size, attention=attention)
    first, second = (prompt(length, seed) for seed, length in enumerate(lengths))
    total = math.ceil(max(lengths) / model.config.tokens_per_block) * model.config.tokens_per_block
    ends = [latents_of(model, ids + [END_ID] * (total - len(ids))) for ids in (first, second)]
    shares = (1.0, 0.25, 0.0)
    found = interpolate(model, first, second, shares)
    assert found.latents.shape == (3, total // patch_size, 4) and found.texts == [""] * 3
    for s, ids, z in zip(shares, found.tokens, found.latents):
        wanted = ends[0] + s * (ends[1] - ends[0])
        torch.testing.assert_close(z, wanted[0], atol=1e-5, rtol=1e-5)
        plain = model.vae.decode(wanted)[0].argmax(-1).tolist() + [END_ID]
        assert ids == plain[: plain.index(END_ID)]


def test_a_path_stops_at_the_end_token_and_texts_may_be_strings():
    model, grammar = ColaDLM.from_pretrained(data_dir() / "pretrained"), Grammar.load()
    stories = sorted((grammar.story(3, i, "validation").text for i in range(2)), key=len)
    assert len({len(model.tokenizer.encode(story).ids) for story in stories}) == 2  # one of them is filled up
    found = interpolate(model, *stories, [0, 1])
    assert found.texts == stories and found.tokens == [model.tokenizer.encode(story).ids for story in stories]
    span = rewrite_span(model, stories[0], 24, 27, seeds=[0, 1])
    assert span.texts == [model.tokenizer.decode(ids) for ids in span.tokens]
    assert span.tokens == rewrite_span(model, model.tokenizer.encode(stories[0]).ids, 24, 27, seeds=[0, 1]).tokens


def test_a_text_may_fill_max_length_and_blocks_have_the_size_asked_for():
    model, ids, config = endless(), prompt(12), replace(PLAIN, max_length=12)
    assert len(rewrite_span(model, ids, 9, 12, config).tokens[0]) == len(shake_block(model, ids, 2, 0.5, config).tokens[0]) == 12
    halves, config = in_blocks_of(model, 2), replace(PLAIN, block_size=2)
    for edit in (lambda model, config: rewrite_span(model, ids, 3, 6, config), lambda model, config: shake_block(model, ids, 4, 0.9, config, blocks=2)):
        found, wanted = edit(model, config), edit(halves, PLAIN)
        assert found.tokens == wanted.tokens and torch.equal(found.latents, wanted.latents) and found.latents.shape == (1, 4, 4)


@pytest.mark.parametrize("start, stop", [(-1, 2), (3, 3), (4, 2), (0, 10), (9, 10)])
def test_a_span_outside_the_text_is_refused(start, stop):
    with pytest.raises(PromptError, match=rf"^the span {start}\.\.{stop} is not in the text of 9 tokens"):
        rewrite_span(endless(), prompt(9), start, stop, PLAIN)


@pytest.mark.parametrize("t", [0, -0.1, 1.1, math.nan, math.inf])
def test_a_time_outside_the_flow_is_refused(t):
    with pytest.raises(ConfigError, match=f"^t is {t}, "): shake_block(endless(), prompt(9), 0, t, PLAIN)


@pytest.mark.parametrize("block, blocks", [(-1, 1), (3, 1), (0, 0), (0, 4), (2, 2), (1, -1)])
def test_blocks_outside_the_text_are_refused(block, blocks):
    with pytest.raises(PromptError, match=f"^{blocks} blocks from block {block} on are not in the text of 3"):
        shake_block(endless(), prompt(9), block, 0.5, PLAIN, blocks=blocks)


@pytest.mark.parametrize("shares", [[], [-0.1], [0.5, 1.1], [math.nan]])
def test_shares_outside_the_path_are_refused(shares):
    with pytest.raises(ConfigError, match="^shares are "): interpolate(endless(), prompt(9), prompt(3), shares)


@pytest.mark.parametrize("seeds", [[], [-1], [0, 1.5], [2**63], [None]])
def test_bad_seeds_are_refused(seeds):
    for edit in (lambda: rewrite_span(endless(), prompt(9), 1, 3, PLAIN, seeds), lambda: shake_block(endless(), prompt(9), 1, 0.5, PLAIN, seeds)):
        with pytest.raises(PromptError, match="^(there are no seeds|seeds are|seed )"): edit()


@pytest.mark.parametrize(
    "text, words",
    [
        ([], "is empty"),
        ([1, 99, 2], "holds token id 99"),
        ([1, -1], "holds token id -1"),
        ([1, 2.5], "is neither a text nor whole numbers"),
        (7, "is neither a text nor whole numbers"),
        ("Once", "is a string, but the model has no tokenizer"),
        (prompt(13), "has 13 tokens, but max_length is 12"),
    ],
)
def test_a_bad_text_is_refused_by_its_number(text, words):
    model, config = endless(), replace(PLAIN, max_length=12)
    model.generation = config
    with pytest.raises(PromptError, match=f"^prompt 0 {words}"): rewrite_span(model, text, 0, 1, config)
    with pytest.raises(PromptError, match=f"^prompt 0 {words}"): shake_block(model, text, 0, 0.5)
    with pytest.raises(PromptError, match=f"^prompt 0 {words}"): interpolate(model, text, prompt(3), [0.5])
    with pytest.raises(PromptError, match=f"^prompt 1 {words}"): interpolate(model, prompt(3), text, [0.5])
