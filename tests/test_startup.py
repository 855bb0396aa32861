"""What importing regard costs, and what it brings along."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest

import regard

HEAVY = ("torch._dynamo", "torch._inductor", "triton", "lightning", "gradio", "scipy", "matplotlib", "sklearn", "sympy")
ALL = "import regard; [getattr(regard, name) for name in regard.__all__]"


def answered(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def loaded(code: str) -> set[str]:
    return set(answered(f"import sys\n{code}\nprint(*sys.modules)").split())


def test_regard_loads_nothing_heavy_beyond_what_torch_loads() -> None:
    more = loaded(ALL) - loaded("import torch")
    assert not [name for name in more if name.startswith(HEAVY)]
    assert {name.partition(".")[0] for name in more} - sys.stdlib_module_names <= {"regard", "safetensors"} | {
        name for name in more if name.startswith("_sysconfigdata")
    }


def test_importing_the_front_door_loads_no_room_above_the_operators() -> None:
    front = loaded("from regard import attend, Source, merge, patterns, plan")
    rooms = ("layers", "models", "lens", "bench", "data", "losses", "train", "app", "compat", "catalog", "commands")
    assert not [name for name in front if name.startswith(tuple(f"regard.{room}" for room in rooms))]


def test_the_version_is_known_without_torch() -> None:
    assert answered("import sys, regard; print(regard.__version__, 'torch' in sys.modules)") == f"{regard.__version__} False"


@pytest.mark.parametrize("name", regard.__all__)
def test_every_name_is_found_from_a_fresh_start_and_listed(name) -> None:
    assert name in dir(regard)
    found = getattr(regard, name)
    assert isinstance(found, types.ModuleType) or found.__module__.startswith("regard.")
    assert getattr(regard, name) is found


def test_names_and_rooms_come_by_any_way_of_importing() -> None:
    answered("from regard import *; attend, create_mixer, lens.capture, bench.count")
    answered(
        "import regard; regard.lens.capture; regard.layers.mixers.create_mixer; regard.models.create_model; regard.ops.attend"
    )
    answered("import regard.lens, regard; regard.bench.count")
    answered("import regard; regard.compat.natten.install, regard.compat.dinat.mend, regard.data.photograph, regard.losses")


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'regard' has no attribute 'atend'"):
        regard.atend  # noqa: B018  # asking is the test
    with pytest.raises(ImportError, match="cannot import name 'atend'"):
        from regard import atend  # noqa: F401


COUNTS = """
import torch
{before}
import regard
x = torch.randn(1, 8, 8, 2, 16)
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    regard.attend(x, x, x, "window(4)")
print(counter.get_total_flops())
"""


@pytest.mark.parametrize("before", ["", "import torch.utils.flop_counter", "from regard import attend"])
def test_torch_counts_operators_of_regard_whichever_is_imported_first(before) -> None:
    assert int(answered(COUNTS.format(before=before))) == 2 * 2 * 64 * 16 * 2 * 16  # products, heads, queries, keys, channels


def test_a_compiled_function_may_be_the_first_to_ask_for_attention() -> None:
    code = """
import torch, regard
x = torch.randn(1, 8, 8, 2, 16)
made = torch.compile(lambda x: regard.attend(x, x, x, "window(4)"), backend="eager", fullgraph=True)(x)
torch.testing.assert_close(made, regard.attend(x, x, x, "window(4)", backend="reference"))
"""
    answered(code)
