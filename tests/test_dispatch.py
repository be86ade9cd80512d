import subprocess
import sys

import pytest
import torch

from slm_fast import dispatch

needs_extension = pytest.mark.skipif(dispatch.available()["cpu"] is not None, reason="extension not built")


def test_reference_is_always_there():
    assert dispatch.available()["reference"] is None


def test_available_is_a_copy():
    dispatch.available()["reference"] = "broken"
    assert dispatch.available()["reference"] is None


@needs_extension
def test_select_by_device(monkeypatch):
    monkeypatch.delenv("SLM_FAST_BACKEND", raising=False)
    assert dispatch.select(torch.empty(1)) == "cpu"
    assert dispatch.select(torch.empty(1, device="meta")) == "reference"
    assert dispatch.select(torch.empty(1), "auto") == "cpu"


def test_environment_and_argument(monkeypatch):
    monkeypatch.setenv("SLM_FAST_BACKEND", "reference")
    assert dispatch.select(torch.empty(1)) == "reference"
    if dispatch.available()["cpu"] is None:
        assert dispatch.select(torch.empty(1), "cpu") == "cpu"


@pytest.mark.parametrize("where", ["argument", "environment"])
def test_unknown_backend_names_the_known(monkeypatch, where):
    if where == "environment":
        monkeypatch.setenv("SLM_FAST_BACKEND", "tpu")
    with pytest.raises(ValueError, match="unknown backend 'tpu'; known: cpu, gpu, reference"):
        dispatch.select(torch.empty(1), "tpu" if where == "argument" else None)


@needs_extension
def test_wrong_device():
    with pytest.raises(ValueError, match="cannot run on a tensor on meta"):
        dispatch.select(torch.empty(1, device="meta"), "cpu")


def test_missing_extension_falls_back_and_keeps_the_reason():
    code = """
import sys
sys.modules["slm_fast._C"] = None
import torch
from slm_fast import dispatch
assert "not built" in dispatch.available()["cpu"]
assert dispatch.select(torch.empty(1)) == "reference"
try:
    dispatch.select(torch.empty(1), "cpu")
except ValueError as error:
    assert "not built" in str(error)
else:
    raise SystemExit(1)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@needs_extension
@pytest.mark.parametrize("name", ["pentium", "avx512_bf16"])
def test_isa_that_cannot_run_is_an_error(monkeypatch, name):
    from slm_fast import _C

    if name in _C.isa_supported():
        pytest.skip("supported here")
    monkeypatch.setenv("SLM_FAST_ISA", name)
    start = "import torch; from slm_fast import dispatch, ops; torch.set_num_threads(2); "
    slabs = "*torch.zeros(2, 8, 576), torch.zeros(1).int(), torch.tensor([8]).int(), torch.ones(1)"
    routing = "torch.zeros(32, 1).int(), torch.ones(32, 1)"
    for code in (
        "dispatch.select(torch.empty(1))",
        f"ops.mixture(*torch.zeros(2, 32, 576), {slabs}, {routing})",  # enough for two threads, as below
        "ops.key_search(torch.zeros(32, 64), torch.zeros(1000, 64), top_k=1)",
    ):
        result = subprocess.run([sys.executable, "-c", start + code], capture_output=True, text=True)
        assert result.returncode == 1 and "ValueError: SLM_FAST_ISA" in result.stderr, code


@needs_extension
def test_shares_torchs_thread_pool():
    if sys.platform == "linux":
        assert dispatch.cpu_info()["thread_pool"] == "gomp"


@needs_extension
def test_cuda_devices():
    from slm_fast import _C

    if not _C.has_cuda:
        assert not hasattr(_C, "cuda_devices")
    elif torch.cuda.is_available():
        assert _C.cuda_devices()[0][0] == torch.cuda.get_device_name(0)
    else:
        with pytest.raises(RuntimeError, match="CUDA"):
            _C.cuda_devices()
