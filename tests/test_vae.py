"The Text VAE against a block written out plainly, against its parts alone, and against itself with a memory."

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from cola_tutorial.config import ATTENTION_KINDS, ConfigError, VAEConfig
from cola_tutorial.nn.attention import Sight, rotary_turns
from cola_tutorial.vae import Posterior, TextBlock, TextVAE

EXAMPLES = settings(max_examples=25, deadline=None, derandomize=True)
SIZES = dict(
    vocab_size=11,
    dim=16,
    ffn_dim=24,
    num_heads=2,
    encoder_num_blocks=2,
    decoder_num_blocks=2,
    latent_dim=4,
    block_size=3,
)
CHOICES = [
    {},
    {"post_norm": False},
    {"qk_norm": False},
    {"act": "gelu"},
    {"act": "silu", "bias": False, "qk_bias": True},
    {"clip_qkv": 0.2},
    {"clip_qkv": 0.2, "qk_norm": False, "post_norm": False},
    {"layer_norm_affine": False, "qk_norm_affine": False},
    {"encoder_last_ln": False, "scaling_factor": 0.5, "shifting_factor": 0.3},
]


def scatter(module, seed=0, scale=0.3):
    "Move every weight, so that none is zero or one by chance."
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(scale * torch.randn(weight.shape, generator=generator))
    return module


def tiny(**changes):
    "A Text VAE whose every weight matters, in evaluation mode."
    torch.manual_seed(0)
    return scatter(TextVAE(VAEConfig(**SIZES | changes))).eval()


def tokens_of(rows, length, seed=0):
    return torch.randint(0, 11, (rows, length), generator=torch.Generator().manual_seed(seed))


def plain_norm(x, weights, name):
    "LayerNorm in double precision, with weight and bias where they exist."
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    return x * weights.get(f"{name}.weight", 1.0) + weights.get(f"{name}.bias", 0.0)


def plain_block(block, x, mask):
    "What the paper and the released format say of one block, for one row (N, dim), head by head."
    c, w = block.config, {k: v.double() for k, v in block.state_dict().items()}

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    width = c.dim // c.num_heads

    def attention(x):
        q, k, v = linear(x, "qkv_proj").split(c.dim, -1)
        if c.clip_qkv:
            q, k, v = (torch.clip(part, -c.clip_qkv, c.clip_qkv) for part in (q, k, v))
        if c.qk_norm:
            q, k = plain_norm(q, w, "q_norm"), plain_norm(k, w, "k_norm")
        speeds = c.rope_theta ** (-torch.arange(0, width, 2).double() / width)
        turn = torch.polar(torch.ones(len(x), width // 2).double(), torch.arange(len(x)).double()[:, None] * speeds)
        heads = []
        for h in range(c.num_heads):
            part = slice(h * width, (h + 1) * width)
            waves = [torch.complex(p[:, part][:, : width // 2], p[:, part][:, width // 2 :]) * turn for p in (q, k)]
            scores = (waves[0] @ waves[1].conj().T).real / math.sqrt(width)
            heads.append(scores.masked_fill(~mask, -math.inf).softmax(-1) @ v[:, part])
        return linear(torch.cat(heads, -1), "attn_out_proj")

    def feed_forward(x):
        x = linear(x, "ffn_proj")
        if c.act == "swiglu":
            x, gate = x.split(c.ffn_dim // 2, -1)
            return linear(x * gate / (1 + torch.exp(-gate)), "ffn_out")
        bend = {
            "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
            "silu": lambda x: x / (1 + torch.exp(-x)),
        }
        return linear(bend[c.act](x), "ffn_out")

    if not c.post_norm:
        x = x + attention(plain_norm(x, w, "norm_attn"))
        return x + feed_forward(plain_norm(x, w, "norm_ffn"))
    x = plain_norm(x, w, "norm_attn") + attention(x)
    return x + plain_norm(feed_forward(x), w, "norm_ffn")


@torch.no_grad()
@pytest.mark.parametrize("changes", CHOICES, ids=str)
def test_block_is_the_formula(changes):
    config = VAEConfig(**SIZES | changes)
    torch.manual_seed(1)
    block = scatter(TextBlock(config)).eval()
    x = torch.randn(2, 7, 16)
    mask = torch.arange(7)[:, None] // 3 >= torch.arange(7)[None, :] // 3
    out = block(x, Sight(rotary_turns(torch.arange(7), 8, config.rope_theta), mask))
    for row in range(2):
        torch.testing.assert_close(out[row], plain_block(block, x[row].double(), mask).float(), atol=2e-5, rtol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("attention", ATTENTION_KINDS)
@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_a_token_reaches_exactly_the_latents_that_may_see_it(attention, patch_size):
    vae, n, size = tiny(attention=attention, patch_size=patch_size), 7, 3
    tokens = tokens_of(1, n * patch_size)
    z_0 = vae.encode(tokens).mean
    logits = vae.decode(z_0)
    assert z_0.shape == (1, n, 4) and logits.shape == (1, n * patch_size, 11)
    for latent in range(n):
        changed = tokens.clone()
        changed[0, latent * patch_size] = (changed[0, latent * patch_size] + 1) % 11
        seen = {"bidirectional": 0, "causal": latent, "block_causal": latent // size * size}[attention]
        moved = (vae.encode(changed).mean - z_0)[0].abs().amax(-1) > 1e-5
        assert moved.tolist() == [at >= seen for at in range(n)]
        bent = z_0.clone()
        bent[0, latent] += 1.0
        moved = (vae.decode(bent) - logits)[0].abs().amax(-1) > 1e-5
        assert moved.tolist() == [at // patch_size >= seen for at in range(n * patch_size)]


@torch.no_grad()
def test_patches_are_the_convolution():
    vae = tiny(patch_size=4, encoder_num_blocks=1)
    seen = []
    vae.encoder.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    tokens = tokens_of(2, 12)
    vae.encode(tokens)
    expected = vae.encoder.patch_embedder(vae.encoder.wte(tokens).transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(seen[0], expected, atol=1e-5, rtol=1e-5)


@EXAMPLES
@given(
    st.sampled_from(ATTENTION_KINDS),
    st.sampled_from([1, 2]),
    st.lists(st.integers(1, 3), min_size=2, max_size=4),
    st.sampled_from([{}, {"post_norm": False, "encoder_last_ln": False}, {"log_snr": 1.5, "encoder_last_ln": False}]),
)
def test_a_padded_row_is_encoded_as_if_it_were_alone(attention, patch_size, blocks, changes):
    vae, block = tiny(attention=attention, patch_size=patch_size, **changes), 3 * patch_size
    lengths = torch.tensor(blocks) * 3
    tokens = tokens_of(len(blocks), max(blocks) * block)
    with torch.no_grad():
        together = vae.encode(tokens, lengths)
        for row, length in enumerate(lengths.tolist()):
            alone = vae.encode(tokens[row : row + 1, : length * patch_size])
            torch.testing.assert_close(together.mean[row, :length], alone.mean[0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(together.logvar[row, :length], alone.logvar[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("changes", [*CHOICES, {"patch_size": 2}, {"attention": "causal"}], ids=str)
def test_decoding_with_a_memory_is_decoding_at_once(changes):
    vae = tiny(**changes)
    z = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(2))
    at_once, cache, parts = vae.decode(z), vae.new_cache(2, 9), []
    for start, stop in ((0, 3), (3, 9)) if vae.config.attention == "block_causal" else ((0, 1), (1, 5), (5, 9)):
        parts.append(vae.decode(z[:, start:stop], cache))
        cache.commit(stop - start)
    torch.testing.assert_close(torch.cat(parts, 1), at_once, atol=2e-5, rtol=2e-5)


def test_bidirectional_decoder_refuses_a_memory():
    with pytest.raises(ConfigError, match="bidirectional decoder sees the future"):
        tiny(attention="bidirectional").new_cache(1, 3)


def test_tokens_that_fill_no_whole_latent_are_named():
    with pytest.raises(ConfigError, match="7 tokens do not fill latents of 2"):
        tiny(patch_size=2).encode(tokens_of(1, 7))


@torch.no_grad()
@pytest.mark.parametrize("log_snr", [-1.0, 1.5])
@pytest.mark.parametrize("encoder_last_ln", [True, False])
def test_fixed_signal_to_noise_holds_for_every_row(log_snr, encoder_last_ln):
    posterior = tiny(log_snr=log_snr, encoder_last_ln=encoder_last_ln).encode(tokens_of(3, 9))
    for row in range(3):
        ratio = posterior.mean[row].pow(2).mean() / posterior.logvar[row].exp().mean()
        assert ratio.log().item() == pytest.approx(log_snr, abs=1e-4)
    assert posterior.log_snr().item() == pytest.approx(log_snr, abs=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["dropout", "attn_dropout"])
def test_dropout_is_for_training_only(name):
    vae, plain, tokens = tiny(**{name: 0.5}), tiny(), tokens_of(2, 9)
    assert torch.equal(vae.encode(tokens).mean, plain.encode(tokens).mean)
    vae.train()
    one, two = vae.encode(tokens).mean, vae.encode(tokens).mean
    assert not torch.equal(one, two)
    torch.manual_seed(3)
    three = vae.encode(tokens).mean
    torch.manual_seed(3)
    assert torch.equal(three, vae.encode(tokens).mean)


@torch.no_grad()
def test_the_mask_token_is_the_row_behind_the_vocabulary():
    vae, tokens = tiny(), tokens_of(1, 6)
    assert vae.encoder.wte.weight.shape[0] == 12 and vae.decode(torch.zeros(1, 3, 4)).shape[-1] == 11
    before, hidden = vae.encode(tokens).mean, vae.encode(tokens.fill_(11)).mean
    vae.encoder.wte.weight[11] += 1.0
    assert torch.equal(vae.encode(tokens_of(1, 6)).mean, before)
    assert not torch.equal(vae.encode(tokens).mean, hidden)


def test_every_weight_learns():
    vae = tiny(patch_size=2).train()
    tokens = tokens_of(2, 12)
    tokens[0, 0] = 11
    posterior = vae.encode(tokens)
    vae.decode(posterior.sample(torch.Generator().manual_seed(0))).logsumexp(-1).sum().backward()
    assert [name for name, weight in vae.named_parameters() if weight.grad is None or not weight.grad.any()] == []


@EXAMPLES
@given(st.integers(0, 10_000))
def test_posterior_terms_are_those_of_the_normal_law(seed):
    generator = torch.Generator().manual_seed(seed)
    ours, other = (Posterior(*torch.randn(2, 2, 3, 4, generator=generator)) for _ in range(2))

    def law(posterior):
        return Normal(posterior.mean, (0.5 * posterior.logvar).exp())

    def close(found, expected):
        return torch.testing.assert_close(found, expected.sum(-1), atol=1e-4, rtol=1e-4)

    close(ours.kl(), kl_divergence(law(ours), Normal(0.0, 1.0)))
    close(ours.kl_to(other), kl_divergence(law(ours), law(other)))
    close(ours.negative_entropy(), -law(ours).entropy())


def test_samples_have_the_posteriors_mean_and_spread():
    posterior = Posterior(torch.full((1, 50_000, 1), 3.0), torch.full((1, 50_000, 1), math.log(0.25)))
    drawn = posterior.sample(torch.Generator().manual_seed(0))
    assert drawn.mean().item() == pytest.approx(3.0, abs=0.01) and drawn.std().item() == pytest.approx(0.5, abs=0.01)
    assert torch.equal(drawn, posterior.sample(torch.Generator().manual_seed(0)))


def test_latents_are_shifted_then_scaled():
    vae = tiny(scaling_factor=2.0, shifting_factor=0.5)
    assert vae.to_latents(torch.tensor([1.0, 0.5])).tolist() == [1.0, 0.0]


def test_documents_in_one_row_are_encoded_and_decoded_as_rows_of_their_own():
    torch.manual_seed(5)
    sizes = dict(vocab_size=9, dim=16, ffn_dim=16, num_heads=2, encoder_num_blocks=1, decoder_num_blocks=1, latent_dim=4)
    vae = TextVAE(VAEConfig(**sizes, block_size=2, init_std=0.3))
    tokens, documents = torch.randint(0, 9, (2, 12)), torch.tensor([[0] * 4 + [1] * 8]).expand(2, -1)
    mean = vae.encode(tokens, documents=documents).mean
    parts = (slice(0, 4), slice(4, 12))
    torch.testing.assert_close(mean, torch.cat([vae.encode(tokens[:, part]).mean for part in parts], 1), atol=1e-5, rtol=1e-5)
    states = vae.decoder.states(mean, documents=documents)
    torch.testing.assert_close(states, torch.cat([vae.decoder.states(mean[:, part]) for part in parts], 1), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(mean, vae.encode(tokens).mean, atol=1e-3)
