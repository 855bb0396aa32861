"""Where an attention is called from: the path of the module that is running."""

from __future__ import annotations

import sys
import threading
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from ..ops.calls.observe import in_this_thread

_HOOKS = threading.Lock()
"""Torch numbers its hooks with a plain counter: two that are registered at once could get one number and replace each other."""


class _Eagerly:
    """Holders, while whom compiled models run as they were written: graphs call no observers, and hooks cannot be traced."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders = 0
        self._stance: Any = None

    def enter(self) -> None:
        with self._lock:
            self._holders += 1
            self._set()

    def notice(self) -> None:
        """Look again whether there is a compiler to stop: importing it takes seconds, so that is left to who compiles."""
        with self._lock:
            self._set()

    def leave(self) -> None:
        with self._lock:
            self._holders -= 1
            if not self._holders and self._stance is not None:
                self._stance.__exit__(None, None, None)
                self._stance = None

    def _set(self) -> None:
        running = "torch._dynamo" in sys.modules and not torch.compiler.is_compiling()
        if running and self._holders and self._stance is None:
            self._stance = torch.compiler.set_stance("force_eager")


EAGERLY = _Eagerly()


class Trail:
    """Follows, while it is entered, which modules are being called in the thread that entered it; for observers.

    The hooks are torch's global module hooks: nothing is written into a model, its outputs stay as they are, and the hooks
    go away with the context, also after an exception. Modules that were compiled run as they were written meanwhile. Modules
    that a model runs in threads of its own, such as the replicas of ``DataParallel``, are not followed.
    """

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []
        self._names: dict[nn.Module, str] = {}
        self._handles: list = []

    def __enter__(self) -> Trail:
        EAGERLY.enter()
        with _HOOKS:
            self._handles = [
                register_module_forward_pre_hook(in_this_thread(self._enter)),
                register_module_forward_hook(in_this_thread(self._leave), always_call=True),
            ]
        return self

    def __exit__(self, *_) -> None:
        with _HOOKS:
            for handle in self._handles:
                handle.remove()
        self.modules.clear()
        EAGERLY.leave()

    @property
    def recomputing(self) -> bool:
        """Whether a backward pass is calling, to recompute what activation checkpointing dropped."""
        return torch._C._current_graph_task_id() != -1  # as torch.utils.module_tracker asks; there is no public name

    def path(self, names: dict[nn.Module, str] | None = None) -> str | None:
        """Name of the innermost running module, among ``names`` or else within the outermost running module.

        None where no such module is running.
        """
        names = self._names if names is None else names
        return next((names[m] for m in reversed(self.modules) if m in names), None)

    def _enter(self, module: nn.Module, args) -> None:
        EAGERLY.notice()
        if not self.modules:
            self._names = {m: name for name, m in module.named_modules()}
        self.modules.append(module)

    def _leave(self, module: nn.Module, args, output) -> None:
        if module in self.modules:  # a module that was running when the trail was entered is not
            del self.modules[len(self.modules) - 1 - self.modules[::-1].index(module) :]
