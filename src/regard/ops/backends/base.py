"""What a backend is: one way to compute a call, what it says of itself, and how one of several is chosen.

The same interface serves softmax attention (:mod:`regard.ops.backends.choice`) and linear attention
(:mod:`regard.ops.linear.backends`). A backend is one class in a file or folder of its own and one entry in a list.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from ...checks import check_choice
from ..calls.call import Call

AnyCall = TypeVar("AnyCall")


@dataclass(frozen=True)
class Cost:
    """What a backend computes and moves for one call, in one forward pass.

    Attributes:
        computed_pairs: pairs whose logit is computed, over batch and heads; masked ones and zero keys included.
        flops: of the products, a multiplication and an addition as two.
        bytes: moved at least: operands and output once, and what is gathered into tiles or stored per pair.
        tile: queries and keys of the most common tile; empty where there are none.
        tiles: number of tiles, over batch and heads.
    """

    computed_pairs: int
    flops: int
    bytes: int
    tile: tuple[int, ...] = ()
    tiles: int = 0


class Backend(Generic[AnyCall]):
    """One way to compute a call.

    ``name`` is what ``backend=`` takes; ``passed_over`` is what a plan says where the backend could run and was not the best.
    """

    name: ClassVar[str]
    passed_over: ClassVar[str]

    def available(self) -> str | None:
        """None where the backend can run on this machine, else the reason why not."""
        return None

    def supports(self, call: AnyCall) -> str | None:
        """None where the backend can run the call, else the reason why not."""
        return None

    def automatic(self, call: AnyCall) -> bool:
        """Whether it may be chosen without being asked for."""
        return True

    def time(self, call: AnyCall) -> float:
        """Expected time of a call that it supports, in the unit of :mod:`regard.ops.backends.costs`.

        Every call that runs asks for it: it must be cheap. Batch, heads and widths are left out: all backends scale with them.
        """
        raise NotImplementedError

    def cost(self, call: AnyCall) -> Cost:
        """What it computes and moves; for plans."""
        raise NotImplementedError

    def run(self, call: AnyCall) -> Any:
        """The result: for softmax attention the output ``(batch, *q_grid, heads, value_dim)`` and the log-sum-exp
        ``(batch, *q_grid, heads)``, None where it was not asked for."""
        raise NotImplementedError

    def reason(self, call: AnyCall) -> str:
        """Why it is the best for a call that it was chosen for."""
        raise NotImplementedError

    def why_not(self, call: AnyCall, chosen: Cost) -> str:
        """Why it was not chosen, where it supports the call; ``chosen`` is the cost of the one that was."""
        return self.passed_over


def choose(among: Mapping[str, Backend[AnyCall]], call: AnyCall, name: str = "auto") -> Backend[AnyCall]:
    """The backend of a call: the named one, else the supporting one of least expected time; of several the last in the list.

    Raises:
        ValueError: an unknown backend, or a named one that cannot run this call.
    """
    if not isinstance(name, str) or name != "auto":
        check_choice("backend", name, ("auto", *among))
        if (why := among[name].supports(call)) is not None:
            raise ValueError(f"backend {name!r} cannot run this call: {why}")
        return among[name]
    best, least = None, 0.0
    for backend in among.values():
        if backend.automatic(call) and backend.supports(call) is None:
            time = backend.time(call)
            if best is None or time <= least:
                best, least = backend, time
    assert best is not None  # dense attention, and the definition of linear attention, take everything
    return best


def others(among: Mapping[str, Backend[AnyCall]], call: AnyCall, chosen: Backend[AnyCall]) -> dict[str, str]:
    """Why each of the other backends was not chosen."""
    cost = chosen.cost(call)
    return {b.name: b.supports(call) or b.why_not(call, cost) for b in among.values() if b is not chosen}


def flop(call: Call, pairs: int) -> int:
    """FLOPs of so many pairs of query and key per batch item and head."""
    return 2 * call.batch * call.heads * pairs * (call.q.shape[-1] + call.v.shape[-1])


def cost_of(call: Call, pairs: int, extra: int = 0, tile: tuple[int, ...] = (), tiles: int = 0) -> Cost:
    """The cost of softmax attention by so many pairs per batch item and head, with ``extra`` bytes besides the operands."""
    out = call.batch * call.queries * call.heads * call.v.shape[-1]
    operands = call.q.element_size() * (call.q.numel() + call.k.numel() + call.v.numel() + out)
    return Cost(call.batch * call.heads * pairs, flop(call, pairs), operands + extra, tile, tiles)


def stored_bytes(call: Call) -> int:
    """Bytes of logits and weights where they are stored: in float32, written and read."""
    return 4 * 4 * call.batch * call.heads * call.queries * call.keys
