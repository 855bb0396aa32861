"""Damaged, foreign and hostile files: checkpoints, pictures, tables of pictures, folders, runs that go on.

Each is read, or refused in one clear error that names it; nothing in it is ever run; a refused checkpoint changes no weight.
"""

from __future__ import annotations

import atexit
import io
import json
import pickle
import shutil
import struct
import sys
import tempfile
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor, nn

from regard import create_model, load_checkpoint
from regard.data.images import ImageSet, Samples, VisionData, decode_image
from regard.data.sources import load_data

from .judging import FILES, Wrong, clear
from .sets import choose

FILE_ERRORS = (ValueError, TypeError, FileNotFoundError)
FORMATS = {"png": "PNG", "jpg": "JPEG", "tif": "TIFF", "bmp": "BMP", "gif": "GIF", "webp": "WEBP", "ppm": "PPM"}
MODES = ("RGB", "L", "RGBA", "P", "1", "CMYK", "I;16", "F")
MARK = "REGARD_FUZZ_RAN"


def evil() -> None:
    """What a hostile pickle asks to be run."""
    setattr(sys, MARK, True)


class Evil:
    def __reduce__(self) -> tuple[Callable, tuple]:
        return evil, ()


def check(rng: np.random.Generator) -> str:
    """Make and check one case; returns what it was."""
    sort = rng.random()
    try:
        if sort < 0.45:
            return picture(rng)
        if sort < 0.75:
            return checkpoint(rng)
        if sort < 0.88:
            return parquet(rng)
        return folder(rng) if sort < 0.993 else resumed(rng)
    finally:
        if getattr(sys, MARK, False):
            delattr(sys, MARK)
            raise Wrong("code of the file was run")


@cache
def place() -> Path:
    made = Path(tempfile.mkdtemp(prefix="fuzz-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def judged(label: str, names: list[str], act: Callable[[], Any]) -> Any:
    """What came of reading; None where it was refused clearly."""
    try:
        return act()
    except Exception as error:
        try:
            clear(error, names, FILE_ERRORS, FILES)
        except Wrong as wrong:
            raise Wrong(f"{label}: {wrong}") from error
        return None


# --------------------------------------------------------------------------------------------------------------------
# damage


def damaged(rng: np.random.Generator, content: bytes) -> bytes:
    """One to three of the ways in which files break."""
    for _ in range(int(rng.integers(1, 4))):
        content = damage(rng, content)
    return content


def damage(rng: np.random.Generator, content: bytes) -> bytes:
    n = len(content)
    if n == 0:
        return rng.bytes(int(rng.integers(0, 40)))
    at, sort = int(rng.integers(0, n)), int(rng.integers(10))
    if rng.random() < 0.5:
        at = min(at, int(rng.integers(0, 200)))  # headers
    length = int(rng.integers(1, max(2, min(n, 64))))
    if sort == 0:
        return content[:at]
    if sort == 1:  # bits
        changed = bytearray(content)
        for place in rng.integers(0, n, int(rng.integers(1, 6))):
            changed[place] ^= 1 << int(rng.integers(8))
        return bytes(changed)
    if sort == 2:
        return content[:at] + b"\0" * length + content[at + length :]
    if sort == 3:
        return content[:at] + rng.bytes(length) + content[at + length :]
    if sort == 4:
        return content[:at] + content[at + length :]
    if sort == 5:
        return content[:at] + rng.bytes(length) + content[at:]
    if sort == 6:
        return content[:at] + content[at : at + length] * 3 + content[at + length :]
    if sort == 7:  # a size, or what may be one
        code, value = choose(rng, ("<I", 2**32 - 1), (">I", 2**31), ("<Q", 2**63), (">H", 65535), ("<I", 0), ("<Q", 2**40))
        packed = struct.pack(code, value)
        return content[:at] + packed + content[at + len(packed) :]
    if sort == 8:
        return choose(rng, b"", b"\0", rng.bytes(100), b"{}", b"null", content[::-1], b"<html></html>", b"\x1f\x8b" + content)
    return content + rng.bytes(length)


# --------------------------------------------------------------------------------------------------------------------
# pictures


@cache
def encoded(suffix: str, mode: str) -> bytes | None:
    """A small picture as a file; None where the format does not know the mode."""
    pixels = np.random.default_rng(7).integers(0, 255, (12, 16, 4), dtype=np.uint8)
    if mode == "F":
        made = Image.fromarray(pixels[..., 0].astype(np.float32) / 255)
    elif mode == "I;16":
        made = Image.fromarray(pixels[..., 0].astype(np.uint16) * 256)
    else:
        made = (
            Image.fromarray(pixels, "RGBA").convert("RGB").convert(mode) if mode != "RGBA" else Image.fromarray(pixels, "RGBA")
        )
    into = io.BytesIO()
    try:
        made.save(into, FORMATS[suffix])
    except (OSError, KeyError, ValueError):
        return None
    return into.getvalue()


def a_picture(rng: np.random.Generator) -> tuple[str, bytes]:
    while True:
        suffix = choose(rng, *FORMATS)
        if (content := encoded(suffix, choose(rng, *MODES))) is not None:
            return suffix, content


def picture(rng: np.random.Generator) -> str:
    suffix, content = a_picture(rng)
    if rng.random() < 0.95:
        content = damaged(rng, content)
    size = choose(rng, None, 8)
    item: Path | bytes = content
    if rng.random() < 0.3:
        item = place() / f"picture.{choose(rng, *FORMATS)}"
        item.write_bytes(content)
    pixels = judged(f"picture {suffix}", ["the-name-of-it"], lambda: decode_image(item, "the-name-of-it", size))
    if pixels is not None:
        side = tuple(pixels.shape[1:])
        if pixels.dtype != torch.uint8 or pixels.shape[0] != 3 or 0 in side or (size is not None and side != (size, size)):
            raise Wrong(f"picture: {pixels.dtype} {tuple(pixels.shape)}")
    return "picture read" if pixels is not None else "picture refused"


# --------------------------------------------------------------------------------------------------------------------
# checkpoints


@cache
def model() -> nn.Module:
    torch.manual_seed(3)
    return create_model("vit_tiny_patch16_224", depth=1, dim=16, head_dim=8, num_classes=3).eval()


@cache
def weights() -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model().state_dict().items()}


def checkpoint(rng: np.random.Generator) -> str:
    state = {key: value.clone() for key, value in weights().items()}
    key, foreign = choose(rng, *state), rng.random() < 0.4
    if foreign:
        state[key] = choose(
            rng, torch.full_like(state[key], float("nan")), state[key].to(torch.int64), state[key].bool(), state[key][..., :0],
            state[key].to(torch.complex64), state[key].expand(2, *state[key].shape),
        ).contiguous()  # fmt: skip
    elif rng.random() < 0.5:
        state[key] = choose(rng, state[key].half(), state[key].double(), state[key].bfloat16())
    suffix = choose(rng, "safetensors", "safetensors", "pt", "pth", "bin", "ckpt")
    if suffix == "safetensors":
        content = tensors_file(rng, state)
    else:
        content = torch_file(rng, state)
    whole = rng.random() < 0.4
    if not whole:
        content = damaged(rng, content)
    path = place() / f"weights-{int(rng.integers(100))}.{suffix}"
    path.write_bytes(content)
    before = [t.clone() for t in model().state_dict().values()]
    done = judged(f"checkpoint .{suffix}", [str(path), path.name, key], lambda: load_checkpoint(model(), path))
    after = model().state_dict().values()
    alike = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))  # bitwise: nothing touched them
    finite = all(bool(t.isfinite().all()) for t in after)
    if not alike:
        model().load_state_dict(weights())
    path.unlink()
    if not finite:
        raise Wrong(f"checkpoint .{suffix}: weights that are not finite were loaded")
    if done is not None and foreign and whole:
        raise Wrong(f"checkpoint .{suffix}: {state[key].dtype} {tuple(state[key].shape)} was taken for a weight")
    if done is None and not alike:
        raise Wrong(f"checkpoint .{suffix}: refused, but weights have changed")
    return f"checkpoint .{suffix} {'read' if done is not None else 'refused'}"


def tensors_file(rng: np.random.Generator, state: dict[str, Tensor]) -> bytes:
    """A safetensors file; perhaps with another header than its data."""
    content = save({key: value for key, value in state.items() if rng.random() < 0.995})
    if rng.random() < 0.5:
        return content
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    entry = header[choose(rng, *[key for key in header if key != "__metadata__"])]
    for _ in range(int(rng.integers(1, 3))):
        field, value = choose(
            rng, ("dtype", "F16"), ("dtype", "I64"), ("dtype", "BOOL"), ("dtype", "X99"), ("dtype", None), ("shape", [-1, 4]),
            ("shape", [2**62, 4]), ("shape", []), ("shape", "3"), ("shape", [0]), ("shape", [1.5]), ("data_offsets", [0,
            2**60]),
            ("data_offsets", [8, 4]), ("data_offsets", [0]), ("data_offsets", None), ("more", {}),
        )  # fmt: skip
        entry[field] = value
    if rng.random() < 0.2:
        header["__metadata__"] = choose(rng, None, [], {"format": 3}, "x", {"format": "pt"})
    told = json.dumps(header).encode()
    return struct.pack("<Q", choose(rng, len(told), len(told), len(told), len(told) + 1, 0, 2**63)) + told + data


def torch_file(rng: np.random.Generator, state: dict[str, Tensor]) -> bytes:
    """What ``torch.save`` writes, of many things that people save; or a pickle that asks for code to be run."""
    content: Any = choose(
        rng, state, {"state_dict": state}, {"model": state, "epoch": 3}, {f"module.{k}": v for k, v in state.items()},
        list(state.values()),
        {"state_dict": None}, None, 3, [], "text", {1: state}, {**state, 5: torch.ones(2)}, {**state, "evil": Evil()},
        {"model": state, "args": Evil()}, Evil(), {"state_dict": {"a": Evil()}}, {b"key": torch.ones(2)}, nn.Linear(2, 2),
    )  # fmt: skip
    into = io.BytesIO()
    if rng.random() < 0.15:
        pickle.dump(content, into, protocol=int(rng.integers(0, 6)))
        return into.getvalue()
    torch.save(content, into, _use_new_zipfile_serialization=bool(rng.random() < 0.8))
    if rng.random() < 0.3:
        return other_members(rng, into.getvalue())
    return into.getvalue()


def other_members(rng: np.random.Generator, content: bytes) -> bytes:
    """The same archive with a member that is damaged, missing, or one too many."""
    if not zipfile.is_zipfile(io.BytesIO(content)):
        return content
    into = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(into, "w") as new:
        chosen = choose(rng, *old.namelist())
        for name in old.namelist():
            data = old.read(name)
            if name == chosen:
                data = choose(rng, None, b"", damaged(rng, data), pickle.dumps(Evil()))
            if data is not None:
                new.writestr(name, data)
        new.writestr(choose(rng, "../outside", "archive/data.pkl", "x", "archive/byteorder"), choose(rng, b"big", b"x", b""))
    return into.getvalue()


# --------------------------------------------------------------------------------------------------------------------
# tables of pictures, folders


def read_all(spec: Path) -> int:
    data = load_data(spec)
    for samples in (data.train, data.val):
        for i in range(len(samples)):
            pixels, label = samples[i]
            if not pixels.isfinite().all() or not 0 <= int(label) < len(data.classes):
                raise Wrong("a sample that is not finite, or of no class")
    return len(data.train) + len(data.val)


def parquet(rng: np.random.Generator) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pictures = [{"bytes": encoded("png", choose(rng, "RGB", "L")), "path": f"{i}.png"} for i in range(6)]
    labels: Any = [0, 1] * 3
    names: Any = {"info": {"features": {"label": {"names": ["cat", "dog"]}}}}
    column, label_column = choose(rng, "image", "image", "img", "photo", "x"), choose(rng, "label", "label", "labels", "y", "")
    if rng.random() < 0.4:
        labels = choose(
            rng, [0.0, 1.0] * 3, [float("nan")] * 6, ["a", "b"] * 3, [None] * 6, [[0], [1]] * 3, [2**40, 0] * 3, [-1, 0] * 3,
            [0] * 6,
            [True, False] * 3,
        )  # fmt: skip
    if rng.random() < 0.3:
        names = choose(rng, None, [], 3, "x", {"info": None}, {"info": {"features": []}}, {"info": {"features": {"label": 3}}},
                       {"info": {"features": {"label": {"names": [1, None]}}}},
                       {"info": {"features": {"label": {"names": []}}}})  # fmt: skip
    images: Any = pictures
    if rng.random() < 0.3:
        bad = damaged(rng, encoded("png", "RGB") or b"")
        images = choose(rng, [1] * 6, ["a"] * 6, [None] * 6, [{"bytes": None, "path": "a.png"}] * 6, [bad] * 6,
                        [*pictures[:5], {"bytes": bad, "path": None}], [{"path": "x"}] * 6)  # fmt: skip
    columns = {column: images} | ({label_column: labels} if label_column else {})
    table = pa.table(columns)
    if rng.random() < 0.7:
        told = json.dumps(names).encode()
        table = table.replace_schema_metadata({b"huggingface": told if rng.random() < 0.8 else damaged(rng, told)})
    into = io.BytesIO()
    pq.write_table(table, into)
    content = into.getvalue() if rng.random() < 0.5 else damaged(rng, into.getvalue())
    where = place() / f"table-{int(rng.integers(100))}"
    shutil.rmtree(where, ignore_errors=True)
    where.mkdir()
    path = where / choose(rng, "train-00000.parquet", "data.parquet")
    path.write_bytes(content)
    if rng.random() < 0.2:
        told = choose(rng, b"cat\ndog\n", b"\xff\xfe", b"", b"cat\ncat\n", rng.bytes(30))
        (where / "labels.txt").write_bytes(told)
    spec = path if rng.random() < 0.5 else where
    count = judged("parquet", [str(where), where.name, path.name], lambda: read_all(spec))
    shutil.rmtree(where)
    return "parquet read" if count is not None else "parquet refused"


def folder(rng: np.random.Generator) -> str:
    """Folders of pictures with what people and machines leave in them; or one that `datasets` saved, with damaged records."""
    where = place() / f"folder-{int(rng.integers(100))}"
    shutil.rmtree(where, ignore_errors=True)
    if rng.random() < 0.15:
        return saved_dataset(rng, where)
    roots = choose(rng, [""], [""], ["train", "val"], ["train", "test"], ["train"])
    for root in roots:
        for name in choose(rng, ("cat", "dog"), ("cat", "dog"), ("cat",), ("ü x", "dog")):
            inside = where / root / name
            inside.mkdir(parents=True)
            for i in range(int(rng.integers(0, 5)) if rng.random() < 0.2 else 4):
                suffix, content = a_picture(rng)
                if rng.random() < 0.1:
                    content = damaged(rng, content)
                (inside / f"{i}.{suffix}").write_bytes(content)
    classes = [path for path in where.rglob("*") if path.is_dir()] or [where]
    for _ in range(int(rng.integers(0, 3))):
        leftover = choose(rng, *classes) / choose(
            rng, ".DS_Store", "._0.png", ".ipynb_checkpoints", "Thumbs.db", "notes.txt", "x.png", "labels.txt", "classes.txt",
            "deep", "state.json", "dataset_dict.json", "data.parquet", ".hidden.jpg", "desktop.ini", "__MACOSX",
        )  # fmt: skip
        if leftover.exists():
            continue
        if rng.random() < 0.3 and leftover.suffix not in (".txt", ".json"):
            leftover.mkdir()
            (leftover / "0.png").write_bytes(encoded("png", "RGB") or b"")
        else:
            leftover.write_bytes(choose(rng, b"", b"\0\5\26\7", rng.bytes(50), b"{}", b"null"))
    where.mkdir(exist_ok=True, parents=True)
    names = [str(where), where.name]
    count = judged("folder", names, lambda: read_all(where))
    shutil.rmtree(where)
    return "folder read" if count is not None else "folder refused"


@cache
def dataset_of_pictures() -> Path:
    import datasets

    datasets.disable_progress_bars()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    images = [Image.open(io.BytesIO(encoded("png", "RGB") or b"")) for _ in range(6)]
    made = datasets.Dataset.from_dict({"image": images, "label": [0, 1] * 3}, features=features)
    path = place() / "saved"
    datasets.DatasetDict({"train": made, "test": made}).save_to_disk(path)
    return path


def saved_dataset(rng: np.random.Generator, where: Path) -> str:
    shutil.copytree(dataset_of_pictures(), where)
    chosen = choose(rng, *sorted(path for path in where.rglob("*") if path.is_file()))
    sort = rng.random()
    if sort < 0.2:
        chosen.unlink()
    elif sort < 0.5 and chosen.suffix == ".json":
        chosen.write_text(choose(rng, "{}", "null", "[]", "3", '{"splits": 3}', '{"splits": ["a"]}', '{"_data_files": 3}', "{"))
    else:
        chosen.write_bytes(damaged(rng, chosen.read_bytes()))
    count = judged("saved dataset", [str(where), where.name], lambda: read_all(where))
    shutil.rmtree(where)
    return "dataset read" if count is not None else "dataset refused"


# --------------------------------------------------------------------------------------------------------------------
# a run that goes on


@cache
def trained() -> tuple[VisionData, Path]:
    """A run of one epoch, and the folder it has left."""
    images = ImageSet([torch.full((3, 8, 8), 20 * i, dtype=torch.uint8) for i in range(8)], [0, 1] * 4, 8, "made")
    data = VisionData("made", Samples(images, 8, train=True), Samples(images, 8), ("cat", "dog"), 8, "made")
    path = place() / "run"
    path.mkdir()
    go_on(data, path)
    return data, path


def go_on(data: VisionData, path: Path) -> nn.Module:
    from regard.train.fitting import Recipe, fit

    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    return fit(network, data, Recipe(epochs=1, batch_size=4), path, progress=False, accelerator="cpu")


def resumed(rng: np.random.Generator) -> str:
    data, run = trained()
    where = place() / "again"
    shutil.rmtree(where, ignore_errors=True)
    shutil.copytree(run, where)
    chosen = choose(rng, *sorted(path for path in where.rglob("*") if path.is_file()))
    sort = rng.random()
    if sort < 0.3:
        into = io.BytesIO()
        torch.save(choose(rng, Evil(), {"state_dict": {}, "x": Evil()}), into)
        (choose(rng, chosen, where / "last.ckpt")).write_bytes(into.getvalue())
    elif sort < 0.4:
        chosen.unlink()
    else:
        chosen.write_bytes(damaged(rng, chosen.read_bytes()))
    module = judged("resumed run", [str(where), where.name, chosen.name], lambda: go_on(data, where))
    if module is not None and not all(bool(t.isfinite().all()) for t in module.parameters()):
        raise Wrong("resumed run: weights that are not finite")
    shutil.rmtree(where)
    return "run went on" if module is not None else "run refused"
