"""Invalid calls at random: a valid one of a public door, with one argument broken. Each must raise one clear error."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import regard
from regard import Source, attend, create_mixer, create_model, load_checkpoint, merge
from regard.ops import attend_weights
from regard.ops import patterns as P
from regard.ops.calls.source import HeadTable
from regard.ops.linear.attend import LinearState, linear_attend

from .judging import Wrong, clear, quotable
from .sets import choose

HUGE = (2**31, 2**40, 2**63, 10**30)


class Thing:
    """Something that no argument is."""


class Silent:
    """Something that cannot even be shown."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


@dataclass
class Broken:
    """A call with a broken argument: how to make it, and what was given instead."""

    door: str
    slot: str
    given: Any
    make: Callable[[], Any]
    kinds: tuple[type[BaseException], ...] = (ValueError, TypeError)


def check(rng: np.random.Generator) -> str:
    """Make and check one case; returns what it was."""
    door = DOORS[int(rng.choice(len(DOORS), p=SHARES))]
    broken = door(rng)
    what = f"{broken.door}({broken.slot}={brief(broken.given)})"
    try:
        broken.make()
    except Exception as error:
        try:
            clear(error, list(quotable(broken.given)), broken.kinds)
        except Wrong as wrong:
            raise Wrong(f"{broken.door}({broken.slot}): {wrong} | {what}") from error
        return broken.door
    raise Wrong(f"{broken.door}({broken.slot}): accepted | {what}")


def brief(value: Any) -> str:
    if isinstance(value, Tensor) and value.is_nested:
        return "a nested tensor"
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)} {value.device.type} {value.layout}"
    try:
        return repr(value)[:80]
    except Exception:
        return "Silent"


# --------------------------------------------------------------------------------------------------------------------
# what no argument of a kind is


def things(rng: np.random.Generator) -> Any:
    """Neither a number, text, a sequence of them, nor a tensor."""
    return choose(rng, Thing(), Silent(), Thing, len, {"a": 1}, {1, 2}, 1j, b"bytes", ..., lambda x: x)


def no_number(rng: np.random.Generator, optional: bool = False) -> Any:
    wrong = [things(rng), "0.5", "", [0.5], (), True, math.nan, math.inf, -math.inf, 10**400, np.ones(2), torch.ones(2)]
    return choose(rng, *wrong, *([] if optional else [None]))


def no_integer(rng: np.random.Generator, low: int = 1, optional: bool = False, huge: bool = True) -> Any:
    wrong = [things(rng), "3", "", 2.5, 3.0, True, math.nan, math.inf, low - 1, -(2**40), np.ones(2), torch.ones(2), "seven"]
    return choose(rng, *wrong, *([] if optional else [None]), *(HUGE if huge else ()))


def no_flag(rng: np.random.Generator) -> Any:
    return choose(rng, things(rng), None, 1, 0, 1.0, "yes", "", [], [True], torch.tensor(True))


def no_word(rng: np.random.Generator, near: str) -> Any:
    return choose(rng, things(rng), None, 3, 1.5, [], [near], near[:-1], near.upper() + "x", "", near + " ", "\0", "ü" * 300)


def no_sizes(rng: np.random.Generator, rank: int, low: int = 1) -> Any:
    """Neither a size for all axes, nor one for each."""
    inside: Any = no_integer(rng, low)
    other = tuple([low + 1] * (rank + choose(rng, 1, 2)))
    return choose(rng, inside, inside, (inside,) * rank, [low] * (rank - 1) + [inside], other, list(other), ())


def no_grid(rng: np.random.Generator) -> Any:
    return choose(
        rng, things(rng), None, "3,4", 3.5, (), [], (0, 4), (3, -1), (3, 4.0), (3, None), ("a", 2), (2**40, 2**40), (True, 3)
    )


TEXTS = (
    "", " ", "window", "window(", "window()", "window(0)", "window(-3)", "window(2.5)", "window('a')", "window(2, 3, 4, 5)",
    "window(size=)", "windows(3)", "window(3) |", "| window(3)", "window(3) + axis(0)", "window(3) & ", "window(3) | 7",
    "window(3, **{'shift': 1})", "window(3, shift=1, shift=2)", "neighborhood(3, border='wrap')", "neighborhood(3, dilation=0)",
    "neighborhood(2, stride=3)", "neighborhood(3, causal=1)", "halo(2)", "halo(2, -1)", "halo(3, 1, stride=2)", "axis('x')",
    "axis(1.5)", "axis(9)", "grid(0)", "grid((1, 2, 3, 4))", "dense(3)", "causal(1)", "perhead({window(2): 0})", "perhead(3)",
    "perhead({window(2): 1.5})", "perhead({'window': 2})", "blocks(3)", "import os", "__import__('os')", "os.system('x')",
    "window(10**9)", "window(99999999999999999999)", "lambda: 0", "window(3); window(4)", "window(3)\nwindow(4)", "ü(3)",
    "window(*[3])", "window(True)", "window(None)", "window([])", "window(())", "window(3)" + " & window(3" * 3,
    "(" * 3000 + "window(3)" + ")" * 3000, "window(3)" + "".join(" | (window(3)" for _ in range(400)),
)  # fmt: skip


def no_pattern(rng: np.random.Generator) -> Any:
    if rng.random() < 0.6:
        return choose(rng, *TEXTS)
    return choose(rng, things(rng), None, 3, 2.5, [], ["window(2)"], {}, P.Window, torch.ones(3, 3), ("window", 2))


def no_tensor(rng: np.random.Generator, right: Tensor, optional: bool = False) -> Any:
    """Another kind of thing than a dense tensor of this dtype, here."""
    shape, floating = tuple(right.shape), right.is_floating_point()
    wrong: list[Callable[[], Any]] = [
        lambda: things(rng), lambda: right.tolist(), lambda: right.numpy(), lambda: "tensor", lambda: 7,
        lambda: right.to("meta"),
        lambda: right.to_sparse(), lambda: right.to(torch.complex64), lambda: [right], lambda: (right, right),
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    ]  # fmt: skip
    if floating:
        wrong += [
            lambda: right.to(torch.int64), lambda: right.to(torch.bool), lambda: right.to(torch.float8_e4m3fn),
            lambda: torch.quantize_per_tensor(right.float(), 0.1, 0, torch.qint8), lambda: torch.zeros(shape,
            dtype=torch.uint8),
        ]  # fmt: skip
    else:
        wrong += [lambda: right.float(), lambda: right.double()]
    if not optional:
        wrong.append(lambda: None)
    return choose(rng, *wrong)()


def other_shape(rng: np.random.Generator, *shapes: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(*[choose(rng, *shapes)], dtype=dtype)


# --------------------------------------------------------------------------------------------------------------------
# attention

BATCH, GRID, HEADS, KV, DIM, VALUE = 2, (3, 4), 4, 2, 4, 3
Q, K, V = (BATCH, *GRID, HEADS, DIM), (BATCH, *GRID, KV, DIM), (BATCH, *GRID, KV, VALUE)
PATTERNS = ("dense", "causal", "window(2)", "neighborhood(3)", "halo(2, 1)", "axis(0) | axis(1)", "grid(2)")
BACKENDS = ("auto", "auto", "native", "tiled", "dense", "reference")

WRONG_SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "q": ((3, *Q[1:]), (2, 3, 4, 3, 4), (2, 3, 4, 4, 5), (2, 4, 4), (4,), (), (2, 3, 4, 4, 0), (2, 0, 4, 4, 4), (2, 3, 4, 0,
    4)),
    "k": ((3, *K[1:]), (2, 3, 4, 3, 4), (2, 3, 4, 2, 5), (2, 2, 4, 2, 4), (2, 3, 4, 0, 4), (), (2, 12, 2, 4), (2, 0, 4, 2, 4)),
    "v": ((1, *V[1:]), (2, 3, 4, 1, 3), (2, 3, 3, 2, 3), (2, 3, 4, 2, 0), (3,), (), (2, 12, 2, 3), (2, 3, 4, 2)),
    "bias": ((3,), (2, 4, 12, 11), (2, 3, 12, 12), (5, 4, 12, 12), (1, 1, 1, 12, 12), (2, 4, 0, 12), (0,), (12, 3, 4)),
    "valid": ((3, *GRID), (2, 12), (2, 3), (), (2, 4, 3), (2, 3, 4, 1), (0, 3, 4), (3, 4)),
    "sink": ((3,), (4, 2), (1, 5), (12,), (2, 3, 4, 3), (0,)),
}  # fmt: skip


def attention(rng: np.random.Generator) -> Broken:
    backend, pattern = choose(rng, *BACKENDS), choose(rng, *PATTERNS)
    arguments: dict[str, Any] = {
        "q": torch.randn(Q), "k": torch.randn(K), "v": torch.randn(V), "pattern": pattern, "backend": backend,
    }  # fmt: skip
    if rng.random() < 0.3:
        arguments["bias"] = torch.randn(1, HEADS, 12, 12)
    if rng.random() < 0.3:
        arguments["valid"] = torch.ones(BATCH, *GRID, dtype=torch.bool)
    slot = choose(rng, "q", "k", "v", "pattern", "bias", "valid", "scale", "sink", "q_start", "dropout", "return_lse",
    "backend",
                  "table", "routed")  # fmt: skip
    if slot in ("table", "routed"):
        wrong = wrong_table(rng) if slot == "table" else wrong_routed(rng)
        arguments |= {"bias": wrong} if slot == "table" else {"pattern": None}
        if slot == "routed":
            make, wrong = wrong
            return Broken("attend", slot, wrong, lambda: attend(**{**arguments, "pattern": make()}))
    elif slot in WRONG_SHAPES and rng.random() < 0.5:
        wrong = other_shape(rng, *WRONG_SHAPES[slot], dtype=torch.bool if slot == "valid" else torch.float32)
    elif slot in ("q", "k", "v"):
        wrong = no_tensor(rng, arguments[slot])
        if rng.random() < 0.1:
            wrong = arguments[slot].double()
    elif slot in ("bias", "valid"):
        right = torch.zeros(1, HEADS, 12, 12) if slot == "bias" else torch.ones(BATCH, *GRID, dtype=torch.bool)
        wrong = no_tensor(rng, right, optional=True)
        if slot == "bias" and isinstance(wrong, Tensor) and wrong.dtype in (torch.bool, torch.int64, torch.uint8):
            wrong = wrong.to(torch.complex64)  # whether a mask is a bias is told by the guide, not here
    else:
        wrong = {
            "pattern": lambda: no_pattern(rng),
            "scale": lambda: no_number(rng, optional=True),
            "sink": lambda: choose(rng, no_tensor(rng, torch.zeros(HEADS), True), "0", [0.0] * HEADS, math.nan, True),
            "q_start": lambda: choose(rng, no_integer(rng, 0), (0, 0, 0), (), (0, 2.0), (0, None), "00", (-1, 0), (2**40, 0)),
            "dropout": lambda: choose(rng, no_number(rng), 1.0, 1, -0.1, 2.5),
            "return_lse": lambda: no_flag(rng),
            "backend": lambda: no_word(rng, "native"),
        }[slot]()
        if slot == "sink" and isinstance(wrong, int) and not isinstance(wrong, bool):
            wrong = "7"
        if slot == "pattern" and isinstance(wrong, str) and wrong.strip() in ("dense", "causal"):
            wrong = ""
        if slot == "q_start" and pattern in ("dense",) and isinstance(wrong, int) and not isinstance(wrong, bool):
            wrong = "0"  # where everything is seen a start says nothing
    if slot == "q_start" and pattern == "dense" and isinstance(wrong, tuple) and wrong in ((-1, 0), (2**40, 0)):
        wrong = (0, 0, 0)
    arguments["bias" if slot == "table" else slot] = wrong
    if rng.random() < 0.1 and slot in ("q", "k", "v") and isinstance(arguments["k"], Tensor) and wrong is not None:
        sources = [Source(arguments["k"], arguments["v"], pattern)]
        return Broken("attend_weights", slot, wrong, lambda: attend_weights(arguments["q"], sources))
    if slot in ("k", "v", "valid", "pattern") and rng.random() < 0.2:

        def listed() -> Any:
            names = ("k", "v", "pattern", "bias", "valid")
            return attend(arguments["q"], [Source(**{n: arguments[n] for n in names if n in arguments})], backend=backend)

        return Broken("attend(sources)", slot, wrong, listed)
    return Broken("attend", slot, wrong, lambda: attend(**arguments))


def wrong_table(rng: np.random.Generator) -> Any:
    """A relative bias that does not fit, or is none."""
    right = torch.randn(HEADS, 5, 7)
    table = choose(
        rng, torch.randn(3, 5, 7), torch.randn(4, 4, 7), torch.randn(4, 5), torch.randn(5), right.to("meta"),
        right.to(torch.int64),
        right.to(torch.complex64), None, "table", torch.randn(4, 5, 7, 1), torch.randn(4, 0, 7),
    )  # fmt: skip
    return choose(rng, HeadTable(table, P.Neighborhood(3)), HeadTable(right, things(rng)), things(rng))


def wrong_routed(rng: np.random.Generator) -> tuple[Callable[[], Any], Any]:
    """A routed pattern whose tensor does not fit a grid of 3 x 4 in blocks of 2 x 2."""
    right = torch.zeros(BATCH, 4, 2, dtype=torch.int64)
    sort = choose(rng, "blocks", "tokens", "clusters")
    if sort == "blocks":
        table = choose(
            rng, no_tensor(rng, right), torch.zeros(2, 5, 2, dtype=torch.int64), torch.zeros(3, 4, 2, dtype=torch.int64),
            torch.zeros(2, 3, 4, 2, dtype=torch.int64), torch.full((2, 4, 2), 4), torch.full((2, 4, 2), 10**6), right - 2,
            torch.zeros(4, 2, dtype=torch.int64), torch.zeros(4, dtype=torch.int64),
        )  # fmt: skip
        if rng.random() < 0.3:
            block = no_sizes(rng, 2)
            return lambda: P.Blocks(right, block), block
        return lambda: P.Blocks(table, 2), table
    if sort == "tokens":
        table = choose(
            rng, no_tensor(rng, right), torch.zeros(2, 11, 2, dtype=torch.int64), torch.full((2, 12, 2), 12), torch.full((2,
            12, 2), -2),
            torch.zeros(12, 2, dtype=torch.int64), torch.zeros(3, 12, 2, dtype=torch.int64),
        )  # fmt: skip
        return lambda: P.Tokens(table), table
    labels = choose(
        rng, no_tensor(rng, right), torch.zeros(2, 11, dtype=torch.int64), torch.zeros(3, 12, dtype=torch.int64),
        torch.zeros(12, dtype=torch.int64), torch.zeros(2, 3, 12, dtype=torch.int64), torch.zeros(2, 1, 4, 12,
        dtype=torch.int64),
    )  # fmt: skip
    return lambda: P.Clusters(labels), labels


def linear(rng: np.random.Generator) -> Broken:
    shape, causal = (BATCH, 6, 2, DIM), bool(rng.integers(2))
    arguments: dict[str, Any] = {
        "q": torch.randn(shape), "k": torch.randn(shape), "v": torch.randn(BATCH, 6, 2, VALUE), "causal": causal,
        "backend": choose(rng, "auto", "chunked", "native", "naive"),
    }  # fmt: skip
    slot = choose(rng, *arguments, "feature", "norm", "floor", "eps", "log_decay", "scale", "valid", "state", "start",
                  "return_state", "chunk")  # fmt: skip
    shapes = {
        "q": ((3, 6, 2, 4), (2, 6, 3, 4), (2, 6, 2, 5), (2, 6, 4), (), (2, 6, 2, 0)),
        "k": ((3, 6, 2, 4), (2, 6, 3, 4), (2, 6, 2, 5), (2, 5, 2, 4), (6,)),
        "v": ((3, 6, 2, 3), (2, 6, 3, 3), (2, 5, 2, 3), (2, 6, 2, 0), (6,)),
        "log_decay": ((3,), (2, 5), (2, 6), (2, 5, 2), (2, 6, 2, 5), (), (0,)),
        "valid": ((3, 6), (6,), (2, 5), (2, 6, 1), ()),
        "scale": ((3,), (0,), (2, 2)),
    }
    if slot in shapes and rng.random() < 0.5:
        wrong: Any = other_shape(rng, *shapes[slot], dtype=torch.bool if slot == "valid" else torch.float32)
    elif slot in ("q", "k", "v"):
        wrong = no_tensor(rng, arguments[slot])
    elif slot == "state":
        wrong = wrong_state(rng)
        arguments["norm"] = choose(rng, "none", "sum", "count")
    else:
        wrong = {
            "causal": lambda: no_flag(rng),
            "return_state": lambda: no_flag(rng),
            "backend": lambda: no_word(rng, "chunked"),
            "feature": lambda: choose(rng, None, 3, "softmax", "", ["relu"], "RELU", Thing(), 1j),
            "norm": lambda: no_word(rng, "count"),
            "floor": lambda: no_number(rng, optional=True),
            "eps": lambda: no_number(rng),
            "log_decay": lambda: no_tensor(rng, torch.zeros(2), optional=True),
            "valid": lambda: no_tensor(rng, torch.ones(BATCH, 6, dtype=torch.bool), optional=True),
            "scale": lambda: choose(
                rng, "1", None, math.nan, [1.0, 2.0], things(rng), torch.ones(2).to("meta"), torch.ones(2) * 1j
            ),
            "start": lambda: no_integer(rng, 0),
            "chunk": lambda: choose(rng, no_integer(rng, 1), 3, 48, 64.0, 0, -4),
        }[slot]()
    arguments[slot] = wrong
    if slot in ("floor", "eps"):
        arguments["norm"] = "sum"
    return Broken("linear_attend", slot, wrong, lambda: linear_attend(**arguments))


def wrong_state(rng: np.random.Generator) -> Any:
    memory, total, keys = torch.zeros(BATCH, 2, DIM, VALUE), torch.zeros(BATCH, 2, DIM), torch.zeros(BATCH)
    broken = choose(
        rng, torch.zeros(BATCH, 2, DIM + 1, VALUE), torch.zeros(BATCH, 2, 1, VALUE), torch.zeros(BATCH, 2, DIM, VALUE + 1),
        torch.zeros(1, 2, DIM, VALUE), torch.zeros(BATCH, 2, DIM), memory.double(), memory.bfloat16(), memory.to("meta"),
        memory.to(torch.int64), None, "memory", memory.tolist(),
    )  # fmt: skip
    return choose(rng, LinearState(broken, total, keys), things(rng), [memory], "state", 3, memory)


# --------------------------------------------------------------------------------------------------------------------
# patterns, merges and plans


def pattern(rng: np.random.Generator) -> Broken:
    sort = choose(rng, "parse", "construct", "construct", "construct", "join", "per_head", "mask", "empty")
    if sort == "parse":
        wrong = choose(rng, *TEXTS, things(rng), None, 3)
        wrong = "windows(3)" if wrong in ("axis(9)", "window(10**9)", "grid((1, 2, 3, 4))") else wrong  # right on some grid
        return Broken("parse", "text", wrong, lambda: P.parse(wrong))
    if sort == "construct":
        kind, rights, slots = choose(
            rng, (P.Window, {"size": 3}, {"size": 1, "shift": 0, "pad": "mask"}),
            (P.Neighborhood, {"kernel_size": 3}, {"kernel_size": 1, "dilation": 1, "stride": 1, "causal": True,
            "border": "shift"}),
            (P.Halo, {"block": 2, "halo": 1}, {"block": 1, "halo": 0, "border": "mask", "stride": 1}),
            (P.Grid, {"size": 2}, {"size": 1}), (P.Axis, {"axis": 0}, {"axis": None, "causal": True}),
        )  # fmt: skip
        slot = choose(rng, *slots)
        low = slots[slot]
        if isinstance(low, str):
            wrong = no_word(rng, low)
        elif low is True:
            wrong = choose(rng, 1, 0, "yes", None, things(rng), (1, 0), 2.0)
        elif low is None:
            wrong = choose(rng, things(rng), None, "0", 1.0, True, (0,), 2**40)
        else:
            wrong = no_sizes(rng, 2, low)
            if isinstance(wrong, (tuple, list)) and len(wrong) > 2:
                wrong = ()
        return Broken(kind.__name__, slot, wrong, lambda: kind(**{**rights, slot: wrong}))
    if sort == "join":
        wrong = choose(rng, things(rng), None, 3, "window(2)", [], P.Window, torch.ones(2))
        both = bool(rng.integers(2))
        return Broken("| and &", "other", wrong, lambda: P.Window(2) & wrong if both else P.Window(2) | wrong)
    if sort == "per_head":
        wrong = choose(
            rng, (), {}, {P.Window(2): 0}, {P.Window(2): -1}, {P.Window(2): 1.5}, {P.Window(2): "2"}, {P.Window(2): True},
            {"window(2)": None}, {3: 1}, {None: 1}, [P.Window(2)], P.Window(2), 3, {P.PerHead({P.Window(2): 1}): 1},
        )  # fmt: skip
        return Broken("PerHead", "groups", wrong, lambda: P.PerHead(wrong))
    if sort == "empty":
        wrong = choose(rng, (), [], None, 3, ("window(2)", 3), (P.Window(2), None), (3, 4))
        kind = choose(rng, P.Union, P.Intersection)
        return Broken(kind.__name__, "members", wrong, lambda: kind(wrong))
    wrong, made = no_grid(rng), P.parse(choose(rng, "window(2)", "neighborhood((3, 3))", "axis(0) | axis(1)", "causal"))
    how, slot = choose(rng, "mask", "degree"), choose(rng, "q_grid", "k_grid", "q_start")
    if slot != "q_grid":
        wrong = choose(rng, "3,4", (3, 4.0), (3, -1), things(rng), ("a", 2), (1, 2, 3), 2.5)
    return Broken(how, slot, wrong, lambda: getattr(made, how)(**{"q_grid": (3, 4), slot: wrong}))


def merging(rng: np.random.Generator) -> Broken:
    outs, lses = [torch.randn(2, 5, 3) for _ in range(2)], [torch.randn(2, 5) for _ in range(2)]
    slot = choose(rng, "outs", "lses")
    right = outs if slot == "outs" else lses
    bad = choose(rng, no_tensor(rng, right[0]), torch.zeros(2, 4, 3), torch.zeros(3), torch.zeros(2, 6))
    wrong = choose(rng, [right[0], bad], [], None, 3, [right[0]], things(rng), "outs", [None, None])
    return Broken("merge", slot, wrong, lambda: merge(**{"outs": outs, "lses": lses, slot: wrong}))


def planning(rng: np.random.Generator) -> Broken:
    slot = choose(rng, "pattern", "grid", "k_grid", "batch", "heads", "kv_heads", "head_dim", "value_dim", "dtype", "device",
                  "backend", "bias", "training", "return_lse", "tiles")  # fmt: skip
    wrong = {
        "pattern": lambda: no_pattern(rng),
        "grid": lambda: no_grid(rng),
        "k_grid": lambda: choose(rng, *[g for g in [no_grid(rng)] if g is not None and g != () and g != []], (3, 0)),
        "kv_heads": lambda: choose(rng, no_integer(rng, 1, optional=True), 3),
        "value_dim": lambda: no_integer(rng, 1, optional=True),
        "dtype": lambda: choose(rng, things(rng), None, "float", torch.int64, torch.complex64, torch.bool, 3, float),
        "device": lambda: choose(rng, Thing(), "gpu", "", "cuda:x", [], 1.5, Silent()),
        "backend": lambda: no_word(rng, "tiled"),
        "tiles": lambda: choose(
            rng, 3, "8", ((0, 4), (4, 4)), ((2, 2),), ((2.0, 2), (2, 2)), ((2, 2, 2), (2, 2, 2)), things(rng)
        ),
    }.get(slot, lambda: no_flag(rng) if slot in ("bias", "training", "return_lse") else no_integer(rng, 1))()
    arguments = {"pattern": "window(2)", "grid": (3, 4), "heads": 4, slot: wrong}
    return Broken("plan", slot, wrong, lambda: regard.plan(**arguments))


# --------------------------------------------------------------------------------------------------------------------
# modules


@cache
def mixer(name: str) -> torch.nn.Module | None:
    try:
        return create_mixer(name, dim=16, heads=2).eval()
    except (ValueError, TypeError):  # other tests say what each needs
        return None


@cache
def mixers() -> list[str]:
    """Those that compute something: what the identity is given it may return from any device."""
    return [name for name in regard.list_mixers() if name != "identity" and mixer(name) is not None]


def mixing(rng: np.random.Generator) -> Broken:
    name = choose(rng, *mixers())
    if rng.random() < 0.5:
        right = torch.randn(1, 4, 4, 16)
        shapes = [(1, 4, 4, 15), (1, 4, 4, 0), (16,), (), (1, 0, 4, 16), (4, 16)]
        wrong: Any = no_tensor(rng, right) if rng.random() < 0.6 else other_shape(rng, *shapes)
        return Broken("mixer", name, wrong, lambda: mixer(name)(wrong))
    slot = choose(
        rng, "name", "dim", "heads", "option", "kernel_size", "window_size", "qkv_bias", "attn_drop", "proj_drop", "backend"
    )
    arguments: dict[str, Any] = {"name": name, "dim": 16, "heads": 2}
    if slot == "name":
        wrong = arguments["name"] = no_word(rng, name)
    elif slot == "option":
        option = choose(rng, "windows", "kernel", "size", "x")
        arguments[option] = 3
        return Broken("create_mixer", slot, option, lambda: create_mixer(**arguments))
    else:
        if slot == "kernel_size":
            arguments["name"] = "neighborhood"
        elif slot in ("window_size", "backend", "qkv_bias", "attn_drop", "proj_drop"):
            arguments["name"] = "window"
        wrong = arguments[slot] = {
            "dim": lambda: choose(rng, no_integer(rng, huge=False), 15, 0, -16),
            "heads": lambda: choose(rng, no_integer(rng, huge=False), 3, 0),
            "qkv_bias": lambda: no_flag(rng),
            "attn_drop": lambda: choose(rng, no_number(rng), 1.5, -0.1),
            "proj_drop": lambda: choose(rng, no_number(rng), 1.5, -0.1),
            "backend": lambda: no_word(rng, "tiled"),
        }.get(slot, lambda: no_sizes(rng, 2))()
    if slot in ("kernel_size", "window_size"):  # a mixer on its own does not know how many axes it will meet
        return Broken("create_mixer", slot, wrong, lambda: create_mixer(**arguments)(torch.zeros(1, 4, 4, 16)))
    return Broken("create_mixer", slot, wrong, lambda: create_mixer(**arguments))


MODEL = "vit_tiny_patch16_224"
SMALL = {"depth": 1, "dim": 16, "head_dim": 8, "num_classes": 3}


@cache
def model() -> torch.nn.Module:
    return create_model(MODEL, **SMALL).eval()


def modelling(rng: np.random.Generator) -> Broken:
    if rng.random() < 0.2:
        right = torch.randn(1, 3, 32, 32)
        shapes = [(1, 4, 32, 32), (3, 32), (32,), (), (1, 3, 0, 32), (1, 1, 3, 32, 32), (1, 3, 32)]
        wrong: Any = no_tensor(rng, right) if rng.random() < 0.5 else other_shape(rng, *shapes)
        return Broken("model", "images", wrong, lambda: model()(wrong))
    slot = choose(rng, "name", "num_classes", "in_chans", "drop_rate", "drop_path_rate", "features_only", "out_indices",
    "mixer",
                  "pretrained", "dtype", "device", "depth", "option")  # fmt: skip
    arguments: dict[str, Any] = {"name": MODEL, **SMALL}
    kinds: tuple[type[BaseException], ...] = (ValueError, TypeError)
    if slot == "option":
        wrong = choose(rng, "deph", "widths", "x", "img_size_", "patch")
        arguments[wrong] = 2
        return Broken("create_model", slot, wrong, lambda: create_model(**arguments))
    wrong = {
        "name": lambda: no_word(rng, MODEL),
        "num_classes": lambda: no_integer(rng, 0, optional=True, huge=False),
        "in_chans": lambda: no_integer(rng, 1, huge=False),
        "drop_rate": lambda: choose(rng, no_number(rng), 1.5, -0.1),
        "drop_path_rate": lambda: choose(rng, no_number(rng, optional=True), 1.5, -0.1),
        "features_only": lambda: no_flag(rng),
        "out_indices": lambda: choose(rng, 1.5, "0", [7], [-9], [0.0], [None], things(rng)),
        "mixer": lambda: choose(rng, "windows", 3, things(rng), ("window", 3), ["nothing"], ("window", {"x": 1}), [], "", ()),
        "pretrained": lambda: choose(rng, "/nowhere/weights.safetensors", 3, 1.5, [], things(rng), True, "weights.pt", "."),
        "dtype": lambda: choose(rng, Thing(), "float", torch.int64, torch.bool, 3, torch.complex64),
        "device": lambda: choose(rng, Thing(), "gpu", "cuda:x", 1.5, [], ""),
        "depth": lambda: no_integer(rng, 1, huge=False),
    }[slot]()
    arguments[slot] = wrong
    if slot == "out_indices":
        arguments["features_only"] = True
    if slot == "pretrained":
        kinds = (ValueError, TypeError, FileNotFoundError)
    return Broken("create_model", slot, wrong, lambda: create_model(**arguments), kinds)


def loading(rng: np.random.Generator) -> Broken:
    state = dict(model().state_dict())
    key = choose(rng, *state)
    slot, extra = choose(rng, "source", "source", "source", "new_head", "layouts", "model"), {}
    if slot == "source":
        value = state[key]
        broken = choose(
            rng, value.to(torch.int64), value.to(torch.bool), value.to(torch.complex64), torch.full_like(value, math.nan),
            torch.full_like(value, math.inf), value.tolist(), None, "weights", torch.zeros(7, 3, 5, 2), value.to("meta"),
            value.to_sparse(), torch.zeros(0),
        )  # fmt: skip
        wrong: Any = choose(
            rng, Path("/nowhere/x.safetensors"), "/nowhere/x.pt", "", ".", "/dev/null", 3, None, [], {}, {"a": 1},
            {3: state[key]},
            things(rng), "\0", "x" * 300, {k: v for k, v in state.items() if k != key}, {**state,
            "what.is.this": torch.ones(3)},
            {**state, key: broken}, {**state, key: broken}, {**state, key: broken}, {**state, 7: torch.ones(2)}, [state],
        )  # fmt: skip
        whole = isinstance(wrong, dict) and len(wrong) > 3  # the error names the key
        told: Any = (key if 7 not in wrong and "what.is.this" not in wrong else ["what.is.this", 7, "7"]) if whole else wrong
        return Broken("load_checkpoint", slot, told, lambda: load_checkpoint(model(), wrong),
                      (ValueError, TypeError, FileNotFoundError))  # fmt: skip
    if slot == "model":
        wrong = choose(rng, None, 3, "vit", things(rng), state, torch.nn.Module)
        return Broken("load_checkpoint", slot, wrong, lambda: load_checkpoint(wrong, state))
    wrong = no_flag(rng) if slot == "new_head" else choose(rng, 3, ["timm"], things(rng), [None], "timm")
    extra[slot] = wrong
    return Broken("load_checkpoint", slot, wrong, lambda: load_checkpoint(model(), state, **extra))


DOORS = (attention, linear, pattern, merging, planning, mixing, modelling, loading)
SHARES = np.array([0.3, 0.15, 0.18, 0.06, 0.1, 0.09, 0.06, 0.06])
