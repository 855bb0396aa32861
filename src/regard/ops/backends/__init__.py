"""Ways to compute a call: one class of :class:`regard.ops.backends.base.Backend` each, in a file or folder of its own.

To add one, write its class and put it on the list in :mod:`regard.ops.backends.choice`.
"""
