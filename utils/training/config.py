"""What a training run is: dataclasses read from one YAML file, checked before anything heavy is imported.

    config = load_config("utils/training/configs/toy.yaml")
    config.stages[0].learning_rates           # {"adapter": 0.001}: the parts that learn, and how fast

A stage starts from a preset; what the file says about it wins:

    align     adapter learns to give the decoder's own embedding rows back (chunk size 1, no decoder pass)
    adapter   adapter and marker rows, next-token loss through the frozen decoder
    encoder   + the encoder
    decoder   + the decoder
    instruct  the same parts on tasks, slower

Source of stages 0-3 and their learning rates: LCLM, "End-to-End Context Compression at Scale", arXiv 2606.09659.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from utils.errors import ConfigError
from utils.training.plain import from_plain, read_layers

UNPACKER = "unpacker"
PRESETS: dict[str, dict[str, Any]] = {
    "align": {"learning_rates": {"adapter": 1e-3}, "chunk_sizes": {1: 1.0}},
    "adapter": {"learning_rates": {"adapter": 1e-3, "markers": 1e-3}},
    "encoder": {"learning_rates": {"adapter": 6e-5, "markers": 6e-5, "encoder": 6e-5}},
    "decoder": {"learning_rates": {"adapter": 6e-5, "markers": 6e-5, "encoder": 6e-5, "decoder": 1e-5}},
    "instruct": {"learning_rates": {"adapter": 3e-5, "markers": 3e-5, "encoder": 3e-5, "decoder": 3e-5}},
}
_ORDER = list(PRESETS)
# A run may go on with other values of these: they change no number that is trained.
_FREE_ON_RESUME = ("output", "threads", "save_minutes", "log_every", "keep_checkpoints", "trackers")


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningConfig:
    """How one of the two language models learns, in the stages in which it does.

    Attributes:
        method: "full", or "lora" on all its linear layers.
        rank: LoRA rank.
        alpha: LoRA scale times rank.
    """

    method: Literal["full", "lora"] = "full"
    rank: int = 32
    alpha: float = 64.0

    def __post_init__(self) -> None:
        _check_range("rank", self.rank, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairConfig:
    """The model pair that is trained.

    Attributes:
        checkpoint: "toy" (tiny and random), "default" (the embedded one, untrained), a checkpoint folder or hub id;
            or empty, and a new pair is put together from the next two.
        encoder: Folder or hub id of a Hugging Face encoder or decoder-only model.
        decoder: Folder or hub id of a Hugging Face causal language model.
        window: Encoder window of a new pair.
        pooling: Pooling of a new pair.
        adapter_width: Middle width of a new pair's adapter; the decoder's width by default.
        token_columns: Let the adapter read the tokens' own embeddings as well, where it does not yet. Its new weights
            begin at zero: the pair, or the trained part, starts as it was.
        trained: Folder with a trained part of this pair, as `pack` writes it: training goes on from there, its LoRA
            unmerged, with a new optimiser. By default from the pair as it is.
    """

    checkpoint: str = ""
    encoder: str = ""
    decoder: str = ""
    window: int = 1024
    pooling: str = "mean"
    adapter_width: int | None = None
    token_columns: bool = False
    trained: str | None = None

    def __post_init__(self) -> None:
        if bool(self.checkpoint) == bool(self.encoder and self.decoder):
            raise ConfigError("pair: give either checkpoint, or encoder and decoder")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """The training examples; made on first use where the folder does not have them.

    Attributes:
        folder: Where the JSONL files and their tokenised caches live.
        tasks: Examples of each builder task; empty where the folder's own JSONL files are to be used as they are.
        memory_tokens: Shortest and longest memory, in tokens (roughly: builders count characters). A length is drawn
            evenly over the logarithm.
        lengths: What becomes of it. "up_to": a memory is at most as long, and the end of a file cuts it short, so that
            long ones are rarer than drawn. "log_uniform": an example is drawn again and again until its memory has at
            least two thirds of the length, so that memories are as long as drawn.
        source: "installed" (packages and standard library of this machine), "symbols" (toy texts) or a code folder.
        max_files: Draw from a random choice of so many files; from all by default.
        package_weights: Package → how many times as often as others its files are drawn; `python` is the standard
            library.
        chars_per_token: What the builders reckon with.
        question_first: Part of the examples in which the question stands before the memory.
        scattered: Part of the examples in which the memory is dealt out over the prompt: one to a few spans, some of
            its lines as plain text before, between and after them, the question anywhere among these.
        seed: Of the builders.
    """

    folder: str
    tasks: dict[str, int] = field(default_factory=dict)
    memory_tokens: tuple[int, int] = (64, 256)
    lengths: Literal["up_to", "log_uniform"] = "up_to"
    source: str = "installed"
    max_files: int | None = None
    package_weights: dict[str, int] = field(default_factory=dict)
    chars_per_token: float = 3.2
    question_first: float = 0.0
    scattered: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        low, high = self.memory_tokens
        if not 1 <= low <= high:
            raise ConfigError(f"memory_tokens: expected [shortest, longest] from 1 up, got [{low}, {high}]")
        for name in ("tasks", "package_weights"):
            for key, number in getattr(self, name).items():
                _check_range(f"{name}.{key}", number, 1)
        _check_range("question_first", self.question_first, 0, 1)
        _check_range("scattered", self.scattered, 0, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageConfig:
    """One stage of training.

    Attributes:
        preset: Which of the presets it starts from.
        steps: Optimiser steps.
        learning_rates: Peak rate of each part that learns; parts that are not named, or have a rate of 0, are
            frozen.
        chunk_sizes: Chunk size → weight of its being drawn, for each example anew.
        mixture: Task → weight of its being drawn; all tasks equally by default.
        row_tokens: Decoder rows of one packed row.
        memory_tokens: Encoder tokens of one packed row; no limit of its own by default.
        rows: Packed rows of one optimiser step, over all processes.
        length_discount: Each of an answer's n labels weighs n^-length_discount in the loss. 0 counts tokens alike, and
            a text that is repeated drowns the answer to a question; 1 counts answers alike; 0.5 lies between
            (InternVL 2.5's square averaging, arXiv 2412.05271).
        expanded: Share of the examples in which some segments of the memory are text and the rest latents, as selective
            expansion shows it: what the selector chooses, or one to three others.
        ratios: How many different chunk sizes each example is read at: it is encoded once, its states are pooled at
            each of them, and each reading is a sequence of its own in the packed row.
        unpack_weight: Weight of the unpack loss (`unpacking.py`) beside the next-token loss; with it, and only then,
            the part `unpacker` learns.
        teacher_weight: Weight of the KL divergence from the decoder that reads the memory as text (`teaching.py`),
            on the labels of answers that it gives right, beside the next-token loss. It costs a forward pass over the
            text of each example.
        warmup_steps: Linear rise of the learning rate; then a cosine.
        final_rate: What the cosine falls to, as a part of the peak.
        weight_decay: AdamW's, on matrices only.
        clip_norm: Largest norm of the gradient.
    """

    preset: str
    steps: int
    learning_rates: dict[Literal["adapter", "markers", "encoder", "decoder", "unpacker"], float]
    chunk_sizes: dict[int, float]
    mixture: dict[str, float] = field(default_factory=dict)
    row_tokens: int = 2048
    memory_tokens: int | None = None
    rows: int = 1
    length_discount: float = 0.0
    expanded: float = 0.0
    ratios: int = 1
    unpack_weight: float = 0.0
    teacher_weight: float = 0.0
    warmup_steps: int = 20
    final_rate: float = 0.1
    weight_decay: float = 0.01
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        for name in ("steps", "row_tokens", "rows"):
            _check_range(name, getattr(self, name), 1)
        _check_range("length_discount", self.length_discount, 0, 1)
        _check_range("expanded", self.expanded, 0, 1)
        _check_weights("chunk_sizes", self.chunk_sizes)
        _check_weights("mixture", self.mixture)
        _check_range("ratios", self.ratios, 1, sum(weight > 0 for weight in self.chunk_sizes.values()))
        _check_range("teacher_weight", self.teacher_weight, 0)
        if not self.learning_rates:
            raise ConfigError("learning_rates: name at least one part that learns")
        if self.unpack_weight < 0 or (self.unpack_weight > 0) != (UNPACKER in self.learning_rates):
            raise ConfigError(
                f"unpack_weight is {self.unpack_weight} and learning_rates name {', '.join(self.learning_rates)}: give "
                f"the {UNPACKER} a learning rate where the weight is above 0, and only there"
            )
        if self.preset == "align" and (
            set(self.learning_rates) != {"adapter"}
            or set(self.chunk_sizes) != {1}
            or self.expanded
            or self.teacher_weight
        ):
            raise ConfigError("the align stage trains the adapter only, at chunk size 1, all latents: set nothing else")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """A training run.

    Attributes:
        name: Shown in reports.
        output: Folder of checkpoints, metrics, curve and the exported pair.
        pair: What is trained.
        data: On what.
        stages: In order.
        encoder_tuning: How the encoder learns.
        decoder_tuning: How the decoder learns.
        precision: "float32", or "bfloat16" (autocast; what learns stays in float32).
        gradient_checkpointing: Compute activations twice, keep them once: less memory, a third more time.
        seed: Of initial LoRA weights, order and draws.
        threads: torch threads; torch's own choice by default.
        save_minutes: Time between two checkpoints.
        keep_checkpoints: How many are kept.
        log_every: Steps between two lines of metrics.
        trackers: Where metrics go besides `metrics.jsonl`: accelerate's trackers by name, such as tensorboard.
    """

    name: str
    output: str
    pair: PairConfig
    data: DataConfig
    stages: tuple[StageConfig, ...]
    encoder_tuning: TuningConfig = field(default_factory=TuningConfig)
    decoder_tuning: TuningConfig = field(default_factory=TuningConfig)
    precision: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False
    seed: int = 0
    threads: int | None = None
    save_minutes: float = 5.0
    keep_checkpoints: int = 2
    log_every: int = 10
    trackers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_range("keep_checkpoints", self.keep_checkpoints, 1)
        if not self.stages:
            raise ConfigError("stages: a run needs at least one")
        order = [_ORDER.index(stage.preset) for stage in self.stages]
        for number, (before, after) in enumerate(itertools.pairwise(order), start=1):
            if after < before:
                raise ConfigError(
                    f"stages[{number}]: {_ORDER[after]} after {_ORDER[before]}; the order is {' → '.join(_ORDER)}"
                )

    @property
    def total_steps(self) -> int:
        """Optimiser steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def trained_chunk_sizes(self) -> tuple[int, ...]:
        """The chunk sizes that the last stage trains for."""
        return tuple(sorted(size for size, weight in self.stages[-1].chunk_sizes.items() if weight))

    @property
    def trained_parts(self) -> set[str]:
        """The parts that some stage trains."""
        return {part for stage in self.stages for part in stage.learning_rates}

    def what_is_trained(self) -> dict[str, Any]:
        """The settings that decide the trained numbers, as JSON: a run resumes only under the same ones."""
        values = {name: v for name, v in dataclasses.asdict(self).items() if name not in _FREE_ON_RESUME}
        plain: dict[str, Any] = json.loads(json.dumps(values))
        return plain


def load_config(path: str | Path) -> TrainConfig:
    """Read a run's YAML file, over the one that it names under `base`.

    Raises:
        ConfigError: The message names the file and the key of what is wrong.
    """
    values = read_layers(Path(path))
    try:
        return parse_config(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def parse_config(values: Any) -> TrainConfig:
    """Build a run's settings from plain values, presets applied; a `ConfigError` names the key."""
    if isinstance(values, Mapping) and isinstance(values.get("stages"), list):
        stages = [_apply_preset(stage, number) for number, stage in enumerate(values["stages"])]
        values = {**values, "stages": stages}
    config: TrainConfig = from_plain(TrainConfig, values)
    return config


def _apply_preset(stage: Any, number: int) -> Any:
    if not isinstance(stage, Mapping):
        return stage
    preset = from_plain(Literal[tuple(PRESETS)], stage.get("preset"), f"stages[{number}].preset")
    return {**PRESETS[preset], **stage}


def _check_range(key: str, value: float, low: int, high: int | None = None) -> None:
    if value < low or (high is not None and value > high):
        expected = f"at least {low}" if high is None else f"a number from {low} to {high}"
        raise ConfigError(f"{key}: expected {expected}, got {value}")


def _check_weights(key: str, weights: Mapping[Any, float]) -> None:
    if any(weight < 0 for weight in weights.values()) or (weights and not sum(weights.values())):
        raise ConfigError(f"{key}: weights must not be negative, and one must be above 0; got {dict(weights)}")
