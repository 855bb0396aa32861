"""Attaching a function to every attention of a model of another library."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType

from torch import nn

from ..checks import check_flag, shown
from . import transformers
from .call import AtAttention, Attachment
from .diffusers import is_diffusers
from .functional import listening
from .replacing import around, replaced
from .running import EAGERLY
from .timm_like import is_timm_like
from .torch_mha import encoder_layer, multi_head
from .windows import Windows, cuts_windows


class Handle:
    """What :func:`attach` returns: :meth:`remove` puts everything back, and so does leaving it as a context."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack

    def remove(self) -> None:
        """Put everything back as it was; a second time does nothing."""
        self._stack.close()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()


def reachable(model: nn.Module) -> list[nn.Module]:
    """The attention modules of other libraries in a model that :func:`attach` reaches."""
    kinds = (is_timm_like, is_diffusers, transformers.asks_interface)
    return [m for m in model.modules() if isinstance(m, nn.MultiheadAttention) or any(kind(m) for kind in kinds)]


def attach(model: nn.Module, at_attention: AtAttention, *, strict: bool = True) -> Handle:
    """Attach a function to every attention of a model: of torch, of modules like timm's, of transformers and diffusers.

    The function is called with each :class:`HostCall` before it is computed. It returns None to leave it as it is, which then
    is computed by the host, bit by bit as ever; or a changed one, made by ``dataclasses.replace``: other queries, keys, values,
    bias, scale, or the output itself. Several functions are asked in the order in which they were attached. Calls of other
    threads than the one that attached it are not shown. Models that were compiled run as they were written meanwhile.

    Args:
        model: a module. Attention built on :func:`regard.attend` is not a host's: see :func:`regard.lens.capture`.
        at_attention: the function.
        strict: whether to refuse a model without attention that can be reached, and a run of one that cannot be seen.

    Returns:
        A handle that removes it, also as a context manager.

    Raises:
        TypeError: ``model`` is no module, or ``at_attention`` cannot be called.
        ValueError: no attention that can be reached. While the model runs: attention that cannot be seen, or an answer that
            does not fit.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module; got {shown(model)}")
    if not callable(at_attention):
        raise TypeError(f"at_attention must be a function of a HostCall; got {shown(at_attention)}")
    check_flag("strict", strict)
    found = reachable(model)
    if strict and not found:
        raise ValueError(
            f"{type(model).__name__} has no attention that can be reached: neither torch.nn.MultiheadAttention, nor modules "
            "like timm's, nor those of transformers' attention interface or of diffusers"
        )
    windows = Windows()
    attachment = Attachment(at_attention, {module: name for name, module in model.named_modules()}, windows)
    with ExitStack() as stack:
        if found:
            EAGERLY.enter()
            stack.callback(EAGERLY.leave)
        for module in list(model.modules()):
            if isinstance(module, nn.MultiheadAttention):
                stack.enter_context(around(module, multi_head(module), attachment))
            elif isinstance(module, nn.TransformerEncoderLayer):
                stack.enter_context(around(module, encoder_layer(module), attachment))
            elif transformers.asks_interface(module):
                transformers.register()
                stack.enter_context(replaced(module, "config", transformers.asking, attachment))
            elif is_diffusers(module):
                stack.enter_context(around(module, listening(module, "diffusers", strict), attachment))
            elif is_timm_like(module):
                stack.enter_context(around(module, listening(module, "timm", strict), attachment))
            elif cuts_windows(module):
                stack.enter_context(around(module, windows.around(module), windows))
        return Handle(stack.pop_all())
