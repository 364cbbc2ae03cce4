"Who sees whom: tables that are painted and judged, attention weights that explain the output, and a cache whose diary is true."

import base64
import json
from dataclasses import replace

import numpy as np
import plotly.graph_objects as go
import pytest
import torch

from cola_tutorial.config import GenerationConfig, preset
from cola_tutorial.flow import bridge
from cola_tutorial.generation import generate, read_prompts
from cola_tutorial.model import ColaDLM
from cola_tutorial.nn import attention
from cola_tutorial.nn.attention import attention_mask, two_copy_mask
from cola_tutorial.screen import still
from cola_tutorial.text.corpus import train_tokenizer
from cola_tutorial.text.stories import Grammar
from cola_tutorial.views import seeing
from cola_tutorial.views.seeing import attention_map, attention_weights, cache_diary, cache_view, mask_painter
from cola_tutorial.viz import ViewError

GRAMMAR = Grammar.load()
STORIES = [GRAMMAR.story(3, i).text for i in range(4)]
TOKENIZER = train_tokenizer([GRAMMAR.story(4, i).text for i in range(300)], vocab_size=900)
SMALL = dict(dim=32, emb_dim=32, num_heads=2, head_dim=16, rope_dim=8, num_layers=3, ffn_dim=64, latent_dim=8, encoder_num_blocks=1, decoder_num_blocks=1)


def tiny(patch_size: int = 1, block_size: int = 4) -> ColaDLM:
    "An untrained model whose weights are large enough to make it look here and there."
    torch.manual_seed(patch_size)
    sizes = SMALL | dict(block_size=block_size, patch_size=patch_size, init_std=0.3)
    model = ColaDLM(preset("tiny", TOKENIZER.get_vocab_size(), **sizes), TOKENIZER, GenerationConfig(steps=4, max_new_tokens=12)).eval()
    with torch.no_grad():
        for weight in model.dit.parameters(): weight.add_(0.2 * torch.randn_like(weight))
    return model


MODEL = tiny()
TEXT = STORIES[0][:69]


# Painting


@pytest.mark.parametrize("layout", ["training", "generation"])
@pytest.mark.parametrize("latents, size", [(2, 1), (6, 2), (7, 3), (8, 4)])
def test_the_real_mask_scores_all_and_each_slip_is_told(layout: str, latents: int, size: int) -> None:
    "Every single wrong cell is found, on its own, with the sentence that the mask would say."
    view = mask_painter(size, latents, layout, "real")
    real = two_copy_mask(latents, size) if layout == "training" else attention_mask("block_causal", latents, size)
    view.picture()
    assert "Score 100" in view.picture(check=True).texts
    for i, j in np.ndindex(*real.shape):
        if (i + 3 * j) % 17: continue
        cells = real.int()
        cells[i, j] = 1 - cells[i, j]
        told = view.picture(cells=cells.tolist(), check=True)
        copies = [("clean ", "noisy ")[k // latents] if layout == "training" else "" for k in (i, j)]
        sentence = f"{copies[0]}latent {i % latents} {'must' if real[i, j] else 'may not'} see {copies[1]}latent {j % latents}: "
        assert told.texts.count("<li>") == 1 and f"<li>{sentence}" in told.texts
        marks = [(y, x) for trace in told.figure.data[1:] for x, y in zip(trace.x, trace.y)]
        assert marks == [(i, j)] and told.figure.data[1].x == (() if real[i, j] else (j,))


def test_the_answer_beside_the_question_is_named() -> None:
    "The mistake that would teach the model to copy."
    view = mask_painter(2, 6, start="real")
    view.picture()
    cells = two_copy_mask(6, 2).int()
    cells[6 + 3, 3] = 1
    assert "noisy latent 3 may not see clean latent 3: that would be the answer." in view.picture(cells=cells.tolist(), check=True).texts


def test_the_score_counts_pairs_that_either_has() -> None:
    "Sets of pairs, counted apart; an empty table is worth nothing."
    view, real = mask_painter(3, 5, start="empty"), two_copy_mask(5, 3)
    assert "Score 0 of 100" in view.picture(check=True).texts
    painted = torch.rand(10, 10, generator=torch.Generator().manual_seed(0)) < 0.4
    mine, theirs = ({(i, j) for i, j in mask.nonzero().tolist()} for mask in (painted, real))
    told = view.picture(cells=painted.int().tolist(), check=True).texts
    assert f"Score {round(100 * len(mine & theirs) / len(mine | theirs))} of 100" in told and f"{len(mine ^ theirs)} of 100 cells are wrong" in told


def test_tables_are_laid_kept_and_cleared() -> None:
    "A size lays a new table, painting keeps the old one, and buttons do what they say; a button is no state."
    view = mask_painter(2, 6)
    first = view.picture()
    assert view.values["cells"] == torch.ones(12, 12, dtype=torch.int).tril().tolist() and "Score 50 of 100" in first.texts
    eye = torch.eye(12, dtype=torch.int).tolist()
    painted = view.picture(cells=eye)
    assert not painted.controls and "Score" not in painted.texts and "c5 no longer sees c0" not in painted.texts and view.values["cells"] == eye
    eye[1][0] = 1
    assert "c1 now sees c0." in view.picture(cells=eye).texts and "c1 now sees c0." in view.picture().texts
    assert "Score" in view.picture(check=True).texts and "Score" not in view.picture().texts
    grown = view.picture(latents=8)
    assert len(view.values["cells"]) == 16 and {control.name for control in grown.controls} == {"start", "cells"}
    view.picture(layout="generation", reveal=True)
    assert view.values["cells"] == attention_mask("block_causal", 8, 2).int().tolist() and view.values["start"] == "real"
    view.picture(clear=True)
    assert not any(map(any, view.values["cells"])) and (view.values["start"], view.values["clear"]) == ("empty", False)


@pytest.mark.parametrize("cells", [[[1, 0], [0, 1]], [[2] * 12] * 12, [[0] * 12] * 11, ["000000000000"] * 12])
def test_a_table_of_another_kind_is_refused(cells: list) -> None:
    "What does not fit changes nothing."
    view = mask_painter(2, 6)
    view.picture()
    before = view.values["cells"]
    with pytest.raises(ViewError, match="12 rows of 12"): view.picture(cells=cells)
    assert view.values["cells"] == before


def test_the_stills_frames_are_the_beginnings() -> None:
    "Without a kernel: the empty table, two guesses with what is wrong with them, and the real mask."
    figure = still(mask_painter())
    texts = figure.layout.meta["cola"]["texts"]
    assert [frame.name for frame in figure.frames] == ["an empty table", "a causal mask, laid over all", "everyone sees everyone", "the real mask"]
    assert ["Score" in text for text in texts] == [False, True, True, False] and figure.layout.meta["cola"]["start"] == 1
    assert still(mask_painter()).to_json() == figure.to_json()


# Attention


def weights_by_cache(model: ColaDLM, z_0: torch.Tensor, z_t: torch.Tensor, t: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> list[list[torch.Tensor]]:
    "Softmax of each layer (B, H, size, M), for block after block with a cache, in double precision."
    found, blocks, size = [], [], model.config.dit.block_size
    plain = attention.attend

    def noted(q, k, v, mask=None, dropout=0.0):
        found.append((q.double() @ k.double().mT / q.shape[-1] ** 0.5).softmax(-1))
        assert mask is None
        return plain(q, k, v, mask, dropout)

    monkeypatch.setattr(attention, "attend", noted)
    cache = model.dit.new_cache(len(z_0), z_0.shape[1])
    for start in range(0, z_0.shape[1], size):
        found.clear()
        model.dit(z_t[:, start : start + size], t, cache=cache)
        blocks.append([*found])
        model.dit(z_0[:, start : start + size], torch.zeros(len(z_0)), cache=cache)
        cache.commit(size)
    monkeypatch.undo()
    return blocks


@torch.no_grad()
def test_weights_are_those_of_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    "What one pass over all blocks finds is what each block looks at when it is written with a cache."
    z_0, z_1 = torch.randn(2, 3, 12, 8, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0.9, 0.5, 0.0])
    z_t = bridge(z_0, z_1, t)[0]
    found = attention_weights(MODEL, z_0, z_t, t)
    assert found.weights.shape == (3, 3, 2, 12, 12) and found.gap < 1e-5
    for b, layers in enumerate(weights_by_cache(MODEL, z_0, z_t, t, monkeypatch)):
        own, seen = slice(4 * b, 4 * b + 4), 4 * b + 4
        theirs = torch.stack(layers, 1).float()
        torch.testing.assert_close(found.weights[:, :, :, own, :seen], theirs, atol=1e-5, rtol=1e-4)
        assert not found.weights[:, :, :, own, seen:].any()
    assert all(not block.msa._forward_hooks for block in MODEL.dit.blocks)


def test_weights_that_explain_nothing_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    "An attention that does something else is noticed, and no hook stays behind."
    plain = attention.Sight.attend
    monkeypatch.setattr(attention.Sight, "attend", lambda *args: 2 * plain(*args))
    with pytest.raises(ViewError, match="changed attention"): attention_map(MODEL, TEXT).picture()
    monkeypatch.setattr(MODEL.dit, "two_copy_velocity", lambda *args: 1 / 0, raising=False)
    with pytest.raises(ZeroDivisionError): attention_weights(MODEL, torch.zeros(1, 4, 8), torch.zeros(1, 4, 8), torch.zeros(1))
    assert all(not block.msa._forward_hooks for block in MODEL.dit.blocks)


def expected(model: ColaDLM, text: str, seed: int) -> torch.Tensor:  # (T, layers, H, N, N)
    "Weights as the view must find them."
    ids = TOKENIZER.encode(text).ids
    n = -(-len(ids) // model.config.vae.patch_size)
    z_0, times = read_prompts(model, [ids]).latents[:, :n].expand(5, -1, -1), torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
    z_1 = torch.randn(1, n, 8, generator=torch.Generator().manual_seed(seed)).expand(5, -1, -1)
    return attention_weights(model, z_0, bridge(z_0, z_1, times)[0], times).weights


@pytest.mark.parametrize("patch_size", [1, 2])
def test_one_position_shows_all_layers_and_heads(patch_size: int) -> None:
    "Rows are layers and heads, frames are times; what cannot be seen is empty."
    model = tiny(patch_size)
    view, found = attention_map(model, TEXT, position=5, seed=3), expected(model, TEXT, 3)
    picture = view.picture()
    assert [frame.name for frame in picture.figure.frames] == ["1", "0.75", "0.5", "0.25", "0"] and len(picture.texts) == 5
    for frame, weights in zip(picture.figure.frames, found):
        rows = np.array(frame.data[0].z, dtype=float)
        np.testing.assert_allclose(rows[:, :8], weights[:, :, 5, :8].flatten(0, 1), atol=1e-6)
        assert np.isnan(rows[:, 8:]).all()
    names = [name for name, _ in view.controls["position"].options]
    assert len(names) == found.shape[-1] and names[0].startswith("0 ")
    strongest = found[0, :, :, 5].max()
    assert f"gives {strongest:.0%} to" in picture.texts[0] and picture.alt in picture.alt.replace("<", "") and f"{strongest:.0%}" in picture.alt
    assert view.picture(position=2).figure.frames[0].data[0].z[0][4] is None  # the first block sees itself alone


def test_one_head_shows_all_positions_and_the_mean_is_one() -> None:
    "A square of weights for a layer and a head, or for the mean of heads."
    view, found = attention_map(MODEL, TEXT), expected(MODEL, TEXT, 0)
    for layer, head, theirs in ((2, 1, found[:, 1, 0]), (3, 0, found[:, 2].mean(1))):
        picture = view.picture(look="head", layer=layer, head=head)
        for frame, weights in zip(picture.figure.frames, theirs):
            np.testing.assert_allclose(np.nan_to_num(np.array(frame.data[0].z, dtype=float)), weights, atol=1e-6)
        back = torch.arange(len(theirs[0]))[:, None] - torch.arange(len(theirs[0]))
        assert f"looks {(theirs[0] * back).sum(-1).mean():.1f} latents back" in picture.texts[0]


def test_another_text_and_what_is_none() -> None:
    "Positions follow the text; words are escaped; a text that cannot be shown is refused and changes nothing."
    view = attention_map(MODEL, TEXT)
    view.picture()
    view.picture(text="<b> & Tom", position=view.values["position"])
    assert len(view.controls["position"].options) == len(TOKENIZER.encode("<b> & Tom").ids) and view.values["position"] < len(view.controls["position"].options)
    assert all("<b> " not in words and "&lt;" in "".join(view.picture(position=0).texts) for words in view.last.texts)
    for text, words in (("", "at least one word"), ("Tom " * 90, "at most 80")):
        with pytest.raises(ViewError, match=words): view.picture(text=text)
    assert view.values["text"] == "<b> & Tom"
    with pytest.raises(ViewError, match="position is 99"): attention_map(MODEL, TEXT, position=99)
    with pytest.raises(ViewError, match="tokenizer"): attention_map(ColaDLM(MODEL.config))


def test_weights_are_kept_and_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    "Another position or head asks the model nothing; another seed does; not everything is kept for ever."
    view, asked = attention_map(MODEL, TEXT), []
    plain = seeing.attention_weights
    monkeypatch.setattr(seeing, "attention_weights", lambda *args: asked.append(1) or plain(*args))
    for change in ({}, {"position": 1}, {"look": "head"}, {"head": 2}): view.picture(**change)
    assert len(asked) == 1
    first = view.picture(seed=0).figure.to_json()
    for seed in (1, 2, 3, 4, 0): again = view.picture(seed=seed).figure.to_json()
    assert len(asked) == 6 and again == first


# The cache


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("patch_size", [1, 2])
def test_the_diary_is_true(merge: bool, patch_size: int) -> None:
    "Noted calls are what the sampler must do, the text is the sampler's own, and what is kept would be computed anew."
    model = tiny(patch_size)
    entries, writer = cache_diary(model, TEXT, 3, 5, 4, merge)
    ids, per_block = TOKENIZER.encode(TEXT).ids, 4 * patch_size
    whole, given = len(ids) // per_block * 4, len(ids) % per_block
    settings = replace(model.generation, num_blocks=3, temperature=0.0)
    written = generate(model, [ids], settings, [5])
    torch.testing.assert_close(torch.cat([entry.latents for entry in entries]), written.latents[0][: 4 * len(entries)], atol=1e-4, rtol=1e-4)
    assert len(entries) == 3 and given
    for b, entry in enumerate(entries):
        start, clean = whole + 4 * b, 4 * (merge and b > 0)
        assert entry.kept == start
        assert entry.times == [0] * (start - clean) + [1] * clean + [4 + (not merge)] * 4
        assert entry.needed == (4 + (not merge)) * (start + 4)
        assert entry.held == 3 * 2 * 2 * 16 * 4 * (start if merge else start + 4) and entry.room == writer.prior.memory.nbytes
    latents = torch.cat([read_prompts(model, [ids]).latents[0, :whole], *(entry.latents for entry in entries)])[None]
    anew, length = model.dit.new_cache(1, latents.shape[1]), writer.prior.length
    with torch.no_grad(): model.dit(latents, torch.zeros(1), attention_mask("block_causal", latents.shape[1], 4), anew)
    torch.testing.assert_close(writer.prior.memory[..., :length, :], anew.memory[..., :length, :], atol=1e-3, rtol=1e-3)


def test_the_cache_is_drawn_block_by_block() -> None:
    "Each frame has one row more; names stand under all slots; the numbers are the diary's."
    view = cache_view(MODEL, TEXT, 3, 5, 4)
    picture, (entries, _) = view.picture(), cache_diary(MODEL, TEXT, 3, 5, 4)
    ids = TOKENIZER.encode(TEXT).ids
    assert [frame.name for frame in picture.figure.frames] == ["1", "2", "3"] and picture.start == 2
    assert len(picture.figure.layout.xaxis.ticktext) == len(ids) // 4 * 4 + 12
    for i, frame in enumerate(picture.figure.frames):
        rows = [[value for value in row if value is not None] for row in frame.data[0].z]
        assert rows == [entry.times for entry in entries[: i + 1]] + [[]] * (2 - i)
        assert [*frame.data[2].y] == [sum(entry.times) for entry in entries[: i + 1]]
        assert f"<td>{entries[i].needed:,} (" in picture.texts[i] and f"{entries[i].held:,} of {entries[i].room:,} bytes" in picture.texts[i]
    with pytest.raises(ValueError, match="no text"): view.picture(prompt="")
    with pytest.raises(ViewError, match="tokenizer"): cache_view(ColaDLM(MODEL.config))
    assert view.picture(prompt=TEXT).figure.to_json() == picture.figure.to_json()


def test_stills_carry_their_tables_and_are_small() -> None:
    "Tables go as bytes with a shape, which the drawing library reads; a still has room in a notebook."
    for view in (mask_painter(), attention_map(MODEL, TEXT), cache_view(MODEL, TEXT, 3)):
        answer = view.answer({})
        figure = answer["picture"]["figure"]
        table = figure["data"][0]["z"]
        if isinstance(table, dict):
            shape = [int(part) for part in table["shape"].split(",")]
            assert len(base64.b64decode(table["bdata"])) == 4 * shape[0] * shape[1]
        assert len(json.dumps(figure)) < 120_000 and isinstance(view.last.figure, go.Figure)
