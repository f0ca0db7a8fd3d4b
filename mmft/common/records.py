"""Types of the JSON files of run directories and prepared data: which keys each file has and what they mean.

Readers of a run directory accept files of unfinished, failed and older runs, so every key may be missing. Raw values of a
configuration stay `dict[str, Any]`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    from typing import NotRequired  # Python 3.11; in 3.10 only mypy reads it

MetricValues = dict[str, float]  # metric name -> value over a set of rows; of a mix also `NAME/SOURCE`, and `loss/SOURCE`


class FirstAndLast(TypedDict):
    """A value of training at the first and the last logged step."""

    first: float | None
    last: float | None


class Region(TypedDict):
    """A box [left, top, right, bottom] or a point [x, y], in pixels of the image file. label: "" where none is known.

    image: number of the image in its row, from 0.
    """

    label: str
    image: int
    box: NotRequired[list[float]]
    point: NotRequired[list[float]]


class AnswerRecord(TypedDict, total=False):
    """One row of eval/*.jsonl: a held-out row, or an input of `predict`, and the model's answer to it.

    images: files below `root`. prediction: the generated text; None where `error` says why there is none. reasoning: what the model
    wrote before it, in a think block.
    truncated: the answer reached generation.max_new_tokens without an end token. metrics: the metrics that one row has by itself.
    loss: of the reference, summed over its `loss_tokens` supervised tokens. source: of a mix.
    boxes: what the answer marks in the images. reference_boxes: what it should mark.
    choices: of the row, before it is answered. probabilities: of each choice, where the prediction was chosen.
    """

    index: int
    id: str
    root: str
    images: list[str]
    prompt: str
    references: list[str]
    prediction: str | None
    reasoning: str
    truncated: bool
    metrics: MetricValues
    loss: float
    loss_tokens: int
    error: str
    source: str
    boxes: list[Region]
    reference_boxes: list[Region]
    choices: list[str]
    probabilities: dict[str, float]


class AnswerCounts(TypedDict):
    """What stands next to every score over a set of rows.

    rows: number of rows measured. references_per_row: mean. truncated: answers that reached generation.max_new_tokens.
    left_out: rows that could not be measured (no answer, or no reference).
    """

    rows: int
    references_per_row: float
    truncated: int
    left_out: int


class _ScoreInfo(TypedDict):
    label: str
    higher_is_better: bool
    top: float | None


class MetricInfo(_ScoreInfo, total=False):
    """What a report has to know of a score. top: the value at which a bar is full. missing: number of rows without a value.

    note: what has to be known to compare values, e.g. a signature or the segmentation of Chinese.
    """

    note: str
    missing: int


class TaskResult(TypedDict):
    """What lmms-eval measured of a task. rows: None if it does not say. limit, checkpoint, time: of the measurement."""

    scores: MetricValues
    higher_is_better: dict[str, bool]
    rows: int | None
    limit: NotRequired[int | None]
    checkpoint: NotRequired[int | None]
    time: NotRequired[str]


class BenchmarkRecord(TypedDict, total=False):
    """benchmarks.json: task -> side (tuned, base) -> result."""

    tasks: dict[str, dict[str, TaskResult]]


class Difference(TypedDict):
    """The difference of a score between two models on the same rows, second minus first (evaluation/resampling.py).

    low, high: 95 % interval. p: of the null hypothesis that there is no difference. rows: number of rows of both. resamples: number of
    resamples behind the interval.
    """

    value: float
    low: float
    high: float
    p: float
    rows: int
    resamples: int


class ConfusionMatrix(TypedDict):
    """counts[i][j]: rows with reference labels[i] and answer labels[j]. examples[i][j]: index of one of these rows."""

    labels: list[str]
    counts: list[list[int]]
    examples: list[list[int | None]]


class SamplesEntry(TypedDict, total=False):
    """One row of eval/samples.jsonl: answers to a few held-out rows at a training step."""

    step: int
    samples: list[AnswerRecord]


class BaseMeasurement(TypedDict, total=False):
    """base.json: loss and metrics of the model before training; a resumed run reads them again."""

    loss: float
    metrics: MetricValues


class MetricsRow(TypedDict, total=False):
    """One row of metrics.jsonl: what the Trainer logged at a step. Further scalars are keyed by the Trainer's names."""

    step: int
    epoch: float
    seconds: float
    loss: float
    eval_loss: float
    learning_rate: float
    grad_norm: float


class OutOfMemoryEvent(TypedDict):
    """An out-of-memory error that training survived: from `step` on, micro-batches of this size."""

    step: int
    per_device_train_batch_size: int
    gradient_accumulation_steps: int


class KeptRecord(TypedDict, total=False):
    """A set of evaluation.keep in a summary. Its scores are in `metrics`, `base_metrics` and `gains` as keep.NAME.SCORE.

    data: name of the prepared data. rows: number of rows measured. The others as in Measured.
    """

    data: str
    fingerprint: str
    split: str
    rows: int
    answer_counts: AnswerCounts
    base_answer_counts: AnswerCounts
    max_new_tokens: int | None
    longest_reference: int


class TrainedSource(TypedDict, total=False):
    """What a run did with one source of a mix. weight: null if none was given. training_rows: it has. draws: of these in an epoch.

    held_out: rows measured. rows, tokens: trained in all; tokens are those with loss.
    """

    weight: float | None
    training_rows: int
    draws: int
    held_out: int
    rows: int
    tokens: int


class Measured(TypedDict, total=False):
    """What an evaluation measures, of the tuned model and of its base.

    max_new_tokens: the limit in use. longest_reference: in tokens, with the end token. gains: of each score, tuned minus base.
    keep: the sets of evaluation.keep.
    """

    eval_loss: float | None
    base_eval_loss: float | None
    metrics: MetricValues
    base_metrics: MetricValues
    metric_info: dict[str, MetricInfo]
    gains: dict[str, Difference]
    confusion: ConfusionMatrix | None
    answer_counts: AnswerCounts
    base_answer_counts: AnswerCounts
    max_new_tokens: int | None
    longest_reference: int
    keep: dict[str, KeptRecord]


class Summary(Measured, total=False):
    """summary.json: the result of a run.

    status: finished, failed, interrupted, preempted or pruned. reason: why it did not finish. times: seconds by stage.
    trained_together: number of sweep points that shared the process. seconds: wall time of the run.
    """

    status: str
    name: str
    reason: str
    method: str
    seconds: float
    steps: int
    samples_per_second: float | None
    train_loss: FirstAndLast
    reward: FirstAndLast  # mean reward of sampled answers, of objective=grpo
    trainable_parameters: int | None
    total_parameters: int | None
    peak_memory_mb: float
    supervised_tokens: int
    effective_batch_size: int | None
    skipped_steps: int
    micro_batches_folded: int
    trained_together: int
    out_of_memory: list[OutOfMemoryEvent]
    seed: int
    data_fingerprint: str
    held_out_samples: int
    dropped_rows: int  # too long, left out by data.too_long=drop (dropped_rows.jsonl)
    sources: dict[str, TrainedSource]  # of a mix
    times: dict[str, float]


class EvaluationSummary(Measured, total=False):
    """eval/NAME.json: the result of `mmft evaluate`.

    name: the common name of the evaluation's files. rows: number of rows measured. fingerprint: of the prepared data. answer, choice_norm:
    of the config's section `evaluation`, where answers were chosen. backend: what computed it, if not transformers.
    """

    name: str
    backend: str
    fingerprint: str
    split: str
    rows: int
    checkpoint: int | None
    base: bool
    generation: dict[str, Any]
    answer: str
    choice_norm: str
    data: str
    model: str
    method: str
    seconds: float


class PlanRow(TypedDict, total=False):
    """One part of the model in lora_plan.json.

    method: LoRA, DoRA or another one (lora.method), whole, full, top N layers, or frozen. modules: linear layers with an adapter, of `linear` in this part. r: the
    ranks as text. scale: largest effective scale of the adapter (lora_alpha / r, or / sqrt(r)). rate: the learning rate; None where
    nothing is trained. trainable, total: numbers of parameters.
    """

    part: str
    method: str
    rate: float | None
    modules: int
    linear: int
    r: str
    scale: float | None
    trainable: int
    total: int


class ExpertRow(TypedDict):
    """Expert tensors (experts, ., .) of one name and shape in lora_plan.json.

    name: with `*` for numbers of layers. tensors: how many there are, of which `adapted` have an adapter. total: number of parameters.
    """

    name: str
    part: str
    shape: list[int]
    tensors: int
    adapted: int
    total: int


class PlanReport(TypedDict, total=False):
    """lora_plan.json: what is trained, by part of the model. method: lora (an adapter) or full. adapter: the method of peft, as tables write it. experts: empty without a mixture of experts.

    unreachable: linear layers that were asked for and that peft cannot adapt in this model type. notes: what else decides the training.
    """

    notes: list[str]

    method: str
    adapter: str
    scope: str
    rows: list[PlanRow]
    experts: list[ExpertRow]
    unreachable: list[str]
    trainable_parameters: int
    total_parameters: int
    modules_to_save: list[str]


class CodeState(TypedDict):
    """Commit of mmft's checkout and whether it has uncommitted changes; None for an installed copy."""

    commit: str | None
    changed: bool | None


class Hardware(TypedDict, total=False):
    cpu: str
    cores: int | None
    threads: int
    memory_mb: int
    gpus: list[str]
    cuda: str | None


class Placement(TypedDict, total=False):
    """Which GPUs of the machine the run was given (None: all) and how many processes train it together."""

    cuda_visible_devices: str | None
    processes: int
    host: str


ModelIdentity = TypedDict("ModelIdentity", {"path": str, "hub": str, "revision": str | None, "class": str}, total=False)


class DataIdentity(TypedDict, total=False):
    path: str
    fingerprint: str


class ParentRecord(TypedDict, total=False):
    """An adapter that a run builds on.

    role: start (it went on with this adapter), below (merged into its base), extended (it is the rest of this run), combined (it is a part of
    this adapter). path: as the config names it. run: name of the run that trained it; "" where there is none. sha256: of the adapter
    (runs/weights.py: adapter_hash). steps: that it was trained for in its run. weight: of a combined one.
    """

    role: str
    path: str
    run: str
    sha256: str
    steps: int | None
    weight: float


class Environment(TypedDict, total=False):
    """env.json: everything outside the config that can change a result.

    parents: the adapters that the run builds on; those merged below it in their order.

    max_new_tokens: what generation.max_new_tokens=auto stands for in this run. kept_max_new_tokens: the same for each set of
    evaluation.keep.
    """

    created: str
    mmft: str
    code: CodeState
    python: str
    platform: str
    packages: dict[str, str | None]
    hardware: Hardware
    placement: Placement
    device: str
    dtype: str
    attention: str | None
    seed: int
    model: ModelIdentity
    data: DataIdentity
    image_processor: str
    max_new_tokens: int | None
    kept_max_new_tokens: dict[str, int | None]
    parents: list[ParentRecord]
    notes: list[str]


class SplitManifest(TypedDict, total=False):
    """Numbers of rows and of different images of one split."""

    rows: int
    images: int


class Manifest(TypedDict, total=False):
    """manifest.json of a prepared data set: what it was made of, and counts.

    key: hash of the source's settings. stamp: state of the source's files. root: folder of images that are not stored in
    the set. reasons: number of dropped or changed rows by kind.
    """

    format: int
    name: str
    key: str
    source: dict[str, Any]
    stamp: Any
    fingerprint: str
    root: str | None
    splits: dict[str, SplitManifest]
    images: int
    rows_read: int
    dropped: int
    changed: int
    reasons: dict[str, int]
    notes: list[str]
    created: str
    versions: dict[str, str]


class SweepPointRecord(TypedDict, total=False):
    """One point in plan.json of a sweep."""

    name: str
    words: list[str]
    identity: str
    config: dict[str, Any]


class SweepPlan(TypedDict, total=False):
    """plan.json: the points of a sweep and the value they are ranked by."""

    format: int
    name: str
    objective: str
    points: list[SweepPointRecord]
