"""What every registered mixer promises, for queries of its own tokens and of another grid, with and without extra tokens."""

from __future__ import annotations

import copy

import pytest
import torch
from contract import adapt, heard, randomise, without_gradient
from torch import Tensor, nn

from regard import create_mixer, list_mixers
from regard.bench import count
from regard.layers.mixers import calls_of, mixer_card
from regard.lens import capture

MIXERS = [name for name in list_mixers() if mixer_card(name).computes]  # has nothing to learn, to weigh or to count
INPUTS = ["alone", "context", "extra", "both"]


def make(name: str, **options) -> nn.Module:
    return randomise(mixer_card(name).tiny(dtype=torch.float64, **options)[0])


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
    return {each for each in names if not each.startswith(tuple(mixer_card(name).unlearned))}


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
    mixer, _ = mixer_card(name).tiny()
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
    mixer, _ = mixer_card(name).tiny(dtype=torch.float64)
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


def test_a_card_says_what_is_known_of_a_mixer() -> None:
    card = mixer_card("hilo")
    assert (card.label, card.calls, card.papers) == ("HiLo", "parallel", ("2205.13213",))
    assert card.cost == "s^2 + N / s^2 keys per query"
    assert [mixer_card(name).label for name in ("multi_head", "mixture_of_heads")] == ["dense", "mixture-of-heads"]
    assert not mixer_card("identity").computes
    assert mixer_card("sparsifiner").options_for((3, 5)) == {"grid": (3, 5)}
    module, given = mixer_card("window").tiny(dtype=torch.float64, shift=1)
    assert repr(module.pattern) == "Window(4, shift=1)"
    assert module(*given).shape == given[0].shape == (2, 6, 7, 16)
    assert [calls_of(create_mixer(name, dim=16, heads=4)) for name in ("hilo", "criss_cross", "window")] == [
        "parallel",
        "sequence",
        None,
    ]
    assert calls_of(nn.Identity()) is None


def test_a_word_that_an_option_does_not_know_is_refused() -> None:
    with pytest.raises(ValueError, match=r"pad must be one of mask, token; got 'tokn' \(did you mean token\?\)"):
        create_mixer("window", dim=16, heads=4, pad="tokn")
    with pytest.raises(TypeError, match="router must be one of linear, query_norm; got"):
        create_mixer("mixture_of_heads", dim=16, heads=4, router=1)
