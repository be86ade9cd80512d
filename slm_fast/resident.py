"""A pool whose factors live in host memory, with the entries in use in slots beside the base weights.

A batch takes a lease: its entries are copied in unless they are there already, slots that no lease holds make
room, least recently used first, and the lease's routing names slots. A batch of more entries than there is
room for gets slabs of its own, which live as long as its lease.
"""

import threading
from itertools import islice

import torch
from torch import Tensor

from slm_fast.factors import Factors
from slm_fast.pool import KnowledgePool
from slm_fast.routing import Routing

Found = tuple[int, int, int]  # of a picked entry: its version, its first row in the pool, its rank


class Slabs:
    """Entries side by side on one device, in slots of `width` rows. Layers read it like a `KnowledgePool`
    whose entries are the slots."""

    owner = None  # nothing here is trained

    @torch.inference_mode(False)
    def __init__(self, pool: KnowledgePool, slots: int, width: int, device: torch.device) -> None:
        self.pool, self.device, self.dtype = pool, device, pool.factors[0].A.dtype
        self.max_rank, self.num_rows = width, slots * width
        self.factors = [Factors(*shape, self.dtype).to(device) for shape in pool.modules_shape.values()]
        for factors in self.factors:
            factors.grow(self.num_rows)
        self.start = torch.arange(slots, dtype=torch.int32, device=device) * width
        self.rank = torch.zeros(slots, dtype=torch.int32, device=device)
        self.scaling = torch.zeros(slots, device=device)
        self.row_entry = torch.full((self.num_rows,), -1, dtype=torch.int32, device=device)

    @property
    def version(self) -> int:
        return self.pool.version

    @property
    def backend(self) -> str | None:
        return self.pool.backend

    @torch.inference_mode(False)
    @torch.no_grad()
    def load(
        self, slots: list[int], entries: dict[int, Found], other: "Slabs | None" = None, others=()
    ) -> None:
        """Copy entries of the pool into slots, one each; or from the slots `others` of `other` slabs, where
        they are already."""
        source = self.pool.factors if other is None else other.factors
        begins = [begin for _, begin, _ in entries.values()]
        if other is not None:
            begins = [slot * other.max_rank for slot in others]
        places = [
            (slice(slot * self.max_rank, slot * self.max_rank + rank), slice(begin, begin + rank))
            for slot, begin, (_, _, rank) in zip(slots, begins, entries.values(), strict=True)
        ]
        for own, target in zip(source, self.factors, strict=True):
            for to, rows in places:
                target.A[to].copy_(own.A[rows], non_blocking=True)
                target.B[to].copy_(own.B[rows], non_blocking=True)
        ranks = [rank for *_, rank in entries.values()]
        slot, entry, rank = uploaded([slots, list(entries), ranks], torch.int64, self.device)
        self.rank[slot] = rank.int()
        self.scaling[slot] = self.pool.scaling[entry.to(self.pool.scaling.device)].to(self.device)
        used = torch.arange(self.max_rank, device=self.device) < rank[:, None]
        self.row_entry.view(-1, self.max_rank)[slot] = torch.where(used, slot[:, None], -1).int()


class Lease:
    """A running batch's claim on its entries, which stay as they were until `release`, or the end of `with`.

    pool: what layers read in the place of the `KnowledgePool`.  routing: the batch's routing on the pool's
    device, its indices slots of `pool`. On a GPU the batch must run on the stream that was current when the
    lease was taken.
    """

    def __init__(self, pool: Slabs, routing: Routing, slots: list[int], resident: "ResidentPool") -> None:
        self.pool, self.routing = pool, routing
        self._slots, self._resident = slots, resident
        self._stream = torch.cuda.current_stream(pool.device) if pool.device.type == "cuda" else None

    def release(self) -> None:
        """Give the slots back; a second call does nothing."""
        resident, self._resident = self._resident, None
        if resident is not None:
            resident._release(self)

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *exception) -> None:
        self.release()


class ResidentPool:
    """Slots on the device for entries of a pool whose factors stay in host memory; see `acquire`.

    All slots have the pool's largest rank. An entry of a larger rank, a new dtype or a new device makes new
    slots, which are filled on demand again. Adding an entry to the pool costs nothing here, and an entry
    whose factors the pool wrote again (training, removal, reuse) is copied again when it is next picked.
    Whoever writes to the pool's factors by hand calls `forget`. Threads may share a resident pool; the pool
    itself must not be changed while one acquires.

    Args: slots: how many entries fit.  memory: bytes instead, at least those of one slot.  device: where;
    None follows the pool.
    Raises ValueError unless one of slots and memory is given and admits a slot.
    """

    def __init__(
        self, pool: KnowledgePool, slots: int | None = None, *, memory: int | None = None, device=None
    ) -> None:
        if (slots is None) == (memory is None):
            raise ValueError(f"give one of slots and memory, got slots={slots} and memory={memory}")
        if slots is not None and slots < 1:
            raise ValueError(f"slots must be at least 1, got {slots}")
        if pool.owner is not None:
            raise ValueError(f"task {pool.owner!r} is being trained; finish it first")
        self.pool = pool
        self.settings = {"slots": slots, "memory": memory, "device": device}
        if memory is not None and memory < (wanted := self._slot_bytes()):
            raise ValueError(f"memory must hold a slot of {wanted} bytes, got {memory}")
        pool.keep_on_host()
        self.hits = self.misses = self.evictions = self.overflows = self.bytes_copied = 0
        self.slabs: Slabs | None = None  # made by the first batch, since the pool may move before
        self._lock = threading.Lock()

    @property
    def num_slots(self) -> int:
        if self.settings["slots"] is not None:
            return self.settings["slots"]
        return max(self.settings["memory"] // self._slot_bytes(), 1)

    def stats(self) -> dict[str, int]:
        """Entries found in a slot, copied into one, driven out of one; batches that did not fit; bytes."""
        names = ("hits", "misses", "evictions", "overflows", "bytes_copied")
        return {name: getattr(self, name) for name in names}

    def acquire(self, routing: Routing) -> Lease:
        """Make the entries that a batch picks (weight not 0) resident, until the lease is released.

        The host waits for the device once, to read the routing. Copies run on a stream of their own from
        pinned memory; the current stream waits for them.
        Raises ValueError while the pool is being trained, and on picks that are not in the pool.
        """
        if torch.compiler.is_compiling():
            raise ValueError(
                "a resident pool cannot be used inside a graph: enter state.use(routing) outside"
            )
        if self.pool.owner is not None:
            raise ValueError(f"task {self.pool.owner!r} is being trained: no batch can use a resident pool")
        found, picks = self._read(routing)
        with self._lock:
            slabs = self._fitted()
            held = self._seated(found)
            if self._loaded is not None:
                torch.cuda.current_stream(slabs.device).wait_event(self._loaded)
            if held is None:
                self.overflows += 1
                slabs = self._overflow(found)
        slots = list(range(len(found))) if held is None else held
        places = dict(zip(found, slots, strict=True))
        indices = uploaded([places.get(pick, 0) for pick in picks], torch.int32, slabs.device)
        translated = routing.to(slabs.device)._replace(indices=indices.view(routing.indices.shape))
        return Lease(slabs, translated, held or [], self)

    def prefetch(self, routing: Routing) -> None:
        """Copy the entries of a coming batch into slots that no lease holds, as many as there is room for.

        Nothing is held: what other batches need meanwhile may drive them out again. Raises as `acquire` does.
        """
        found, _ = self._read(routing)
        with self._lock:
            self._fitted()
            known = {entry for entry, facts in found.items() if (entry, facts[0]) in self._slot_of}
            room = len(self._idle) - sum(self._slot_of[e, found[e][0]] in self._idle for e in known)
            missing = [entry for entry in found if entry not in known][:room]
            kept = {entry: facts for entry, facts in found.items() if entry in known or entry in missing}
            self._let_go(self._seated(kept), None)

    def forget(self) -> None:
        """Copy every entry again when it is next picked."""
        with self._lock:
            if self.slabs is not None:
                self._slot_of, self._key = {}, [None] * len(self._key)

    def _read(self, routing: Routing) -> tuple[dict[int, Found], list[int]]:
        """What the pool knows about the picked entries, and all picks in order, -1 for those of weight 0."""
        pool = self.pool
        tables = (pool.start, pool.rank, pool.factors_version, pool.active)
        device, capacity = pool.start.device, pool.start.shape[0]
        indices = routing.indices.to(device).long()
        exists = (indices >= 0) & (indices < capacity)
        at = torch.where(exists, indices, 0)
        columns = [t[at].long() for t in tables] if capacity else [at] * len(tables)
        used = (routing.weights != 0).to(device)
        host = torch.stack([indices, used.long(), exists.long(), *columns]).flatten(1).tolist()
        found, picks = {}, []
        for pick, use, exist, begin, rank, version, active in zip(*host, strict=True):
            if use and not (exist and active):
                raise ValueError(f"the routing picks entry {pick}, which is not in the pool")
            if use:
                found[pick] = (version, begin, rank)
            picks.append(pick if use else -1)
        return found, picks

    def _fitted(self) -> Slabs:
        """The slots, made again when the pool's largest rank, dtype or device changed."""
        pool = self.pool
        device = torch.device(self.settings["device"] or pool.start.device)
        width, dtype = self._width(), pool.factors[0].A.dtype
        old = self.slabs
        if old is not None and (old.max_rank, old.dtype, old.device) == (width, dtype, device):
            return old
        if old is not None and old.device.type == "cuda":
            torch.cuda.synchronize(old.device)  # before memory that other streams read is reused
        self.slabs = old = None  # the old slots' memory goes first
        slots = self.num_slots
        self.slabs = Slabs(pool, slots, width, device)
        self._slot_of: dict[tuple[int, int], int] = {}  # of (entry, version)
        self._key: list[tuple[int, int] | None] = [None] * slots
        self._held = [0] * slots  # leases
        self._idle = dict.fromkeys(range(slots))  # held by none, least recently used first
        self._done = [{} for _ in range(slots)]  # {stream: event} of the work that leases ran
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._loaded: torch.cuda.Event | None = None  # of the last copy
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))
            self._loaded = self._stream.record_event()
        return self.slabs

    def _seated(self, found: dict[int, Found]) -> list[int] | None:
        """A held slot for each entry, filled where it has to be; None, without a change, if too few."""
        keys = {entry: (entry, version) for entry, (version, _, _) in found.items()}
        slots = {entry: self._slot_of[key] for entry, key in keys.items() if key in self._slot_of}
        missing = {entry: facts for entry, facts in found.items() if entry not in slots}
        hits = set(slots.values())
        victims = list(islice((slot for slot in self._idle if slot not in hits), len(missing)))
        if len(victims) < len(missing):
            return None
        for slot in victims:
            if self._key[slot] is not None:
                self._slot_of.pop(self._key[slot])
                self._key[slot], self.evictions = None, self.evictions + 1
        if missing:
            self._load(victims, missing)
        for entry, slot in zip(missing, victims, strict=True):
            slots[entry], self._key[slot], self._slot_of[keys[entry]] = slot, keys[entry], slot
        for slot in slots.values():
            self._held[slot] += 1
            self._idle.pop(slot, None)
        self.hits, self.misses = self.hits + len(hits), self.misses + len(missing)
        return [slots[entry] for entry in found]

    def _overflow(self, found: dict[int, Found]) -> Slabs:
        """Slabs for one batch: entries that have a slot are copied from there, the others from the pool."""
        home, slabs = self.slabs, Slabs(self.pool, len(found), self.slabs.max_rank, self.slabs.device)
        number = {entry: place for place, entry in enumerate(found)}
        seats = {
            e: self._slot_of[e, facts[0]] for e, facts in found.items() if (e, facts[0]) in self._slot_of
        }
        for known in (True, False):
            part = {entry: facts for entry, facts in found.items() if (entry in seats) == known}
            if part and known:
                slabs.load([number[e] for e in part], part, home, [seats[e] for e in part])
            elif part:
                slabs.load([number[e] for e in part], part)
                self._count_bytes(part)
        if self._stream is not None:
            stream = torch.cuda.current_stream(home.device)
            for slot in seats.values():
                self._done[slot][stream] = stream.record_event()
        return slabs

    def _load(self, slots: list[int], entries: dict[int, Found]) -> None:
        self._count_bytes(entries)
        if self._stream is None:
            self.slabs.load(slots, entries)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.slabs.device))  # the pool's tables
        for slot in slots:
            for event in self._done[slot].values():
                self._stream.wait_event(event)
            self._done[slot] = {}
        with torch.cuda.stream(self._stream):
            self.slabs.load(slots, entries)
        self._loaded = self._stream.record_event()

    def _count_bytes(self, entries: dict[int, Found]) -> None:
        self.bytes_copied += row_bytes(self.pool) * sum(rank for *_, rank in entries.values())

    def _release(self, lease: Lease) -> None:
        with self._lock:
            if lease.pool is not self.slabs:
                if lease._slots and lease._stream is not None:
                    lease._stream.synchronize()  # the slots were made again: their memory goes now
                return
            self._let_go(lease._slots, lease._stream)

    def _let_go(self, slots: list[int], stream: torch.cuda.Stream | None) -> None:
        """Of a batch that ran on `stream`."""
        done = None if stream is None else stream.record_event()
        for slot in slots:
            self._held[slot] -= 1
            if done is not None:
                self._done[slot][stream] = done
            if not self._held[slot]:
                self._idle[slot] = None

    def _width(self) -> int:
        return self.pool.max_rank or self.pool.config.r

    def _slot_bytes(self) -> int:
        return self._width() * row_bytes(self.pool)

    def __getstate__(self) -> dict:
        return {"pool": self.pool, "settings": self.settings}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["pool"], **state["settings"])


def row_bytes(pool: KnowledgePool) -> int:
    """Of one rank of an entry, over all linears."""
    return pool.factors[0].A.element_size() * sum(i + o for i, o in pool.modules_shape.values())


def uploaded(values: list, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor on `device` for which the host does not wait."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)
