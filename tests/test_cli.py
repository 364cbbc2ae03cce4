"""The console scripts as a user runs them: in a process of their own."""

import json
import subprocess
import sys

import pytest

SMALL = [
    f"changes.{name}={value}"
    for name, value in dict(
        dim=32, ffn_dim=64, num_heads=2, encoder_num_blocks=1, decoder_num_blocks=1, emb_dim=32, head_dim=16, rope_dim=12, num_layers=1
    ).items()
]

ROWS = (
    ("rows.jsonl", b'{"generate": "x", "ground_truth": "X."}\n\n{"ground_truth": "x"}\n'),
    ("words.jsonl", b'{"text": "Tom lived near the mill"}\n'),
)


def run(command, *args, cwd=None):
    program = f"import sys; sys.argv[0] = 'cola-{command}'; from cola_tutorial.cli import {command}; sys.exit({command}())"
    # call_parse reads the arguments only in a script that is run, so the script is a file
    path = cwd / f"{command}.py"
    path.write_text(program)
    return subprocess.run([sys.executable, str(path), *map(str, args)], capture_output=True, text=True, cwd=cwd, timeout=300)


@pytest.mark.parametrize("command", ["train", "shards", "report", "generate", "evaluate", "score", "task", "info", "verify", "bench"])
def test_help_names_every_option(command, tmp_path):
    done = run(command, "--help", cwd=tmp_path)
    assert done.returncode == 0 and "usage" in done.stdout and "--help" in done.stdout
    assert "--json" in done.stdout or command in ("train", "shards", "report", "generate", "verify")


@pytest.mark.parametrize("size, vae, dit", [("full", 501_871_574, 1_829_875_728)])
def test_info_ends_with_the_released_sizes(size, vae, dit, tmp_path):
    done = run("info", "--size", size, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["parameters"] == {"vae": vae, "dit": dit}


def test_evaluate_ends_with_one_json_object(tmp_path):
    done = run("evaluate", "--n", 5, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    for name in ("reconstruction", "parses", "consistent"):
        assert {"value", "low", "high", "n"} <= set(result[name]) and result[name]["n"] == 5


@pytest.mark.parametrize(
    "command, args, words",
    [
        ("generate", ["--top-p", "2", "Tom lived"], "top_p is 2"),
        ("generate", ["Tom lived", ""], "prompt 1 is empty"),
        ("generate", ["Tom lived near the mill. " * 40], "no room"),
        ("generate", ["--model", "nowhere", "Tom"], "nowhere"),
        ("evaluate", ["--n", "0"], "n is 0"),
        ("info", ["--size", "huge"], "huge"),
        ("train", ["missing.txt"], "missing.txt"),
        ("shards", ["missing.txt", "out"], "missing.txt"),
        ("shards", ["missing.txt"], "a text and a folder are needed"),
        ("train", ["--set", "stage2.stepz=3"], "stepz"),
        ("train", ["--steps1", "0"], "steps is 0"),
        ("train", ["--length", "79"], "79"),
        ("train", ["--vocab-size", "20"], "20"),
        ("train", ["--set", "stories=2e5"], "stories is 200000.0"),
        ("train", ["--stages", "stage3"], "stage3"),
        ("train", ["--device", "gpu"], "device 'gpu' cannot be used here"),
        ("train", ["--recipe", "list.json"], "list.json"),
        ("train", [""], "source is empty"),
        ("train", ["empty.txt"], "empty.txt"),
        ("train", ["latin.txt"], "latin.txt, line 1: not UTF-8"),
        ("train", ["folder"], "a folder without text"),
        ("train", ["--out", "empty.txt", "good.txt"], "empty.txt"),
        ("train", ["--tokenizer", "list.json", "good.txt"], "list.json: not a tokenizer"),
        ("generate", [""], "prompt 0 is empty"),
        ("generate", ["--seed", "99999999999999999999", "Tom"], "seed is 99999999999999999999"),
        ("generate", ["--solver", "rk5", "Tom"], "solver is 'rk5'"),
        ("generate", ["--set", "times=[1,2]", "Tom"], "times is (1, 2)"),
        ("generate", ["--stream", "Tom", "Nora"], "stream shows one text, but 2"),
        ("evaluate", ["--group", "guidance"], "group belongs to study"),
        ("evaluate", ["--study", "study.json", "--group", "taste"], "group 'taste' is not in the study"),
        ("score", [], "cola-score FILE --task NAME"),
        ("score", ["good.txt", "--task", "squad"], "good.txt: not one of .jsonl"),
        ("score", ["list.json"], "list.json is not named after a task"),
        ("score", ["list.json", "--task", "squad"], "list.json: no row in it"),
        ("score", ["list.json", "--task", "arc"], "task 'arc' is not known"),
        ("score", ["nowhere.jsonl", "--task", "squad"], "nowhere.jsonl: cannot be read"),
        ("score", ["rows.jsonl", "--task", "mmlu"], "rows.jsonl, line 1: choices is missing"),
        ("score", ["rows.jsonl", "--task", "squad"], "rows.jsonl, line 3: generate is missing"),
        ("task", [], "cola-task NAME --items FILE"),
        ("task", ["arc", "--items", "rows.jsonl"], "task 'arc' is not known"),
        ("task", ["lambada", "--items", "rows.jsonl"], "rows.jsonl, line 1: no column 'text'"),
        ("task", ["lambada"], "lambada_openai: not to be had from the hub"),
        ("task", ["lambada", "--items", "words.jsonl", "--new-tokens", "80"], "rows have 80 tokens"),
        ("task", ["lambada", "--items", "words.jsonl", "--out", "words.txt"], "words.txt: the rows are written as jsonl"),
        ("task", ["lambada", "--items", "words.jsonl", "--set", "stepz=3"], "stepz"),
        ("verify", [], "cola-verify CHECKPOINT REFERENCE"),
        ("verify", ["folder", "nowhere.safetensors"], "nowhere.safetensors is missing"),
        ("verify", ["folder", "list.json"], "list.json is damaged, or no safetensors file"),
    ],
)
def test_mistakes_are_named_in_one_line(command, args, words, tmp_path):
    (tmp_path / "folder").mkdir()
    for name, content in (("list.json", b"[]"), ("empty.txt", b""), ("latin.txt", b"caf\xe9"), ("good.txt", b"One line.\n" * 50), *ROWS):
        (tmp_path / name).write_bytes(content)
    done = run(command, *args, cwd=tmp_path)
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists(), "nothing half-written stays"


def test_generations_are_scored(tmp_path):
    "The accuracy stands alone on the last line; the object behind it says the same."
    rows = [{"generate": text, "ground_truth": 1, "choices": ["cold", "hot", "wet"]} for text in ("hot", "(B)", "", "cold") * 3]
    (tmp_path / "obqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run("score", "obqa.jsonl", "--task", "OBQA", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    first, *rules, last = done.stdout.splitlines()
    assert first == "obqa   n 12   correct 6   95% interval [25.38, 74.62]   chance 33.33"
    assert [rule.split() for rule in rules] == [
        ["equal", "option", "decided", "6", "right", "3"],
        ["letter", "decided", "3", "right", "3"],
        ["empty", "decided", "3", "right", "0"],
    ]
    assert last == "accuracy 50.00"
    more = run("score", "obqa.jsonl", "--json", cwd=tmp_path)
    *lines, told = more.stdout.splitlines()
    told = json.loads(told)
    assert lines == done.stdout.splitlines() and (told["task"], told["n"], told["correct"], told["accuracy"]) == ("obqa", 12, 6, 50)
    assert told["rules"]["letter"] == [3, 3] and told["file"] == "obqa.jsonl"


def test_a_task_is_asked_and_scored(tmp_path):
    "What it writes, cola-score scores alike."
    julia = "Near the river lived Julia and her grandfather. One cloudy afternoon, she went out. She secretly wanted to learn to skate. Under a bush lay"
    texts = [f"{julia} a little white scarf. Julia quickly shared it with a clever turtle. Near the river, her grandfather"] * 4
    (tmp_path / "words.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    args = ["words.jsonl", "--out", "said.jsonl", "--new-tokens", 6, "--limit", 3, "--set", "steps=16", "--json"]
    done = run("task", "lambada", "--items", *args, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert (told["n"], told["cut"], told["shortened"], told["seed"], told["correct"]) == (3, 0, 0, 0, 3)
    assert done.stdout.startswith("prompts 3   without some worked examples 0   cut 0   seed 0\n")
    scored = run("score", "said.jsonl", "--task", "lambada", cwd=tmp_path)
    assert scored.stdout.splitlines() == done.stdout.splitlines()[1:-1]


def test_train_then_generate_on_a_text_file(tmp_path):
    (tmp_path / "words.txt").write_text("".join(f"The {n} small ships sail over the {n % 7} wide seas.\n" for n in range(400)))
    changes = [part for setting in SMALL for part in ("--set", setting)]
    args = ["words.txt", "--out", "run", "--steps1", 6, "--steps2", 4, "--length", 32, "--vocab-size", 300, "--prompt", "The small", *changes]
    done = run("train", *args, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["parameters"]["vae"] > 0
    again = run("train", *args, cwd=tmp_path)  # nothing left to do, and nothing lost
    assert again.returncode == 0, again.stderr
    other = run("train", *[a if a != 300 else 310 for a in args], cwd=tmp_path)
    assert other.returncode == 2 and "another run" in other.stderr
    written = run("generate", "The small ships", "--model", "run/model", "--n", 2, cwd=tmp_path)
    assert written.returncode == 0 and written.stdout.count("The small ships") >= 2, written.stderr


def test_a_streamed_text_is_the_text(tmp_path):
    options = ["--stop", "lantern", "--set", "guidance_schedule=[[1,2],[0,1]]", "--repetition-penalty", 1.1, "--max-new-tokens", 40]
    prompt = "Near the bakery lived Nora and her grandfather."
    whole, streamed = (run("generate", prompt, *options, *more, cwd=tmp_path) for more in ([], ["--stream"]))
    assert whole.returncode == streamed.returncode == 0, whole.stderr + streamed.stderr
    assert streamed.stdout.strip() == whole.stdout.strip() and len(whole.stdout) > len(prompt) + 20 and "lantern" not in whole.stdout


def test_a_study_is_written_as_one_json_file(tmp_path):
    done = run("evaluate", "--n", 2, "--study", "study.json", "--group", "schedule", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "study.json").read_text())
    assert (result["n"], result["seed"]) == (2, 7) and set(result["groups"]) == {"schedule"}
    for scores in result["groups"]["schedule"].values():
        assert {"value", "low", "high", "n"} <= set(scores["parses"]) and scores["consistent"]["n"] == 2


def test_text_becomes_shards_and_shards_a_model(tmp_path):
    "The second call finds all done; a size of digits is a name."
    (tmp_path / "tyger.txt").write_text("Tyger Tyger, burning bright, in the forests of the night.\n" * 60)
    command = ("shards", "tyger.txt", "tokens", "--length", 32, "--multiple-of", 2, "--vocab-size", 280, "--processes", 2)
    first, again = run(*command, cwd=tmp_path), run(*command, cwd=tmp_path)
    assert first.returncode == again.returncode == 0, first.stderr + again.stderr
    told = json.loads(first.stdout.splitlines()[-1])
    assert told == json.loads(again.stdout.splitlines()[-1]) and told["rows"] > 2 and told["filled"] > 0.9
    assert len(first.stdout.splitlines()) == 2 and len(again.stdout.splitlines()) == 1
    small = [part for setting in SMALL for part in ("--set", setting)]
    done = run("train", "tokens", "--out", "run", "--steps1", 2, "--steps2", 2, "--set", "size=128", *small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["size"] == "128"
