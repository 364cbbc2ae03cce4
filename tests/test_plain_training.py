"The straightforward training step and every way out of its waste have the loss and the gradients of the package's."

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from test_generation import small

from cola_tutorial.config import ConfigError, Stage1Config, Stage2Config
from cola_tutorial.objectives import Noise, counted_positions, draw_stage1, draw_stage2, stage1_terms, stage2_terms
from cola_tutorial.plain_training import NO_TRAINING_WASTE, TRAINING_SAVINGS, PlainTrainer, TrainingWaste, flat_mask, plain_loss, training_ladder

# All of it, none of it, each item alone, and each item left out.
WASTES = {"all": TrainingWaste(), "none": NO_TRAINING_WASTE}
WASTES |= {name: replace(NO_TRAINING_WASTE, **{name: True}) for name in TRAINING_SAVINGS}
WASTES |= {f"all but {name}": replace(TrainingWaste(), **{name: False}) for name in TRAINING_SAVINGS}
STAGES = {"stage1": Stage1Config(), "prior": Stage2Config(prefix_rate=0.5), "joint": Stage2Config(prefix_rate=0.5, vae_lr_ratio=1.0)}
ROWS, BLOCKS = 3, 4


def question(stage, **vae):
    "A model that learns, tokens, documents with padding, and the noise of a step."
    model, config = small(**vae), STAGES[stage]
    model.requires_grad_(False)
    for name in {"stage1": ["vae"], "prior": ["dit"], "joint": ["vae", "dit"]}[stage]:
        getattr(model, name).requires_grad_(True)
    c, generator = model.config, torch.Generator().manual_seed(7)
    tokens = torch.randint(0, c.vae.vocab_size, (ROWS, BLOCKS * c.tokens_per_block), generator=generator)
    document = torch.zeros_like(tokens)
    document[1, c.tokens_per_block * 3 - 1 :] = -1  # the last block of row 1 carries no loss
    draw = draw_stage1 if stage == "stage1" else draw_stage2
    return model, tokens, document, config, draw(config, c.vae, *tokens.shape, generator)


def reference_of(model):
    "Another VAE, which the joint loss is held to."
    other = copy.deepcopy(model.vae).requires_grad_(False)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(0.9)
    return other


def gradients(model, loss):
    "The loss, and the gradient of every weight that has one."
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("vae", [{}, {"patch_size": 2, "attention": "causal"}], ids=str)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("waste", WASTES.values(), ids=WASTES)
def test_no_item_of_waste_changes_loss_or_gradients(waste, stage, vae):
    model, tokens, document, config, noise = question(stage, **vae)
    counted = counted_positions(document, model.config.tokens_per_block)
    assert not counted.all() and (stage == "stage1" or noise.pinned.any())
    if stage == "stage1":
        expected, reference = stage1_terms(model.vae, tokens, counted, config, noise)["loss"], None
    else:
        reference = reference_of(model) if stage == "joint" else None
        expected = stage2_terms(model.vae, model.dit, tokens, counted, config, noise, reference)["loss"]
    expected, slopes = gradients(model, expected)
    found, ours = gradients(model, plain_loss(model, tokens, counted, config, noise, waste, reference))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert ours.keys() == slopes.keys() and any(slope.abs().max() > 1e-3 for slope in slopes.values())
    for name, slope in slopes.items():
        torch.testing.assert_close(ours[name], slope, rtol=1e-4, atol=1e-5 * max(1, slope.abs().max()), msg=lambda text, name=name: f"{name}: {text}")


def test_the_flat_mask_is_the_rule_asked_pair_by_pair():
    rows, n, size = 3, 6, 2
    mask = flat_mask(rows, n, size)
    place = [(row, noisy, k // size) for row in range(rows) for noisy in (False, True) for k in range(n)]
    for i, (row, noisy, block) in enumerate(place):
        for j, (other, noise_too, earlier) in enumerate(place):
            if noise_too:
                sees = noisy and block == earlier
            else:
                sees = earlier < block if noisy else earlier <= block
            assert mask[i, j] == (sees and row == other), (i, j)


def test_another_block_size_of_the_noise_is_taken():
    model, tokens, document, config, noise = question("prior")
    noise, counted = replace(noise, block_size=2, pinned=torch.zeros_like(noise.pinned)), torch.ones_like(tokens, dtype=torch.bool)
    expected = stage2_terms(model.vae, model.dit, tokens, counted, config, noise)["loss"]
    own = plain_loss(model, tokens, counted, config, replace(noise, block_size=None))
    for waste in (TrainingWaste(), NO_TRAINING_WASTE):
        found = plain_loss(model, tokens, counted, config, noise, waste)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
        assert (own - found).abs() > 1e-4 * found


def test_the_kept_mask_is_kept_and_the_rebuilt_one_is_not(monkeypatch):
    model, tokens, document, config, noise = question("prior")
    counted, built = torch.ones_like(tokens, dtype=torch.bool), []
    from cola_tutorial import plain_training

    monkeypatch.setattr(plain_training, "flat_mask", lambda *given: built.append("new") or flat_mask(*given))
    monkeypatch.setattr(plain_training, "_kept_mask", lambda *given: built.append("kept") or flat_mask(*given))
    for waste in (TrainingWaste(), NO_TRAINING_WASTE):
        plain_loss(model, tokens, counted, config, noise, waste)
    assert built == ["new", "kept"] and plain_training._kept_mask is not flat_mask


def test_the_ladder_takes_one_item_at_a_time_and_passes_over_what_a_stage_lacks():
    rungs = list(training_ladder())
    assert [words for words, _ in rungs] == ["straightforward", *TRAINING_SAVINGS.values()]
    assert rungs[0][1] == TrainingWaste() and rungs[-1][1] == NO_TRAINING_WASTE
    for (_, before), (words, after), name in zip(rungs, rungs[1:], TRAINING_SAVINGS):
        assert after == replace(before, **{name: False}) and words == TRAINING_SAVINGS[name]
    assert "logits a few at a time" not in dict(training_ladder(words=False))
    assert list(dict(training_ladder(prior=False))) == ["straightforward", "rows encoded together", "logits a few at a time", "fused AdamW"]


@pytest.mark.parametrize("stage", STAGES)
def test_steps_of_plain_and_fused_adamw_agree(stage):
    losses = []
    for waste in (TrainingWaste(), NO_TRAINING_WASTE):
        model, tokens, document, config, noise = question(stage)
        config, before = replace(config, learning_rate=1e-3), copy.deepcopy(model.state_dict())
        trainer = PlainTrainer(model, config, partial(plain_loss, waste=waste), fused=not waste.plain_optimizer)
        losses.append([trainer.step(tokens, document, noise) for _ in range(4)])
        moved = {name.split(".")[0] for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
        assert moved == {"stage1": {"vae"}, "prior": {"dit"}, "joint": {"vae", "dit"}}[stage]
    torch.testing.assert_close(*map(torch.stack, losses), rtol=1e-5, atol=0)
    assert losses[0][-1] < losses[0][0]


def test_a_step_is_adamw_on_clipped_gradients_with_decay_on_matrices():
    "One step by hand: at the first, AdamW moves every weight by lr * g / (|g| + eps), after its decay."
    model, tokens, document, config, noise = question("joint")
    config = replace(config, vae_lr_ratio=0.5, learning_rate=1e-3, weight_decay=0.1, clip_norm=0.01)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    _, slopes = gradients(model, plain_loss(model, tokens, counted_positions(document, model.config.tokens_per_block), config, noise))
    norm = torch.stack([slope.norm() for slope in slopes.values()]).norm()
    assert norm > 0.1
    PlainTrainer(model, config).step(tokens, document, noise)
    for name, weight in model.named_parameters():
        if name not in slopes: continue
        rate, slope = config.learning_rate * (0.5 if name.startswith("vae") else 1.0), slopes[name] * config.clip_norm / norm
        expected = before[name] * (1 - rate * config.weight_decay * (weight.ndim > 1)) - rate * slope / (slope.abs() + 1e-8)
        firm = slope.abs() > 1e-7  # elsewhere rounding is as large as the gradient
        torch.testing.assert_close(weight[firm], expected[firm], rtol=1e-4, atol=2e-5)


def test_what_it_does_not_have_is_refused_by_name():
    model, tokens, _, config, noise = question("prior")
    with pytest.raises(ConfigError, match="^within_documents is True"):
        plain_loss(model, tokens, torch.ones_like(tokens, dtype=torch.bool), replace(config, within_documents=True), noise)
    assert isinstance(noise, Noise)
