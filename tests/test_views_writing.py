"A text in the making: the grid, the bench and the theatre show what generation, editing and projection give."

import html
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from cola_tutorial.config import GenerationConfig, preset
from cola_tutorial.editing import shake_block
from cola_tutorial.generation import PromptError, generate, read_prompts
from cola_tutorial.model import ColaDLM
from cola_tutorial.screen import View, still
from cola_tutorial.text.corpus import train_tokenizer
from cola_tutorial.text.stories import Grammar
from cola_tutorial.views import writing
from cola_tutorial.views.writing import COLUMNS, crystallisation, flow_theatre, renoising
from cola_tutorial.viz import KIND, LatentPlane, ViewError, follow, pages, story_points, token_name

GRAMMAR = Grammar.load()
STORIES = [GRAMMAR.story(3, i).text for i in range(12)]
TOKENIZER = train_tokenizer([GRAMMAR.story(4, i).text for i in range(300)], vocab_size=900)
SMALL = dict(dim=32, emb_dim=32, num_heads=2, head_dim=16, rope_dim=8, num_layers=1, ffn_dim=64, latent_dim=8)
CONFIG = GenerationConfig(steps=5, max_new_tokens=26, max_length=80)
PROMPT = TOKENIZER.decode(TOKENIZER.encode(STORIES[0]).ids[:9])


def tiny(patch_size: int = 1) -> ColaDLM:
    "An untrained model with blocks of four latents; its weights are large enough to make it choose different words."
    torch.manual_seed(patch_size)
    sizes = SMALL | dict(encoder_num_blocks=1, decoder_num_blocks=1, block_size=4, patch_size=patch_size, init_std=0.3)
    model = ColaDLM(preset("tiny", TOKENIZER.get_vocab_size(), **sizes), TOKENIZER, CONFIG).eval()
    with torch.no_grad():
        for weight in model.dit.parameters(): weight.add_(0.1 * torch.randn_like(weight))
    return model


MODEL = tiny()
POINTS = story_points(MODEL, STORIES, GRAMMAR).thin(300)


def plain(text: str) -> str:
    "What a reader of HTML sees."
    return html.unescape(re.sub(r"<[^>]+>", "", text))


# The grid


def cells(view: View) -> list[list[str]]:
    "The words of all pages, row by row, as they stand in the figure."
    frames = view.last.figure.frames
    rows = [[word for frame in frames for word in frame.data[0].text[row] if word] for row in range(len(frames[0].data[0].text))]
    return [[html.unescape(word).replace("-<br>", "") for word in row] for row in rows]


@pytest.mark.parametrize("steps", [4, 24])
@pytest.mark.parametrize("seed", [0, 7])
def test_grid_ends_in_what_is_generated(steps: int, seed: int) -> None:
    "The last row is the text, page by page; the first what the trace reads in pure noise; a long run shows its ends."
    view = crystallisation(MODEL, PROMPT, 0, CONFIG, length=19)
    view.picture(seed=seed, steps=steps)
    result = generate(MODEL, [PROMPT], replace(CONFIG, steps=steps, max_new_tokens=19), [seed], trace=True)
    grid = cells(view)
    count = len(grid[0])
    wanted = [[token_name(TOKENIZER, i) for trace in result.traces for i in trace.tokens[step, 0].tolist()][1 : count + 1] for step in (0, -1)]
    assert [grid[0], grid[-1]] == wanted and len(grid) <= 17
    assert grid[-1][: len(result.tokens[0])] == [token_name(TOKENIZER, i) for i in result.tokens[0]]
    assert [frame.name for frame in view.last.figure.frames] == [f"{i + 1} of {-(-count // COLUMNS)}" for i in range(-(-count // COLUMNS))]


def test_bars_stand_where_nothing_changes_below() -> None:
    "Found by walking up each column of the drawn grid."
    view = crystallisation(MODEL, PROMPT, 3, CONFIG, length=16)
    view.picture(steps=8)
    for frame in view.last.figure.frames:
        words, marks = frame.data[0].text, frame.data[1]
        for column in range(COLUMNS):
            if words[-1][column] == "": continue
            row = len(words) - 1
            while row and words[row - 1][column] == words[-1][column]: row -= 1
            assert marks.y[3 * column] == marks.y[3 * column + 1] == row - 0.5
            assert marks.x[3 * column] < column + 1 < marks.x[3 * column + 1] and marks.y[3 * column + 2] is None


def test_grid_reads_the_predicted_end() -> None:
    "One row under the noise: the words of z_1 - v, by the trace; the shading is their probability."
    view = crystallisation(MODEL, PROMPT, 1, CONFIG, length=8)
    view.picture(reading="end", steps=4)
    paths = follow(MODEL, PROMPT, 1, replace(CONFIG, steps=4, max_new_tokens=8), ends=True)
    names = [name for path in paths for name in path.names[0]][1:]
    assert cells(view)[0] == names[: len(cells(view)[0])]
    sure = np.concatenate([path.confidence[0] for path in paths])[1:]
    shown = [value for frame in view.last.figure.frames for value in frame.data[0].z[0] if value is not None]
    np.testing.assert_allclose(shown, sure[: len(shown)], atol=6e-4)
    assert "predicted end" in view.last.alt and view.last.texts[0] != view.picture(reading="state").texts[0]


def test_grid_says_the_text_and_its_page() -> None:
    "Beneath each page stands the whole text, the page marked; words are shown, not obeyed."
    view = crystallisation(MODEL, PROMPT, 2, CONFIG, length=19)
    picture = view.picture(steps=4)
    ids = generate(MODEL, [PROMPT], replace(CONFIG, steps=4, max_new_tokens=19), [2]).tokens[0]
    for page, said in enumerate(picture.texts):
        first = page * COLUMNS
        parts = [TOKENIZER.decode(part) for part in (ids[:first], ids[first : first + COLUMNS])]
        assert PROMPT + parts[0] + parts[1] in plain(said) and f"<mark>{html.escape(parts[1])}" in said
    assert writing._cell("<b>&") == "&lt;b&gt;&amp;" and writing._cell("grandmother") == "grandm-<br>other"


def test_grid_keeps_what_it_has_written(monkeypatch: pytest.MonkeyPatch) -> None:
    "The same wish is not computed twice; the same values give the same picture."
    view = crystallisation(MODEL, PROMPT, 0, CONFIG, length=8)
    first = view.picture(steps=4)
    view.picture(seed=5)
    monkeypatch.setattr(writing, "follow", None)
    again = view.picture(seed=0)
    assert again.texts == first.texts and again.figure == first.figure


@pytest.mark.parametrize("make", [lambda text: crystallisation(MODEL, text, 0, CONFIG), lambda text: flow_theatre(MODEL, POINTS, text, 0, CONFIG)])
def test_a_prompt_that_cannot_be_continued_is_refused(make) -> None:
    "The message says why, and the values stay."
    view = make(PROMPT)
    view.picture()
    with pytest.raises(PromptError, match="80"): view.picture(prompt=" ".join(STORIES[:4]))
    assert view.values["prompt"] == PROMPT
    assert view.picture(prompt="").texts


# The bench


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("behind", ["kept", "anew"])
def test_bench_shows_what_shaking_gives(behind: str, patch_size: int) -> None:
    "Bars are the distances of the latents, hatched where a word differs; nothing stands outside what was written again."
    model = MODEL if patch_size == 1 else tiny(2)
    text, per_block = STORIES[1], 4 * patch_size
    ids = TOKENIZER.encode(text).ids
    blocks = 1 if behind == "kept" else -(-len(ids) // per_block) - 3
    edit = shake_block(model, text, 3, 0.75, CONFIG, [4], blocks)
    old, new = read_prompts(model, [ids]).latents[0, 12:], edit.latents[0]
    wanted = [(a - b).square().sum().sqrt().item() for a, b in zip(old, new)][: -(-len(ids) // patch_size) - 12]
    picture = renoising(model, text, 3, 0.75, CONFIG).picture(seed=4, behind=behind)
    same, changed, kept, usual = picture.figure.data
    heights = {x: y for bars in (same, changed) for x, y in zip(bars.x, bars.y) if y is not None}
    assert [*heights] != [] and sorted(heights) == [*range(13, 13 + len(wanted))]
    np.testing.assert_allclose([heights[x] for x in sorted(heights)], wanted, rtol=1e-4)
    cut = lambda row: [row[i : i + patch_size] for i in range(0, len(row), patch_size)]
    differ = {i + 1 for i, (a, b) in enumerate(zip(cut(ids), cut(edit.tokens[0]))) if a != b}
    assert {x for x, y in zip(changed.x, changed.y) if y is not None} == differ and changed.marker.pattern.shape == "/"
    assert set(kept.x).isdisjoint(heights) and not any(kept.y)
    assert edit.texts[0] in plain(picture.texts) or not model.tokenizer


def test_bench_leaves_what_stands_before() -> None:
    "Counted in the text beneath, for every block and both ways; what differs is said in words."
    view = renoising(MODEL, STORIES[2], 0, 1.0, CONFIG)
    ids = TOKENIZER.encode(STORIES[2]).ids
    for block in (0, 1, 5):
        for behind in ("kept", "anew"):
            picture = view.picture(block=block, behind=behind)
            assert f"Before the block {4 * block} of {4 * block} tokens are identical" in picture.texts
            assert f"behind it {len(ids) - 4 * block - 4 if behind == 'kept' else 0} were not touched" in picture.texts
            assert ("→" in picture.texts) == ("<mark>" in picture.texts)
    again = writing._compared(MODEL, ids, ids, 4, 8)
    assert "4 of 4 tokens came back" in again and "<mark>" not in again and "→" not in again


def test_bench_takes_another_text() -> None:
    "The list of blocks follows the text; a block that a shorter text lacks becomes its last."
    view = renoising(MODEL, STORIES[2], 9, 0.5, CONFIG)
    view.picture()
    short = TOKENIZER.decode(TOKENIZER.encode(STORIES[3]).ids[:10])
    picture = view.picture(text=short)
    assert view.values["block"] == 2 and [value for _, value in picture.controls[0].options] == [0, 1, 2]
    assert [name for name, _ in picture.controls[0].options][0].startswith("1: ")
    assert len(view.picture(text=STORIES[2], block=2).controls[0].options) > 3
    with pytest.raises(PromptError, match="empty"): view.picture(text="")
    with pytest.raises(PromptError, match="80"): view.picture(text=" ".join(STORIES[:3]))
    with pytest.raises(ViewError): view.picture(t=0.0)


def test_still_of_the_bench_goes_through_the_times() -> None:
    "A frame for each time, the one that was chosen first."
    view = renoising(MODEL, STORIES[2], 1, 1.0, CONFIG)
    view.picture()
    figure = still(view)
    assert len(figure.frames) == 11 and figure.layout.meta["cola"]["start"] == 10
    assert len({text for text in figure.layout.meta["cola"]["texts"]}) > 1


# The theatre


def moving(view: View, step: int) -> list:
    "The traces that move, as they are at a step: way, latents, bars, words at the end."
    return view.last.figure.frames[step].data


def test_theatre_follows_the_page() -> None:
    "Latents are projected, bars are probabilities, and frames are times; each page is that of the whole text."
    view, plane = flow_theatre(MODEL, POINTS, PROMPT, 3, CONFIG), LatentPlane(POINTS.latents)
    whole = pages(follow(MODEL, PROMPT, 3, CONFIG))
    assert len(whole) == 2
    for number, path in enumerate(whole, 1):
        picture = view.picture(page=number)
        assert [frame.name for frame in picture.figure.frames] == [f"{t:.2f}" for t in path.times.tolist()]
        for step in range(len(path.times)):
            way, latents, bars, words = moving(view, step)
            np.testing.assert_allclose(np.stack([latents.x, latents.y], 1), plane.project(path.z[step]), atol=1e-4)
            np.testing.assert_allclose(bars.x, path.confidence[step], atol=1e-6)
            assert list(words.text) == [html.escape(name) for name in path.names[step]]
            assert np.isnan(way.x).sum() == path.z.shape[1] and len(way.x) == path.z.shape[1] * (step + 2)
            assert path.texts[step] in plain(picture.texts[step]) and path.before in plain(picture.texts[step])


def test_theatre_ends_where_the_text_ends() -> None:
    "A page beyond the end is the last one, and that is said."
    view = flow_theatre(MODEL, POINTS, PROMPT, 3, CONFIG)
    picture = view.picture(page=4)
    assert view.values["page"] == 2 and "ends on this page" in picture.texts[0]
    assert "ends on this page" not in view.picture(page=1).texts[0]


@pytest.mark.parametrize(("ghost", "other"), [("seed", (4, 1.0)), ("2", (3, 2.0)), ("0", (3, 0.0))])
def test_a_ghost_is_the_same_page_of_another_text(ghost: str, other: tuple[int, float]) -> None:
    "Under other noise or guidance; its words stand behind those that differ."
    view, plane = flow_theatre(MODEL, POINTS, PROMPT, 3, CONFIG), LatentPlane(POINTS.latents)
    view.picture(ghost=ghost, page=1)
    path, twin = (pages(follow(MODEL, PROMPT, seed, replace(CONFIG, guidance_scale=weight)))[0] for seed, weight in ((3, 1.0), other))
    way, rings, _, latents, _, words = moving(view, 5)
    np.testing.assert_allclose(np.stack([rings.x, rings.y], 1), plane.project(twin.z[5]), atol=1e-4)
    np.testing.assert_allclose(np.stack([latents.x, latents.y], 1), plane.project(path.z[5]), atol=1e-4)
    pairs = [(html.escape(a), html.escape(b)) for a, b in zip(path.names[5], twin.names[5])]
    assert list(words.text) == [a if a == b else f"{a} ({b})" for a, b in pairs]
    start = moving(view, 0)
    if ghost != "seed": np.testing.assert_allclose(start[1].x[1:4], start[3].x[1:4])  # the same noise
    names = [trace.name for trace in view.last.figure.data]
    assert "ghost" in names and "ghost" not in [trace.name for trace in view.picture(ghost="none").figure.data]


def test_badge_counts_true_neighbours() -> None:
    "By hand, at every time; and what it calls large or small is so."
    view, plane = flow_theatre(MODEL, POINTS, PROMPT, 3, CONFIG), LatentPlane(POINTS.latents)
    picture, path, cloud = view.picture(page=1), pages(follow(MODEL, PROMPT, 3, CONFIG))[0], plane.project(POINTS.latents)
    for step, text in enumerate(picture.texts):
        true = 0
        for z, place in zip(path.z[step], plane.project(path.z[step])):
            near = POINTS.tokens[int((POINTS.latents - z).square().sum(1).argmin())]
            true += near == POINTS.tokens[int((cloud - place).square().sum(1).argmin())]
        assert f"For {true} of 16 latents" in text
    said = [re.search("Distortion: (\\w+)", writing._badge(plane, true, 12))[1] for true in (0, 4, 5, 7, 8, 12)]
    assert said == ["large", "large", "moderate", "moderate", "small", "small"]


def test_planes_and_colours_can_be_chosen() -> None:
    "Every choice that names two values colours the words; the plane of centres belongs to the choice."
    view = flow_theatre(MODEL, POINTS, PROMPT, 3, CONFIG)
    assert KIND in [value for _, value in view.controls["choice"].options]
    for choice in ("animal", "colour", KIND):
        picture = view.picture(method="centres", choice=choice)
        plane = LatentPlane(POINTS.latents, "centres", labels=POINTS.said[choice])
        path = pages(follow(MODEL, PROMPT, 3, CONFIG))[0]
        latents = moving(view, 2)[1]
        np.testing.assert_allclose(np.stack([latents.x, latents.y], 1), plane.project(path.z[2]), atol=1e-4)
        names = [trace.name for trace in picture.figure.data]
        assert [name for name in names if name in POINTS.values(choice)] == POINTS.values(choice)
        assert "word centres" in picture.figure.layout.xaxis.title.text and choice in picture.alt


def test_theatre_computes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    "UMAP is fitted once, when asked for, and projects page and ghost in one call; colours and planes write no text."
    calls = []

    class Plane(LatentPlane):
        "Straight, but counts."

        def __init__(self, latents: torch.Tensor, method: str = "pca", **options: object):
            calls.append(f"fit {method}")
            super().__init__(latents, "pca" if method == "umap" else method, **options)

        def project(self, latents: torch.Tensor) -> torch.Tensor:
            "As it is, and noted."
            calls.append(tuple(latents.shape[:-1]))
            return super().project(latents)

    monkeypatch.setattr(writing, "LatentPlane", Plane)
    view = flow_theatre(MODEL, POINTS, PROMPT, 3, CONFIG)
    view.picture(ghost="seed")
    assert "fit umap" not in calls
    monkeypatch.setattr(writing, "follow", None)
    view.picture(method="umap")
    assert calls[-1] == (6, 32)  # times, latents of both
    before = len(calls)
    view.picture(choice="colour")
    view.picture(method="pca")
    view.picture(method="umap", choice="animal")
    assert len(calls) == before and calls.count("fit umap") == 1


def test_still_of_the_theatre_is_small() -> None:
    "It brings a frame for each time, in room for a page."
    view = flow_theatre(MODEL, POINTS, PROMPT, 3, CONFIG)
    figure = still(view)
    assert len(figure.frames) == 6 and len(figure.to_json()) < 400_000
    assert "16 latents" in figure.layout.meta["cola"]["alt"]
