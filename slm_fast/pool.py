"""The knowledge pool: keys, low-rank factors and ownership of every entry, with O(1) addition and removal."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from slm_fast import ops
from slm_fast.config import SLMConfig
from slm_fast.factors import Factors, grown
from slm_fast.faiss_index import FaissIndex
from slm_fast.keys import METRIC_CLASSES, learn_keys
from slm_fast.routing import Routing
from slm_fast.task_statistics import module_key


@dataclass
class TaskInfo:
    """What the pool knows about a task: its entries' slots in order, and its label names if it has a head."""

    name: str
    slots: list[int] = field(default_factory=list)
    labels: list[str] | None = None


class KnowledgePool(nn.Module):
    """Entries of all tasks for a set of linears.

    An entry has a slot (its index in a `Routing`), a key, a task, a rank, a scaling, and rows `start : start
    + rank` of every linear's `Factors`. Slots and rows of removed entries are reused; `slot_version` says
    when a slot was last given to an entry, so that a `Routing` made before that is recognised as stale, and
    `factors_version` when its factors were last written, training included.

    Args:
        config: the settings; metric, weighting, `top_k` and the rest of the routing are read from it.
        modules: {name of the linear in the base model: (in_features, out_features)}.
        query_dim: D, the size of a query; may be set by the first keys.
        dtype: of the factors.
    """

    def __init__(
        self,
        config: SLMConfig,
        modules: dict[str, tuple[int, int]],
        query_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if not modules:
            raise ValueError("a pool needs at least one target linear")
        self.config = config
        self.modules_shape = dict(modules)
        self.factors = nn.ModuleList(Factors(i, o, dtype) for i, o in modules.values())
        self.module_index = {name: m for m, name in enumerate(modules)}
        self.tasks: dict[str, TaskInfo] = {}
        self.heads = nn.ModuleDict()
        self.names: dict[int, str] = {}
        self.slot_of: dict[str, int] = {}
        self.version = 0
        self.owner: str | None = None
        self.factors_on_host = False
        self._free_slots: list[int] = []
        self._num_slots = 0
        self._free_rows: dict[int, list[int]] = {}  # number of rows: starts of free blocks of that size
        self.num_rows = 0  # slab rows that were ever used
        self.max_rank = 0  # never smaller than any entry's rank
        self.register_buffer("start", torch.zeros(0, dtype=torch.int32))
        self.register_buffer("rank", torch.zeros(0, dtype=torch.int32))
        self.register_buffer("scaling", torch.zeros(0))
        self.register_buffer("active", torch.zeros(0, dtype=torch.bool))
        self.register_buffer("slot_version", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("factors_version", torch.zeros(0, dtype=torch.int64), persistent=False)
        self.register_buffer("row_entry", torch.zeros(0, dtype=torch.int32))
        self.register_buffer("keys", torch.zeros(0, 0))
        self.register_buffer("index_keys", torch.zeros(0, 0))
        self.register_buffer("index_bias", torch.zeros(0))
        self.metric: nn.Module | None = None
        self._faiss: FaissIndex | None = None  # dropped whenever what is searched changes
        if query_dim is not None:
            self._set_query_dim(query_dim)

    # ---- what is in the pool

    @property
    def num_entries(self) -> int:
        return len(self.names)

    @property
    def backend(self) -> str | None:
        return None if self.config.backend == "auto" else self.config.backend

    @property
    def query_dim(self) -> int | None:
        return self.keys.shape[1] or None

    def task_names(self) -> list[str]:
        return list(self.tasks)

    def task(self, name: str) -> TaskInfo:
        if name not in self.tasks:
            raise ValueError(f"unknown task {name!r}; the pool has: {', '.join(self.tasks) or 'none'}")
        return self.tasks[name]

    def head(self, name: str) -> nn.Linear | None:
        """The classification head of a task, or None for a task without labels."""
        return self.heads[module_key(name)] if self.task(name).labels is not None else None

    def tasks_of_slots(self) -> dict[int, str]:
        """{slot: name of its task} of all entries."""
        return {slot: info.name for info in self.tasks.values() for slot in info.slots}

    # ---- adding and removing

    def learn_keys(self, query: Tensor, method: str, seed: int = 0, progress=None) -> Tensor:
        """Keys for a new task from its queries [N, D]; see `keys.learn_keys`. The pool is not changed.

        Clusters are sought in the metric as it will be once the task's queries are part of it.
        """
        metric = self.metric
        if method == "kmeans":
            metric = self.new_metric(query.shape[1]) if metric is None else metric
            metric = metric.with_queries(query)
        return learn_keys(query, self.config.entries_per_task, metric, self.config, method, seed, progress)

    def add_task(
        self,
        name: str,
        keys: Tensor,
        *,
        rank: int | list[int] | None = None,
        scaling: float | None = None,
        labels: list[str] | None = None,
        hidden_size: int | None = None,
        queries: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> TaskInfo:
        """Add one entry per row of `keys` [M, D]; A starts as in PEFT (Kaiming uniform), B at zero.

        `queries` [N, D] update the metric's statistics. `labels` with `hidden_size` add a classification
        head.
        Raises ValueError when the name is taken, a key is not finite or has another size.
        """
        if name in self.tasks:
            raise ValueError(f"the pool already has a task {name!r}")
        if not name or "/" in name or "\\" in name or name.startswith(".") or name == "__base__":
            raise ValueError(f"{name!r} cannot name a task: it becomes a folder name")
        self._check_queries(keys, "keys")
        if labels is not None and (len(set(labels)) != len(labels) or not labels):
            raise ValueError(f"labels of task {name!r} must be distinct and not empty")
        if labels is not None and hidden_size is None:
            raise ValueError("labels need hidden_size")
        num = keys.shape[0]
        ranks = list(rank) if isinstance(rank, (list, tuple)) else [rank or self.config.r] * num
        if len(ranks) != num or min(ranks) < 1:
            raise ValueError(f"rank must be positive, one for each of the {num} keys, got {ranks}")
        if self.query_dim is None:
            self._set_query_dim(keys.shape[1])
        if queries is not None:
            self._check_queries(queries, "queries")
            self.metric.update(name, queries.to(self.keys))
        info = TaskInfo(name, labels=list(labels) if labels is not None else None)
        self.version += 1
        self._settle()
        starts = self._take_rows(ranks)
        for m in range(num):
            slot = self._take_slot()
            info.slots.append(slot)
            self.names[slot] = f"{name}.{m}"
            self.slot_of[self.names[slot]] = slot
            self.start[slot], self.rank[slot] = starts[m], ranks[m]
            self.row_entry[starts[m] : starts[m] + ranks[m]] = slot
            self.scaling[slot] = self.config.scaling if scaling is None else scaling
            self.active[slot] = True
            self.slot_version[slot] = self.factors_version[slot] = self.version
            self.keys[slot] = keys[m].to(self.keys)
        for factors in self.factors:
            for begin, r in zip(starts, ranks, strict=True):
                bound = 1 / math.sqrt(factors.A.shape[1])
                fresh = torch.empty(r, factors.A.shape[1]).uniform_(-bound, bound, generator=generator)
                factors.A[begin : begin + r] = fresh.to(factors.A)
                factors.B[begin : begin + r] = 0
        if labels is not None:
            head = nn.Linear(hidden_size, len(labels)).to(self.keys.device)
            nn.init.normal_(head.weight, std=0.02, generator=generator)
            nn.init.zeros_(head.bias)
            self.heads[module_key(name)] = head.requires_grad_(False)
        self.tasks[name] = info
        self.refresh_index(None if queries is not None and self.metric.has_statistics else info.slots)
        return info

    @torch.no_grad()
    def copy_entries(self, source: str, target: str) -> None:
        """Start the entries of task `target` from those of `source`; both need the same ranks."""
        pairs = list(zip(self.task(source).slots, self.task(target).slots, strict=True))
        if any(self.rank[s] != self.rank[t] for s, t in pairs):
            raise ValueError(f"the entries of {source!r} and {target!r} have different ranks")
        self.version += 1
        self._settle()
        for s, t in pairs:
            begin, end, r = int(self.start[s]), int(self.start[t]), int(self.rank[s])
            for factors in self.factors:
                factors.A[end : end + r] = factors.A[begin : begin + r]
                factors.B[end : end + r] = factors.B[begin : begin + r]
            self.slot_version[t] = self.factors_version[t] = self.version

    def remove_task(self, name: str) -> None:
        """Forget a task: its entries can never be picked again, their slots and rows are reused, and the
        metric is what it would be without the task."""
        info = self.task(name)
        if self.owner == name:
            raise ValueError(f"task {name!r} is being trained")
        self.version += 1
        self._faiss = None
        begin, size = int(self.start[info.slots[0]]), int(self.rank[info.slots].sum())
        self._free_rows.setdefault(size, []).append(begin)
        self.row_entry[begin : begin + size] = -1
        for slot in info.slots:
            self._free_slots.append(slot)
            self.active[slot], self.slot_version[slot] = False, self.version
            del self.slot_of[self.names.pop(slot)]
        if info.labels is not None:
            del self.heads[module_key(name)]
        del self.tasks[name]
        if self.metric is not None and self.metric.remove(name):
            self.refresh_index()

    def new_metric(self, dim: int) -> nn.Module:
        """The config's metric for queries of size `dim`, without any statistics."""
        return METRIC_CLASSES[self.config.metric](self.config, dim).to(self.start.device)

    def _set_query_dim(self, dim: int) -> None:
        self.metric = self.new_metric(dim)
        self.keys, self.index_keys = self.keys.new_zeros(self.keys.shape[0], dim), self.keys.new_zeros(0, dim)

    def _take_slot(self) -> int:
        if self._free_slots:
            return self._free_slots.pop()
        if self._num_slots == self.start.shape[0]:
            capacity = max(8, 2 * self._num_slots)
            for name in ("start", "rank", "scaling", "active", "slot_version", "factors_version", "keys"):
                setattr(self, name, grown(getattr(self, name), capacity))
        self._num_slots += 1
        return self._num_slots - 1

    def _take_rows(self, ranks: list[int]) -> list[int]:
        """Contiguous rows for a task's entries, so that one parameter can own them; freed ones first."""
        size = sum(ranks)
        self.max_rank = max(self.max_rank, *ranks)
        free = self._free_rows.get(size)
        begin = free.pop() if free else self.num_rows
        if begin == self.num_rows:
            capacity = self.factors[0].A.shape[0]
            if begin + size > capacity:
                capacity = max(begin + size, 2 * capacity)
                for factors in self.factors:
                    factors.grow(capacity, self._pins)
                self.row_entry = grown(self.row_entry, capacity)
                self.row_entry[self.num_rows :] = -1
            self.num_rows += size
        return [begin + sum(ranks[:m]) for m in range(len(ranks))]

    # ---- ownership: which entries are parameters

    def own(self, name: str) -> None:
        """Make the entries and the head of task `name` trainable parameters, and nothing else."""
        info = self.task(name)
        if self.owner is not None:
            raise ValueError(f"task {self.owner!r} is being trained; finish it first")
        if self.factors_on_host and self.start.device.type != "cpu":
            raise ValueError(f"training needs the factors on {self.start.device}: call keep_on_host(False)")
        begin = int(self.start[info.slots[0]])
        end = int(self.start[info.slots[-1]] + self.rank[info.slots[-1]])
        for factors in self.factors:
            factors.own(begin, end)
        if info.labels is not None:
            self.head(name).requires_grad_(True)
        self.owner = name

    def disown(self) -> None:
        """Turn the trained entries back into plain buffers."""
        if self.owner is None:
            return
        for factors in self.factors:
            factors.disown()
        self.heads.requires_grad_(False)
        self.version += 1
        self.factors_version[self.tasks[self.owner].slots] = self.version
        self.owner = None

    # ---- where it is

    def keep_on_host(self, on: bool = True) -> None:
        """Hold the factors in host memory, pinned where CUDA is present, wherever the pool is moved to.

        Layers on a GPU then read them through a `ResidentPool`. False moves them to the pool's device.
        """
        self.factors_on_host = on
        self._apply(lambda tensor: tensor)

    def _settle(self) -> None:
        """Wait for copies out of pinned memory, before rows there are written."""
        if self._pins:
            torch.cuda.synchronize(self.start.device if self.start.is_cuda else None)

    @property
    def _pins(self) -> bool:
        return self.factors_on_host and torch.cuda.is_available()

    def _apply(self, fn, recurse=True):
        """Move everything to fn's device; only the factors take its dtype: routing stays in fp32."""
        like = fn(torch.empty(0, device=self.start.device, dtype=self.factors[0].A.dtype))
        device = like.device
        if self.factors_on_host:
            held = self.factors[0].A.new_empty(0, dtype=like.dtype, device="cpu")
            self.factors._apply(lambda t: t.to(held).pin_memory() if self._pins else t.to(held))
        else:
            self.factors._apply(lambda t: fn(t).to(device))
        for part in (self.heads, self.metric):
            if part is not None:
                part._apply(lambda tensor: tensor.to(device))
        for name, buffer in self._buffers.items():
            self._buffers[name] = buffer.to(device)
        self._faiss = None
        return self

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._faiss = None
        self.version += 1
        self.factors_version.fill_(self.version)

    def __getstate__(self) -> dict:
        """A FAISS index is neither pickled nor copied: the copy builds its own."""
        return self.__dict__ | {"_faiss": None}

    # ---- search

    def refresh_index(self, slots: list[int] | None = None) -> None:
        """Recompute what is searched from the raw keys: of some slots, or of all after the metric changed."""
        self._faiss = None
        if self.index_keys.shape != self.keys.shape or slots is None:
            self.index_keys, self.index_bias = self.metric.index(self.keys)
            self.index_bias = torch.where(self.active, self.index_bias, torch.zeros_like(self.index_bias))
        else:
            self.index_keys[slots], self.index_bias[slots] = self.metric.index(self.keys[slots])

    def temperature(self) -> float:
        return self.config.temperature or self.metric.default_temperature

    def search(self, query: Tensor, tasks: str | list[str | None] | None = None) -> Routing:
        """Route queries [B, D]: the `top_k` best entries and their weights, as a `Routing`.

        `tasks` restricts all rows (a name) or each row (a list, None = any) to the entries of a task.
        Raises ValueError on an empty pool, unknown tasks, NaN or infinite queries.
        """
        if not self.names:
            raise ValueError("the pool has no entries yet; add a task first")
        self._check_queries(query, "query")
        query = query.to(self.keys)
        mask = self.active
        if isinstance(tasks, str):
            mask = self._task_mask(tasks)
        elif tasks is not None:
            if len(tasks) != query.shape[0]:
                raise ValueError(f"tasks has {len(tasks)} rows, the batch has {query.shape[0]}")
            distinct = {t: self.active if t is None else self._task_mask(t) for t in set(tasks)}
            mask = torch.stack([distinct[t] for t in tasks]) if tasks else self.active.expand(0, -1)
        config = self.config
        features, transform = query, self.metric.query_transform()
        if config.mixing == "batch" and query.shape[0] > 0:
            if mask.ndim == 2:
                raise ValueError(
                    'mixing="batch" shares one mixture and cannot restrict rows to different tasks'
                )
            features, transform = self.metric.transform(query).mean(0, keepdim=True), {}
        calibrated = config.min_similarity == "auto"
        options = transform | dict(
            top_k=config.top_k,
            weighting=config.weighting,
            temperature=self.temperature(),
            min_similarity=None if calibrated else config.min_similarity,
        )
        if tasks is None and config.faiss_above is not None and self.num_entries > config.faiss_above:
            if self._faiss is None:
                self._faiss = FaissIndex(self.index_keys, self.index_bias, self.active)
            found = self._faiss.search(features, **options)
        else:
            found = ops.key_search(
                features, self.index_keys, self.index_bias, mask, **options, backend=self.backend
            )
        routing = Routing.make(*found, self.version)
        if calibrated and not isinstance(tasks, str):
            told = [False] * query.shape[0] if tasks is None else [task is not None for task in tasks]
            outside = self._outside(query, routing) & ~torch.tensor(told, dtype=torch.bool)
            weights = routing.weights.masked_fill(outside.to(query.device)[:, None], 0.0)
            routing = routing._replace(weights=weights)
        return routing if routing.num_rows == query.shape[0] else routing.repeat_interleave(query.shape[0])

    def _outside(self, query: Tensor, routing: Routing) -> Tensor:
        """[B] bool: the queries that are too far from the task of their best entry to be one of its texts."""
        of_task, best = self.tasks_of_slots(), routing.indices[:, 0].tolist()
        rows: dict[str, list[int]] = {}
        for row, slot in enumerate(best):
            rows.setdefault(of_task[slot], []).append(row)
        outside = torch.zeros(query.shape[0], dtype=torch.bool)
        for name, members in rows.items():
            if module_key(name) in self.metric.tasks:
                statistics = self.metric.tasks[module_key(name)]
                outside[members] = statistics.is_outside(query[members], self.config.coverage)
        return outside

    def fixed_routing(self, adapter_names: list[str]) -> Routing:
        """Route every row to a named entry, to a task's entries in equal parts, or to "__base__"."""
        rows = []
        for name in adapter_names:
            if name == "__base__":
                rows.append([])
            elif name in self.tasks:
                rows.append(self.tasks[name].slots)
            elif name in self.slot_of:
                rows.append([self.slot_of[name]])
            else:
                known = [*self.tasks, *self.slot_of, "__base__"]
                raise ValueError(f"unknown adapter {name!r}; known: {', '.join(known)}")
        width = max((len(slots) for slots in rows), default=0) or 1
        indices = torch.zeros(len(rows), width, dtype=torch.int32)
        weights = torch.zeros(len(rows), width)
        for b, slots in enumerate(rows):
            if slots:
                indices[b, : len(slots)] = torch.tensor(slots, dtype=torch.int32)
                weights[b, : len(slots)] = 1 / len(slots)
        return Routing.make(indices, weights, pool_version=self.version).to(self.keys.device)

    def check_routing(self, routing: Routing) -> None:
        """Raise ValueError if a picked slot does not exist or was rewritten after the routing was made."""
        routing = routing.to(self.slot_version.device)
        used = routing.weights != 0
        picked = routing.indices[used].long()
        if picked.numel() == 0:
            return
        if int(picked.min()) < 0 or int(picked.max()) >= self._num_slots:
            raise ValueError(f"the routing names slot {int(picked.max())}; the pool has {self._num_slots}")
        made = routing.pool_version[:, None].expand_as(routing.indices)[used]
        stale = (self.slot_version[picked] > made) | ~self.active[picked]
        if bool(stale.any()):
            raise ValueError(f"the routing is stale: slot {int(picked[stale][0])} changed after it was made")

    def task_mass(self, routing: Routing) -> tuple[Tensor, list[str]]:
        """Summed weights per task: [B, number of tasks] fp32, and the tasks' names in that order."""
        names = self.task_names()
        column = torch.zeros(max(self._num_slots, 1), dtype=torch.int64, device=routing.weights.device)
        for t, name in enumerate(names):
            column[self.tasks[name].slots] = t
        mass = routing.weights.new_zeros(routing.num_rows, max(len(names), 1))
        return mass.scatter_add_(1, column[routing.indices.long()], routing.weights), names

    def _task_mask(self, name: str) -> Tensor:
        mask = torch.zeros_like(self.active)
        mask[self.task(name).slots] = True
        return mask

    def _check_queries(self, query: Tensor, what: str) -> None:
        if query.ndim != 2 or (self.query_dim is not None and query.shape[1] != self.query_dim):
            wanted = f"[N, {self.query_dim}]" if self.query_dim else "[N, D]"
            raise ValueError(f"{what} must be {wanted}, got {list(query.shape)}")
        if not bool(query.isfinite().all()):
            raise ValueError(
                f"{what} must be finite; row {int((~query.isfinite()).any(-1).nonzero()[0])} is not"
            )
