"The straightforward sampler and every way out of its waste write what the package's sampler writes."

from dataclasses import astuple, fields, replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_fixtures import FIXTURES, close
from test_generation import PLAIN, SIZE, prompt, small

from cola_tutorial.config import ConfigError
from cola_tutorial.generation import read_prompts, write_blocks
from cola_tutorial.model import ColaDLM
from cola_tutorial.plain import NO_WASTE, SAVINGS, Tally, Waste, ladder, write_plainly

# All of it, none of it, each item alone, and each item left out.
WASTES = {"all": Waste(), "none": NO_WASTE}
WASTES |= {name: replace(NO_WASTE, **{name: True}) for name in SAVINGS}
WASTES |= {f"all but {name}": replace(Waste(), **{name: False}) for name in SAVINGS}
LENGTHS = [1, 11, 8, 6]


def same(found, expected):
    "Equal latents, logits and tokens, block for block."
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.latents, b.latents, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(a.logits, b.logits, atol=1e-3, rtol=1e-3)
        assert torch.equal(a.tokens, b.tokens)


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("waste", WASTES.values(), ids=WASTES)
def test_no_item_of_waste_changes_what_is_written(waste, scale, patch_size):
    model = small(patch_size=patch_size)
    read = read_prompts(model, [prompt(length * patch_size, seed) for seed, length in enumerate(LENGTHS)])
    assert read.whole == [0, 8, 8, 4] and read.rest == [1, 3, 0, 2]
    config, seeds = replace(PLAIN, guidance_scale=scale), [7, 8, 9, 10]
    noise = torch.randn(3, len(LENGTHS), SIZE, 4, generator=torch.Generator().manual_seed(1))
    same(write_plainly(model, read, config, 3, seeds, noise, waste), write_blocks(model, read, config, 3, seeds, noise))


@pytest.mark.parametrize("waste", [Waste(), NO_WASTE], ids=["all", "none"])
@pytest.mark.parametrize(
    "vae",
    [{"attention": "causal"}, {"post_norm": False, "act": "gelu"}, {"clip_qkv": 0.5, "qk_norm": False}],
    ids=str,
)
def test_every_kind_of_decoder_is_read_from_its_weights(vae, waste):
    model = small(**vae)
    read = read_prompts(model, [prompt(length, seed) for seed, length in enumerate(LENGTHS)])
    same(write_plainly(model, read, PLAIN, 2, range(4), waste=waste), write_blocks(model, read, PLAIN, 2, range(4)))


@pytest.mark.parametrize("waste", [Waste(), NO_WASTE], ids=["all", "none"])
def test_texts_from_nothing_have_no_history(waste):
    model, config = small(), replace(PLAIN, guidance_scale=2.0)
    read = read_prompts(model, [[], []])
    same(write_plainly(model, read, config, 2, [3, 4], waste=waste), write_blocks(model, read, config, 2, [3, 4]))


@pytest.mark.parametrize("waste", [waste for _, waste in ladder()], ids=[words for words, _ in ladder()])
@pytest.mark.parametrize("name", ["tiny", "tiny_patch2"])
def test_the_released_numerics_are_met(name, waste):
    model, path = ColaDLM.from_pretrained(FIXTURES / name), FIXTURES / name / "reference.safetensors"
    reference = load_file(path)
    with safe_open(path, framework="pt") as file:
        told = file.metadata()
    model.config = replace(model.config, pad_id=int(told["pad_token_id"]))
    config = replace(PLAIN, steps=int(told["timestep_num"]), guidance_scale=float(told["guidance_scale"]))
    noise = [reference[f"generate.noise.{b}"] for b in range(sum(key.startswith("generate.noise") for key in reference))]
    read = read_prompts(model, [reference[f"generate.prompt_ids.{i}"].tolist() for i in range(3)])
    for b, block in enumerate(write_plainly(model, read, config, len(noise), range(3), noise, waste)):
        close(block.latents, reference[f"generate.latents.{b}"], 1e-3)
        close(block.logits, reference[f"generate.logits.{b}"], 1e-3)


def test_the_ladder_goes_from_all_to_nothing_one_item_at_a_time():
    steps = [waste for _, waste in ladder()]
    assert steps[0] == Waste() and steps[-1] == NO_WASTE and list(SAVINGS) == [f.name for f in fields(Waste)]
    assert [sum(astuple(waste)) for waste in steps] == list(range(len(SAVINGS), -1, -1))


def count(waste, rows=3, blocks=4, scale=3.0, whole=8):
    "What was counted for `rows` prompts of `whole` latents."
    model, tally = small(), Tally()
    read = read_prompts(model, [prompt(whole, seed) for seed in range(rows)])
    list(write_plainly(model, read, replace(PLAIN, guidance_scale=scale), blocks, range(rows), waste=waste, tally=tally))
    return tally


@pytest.mark.parametrize("scale, branches", [(1.0, 1), (3.0, 2)])
def test_counts_are_what_arithmetic_says(scale, branches):
    B, blocks, S, whole, layers = 3, 4, PLAIN.steps, 8, 2  # of the prior; the decoder has one layer
    most, least = count(Waste(), scale=scale), count(NO_WASTE, scale=scale)
    assert most.forwards == 1 + blocks * (branches * S + 1) and least.forwards == 1 + blocks * S
    assert most.positions == B * (whole + blocks * SIZE * (branches * S + 1))
    assert least.positions == most.positions - B * SIZE  # nobody asks for the last block's keys
    assert most.modulations == most.positions and least.modulations == S + 1
    ends = [whole + (b + 1) * SIZE for b in range(blocks)]  # keys that a block sees, its own included
    prior = whole**2 + sum(SIZE * ((S + 1) * end + (branches - 1) * S * SIZE) for end in ends)
    decoder = whole**2 + sum(SIZE * end for end in ends)
    assert most.pairs == B**2 * (layers * prior + decoder)
    # Without waste a block's commit sees what the next block's first step sees, and the last has none.
    joined = prior - SIZE * sum(ends) + sum(SIZE * end for end in ends[1:])
    assert least.pairs == B * (layers * joined + decoder)
    assert most.cells == most.pairs
    own = B * SIZE * 4 * 16  # bytes of one block's keys: fp32, two heads of eight
    # Joined: the prompt, every end S + 1 times, the lone branch; in the decoder, of the same width, every end once.
    lone = (branches - 1) * S * SIZE * blocks
    assert most.moved == 2 * own // SIZE * (layers * (whole + (S + 1) * sum(ends) + lone) + whole + sum(ends))


def test_a_memory_that_never_asks_twice_does_not_grow_with_the_history():
    near, far = count(NO_WASTE, whole=8), count(NO_WASTE, whole=32)
    more = 3 * (32 - 8) * (2 + 1)  # rotated once, when the prompt is read, in two layers of the prior and one of the decoder
    assert far.rotated - near.rotated == more and count(Waste(), whole=32).rotated - count(Waste(), whole=8).rotated > 10 * more


@pytest.mark.parametrize("change", [{"solver": "heun"}, {"renew_below": 0.5}, {"temperature": 0.5}], ids=str)
def test_what_it_does_not_have_is_refused_by_name(change):
    model = small()
    with pytest.raises(ConfigError, match=f"^{next(iter(change))} is "):
        next(write_plainly(model, read_prompts(model, [prompt(3)]), replace(PLAIN, **change), 1, [0]))


def test_a_decoder_that_sees_the_future_is_refused():
    model = small(attention="bidirectional")
    with pytest.raises(ConfigError, match="bidirectional"):
        next(write_plainly(model, read_prompts(model, [prompt(3)]), PLAIN, 1, [0]))
