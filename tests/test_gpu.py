"""What only a GPU can show: bf16 numerics, repetitions under load, graphs, compilations, waiting, offsets.

Other tests run the kernels on the device where there is one; the key search's own are in test_cuda_search.py.
"""

import contextlib
import copy
import random

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, clustered_embeddings, tiny_model
from gpu_problem import DTYPE, LINEARS, OPS, SQUARE, Problem, forward, verify, waiting_is_an_error
from test_ops import assert_close
from test_ops_key_search import name_of

from slm_fast import dispatch, ops, plan

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

MISSING = dispatch.available()["gpu"] or (None if torch.cuda.is_available() else "torch sees no CUDA device")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(MISSING is not None, reason=str(MISSING))]

LENGTHS = {
    "1": (1,),
    "8 rows": (1,) * 8,
    "64 rows": (1,) * 64,
    "ragged": (3, 0, 130, 1, 77),
    "prefill": (128,) * 8,
}
ODD = (100, 63)


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that nobody wrote is NaN."""
    empty, empty_like = torch.empty, torch.empty_like

    def nan(tensor):
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: nan(empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: nan(empty_like(*args, **kwargs)))


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("op", OPS)
def test_bf16(poisoned, op, lengths):
    verify(Problem(op, LENGTHS[lengths]))


@pytest.mark.parametrize("ranks", [(1,), (3,) * 5, (12, 1, 8, 3), (48, 12)], ids=name_of)
@pytest.mark.parametrize("op", OPS)
def test_bf16_odd_sizes(poisoned, op, ranks):
    verify(Problem(op, (3, 0, 130, 1, 77), ranks=ranks, features=ODD))


@pytest.mark.parametrize("lengths", ["8 rows", "prefill"])
@pytest.mark.parametrize("op", LINEARS)
def test_bf16_behind_a_norm(op, lengths):
    norm = Problem("norm_shrink" + (" resident" if op == "fused_linear" else ""), LENGTHS[lengths])
    problem = Problem(op, LENGTHS[lengths])
    with torch.no_grad():
        h, u = norm.call()
        for name in ("indices", "weights", "dense"):
            problem.values[name] = norm.values[name]
        problem.scaling = norm.scaling
        problem.values |= {"x": h, "A": [norm.values["A"][1]]}
        (got,) = problem.call(u=u[1])
        (exact,), (same,) = problem.call("reference", problem.cast(torch.float32)), problem.call("reference")
    assert_close(got, exact, same, DTYPE)


def load_another_stream(stream, a):
    with torch.cuda.stream(stream):
        for _ in range(30):
            a @ a


@pytest.mark.parametrize("op", OPS)
def test_repetitions_beside_another_stream_give_the_same_bits(op):
    """128 tokens of each of 32 rows, and a batch that decodes: enough programs for every multiprocessor."""
    stream, a = torch.cuda.Stream(), torch.randn(4096, 4096, device=DEVICE, dtype=DTYPE)
    large, decoding = Problem(op, (128,) * 32), Problem(op, (1,) * 64)
    first = large.train(), forward(large), forward(decoding)
    assert all(t.isfinite().all() for t in first[0])
    for _ in range(20):
        load_another_stream(stream, a)
        again = large.train(), forward(large), forward(decoding)
        for got, want in zip(again, first, strict=True):
            assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def capture(run):
    """(graph, what `run` returned inside)"""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = run()
    return graph, captured


@pytest.mark.parametrize("lengths", ["1", "8 rows", "ragged", "prefill"])
@pytest.mark.parametrize("op", OPS)
def test_graph_replays_follow_their_inputs(op, lengths):
    problem = Problem(op, LENGTHS[lengths])
    with torch.no_grad():
        graph, captured = capture(problem.call)
        for weights in (True, False, True):
            problem.redraw(weights)
            for out in captured:
                out.fill_(torch.nan)
            graph.replay()
            for got, want in zip(captured, problem.call(), strict=True):
                assert torch.equal(got, want)
            if not weights and op == "mixture":
                assert torch.equal(captured[0], problem.values["y"])


@contextlib.contextmanager
def variants():
    """The names of the kernel variants that Triton makes inside: compiled, or taken from its disk cache."""
    names, runtime = [], triton.knobs.runtime
    before = runtime.jit_cache_hook

    def note(*, fn, **_):  # called for each variant that this process has not launched yet
        names.append(fn.name)

    runtime.jit_cache_hook = note
    try:
        yield names
    finally:
        runtime.jit_cache_hook = before


@triton.jit
def _probe_kernel(out_ptr, number, BLOCK: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, BLOCK), number)


def test_variants_are_counted():
    out = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    counts = []
    for number in (7, 9, 16, 32, 1):  # one for most, for multiples of 16, and for 1
        with variants() as names:
            _probe_kernel[(1,)](out, number, BLOCK=4)
        assert out.tolist() == [number] * 4
        counts.append(names.count("_probe_kernel"))
    assert counts == [1, 0, 1, 0, 1]


def batches(count, row_lengths):
    return {"single": (1,) * count, "one row": (count,), "ragged": (count // 3, 0, count - count // 3)}[
        row_lengths
    ]


def run_both(op, lengths, entries, rank, seed=0):
    problem = Problem(op, lengths, ranks=(rank,) * entries, features=(512, 512), seed=seed)
    forward(problem)
    problem.train()


def bounds_of(op):
    """(numbers of tokens, numbers of columns) at which the table changes from one plan to the next."""
    table = plan.load(dispatch._architecture(DEVICE))["rows"]
    rows = [row for row in table if row["op"] == {"segment_linear": "fused_linear"}.get(op, op)]
    tokens = {row["max_tokens"] for row in rows if "max_tokens" in row}
    return tokens, {row["max_columns"] for row in rows if "max_columns" in row} | {16}


@pytest.mark.parametrize("rank", [8, 3])
@pytest.mark.parametrize("op", OPS)
def test_nothing_compiles_after_a_warm_up(op, rank):
    tokens, columns = bounds_of(op.partition(" ")[0])
    tokens = [n for bound in {0} | tokens for n in (bound, bound + 1) if 1 <= n <= 301] + [300]
    entries = {n for bound in columns for n in (bound // rank, bound // rank + 1)} | {1, 60}
    for row_lengths in ("single", "one row", "ragged"):
        for count in tokens:
            for number in entries:
                run_both(op, batches(count, row_lengths), number, rank)
    rng = random.Random(0)
    with variants() as names:
        for count in range(1, 301):
            lengths = batches(count, rng.choice(("single", "one row", "ragged")))
            run_both(op, lengths, rng.randint(1, 60), rank, seed=count)
    assert names == []


@pytest.mark.parametrize("lengths", ["8 rows", "ragged", "prefill"])
@pytest.mark.parametrize("op", OPS)
def test_the_host_never_waits(op, lengths):
    problem = Problem(op, LENGTHS[lengths])
    problem.train(), forward(problem)  # compiles
    with waiting_is_an_error():
        forward(problem)
        problem.train()
    with pytest.raises(RuntimeError), waiting_is_an_error():
        problem.values["x"].sum().item()


def test_the_host_never_waits_for_a_search():
    query = torch.randn(8, 768, device=DEVICE)
    for num_keys in (1000, 100_000):
        keys = torch.randn(num_keys, 768, device=DEVICE).to(DTYPE)
        ops.key_search(query, keys, top_k=4, backend="gpu")
        with waiting_is_an_error():
            ops.key_search(query, keys, top_k=4, num_groups=6, backend="gpu")


@pytest.mark.parametrize("lengths", ["8 rows", "ragged", "prefill"])
@pytest.mark.parametrize("op", LINEARS)
def test_a_row_without_weights_keeps_the_bits_of_the_linear(op, lengths):
    """`mixture`: of any linear's output; the fused kernels: of what they compute when no row has weights."""
    problem = Problem(op, LENGTHS[lengths])
    row = slice(problem.lengths[0], sum(problem.lengths[:2])) if lengths != "ragged" else slice(3, 133)
    if lengths == "ragged":
        problem.values["weights"][2] = problem.values["dense"][2] = 0
    with torch.no_grad():
        if op == "mixture":
            problem.values["y"].copy_(F.linear(problem.values["x"], problem.values["weight"]))
        (got,) = problem.call()
        problem.values["weights"].zero_(), problem.values["dense"].zero_()
        (frozen,) = problem.call()
    assert torch.equal(got[row], frozen[row]) and not torch.equal(got, frozen)
    if op == "mixture":
        assert torch.equal(frozen, problem.values["y"])


def needs_memory(gigabytes):
    if torch.cuda.get_device_properties(0).total_memory < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes} GB of device memory")


@pytest.mark.large
@pytest.mark.parametrize("op", [*LINEARS, "norm_shrink", "silu_mul_shrink"])
def test_offsets_beyond_31_bits(op):
    """2^31 elements and 256 tokens more in x; the last four rows against the formula, gradients too."""
    needs_memory(70)
    torch.cuda.empty_cache()
    length, last = 128, 4
    rows = (1 << 31) // (SQUARE[0] * length) + 2
    problem = Problem(op, (length,) * rows)
    assert problem.values["x"].numel() > 1 << 31
    tail, beyond = problem.tail(last), last * length
    with torch.no_grad():
        outputs = forward(problem)
    exact, same = tail.train("reference", torch.float32), tail.train("reference")
    token = [0 if out.dim() == 2 else out.dim() - 2 for out in outputs]
    for out, dim, w, s in zip(outputs, token, exact, same):  # noqa: B905 (outputs alone)
        assert_close(out.narrow(dim, out.shape[dim] - beyond, beyond), w, s, DTYPE)
    problem.gradients = []
    for out, dim, g in zip(outputs, token, tail.gradients, strict=True):
        zeros = torch.zeros_like(out, dtype=DTYPE)
        zeros.narrow(dim, out.shape[dim] - beyond, beyond).copy_(g)
        problem.gradients.append(zeros)
    del outputs, out, zeros
    grads = problem.train()[len(token) :]
    for got, w, s in zip(grads, exact[len(token) :], same[len(token) :], strict=True):
        if got.shape != w.shape:  # of an input: by token, or by row
            count = len(w)
            assert not got[:-count].any()
            got = got[-count:]
        assert_close(got, w, s, DTYPE)


@pytest.mark.large
def test_search_offsets_beyond_31_bits():
    needs_memory(20)
    num_keys, dim = (1 << 31) // 768 + 1000, 768
    keys = torch.randn(num_keys, dim, device=DEVICE, dtype=DTYPE)
    wanted = torch.tensor([num_keys - 1, num_keys - 999, 5], device=DEVICE)
    indices, _, scores = ops.key_search(keys[wanted].float(), keys, top_k=2, backend="gpu")
    assert torch.equal(indices[:, 0].long(), wanted)
    torch.testing.assert_close(scores[:, 0], keys[wanted].float().square().sum(1))


def test_a_compiled_llama_gives_the_same_logits():
    model = tiny_model("llama", dtype=DTYPE).to(DEVICE)
    exact = copy.deepcopy(model).float()
    embeddings = torch.stack([clustered_embeddings(t)[0] for t in range(3)]).to(DEVICE)
    routing = model.pool.search(embeddings)
    compiled = torch.compile(model.base_model, fullgraph=True, dynamic=True)
    for length in (5, 9, 70):
        ids = torch.randint(1, 96, (3, length), device=DEVICE)
        with torch.no_grad(), model.state.use(routing), exact.state.use(routing):
            got, same = compiled(input_ids=ids).logits, model.base_model(input_ids=ids).logits
            want = exact.base_model(input_ids=ids).logits
        assert_close(got, want, same, DTYPE)
    torch._dynamo.reset()
