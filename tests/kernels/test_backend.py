"""One switch decides between Triton and PyTorch, per call or for all calls, and says clearly what cannot be."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from kernel_testing import DEVICE, normal

from redwhale.kernels import kernel_backend, rms_norm, set_kernel_backend
from redwhale.kernels.launch import captured_launches, compute_capability, multiprocessors

backend_module = import_module("redwhale.kernels.backend")


def started(**options) -> bool:
    """Whether a call of an operation starts Triton kernels."""
    x, weight = torch.empty(4, 16, device="meta"), torch.empty(16, device="meta")
    with captured_launches() as launches:
        rms_norm(x, weight, **options)
    return bool(launches)


def test_a_calls_choice_comes_before_the_global_one():
    with kernel_backend("triton"):
        assert started()
        assert not started(backend="torch")
        with kernel_backend("torch"):
            assert not started()
            assert started(backend="triton")
        assert started()
    assert started()  # auto plans for a GPU while starts are captured


def test_auto_leaves_what_is_not_on_a_gpu_to_pytorch():
    x = torch.randn(4, 16)
    assert not backend_module.use_triton("auto", x)
    assert not backend_module.use_triton("auto", x.to("meta"))


def test_the_global_choice_lasts_until_the_next_and_a_block_gives_it_back_after_an_error():
    set_kernel_backend("triton")
    try:
        with pytest.raises(ZeroDivisionError), kernel_backend("torch"):
            raise ZeroDivisionError
        assert started()
    finally:
        set_kernel_backend("auto")


def test_auto_takes_triton_on_a_gpu_and_pytorch_elsewhere():
    assert backend_module.use_triton("auto", normal(2, 4)) is (DEVICE.type == "cuda")
    assert not backend_module.use_triton("auto", torch.ones(2))
    assert not backend_module.use_triton("auto", torch.ones(2, dtype=torch.float64))


def test_unknown_backends_are_refused():
    for call in (lambda: set_kernel_backend("cuda"), lambda: rms_norm(torch.ones(2, 4), torch.ones(4), backend="cuda")):
        with pytest.raises(ValueError, match="kernel backend 'cuda' is not one of auto, triton, torch"):
            call()


def test_triton_for_cpu_tensors_names_the_interpreter(monkeypatch):
    monkeypatch.setattr(backend_module, "INTERPRETED", False)
    with pytest.raises(
        RuntimeError, match="runs on a GPU; on a CPU it needs Triton's interpreter: set TRITON_INTERPRET=1"
    ):
        rms_norm(torch.ones(2, 4), torch.ones(4), backend="triton")


def test_triton_refuses_float64_rather_than_rounding_it():
    x, weight = torch.ones(2, 4, dtype=torch.float64, device=DEVICE), torch.ones(4, dtype=torch.float64, device=DEVICE)
    with pytest.raises(TypeError, match="not torch.float64"):
        rms_norm(x, weight, backend="triton")
    assert rms_norm(x, weight).dtype == torch.float64


def test_without_triton_installed_everything_imports_and_runs_on_pytorch():
    program = """
import sys
sys.modules["triton"] = None  # importing it fails
import torch
from redwhale.kernels import rms_norm
import redwhale.engine, redwhale.model
x, weight = torch.ones(2, 4), torch.ones(4)
assert rms_norm(x, weight).allclose(x)
try:
    rms_norm(x, weight, backend="triton")
except RuntimeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == 'the backend "triton" needs the package triton, which is not installed'


def test_a_copy_of_the_kernels_imported_besides_leaves_their_operators_alone():
    program = """
import torch
from importlib import import_module
ours = import_module("redwhale.kernels.swiglu")
import_module("kernels")  # the same folder, as a package of its own
started = []
ours.launch = lambda *args, **options: started.append(args)
gate, up = torch.ones(2, 4, device=DEVICE), torch.ones(2, 4, device=DEVICE)
ours.swiglu(gate, up, backend="triton")
assert started
"""
    program, root = program.replace("DEVICE", repr(DEVICE.type)), Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", program], cwd=root, check=True)


def test_ahead_of_time_compilation_sees_the_chip_it_asks_for():
    x = torch.empty(1, device="meta")
    with captured_launches(80):
        assert compute_capability(x) == 80
        with captured_launches(100):
            assert compute_capability(x) == 100
        assert compute_capability(x) == 80
    assert multiprocessors(x) == 132
