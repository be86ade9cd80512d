"""Settings of the method, and how the paper's words map to this project's names.

| paper (ICLR 2024) | here |
|---|---|
| JARe, joint adaptive re-parameterisation | the mixture: `ops.mixture`, `layers.MixtureLinear` |
| DTKR, dynamic task-related knowledge retrieval | the routing: `SLMModel.route`, `ops.key_search` |
| weight increment, knowledge vector | a pool entry's factors `A`, `B` |
| pool, memory bank | `KnowledgePool` |
| groups | `num_groups` |
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

from slm_fast.reference import MAX_TOP_K, WEIGHTINGS

CONFIG_NAME = "slm_config.json"
METRICS = ("whitened", "grouped_cosine")
KEY_METHODS = ("group_avg", "kmeans", "paper")
INITS = ("zero", "retrieved")
HEAD_INITS = ("probe", "zero")
MIXINGS = ("instance", "batch")
KEY_TRAINING = ("key_learning_rate", "key_epochs", "key_batch_size")
# Left out of `to_dict` at their defaults.
LATER_FIELDS = (*KEY_TRAINING, "layers_to_transform", "route_in_prefill", "feature_penalty", "label_keys")
POOLINGS = ("auto", "mean", "first", "last")

# The linear after attention, which the paper re-parameterises: BERT, LLaMA, T5. The first that matches.
DEFAULT_TARGETS = ("attention.output.dense", "o_proj", "o")


@dataclass
class SLMConfig:
    """Settings of a Scalable Language Model.

    Args:
        r: rank of a pool entry.
        target_modules: name suffixes of the linears that get a mixture, "all-linear" for every linear of the
            backbone except its output head, or None for the paper's choice (`o_proj`; BERT:
            `attention.output.dense`).
        layers_to_transform: the layers whose linears get a mixture, an index or several: as in PEFT the first
            number in a linear's name counts, in both stacks of an encoder-decoder model. None: all layers.
        scaling: factor on every update, PEFT's `lora_alpha / r`.
        entries_per_task: pool entries that a new task gets.  top_k: entries mixed for a row.
        metric: "whitened" (Mahalanobis score from replay-free statistics) or "grouped_cosine" (the paper).
        num_groups: groups of `grouped_cosine` and of the "paper" key method.
        shrinkage: whitened: multiple of the identity added to the within-task covariance, in units of its
            mean diagonal. None chooses it from the statistics alone.
        statistics_rank: whitened: directions in which a task's covariance is kept, D bytes each. None: as
            many as a mebibyte holds (390 of 2,688 values). With them a task's statistics take D (8 + 4 s)
            bytes, s the encoder's layers that make up a query, and 4 KB.
        key_method: "group_avg", "kmeans" or "paper".  key_masking: probability that "paper" hides a key for a
            step.  key_learning_rate, key_epochs, key_batch_size: of its training, by AdamW. The authors' two
            or three epochs at 1e-3 are for their tasks of up to 200,000 texts.
        label_keys: whitened, weighting "task", mixing "instance": whether a task whose answers are told when
            it is added is found by keys of its labels: the answers that 4 or more of its texts have, if half
            of its texts have one. A label key's score is half that of the mean of the label's texts and half
            that of the task's. They stand in place of the entries' keys, which then pick among the entries of
            a task that was found. A label takes D + 4 bytes in the statistics (its mean is that of 4 texts or
            more) and 5 D where it is searched.
        init: where new entries start: "zero" (they change nothing yet) or "retrieved" (the mixture that the
            task's texts get from the entries that are there, and the heads of tasks with the same labels).
        head_init: where a task's classification head starts when its training does: "probe" (a logistic
            regression on the features of as many texts as the training sees) or "zero". A head that took
            over those of other tasks (`init`) starts there.
        feature_penalty: weight of what a task with a head may change besides its answers: while it is learnt,
            the loss gets this times mean |f - f0|^2 / mean |f0 - mean f0|^2, f what the head reads of a
            training text and f0 what it reads of it in the frozen model. Texts of other tasks that are taken
            for this one's then keep more of what the frozen model makes of them. 0: nothing is added.
            Source: Mukhoti et al., "Fine-tuning can cripple your foundation model; preserving features may be
            the solution" (TMLR 2024).
        query_layers: encoder layers whose mean-pooled states form the query, or "auto": all of them while the
            query stays under 4,096 values, else evenly spaced ones ("backbone": `auto_layers`).
            `choose_query_layers` measures which tell tasks apart; keys are made of them, so that they stay.
        weighting: of a row's picks. "task": a softmax over the tasks among them by each one's best score, in
            equal parts to its entries, so that a row that goes to one task is answered as it was when that
            task was learnt, to the bit (with a `taper`, but for texts at the edge of a step); "softmax",
            "similarity" or "uniform" over the entries. None is "task" with averaged keys, which differ by
            noise alone, and "softmax" with others.
        temperature: of the softmax, in units of the score. None lets the metric choose; "auto" (whitened,
            "task") fits it when a task is learnt, on a part of its texts held out against the tasks known;
            what was measured against a task goes with it.
        twin_share: whitened: the share of a row's weight that its best task hands on to its near-duplicates,
            tasks with the same labels of which each could hold the other's texts: in equal parts, less to one
            that was learnt from fewer texts, in proportion. Their heads answer in these shares too. 0: none.
            Rows whose task is told keep to it.
        min_similarity: rows whose best score is lower use the frozen model. whitened: nats by which the key
            must explain the query better than the mean of all tasks does; grouped_cosine: a cosine. "auto"
            (whitened): rows that lie farther from the best entry's task than a share `coverage` of the task's
            own texts (held out, when it was learnt); rows whose task is told are not asked.
        taper: "auto" floors: a row keeps all of its weights up to about the distance of this share of the
            task's own texts; from there on they fall, in 16 steps, to 0 at `coverage`, so that a text that
            is hardly one of the task's moves the frozen model but little. None, or not less than `coverage`:
            whole up to there.
        mixing: "instance" (a mixture per row) or "batch" (the paper's evaluation: scores averaged over the
            batch).
        pooling: what a classification head reads: "mean", "first" or "last" token; "auto" by architecture.
        encoder_name_or_path: sentence encoder, a folder or a hub id, or "backbone" for the base model itself.
            encoder_max_length: tokens kept of a text.
        route_in_prefill: whether rows that come without a source are routed by the pass that answers them,
            from the states that it makes anyway (`PrefillScope`). Needs the encoder "backbone", and layers
            without mixtures up to the deepest that the query is read from: `layers_to_transform=None` is then
            those behind it, and the whole decoder of an encoder-decoder model. Keys and the inputs of heads
            are made of texts in one form, `prompts.encode_texts`.
        backend: "auto" or a name from `dispatch.available()`.
        faiss_above: pools with more entries than this are searched by FAISS (faiss-cpu, or faiss-gpu where
            the keys are on a CUDA device), except for searches restricted to tasks; None never does.
    """

    r: int = 8
    target_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    scaling: float = 1.0
    entries_per_task: int = 4
    top_k: int = 2
    metric: str = "whitened"
    num_groups: int = 6
    shrinkage: float | None = None
    key_method: str = "group_avg"
    key_masking: float = 0.2
    key_learning_rate: float = 1e-2
    key_epochs: int = 20
    key_batch_size: int = 32
    label_keys: bool = True
    init: str = "zero"
    head_init: str = "probe"
    feature_penalty: float = 0.0
    query_layers: list[int] | str = "auto"
    weighting: str | None = None
    temperature: float | str | None = None
    twin_share: float = 0.0
    min_similarity: float | str | None = None
    coverage: float = 0.99
    taper: float | None = 0.5
    statistics_rank: int | None = None
    mixing: str = "instance"
    pooling: str = "auto"
    encoder_name_or_path: str | None = None
    encoder_max_length: int = 256
    route_in_prefill: bool = False
    backend: str = "auto"
    faiss_above: int | None = None

    def __post_init__(self) -> None:
        positive = (
            "r",
            "entries_per_task",
            "num_groups",
            "encoder_max_length",
            "key_epochs",
            "key_batch_size",
        )
        for name in (*positive, "statistics_rank"):
            value = getattr(self, name)
            if value is None and name == "statistics_rank":
                continue
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if not isinstance(self.top_k, int) or not 1 <= self.top_k <= MAX_TOP_K:
            raise ValueError(f"top_k must be an integer from 1 to {MAX_TOP_K}, got {self.top_k!r}")
        choices = dict(metric=METRICS, key_method=KEY_METHODS, init=INITS, head_init=HEAD_INITS)
        self.weighting = self.weighting or ("task" if self.key_method == "group_avg" else "softmax")
        choices |= dict(weighting=("task", *WEIGHTINGS), mixing=MIXINGS, pooling=POOLINGS)
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.temperature == "auto" and (self.metric, self.weighting) != ("whitened", "task"):
            raise ValueError(
                'temperature="auto" needs metric="whitened" and weighting="task", '
                f"got {self.metric!r} and {self.weighting!r}"
            )
        for name in ("temperature", "shrinkage"):
            value = getattr(self, name)
            if isinstance(value, str) and (name, value) != ("temperature", "auto"):
                raise ValueError(f"{name} must be a number, got {value!r}")
            if value not in (None, "auto") and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be positive and finite, or None, got {value!r}")
        floor = self.min_similarity
        if isinstance(floor, str):
            if floor != "auto" or self.metric != "whitened" or self.mixing != "instance":
                raise ValueError(
                    'min_similarity must be a number, None, or "auto" with metric="whitened" and '
                    f'mixing="instance"; got {floor!r} with {self.metric!r} and {self.mixing!r}'
                )
        elif floor is not None and not math.isfinite(floor):
            raise ValueError(f"min_similarity must be finite, got {floor!r}")
        if not 0 <= self.twin_share < 1:
            raise ValueError(f"twin_share must be in [0, 1), got {self.twin_share!r}")
        if self.twin_share and (self.metric, self.mixing) != ("whitened", "instance"):
            raise ValueError(
                f'twin_share needs metric="whitened" and mixing="instance", got {self.metric!r} and '
                f"{self.mixing!r}"
            )
        penalty, taper = self.feature_penalty, self.taper
        if not (_is_number(penalty) and math.isfinite(penalty) and penalty >= 0):
            raise ValueError(f"feature_penalty must be a number from 0, got {penalty!r}")
        if taper is not None and not (_is_number(taper) and 0 <= taper <= 1):
            raise ValueError(f"taper must be a number from 0 to 1, or None, got {taper!r}")
        if not math.isfinite(self.scaling):
            raise ValueError(f"scaling must be finite, got {self.scaling!r}")
        if not 0 < self.coverage <= 1:
            raise ValueError(f"coverage must be in (0, 1], got {self.coverage!r}")
        if self.faiss_above is not None and not (isinstance(self.faiss_above, int) and self.faiss_above >= 0):
            raise ValueError(f"faiss_above must be an integer from 0, or None, got {self.faiss_above!r}")
        if not (math.isfinite(self.key_learning_rate) and self.key_learning_rate > 0):
            raise ValueError(f"key_learning_rate must be positive and finite, got {self.key_learning_rate!r}")
        if not 0 <= self.key_masking < 1:
            raise ValueError(f"key_masking must be in [0, 1), got {self.key_masking!r}")
        if isinstance(self.query_layers, str):
            if self.query_layers != "auto":
                raise ValueError(
                    f'query_layers must be "auto" or a list of layers, got {self.query_layers!r}'
                )
        else:
            self.query_layers = [int(layer) for layer in self.query_layers]
            if not self.query_layers:
                raise ValueError("query_layers must name at least one layer")
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            self.target_modules = [self.target_modules]
        layers = self.layers_to_transform
        if layers is not None:
            self.layers_to_transform = list(layers) if isinstance(layers, (list, tuple)) else [layers]
            if not self.layers_to_transform or any(
                type(layer) is not int or layer < 0 for layer in self.layers_to_transform
            ):
                raise ValueError(f"layers_to_transform must be indices from 0, or None, got {layers!r}")
        for name in ("route_in_prefill", "label_keys"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")

    @classmethod
    def paper(cls, **overrides) -> "SLMConfig":
        """The paper's LLaMA settings, with the authors' scripts' for the keys' training.

        For its BERT ones pass `r=12, top_k=4, key_epochs=3, key_batch_size=8`.
        """
        settings = dict(
            metric="grouped_cosine",
            weighting="similarity",
            query_layers=[-1],
            key_method="paper",
            key_masking=0.2,
            key_learning_rate=1e-3,
            key_epochs=2,
            head_init="zero",
        )
        return cls(**(settings | overrides))

    def to_dict(self) -> dict:
        """The settings by name.

        Those of `LATER_FIELDS` are left out at their defaults, so that what was stored before they existed
        keeps its identity; so is `taper`, but with an "auto" floor where it is None.
        """
        values = dataclasses.asdict(self)
        for name in LATER_FIELDS:
            if values[name] == getattr(SLMConfig, name):
                del values[name]
        if self.taper == (None if self.min_similarity == "auto" else SLMConfig.taper):
            del values["taper"]
        return values

    @classmethod
    def from_dict(cls, values: dict) -> "SLMConfig":
        """The settings of `to_dict`; floors that were stored without a `taper` had none."""
        if values.get("min_similarity") == "auto":
            values = {"taper": None} | values
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(
                f"unknown SLMConfig fields: {', '.join(unknown)}; known: {', '.join(sorted(known))}"
            )
        return cls(**values)

    def save_pretrained(self, directory: str | Path) -> None:
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        (path / CONFIG_NAME).write_text(
            json.dumps({"config": self.to_dict()}, indent=2) + "\n", encoding="utf8"
        )

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "SLMConfig":
        """Read the settings of a saved config or model. Raises OSError when the file is not there."""
        path = Path(directory) / CONFIG_NAME
        try:
            content = json.loads(path.read_text(encoding="utf8"))
        except json.JSONDecodeError as error:
            raise OSError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(content, dict) or "config" not in content:
            raise OSError(f'{path} has no "config" section')
        return cls.from_dict(content["config"])


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
