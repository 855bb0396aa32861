"""The compact pyramids: their cards say what they are."""

import pytest

from regard import create_model, list_models
from regard.models import count_parameters, model_card


@pytest.mark.parametrize("name", list_models("compact_*"))
def test_cards_tell_the_parameters(name):
    assert count_parameters(create_model(name, device="meta")) == model_card(name).params
