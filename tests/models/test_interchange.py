"""Interchange: every registered mixer stands in every backbone that is built from a table, or the table says why not."""

from __future__ import annotations

import re
from itertools import chain, combinations

import pytest
import torch
from families import families, image_of_ten_tokens, mixing, tiny
from torch import Tensor, nn

from regard import create_model, list_mixers
from regard.layers.mixers import mixer_card, mixer_class
from regard.models import model_card

BLIND = [name for name in list_mixers() if not mixer_card(name).joins_extra]  # a class token would not see the image
CARDS = {family: model_card(name) for family, name in families().items()}
FIXED = {family: why for family, card in CARDS.items() if (why := card.table(**card.tiny_options).fixed)}
OPEN = [family for family in families() if family not in FIXED]


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
        if mixer_card(mixer).computes:
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
    with pytest.raises(ValueError, match=rf"{re.escape(FIXED[family])}.*it takes no other mixer; got 'window'"):
        create_model(families()[family], mixer="window")
