"""The CUDA key search: its emulation on the CPU against the reference, its source under NVRTC, the GPU."""

import ctypes
import glob
import importlib.util
import math
import os
import sys
import sysconfig

import pytest
import torch
from test_ops import assert_close
from test_ops_key_search import DTYPES, check_search, name_of, search_case

from slm_fast import cuda_search, dispatch, ops, reference

_C = cuda_search._C
pytestmark = pytest.mark.skipif(_C is None, reason="extension not built")

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(cuda_search.available() is not None, reason=str(cuda_search.available()))


def search(query, keys, bias=None, mask=None, *, top_k, weighting="softmax", temperature=1.0, **options):
    options = {"min_similarity": None, "num_groups": None, "shift": None} | options
    return cuda_search.key_search(query, keys, bias, mask, top_k, weighting, temperature, *options.values())


def same_bits(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture
def plans(monkeypatch):
    """Force fields of the plan: other cuts of the same work must give the same bits."""
    real = cuda_search.plan.__wrapped__

    def force(**fields):
        def plan(num_queries, num_keys, dim, key_size, aligned, top_k, num_sms):
            chosen = real(num_queries, num_keys, dim, key_size, aligned, top_k, num_sms)._replace(**fields)
            per_query = (4 * chosen.row_size if chosen.staged else 0) + 8 * cuda_search.WARPS * top_k
            return chosen._replace(shared_bytes=chosen.queries * per_query)

        monkeypatch.setattr(cuda_search, "plan", plan)

    return force


@pytest.mark.parametrize("num_queries", [0, 1, 3, 9])
@pytest.mark.parametrize("num_keys", [0, 1, 63, 100, 1000, 5000])
@pytest.mark.parametrize("key_dtype", DTYPES, ids=name_of)
def test_emulation_sizes(num_queries, num_keys, key_dtype):
    for dim, top_k in [(1, 4), (7, 64), (48, 1), (100, 4), (384, 64), (768, 4)]:
        query, keys = search_case(num_queries, num_keys, dim, key_dtype)
        check_search(search(query, keys, top_k=top_k), query, keys.float(), top_k=top_k)


@pytest.mark.parametrize("num_keys", [200, 4500])
@pytest.mark.parametrize("weighting", reference.WEIGHTINGS)
@pytest.mark.parametrize("masked", ["none", "shared", "per_query", "all"])
def test_emulation_options(weighting, masked, num_keys):
    query, keys = search_case(9, num_keys, 48)
    g = torch.Generator().manual_seed(1)
    bias = torch.randn(num_keys, generator=g) - 5
    mask = {
        "none": None,
        "shared": torch.rand(num_keys, generator=g) < 0.02,
        "per_query": torch.rand(9, num_keys, generator=g) < 4 / num_keys,
        "all": torch.zeros(num_keys, dtype=torch.bool),
    }[masked]
    for min_similarity in (None, 3.0):
        options = {"weighting": weighting, "temperature": 0.7, "min_similarity": min_similarity, "top_k": 5}
        check_search(search(query, keys, bias, mask, **options), query, keys, bias, mask, **options)


@pytest.mark.parametrize("num_keys", [300, 5000])
def test_emulation_transforms(num_keys):
    query, keys = search_case(5, num_keys, 96, torch.bfloat16)
    query[1, :48] = 0  # a group without a direction stays 0
    for transform in ({"num_groups": 2}, {"num_groups": 96}, {"shift": torch.linspace(-1, 1, 96)}):
        found = search(query, keys, top_k=6, **transform)
        transformed = reference.transform_query(query, **transform)
        check_search(found, transformed, keys.float(), top_k=6)


@pytest.mark.parametrize("num_keys", [500, 5000])
def test_emulation_ties_break_by_the_lower_index(num_keys):
    keys = torch.ones(num_keys, 8)
    keys[[40, 400, num_keys - 1]] = 2
    indices, _, _ = search(torch.ones(2, 8), keys, top_k=6)
    assert indices.tolist() == [[40, 400, num_keys - 1, 0, 1, 2]] * 2


@pytest.mark.parametrize("key_dtype", DTYPES, ids=name_of)
def test_emulation_same_bits_for_any_plan(plans, key_dtype):
    query, keys = search_case(9, 4200, 72, key_dtype)
    want = search(query, keys, top_k=5)
    assert same_bits([t[3:4] for t in want], search(query[3:4], keys, top_k=5))
    for queries, slices in [(1, 1), (2, 7), (4, 64), (8, 1051), (8, 3)]:
        plans(queries=queries, slices=slices)
        assert same_bits(want, search(query, keys, top_k=5))
    plans(queries=1, slices=5, wide=False)
    assert same_bits(want, search(query, keys, top_k=5))


def test_emulation_of_queries_too_long_for_shared_memory():
    query, keys = search_case(2, 40, 30000, torch.float16)
    chosen = cuda_search.plan(2, 40, 30000, 2, True, 4, 132)
    assert not chosen.staged and not chosen.wide and chosen.shared_bytes <= cuda_search.SHARED_BYTES
    shift = torch.ones(30000)
    found = search(query, keys, top_k=4, shift=shift)
    exact = (query - shift).double() @ keys.double().T
    own = reference.key_search(query - shift, keys, top_k=4)[2]
    assert_close(found[2], exact.topk(4).values, own)


@pytest.mark.parametrize("num_keys", [100, 5000])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_emulation_marks_queries_that_are_not_finite(num_keys, bad):
    query, keys = search_case(4, num_keys, 24)
    want = search(query, keys, top_k=3)
    query[2, 5] = bad
    for transform in ({}, {"num_groups": 3}, {"shift": torch.zeros(24)}):
        indices, weights, scores = search(query, keys, top_k=3, **transform)
        assert indices[2].tolist() == [0] * 3 and weights[2].isnan().all() and scores[2].isnan().all()
        assert not weights[[0, 1, 3]].isnan().any()
    assert same_bits([t[:2] for t in want], [t[:2] for t in search(query, keys, top_k=3)])


@pytest.mark.parametrize("num_queries", [1, 2, 9, 131, 133, 5000])
@pytest.mark.parametrize("num_keys", [0, 4096, 4097, 1_000_000])
@pytest.mark.parametrize("dim", [1, 384, 768, 4096])
def test_plan(num_queries, num_keys, dim):
    for top_k in (1, 64):
        chosen = cuda_search.plan(num_queries, num_keys, dim, 2, True, top_k, 132)
        assert chosen.shared_bytes <= cuda_search.SHARED_BYTES
        assert (chosen.slices == 1) or num_keys > cuda_search.ONE_LAUNCH_KEYS
        lists = num_queries * top_k * chosen.slices
        assert chosen.slices == 1 or lists <= 8 * 64 * 2 * 132
    if num_keys == 1_000_000 and dim == 768 and num_queries <= 8:
        assert chosen.queries >= min(num_queries, 8) and chosen.slices == (264 if num_queries == 1 else 132)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"slices": 0}, "slices"),
        ({"queries": 3}, "queries of a block"),
        ({"row_size": 24}, "row_size"),
        ({"shared_bytes": 16}, "shared_bytes"),
        ({"wide": True}, "16-byte"),
    ],
    ids=name_of,
)
def test_the_extension_refuses_wrong_plans(monkeypatch, fields, message):
    query, keys = search_case(2, 50, 23)
    real = cuda_search.plan.__wrapped__
    monkeypatch.setattr(cuda_search, "plan", lambda *args: real(*args)._replace(**fields))
    with pytest.raises(ValueError, match=message):
        search(query, keys, top_k=3, num_groups=1)


def test_a_launch_without_a_device_says_why():
    if not _C.has_cuda or torch.cuda.is_available():
        pytest.skip("needs an extension with CUDA and no device")
    query, keys = search_case(1, 8, 16)
    out = [torch.empty(1, 1, dtype=dtype) for dtype in (torch.int32, torch.float32, torch.float32)]
    chosen = cuda_search.plan(1, 8, 16, 4, True, 1, 132)
    pointers = [t.data_ptr() for t in out]
    arguments = [
        query.data_ptr(),
        keys.data_ptr(),
        0,
        0,
        0,
        0,
        0,
        0,
        1,
        8,
        16,
        1,
        1,
        1.0,
        -math.inf,
        *pointers,
    ]
    with pytest.raises(RuntimeError, match="CUDA"):
        _C.key_search_cuda(0, 0, *arguments, *chosen, 0, 0)


def find_nvrtc():
    """NVRTC from SLM_FAST_NVRTC, the nvidia-cuda-nvrtc package, or the system."""
    folders = [sysconfig.get_path("purelib"), *sys.path]
    packaged = (f"{folder}/nvidia/*/lib/libnvrtc.so.*" for folder in folders)
    candidates = [os.environ.get("SLM_FAST_NVRTC"), *(path for p in packaged for path in glob.glob(p))]
    for path in [*filter(None, candidates), "libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12"]:
        try:
            return ctypes.CDLL(path)
        except OSError:
            continue
    return None


def nvrtc_compile(nvrtc, source: str, names: list[str], arch: int) -> str:
    """Compile to machine code; returns the log, raises AssertionError with it."""
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"a.cu", 0, None, None) == 0
    for name in names:
        assert nvrtc.nvrtcAddNameExpression(program, name.encode()) == 0
    options = [b"-std=c++17", f"-arch=sm_{arch}".encode()]
    status = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    assert status == 0, log.value.decode()
    assert nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)) == 0 and size.value > 0
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return log.value.decode()


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_nvrtc_accepts_the_source(arch):
    nvrtc = find_nvrtc()
    if nvrtc is None:
        pytest.skip("no libnvrtc: pip install nvidia-cuda-nvrtc, or set SLM_FAST_NVRTC")
    names = ["slm::key_search_merge_kernel", "slm::key_search_kernel<0, 1, false>"]
    names += ["slm::key_search_kernel<1, 8, true>", "slm::key_search_kernel<2, 1, true>"]
    log = nvrtc_compile(nvrtc, _C.cuda_source, names, arch)
    assert "warning" not in log, log


@gpu
@needs_gpu
@pytest.mark.parametrize("key_dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("num_keys", [0, 1, 63, 1000, 4096, 5000, 70000])
def test_gpu_against_emulation_and_itself(key_dtype, num_keys):
    for num_queries, dim, top_k in [(1, 768, 4), (3, 100, 64), (9, 7, 4), (300, 384, 4)]:
        query, keys = search_case(num_queries, num_keys, dim, key_dtype)
        bias, mask = torch.randn(num_keys), torch.rand(num_queries, num_keys) < 0.9
        on_gpu = [t.cuda() for t in (query, keys, bias, mask)]
        found = search(*on_gpu, top_k=top_k)
        assert all(same_bits(found, search(*on_gpu, top_k=top_k)) for _ in range(20))
        found = [t.cpu() for t in found]
        check_search(found, query, keys.float(), bias, mask, top_k=top_k)
        if num_queries * num_keys <= 50000:
            want = search(query, keys, bias, mask, top_k=top_k)
            assert same_bits(found[::2], want[::2])  # indices and scores; expf differs


@gpu
@needs_gpu
@pytest.mark.parametrize("transform", ["num_groups", "shift"])
def test_gpu_through_the_op(transform):
    if dispatch.available().get("gpu", "unknown") is not None:
        pytest.skip("dispatch has no gpu backend here")
    query, keys = search_case(9, 6000, 96, torch.bfloat16)
    options = {"num_groups": 6} if transform == "num_groups" else {"shift": torch.randn(96)}
    on_gpu = {name: value.cuda() if torch.is_tensor(value) else value for name, value in options.items()}
    found = ops.key_search(query.cuda(), keys.T.contiguous().T.cuda(), top_k=5, **on_gpu)
    transformed = reference.transform_query(query, **options)
    check_search([t.cpu() for t in found], transformed, keys.float(), top_k=5)


@gpu
@needs_gpu
def test_gpu_marks_queries_that_are_not_finite():
    query, keys = search_case(9, 6000, 64)
    query[4, 3] = math.nan
    indices, weights, scores = search(query.cuda(), keys.cuda(), top_k=4, num_groups=4)
    assert not indices[4].any() and weights[4].isnan().all() and scores[4].isnan().all()
    assert not weights[[0, 8]].isnan().any()


@gpu
@needs_gpu
@pytest.mark.parametrize("num_keys", [1000, 20000])
def test_gpu_graph_capture(num_keys):
    query, keys = (t.cuda() for t in search_case(4, num_keys, 256, torch.bfloat16))
    shift = torch.randn(256, device="cuda")
    search(query, keys, top_k=4, shift=shift)  # compiles where CuPy does
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = search(query, keys, top_k=4, shift=shift)
    query.copy_(torch.randn_like(query))
    graph.replay()
    assert same_bits(captured, search(query, keys, top_k=4, shift=shift))


@gpu
@needs_gpu
@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="CuPy is not installed")
@pytest.mark.parametrize("num_keys", [1000, 20000])
def test_gpu_cupy_gives_the_same_bits(monkeypatch, num_keys):
    query, keys = (t.cuda() for t in search_case(9, num_keys, 256, torch.bfloat16))
    want = search(query, keys, top_k=4)
    fake = type("WithoutNvcc", (), {"has_cuda": False, "cuda_source": _C.cuda_source})
    monkeypatch.setattr(cuda_search, "_C", fake)
    assert same_bits(want, search(query, keys, top_k=4))


def test_a_fallback_is_said_once(caplog):
    cuda_search.warn_of_fallback.cache_clear()
    for _ in range(2):
        cuda_search.warn_of_fallback("CuPy is missing")
    assert [record.getMessage() for record in caplog.records] == [
        "key search on the GPU falls back to PyTorch, several times slower: CuPy is missing"
    ]
