"Losses whose value is known in advance, and gradients that go where they should and nowhere else."

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cola_tutorial.config import ConfigError, DiTConfig, Stage1Config, Stage2Config, VAEConfig
from cola_tutorial.dit import DiT
from cola_tutorial.objectives import (
    counted_positions,
    draw_flow,
    draw_stage2,
    flow_matching_loss,
    hidden_tokens,
    latent_mask,
    loss_totals,
    mask_loss,
    mean_over,
    random_prefixes,
    reconstruction_accuracy,
    stage1_terms,
    stage2_terms,
    summed_token_loss,
    token_loss,
)
from cola_tutorial.vae import TextVAE

EXAMPLES = settings(max_examples=50, deadline=None, derandomize=True)


def parts(block_size=2, patch_size=1, silent=False, **changes):
    "A small VAE and a DiT; `silent` gives a DiT of zeros, which answers zero to everything."
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=9, dim=16, ffn_dim=16, num_heads=2, encoder_num_blocks=1, decoder_num_blocks=1, init_std=0.2
    )
    vae = TextVAE(VAEConfig(**sizes, latent_dim=4, block_size=block_size, patch_size=patch_size, **changes))
    dit = DiT(
        DiTConfig(
            latent_dim=4,
            dim=16,
            emb_dim=8,
            num_heads=2,
            head_dim=8,
            expand_ratio=2,
            num_layers=1,
            rope_dim=4,
            block_size=block_size,
        )
    )
    with torch.no_grad():
        for weight in dit.parameters():
            weight.copy_(torch.zeros_like(weight) if silent else weight + 0.1 * torch.randn_like(weight))
    return vae, dit


def batch(rows=3, length=8, seed=0):
    "Tokens and the positions that count: the last row ends early."
    tokens = torch.randint(0, 9, (rows, length), generator=torch.Generator().manual_seed(seed))
    counted = torch.ones(rows, length, dtype=torch.bool)
    counted[-1, length // 2 :] = False
    return tokens, counted


def source(seed=0):
    return torch.Generator().manual_seed(seed)


@EXAMPLES
@given(st.integers(1, 4), st.lists(st.integers(0, 12), min_size=1, max_size=4))
def test_counted_positions_block_by_block(block, lengths):
    row_length = 12 // block * block
    document = torch.full((len(lengths), row_length), -1)
    for row, length in zip(document, lengths):
        row[:length] = torch.arange(min(length, row_length)) // 3
    expected = []
    for row in document.tolist():
        blocks = [row[start : start + block] for start in range(0, row_length, block)]
        expected.append([any(owner >= 0 for owner in one) for one in blocks for _ in one])
    assert counted_positions(document, block).tolist() == expected


def test_mean_over_only_what_counts():
    values, counted = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[True, False, True]])
    assert mean_over(values, counted).item() == 2.5
    assert mean_over(values, torch.zeros_like(counted)).item() == 0


@EXAMPLES
@given(st.integers(1, 5), st.integers(1, 5), st.floats(0, 1), st.integers(1, 6))
def test_prefixes_are_prefixes(rows, blocks, rate, size):
    pinned = random_prefixes(rows, blocks, size, rate, source(rows))
    assert pinned.shape == (rows, blocks * size)
    for block in pinned.view(-1, size).tolist():
        assert sum(block) < size and block == sorted(block, reverse=True)


def test_prefixes_have_the_given_rate_and_every_length_equally():
    pinned = random_prefixes(4000, 5, 6, 0.3, source()).view(-1, 6).sum(-1)
    assert (pinned > 0).float().mean().item() == pytest.approx(0.3, abs=0.01)
    shares = torch.bincount(pinned[pinned > 0], minlength=6)[1:] / (pinned > 0).sum()
    assert shares.tolist() == pytest.approx([0.2] * 5, abs=0.02)
    assert not random_prefixes(50, 4, 6, 0.0, source()).any() and random_prefixes(50, 4, 6, 1.0, source())[:, ::6].all()
    assert not random_prefixes(50, 4, 1, 1.0, source()).any()


def test_flow_matching_of_a_silent_network_is_the_mean_square_of_the_target():
    _, dit = parts(silent=True)
    counted = torch.ones(2000, 8, dtype=torch.bool)
    still = flow_matching_loss(dit, torch.zeros(2000, 8, 4), counted, Stage2Config(prefix_rate=0.0), source())
    assert still.item() == pytest.approx(1.0, abs=0.02)  # u = z_1
    one = flow_matching_loss(dit, torch.full((2000, 8, 4), 2.0), counted, Stage2Config(prefix_rate=0.3), source())
    assert one.item() == pytest.approx(5.0, abs=0.05)  # u = z_1 - 2


@pytest.mark.parametrize("prefix_rate, positions", [(0.0, [0, 1, 2, 3]), (1.0, [1, 3])])
def test_flow_matching_looks_only_at_counted_latents_that_are_not_pinned(prefix_rate, positions):
    "In blocks of two a prefix is the first latent; large latents drown the noise, so u^2 is nearly z_0^2."
    _, dit = parts(silent=True)
    z_0 = 1000.0 * torch.arange(1, 9).view(1, 8, 1).expand(1, 8, 4)
    counted = torch.arange(8)[None] < 4
    loss = flow_matching_loss(dit, z_0, counted, Stage2Config(prefix_rate=prefix_rate), source())
    expected = sum((at + 1) ** 2 for at in positions) / len(positions)
    assert loss.item() / 1e6 == pytest.approx(expected, rel=0.01)


def test_flow_matching_asks_at_times_of_the_given_law(monkeypatch):
    _, dit = parts()
    asked, original = [], DiT.two_copy_velocity

    def spy(self, z_0, z_t, t, *more):
        return asked.append(t) or original(self, z_0, z_t, t, *more)

    monkeypatch.setattr(DiT, "two_copy_velocity", spy)
    counted = torch.ones(500, 2, dtype=torch.bool)
    for config in (Stage2Config(time_loc=2.0), Stage2Config(time_loc=-2.0), Stage2Config(time_law="uniform")):
        flow_matching_loss(dit, torch.zeros(500, 2, 4), counted, config, source())
    assert [t.median().item() for t in asked] == pytest.approx(
        [1 / (1 + math.exp(-2)), 1 / (1 + math.exp(2)), 0.5], abs=0.05
    )


def test_what_does_not_count_changes_no_loss():
    vae, dit = parts()
    tokens, counted = batch()
    other = tokens.clone()
    other[-1, 4:] = (other[-1, 4:] + 1) % 9
    config = Stage2Config(vae_lr_ratio=1.0)
    for name in ("reconstruction", "kl", "mask"):
        one, two = (stage1_terms(vae, t, counted, Stage1Config(), source())[name].item() for t in (tokens, other))
        assert one == pytest.approx(two, rel=1e-5), name
    for name in ("flow_matching", "negative_entropy", "reconstruction"):
        one, two = (stage2_terms(vae, dit, t, counted, config, source())[name].item() for t in (tokens, other))
        assert one == pytest.approx(two, rel=1e-5), name


def test_token_loss_one_by_one():
    logits, tokens = torch.randn(2, 3, 5), torch.tensor([[0, 4, 2], [3, 3, 1]])
    found = token_loss(logits, tokens)
    for b in range(2):
        for i in range(3):
            odds = [math.exp(x) for x in logits[b, i].tolist()]
            assert found[b, i].item() == pytest.approx(-math.log(odds[tokens[b, i]] / sum(odds)), abs=1e-5)


def test_latents_count_as_their_tokens_do():
    counted = torch.tensor([[True] * 4 + [False] * 4])
    assert latent_mask(counted, 2).tolist() == [[True, True, False, False]]


def test_mask_loss_hides_counted_tokens_only_and_asks_for_them():
    vae, _ = parts(use_variation=False)
    tokens, counted = batch()
    seen = []
    vae.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    drawn = hidden_tokens(*tokens.shape, 0.5, source()) & counted
    loss = mask_loss(vae, tokens, drawn)
    hidden = seen[0] == 9
    assert torch.equal(hidden, drawn)
    assert hidden.any() and not (hidden & ~counted).any() and torch.equal(seen[0][~hidden], tokens[~hidden])
    asked = token_loss(vae.decode(vae.encode(seen[0]).mean), tokens)
    assert loss.item() == pytest.approx(asked[hidden].mean().item(), rel=1e-5)
    assert mask_loss(vae, tokens, torch.zeros_like(counted)).item() == 0
    assert not hidden_tokens(9, 9, 0.0).any() and hidden_tokens(9, 9, 1.0).all()
    stage1_terms(vae, tokens, counted, Stage1Config(mask_rate=1.0), source())
    assert torch.equal(seen[-1] == 9, counted)


@pytest.mark.parametrize("beta, lambda_mask", [(0.0, 0.0), (0.3, 0.0), (1e-4, 0.1), (2.0, 3.0)])
def test_stage_one_adds_its_terms_with_their_weights(beta, lambda_mask):
    vae, _ = parts(patch_size=2)
    terms = stage1_terms(vae, *batch(), Stage1Config(beta=beta, lambda_mask=lambda_mask), source())
    expected = terms["reconstruction"] + beta * terms["kl"] + lambda_mask * terms.get("mask", 0.0)
    assert terms["loss"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert ("mask" in terms) == (lambda_mask > 0)


def test_stage_one_teaches_the_whole_vae():
    vae, _ = parts()
    stage1_terms(vae, *batch(), Stage1Config(mask_rate=0.5), source())["loss"].backward()
    assert [name for name, weight in vae.named_parameters() if weight.grad is None or not weight.grad.any()] == []
    assert vae.encoder.wte.weight.grad[9].any()  # the mask token


@pytest.mark.parametrize(
    "weights", [dict(lambda_fm=2.0), dict(lambda_vae=0.5), dict(beta=0.3), dict(lambda_mask=4.0), dict(lambda_ref=7.0)]
)
def test_stage_two_adds_its_terms_with_their_weights(weights):
    vae, dit = parts()
    reference, _ = parts()
    with torch.no_grad():
        reference.encoder.final_layer.bias.add_(0.3)
    config = Stage2Config(vae_lr_ratio=1.0, **weights)
    terms = stage2_terms(vae, dit, *batch(), config, source(), reference)
    c = config
    moving = terms["reconstruction"] + c.beta * terms["negative_entropy"] + c.lambda_mask * terms["mask"]
    expected = c.lambda_fm * terms["flow_matching"] + c.lambda_vae * moving + c.lambda_ref * terms["reference_kl"]
    assert terms["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    plain = stage2_terms(vae, dit, *batch(), Stage2Config(vae_lr_ratio=1.0), source(), reference)
    for name in ("flow_matching", "reconstruction", "mask", "reference_kl"):  # a weight scales a term, never changes it
        assert terms[name].item() == pytest.approx(plain[name].item(), rel=1e-6)


def test_a_fixed_vae_learns_nothing_and_the_prior_everything():
    vae, dit = parts()
    terms = stage2_terms(vae, dit, *batch(), Stage2Config(), source())
    terms["loss"].backward()
    assert set(terms) == {"flow_matching", "loss", "log_snr", "latent_mean", "latent_std"}
    assert all(weight.grad is None for weight in vae.parameters())
    assert [name for name, weight in dit.named_parameters() if weight.grad is None or not weight.grad.any()] == []


def test_in_joint_training_the_flow_moves_the_encoder_and_the_reference_stays():
    vae, dit = parts()
    reference, _ = parts()
    alone = Stage2Config(vae_lr_ratio=1.0, lambda_vae=0.0, lambda_ref=0.0)
    stage2_terms(vae, dit, *batch(), alone, source())["loss"].backward()

    def moved(module):
        return any(weight.grad is not None and weight.grad.any() for weight in module.parameters())

    assert moved(vae.encoder) and not moved(vae.decoder) and moved(dit)
    stage2_terms(vae, dit, *batch(), replace(alone, lambda_vae=1.0, lambda_ref=1.0), source(), reference)[
        "loss"
    ].backward()
    assert moved(vae.decoder) and all(weight.grad is None for weight in reference.parameters())


def test_reference_term_is_zero_for_the_same_vae_and_grows_with_distance():
    vae, dit = parts()
    reference, _ = parts()

    def terms():
        return stage2_terms(vae, dit, *batch(), Stage2Config(vae_lr_ratio=1.0), source(), reference)[
            "reference_kl"
        ].item()

    assert terms() == pytest.approx(0.0, abs=1e-6)
    far = []
    for _ in range(2):
        with torch.no_grad():
            reference.encoder.final_layer.bias.add_(torch.linspace(-0.4, 0.4, 8))
        far.append(terms())
    assert 0 < far[0] < far[1]
    assert "reference_kl" not in stage2_terms(
        vae, dit, *batch(), Stage2Config(vae_lr_ratio=1.0, lambda_ref=0.0), source(), reference
    )


def test_the_mean_stands_in_for_samples_where_variation_is_off():
    vae, dit = parts(use_variation=False, log_snr=-3.0)
    tokens, counted = batch()
    first, second = (
        stage1_terms(vae, tokens, counted, Stage1Config(lambda_mask=0.0), source(s))["reconstruction"] for s in (0, 1)
    )
    assert torch.equal(first, second)
    noisy, _ = parts(log_snr=-3.0)
    first, second = (
        stage1_terms(noisy, tokens, counted, Stage1Config(lambda_mask=0.0), source(s))["reconstruction"] for s in (0, 1)
    )
    assert not torch.equal(first, second)


def test_reconstruction_accuracy_is_a_share_and_noise_only_hurts():
    vae, _ = parts(log_snr=10.0)
    vae.train()
    tokens, counted = batch(16, 8)
    optimizer = torch.optim.Adam(vae.parameters(), 0.02)
    for step in range(60):
        optimizer.zero_grad()
        stage1_terms(vae, tokens, counted, Stage1Config(lambda_mask=0.0, beta=0.0), source(step))["loss"].backward()
        optimizer.step()
    clean, middle, noise = reconstruction_accuracy(vae, tokens, counted, [0.0, 0.5, 1.0], source())
    assert clean > 0.95 and clean >= middle > noise and noise < 0.4


def test_random_blocks_are_drawn_from_the_list_and_must_fill_the_row():
    config = Stage2Config(block_sizes=(1, 2, 4))
    assert {draw_flow(config, 3, 8, 4, 2, source(seed)).block_size for seed in range(40)} == {1, 2, 4}
    assert draw_flow(Stage2Config(), 3, 8, 4, 2, source()).block_size == 2
    with pytest.raises(ConfigError, match="block_sizes is .*must divide the 8 latents"):
        draw_flow(Stage2Config(block_sizes=(2, 3)), 3, 8, 4, 2, source())


@pytest.mark.parametrize("most_logits", [9, 50, 2**27])
def test_the_loss_in_pieces_is_the_loss_of_all_logits_at_once(most_logits):
    vae, _ = parts()
    tokens, counted = batch()
    z = torch.randn(3, 8, 4, generator=source())
    expected = token_loss(vae.decode(z), tokens)[counted].sum()
    found = summed_token_loss(vae.decoder, vae.decoder.states(z), tokens, counted, most_logits)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    wanted, given_ = (torch.autograd.grad(loss, list(vae.decoder.parameters())) for loss in (expected, found))
    for one, other in zip(wanted, given_):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_parts_of_a_batch_add_up_to_its_loss():
    vae, dit = parts()
    tokens, counted = batch(rows=4)
    config = Stage2Config(vae_lr_ratio=1.0, prefix_rate=0.5)
    noise = draw_stage2(config, vae.config, 4, 8, source())
    totals = loss_totals(counted, noise, 1)
    whole = stage2_terms(vae, dit, tokens, counted, config, noise)["loss"].item()
    some = [slice(0, 1), slice(1, 4)]
    assert whole == pytest.approx(sum(stage2_terms(vae, dit, tokens[s], counted[s], config, noise[s], totals=totals)["loss"].item() for s in some), rel=1e-5)
