"""Shared by all tests: one thread, one seed, and the same hypothesis examples on every run.

``REGARD_TEST_THREADS`` asks for more threads, ``REGARD_LANES`` for compiled kernels with vectors of 4, 8 or 16 numbers.
"""

import os
import sys

import pytest
import torch
from hypothesis import HealthCheck, settings

from regard.models import create_model, save_checkpoint
from regard.ops.compiled import library

if lanes := os.environ.get("REGARD_LANES"):
    library.FLAGS += ({"4": "-march=x86-64", "8": "-march=x86-64-v3", "16": "-march=x86-64-v4"}[lanes],)
    library.MACHINE = ((),)

settings.register_profile(
    "regard",
    deadline=None,
    derandomize=True,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
settings.load_profile("regard")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(int(os.environ.get("REGARD_TEST_THREADS", "1")))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_compiled_graphs() -> None:
    """A class is compiled only a few times over before torch gives up: forget what other tests compiled."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, str]:
    """A small vision transformer with random weights, and the file that has them."""
    torch.manual_seed(7)
    model = create_model("vit_tiny_patch16_224").eval()
    path = tmp_path_factory.mktemp("weights") / "mine.safetensors"
    save_checkpoint(model, path)
    return model, str(path)
