"""Backbones, inference and training step, per image and per FLOP: regard's, timm's, and regard's with dense attention.

All take turns in one process. FLOPs are those of a forward pass by what the patterns show, a multiply-add as two; those of a
backbone of timm's are those of the same one here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import create_model, export_state_dict
from .cases.scope import Case, Scope
from .harness import Contest, Run, Variant, worst_error
from .peers import load_timm
from .usage import flops

CHECKED = 2
"""Images whose logits and gradients are compared with float64."""


@dataclass(frozen=True)
class Entry:
    """A backbone to measure.

    Args:
        label: how it is shown.
        name: see :func:`regard.create_model`.
        timm: its name in timm; None where timm does not have it.
        dense: whether to measure it with dense attention in place of its own, too.
        tiny: options of a tiny one.
    """

    label: str
    name: str
    timm: str | None = None
    dense: bool = True
    tiny: Mapping[str, Any] = field(default_factory=dict)


ENTRIES = (
    Entry(
        "Swin-T",
        "swin_tiny_patch4_window7_224",
        "swin_tiny_patch4_window7_224",
        tiny={"dim": 16, "depths": (1, 1), "head_dim": 8},
    ),
    Entry("DiNAT-T", "dinat_tiny", tiny={"depths": (1, 1, 1, 1), "dim": 16, "head_dim": 8}),
    Entry("BiFormer-T", "biformer_tiny", tiny={"depths": (1, 1, 1, 1), "dim": 16, "head_dim": 8}),
    Entry(
        "ViT-S",
        "vit_small_patch16_224",
        "vit_small_patch16_224",
        dense=False,
        tiny={"dim": 16, "depth": 1, "head_dim": 8, "image_size": 64},
    ),
)


def backbone_cases(scope: Scope, chosen: Sequence[str] = ()) -> list[Case]:
    """Inference and training step of the backbones.

    Args:
        scope: sizes and peers.
        chosen: labels, in any case, or beginnings of names; all by default.

    Raises:
        ValueError: nothing is called so.
    """
    known = [entry.label.lower() for entry in ENTRIES]
    if unknown := [name for name in chosen if name.lower() not in known]:
        raise ValueError(f"unknown backbones {', '.join(map(repr, unknown))}; there are {', '.join(known)}")
    entries = [entry for entry in ENTRIES if not chosen or entry.label.lower() in {name.lower() for name in chosen}]
    return [partial(_contest, scope, entries, training) for training in (False, True)]


def _contest(scope: Scope, entries: Sequence[Entry], training: bool) -> Contest:
    batch, side = scope.size(8, 2), scope.size(224, 64)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, side, side, generator=generator)
    labels = torch.randint(10 if scope.smoke else 1000, (batch,), generator=generator)
    variants: dict[str, Variant] = {}

    def add(name: str, model: nn.Module, truth: nn.Module, cost: float, peer: bool, against: str | None = None) -> None:
        error = partial(_error, model, truth, images[:CHECKED], labels[:CHECKED], training)
        run = _step(model, images, labels) if training else partial(_infer, model, images)
        variants[name] = Variant(run, lambda _: error(), peer, against, {"gflops": round(cost / 1e9, 3), "images": batch})

    for entry in entries:
        ours = build(entry, scope, training)
        cost = flops(ours, images[:1])["flops"]
        label = f"{entry.label}, regard"
        add(label, ours, ours, cost, False, label)
        if entry.timm and "timm" in scope.peers and not scope.smoke:
            add(f"{entry.label}, timm", build_timm(entry, ours, training), ours, cost, True, label)
        if entry.dense:
            dense = build(entry, scope, training, mixer="multi_head")
            add(f"{entry.label}, dense attention", dense, dense, flops(dense, images[:1])["flops"], True, label)
    about = {"backbones": [entry.label for entry in entries], "batch": batch, "image": [side, side], "dtype": "float32"}
    return Contest(f"backbones, {'training step' if training else 'inference'}", about, variants, training)


def build(entry: Entry, scope: Scope, training: bool, **options: Any) -> nn.Module:
    """regard's backbone; nothing random is dropped."""
    torch.manual_seed(0)
    table = {"num_classes": 10, **entry.tiny} if scope.smoke else {}
    return create_model(entry.name, drop_path_rate=0.0, **table, **options).train(training)


def build_timm(entry: Entry, ours: nn.Module, training: bool) -> nn.Module:
    """timm's backbone with the weights of ours."""
    model = load_timm().create_model(entry.timm, drop_path_rate=0.0)
    left = model.load_state_dict(export_state_dict(ours, "timm"), strict=False)
    if left.unexpected_keys or [key for key in left.missing_keys if key in dict(model.named_parameters())]:
        raise RuntimeError(f"{entry.timm} has other weights: {left}")
    return model.train(training)


def _infer(model: nn.Module, images: Tensor) -> Tensor:
    return model(images)


def _step(model: nn.Module, images: Tensor, labels: Tensor) -> Run:
    """Forward and backward."""

    def run() -> Tensor:
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        model.zero_grad(set_to_none=True)
        return loss.detach()

    return run


def _error(model: nn.Module, truth: nn.Module, images: Tensor, labels: Tensor, training: bool) -> float:
    """Largest relative error of the logits, and of the gradients of the images in training, against float64."""

    def results(network: nn.Module, inputs: Tensor) -> list[Tensor]:
        inputs = inputs.detach().requires_grad_(training)
        logits = network(inputs)
        if not training:
            return [logits]
        gradients: Callable[..., Any] = torch.autograd.grad
        return [logits.detach(), *gradients(F.cross_entropy(logits, labels), inputs)]

    return worst_error(results(model, images), results(copy.deepcopy(truth).double(), images.double()))
