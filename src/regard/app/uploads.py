"""Photographs of the playground: the embedded ones, and those that a visitor sends.

What is sent is only ever decoded as an image: its size in bytes and pixels is checked before a pixel is decoded.
"""

from __future__ import annotations

import hashlib
import io
import threading
import warnings
from collections import OrderedDict

import torch
from torch import Tensor

from ..data.embedded import PHOTOGRAPHS, photograph
from ..data.images import as_seen

BYTES = 32 << 20
"""Of a file, at most."""
PIXELS = 24_000_000
"""Of an image, at most: it is decoded whole."""
JPEG_PIXELS = 64_000_000
"""Of a JPEG, which is decoded at a fraction of its size."""
SIDE = 1024
"""Longer side at which photographs are kept, in pixels."""
KEPT = 16
"""Uploads that are remembered; the oldest are forgotten."""
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")

_uploads: OrderedDict[str, Tensor] = OrderedDict()
_lock = threading.Lock()


def names() -> list[str]:
    """The embedded photographs."""
    return list(PHOTOGRAPHS)


def receive(data: bytes) -> str:
    """Take an uploaded file.

    Returns:
        The name under which :func:`photo` finds it.

    Raises:
        ValueError: see :func:`decode`.
    """
    picture = decode(data)
    name = f"upload-{hashlib.sha256(data).hexdigest()[:12]}"
    with _lock:
        _uploads[name] = picture
        while len(_uploads) > KEPT:
            _uploads.popitem(last=False)
    return name


def photo(name: str) -> Tensor:
    """The middle square of a photograph ``(3, side, side)``, uint8.

    Raises:
        ValueError: no such photograph, or an upload that was forgotten.
    """
    if name.startswith("upload-"):
        with _lock:
            found = _uploads.get(name)
        if found is None:
            raise ValueError(f"the photograph {name!r} is not kept any more; send it again")
    else:
        found = photograph(name)
    height, width = found.shape[1:]
    edge = min(height, width)
    top, left = (height - edge) // 2, (width - edge) // 2
    return found[:, top : top + edge, left : left + edge]


def decode(data: bytes) -> Tensor:
    """Decode an image that nobody vouches for: ``(3, height, width)``, uint8, its longer side at most ``SIDE``.

    Raises:
        ValueError: too many bytes or pixels; another format than ``FORMATS``; broken.
    """
    from PIL import Image

    if len(data) > BYTES:
        raise ValueError(f"an image may have {BYTES >> 20} MiB at most; got {len(data) / 2**20:.1f} MiB")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
                width, height = opened.size
                most = JPEG_PIXELS if opened.format == "JPEG" else PIXELS
                if width * height > most:
                    raise ValueError(f"it has {width} x {height} pixels, more than {most / 1e6:.0f} million")
                opened.draft("RGB", (SIDE, SIDE))  # a JPEG is decoded smaller at once
                picture = as_seen(opened)
        picture.thumbnail((SIDE, SIDE))
    except Exception as error:  # decoders of broken files raise anything
        reason = f"not an image of {', '.join(FORMATS)}" if "cannot identify" in str(error) else str(error).splitlines()[0]
        raise ValueError(f"cannot read this image: {reason}") from None
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.view(picture.height, picture.width, 3).permute(2, 0, 1).contiguous()
