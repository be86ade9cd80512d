"""A pool on disk: `slm_config.json` (index, checksums), `slm_keys.safetensors`, `slm_heads.safetensors` and
`adapters/<entry>/`, each entry a valid PEFT LoRA folder. Data is written first, the index last, by atomic
rename."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from slm_fast.config import CONFIG_NAME, SLMConfig
from slm_fast.encoder import Encoder
from slm_fast.fitted_temperature import drop_losses
from slm_fast.layers import is_plain
from slm_fast.loading import local_name
from slm_fast.pool import KnowledgePool
from slm_fast.task_statistics import module_key

FORMAT = 6
# 3: a task's directions in fp16, what they leave of its scatter as a diagonal; 4: losses without `against`;
# 5: no means of labels
READABLE = (3, 4, 5, 6)
KEYS_NAME = "slm_keys.safetensors"
HEADS_NAME = "slm_heads.safetensors"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"


def base_fingerprint(base: nn.Module, module_names: list[str]) -> dict:
    """What identifies the frozen base: its type, and 16 weights from each of up to 8 target linears that are
    not quantised."""
    step = max(len(module_names) // 8, 1)
    probe = {}
    for name in module_names[::step][:8]:
        module = base.get_submodule(name)
        weight = getattr(getattr(module, "base_layer", module), "weight", None)
        if is_plain(weight) and weight.is_floating_point():
            flat = weight.detach().flatten()
            where = torch.arange(16, device=flat.device) * (flat.numel() // 16)
            probe[name] = [round(v, 8) for v in flat[where].float().tolist()]
    config = getattr(base, "config", None)
    return {
        "model_type": getattr(config, "model_type", type(base).__name__),
        "name_or_path": getattr(config, "_name_or_path", ""),
        "probe": probe,
    }


def check_base(base: nn.Module, saved: dict, modules: dict[str, tuple[int, int]]) -> None:
    """Raise ValueError when `base` is not the model that the saved pool was trained on."""
    described = f"the pool was made for another base model ({saved['model_type']} {saved['name_or_path']!r})"
    for name, shape in modules.items():
        try:
            module = base.get_submodule(name)
        except AttributeError:
            raise ValueError(f"{described}: this one has no module {name!r}") from None
        if (got := (getattr(module, "in_features", None), getattr(module, "out_features", None))) != shape:
            raise ValueError(f"{described}: {name} is {got} here and {shape} there")
    if (what := _differing(base_fingerprint(base, list(modules)), saved)) is not None:
        raise ValueError(f"{described}: {what}")


def encoder_fingerprint(encoder: Encoder | None) -> dict | None:
    """What identifies the weights that make queries; None for the base's own and for a callable's."""
    if encoder is None or encoder.model is None or encoder.name_or_path in (None, "backbone"):
        return None
    linears = [name for name, module in encoder.model.named_modules() if isinstance(module, nn.Linear)]
    return base_fingerprint(encoder.model, linears)


def check_keys(encoder: Encoder, index: dict) -> None:
    """Raise ValueError when the keys of a saved pool, by its index, are queries of another encoder than this.

    Its weights say so, wherever they lie; of pools saved without them the last part of the name. Encoders
    without a name are not compared.
    """
    config, here = index["config"], encoder.name_or_path
    saved = config["encoder_name_or_path"]
    if encoder.model is None or here is None or saved is None:
        return
    theirs, ours = f"the pool's keys are queries of the encoder {saved!r}", f"this model has {here!r}"
    mine = encoder_fingerprint(encoder)
    if mine is None or saved == "backbone":
        same = here == saved
    elif "encoder" in index:
        same = _differing(mine, index["encoder"]) is None
    else:
        same = Path(local_name(here)).name == Path(local_name(saved)).name
    if not same:
        raise ValueError(f"{theirs}, {ours}")
    if (layers := encoder.layers_of(config["query_layers"])) != encoder.layers:
        raise ValueError(f"{theirs} from its layers {layers}, {ours} from its layers {encoder.layers}")
    prompts, generates = config.get("route_in_prefill", False), getattr(encoder.model, "can_generate", bool)()
    if here == "backbone" and generates and prompts != encoder.in_prefill:
        forms = ["texts as they are", "prompts"]
        raise ValueError(f"{theirs} for {forms[prompts]}, {ours} for {forms[not prompts]} (route_in_prefill)")


def _differing(here: dict, saved: dict) -> str | None:
    """In what two fingerprints differ, if they do."""
    if here["model_type"] != saved["model_type"]:
        return f"this one is a {here['model_type']}"
    for name, values in saved["probe"].items():
        mine = torch.tensor(here["probe"].get(name, values))
        if not torch.allclose(mine, torch.tensor(values), rtol=4e-3, atol=1e-6):
            return f"the weights of {name} differ"
    return None


def _adapter_files(pool: KnowledgePool, slot: int, base_name: str) -> dict[str, bytes]:
    r, rows = int(pool.rank[slot]), pool.rows_of([slot])
    tensors = {}
    for name, factors in zip(pool.modules_shape, pool.factors, strict=True):
        tensors[f"base_model.model.{name}.lora_A.weight"] = factors.A[rows].detach().cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = factors.B[rows].detach().cpu().T.contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_name,
        "r": r,
        "lora_alpha": float(pool.scaling[slot]) * r,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": list(pool.modules_shape),
    }
    return {
        ADAPTER_WEIGHTS: save(tensors, metadata={"format": "pt"}),
        ADAPTER_CONFIG: (json.dumps(config, indent=2) + "\n").encode(),
    }


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def save_pool(
    pool: KnowledgePool,
    base: nn.Module,
    directory: str | Path,
    encoder: Encoder | None = None,
    tasks: Sequence[str] | None = None,
) -> None:
    """Write the pool, or some tasks of it, to `directory`; a save that was cut off is recognised on loading.
    Processes that save to one directory do so one after another."""
    root = Path(directory)
    if root.exists() and not root.is_dir():
        raise OSError(f"{root} is not a directory")
    files, index = _contents(pool, base, encoder, tasks)
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root):
        _finish_interrupted_save(root)
        try:
            previous = read_index(root)
        except OSError:
            previous = {"entries": []}
        try:
            for name, data in files.items():  # the index last: while it is missing, nothing has been renamed
                _write(_staged(root, name), data)
        except OSError:
            for name in files:
                _staged(root, name).unlink(missing_ok=True)
            raise
        for name in files:
            os.replace(_staged(root, name), root / name)
        kept = {entry["name"] for entry in index["entries"]}
        for entry in previous["entries"]:
            if entry["name"] not in kept:
                shutil.rmtree(root / "adapters" / entry["name"], ignore_errors=True)


def _contents(
    pool: KnowledgePool, base: nn.Module, encoder: Encoder | None, names: Sequence[str] | None
) -> tuple[dict[str, bytes], dict]:
    """A saved pool's files by name, the index last, and the index."""
    metric, heads = pool.metric, pool.heads.state_dict()
    if names is None:
        names = [*pool.tasks]
    else:
        names, metric = [*dict.fromkeys(names)], metric and metric.only(names)
        heads = {k: v for k, v in heads.items() if k.rpartition(".")[0] in map(module_key, names)}
    tasks = [pool.task(name) for name in names]
    fingerprint = base_fingerprint(base, list(pool.modules_shape))
    slots = [slot for task in tasks for slot in task.slots]
    of_task = pool.tasks_of_slots()
    files: dict[str, bytes] = {}
    for slot in slots:
        for name, data in _adapter_files(pool, slot, fingerprint["name_or_path"]).items():
            files[f"adapters/{pool.names[slot]}/{name}"] = data
    keys = {"keys": pool.keys[slots].cpu().contiguous()}
    if metric is not None:
        keys |= {f"metric.{k}": v.cpu().contiguous() for k, v in metric.state_dict().items()}
    files[KEYS_NAME] = save(keys)
    files[HEADS_NAME] = save({k: v.cpu().contiguous() for k, v in heads.items()})
    index = {
        "format": FORMAT,
        "config": pool.config.to_dict() | (encoder.settings() if encoder else {}),
        "base": fingerprint,
        "modules": {name: list(shape) for name, shape in pool.modules_shape.items()},
        "dtype": str(pool.factors[0].A.dtype).removeprefix("torch."),
        "tasks": [{"name": t.name, "labels": t.labels, "max_length": t.max_length} for t in tasks],
        "entries": [
            {
                "name": pool.names[s],
                "task": of_task[s],
                "rank": int(pool.rank[s]),
                "scaling": float(pool.scaling[s]),
            }
            for s in slots
        ],
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
    }
    if (of_encoder := encoder_fingerprint(encoder)) is not None:
        index["encoder"] = of_encoder
    files[CONFIG_NAME] = (json.dumps(index, indent=1) + "\n").encode()
    return files, index


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Alone among the processes of this machine; on file systems without locks as if alone."""
    handle = os.open(root, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _staged(root: Path, name: str) -> Path:
    return root / (name + ".tmp")


def _finish_interrupted_save(root: Path) -> None:
    """Complete the renames of a save that was killed among them, when all its data is there."""
    try:
        files = _parse_index(_staged(root, CONFIG_NAME))["files"]
        places = {name: _find(root, name, digest) for name, digest in files.items()}
    except OSError:
        return
    for name, path in places.items():
        os.replace(path, root / name)
        _staged(root, name).unlink(missing_ok=True)
    os.replace(_staged(root, CONFIG_NAME), root / CONFIG_NAME)


def _find(root: Path, name: str, digest: str) -> Path:
    """Where the data with this checksum is: already renamed or still staged."""
    for path in (root / name, _staged(root, name)):
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == digest:
            return path
    raise OSError(f"{root / name} has no data with the checksum of the index")


def read_index(directory: str | Path) -> dict:
    """The index of a saved pool. Raises OSError when it is missing, unreadable or of a newer format."""
    path = Path(directory) / CONFIG_NAME
    if not path.is_file():
        raise OSError(f"{directory} holds no saved pool: {CONFIG_NAME} is missing")
    return _parse_index(path)


def _parse_index(path: Path) -> dict:
    try:
        index = json.loads(path.read_text(encoding="utf8"))
        version = index["format"]
        for section in ("config", "base", "modules", "dtype", "tasks", "entries", "files"):
            index[section]
        for name in (KEYS_NAME, HEADS_NAME):
            index["files"][name]
    except (ValueError, KeyError, TypeError) as error:
        raise OSError(f"{path} is damaged: {error!r}") from error
    if version not in READABLE:
        known = ", ".join(map(str, READABLE))
        raise OSError(f"{path} has format {version}; this release reads formats {known}")
    return index


def _read(root: Path, name: str, digest: str) -> bytes:
    path = root / name
    try:
        data = path.read_bytes()
    except OSError as error:
        raise OSError(f"{path} is missing or unreadable: {error}") from error
    if hashlib.sha256(data).hexdigest() != digest:
        raise OSError(f"{path} is truncated or corrupted: its checksum is not the one in {CONFIG_NAME}")
    return data


def _tensors(root: Path, name: str, data: bytes) -> dict[str, Tensor]:
    try:
        return load(data)
    except SafetensorError as error:
        raise OSError(f"{root / name} is not a valid safetensors file: {error}") from error


def load_pool(base: nn.Module, directory: str | Path) -> KnowledgePool:
    """Read a saved pool. Raises OSError on missing or damaged files, ValueError on another base."""
    root = Path(directory)
    if _staged(root, CONFIG_NAME).exists():
        with _locked(root):  # another process may be at it
            _finish_interrupted_save(root)
    index = read_index(root)
    config = SLMConfig.from_dict(index["config"])
    modules = {name: tuple(shape) for name, shape in index["modules"].items()}
    check_base(base, index["base"], modules)
    data = {name: _read(root, name, digest) for name, digest in index["files"].items()}
    stored = _tensors(root, KEYS_NAME, data[KEYS_NAME])
    heads = _tensors(root, HEADS_NAME, data[HEADS_NAME])
    keys = stored.pop("keys")
    pool = KnowledgePool(config, modules, keys.shape[1] or None, getattr(torch, index["dtype"]))
    row = 0
    for task in index["tasks"]:
        entries = [entry for entry in index["entries"] if entry["task"] == task["name"]]
        prefix = f"{module_key(task['name'])}."
        weight = heads.get(prefix + "weight")
        pool.add_task(
            task["name"],
            keys[row : row + len(entries)],
            rank=[entry["rank"] for entry in entries],
            labels=task["labels"],
            hidden_size=None if weight is None else weight.shape[1],
            generator=torch.Generator(),  # everything drawn here is overwritten
        )
        pool.task(task["name"]).max_length = task.get("max_length")
        for slot, entry in zip(pool.task(task["name"]).slots, entries, strict=True):
            pool.scaling[slot] = entry["scaling"]
            name = f"adapters/{entry['name']}/{ADAPTER_WEIGHTS}"
            _fill_entry(pool, slot, _tensors(root, name, data[name]), root / name)
        row += len(entries)
    pool.heads.load_state_dict(heads)
    if pool.metric is not None:
        pool.metric.load_state_dict({k.removeprefix("metric."): v for k, v in stored.items()})
        drop_losses(pool)  # against tasks that were not saved
        pool.refresh_index()
    return pool


def _fill_entry(pool: KnowledgePool, slot: int, tensors: dict[str, Tensor], path: Path) -> None:
    rows = pool.rows_of([slot])
    for name, factors in zip(pool.modules_shape, pool.factors, strict=True):
        for side, target in (("A", factors.A[rows]), ("B", factors.B[rows].T)):
            key = f"base_model.model.{name}.lora_{side}.weight"
            if key not in tensors or tensors[key].shape != target.shape:
                raise OSError(f"{path} lacks {key} of shape {list(target.shape)}")
            target.copy_(tensors[key])
