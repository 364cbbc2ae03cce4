"The rivals' common ground and the autoregressive one, against loops, counters and a second reading of the same weights."

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cola_tutorial.baselines import AR, Baseline, open_model
from cola_tutorial.config import BASELINES, BaselineConfig, BaselineTraining, ConfigError, GenerationConfig, ScaleConfig, baseline_for, data_dir, preset
from cola_tutorial.costs import StepPlan, training_flops
from cola_tutorial.generation import PromptError
from cola_tutorial.model import ColaDLM, ModelFileError
from cola_tutorial.objectives import Noise
from cola_tutorial.text.corpus import load_tokenizer
from cola_tutorial.training import RunConfig, Trainer, prepare, read_run, train

SMALL = dict(dim=32, num_heads=2, head_dim=16, num_layers=2, ffn_dim=48)


@pytest.fixture
def model() -> AR:
    "A small model with random weights that are not tiny, so that its likeliest tokens differ."
    torch.manual_seed(5)
    made = Baseline.make(BaselineConfig(vocab_size=40, **SMALL)).eval()
    with torch.no_grad():
        for p in made.parameters(): p.mul_(4.0 if p.ndim > 1 else 1.0)
    return made


def loss_of(model: AR, tokens: torch.Tensor, document: torch.Tensor) -> float:
    "The model's own loss."
    return model.terms(tokens, document, Noise(), model.totals(document, Noise()))["loss"].item()


# Sizes


@pytest.mark.parametrize("size", ["tiny", "small", "512", "1024", "full"])
def test_the_core_is_that_of_the_prior(size: str) -> None:
    "Parameters inside blocks are within half a block of the prior's, counted from the modules themselves."
    cola = preset(size)
    with torch.device("meta"): ours, theirs = Baseline.make(baseline_for(cola, "ar")), ColaDLM(cola).dit
    core, prior, block = (sum(p.numel() for p in part.parameters()) for part in (ours.net.blocks, theirs.blocks, ours.net.blocks[0]))
    assert abs(core - prior) <= 0.51 * block
    assert ours.sizes() == {"core": core, "ends": sum(p.numel() for p in ours.parameters()) - core}


@pytest.mark.parametrize(
    "wrong, said",
    [
        (dict(kind="gpt"), "kind is 'gpt'"),
        (dict(num_layers=0), "num_layers is 0"),
        (dict(head_dim=15), "head_dim is 15"),
        (dict(vocab_size=True), "vocab_size is True"),
        (dict(end_id=100_278), "end_id is 100278"),
        (dict(norm_eps=float("nan")), "norm_eps is nan"),
    ],
)
def test_wrong_sizes_are_named(wrong: dict, said: str) -> None:
    "Every field has a range."
    with pytest.raises(ConfigError, match=said): BaselineConfig(**wrong)


def test_a_configuration_of_another_kind_is_refused() -> None:
    "A class takes configurations of its own kind only."
    with pytest.raises(ConfigError, match="kind is 'llada', but this is 'ar'"): AR(BaselineConfig(kind="llada", vocab_size=40, **SMALL))


# Loss


def test_loss_is_the_mean_of_single_predictions(model: AR) -> None:
    "Token by token, each from a row that ends before it."
    torch.manual_seed(0)
    tokens, document = torch.randint(2, 40, (3, 7)), torch.zeros(3, 7, dtype=torch.long)
    document[1, 5:] = -1
    costs = []
    for row, own in zip(tokens, document):
        for i in range(7):
            before = torch.tensor([[model.config.end_id, *row[:i].tolist()]])
            logits = model.net.final_layer(model.net.states(model.net.wte(before), model.net.sight(i + 1, "causal")))[0, -1]
            if own[i] >= 0: costs.append(F.cross_entropy(logits, row[i]).item())
    assert len(costs) == 19
    assert loss_of(model, tokens, document) == pytest.approx(sum(costs) / 19, abs=1e-5)


def test_documents_may_be_kept_apart(model: AR) -> None:
    "With documents given, what comes before one changes nothing in it."
    torch.manual_seed(0)
    tokens, documents = torch.randint(2, 40, (1, 8)), torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])
    other = tokens.clone()
    other[:, :3] = 39
    one, two = (model.states(t, documents)[:, 5:] for t in (tokens, other))
    assert torch.allclose(one, two, atol=1e-6)
    assert not torch.allclose(model.states(tokens)[:, 5:], model.states(other)[:, 5:], atol=1e-3)


@pytest.mark.parametrize("kind", BASELINES)
def test_operations_are_those_that_torch_counts(kind: str) -> None:
    "All products of one step but for attention's, which torch counts as dense and we count as what may be seen."
    torch.manual_seed(0)
    config = baseline_for(preset("tiny", vocab_size=300), kind)
    made, tokens = Baseline.make(config), torch.randint(2, 300, (2, 16))
    document = torch.zeros_like(tokens)
    noise = made.draw(2, 16, torch.Generator().manual_seed(0))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        made.terms(tokens, document, noise, made.totals(document, noise))["loss"].backward()
    told = training_flops(config, 16, BaselineTraining(), StepPlan(dense_rows=1))
    assert counter.get_total_flops() / 32 == pytest.approx(sum(told.values()), rel=0.01)


# Writing


@settings(max_examples=15, deadline=None)
@given(st.lists(st.lists(st.integers(2, 39), min_size=1, max_size=6), min_size=1, max_size=4), st.integers(0, 2**31))
def test_a_row_never_depends_on_its_neighbours(prompts: list[list[int]], seed: int) -> None:
    "Prompts of any lengths, together and alone, sampled and greedy; and greedy is what rows without a memory give."
    torch.manual_seed(5)
    made = Baseline.make(BaselineConfig(vocab_size=40, **SMALL)).eval()
    with torch.no_grad():
        for p in made.parameters(): p.mul_(4.0 if p.ndim > 1 else 1.0)
    seeds = [seed + i for i in range(len(prompts))]
    for config in (GenerationConfig(max_new_tokens=5, temperature=0.8), GenerationConfig(max_new_tokens=5)):
        together = made.generate(prompts, config, seeds)
        assert together.tokens == [made.generate([p], config, [s]).tokens[0] for p, s in zip(prompts, seeds)]
    for prompt, written in zip(prompts, together.tokens):
        row = list(prompt)
        while len(row) < len(prompt) + 5:
            token = made.net.final_layer(made.states(torch.tensor([row + [0]]))[:, -1]).argmax().item()
            if token == made.config.end_id: break
            row.append(token)
        assert written == row[len(prompt) :]


def test_sampled_tokens_follow_the_model(model: AR) -> None:
    "First tokens of many rows have the probabilities that the model gives them (chi-square below its 99.99% point)."
    rows = model.generate(4000, GenerationConfig(max_new_tokens=1, temperature=1.0), range(4000))
    first = torch.tensor([ids[0] if ids else model.config.end_id for ids in rows.tokens])
    law = model.net.final_layer(model.states(torch.zeros(1, 1, dtype=torch.long)))[0, 0].softmax(-1)
    expected, counts = law * 4000, torch.bincount(first, minlength=40)
    large = expected > 5
    assert ((counts - expected)[large] ** 2 / expected[large]).sum() < 85


@pytest.mark.parametrize(
    "asked, config, error",
    [
        ([], {}, PromptError),
        ([[]], {}, PromptError),
        ([[40]], {}, PromptError),
        ([[3] * 20], dict(max_length=20), PromptError),
        (["words"], {}, PromptError),
        ([[3]], dict(num_blocks=2), ConfigError),
        ([[3]], dict(stop=("x",)), ConfigError),
    ],
)
def test_what_cannot_be_written_is_named(model: AR, asked: list, config: dict, error: type) -> None:
    "The same checks as for Cola DLM."
    with pytest.raises(error): model.generate(asked, GenerationConfig(**config))


def test_texts_end_where_they_are_told_to() -> None:
    "At the end token, at a stop string, at the limit."
    tokenizer = load_tokenizer(data_dir() / "pretrained" / "tokenizer.json")
    torch.manual_seed(1)
    made = Baseline.make(BaselineConfig(vocab_size=860, **SMALL), tokenizer).eval()
    with torch.no_grad(): made.net.final_layer.weight.zero_()
    free = made.generate(["Anna lived"], GenerationConfig(max_new_tokens=7, temperature=1.0), [3])
    assert free.reasons == ["length"] and len(free.tokens[0]) == 7
    word = free.texts[0][4:7]
    cut = made.generate(["Anna lived"], GenerationConfig(max_new_tokens=7, temperature=1.0, stop=(word,)), [3])
    assert cut.reasons == ["stop"] and cut.texts[0] == free.texts[0][: free.texts[0].index(word)]
    limit = made.generate(["Anna lived"], GenerationConfig(max_length=5, max_new_tokens=70, temperature=1.0), [3])
    assert len(limit.tokens[0]) == 5 - len(tokenizer.encode("Anna lived", add_special_tokens=False).ids)


# Scores


def test_scores_are_exact_and_add_up(model: AR) -> None:
    "A text costs what the loss says of its tokens and end; a conditional score is the whole minus the prompt."
    torch.manual_seed(0)
    rows = [torch.randint(2, 40, (n,)).tolist() for n in (3, 7, 5, 1)]
    found = model.score([[]] * 4, rows, samples=1, batch_size=3)
    for row, one in zip(rows, found):
        tokens = torch.tensor([row + [model.config.end_id]])
        assert one.value == pytest.approx(-loss_of(model, tokens, torch.zeros_like(tokens)) * (len(row) + 1), abs=1e-4)
        assert one.kind == "exact" and one.low == one.value == one.high and one.tokens == len(row) + 1 and one.samples == 0
    (begun,), (rest,) = model.score([[]], [rows[1][:4]], ended=False), model.score([rows[1][:4]], [rows[1][4:]])
    assert begun.value + rest.value == pytest.approx(found[1].value, abs=1e-4) and rest.tokens == 4


@pytest.mark.parametrize(
    "asked, error",
    [
        (dict(prompts=[[]], continuations=[[3], [4]]), PromptError),
        (dict(prompts=[[]], continuations=[[]], ended=False), PromptError),
        (dict(prompts=[[]], continuations=[[40]]), PromptError),
        (dict(prompts=[[]], continuations=[[3] * 2048]), PromptError),
        (dict(prompts=[[]], continuations=[[3]], samples=0), ConfigError),
        (dict(prompts=[[]], continuations=[[3]], batch_size=0), ConfigError),
    ],
)
def test_what_cannot_be_scored_is_named(model: AR, asked: dict, error: type) -> None:
    "The same checks as for Cola DLM."
    with pytest.raises(error): model.score(**asked)


# Files


def test_a_rival_is_read_as_it_was_written(model: AR, tmp_path: Path) -> None:
    "Weights, settings, and the class by its kind; Cola DLM beside it."
    model.generation = GenerationConfig(top_k=7)
    model.save_pretrained(tmp_path / "m")
    read = open_model(tmp_path / "m")
    assert type(read) is AR and read.config == model.config and read.generation == model.generation and not read.training
    assert all(torch.equal(a, b) for a, b in zip(read.state_dict().values(), model.state_dict().values(), strict=True))
    model.save_pretrained(tmp_path / "m", torch.bfloat16)
    assert type(open_model(data_dir() / "pretrained")) is ColaDLM


@pytest.mark.parametrize("wrong", ["format", "kind", "missing", "cut", "shape"])
def test_a_damaged_folder_is_named(model: AR, tmp_path: Path, wrong: str) -> None:
    "Never half a model."
    folder = model.save_pretrained(tmp_path / "m")
    text, weights = (folder / "config.json").read_text(), folder / "model.safetensors"
    if wrong == "format": (folder / "config.json").write_text(text.replace("rival 1", "rival 9"))
    if wrong == "kind": (folder / "config.json").write_text(text.replace('"ar"', '"gpt"'))
    if wrong == "shape": (folder / "config.json").write_text(text.replace('"ffn_dim": 48', '"ffn_dim": 40'))
    if wrong == "missing": weights.unlink()
    if wrong == "cut": weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(ModelFileError, match="config.json" if wrong in ("format", "kind") else "model.safetensors"): Baseline.from_pretrained(folder)


def test_other_files_are_not_replaced(model: AR, tmp_path: Path) -> None:
    "A folder with something else in it is left alone."
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "letter.txt").write_text("dear")
    with pytest.raises(ModelFileError, match="other files"): model.save_pretrained(tmp_path / "m")


# Training


def small_run(**changes) -> RunConfig:
    "A few steps on a few stories."
    rival = BaselineTraining(steps=6, batch_size=4, save_every=3, log_every=1)
    return replace(RunConfig(kind="ar", stories=60, vocab_size=320, changes=SMALL, rival=rival), **changes)


def test_a_stopped_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    "Weights of a run in one go, and of one that was stopped after three of six steps."
    whole = train(small_run(), tmp_path / "whole", progress=False)
    made, rows, held = prepare(small_run())
    first = Trainer(made, rows, small_run().rival, tmp_path / "parts", held)
    first.run(until=3, progress=False)
    again = train(small_run(), tmp_path / "parts", progress=False)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))
    read = open_model(tmp_path / "parts" / "model")
    assert read.tokenizer is not None and read.generation.max_length == 80
    assert all(torch.equal(a, b) for a, b in zip(read.state_dict().values(), again.state_dict().values(), strict=True))


def test_parts_of_a_batch_add_up(tmp_path: Path) -> None:
    "Micro-batches of one row give the losses of the whole batch."
    one, parts = (train(small_run(scale=ScaleConfig(micro_batch_size=size)), tmp_path / str(size), progress=False) for size in (0, 1))
    for a, b in zip(one.state_dict().values(), parts.state_dict().values(), strict=True): assert torch.allclose(a, b, atol=2e-4)


def test_a_repeating_text_is_learned() -> None:
    "Loss falls to nearly nothing where nothing is left to chance."
    torch.manual_seed(0)
    made = Baseline.make(BaselineConfig(vocab_size=12, **SMALL))
    tokens = torch.arange(16)[None].expand(8, 16) % 5 + 2
    rows = Dataset.from_dict({"tokens": tokens.tolist(), "document": [[0] * 16] * 8}).with_format("torch")
    config = BaselineTraining(steps=60, batch_size=8, learning_rate=1e-2, warmup_steps=5)
    history = Trainer(made, rows, config).run(progress=False)
    assert history[0]["loss"] > 2.0 and history[-1]["loss"] < 0.05


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(kind="gpt"), "kind is 'gpt'"),
        (dict(changes={"latent_dim": 4}), "baseline field is 'latent_dim'"),
        (dict(scale=ScaleConfig(flex=True)), "scale.flex is True"),
    ],
)
def test_wrong_runs_are_named(changes: dict, said: str, tmp_path: Path) -> None:
    "Before anything is written."
    with pytest.raises(ConfigError, match=said): train(small_run(**changes), tmp_path / "run", progress=False)
    with pytest.raises(ConfigError, match="stages is"): train(small_run(), tmp_path / "run", ("stage1",), progress=False)


def test_a_rival_draws_its_tokens_unless_told_otherwise() -> None:
    "Greedy writing is for Cola DLM, whose chance lies in its latents."
    assert RunConfig(kind="ar").generation == GenerationConfig(temperature=1.0) != RunConfig().generation
    assert RunConfig(kind="ar", generation=GenerationConfig(top_k=3)).generation == GenerationConfig(top_k=3)


def test_the_record_of_a_run_is_read_back(tmp_path: Path) -> None:
    "run.json of a rival is a recipe."
    train(small_run(), tmp_path / "run", progress=False)
    assert asdict(read_run(tmp_path / "run" / "run.json")) == asdict(small_run())
