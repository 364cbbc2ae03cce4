"""The released numerics: random weights, outputs of the released implementation, commit 6752ff1, fp32."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from cola_tutorial.config import GenerationConfig, dit_from_released, vae_from_released
from cola_tutorial.dit import DiT
from cola_tutorial.flow import bridge
from cola_tutorial.generation import generate, read_prompts, write_blocks
from cola_tutorial.model import ColaDLM
from cola_tutorial.vae import TextVAE

FIXTURES = Path(__file__).parent / "fixtures"


def close(ours, theirs, tolerance=1e-4):
    assert ours.shape == theirs.shape
    error = (ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-6)
    assert error < tolerance, f"relative error {error:.2e}"


def load(part, name):
    folder = FIXTURES / name / f"cola_{part}"
    config = json.loads((folder / "config.json").read_text())
    module = TextVAE(vae_from_released(config)) if part == "vae" else DiT(dit_from_released(config))
    module.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    return module.eval()


@pytest.fixture(scope="module", params=["tiny", "tiny_patch2"])
def fixture(request):
    reference = load_file(FIXTURES / request.param / "reference.safetensors")
    return load("vae", request.param), load("dit", request.param), reference


@torch.no_grad()
def test_encoder_agrees(fixture):
    vae, _, reference = fixture
    for i in range(3):
        posterior = vae.encode(reference[f"encode.input_ids.{i}"][None])
        close(posterior.mean[0], reference[f"encode.mean.{i}"])
        close(posterior.logvar[0], reference[f"encode.logvar.{i}"])


@torch.no_grad()
def test_decoder_agrees(fixture):
    vae, _, reference = fixture
    for i in range(3):
        close(vae.decode(reference[f"decode.z.{i}"][None])[0], reference[f"decode.logits.{i}"])


@torch.no_grad()
def test_velocity_agrees_with_a_time_for_every_position(fixture):
    _, dit, reference = fixture
    for i in range(3):
        t = reference[f"dit.timestep.{i}"][None] / 1000
        close(dit(reference[f"dit.z.{i}"][None], t)[0], reference[f"dit.velocity.{i}"])


@torch.no_grad()
def test_two_copy_training_agrees(fixture):
    _, dit, reference = fixture
    z_0, z_1, t = (reference[f"train.{k}"] for k in ("z0", "z1", "t"))
    z_t, u = bridge(z_0, z_1, t)
    velocity = dit.two_copy_velocity(z_0, z_t, t)
    close(velocity, reference["train.velocity"])
    close((velocity - u).pow(2).mean(), reference["train.fm_loss"])


@pytest.mark.parametrize("name", ["tiny", "tiny_patch2"])
def test_generation_agrees(name):
    model = ColaDLM.from_pretrained(FIXTURES / name)
    path = FIXTURES / name / "reference.safetensors"
    reference = load_file(path)
    with safe_open(path, framework="pt") as file:
        settings = file.metadata()
    model.config = replace(model.config, pad_id=int(settings["pad_token_id"]))
    blocks = sum(key.startswith("generate.noise") for key in reference)
    config = GenerationConfig(steps=int(settings["timestep_num"]), guidance_scale=float(settings["guidance_scale"]))
    tokens = [reference[f"generate.prompt_ids.{i}"].tolist() for i in range(3)]
    noise = [reference[f"generate.noise.{b}"] for b in range(blocks)]
    written = list(write_blocks(model, read_prompts(model, tokens), config, blocks, [0, 1, 2], noise))
    for b, block in enumerate(written):
        close(block.latents, reference[f"generate.latents.{b}"], 1e-3)
        close(block.logits, reference[f"generate.logits.{b}"], 1e-3)
    result = generate(model, tokens, replace(config, num_blocks=blocks), noise=noise)
    for i in range(3):
        assert result.tokens[i] == reference[f"generate.output_ids.{i}"].tolist()
