"""Attention of other libraries, seen from outside: what it multiplies is recorded, what it computes is left alone.

Three kinds of modules are known:

- like timm's (``qkv`` or ``q``, with ``num_heads``, ``attn_drop`` and ``proj``): while they run, calls of
  ``scaled_dot_product_attention``, or of a softmax and the product after it, are noted;
- those of transformers, through its attention interface: while the capture lasts, they ask for an attention function that notes
  queries, keys and mask and then calls the one they had;
- :class:`torch.nn.MultiheadAttention`: its projections are computed a second time, since its fused form shows nothing.

Windows that were put into the batch (Swin) are put back on their grid.
"""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..layers.mixers import AttentionMixer
from ..ops import Source
from ..ops.calls.observe import Record
from ..ops.patterns import Dense
from .kept import Kept, KeptAttention, KeptWeights, KeptWindows

INTERFACE = "regard_lens"
"""The name of the attention function that transformers' modules ask for meanwhile."""


@dataclass(frozen=True, eq=False)
class Found:
    """An attention of another library.

    Attributes:
        module: that attended.
        kept: its weights.
        queries, keys: numbers of tokens.
        output: of the attention or of its module, whatever carries a gradient.
        to_tokens: makes of a gradient of that one of the attention's output, ``(batch, tokens, heads, value_dim)``.
        grid: of the tokens, where windows of it were attended to.
    """

    module: nn.Module
    kept: Kept
    queries: int
    keys: int
    output: Tensor
    to_tokens: Callable[[Tensor], Tensor]
    grid: tuple[int, ...] | None = None


Report = Callable[[Found], None]


@contextmanager
def watched(model: nn.Module, report: Report) -> Iterator[None]:
    """Report every attention of other libraries' modules in a model while the context is entered."""
    windows = _Windows()
    with ExitStack() as stack:
        for module in list(model.modules()):
            if isinstance(module, nn.MultiheadAttention):
                stack.enter_context(_around(module, lambda m: _watch_multi_head(m, report)))
            elif isinstance(module, nn.TransformerEncoderLayer):
                stack.enter_context(_around(module, lambda m: _watch_encoder_layer(m, report)))
            elif is_timm_like(module):
                stack.enter_context(_around(module, lambda m: _listening(m, windows, report)))
            elif _cuts_windows(module):
                stack.enter_context(_around(module, windows.around))
        stack.enter_context(_interface(model, windows, report))
        yield


def is_timm_like(module: nn.Module) -> bool:
    """Whether a module is attention with the attributes that timm's have."""
    if isinstance(module, AttentionMixer) or type(module).__module__.startswith("regard."):
        return False
    names = ("num_heads", "attn_drop", "proj")
    return all(hasattr(module, name) for name in names) and (hasattr(module, "qkv") or hasattr(module, "q"))


Forward = Callable[..., Any]


@dataclass(eq=False)
class _Change:
    """An attribute of a module that captures have replaced: what stood there, and who listens, by thread."""

    own: Any  # of the instance; absent where its class has it
    usual: Any  # what the attribute was
    listeners: list[tuple[int, Any]]

    def here(self) -> list[Any]:
        """The listeners of this thread, in the order in which they came."""
        return [listener for thread, listener in tuple(self.listeners) if thread == threading.get_ident()]


_ABSENT = object()
_CHANGES: dict[tuple[nn.Module, str], _Change] = {}
_CHANGING = threading.Lock()


@contextmanager
def _replaced(module: nn.Module, attribute: str, made: Callable[[_Change], Any], listener: Any) -> Iterator[None]:
    """Replace an attribute of one module for the listeners of all threads: the first one does it, the last puts it back."""
    entry = (threading.get_ident(), listener)
    with _CHANGING:
        change = _CHANGES.get((module, attribute))
        if change is None:
            change = _Change(module.__dict__.get(attribute, _ABSENT), getattr(module, attribute), [])
            _CHANGES[module, attribute] = change
            setattr(module, attribute, made(change))
        change.listeners.append(entry)
    try:
        yield
    finally:
        with _CHANGING:
            change.listeners.remove(entry)
            if not change.listeners:
                if change.own is _ABSENT:
                    del module.__dict__[attribute]
                else:
                    module.__dict__[attribute] = change.own
                del _CHANGES[module, attribute]


def _around(module: nn.Module, wrap: Callable[[Any], Callable[[Forward], Forward]]) -> AbstractContextManager[None]:
    """Wrap the ``forward`` of one module in the calls of this thread."""

    def made(change: _Change) -> Forward:
        def run(*args, **kwargs):
            forward = change.usual
            for wrapped in change.here():
                forward = wrapped(forward)
            return forward(*args, **kwargs)

        return run

    return _replaced(module, "forward", made, wrap(module))


def record_of(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None) -> KeptAttention:
    """An attention of tensors ``(batch, heads, tokens, dim)`` with a bias that broadcasts to all pairs."""
    q, k, v = (t.detach().transpose(1, 2) for t in (q, k, v))
    source = Source(k, v, Dense(), bias=None if bias is None else bias.detach())
    return KeptAttention(Record(q, [source], (), q.shape[-1] ** -0.5 if scale is None else float(scale), None, (0,)))


def bias_of(mask: Tensor | None, q: Tensor, k: Tensor, is_causal: bool = False) -> Tensor | None:
    """A mask as ``scaled_dot_product_attention`` takes it (True is visible, numbers are added) as a bias."""
    bias = mask
    if mask is not None and mask.dtype == torch.bool:
        bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
    if is_causal:
        later = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).triu(1)
        causal = torch.zeros_like(later, dtype=q.dtype).masked_fill(later, -torch.inf)
        bias = causal if bias is None else bias + causal
    return bias


def _swap(gradient: Tensor) -> Tensor:
    return gradient.transpose(1, 2)


# --------------------------------------------------------------------------------------------------------------------
# windows


class _Windows:
    """The window layouts of the blocks that are running."""

    def __init__(self) -> None:
        self.layouts: list[tuple[tuple[int, ...], Tensor]] = []

    def around(self, block: Any) -> Callable[[Forward], Forward]:
        def wrap(forward: Forward) -> Forward:
            def run(*args, **kwargs):
                x = args[0] if args else kwargs["hidden_states"]
                if hasattr(block, "set_shift_and_window_size"):  # transformers: tokens in a row, their grid beside them
                    grid = tuple(kwargs["input_dimensions"] if "input_dimensions" in kwargs else args[1])
                    block.set_shift_and_window_size(grid)  # as its forward does
                    shift, window = (block.shift_size,) * 2, (block.window_size,) * 2
                    layout = window_index(grid, window, shift, pad_first=True)
                else:  # timm: tokens on their grid
                    grid = tuple(x.shape[1:3])
                    layout = window_index(grid, _pair(block.window_size), _pair(block.shift_size), pad_first=False)
                self.layouts.append((grid, layout.to(x.device)))
                try:
                    return forward(*args, **kwargs)
                finally:
                    self.layouts.pop()

            return run

        return wrap

    def seen(
        self, module: nn.Module, kept: Kept, queries: int, keys: int, output: Tensor, to_tokens: Callable[[Tensor], Tensor]
    ) -> Found:
        """The attention, on the grid of the running block where it cuts windows out of that."""
        if self.layouts and queries == keys == self.layouts[-1][1].shape[1]:
            grid, index = self.layouts[-1]
            if kept.batch % len(index) == 0:
                cells = grid[0] * grid[1]
                return Found(module, KeptWindows(kept, index, cells), cells, cells, output, to_tokens, grid)
        return Found(module, kept, queries, keys, output, to_tokens)


def _pair(value) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _cuts_windows(module: nn.Module) -> bool:
    return (
        hasattr(module, "window_size") and hasattr(module, "shift_size") and not type(module).__module__.startswith("regard.")
    )


def window_index(grid: tuple[int, ...], window: tuple[int, int], shift: tuple[int, int], *, pad_first: bool) -> Tensor:
    """Which cell each token of each window is, ``(windows, tokens)``; -1 where it only pads.

    Args:
        grid: rows and columns.
        window, shift: per axis; the grid is rolled back by the shift.
        pad_first: whether the grid is padded before it is rolled, or after.
    """
    index = torch.arange(grid[0] * grid[1]).reshape(grid)
    pads = [n for length, size in ((grid[1], window[1]), (grid[0], window[0])) for n in (0, -length % size)]
    if pad_first:
        index = F.pad(index, pads, value=-1)
    index = index.roll((-shift[0], -shift[1]), (0, 1))
    if not pad_first:
        index = F.pad(index, pads, value=-1)
    rows, columns = index.shape
    tiles = index.reshape(rows // window[0], window[0], columns // window[1], window[1]).transpose(1, 2)
    return tiles.reshape(-1, window[0] * window[1])


# --------------------------------------------------------------------------------------------------------------------
# like timm


_SOFTMAX = (torch.softmax, Tensor.softmax, F.softmax)
_PRODUCT = (torch.matmul, Tensor.matmul, Tensor.__matmul__)


class _Listener(TorchFunctionMode):
    """Notes the attention of one module."""

    def __init__(self, module: nn.Module, windows: _Windows, report: Report) -> None:
        super().__init__()
        self.module, self.windows, self.report = module, windows, report
        self.weights: Tensor | None = None
        self.k: Tensor | None = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            self._fused(output, *args, **kwargs)
        elif func in _SOFTMAX and output.ndim == 4:
            self.weights = output
        elif func in _PRODUCT and self.weights is not None and args[0].shape == self.weights.shape:
            weights, v = self.weights, args[1]
            self.weights = None
            if v.ndim == 4 and v.shape[:3] == (*weights.shape[:2], weights.shape[3]):
                k = None if self.k is None or self.k.shape[:3] != v.shape[:3] else self.k
                kept = KeptWeights(weights.detach(), v.detach().transpose(1, 2), None if k is None else k.transpose(1, 2))
                self._tell(kept, weights.shape[2], weights.shape[3], output)
        elif func in _PRODUCT and output.ndim == args[1].ndim == 4:
            self.k = args[1].detach().mT  # of the last product before a softmax
        return output

    def _fused(self, output, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if query.ndim == 4:
            bias = bias_of(attn_mask, query, key, is_causal)
            self._tell(record_of(query, key, value, bias, scale), query.shape[2], key.shape[2], output)

    def _tell(self, kept: Kept, queries: int, keys: int, output: Tensor) -> None:
        self.report(self.windows.seen(self.module, kept, queries, keys, output, _swap))


def _listening(module: nn.Module, windows: _Windows, report: Report) -> Callable[[Forward], Forward]:
    def wrap(forward: Forward) -> Forward:
        def run(*args, **kwargs):
            with _Listener(module, windows, report):
                return forward(*args, **kwargs)

        return run

    return wrap


# --------------------------------------------------------------------------------------------------------------------
# transformers


@contextmanager
def _interface(model: nn.Module, windows: _Windows, report: Report) -> Iterator[None]:
    """Let the attention modules of transformers ask for a function that reports."""
    modules = [m for m in model.modules() if _asks_interface(m)]
    if not modules:
        yield
        return
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # it is there: the modules are its own

    ALL_ATTENTION_FUNCTIONS[INTERFACE] = _attention  # stays: nothing else asks for it, and another thread may
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(_replaced(module, "config", _asking, (windows, report)))
        yield


def _asking(change: _Change) -> Any:
    """A configuration that names our attention function."""
    config = copy.copy(change.usual)
    config._attn_implementation_internal = INTERFACE
    return config


def _attention(module, query, key, value, attention_mask, **options):
    """The attention that a module of transformers would have asked for, and its report to the listeners of this thread."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    change = _CHANGES.get((module, "config"))  # none where another thread asked while the last capture left
    name = (module.config if change is None else change.usual)._attn_implementation
    usual = ALL_ATTENTION_FUNCTIONS.get(name) if name != "eager" else None
    usual = usual or sys.modules[type(module).__module__].eager_attention_forward
    output = usual(module, query, key, value, attention_mask, **options)
    for windows, report in change.here() if change else ():
        is_causal = options.get("is_causal")
        causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
        causal = bool(causal and attention_mask is None and query.shape[2] > 1)
        repeated = query.shape[1] // key.shape[1]
        k, v = (t.repeat_interleave(repeated, 1) if repeated > 1 else t for t in (key, value))
        kept = record_of(query, k, v, bias_of(attention_mask, query, k, causal), options.get("scaling"))
        tokens = query.shape[2], key.shape[2]
        report(windows.seen(module, kept, *tokens, output[0], lambda gradient: gradient))
    return output


def _asks_interface(module: nn.Module) -> bool:
    return (
        "Attention" in type(module).__name__
        and hasattr(getattr(module, "config", None), "_attn_implementation_internal")
        and hasattr(sys.modules[type(module).__module__], "ALL_ATTENTION_FUNCTIONS")
    )


# --------------------------------------------------------------------------------------------------------------------
# torch


def _watch_multi_head(module: nn.MultiheadAttention, report: Report) -> Callable[[Forward], Forward]:
    def wrap(forward: Forward) -> Forward:
        def run(query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None, **options):
            output = forward(
                query, key, value, key_padding_mask=key_padding_mask, need_weights=need_weights, attn_mask=attn_mask, **options
            )
            if query.is_nested:
                raise ValueError("nested tensors have no map: make the encoder with enable_nested_tensor=False")
            tensors = [t if t.ndim == 3 else t.unsqueeze(0 if module.batch_first else 1) for t in (query, key, value)]
            if not module.batch_first:
                tensors = [t.transpose(0, 1) for t in tensors]
            _report_multi_head(module, tensors, key_padding_mask, attn_mask, output[0], query.ndim, report)
            return output

        return run

    return wrap


def _report_multi_head(module, tensors, key_padding_mask, attn_mask, output: Tensor, rank: int, report: Report) -> None:
    with torch.no_grad():
        q, k, v = _projected(module, *tensors)
        bias = _multi_head_bias(module, q, attn_mask, key_padding_mask, k.shape[2])
    kept = record_of(q, k, v, bias, None)
    weight, heads, batch_first = module.out_proj.weight.detach(), module.num_heads, module.batch_first

    def to_tokens(gradient: Tensor) -> Tensor:  # of the module's output: back through the projection
        gradient = gradient if rank == 3 else gradient.unsqueeze(0 if batch_first else 1)
        gradient = gradient if batch_first else gradient.transpose(0, 1)
        return (gradient @ weight).unflatten(-1, (heads, -1))

    report(Found(module, kept, q.shape[2], k.shape[2], output, to_tokens))


def _projected(module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``(batch, heads, tokens, head_dim)`` of ``(batch, tokens, dim)``."""
    if module.in_proj_weight is not None:
        weights = module.in_proj_weight.chunk(3)
    else:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    q, k, v = (F.linear(t, w, b) for t, w, b in zip((query, key, value), weights, biases, strict=True))
    if module.bias_k is not None and module.bias_v is not None:
        k, v = (torch.cat([t, b.expand(len(t), -1, -1)], 1) for t, b in ((k, module.bias_k), (v, module.bias_v)))
    if module.add_zero_attn:
        k, v = (F.pad(t, (0, 0, 0, 1)) for t in (k, v))
    q, k, v = (t.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    return q, k, v


def _multi_head_bias(module, q: Tensor, attn_mask: Tensor | None, padding: Tensor | None, keys: int) -> Tensor | None:
    """Here True in a mask hides a key, and keys that the module adds are seen by all."""

    def added(mask: Tensor) -> Tensor:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, -torch.inf)
        return F.pad(mask.to(q.dtype), (0, keys - mask.shape[-1]))

    total = None
    if attn_mask is not None:
        total = added(attn_mask)
        total = total.unflatten(0, (-1, module.num_heads)) if total.ndim == 3 else total[None, None]
    if padding is not None:
        hidden = added(padding if padding.ndim == 2 else padding[None])[:, None, None]
        total = hidden if total is None else total + hidden
    return total


def _watch_encoder_layer(layer: nn.TransformerEncoderLayer, report: Report) -> Callable[[Forward], Forward]:
    """Where torch runs a layer as one fused operator its attention module is not called: see to it from the layer's input."""

    def wrap(forward: Forward) -> Forward:
        def run(src, src_mask=None, src_key_padding_mask=None, is_causal=False):
            called: list[int] = []
            with _around(layer.self_attn, lambda m: _noting(called)):
                output = forward(src, src_mask=src_mask, src_key_padding_mask=src_key_padding_mask, is_causal=is_causal)
            if not called:
                if src.is_nested:
                    raise ValueError("nested tensors have no map: make the encoder with enable_nested_tensor=False")
                with torch.no_grad():
                    x = layer.norm1(src) if layer.norm_first else src
                x = x if x.ndim == 3 else x[None]
                _report_multi_head(layer.self_attn, [x] * 3, src_key_padding_mask, src_mask, output, src.ndim, report)
            return output

        return run

    return wrap


def _noting(called: list) -> Callable[[Forward], Forward]:
    def wrap(forward: Forward) -> Forward:
        def run(*args, **kwargs):
            called.append(1)
            return forward(*args, **kwargs)

        return run

    return wrap
