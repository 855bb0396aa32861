"""The user's data: image folders, parquet files in the layout of the Hugging Face hub, names that `datasets` knows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .embedded import photo_crops
from .images import ImageSet, Samples, VisionData, decode_image

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})
TRAIN_NAMES, VAL_NAMES = ("train", "training"), ("val", "valid", "validation", "test")
LARGEST_DEFAULT_SIZE = 64

Items = list[Path | bytes]
Split = tuple[Items, list[int]]


def load_data(
    spec: str | Path,
    *,
    size: int | None = None,
    limit: int | None = None,
    val_fraction: float = 0.2,
    pad: int | None = None,
    seed: int = 0,
) -> VisionData:
    """Load a classification task.

    Args:
        spec: one of

            - ``"embedded"``: :func:`photo_crops`;
            - a folder with one folder of images per class, or with ``train`` and ``val`` (or ``test``) folders of such;
            - a parquet file with columns ``image{bytes, path}`` and ``label``, or a folder with ``train*.parquet`` and
              ``val*`` or ``test*.parquet`` (class names from its metadata or a ``labels.txt`` beside it);
            - a folder that `datasets` saved, or a name that ``datasets.load_dataset`` knows.
        size: side of the samples; by default the shorter side of the first image, at most 64.
        limit: images of each split that are used, drawn with ``seed``.
        val_fraction: share of each class that is held out where the data comes in one split.
        pad: pixels that training images are reflected by before they are cropped; an eighth of ``size`` by default.
        seed: what the split, the limit and the random crops depend on.

    Raises:
        FileNotFoundError: nothing at that path, and no such name.
        ValueError: no classes, an empty split, unknown labels, an unreadable image, missing columns.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1; got {limit}")
    if size is not None and size < 8:
        raise ValueError(f"size must be at least 8 pixels; got {size}")
    if not 0.0 < val_fraction < 1.0:
        raise ValueError(f"val_fraction must be between 0 and 1; got {val_fraction}")
    if str(spec) == "embedded":
        return photo_crops(size or LARGEST_DEFAULT_SIZE, seed=seed)
    train, val, classes = _find(spec, val_fraction, seed)
    for name, (items, labels) in (("training", train), ("validation", val)):
        if not items:
            raise ValueError(f"{spec}: no {name} images")
        wrong = [label for label in labels if not 0 <= label < len(classes)]
        if wrong:
            raise ValueError(f"{spec}: label {wrong[0]} of a {name} image is none of the {len(classes)} classes")
    if len(classes) < 2:
        raise ValueError(f"{spec}: classification needs at least two classes; found {', '.join(classes) or 'none'}")
    train, val = _limit(train, limit, seed), _limit(val, limit, seed + 1)
    if size is None:
        first = decode_image(train[0][0], f"{spec}, first training image")
        size = min(*first.shape[1:], LARGEST_DEFAULT_SIZE)
    images = [ImageSet(*split, size, f"{spec} ({name})") for split, name in ((train, "training"), (val, "validation"))]
    return VisionData(
        name=Path(spec).name or str(spec),
        train=Samples(images[0], size, pad=size // 8 if pad is None else pad, train=True, seed=seed),
        val=Samples(images[1], size),
        classes=tuple(classes),
        size=size,
        description=f"{Path(spec).name}: {len(classes)} classes, {len(images[0])} training and {len(images[1])} validation "
        f"images of {size}×{size}.",
    )


def _find(spec: str | Path, val_fraction: float, seed: int) -> tuple[Split, Split, Sequence[str]]:
    path = Path(spec).expanduser()
    if path.is_file():
        if path.suffix != ".parquet":
            raise ValueError(f"{path}: expected a folder or a .parquet file; got {path.suffix or 'a file without suffix'}")
        split, classes = _parquet([path])
        return (*_hold_out(split, val_fraction, seed), classes)
    if not path.is_dir():
        if path.is_absolute() or path.suffix or str(spec).startswith((".", "~")) or str(spec).count("/") > 1:
            raise FileNotFoundError(f"no data at {spec}")
        return _hub(str(spec), val_fraction, seed)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        import datasets

        return _from_datasets(datasets.load_from_disk(str(path)), str(path), val_fraction, seed)
    if files := sorted(path.rglob("*.parquet")):
        return _parquet_folder(path, files, val_fraction, seed)
    return _image_folder(path, val_fraction, seed)


def _image_folder(path: Path, val_fraction: float, seed: int) -> tuple[Split, Split, Sequence[str]]:
    folders = {child.name: child for child in sorted(path.iterdir()) if child.is_dir() and not child.name.startswith(".")}
    train = next((folders[name] for name in TRAIN_NAMES if name in folders), None)
    val = next((folders[name] for name in VAL_NAMES if name in folders), None)
    if train is not None and val is not None:
        classes = _class_names(train)
        unknown = sorted(set(_class_names(val)) - set(classes))
        if unknown:
            raise ValueError(f"{val}: class {unknown[0]!r} is not among the training classes {', '.join(classes)}")
        return _class_folders(train, classes), _class_folders(val, classes), classes
    root = train or path
    classes = _class_names(root)
    return (*_hold_out(_class_folders(root, classes), val_fraction, seed), classes)


def _class_names(path: Path) -> list[str]:
    names = sorted(child.name for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))
    if not names:
        raise ValueError(f"{path}: no classes; expected one folder of images per class, or parquet files")
    return names


def _class_folders(path: Path, classes: Sequence[str]) -> Split:
    items: Items = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(file for file in (path / name).rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        items += found
        labels += [label] * len(found)
    if not items:
        raise ValueError(f"{path}: no images in the folders {', '.join(classes)}")
    return items, labels


def _parquet_folder(path: Path, files: list[Path], val_fraction: float, seed: int) -> tuple[Split, Split, Sequence[str]]:
    def starting(names: Sequence[str]) -> list[Path]:
        name = next((n for n in names if any(file.name.startswith(n) for file in files)), None)
        return [file for file in files if name and file.name.startswith(name)]

    train, val = starting(TRAIN_NAMES), starting(VAL_NAMES)
    if not train or not val:
        split, classes = _parquet(files)
        return (*_hold_out(split, val_fraction, seed), classes)
    (train_split, classes), (val_split, val_classes) = _parquet(train), _parquet(val)
    return train_split, val_split, max(classes, val_classes, key=len)


def _parquet(files: Sequence[Path]) -> tuple[Split, list[str]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('parquet files need pyarrow; pip install "regard[train]"') from error

    items: Items = []
    labels: list[int] = []
    classes: list[str] = []
    for file in files:
        try:
            schema = pyarrow.parquet.read_schema(file)
            missing = [name for name in ("image", "label") if name not in schema.names]
            if missing:
                raise ValueError(
                    f"{file}: expected columns image and label; there are {', '.join(schema.names) or 'none'}"
                )  # fmt: skip
            table = pyarrow.parquet.read_table(file, columns=["image", "label"])
        except pyarrow.ArrowException as error:
            raise ValueError(f"cannot read the parquet file {file}: {error}") from error
        images = table.column("image").combine_chunks()
        if pyarrow.types.is_struct(images.type):
            if images.type.get_field_index("bytes") < 0:
                raise ValueError(f"{file}: column image must hold bytes; it holds {images.type}")
            images = images.field("bytes")
        if images.null_count:
            raise ValueError(f"{file}: {images.null_count} images have no bytes")
        items += images.to_pylist()
        labels += [int(label) for label in table.column("label").to_pylist()]
        classes = classes or _names_in_metadata(schema.metadata)
    listed = files[0].parent / "labels.txt"
    if not classes and listed.is_file():
        classes = [line.strip() for line in listed.read_text().splitlines() if line.strip()]
    return (items, labels), classes or [str(label) for label in range(max(labels, default=-1) + 1)]


def _names_in_metadata(metadata: dict[bytes, bytes] | None) -> list[str]:
    """Class names that `datasets` writes into the schema of a parquet file."""
    features = json.loads((metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    return list(features.get("label", {}).get("names", []))


def _hub(name: str, val_fraction: float, seed: int) -> tuple[Split, Split, Sequence[str]]:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise FileNotFoundError(f'no data at {name}; for names of hub datasets pip install "regard[train]"') from error
    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:  # whatever the hub client, the network or the dataset raises
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(f"no file or folder {name}, and datasets cannot load that name: {reason}") from error
    return _from_datasets(loaded, name, val_fraction, seed)


def _from_datasets(loaded: Any, name: str, val_fraction: float, seed: int) -> tuple[Split, Split, Sequence[str]]:
    import datasets

    parts = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    train = next((parts[part] for part in TRAIN_NAMES if part in parts), None)
    if train is None:
        raise ValueError(f"{name}: no training split; there are {', '.join(parts)}")
    val = next((parts[part] for part in VAL_NAMES if part in parts), None)
    image = next((key for key, feature in train.features.items() if isinstance(feature, datasets.Image)), None)
    label = next((key for key, feature in train.features.items() if isinstance(feature, datasets.ClassLabel)), None)
    if image is None or label is None:
        raise ValueError(f"{name}: needs an Image and a ClassLabel column; there are {', '.join(train.features)}")

    def split(part: Any) -> Split:
        rows = part.cast_column(image, datasets.Image(decode=False))
        return [Path(row["path"]) if row["bytes"] is None else row["bytes"] for row in rows[image]], list(rows[label])

    classes = train.features[label].names
    if val is None:
        return (*_hold_out(split(train), val_fraction, seed), classes)
    return split(train), split(val), classes


def _hold_out(split: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """Hold out a share of each class, at least one image and never all."""
    items, labels = split
    by_class: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        by_class.setdefault(label, []).append(index)
    generator = torch.Generator().manual_seed(seed)
    held: set[int] = set()
    for label in sorted(by_class):
        members = by_class[label]
        count = min(max(1, round(len(members) * fraction)), len(members) - 1)
        held.update(members[i] for i in torch.randperm(len(members), generator=generator)[:count].tolist())
    return tuple(  # type: ignore[return-value]  # a tuple of two, which mypy cannot see
        ([items[i] for i in chosen], [labels[i] for i in chosen])
        for chosen in ([i for i in range(len(items)) if i not in held], sorted(held))
    )


def _limit(split: Split, limit: int | None, seed: int) -> Split:
    items, labels = split
    if limit is None or limit >= len(items):
        return split
    chosen = sorted(torch.randperm(len(items), generator=torch.Generator().manual_seed(seed))[:limit].tolist())
    return [items[i] for i in chosen], [labels[i] for i in chosen]
