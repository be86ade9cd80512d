"""What was trained once, for every run whose training would be the same: other orders, other benchmarks."""

import hashlib
import json
from pathlib import Path

from slm_fast.continual.method import Method
from slm_fast.continual.tasks import Task
from slm_fast.storage import base_fingerprint, load_pool, read_index, save_pool

COST_NAME = "cost.json"
VERSION = 2  # raised where the same settings learn something else, or keep other statistics, than before
NO_MATTER = ("output_dir", "logging_dir", "run_name", "report_to", "disable_tqdm", "logging_steps")
NO_MATTER += ("save_steps", "save_total_limit")  # of the training arguments
OF_RETRIEVAL = ("twin_share", "min_similarity", "coverage", "faiss_above")  # of the config


class TrainedTasks:
    """A folder of trained tasks. A folder in it is a saved pool, named after the method, the tasks and all
    that their training depends on: rows, settings, seed, base and encoder.

    Only training that does not depend on the tasks before is kept (`Method.independent`), and none where the
    encoder has no name.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def take(self, method: Method, stage: int) -> dict | None:
        """Add what the method would learn at a stage to its pool; what that has cost, or None where it is not
        here. Raises OSError on a damaged folder."""
        place = self._place(method, stage)
        if place is None or not _has_pool(place):
            return None
        pool = load_pool(method.model.base_model, place)
        for task in method.learnt_at(stage):
            method.model.pool.take_task(pool, task.name)
        return json.loads((place / COST_NAME).read_text(encoding="utf8"))

    def keep(self, method: Method, stage: int, cost: dict) -> None:
        """Save what the method learnt at a stage, and its cost."""
        place = self._place(method, stage)
        if place is None or _has_pool(place):
            return
        place.mkdir(parents=True, exist_ok=True)
        (place / COST_NAME).write_text(json.dumps(cost), encoding="utf8")
        model = method.model
        pool = model.pool.only([task.name for task in method.learnt_at(stage)])
        save_pool(pool, model.base_model, place, model.encoder.settings())

    def _place(self, method: Method, stage: int) -> Path | None:
        encoder = method.model.encoder.settings()
        if not method.independent or encoder["encoder_name_or_path"] is None:
            return None
        tasks, runner = method.learnt_at(stage), method.runner
        model = method.model
        config = model.slm_config.to_dict() | encoder
        what = {
            "version": VERSION,
            "method": method.name,
            "options": method.options,
            "tasks": [_content(task) for task in tasks],
            "config": {name: value for name, value in config.items() if name not in OF_RETRIEVAL},
            "base": base_fingerprint(model.base_model, list(model.pool.modules_shape)),
            "dtypes": [str(model.base_model.dtype), str(model.pool.factors[0].A.dtype)],
            "training": {k: v for k, v in runner.args.to_dict().items() if k not in NO_MATTER},
            "seed": runner.seed,
            "max_length": runner.max_length,
        } | runner.uncommon_settings()
        digest = hashlib.sha256(json.dumps(what, default=str).encode()).hexdigest()[:16]
        return self.folder / f"{method.name}-{tasks[0].name if len(tasks) == 1 else len(tasks)}-{digest}"


def _content(task: Task) -> list:
    return [task.name, task.labels, [row.content() for row in task.train]]


def _has_pool(folder: Path) -> bool:
    try:
        read_index(folder)
    except OSError:
        return False
    return True
