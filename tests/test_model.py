"A saved model comes back bit for bit, a damaged one is named, and a failing save leaves the old one."

import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from cola_tutorial import model as model_module
from cola_tutorial.config import ColaConfig, ConfigError, DiTConfig, GenerationConfig, VAEConfig
from cola_tutorial.generation import generate
from cola_tutorial.model import ColaDLM, ModelFileError, from_pretrained, save_pretrained, whole_file, whole_folder
from cola_tutorial.text.corpus import train_tokenizer

VERSE = "Tyger Tyger, burning bright, in the forests of the night."


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([VERSE], 270)


def small(tokenizer=None, seed=0, vocab_size=270, vae=None, **settings):
    "A model small enough to write a hundred times."
    torch.manual_seed(seed)
    sizes = dict(vocab_size=vocab_size, dim=16, ffn_dim=16, num_heads=2, encoder_num_blocks=1, decoder_num_blocks=1)
    vae = VAEConfig(**sizes | dict(latent_dim=4, block_size=2) | (vae or {}))
    dit = DiTConfig(
        latent_dim=4, dim=16, emb_dim=8, num_heads=2, head_dim=8, expand_ratio=2, num_layers=1, rope_dim=4, block_size=2
    )
    return ColaDLM(ColaConfig(vae, dit, pad_id=0, end_id=1), tokenizer, **settings)


@pytest.fixture
def folder(tmp_path, tokenizer):
    "A saved model."
    return save_pretrained(small(tokenizer), tmp_path / "model")


def same_weights(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


CHOICES = [
    {},
    {"attention": "causal", "patch_size": 2},
    {"attention": "bidirectional", "log_snr": 1.5},
    {"qk_norm": False, "layer_norm_affine": False, "bias": False, "post_norm": False, "act": "gelu", "clip_qkv": 2.0},
]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_a_saved_model_comes_back_bit_for_bit(tmp_path, tokenizer, choice):
    model = small(tokenizer, vae=choice, generation=GenerationConfig(steps=5, guidance_scale=3.0, seed=7))
    back = from_pretrained(save_pretrained(model, tmp_path / "deep" / "model"))
    assert same_weights(model, back) and back.config == model.config and back.generation == model.generation
    assert not back.training and back.tokenizer.to_str() == tokenizer.to_str()
    assert back.sizes() == {
        "vae": sum(p.numel() for p in model.vae.parameters()),
        "dit": sum(p.numel() for p in model.dit.parameters()),
    }


def test_half_precision_is_stored_as_it_is_and_read_as_asked(tmp_path):
    model = small().to(torch.bfloat16)
    folder = save_pretrained(model, tmp_path / "half")
    assert load_file(folder / "cola_dit" / "model.safetensors")["txt_in.proj.weight"].dtype == torch.bfloat16
    assert same_weights(from_pretrained(folder, dtype=torch.bfloat16), model)
    assert same_weights(from_pretrained(folder), model.float())
    rounded = save_pretrained(small(), tmp_path / "rounded", dtype=torch.bfloat16)
    assert same_weights(from_pretrained(rounded, dtype=torch.bfloat16), small().to(torch.bfloat16))


def test_a_model_without_tokenizer_keeps_its_special_ids(tmp_path):
    model = small()
    model.config = replace(model.config, pad_id=5, end_id=9)
    back = from_pretrained(save_pretrained(model, tmp_path / "model"))
    assert back.tokenizer is None and (back.config.pad_id, back.config.end_id) == (5, 9)


JSON_FILES = ["cola_vae/config.json", "cola_dit/config.json", "generation.json"]
WEIGHT_FILES = ["cola_vae/model.safetensors", "cola_dit/model.safetensors"]


@pytest.mark.parametrize("name", [*JSON_FILES[:2], *WEIGHT_FILES])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ModelFileError, match=f"{name} is missing"):
        from_pretrained(folder)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ModelFileError, match="nowhere is no folder"):
        from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize("content", [b"", b'{"dim": 16', b"\xff\xfe{}", b"[1, 2]", b"3"])
def test_a_broken_json_file_is_named(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(ModelFileError, match=name):
        from_pretrained(folder)


@pytest.mark.parametrize("settings", [{"steps": 0}, {"stepps": 3}, {"top_p": "all"}])
def test_generation_settings_that_cannot_be_are_named(folder, settings):
    (folder / "generation.json").write_text(json.dumps(settings))
    with pytest.raises(ModelFileError, match=f"generation.json.*{next(iter(settings))}"):
        from_pretrained(folder)


@pytest.mark.parametrize(
    "name, field, value",
    [
        ("vae", "dim", 17),
        ("vae", "act", "relu"),
        ("vae", "post_norm", "yes"),
        ("dit", "heads", 0),
        ("dit", "patch_size", 2),
    ],
)
def test_sizes_that_cannot_be_are_named(folder, name, field, value):
    path = folder / f"cola_{name}" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(ModelFileError, match=f"cola_{name}/config.json: {'num_heads' if field == 'heads' else field}"):
        from_pretrained(folder)


@pytest.mark.parametrize("name", WEIGHT_FILES)
@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
def test_cut_weights_are_named(folder, name, keep):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(ModelFileError, match=f"{name} is damaged"):
        from_pretrained(folder)


@pytest.mark.parametrize("name", WEIGHT_FILES)
def test_a_foreign_file_is_named(folder, name):
    (folder / name).write_bytes(b"\x80\x04\x95 not a safetensors file at all, but bytes of another kind")
    with pytest.raises(ModelFileError, match=f"{name} is damaged"):
        from_pretrained(folder)


@pytest.mark.parametrize("name", WEIGHT_FILES)
@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_weights_that_do_not_fit_are_named_one_by_one(folder, name, change):
    weights = load_file(folder / name)
    first = sorted(weights)[0]
    if change == "missing":
        del weights[first]
    elif change == "unknown":
        weights["surplus.weight"] = torch.zeros(1)
    else:
        weights[first] = torch.zeros(*weights[first].shape, 2)
    save_file(weights, folder / name)
    words = {
        "missing": f"{first} is missing",
        "unknown": "surplus.weight is unknown",
        "shape": f"{first} has shape .*2\\), not",
    }
    with pytest.raises(ModelFileError, match=f"{name} does not fit.*{words[change]}"):
        from_pretrained(folder)


def test_a_broken_tokenizer_is_named(folder):
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json"):
        from_pretrained(folder)


def test_a_tokenizer_that_does_not_fit_is_refused(tokenizer):
    with pytest.raises(ConfigError, match="the tokenizer has 270 tokens, but the VAE only 269"):
        small(tokenizer, vocab_size=269)
    config = replace(small().config, pad_id=3)
    with pytest.raises(ConfigError, match="pad and end ids are \\(0, 1\\), but the configuration says \\(3, 1\\)"):
        ColaDLM(config, tokenizer)


@pytest.mark.parametrize("failing_call", [1, 2])
def test_a_failing_save_leaves_the_old_model_and_nothing_else(folder, monkeypatch, failing_call):
    calls, original = [], save_file

    def full_disk(*args, **kwargs):
        calls.append(1)
        if len(calls) == failing_call:
            raise OSError(28, "No space left on device")
        original(*args, **kwargs)

    monkeypatch.setattr(model_module, "save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_pretrained(small(seed=1), folder)
    assert same_weights(from_pretrained(folder), small())
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_saving_again_replaces_the_whole_folder(folder):
    (folder / "stale.txt").write_text("from an older model")
    save_pretrained(small(seed=1), folder)
    assert same_weights(from_pretrained(folder), small(seed=1))
    assert not (folder / "stale.txt").exists() and not (folder / "tokenizer.json").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_save_killed_while_old_and_new_change_places_is_put_right_by_the_next(folder):
    "A process that dies between the two renames leaves the old folder under a hidden name, and a new one."
    new, old = (folder.with_name(f".model.{part}") for part in ("new", "old"))
    folder.rename(old)
    new.mkdir()
    with pytest.raises(KeyError):
        with whole_folder(folder):
            raise KeyError
    assert same_weights(from_pretrained(folder), small()) and not new.exists() and not old.exists()


def test_a_rename_that_fails_puts_the_old_folder_back(folder, monkeypatch):
    original = os.replace

    def refuse(source, target):
        if str(source).endswith(".new"):
            raise PermissionError(13, "Permission denied")
        original(source, target)

    monkeypatch.setattr(model_module.os, "replace", refuse)
    with pytest.raises(PermissionError):
        save_pretrained(small(seed=1), folder)
    assert same_weights(from_pretrained(folder), small())
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_other_files_in_the_way_are_named_and_kept(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "thesis.tex").write_text("dear")
    with pytest.raises(ModelFileError, match="holds other files"):
        save_pretrained(small(), tmp_path / "model")
    assert (tmp_path / "model" / "thesis.tex").read_text() == "dear"


def test_half_precision_writes_texts(folder):
    model = from_pretrained(folder, dtype=torch.bfloat16)
    written = generate(model, ["a cat", "the"], GenerationConfig(max_new_tokens=6, steps=2, max_length=64))
    assert len(written.tokens) == 2 and written.latents.isfinite().all()


def test_a_file_in_the_way_is_named_and_kept(tmp_path):
    (tmp_path / "model").write_text("something dear")
    with pytest.raises(ModelFileError, match="is a file"):
        save_pretrained(small(), tmp_path / "model")
    assert (tmp_path / "model").read_text() == "something dear"


def test_a_file_or_folder_appears_whole_or_not_at_all(tmp_path):
    (tmp_path / "log").write_text("old")
    with pytest.raises(KeyError):
        with whole_file(tmp_path / "log") as part:
            part.write_text("ne")
            assert (tmp_path / "log").read_text() == "old"
            raise KeyError
    assert (tmp_path / "log").read_text() == "old"
    with pytest.raises(KeyError):
        with whole_folder(tmp_path / "new") as out:
            (out / "part").touch()
            raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["log"]
    with whole_file(tmp_path / "log") as part:
        part.write_text("new")
    assert (tmp_path / "log").read_text() == "new" and len(list(tmp_path.iterdir())) == 1
