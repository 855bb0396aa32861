"""What the playground shows, without a browser."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from regard import catalog
from regard import patterns as P
from regard.app import compare, uploads
from regard.app.compare import Choice, Setting, cost, growth, look, times
from regard.app.mechanisms import PATTERN, fields_of, mechanisms, read
from regard.lens.pictures import overlay

SMALL = Setting(grid=14, dim=32, heads=2)


def chosen(name: str, **typed: object) -> Choice:
    return Choice(name, tuple(read(name, typed).items()))


def test_pattern_alone_gives_equal_weight_to_exactly_the_visible_keys() -> None:
    pattern = P.Neighborhood(3, dilation=2) | P.Axis(1)
    view = look(Setting(grid=14, dim=32, heads=2, weights="pattern"), chosen(PATTERN, pattern=repr(pattern)), (0.0, 0.99))
    visible = pattern.mask((14, 14), (14, 14))[13].reshape(14, 14)
    torch.testing.assert_close(view.heat, visible.float() / visible.sum())
    assert view.keys == int(visible.sum())


def test_weights_are_the_softmax_of_the_mixers_own_queries_and_keys() -> None:
    from regard.app.compare import mixer_of, tokens_of

    choice = chosen("multi_head")
    view = look(SMALL, choice, (5.5 / 14, 9.5 / 14))
    mixer, x = mixer_of(choice, 32, 2, 14), tokens_of("chelsea", 14, 32)
    q, k, _ = mixer.qkv(x.flatten(1, 2))[0].double().split(32, -1)
    rows = [(q[5 * 14 + 9, 16 * h : 16 * h + 16] @ k[:, 16 * h : 16 * h + 16].T / 4).softmax(-1) for h in range(2)]
    expected = torch.stack(rows).mean(0).reshape(14, 14).detach()
    torch.testing.assert_close(view.heat.double(), expected, atol=1e-6, rtol=1e-5)
    y, x, weight = view.strongest[0]
    assert (y, x) == divmod(int(expected.argmax()), 14)
    assert weight == pytest.approx(float(expected.max()), rel=1e-4)


@pytest.mark.parametrize("name", [n for n in mechanisms() if n not in ("channel_group", "identity", "reversed")])
def test_every_mechanism_with_places_has_a_picture_and_a_click_uses_what_ran(name) -> None:
    view = look(SMALL, chosen(name), (0.5, 0.5))
    assert view.drawn.shape[:2] == (448 + 34, 448)
    if name == "outlook":  # no softmax over the keys: a token takes from each of the windows that it lies in
        assert float(view.heat.sum()) == pytest.approx(4.0, abs=1e-4)
    else:
        assert float(view.heat.sum()) + view.elsewhere == pytest.approx(1.0, abs=1e-4)
    assert not torch.equal(look(SMALL, chosen(name), (0.05, 0.05)).heat, view.heat)


@pytest.mark.parametrize(
    ("name", "typed", "message"),
    [
        ("neighborhood", {"kernel_size": "seven"}, "kernel_size must be a whole number, or two such as 3,7; got 'seven'"),
        ("neighborhood", {"kernel_size": "99999"}, "kernel_size must be at most 64 here; got 99999"),
        ("neighborhood", {"kernel_size": "3,5,7"}, "kernel_size must be a whole number, or two such as 3,7; got '3,5,7'"),
        ("neighborhood", {"kernel_size": "x" * 999}, "got 'xxx"),
        ("bi_level_routing", {"kernel_size": "0"}, "kernel_size must be at least 1; got int 0"),
        ("gated_positional", {"strength": "1e308"}, "strength must lie between -1e+06 and 1e+06; got 1e308"),
        ("outlook", {"kernel_size": "63"}, "learned values like this, more than 2e+07"),
        (PATTERN, {"pattern": " | ".join(["axis(0)"] * 6)}, "a pattern may have 200 letters and join 5 others here"),
        ("window", {"bogus": 1}, "window has no parameter bogus; it has window_size"),
        (PATTERN, {"pattern": "__import__('os')"}, "cannot read pattern"),
        ("channel_group", {}, "channel_group works on channels: it has no picture of places"),
        ("identity", {}, "identity attends to nothing: it has no picture of places"),
    ],
)
def test_bad_parameters_are_one_readable_line(name, typed, message) -> None:
    with pytest.raises(ValueError, match=r".") as told:
        look(SMALL, chosen(name, **typed), (0.5, 0.5))
    assert message in str(told.value)
    assert "\n" not in str(told.value)
    assert len(str(told.value)) < 200


def test_predicted_speedup_is_dense_over_visible_pairs() -> None:
    pattern = P.Window(7)
    found = cost(SMALL, chosen("window", window_size="7"))
    assert found.speedup == pytest.approx(14**4 / int(pattern.mask((14, 14), (14, 14)).sum()))
    assert found.attention_flops == 2 * 2 * (16 + 16) * int(pattern.mask((14, 14), (14, 14)).sum())
    assert found.milliseconds > 0


def test_flops_grow_with_the_tokens_for_windows_and_their_square_for_dense_attention() -> None:
    window, dense = (dict(growth(SMALL, chosen(name))) for name in ("window", "multi_head"))
    assert window[56] / window[28] == pytest.approx(4.0, rel=0.01)
    width = SMALL.dim
    assert all(flops == 2 * side**2 * 4 * width**2 + 4 * side**4 * width for side, flops in dense.items())


@pytest.mark.parametrize("side", [56, 112])
def test_flops_of_routing_are_counted_without_computing(side) -> None:
    """Projections, 4 of 7 x 7 regions for each query, scores between regions, and the 5 x 5 convolution of the values."""
    tokens, dim = side**2, SMALL.dim
    pairs = tokens * 4 * tokens // 49
    expected = 8 * tokens * dim**2 + 4 * pairs * dim + 2 * 49**2 * dim + 2 * 25 * tokens * dim
    assert compare._flops_at(SMALL, chosen("bi_level_routing"), side) == expected


@pytest.mark.parametrize("name", ["neighborhood", "bi_level_routing", "multi_head"])
def test_flops_need_no_clock_and_are_drawn_on_a_busy_machine_too(name, monkeypatch) -> None:
    monkeypatch.setattr(compare, "PATIENCE", 0.0)  # whatever is timed takes too long
    growth.cache_clear()
    assert [side for side, _ in growth(SMALL, chosen(name))] == [7, 14, 28, 56]
    growth.cache_clear()


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(1.73, "1.73 s"), (0.00412, "4.12 ms"), (0.9999, "1 s"), (0.5, "500 ms"), (95.04, "95 s"), (1234.0, "1234 s")],
)
def test_times_are_written_without_powers_of_ten(seconds, words) -> None:
    assert compare.duration(seconds) == words


def test_an_axis_has_numbers_where_its_values_lie_close_together(monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(compare, "_scaled", lambda value, seconds=False: seen.append((value, seconds)) or "x")
    compare.growth_figure([("a", [(7, 2.3e6)], [(7, 0.031), (14, 0.042)])])
    assert any(1.1e6 <= value <= 4.7e6 for value, seconds in seen if not seconds)
    assert any(0.0155 <= value <= 0.084 for value, seconds in seen if seconds)


def test_time_is_measured_once_for_the_grid_that_is_shown() -> None:
    points = dict(times(SMALL, chosen("window"), 123.0))
    assert points[14] == 123.0
    assert 0.0 < points[7] < 123.0


def test_controls_are_those_of_the_constructor() -> None:
    kinds = {field.name: field.kind for field in fields_of("neighborhood")}
    assert kinds["kernel_size"] == "wholes"
    assert kinds["causal"] == "flag"
    assert kinds["border"] == "word"
    assert read("neighborhood", {"kernel_size": "3,7"})["kernel_size"] == (3, 7)


def encoded(width: int, height: int, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 40)).save(buffer, form)
    return buffer.getvalue()


def test_uploads_are_decoded_and_kept_under_their_content() -> None:
    name = uploads.receive(encoded(60, 40))
    assert uploads.photo(name).shape == (3, 40, 40)
    assert uploads.photo(name)[:, 3, 3].tolist() == [200, 30, 40]


def test_uploads_are_seen_upright_on_white_and_in_all_their_greys() -> None:
    def sent(picture: Image.Image, form: str = "PNG", **options: object) -> torch.Tensor:
        buffer = io.BytesIO()
        picture.save(buffer, form, **options)
        return uploads.decode(buffer.getvalue())

    wide = Image.new("RGB", (40, 20), (0, 0, 0))
    wide.paste((255, 0, 0), (0, 0, 20, 20))  # left half
    turned = wide.getexif()
    turned[274] = 6  # the camera was held so that left is up
    seen = sent(wide, exif=turned)
    assert seen.shape == (3, 40, 20)
    assert seen[0, 5, 10] == 255
    assert seen[0, 35, 10] == 0
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert sent(clear).unique().tolist() == [255]
    deep = Image.fromarray(np.array([[0, 257 * 100], [257 * 200, 65535]], np.uint16))
    assert sent(deep)[0].tolist() == [[0, 100], [200, 255]]
    assert sent(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "JPEG")[:, 2, 2].tolist() == pytest.approx([254, 0, 0], abs=3)


def test_a_photograph_of_a_phone_is_taken_and_kept_small() -> None:
    seen = uploads.decode(encoded(8064, 6048, "JPEG"))  # 48 million pixels, decoded at an eighth
    assert seen.shape == (3, 768, 1024)
    noise = np.random.default_rng(0).integers(0, 256, (2000, 2000, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    assert 8 << 20 < len(buffer.getvalue()) < uploads.BYTES
    assert uploads.decode(buffer.getvalue()).shape == (3, 1024, 1024)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x80\x04cos\nsystem\n", "not an image of PNG"),
        (encoded(60, 40)[:60], "cannot read this image"),
        (encoded(60, 40, "TIFF"), "not an image of PNG"),
        (encoded(6000, 6000), "6000 x 6000 pixels, more than 24 million"),
        (encoded(9000, 8000, "JPEG"), "9000 x 8000 pixels, more than 64 million"),
        (b"0" * (33 << 20), "32 MiB at most; got 33.0 MiB"),
    ],
)
def test_uploads_that_are_no_images_or_too_large_are_refused(data, message) -> None:
    with pytest.raises(ValueError, match="image") as told:
        uploads.decode(data)
    assert message in str(told.value)


def test_brightest_colour_is_where_the_weight_is() -> None:
    heat = torch.zeros(4, 4)
    heat[1, 2] = 0.5
    drawn = overlay(torch.zeros(3, 40, 40, dtype=torch.uint8), heat, 40)
    assert (drawn[10:20, 20:30].astype(int).sum(-1) > 500).all()
    grey = np.delete(drawn.reshape(40, 40, 3), np.s_[10:20], 0)
    assert (grey == grey[..., :1]).all()


def test_catalog_reads_formula_cost_and_source_of_every_system() -> None:
    for system in catalog.systems():
        assert system.account.text, system.slug
        assert "Cost:" not in system.account.text, system.slug
        assert len(system.lines.splitlines()) == 2
    (found,) = catalog.search("2103.14030")
    assert found.slug == "swin"
    assert 'regard.create_model("swin_tiny' in found.lines
    years = [each.year for each in catalog.search("attention")]
    assert len(years) > 5
    assert years == sorted(years, reverse=True)
    assert catalog.search("no such system anywhere") == []
