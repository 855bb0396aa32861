"""What a small model of every family promises in training, to adapters and hooks, and to who looks inside."""

from __future__ import annotations

import pytest
import torch
from contract import adapt, heard, without_gradient
from families import families, image_of_ten_tokens, tiny
from torch import Tensor, nn

from regard.bench import count
from regard.lens import capture

SILENT = {"sparsifiner": (".predictor.", "its choice is discrete: it learns from reconstruction_loss alone")}
"""Parameters that get no gradient from the logits, and why."""
UNCOUNTED = {"patnet": "attends by gates of channels and places, which are no weights of anything"}


def images(model: nn.Module, count: int = 1) -> Tensor:
    image = image_of_ten_tokens(model).to(next(model.parameters()).dtype)
    return torch.cat([image, image.flip(-1)][:count])


def numbers(y: Tensor | tuple[Tensor, ...]) -> Tensor:
    """All logits in one row: distilled models give two."""
    return torch.cat([t.flatten() for t in (y if isinstance(y, tuple) else (y,))])


def learning(family: str, names) -> set[str]:
    return {name for name in names if SILENT[family][0] not in f".{name}."} if family in SILENT else set(names)


@pytest.mark.parametrize("family", families())
def test_every_parameter_learns_in_a_plain_step(family: str) -> None:
    model = tiny(family, drop_path_rate=0.0).double().train()
    numbers(model(images(model, 2))).square().sum().backward()
    assert not learning(family, without_gradient(model))


@pytest.mark.parametrize("family", families())
def test_an_adapter_in_place_of_every_layer_learns(family: str) -> None:
    model = tiny(family).double().eval()
    adapters = adapt(model)
    numbers(model(images(model))).square().sum().backward()
    for path in learning(family, adapters):
        for parameter in (adapters[path].shift, adapters[path].scale):
            assert parameter.grad is not None, path
            assert parameter.grad.abs() > 0, path


@pytest.mark.parametrize("family", families())
def test_what_a_hook_returns_in_place_of_a_layers_output_counts(family: str) -> None:
    model = tiny(family).double().eval()
    image = images(model)
    with torch.no_grad():
        changed = heard(model, lambda: numbers(model(image)))
    assert changed
    assert all(changed[path] for path in learning(family, changed)), [path for path, yes in changed.items() if not yes]


@pytest.mark.parametrize("family", families())
def test_captured_rows_sum_to_one_and_the_cost_is_counted(family: str) -> None:
    model = tiny(family).eval()
    with torch.no_grad(), capture(model) as maps, count() as cost:
        model(images(model))
    assert cost.flops > 0 or family in UNCOUNTED
    assert len(maps) or family in UNCOUNTED
    for each in maps:
        if each.kind == "attention" and not each.lossy:
            total = sum(weights.flatten(3).sum(-1) for weights in each.weights)
            torch.testing.assert_close(total, torch.ones_like(total), msg=each.name)


@pytest.mark.parametrize("family", families())
def test_a_wrong_image_is_refused_in_one_sentence(family: str) -> None:
    model = tiny(family)
    image = images(model)
    for given, said in (
        (image.byte(), "uint8"),
        (image.numpy(), "ndarray"),
        (image.double(), "float64"),
        (image[0], r"got \("),
        (image[:, :2], r"got \("),
        (image[..., :0], r"got \("),
    ):
        with pytest.raises((ValueError, TypeError), match=said) as caught:
            model(given)
        assert "\n" not in str(caught.value)
