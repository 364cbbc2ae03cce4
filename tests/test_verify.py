"A checkpoint that gives a reference's numbers passes, any other fails where it differs, and what cannot be compared is named."

import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cola_tutorial.cli import verify
from cola_tutorial.config import GenerationConfig
from cola_tutorial.generation import generate
from cola_tutorial.model import ColaDLM, ModelFileError
from cola_tutorial.verify import Agreement, check_reference, read_reference, write_reference

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests" / "fixtures"
NAMES = ["tiny", "tiny_patch2"]
OUTPUTS = [f"{kind}.{i}" for kind in ("encode.mean", "encode.logvar", "decode.logits", "dit.velocity") for i in range(3)]
OUTPUTS += ["train.velocity", "train.fm_loss"]
OUTPUTS += [f"generate.{kind}.{i}" for kind in ("latents", "logits", "output_ids") for i in range(3)]
LINE = re.compile(r"(\S+) +(\S+) +most (\S+) +(ok|FAIL)")


def stored(name="tiny"):
    "Entries and settings of a fixture's reference."
    path = FIXTURES / name / "reference.safetensors"
    with safe_open(path, framework="pt") as file: return load_file(path), file.metadata()


@pytest.fixture
def changed(tmp_path):
    "Writes a fixture's reference with some entries and settings replaced; None leaves one out."

    def write(entries=(), settings=(), name="tiny"):
        tensors, metadata = stored(name)
        tensors |= {k: v.contiguous() if v is not None else None for k, v in dict(entries).items()}
        metadata |= dict(settings)
        path = tmp_path / "reference.safetensors"
        save_file({k: v for k, v in tensors.items() if v is not None}, path, {k: v for k, v in metadata.items() if v is not None})
        return path

    return write


@pytest.fixture(scope="module")
def model():
    return ColaDLM.from_pretrained(FIXTURES / "tiny")


def failing(model, path):
    return {one.name for one in check_reference(model, read_reference(path)) if not one.holds}


def lines(text):
    return {name: (float(error), float(most), verdict == "ok") for name, error, most, verdict in LINE.findall(text)}


# The command


@pytest.mark.parametrize("layout", ["released", "single"])
@pytest.mark.parametrize("name", NAMES)
def test_the_fixtures_pass_entry_by_entry(name, layout, tmp_path, capsys):
    folder = FIXTURES / name
    if layout == "single": folder = ColaDLM.from_pretrained(folder).save_pretrained(tmp_path / "single", layout="single")
    verify(str(folder), str(FIXTURES / name / "reference.safetensors"))
    out = capsys.readouterr().out
    found = lines(out)
    assert sorted(found) == sorted(OUTPUTS) and all(ok for _, _, ok in found.values())
    for entry, (error, most, _) in found.items():
        assert most == (0 if "ids" in entry else 1e-3 if "generate" in entry else 1e-4)
        assert error <= most and (error == 0 or error < 5e-5)
    assert out.splitlines()[-1] == "23 of 23 entries agree"


def test_the_command_as_a_process_passes_and_fails(tmp_path):
    (tmp_path / "verify.py").write_text("from cola_tutorial.cli import verify; verify()")
    broken = shutil.copytree(FIXTURES / "tiny", tmp_path / "broken")
    weights = load_file(broken / "cola_vae" / "model.safetensors")
    weights["decoder.final_layer.bias"] += 0.5
    save_file(weights, broken / "cola_vae" / "model.safetensors")
    for folder, status, last in ((FIXTURES / "tiny", 0, "23 of 23 entries agree"), (broken, 1, "do not"), (tmp_path / "nowhere", 2, "")):
        command = [sys.executable, tmp_path / "verify.py", folder, FIXTURES / "tiny" / "reference.safetensors"]
        done = subprocess.run(command, cwd=ROOT, env=None, capture_output=True, text=True)
        assert done.returncode == status and "Traceback" not in done.stderr, done.stderr
        assert status == 2 or last in done.stdout.splitlines()[-1]
    assert "nowhere is no folder" in done.stderr


@pytest.mark.parametrize("arguments", [(), ("somewhere",), (None, "reference")])
def test_both_arguments_are_needed(arguments, capsys):
    with pytest.raises(SystemExit) as done: verify(*arguments)
    assert done.value.code == 2 and "cola-verify CHECKPOINT REFERENCE" in capsys.readouterr().err


def test_settings_that_are_not_known_are_reported(changed, capsys):
    verify(str(FIXTURES / "tiny"), str(changed(settings={"beams": "4", "format": "pt"})))
    out = capsys.readouterr().out
    assert out.startswith("setting beams = 4 is not known here and not used\n") and "format" not in out


# What differs is found where it differs


@pytest.mark.parametrize(
    "weight, first, untouched",
    [
        ("vae.encoder.final_layer.bias", "encode.mean.0", ("decode", "dit", "train")),
        ("vae.decoder.blocks.1.ffn_out.weight", "decode.logits.0", ("encode", "dit", "train", "generate.latents")),
        ("dit.blocks.0.msa.proj_out.weight", "dit.velocity.0", ("encode", "decode")),
        ("dit.emb_in.proj_hid.bias", "train.fm_loss", ("encode", "decode")),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_a_changed_weight_fails_the_entries_that_depend_on_it(name, weight, first, untouched):
    model = ColaDLM.from_pretrained(FIXTURES / name)
    value = model.get_parameter(weight).data
    value += 0.3 * torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
    wrong = failing(model, FIXTURES / name / "reference.safetensors")
    assert first in wrong and not [entry for entry in wrong if entry.startswith(untouched)]


@pytest.mark.parametrize("entry", OUTPUTS)
def test_a_changed_entry_fails_alone(entry, changed, model):
    value = stored()[0][entry].clone()
    value.view(-1)[-1] += 1 if "ids" in entry else 2e-3 * value.abs().max()
    path = changed({entry: value})
    assert failing(model, path) == {entry}
    (found,) = [one for one in check_reference(model, read_reference(path)) if one.name == entry]
    assert found.error == 1 if "ids" in entry else 1.5e-3 < found.error < 2.5e-3


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_never_agrees(value, changed, model):
    velocity = stored()[0]["dit.velocity.1"].clone()
    velocity[0, 0] = value
    assert failing(model, changed({"dit.velocity.1": velocity})) == {"dit.velocity.1"}


def test_a_wrong_block_is_reported_with_all_that_follow(changed, model):
    noise = stored()[0]["generate.noise.1"]
    wrong = failing(model, changed({"generate.noise.1": noise.flip(1)}))
    assert {"generate.latents.1", "generate.latents.2"} <= wrong and "generate.latents.0" not in wrong
    assert {one.name for one in check_reference(model, read_reference(FIXTURES / "tiny" / "reference.safetensors"))} == {*OUTPUTS}


@pytest.mark.parametrize("name", ["encode.variance.0", "train.velocity.0", "encode.mean", "encode.mean.01", "decode.z", "notes"])
def test_an_unknown_entry_does_not_agree(name, changed, model):
    found = [one for one in check_reference(model, read_reference(changed({name: torch.zeros(1)}))) if not one.holds]
    assert [(one.name, one.note) for one in found] == [(name, "no such entry is known here")]


def test_a_reference_may_hold_any_part(changed, model):
    for kept in ("encode", "decode", "dit", "train", "generate"):
        drop = {entry: None for entry in stored()[0] if not entry.startswith(kept)}
        names = [one.name for one in check_reference(model, read_reference(changed(drop)))]
        assert sorted(names) == sorted(entry for entry in OUTPUTS if entry.startswith(kept))
    less = {f"generate.{kind}.2": None for kind in ("noise", "latents", "logits")} | {f"generate.output_ids.{i}": None for i in range(3)}
    assert failing(model, changed(less)) == set()
    assert failing(model, changed({f"generate.{kind}.2": None for kind in ("latents", "logits")})) == {f"generate.output_ids.{i}" for i in range(3)}


# Rows of ids


def test_rows_end_where_the_settings_allow(changed, model):
    row = stored()[0]["generate.output_ids.1"]  # 10 ids of 12: the prompt ends inside a block
    name, cut = "generate.output_ids.1", row[:7]
    assert failing(model, changed({name: cut})) == {name}
    assert failing(model, changed({name: torch.cat([row, row[:1]])})) == {name}
    for end, agrees in ((cut[-1], True), (row[7], True), (cut[0], False)):
        assert end != cut[-1] or cut[0] not in (cut[-1], row[7]), "the fixture is of no use here"
        assert failing(model, changed({name: cut}, {"eos_token_id": str(end.item())})) == (set() if agrees else {name})
    limited = {f"generate.output_ids.{i}": stored()[0][f"generate.output_ids.{i}"][:7] for i in range(3)}
    assert failing(model, changed(limited, {"max_new_tokens": "7"})) == set()
    assert failing(model, changed(limited, {"max_new_tokens": "8"})) == {*limited}


# The penalty


@pytest.mark.parametrize("stage", ["before", "after"])
def test_a_penalty_may_have_come_before_or_after_the_logits_were_written(stage, tmp_path, model):
    path = tmp_path / "reference.safetensors"
    write_reference(model, path, [], [[5, 6, 7], [8, 9, 10, 11, 12]], repetition_penalty=1.7)
    entries = load_file(path)
    with safe_open(path, framework="pt") as file: settings = file.metadata()
    plain = write_reference(model, tmp_path / "plain", [], [[5, 6, 7], [8, 9, 10, 11, 12]])
    assert any(not torch.equal(entries[f"generate.output_ids.{i}"], load_file(plain)[f"generate.output_ids.{i}"]) for i in range(2))
    starts, logits = (3, 1), [entries[f"generate.logits.{b}"] for b in range(3)]
    for row, start in enumerate(starts):  # one number at a time: what was written in earlier blocks, and what follows from it
        seen = set()
        for b in range(3):
            for place in range(4):
                for token in seen:
                    value = logits[b][row, place, token]
                    logits[b][row, place, token] = value / 1.7 if value > 0 else value * 1.7
            ids = logits[b][row].argmax(-1).tolist()
            written = entries[f"generate.output_ids.{row}"].tolist()[max(0, 4 * b - start) : 4 * (b + 1) - start]
            assert ids[-len(written) :] == written
            seen |= {*ids}
    if stage == "after":
        entries |= {f"generate.logits.{b}": value for b, value in enumerate(logits)}
        save_file(entries, path, settings)
    found = {one.name: one for one in check_reference(model, read_reference(path))}
    assert all(one.holds for one in found.values())
    assert [found[f"generate.logits.{b}"].note for b in range(3)] == ["", *[f"{stage} the penalty"] * 2]


# What cannot be compared


@pytest.mark.parametrize(
    "entries, settings, words",
    [
        ({}, {"timestep_num": None}, "lack timestep_num"),
        ({}, {"guidance_scale": "None"}, "lack guidance_scale"),
        ({}, {"pad_token_id": None}, "lack pad_token_id"),
        ({}, {"timestep_num": "eight"}, "timestep_num is 'eight'"),
        ({}, {"timestep_num": "0"}, "steps is 0"),
        ({}, {"guidance_scale": "nan"}, "guidance_scale is nan"),
        ({}, {"pad_token_id": "120"}, "pad_id is 120"),
        ({}, {"temperature": "0.7"}, "temperature is 0.7: only greedy references"),
        ({"encode.input_ids.1": None}, {}, "encode.logvar.1 cannot be computed without encode.input_ids.1"),
        ({"dit.timestep.0": None}, {}, "dit.velocity.0 cannot be computed without dit.timestep.0"),
        ({"generate.noise.1": None}, {}, "generate.latents.1 cannot be computed without generate.noise.1"),
        ({"generate.prompt_ids.0": None, "generate.output_ids.0": None}, {}, r"numbers \[1, 2\]"),
        ({"decode.z.0": torch.zeros(8, 7)}, {}, r"decode.z.0 has shape \(8, 7\), but this model needs \(any, 8\)"),
        ({"dit.timestep.2": torch.zeros(5)}, {}, r"dit.timestep.2 has shape \(5,\)"),
        ({"train.z1": torch.zeros(2, 11, 8)}, {}, "train.z1 has shape"),
        ({"generate.noise.2": torch.zeros(2, 4, 8)}, {}, "generate.noise.2 has shape"),
        ({"encode.input_ids.0": torch.zeros(0, dtype=torch.long)}, {}, "encode.input_ids.0 has shape"),
        ({"encode.input_ids.0": torch.full((8,), 121)}, {}, "encode.input_ids.0 must hold whole numbers from 0 to 120"),
        ({"generate.prompt_ids.1": torch.zeros(6)}, {}, "generate.prompt_ids.1 must hold whole numbers"),
        ({"decode.logits.2": torch.zeros(4, 119)}, {}, r"decode.logits.2 has shape \(4, 119\), but this model gives \(4, 120\)"),
        ({"generate.output_ids.0": torch.zeros(3, 4)}, {}, "generate.output_ids.0 has shape"),
    ],
    ids=str,
)
def test_what_cannot_be_compared_is_named(entries, settings, words, changed, capsys):
    path = changed(entries, settings)
    with pytest.raises(SystemExit) as done: verify(str(FIXTURES / "tiny"), str(path))
    assert done.value.code == 2
    assert re.fullmatch(rf"cola-verify: {re.escape(str(path))}: .*{words}.*\n", capsys.readouterr().err)


def test_files_that_are_no_reference_are_named(tmp_path, changed):
    path = tmp_path / "reference.safetensors"
    with pytest.raises(ModelFileError, match="is missing"): read_reference(path)
    path.write_bytes(b"\x80\x04 anything")
    with pytest.raises(ModelFileError, match="damaged, or no safetensors file"): read_reference(path)
    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(ModelFileError, match="no entry can be compared"): read_reference(path)
    save_file({"encode.input_ids.0": torch.zeros(4, dtype=torch.long)}, path)
    with pytest.raises(ModelFileError, match="no entry can be compared"): read_reference(path)


def test_a_reference_of_another_patch_size_is_named(tmp_path):
    model = ColaDLM.from_pretrained(FIXTURES / "tiny_patch2")
    with pytest.raises(ModelFileError, match="another model"):
        list(check_reference(model, read_reference(FIXTURES / "tiny" / "reference.safetensors")))


# Writing one


@pytest.mark.parametrize("name", NAMES)
def test_a_written_reference_holds_for_its_model_alone(name, tmp_path):
    model = ColaDLM.from_pretrained(FIXTURES / name)
    prompts = [[3], [4, 5, 6, 7, 8, 9, 10], [11] * 8, [12] * 17, []]  # shorter than a block, odd, whole, longer, nothing
    path = write_reference(model, tmp_path / "deep" / "mine", [[1, 2, 3, 4], [5] * 10], prompts, blocks=2, steps=3, guidance_scale=2.0)
    assert failing(model, path) == set() and [p.name for p in path.parent.iterdir()] == ["mine"]
    entries = load_file(path)
    noise = [entries[f"generate.noise.{b}"] for b in range(2)]
    model.config = model.config.__class__(model.config.vae, model.config.dit, model.config.pad_id, 118)
    config = GenerationConfig(steps=3, guidance_scale=2.0, num_blocks=2)
    for i in range(4):  # the rows one by one, by the way that users go
        alone = generate(model, [prompts[i]], config, noise=[z[i : i + 1] for z in noise]).tokens[0]
        assert alone == entries[f"generate.output_ids.{i}"].tolist()
    model.dit.txt_out["proj"].bias.data += 0.01
    assert {"dit.velocity.0", "train.velocity", "generate.latents.0"} <= failing(model, path)


def test_the_model_is_left_as_it_was(model, changed):
    before = model.config
    list(check_reference(model, read_reference(changed(settings={"pad_token_id": "7"}))))
    assert model.config is before and before.pad_id == 119


def test_an_agreement_says_how_far_and_how_much_is_allowed():
    assert str(Agreement("dit.velocity.0", 2e-6, 1e-4)).split() == ["dit.velocity.0", "2.0e-06", "most", "1e-04", "ok"]
    assert not Agreement("x", math.nan, 1e-4).holds and Agreement("x", 1e-4, 1e-4).holds
