"""The user's data, from files that the tests write."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from regard.data import load_data, photograph

CLASSES = ("cat", "cup", "roof")
PHOTOS = ("chelsea", "coffee", "china")


def picture(label: int, number: int, side: int = 24) -> Image.Image:
    pixels = photograph(PHOTOS[label])[:, 10 * number : 10 * number + side, 7 * number : 7 * number + side]
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def png(label: int, number: int) -> bytes:
    buffer = io.BytesIO()
    picture(label, number).save(buffer, format="PNG")
    return buffer.getvalue()


def write_folder(path: Path, count: int = 5) -> Path:
    for label, name in enumerate(CLASSES):
        (path / name).mkdir(parents=True)
        for number in range(count):
            picture(label, number).save(path / name / f"{number}.png")
    return path


def write_parquet(path: Path, count: int = 5, *, first: int = 0, metadata: bool = False) -> Path:
    import pyarrow
    import pyarrow.parquet

    rows = [(label, number) for number in range(first, first + count) for label in range(len(CLASSES))]
    table = pyarrow.table(
        {
            "image": [{"bytes": png(*row), "path": f"{row[1]}.png"} for row in rows],
            "label": [row[0] for row in rows],
        }
    )
    if metadata:
        features = {"label": {"names": list(CLASSES), "_type": "ClassLabel"}, "image": {"_type": "Image"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table, path)
    return path


def contents(samples) -> set[bytes]:
    return {samples.images.image(i).numpy().tobytes() for i in range(len(samples.images))}


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_split_holds_out_a_share_of_every_class_and_leaks_nothing(kind: str, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "d", 10) if kind == "folder" else write_parquet(tmp_path / "d.parquet", 10)
    data = load_data(source, val_fraction=0.3, seed=4)
    assert data.train.images.labels.bincount().tolist() == [7, 7, 7]
    assert data.val.images.labels.bincount().tolist() == [3, 3, 3]
    assert not contents(data.train) & contents(data.val)
    assert len(contents(data.train)) == 21
    assert contents(load_data(source, val_fraction=0.3, seed=4).val) == contents(data.val)
    assert contents(load_data(source, val_fraction=0.3, seed=5).val) != contents(data.val)


def test_folder_and_parquet_give_the_pixels_and_labels_that_were_written(tmp_path: Path) -> None:
    for source in (write_folder(tmp_path / "d"), write_parquet(tmp_path / "p.parquet", metadata=True)):
        data = load_data(source)
        assert data.classes == CLASSES
        assert data.size == 24
        expected = {photograph(PHOTOS[label])[:, 10 * n : 10 * n + 24, 7 * n : 7 * n + 24].contiguous().numpy().tobytes(): label
                    for label in range(3) for n in range(5)}  # fmt: skip
        for samples in (data.train, data.val):
            for index in range(len(samples.images)):
                image = samples.images.image(index)
                assert expected[image.numpy().tobytes()] == samples.images.labels[index]


def test_train_and_val_folders_are_used_as_they_are(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", 4)
    write_folder(tmp_path / "test", 2)
    data = load_data(tmp_path)
    assert (len(data.train), len(data.val)) == (12, 6)


def test_train_and_test_parquet_files_with_names_beside_them(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-00000-of-00002.parquet", 2)
    write_parquet(tmp_path / "train-00001-of-00002.parquet", 2, first=2)
    write_parquet(tmp_path / "test.parquet", 3, first=4)
    (tmp_path / "labels.txt").write_text("\n".join(CLASSES))
    data = load_data(tmp_path)
    assert data.classes == CLASSES
    assert (len(data.train), len(data.val)) == (12, 9)


def test_dataset_saved_by_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"photo": datasets.Image(), "kind": datasets.ClassLabel(names=list(CLASSES))})
    rows = [(label, number) for number in range(4) for label in range(3)]
    table = {"photo": [{"bytes": png(*row), "path": None} for row in rows], "kind": [row[0] for row in rows]}
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(table, features=features)}).save_to_disk(tmp_path / "d")
    data = load_data(tmp_path / "d", val_fraction=0.25)
    assert data.classes == CLASSES
    assert (len(data.train), len(data.val)) == (9, 3)


def test_limit_draws_the_same_images_again(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "d", 8)
    first, second = load_data(source, limit=6, seed=1), load_data(source, limit=6, seed=1)
    assert len(first.train) == 6
    assert first.fingerprint() == second.fingerprint()
    assert first.fingerprint() != load_data(source, limit=6, seed=2).fingerprint()


def test_fingerprint_depends_on_the_files(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "d")
    before = load_data(source).fingerprint()
    picture(2, 9).save(source / "cat" / "0.png")
    assert load_data(source).fingerprint() != before


def wrong_columns(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path.mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "label": [0]}), path / "train.parquet")


def broken_parquet(path: Path) -> None:
    path.mkdir()
    (path / "train.parquet").write_bytes(b"PAR1 and nothing")


def no_images(path: Path) -> None:
    for name in CLASSES:
        (path / name).mkdir(parents=True)


def unknown_label(path: Path) -> None:
    write_parquet(path / "train.parquet")
    (path / "labels.txt").write_text("cat\ncup\n")


def another_class(path: Path) -> None:
    write_folder(path / "train")
    write_folder(path / "val")
    (path / "val" / "cat").rename(path / "val" / "dog")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, r"no data at .*/d"),
        (lambda path: path.mkdir(), r"no classes; expected one folder of images per class, or parquet files"),
        (no_images, r"no images in the folders cat, cup, roof"),
        (wrong_columns, r"expected columns image and label; there are text, label"),
        (broken_parquet, r"cannot read the parquet file .*train.parquet"),
        (unknown_label, r"label 2 of a training image is none of the 2 classes"),
        (another_class, r"class 'dog' is not among the training classes cat, cup, roof"),
        (
            lambda path: (path / "only").mkdir(parents=True) or picture(0, 0).save(path / "only" / "a.png"),
            "no validation images",
        ),
        (lambda path: path.write_text("x"), r"expected a folder or a .parquet file"),
    ],
)
def test_what_cannot_be_loaded_is_said_in_one_line(write, message: str, tmp_path: Path) -> None:
    write(tmp_path / "d")
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load_data(tmp_path / "d")
    assert "\n" not in str(caught.value)


def test_unreadable_image_is_named(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "d")
    (source / "cup" / "3.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"cannot read the image .*cup/3.png"):
        load_data(source)


def test_random_samples_depend_on_seed_epoch_and_index_only(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "d")
    train = load_data(source, seed=3).train
    alone = train[(2, 1)][0]
    torch.manual_seed(99)
    for index in reversed(range(len(train))):
        train[(2, index)]
    assert torch.equal(train[(2, 1)][0], alone)
    assert torch.equal(load_data(source, seed=3).train[(2, 1)][0], alone)
    others = [train.crop(epoch, 1) for epoch in range(20)]
    assert len(set(others)) > 10
    assert {flip for *_, flip in others} == {True, False}


def test_validation_samples_are_not_augmented(tmp_path: Path) -> None:
    val = load_data(write_folder(tmp_path / "d")).val
    for index in range(len(val)):
        assert torch.equal(val[(0, index)][0], val[(7, index)][0])
        assert torch.allclose(val[index][0] * 64 + 127.5, val.images.image(index).float(), atol=1e-4)
