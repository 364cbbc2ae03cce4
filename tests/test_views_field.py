"The field and the walk: a drawing's score, a guided step in its plane, solvers on the bench, with a tiny untrained model."

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from cola_tutorial.config import GenerationConfig, preset
from cola_tutorial.flow import guide
from cola_tutorial.generation import PromptError, generate
from cola_tutorial.model import ColaDLM
from cola_tutorial.screen import reply, still
from cola_tutorial.text.corpus import train_tokenizer
from cola_tutorial.text.stories import Grammar
from cola_tutorial.views.field import (
    Clouds,
    answers_plane,
    be_the_field,
    drawn_velocity,
    flow_errors,
    guidance_dissector,
    solver_bench,
    step_bench,
    straightness,
    weighed_texts,
)
from cola_tutorial.viz import ViewError

GRAMMAR = Grammar.load()
TOKENIZER = train_tokenizer([GRAMMAR.story(4, i).text for i in range(300)], vocab_size=900)
SMALL = dict(dim=32, emb_dim=32, num_heads=2, head_dim=16, rope_dim=8, num_layers=1, ffn_dim=64, latent_dim=8)
CONFIG = GenerationConfig(steps=4, max_new_tokens=12, max_length=40)
CLOUDS = Clouds()
START = "Tom lived near the mill with his sister."


def tiny(patch_size: int = 1, block_size: int = 4) -> ColaDLM:
    "An untrained model; its weights are large enough to make it choose different words."
    torch.manual_seed(patch_size)
    sizes = SMALL | dict(encoder_num_blocks=1, decoder_num_blocks=1, block_size=block_size, patch_size=patch_size, init_std=0.3)
    model = ColaDLM(preset("tiny", TOKENIZER.get_vocab_size(), **sizes), TOKENIZER, CONFIG).eval()
    with torch.no_grad():
        for weight in model.dit.parameters(): weight.add_(0.1 * torch.randn_like(weight))
    return model


MODEL = tiny()


# The toy


def test_optimum_is_the_mean_of_the_pairs_that_pass() -> None:
    "Among very many simulated pairs, those that come by a place have the velocity of the closed form on average."
    source = torch.Generator().manual_seed(1)
    z_0, z_1, t = CLOUDS.draw(2_000_000, source), torch.randn(2_000_000, 2, generator=source), 0.5
    z_t = (1 - t) * z_0 + t * z_1
    for place in ([0.3, 0.2], [-0.9, 0.1], [0.5, -0.5]):
        near = (z_t - torch.tensor(place)).norm(dim=-1) < 0.06
        assert near.sum() > 500
        torch.testing.assert_close(CLOUDS.velocity(torch.tensor([place]), t)[0], (z_1 - z_0)[near].mean(0), atol=0.12, rtol=0)


def test_best_still_field_is_the_mean_over_all_times() -> None:
    "Pairs at random times that come by a place, simulated, have its velocity on average; so within a part of the times."
    source = torch.Generator().manual_seed(2)
    z_0, z_1 = CLOUDS.draw(2_000_000, source), torch.randn(2_000_000, 2, generator=source)
    for high, low in ((1.0, 0.0), (1.0, 0.5), (0.5, 0.0)):
        t = low + (high - low) * torch.rand(len(z_0), 1, generator=source)
        z_t = (1 - t) * z_0 + t * z_1
        for place in ([0.4, 0.3], [-0.8, -0.2]):
            near = (z_t - torch.tensor(place)).norm(dim=-1) < 0.06
            torch.testing.assert_close(CLOUDS.still_velocity(torch.tensor([place]), high, low)[0], (z_1 - z_0)[near].mean(0), atol=0.15, rtol=0)


def test_no_change_of_the_best_still_field_makes_it_better() -> None:
    "Bent in any of several ways, it has a larger error; the optimum, which sees t, a smaller one."
    bends = {"right": lambda z: torch.tensor([0.3, 0.0]), "inwards": lambda z: 0.3 * z, "round": lambda z: 0.3 * z.flip(-1) * torch.tensor([1.0, -1.0])}
    fields = {name: lambda z, t, bend=bend: CLOUDS.still_velocity(z) + bend(z) for name, bend in bends.items()}
    errors = flow_errors(CLOUDS, fields | {"best": lambda z, t: CLOUDS.still_velocity(z), "optimum": lambda z, t: CLOUDS.answer(z, t)[0]})
    assert errors["optimum"] < errors["best"] < min(errors[name] for name in bends)


def test_arrows_act_where_they_begin_and_fade() -> None:
    "Half-way between two arrows acts their mean; no arrows are a field that stands still."
    arrows = torch.tensor([[0.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 1.0]])
    middle = drawn_velocity(arrows, torch.tensor([[0.5, 0.0]]))[0]
    assert middle[0] == middle[1] and -0.5 < middle[0] < -0.45
    assert drawn_velocity(arrows, torch.tensor([[5.0, 5.0]])).abs().max() < 1e-6
    assert drawn_velocity(torch.zeros(0, 4), torch.randn(3, 2)).abs().max() == 0


# Be the field


def arrived(text: str) -> int:
    "How many particles a picture says have arrived."
    return int(re.search(r"(\d+) of \d+ particles arrive", text)[1])


def test_field_scores_what_is_drawn() -> None:
    "No arrows: 0%. The best still field, read off densely: nearly 100%. The optimum brings nearly all particles home."
    view = be_the_field(particles=100)
    assert "reach 0% of" in view.picture(strokes=[]).alt
    places = torch.cartesian_prod(*2 * [torch.linspace(-3, 3, 15)])
    score = {}
    for part, span in (("all", (1.0, 0.0)), ("early", (1.0, 0.5)), ("late", (0.5, 0.0))):
        best = torch.cat([places, -CLOUDS.still_velocity(places, *span)], 1)
        score[part] = int(re.search(r"reach (-?\d+)%", view.picture(strokes=best.tolist(), part=part).alt)[1])
    assert all(85 < value <= 100 for value in score.values()), score
    optimum, mine = (view.picture(strokes=[], part="all", follow=follow).texts for follow in ("optimum", "my arrows"))
    assert arrived(optimum) > 90 > 30 > arrived(mine)


def test_field_frames_are_the_particles_on_their_way() -> None:
    "The first frame is the noise, the names go from 1 to 0, and the count beneath is that of the last frame."
    picture = be_the_field(particles=80, steps=10).picture(follow="optimum")
    frames = picture.figure.frames
    assert [frame.name for frame in frames] == [f"{1 - i / 10:.2f}" for i in range(11)]
    first, last = (np.stack([frame.data[-1].x, frame.data[-1].y], 1) for frame in (frames[0], frames[-1]))
    np.testing.assert_allclose(first, torch.randn(80, 2, generator=torch.Generator().manual_seed(1)).numpy(), atol=1e-6)
    distance = np.linalg.norm(last[:, None] - np.array(CLOUDS.centres), axis=-1).min(1)
    assert arrived(picture.texts) == (distance <= 3 * CLOUDS.spread).sum()


def test_field_part_decides_who_moves_the_particles() -> None:
    "Counted late, the optimum moves them until t = 0.5, and without arrows they stand still from there."
    late = be_the_field((), particles=20, steps=10).picture(part="late").figure.frames
    optimum = be_the_field((), particles=20, steps=10).picture(follow="optimum").figure.frames
    at = lambda frames, i: frames[i].data[-1].x
    np.testing.assert_array_equal(at(late, 5), at(optimum, 5))
    np.testing.assert_array_equal(at(late, 5), at(late, 10))
    early = be_the_field((), particles=20, steps=10).picture(part="early").figure.frames
    np.testing.assert_array_equal(at(early, 0), at(early, 5))
    assert np.abs(at(early, 5) - at(early, 10)).max() > 0.1


def test_field_buttons_take_arrows_back() -> None:
    "Undo takes the last, clear all; the browser is told the rest; with none left both do nothing."
    view = be_the_field(particles=10, steps=4)
    arrows = view.values["strokes"]
    picture = view.picture(undo=True)
    assert view.values["strokes"] == arrows[:-1] and [control.name for control in picture.controls] == ["strokes"]
    assert view.values["undo"] is False
    assert view.picture(strokes=[*arrows, [0.0, 0.0, 1.0, 1.0]]).controls == ()  # a drawn arrow is never answered with old ones
    view.picture(clear=True)
    assert view.values["strokes"] == []
    assert view.picture(undo=True).controls == () == view.picture(clear=True).controls


@pytest.mark.parametrize("bad", [[[1, 2, 3]], [["a", 0, 0, 0]], [[float("nan"), 0, 0, 0]], [[0, 0, 0, 0, 0]], [7]])
def test_field_refuses_what_is_no_arrow(bad: list) -> None:
    "It says so, and what was drawn stays."
    view = be_the_field(particles=10, steps=4)
    before = view.values["strokes"]
    with pytest.raises(ViewError, match="four numbers"): view.picture(strokes=bad)
    assert view.values["strokes"] == before


def test_field_needs_a_time_in_the_middle() -> None:
    "An odd number of steps never stands at t = 0.5."
    with pytest.raises(ViewError, match="even"): be_the_field(steps=5)


# Guidance


def test_plane_keeps_lengths_and_angles() -> None:
    "Every combination has the length in the plane that it has in full; the conditional lies on the first axis."
    u, c = torch.randn(2, 7, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    flat_c, flat_u = answers_plane(c, u)
    for w in (0.0, 0.7, 1.0, 4.0):
        torch.testing.assert_close(guide(flat_u, flat_c, w).norm(dim=-1), guide(u, c, w).square().mean(-1).sqrt())
    assert flat_c[:, 1].abs().max() == 0 and (flat_u[:, 1] >= 0).all()


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("prompt", [START, "Tom lived", ""])
def test_each_row_is_the_text_of_its_weight(patch_size: int, prompt: str) -> None:
    "Tokens and velocities are those that the sampler and its trace give for one weight at a time."
    model = tiny(patch_size)
    per_block = model.config.tokens_per_block
    found = weighed_texts(model, prompt, 5, (0.0, 1.0, 3.0), blocks=3)
    for row, w in enumerate(found.weights):
        config = replace(CONFIG, guidance_scale=w, num_blocks=3, max_length=200)
        alone = generate(model, [prompt] if prompt else 1, config, [5], trace=True)
        for block, trace in enumerate(alone.traces):
            assert trace.tokens[-1, 0].tolist() == found.tokens[row, block].tolist()
            torch.testing.assert_close(trace.conditional[:, 0], found.conditional[block, :, row], atol=1e-4, rtol=1e-4)
            asked = trace.unconditional[:, 0]
            if not asked.isnan().any(): torch.testing.assert_close(asked, found.unconditional[block, :, row], atol=1e-4, rtol=1e-4)
    ids = len(found.prompt)
    assert found.history == (ids >= per_block) and found.given == -(-(ids % per_block) // patch_size)


def test_dissector_shows_the_numbers_of_the_walk() -> None:
    "Sizes, angles and arrows are those of the full vectors; the frames are the times at which the prior was asked."
    view = guidance_dissector(MODEL, START, 5, CONFIG, (0.0, 1.0, 3.0), blocks=3)
    picture = view.picture(block=2, weight=3.0, latent=2)
    found = weighed_texts(MODEL, START, 5, (0.0, 1.0, 3.0), CONFIG, 3)
    c, u = (part[1, :, 2, 1] for part in (found.conditional, found.unconditional))
    v = guide(u, c, 3.0)
    traces = picture.figure.data
    assert [frame.name for frame in picture.figure.frames] == [f"{t:.2f}" for t in found.times]
    for trace, part in zip(traces[6:9], (u, c, v)): np.testing.assert_allclose(trace.y, part.square().mean(-1).sqrt(), rtol=1e-4)
    np.testing.assert_allclose(traces[9].y, torch.nn.functional.cosine_similarity(c, u, -1).arccos().rad2deg(), atol=0.05)
    for i, frame in enumerate(picture.figure.frames):
        tip = np.array([frame.data[3].x[1], frame.data[3].y[1]])
        np.testing.assert_allclose(np.linalg.norm(tip), v[i].norm() / c[i].norm(), rtol=1e-4)
        assert frame.data[4].x[0] == pytest.approx(found.times[i].item())


def test_dissector_table_marks_what_differs_from_weight_one() -> None:
    "A row for each weight with its whole text; the row of weight 1 has no mark; the chosen one has an arrow."
    picture = guidance_dissector(MODEL, START, 5, CONFIG, (0.0, 1.0, 3.0), blocks=3).picture(weight=0.0)
    rows = re.findall(r"<th scope='row'[^>]*>(.*?)</th><td>(.*?)</td>", picture.texts)
    assert [name for name, _ in rows] == ["→ 0", "1", "3"]
    assert "<mark>" not in rows[1][1] and "<mark>" in rows[0][1] + rows[2][1]


def test_dissector_tells_where_one_answer_is_all() -> None:
    "Without history the arrows are one; a latent of the prompt does not move, and the view says which do."
    view = guidance_dissector(MODEL, "", 5, CONFIG, (0.0, 1.0, 3.0), blocks=2)
    assert "no history" in view.picture(block=1).alt and "no history" not in view.picture(block=2).alt
    view.picture(prompt="Tom lived", block=1)
    with pytest.raises(ViewError, match="does not move: take one from 3 to 4"): view.picture(latent=1)
    assert view.values["latent"] == 0 and view.picture(latent=3).alt


def test_dissector_keeps_its_picture_through_errors() -> None:
    "A prompt too long, a weight that was not written, a model without words."
    view = guidance_dissector(MODEL, START, 5, CONFIG, (0.0, 1.0), blocks=2)
    with pytest.raises(PromptError, match="no room"): view.picture(prompt=START * 9)
    with pytest.raises(ViewError, match="not possible"): view.picture(weight=2.0)
    with pytest.raises(ViewError, match="at least two"): guidance_dissector(MODEL, weights=(1.0,))
    wordless = tiny()
    wordless.tokenizer = None
    for make in (guidance_dissector, step_bench):
        with pytest.raises(ViewError, match="no tokenizer"): make(wordless)


def test_words_of_a_reader_are_shown_as_text() -> None:
    "Tags in a prompt are no tags on the page."
    for make in (guidance_dissector, step_bench):
        texts = make(MODEL, "Tom <b>lived</b>", blocks=2).picture().texts
        assert "<b>" not in texts and "&lt;" in texts


# The bench


def test_straightness_of_known_ways() -> None:
    "A line is straight, a half circle has two by pi, a way and back none."
    turn = torch.linspace(0, torch.pi, 3000)
    ways = [torch.stack([turn, 2 * turn], -1), torch.stack([turn.cos(), turn.sin()], -1), torch.stack([turn.sin(), 0 * turn], -1)]
    torch.testing.assert_close(straightness(torch.stack(ways, 1)), torch.tensor([1.0, 2 / torch.pi, 0.0]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("prompt", [START, "Tom lived", ""])
def test_bench_walks_as_the_sampler_does(prompt: str) -> None:
    "Each row of a walk is the first block that the sampler writes after the text so far, from the same noise."
    bench = solver_bench(MODEL, prompt, 7, blocks=3)
    config = replace(CONFIG, solver="heun", steps=3, num_blocks=1, max_length=200)
    found = bench.walk("heun", 3)
    again = bench.walk("heun", 3)
    assert torch.equal(found.z, again.z)  # one walk leaves nothing behind for the next
    noise = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(7))
    text, per_block = bench.prompt[: len(bench.prompt) // 4 * 4], 4
    written = generate(MODEL, [bench.prompt] if bench.prompt else 1, replace(CONFIG, steps=8, num_blocks=3, max_length=200), [7], trace=True)
    whole = text + [i for trace in written.traces for i in trace.tokens[-1, 0].tolist()]
    for row in range(3):
        history = whole[: len(text) + row * per_block] if row else bench.prompt
        alone = generate(MODEL, [history] if history else 1, config, noise=[noise[row : row + 1]], trace=True)
        torch.testing.assert_close(alone.traces[0].z[:, 0], found.z[:, row], atol=1e-4, rtol=1e-4)
        assert alone.traces[0].tokens[-1, 0].tolist() == found.tokens[row].tolist()


def test_bench_shows_what_it_measures() -> None:
    "Error, words and straightness of the picture are those of walks made by hand; at equal evaluations the steps fit."
    view = step_bench(MODEL, START, 7, blocks=2)
    bench = solver_bench(MODEL, START, 7, blocks=2)
    exact, ours = bench.walk("midpoint", 128), bench.walk("rk4", 2)
    picture = view.picture(solver="rk4", count=8)
    shown = {trace.name: trace for trace in picture.figure.data}["rk4"]
    moves = bench.moves
    assert shown.y[1] == pytest.approx((ours.z[-1] - exact.z[-1])[moves].square().mean().sqrt().item(), rel=1e-4)
    assert [*shown.text] == ["1", "2", "4", "8"]
    changed = (ours.tokens != exact.tokens).flatten()[bench.given :].sum().item()
    assert f"{changed} of {8 - bench.given} words changed" in picture.alt and picture.texts.count("<mark>") == changed
    for count in (4, 8, 32):  # from a single step on
        walk = {trace.name: trace for trace in view.picture(count=count, measure="error").figure.data}
        assert walk["this walk: error"].y[-1] == pytest.approx(walk["rk4"].y[(4, 8, 16, 32).index(count)], rel=1e-4)
        assert len(walk["this walk: error"].x) == count // 4 + 1
    view.picture(count=8)
    straight = {trace.name: trace for trace in view.picture(measure="straight").figure.data}["rk4"].y[1]
    length = ours.z[:, moves].diff(dim=0).norm(dim=-1).sum(0)
    assert straight == pytest.approx(((ours.z[-1] - ours.z[0])[moves].norm(dim=-1) / length).mean().item(), rel=1e-4)


def test_bench_refuses_a_full_text() -> None:
    "A prompt that leaves no room is refused in words, and the picture stays."
    view = step_bench(MODEL, START, 7, blocks=2)
    before = view.picture()
    with pytest.raises(PromptError, match="no room"): view.picture(prompt=START * 9)
    assert view.last is before


# On the page


@pytest.mark.parametrize("make", [lambda: be_the_field(), lambda: guidance_dissector(MODEL, START, blocks=2), lambda: step_bench(MODEL, START, blocks=2)])
def test_stills_move_and_are_small(make) -> None:
    "Each has several frames, a text, words for those who cannot see, and the same picture every time."
    first, second = still(make()), still(make())
    assert len(first.frames) > 3
    assert first.to_json() == second.to_json()
    assert first.layout.meta["cola"]["alt"] and first.layout.meta["cola"]["texts"]
    told = []
    reply(make(), {"kind": "ask", "view": "one", "values": {}}, told.append)
    assert not told[0].get("error") and len(json.dumps(told[0])) < 120_000
