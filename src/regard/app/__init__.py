"""The playground: click a pixel of a photograph and see what it attends to, for any mechanism, in the browser.

``launch`` serves it. What it shows is made by the plain functions of :mod:`regard.app.compare`, :mod:`regard.app.trained` and
:mod:`regard.catalog`; :mod:`regard.app.page` puts them on a page.
"""

from __future__ import annotations

import importlib.util
import os
import socket

__all__ = ["launch"]


def launch(host: str = "127.0.0.1", port: int | None = 7860, *, wait: bool = True) -> str:
    """Serve the playground.

    Args:
        host: address to listen on.
        port: to listen on; a free one by default.
        wait: until interrupted; else it runs in the background while the process lives.

    Returns:
        Its address.

    Raises:
        ModuleNotFoundError: gradio is missing: install ``regard[app]``.
        ValueError: the port is taken; no such address.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it when it is imported
    os.environ["HF_HUB_OFFLINE"] = "1"
    if importlib.util.find_spec("gradio") is None:
        raise ModuleNotFoundError('the playground needs gradio; pip install "regard[app]"')
    from .page import serve

    try:
        socket.getaddrinfo(host, port)
    except OSError as error:
        raise ValueError(f"this machine has no address {host!r} to listen on: {error.strerror}") from error
    try:
        return serve(host, port, wait)
    except OSError as error:
        raise ValueError(
            f"cannot listen on {host}:{port}: it is taken or not for us; --port, port= in Python, chooses another"
        ) from error
