"""What is optimised, and how fast."""

from __future__ import annotations

import math

import pytest
import torch

from regard.models import create_model
from regard.train.classify import Classifier, warmup_cosine


def test_learning_rate_rises_linearly_and_falls_as_a_cosine() -> None:
    factors = [warmup_cosine(step, 100, 0.1) for step in range(101)]
    assert factors[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert factors[10] == 1.0
    assert factors[55] == pytest.approx(0.5)
    assert factors[70] == pytest.approx(0.5 * (1 + math.cos(math.pi * 60 / 90)))
    assert factors[100] == pytest.approx(0.0)
    assert max(factors) == 1.0


def test_norms_biases_and_bias_tables_are_not_decayed() -> None:
    model = create_model("compact_nano", num_classes=3, mixer="window")
    optimizer = Classifier(model, 3, 10, weight_decay=0.3).configure_optimizers()["optimizer"]
    decay = {parameter: group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        free = name.endswith((".bias", ".table")) or "norm" in name
        assert decay[parameter] == (0.0 if free else 0.3), name


def test_loss_is_cross_entropy_with_smoothed_targets() -> None:
    model = create_model("compact_nano", num_classes=4).eval()
    module = Classifier(model, 4, 10, label_smoothing=0.2)
    module.log = lambda *args, **kwargs: None  # there is no trainer to log to
    images, labels = torch.randn(5, 3, 16, 16), torch.tensor([0, 1, 2, 3, 1])
    target = torch.full((5, 4), 0.2 / 4)
    target[torch.arange(5), labels] += 0.8
    expected = -(target * model(images).log_softmax(-1)).sum(-1).mean()
    assert torch.allclose(module.training_step((images, labels), 0), expected)
