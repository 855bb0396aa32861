"""The user's data: image folders, parquet files in the layout of the Hugging Face hub, names that `datasets` knows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ..checks import LARGEST, check_choice, check_integer, check_number, shown
from ..files import one_line
from ..names import nearest
from .columns import IMAGES, LABELS, choose_column, class_numbers, numbered
from .embedded import photo_crops
from .folders import class_folders, class_names, folders_in, is_leftover, said_of
from .images import ImageSet, Samples, VisionData, decode_image

TRAIN_NAMES, VAL_NAMES = ("train", "training"), ("val", "valid", "validation", "test")
LARGEST_DEFAULT_SIZE, LARGEST_SIZE = 64, 4096

BAD_LISTED = 3
"""Unreadable images that an error names."""

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
    bad: str = "error",
) -> VisionData:
    """Load a classification task.

    Every image is decoded once, so that one which cannot be read is found now and not while a model trains. Hidden files and
    folders, and what systems and notebooks leave behind (``._*``, ``.DS_Store``, ``__MACOSX``, ``.ipynb_checkpoints``,
    ``Thumbs.db``), are no samples.

    Args:
        spec: one of

            - ``"embedded"``: :func:`photo_crops`;
            - a folder with one folder of images per class, or with ``train`` and ``val`` (or ``test``) folders of such;
            - a parquet file with columns such as ``image{bytes, path}`` and ``label``, or a folder with ``train*.parquet`` and
              ``val*`` or ``test*.parquet`` (class names from its metadata or a ``labels.txt`` beside it, or the labels
              themselves where they are text); :mod:`regard.data.columns` says what columns may be called;
            - a folder that `datasets` saved, or a name that ``datasets.load_dataset`` knows.
        size: side of the samples; by default the shorter side of the first image, at most 64.
        limit: images of each split that are used, drawn with ``seed``.
        val_fraction: share of each class that is held out where the data comes in one split.
        pad: pixels that training images are reflected by before they are cropped; an eighth of ``size`` by default.
        seed: what the split, the limit and the random crops depend on.
        bad: what to do about images that cannot be read: ``"error"`` lists them, ``"skip"`` leaves them out and counts them in
            the description.

    Raises:
        FileNotFoundError: nothing at that path, and no such name.
        ValueError: no classes, a class or a split without images, unknown labels, unreadable images, missing columns.
    """
    check_choice("bad", bad, ("error", "skip"))
    if not isinstance(spec, (str, Path)):
        raise TypeError(f"data must be named by text or a path; got {shown(spec)}")
    if not str(spec).strip():
        raise ValueError(f"data must be named by text or a path; got {shown(spec)}")
    for name, value, low, high in (
        ("limit", limit, 1, LARGEST),
        ("size", size, 8, LARGEST_SIZE),
        ("pad", pad, 0, LARGEST_SIZE),
    ):
        if value is not None:
            check_integer(name, value, low, high)
    check_integer("seed", seed, 0, 2**32 - 1)
    if not 0.0 < check_number("val_fraction", val_fraction) < 1.0:
        raise ValueError(f"val_fraction must be between 0 and 1; got {val_fraction}")
    if str(spec) == "embedded":
        return photo_crops(size or LARGEST_DEFAULT_SIZE, seed=seed)
    remarks: list[str] = []
    train, val, classes = _find(spec, val_fraction, seed, remarks)
    for name, (items, labels) in (("training", train), ("validation", val)):
        if not items:
            raise ValueError(f"{spec}: no {name} images")
        wrong = [label for label in labels if not 0 <= label < len(classes)]
        if wrong:
            raise ValueError(f"{spec}: label {wrong[0]} of a {name} image is none of the {len(classes)} classes")
    if len(classes) < 2:
        raise ValueError(f"{spec}: classification needs at least two classes; found {', '.join(classes) or 'none'}")
    train, val = _limit(train, limit, seed), _limit(val, limit, seed + 1)
    size = _size_of_first(train[0]) if size is None else size
    images = [ImageSet(*split, size, f"{spec} ({name})") for split, name in ((train, "training"), (val, "validation"))]
    images = _readable(images, classes, bad, str(spec), remarks)
    return VisionData(
        name=Path(spec).name or str(spec),
        train=Samples(images[0], size, pad=size // 8 if pad is None else pad, train=True, seed=seed),
        val=Samples(images[1], size),
        classes=tuple(classes),
        size=size,
        description=f"{Path(spec).name}: {len(classes)} classes, {len(images[0])} training and {len(images[1])} validation "
        f"images of {size}×{size}.{''.join(f' {remark}' for remark in remarks)}",
    )


def _size_of_first(items: Items) -> int:
    """The shorter side of the first image that can be read, at most ``LARGEST_DEFAULT_SIZE``; that where none can."""
    for item in items:
        with suppress(ValueError, FileNotFoundError):
            return min(*decode_image(item, "").shape[1:], LARGEST_DEFAULT_SIZE)
    return LARGEST_DEFAULT_SIZE


def _readable(images: list[ImageSet], classes: Sequence[str], bad: str, spec: str, remarks: list[str]) -> list[ImageSet]:
    """Those images that can be read, or an error that lists the others."""
    unreadable = [each.unreadable() for each in images]
    told = [why for each in unreadable for why in each.values()]
    if not told:
        return images
    if bad == "error":
        more = f"; and {len(told) - BAD_LISTED} more" if len(told) > BAD_LISTED else ""
        count = f"{spec}: {len(told)} images cannot be read: " if len(told) > 1 else ""
        raise ValueError(f"{count}{'; '.join(told[:BAD_LISTED])}{more}; bad='skip' (--bad-images skip) leaves such images out")
    kept = [each.subset([i for i in range(len(each)) if i not in out]) for each, out in zip(images, unreadable, strict=True)]
    left = set(kept[0].labels.tolist())
    lost = [classes[label] for label in sorted(set(images[0].labels.tolist()) - left)]
    if lost or not len(kept[1]):
        raise ValueError(f"{spec}: no image of {', '.join(lost) or 'the validation split'} can be read: {told[0]}")
    remarks.append(f"{len(told)} unreadable image{'s were' if len(told) > 1 else ' was'} left out.")
    return kept


def _find(spec: str | Path, val_fraction: float, seed: int, remarks: list[str]) -> tuple[Split, Split, Sequence[str]]:
    try:
        path = Path(spec).expanduser()
        is_file, is_dir = path.is_file(), path.is_dir()
    except OSError as error:  # such as a name that is too long
        raise FileNotFoundError(f"no data at {shown(str(spec))}: {error.strerror}") from None
    except (RuntimeError, ValueError) as error:  # no such user, letters that no path has
        raise FileNotFoundError(f"no data at {shown(str(spec))}: {one_line(error)}") from None
    if is_file:
        if path.suffix != ".parquet":
            raise ValueError(f"{path}: expected a folder or a .parquet file; got {path.suffix or 'a file without suffix'}")
        split, classes = _parquet([[path]])
        return (*_hold_out(split[0], val_fraction, seed), classes)
    if not is_dir:
        if path.is_absolute() or path.suffix or str(spec).startswith((".", "~")) or str(spec).count("/") > 1:
            raise FileNotFoundError(f"no data at {spec}")
        return _hub(str(spec), val_fraction, seed)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        import datasets

        try:
            loaded = datasets.load_from_disk(str(path))
        except Exception as error:  # damaged files make it raise anything
            raise ValueError(f"cannot read the data set {path}: {one_line(error)}") from None
        return _from_datasets(loaded, str(path), val_fraction, seed)
    inside = [file for file in sorted(path.rglob("*.parquet")) if not any(map(is_leftover, file.relative_to(path).parts))]
    if files := [file for file in inside if file.is_file()]:
        return _parquet_folder(path, files, val_fraction, seed)
    return _image_folder(path, val_fraction, seed, remarks)


def _image_folder(path: Path, val_fraction: float, seed: int, remarks: list[str]) -> tuple[Split, Split, Sequence[str]]:
    folders = {child.name.lower(): child for child in reversed(folders_in(path))}

    def images(folder: Path, all_of_them: bool = True) -> Split:
        items, labels, passed = class_folders(folder, classes, all_of_them=all_of_them)
        if passed:
            remarks.append(f"In {folder}:{said_of(passed)}.")
        return list(items), labels

    train = next((folders[name] for name in TRAIN_NAMES if name in folders), None)
    if train is not None and not folders_in(train):  # a class of that name
        train = None
    val = next((folders[name] for name in VAL_NAMES if name in folders), None)
    if train is not None and val is not None:
        classes = class_names(train)
        unknown = sorted(set(class_names(val)) - set(classes))
        if unknown:
            raise ValueError(f"{val}: class {unknown[0]!r} is not among the training classes {', '.join(classes)}")
        return images(train), images(val, all_of_them=False), classes
    root = train or path
    classes = class_names(root)
    return (*_hold_out(images(root), val_fraction, seed), classes)


def _parquet_folder(path: Path, files: list[Path], val_fraction: float, seed: int) -> tuple[Split, Split, Sequence[str]]:
    def starting(names: Sequence[str]) -> list[Path]:
        name = next((n for n in names if any(file.name.lower().startswith(n) for file in files)), None)
        return [file for file in files if name and file.name.lower().startswith(name)]

    def within(names: Sequence[str]) -> list[Path]:
        folders = {file: {part.lower() for part in file.relative_to(path).parts[:-1]} for file in files}
        name = next((n for n in names if any(n in parts for parts in folders.values())), None)
        return [file for file, parts in folders.items() if name in parts]

    train, val = starting(TRAIN_NAMES), starting(VAL_NAMES)
    if not train or not val:
        train, val = within(TRAIN_NAMES), within(VAL_NAMES)
    if not train or not val:
        splits, classes = _parquet([files])
        return (*_hold_out(splits[0], val_fraction, seed), classes)
    splits, classes = _parquet([train, val])
    return splits[0], splits[1], classes


def _parquet(splits: Sequence[Sequence[Path]]) -> tuple[list[Split], list[str]]:
    """The images and labels of files, split by split, and the names of the classes."""
    try:
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('parquet files need pyarrow; pip install "regard[train]"') from error

    read = [[_parquet_file(file, pyarrow) for file in files] for files in splits]
    named = max((names for files in read for *_, names in files), key=len)
    listed = splits[0][0].parent / "labels.txt"
    if not named and listed.is_file():
        try:
            named = [line.strip() for line in listed.read_text("utf-8").splitlines() if line.strip()]
        except (ValueError, OSError) as error:
            raise ValueError(f"cannot read the names of classes in {listed}: {one_line(error)}") from None
    labels = [[label for _, values, _ in files for label in values] for files in read]
    numbers, classes = numbered(labels, named, str(splits[0][0]))
    return [([i for items, *_ in files for i in items], n) for files, n in zip(read, numbers, strict=True)], classes


def _parquet_file(file: Path, pyarrow: Any) -> tuple[Items, list[Any], list[str]]:
    """The images of a file, their labels as they stand there, and the names of the classes where its metadata has them."""
    try:
        schema = pyarrow.parquet.read_schema(file)
        image = choose_column("images", IMAGES, schema.names, str(file))
        label = choose_column("classes", LABELS, schema.names, str(file))
        names = _names_in_metadata(schema.metadata, label)
        table = pyarrow.parquet.read_table(file, columns=[image, label])
        images = table.column(image).combine_chunks()
        if pyarrow.types.is_struct(images.type) and images.type.get_field_index("bytes") >= 0:
            images = images.field("bytes")
        if not any(test(images.type) for test in (pyarrow.types.is_binary, pyarrow.types.is_large_binary)):
            raise ValueError(f"{file}: column {image} must hold bytes, the files of images; it holds {images.type}")
        if images.null_count:
            raise ValueError(f"{file}: {images.null_count} images have no bytes")
        labels = table.column(label).to_pylist()
        if not all(isinstance(value, str) for value in labels):
            labels = class_numbers(labels, f"{file}, column {label}")
        return images.to_pylist(), labels, names
    except Exception as error:  # damaged files make it raise anything
        if isinstance(error, ValueError) and str(error).startswith(str(file)):
            raise
        raise ValueError(f"cannot read the parquet file {file}: {one_line(error)}") from None


def _names_in_metadata(metadata: dict[bytes, bytes] | None, label: str) -> list[str]:
    """Class names that `datasets` writes into the schema of a parquet file.

    Raises:
        ValueError: metadata of another form.
    """
    found: Any = json.loads((metadata or {}).get(b"huggingface", b"{}"))
    for key in ("info", "features", label, "names"):
        if not isinstance(found, dict):
            raise ValueError(f"its metadata 'huggingface' holds {shown(found)} where a dictionary with {key!r} is expected")
        if key not in found:
            return []
        found = found[key]
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"its metadata 'huggingface' names classes by {shown(found)}, not by a list of texts")
    return found


def _hub(name: str, val_fraction: float, seed: int) -> tuple[Split, Split, Sequence[str]]:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise FileNotFoundError(f'no data at {name}; for names of hub datasets pip install "regard[train]"') from error
    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:  # whatever the hub client, the network or the dataset raises
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = "; did you mean embedded?" if nearest(name, ["embedded"]) else ""
        raise FileNotFoundError(f"no file or folder {name}, and datasets cannot load that name: {reason}{hint}") from error
    return _from_datasets(loaded, name, val_fraction, seed)


def _from_datasets(loaded: Any, name: str, val_fraction: float, seed: int) -> tuple[Split, Split, Sequence[str]]:
    import datasets

    parts = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    train = next((parts[part] for part in TRAIN_NAMES if part in parts), None)
    if train is None:
        raise ValueError(f"{name}: no training split; there are {', '.join(parts)}")
    val = next((parts[part] for part in VAL_NAMES if part in parts), None)
    image = _of_kind(train.features, datasets.Image, IMAGES)
    label = _of_kind(train.features, datasets.ClassLabel, LABELS)
    if image is None:
        raise ValueError(f"{name}: needs an Image column; there are {', '.join(train.features)}")
    names: list[str] = []
    if label is None:
        label = choose_column("classes", LABELS, train.features, name)
    else:
        names = train.features[label].names

    def split(part: Any) -> tuple[Items, list[Any]]:
        try:
            rows = part.cast_column(image, datasets.Image(decode=False))
            return [Path(row["path"]) if row["bytes"] is None else row["bytes"] for row in rows[image]], list(rows[label])
        except Exception as error:  # damaged files make it raise anything
            raise ValueError(f"cannot read the data set {name}: {one_line(error)}") from None

    read = [split(part) for part in (train, val) if part is not None]
    numbers, classes = numbered([labels for _, labels in read], names, name)
    splits = [(items, labels) for (items, _), labels in zip(read, numbers, strict=True)]
    if val is None:
        return (*_hold_out(splits[0], val_fraction, seed), classes)
    return splits[0], splits[1], classes


def _of_kind(features: Mapping[str, Any], kind: type, names: Sequence[str]) -> str | None:
    """The column of a kind; of several the one whose name comes first, or the first where none has such a name."""
    found = [key for key, feature in features.items() if isinstance(feature, kind)]
    usual = [key for name in names for key in found if key.lower() == name]
    return next(iter([*usual, *found]), None)


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
