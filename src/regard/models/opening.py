"""A model from what a user typed, and how its images are normalised."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..names import nearest
from .registry import create_model, list_models, model_card

NORMALISATIONS: dict[str, tuple[Sequence[float], Sequence[float]]] = {
    "imagenet": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    "half": ((127.5,) * 3, (127.5,) * 3),
    "clip": ((122.771, 116.746, 104.094), (68.501, 66.632, 70.323)),
    "regard": ((127.5,) * 3, (64.0,) * 3),
}
"""Means and deviations of the channels, in grey levels, that checkpoints were trained with: those of ImageNet, the range
-1..1, CLIP's, and what ``regard compare`` trains with."""


CLASSIFIERS = frozenset({"head.weight", "head.fc.weight", "classifier.weight", "fc.weight"})
"""Names of the matrix whose rows are the classes."""


AUTO = "auto"
"""The normalisation of :func:`inputs_of`."""


TINY_DINO = "tiny_dino"
"""The name of :func:`regard.models.pretrained.tiny_dino`."""


def normalised(photo: Tensor, how: str = "imagenet") -> Tensor:
    """A photograph ``(3, height, width)``, uint8, as a model sees it: ``(1, 3, height, width)``."""
    if how not in NORMALISATIONS:
        raise ValueError(f"normalise must be one of {', '.join(NORMALISATIONS)}; got {how!r}")
    mean, std = (torch.tensor(values)[:, None, None] for values in NORMALISATIONS[how])
    return ((photo.float() - mean) / std)[None]


def open_model(text: str, classes: int | None = None) -> tuple[nn.Module, str, int]:
    """A model from what a user types.

    Args:
        text: the name of a model (random weights, seed 0); the path of a checkpoint whose file name starts with a model's;
            or ``name=path``; the folder of a vision transformer of transformers; or ``tiny_dino``, which comes with regard.
        classes: of the checkpoint; by default those of its classifier where it is a safetensors file, else the published.

    Returns:
        The model in evaluation mode, what it is in words, and the side of the images that its weights were made for.

    Raises:
        ValueError: no such model; a file whose name does not say of which model it is; a checkpoint that does not fit.
        FileNotFoundError: no such file.
        ModuleNotFoundError: a folder, without transformers.
    """
    if text == TINY_DINO:
        from .pretrained import TINY_DINO as CHANGED
        from .pretrained import tiny_dino

        return tiny_dino(), f"{TINY_DINO}, trained", CHANGED["image_size"]
    if Path(text).is_dir():
        return _of_transformers(Path(text))
    name, found, path = text.partition("=")
    if not found and nearest(text, [TINY_DINO]) and not Path(text).exists() and not nearest(text, list_models()):
        raise ValueError(f"unknown model {text!r}; did you mean {TINY_DINO}?")
    if not found and Path(text).is_file():
        fitting = [each for each in list_models() if Path(text).name.startswith(each)]
        if not fitting:
            raise ValueError(f"the file name {Path(text).name!r} does not start with the name of a model: give NAME={text}")
        name, path = max(fitting, key=len), text
    card = model_card(name)
    if classes is None and path.endswith(".safetensors") and Path(path).is_file():
        classes = _classes_in(path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = create_model(name, pretrained=path or False, num_classes=classes)
    weights = Path(path).name if path else "random weights"
    return model.eval(), f"{name}, {weights}", card.input_size


def _classes_in(path: str) -> int | None:
    """The outputs of the classifier in a safetensors file; None where it is not known by its name, or the file is none."""
    try:
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118  # it is no mapping
                if key in CLASSIFIERS:
                    return int(file.get_slice(key).get_shape()[0])
    except SafetensorError:
        return None  # what is wrong with it is said where it is loaded
    return None


def _of_transformers(folder: Path) -> tuple[nn.Module, str, int]:
    """The model of a folder that transformers wrote: its classifier, if it has one; nothing is downloaded or unpickled."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"the folder {folder} holds no config.json: it is no model of transformers")
    try:
        from transformers import AutoConfig, AutoModel, AutoModelForImageClassification
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("models of transformers need it: pip install transformers") from error
    safe = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(folder, **safe)
        classifies = any("ImageClassification" in each for each in config.architectures or ())
        made = AutoModelForImageClassification if classifies else AutoModel
        model = made.from_pretrained(folder, use_safetensors=True, **safe)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ValueError(f"cannot read the model in {folder}: {str(error).strip().splitlines()[0]}") from error
    side = getattr(config, "image_size", None)
    if not isinstance(side, int):
        raise ValueError(f"the model in {folder} is not for square images: its config has image_size {side!r}")
    return model.eval(), f"{type(model).__name__}, {folder.resolve().name}", side


def inputs_of(text: str) -> str:
    """The normalisation of a model: what the folder of transformers says, else ``"imagenet"``.

    Args:
        text: see :func:`open_model`.

    Raises:
        ValueError: one that is not in ``NORMALISATIONS``.
    """
    path = Path(text) / "preprocessor_config.json"
    if not path.is_file():
        return "imagenet"
    told = json.loads(path.read_text(encoding="utf-8"))
    wanted = [[255.0 * float(x) for x in told.get(key, ())] for key in ("image_mean", "image_std")]
    for name, values in NORMALISATIONS.items():
        if all(np.allclose(list(a), b, atol=0.01) for a, b in zip(values, wanted, strict=True) if b):
            return name
    raise ValueError(f"{path.name} asks for mean {told['image_mean']} and deviation {told['image_std']}, which is none of "
                     f"{', '.join(NORMALISATIONS)}: choose one")  # fmt: skip
