"""Explanations: what is drawn is what the lens computes, in files that need no others."""

from __future__ import annotations

import io
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from regard import create_model
from regard.cli import main
from regard.data.embedded import photograph
from regard.data.photographs import square
from regard.lens import capture, image_map, relevance, rollout
from regard.lens.explain import Explanation, Panel, explain
from regard.lens.pictures import Tile, font, sheet, wrapped
from regard.models import save_checkpoint
from regard.models.opening import normalised, open_model

VIT = "vit_tiny_patch16_224"
QUERY = (0.3, 0.7)
CLOSE = {"atol": 0.0, "rtol": 1e-4}
"""A pixel has a hundred-thousandth of a map: only what is relative tells two maps apart."""


@pytest.fixture(scope="module")
def photo() -> torch.Tensor:
    return square("chelsea", 64)[0]


@pytest.fixture(scope="module")
def swin() -> torch.nn.Module:
    torch.manual_seed(3)
    model = create_model("swin_tiny_patch4_window7_224", dim=16, depths=(2, 1), head_dim=8, window_size=4, num_classes=5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


def called(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(["explain", *arguments])
    return int(left.value.code or 0)


def test_maps_of_a_query_are_those_of_its_token_in_every_layer_and_head(swin, photo) -> None:
    made = explain(swin, photo, query=QUERY)
    with torch.no_grad(), capture(swin) as maps:
        swin(normalised(photo))
    assert [panel.title for panel in made.panels] == ["stages.0.blocks.0", "stages.0.blocks.1", "stages.1.blocks.0"]
    for panel, found in zip(made.panels, maps, strict=True):
        rows, columns = found.grid
        token = int(QUERY[0] * rows) * columns + int(QUERY[1] * columns)
        by_head = image_map(found, None).map[0, :, token]
        torch.testing.assert_close(panel.heat, by_head.mean(0), **CLOSE)
        torch.testing.assert_close(torch.stack([each.heat for each in made.heads[panel.title]]), by_head, **CLOSE)
        assert panel.query == ((token // columns + 0.5) / rows, (token % columns + 0.5) / columns)


@pytest.mark.parametrize("start", [None, QUERY])
def test_rollout_and_relevance_drawn_are_those_of_the_lens(swin, photo, start) -> None:
    made = explain(swin, photo, query=start, with_rollout=True, with_relevance=True, target=2)
    images = normalised(photo)
    with torch.no_grad(), capture(swin, lazy=True) as maps:
        swin(images)
    with torch.no_grad():
        rolled = rollout(maps, start=start).on_image()[0, 0]
    heats = {panel.title: panel.heat for panel in made.panels}
    torch.testing.assert_close(heats["rollout"], rolled, **CLOSE)
    torch.testing.assert_close(heats["relevance, class 2"], relevance(swin, images, 2, start).on_image()[0, 0], **CLOSE)
    assert not torch.allclose(heats["relevance, class 2"], relevance(swin, images, 0, start).on_image()[0, 0], rtol=1e-3)


def test_sheet_is_bright_where_the_weight_is_and_grey_where_none_is() -> None:
    heat = torch.zeros(4, 4)
    heat[1, 2] = 1.0
    drawn = Explanation("t", torch.zeros(3, 8, 8, dtype=torch.uint8), "a", [Panel("p", heat, "n")]).picture(side=80)
    coloured = (drawn.max(-1).astype(int) - drawn.min(-1) > 60)[: drawn.shape[0] - 52]
    rows, columns = np.nonzero(coloured)
    left, top = 2 * 10 + 80, 32 + 10 + 18  # of the second tile, below the title of the sheet and its own
    assert (rows.min() - top, rows.max() - top) == (20, 39)
    assert (columns.min() - left, columns.max() - left) == (40, 59)


@pytest.mark.parametrize("words", ["8x8 tokens, most 0.016", "head 3", "", "stages.0.blocks.11.attention", "m" * 40, "a " * 30])
@pytest.mark.parametrize("width", [112, 60])
def test_captions_stand_whole_in_lines_no_wider_than_their_picture(words, width) -> None:
    lines = wrapped(words, width, 12)
    assert "".join(lines).replace(" ", "") == words.replace(" ", "")
    assert all(0 < font(12).getlength(each) <= width for each in lines)
    for before, after in pairwise(lines):  # a line ends where the next word has no room, or within a word after its dots
        assert font(12).getlength(f"{before} {after.split()[0]}") > width or before[-1] in "._"
    dark = np.zeros((40, width, 3), np.uint8)
    drawn = sheet([Tile(dark, "", words), Tile(dark, "", "one")], 2)
    canvas = Image.new("RGB", (width, drawn.shape[0] - 50), (255, 255, 255))
    for i, each in enumerate(lines):
        ImageDraw.Draw(canvas).text((0, 3 + 18 * i), each, fill=(107, 119, 133), font=font(12))
    assert np.array_equal(drawn[50:, 10 : 10 + width], np.asarray(canvas))


def test_a_name_too_long_for_a_line_is_broken_after_its_dots() -> None:
    assert wrapped("stages.0.blocks.11.attention #2", 60, 12) == ["stages.0.", "blocks.11.", "attention", "#2"]


def test_a_long_title_goes_on_in_the_next_line_right_above_the_picture() -> None:
    dark = np.zeros((20, 60, 3), np.uint8)
    drawn = sheet([Tile(dark, "one two three four"), Tile(dark, "one")], 2)
    top = 10 + 18 * len(wrapped("one two three four", 60, 12))
    assert not drawn[top : top + 20, 10:70].any()
    assert not drawn[top : top + 20, 80:140].any()
    assert (drawn[:28, 10:70] < 200).any()
    assert (drawn[: top - 18, 80:140] == 255).all()
    assert (drawn[top - 18 : top, 80:140] < 200).any()


def test_colours_of_rollout_begin_at_its_least_cell(swin, photo) -> None:
    (panel,) = explain(swin, photo, with_rollout=True).panels
    assert panel.least == float(panel.heat.min()) > 0.0


def test_command_writes_a_picture_and_a_page_that_needs_nothing_else(tmp_path, capsys, checkpoint) -> None:
    out = tmp_path / "seen"
    options = ("--query", "150,225", "--rollout", "--layers", "*blocks.[01].*", "--out", str(out))
    assert called("chelsea", "--model", f"{VIT}={checkpoint[1]}", *options) == 0
    assert capsys.readouterr().out.split() == [f"{out}.png", f"{out}.html"]
    picture = np.asarray(Image.open(f"{out}.png"))
    photo, place = square("chelsea", 224, "150,225")
    asked = {"query": place, "with_rollout": True, "layers": "*blocks.[01].*"}
    expected = explain(checkpoint[0], photo, title=f"{VIT}, mine.safetensors", **asked)
    assert np.array_equal(picture, expected.picture())
    random, _, _ = open_model(VIT)
    assert not np.array_equal(picture, explain(random, photo, title=expected.title, **asked).picture())
    page = (tmp_path / "seen.html").read_text(encoding="utf-8")
    sources = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", page)
    assert len(sources) == 1 + 2  # the sheet, and each layer by head
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?:|@import|url\(|<script", page)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("chelsea", "--model", "vit_tinny", "--rollout"), "vit_tinny"),
        (
            ("no-such.png", "--model", VIT, "--rollout"),
            "no-such.png; photographs that come along are astronaut, ",
        ),
        (("chelse", "--model", VIT, "--rollout"), "no image file chelse; did you mean chelsea?"),
        (("chelsea", "--model", "tiny_dinoo", "--rollout"), "unknown model 'tiny_dinoo'; did you mean tiny_dino?"),
        (("{junk}", "--model", VIT, "--rollout"), "cannot read the image"),
        (("chelsea", "--model", VIT, "--query", "0.5,0.01"), "lies outside of what the model sees"),
        (("chelsea", "--model", VIT, "--query", "9,9,9"), "query must be y,x"),
        (("chelsea", "--model", VIT, "--rollout", "--target", "3"), "--relevance speaks for: give both; got --target 3 alone"),
        (("chelsea", "--model", "tiny_dino", "--relevance", "--target", "5"), "this model has no classes"),
        (("chelsea", "--model", VIT, "--size", "99999999999999999999"), "Invalid value for '--size'"),
        (("chelsea", "--model", VIT, "--target", "-1", "--relevance"), "Invalid value for '--target'"),
        (("chelsea", "--model", VIT, "--relevance", "--target", "1000"), "target must be classes 0 to 999; got 1000"),
        (("chelsea", "--model", f"{VIT}=absent.safetensors", "--rollout"), "absent.safetensors"),
        (("chelsea", "--model", f"{VIT}={{junk}}", "--rollout"), "cannot read"),
        (("chelsea", "--model", "{junk}", "--rollout"), "does not start with the name of a model"),
        (("chelsea", "--model", VIT, "--rollout", "--normalise", "none"), "normalise must be one of"),
        (
            ("chelsea", "--model", VIT, "--rollout", "--layers", "nowhere*"),
            "no layer that attends matches 'nowhere*'; there are stages.0.blocks.0.",
        ),
    ],
)
def test_what_the_user_got_wrong_is_one_line(tmp_path, capsys, arguments, message) -> None:
    junk = tmp_path / "junk.png"
    junk.write_bytes(b"\x80\x02cos\nsystem\n.")
    assert called(*(each.format(junk=junk) for each in arguments), "--out", str(tmp_path / "seen")) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "seen.png").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("--query", "9,9,9"),
        ("--query", "0.5,0.01"),
        ("--normalise", "none"),
        ("--target", "3"),
        ("--out", "{file}/seen"),
    ],
)
def test_what_was_typed_is_read_before_a_model_is_built(tmp_path, capsys, monkeypatch, arguments) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("regard.models.opening.open_model", lambda *_: pytest.fail("the model was built"))
    assert called("chelsea", "--model", VIT, *(each.format(file=tmp_path / "file") for each in arguments)) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_without_a_wish_the_middle_of_the_image_is_asked(tmp_path, capsys) -> None:
    assert called("chelsea", "--model", "tiny_dino", "--out", str(tmp_path / "a.b")) == 0
    assert called("chelsea", "--model", "tiny_dino", "--query", "0.5,0.5", "--out", str(tmp_path / "c")) == 0
    assert (tmp_path / "a.b.png").read_bytes() == (tmp_path / "c.png").read_bytes()


def test_rings_of_rollout_and_relevance_are_on_the_middle_of_a_token(swin, photo) -> None:
    made = explain(swin, photo, query=QUERY, with_rollout=True, with_relevance=True)
    rings = {panel.title: panel.query for panel in made.panels}
    fine = made.panels[0]  # the finest grid
    assert rings["rollout"] == rings["relevance"] == fine.query
    assert fine.query != QUERY


def test_query_of_the_photograph_is_found_in_its_middle_square() -> None:
    whole = photograph("chelsea")
    height, width = whole.shape[1:]
    left = (width - height) // 2
    _, place = square("chelsea", 32, f"{height // 4},{left + height // 2}")
    assert place == pytest.approx((height // 4 / height, height // 2 / height))
    assert square("chelsea", 32, "0.25,0.5")[1] == pytest.approx((0.25, (0.5 * width - left) / height))


def test_name_of_a_checkpoint_says_its_model(tmp_path, checkpoint) -> None:
    path = tmp_path / f"{VIT}.mine.safetensors"
    save_checkpoint(checkpoint[0], path)
    model, words, side = open_model(str(path))
    assert (words, side) == (f"{VIT}, {path.name}", 224)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), checkpoint[0].parameters(), strict=True))


def test_pictures_are_whole_png_files(swin, photo) -> None:
    made = explain(swin, photo, query=QUERY)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(made.png()))), made.picture())
