"""A run that is killed goes on exactly where it was."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from regard.data import photo_crops
from regard.models import create_model
from regard.train.fitting import Recipe, fit

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
    return fit(model, data, recipe, folder, progress=False, checkpoint_every=2, **options)


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
