"""Metrics that score a query against keys, and the three ways to make a task's keys from its queries.

Every metric is reduced to `score(q, p) = <transform(q), c_p> + beta_p`, so that one search serves all of
them.
"""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slm_fast.config import SLMConfig
from slm_fast.reference import group_normalize, key_learning_loss, transform_query
from slm_fast.task_statistics import DIRECTION_BYTES, TaskStatistics, module_key

TEMPERATURES = tuple(2 ** (n / 4) for n in range(25))  # 1 to 64, among which one is fitted


class GroupedCosine(nn.Module):
    """The paper's metric: mean over groups of the cosine between a query's and a key's slice.

    score = <gn(q), gn(k)> / G,  gn = L2-normalise each of the G slices.  Source: SLM (ICLR 2024), section
    3.2.
    """

    default_temperature = 0.05
    has_statistics = False

    def __init__(self, config: SLMConfig, dim: int) -> None:
        super().__init__()
        self.num_groups = config.num_groups
        if dim % self.num_groups:
            raise ValueError(f"the query size {dim} is not divisible by num_groups={self.num_groups}")

    def update(self, name: str, query: Tensor, answers: Sequence[str] | None = None) -> None:
        """Take in a new task's queries [N, D]; the cosine needs no statistics."""

    def remove(self, name: str) -> bool:
        """Whether the metric changes when a task is removed: never."""
        return False

    def only(self, names: Sequence[str]) -> "GroupedCosine":
        return self

    def query_transform(self) -> dict:
        """`transform` as arguments of `ops.key_search`."""
        return {"num_groups": self.num_groups}

    def transform(self, query: Tensor) -> Tensor:
        return transform_query(query, **self.query_transform())

    def index(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [P, D] -> what is searched: c [P, D] and beta [P]."""
        return group_normalize(keys, self.num_groups) / self.num_groups, keys.new_zeros(keys.shape[0])

    def embed(self, query: Tensor) -> Tensor:
        """Queries [N, D] -> points whose Euclidean geometry is the metric's; for clustering."""
        return group_normalize(query, self.num_groups)


class Whitened(nn.Module):
    """Log-likelihood ratio of a Gaussian at the key against one at the mean of all tasks, in nats.

        score = <q - mu, c> + beta,   c = (S + lambda I)^-1 (k - mu),   beta = -<k - mu, c> / 2

    which orders keys by their Mahalanobis distance to q. S is the pooled within-task covariance, the sum of
    what every task's `TaskStatistics` say, which are never examples: a new task changes the metric, not the
    stored keys, and a removed one leaves the metric as if it had never been there, to the bit.
    lambda is `shrinkage` times the mean diagonal of S. By default it comes from the statistics alone: the OAS
    estimate (Chen et al., 2010), which looks at S only, or 0.08 (D / n)^2, which also covers the error of the
    keys at few texts (the constant was chosen on held-out training texts): the larger one, at most 1.
    """

    has_statistics = True

    def __init__(self, config: SLMConfig, dim: int) -> None:
        super().__init__()
        # Over tasks, 6 suits held-out training texts of 5 and 25 tasks. Averaged keys of a task differ by
        # noise alone: a high temperature weighs them alike. Clustered keys differ for a reason, and those of
        # another task are as near.
        averaged = config.key_method == "group_avg"
        self.default_temperature = 6.0 if config.weighting == "task" else 32.0 if averaged else 4.0
        self.shrinkage = config.shrinkage
        self.rank = config.statistics_rank or max(DIRECTION_BYTES // dim, 1)
        self.register_buffer("scatter", torch.zeros(dim, dim))
        self.tasks = nn.ModuleDict()
        self._forget()

    def update(self, name: str, query: Tensor, answers: Sequence[str] | None = None) -> None:
        """Add the queries [N, D] of a new task to the statistics; with the answers to them, also the means
        of its labels."""
        self.take(name, TaskStatistics.of(query, self.rank, answers))

    def take(self, name: str, statistics: TaskStatistics) -> None:
        """Add what is known of a task's queries."""
        position = 1 + max((int(task.position) for task in self.tasks.values()), default=-1)
        statistics.position.fill_(position)
        self.tasks[module_key(name)] = statistics
        self.scatter = self.scatter + statistics.scatter().to(self.scatter)
        self._forget()

    def remove(self, name: str) -> bool:
        """Take a task out of the statistics; False where it has none."""
        if module_key(name) not in self.tasks:
            return False
        del self.tasks[module_key(name)]
        self.scatter = torch.zeros_like(self.scatter)
        for task in self.tasks.values():
            self.scatter = self.scatter + task.scatter().to(self.scatter)
        self._forget()
        return True

    def only(self, names: Sequence[str]) -> "Whitened":
        """The metric as it is without any other tasks; this one is not changed."""
        other = copy.copy(self)
        other._buffers, other._modules = {"scatter": torch.zeros_like(self.scatter)}, {}
        other.tasks = nn.ModuleDict()
        other._forget()
        known = {key: name for name in names if (key := module_key(name)) in self.tasks}
        if list(known) == list(self.tasks):  # the same sum
            other.tasks.update(self.tasks)
            other.scatter = self.scatter
            return other
        for key, name in known.items():
            other.take(name, copy.deepcopy(self.tasks[key]))
        return other

    def fitted_temperature(self) -> float:
        """The temperature at which held-out texts are best told apart: the least mean loss of the tasks that
        have losses; the default where none has."""
        curves = [task.losses for task in self.tasks.values() if len(task.losses)]
        if not curves:
            return self.default_temperature
        return TEMPERATURES[int(torch.stack(curves).mean(0).argmin())]

    def _forget(self) -> None:
        self._factor: Tensor | None = None
        self._mean: Tensor | None = None

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        """Makes room for the tasks that were saved, in their order."""
        begin, end = f"{prefix}tasks.", ".position"
        saved = {k: int(v) for k, v in state_dict.items() if k.startswith(begin) and k.endswith(end)}
        self.tasks = nn.ModuleDict()
        for key in sorted(saved, key=saved.__getitem__):
            stem = key.removesuffix("position")
            own = {n: state_dict[stem + n] for n in TaskStatistics.SIZED if stem + n in state_dict}
            self.tasks[key.removeprefix(begin).removesuffix(end)] = TaskStatistics.like(own)
            state_dict.update({stem + n: tensor for n, tensor in own.items()})
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._forget()

    @property
    def mean(self) -> Tensor:
        """Of the tasks' means, [D] fp32."""
        if self._mean is None or self._mean.device != self.scatter.device:
            means = [task.mean for task in self.tasks.values()]
            mean = sum(means) / len(means) if means else torch.zeros(len(self.scatter))
            self._mean = mean.float().to(self.scatter.device)
        return self._mean

    def covariance(self) -> tuple[Tensor, float]:
        """The within-task covariance S [D, D] fp32 and the ridge lambda, in the units of S."""
        dim = self.scatter.shape[0]
        degrees = max(sum(int(task.count) - 1 for task in self.tasks.values()), 1)
        cov = self.scatter / degrees
        trace = float(cov.diagonal().sum(dtype=torch.float64))
        mean_variance = trace / dim
        if mean_variance <= 0:
            return cov, 1.0
        if self.shrinkage is not None:
            return cov, self.shrinkage * mean_variance
        trace_squared = trace * trace
        frobenius = float(cov.square().sum(dtype=torch.float64))
        numerator = (1 - 2 / dim) * frobenius + trace_squared
        denominator = (degrees + 1 - 2 / dim) * max(frobenius - trace_squared / dim, 1e-30)
        rho = min(numerator / denominator, 0.5)
        few_texts = 0.08 * (dim / degrees) ** 2
        return cov, min(max(rho / (1 - rho), few_texts, 1e-3), 1.0) * mean_variance

    def cholesky(self) -> Tensor:
        """Lower factor of S + lambda I, cached until the statistics change."""
        if self._factor is None or self._factor.device != self.scatter.device:
            cov, ridge = self.covariance()
            cov = cov.double()
            cov.diagonal().add_(ridge)
            self._factor = torch.linalg.cholesky(cov)
        return self._factor

    def query_transform(self) -> dict:
        """`transform` as arguments of `ops.key_search`."""
        return {"shift": self.mean}

    def transform(self, query: Tensor) -> Tensor:
        return transform_query(query, **self.query_transform())

    def index(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [P, D] -> what is searched: c [P, D] and beta [P]."""
        centred = (keys - self.mean).double()
        c = torch.cholesky_solve(centred.T, self.cholesky()).T
        return c.float().contiguous(), (-0.5 * (centred * c).sum(-1)).float()

    def index_labels(self, labels: Tensor, means: Tensor, task: Tensor) -> tuple[Tensor, Tensor]:
        """Label keys: means of labels [L, D] and of tasks [T, D], the labels being of the tasks `task` [L] ->
        what is searched, c [L, D] and beta [L], so that a label key's score is half that of the label's mean
        and half that of its task's. (By the label's alone, tasks with far-flung labels would take others'
        texts.)"""
        c, beta = self.index(torch.cat([labels, means]))
        task = task + len(labels)
        return (c[: len(labels)] + c[task]) / 2, (beta[: len(labels)] + beta[task]) / 2

    def embed(self, query: Tensor) -> Tensor:
        """Queries [N, D] -> points whose Euclidean geometry is the metric's; for clustering."""
        centred = (query - self.mean).double()
        return torch.linalg.solve_triangular(self.cholesky(), centred.T, upper=False).T.float()


METRIC_CLASSES = {"grouped_cosine": GroupedCosine, "whitened": Whitened}


def learn_keys(
    query: Tensor,
    num_keys: int,
    metric: nn.Module,
    config: SLMConfig,
    method: str,
    seed: int = 0,
    progress=None,
) -> Tensor:
    """Make a task's keys from its queries: [N, D] fp32 -> [num_keys, D] fp32 in the queries' raw space.

    group_avg: the mean of each of `num_keys` random parts.  kmeans: Lloyd's algorithm in the metric's space.
    paper: keys from an orthogonal start, trained by `reference.key_learning_loss`.
    Raises ValueError when there are fewer queries than keys.
    """
    if query.shape[0] < num_keys:
        raise ValueError(f"{num_keys} keys need at least {num_keys} texts, got {query.shape[0]}")
    generator = torch.Generator().manual_seed(seed)
    if method == "group_avg":
        order = torch.randperm(query.shape[0], generator=generator).to(query.device)
        return torch.stack([query[part].mean(0) for part in order.tensor_split(num_keys)])
    if method == "kmeans":
        return _kmeans(query, metric.embed(query), num_keys, generator)
    return _train_keys(query, num_keys, config, generator, progress)


def _kmeans(
    query: Tensor, points: Tensor, num_keys: int, generator: torch.Generator, iterations: int = 50
) -> Tensor:
    """Lloyd's algorithm with a k-means++ start; returns the raw-space means of the clusters."""
    first = int(torch.randint(len(points), (1,), generator=generator))
    centres = points[first : first + 1]
    for _ in range(num_keys - 1):
        distance = torch.cdist(points, centres).square().amin(-1).cpu()
        if float(distance.sum()) <= 0:
            distance = torch.ones_like(distance)
        pick = torch.multinomial(distance, 1, generator=generator).to(points.device)
        centres = torch.cat([centres, points[pick]])
    assignment = None
    for _ in range(iterations):
        distance, closest = torch.cdist(points, centres).min(-1)
        _fill_empty(closest, distance, num_keys)
        if assignment is not None and torch.equal(closest, assignment):
            break
        assignment = closest
        centres = torch.stack([points[assignment == m].mean(0) for m in range(num_keys)])
    return torch.stack([query[assignment == m].mean(0) for m in range(num_keys)])


def _fill_empty(closest: Tensor, distance: Tensor, num_keys: int) -> None:
    """Give every empty cluster the farthest point of a cluster that keeps another one, in place."""
    count = torch.bincount(closest, minlength=num_keys).tolist()
    farthest = iter(distance.argsort(descending=True).tolist())
    for empty in (m for m in range(num_keys) if count[m] == 0):
        point = next(p for p in farthest if count[int(closest[p])] > 1)
        count[int(closest[point])] -= 1
        closest[point] = empty


def _train_keys(
    query: Tensor,
    num_keys: int,
    config: SLMConfig,
    generator: torch.Generator,
    progress=None,
) -> Tensor:
    """The paper's preparation phase: AdamW, gradients clipped at 0.1, keys hidden at random."""
    dim = query.shape[1]
    width = dim // config.num_groups
    if dim % config.num_groups:
        raise ValueError(f"the query size {dim} is not divisible by num_groups={config.num_groups}")
    starts = [
        nn.init.orthogonal_(torch.empty(num_keys, width), generator=generator)
        for _ in range(config.num_groups)
    ]
    keys = nn.Parameter(torch.cat(starts, dim=1).to(query.device))
    optimizer = torch.optim.AdamW([keys], lr=config.key_learning_rate)
    size = config.key_batch_size
    batches = [range(lo, min(lo + size, len(query))) for lo in range(0, len(query), size)]
    steps = [batch for _ in range(config.key_epochs) for batch in batches]
    with torch.enable_grad():
        for batch in progress(steps) if progress else steps:
            rows = torch.randint(len(query), (len(batch),), generator=generator).to(query.device)
            keep = torch.rand(num_keys, generator=generator) >= config.key_masking
            if not keep.any():
                keep[:] = True
            loss = key_learning_loss(
                query[rows], keys, config.num_groups, config.top_k, keep.to(query.device)
            )
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([keys], 0.1)
            optimizer.step()
    return F.normalize(keys.detach().unflatten(-1, (config.num_groups, width)), dim=-1).flatten(-2)
