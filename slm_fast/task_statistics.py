"""What the metric keeps of a task's queries: moments in a few directions, never examples."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

DIRECTIONS = 32  # of the task's own Gaussian; more do not tell other inputs apart any better
RIDGE = 0.1  # on its variances, in units of their mean
UNIT_RIDGE = 0.1  # on the scatter between the states' values of a unit, in units of its mean diagonal
LEVELS = 127  # of a direction's codes, on either side of 0
DIRECTION_BYTES = 1 << 20  # of a task's directions, where their number is not told
FOLDS = 5
STEPS = 16  # of a tapering floor
MIN_TEXTS_A_LABEL = 4  # from which on a label has a key, and its mean is that of no single text
NUM_QUANTILES = 1001


def module_key(name: str) -> str:
    """A task's name as a key of an `nn.ModuleDict`, which must not contain dots."""
    return "task:" + name.replace("%", "%25").replace(".", "%2E")


class Gaussian(NamedTuple):
    """N(mean, diag(variance) + V^T V) of D values, V of a few rows. The inverse covariance is
    diag(1 / variance) - whitener^T whitener, with C C^T = I + (V / variance) V^T and `whitener` [k, D] = C^-1
    V / variance.
    """

    mean: Tensor
    variance: Tensor
    whitener: Tensor

    @classmethod
    def of(cls, mean: Tensor, V: Tensor, total: Tensor) -> "Gaussian":
        """V [k, D] and the variances of the D values, V's share included."""
        ridge = RIDGE * float(total.mean()) or 1e-12
        variance = (total - V.square().sum(0)).clamp(min=0) + ridge
        scaled = V / variance
        inner = torch.eye(len(V)) + scaled @ V.T
        whitener = torch.linalg.solve_triangular(torch.linalg.cholesky(inner), scaled, upper=False)
        return cls(mean, variance, whitener)

    def distance(self, query: Tensor) -> Tensor:
        """Squared Mahalanobis distances [N] of queries [N, D]."""
        off = query - self.mean
        return (off.square() / self.variance).sum(1) - (off @ self.whitener.T).square().sum(1)

    def mean_distance(self, mean: Tensor, V: Tensor, rest: Tensor) -> float:
        """The mean of `distance` over points with a mean and a covariance V^T V + diag(rest)."""
        total = rest + V.square().sum(0)
        within = (total / self.variance).sum() - (self.whitener @ V.T).square().sum()
        within = within - (self.whitener.square() * rest).sum()
        return float(within + self.distance(mean[None])[0])


def leading(centred: Tensor, rank: int) -> Tensor:
    """[k, D]: the leading right singular vectors of `centred` [N, D] times their singular values, k at most
    `rank`. Subspace iteration where there are many more; deterministic."""
    rank = min(rank, *centred.shape)
    wide = rank + 8
    if wide < min(centred.shape):
        start = torch.randn(centred.shape[1], wide, generator=torch.Generator().manual_seed(0))
        basis = torch.linalg.qr(centred @ start).Q
        for _ in range(3):
            basis = torch.linalg.qr(centred @ (centred.T @ basis)).Q
        centred = basis.T @ centred
    _, values, vectors = torch.linalg.svd(centred, full_matrices=False)
    return values[:rank, None] * vectors[:rank]


def num_states(query: Tensor) -> int:
    """Of how many hidden states of a text the queries [N, D] are made: those of an encoder have a norm of 1
    each; anything else counts as one state."""
    states = round(float(query[0].square().sum()))
    if not 1 < states < query.shape[1] or query.shape[1] % states:
        return 1
    norms = query.unflatten(1, (states, -1)).norm(dim=-1)
    return states if bool(((norms - 1).abs() < 1e-2).all()) else 1


def by_unit(X: Tensor, states: int) -> Tensor:
    """[N, D] -> [D / states, states, N]: what a hidden unit is in the states."""
    return X.unflatten(1, (states, -1)).permute(2, 1, 0)


def unit_products(X: Tensor, states: int) -> Tensor:
    """[D / states, states, states]: the part of X^T X, X [N, D], between the values of the same unit."""
    values = by_unit(X, states)
    return values @ values.mT


def telling_directions(centred: Tensor, rank: int, states: int) -> Tensor:
    """[k, D]: V = U^T X for the k leading left singular vectors U, at most `rank`, of X = `centred` [N, D]
    with every unit's values whitened: what `unit_products` do not say of the scatter. X^T X - V^T V has no
    negative eigenvalues."""
    own = unit_products(centred, states).double()
    ridge = UNIT_RIDGE * float(own.diagonal(dim1=1, dim2=2).mean()) or 1e-12
    factor = torch.linalg.cholesky(own + ridge * torch.eye(states)).float()
    white = torch.linalg.solve_triangular(factor, by_unit(centred, states), upper=False)
    V = leading(white.permute(2, 1, 0).flatten(1), rank)
    return (factor @ by_unit(V, states)).permute(2, 1, 0).flatten(1).contiguous()


def nearest_positive(matrices: Tensor) -> Tensor:
    """Symmetric matrices [B, n, n] with their negative eigenvalues at 0."""
    values, vectors = torch.linalg.eigh(matrices.double())
    return (vectors * values.clamp(min=0)[:, None] @ vectors.mT).float()


def common_labels(answers: Sequence[str] | None) -> list[str]:
    """The answers that 4 or more of a task's texts have, by name; none where there is but one such, or fewer
    than half of the texts have one, as of free text."""
    count = Counter(answers or ())
    names = sorted(name for name, texts in count.items() if texts >= MIN_TEXTS_A_LABEL)
    covered = sum(count[name] for name in names)
    return names if len(names) > 1 and 2 * covered >= len(answers) else []


def label_means(query: Tensor, answers: Sequence[str], labels: Sequence[str]) -> Tensor:
    """The mean of the queries [N, D] that have each of the labels as their answer, and, where there are other
    answers, behind them the mean of all queries: [L, D] fp32. A label without texts has that mean too."""
    if not labels:
        return query[:0].float()
    names = {label: n for n, label in enumerate(labels)}
    number = torch.tensor([names.get(answer, len(names)) for answer in answers], device=query.device)
    rows = len(names) + (not names.keys() >= set(answers))
    sums = torch.zeros(len(names) + 1, query.shape[1], dtype=torch.float64, device=query.device)
    sums.index_add_(0, number, query.double())
    counts = number.bincount(minlength=len(names) + 1)[:, None]
    counts[-1] = 0
    means = torch.where(counts > 0, sums / counts.clamp(min=1), query.double().mean(0))
    return means[:rows].float()


def _gaussian(query: Tensor) -> Gaussian:
    mean, degrees = query.mean(0), max(len(query) - 1, 1)
    centred = query - mean
    return Gaussian.of(mean, leading(centred, DIRECTIONS) / degrees**0.5, centred.square().sum(0) / degrees)


def held_out_distances(query: Tensor) -> Tensor:
    """Each query's distance to the Gaussian of the other folds: [N], or [0] for a single query."""
    if len(query) < 2:
        return query.new_zeros(0)
    order = torch.randperm(len(query), generator=torch.Generator().manual_seed(0))
    distances = []
    for fold in order.tensor_split(min(FOLDS, len(query))):
        others = torch.ones(len(query), dtype=torch.bool)
        others[fold] = False
        distances.append(_gaussian(query[others]).distance(query[fold]))
    return torch.cat(distances)


def _in_levels(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [k, D] as codes [k, D] int8 and their scales [k]."""
    scale = rows.abs().amax(1) / LEVELS
    return (rows / scale.clamp(min=1e-30)[:, None]).round().to(torch.int8), scale


class TaskStatistics(nn.Module):
    """Count, mean and scatter of a task's queries [N, D], and how far from them its own texts lie.

        scatter = V^T diag(scale^2) V + rest

    V [k, D], int8: directions of the centred queries (`telling_directions`), all of them for up to k + 1
    queries. `rest` [D / s, s, s]: what they leave of the scatter between the values that a hidden unit has
    in the s states of which a query is made, for neighbouring layers say nearly the same; with s = 1 a
    diagonal. Of format 3 V is in fp16 and s = 1. `quantiles`: of the held-out distances, 0 to 1. `losses`: of
    held-out texts among the task and others, at every temperature of `keys.TEMPERATURES`, if one is fitted;
    `against`: these others, by `KnowledgePool.identity`. `label_offsets` [L, D], int8, times `label_scale`:
    how far the `label_means` are from the task's. It stays on the CPU wherever the pool is moved.
    """

    # Buffers whose sizes differ among tasks.
    SIZED = ("V", "scale", "rest", "quantiles", "losses", "against", "label_offsets", "label_scale")

    def __init__(
        self,
        dim: int,
        rank: int,
        states: int = 1,
        num_quantiles: int = NUM_QUANTILES,
        num_losses: int = 0,
        num_others: int = 0,
        num_label_means: int = 0,
    ) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))  # among the tasks, by age
        self.register_buffer("mean", torch.zeros(dim, dtype=torch.float64))
        self.register_buffer("V", torch.zeros(rank, dim, dtype=torch.int8))
        self.register_buffer("scale", torch.zeros(rank))
        self.register_buffer("rest", torch.zeros(dim // states, states, states))
        self.register_buffer("quantiles", torch.zeros(num_quantiles))
        self.register_buffer("losses", torch.zeros(num_losses))
        self.register_buffer("against", torch.zeros(num_others, dtype=torch.int64))
        self.register_buffer("label_offsets", torch.zeros(num_label_means, dim, dtype=torch.int8))
        self.register_buffer("label_scale", torch.zeros(num_label_means))
        self._own: Gaussian | None = None

    @classmethod
    def of(cls, query: Tensor, rank: int, answers: Sequence[str] | None = None) -> "TaskStatistics":
        """Of a task's queries [N, D]; with the answers to them, of its `common_labels` too."""
        query = query.float().cpu()
        mean = query.double().mean(0)
        centred, states = query - mean.float(), num_states(query)
        V = telling_directions(centred, cls.num_directions(len(query), rank), states)
        distances = held_out_distances(query)
        made = cls(query.shape[1], len(V), states, NUM_QUANTILES if len(distances) else 0)
        made.count += len(query)
        made.mean, (made.V, made.scale) = mean, _in_levels(V)
        offsets = label_means(query, answers, common_labels(answers)) - mean.float()
        made.label_offsets, made.label_scale = _in_levels(offsets)
        left = unit_products(centred, states) - unit_products(made.directions(), states)
        made.rest = nearest_positive(left)
        if len(distances):
            made.quantiles = distances.quantile(torch.linspace(0, 1, NUM_QUANTILES))
        return made

    @staticmethod
    def num_directions(count: int, rank: int) -> int:
        """Of that many queries, at most `rank`: they lie in count - 1 of them."""
        return min(rank, max(count - 1, 1))

    def is_kept_in(self, rank: int) -> bool:
        """Whether these are what `of` keeps of the task's queries, labels apart; of format 3 they are not."""
        return self.V.dtype is torch.int8 and len(self.V) == self.num_directions(int(self.count), rank)

    @classmethod
    def like(cls, saved: dict[str, Tensor]) -> "TaskStatistics":
        """Room for statistics that were saved: their `SIZED` buffers, which are brought up to date, in place,
        where they are of format 3. Losses of before format 5 go: nobody knows against which tasks they were
        measured. Before format 6 labels had no means."""
        saved.setdefault("scale", torch.ones(len(saved["V"])))
        if "against" not in saved:
            saved |= {"losses": saved["losses"][:0], "against": torch.zeros(0, dtype=torch.int64)}
        if saved["rest"].ndim == 1:
            saved["rest"] = saved["rest"][:, None, None]
        rank, dim = saved["V"].shape
        saved.setdefault("label_offsets", torch.zeros(0, dim, dtype=torch.int8))
        saved.setdefault("label_scale", torch.zeros(0))
        sizes = (len(saved[name]) for name in ("quantiles", "losses", "against", "label_scale"))
        made = cls(dim, rank, saved["rest"].shape[1], *sizes)
        made.V = made.V.to(saved["V"].dtype)
        return made

    def means_of_labels(self) -> Tensor:
        """[L, D] fp32, to 8 bits of how far they are from the task's; [0, D] where no labels are known."""
        return self.mean.float() + self.label_offsets * self.label_scale[:, None]

    def keep_losses(self, losses: Tensor | None, against: Sequence[int] = ()) -> None:
        """Replace the losses; None leaves none."""
        self.losses = self.losses[:0] if losses is None else losses
        self.against = torch.tensor(against, dtype=torch.int64)

    def directions(self) -> Tensor:
        """V with its scale, [k, D] fp32."""
        return self.V * self.scale[:, None]

    def scatter(self) -> Tensor:
        """[D, D] fp32."""
        V, (units, states, _) = self.directions(), self.rest.shape
        scatter = V.T @ V
        same_unit = scatter.view(states, units, states, units).diagonal(dim1=1, dim2=3)
        same_unit += self.rest.permute(1, 2, 0)  # [states, states, units]
        return scatter

    def nearness(self, query: Tensor, coverage: float, taper: float | None = None) -> Tensor:
        """How much of the task the queries [N, D] get: [N] fp32, with p the share of its own texts, held out,
        that are nearer than a query,

            1 if p <= taper,   (coverage - p) / (coverage - taper) up to coverage,   0 behind it

        rounded up to a multiple of 1 / 16: rows of one share have equal weights, and the last bits of a
        distance, which depend on the rows beside it, hardly ever matter.
        taper: None is the same as `coverage`: whole up to there.
        """
        query = query.cpu()
        if not len(self.quantiles):
            return torch.ones(len(query))
        distance = self.own().distance(query)
        inside = (distance <= self.quantiles.quantile(coverage)).float()
        if taper is None or taper >= coverage:
            return inside
        above = torch.searchsorted(self.quantiles, distance).clamp(1, len(self.quantiles) - 1)
        low, high = self.quantiles[above - 1], self.quantiles[above]
        part = ((distance - low) / (high - low).clamp(min=1e-30)).clamp(0, 1)
        nearer = (above - 1 + part) / (len(self.quantiles) - 1)
        share = ((coverage - nearer) / (coverage - taper)).clamp(0, 1)
        return inside * (STEPS * share).ceil() / STEPS

    def holds(self, other: "TaskStatistics", coverage: float) -> bool:
        """Whether the other task's texts lie, in the mean, no farther away than a share `coverage` of the
        task's own."""
        if not len(self.quantiles):
            return False
        distance = self.own().mean_distance(*other.moments())
        return distance <= float(self.quantiles.quantile(coverage))

    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean [D], and V [k, D] and rest [D] of the covariance V^T V + diag(rest), without the rest between
        states; fp32."""
        degrees = max(int(self.count) - 1, 1)
        rest = self.rest.diagonal(dim1=1, dim2=2).T.flatten()
        return self.mean.float(), self.directions() / degrees**0.5, rest / degrees

    def own(self) -> Gaussian:
        """The task's Gaussian, made once."""
        if self._own is None:
            mean, V, rest = self.moments()
            self._own = Gaussian.of(mean, leading(V, DIRECTIONS), rest + V.square().sum(0))
        return self._own

    def _apply(self, fn, recurse=True):
        return self
