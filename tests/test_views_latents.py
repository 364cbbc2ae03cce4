"Views around latents: maps of words, noise and schedule, and the posterior lab, with a tiny untrained model."

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cola_tutorial.config import GenerationConfig, preset
from cola_tutorial.flow import sample_times
from cola_tutorial.generation import PromptError, read_prompts
from cola_tutorial.model import ColaDLM
from cola_tutorial.screen import still
from cola_tutorial.text.corpus import train_tokenizer
from cola_tutorial.text.stories import Grammar
from cola_tutorial.training import read_run
from cola_tutorial.vae import TextVAE
from cola_tutorial.views import latents as room
from cola_tutorial.views.latents import (
    GRID,
    LAB_LEVELS,
    NOISE_TIMES,
    NOISES,
    asked_beyond,
    basin_map,
    bridge_log_snr,
    ellipse,
    half_time,
    lab_cells,
    lab_recipe,
    mean_interval,
    measure_posterior,
    noise_schedule,
    posterior_lab,
    read_map,
    read_posterior_lab,
    read_through_noise,
    slice_through,
    sliced_gaussian,
    text_latents,
    timeshift_density,
    used_dimensions,
    words_at,
    write_posterior_lab,
)
from cola_tutorial.viz import ViewError, token_name

GRAMMAR = Grammar.load()
TOKENIZER = train_tokenizer([GRAMMAR.story(4, i).text for i in range(300)], vocab_size=900)
SMALL = dict(dim=32, emb_dim=32, num_heads=2, head_dim=16, rope_dim=8, num_layers=1, ffn_dim=64, latent_dim=8)
TEXT = "Tom lived near the mill with his sister."


def tiny(patch_size: int = 1, **changes) -> ColaDLM:
    "An untrained model with blocks of four latents; its weights are large enough to make it choose different words."
    torch.manual_seed(patch_size)
    sizes = SMALL | dict(encoder_num_blocks=1, decoder_num_blocks=2, block_size=4, patch_size=patch_size, init_std=0.3) | changes
    return ColaDLM(preset("tiny", TOKENIZER.get_vocab_size(), **sizes), TOKENIZER, GenerationConfig(max_length=80)).eval()


MODEL = tiny()
TOLD = text_latents(MODEL, TEXT)
REACH = round(1.4 * TOLD.mean.norm(dim=-1).max().item(), 1)  # as the view rounds it
MAP = read_map(MODEL, TOLD, (0, 4, 7), 4, REACH)


# A text and a plane


@pytest.mark.parametrize("patch_size", [1, 2])
def test_a_text_is_encoded_as_for_generation(patch_size: int) -> None:
    "Means are those of a prompt, scaled; names and pieces give the text back; padding stays out."
    model = tiny(patch_size, scaling_factor=1.5, shifting_factor=0.25)
    told = text_latents(model, TEXT)
    ids = TOKENIZER.encode(TEXT, add_special_tokens=False).ids
    assert torch.allclose(told.mean, read_prompts(model, [ids]).latents[0], atol=1e-5)
    posterior = model.vae.encode(told.tokens)
    noise = torch.randn(1, *told.mean.shape, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(told.sample(noise), model.vae.to_latents(posterior.sample(noise=noise)), atol=1e-5)
    assert (told.own, "".join(told.pieces).strip(), len(told.names)) == (len(ids), TEXT, math.ceil(len(ids) / patch_size))


def test_a_slice_keeps_distances_and_comes_back() -> None:
    "The three latents lie where they should; points of the plane and their latents belong together."
    latents = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    plane = slice_through(latents)
    assert torch.allclose(torch.cdist(plane.corners, plane.corners), torch.cdist(latents, latents), atol=1e-4)
    assert torch.allclose(plane.latents(plane.corners), latents, atol=1e-5)
    places = torch.randn(5, 4, 2)
    assert torch.allclose(plane.places(plane.latents(places)), places, atol=1e-4)
    assert torch.allclose(plane.corners.mean(0), torch.zeros(2), atol=1e-5) and plane.corners[0, 1].isclose(plane.corners[1, 1], atol=1e-5)


@pytest.mark.parametrize("latents", [torch.zeros(3, 4), torch.tensor([[0.0, 0], [1, 1], [2, 2]]), torch.tensor([[0.0, 0], [0, 0], [1, 2]])])
def test_no_plane_through_a_line(latents: torch.Tensor) -> None:
    "Latents on a line, or twice the same one, span none."
    with pytest.raises(ViewError, match="one line"): slice_through(latents)


def test_a_sliced_gaussian_is_the_conditional_one() -> None:
    "Mean and covariance are those of the full Gaussian in the plane's coordinates, given that all others are 0."
    generator = torch.Generator().manual_seed(2)
    plane = slice_through(torch.randn(3, 5, generator=generator, dtype=torch.float64))
    mean, variance = torch.randn(5, generator=generator, dtype=torch.float64), torch.rand(5, generator=generator, dtype=torch.float64) + 0.1
    full, _ = torch.linalg.qr(torch.cat([plane.axes, torch.randn(3, 5, generator=generator, dtype=torch.float64)]).T)
    turn = full.T.clone()
    turn[:2] = plane.axes  # an orthonormal basis whose first two vectors are the plane's
    covariance, centre = turn * variance @ turn.T, turn @ (mean - plane.origin)
    gain = covariance[:2, 2:] @ torch.linalg.inv(covariance[2:, 2:])
    found_mean, found = sliced_gaussian(plane, mean, variance)
    assert torch.allclose(found, covariance[:2, :2] - gain @ covariance[2:, :2])
    assert torch.allclose(found_mean, centre[:2] - gain @ centre[2:])
    gap = ellipse(found_mean, found, 2.0) - found_mean
    assert torch.allclose((gap * torch.linalg.solve(found, gap.T).T).sum(1), torch.full((49,), 4.0, dtype=torch.float64), atol=1e-4)


# The map


@pytest.mark.parametrize("patch_size, attention", [(1, "block_causal"), (2, "block_causal"), (1, "causal")])
def test_words_are_those_of_whole_texts(patch_size: int, attention: str) -> None:
    "With a remembered history, in any place and in batches, the decoder reads what it reads of whole rows."
    model = tiny(patch_size, attention=attention)
    told = text_latents(model, TEXT)
    candidates = told.mean[torch.arange(30) % 5] + torch.randn(30, 8, generator=torch.Generator().manual_seed(3))
    for place in (0, 2, 4):
        tokens, sure = words_at(model, told.mean, place, candidates, batch_size=7)
        rows = told.mean.repeat(30, 1, 1)
        rows[:, place] = candidates
        with torch.no_grad(): best = model.vae.decode(rows)[:, place * patch_size : (place + 1) * patch_size].softmax(-1).max(-1)
        assert torch.equal(tokens, best.indices) and len(tokens.unique()) > 1
        assert torch.allclose(sure, best.values.prod(-1), atol=1e-5)


def test_a_map_reads_its_cells() -> None:
    "Row and column are y and x: some cells read singly give the same word; lands are where their word is read."
    places = torch.tensor([[MAP.side[i], MAP.side[j]] for i, j in ((3, 50), (50, 3), (20, 40))])
    tokens, sure = words_at(MODEL, TOLD.mean, 4, MAP.plane.latents(places))
    assert [MAP.tokens[j, i].tolist() for i, j in ((3, 50), (50, 3), (20, 40))] == tokens.tolist()
    assert torch.allclose(MAP.sure[[50, 3, 40], [3, 50, 20]], sure, atol=1e-4)
    lands = MAP.lands(3)
    sizes = [int(land.sum()) for _, land in lands]
    assert sizes == sorted(sizes, reverse=True) and all((MAP.tokens[land] == ids).all() for ids, land in lands)


def test_a_name_stands_in_the_middle_of_its_land() -> None:
    "Of a rectangle and a thin tail, the middle of the rectangle; elsewhere where that is taken."
    land = torch.zeros(20, 30, dtype=torch.bool)
    land[2:11, 3:16], land[5, 16:] = True, True
    everywhere, corner = torch.ones_like(land), torch.ones_like(land)
    assert room._middle(land, everywhere)[0] == 6 and 7 <= room._middle(land, everywhere)[1] <= 11
    corner[:, :20] = False
    assert room._middle(land, corner)[1] >= 20 and room._middle(land, ~everywhere)[0] == 6


def test_the_map_answers_a_point() -> None:
    "The text under the point is that of a whole row, with what differs marked; the map itself stays."
    view = basin_map(MODEL, TEXT, ("Tom", "mill", "sister"))
    first = view.picture(moved=1)
    there = 0.9 * REACH, -0.8 * REACH
    moved = view.picture(x=there[0], y=there[1])
    z = TOLD.mean.clone()
    z[4] = MAP.plane.latents(torch.tensor(there))
    with torch.no_grad(): read = MODEL.vae.decode(z[None])[0].argmax(-1)[: TOLD.own]
    assert moved.texts.count("<mark>") == (read != TOLD.tokens[0, : TOLD.own]).sum().item()
    assert f"“{token_name(TOKENIZER, read[4].item())}”" in moved.alt
    assert all(np.array_equal(old.z, new.z) for old, new in zip(first.figure.data[:1], moved.figure.data[:1]))
    assert [moved.figure.data[-1].x[0], moved.figure.data[-1].y[0]] == pytest.approx(there, abs=1e-4)
    assert not moved.controls  # only another text or another plane changes what can be chosen


def test_another_text_brings_its_words() -> None:
    "Three of its words become the corners, the point goes to the first of them, and all words can be chosen."
    view = basin_map(MODEL, TEXT, ("Tom", "mill", "sister"))
    view.picture(x=1.0)
    picture = view.picture(text="She saw a boat near the castle")
    names = text_latents(MODEL, "She saw a boat near the castle").names
    assert [option[0] for option in view.controls["a"].options] == [f"{i + 1} {name}" for i, name in enumerate(names)]
    corner = [picture.figure.data[-2].x[0], picture.figure.data[-2].y[0]]
    assert [view.values["x"], view.values["y"]] == pytest.approx(corner, abs=0.006) and len({view.values[name] for name in "abc"}) == 3
    again = view.picture(a=view.values["b"], b=view.values["a"])
    assert np.ptp(again.figure.data[-2].x[:2]) == pytest.approx(np.ptp(picture.figure.data[-2].x[:2]), abs=1e-4)  # the same distance


def test_how_sure_is_shown() -> None:
    "The other look has the probabilities, and still the corners and the point."
    view = basin_map(MODEL, TEXT, ("Tom", "mill", "sister"))
    picture = view.picture(look="sure", moved=1)
    assert picture.figure.data[0].z.shape == (GRID, GRID) and np.allclose(picture.figure.data[0].z, MAP.sure.numpy(), atol=1e-4)
    assert len(picture.figure.data) == len(view.picture(look="word").figure.data)


def test_the_still_walks_through_the_map() -> None:
    "Frames move the point alone; the picture is the same every time."
    view = basin_map(MODEL, TEXT, ("Tom", "mill", "sister"))
    frames = still(view).frames
    assert len(frames) >= 10 and {trace for frame in frames for trace in frame.traces} == {5}
    assert basin_map(MODEL, TEXT, ("Tom", "mill", "sister")).picture().figure == view.picture().figure


@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"text": " ".join(["mill"] * 200)}, PromptError, "tokens"),
        ({"text": ""}, ViewError, "write a few words"),
        ({"text": "Tom"}, ViewError, "write more words"),
        ({"a": 4}, ViewError, "three different ones"),
        ({"x": 1e6}, ViewError, "from"),
    ],
)
def test_what_cannot_be_mapped_says_so(changes: dict, error: type, words: str) -> None:
    "A bad text, the same word twice, a point beyond the map: a message, and the last picture stays."
    view = basin_map(MODEL, TEXT, ("Tom", "mill", "sister"))
    kept = view.picture(), dict(view.values)
    with pytest.raises(error, match=words): view.picture(**changes)
    assert (view.last, view.values) == kept
    assert view.picture(moved=1).figure.data


def test_words_that_are_not_there() -> None:
    "The first three words must stand in the text."
    with pytest.raises(ViewError, match="'dragon'"): basin_map(MODEL, TEXT, ("Tom", "mill", "dragon"))
    with pytest.raises(ViewError, match="needs three"): basin_map(MODEL, TEXT, ("Tom", "mill"))
    longest = [TOLD.names[basin_map(MODEL, TEXT, ()).values[corner]] for corner in "abc"]
    assert sorted(map(len, longest)) == sorted(map(len, TOLD.names))[-3:]
    with pytest.raises(ViewError, match="no word 99"): read_map(MODEL, TOLD, (0, 1, 98), 0, REACH)
    with pytest.raises(ViewError, match="too far apart"): read_map(MODEL, TOLD, (0, 4, 7), 0, 0.1)


def test_words_of_a_user_do_not_become_markup() -> None:
    "Text from outside is escaped wherever it is shown."
    view = basin_map(MODEL, TEXT, ("Tom", "mill", "sister"))
    assert "<b>" not in view.picture(text="the <b> mill <b> and Tom").texts
    assert "<b>" not in noise_schedule(MODEL, "the <b> mill", [TEXT]).picture(t=0.0).texts


# Noise and schedule


@pytest.mark.parametrize("law, loc, scale", [("logit_normal", 1.0, 1.0), ("logit_normal", -0.5, 0.6), ("uniform", 0.0, 1.0)])
def test_the_density_is_that_of_the_sampler(law: str, loc: float, scale: float) -> None:
    "Shares of drawn times in each tenth, and beyond a time."
    drawn = sample_times(200_000, law, loc, scale, torch.Generator().manual_seed(0)).double()
    middles = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    shares = timeshift_density(middles, law, loc, scale).view(10, -1).mean(1) / 10
    assert torch.allclose(drawn.histc(10, 0, 1) / len(drawn), shares, atol=4e-3)
    assert asked_beyond(0.3, law, loc, scale) == pytest.approx((drawn > 0.3).double().mean().item(), abs=4e-3)
    assert timeshift_density(torch.tensor([0.0, 1.0]), law, loc, scale).tolist() == [0.0, 0.0]


def test_the_bridge_is_as_loud_as_measured() -> None:
    "The ratio of the parts of a mixed latent, and 0 where both are equally loud."
    generator = torch.Generator().manual_seed(0)
    z_0, z_1 = 1.7 * torch.randn(100_000, generator=generator), torch.randn(100_000, generator=generator)
    measured = ((0.7 * z_0).pow(2).mean() / (0.3 * z_1).pow(2).mean()).log().item()
    assert bridge_log_snr(torch.tensor(0.3), z_0.pow(2).mean().item()).item() == pytest.approx(measured, abs=0.02)
    assert bridge_log_snr(torch.tensor(0.5)).item() == 0


def test_a_text_is_read_through_noise() -> None:
    "At the ends: samples of the posterior, and nothing but noise; the same seed gives the same."
    read = read_through_noise(MODEL, TOLD)
    generator = torch.Generator().manual_seed(0)
    z_0, z_1 = (torch.randn(NOISES, *TOLD.mean.shape, generator=generator) for _ in range(2))
    with torch.no_grad(): ends = [MODEL.vae.decode(z).argmax(-1)[:, : TOLD.own] for z in (TOLD.sample(z_0), z_1)]
    assert torch.equal(read[0], ends[0]) and torch.equal(read[-1], ends[1])
    assert read.shape == (len(NOISE_TIMES), NOISES, TOLD.own) and torch.equal(read, read_through_noise(MODEL, TOLD))


def test_intervals_hold_the_mean() -> None:
    "For normal shares the bootstrap is near the textbook's interval; where all are equal it has no width."
    shares = torch.randn(2, 400, generator=torch.Generator().manual_seed(0)) * 0.1 + 0.5
    mean, low, high = mean_interval(shares)
    assert torch.allclose(mean, shares.double().mean(1))
    half = 1.96 * shares.double().std(1) / 20
    assert torch.allclose(high - mean, half, rtol=0.15) and torch.allclose(mean - low, half, rtol=0.15)
    assert [part.tolist() for part in mean_interval(torch.ones(1, 5))] == [[1.0], [1.0], [1.0]]


def test_half_time_is_found_between_the_times() -> None:
    "Linear between two times; None where nothing is lost."
    share = [1.0] * 10 + [0.6, 0.4] + [0.0] * 9
    assert half_time(share) == pytest.approx(0.525)
    assert half_time([1.0] * 21) is None and half_time([0.2] * 21) is None


def test_noise_is_shown_at_a_time() -> None:
    "Shares and marks are those of the reading; only the lines at t move in the still."
    view = noise_schedule(MODEL, TEXT, [GRAMMAR.story(9, i).text for i in range(2)])
    read, wanted = read_through_noise(MODEL, TOLD), TOLD.tokens[0, : TOLD.own]
    picture = view.picture(t=0.3, noise=5)
    assert picture.texts.count("<mark>") == (read[6, 4] != wanted).sum().item()
    share = (read[6] == wanted).float().mean().item()
    assert f"{share:.0%} of the tokens come back" in picture.alt
    curve = next(trace for trace in picture.figure.data if trace.name == "this text")
    assert curve.y[6] == pytest.approx(share, abs=1e-6)
    moved = {trace for frame in still(view).frames for trace in frame.traces}
    assert {picture.figure.data[i].name for i in moved} == {"t"} and len(moved) == 3


def test_the_law_changes_its_curve_and_its_sentence() -> None:
    "Another loc: another density, the same readings."
    view = noise_schedule(MODEL, TEXT, [TEXT])
    curves = {loc: {trace.name: trace.y for trace in view.picture(loc=loc).figure.data} for loc in (-1.0, 2.0)}
    assert np.allclose(curves[2.0]["this law"], timeshift_density(torch.linspace(0, 1, 101), loc=2.0).numpy())
    assert not np.allclose(curves[-1.0]["this law"], curves[2.0]["this law"])
    assert curves[-1.0]["this text"] == curves[2.0]["this text"]
    with pytest.raises(PromptError): view.picture(text=" ".join(["mill"] * 200))


# The posterior lab


def tiny_recipe(**changes):
    "The lab's recipe, smaller."
    recipe = lab_recipe()
    sizes = recipe.changes | dict(dim=32, emb_dim=32, num_heads=2, head_dim=16, rope_dim=8, num_layers=1, ffn_dim=64)
    return replace(recipe, stories=60, vocab_size=400, changes=sizes, stage1=replace(recipe.stage1, steps=4, batch_size=4, **changes))


def test_a_measured_posterior_adds_up() -> None:
    "KL, length and log SNR agree with the posterior; a dimension that stands still is not used."
    torch.manual_seed(0)
    vae = TextVAE(preset("tiny", 50, **{**SMALL, "block_size": 4}).vae).eval()
    with torch.no_grad():
        vae.encoder.final_layer.weight[:3] = 0  # three means that do not move, and a norm that sees the others
    vae.encoder.config = replace(vae.config, encoder_last_ln=False)
    tokens, counted = torch.randint(50, (6, 16)), torch.ones(6, 16, dtype=torch.bool)
    counted[:, 12:] = False
    found, posterior = measure_posterior(vae, tokens, counted), vae.encode(tokens)
    assert sum(found["kl"]) == pytest.approx(posterior.kl()[counted].mean().item(), rel=1e-3)
    assert found["length"] == pytest.approx((0.5 * posterior.mean[counted] ** 2).mean(0).tolist(), rel=1e-3, abs=1e-6)
    assert found["spread"][:3] == [0.0, 0.0, 0.0] and not any(used_dimensions(found)[:3])
    assert used_dimensions({"spread": [0.2, 0.05]}) == [True, False]
    assert len(found["right"]) == len(LAB_LEVELS) and found == measure_posterior(vae, tokens, counted)


def test_a_cell_is_trained_and_written(tmp_path) -> None:
    "The lab's own path, for two tiny cells: the file can be read, is the same again, and holds what was asked."
    cells = [{"posterior": "width held, log SNR 1.5", "beta": None, "lambda_mask": 0.5}, {"posterior": "nothing held", "beta": 0.1, "lambda_mask": 0.0}]
    made = write_posterior_lab(tmp_path / "lab.json", tiny_recipe(), cells, unseen=5)
    assert made == read_posterior_lab(tmp_path / "lab.json") and made["unseen"] == 5 and made["recipe"]["stage1"]["steps"] == 4
    assert [{name: run[name] for name in cells[0]} for run in made["runs"]] == cells
    held, free = made["runs"]
    assert held["log_snr"] == pytest.approx(1.5, abs=1e-3) and sum(held["length"]) == pytest.approx(8.0, abs=0.01)
    assert sum(free["length"]) < 7.9
    assert write_posterior_lab(tmp_path / "again.json", tiny_recipe(), cells[1:], unseen=5)["runs"] == made["runs"][1:]
    view = posterior_lab(tmp_path / "lab.json")
    assert view.picture(posterior="width held, log SNR 1.5", lambda_mask=0.5).figure.data
    with pytest.raises(ViewError, match="no run with"): view.picture(lambda_mask=0.0)
    with pytest.raises(ViewError, match="take one of"): write_posterior_lab(tmp_path / "x.json", tiny_recipe(), [cells[0] | {"posterior": "soft"}])


def test_a_cell_trains_with_its_own_settings(tmp_path) -> None:
    "Another price, or the mask loss, gives another posterior; no price means the recipe's."
    settings = [(None, 0.0), (lab_recipe().stage1.beta, 0.0), (100.0, 0.0), (None, 0.5)]
    cells = [{"posterior": "width learned", "beta": beta, "lambda_mask": weight} for beta, weight in settings]
    kl = [run["kl"] for run in write_posterior_lab(tmp_path / "lab.json", tiny_recipe(), cells, unseen=5)["runs"]]
    assert kl[0] == kl[1] and kl[2] != kl[0] != kl[3]


def test_the_price_of_a_held_posterior_is_a_constant() -> None:
    "The KL of a held width has no gradient; that of a learned one has."
    for log_snr, steep in ((1.5, False), (None, True)):
        torch.manual_seed(0)
        vae = TextVAE(preset("tiny", log_snr=log_snr).vae)
        vae.encode(torch.randint(1024, (2, 16))).kl().mean().backward()
        assert (vae.encoder.final_layer.weight.grad.abs().max().item() > 1e-3) == steep


def test_the_shipped_lab_is_whole(tmp_path: Path) -> None:
    "Every cell of the grid once, made by the recipe of today (settings that came later have their defaults), small enough to ship."
    lab = read_posterior_lab()
    (tmp_path / "run.json").write_text(json.dumps(lab["recipe"]))
    assert read_run(tmp_path / "run.json") == lab_recipe()
    assert [{name: run[name] for name in ("posterior", "beta", "lambda_mask")} for run in lab["runs"]] == lab_cells()
    assert all(len(run["kl"]) == 16 and len(run["right"]) == len(lab["levels"]) == len(LAB_LEVELS) for run in lab["runs"])
    assert (room.data_dir() / "views" / "posterior_lab.json").stat().st_size < 100_000


def test_the_lab_shows_the_run_that_was_chosen() -> None:
    "Bars add up to the KL, sorted; crosses are the dimensions that say nothing; the star stands on the run."
    view, lab = posterior_lab(), read_posterior_lab()
    picture = view.picture(posterior="nothing held", beta=1.0, lambda_mask=0.0)
    (run,) = [run for run in lab["runs"] if (run["posterior"], run["beta"], run["lambda_mask"]) == ("nothing held", 1.0, 0.0)]
    data = {trace.name: trace for trace in picture.figure.data}
    total = np.add(data["length"].y, data["narrowness"].y)
    assert total.tolist() == pytest.approx(sorted(run["kl"], reverse=True))
    assert len(data["collapsed"].x) == 16 - sum(used_dimensions(run))
    assert (data["this run"].x[0], data["this run"].y[0]) == (run["log_snr"], run["right"][room.LAB_LOOK])
    assert f"{sum(used_dimensions(run))} of 16" in picture.alt
    held = [view.picture(posterior="width held, log SNR 3", beta=beta).alt for beta in (0.0, 1.0)]
    assert held[0] == held[1] and "changes nothing" in held[0]
    assert len(still(view).frames) == len(room.LAB_BETAS)


def test_a_lab_without_runs_is_refused(tmp_path) -> None:
    "No file, no JSON, no runs: each says how to make one."
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "empty.json").write_text('{"runs": []}')
    for name in ("absent.json", "broken.json", "empty.json"):
        with pytest.raises(ViewError, match="make posterior-lab"): posterior_lab(tmp_path / name)
