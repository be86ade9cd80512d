"""Key search against FAISS and PyTorch: the `top_k` best of P keys for B queries.

Keys are those of P / 4 tasks: four near-duplicates around a random direction each, as a task's entries are;
queries lie around tasks too. Exact contenders must find the exact best scores; of FAISS's HNSW and IVF, which
may miss some, the recall is given. All indexes are built before. Where a peer or a size is left out, a record
says why.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy
import torch
from torch import Tensor
from units import amount

from slm_fast import SLMConfig, ops
from slm_fast.pool import KnowledgePool
from suite.cases import Case, Contender, Effort, measured, near, reason_of, target
from suite.machine import available_bytes, cache_bytes, dtype_name

DIM, TOP_K, ENTRIES = 384, 4, 4
TASK_NOISE, QUERY_NOISE = 0.3, 1.0  # of a key, a query around its task's direction, whose norm is 1
TOLERANCE = 1e-5
HNSW_LINKS, HNSW_SEARCH = 32, 64
PEERS = ("faiss flat", "faiss hnsw", "faiss ivf")
CHUNK = 1 << 18
SIZES = (100, 300, 1000, 10_000, 100_000, 1_000_000, 10_000_000)  # keys; the last in fp16
MOST_SCORES = 160_000_000  # of a case: more take FAISS seconds a call
FIT_FROM = 100_000  # keys from which on codes come from memory, so that time must grow by their bytes
WIDE = 7 * DIM  # a query of MiniLM's embeddings and six layers


def make_keys(num_keys: int, dim: int, device: str, dtype=torch.float32) -> Tensor:
    """[P, dim], made in parts."""
    generator = torch.Generator(device).manual_seed(0)
    keys = torch.empty(num_keys, dim, dtype=dtype, device=device)
    for part in keys.split(CHUNK):
        tasks = torch.randn(math.ceil(len(part) / ENTRIES), dim, generator=generator, device=device)
        noise = torch.randn(len(part), dim, generator=generator, device=device)
        made = tasks.repeat_interleave(ENTRIES, 0)[: len(part)] + TASK_NOISE * noise
        part.copy_(made / made.norm(dim=1, keepdim=True))
    return keys


def make_queries(keys: Tensor, num_queries: int) -> Tensor:
    generator = torch.Generator(keys.device).manual_seed(1)
    near = torch.randint(len(keys), (num_queries,), generator=generator, device=keys.device)
    noise = torch.randn(num_queries, keys.shape[1], generator=generator, device=keys.device)
    query = keys[near].float() + QUERY_NOISE * noise / keys.shape[1] ** 0.5
    return query / query.norm(dim=1, keepdim=True)


def best_scores(query: Tensor, keys: Tensor) -> Tensor:
    """[B, top_k] fp64, the exact ones."""
    best = query.new_full((len(query), TOP_K), -torch.inf, dtype=torch.float64)
    for part in keys.split(CHUNK):
        scores = (query @ part.float().T).topk(min(TOP_K + 4, len(part)))  # in fp32, then those in fp64
        exact = torch.einsum("bkd,bd->bk", part[scores.indices].double(), query.double())
        best = torch.cat([best, exact], 1).topk(TOP_K).values
    return best


class Checked:
    """Judges (indices) by the exact scores of what they name."""

    def __init__(self, query: Tensor, keys: Tensor) -> None:
        self.query, self.keys, self.best = query, keys, best_scores(query, keys)

    def hits(self, indices: Tensor) -> Tensor:
        """[B, top_k] bool: the picks that are as good as the last of the exact ones."""
        picked = self.keys[indices.long().clamp(min=0)].double()
        scores = torch.einsum("bkd,bd->bk", picked, self.query.double()).masked_fill(indices < 0, -torch.inf)
        return scores >= self.best[:, -1:] - TOLERANCE

    def exact(self, indices: Tensor) -> str | None:
        wrong = int((~self.hits(indices)).any(1).sum())
        distinct = all(len(set(row)) == len(row) for row in indices.tolist())
        return None if not wrong and distinct else f"wrong top {TOP_K} for {wrong} queries"

    def recall(self, indices: Tensor) -> float:
        return float(self.hits(indices).float().mean())


def memory(size: int) -> Callable[[object], dict]:
    return lambda _: {"memory_bytes": size}


def as_tensor(found: tuple) -> Tensor:
    """The indices of what a contender returns: ours, torch's topk or FAISS's."""
    indices = found[0] if isinstance(found, tuple) and len(found) == 3 else found[1]
    return torch.as_tensor(indices)


def faiss_index(name: str, keys: Tensor):
    """One of `PEERS` over the keys; all but the first are not exact."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    data, (num_keys, dim) = keys.float().numpy(), keys.shape
    if name == "faiss hnsw":
        index = faiss.IndexHNSWFlat(dim, HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efSearch = HNSW_SEARCH
    elif name == "faiss ivf":
        lists = max(1, round(4 * num_keys**0.5))
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, lists, faiss.METRIC_INNER_PRODUCT)
        index.cp.max_points_per_centroid = 64
        index.train(data)
        index.nprobe = max(1, lists // 32)
    else:
        index = faiss.IndexFlatIP(dim)
    index.add(data)
    return index


def named(
    num_keys: int, dim: int, dtype: torch.dtype, num_queries: int, cold: bool = False
) -> tuple[str, dict]:
    """(name, axes) of a case."""
    name = f"{num_keys:,} keys x {dim} {dtype_name(dtype)}, {num_queries} queries"
    name += ", cold" if cold else ""
    return name, {"keys": num_keys, "queries": num_queries, "dim": dim, "cache": "cold" if cold else "hot"}


class Problem:
    """The keys of a number of cases, which differ in their queries.

    cold: copies of the keys in turns, so that they come from memory.  peers: indexes of FAISS to build;
    reason: why not the others.
    """

    def __init__(
        self,
        num_keys: int,
        dim: int,
        device: str,
        *,
        dtype: torch.dtype = torch.float32,
        cold: bool = False,
        peers: Sequence[str] = PEERS,
        reason: str = "not asked for",
    ) -> None:
        scanned = num_keys * dim * (1 if device == "cpu" else dtype.itemsize)  # codes, or the keys themselves
        self.copies = max(2, math.ceil(2 * cache_bytes(device) / scanned)) if cold else 1
        base = make_keys(num_keys, dim, device, dtype)
        self.keys = [base, *(base.clone() for _ in range(self.copies - 1))]
        self.codes = [ops.key_codes(keys) if device == "cpu" else None for keys in self.keys]
        self.cold, self.indexes = cold, {}
        if device != "cpu":
            peers, reason = (), "an index on the CPU; of FAISS on the GPU bench_gpu_ops.py has flat"
        self.skipped = {name: reason for name in PEERS if name not in peers}
        if dtype != torch.float32:
            self.skipped["torch"] = f"its product needs the queries' dtype, keys are {dtype_name(dtype)}"
        for name in peers:
            if 2 * self.copies * 4 * num_keys * dim > available_bytes(device):
                self.skipped[name] = "too little memory for its copy of the keys"
                continue
            try:
                self.indexes[name] = [faiss_index(name, keys) for keys in self.keys]
            except Exception as error:  # of a peer
                self.skipped[name] = reason_of(error)

    def case(self, num_queries: int) -> Case:
        keys, (num_keys, dim) = self.keys, self.keys[0].shape
        query = make_queries(keys[0], num_queries)
        checked = Checked(query, keys[0])
        codes_bytes = self.codes[0].nbytes if self.codes[0] is not None else 0
        scanned = codes_bytes or keys[0].nbytes

        def ours(i):
            return ops.key_search(query, keys[i], top_k=TOP_K, codes=self.codes[i])

        def exact(found):
            return checked.exact(as_tensor(found))

        contenders = [Contender("slm_fast", ours, exact, memory(keys[0].nbytes + codes_bytes))]
        if self.codes[0] is not None:
            plain = lambda i: ops.key_search(query, keys[i], top_k=TOP_K)  # noqa: E731
            contenders.append(Contender("slm_fast, no codes", plain, exact, memory(keys[0].nbytes)))
        if keys[0].dtype == torch.float32:
            contenders.append(Contender("torch", lambda i: (query @ keys[i].T).topk(TOP_K), exact))
        data = query.cpu().numpy()
        for name, indexes in self.indexes.items():
            run = lambda i, indexes=indexes: indexes[i].search(data, TOP_K)  # noqa: E731
            recall = lambda found: {"recall": checked.recall(as_tensor(found))}  # noqa: E731
            contenders.append(Contender(name, run, exact if name == "faiss flat" else None, recall))
        name, axes = named(num_keys, dim, keys[0].dtype, num_queries, self.cold)
        operations = 2 * num_keys * dim * num_queries
        options = dict(bytes=scanned, operations=operations, copies=self.copies, skipped=self.skipped)
        options["dtype"] = "int8" if codes_bytes else dtype_name(keys[0].dtype)
        return Case("search", name, axes, contenders, **options)


def refresh_case(num_keys: int, dim: int = WIDE) -> Case:
    """What a new task costs a pool of that many entries beside its own keys and statistics: the metric's
    factor again, and all that is searched. `torch`: both in plain PyTorch, fp64, from the same covariance,
    which is made of the statistics each time."""
    keys = make_keys(num_keys, dim, "cpu")
    pool = KnowledgePool(SLMConfig(), {"none": (1, 1)})
    queries = make_queries(keys, 4 * ENTRIES)
    pool.add_task("all", keys, queries=queries)

    def run(_):
        pool.metric._forget()
        pool.refresh_index()
        return pool.index_keys[:ENTRIES]

    def in_fp64() -> tuple[Tensor, Tensor]:
        covariance, ridge = pool.metric.covariance()
        whole = covariance.double()
        whole.diagonal().add_(ridge)
        return whole, (keys - pool.metric.mean).double()

    whole, centred = in_fp64()
    want = torch.linalg.solve(whole, centred[:ENTRIES].T).T.float()
    axes = {"kind": "refresh", "keys": num_keys, "dim": dim}
    operations = round(dim**3 / 3 + 2 * num_keys * dim**2)  # a factor, two triangular solves a key

    def plain(_):
        pool.metric._forget()
        whole, centred = in_fp64()
        return torch.cholesky_solve(centred.T, torch.linalg.cholesky(whole)).T[:ENTRIES].float()

    right = near(want, 1e-4)
    contenders = [Contender("slm_fast", run, right), Contender("torch", plain, right)]
    name = f"the metric of {num_keys:,} entries x {dim} again"
    return Case("search", name, axes, contenders, operations=operations, dtype="float64")


def left_out(num_keys: int, quick: bool) -> str:
    """Why HNSW and IVF are not built over so many keys; "" where they are."""
    if num_keys < 1000:
        return "not built over fewer than 1,000 keys"
    if num_keys > 100_000:
        return "building it over more than 100,000 keys takes minutes"
    return "in quick mode built over 10,000 keys alone" if quick and num_keys != 10_000 else ""


def of_size(num_keys: int, queries: tuple[int, ...], quick: bool, device: str) -> Iterator[Case]:
    """The cases of so many keys."""
    dtype, problem = torch.float16 if num_keys == SIZES[-1] else torch.float32, None
    needed, free = round(1.6 * num_keys * DIM * dtype.itemsize), available_bytes(device)
    if needed <= free:
        reason = left_out(num_keys, quick)
        peers = PEERS[:1] if reason else PEERS
        problem = Problem(num_keys, DIM, device, dtype=dtype, peers=peers, reason=reason)
    for count in queries:
        if problem is None:
            reason = f"needs {amount(needed)} of memory, {amount(free)} are free"
        elif count * num_keys > MOST_SCORES:
            reason = f"{count * num_keys:,} scores a call: cases have at most {MOST_SCORES:,}"
        else:
            yield problem.case(count)
            continue
        yield Case("search", *named(num_keys, DIM, dtype, count), [], skipped={"slm_fast": reason})


def cases(quick: bool, device: str) -> Iterator[Case]:
    """In quick mode up to 100,000 keys."""
    queries = (1, 16) if quick else (1, 4, 16, 64, 256)
    for num_keys in SIZES[2:5] if quick else SIZES:
        yield from of_size(num_keys, queries, quick, device)
    exact = dict(peers=PEERS[:1], reason=f"built over hot keys of {DIM} numbers alone")
    yield Problem(1000, DIM, device, cold=True, **exact).case(1)
    yield Problem(100, WIDE, device, **exact).case(1)
    if device == "cpu":
        yield from map(refresh_case, (100,) if quick else (30, 100, 300, 1000, 3000, 10_000))


def records(quick: bool, device: str, effort: Effort) -> Iterator[dict]:
    return measured(cases(quick, device), device, effort)


def growth(records: list[dict]) -> dict | None:
    """A line through the times of one query of `DIM` numbers over their bytes, from `FIT_FROM` keys on, with
    the least squared relative errors: seconds a key, the bytes per second that this makes and, with three
    sizes or more, `residual`, the largest relative error. None with fewer than two."""
    having, points = {"queries": 1, "cache": "hot", "dim": DIM}, []
    for record in records:
        axes, found = record["axes"], record["contenders"].get("slm_fast", {})
        if having.items() <= axes.items() and axes["keys"] >= FIT_FROM and "seconds" in found:
            points.append((axes["keys"], record["bytes"], found["seconds"]))
    if len(points) < 2:
        return None
    keys, sizes, seconds = numpy.array(points).T
    slope, fixed = numpy.polyfit(sizes, seconds, 1, w=1 / seconds)
    line = {"from_keys": points[0][0], "to_keys": points[-1][0], "bytes_per_second": float(1 / slope)}
    line["seconds_per_key"] = float(slope * sizes[0] / keys[0])
    if len(points) > 2:
        line["residual"] = float(numpy.abs((fixed + slope * sizes) / seconds - 1).max())
    return line


def targets(records: list[dict], ceilings: dict) -> list[dict]:
    """What the section has to reach on a CPU."""
    rows = []
    for record in records:
        axes, flat = record["axes"], record["contenders"].get("faiss flat", {})
        if axes["dim"] != DIM or axes.get("cache") != "hot" or "ratio" not in flat:
            continue
        wanted = {1000: 3.0, 100_000: 1.5}.get(axes["keys"]) if axes["queries"] in (1, 16) else None
        if wanted:
            what = f"search, {record['case']}: FAISS flat / slm_fast"
            rows.append(target(what, flat["ratio"], ">=", wanted))
    if (line := growth(records)) and "read_bytes_per_second" in ceilings:
        what = f"search, growth from {line['from_keys']:,} to {line['to_keys']:,} keys:"
        off = abs(line["bytes_per_second"] / ceilings["read_bytes_per_second"] - 1)
        rows.append(target(f"{what} fitted slope's distance from read bandwidth", off, "<=", 0.1))
        if "residual" in line:
            rows.append(target(f"{what} largest distance from the line", line["residual"], "<=", 0.1))
    return rows
