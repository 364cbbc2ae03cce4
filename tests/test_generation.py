"A row is what it would be alone; options are obeyed or refused; every token is counted."

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cola_tutorial.config import ColaConfig, ConfigError, DiTConfig, GenerationConfig, VAEConfig
from cola_tutorial.generation import PromptError, choose_tokens, generate, read_prompts, write_blocks
from cola_tutorial.model import ColaDLM
from cola_tutorial.text.corpus import train_tokenizer

EXAMPLES = settings(max_examples=25, deadline=None, derandomize=True)
SIZE, VOCABULARY, END_ID = 4, 13, 12
PLAIN = GenerationConfig(max_length=64, max_new_tokens=7, steps=3)


def small(tokenizer=None, vocab_size=VOCABULARY, end_id=END_ID, **vae):
    "A model whose every weight matters, so that a wrong neighbour is felt."
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=vocab_size, dim=16, ffn_dim=16, num_heads=2, encoder_num_blocks=1, decoder_num_blocks=1, init_std=0.2
    )
    dit = DiTConfig(
        latent_dim=4,
        dim=16,
        emb_dim=8,
        num_heads=2,
        head_dim=8,
        expand_ratio=2,
        num_layers=2,
        rope_dim=4,
        block_size=SIZE,
    )
    model = ColaDLM(
        ColaConfig(VAEConfig(**sizes, latent_dim=4, block_size=SIZE, **vae), dit, pad_id=0, end_id=end_id), tokenizer
    )
    with torch.no_grad():
        for weight in model.dit.parameters():
            weight.add_(0.25 * torch.randn_like(weight))
    return model.requires_grad_(False).eval()


def endless(**vae):
    "The same model, but it never ends a text: the end token's bias is very low."
    model = small(**vae)
    model.vae.decoder.final_layer.bias[END_ID] = -1e4
    return model


def same(ours, theirs):
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def prompt(length, seed=0):
    return torch.randint(1, END_ID, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@EXAMPLES
@given(
    st.lists(st.integers(1, 11), min_size=2, max_size=4),
    st.sampled_from([{}, {"attention": "causal"}, {"patch_size": 2}]),
    st.sampled_from([0.0, 1.0, 3.0]),
    st.sampled_from([0.0, 0.8]),
    st.randoms(use_true_random=False),
)
def test_a_row_is_what_it_would_be_alone_and_in_any_order(lengths, vae, guidance_scale, temperature, random):
    if "patch_size" in vae:
        lengths = [2 * length for length in lengths]
    model = endless(**vae)
    config = replace(PLAIN, guidance_scale=guidance_scale, temperature=temperature)
    prompts = [prompt(length, seed) for seed, length in enumerate(lengths)]
    seeds = [100 + row for row in range(len(prompts))]
    together = generate(model, prompts, config, seeds)
    order = random.sample(range(len(prompts)), len(prompts))
    permuted = generate(model, [prompts[row] for row in order], config, [seeds[row] for row in order])
    for row in range(len(prompts)):
        alone = generate(model, [prompts[row]], config, [seeds[row]])
        at = order.index(row)
        assert together.tokens[row] == alone.tokens[0] == permuted.tokens[at] and len(alone.tokens[0]) == 7
        torch.testing.assert_close(together.latents[row], alone.latents[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(together.latents[row], permuted.latents[at], atol=1e-5, rtol=1e-5)


def test_rows_of_a_bidirectional_encoder_are_alone_too():
    model = small(attention="bidirectional")
    tokens = [prompt(2), prompt(11, 1), prompt(4, 2)]
    read = read_prompts(model, tokens)
    for row, ids in enumerate(tokens):
        alone = read_prompts(model, [ids]).latents[0]
        torch.testing.assert_close(read.latents[row, : len(alone)], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length, whole, rest", [(1, 0, 1), (3, 0, 3), (4, 4, 0), (5, 4, 1), (8, 8, 0), (11, 8, 3)])
def test_a_prompt_is_history_in_whole_blocks_and_an_opening(length, whole, rest):
    model = endless()
    read = read_prompts(model, [prompt(length)])
    assert (read.whole, read.rest) == ([whole], [rest])
    block = next(write_blocks(model, read, PLAIN, 1, [0]))
    torch.testing.assert_close(block.latents[:, :rest], read.latents[:, whole : whole + rest])  # clean condition
    others = next(write_blocks(model, read, PLAIN, 1, [1])).latents
    assert (others[:, rest:] - block.latents[:, rest:]).abs().amax(-1).min() > 1e-3


def by_hand(model, ids, noise, steps, scale, solver="euler", renew_below=0.0, seed=0):
    "One block after the prompt `ids` without a cache: the whole text goes through the prior at every step."
    whole = len(ids) // SIZE * SIZE
    padded = torch.tensor([ids + [0] * (-len(ids) % SIZE)])
    latents = model.vae.to_latents(model.vae.encode(padded).mean)
    rest = len(ids) - whole
    z = noise.clone()
    z[:, :rest] = latents[:, whole : whole + rest]

    def velocity(z, time):
        t = torch.full((1, SIZE), time)
        t[:, :rest] = 0.0
        v = model.dit(torch.cat([latents[:, :whole], z], 1), torch.cat([torch.zeros(1, whole), t], 1))[:, whole:]
        without = model.dit(z, t)
        v = without + scale * (v - without)
        v[:, :rest] = 0.0
        return v

    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        time, time_next = 1 - step / steps, 1 - (step + 1) / steps
        v = velocity(z, time)
        if 0 < time_next < renew_below:
            fresh = torch.randn(SIZE, 4, generator=generator)
            z[:, rest:] = ((1 - time_next) * (z - time * v) + time_next * fresh)[:, rest:]
            continue
        if solver == "heun":
            v = (v + velocity(z - v / steps, time_next)) / 2
        z = z - v / steps
    return z, model.vae.decode(torch.cat([latents[:, :whole], z], 1))[0, whole:].argmax(-1).tolist()


@pytest.mark.parametrize("length", [1, 4, 6, 8, 11])
@pytest.mark.parametrize(
    "scale, solver", [(0.0, "euler"), (1.0, "euler"), (3.0, "euler"), (1.0, "heun"), (2.0, "heun")]
)
def test_a_block_is_the_recipe_without_any_memory(length, scale, solver):
    model, ids = endless(), prompt(length)
    noise = torch.randn(1, SIZE, 4, generator=torch.Generator().manual_seed(3))
    z, tokens = by_hand(model, ids, noise, 5, scale, solver)
    config = replace(PLAIN, steps=5, guidance_scale=scale, num_blocks=1, solver=solver)
    found = generate(model, [ids], config, noise=[noise])
    torch.testing.assert_close(found.latents[0], z[0], atol=1e-4, rtol=1e-4)  # angles of a thousand radians in fp32
    assert found.tokens == [tokens[length % SIZE :]]


@pytest.mark.parametrize("length", [1, 4, 11])
@pytest.mark.parametrize("below, scale, solver", [(0.5, 1.0, "euler"), (0.5, 1.0, "heun"), (1.0, 1.0, "euler"), (0.7, 3.0, "euler")])
def test_late_steps_renew_the_noise_of_what_is_not_known(length, below, scale, solver):
    model, ids = endless(), prompt(length)
    noise = torch.randn(1, SIZE, 4, generator=torch.Generator().manual_seed(3))
    z, tokens = by_hand(model, ids, noise, 8, scale, solver, below, seed=8)
    config = replace(PLAIN, steps=8, guidance_scale=scale, num_blocks=1, solver=solver, renew_below=below)
    found = generate(model, [ids], config, [8], noise=[noise])
    torch.testing.assert_close(found.latents[0], z[0], atol=1e-4, rtol=1e-4)
    known = read_prompts(model, [ids]).latents[0, length - length % SIZE : length]
    assert torch.equal(found.latents[0][: length % SIZE], known)  # not even rounding moves them
    assert found.tokens == [tokens[length % SIZE :]]


def test_guidance_is_felt_only_where_there_is_history():
    model = endless()

    def write(prompts, scale):
        return generate(model, prompts, replace(PLAIN, guidance_scale=scale, num_blocks=1)).latents[0]

    torch.testing.assert_close(write([prompt(3)], 5.0), write([prompt(3)], 1.0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(write(1, 5.0), write(1, 1.0), atol=1e-5, rtol=1e-5)
    assert (write([prompt(4)], 5.0) - write([prompt(4)], 1.0)).abs().max() > 1e-2


@pytest.mark.parametrize("renew_below", [0.0, 0.6])
def test_seeds_decide_everything(renew_below):
    model, plain = endless(), replace(PLAIN, renew_below=renew_below)

    def write(**options):
        return generate(model, [prompt(3)] * 2, plain, **options)

    one = write(seeds=[5, 6])
    assert same(one.latents, write(seeds=[5, 6]).latents) and one.tokens == write(seeds=[5, 6]).tokens
    for mine, swapped in zip(one.latents[::-1], write(seeds=[6, 5]).latents): torch.testing.assert_close(mine, swapped, atol=1e-5, rtol=1e-5)
    twins = write(seeds=[5, 5])
    torch.testing.assert_close(twins.latents[0], twins.latents[1])
    assert (one.latents[0] - one.latents[1]).abs().max() > 1e-2
    counted_on = generate(model, [prompt(3)] * 2, replace(plain, seed=5))
    assert same(counted_on.latents, one.latents)
    torch.manual_seed(999)
    assert same(write(seeds=[5, 6]).latents, one.latents)  # no global randomness


@EXAMPLES
@given(st.integers(1, 11), st.integers(1, 13))
def test_exactly_as_many_tokens_as_asked_for(length, new):
    model = endless()
    found = generate(model, [prompt(length), prompt(2)], replace(PLAIN, max_new_tokens=new, steps=1))
    assert [len(ids) for ids in found.tokens] == [new, new] and found.finished == [False, False]
    assert [len(z) for z in found.latents] == [math.ceil((start + new) / SIZE) * SIZE for start in (length % SIZE, 2)]


def test_blocks_can_be_counted_instead():
    model = endless()
    found = generate(model, [prompt(length) for length in (1, 4, 6)], replace(PLAIN, num_blocks=2, max_new_tokens=1))
    assert [len(ids) for ids in found.tokens] == [7, 8, 6] and [len(z) for z in found.latents] == [8, 8, 8]


def test_no_text_is_longer_than_max_length():
    model = endless()
    found = generate(model, [prompt(1), prompt(9)], replace(PLAIN, max_length=10, max_new_tokens=50, steps=1))
    assert [len(ids) for ids in found.tokens] == [9, 1]


def test_the_end_token_cuts_a_row_and_stops_when_all_have_met_it():
    model, config = small(), replace(PLAIN, max_new_tokens=40, steps=2)
    model.vae.decoder.final_layer.bias[END_ID] = 1e4
    found = generate(model, [prompt(3), prompt(4)], config)
    assert found.tokens == [[], []] and found.reasons == ["end", "end"] and [len(z) for z in found.latents] == [SIZE, SIZE]
    free = generate(endless(), [prompt(3), prompt(6)], config)
    row = free.tokens[0]
    ended = endless()
    ended.config = replace(ended.config, end_id=row[5])
    found = generate(ended, [prompt(3), prompt(6)], config)
    for before, after, finished in zip(free.tokens, found.tokens, found.finished):
        assert finished == (row[5] in before) and after == (before[: before.index(row[5])] if finished else before)
    assert found.finished[0]


def test_an_end_token_in_the_prompt_or_beyond_the_limit_does_not_count():
    model = endless()
    free = generate(model, [prompt(3)], replace(PLAIN, max_new_tokens=5)).tokens[0]
    beyond = next(t for t in range(1, END_ID) if t not in free)
    model.config = replace(model.config, end_id=prompt(3)[0] if prompt(3)[0] not in free else beyond)
    found = generate(model, [prompt(3)], replace(PLAIN, max_new_tokens=5))
    assert found.tokens[0] == free and not found.finished[0]


@pytest.mark.parametrize("prompts", [2, [[3, 5, 1], [4] * 4]])
def test_a_trace_shows_every_time_and_ends_in_what_was_written(prompts):
    model = endless()
    found = generate(model, prompts, replace(PLAIN, steps=3, num_blocks=2), trace=True)
    assert len(found.traces) == 2
    quiet = generate(model, prompts, replace(PLAIN, steps=3, num_blocks=2))
    assert same(quiet.latents, found.latents) and quiet.tokens == found.tokens and quiet.traces == []
    read = read_prompts(model, prompts if isinstance(prompts, list) else [[], []])
    blocks = list(write_blocks(model, read, PLAIN, 2, [0, 1]))
    for number, (trace, block) in enumerate(zip(found.traces, blocks)):
        assert trace.times.tolist() == pytest.approx([1, 2 / 3, 1 / 3, 0], abs=1e-6)
        assert trace.z.shape == (4, 2, SIZE, 4) and trace.tokens.shape == trace.confidence.shape == (4, 2, SIZE)
        assert torch.equal(trace.z[-1], torch.stack(found.latents)[:, SIZE * number : SIZE * (number + 1)])
        assert torch.equal(trace.tokens[-1], block.tokens)
        torch.testing.assert_close(trace.confidence[-1], block.logits.softmax(-1).amax(-1))


def test_texts_from_nothing_start_at_the_first_block():
    model = endless()
    found = generate(model, 3, PLAIN)
    assert [len(ids) for ids in found.tokens] == [7, 7, 7] and len({tuple(ids) for ids in found.tokens}) > 1
    noise = torch.randn(3, SIZE, 4, generator=torch.Generator().manual_seed(0))
    z = noise.clone()
    for step in range(3):
        z = z - model.dit(z, torch.full((3,), 1 - step / 3)) / 3
    torch.testing.assert_close(
        torch.stack(generate(model, 3, replace(PLAIN, num_blocks=1), noise=[noise]).latents), z, atol=1e-4, rtol=1e-4
    )


def test_strings_are_read_and_written_by_the_tokenizer():
    tokenizer = train_tokenizer(["the tiger and the forest and the night"], 270)
    model = small(tokenizer, vocab_size=270, end_id=1)
    model.vae.decoder.final_layer.bias[1] = -1e4
    by_text = generate(model, ["the tiger", "a"], PLAIN)
    by_ids = generate(model, [tokenizer.encode(text).ids for text in ("the tiger", "a")], PLAIN)
    assert by_text.tokens == by_ids.tokens and by_text.texts == [tokenizer.decode(ids) for ids in by_text.tokens]
    strange = generate(model, ["\u00e9\u4e2d\U0001f405 <|endoftext|>"], PLAIN)
    assert len(strange.tokens[0]) == 7


@pytest.mark.parametrize(
    "prompts, message",
    [
        ([], "no prompts"),
        (0, "no prompts"),
        ("tiger", "a string: give a list"),
        (["tiger"], "prompt 0 is a string, but the model has no tokenizer"),
        ([[1], []], "prompt 1 is empty"),
        ([[1], [2, VOCABULARY]], f"prompt 1 holds token id {VOCABULARY}"),
        ([[-1]], "prompt 0 holds token id -1"),
        ([[1], [2, 1.7]], "prompt 1 is neither a text nor whole numbers"),
        ([None], "prompt 0 is neither a text nor whole numbers"),
        ([[1] * 64], "prompt 0 has 64 tokens.*64 of this model"),
    ],
)
def test_a_prompt_that_cannot_be_continued_is_named(prompts, message):
    with pytest.raises(PromptError, match=message):
        generate(small(), prompts, PLAIN)


def test_the_wrong_number_of_seeds_is_named():
    with pytest.raises(PromptError, match="1 seeds for 2 prompts"):
        generate(small(), 2, PLAIN, seeds=[1])


@pytest.mark.parametrize(
    "count, shape, message",
    [
        (2, (1, SIZE, 4), "the noise of block 0 has shape"),
        (2, (2, SIZE + 1, 4), "the noise of block 0 has shape"),
        (2, (2, SIZE), "the noise of block 0 has shape"),
        (1, (2, SIZE, 4), "noise is given for 1 blocks, but 2 are to be written"),
    ],
)
def test_noise_that_does_not_fit_is_named(count, shape, message):
    with pytest.raises(PromptError, match=message):
        generate(small(), 2, replace(PLAIN, num_blocks=2), noise=[torch.zeros(shape)] * count)


def test_the_longest_prompt_leaves_room_for_one_token():
    assert len(generate(endless(), [prompt(63)], PLAIN).tokens[0]) == 1


WHOLE = {"max_length": 1, "max_new_tokens": 1, "num_blocks": 1, "block_size": 1, "steps": 1, "repaint_repeats": 1, "top_k": 0, "seed": 0}
RANGES = {"guidance_scale": (0, 100), "temperature": (0, 100), "top_p": (1e-6, 1), "renew_below": (0, 1)}
RANGES |= {"min_p": (0, 1), "repaint_fraction": (0, 1), "time_shift": (0.01, 100), "repetition_penalty": (0.01, 100)}


@EXAMPLES
@given(
    st.sampled_from(sorted(WHOLE)), st.one_of(st.integers(-1000, 2), st.floats(), st.booleans(), st.text(max_size=2))
)
def test_whole_numbers_out_of_range_are_named(name, value):
    if type(value) is int and value >= WHOLE[name]:
        assert getattr(GenerationConfig(**{name: value}), name) == value
    else:
        with pytest.raises(ConfigError, match=f"^{name} is "):
            GenerationConfig(**{name: value})


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    st.sampled_from(sorted(RANGES)),
    st.one_of(st.floats(), st.floats(-0.5, 1.5), st.sampled_from([math.nan, math.inf, "1", None])),
)
def test_numbers_out_of_range_are_named(name, value):
    low, high = RANGES[name]
    if isinstance(value, float) and low <= value <= high:
        assert getattr(GenerationConfig(**{name: value}), name) == value
    else:
        with pytest.raises(ConfigError, match=f"^{name} is "):
            GenerationConfig(**{name: value})


def test_an_unknown_solver_is_named():
    with pytest.raises(ConfigError, match="^solver is 'rk5'.*euler, heun, midpoint, rk4"):
        GenerationConfig(solver="rk5")


def shares(logits, count=20_000, **options):
    "How often each token is chosen, for `count` equally spaced uniform numbers."
    uniform = ((torch.arange(count) + 0.5) / count)[None]
    picked = choose_tokens(torch.tensor(logits).log().expand(1, count, -1), GenerationConfig(**options), uniform)
    return (torch.bincount(picked.flatten(), minlength=len(logits)) / count).tolist()


@pytest.mark.parametrize(
    "options, expected",
    [
        (dict(temperature=0.0), [0, 0, 1, 0]),
        (dict(temperature=1.0), [0.1, 0.25, 0.5, 0.15]),
        (dict(temperature=1e-40), [0, 0, 1, 0]),
        (dict(temperature=0.5), [0.01 / 0.345, 0.0625 / 0.345, 0.25 / 0.345, 0.0225 / 0.345]),
        (dict(temperature=1.0, top_k=1), [0, 0, 1, 0]),
        (dict(temperature=1.0, top_k=2), [0, 1 / 3, 2 / 3, 0]),
        (dict(temperature=1.0, top_k=99), [0.1, 0.25, 0.5, 0.15]),
        (dict(temperature=1.0, top_p=1e-6), [0, 0, 1, 0]),
        (dict(temperature=1.0, top_p=0.6), [0, 1 / 3, 2 / 3, 0]),
        (dict(temperature=1.0, top_p=0.89), [0, 0.25 / 0.9, 0.5 / 0.9, 0.15 / 0.9]),
        (dict(temperature=1.0, top_k=3, top_p=0.6), [0, 1 / 3, 2 / 3, 0]),
        (dict(temperature=0.0, top_k=2, top_p=0.5), [0, 0, 1, 0]),
        (dict(temperature=1.0, min_p=1.0), [0, 0, 1, 0]),
        (dict(temperature=1.0, min_p=0.4), [0, 1 / 3, 2 / 3, 0]),
        (dict(temperature=1.0, min_p=0.25), [0, 0.25 / 0.9, 0.5 / 0.9, 0.15 / 0.9]),
        (dict(temperature=1.0, top_k=3, top_p=0.9, min_p=0.2), [0, 0.25 / 0.9, 0.5 / 0.9, 0.15 / 0.9]),
    ],
    ids=str,
)
def test_tokens_are_chosen_with_the_shares_of_the_cut_law(options, expected):
    assert shares([0.1, 0.25, 0.5, 0.15], **options) == pytest.approx(expected, abs=2e-3)


@EXAMPLES
@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.5, 0.9999999]), st.integers(0, 4), st.floats(0.01, 1.0))
def test_no_number_picks_a_token_that_was_cut(seed, uniform, top_k, top_p):
    logits = 3 * torch.randn(1, 1, 6, generator=torch.Generator().manual_seed(seed))
    config = GenerationConfig(temperature=1.0, top_k=top_k, top_p=top_p)
    picked = choose_tokens(logits, config, torch.full((1, 1), uniform)).item()
    ranked = sorted(range(6), key=lambda i: -logits[0, 0, i].item())
    probabilities = logits[0, 0].double().softmax(-1).tolist()
    likelier = sum(probabilities[i] for i in ranked[: ranked.index(picked)])
    assert (not top_k or ranked.index(picked) < top_k) and likelier < top_p + 1e-6


@pytest.mark.parametrize("length", [1, 2, 3, 5, 6, 7, 8, 9, 13, 15, 16])
def test_a_latent_of_two_tokens_and_a_prompt_of_any_length(length):
    model = endless(patch_size=2)
    found = generate(model, [prompt(length)], PLAIN)
    assert len(found.tokens[0]) == 7
    alone, beside = found, generate(model, [prompt(length), prompt(16, 1), prompt(3, 2)], PLAIN, seeds=[0, 1, 2])
    assert alone.tokens[0] == beside.tokens[0]
