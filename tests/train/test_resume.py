"""A run that is killed goes on exactly where it was."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from regard.data import photo_crops
from regard.files import alone_in
from regard.models import create_model
from regard.train.fitting import Recipe, fit
from regard.train.resume import RunFiles, read_checkpoint, resumable, write_checkpoint

SCRIPT = """
import os, signal, sys
from pathlib import Path
import lightning as L
import torch
torch.set_num_threads(1)
from test_resume import trained

class Kill(L.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        if trainer.global_step == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)

trained(Path(sys.argv[1]), callbacks=[Kill()])
"""


def trained(folder: Path, **options):
    """A tiny model with stochastic depth and dropout, two epochs of six steps; a checkpoint every second step."""
    data = photo_crops(16, names=("chelsea", "coffee", "china"), repeats=3, across=3)
    torch.manual_seed(1)
    model = create_model("compact_nano", num_classes=3, mixer="window", drop_path_rate=0.5, drop_rate=0.2)
    recipe = Recipe(epochs=2, batch_size=len(data.train) // 6, seed=5)
    return fit(model, data, options.pop("recipe", recipe), folder, progress=False, checkpoint_every=2, **options)


def digest(module: torch.nn.Module) -> str:
    values = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        values.update(name.encode() + tensor.numpy().tobytes())
    return values.hexdigest()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, float]]]:
    module = trained(tmp_path_factory.mktemp("whole"))
    return digest(module), module.history


# 3: between two checkpoints; 6: at the end of an epoch, before validation; 9: in the second epoch
@pytest.mark.parametrize("step", [3, 6, 9])
def test_killed_run_ends_with_the_same_weights_and_history(step: int, uninterrupted, tmp_path: Path) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), str(step)], cwd=Path(__file__).parent, capture_output=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
    assert (tmp_path / "last.ckpt").is_file()
    module = trained(tmp_path)
    assert (digest(module), module.history) == uninterrupted


def test_another_seed_gives_other_weights(uninterrupted, tmp_path: Path) -> None:
    data = photo_crops(16, names=("chelsea", "coffee", "china"), repeats=3, across=3)
    torch.manual_seed(1)
    model = create_model("compact_nano", num_classes=3, mixer="window", drop_path_rate=0.5, drop_rate=0.2)
    recipe = Recipe(epochs=2, batch_size=len(data.train) // 6, seed=6)
    assert digest(fit(model, data, recipe, tmp_path, progress=False)) != uninterrupted[0]


def test_a_damaged_or_planted_checkpoint_is_set_aside_and_the_run_ends_the_same(uninterrupted, tmp_path: Path) -> None:
    trained(tmp_path)
    whole = (tmp_path / "last.ckpt").read_bytes()
    (tmp_path / "last.ckpt").write_bytes(whole[: len(whole) // 2])
    told: list[str] = []
    module = trained(tmp_path, tell=told.append)
    assert (digest(module), module.history) == uninterrupted
    assert told[0].endswith("training goes on from the checkpoint before")
    assert "between the last step and its validation" in told[1]  # nothing would add the last epoch to the history
    for name in ("last.ckpt", "before.ckpt"):
        torch.save({"state_dict": Payload(tmp_path / "ran")}, tmp_path / name)
    module = trained(tmp_path, tell=told.append)
    assert (digest(module), module.history) == uninterrupted
    assert told[-1].endswith("before.ckpt.damaged-2, and training begins again")
    assert not (tmp_path / "ran").exists()
    assert sorted(path.name for path in tmp_path.glob("*.damaged*")) == [
        "before.ckpt.damaged", "before.ckpt.damaged-2", "last.ckpt.damaged", "last.ckpt.damaged-2"
    ]  # fmt: skip


class Payload:
    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self):
        return Path.touch, (self.flag,)


def test_a_run_of_other_data_or_another_recipe_begins_again(uninterrupted, tmp_path: Path) -> None:
    trained(tmp_path, recipe=Recipe(epochs=2, batch_size=8, seed=6))
    told: list[str] = []
    module = trained(tmp_path, tell=told.append)
    assert (digest(module), module.history) == uninterrupted
    assert "last.ckpt is of a run with other data or another recipe; it was set aside as last.ckpt.damaged" in told[0]
    told.clear()
    assert digest(trained(tmp_path, tell=told.append)) == uninterrupted[0]  # complete: nothing is trained again
    assert told == []


HELD = """
import sys
from pathlib import Path
from regard.files import alone_in
with alone_in(Path(sys.argv[1])):
    print("held", flush=True)
    input()
"""


def test_one_process_at_a_time_trains_in_a_folder(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HELD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(ValueError, match=r"another process works in .*: wait for it, or choose another folder"):
            trained(tmp_path)
        other.kill()
    with alone_in(tmp_path):
        pass


FULL = """
import resource, sys
from pathlib import Path
import torch
from regard.models import save_checkpoint
from regard.train.resume import RunFiles
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
for write in (lambda path: RunFiles().save_checkpoint({"a": torch.ones(9000)}, path / "last.ckpt"),
              lambda path: save_checkpoint(torch.nn.Linear(90, 90), path / "a.safetensors")):
    try:
        write(Path(sys.argv[1]))
    except OSError as error:
        print(error)
"""


def test_a_full_disk_is_one_sentence_and_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    RunFiles().save_checkpoint({"number": 1}, tmp_path / "last.ckpt")
    done = subprocess.run([sys.executable, "-c", FULL, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.count(f"cannot write in {tmp_path}: ") == 2
    assert read_checkpoint(tmp_path / "last.ckpt") == {"number": 1}
    assert [each.name for each in tmp_path.iterdir()] == ["last.ckpt"]


CHECKPOINT = {
    "none": None, "flag": True, "number": 3, "real": 0.1, "infinite": float("inf"), "text": "ü", "numpy": np.float32(0.5),
    "tuple": (1, [2, (3,)], {}), "by number": {0: {"step": torch.tensor(2.0)}, (1, 2): []},
    "array": np.arange(4, dtype=np.uint32),
    "tensors": [torch.arange(6).reshape(2, 3).T, torch.ones(2, dtype=torch.bfloat16), torch.zeros(0, 3), torch.tensor(True)],
}  # fmt: skip


def equal(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(equal, one, other))
    return one == other


def test_what_is_written_comes_back_with_its_types(tmp_path: Path) -> None:
    tied = torch.ones(3)
    content = CHECKPOINT | {"tied": [tied, tied[:2]]}
    write_checkpoint(content, tmp_path / "a")
    assert equal(content, read_checkpoint(tmp_path / "a"))
    with pytest.raises(TypeError, match=r"checkpoint\['deep'\]\[0\] is a Payload"):
        write_checkpoint({"deep": [Payload(tmp_path)]}, tmp_path / "b")


def test_any_changed_byte_is_noticed(tmp_path: Path) -> None:
    write_checkpoint(CHECKPOINT, tmp_path / "a")
    whole = (tmp_path / "a").read_bytes()
    for at in range(0, len(whole), 7):
        (tmp_path / "b").write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        try:
            found = read_checkpoint(tmp_path / "b")
        except ValueError as error:
            assert str(tmp_path / "b") in str(error)  # noqa: PT017  # a change of spaces alone may be read
        else:
            assert equal(CHECKPOINT, found)


def test_the_checkpoint_before_stays_beside_the_last_whole_one(tmp_path: Path) -> None:
    files, path = RunFiles(), tmp_path / "last.ckpt"
    for number in range(3):
        files.save_checkpoint({"number": number}, path)
    assert files.load_checkpoint(path) == {"number": 2}
    assert files.load_checkpoint(tmp_path / "before.ckpt") == {"number": 1}
    with pytest.raises(TypeError):
        files.save_checkpoint({"number": object()}, path)
    assert files.load_checkpoint(path) == {"number": 2}
    assert sorted(each.name for each in tmp_path.iterdir()) == ["before.ckpt", "last.ckpt"]


def test_a_checkpoint_of_another_model_or_program_is_not_gone_on_from(tmp_path: Path) -> None:
    told: list[str] = []
    write_checkpoint({"epoch": 1}, tmp_path / "last.ckpt")
    (tmp_path / "before.ckpt").mkdir()
    (tmp_path / ".last.ckpt.999999999").write_bytes(b"")
    assert resumable(tmp_path, torch.nn.Linear(2, 2), told.append) is None
    assert "is no checkpoint of a run: it has no callbacks" in told[0]
    assert "before.ckpt is not a file" in told[1]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["before.ckpt.damaged", "last.ckpt.damaged"]
