"""Every public door takes what its documentation allows, and refuses all else with one ``TypeError`` or ``ValueError``."""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import pytest
import torch

import regard
from regard import Source, attend, create_mixer, create_model, merge, plan
from regard import patterns as P
from regard.ops import attend_weights
from regard.ops.attention.transposed import attend_transposed
from regard.ops.calls.source import HeadTable
from regard.ops.channel import channel_attend
from regard.ops.local.deform import deform_sample, sample_points
from regard.ops.local.kernels import apply_kernel, fold_windows, unfold_windows
from regard.ops.local.neighbors import neighbor_bias, neighbor_scores, neighbor_sum
from regard.ops.mixture import balance_loss, chosen_attend, mixture, z_loss
from regard.ops.tokens.permute import attend_permuted, from_tiles, to_tiles
from regard.ops.tokens.rope import rope
from regard.ops.tokens.route import affinity, block_sizes, summaries, top_k
from regard.ops.tokens.tree import dependency_tree, subtrees

X = torch.randn(1, 4, 6, 2, 8)
LSE = torch.randn(1, 4, 6, 2)
TABLE = torch.zeros(1, 24, 2, dtype=torch.long)
CHOSEN = torch.ones(1, 4, 6, 2, dtype=torch.bool)

WRONG = (
    None,
    "a",
    "",
    True,
    b"x",
    2.5,
    math.nan,
    math.inf,
    -1,
    0,
    2**31,
    2**63,
    10**40,
    1j,
    [],
    (),
    [1.5],
    ["a"],
    [None],
    {},
    {1: 2},
    object(),
    int,
    lambda: 0,
    (0,),
    (-1, 2),
    (1, 2, 3, 4),
    [[1, 2], [3, 4]],
    np.zeros((1, 4, 6, 2, 8), dtype=np.float32),
    torch.zeros(()),
    torch.zeros(3),
    X[:, :2],
    X[:, :, :0],
    X[..., :0],
    X[..., :3],
    X[..., :1, :],
    X[0],
    X.double(),
    X.long(),
    X.bool(),
    X.to(torch.uint8),
    X.to(torch.complex64),
    X.to(torch.float8_e4m3fn),
    X.to("meta"),
    X.to_sparse(),
    X.expand(3, -1, -1, -1, -1),
    X[:0],
    X.half(),
    TABLE - 9,
    TABLE + 99,
    torch.device("cpu"),
    torch.float32,
    P.PerHead({P.Window(3): 5}),
    P.Window(3),
)

DOORS = {
    "attend": (
        attend,
        {
            "q": X,
            "k": X,
            "v": X,
            "pattern": "window(3)",
            "bias": None,
            "valid": None,
            "scale": None,
            "sink": None,
            "q_start": 0,
            "dropout": 0.0,
            "return_lse": False,
            "backend": "auto",
        },
    ),
    "source": (
        lambda **options: attend(X, [Source(**options), Source(X, X)]),
        {
            "k": X,
            "v": X,
            "pattern": "dense",
            "q": None,
            "bias": None,
            "valid": None,
            "heads": None,
            "footprint": None,
        },
    ),
    "sources": (lambda sources: attend(X, sources), {"sources": [Source(X, X)]}),
    "bias table": (
        lambda table, pattern: attend(X, X, X, "window(3)", bias=HeadTable(table, pattern)),
        {"table": torch.zeros(2, 5, 5), "pattern": P.Window(3)},
    ),
    "attend_weights": (
        attend_weights,
        {"q": X, "sources": [Source(X, X)], "rows": [0, 1], "scale": None, "sink": None, "q_start": 0, "reduce": None},
    ),
    "attend_transposed": (
        attend_transposed,
        {"q": X, "k": X, "v": X, "pattern": "dense", "scale": None, "lse": LSE, "dropout": 0.0, "backend": "auto"},
    ),
    "merge": (merge, {"outs": [X, X], "lses": [LSE, LSE]}),
    "merge each": (lambda out, lse: merge([X, out], [LSE, lse]), {"out": X, "lse": LSE}),
    "plan": (
        plan,
        {
            "pattern": "window(3)",
            "grid": (8, 8),
            "k_grid": (8, 8),
            "batch": 1,
            "heads": 1,
            "kv_heads": 1,
            "head_dim": 8,
            "value_dim": 8,
            "dtype": torch.float32,
            "device": "cpu",
            "bias": False,
            "training": False,
            "return_lse": False,
            "backend": "auto",
            "tiles": None,
        },
    ),
    "mask": (
        lambda **options: P.Window(3).mask(**options),
        {"q_grid": (4, 4), "k_grid": (4, 4), "q_start": (0, 0), "device": None},
    ),
    "degree": (lambda **options: P.Neighborhood(3).degree(**options), {"q_grid": (4, 4), "k_grid": (4, 4), "q_start": (0, 0)}),
    "Window": (P.Window, {"size": 3, "shift": 1, "pad": "mask"}),
    "Neighborhood": (P.Neighborhood, {"kernel_size": 3, "dilation": 1, "stride": 1, "causal": False, "border": "shift"}),
    "Halo": (P.Halo, {"block": 2, "halo": 1, "border": "zero", "stride": 1}),
    "Grid": (P.Grid, {"size": 3}),
    "Axis": (P.Axis, {"axis": 0, "causal": False}),
    "Union": (P.Union, {"members": (P.Window(3),)}),
    "Intersection": (P.Intersection, {"members": (P.Window(3),)}),
    "PerHead": (P.PerHead, {"groups": {P.Window(3): 1}}),
    "PerHead count": (lambda count: P.PerHead({P.Window(3): count}), {"count": 1}),
    "|": (lambda other: P.Window(3) | other, {"other": P.Window(2)}),
    "&": (lambda other: other & P.Window(3), {"other": P.Window(2)}),
    "Blocks": (lambda **options: attend(X, X, X, P.Blocks(**options)), {"table": TABLE[:, :4], "block": (2, 3)}),
    "Tokens": (lambda table: attend(X, X, X, P.Tokens(table)), {"table": TABLE}),
    "Clusters": (lambda **options: attend(X, X, X, P.Clusters(**options)), {"labels": TABLE[..., 0], "key_labels": None}),
    "parse": (P.parse, {"text": "window(3)"}),
    "block_sizes": (block_sizes, {"grid": (8, 8), "blocks": 2}),
    "summaries": (summaries, {"x": X, "block": (2, 2)}),
    "top_k": (top_k, {"scores": torch.zeros(1, 4, 4), "count": 2, "block": (2, 2)}),
    "affinity": (affinity, {"q": X[..., 0, :], "k": X[..., 0, :]}),
    "channel_attend": (
        channel_attend,
        {"q": X, "k": X, "v": X, "normaliser": "softmax", "l2": False, "temperature": torch.ones(2), "scale": None, "dim": -1},
    ),
    "apply_kernel": (apply_kernel, {"v": X, "weights": torch.zeros(1, 4, 6, 2, 9), "size": 3, "dilation": 1, "border": "zero"}),
    "unfold_windows": (unfold_windows, {"v": X, "size": 3, "stride": 2}),
    "fold_windows": (fold_windows, {"y": torch.zeros(1, 2, 3, 2, 9, 8), "grid": (4, 6), "size": 3, "stride": 2}),
    "sample_points": (sample_points, {"v": X, "points": torch.zeros(1, 4, 2, 3, 2)}),
    "deform_sample": (deform_sample, {"v": X, "points": torch.zeros(1, 4, 2, 3, 2), "weights": torch.zeros(1, 4, 2, 3)}),
    "to_tiles": (to_tiles, {"x": X, "tile": (2, 2), "dilation": (1, 1)}),
    "from_tiles": (from_tiles, {"x": to_tiles(X, (2, 2)), "grid": (4, 6), "tile": (2, 2), "dilation": (1, 1)}),
    "attend_permuted": (
        attend_permuted,
        {"q": X, "k": X, "v": X, "pattern": "neighborhood(3)", "q_tile": (2, 2), "k_tile": (2, 2), "scale": None},
    ),
    "mixture": (mixture, {"logits": torch.zeros(2, 4), "k": 2, "total": 1.0}),
    "chosen_attend": (chosen_attend, {"q": X, "k": X, "v": X, "chosen": CHOSEN, "scale": None}),
    "balance_loss": (balance_loss, {"probabilities": torch.ones(2, 4), "chosen": torch.ones(2, 4, dtype=torch.bool)}),
    "z_loss": (z_loss, {"logits": torch.zeros(2, 4)}),
    "neighbor_scores": (neighbor_scores, {"q": X, "k": X, "pattern": "neighborhood(3)"}),
    "neighbor_sum": (neighbor_sum, {"weights": torch.zeros(1, 4, 6, 2, 9), "v": X, "pattern": "neighborhood(3)"}),
    "neighbor_bias": (neighbor_bias, {"table": torch.zeros(2, 5, 5), "pattern": "neighborhood(3)", "grid": (4, 6)}),
    "rope": (rope, {"x": X, "positions": None, "base": 100.0}),
    "dependency_tree": (dependency_tree, {"weights": torch.ones(1, 3, 3)}),
    "subtrees": (subtrees, {"parents": torch.zeros(1, 3, dtype=torch.long)}),
    "create_mixer": (create_mixer, {"name": "window", "dim": 8, "heads": 2}),
    "create_model": (
        create_model,
        {
            "name": "compact_nano",
            "pretrained": False,
            "num_classes": 2,
            "in_chans": 3,
            "drop_rate": 0.0,
            "drop_path_rate": 0.0,
            "features_only": True,
            "out_indices": [0],
            "mixer": "window",
            "device": None,
            "dtype": None,
            "dim": 16,
        },
    ),
    "list_mixers": (regard.list_mixers, {"pattern": "*"}),
    "list_models": (regard.list_models, {"pattern": "*"}),
}


def refused_or_done(name, call, options):
    """Whether a call is refused in one clear sentence; any other error is the test's."""
    try:
        call(**options)
    except (TypeError, ValueError) as error:
        told = str(error)
        assert told, f"{name}: an error without a word"
        assert "NoneType' object" not in told, f"{name}: {told}"
        assert "unsupported operand" not in told, f"{name}: {told}"
        assert "object is not" not in told, f"{name}: {told}"
        assert "not supported between" not in told, f"{name}: {told}"
        return True
    return False


@pytest.mark.parametrize("door", DOORS)
def test_wrong_kinds_are_refused_and_nothing_else_is_raised(door):
    call, options = DOORS[door]
    assert not refused_or_done(door, call, options)
    for option, value in itertools.product(options, WRONG):
        try:
            refused_or_done(f"{door} {option}", call, {**options, option: value})
        except (AssertionError, FileNotFoundError) as error:  # a word may be the path of a file
            if isinstance(error, AssertionError) or option != "pretrained":
                raise
        except Exception as error:
            pytest.fail(f"{door}({option}={value!r:.60}): {type(error).__name__} {error}"[:400])


def test_masks_of_bools_are_no_bias():
    with pytest.raises(TypeError, match="hidden by valid=, by a pattern, or by a bias of -inf"):
        attend(X, X, X, bias=torch.ones(24, 24, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"bias must be float16.*complex64"):
        attend(X, X, X, bias=torch.ones(24, 24, dtype=torch.complex64))


@pytest.mark.parametrize("shape", [(6, 2), (1, 1, 2), (3,), (2, 1)])
def test_a_sink_is_a_number_or_one_per_head(shape):
    with pytest.raises(ValueError, match=r"one per head, \(2,\)"):
        attend(X, X, X, sink=torch.zeros(shape))
    with pytest.raises(TypeError, match=r"sink must be .*complex64"):
        attend(X, X, X, sink=torch.zeros(2, dtype=torch.complex64))


def routed(table, depth):
    pattern = P.Blocks(table, (2, 3))
    for level in range(depth):
        pattern = pattern & P.Window(3) if level % 2 else pattern | P.Axis(0)
    return pattern


@pytest.mark.parametrize("backend", ["auto", "reference", "dense", "tiled"])
@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_tables_list_what_there_is_at_any_depth(depth, backend):
    for entry in (-2, 4):
        with pytest.raises(ValueError, match=rf"the table of Blocks.*0 to 3, or -1 for none; got {entry}"):
            attend(X, X, X, routed(torch.full((1, 4, 2), entry), depth), backend=backend)
    with pytest.raises(ValueError, match="batch of 1 with 2 heads"):
        attend(X, X, X, routed(torch.zeros(2, 4, 2, dtype=torch.long), depth))
    with pytest.raises(ValueError, match="batch of 1 with 2 heads"):
        attend(X, X, X, routed(torch.zeros(1, 3, 4, 2, dtype=torch.long), depth))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_integers_of_any_width_are_the_same_table(dtype):
    table = torch.tensor([[[0, 1], [1, 2], [3, 3], [0, 2]]])
    expected = attend(X, X, X, P.Blocks(table, (2, 3)), backend="reference")
    for backend in ("auto", "reference", "dense"):
        found = attend(X, X, X, P.Blocks(table.to(dtype), (2, 3)), backend=backend)
        torch.testing.assert_close(found, expected)
    for kind in (torch.bool, torch.float32, torch.complex64):
        with pytest.raises(TypeError, match="table must be int64"):
            P.Blocks(table.to(kind), (2, 3))


def test_a_table_of_no_entries_shows_nothing():
    for pattern in (P.Blocks(TABLE[:, :4, :0], (2, 3)), P.Tokens(TABLE[..., :0])):
        out, lse = attend(X, X, X, pattern, return_lse=True, backend="reference")
        assert bool((out == 0).all())
        assert bool((lse == -torch.inf).all())


@pytest.mark.parametrize("backend", ["auto", "reference", "dense"])
def test_causal_on_a_part_of_a_grid_is_its_own_mask(backend):
    grid = (3, 4)
    k, v = (torch.randn(1, *grid, 2, 8, dtype=torch.float64) for _ in range(2))
    for rows, columns in itertools.product((1, 2, 3), (1, 2, 4)):
        for start in itertools.product(range(grid[0] - rows + 1), range(grid[1] - columns + 1)):
            q = torch.randn(1, rows, columns, 2, 8, dtype=torch.float64)
            mask = torch.tensor(
                [
                    [(a * grid[1] + b) >= key for key in range(math.prod(grid))]
                    for a in range(start[0], start[0] + rows)
                    for b in range(start[1], start[1] + columns)
                ]
            )
            assert torch.equal(mask, P.Causal().mask((rows, columns), grid, q_start=start))
            scores = torch.einsum("bqhd,bkhd->bhqk", q.flatten(1, 2), k.flatten(1, 2)) / math.sqrt(8)
            weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
            expected = torch.einsum("bhqk,bkhd->bqhd", weights, v.flatten(1, 2))
            found = attend(q, k, v, "causal", q_start=start, backend=backend)
            torch.testing.assert_close(found.flatten(1, 2), expected, atol=1e-12, rtol=1e-10)
            (shown,) = attend_weights(q, [Source(k, v, "causal")], q_start=start)
            torch.testing.assert_close(shown.flatten(3), weights, atol=1e-12, rtol=1e-10)


def test_causal_across_ranks_takes_one_number():
    with pytest.raises(ValueError, match="q_start must be one number"):
        attend(X[:, :1, :2], X[:, 0], X[:, 0], "causal", q_start=(1, 1))
    with pytest.raises(ValueError, match="leaves the key grid"):
        attend(X[:, :1, :3], X, X, "causal", q_start=(0, 4))


def test_patterns_refuse_what_they_cannot_be():
    with pytest.raises(ValueError, match="PerHead"):
        P.Union((P.PerHead({P.Halo(2, 1): 2}), P.Window(2)))
    with pytest.raises(ValueError, match="PerHead"):
        P.Window(2) & P.PerHead({P.Halo(2, 1): 2})
    with pytest.raises(ValueError, match=r"i \* 2.*leaves the key grid \(4, 6\)"):
        attend(X, X, X, P.Halo(2, 1, stride=2))
    for make in (lambda: P.Neighborhood(3, 2**63), lambda: P.Halo(2, 2**40), lambda: P.Window(3, shift=2**31)):
        with pytest.raises(ValueError, match="at most 2147483647"):
            make()
    with pytest.raises(ValueError, match="zero keys"):
        attend(X, X, X, P.Halo(2, 2**30))
    with pytest.raises(ValueError, match="deep"):
        functools.reduce(lambda p, level: p | P.Axis(0) if level % 2 else p & P.Axis(1), range(3000), P.Window(3))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("windw(7)", "did you mean window?"),
        ("window", "window needs size, such as 'window\\(7\\)'"),
        ("window(3, **{'shift': 1})", r"without \* and \*\*"),
        ("window(3, sice=2)", "no option sice.*did you mean size?"),
        ("(" * 3000 + "dense" + ")" * 3000, "nested"),
        ("|".join(["dense"] * 3000), "deep"),
        ("-" * 3000 + "dense", "deep"),
        ("window(" + "9" * 40 + ")", "at most 2147483647"),
        ("dense(3)", "takes no arguments"),
        ("window(size=3, size=4)", "size|repeated"),
        ("perhead({dense: 1.5})", "whole number"),
        ("dense|" * 4000 + "dense", "letters"),
        ("\0", "null"),
        ("window(7) | 3", "expected patterns"),
    ],
)
def test_texts_that_are_no_patterns_are_refused(text, told):
    with pytest.raises(ValueError, match=told):
        P.parse(text)


def test_unions_of_many_windows_are_right_and_quick():
    union = P.Union(tuple(P.Window(n) for n in range(2, 14)))
    seen = torch.stack([P.Window(n).mask((6, 7)) for n in range(2, 14)]).any(0)
    assert torch.equal(union.mask((6, 7)), seen)
    assert torch.equal(union.degree((6, 7)).flatten(), seen.sum(1))


@pytest.mark.parametrize(
    "pattern",
    [
        "dense",
        "causal",
        "window(3)",
        "neighborhood(3, border='zero')",
        "halo(2, 1)",
        "axis(0) | axis(1)",
        "perhead({window(3): 1, dense: 1})",
        P.Blocks(TABLE[:, :4], (2, 3)),
        P.Tokens(TABLE),
        P.Clusters(TABLE[..., 0]),
    ],
    ids=repr,
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_batch_of_none_gives_nothing_and_empty_gradients(pattern, backend):
    x = torch.randn(0, 4, 6, 2, 8, requires_grad=True)
    sink = torch.zeros(2, requires_grad=True)
    sources = [Source(x, x, pattern), Source(x[:, :2], x[:, :2])]
    out, lse = attend(x, sources, sink=sink, return_lse=True, backend=backend)
    assert out.shape == x.shape
    assert lse.shape == x.shape[:-1]
    (out.sum() + lse.sum()).backward()
    assert x.grad.shape == x.shape
    assert bool((sink.grad == 0).all())
    assert [w.shape for w in attend_weights(x, sources)] == [(0, 2, 24, 4, 6), (0, 2, 24, 2, 6)]
    assert attend(x, x, x, pattern, backend=backend).shape == x.shape


@pytest.mark.parametrize("name", [name for name in regard.list_mixers() if name != "identity"])
def test_mixers_check_options_and_tokens(name):
    options = {"dim": 8, "heads": 2}
    mixer = create_mixer(name, **options)
    for option, value in itertools.product(("dim", "heads"), WRONG):
        if not (isinstance(value, int) and value in (1, 2, 8)):
            assert refused_or_done(f"{name} {option}", lambda **o: create_mixer(name, **o), {**options, option: value})
    with pytest.raises(ValueError, match=f"mixer {name} has no option colour; it has"):
        create_mixer(name, **options, colour=1)
    with pytest.raises(ValueError, match=f"mixer {name} needs dim"):
        create_mixer(name)
    x = torch.randn(1, 8, 8, 8)
    wrong = (
        None,
        "a",
        x.numpy(),
        x.long(),
        x.double(),
        x.to("meta"),
        x.to_sparse(),
        x[..., :3],
        x[0, 0],
        x[:, :0],
        x.to(torch.complex64),
    )
    for value in wrong:
        assert refused_or_done(f"{name} x={value!r:.40}", mixer, {"x": value})
    for argument in ("extra", "context"):
        for value in ("a", x.numpy(), x.long(), x[..., :3], x.to("meta"), x.expand(3, -1, -1, -1)):
            assert refused_or_done(f"{name} {argument}", lambda **o: mixer(x, **o), {argument: value})
    y = mixer(x[:0])
    assert (y[0] if isinstance(y, tuple) else y).shape == (0, 8, 8, 8)


def test_an_unknown_option_is_answered_with_those_that_are_near():
    with pytest.raises(ValueError, match=r"window has no option kernel_size; it has window_size, shift.*mean window_size"):
        create_mixer("window", dim=64, heads=2, kernel_size=7)
    with pytest.raises(ValueError, match=r"has no option window; its table takes dim.*did you mean window_size"):
        create_model("swin_tiny_patch4_window7_224", window=7)


def test_pixels_are_no_images():
    model = create_model("compact_nano", num_classes=2).eval()
    pixels = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    for image in (pixels, pixels.numpy(), None):
        with pytest.raises(TypeError, match=r"floating point tensor .*pixels / 255, normalised"):
            model(image)
    with pytest.raises(ValueError, match="images must be float32, as the model is"):
        model(pixels.double())
    with torch.no_grad():
        assert model(torch.zeros(0, 3, 32, 32)).shape == (0, 2)
