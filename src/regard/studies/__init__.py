"""Published analyses, one folder each: the method, its numbers and what it says of a model.

A study is a function on a model or on its maps, ``find_objects(model, pictures)``, and computes what its paper reports. It may
use the instruments of :mod:`regard.lens`, and no other study. ``head_analytics`` is the one to follow.
"""
