"""Several threads at once: each sees, counts and plans its own, as if it were alone, also while caches are emptied."""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

import regard
from regard import attend, plan
from regard import patterns as P
from regard.bench import count
from regard.bench.usage import flops
from regard.lens import capture
from regard.ops.attention.transposed import attend_transposed
from regard.ops.calls.observe import OBSERVERS, WATCHERS

THREADS = 6
ROUNDS = 4
TEXTS = (
    "window(3)",
    "neighborhood(3)",
    "axis(0) | axis(1)",
    "window(2) | window(3, shift=1)",
    "halo(2, 1)",
    "causal",
    "grid(2)",
)
MODELS = {
    "swin_tiny_patch4_window7_224": {"dim": 8, "head_dim": 4, "depths": (2, 1, 1, 1)},
    "dinat_mini": {"dim": 8, "head_dim": 4, "depths": (1, 1, 1, 2)},
    "biformer_tiny": {"dim": 8, "head_dim": 4, "depths": (1, 1, 1, 1)},
    "compact_nano": {},
    "deit_tiny_patch16_224": {"depth": 2, "dim": 24, "head_dim": 8},
    "volo_d1_224": {"dim": 8, "head_dim": 4, "stem_dim": 4, "depths": (1, 1, 1, 1)},
}


@pytest.fixture(autouse=True)
def _threads_take_turns_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)
    assert not OBSERVERS
    assert not WATCHERS


def at_once(*works: Callable[[], Any], rounds: int = ROUNDS, beside: Callable[[], object] | None = None) -> list[list[Any]]:
    """What each work gives, over and over, in threads that start together; ``beside`` is called until all are done."""
    start = threading.Barrier(len(works))

    def repeated(work: Callable[[], Any]) -> list[Any]:
        start.wait()
        return [work() for _ in range(rounds)]

    with ThreadPoolExecutor(len(works)) as pool:
        running = [pool.submit(repeated, work) for work in works]
        while beside is not None and not all(one.done() for one in running):
            beside()
        return [one.result() for one in running]


@pytest.fixture(scope="module")
def models() -> list[nn.Module]:
    torch.manual_seed(0)
    return [regard.create_model(name, num_classes=3, **table).eval() for name, table in MODELS.items()]


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_captures_of_six_models_at_once_have_their_own_maps(models, image):
    def seen(model: nn.Module) -> list[tuple[str, str, int, list[torch.Tensor]]]:
        with torch.no_grad(), capture(model) as maps:
            model(image)
        return [(found.name, found.kind, found.call, list(found.weights)) for found in maps]

    alone = [seen(model) for model in models]
    together = at_once(*(lambda model=model: seen(model) for model in models))
    for expected, rounds in zip(alone, together, strict=True):
        assert expected
        for found in rounds:
            assert [one[:3] for one in found] == [one[:3] for one in expected]
            for one, other in zip(found, expected, strict=True):
                for weights, wanted in zip(one[3], other[3], strict=True):
                    torch.testing.assert_close(weights, wanted, rtol=1e-5, atol=1e-6)


def test_counts_of_six_threads_are_those_of_each_alone(models, image):
    def counted(model: nn.Module):
        with torch.no_grad(), count() as cost:
            model(image)
        return cost.layers

    alone = [counted(model) for model in models]
    together = at_once(*(lambda model=model: counted(model) for model in models))
    assert together == [[expected] * ROUNDS for expected in alone]


def test_floating_point_operations_of_six_threads_are_those_of_each_alone(models, image):
    alone = [flops(model, image) for model in models]
    together = at_once(*(lambda model=model: flops(model, image) for model in models))
    assert together == [[expected] * ROUNDS for expected in alone]


def test_plans_of_six_threads_are_those_of_each_alone():
    patterns = ["neighborhood(3)", "window(4)", "window(4, shift=2)", "axis(0) | axis(1)", "causal", "grid(2) | window(2)"]

    def planned(pattern: str) -> str:
        regard.clear_caches()
        return str(regard.plan(pattern, (12, 10), heads=2, head_dim=8))

    alone = [planned(pattern) for pattern in patterns]
    together = at_once(*(lambda pattern=pattern: planned(pattern) for pattern in patterns))
    assert together == [[expected] * ROUNDS for expected in alone]


def test_threads_that_look_at_one_model_of_torch_each_see_it_and_leave_it_as_it_was():
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False
    ).eval()
    inputs = torch.randn(THREADS, 1, 5, 8, generator=torch.Generator().manual_seed(0))

    def seen(x: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        with torch.no_grad(), capture(encoder) as maps:
            encoder(x)
        return [(found.name, found.weights[0]) for found in maps]

    alone = [seen(x) for x in inputs]
    for expected, rounds in zip(alone, at_once(*(lambda x=x: seen(x) for x in inputs)), strict=True):
        for found in rounds:
            assert [name for name, _ in found] == [name for name, _ in expected] == ["layers.0.self_attn", "layers.1.self_attn"]
            for (_, weights), (_, wanted) in zip(found, expected, strict=True):
                torch.testing.assert_close(weights, wanted, rtol=1e-5, atol=1e-6)
    assert not any("forward" in vars(module) for module in encoder.modules())


def test_threads_that_look_at_one_model_of_transformers_each_see_it_and_leave_it_as_it_was():
    transformers = pytest.importorskip("transformers", reason="asks for models of transformers")
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4
    )
    model = transformers.ViTModel(config).eval()
    configs = [m.config for m in model.modules() if hasattr(m, "config")]
    images = torch.randn(THREADS, 1, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def seen(image: torch.Tensor) -> list[torch.Tensor]:
        with torch.no_grad(), capture(model) as maps:
            model(image)
        return [w for found in maps for w in found.weights]

    alone = [seen(image) for image in images]
    for expected, rounds in zip(alone, at_once(*(lambda image=image: seen(image) for image in images)), strict=True):
        for found in rounds:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert all(
        before is m.config for before, m in zip(configs, (m for m in model.modules() if hasattr(m, "config")), strict=True)
    )


def test_an_operator_made_of_attentions_hides_none_of_another_thread():
    mixer = regard.create_mixer("multi_head", dim=8, heads=2)
    x, q = torch.randn(1, 4, 4, 8), torch.randn(1, 4, 4, 2, 4)
    stop = threading.Event()

    def sending() -> None:
        with torch.no_grad():
            while not stop.is_set():
                attend_transposed(q, q, q)

    thread = threading.Thread(target=sending)
    thread.start()
    try:
        for _ in range(30):
            with torch.no_grad(), capture(mixer) as maps:
                mixer(x)
            assert [found.kind for found in maps] == ["attention"]
    finally:
        stop.set()
        thread.join()


def test_gradients_arrive_at_the_maps_of_the_thread_that_ran_the_model():
    mixers = [regard.create_mixer("multi_head", dim=8, heads=2) for _ in range(THREADS)]
    x = torch.randn(1, 4, 4, 8, generator=torch.Generator().manual_seed(0))

    def derived(mixer: nn.Module) -> torch.Tensor:
        with capture(mixer, gradients=True) as maps:
            mixer(x).square().sum().backward()
        (found,) = maps
        return found.gradients[0]

    alone = [derived(mixer) for mixer in mixers]
    for expected, rounds in zip(alone, at_once(*(lambda mixer=mixer: derived(mixer) for mixer in mixers)), strict=True):
        torch.testing.assert_close(rounds, [expected] * ROUNDS, rtol=1e-5, atol=1e-6)


def turns(number: int) -> Callable[[], str]:
    """The texts in turn, each thread from another one on."""
    return lambda texts=itertools.cycle(TEXTS[number:] + TEXTS[:number]): next(texts)


def test_threads_attend_while_the_caches_are_emptied():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 5, 6, 2, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    expected = {text: attend(q, k, v, text, backend="reference") for text in TEXTS}

    def attending(number: int) -> Callable[[], None]:
        following = turns(number)

        def work() -> None:
            text = following()
            for backend in ("auto", "dense"):
                torch.testing.assert_close(attend(q, k, v, text, backend=backend), expected[text], atol=1e-11, rtol=1e-9)

        return work

    at_once(*map(attending, range(THREADS)), rounds=12, beside=regard.clear_caches)


def test_threads_read_plan_and_mask_while_the_caches_are_emptied():
    grid = (5, 6)
    expected = {text: (repr(P.parse(text)), P.parse(text).mask(grid), plan(text, grid).as_dict()) for text in TEXTS}

    def reading(number: int) -> Callable[[], None]:
        following = turns(number)

        def work() -> None:
            text = following()
            shown, mask, planned = expected[text]
            pattern = P.parse(text)
            assert repr(pattern) == shown
            assert torch.equal(pattern.mask(grid), mask)
            assert int(pattern.degree(grid).sum()) == int(mask.sum())
            assert plan(text, grid).as_dict() == planned

        return work

    at_once(*map(reading, range(THREADS)), rounds=10, beside=regard.clear_caches)
    assert all(held.size <= held.most for held in regard.cache_info().values())
