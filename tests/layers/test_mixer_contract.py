"""What every registered mixer promises, for queries of its own tokens and of another grid, with and without extra tokens."""

from __future__ import annotations

import copy

import pytest
import torch
from contract import adapt, heard, randomise, without_gradient
from torch import Tensor, nn

from regard import create_mixer, list_mixers
from regard.bench import count
from regard.lens import capture

OPTIONS = {
    "bi_level_routing": {"regions": 3, "topk": 2},
    "mixture_of_heads": {"shared": 1, "routed": 2},  # a single routed head always has the gate 1, whatever its router says
    "sparsifiner": {"keep_rate": 0.4, "grid": (6, 7)},
    "window": {"window_size": 4, "shift": 2},
    "neighborhood": {"kernel_size": 3},
    "halo": {"block_size": 3, "halo_size": 1},
    "grid": {"grid_size": 3},
    "multi_head": {"grid": (6, 7)},
}
"""For mixers that would not do all they can on a grid of 6 x 7 by default."""
SILENT = {"sparsifiner": ("predictor.", "its choice is discrete: it learns from reconstruction_loss alone")}
"""Parameters that get no gradient from the output, and why."""
MIXERS = [name for name in list_mixers() if name != "identity"]  # has nothing to learn, to weigh or to count
INPUTS = ["alone", "context", "extra", "both"]


def make(name: str, **options) -> nn.Module:
    return randomise(create_mixer(name, dim=16, heads=4, dtype=torch.float64, **OPTIONS.get(name, {}) | options))


def tokens(seed: int, *grid: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, *grid, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def arguments(inputs: str, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], dict[str, Tensor]]:
    given = [tokens(0, 6, 7, dtype=dtype)]
    if inputs in ("extra", "both"):
        given.append(tokens(1, 3, dtype=dtype))
    return given, {"context": tokens(2, 6, 7, dtype=dtype)} if inputs in ("context", "both") else {}


def run(mixer: nn.Module, inputs: str) -> Tensor:
    """All of its outputs in one row."""
    given, named = arguments(inputs)
    y = mixer(*given, **named)
    return torch.cat([t.flatten() for t in (y if isinstance(y, tuple) else (y,))])


def learning(name: str, names) -> set[str]:
    return {each for each in names if not each.startswith(SILENT[name][0])} if name in SILENT else set(names)


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("name", MIXERS)
def test_every_parameter_has_a_finite_gradient_that_is_not_zero(name: str, inputs: str) -> None:
    mixer = make(name).train()
    run(mixer, inputs).square().sum().backward()
    assert not learning(name, without_gradient(mixer))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("name", MIXERS)
def test_an_adapter_in_place_of_every_layer_learns(name: str, inputs: str, training: bool) -> None:
    mixer = make(name).train(training)
    adapters = adapt(mixer)
    assert adapters
    run(mixer, inputs).square().sum().backward()
    for path in learning(name, adapters):
        for parameter in (adapters[path].shift, adapters[path].scale):
            assert parameter.grad is not None, path
            assert parameter.grad.abs() > 0, path


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("name", MIXERS)
def test_what_a_hook_returns_in_place_of_a_layers_output_counts(name: str, inputs: str) -> None:
    mixer = make(name).eval()
    with torch.no_grad():
        changed = heard(mixer, lambda: run(mixer, inputs))
    assert changed
    assert all(changed[path] for path in learning(name, changed)), changed


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("name", MIXERS)
def test_a_capture_holds_rows_that_sum_to_one(name: str, inputs: str) -> None:
    mixer = make(name).eval()
    with torch.no_grad(), capture(mixer) as maps:
        run(mixer, inputs)
    assert len(maps)
    for each in maps:
        if each.kind == "attention" and not each.lossy:
            total = sum(weights.flatten(3).sum(-1) for weights in each.weights)
            torch.testing.assert_close(total, torch.ones_like(total), msg=each.name)


@pytest.mark.parametrize("name", MIXERS)
def test_its_cost_is_counted(name: str) -> None:
    mixer = make(name).eval()
    with torch.no_grad(), count() as cost:
        run(mixer, "alone")
    assert cost.flops > 0
    assert cost.bytes > 0
    assert cost.calls > 0


@pytest.mark.parametrize("name", list_mixers())
def test_wrong_arguments_are_refused_in_one_sentence(name: str) -> None:
    for options, said in (
        ({"dim": 16, "heads": 4, "no_such_option": 1}, "no_such_option"),
        ({"dim": 18, "heads": 4}, "18"),
        ({"dim": 16, "heads": 0}, "0"),
        ({"dim": 0, "heads": 1}, "0"),
        ({"dim": 16, "heads": "four"}, "four"),
        ({"dim": 16.5, "heads": 4}, "16.5"),
        ({"dim": True, "heads": 1}, "True"),
    ):
        with pytest.raises((ValueError, TypeError), match=said) as caught:
            create_mixer(name, **options)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", list_mixers())
def test_wrong_tokens_are_refused_in_one_sentence(name: str) -> None:
    mixer = create_mixer(name, dim=16, heads=4, **OPTIONS.get(name, {}))
    x = torch.randn(2, 6, 7, 16)
    for given, said in (
        (torch.randn(2, 6, 7, 8), r"\(2, 6, 7, 8\)"),
        (torch.randn(2, 16), r"\(2, 16\)"),
        (x.long(), "int64"),
        (x.to(torch.complex64), "complex64"),
        (x.numpy(), "ndarray"),
        (None, "None"),
    ):
        with pytest.raises((ValueError, TypeError), match=said) as caught:
            mixer(given)
        assert "\n" not in str(caught.value)
    for extra in (torch.randn(2, 3, 8), torch.randn(1, 3, 16), torch.randn(2, 16), torch.randn(2, 1, 3, 16), x[0].long(), "x"):
        with pytest.raises((ValueError, TypeError), match="extra") as caught:
            mixer(x, extra)
        assert "\n" not in str(caught.value)
    for context in (torch.randn(2, 6, 7, 8), torch.randn(3, 6, 7, 16), torch.randn(2, 16), x.long(), "x"):
        with pytest.raises((ValueError, TypeError), match="context") as caught:
            mixer(x, context=context)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", list_mixers())
def test_tokens_of_another_dtype_than_the_weights_are_refused_in_one_sentence(name: str) -> None:
    mixer = create_mixer(name, dim=16, heads=4, dtype=torch.float64, **OPTIONS.get(name, {}))
    if not list(mixer.parameters()):
        return
    with pytest.raises((ValueError, TypeError), match="float64, as the weights are; got a float32"):
        mixer(torch.randn(2, 6, 7, 16))


@pytest.mark.parametrize("name", MIXERS)
def test_a_copy_computes_the_same(name: str) -> None:
    mixer = make(name).eval()
    assert torch.equal(run(copy.deepcopy(mixer), "both"), run(mixer, "both"))  # the same operators on the same numbers


def test_the_router_of_a_single_routed_head_decides_nothing() -> None:
    """Its gate is its share among the chosen, which is all: the only parameters in the library whose gradient is zero."""
    mixer = make("mixture_of_heads", shared=2, routed=1)
    run(mixer, "alone").square().sum().backward()
    assert without_gradient(mixer) == {"router.weight": "zero"}
