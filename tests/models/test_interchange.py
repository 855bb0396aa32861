"""Interchange: every registered mixer stands in every backbone that is built from a table, or the table says why not."""

from __future__ import annotations

from functools import cache
from inspect import signature
from itertools import chain, combinations
from zlib import crc32

import pytest
import torch
from torch import Tensor, nn

from regard import create_model, list_mixers, list_models
from regard.layers.mixers import mixer_class
from regard.models import model_card


@cache
def families() -> dict[str, str]:
    """The smallest registered model of each function that makes tables."""
    smallest: dict[str, str] = {}
    for name in sorted(list_models(), key=lambda name: model_card(name).params):
        table = model_card(name).table
        smallest.setdefault(getattr(table, "func", table).__name__, name)
    return dict(sorted(smallest.items()))


BLIND = ["identity", "outlook"]  # a class token would not see the image
FIXED = {
    "dependency_vit": "hands the messages",
    "dualtoken_vit": "carries global tokens",
    "evit": "ranks tokens",
    "overlock": "a context that travels",
    "tic": "mixer, MLP and downsampling in one",
}
OPEN = [family for family in families() if family not in FIXED]
SMALL = {  # what a table takes of these makes it tiny
    "dim": 32,
    "dims": (16, 32, 48),
    "head_dim": 8,
    "depth": 2,
    "depths": (1, 1, 1, 1),
    "stem_dim": 8,
    "plain": 1,
    "pretrain_size": 64,
}
SMALL_OTHERWISE = {
    "compact": {"depths": (1, 1)},
    "efficientvit_msra": {"depths": (1, 1, 2), "heads": (2, 4, 4), "head_dim": 4},
    "halonet": {"ratios": (0.5, 0.5, 0.5, 0.5)},
    "lookup_vit": {"size": (10, 9)},  # mixers work on the compressed tokens
    "moh_transnext": {"shared": (2, 2, 2, 2), "routed": (1, 1, 1, 1)},
    "shvit": {"depths": (1, 1, 2), "parts": (None, 8, 8)},
    "volo": {"grid": (5, 5)},
}


def tiny(family: str, mixer: str | list[str] | None) -> nn.Module:
    """A narrow model whose parameters and statistics are numbers that their names decide."""
    name = families()[family]
    taken = signature(model_card(name).table).parameters
    options = {key: value for key, value in SMALL.items() if key in taken} | SMALL_OTHERWISE.get(family, {})
    model = create_model(name, num_classes=5, mixer=mixer, **options).eval()
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(crc32(key.encode())))
            value.copy_(1 + 0.2 * noise.abs() if value.ndim == 1 else noise * value[0].numel() ** -0.5)
    return model


def mixing(model: nn.Module) -> list[list[int]]:
    """Of each stage, the numbers of heads of its blocks that have a mixer."""
    return [
        [stage.heads for i in range(stage.depth) if stage.period[i % len(stage.period)].mixer is not None]
        for stage in model.spec.stages
    ]


def image_of_ten_tokens(model: nn.Module) -> Tensor:
    """No whole number of patches; where mixing begins it has 10 x 9 tokens, more than windows and neighborhoods hold."""
    first = next(i for i, blocks in enumerate(mixing(model)) if blocks)
    side = model.feature_info[first]["reduction"]
    return torch.randn(1, 3, 10 * side - 1, 9 * side - 1, generator=torch.Generator().manual_seed(0))


def run(model: nn.Module, image: Tensor, kind: object) -> tuple[Tensor, list[nn.Module]]:
    """The logits, and those mixers of a kind that were called, in order."""
    called: list[nn.Module] = []
    for module in model.modules():
        if type(module) is kind:
            module.register_forward_hook(lambda module, *_: called.append(module))
    return model(image), called


def outside_mixers(model: nn.Module) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in model.state_dict().items() if ".mixer." not in key}


@pytest.mark.parametrize("family", OPEN)
def test_every_mixer_stands_in_every_table_and_makes_a_difference(family: str) -> None:
    plain = tiny(family, None)
    image, outputs = image_of_ten_tokens(plain), {}
    blind = BLIND if hasattr(plain, "cls_token") and family != "volo" else []  # volo's class token comes after its table
    for mixer in [name for name in list_mixers() if name not in blind]:
        model = tiny(family, mixer)
        assert outside_mixers(model) == outside_mixers(plain), mixer
        outputs[mixer], called = run(model, image, mixer_class(mixer))
        assert outputs[mixer].shape == (1, 5), mixer
        assert outputs[mixer].isfinite().all(), mixer
        assert [each.heads for each in called] == list(chain(*mixing(plain))), mixer
        assert len(set(called)) == len(called), mixer
        if mixer != "identity":
            learned = [parameter for each in called for parameter in each.parameters()]
            gradients = torch.autograd.grad(outputs[mixer].square().sum(), learned, allow_unused=True)
            moved = {p for p, gradient in zip(learned, gradients, strict=True) if gradient is not None and gradient.any()}
            assert not any(moved.isdisjoint(each.parameters()) for each in called), mixer
    if all(stage.heads == 1 for stage in plain.spec.stages):
        torch.testing.assert_close(outputs.pop("mixture_of_heads"), outputs["multi_head"])  # one head is always on
    for (first, ours), (second, theirs) in combinations(outputs.items(), 2):
        assert (ours - theirs).abs().max() > 1e-4 * ours.abs().max(), f"{first} and {second}"
    for mixer in blind:
        with pytest.raises(ValueError, match=rf"never see the image.*\['{mixer}', 'multi_head'\]; got '{mixer}'"):
            tiny(family, mixer)
        assert tiny(family, [mixer, "multi_head"])(image).isfinite().all()


@pytest.mark.parametrize("family", FIXED)
def test_a_table_that_takes_no_other_mixer_says_why(family: str) -> None:
    with pytest.raises(ValueError, match=rf"{FIXED[family]}.*: it takes no other mixer; got 'window'"):
        create_model(families()[family], mixer="window")
