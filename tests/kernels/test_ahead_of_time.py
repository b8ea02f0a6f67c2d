"""Every Triton kernel compiles for Ampere, Hopper and Blackwell, and fits their multiprocessors without spilling."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CAPABILITIES = (80, 90, 100)
MATRIX_PRODUCTS = {"low_rank_gemm", "swiglu_low_rank_forward", "swiglu_low_rank_backward"}
"""Kernels that multiply matrices; the others touch none of the tensor cores."""

pytest.importorskip("triton", reason="Triton is not available on this platform")


@pytest.fixture(scope="module")
def resources(tmp_path_factory):
    """One row for each kernel, capability, and set of constants that the operations start at SOLAR's shapes."""
    table = tmp_path_factory.mktemp("resources") / "table.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = [sys.executable, ROOT / "bench" / "kernel_resources.py", "--json", table]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(table.read_text(encoding="utf-8"))


SIZES_OF_ONE = """
import sys, torch, kernel_cases
from kernel_resources import compiled_launches
from redwhale.kernels import seeded_dropout

@kernel_cases.case("threshold_of_one")
def _(shapes, device, dtype):
    x, seed = torch.empty(3, 5, device=device, dtype=dtype), torch.empty(1, device=device, dtype=torch.int64)
    return lambda: seeded_dropout(x, seed, 2**-32, backend="triton")

shapes = kernel_cases.Shapes(1, 1, 1, 1, 1, 2, 38, (1,))
for name in kernel_cases.CASES:
    print(*(row["kernel"] for row in compiled_launches(name, 90, shapes)), sep="\\n")
"""


def described(row) -> str:
    return f"{row['kernel']} {row['constants']} on sm_{row['capability']}"


def kernels_in_sources() -> set[str]:
    """Names of all functions decorated with `triton.jit` that functions without the decorator name, to start them."""
    found = set()
    for path in (ROOT / "kernels").glob("*.py"):
        functions = [n for n in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(n, ast.FunctionDef)]
        kernels = {f.name for f in functions if any(ast.unparse(d).startswith("triton.jit") for d in f.decorator_list)}
        for function in functions:
            if function.name not in kernels:
                names = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
                found |= {name.lstrip("_") for name in kernels & names}
    return found


def test_every_kernel_is_compiled_for_every_capability(resources):
    for capability in CAPABILITIES:
        compiled = {row["kernel"] for row in resources if row["capability"] == capability}
        assert compiled == kernels_in_sources()


def test_every_kernel_compiles_where_sizes_and_strides_are_one():
    # Triton makes constants of integer arguments of 1, which its interpreter does not.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = [sys.executable, "-c", SIZES_OF_ONE]
    done = subprocess.run(script, env=environment, cwd=ROOT / "bench", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == kernels_in_sources()


def test_no_kernel_spills_registers(resources):
    assert [f"{described(row)}: {row['spilled_bytes']} bytes" for row in resources if row["spilled_bytes"]] == []


def test_every_kernel_fits_the_shared_memory_of_a_multiprocessor(resources):
    assert [described(row) for row in resources if row["shared_bytes"] > row["shared_limit"]] == []


@pytest.mark.parametrize(("capability", "instruction"), [(80, "mma.sync"), (90, "wgmma"), (100, "tcgen05")])
def test_matrix_products_use_the_tensor_cores_of_their_generation(resources, capability, instruction):
    rows = [row for row in resources if row["capability"] == capability and row["kernel"] in MATRIX_PRODUCTS]
    assert {row["kernel"] for row in rows} == MATRIX_PRODUCTS
    for row in rows:
        assert row["matrix_instructions"], described(row)
    large = [row for row in rows if row["kernel"] == "low_rank_gemm"]
    assert [described(row) for row in large if instruction not in row["matrix_instructions"]] == []
