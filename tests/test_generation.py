"A row is what it would be alone; options are obeyed or refused; every token is counted."

import asyncio
import functools
import gc
import math
import weakref
from dataclasses import fields, replace

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cola_tutorial import generation
from cola_tutorial.config import ColaConfig, ConfigError, DiTConfig, GenerationConfig, SpeedConfig, TraceConfig, VAEConfig
from cola_tutorial.generation import (
    PromptError,
    choose_tokens,
    generate,
    read_prompts,
    stream,
    stream_async,
    write_blocks,
)
from cola_tutorial.model import ColaDLM
from cola_tutorial.nn.attention import KVCache
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


WAYS = st.fixed_dictionaries(
    {
        "guidance_scale": st.sampled_from([0.0, 1.0, 3.0]),
        "guidance_schedule": st.sampled_from([(), ((1.0, 1.0), (0.3, 2.0)), ((0.5, 3.0), (0.4, 1.0))]),
        "solver": st.sampled_from(["euler", "heun", "midpoint", "rk4"]),
        "time_shift": st.sampled_from([0.5, 1.0, 3.0]),
        "times": st.sampled_from([(), (1.0, 0.4, 0.0)]),
        "renew_below": st.sampled_from([0.0, 0.6]),
        "first_block": st.sampled_from(["clean", "repaint", "left_padding", "right_padding"]),
        "temperature": st.sampled_from([0.0, 0.8]),
        "repetition_penalty": st.sampled_from([1.0, 1.7]),
        "min_p": st.sampled_from([0.0, 0.2]),
        "stop_tokens": st.sampled_from([(), (3, 7)]),
        "num_blocks": st.sampled_from([None, 2]),
    }
)
MODELS = st.sampled_from([{}, {"attention": "causal"}, {"patch_size": 2}])


def test_the_drawn_ways_name_every_setting_that_changes_what_is_written():
    limits = {"max_length", "max_new_tokens", "block_size", "steps", "top_k", "top_p", "stop", "seed"}
    drawn = {"guidance_scale", "guidance_schedule", "solver", "time_shift", "times", "renew_below", "first_block"}
    drawn |= {"temperature", "repetition_penalty", "min_p", "stop_tokens", "num_blocks"}
    assert {f.name for f in fields(GenerationConfig)} == limits | drawn | {"repaint_repeats", "repaint_fraction"} | {"remasking"}


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 11), min_size=2, max_size=3), MODELS, WAYS, st.booleans(), st.randoms(use_true_random=False))
def test_a_row_is_what_it_would_be_alone_and_in_any_order(lengths, vae, ways, ends, random):
    model = small(**vae) if ends else endless(**vae)
    config = replace(PLAIN, steps=2, **ways)
    prompts = [prompt(length, seed) for seed, length in enumerate(lengths)]
    seeds = [100 + row for row in range(len(prompts))]
    together = generate(model, prompts, config, seeds)
    again = generate(model, prompts, config, seeds)
    assert again.tokens == together.tokens and same(again.latents, together.latents)
    order = random.sample(range(len(prompts)), len(prompts))
    permuted = generate(model, [prompts[row] for row in order], config, [seeds[row] for row in order])
    for row in range(len(prompts)):
        alone = generate(model, [prompts[row]], config, [seeds[row]])
        at = order.index(row)
        assert together.tokens[row] == alone.tokens[0] == permuted.tokens[at]
        assert together.reasons[row] == alone.reasons[0] == permuted.reasons[at]
        assert len(together.tokens[row]) <= 8 * model.config.vae.patch_size
        torch.testing.assert_close(together.latents[row], alone.latents[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(together.latents[row], permuted.latents[at], atol=1e-5, rtol=1e-5)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(1, 11), min_size=1, max_size=3),
    MODELS,
    WAYS,
    st.fixed_dictionaries({name: st.booleans() for name in ("one_forward", "merge_commit", "leave")}),
)
def test_how_it_is_computed_does_not_change_what_is_written(lengths, vae, ways, speed):
    model, config = small(**vae), replace(PLAIN, steps=2, **ways)
    prompts = [prompt(length, seed) for seed, length in enumerate(lengths)]
    plain = generate(model, prompts, config, speed=SpeedConfig(one_forward=False, merge_commit=False, leave=False))
    found = generate(model, prompts, config, speed=SpeedConfig(**speed))
    assert found.tokens == plain.tokens and found.reasons == plain.reasons
    for mine, theirs in zip(found.latents, plain.latents): torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@pytest.fixture
def whole_graphs(monkeypatch):
    "torch.compile that breaks where it cannot follow, without the minute that code generation takes."
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    generation._compiled.cache_clear()
    yield
    generation._compiled.cache_clear()


def test_a_compiled_step_is_one_graph_and_gives_the_same(whole_graphs):
    model, config = endless(), replace(PLAIN, guidance_scale=2.0)
    for prompts in ([prompt(3), prompt(9)], [prompt(4)]):
        plain, found = (generate(model, prompts, config, speed=speed) for speed in (None, SpeedConfig(compile=True)))
        assert found.tokens == plain.tokens
        for mine, theirs in zip(found.latents, plain.latents): torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_a_graph_cannot_be_captured_without_cuda():
    with pytest.raises(ConfigError, match="^capture is True.*CUDA"):
        generate(endless(), [prompt(3)], PLAIN, speed=SpeedConfig(capture=True))


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


@pytest.mark.parametrize("seeds", [[1.5], ["1"], [-1], [2**63], [torch.tensor(1.5)], [None]])
def test_a_seed_that_is_none_is_named(seeds):
    with pytest.raises(PromptError, match="^seed"):
        generate(endless(), [prompt(3)], PLAIN, seeds)


def test_seeds_of_any_whole_kind_and_their_upper_half_count():
    model = endless()
    wanted = generate(model, [prompt(3)], PLAIN, [7]).latents[0]
    for seeds in ([numpy.int64(7)], torch.tensor([7]), range(7, 8)):
        assert torch.equal(generate(model, [prompt(3)], PLAIN, seeds).latents[0], wanted)
    assert not torch.equal(generate(model, [prompt(3)], PLAIN, [7 + 2**32]).latents[0], wanted)


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


@pytest.mark.parametrize("penalty", [0.5, 1.0, 2.5])
def test_the_penalty_is_for_ids_of_earlier_blocks_of_this_call(penalty):
    model, read = endless(), None
    config = replace(PLAIN, num_blocks=3, repetition_penalty=penalty)
    ids = [prompt(9), prompt(6, 1)]
    read, seen = read_prompts(model, ids), [set(), set()]
    chosen = []
    for block in write_blocks(model, read, config, 3, [0, 1]):
        for row in range(2):
            for place, logits in enumerate(block.logits[row].tolist()):
                scores = [(v / penalty if v > 0 else v * penalty) if i in seen[row] else v for i, v in enumerate(logits)]
                assert block.tokens[row, place].item() == max(range(VOCABULARY), key=scores.__getitem__)
        for row in range(2): seen[row] |= set(block.tokens[row].tolist())  # the first block's prompt part included
        chosen.append(block.tokens)
    plain = [block.tokens for block in write_blocks(model, read, replace(config, repetition_penalty=1.0), 3, [0, 1])]
    assert torch.equal(chosen[0], plain[0]) and same(chosen, plain) == (penalty == 1.0)


def test_a_stop_token_ends_a_row_and_the_others_go_on():
    model, config = endless(), replace(PLAIN, max_new_tokens=20)
    prompts = [prompt(3), prompt(6, 1)]
    free = generate(model, prompts, config)
    last = [tokens.index for tokens in free.tokens]
    stop = max(set(free.tokens[0]) & set(free.tokens[1]), key=lambda t: abs(last[0](t) - last[1](t)))  # met at different times
    assert last[0](stop) // SIZE != last[1](stop) // SIZE
    found = generate(model, prompts, replace(config, stop_tokens=(stop,)))
    assert found.reasons == ["stop", "stop"] and found.finished == [True, True]
    assert found.tokens == [tokens[: tokens.index(stop)] for tokens in free.tokens]
    for mine, whole, tokens, ids in zip(found.latents, free.latents, found.tokens, prompts):
        assert len(mine) == ((len(ids) % SIZE + len(tokens)) // SIZE + 1) * SIZE < len(whole)  # to the end of the block with the stop
        torch.testing.assert_close(mine, whole[: len(mine)], atol=1e-5, rtol=1e-5)


def words():
    "A tokenizer of whole words and a model that writes them."
    tokenizer = train_tokenizer(["the tiger and the forest and the night"], 270)
    model = small(tokenizer, vocab_size=270, end_id=1)
    model.vae.decoder.final_layer.bias[1] = -1e4
    return model


def test_a_stop_string_cuts_the_text_wherever_its_blocks_end():
    model, config = words(), replace(PLAIN, max_new_tokens=24)
    free = generate(model, ["the tiger"], config)
    for start in range(2, len(free.texts[0]) - 4):
        stop = free.texts[0][start : start + 3]
        if "\ufffd" in stop: continue  # half a character, which the next token may complete
        found = generate(model, ["the tiger"], replace(config, stop=(stop, "never written")))
        assert found.texts[0] == free.texts[0][: free.texts[0].index(stop)] and found.reasons == ["stop"]
        assert found.tokens[0] == free.tokens[0][: len(found.tokens[0])]
        assert free.texts[0].startswith(model.tokenizer.decode(found.tokens[0])) or "\ufffd" in model.tokenizer.decode(found.tokens[0])
        shown = [piece.texts[0] for piece in stream(model, ["the tiger"], replace(config, stop=(stop, "never written")))]
        assert shown[-1] == found.texts[0] and all(found.texts[0].startswith(text) for text in shown if "\ufffd" not in text)  # nothing is taken back
    with pytest.raises(ConfigError, match="stop strings need a tokenizer"):
        generate(endless(), [prompt(3)], replace(PLAIN, stop=("a",)))


@pytest.mark.parametrize("length", [1, 3, 6, 11])
@pytest.mark.parametrize("side", ["left_padding", "right_padding"])
def test_padding_is_a_longer_prompt(side, length):
    model, ids = endless(), prompt(length)
    pads = [0] * (-length % SIZE)
    padded = pads + ids if side == "left_padding" else ids + pads
    found = generate(model, [ids], replace(PLAIN, first_block=side, num_blocks=2))
    asked = generate(model, [padded], replace(PLAIN, num_blocks=2))
    assert found.tokens == asked.tokens and len(found.tokens[0]) == 2 * SIZE
    torch.testing.assert_close(found.latents[0], asked.latents[0])


def test_repaint_is_the_walk_with_the_known_latents_painted_in():
    model, ids, steps, repeats, fraction = endless(), prompt(6), 4, 3, 0.5
    config = replace(PLAIN, first_block="repaint", steps=steps, repaint_repeats=repeats, repaint_fraction=fraction, num_blocks=1, guidance_scale=2.0)
    found = generate(model, [ids], config, [11]).latents[0][None]
    latents = model.vae.to_latents(model.vae.encode(torch.tensor([ids + [0, 0]])).mean)
    known, generator = latents[:, 4:6], generation.seed_source(11, painting=True)
    assert not torch.equal(torch.randn(4, generator=generation.seed_source(11)), torch.randn(4, generator=generation.seed_source(11, painting=True)))
    z = torch.randn(SIZE, 4, generator=torch.Generator().manual_seed(11))[None]
    for step in range(steps):
        t, end = 1 - step / steps, 1 - (step + 1) / steps
        for again in range(repeats if step < 2 else 1):
            if again:
                share = (1 - t) / (1 - end)
                z = share * z + math.sqrt(t * t - (share * end) ** 2) * torch.randn(SIZE, 4, generator=generator)
            if step < 2: z = torch.cat([((1 - t) * known + t * torch.randn(SIZE, 4, generator=generator)[:2]), z[:, 2:]], 1)
            times = torch.full((1, SIZE), t)
            v = model.dit(torch.cat([latents[:, :4], z], 1), torch.cat([torch.zeros(1, 4), times], 1))[:, 4:]
            alone = model.dit(z, times)
            z = z - (t - end) * (alone + 2 * (v - alone))
    torch.testing.assert_close(found, torch.cat([known, z[:, 2:]], 1), atol=1e-4, rtol=1e-4)


def test_a_block_size_at_run_time_is_a_model_of_that_size_with_the_same_weights():
    model = endless()
    vae, dit = replace(model.config.vae, block_size=2), replace(model.config.dit, block_size=2)
    other = ColaDLM(replace(model.config, vae=vae, dit=dit)).eval()
    other.load_state_dict(model.state_dict())
    ids, config = [prompt(5), prompt(4, 1)], replace(PLAIN, guidance_scale=2.0)
    found, wanted = generate(model, ids, replace(config, block_size=2)), generate(other, ids, config)
    assert found.tokens == wanted.tokens and same(found.latents, wanted.latents)
    assert found.tokens != generate(model, ids, config).tokens and model.config.dit.block_size == SIZE
    assert model.vae.encoder.config.block_size == model.vae.decoder.config.block_size == SIZE


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_given_grid_is_walked_and_a_schedule_is_followed(scale):
    model, ids = endless(), [prompt(4)]
    uniform = replace(PLAIN, steps=4, guidance_scale=scale, num_blocks=1)
    given_times = replace(uniform, steps=1, times=(1.0, 0.75, 0.5, 0.25, 0.0))
    flat = replace(uniform, guidance_scale=0.5, guidance_schedule=((1.0, scale), (0.0, scale)))
    wanted = generate(model, ids, uniform)
    for config in (given_times, flat): assert same(generate(model, ids, config).latents, wanted.latents)
    uneven = generate(model, ids, replace(uniform, times=(1.0, 0.9, 0.2, 0.1, 0.0)))
    assert (uneven.latents[0] - wanted.latents[0]).abs().max() > 1e-3
    if scale == 1: return
    late = generate(model, ids, replace(uniform, guidance_schedule=((0.6, 1.0), (0.5, scale))), trace=True).traces[0]
    assert late.unconditional[:2].isnan().all() and not late.unconditional[2:].isnan().any()
    torch.testing.assert_close(late.velocity[:2], late.conditional[:2])
    torch.testing.assert_close(late.velocity[2:], late.unconditional[2:] + scale * (late.conditional - late.unconditional)[2:])


def test_a_trace_holds_velocities_and_the_likeliest_words():
    model, ids = endless(), [prompt(6), prompt(8, 1)]
    config = replace(PLAIN, guidance_scale=2.0, num_blocks=2)
    found = generate(model, ids, config, trace=TraceConfig(top=3))
    first = found.traces[0]
    assert first.rows == [0, 1] and first.velocity.shape == (3, 2, SIZE, 4) and first.top_logits.shape == (4, 2, SIZE, 3)
    h = first.times[:-1] - first.times[1:]
    torch.testing.assert_close(first.z[1:], first.z[:-1] - h[:, None, None, None] * first.velocity)  # Euler, step by step
    assert not first.velocity[:, 0, :2].any() and torch.equal(first.z[:, 0, :2], first.z[:1, 0, :2].expand(4, 2, 4))  # pinned
    alone = model.dit(first.z[1, 1:], torch.full((1,), first.times[1].item()))
    torch.testing.assert_close(first.unconditional[1, 1:], alone, atol=1e-5, rtol=1e-5)
    full = generate(model, ids, config, trace=TraceConfig(top=VOCABULARY)).traces[0]
    torch.testing.assert_close(full.top_logits.logsumexp(-1), first.log_total)
    assert torch.equal(full.top_tokens[..., :3], first.top_tokens)


def test_a_trace_that_would_not_fit_is_refused_before_anything_is_written():
    model, config = endless(), replace(PLAIN, num_blocks=2)
    found = generate(model, [prompt(4)], config, trace=True).traces
    parts = ("z", "conditional", "unconditional", "velocity", "top_tokens", "top_logits", "log_total")
    taken = sum(getattr(trace, name).nbytes for trace in found for name in parts)
    assert generate(model, [prompt(4)], config, trace=TraceConfig(max_bytes=taken)).traces
    with pytest.raises(ConfigError, match=f"the traces need {taken:,} bytes, but max_bytes is {taken - 1:,}"):
        generate(model, [prompt(4)], config, trace=TraceConfig(max_bytes=taken - 1))


def test_pieces_grow_into_what_generate_gives():
    model, config = words(), replace(PLAIN, max_new_tokens=14)
    prompts = ["the tiger and", "night"]
    whole, pieces = generate(model, prompts, config), list(stream(model, prompts, config, read_at=(1, 2)))
    finished = [piece for piece in pieces if piece.step is None]
    assert finished[-1].texts == whole.texts and finished[-1].tokens == whole.tokens and finished[-1].reasons == whole.reasons
    for before, after in zip(finished, finished[1:]):
        for short, long in zip(before.tokens, after.tokens): assert long[: len(short)] == short
    assert [(piece.block, piece.step) for piece in pieces] == [(b, s) for b in range(len(finished)) for s in (1, 2, None)]
    trace = generate(model, prompts, config, trace=True).traces[0]
    starts = [len(model.tokenizer.encode(p).ids) % SIZE for p in prompts]
    for step in (1, 2):
        draft = next(piece for piece in pieces if piece.step == step)
        assert draft.time == pytest.approx(1 - step / 3) and draft.reasons == ["", ""]
        assert draft.tokens == [trace.tokens[step, row, start:].tolist() for row, start in enumerate(starts)]


def test_a_stream_that_is_left_leaves_nothing_behind():
    model, config = endless(), replace(PLAIN, max_new_tokens=30)
    wanted = generate(model, [prompt(3)], config)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    gc.collect()
    pieces = stream(model, [prompt(3)], config, read_at=(1,))
    assert next(pieces).step == 1  # in the middle of a block
    memories = [weakref.ref(thing) for thing in gc.get_objects() if isinstance(thing, KVCache)]
    assert len(memories) == 2  # of the prior and of the decoder
    pieces.close()
    del pieces
    gc.collect()
    assert not any(memory() for memory in memories)
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert torch.equal(generate(model, [prompt(3)], config).latents[0], wanted.latents[0])


def test_a_stream_stops_when_it_is_told_to():
    asked = []
    found = list(stream(endless(), [prompt(3)], replace(PLAIN, max_new_tokens=30), stopped=lambda: len(asked) == 6 or asked.append(1)))
    assert len(found) == 1 and found[0].reasons == [""]  # four questions in the first block, the third of the second says stop


def test_what_cannot_be_streamed_is_named_at_once():
    with pytest.raises(PromptError, match="prompt 0 is empty"):
        stream(endless(), [[]], PLAIN)


def test_streaming_leaves_the_event_loop_free_and_can_be_cancelled():
    model, config = endless(), replace(PLAIN, max_new_tokens=40)
    wanted = list(stream(model, [prompt(3)], config))

    async def collect(found):
        async for piece in stream_async(model, [prompt(3)], config): found.append(piece)

    async def beside():
        found, ticks = [], 0
        task = asyncio.create_task(collect(found))
        while not task.done():
            ticks += 1
            await asyncio.sleep(0)
        return found, ticks

    found, ticks = asyncio.run(beside())
    assert [piece.tokens for piece in found] == [piece.tokens for piece in wanted] and ticks > len(found)

    async def cancelled():
        found = []
        task = asyncio.create_task(collect(found))
        while not found: await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError): await task
        return found

    assert len(asyncio.run(cancelled())) < len(wanted)

    async def cancelled_twice():
        task = asyncio.create_task(collect(found := []))
        while not found: await asyncio.sleep(0)
        for _ in range(2):
            task.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError): await task

    asyncio.run(cancelled_twice())
    assert generate(model, [prompt(3)], config).tokens[0] == wanted[-1].tokens[0]
