"""What every system of the catalog promises: the shared contract, over the rows of systems.csv.

A property that a system really lacks stands in the row's ``exempt``: ``property: reason``, several separated by ``;``.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from functools import cache, partial
from importlib import resources
from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch
import torch.nn.functional as F
from contract import randomise, without_gradient
from skimage import data
from torch import Tensor, nn

from regard import create_model, list_models
from regard.layers.mixers import PatternMixer
from regard.ops.patterns import parse

PROPERTIES = ("gradients", "batch", "bfloat16", "state_dict", "compile", "export", "seed", "errors")
VERIFIED = r"(\S+/\S+@[0-9a-f]{7}|\w+ [\d.]+|same)[^:;|]*: [^;|]+; [^;|]+; .*(output|eigenvector) [\d.e-]+.*"
"""What a system was compared with: code, variants, sizes, and the errors, see :class:`regard.catalog.System`."""
COLUMNS = ["id", "slug", "name", "title", "arxiv", "year", "kind", "area", "entry", "sizes", "verified", "exempt"]


@cache
def catalog() -> list[dict[str, str]]:
    with resources.files("regard").joinpath("systems.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@cache
def photo() -> Tensor:
    """An odd-sized real image (3, 61, 83), standardised."""
    image = torch.from_numpy(data.astronaut()).movedim(-1, 0)[None].float()
    image = F.interpolate(image, (61, 83), mode="bilinear", antialias=True)[0]
    return (image - image.mean()) / image.std()


def photos(dtype: torch.dtype = torch.float32) -> Tensor:
    """Two different images (2, 3, 61, 83)."""
    return torch.stack([photo(), photo().flip(-1)]).to(dtype)


def tokens(dtype: torch.dtype = torch.float32) -> Tensor:
    """The same as tokens (2, 15, 20, 48): patches of 4 x 4 pixels."""
    patches = F.unfold(photos(dtype)[..., :60, :80], 4, stride=4)
    return patches.unflatten(-1, (15, 20)).movedim(1, -1)


NARROW = {"dim": 16, "head_dim": 8, "depths": (2, 1, 1, 1)}
ISOTROPIC = {"dim": 16, "head_dim": 8, "depth": 4}
NARROW_OTHERWISE = {  # tables of one resolution, and those that list the widths of their stages
    "evit": ISOTROPIC,
    "convit": ISOTROPIC,
    "dependency_vit": {"dim": 16, "heads": 2, "depth": 4},
    "sparsifiner": ISOTROPIC,
    "lookup_vit": ISOTROPIC | {"size": (2, 3)},
    # a single routed head has the gate 1 whatever its router says, whose gradient is then zero
    "moh": NARROW | {"shared": (2, 2, 2, 4), "routed": (0, 2, 3, 4)},
    "convshare_vit": {"side": 8, "depth": 2, "kernel_size": 5},
    "dualtoken_vit": {"dims": (16, 24, 32), "heads": (2, 2, 2), "depths": (1, 1, 1)},
    "efficientvit_msra": {"dims": (16, 24, 32), "heads": (2, 3, 2), "window_sizes": (3, 2, 2)},
    "patnet": {"dim": 16, "depths": (2, 1, 1, 1)},
    "shvit": {"dims": (16, 24, 32), "depths": (2, 1, 1), "parts": (None, 7, 8)},
    "overlock": {
        "dims": (8, 12, 16, 24),
        "depths": (1, 1, 1, 1),
        "focus_depths": (2, 1),
        "focus_heads": (2, 1),
        "kernel_sizes": (7, 5, 7, 5),
        "features": 32,
    },
}


def backbone(row: dict[str, str], **options) -> nn.Module:
    """The first published size, narrow and shallow."""
    narrow = NARROW_OTHERWISE.get(row["slug"], NARROW)
    return resolve_name(row["entry"])(row["sizes"].split()[0], num_classes=5, drop_path_rate=0.0, **narrow, **options)


def mixer(row: dict[str, str], **options) -> nn.Module:
    return resolve_name(row["entry"])(48, 4, **options)


def operator(row: dict[str, str], **options) -> nn.Module:
    """The first pattern, between projections."""
    return PatternMixer(48, 4, parse(row["sizes"].split()[0]), relative_bias=False, rank=2, **options)


def maps(dtype: torch.dtype = torch.float32) -> Tensor:
    """The same channels first (2, 48, 15, 20)."""
    return tokens(dtype).movedim(-1, 1)


def gate(row: dict[str, str], **options) -> nn.Module:
    return resolve_name(row["entry"])(48, **options)


def levels(dtype: torch.dtype = torch.float32) -> Tensor:
    """The same as integers of eight levels (2, 3, 15, 20), whatever the dtype of the model."""
    small = F.interpolate(photos(), (15, 20), mode="bilinear", antialias=True)
    return (2 * small + 4).long().clamp(0, 7)


def generator(row: dict[str, str], **options) -> nn.Module:
    """A small one for the integers above."""
    return resolve_name(row["entry"])((15, 20), 3, 8, 16, 2, outer=1, inner=1, encoder=1, **options)


def runs(dtype: torch.dtype = torch.float32) -> Tensor:
    """The same in 15 groups of 60 integers."""
    return levels(dtype).flatten(1).unflatten(1, (15, 60))


def decoder(row: dict[str, str], **options) -> nn.Module:
    """A small one for the groups above."""
    return resolve_name(row["entry"])("(1)1(1)", 15, 60, 2, 8, 16, 32, 2, 4, **options)


SMALL_VIT = {"dim": 16, "head_dim": 8, "depth": 4, "num_classes": 5, "drop_path_rate": 0.0}


class Analysis(nn.Module):
    """What a function of a model and images measures, all its tensors in one ``(numbers, ...)``, as if it were a layer."""

    def __init__(self, measure: Callable[..., object], **options) -> None:
        super().__init__()
        self.measure, self.model = measure, create_model("vit_tiny_patch16_224", **SMALL_VIT, **options)

    def forward(self, x: Tensor) -> Tensor:
        found = self.measure(self.model, x)
        if not isinstance(found, list):
            return self._numbers(found)
        return torch.stack([self._numbers(each) for each in found])

    @staticmethod
    def _numbers(found: object) -> Tensor:
        return torch.cat([t.flatten().double() for t in vars(found).values() if isinstance(t, Tensor)])


def analysis(row: dict[str, str], **options) -> nn.Module:
    return Analysis(resolve_name(row["entry"]), **options)


def wrapper(row: dict[str, str], **options) -> nn.Module:
    """Around a small vision transformer."""
    return resolve_name(row["entry"])(create_model("deit_tiny_patch16_224", **SMALL_VIT, **options))


KINDS: dict[str, tuple[Callable[..., nn.Module], Callable[..., Tensor]]] = {
    "backbone": (backbone, photos),
    "mixer": (mixer, tokens),
    "gate": (gate, maps),
    "operator": (operator, tokens),
    "generator": (generator, levels),
    "decoder": (decoder, runs),
    "analysis": (analysis, photos),
    "wrapper": (wrapper, photos),
}


def exempt(row: dict[str, str]) -> dict[str, str]:
    return dict(part.strip().split(": ", 1) for part in row["exempt"].split(";") if part.strip())


def systems(name: str) -> pytest.MarkDecorator:
    """All rows that promise a property: how to build the system and what to give it."""
    rows = [row for row in catalog() if name not in exempt(row)]
    cases = [pytest.param(partial(KINDS[row["kind"]][0], row), KINDS[row["kind"]][1], id=row["slug"]) for row in rows]
    return pytest.mark.parametrize(("build", "inputs"), cases)


def test_rows_are_complete_and_unique():
    rows = catalog()
    assert all(list(row) == COLUMNS and None not in row.values() for row in rows)
    for column in ("id", "slug"):
        values = [row[column] for row in rows]
        assert len(set(values)) == len(values)
    assert [int(row["id"]) for row in rows] == sorted(int(row["id"]) for row in rows)
    for row in rows:
        assert row["kind"] in KINDS, row
        assert callable(resolve_name(row["entry"]))
        assert set(exempt(row)) <= set(PROPERTIES)
        assert all(exempt(row).values())
        for source in row["verified"].split("|"):
            assert row["verified"] == "formula" or re.fullmatch(VERIFIED, source.strip()), source
        assert Path(__file__).with_name(f"test_{row['slug']}.py").is_file()
        if row["kind"] == "backbone":
            assert set(row["sizes"].split()) <= set(list_models())


@systems("gradients")
def test_every_parameter_gets_a_finite_gradient_that_is_not_zero(build, inputs):
    """Randomised first: residual branches and gains that start at zero would hide parameters without effect."""
    model = randomise(build(dtype=torch.float64)).train()
    model(inputs(torch.float64)).square().sum().backward()
    assert not without_gradient(model)


@systems("batch")
def test_images_of_a_batch_do_not_see_each_other(build, inputs):
    model, x = build(dtype=torch.float64).eval(), inputs(torch.float64)
    torch.testing.assert_close(model(x)[1:], model(x[1:]), rtol=1e-12, atol=1e-12)


@systems("bfloat16")
def test_bfloat16_stays_close_to_float32(build, inputs):
    model = build().eval()
    with torch.no_grad():
        expected = model(inputs())
        got = model.to(torch.bfloat16)(inputs(torch.bfloat16))
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).norm() < 5e-2 * expected.norm()


@systems("state_dict")
def test_a_state_dict_carries_the_model(build, inputs):
    first, second = build().eval(), build().eval()
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(inputs()), second(inputs()))  # bitwise: the same operators on the same shapes


@systems("compile")
def test_compiles_without_graph_breaks(build, inputs):
    model = build().eval()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(inputs()), model(inputs()))


@systems("export")
def test_exports_to_one_graph(build, inputs):
    model = build().eval()
    exported = torch.export.export(model, (inputs(),))
    torch.testing.assert_close(exported.module()(inputs()), model(inputs()))


@systems("seed")
def test_a_seed_decides_everything(build, inputs):
    outputs = []
    for _ in range(2):
        torch.manual_seed(7)
        outputs.append(build().train()(inputs()))
    assert torch.equal(*outputs)  # bitwise: the same operators on the same shapes


@systems("errors")
def test_bad_input_is_told_what_was_given_and_what_is_allowed(build, inputs):
    model = build()
    with pytest.raises(ValueError, match=r"expected .*got \("):
        model(inputs()[0, 0])
