"""The knowledge pool: keys, low-rank factors and ownership of every entry, with O(1) addition and removal."""

import copy
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from slm_fast import dispatch, ops
from slm_fast.config import SLMConfig
from slm_fast.factors import Factors, grown
from slm_fast.faiss_index import FaissIndex
from slm_fast.fitted_temperature import drop_losses, held_out_losses, keep_losses
from slm_fast.keys import METRIC_CLASSES, learn_keys
from slm_fast.label_keys import checked_answers, has_label_keys, label_index, with_entries
from slm_fast.reference import KeyCodes
from slm_fast.routing import Routing
from slm_fast.task_statistics import module_key
from slm_fast.twins import near_duplicates, share_with_twins, twins

CODED_SLOTS = 64  # from which on a search on the CPU gains by codes of the keys
SLOT_BUFFERS = ("start", "rank", "scaling", "active", "slot_version", "factors_version", "slot_task", "keys")


@dataclass
class TaskInfo:
    """What the pool knows about a task: its entries' slots in order, its label names if it has a head, and
    the tokens that its training kept of an example, if it was trained."""

    name: str
    slots: list[int] = field(default_factory=list)
    labels: list[str] | None = None
    max_length: int | None = None


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
        self.tasks_by_number: dict[int, TaskInfo] = {}  # the same by their numbers in `slot_task`
        self.heads = nn.ModuleDict()
        self.names: dict[int, str] = {}
        self.num_taken = 0  # tasks ever added: the number of the next one, which `slot_task` holds
        self.slot_of: dict[str, int] = {}
        self.version = 0
        self.owner: str | None = None
        self.factors_on_host = False
        self._free_slots: list[int] = []
        self.num_slots = 0
        self._free_rows: dict[int, list[int]] = {}  # number of rows: starts of free blocks of that size
        self.num_rows = 0  # slab rows that were ever used
        self.max_rank = 0  # never smaller than any entry's rank
        self.register_buffer("start", torch.zeros(0, dtype=torch.int32))
        self.register_buffer("rank", torch.zeros(0, dtype=torch.int32))
        self.register_buffer("scaling", torch.zeros(0))
        self.register_buffer("active", torch.zeros(0, dtype=torch.bool))
        self.register_buffer("slot_version", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("factors_version", torch.zeros(0, dtype=torch.int64), persistent=False)
        self.register_buffer("slot_task", torch.zeros(0, dtype=torch.int64), persistent=False)
        self.register_buffer("row_entry", torch.zeros(0, dtype=torch.int32))
        self.register_buffer("keys", torch.zeros(0, 0))
        # What is searched, made of the rest: keys of entries, by slot, and behind them label keys; the number
        # of each one's task; whether it is what its task is found by.
        self.register_buffer("index_keys", torch.zeros(0, 0), persistent=False)
        self.register_buffer("index_bias", torch.zeros(0), persistent=False)
        self.register_buffer("index_task", torch.zeros(0, dtype=torch.int64), persistent=False)
        self.register_buffer("searched", torch.zeros(0, dtype=torch.bool), persistent=False)
        self.fitted: float | None = None  # the temperature, until the losses change
        self.num_label_keys = 0
        self._indexed_labels: bool | None = None  # whether there may be label keys; None: the index is stale
        self.metric: nn.Module | None = None
        self._faiss: FaissIndex | None = None  # dropped whenever what is searched changes
        self._codes: KeyCodes | None = None  # of index_keys, made by the first search on the CPU
        self._twins: tuple[int, dict[str, list[str]]] = (-1, {})  # a version of the pool, and those asked for
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

    def task_of_slot(self, slot: int) -> str:
        return self.names[slot].rpartition(".")[0]

    def twins(self, name: str) -> list[str]:
        """The near-duplicates of a task: see `twins.twins`. Found once for a version of the pool."""
        if self._twins[0] != self.version:
            self._twins = (self.version, {})
        found = self._twins[1]
        if name not in found:
            found[name] = twins(self, name)
        return found[name]

    def near_duplicates(self, name: str) -> list[str]:
        """Tasks with any labels, or none, whose texts look like those of task `name`: rows may go to either.
        Raises ValueError on an unknown task. See `twins.near_duplicates`."""
        self.task(name)
        return near_duplicates(self, name)

    def rows_of(self, slots: list[int]) -> slice:
        """The slab rows of entries that lie side by side, as a task's do."""
        return slice(int(self.start[slots[0]]), int(self.start[slots[-1]] + self.rank[slots[-1]]))

    @classmethod
    def of_queries(
        cls, config: SLMConfig, queries: dict[str, Tensor], answers: dict[str, list[str]] | None = None
    ) -> "KnowledgePool":
        """Keys and statistics of tasks, learnt from their queries [N, D] (and their `answers`), and hardly
        any factors: retrieval by itself, to be measured."""
        pool, answers = cls(config, {"none": (1, 1)}), answers or {}
        for name, query in queries.items():
            keys = pool.learn_keys(query, config.key_method)
            pool.add_task(name, keys, queries=query, answers=answers.get(name))
        return pool

    # ---- adding and removing

    def learn_keys(self, query: Tensor, method: str, seed: int = 0, progress=None) -> Tensor:
        """Keys for a new task from its queries [N, D]; see `keys.learn_keys`. The pool is not changed.

        Clusters are sought in the metric of the task alone: its keys depend on no other task.
        """
        metric = self.new_metric(query.shape[1])
        if method == "kmeans":
            metric.update("", query)
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
        answers: Sequence[str] | None = None,
        generator: torch.Generator | None = None,
    ) -> TaskInfo:
        """Add one entry per row of `keys` [M, D]; A starts as in PEFT (Kaiming uniform), B at zero.

        `queries` [N, D] update the metric's statistics; with the `answers` to them, a string each, the task
        gets label keys. `labels` with `hidden_size` add a classification head, at zero.
        Raises ValueError when the name is taken, a key is not finite or has another size, or answers are not
        one for each query.
        """
        info = self._add(
            name,
            keys,
            rank=rank,
            scaling=scaling,
            labels=labels,
            hidden_size=hidden_size,
            queries=queries,
            answers=answers,
            generator=generator,
        )
        self.refresh_index(None if queries is not None and self.metric.has_statistics else info.slots)
        return info

    def _add(
        self, name, keys, *, rank, labels, hidden_size, generator, scaling=None, queries=None, answers=None
    ) -> TaskInfo:
        """`add_task`, without what is searched."""
        if name in self.tasks:
            raise ValueError(f"the pool already has a task {name!r}")
        if not name or "/" in name or "\\" in name or name.startswith(".") or name == "__base__":
            raise ValueError(f"{name!r} cannot name a task: it becomes a folder name")
        self._check_queries(keys, "keys")
        if queries is not None:
            self._check_queries(queries, "queries")
        if labels is not None and (len(set(labels)) != len(labels) or not labels):
            raise ValueError(f"labels of task {name!r} must be distinct and not empty")
        if labels is not None and hidden_size is None:
            raise ValueError("labels need hidden_size")
        if answers is not None:
            answers = checked_answers(answers, 0 if queries is None else len(queries))
            answers = answers if self.config.label_keys else None
        num = keys.shape[0]
        ranks = list(rank) if isinstance(rank, (list, tuple)) else [rank or self.config.r] * num
        if len(ranks) != num or min(ranks) < 1:
            raise ValueError(f"rank must be positive, one for each of the {num} keys, got {ranks}")
        if self.query_dim is None:
            self._set_query_dim(keys.shape[1])
        if queries is not None:
            losses = held_out_losses(self, queries, answers)
            self.metric.update(name, queries.to(self.keys), answers)
            keep_losses(self, name, losses)
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
            self.active[slot], self.slot_task[slot] = True, self.num_taken
            self.slot_version[slot] = self.factors_version[slot] = self.version
            self.keys[slot] = keys[m].to(self.keys)
        for factors in self.factors:
            for begin, r in zip(starts, ranks, strict=True):
                bound = 1 / math.sqrt(factors.A.shape[1])
                fresh = torch.empty(r, factors.A.shape[1]).uniform_(-bound, bound, generator=generator)
                factors.A[begin : begin + r] = fresh.to(factors.A)
                factors.B[begin : begin + r] = 0
        if labels is not None:
            head = nn.utils.skip_init(nn.Linear, hidden_size, len(labels), device=self.keys.device)
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
            self.heads[module_key(name)] = head.requires_grad_(False)
        self.tasks[name] = self.tasks_by_number[self.num_taken] = info
        self.num_taken += 1
        return info

    def take_task(
        self,
        other: "KnowledgePool",
        name: str,
        queries: Tensor | None = None,
        answers: Sequence[str] | None = None,
    ) -> TaskInfo:
        """Add task `name` of another pool: its entries, keys, statistics and head, as if learnt here.

        With temperature="auto" its own `queries` [N, D] and the `answers` to them measure its losses anew,
        against the tasks here; without them it keeps its losses where all tasks that they were measured
        against are here, and has none elsewhere. Raises ValueError when the name is taken, or the pools
        differ in linears, metric or size of a query.
        """
        self.check_take(other, name)
        losses = None if queries is None else held_out_losses(self, queries, answers)
        (info,) = self._take(other, [name])
        if queries is not None:
            keep_losses(self, name, losses)
        drop_losses(self)
        return info

    def take_tasks(self, other: "KnowledgePool", names: Sequence[str]) -> list[TaskInfo]:
        """`take_task` of several, in this order; they keep losses that were measured against each other.
        Nothing is changed where it raises."""
        names = list(dict.fromkeys(names))
        for name in names:
            self.check_take(other, name)
        infos = self._take(other, names)
        drop_losses(self)
        return infos

    def _take(self, other: "KnowledgePool", names: Sequence[str]) -> list[TaskInfo]:
        """Add tasks that were checked, and make what is searched once."""
        infos = [self._take_one(other, name) for name in names]
        if infos:
            slots = [slot for info in infos for slot in info.slots]
            self.refresh_index(None if self.metric.has_statistics else slots)
        return infos

    @torch.no_grad()
    def _take_one(self, other: "KnowledgePool", name: str) -> TaskInfo:
        theirs, head = other.task(name), other.head(name)
        info = self._add(
            name,
            other.keys[theirs.slots],
            rank=other.rank[theirs.slots].tolist(),
            labels=theirs.labels,
            hidden_size=None if head is None else head.in_features,
            generator=torch.Generator(),  # everything drawn here is overwritten
        )
        rows, to = other.rows_of(theirs.slots), self.rows_of(info.slots)
        for mine, source in zip(self.factors, other.factors, strict=True):
            mine.A[to], mine.B[to] = source.A[rows].to(mine.A), source.B[rows].to(mine.B)
        self.scaling[info.slots] = other.scaling[theirs.slots].to(self.scaling)
        info.max_length = theirs.max_length
        if head is not None:
            self.head(name).load_state_dict(head.state_dict())
        if self.metric.has_statistics and module_key(name) in other.metric.tasks:
            self.metric.take(name, copy.deepcopy(other.metric.tasks[module_key(name)]))
        return info

    def check_take(self, other: "KnowledgePool", name: str) -> None:
        """Raise ValueError where `take_task` would."""
        other.task(name)
        if name in self.tasks:
            raise ValueError(f"the pool already has a task {name!r}")
        if other.modules_shape != self.modules_shape:
            raise ValueError(f"task {name!r} comes from a pool for other linears")
        for what in ("metric", "query_dim"):
            theirs, mine = (getattr(p if what == "query_dim" else p.config, what) for p in (other, self))
            if theirs != mine and mine is not None:
                raise ValueError(
                    f"task {name!r} comes from a pool with {what}={theirs!r}, this one has {mine!r}"
                )

    def only(self, names: list[str]) -> "KnowledgePool":
        """A pool of its own with some of the tasks, in the order of the names."""
        pool = KnowledgePool(self.config, self.modules_shape, self.query_dim, self.factors[0].A.dtype)
        pool.to(self.start.device)
        pool.take_tasks(self, names)
        return pool

    @torch.no_grad()
    def copy_entries(self, source: str, target: str) -> None:
        """Start the entries of task `target` from those of `source`; both need the same ranks."""
        pairs = list(zip(self.task(source).slots, self.task(target).slots, strict=True))
        if any(self.rank[s] != self.rank[t] for s, t in pairs):
            raise ValueError(f"the entries of {source!r} and {target!r} have different ranks")
        self.version += 1
        self._settle()
        for s, t in pairs:
            rows, to = self.rows_of([s]), self.rows_of([t])
            for factors in self.factors:
                factors.A[to], factors.B[to] = factors.A[rows], factors.B[rows]
            self.slot_version[t] = self.factors_version[t] = self.version

    def remove_task(self, name: str) -> None:
        """Forget a task: its entries can never be picked again, their slots and rows are reused, the metric
        is what it would be without the task, and losses that were measured against it are gone."""
        info = self.task(name)
        if self.owner == name:
            raise ValueError(f"task {name!r} is being trained")
        self.version += 1
        self._faiss = None
        rows = self.rows_of(info.slots)
        self._free_rows.setdefault(rows.stop - rows.start, []).append(rows.start)
        self.row_entry[rows] = -1
        for slot in info.slots:
            self._free_slots.append(slot)
            self.active[slot], self.slot_version[slot] = False, self.version
            del self.slot_of[self.names.pop(slot)]
        if info.labels is not None:
            del self.heads[module_key(name)]
        del self.tasks[name], self.tasks_by_number[int(self.slot_task[info.slots[0]])]
        self.searched[info.slots] = False
        if self.metric is not None and self.metric.remove(name):
            self.refresh_index()
        drop_losses(self)

    def new_metric(self, dim: int) -> nn.Module:
        """The config's metric for queries of size `dim`, without any statistics."""
        return METRIC_CLASSES[self.config.metric](self.config, dim).to(self.start.device)

    def _set_query_dim(self, dim: int) -> None:
        self.metric = self.new_metric(dim)
        self.keys, self.index_keys = self.keys.new_zeros(self.keys.shape[0], dim), self.keys.new_zeros(0, dim)

    def _take_slot(self) -> int:
        if self._free_slots:
            return self._free_slots.pop()
        if self.num_slots == self.start.shape[0]:
            capacity = max(8, 2 * self.num_slots)
            for name in SLOT_BUFFERS:
                setattr(self, name, grown(getattr(self, name), capacity))
        self.num_slots += 1
        return self.num_slots - 1

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
        rows = self.rows_of(info.slots)
        for factors in self.factors:
            factors.own(rows.start, rows.stop)
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
        self._faiss = self._codes = None
        return self

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._faiss = self._codes = None
        self.version += 1
        self.factors_version.fill_(self.version)
        self._indexed_labels = None

    def __getstate__(self) -> dict:
        """Neither a FAISS index nor codes are pickled or copied: the copy makes its own."""
        return self.__dict__ | {"_faiss": None, "_codes": None}

    # ---- search

    def refresh_index(self, slots: list[int] | None = None) -> None:
        """Recompute what is searched from the raw keys: of some slots, or of all after the metric changed."""
        self._faiss = self.fitted = None
        count, before = self.num_slots, len(self.index_keys) - self.num_label_keys
        with_labels, dim = has_label_keys(self.config), self.keys.shape[1]
        if slots is None or self.index_keys.shape[1] != dim or self._indexed_labels != with_labels:
            keys, bias = self.metric.index(self.keys[:count])
            labels, label_bias, label_task = label_index(self, self.metric)
            self.index_keys = torch.cat([keys, labels])
            self.index_bias = torch.cat([bias.masked_fill(~self.active[:count], 0.0), label_bias])
            self.num_label_keys, self._indexed_labels, self._codes = len(labels), with_labels, None
        else:
            label_task = self.index_task[before:]
            if before < count:
                self.index_keys, self.index_bias = (
                    torch.cat([t[:before], t.new_zeros(count - before, *t.shape[1:]), t[before:]])
                    for t in (self.index_keys, self.index_bias)
                )
                self._codes = None
            self.index_keys[slots], self.index_bias[slots] = self.metric.index(self.keys[slots])
            if self._codes is not None:
                ops.key_codes(self.index_keys, out=self._codes, rows=slots, backend=self.backend)
        entries = self.slot_task[:count]
        self.index_task = torch.cat([entries, label_task])
        plain = self.active[:count] & ~torch.isin(entries, label_task.unique_consecutive())
        self.searched = torch.cat([plain, torch.ones_like(label_task, dtype=torch.bool)])

    def fresh_index(self) -> None:
        """Make what is searched anew where the settings have changed, or what it is made of was loaded."""
        if self._indexed_labels != has_label_keys(self.config):
            self.refresh_index()

    def _index_codes(self) -> KeyCodes | None:
        """Codes of `index_keys`, a quarter of their bytes, where a search reads them."""
        if len(self.index_keys) < CODED_SLOTS or dispatch.select(self.index_keys, self.backend) != "cpu":
            return None
        if self._codes is None:
            self._codes = ops.key_codes(self.index_keys, backend=self.backend)
        return self._codes

    def temperature(self) -> float:
        if self.config.temperature == "auto":
            if self.fitted is None:
                self.fitted = self.metric.fitted_temperature()
            return self.fitted
        return self.config.temperature or self.metric.default_temperature

    def identity(self, name: str) -> int:
        """Of a task, the same in every pool that has taken it: of its name and its keys."""
        keys = self.keys[self.task(name).slots].cpu().numpy().tobytes()
        digest = hashlib.sha256(f"{name}\0".encode() + keys).digest()
        return int.from_bytes(digest[:8], "little", signed=True)

    def search(self, query: Tensor, tasks: str | list[str | None] | None = None) -> Routing:
        """Route queries [B, D]: the `top_k` best entries and their weights, as a `Routing`.

        `tasks` restricts all rows (a name) or each row (a list, None = any) to the entries of a task.
        Raises ValueError on an empty pool, unknown tasks, NaN or infinite queries.
        """
        if not self.names:
            raise ValueError("the pool has no entries yet; add a task first")
        self._check_queries(query, "query")
        self.fresh_index()
        query = query.to(self.keys)
        config, mask = self.config, self._task_mask(tasks) if isinstance(tasks, str) else self.searched
        if tasks is not None and not isinstance(tasks, str):
            if len(tasks) != query.shape[0]:
                raise ValueError(f"tasks has {len(tasks)} rows, the batch has {query.shape[0]}")
            distinct = {t: mask if t is None else self._task_mask(t) for t in set(tasks)}
            mask = torch.stack([distinct[t] for t in tasks]) if tasks else mask.expand(0, -1)
        if config.mixing == "batch" and mask.ndim == 2:
            raise ValueError('mixing="batch" shares one mixture and cannot restrict rows to different tasks')
        calibrated = config.min_similarity == "auto"
        features, options = self._how_to_search(query, self.metric)
        options["min_similarity"] = None if calibrated else config.min_similarity
        if tasks is None and config.faiss_above is not None and self.num_entries > config.faiss_above:
            if self._faiss is None:
                self._faiss = FaissIndex(self.index_keys, self.index_bias, mask)
            found = self._faiss.search(features, **options)
        else:
            options |= dict(codes=self._index_codes(), backend=self.backend)
            found = ops.key_search(features, self.index_keys, self.index_bias, mask, **options)
        routing = Routing.make(*found, self.version)
        if self.num_label_keys:
            routing = with_entries(self, features, routing)
        routing = self._weighted(routing)
        if (calibrated or config.twin_share) and not isinstance(tasks, str):
            free = [task is None for task in ([None] * len(query) if tasks is None else tasks)]
            free = torch.tensor(free, dtype=torch.bool, device=query.device)
            if calibrated:
                share = self._nearness(query, routing, free).to(query.device)
                routing = routing._replace(weights=routing.weights * share[:, None])
            if config.twin_share:
                routing = share_with_twins(self, query, routing, free)
        return routing if routing.num_rows == query.shape[0] else routing.repeat_interleave(query.shape[0])

    def search_for_training(self, query: Tensor, name: str) -> Routing:
        """Route a task's own queries [B, D] among its entries, as if the pool had no other task and no floor:
        what is learnt with it depends on the task alone."""
        self._check_queries(query, "query")
        return self.search_among(query, name, self.metric.only([name]))

    def search_among(self, query: Tensor, name: str, metric: nn.Module | None = None) -> Routing:
        """Route queries [B, D] among the entries of a task, without a floor; by another metric, if given."""
        self.fresh_index()
        found = self.search_slots(query.to(self.keys), self.task(name).slots, metric=metric)
        routing = self._weighted(Routing.make(*found, self.version))
        return routing if routing.num_rows == query.shape[0] else routing.repeat_interleave(query.shape[0])

    def search_slots(
        self, query: Tensor, slots: list[int], task: Tensor | None = None, metric: nn.Module | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`ops.key_search` of queries [B, D] among some slots, by another metric, if given: the slots picked,
        weights and scores [B, top_k]. task: [B], the number of the one whose entries a row is compared with.
        """
        slots = torch.tensor(slots, device=self.keys.device)
        features, options = self._how_to_search(query, metric or self.metric)
        keys, bias = (
            metric.index(self.keys[slots]) if metric else (self.index_keys[slots], self.index_bias[slots])
        )
        mask = None if task is None else self.slot_task[slots] == task[:, None]
        picked, *found = ops.key_search(features, keys, bias, mask, **options, backend=self.backend)
        return slots[picked.long()].to(picked), *found

    def _how_to_search(self, query: Tensor, metric: nn.Module) -> tuple[Tensor, dict]:
        """What is compared with the keys, queries or their mean, and the options of a search."""
        weighting = "softmax" if self.config.weighting == "task" else self.config.weighting
        options = dict(top_k=self.config.top_k, weighting=weighting, temperature=self.temperature())
        if self.config.mixing == "batch" and query.shape[0] > 0:
            return metric.transform(query).mean(0, keepdim=True), options
        return query, options | metric.query_transform()

    def _weighted(self, routing: Routing) -> Routing:
        """With weighting="task", the weights of a search by entries made those by tasks:

        w[i] = softmax_t(max_{j of t} score[j] / temperature)[task of i] / (picks of the task of i)
        """
        if self.config.weighting != "task":
            return routing
        task, found = self.slot_task[routing.indices.long()], routing.scores > -torch.inf
        same = (task[:, :, None] == task[:, None, :]) & found[:, None, :]
        best = torch.where(same, routing.scores[:, None, :], -torch.inf).amax(-1)
        weights = ((best - routing.scores[:, :1]) / self.temperature()).exp() / same.sum(-1).clamp(min=1)
        weights = torch.where(found, weights, 0.0)
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-30)
        kept = (routing.weights != 0).any(-1, keepdim=True)  # not below the floor
        return routing._replace(weights=torch.where(kept, weights, 0.0))

    def _nearness(self, query: Tensor, routing: Routing, free: Tensor) -> Tensor:
        """[B] fp32: how much of its weights a query keeps, by how near the task of its best entry is; all of
        them where the row is not `free`."""
        nearness = torch.ones(query.shape[0])
        for name, members in self.rows_by_task(routing, free):
            if module_key(name) in self.metric.tasks:
                statistics, rows = self.metric.tasks[module_key(name)], query[members.to(query.device)]
                nearness[members.cpu()] = statistics.nearness(rows, self.config.coverage, self.config.taper)
        return nearness

    def rows_by_task(self, routing: Routing, asked: Tensor | None = None) -> Iterator[tuple[str, Tensor]]:
        """Every task that is the best of some rows (of those `asked`, [B] bool), and the rows' numbers."""
        best = routing.indices[:, 0].long()
        number = self.slot_task[best]
        if asked is not None:
            number = torch.where(asked, number, -1)
        for task in number.unique().tolist():
            if task >= 0:
                members = (number == task).nonzero().flatten()
                yield self.task_of_slot(int(best[members[0]])), members

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
        if int(picked.min()) < 0 or int(picked.max()) >= self.num_slots:
            raise ValueError(f"the routing names slot {int(picked.max())}; the pool has {self.num_slots}")
        made = routing.pool_version[:, None].expand_as(routing.indices)[used]
        stale = (self.slot_version[picked] > made) | ~self.active[picked]
        if bool(stale.any()):
            raise ValueError(f"the routing is stale: slot {int(picked[stale][0])} changed after it was made")

    def task_mass(self, routing: Routing) -> tuple[Tensor, list[str]]:
        """Summed weights per task: [B, number of tasks] fp32, and the tasks' names in that order."""
        names = self.task_names()
        column = torch.zeros(max(self.num_slots, 1), dtype=torch.int64, device=routing.weights.device)
        for t, name in enumerate(names):
            column[self.tasks[name].slots] = t
        mass = routing.weights.new_zeros(routing.num_rows, max(len(names), 1))
        return mass.scatter_add_(1, column[routing.indices.long()], routing.weights), names

    def _task_mask(self, name: str) -> Tensor:
        """Of what is searched, [R] bool: what the task is found by."""
        return self.searched & (self.index_task == self.slot_task[self.task(name).slots[0]])

    def _check_queries(self, query: Tensor, what: str) -> None:
        if query.ndim != 2 or (self.query_dim is not None and query.shape[1] != self.query_dim):
            wanted = f"[N, {self.query_dim}]" if self.query_dim else "[N, D]"
            raise ValueError(f"{what} must be {wanted}, got {list(query.shape)}")
        if not bool(query.isfinite().all()):
            raise ValueError(
                f"{what} must be finite; row {int((~query.isfinite()).any(-1).nonzero()[0])} is not"
            )
