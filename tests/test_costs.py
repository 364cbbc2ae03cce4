"What a training step costs is counted as torch counts it, kept as autograd keeps it, and says no to what cannot be."

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from test_cli import run
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cola_tutorial.cli import info
from cola_tutorial.config import DIAL, ConfigError, Stage1Config, Stage2Config, on_dial, preset
from cola_tutorial.costs import (
    StepPlan,
    cost_report,
    largest_batch,
    parameter_parts,
    report_lines,
    training_flops,
    training_memory,
)
from cola_tutorial.dit import DiT
from cola_tutorial.nn.attention import Sight, attention_mask, two_copy_mask
from cola_tutorial.objectives import stage1_terms, stage2_terms
from cola_tutorial.training import make_optimizers
from cola_tutorial.vae import TextVAE

FULL = preset("full")
VAE_PARTS = ("words_in", "encoder", "decoder", "vocabulary")
STAGES = {
    "stage1": Stage1Config(),
    "stage1 without mask": Stage1Config(lambda_mask=0.0),
    "prior": Stage2Config(),
    "joint": Stage2Config(vae_lr_ratio=1.0),
    "joint without mask and reference": Stage2Config(vae_lr_ratio=0.1, lambda_mask=0.0, lambda_ref=0.0),
}
stages = pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
DENSE = StepPlan(dense_rows=1)


# The dial


@pytest.mark.parametrize("name, width", [("tiny", 128), ("small", 256), ("full", 2048)])
def test_presets_lie_on_the_dial(name, width):
    assert preset(str(width)) == preset(width) == preset(name)


def test_every_width_is_a_model_and_none_is_smaller_than_the_one_before():
    before = None
    for width in DIAL:
        config = preset(str(width))
        d, v = config.dit, config.vae
        assert d.dim == d.emb_dim == d.num_heads * d.head_dim == width and v.dim == v.num_heads * d.head_dim and d.rope_dim * 4 == d.head_dim * 3
        with torch.device("meta"):
            made = [sum(p.numel() for p in half.parameters()) for half in (TextVAE(v), DiT(d))]
        parts = parameter_parts(config)
        assert [sum(parts[name] for name in VAE_PARTS), sum(parts.values()) - sum(parts[name] for name in VAE_PARTS)] == made
        costs = [*made, *(sum(training_flops(config, 512, stage).values()) for stage in STAGES.values())]
        assert before is None or (all(a <= b for a, b in zip(before, costs)) and before[1] < costs[1]), width
        before = costs
    assert before[:2] == [501_871_574, 1_829_875_728]


@pytest.mark.parametrize("width", ["500", "0", "2176", "128.0", "-128", " 256", "huge", "", None, True, 0, 129])
def test_a_width_off_the_dial_is_named_with_what_is_allowed(width):
    with pytest.raises(ConfigError, match=r"^preset is .* one of tiny, small, full, or .* a multiple of 128 from 128 to 2048"):
        preset(width)


def test_a_size_between_takes_changes_and_a_vocabulary():
    config = preset("512", vocab_size=77, latent_dim=8)
    assert config.vae.vocab_size == 77 and config.dit.latent_dim == config.vae.latent_dim == 8 and (config.pad_id, config.end_id) == (0, 1)
    assert on_dial("512") == on_dial(512)


# Operations


def terms(stage, vae, dit, tokens):
    "The loss of a stage, as the trainer asks for it."
    vae.requires_grad_(not isinstance(stage, Stage2Config) or stage.vae_lr_ratio > 0)
    counted = torch.ones_like(tokens, dtype=torch.bool)
    if isinstance(stage, Stage1Config):
        return stage1_terms(vae, tokens, counted, stage)["loss"]
    return stage2_terms(vae, dit, tokens, counted, stage, reference=vae if stage.lambda_ref > 0 else None)["loss"]


class Everywhere:
    "No look at modules: torch's is confused by a module that is asked without a gradient, as the words that are watched are."

    parents = {"Global"}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def counted_flops(stage, config, rows, length, recompute=False):
    "What torch's own counter finds in a whole step, put right by what it and the count see differently."
    torch.manual_seed(1)
    vae, dit = TextVAE(config.vae), DiT(config.dit)
    for part in (vae.encoder, vae.decoder, dit):
        part.recompute = recompute
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = Everywhere()
    with counter, sdpa_kernel(SDPBackend.MATH):
        terms(stage, vae, dit, torch.zeros(rows, length, dtype=torch.long)).backward()
    found, d, v, latents = counter.get_total_flops(), config.dit, config.vae, length // config.vae.patch_size
    if isinstance(stage, Stage1Config):
        return found - 2 * v.dim * v.vocab_size * rows * length  # all words once more, to watch how many are right
    waves = 2 * 256 * d.dim * (rows + 1)  # nobody asks their gradient, nor, with a fixed VAE, that of both copies of the latents
    inputs = 2 * d.latent_dim * d.dim * 2 * rows * latents * (stage.vae_lr_ratio == 0)
    # Pairs of a dense mask that a step on a processor leaves out: of clean latents to noisy ones, and of the earlier half to the later one.
    unseen = (3 + recompute) * 4 * d.num_heads * d.head_dim * (2 * (d.num_layers - 1) + 0.75) * rows * latents**2
    return found + waves + inputs + unseen


CHANGES = [{}, {"patch_size": 2}, {"act": "gelu", "attention": "causal"}, {"expand_ratio": 3, "head_dim": 16, "rope_dim": 12, "emb_dim": 96}]


@stages
@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_operations_are_what_torch_counts(stage, changes):
    config, rows, length = preset("tiny", block_size=4, **changes), 3, 32
    assert round(sum(training_flops(config, length, stage, DENSE, rows).values()) * rows * length) == counted_flops(stage, config, rows, length)


@pytest.mark.parametrize("attention", ["block_causal", "causal", "bidirectional"])
def test_pairs_are_what_the_masks_permit(attention):
    config, n = preset("tiny", block_size=4, attention=attention), 48
    d, v = config.dit, config.vae
    permitted, dense = (training_flops(config, n, STAGES["joint"], plan) for plan in (StepPlan(skip_clean=False), DENSE))
    assert permitted["pairs"] * n == pytest.approx(12 * d.num_layers * d.dim * two_copy_mask(n, 4).sum().item())
    less = n * n - attention_mask(attention, n, 4).sum().item()
    assert (dense["decoder"] - permitted["decoder"]) * n == pytest.approx(2 * 12 * v.decoder_num_blocks * v.dim * less)


@stages
def test_recomputed_blocks_are_what_torch_counts(stage):
    config = preset("tiny", block_size=4)
    once, again = (counted_flops(stage, config, 2, 16, recompute) for recompute in (False, True))
    told = [sum(training_flops(config, 16, stage, replace(DENSE, recompute=recompute), 2).values()) * 32 for recompute in (False, True)]
    assert round(told[1] - told[0]) == again - once > 0


def test_a_clean_copy_in_the_last_layer_costs_what_it_does():
    "A layer, of which only the projections of the clean copy are needed, and the last projection, by hand."
    config, n = preset("tiny"), 16
    w = config.dit.dim
    told = [training_flops(config, n, STAGES["prior"], StepPlan(skip_clean=skip)) for skip in (True, False)]
    more = {name: told[1][name] - told[0][name] for name in told[0]}
    assert more == {"projections": 6 * w * w, "pairs": 12 * w * (n + 2) / 2, "feed_forward": 6 * 8 * w * w, "modulation": 0, "ends": 6 * 16 * w, "encoding": 0}


def test_modulation_at_every_position_is_what_torch_counts():
    config, n = preset("tiny", block_size=4), 16
    with torch.device("meta"):
        dit = DiT(config.dit)
        with FlopCounterMode(display=False) as counter:
            dit.modulations(torch.empty(2 * n))
    told = training_flops(config, n, STAGES["prior"], StepPlan(modulation_per_token=True, skip_clean=False))["modulation"]
    assert told * n == 3 * counter.get_total_flops()


def test_the_full_size_costs_what_is_known_of_it():
    prior = lambda plan: sum(count for part, count in training_flops(FULL, 512, Stage2Config(), plan).items() if part != "encoding") / 1e9
    assert f"{prior(StepPlan(skip_clean=False)):.1f}" == "14.8"
    # AdaLN at every position of both copies, and attention over a flattened batch of four rows, which no mask shortens.
    assert f"{prior(StepPlan(skip_clean=False, modulation_per_token=True, dense_rows=4)):.1f}" == "26.8"
    assert f"{sum(training_flops(FULL, 512, Stage1Config()).values()) / 1e9:.2f}" == "4.25"
    joint = training_flops(FULL, 512, Stage2Config(vae_lr_ratio=1.0), StepPlan(skip_clean=False))
    assert f"{14.8 + 4.25 + round(joint['reference'] / 1e9, 2):.2f}" == "19.25"
    assert sum(joint.values()) / 1e9 == pytest.approx(19.25, rel=1e-3)
    mask = two_copy_mask(512, 16)
    assert f"{mask.float().mean():.0%}" == "26%" and mask.unfold(0, 128, 128).unfold(1, 128, 128).any(-1).any(-1).float().mean() == 0.375


# Bytes


class Kept:
    "Every storage that autograd keeps, but those of the weights."

    def __init__(self, *modules):
        self.own = {p.untyped_storage().data_ptr() for module in modules for p in module.parameters()}
        self.storages = {}

    def __call__(self, x):
        if (storage := x.untyped_storage()).data_ptr() not in self.own:
            self.storages[storage.data_ptr()] = storage
        return x

    def bytes(self):
        return sum(storage.nbytes() for storage in self.storages.values())


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    "Under autocast, norms in fp32 and sums of products in the widest type, as CUDA's autocast has it; no kept sigmoid, no halves of attention."
    norm, addcmul = F.layer_norm, torch.addcmul

    def widest(*parts, **more):
        wide = any(part.dtype == torch.float32 for part in parts)
        return addcmul(*(part.float() if wide else part for part in parts), **more)

    monkeypatch.setattr(F, "layer_norm", lambda x, *args, **more: norm(x.float(), *args, **more))
    monkeypatch.setattr(torch, "addcmul", widest)
    monkeypatch.setattr("cola_tutorial.dit.gelu_tanh", partial(F.gelu, approximate="tanh"))
    monkeypatch.setattr("cola_tutorial.dit.Sight", lambda *given, cut, **more: Sight(*given, **more))


@stages
@pytest.mark.parametrize("changes", [{}, {"patch_size": 2}, {"post_norm": False}, {"act": "gelu", "qk_norm": False}], ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_are_what_autograd_keeps(stage, changes, precision, as_on_a_gpu):
    "Logits apart: their log-probabilities are kept in fp32, once for each pass of the decoder."
    config, rows, length = preset("tiny", block_size=4, **changes), 4, 128
    stage = replace(stage, precision=precision)
    torch.manual_seed(3)
    vae, dit = TextVAE(config.vae), DiT(config.dit)
    tokens = torch.randint(config.vae.vocab_size, (rows, length))
    with saved_tensors_hooks(kept := Kept(vae, dit), lambda x: x), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        terms(stage, vae, dit, tokens)
    trained = isinstance(stage, Stage1Config) or stage.vae_lr_ratio > 0
    logits = 4 * config.vae.vocab_size * rows * length * (1 + (stage.lambda_mask > 0)) * trained
    told = training_memory(config, length, stage, rows=rows)
    assert told["activations"] + told["copies"] == pytest.approx(kept.bytes() - logits, rel=0.04)


@stages
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_state_is_what_a_trainer_holds(stage, optimizer):
    config, stage = preset("tiny"), replace(stage, optimizer=optimizer)
    vae, dit = TextVAE(config.vae), DiT(config.dit)
    prior = isinstance(stage, Stage2Config)
    names = ["vae"] if not prior else ["dit", "vae"] if stage.vae_lr_ratio > 0 else ["dit"]
    parts = torch.nn.ModuleDict({name: {"vae": vae, "dit": dit}[name] for name in names})
    optimizers = make_optimizers(parts, stage)
    for p in parts.parameters():
        p.grad = torch.zeros_like(p)
    for optimizer in optimizers:
        optimizer.step()
    size = lambda tensors: sum(4 * x.numel() for x in tensors)
    moments = size(x for optimizer in optimizers for state in optimizer.state.values() for x in state.values() if x.ndim)
    trained, all_of_it = size(parts.parameters()), size([*vae.parameters(), *dit.parameters()])
    reference = size(vae.parameters()) if prior and stage.vae_lr_ratio > 0 and stage.lambda_ref > 0 else 0
    told = training_memory(config, 64, stage)
    assert (told["weights"], told["gradients"], told["held"]) == (trained, trained, all_of_it - trained + reference)
    assert told["moments"] == moments and told["average"] == (trained if stage.ema_decay else 0)


def test_what_is_shared_is_a_share_and_what_is_not_is_not():
    alone, eighth = (training_memory(FULL, 512, STAGES["joint"], rows=4, shards=shards) for shards in (1, 8))
    for name in ("weights", "gradients", "moments", "average"):
        assert eighth[name] == -(-alone[name] // 8)
    for name in ("activations", "logits"):
        assert eighth[name] == alone[name]
    words = parameter_parts(FULL)
    assert alone["held"] > eighth["held"] > 4 * (words["words_in"] + words["vocabulary"])  # the reference's tables are nobody's share


def test_logits_do_not_grow_with_the_tokens_unless_all_are_there_at_once():
    logits = lambda most, rows: training_memory(FULL, 512, Stage1Config(), StepPlan(most_logits=most), rows)["logits"]
    assert logits(2**27, 4) == logits(2**27, 64) == 2 * 4 * 2**27 + 2 * 4 * 100_278 * 1536
    assert logits(None, 64) == 32 * logits(None, 2) == 16 * 64 * 512 * 100_278
    assert logits(2**27, 2) == logits(None, 2)  # that few are all there at once anyway
    assert training_memory(FULL, 512, STAGES["prior"])["logits"] == 0


def test_recomputing_keeps_the_stream_of_each_block_and_one_block():
    kept = lambda layers, again: training_memory(preset("tiny", num_layers=layers), 64, STAGES["prior"], StepPlan(recompute=again), 4)["activations"]
    stream = 4 * 128 * 2 * 64 * 4  # bytes of the stream of both copies
    assert kept(9, True) - kept(5, True) == 4 * stream
    assert kept(1, True) > stream and kept(9, True) < kept(9, False) / 4


@stages
@pytest.mark.parametrize("memory, more", [(80e9, {}), (141e9, {"shards": 8}), (20e9, {"plan": StepPlan(recompute=True, most_logits=None)})])
def test_one_row_more_does_not_fit(stage, memory, more):
    rows = largest_batch(FULL, 512, stage, memory, **more)
    used = [sum(training_memory(FULL, 512, stage, rows=r, **more).values()) for r in (rows or 1, rows + 1)]
    assert used[1] > 0.9 * memory and (used[0] <= 0.9 * memory) == (rows > 0)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: training_flops(FULL, 500, Stage1Config()), "length is 500, but must be a multiple of 16"),
        (lambda: training_memory(FULL, 0, Stage1Config()), "length is 0"),
        (lambda: cost_report(FULL, optimizer="sgd"), "optimizer is 'sgd'"),
        (lambda: training_memory(FULL, 512, Stage1Config(), shards=0), "shards is 0"),
        (lambda: training_memory(FULL, 512, Stage1Config(), rows=0), "rows is 0"),
        (lambda: StepPlan(most_logits=0), "most_logits is 0"),
        (lambda: StepPlan(dense_rows=-1), "dense_rows is -1"),
        (lambda: largest_batch(FULL, 512, Stage1Config(), 0), "memory is 0"),
        (lambda: largest_batch(FULL, 512, Stage1Config(), 1e9, spare=1), "spare is 1"),
        (lambda: cost_report(FULL, tokens=1e9), "give tflops"),
        (lambda: cost_report(FULL, tflops=1, share=0), "share is 0"),
    ],
)
def test_what_cannot_be_asked_is_named(call, words):
    with pytest.raises(ConfigError, match=words):
        call()


# The report


def test_a_report_guesses_no_speed_and_estimates_one_from_a_rate():
    silent, told = (cost_report(preset("tiny"), rows=2, world_size=4, **more) for more in ({}, {"tflops": 100.0, "share": 0.5, "tokens": 1e9}))
    assert "tokens_per_second" not in silent["stages"]["prior"] and not [line for line in report_lines(silent) if "second" in line]
    one = told["stages"]["prior"]
    assert one["tokens_per_second"] == pytest.approx(4 * 50e12 / sum(one["flops_per_token"].values()))
    assert one["days"] * 86_400 * one["tokens_per_second"] == pytest.approx(1e9)
    assert one["step_flops"] == pytest.approx(sum(one["flops_per_token"].values()) * 2 * 4 * 512)
    columns = [line for line in report_lines(told) if "together" in line or "days" in line]
    assert len({len(line) for line in columns[1:]}) == 1  # aligned


def test_info_tells_it_all_before_anything_is_allocated(tmp_path):
    done = run("info", "--preset", "full", "--world-size", 8, "--rows", 4, "--tflops", 790, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["parameters"] == {"vae": 501_871_574, "dit": 1_829_875_728} and sum(told["parts"].values()) == 2_331_747_302
    assert told["stages"] == cost_report(FULL, rows=4, world_size=8, tflops=790.0)["stages"]
    for words in ("GFLOP per token", "GB per process", "rows that fit into 141 GB", "tokens per second"):
        assert words in done.stdout


@pytest.mark.parametrize(
    "options, words",
    [
        ({"preset": "500"}, "a multiple of 128 from 128 to 2048"),
        ({"size": "tiny", "preset": "full"}, "--size and --preset each name a model"),
        ({"gpu": "80,much"}, "gpu is '80,much'"),
        ({"world_size": 0}, "world_size is 0"),
    ],
)
def test_info_names_mistakes_in_one_line(options, words, capsys):
    with pytest.raises(SystemExit) as end:
        info(**options)
    said = capsys.readouterr()
    assert end.value.code == 2 and words in said.err and said.err.count("\n") == 1 and not said.out
