"""The names of ULSAM's release: each subspace is a module of its own there, and all are one here.

Source: Saini et al., ULSAM, arXiv:2006.15102.
"""

from __future__ import annotations

from torch import nn

from ...layers.gates import SubspaceGate
from . import Layout, Rule, split_rules

_NAMES = {
    "conv_dws.weight": ("depthwise.weight", "conv1x1_of_sequence"),
    "conv_dws.bias": ("depthwise.bias", None),
    "bn_dws.{name}": ("norm1.{name}", None),
    "conv_point.weight": ("pointwise.weight", "conv1x1_of_sequence"),
    "conv_point.bias": ("pointwise.bias", None),
    "bn_point.{name}": ("norm2.{name}", None),
}


def _at(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def ulsam_layout(network: nn.Module) -> Layout:
    """The official names of every :class:`regard.layers.gates.SubspaceGate` in a network; the rest keeps its names.

        load_checkpoint(network, path, layouts=[ulsam_layout(network)])

    Args:
        network: a gate, or any module that holds some.

    Raises:
        ValueError: it holds none.
    """
    gates = {path: module for path, module in network.named_modules() if isinstance(module, SubspaceGate)}
    if not gates:
        raise ValueError(f"expected a network with subspace gates; {type(network).__name__} has none")
    rules = [
        rule
        for path, gate in gates.items()
        for theirs, (ours, transform) in _NAMES.items()
        for rule in split_rules(gate.groups, _at(path, f"subspaces.{{part}}.{theirs}"), _at(path, ours), transform)
    ]
    return Layout("official", (*rules, Rule("{name}", "{name}")))
