"""Data as users have it: leftovers, damaged and unusual images, odd columns; read right, or refused with the file's name."""

from __future__ import annotations

import io
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_sources import CLASSES, picture, png, write_folder

from regard.data import images, load_data
from regard.data.columns import IMAGES, LABELS
from regard.data.images import decode_image


def count(data) -> int:
    return len(data.train) + len(data.val)


def test_what_systems_and_notebooks_leave_behind_is_no_sample(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "d")
    good = (source / "cat" / "0.png").read_bytes()
    for name in (
        "._0.png", "cat/._0.png", "cat/.DS_Store", "cat/.ipynb_checkpoints/0-checkpoint.png", "cat/deep/.hidden/0.png",
        "__MACOSX/cat/0.png", "cat/__MACOSX/._0.png", ".ipynb_checkpoints/0.png", "cat/Thumbs.db", ".git/x.parquet",
    ):  # fmt: skip
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(good)
    (source / "cup" / "deep").mkdir()
    (source / "cup" / "deep" / "9.png").write_bytes(png(1, 9))
    data = load_data(source)
    assert data.classes == CLASSES
    assert count(data) == 16


def test_links_are_followed_once(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "d")
    (source / "cat" / "loop").symlink_to(source / "cat")
    (source / "cat" / "self.png").symlink_to(source / "cat" / "self.png")
    more = write_folder(tmp_path / "more")
    (source / "cat" / "linked").symlink_to(more / "cat")
    assert count(load_data(source)) == 20


def test_links_upwards_bring_no_images_of_other_classes(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "d")
    for name in ("all", "cat/all", "cat/above"):
        (source / name).symlink_to(source.parent if name == "cat/above" else source)
    data = load_data(source)
    assert data.classes == CLASSES
    assert count(data) == 15


def test_names_need_not_be_text(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "d")
    plain = load_data(source).fingerprint()
    os.rename(source / "cat" / "0.png", os.fsencode(source / "cat") + b"/\xff.png")
    assert load_data(source).fingerprint() != plain


def test_splits_are_folders_of_classes_whatever_their_capitals(tmp_path: Path) -> None:
    write_folder(tmp_path / "d" / "Train", 4)
    write_folder(tmp_path / "d" / "Test", 3)
    data = load_data(tmp_path / "d")
    assert (len(data.train), len(data.val), data.classes) == (12, 9, CLASSES)
    source = write_folder(tmp_path / "vehicles")
    (source / "cat").rename(source / "train")
    assert "train" in load_data(source).classes


@pytest.mark.parametrize("names", [("Train.parquet", "Test.parquet"), ("train/0.parquet", "test/0.parquet")])
def test_splits_of_tables_are_told_by_their_files_or_folders(names: tuple[str, str], tmp_path: Path) -> None:
    for name, rows in zip(names, (10, 6), strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_table(tmp_path / name, [0, 1] * (rows // 2))
    data = load_data(tmp_path)
    assert (len(data.train), len(data.val)) == (10, 6)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"size": 10**6}, "size must be at most 4096"),
        ({"size": "32"}, "size must be a whole number"),
        ({"limit": 1.5}, "limit must be a whole number"),
        ({"limit": True}, "limit must be a whole number"),
        ({"pad": -1}, "pad must be at least 0"),
        ({"seed": None}, "seed must be a whole number"),
        ({"val_fraction": "a"}, "val_fraction must be a number"),
        ({"spec": ""}, "data must be named by text or a path; got str ''"),
        ({"spec": 3}, "data must be named by text or a path; got int 3"),
        ({"spec": "~nosuchuser/x"}, "no data at .*~nosuchuser/x"),
    ],
)
def test_wrong_arguments_are_refused_by_name(options, error: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=error):
        load_data(**{"spec": tmp_path, **options})


def test_a_deep_grey_that_stands_for_nothing_is_white() -> None:
    deep = np.full((9, 9), 40000, np.uint16)
    deep[0] = 500
    pixels = decode_image(saved(Image.fromarray(deep), "PNG", transparency=500), "a")
    assert pixels[:, 0].eq(255).all()
    assert pixels[:, 1].eq(round(40000 * 255 / 65535)).all()


def test_files_that_cannot_be_decoded_here_are_counted_and_said(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "d")
    for name in ("a.heic", "b.HEIC"):
        (source / "cat" / name).write_bytes(b"")
    picture(0, 9).convert("RGB").save(source / "cat" / "c.jfif", format="JPEG")
    data = load_data(source)
    assert count(data) == 16
    assert "2 .heic passed over" in data.description
    (source / "dog").mkdir()
    (source / "dog" / "a.heic").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no images in the folder dog \(3 \.heic passed over.*\); images end in \.avif"):
        load_data(source)


def test_all_unreadable_images_are_listed_before_training_or_left_out(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "d")
    for number, content in enumerate((b"", b"garbage", (source / "cup" / "2.png").read_bytes()[:300])):
        (source / "cup" / f"{number}.png").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"3 images cannot be read: .*cup/0\.png.*cup/1\.png.*cup/2\.png.*--bad-images skip"
    ) as told:
        load_data(source)
    assert str(told.value).isprintable()
    data = load_data(source, bad="skip")
    assert count(data) == 12
    assert data.description.endswith("3 unreadable images were left out.")
    with pytest.raises(ValueError, match="bad must be one of error, skip; got 'drop'"):
        load_data(source, bad="drop")
    for number in (3, 4):
        (source / "cup" / f"{number}.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no image of cup can be read"):
        load_data(source, bad="skip")


# ----- unusual images


def saved(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=form, **options)
    return buffer.getvalue()


def test_fractions_are_scaled_or_refused() -> None:
    ramp = np.linspace(0, 1, 1600, dtype=np.float32).reshape(40, 40)
    expected = torch.from_numpy(np.rint(ramp.astype(np.float64) * 255)).to(torch.uint8).expand(3, 40, 40)
    # bitwise: pixels are whole numbers
    assert torch.equal(decode_image(saved(Image.fromarray(ramp), "TIFF"), "a"), expected)
    assert torch.equal(decode_image(saved(Image.fromarray(ramp * 255), "TIFF"), "a"), expected)
    for wrong in (ramp - 0.5, ramp * 65535, np.where(ramp > 0.5, np.nan, ramp), np.where(ramp > 0.5, np.inf, ramp)):
        with pytest.raises(ValueError, match="cannot read the image a: its pixels are fractions from"):
            decode_image(saved(Image.fromarray(wrong.astype(np.float32)), "TIFF"), "a")


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    header = struct.pack(">II5B", 100_000, 100_000, 8, 2, 0, 0, 0)
    good = png(0, 0)
    at = good.index(b"IHDR") + 4
    import zlib

    huge = good[:at] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + good[at + 17 :]
    with pytest.raises(ValueError, match=r"cannot read the image a: .*(pixels)"):
        decode_image(huge, "a")
    monkeypatch.setattr(images, "MOST_PIXELS", 24 * 24 - 1)
    with pytest.raises(ValueError, match="it has 24 x 24 pixels, more than 0 million"):
        decode_image(good, "a")


@pytest.mark.parametrize("shape", [(3000, 2), (2, 3000)])
def test_a_long_strip_gives_its_middle(shape: tuple[int, int]) -> None:
    ramp = np.broadcast_to(np.linspace(0, 255, 3000), (2, 3000))
    image = Image.fromarray((ramp if shape[0] == 2 else ramp.T).astype(np.uint8))
    pixels = decode_image(saved(image, "PNG"), "a", 16)
    assert pixels.shape == (3, 16, 16)
    assert (pixels.float() - 127).abs().max() <= 2


# ----- tables


def write_table(path: Path, labels, names=("image", "label"), column=None, metadata=None) -> Path:
    import pyarrow
    import pyarrow.parquet

    encoded = [{"bytes": png(row % 3, row), "path": None} for row in range(len(labels))] if column is None else column
    table = pyarrow.table({names[0]: encoded, names[1]: labels})
    if metadata is not None:
        table = table.replace_schema_metadata({"huggingface": metadata})
    pyarrow.parquet.write_table(table, path)
    return path


@pytest.mark.parametrize(("image", "label"), [*((each, "label") for each in IMAGES), *(("IMG", each) for each in LABELS)])
def test_columns_may_be_called_what_the_table_says(image: str, label: str, tmp_path: Path) -> None:
    data = load_data(write_table(tmp_path / "a.parquet", [0, 1] * 4, (image, label)))
    assert (data.classes, count(data)) == (("0", "1"), 8)


def test_labels_may_be_texts_or_whole_fractions(tmp_path: Path) -> None:
    data = load_data(write_table(tmp_path / "a.parquet", ["dog", "cat"] * 4))
    assert data.classes == ("cat", "dog")
    assert sorted(data.train.images.labels.tolist() + data.val.images.labels.tolist()) == [0] * 4 + [1] * 4
    assert load_data(write_table(tmp_path / "b.parquet", [0.0, 1.0] * 4)).classes == ("0", "1")


@pytest.mark.parametrize(
    ("labels", "more", "message"),
    [
        ([0.0, float("nan")] * 4, {}, "row 1 has float nan"),
        ([0, 2**40] * 4, {}, "row 1 has int 1099511627776"),
        ([0, -1] * 4, {}, "row 1 has int -1"),
        ([0, None] * 4, {}, "row 1 has None"),
        ([[0], [1]] * 4, {}, "row 0 has list"),
        ([0, 1] * 4, {"column": list(range(8))}, "column image must hold bytes, the files of images; it holds int64"),
        (
            [0, 1] * 4,
            {"metadata": json.dumps({"info": {"features": {"label": {"names": ["a", "a"]}}}})},
            "two classes are named",
        ),
        ([0, 1] * 4, {"metadata": "null"}, "metadata 'huggingface' holds None"),
        ([0, 1] * 4, {"metadata": "[1]"}, "metadata 'huggingface' holds list"),
        ([0, 1] * 4, {"metadata": "3"}, "metadata 'huggingface' holds int 3"),
        ([0, 1] * 4, {"metadata": "{"}, "cannot read the parquet file"),
        ([0, 1] * 4, {"metadata": json.dumps({"info": {"features": {"label": {"names": 3}}}})}, "not by a list of texts"),
    ],
)
def test_tables_that_are_wrong_are_refused_by_name(labels, more, message: str, tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.parquet", labels, **more)
    with pytest.raises(ValueError, match=message) as told:
        load_data(path)
    assert str(path) in str(told.value)
    assert str(told.value).isprintable()


def test_damaged_tables_and_names_are_refused_by_name(tmp_path: Path) -> None:
    whole = write_table(tmp_path / "a.parquet", [0, 1] * 4).read_bytes()
    for at in range(4, len(whole) - 4, len(whole) // 40):
        (tmp_path / "b.parquet").write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        said = ""
        try:
            load_data(tmp_path / "b.parquet")
        except ValueError as error:
            said = str(error)
        assert not said or "b.parquet" in said
    (tmp_path / "labels.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match=r"cannot read the names of classes in .*labels\.txt"):
        load_data(tmp_path / "a.parquet")


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"splits": 3}', '{"splits": ["train"]}'])
def test_a_damaged_set_of_datasets_is_refused_by_name(content: str, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "dataset_dict.json").write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=str(tmp_path)):
        load_data(tmp_path)


def test_a_name_that_is_too_long_is_refused() -> None:
    with pytest.raises(FileNotFoundError, match=r"no data at str 'aaa.*too long"):
        load_data("a" * 300)
