"A saved model comes back bit for bit in either layout, a damaged one is named, and a failing save leaves the old one."

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import httpx2
import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import load_file, save_file

from cola_tutorial import model as model_module
from cola_tutorial.config import ColaConfig, ConfigError, DiTConfig, GenerationConfig, VAEConfig, preset
from cola_tutorial.generation import generate
from cola_tutorial.model import ColaDLM, ModelFileError, load_weights, whole_file, whole_folder
from cola_tutorial.text.corpus import train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests" / "fixtures"
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
    return small(tokenizer).save_pretrained(tmp_path / "model")


@pytest.fixture
def single(tmp_path, tokenizer):
    "The same in the single layout."
    return small(tokenizer).save_pretrained(tmp_path / "model", layout="single")


either = pytest.mark.parametrize("layout", ["released", "single"])


def same_weights(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


CHOICES = [
    {},
    {"attention": "causal", "patch_size": 2},
    {"attention": "bidirectional", "log_snr": 1.5},
    {"qk_norm": False, "layer_norm_affine": False, "bias": False, "post_norm": False, "act": "gelu", "clip_qkv": 2.0},
]


@either
@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_a_saved_model_comes_back_bit_for_bit(tmp_path, tokenizer, choice, layout):
    model = small(tokenizer, vae=choice, generation=GenerationConfig(steps=5, guidance_scale=3.0, seed=7))
    back = ColaDLM.from_pretrained(model.save_pretrained(tmp_path / "deep" / "model", layout=layout))
    assert same_weights(model, back) and back.config == model.config and back.generation == model.generation
    assert not back.training and back.tokenizer.to_str() == tokenizer.to_str()
    assert back.sizes() == {
        "vae": sum(p.numel() for p in model.vae.parameters()),
        "dit": sum(p.numel() for p in model.dit.parameters()),
    }


@either
def test_half_precision_is_stored_as_it_is_and_read_as_asked(tmp_path, layout):
    model = small().to(torch.bfloat16)
    folder = model.save_pretrained(tmp_path / "half", layout=layout)
    path, name = ("cola_dit/", "") if layout == "released" else ("", "dit.")
    assert load_file(folder / f"{path}model.safetensors")[f"{name}txt_in.proj.weight"].dtype == torch.bfloat16
    assert layout == "single" or json.loads((folder / "cola_dit" / "config.json").read_text())["dtype"] == "bfloat16"
    assert same_weights(ColaDLM.from_pretrained(folder, dtype=torch.bfloat16), model)
    assert same_weights(ColaDLM.from_pretrained(folder), model.float())
    rounded = small().save_pretrained(tmp_path / "rounded", dtype=torch.bfloat16, layout=layout)
    assert same_weights(ColaDLM.from_pretrained(rounded, dtype=torch.bfloat16), small().to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["tiny", "tiny_patch2"])
def test_released_weights_pass_through_both_layouts_unchanged(tmp_path, name, dtype):
    model = ColaDLM.from_pretrained(FIXTURES / name, dtype=dtype)
    single = ColaDLM.from_pretrained(model.save_pretrained(tmp_path / "single", layout="single"), dtype=dtype)
    assert single.config == model.config and single.generation == model.generation
    folder = single.save_pretrained(tmp_path / "released")
    for part in ("cola_vae", "cola_dit"):
        ours, theirs = (load_file(place / part / "model.safetensors") for place in (folder, FIXTURES / name))
        assert ours.keys() == theirs.keys()
        for key in ours:
            kept = torch.float32 if key.endswith("rope.freqs") else dtype
            assert ours[key].dtype == kept and ours[key].shape == theirs[key].shape
            assert torch.equal(ours[key].view(torch.uint8), theirs[key].to(kept).view(torch.uint8))
        facts, released = (json.loads((place / part / "config.json").read_text()) for place in (folder, FIXTURES / name))
        differ = {key for key in released if facts.get(key, "missing") != released[key]}
        assert differ <= {"transformers_version", "init_cutoff_factor"} | ({"dtype"} if dtype != torch.float32 else set())


def test_reading_draws_no_random_numbers(folder):
    state = torch.get_rng_state()
    model = ColaDLM.from_pretrained(folder)
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())


@either
def test_a_model_outlives_its_file(tmp_path, layout):
    "Somebody writes other bytes over the very file that was read: the weights in memory are their own."
    folder = small().save_pretrained(tmp_path / "model", layout=layout)
    model = ColaDLM.from_pretrained(folder)
    for path in folder.rglob("*.safetensors"):
        with path.open("r+b") as file:
            file.write(b"\xff" * path.stat().st_size)
            file.flush()
            os.fsync(file.fileno())
    assert same_weights(model, small())


def test_what_was_read_can_be_trained(folder):
    model = ColaDLM.from_pretrained(folder)
    before = (folder / "cola_dit" / "model.safetensors").read_bytes()
    sum(p.pow(2).sum() for p in model.parameters()).backward()
    torch.optim.SGD(model.parameters(), lr=0.25).step()
    for name, weight in small().named_parameters():
        torch.testing.assert_close(model.get_parameter(name), weight / 2)
    assert (folder / "cola_dit" / "model.safetensors").read_bytes() == before


def test_weights_are_filled_in_place_where_an_optimizer_holds_them(folder):
    other = small(seed=1).dit.half()
    held = dict(other.named_parameters())
    load_weights(other, folder / "cola_dit" / "model.safetensors")
    for name, weight in small().dit.half().named_parameters():
        assert held[name] is other.get_parameter(name) and torch.equal(held[name], weight)


def test_full_size_has_the_released_tensors():
    "Names and shapes of the released weights, written out from their tables."
    vae = {
        "encoder.wte.weight": (100279, 1536),
        **linear("encoder.patch_embedder", 1536, 1536, 1),
        **linear("encoder.final_layer", 32, 1536),
        **linear("decoder.in_layer", 1536, 16),
        **linear("decoder.unpatch_layer", 1536, 1536),
        **norm("decoder.final_norm", 1536),
        **linear("decoder.final_layer", 100278, 1536),
    }
    for block in (f"{half}.blocks.{i}" for half in ("encoder", "decoder") for i in range(4)):
        vae |= {f"{block}.qkv_proj.weight": (4608, 1536)}
        vae |= linear(f"{block}.attn_out_proj", 1536, 1536)
        vae |= linear(f"{block}.ffn_proj", 6144, 1536) | linear(f"{block}.ffn_out", 1536, 3072)
        for name in ("q_norm", "k_norm", "norm_attn", "norm_ffn"): vae |= norm(f"{block}.{name}", 1536)
    dit = {
        **linear("txt_in.proj", 2048, 16),
        **linear("emb_in.proj_in", 2048, 256),
        **linear("emb_in.proj_hid", 2048, 2048),
        **linear("emb_in.proj_out", 2048, 2048),
        **norm("txt_out_norm", 2048),
        **linear("txt_out_ada.out_in.1", 4096, 2048),
        **linear("txt_out.proj", 16, 2048),
    }
    for block in (f"blocks.{i}" for i in range(24)):
        dit |= {f"{block}.msa.proj_qkv.weight": (6144, 2048), f"{block}.msa.proj_out.weight": (2048, 2048)}
        dit |= norm(f"{block}.msa.norm_q", 128) | norm(f"{block}.msa.norm_k", 128)
        dit |= {f"{block}.msa.rope.rope.freqs": (48,)}
        dit |= linear(f"{block}.mlp.proj_in", 8192, 2048) | linear(f"{block}.mlp.proj_out", 2048, 8192)
        for name, width in (("msa_in", 4096), ("msa_out", 2048), ("mlp_in", 4096), ("mlp_out", 2048)):
            dit |= linear(f"{block}.ada.{name}.1", width, 2048)
    with torch.device("meta"):
        model = ColaDLM(preset("full"))
    assert model.sizes() == {"vae": 501_871_574, "dit": 1_829_875_728}
    for part, tensors in ((model.vae, vae), (model.dit, dit)):
        assert {name: tuple(value.shape) for name, value in part.state_dict().items()} == tensors
    assert (model.config.pad_id, model.config.end_id) == (100277, 100257)


def linear(name, *shape):
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


@either
def test_a_model_without_tokenizer_keeps_its_special_ids(tmp_path, layout):
    model = small()
    model.config = replace(model.config, pad_id=5, end_id=9)
    back = ColaDLM.from_pretrained(model.save_pretrained(tmp_path / "model", layout=layout))
    assert back.tokenizer is None and (back.config.pad_id, back.config.end_id) == (5, 9)


JSON_FILES = ["cola_vae/config.json", "cola_dit/config.json", "generation.json"]
WEIGHT_FILES = ["cola_vae/model.safetensors", "cola_dit/model.safetensors"]


@pytest.mark.parametrize("name", [*JSON_FILES[:2], *WEIGHT_FILES])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ModelFileError, match=f"{name} is missing"):
        ColaDLM.from_pretrained(folder)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ModelFileError, match="nowhere is no folder"):
        ColaDLM.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize("content", [b"", b'{"dim": 16', b"\xff\xfe{}", b"[1, 2]", b"3"])
def test_a_broken_json_file_is_named(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(ModelFileError, match=name):
        ColaDLM.from_pretrained(folder)


@pytest.mark.parametrize("settings", [{"steps": 0}, {"stepps": 3}, {"top_p": "all"}])
def test_generation_settings_that_cannot_be_are_named(folder, settings):
    (folder / "generation.json").write_text(json.dumps(settings))
    with pytest.raises(ModelFileError, match=f"generation.json.*{next(iter(settings))}"):
        ColaDLM.from_pretrained(folder)


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
        ColaDLM.from_pretrained(folder)


@pytest.mark.parametrize("name", WEIGHT_FILES)
@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
def test_cut_weights_are_named(folder, name, keep):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(ModelFileError, match=f"{name} is damaged"):
        ColaDLM.from_pretrained(folder)


@pytest.mark.parametrize("name", WEIGHT_FILES)
def test_a_foreign_file_is_named(folder, name):
    (folder / name).write_bytes(b"\x80\x04\x95 not a safetensors file at all, but bytes of another kind")
    with pytest.raises(ModelFileError, match=f"{name} is damaged"):
        ColaDLM.from_pretrained(folder)


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
        ColaDLM.from_pretrained(folder)


def test_many_misfits_are_counted_and_five_named(folder):
    path = folder / "cola_dit" / "model.safetensors"
    weights = load_file(path)
    save_file({f"{name}.old": value for name, value in weights.items()}, path)
    with pytest.raises(ModelFileError, match=rf"does not fit.*\({2 * len(weights)} in all\)") as error:
        ColaDLM.from_pretrained(folder)
    assert str(error.value).count(" is missing") + str(error.value).count(" is unknown") == 5


@pytest.mark.parametrize("dtype, word", [(torch.int64, "I64"), (torch.bool, "BOOL"), (torch.float8_e4m3fn, "F8_E4M3")], ids=str)
def test_weights_of_another_type_are_named(folder, dtype, word):
    path = folder / "cola_vae" / "model.safetensors"
    weights = load_file(path)
    save_file(weights | {"decoder.final_layer.bias": weights["decoder.final_layer.bias"].to(dtype)}, path)
    with pytest.raises(ModelFileError, match=f"decoder.final_layer.bias is of type {word}, not floating-point"):
        ColaDLM.from_pretrained(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_of_the_single_layout_is_named(single, name):
    (single / name).unlink()
    with pytest.raises(ModelFileError, match=f"{name} is missing"):
        ColaDLM.from_pretrained(single)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"format": None}, "has the format None, not 'cola_tutorial 1'"),
        ({"format": "cola_tutorial 2"}, "another version"),
        ({"vae": {"dim": 16}}, "vocab_size.* is missing"),
        ({"vae": 3}, "config.json: "),
        ({"dit": None}, "config.json: "),
        ({"pad_id": 270}, "pad_id is 270"),
        ({"end_id": 5}, "pad and end ids"),
        ({"colour": "green"}, "colour"),
    ],
    ids=str,
)
def test_a_single_configuration_that_cannot_be_is_named(single, change, words):
    path = single / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelFileError, match=words):
        ColaDLM.from_pretrained(single)


@pytest.mark.parametrize("name", ["format", "vae", "dit", "pad_id", "end_id"])
def test_a_single_configuration_is_complete(single, name):
    path = single / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != name}))
    with pytest.raises(ModelFileError, match=f"config.json.*{name}"):
        ColaDLM.from_pretrained(single)


def test_a_folder_that_holds_no_model_is_named_with_what_was_looked_for(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ModelFileError, match="holds no model: neither cola_vae/ and cola_dit/ nor config.json and model.safetensors"):
        ColaDLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("place", ["", "cola_vae", "cola_dit"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "last.ckpt"])
def test_pickles_are_named_and_never_opened(single, tmp_path, place, name):
    (tmp_path / "bare").mkdir()
    kind = single if not place else small().save_pretrained(tmp_path / "released")
    for where in (kind, *([tmp_path / "bare"] if not place else [])):
        (where / place / "model.safetensors").unlink(missing_ok=True)
        (where / place / name).write_bytes(b"\x80\x04\x95")
        with pytest.raises(ModelFileError, match=f"{name} is not read: only safetensors are"):
            ColaDLM.from_pretrained(where)


def test_a_layout_or_type_that_is_not_known_is_named(folder, tmp_path):
    with pytest.raises(ConfigError, match="layout is 'flat'"):
        small().save_pretrained(tmp_path / "other", layout="flat")
    with pytest.raises(ConfigError, match="dtype is torch.int8"):
        small().save_pretrained(tmp_path / "other", dtype=torch.int8)
    with pytest.raises(ConfigError, match="dtype is torch.int8"):
        ColaDLM.from_pretrained(folder, dtype=torch.int8)
    assert not (tmp_path / "other").exists()


def test_a_layout_can_replace_the_other(folder):
    small(seed=1).save_pretrained(folder, layout="single")
    assert not (folder / "cola_vae").exists() and same_weights(ColaDLM.from_pretrained(folder), small(seed=1))
    small(seed=2).save_pretrained(folder)
    assert not (folder / "config.json").exists() and same_weights(ColaDLM.from_pretrained(folder), small(seed=2))


@pytest.mark.parametrize("config", ['{"model_type": "other"}', None])
def test_a_foreign_model_is_not_replaced(tmp_path, config):
    (tmp_path / "model.safetensors").write_bytes(b"dear")
    if config: (tmp_path / "config.json").write_text(config)
    with pytest.raises(ModelFileError, match="holds other files"):
        small().save_pretrained(tmp_path, layout="single")
    assert (tmp_path / "model.safetensors").read_bytes() == b"dear"


# From the hub


def test_a_hub_name_fetches_exactly_the_files_that_are_read(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **more: asked.append((name, more)) or str(folder))
    assert same_weights(ColaDLM.from_pretrained("someone/cola-small", revision="v2"), small())
    ((name, more),) = asked
    assert name == "someone/cola-small" and more.pop("revision") == "v2"
    parts = ("", "cola_vae/", "cola_dit/", "cola_dlm/cola_vae/", "cola_dlm/cola_dit/")
    wanted = {f"{part}{file}" for part in parts for file in ("config.json", "model.safetensors")}
    assert {*more.pop("allow_patterns")} == wanted | {"tokenizer.json", "generation.json"} and not more


def test_a_folder_goes_before_the_hub(folder, monkeypatch):
    monkeypatch.chdir(folder.parent.parent)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    name = f"{folder.parent.name}/model"
    assert same_weights(ColaDLM.from_pretrained(name), small())
    with pytest.raises(ConfigError, match="revision is 'v2'"):
        ColaDLM.from_pretrained(name, revision="v2")


def response(status):
    request = httpx2.Request("GET", "http://hub.invalid")
    return httpx2.Response(status, request=request)


@pytest.mark.parametrize(
    "error",
    [
        errors.RepositoryNotFoundError("404 Client Error.\n\nNot found", response=response(404)),
        errors.GatedRepoError("403 Client Error.", response=response(403)),
        errors.RevisionNotFoundError("404 Client Error.", response=response(404)),
        errors.HfHubHTTPError("500 Server Error", response=response(500)),
        errors.LocalEntryNotFoundError("Cannot find an appropriate cached snapshot folder"),
        errors.OfflineModeIsEnabled("Cannot reach the hub"),
        errors.HFValidationError("Repo id must use alphanumeric chars"),
        httpx2.ProxyError("no proxy"),
        httpx2.ReadTimeout("too slow"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_the_hub_does_not_give_is_named_with_what_to_do(monkeypatch, error):
    def refuse(name, **more):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    first = re.escape(str(error).split("\n")[0])
    words = rf"someone/cola: no folder here, and not to be had from the hub at revision 'v2' \({first}\): download the model by hand"
    with pytest.raises(ModelFileError, match=words):
        ColaDLM.from_pretrained("someone/cola", revision="v2")


def test_a_model_in_the_cache_is_found_without_a_network(folder, tmp_path):
    "A process of its own, offline, with the hub's cache laid out as the hub lays it out."
    home, commit = tmp_path / "home", "0123456789abcdef0123456789abcdef01234567"
    repository = home / "hub" / "models--someone--cola"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(folder, repository / "snapshots" / commit)
    ask = (
        "import sys; from cola_tutorial.model import ColaDLM, ModelFileError\n"
        "print(ColaDLM.from_pretrained('someone/cola').dit.txt_out_norm.weight.sum().item())\n"
        f"ColaDLM.from_pretrained('someone/cola', revision='{commit}')\n"
        "try: ColaDLM.from_pretrained('someone/other')\n"
        "except ModelFileError as error: print(error)"
    )
    env = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    env = {name: value for name, value in env.items() if name not in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")}
    run = subprocess.run([sys.executable, "-c", ask], env=env, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    loaded, refused = run.stdout.splitlines()
    assert float(loaded) == small().dit.txt_out_norm.weight.sum().item()
    assert refused.startswith("someone/other: no folder here, and not to be had from the hub (") and "by hand" in refused


def test_a_broken_tokenizer_is_named(folder):
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json"):
        ColaDLM.from_pretrained(folder)


def test_a_tokenizer_that_does_not_fit_is_refused(tokenizer):
    with pytest.raises(ConfigError, match="the tokenizer has 270 tokens, but the model only 269"):
        small(tokenizer, vocab_size=269)
    config = replace(small().config, pad_id=3)
    with pytest.raises(ConfigError, match="pad and end ids are \\(0, 1\\), but the configuration says \\(3, 1\\)"):
        ColaDLM(config, tokenizer)


@pytest.mark.parametrize("layout, failing_call", [("released", 1), ("released", 2), ("single", 1)])
def test_a_failing_save_leaves_the_old_model_and_nothing_else(folder, monkeypatch, layout, failing_call):
    calls, original = [], save_file

    def full_disk(*args, **kwargs):
        calls.append(1)
        if len(calls) == failing_call:
            raise OSError(28, "No space left on device")
        original(*args, **kwargs)

    monkeypatch.setattr(model_module, "save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        small(seed=1).save_pretrained(folder, layout=layout)
    assert same_weights(ColaDLM.from_pretrained(folder), small())
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_saving_again_replaces_the_whole_folder(folder):
    (folder / "stale.txt").write_text("from an older model")
    small(seed=1).save_pretrained(folder)
    assert same_weights(ColaDLM.from_pretrained(folder), small(seed=1))
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
    assert same_weights(ColaDLM.from_pretrained(folder), small()) and not new.exists() and not old.exists()


def test_a_rename_that_fails_puts_the_old_folder_back(folder, monkeypatch):
    original = os.replace

    def refuse(source, target):
        if str(source).endswith(".new"):
            raise PermissionError(13, "Permission denied")
        original(source, target)

    monkeypatch.setattr(model_module.os, "replace", refuse)
    with pytest.raises(PermissionError):
        small(seed=1).save_pretrained(folder)
    assert same_weights(ColaDLM.from_pretrained(folder), small())
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_other_files_in_the_way_are_named_and_kept(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "thesis.tex").write_text("dear")
    with pytest.raises(ModelFileError, match="holds other files"):
        small().save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "thesis.tex").read_text() == "dear"


def test_half_precision_writes_texts(folder):
    model = ColaDLM.from_pretrained(folder, dtype=torch.bfloat16)
    written = generate(model, ["a cat", "the"], GenerationConfig(max_new_tokens=6, steps=2, max_length=64))
    assert len(written.tokens) == 2 and all(z.isfinite().all() for z in written.latents)


def test_a_file_in_the_way_is_named_and_kept(tmp_path):
    (tmp_path / "model").write_text("something dear")
    with pytest.raises(ModelFileError, match="is a file"):
        small().save_pretrained(tmp_path / "model")
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


def test_a_download_may_hold_both_halves_one_folder_further_down(tmp_path):
    tokenizer = train_tokenizer(["the tiger and the forest"], 270)
    model = ColaDLM(preset("tiny", vocab_size=270), tokenizer).eval()
    model.save_pretrained(tmp_path / "all" / "cola_dlm")
    (tmp_path / "all" / "cola_dlm" / "tokenizer.json").rename(tmp_path / "all" / "tokenizer.json")
    again = ColaDLM.from_pretrained(tmp_path / "all")
    assert again.tokenizer.to_str() == tokenizer.to_str()
    for name, weight in model.state_dict().items(): assert torch.equal(weight, again.state_dict()[name])


def test_rotary_speeds_are_stored_in_full_whatever_the_weights_are(tmp_path):
    model = ColaDLM(preset("tiny", vocab_size=270))
    wanted = 10_000.0 ** (-torch.arange(0, 24, 2) / 24)
    for number, (dtype, stored) in enumerate([(torch.bfloat16, None), (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]):
        model.to(dtype).save_pretrained(tmp_path / str(number), dtype=stored)
        weights = load_file(tmp_path / str(number) / "cola_dit" / "model.safetensors")
        torch.testing.assert_close(weights["blocks.0.msa.rope.rope.freqs"], wanted)
        assert weights["txt_in.proj.weight"].dtype == (stored or dtype)
