"""What was trained once, for every run whose training would be the same: other orders, other benchmarks."""

import hashlib
import json
from pathlib import Path

from torch import Tensor

from slm_fast.config import SLMConfig
from slm_fast.continual.method import Method
from slm_fast.continual.tasks import Task
from slm_fast.linear_probe import TEXTS_A_LABEL
from slm_fast.pool import KnowledgePool
from slm_fast.storage import base_fingerprint, load_pool, read_index, save_pool
from slm_fast.task_statistics import common_labels, module_key

COST_NAME = "cost.json"
NO_MATTER = ("output_dir", "logging_dir", "run_name", "report_to", "disable_tqdm", "logging_steps")
NO_MATTER += ("save_steps", "save_total_limit")  # of the training arguments
OF_RETRIEVAL = ("twin_share", "min_similarity", "coverage", "taper", "faiss_above", "label_keys")
ANY_RANK = 512  # stands in a folder's name for a `statistics_rank` that training does not depend on


class TrainedTasks:
    """A folder of trained tasks. A folder in it is a saved pool, named after the method, the tasks and all
    that their training depends on: rows, settings, seed, base and encoder. What is not training is the taking
    run's own: statistics are made again from the task's texts where it keeps them in another way, and what
    temperature="auto" is fitted to is measured again, against the tasks that the run has.

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
        pool, own = load_pool(method.model.base_model, place), method.model.pool
        for task in method.learnt_at(stage):
            _keep_statistics(pool, task, method)
            queries = _queries(task, method) if own.config.temperature == "auto" else None
            own.take_task(pool, task.name, queries, _answers(task))
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
        save_pool(pool, model.base_model, place, model.encoder)

    def _place(self, method: Method, stage: int) -> Path | None:
        encoder = method.model.encoder.settings()
        if not method.independent or encoder["encoder_name_or_path"] is None:
            return None
        tasks, runner = method.learnt_at(stage), method.runner
        model = method.model
        config = model.slm_config.to_dict() | encoder
        if not _depends_on_statistics(model.slm_config):
            config["statistics_rank"] = ANY_RANK
        what = {
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
        if config["head_init"] == "probe" and any(task.labels for task in tasks):
            what["probe"] = TEXTS_A_LABEL
        digest = hashlib.sha256(json.dumps(what, default=str).encode()).hexdigest()[:16]
        return self.folder / f"{method.name}-{tasks[0].name if len(tasks) == 1 else len(tasks)}-{digest}"


def _depends_on_statistics(config: SLMConfig) -> bool:
    """Whether what a task learns does: not where averaged keys' entries are all mixed, in equal parts."""
    alike = config.weighting == "task" and config.top_k >= config.entries_per_task
    return config.metric == "whitened" and not (alike and config.key_method != "kmeans")


def _keep_statistics(pool: KnowledgePool, task: Task, method: Method) -> None:
    """Make the statistics of a pool's task again where the method's model keeps them in another way."""
    if not pool.metric.has_statistics:
        return
    old = pool.metric.tasks[module_key(task.name)]
    rank = method.model.pool.new_metric(len(old.mean)).rank
    answers = _answers(task) if method.model.slm_config.label_keys else None
    if old.is_kept_in(rank) and (len(old.label_scale) or not common_labels(answers)):
        return
    pool.metric.remove(task.name)
    pool.metric.rank = rank
    pool.metric.update(task.name, _queries(task, method).to(pool.keys), answers)


def _answers(task: Task) -> list[str]:
    return [row.target for row in task.train]


def _queries(task: Task, method: Method) -> Tensor:
    return method.model.router.queries([row.text for row in task.train], progress=method.runner.progress)


def _content(task: Task) -> list:
    return [task.name, task.labels, [row.content() for row in task.train]]


def _has_pool(folder: Path) -> bool:
    try:
        read_index(folder)
    except OSError:
        return False
    return True
