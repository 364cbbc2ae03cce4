"The first look inside: projections, labels, paths and pictures, with a tiny untrained model."

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from cola_tutorial import viz
from cola_tutorial.config import GenerationConfig, preset
from cola_tutorial.generation import PromptError, generate, read_prompts
from cola_tutorial.model import ColaDLM
from cola_tutorial.text.corpus import train_tokenizer
from cola_tutorial.text.stories import Grammar
from cola_tutorial.viz import (
    KIND,
    BlockPath,
    LatentPlane,
    TokenPoints,
    ViewError,
    axis_labels,
    beside,
    follow,
    latent_names,
    pages,
    plot_plane,
    point_groups,
    settling_times,
    story_points,
    token_name,
    trust_statement,
)

ROOT = Path(__file__).resolve().parent.parent
GRAMMAR = Grammar.load()
STORIES = [GRAMMAR.story(3, i).text for i in range(20)]
TOKENIZER = train_tokenizer([GRAMMAR.story(4, i).text for i in range(300)], vocab_size=900)
SMALL = dict(dim=32, emb_dim=32, num_heads=2, head_dim=16, rope_dim=8, num_layers=1, ffn_dim=64, latent_dim=8)
CONFIG = GenerationConfig(steps=4, max_new_tokens=12)


def tiny(patch_size: int = 1) -> ColaDLM:
    "An untrained model with blocks of four latents; its weights are large enough to make it choose different words."
    torch.manual_seed(patch_size)
    sizes = SMALL | dict(encoder_num_blocks=1, decoder_num_blocks=1, block_size=4, patch_size=patch_size, init_std=0.3)
    model = ColaDLM(preset("tiny", TOKENIZER.get_vocab_size(), **sizes), TOKENIZER, CONFIG).eval()
    with torch.no_grad():
        for weight in model.dit.parameters(): weight.add_(0.1 * torch.randn_like(weight))
    return model


MODEL = tiny()
POINTS = story_points(MODEL, STORIES, GRAMMAR)
PLANE = LatentPlane(POINTS.latents)


@pytest.fixture(autouse=True)
def closed_pictures() -> None:
    "No picture outlives its test."
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def paths() -> list[BlockPath]:
    "A text of several blocks."
    return follow(MODEL, STORIES[0][:40], seed=5)


# Planes


@pytest.mark.parametrize("shape", [(30, 2), (200, 16), (1500, 5)])
def test_pca_is_the_singular_value_decomposition(shape: tuple[int, int]) -> None:
    "Places and shares of variance are those of numpy's SVD, up to the sign of a direction."
    rng = np.random.default_rng(sum(shape))
    rows = rng.normal(size=shape) * np.linspace(3, 1, shape[1]) + 5
    plane = LatentPlane(torch.tensor(rows, dtype=torch.float32))
    centred = rows - rows.mean(0)
    _, sizes, directions = np.linalg.svd(centred, full_matrices=False)
    ours, theirs = plane.project(torch.tensor(rows, dtype=torch.float32)).numpy(), centred @ directions[:2].T
    np.testing.assert_allclose(ours * np.sign((ours * theirs).sum(0)), theirs, atol=1e-3)
    np.testing.assert_allclose(plane.explained, (sizes**2 / (sizes**2).sum())[:2], atol=1e-5)


def test_project_keeps_leading_shape_and_order() -> None:
    "A path is projected as its points are one by one."
    z = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
    whole = PLANE.project(z)
    assert whole.shape == (3, 4, 2) and whole.dtype == torch.float32
    for i in range(3):
        for j in range(4): torch.testing.assert_close(PLANE.project(z[i, j]), whole[i, j], atol=1e-5, rtol=0)


def test_trust_is_full_for_a_plane_and_half_by_chance() -> None:
    "Points of a tilted plane lose nothing; of round noise in many dimensions, two directions keep few neighbours."
    torch.manual_seed(0)
    tilted = torch.randn(200, 2) @ torch.linalg.qr(torch.randn(6, 6)).Q[:2]
    assert LatentPlane(tilted).trust > 0.9999 and sum(LatentPlane(tilted).explained) == pytest.approx(1)
    noise = LatentPlane(torch.randn(500, 64))
    assert 0.5 < noise.trust < 0.65
    assert f"{noise.trust:.2f}" in trust_statement(noise) and f"{sum(noise.explained):.0%}" in trust_statement(noise)
    assert f"{noise.explained[1]:.0%}" in axis_labels(noise)[1]


@pytest.mark.parametrize(
    ("latents", "options", "says"),
    [
        (torch.zeros(40), {}, r"\(M, d\)"),
        (torch.randn(29, 4), {}, "at least 30"),
        (torch.randn(40, 1), {}, "2 dimensions"),
        (torch.full((40, 4), torch.nan), {}, "NaN"),
        (torch.randn(40, 4), {"method": "tsne"}, "pca, centres or umap"),
        (torch.randn(40, 4), {"neighbours": 0}, "1 to 14"),
    ],
)
def test_a_plane_that_cannot_be_says_why(latents: torch.Tensor, options: dict, says: str) -> None:
    "The message names what is wrong."
    with pytest.raises(ViewError, match=says): LatentPlane(latents, **options)


def test_the_plane_of_word_centres_holds_three_of_them() -> None:
    "Through three centres: their distances are kept, the axes are orthonormal, the shares those of a plain projection."
    torch.manual_seed(1)
    labels = [("a", "b", "c", "")[i % 4] for i in range(120)]
    rows = torch.randn(120, 6) + 4 * torch.eye(6)[[i % 4 for i in range(120)]]
    centres = torch.stack([rows[[label == name for label in labels]].mean(0) for name in "abc"])
    plane = LatentPlane(rows, "centres", labels=labels)
    torch.testing.assert_close(torch.pdist(plane.project(centres)), torch.pdist(centres), atol=1e-4, rtol=0)
    basis = torch.linalg.qr((centres[1:] - centres[0]).T).Q  # (6, 2)
    flat, shadow = plane.project(rows), rows @ basis
    torch.testing.assert_close(torch.pdist(flat), torch.pdist(shadow), atol=1e-4, rtol=0)
    assert sum(plane.explained) == pytest.approx(float((shadow.var(0) / rows.var(0).sum()).sum()), abs=1e-5)
    assert "word centres" in trust_statement(plane) and "word centres" in axis_labels(plane)[0]
    with pytest.raises(ViewError, match="three words"): LatentPlane(rows, "centres", labels=[label.replace("c", "a") for label in labels])
    with pytest.raises(ViewError, match="one each"): LatentPlane(rows, "centres", labels=labels[1:])


def test_project_refuses_another_width() -> None:
    "Latents of another model do not fit."
    with pytest.raises(ViewError, match="8"): PLANE.project(torch.zeros(3, 7))


class FakeUMAP:
    "Takes UMAP's place: the first two channels, and a record of what was asked."

    def __init__(self, **options: object):
        self.options, self.calls = options, []

    def fit(self, rows: np.ndarray) -> "FakeUMAP":
        "Note it."
        self.calls.append(("fit", len(rows)))
        return self

    def transform(self, rows: np.ndarray) -> np.ndarray:
        "Note it, and cut."
        self.calls.append(("transform", len(rows)))
        return rows[:, :2]


@pytest.fixture
def fake_umap(monkeypatch: pytest.MonkeyPatch) -> None:
    "UMAP without its compiler; the lesson runs the real one."
    module = ModuleType("umap")
    module.UMAP = FakeUMAP
    monkeypatch.setitem(sys.modules, "umap", module)


def test_umap_is_fitted_once_and_transforms_all_steps_in_one_call(fake_umap: None) -> None:
    "With a fixed seed, and without variance shares that it does not have."
    plane = LatentPlane(POINTS.latents, "umap", seed=7)
    asked = plane.projection
    assert asked.options["random_state"] == 7 and asked.options["n_components"] == 2
    assert [name for name, _ in asked.calls] == ["fit", "transform"]  # the transform judges it
    z = torch.randn(5, 4, 8)
    torch.testing.assert_close(plane.project(z), z[..., :2])
    assert asked.calls[2:] == [("transform", 20)]
    assert plane.explained is None and "UMAP" in trust_statement(plane) and "UMAP" in axis_labels(plane)[0]


def test_the_package_draws_nothing_until_asked() -> None:
    "Neither `import cola_tutorial` nor its names load pictures; pictures do not load UMAP."
    code = (
        "import sys, cola_tutorial; cola_tutorial.generate; "
        "assert not {'plotly', 'ipywidgets', 'matplotlib', 'sklearn', 'umap', 'cola_tutorial.viz'} & {*sys.modules}; "
        "import cola_tutorial.viz; assert not {'umap', 'numba'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# What words say


@pytest.mark.parametrize("choice", ["animal", "thing", "colour", "place", "helper", "hero"])
def test_labels_name_the_words_they_stand_at(choice: str) -> None:
    "A token is labelled with a value exactly where that word stands in the story, found by a plain search."
    values = next(c for c in GRAMMAR.choices if c.name == choice).values.items
    wanted = []
    for text in STORIES:
        spots = {at: m[0] for m in re.finditer(rf"\b({'|'.join(values)})\b", text) for at in range(*m.span())}
        for start, end in TOKENIZER.encode(text).offsets:
            wanted.append(next((spots[at] for at in range(start, end) if at in spots), ""))
    assert [w.lower() for w in POINTS.said[choice]] == [w.lower() for w in wanted]
    assert {*POINTS.values(choice)} == {*wanted} - {""}


def test_kinds_of_words_are_those_of_the_grammar() -> None:
    "Looked up in the grammar's own file: choices by their values, details by the local symbols, the rest fixed."
    wanted = {"Anna": "hidden choice", "kite": "hidden choice", "paint": "hidden choice", "she": "pronoun", "her": "pronoun"}
    wanted |= {"sunny": "detail", "tiny": "detail", "lived": "fixed word", "the": "fixed word", "a": "fixed word", ".": "punctuation", ",": "punctuation"}
    seen = set()
    for token, kind in zip(POINTS.tokens, POINTS.said[KIND]):
        if token in wanted: assert kind == wanted[token], token
        seen.add(kind)
    assert seen == {"hidden choice", "pronoun", "detail", "fixed word", "punctuation"}
    odd = story_points(MODEL, ["Anna ate wasabi."], GRAMMAR)
    assert [kind for token, kind in zip(odd.tokens, odd.said[KIND]) if token == "Anna"] == ["hidden choice"]
    assert "" in odd.said[KIND] and odd.said[KIND][-1] == "punctuation"


@pytest.mark.parametrize("patch_size", [1, 2])
def test_points_are_the_latents_of_each_story_alone(patch_size: int) -> None:
    "Row by row, padded to whole blocks by hand; with patches, both tokens of a patch stand at its latent."
    model = MODEL if patch_size == 1 else tiny(2)
    points, place = story_points(model, STORIES[:5], GRAMMAR, batch_size=2), 0
    for text in STORIES[:5]:
        ids = TOKENIZER.encode(text).ids
        row = torch.tensor([ids + [0] * (-len(ids) % (4 * patch_size))])
        with torch.no_grad(): mean = model.vae.to_latents(model.vae.encode(row).mean)[0]
        for i in range(len(ids)):
            torch.testing.assert_close(points.latents[place + i], mean[i // patch_size], atol=1e-5, rtol=0)
        place += len(ids)
    assert place == len(points.latents) == len(points.tokens) == len(points.said["animal"])


def test_tokens_read_as_words() -> None:
    "Without the space before them, never empty, special ones by name."
    ids = TOKENIZER.encode(STORIES[0]).ids
    assert "".join(token_name(TOKENIZER, i) for i in ids) == STORIES[0].replace(" ", "")
    assert [token_name(TOKENIZER, i) for i in (0, 1)] == ["PAD", "END"]
    assert all(token_name(TOKENIZER, i) for i in range(TOKENIZER.get_vocab_size()))


@pytest.mark.parametrize("most", [1, 7, 100, 10**6])
def test_thin_keeps_rows_together(most: int) -> None:
    "At most so many, and every token keeps its latent and its labels."
    thin = POINTS.thin(most)
    assert 0 < len(thin.tokens) <= most
    at = [int((POINTS.latents == row).all(1).nonzero()[0]) for row in thin.latents[:20]]
    assert [POINTS.tokens[i] for i in at] == thin.tokens[:20]
    assert [POINTS.said["animal"][i] for i in at] == thin.said["animal"][:20]


def test_points_say_what_is_missing() -> None:
    "No texts, no tokenizer, no such choice, a text that is empty."
    with pytest.raises(ViewError, match="no texts"): story_points(MODEL, [], GRAMMAR)
    with pytest.raises(PromptError, match="empty"): story_points(MODEL, [""], GRAMMAR)
    mute = ColaDLM(MODEL.config)
    with pytest.raises(ViewError, match="no tokenizer"): story_points(mute, STORIES, GRAMMAR)
    with pytest.raises(ViewError, match="no tokenizer"): follow(mute)
    with pytest.raises(ViewError, match="animal"): POINTS.values("planet")


# Paths


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("length", [0, 1, 3, 4, 5, 8, 11])
def test_a_path_ends_in_what_is_generated(patch_size: int, length: int) -> None:
    "Tokens of the last step, the prompt's part left out, are those that `generate` writes; so is the text."
    model = MODEL if patch_size == 1 else tiny(2)
    ids = TOKENIZER.encode(STORIES[1]).ids[:length]
    prompt = TOKENIZER.decode(ids)
    result = generate(model, [ids] if ids else 1, CONFIG, seeds=[9])
    paths, block = follow(model, prompt, seed=9), 4 * patch_size
    written = [i for path in paths for i in path.tokens[-1].tolist()]
    assert written[length % block :][: len(result.tokens[0])] == result.tokens[0]
    assert [path.given for path in paths] == [length % block] + [0] * (len(paths) - 1)
    known = ids[: length // block * block]
    for path in paths:
        assert path.z.shape == (5, 4, 8) and path.tokens.shape == path.confidence.shape == (5, block)
        assert path.times.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
        assert path.before == TOKENIZER.decode(known)
        assert path.texts == [TOKENIZER.decode(row) for row in path.tokens.tolist()]
        assert path.names == [[token_name(TOKENIZER, i) for i in row] for row in path.tokens.tolist()]
        assert 0 <= path.confidence.min() and path.confidence.max() <= 1
        known = known + path.tokens[-1].tolist()


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("length", [0, 3, 9])
def test_ends_are_where_the_velocity_points(patch_size: int, length: int) -> None:
    "z - t v of the trace, read by the decoder from the whole text at once, without a memory."
    model, per_block = (MODEL, 4) if patch_size == 1 else (tiny(2), 8)
    ids = TOKENIZER.encode(STORIES[1]).ids[:length]
    found = follow(model, TOKENIZER.decode(ids), 9, CONFIG, ends=True)
    traces = generate(model, [ids] if ids else 1, CONFIG, seeds=[9], trace=True).traces
    start = length // per_block * 4
    before = read_prompts(model, [ids]).latents[:, :start]
    for path, trace in zip(found, traces, strict=True):
        ends = torch.stack([z - t * v for z, t, v in zip(trace.z[:-1, 0], trace.times[:-1], trace.velocity[:, 0])] + [trace.z[-1, 0]])
        torch.testing.assert_close(path.z, ends, atol=1e-5, rtol=0)
        with torch.no_grad(): logits = model.vae.decode(torch.cat([before.expand(5, -1, -1), ends], 1))[:, -per_block:]
        assert torch.equal(path.tokens, logits.argmax(-1))
        torch.testing.assert_close(path.confidence, logits.softmax(-1).amax(-1), atol=1e-5, rtol=0)
        before = torch.cat([before, trace.z[-1]], 1)
    assert [path.texts[-1] for path in found] == [path.texts[-1] for path in follow(model, TOKENIZER.decode(ids), 9, CONFIG)]


def test_a_path_in_blocks_of_another_size() -> None:
    "What is known before a block is counted in the blocks that are written."
    ids = TOKENIZER.encode(STORIES[1]).ids[:5]
    paths = follow(MODEL, TOKENIZER.decode(ids), 9, replace(CONFIG, block_size=2))
    assert [path.tokens.shape[1] for path in paths] == [2] * len(paths) and [path.given for path in paths][:2] == [1, 0]
    assert paths[0].before == TOKENIZER.decode(ids[:4])


def test_a_path_begins_in_the_noise_of_its_seed() -> None:
    "The first block of a text from nothing starts at the first numbers of the seed, and another seed elsewhere."
    first = follow(MODEL, seed=11)[0]
    torch.testing.assert_close(first.z[0], torch.randn(4, 8, generator=torch.Generator().manual_seed(11)))
    assert not torch.equal(first.z[0], follow(MODEL, seed=12)[0].z[0])


def test_a_path_is_read_greedily_whatever_the_settings() -> None:
    "Temperature changes neither the words nor the blocks that follow from them."
    warm = follow(MODEL, STORIES[2][:30], 1, replace(CONFIG, temperature=2.0))
    assert [p.texts for p in warm] == [p.texts for p in follow(MODEL, STORIES[2][:30], 1)]


def made_path(tokens: list[list[int]], given: int = 0) -> BlockPath:
    "A path with these tokens and nothing else of interest."
    ids, steps = torch.tensor(tokens), len(tokens)
    names = [[str(i) for i in row] for row in tokens]
    flat = torch.randn(steps, ids.shape[1], 8, generator=torch.Generator().manual_seed(steps))
    sure = torch.linspace(0, 1, ids.numel()).reshape(ids.shape)
    return BlockPath(torch.linspace(1, 0, steps), flat, ids, sure, names, ["".join(n) for n in names], "", given)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 6).flatmap(
        lambda steps: st.lists(st.lists(st.integers(0, 2), min_size=steps, max_size=steps), min_size=1, max_size=5)
    )
)
def test_settling_times_by_walking_back(columns: list[list[int]]) -> None:
    "From the end backwards until a word differs."
    path = made_path([list(row) for row in zip(*columns)])
    wanted = []
    for column in columns:
        step = len(column) - 1
        while step and column[step - 1] == column[-1]: step -= 1
        wanted.append(path.times[step].item())
    assert settling_times(path).tolist() == wanted


def test_blocks_side_by_side(paths: list[BlockPath]) -> None:
    "Positions follow one another; what was before the first stays before."
    wide = beside(paths[:3])
    assert wide.z.shape == (5, 12, 8) and wide.tokens.shape == (5, 12)
    for i, path in enumerate(paths[:3]):
        torch.testing.assert_close(wide.z[:, 4 * i : 4 * i + 4], path.z)
        assert [row[4 * i : 4 * i + 4] for row in wide.names] == path.names
    assert wide.texts[-1] == "".join(path.texts[-1] for path in paths[:3])
    assert (wide.before, wide.given) == (paths[0].before, paths[0].given)
    with pytest.raises(ViewError, match="no blocks"): beside([])


def test_pages_hold_every_block_once(paths: list[BlockPath]) -> None:
    "As many whole blocks as fit, one where none does; the last page may be shorter."
    four = (paths + paths)[:4]
    for room, sizes in ((16, [4]), (8, [2, 2]), (11, [2, 2]), (12, [3, 1]), (3, [1, 1, 1, 1])):
        made = pages(four, room)
        assert [page.z.shape[1] for page in made] == [4 * n for n in sizes]
        torch.testing.assert_close(torch.cat([page.z for page in made], 1), torch.cat([path.z for path in four], 1))
    assert pages([]) == []


# Pictures


def test_plane_picture_puts_every_word_where_it_lies() -> None:
    "Each value's points are the projected latents of its tokens; legend and axes are labelled; no two look alike."
    axes, flat = plot_plane(PLANE, POINTS, "animal"), PLANE.project(POINTS.latents).numpy()
    drawn = {dots.get_label(): np.asarray(dots.get_offsets()) for dots in axes.collections}
    assert [*drawn] == ["other words", *POINTS.values("animal")]
    for value, where in drawn.items():
        said = [s == ("" if value == "other words" else value) for s in POINTS.said["animal"]]
        np.testing.assert_allclose(where, flat[said], atol=1e-5)
    assert [t.get_text() for t in axes.get_legend().get_texts()] == [*drawn]
    assert "variance" in axes.get_xlabel() and "variance" in axes.get_ylabel()
    looks = {(viz.OKABE_ITO[i % 8], viz._SHAPES[i % 5]) for i in range(40)}
    assert len(looks) == 40
    axes.figure.canvas.draw()


@pytest.mark.parametrize("patch_size", [1, 2])
def test_latents_are_named_by_what_they_read(patch_size: int) -> None:
    "All tokens of a patch."
    path = follow(MODEL if patch_size == 1 else tiny(2), STORIES[0][:40], 5)[0]
    names = path.names[2]
    assert latent_names(path, 2) == [" ".join(names[i * patch_size : (i + 1) * patch_size]) for i in range(4)]


def test_groups_hold_every_point_once() -> None:
    "The other words first, and no two values look alike."
    groups = point_groups(PLANE.project(POINTS.latents), POINTS, "animal")
    assert [group.name for group in groups] == ["other words", *POINTS.values("animal")]
    assert sum(len(group.where) for group in groups) == len(POINTS.tokens)
    assert len({(group.colour, group.shape) for group in groups}) == len(groups)
    with pytest.raises(ViewError, match="planet"): point_groups(PLANE.project(POINTS.latents), POINTS, "planet")


def test_points_of_one_choice_only() -> None:
    "A text without animals can be coloured by animal: everything is another word."
    points = TokenPoints(torch.randn(40, 8), ["x"] * 40, {"animal": [""] * 40})
    axes = plot_plane(LatentPlane(points.latents), points, "animal")
    assert [dots.get_label() for dots in axes.collections] == ["other words"]
