"""A trained model on a photograph: the maps of a query by layer and head, and rollout."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..lens.capture import capture
from ..lens.captured import Map, Maps
from ..lens.explain import answer, at_place, centre, check_weights, followed_note, layer_names, on_image
from ..lens.maps import image_map
from ..lens.pictures import Place, Tile, number, overlay, sheet
from ..lens.rollout import rollout
from ..models.opening import AUTO, TINY_DINO, inputs_of, normalised, open_model
from .uploads import photo

ALL, ROLLOUT = "all layers", "rollout"
"""What can be shown besides the heads of a layer."""
SIDES = (64, 128, 224, 384)
"""Of the image that the model sees, in pixels, besides that which it was made for."""


@lru_cache(maxsize=2)
def opened(name: str, path: str) -> tuple[nn.Module, str, int]:
    """A model by name, with the weights of a safetensors file or, without one, random; or that of a folder of transformers.

    Raises:
        ValueError: unknown name; another kind of file; a checkpoint that does not fit.
        FileNotFoundError: no such file.
        ModuleNotFoundError: a folder, without transformers.
    """
    path = path.strip()
    if path and Path(path).is_dir():
        return open_model(path)
    if path and not path.endswith(".safetensors"):
        raise ValueError(f"checkpoints are read from .safetensors files; got {path!r}")
    if path and not Path(path).is_file():
        raise FileNotFoundError(f"no file {path!r}")
    if path and name == TINY_DINO:
        raise ValueError(f"{TINY_DINO} has its own weights: choose the model that {Path(path).name!r} is of")
    return open_model(f"{name}={path}" if path else name)


@lru_cache(maxsize=2)
def _maps(name: str, path: str, picture: str, normalise: str, side: int) -> tuple[Maps, str]:
    """Its attentions on a photograph, and what it answers."""
    model, _, own = opened(name, path)
    side = side or own
    images = nn.functional.interpolate(photo(picture)[None].float(), (side, side), mode="bilinear", antialias=True)
    if normalise == AUTO:
        normalise = inputs_of(path or name)
    with torch.no_grad(), capture(model, kinds="attention", lazy=True) as maps:
        try:
            output = model(normalised(images[0], normalise))
        except (RuntimeError, ValueError) as error:  # some models take images of one size
            why = str(error).splitlines()[0]
            raise ValueError(f"the model does not take {side}x{side} pixels, it was made for {own}x{own}: {why}") from error
    return maps, answer(output, model)


def title(name: str, path: str, picture: str, normalise: str = AUTO, side: int = 0) -> str:
    """What :func:`show` is of, in a line."""
    _, words, own = opened(name, path)
    said = _maps(name, path, picture, normalise, side)[1]
    return f"{words}, {side or own}x{side or own} pixels: {said}"


def layers(name: str, path: str, picture: str, normalise: str = AUTO, side: int = 0) -> list[str]:
    """What can be shown of a model: all layers, rollout, and the heads of each layer.

    Raises:
        ValueError: see :func:`opened`; a model without attention on the image.
    """
    return [ALL, ROLLOUT, *layer_names(on_image(_maps(name, path, picture, normalise, side)[0]))]


def show(name: str, path: str, picture: str, what: str, place: Place, normalise: str = AUTO, side: int = 0) -> np.ndarray:
    """A sheet of maps: ``(height, width, 3)``, uint8; each has the full range of colours.

    Args:
        name, path: see :func:`opened`.
        picture: name of the photograph.
        what: one of :func:`layers`.
        place: the query, as fractions of height and width.
        normalise: see :data:`regard.models.opening.NORMALISATIONS`; or ``AUTO``, what the model is known to be trained with.
        side: of the image that the model sees, in pixels; by default that which it was made for.

    Raises:
        ValueError: an unknown layer; see also :func:`layers` and :func:`regard.lens.rollout`.
    """
    maps, _ = _maps(name, path, picture, normalise, side)
    found = on_image(maps)
    names = layer_names(found)
    if what == ROLLOUT:
        check_weights(maps)
        with torch.no_grad():
            shares = rollout(maps, start=place)
        heat = shares.on_image()[0, 0]
        drawn = overlay(photo(picture), heat, 512, centre(place, shares.grid), float(heat.min()))
        return sheet([Tile(drawn, ROLLOUT, followed_note(shares))], 1)
    if what == ALL:
        side = 220 if len(found) <= 8 else 150
        tiles = [_mean(picture, each, side, label, place) for label, each in zip(names, found, strict=True)]
        return sheet(tiles, 3 if len(tiles) <= 6 else 4 if len(tiles) <= 8 else 6)
    if what not in names:
        raise ValueError(f"there is no layer {what!r}; there are {', '.join(names)}")
    one = at_place(found[names.index(what)], place)
    heats = image_map(one, None).map[0, :, 0]
    most = torch.stack([w[0, :, 0].flatten(1).amax(1) for w in one.weights]).amax(0)
    at = centre(place, one.grid)
    side = 220 if len(heats) <= 4 else 150
    return sheet([_tile(picture, heat, side, at, f"head {i}", float(most[i])) for i, heat in enumerate(heats)], 6)


def _mean(picture: str, found: Map, side: int, label: str, place: Place) -> Tile:
    one = at_place(found, place)
    most = max(float(w[0, :, 0].mean(0).max()) for w in one.weights)
    return _tile(picture, image_map(one).map[0, 0], side, centre(place, one.grid), label, most)


def _tile(picture: str, heat: torch.Tensor, side: int, place: Place, title: str, most: float) -> Tile:
    return Tile(overlay(photo(picture), heat, side, place), title, f"most {number(most)}")
