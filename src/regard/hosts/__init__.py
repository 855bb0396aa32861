"""Ways into models of other libraries while they run: what their attention multiplies, and how to change it.

    with attach(model, at_attention):
        model(images)

``at_attention(call)`` is shown every attention before it is computed, and may answer with a changed one. ``torch_mha`` is the
one to follow for a new kind of host.
"""

from .attaching import Handle, attach, reachable
from .call import HostCall

__all__ = ["Handle", "HostCall", "attach", "reachable"]
