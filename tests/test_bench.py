"What is counted is counted right, what is wrong gets no time, and the command says what it does not know. No test looks at a time."

import json
import sys
import types
from dataclasses import replace

import pytest
import torch
from test_cli import run
from test_generation import PLAIN, prompt, small
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cola_tutorial.bench import (
    BenchConfig,
    DisagreementError,
    bench_generation,
    bench_model,
    candidates,
    check_agreement,
    generation_flops,
    load_adapter,
    quartiles,
    time_in_turns,
)
from cola_tutorial.config import ConfigError, SpeedConfig, preset
from cola_tutorial.generation import read_prompts, write_blocks
from cola_tutorial.plain import NO_WASTE, SAVINGS, Waste, ladder, write_plainly

CPU = torch.device("cpu")
QUICK = BenchConfig(batches=(1, 2), prompt_tokens=6, new_tokens=7, steps=2, guidance_scale=2.0, repeats=2)
NAMES = ["straightforward", *SAVINGS.values(), "the package's, nothing saved", "+ one_forward", "+ merge_commit"]


def counted(call):
    "What torch's own counter finds; it knows attention in its plain form only."
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "waste, scale, vae",
    [(waste, 3.0, {}) for _, waste in ladder()]
    + [(waste, 1.0, vae) for waste in (Waste(), NO_WASTE) for vae in ({}, {"patch_size": 2}, {"act": "gelu", "attention": "causal"})],
)
def test_arithmetic_is_what_torch_counts(waste, scale, vae):
    model, config = small(**vae), replace(PLAIN, guidance_scale=scale)
    read = read_prompts(model, [prompt(length, seed) for seed, length in enumerate((9, 2, 16))])
    found = generation_flops(model.config, read.whole, 3, PLAIN.steps, scale, waste)
    assert found == counted(lambda: list(write_plainly(model, read, config, 3, range(3), waste=waste)))


def test_full_size_costs_what_its_weights_say():
    "One step of one row costs twice the weights that it meets, of AdaLN apart, and its attention."
    config = preset("full")
    near, far = (generation_flops(config, [512], 1, steps, 1.0) for steps in (16, 17))
    weights = 2 * 16 * 2048 + 24 * 12 * 2048**2  # of the prior that every position meets
    time = 256 * 2048 + 2 * 2048**2 + (6 * 24 + 2) * 2048**2  # met once for each time of the grid
    assert far - near == 2 * (16 * weights + time) + 4 * 16 * (512 + 16) * 24 * 2048


def test_quartiles_and_turns():
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = time_in_turns(runs, 3, CPU)
    assert calls == list("abcabcabc") and [len(times[name]) for name in "abc"] == [3, 3, 3]
    assert quartiles(torch.arange(101).numpy()) == (25.0, 50.0, 75.0)


def test_a_benchmark_model_feels_every_weight_and_is_the_same_each_time():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    model, again = bench_model("tiny"), bench_model("tiny")
    assert torch.equal(torch.get_rng_state(), before)  # the caller's numbers are not disturbed
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    assert all(weight.any() for weight in model.parameters())
    assert bench_model("tiny", block_size=8).config.dit.block_size == 8
    first, other = (next(write_plainly(model, read_prompts(model, [[word, 5]]), PLAIN, 1, [0])).latents for word in (3, 4))
    assert (first - other).abs().max() > 1e-2 * first.abs().max()  # the history is felt a hundred times more than is let pass


def test_a_model_is_read_and_its_block_changed(tmp_path):
    saved = small()
    saved.save_pretrained(tmp_path / "model")
    model = bench_model(folder=tmp_path / "model", block_size=2)
    assert model.config.vae.block_size == model.config.dit.block_size == 2
    for name, weight in saved.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name


@pytest.mark.parametrize("options, word", [({"size": "huge"}, "huge"), ({"folder": "nowhere"}, "nowhere"), ({"block_size": 0}, "block_size is 0")])
def test_a_model_that_cannot_be_made_is_named(options, word):
    with pytest.raises(ValueError, match=word):
        bench_model(**options)


@pytest.mark.parametrize("config", [QUICK, replace(QUICK, guidance_scale=1.0, dtype="bf16")], ids=["fp32", "bf16"])
def test_every_rung_is_there_and_the_file_is_json(config, tmp_path):
    said, path = [], tmp_path / "result.json"
    result = bench_generation(small(), config, report=said.append, path=path, edges=(16,), megabytes=1, machine="this one")
    refuse = lambda word: pytest.fail(f"{word} is no JSON")
    assert json.loads(path.read_text(), parse_constant=refuse) == json.loads(json.dumps(result)) and result["machine"] == "this one"
    assert [one["batch"] for one in result["batches"]] == [1, 2] and result["options"]["repeats"] == 2
    for one in result["batches"]:
        assert [row["name"] for row in one["rows"]] == NAMES + (["+ bf16"] if config.dtype == "bf16" else [])
        assert one["rows"][0]["ratio"] == 1.0 and one["rows"][0]["difference"] == 0.0
        # 6 tokens: one block of history, two tokens in the first block written, and 7 more
        assert one["blocks"] == 3 and one["needed_block_flops"] * 3 == generation_flops(small().config, [4] * one["batch"], 3, 2, config.guidance_scale)
        for row in one["rows"]:
            assert row["block_flops"] >= one["needed_block_flops"] and row["tokens_per_s"] > 0
            assert row["difference"] < 1e-4 and row["equal_tokens"] == 1.0 or row["dtype"] == "bf16"
        assert one["rows"][len(SAVINGS)]["block_flops"] == one["rows"][-1]["block_flops"] == one["needed_block_flops"]
    text = "\n".join(said)
    assert "copy: " in text and "batch 2, 3 blocks" in text and all(name in text for name in NAMES)


def test_the_packages_savings_are_switched_on_one_by_one(monkeypatch):
    "Each row asks `write_blocks` for one saving more, compiled only where asked."
    asked = []
    real = write_blocks
    monkeypatch.setattr("cola_tutorial.bench.write_blocks", lambda *args, speed: asked.append(speed) or real(*args))
    model = small()
    read, noise = read_prompts(model, [prompt(3)]), [torch.zeros(1, 4, 4)]
    ours = candidates(model, replace(QUICK, compile=True))[1 + len(SAVINGS) :]
    for one in ours:
        one.write(read, PLAIN, 1, noise)
    assert [one.name for one in ours] == NAMES[-3:] + ["+ compile"]
    wanted = [dict(one_forward=False, merge_commit=False), dict(merge_commit=False), {}, dict(compile=True)]
    assert asked == [SpeedConfig(**switches) for switches in wanted]
    last = candidates(model, replace(QUICK, capture=True))[-1]
    assert last.name == "+ capture"
    with pytest.raises(ConfigError, match="^capture is True"):
        list(real(model, read, PLAIN, 1, [0], noise, SpeedConfig(capture=True)))


@pytest.fixture
def adapters(monkeypatch):
    "Functions that Python finds in a module `borrowed`."

    def made(change):
        def make(model, device, dtype):
            assert device == CPU and dtype in (torch.float32, torch.bfloat16)

            def write(prompts, config, blocks, noise):
                done = list(write_plainly(model, prompts, config, blocks, range(len(prompts.whole)), noise, NO_WASTE))
                return change([b.latents for b in done], torch.cat([b.tokens for b in done], 1))

            return write

        return make

    module = types.ModuleType("borrowed")
    module.right = made(lambda latents, tokens: (latents, tokens))
    module.shifted = made(lambda latents, tokens: ([z + 1e-3 * z.abs().max() for z in latents], tokens))
    module.unknown = made(lambda latents, tokens: ([z * float("nan") for z in latents], tokens))
    module.other = made(lambda latents, tokens: (latents, (tokens + 1) % 13))
    module.short = made(lambda latents, tokens: (latents[:-1], tokens))
    # The first block repeats two tokens of the prompt: what an adapter puts there does not count.
    module.opening = made(lambda latents, tokens: (latents, torch.cat([tokens[:, :2] * 0, tokens[:, 2:]], 1)))
    monkeypatch.setitem(sys.modules, "borrowed", module)


@pytest.mark.parametrize("name", ["right", "opening"])
def test_an_adapter_that_agrees_is_a_row(name, adapters):
    result = bench_generation(small(), QUICK, f"borrowed:{name}", report=lambda line: None, edges=(16,), megabytes=1)
    row = result["batches"][-1]["rows"][-1]
    assert row["name"] == f"borrowed:{name}" and row["block_flops"] is None and row["equal_tokens"] == 1.0


@pytest.mark.parametrize(
    "name, message",
    [("shifted", "latents differ by 1"), ("unknown", "latents differ by nan"), ("other", "tokens differ"), ("short", "shapes")],
)
def test_an_adapter_that_writes_something_else_gets_no_time(name, message, adapters, monkeypatch):
    monkeypatch.setattr("cola_tutorial.bench.time_in_turns", lambda *_: pytest.fail("something was timed"))
    with pytest.raises(DisagreementError, match=f"^borrowed:{name}: .*{message}"):
        bench_generation(small(), QUICK, f"borrowed:{name}", report=lambda line: None, edges=(16,), megabytes=1)


def test_only_a_tie_excuses_another_token():
    model = small()
    (block,) = write_plainly(model, read_prompts(model, [prompt(3)]), PLAIN, 1, [0])
    second = block.logits.topk(2).indices[..., 1]
    with pytest.raises(DisagreementError, match="4 of 4 tokens differ"):
        check_agreement("x", ([block.latents], second), [block])
    tied = replace(block, logits=block.logits.scatter(-1, second[..., None], block.logits.amax(-1, keepdim=True)))
    assert check_agreement("x", ([block.latents], second), [tied])["ties"] == 4
    third = block.logits.topk(3).indices[..., 2]
    with pytest.raises(DisagreementError, match="4 of 4 tokens differ"):
        check_agreement("x", ([block.latents], third), [tied])
    told = check_agreement("x", ([block.latents + 1], third), [block], required=False)
    assert told["difference"] > 1e-4 and told["equal_tokens"] == 0.0


@pytest.mark.parametrize("spec", ["borrowed", "borrowed:", ":right", "nowhere_at_all:make", "borrowed:missing"])
def test_an_adapter_that_is_not_there_is_named(spec, adapters):
    with pytest.raises(ConfigError, match="^adapter "):
        load_adapter(spec, small())


@pytest.mark.parametrize(
    "change",
    [
        {"batches": ()}, {"batches": (1, 0)}, {"prompt_tokens": 0}, {"new_tokens": -1}, {"repeats": 0}, {"dtype": "fp8"}, {"steps": 0},
        {"guidance_scale": float("nan")}, {"repeats": 2.5},
    ],
    ids=str,
)  # fmt: skip
def test_options_out_of_range_are_named(change):
    with pytest.raises(ConfigError, match=f"^{next(iter(change)).replace('batches', 'batch')} is "):
        replace(QUICK, **change)


@pytest.mark.parametrize(
    "args, words",
    [
        (["reading"], "what is 'reading', but must be generation or training"),
        (["training", "--stage", "stage3"], "stage is 'stage3'"),
        (["training", "--length", "127"], "length is 127, but must be a multiple of 2 tokens"),
        (["--batch", "1,two"], "batch is '1,two'"),
        (["--threads", "0"], "threads is 0"),
        (["--adapter", "nowhere"], "adapter is 'nowhere'"),
        (["--json", "no/such/folder.json"], "no/such/folder.json"),
    ],
)
def test_the_command_names_mistakes_in_one_line(args, words, tmp_path):
    done = run("bench", *args, cwd=tmp_path)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_the_command_measures_a_model_against_an_adapter(tmp_path):
    small().save_pretrained(tmp_path / "model")
    (tmp_path / "borrowed.py").write_text(
        "import torch\nfrom cola_tutorial.generation import write_blocks\n"
        "def make(model, device, dtype):\n"
        "    def write(prompts, config, blocks, noise):\n"
        "        done = list(write_blocks(model, prompts, config, blocks, range(len(prompts.whole)), noise))\n"
        "        return [b.latents for b in done], torch.cat([b.tokens for b in done], 1)\n"
        "    return write\n"
    )
    options = "--batch 1,2 --prompt-tokens 6 --new-tokens 4 --steps 2 --repeats 2 --threads 1 --adapter borrowed:make --json out.json"
    done = run("bench", "generation", "--model", "model", *options.split(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert [row["name"] for row in result["batches"][1]["rows"]] == [*NAMES, "borrowed:make"]
    assert result["environment"]["torch"] == torch.__version__ and "torch" in done.stdout and "borrowed:make" in done.stdout


def test_waste_is_counted_as_what_it_is():
    "More is never less, and two branches of guidance cost the same in one forward or in two."
    config = small().config
    flops = [generation_flops(config, [8, 4], 3, 4, 2.0, waste) for _, waste in ladder()]
    assert flops == sorted(flops, reverse=True) and flops[0] == flops[1] > flops[2] > flops[5] > flops[6]
    assert generation_flops(config, [8, 4], 3, 4, 2.0, Waste()) == flops[0] and flops[-1] == generation_flops(config, [8, 4], 3, 4, 2.0)
