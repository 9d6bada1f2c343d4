"""What a recipe may say: every key, its type, unit, bounds and default. No default lives anywhere else."""

from __future__ import annotations

import math
import os
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Size = Annotated[tuple[PositiveInt, PositiveInt], Field(strict=False)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=64)]

AttentionBackend = Literal["auto", "memory_efficient", "flash", "math"]


class Section(BaseModel):
    """A closed and frozen part of a recipe: unknown keys, wrong types and later changes are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)


class Duration(Section):
    """A length in optimizer steps or in images; exactly one. Images are what is stored and compared."""

    steps: PositiveInt | None = None
    images: PositiveInt | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.steps is None) == (self.images is None):
            raise ValueError(f"give exactly one of steps and images, not steps={self.steps} and images={self.images}")
        return self

    def in_steps(self, global_batch_size: int) -> int:
        """The length in whole steps of `global_batch_size` images, rounded up."""
        if self.steps is not None:
            return self.steps
        assert self.images is not None
        return -(-self.images // global_batch_size)

    def in_images(self, global_batch_size: int) -> int:
        """The length in images, rounded up to whole steps."""
        return self.in_steps(global_batch_size) * global_batch_size


class ModelConfig(Section):
    """The net: PixArt's text-to-image transformer, or stage 1's class-conditional DiT (paper §2.3, appendix A.5)."""

    kind: Literal["pixart", "dit"]
    depth: PositiveInt = 28
    hidden_size: PositiveInt = 1152
    num_heads: PositiveInt = 16
    patch_size: PositiveInt = 2
    mlp_ratio: PositiveFloat = 4.0
    in_channels: PositiveInt = 4
    """Channels of the latents; the output has twice as many (ε and the learned variance)."""
    base_size: PositiveInt = 16
    """Patches a side of the square that the position embedding's coordinates span (image_size / 8 / 2 at full size)."""
    interpolation_scale: PositiveFloat = 1.0
    """Divides the coordinates: 1 at 256 and 512 px, 2 at 1024 px (the released code's lewei_scale)."""
    num_classes: PositiveInt | None = None
    """DiT only: labels, without the null class."""
    caption_channels: PositiveInt | None = None
    """PixArt only: width of the text encoder's features (4096 for T5-v1.1-XXL)."""
    max_tokens: PositiveInt | None = None
    """PixArt only: tokens a caption may have (120)."""
    micro_conditions: bool = False
    """PixArt only: the MS net, told the original size and the aspect ratio (1024 px)."""
    condition_dropout: Fraction = 0.1
    """Probability that a caption or label is replaced by the null one in training, for guidance."""
    fp32_attention: bool = False
    """Self-attention in fp32, as the published runs did; in 16 bit it is several times faster. Set by `paper: true`."""
    scale_init_to_width: bool = False
    """Multiplies the N(0, 0.02) initialisations by √(paper's fan-in / own fan-in): a small net then starts with the same gain."""
    zero_init_adaln: bool = True
    """DiT only: adaLN-Zero as in DiT. False starts the modulation as PixArt's tables do (short runs of small nets)."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        problems = []
        if self.hidden_size % self.num_heads:
            problems.append(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if self.hidden_size % 4:
            problems.append(
                f"hidden_size {self.hidden_size} is not a multiple of 4, which the position embedding needs"
            )
        if self.kind == "pixart":
            if self.caption_channels is None or self.max_tokens is None:
                problems.append("kind pixart needs caption_channels and max_tokens")
            if self.num_classes is not None:
                problems.append(f"kind pixart has no num_classes (got {self.num_classes}); remove it or use kind dit")
            if self.micro_conditions and self.hidden_size % 3:
                problems.append(f"micro_conditions need a hidden_size that divides by 3, not {self.hidden_size}")
        else:
            if self.num_classes is None:
                problems.append("kind dit needs num_classes")
            for key in ("caption_channels", "max_tokens"):
                if getattr(self, key) is not None:
                    problems.append(f"kind dit has no {key} (got {getattr(self, key)}); remove it or use kind pixart")
            if self.micro_conditions:
                problems.append("kind dit has no micro_conditions; remove it or use kind pixart")
        if problems:
            raise ValueError("; ".join(problems))
        return self


class InitConfig(Section):
    """Where a stage's weights come from. Step, moments and EMA always start anew (paper.md 4.3)."""

    source: Literal["scratch", "handover", "reparameterise"] = "scratch"
    """handover: same kind of net as the stage before; reparameterise: DiT to PixArt (paper §2.3); scratch: random."""
    stage: Name | None = None
    """The stage of this chain that hands over; it or path is needed unless the source is scratch."""
    path: str | None = None
    """A folder that `pixart-ds import` made, or a handover of another run, instead of a stage of this chain."""
    weights: Literal["raw", "ema"] | None = None
    """raw, as the released code does, or the EMA of the stage before; needed unless the source is scratch."""
    reparameterise_at: Annotated[int, Field(ge=0, le=999)] = 500
    """The timestep at which DiT and PixArt agree after re-parameterisation (paper §2.3: t = 500)."""
    shared_modulation: Literal["first", "mean"] | Annotated[int, Field(ge=0)] = "first"
    """Which function of the timestep all PixArt blocks share after re-parameterisation: that of DiT's first block (the paper's
    "only at the first block"), the mean over its blocks, or that of the block with this number."""

    @model_validator(mode="after")
    def _origin(self) -> Self:
        origins = [key for key in ("stage", "path") if getattr(self, key) is not None]
        if self.source == "scratch" and (origins or self.weights is not None):
            raise ValueError("source scratch takes no stage, path or weights; remove them or name another source")
        if self.source != "scratch" and (len(origins) != 1 or self.weights is None):
            raise ValueError(
                f"source {self.source} needs weights (raw or ema) and either stage (of this chain) or path (a handover's folder), "
                f"not {' and '.join(origins) or 'none of the two'}"
            )
        return self


class SetConfig(Section):
    """One prepared set and what is taken of it."""

    path: str
    """Folder or s3:// address of a prepared set (written by `pixart-ds prepare`, copied by `pixart-ds upload`)."""
    count: PositiveInt | None = None
    """Only the first `count` rows of a fixed permutation of the set; never repeats."""
    minimum: dict[str, float] = {}
    """Only rows with at least these numbers, of columns that the set's source had: `{aesthetic_score: 6.5}`; none without."""
    maximum: dict[str, float] = {}
    """Only rows with at most these numbers."""
    min_ratio: PositiveFloat | None = None
    """Only rows whose original height / width is at least this."""
    max_ratio: PositiveFloat | None = None
    """Only rows whose original height / width is at most this."""
    min_side: PositiveInt | None = None
    """Only rows whose shorter original side has at least so many pixels."""


class DataConfig(Section):
    """The prepared sets that a stage reads, joined into one order."""

    sets: Annotated[tuple[SetConfig, ...], Field(min_length=1, strict=False)]
    latents: str
    """Which latents of the sets to read, by the name that `prepare` gave them: `256-square`, `512`, `1024`, …"""


class OrderConfig(Section):
    """Shape of the order of the data (architecture: The order of the data)."""

    lanes: PositiveInt = 64
    """Fixed parts of the shards; the same ranks read a lane in every pass."""
    strip_length: PositiveInt = 64
    """Consecutive samples of one bucket."""
    window: PositiveInt = 4
    """Shards of a bucket among which samples are shuffled; it bounds the cache."""


class OptimizerConfig(Section):
    """AdamW, its schedule, clipping and the EMA (paper appendix A.5 and the released configs)."""

    learning_rate: PositiveFloat = 2e-5
    learning_rate_rule: Literal["none", "sqrt"] = "none"
    """sqrt: times √(global_batch_size / 256), as the released configs do; the paper's text has none."""
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = (0.9, 0.999)
    eps: PositiveFloat = 1e-10
    weight_decay: Annotated[float, Field(ge=0)] = 0.03
    gradient_clipping: PositiveFloat = 0.01
    warmup_steps: Annotated[int, Field(ge=0)] = 1000
    """Applied optimizer steps of linear warm-up."""
    decay_fraction: Fraction = 0.0
    """Last part of the stage over which the rate falls linearly to `final_rate`; 0 keeps it constant, as the paper does."""
    final_rate: Fraction = 0.05
    """Share of the learning rate at the end of the decay."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.9999
    ema_warmup: bool = False
    """Uses min(ema_decay, (1 + s) / (10 + s)) after s applied steps: short runs forget the start sooner."""

    def effective_learning_rate(self, global_batch_size: int) -> float:
        """The rate after warm-up, for a batch of `global_batch_size` images."""
        factor = math.sqrt(global_batch_size / 256) if self.learning_rate_rule == "sqrt" else 1.0
        return self.learning_rate * factor


class CacheConfig(Section):
    """Where a node keeps the shards that it reads. A set's own place is never written to."""

    mode: Literal["node-job", "node-persistent", "shared"] = "node-job"
    """node-job: on the node's disk, removed when the job's last rank leaves; node-persistent: kept there for later jobs, and shared
    by those that run at the same time; shared: a set in a folder is read in place, one in an object store from the copy that
    `pixart-ds stage-in` makes in `folder`."""
    folder: str | None = None
    """On a disk of the node's own; by default in $TMPDIR (else /tmp), one for each user. With shared: one that all nodes see."""
    limit_gb: PositiveFloat | None = None
    """10⁹ bytes that all sets in the folder may take together; without it, as many as the disk holds."""
    patience_seconds: PositiveFloat = 120.0
    """How long a store that does not answer is asked again before the stage ends with an error."""


class DeadlinesConfig(Section):
    """Seconds that a rank may spend in a phase before it is taken for stuck; the attempt then starts anew where it was saved."""

    start: PositiveFloat = 1800.0
    """From the process's start to the first step's end: imports, checkpoint, first shards, compilation."""
    step: PositiveFloat = 600.0
    save: PositiveFloat = 1800.0
    """Waiting for a checkpoint to be committed, or handing over."""
    preview: PositiveFloat = 3600.0
    silence: PositiveFloat = 60.0
    """Without any sign of life: a process that was stopped, or a host that is gone."""


class ExecutionConfig(Section):
    """How a rank runs its share. It may change between attempts: the result does not depend on it but for rounding."""

    micro_batch_size: Literal["auto"] | PositiveInt = 32
    """Most samples of one bucket that a rank runs at once. auto: what `pixart-ds estimate` finds fastest for the GPUs at hand, anew
    at the start of each attempt."""
    checkpointed_blocks: Literal["all", "none", "auto"] | Annotated[int, Field(ge=0)] = "all"
    """Blocks whose activations are recomputed in backward: all, none, the first k; auto as above."""
    attention_backend: AttentionBackend = "auto"
    """The kernel that attention must use; it is an error if it cannot. On V100s only memory_efficient is fast: flash has no kernels
    for them, and math, to which torch may turn silently, needs memory for every pair of tokens. auto leaves it to torch."""
    packed_text: bool = False
    """Cross-attention over each caption's real tokens end to end, instead of padded captions under a mask."""
    cache: CacheConfig = CacheConfig()
    """Where the node keeps the shards that it reads."""
    deadlines: DeadlinesConfig = DeadlinesConfig()
    """When a rank is taken for stuck."""
    deepspeed: str = "zero2_v100_32gb"
    """Name of a file in ds_configs/ (without .json) or a path."""

    @property
    def is_auto(self) -> bool:
        """Whether a number is still to be chosen, for the GPUs at hand."""
        return "auto" in (self.micro_batch_size, self.checkpointed_blocks)


class CheckpointConfig(Section):
    """When training state is kept."""

    every: Duration | None = None
    """Between recovery checkpoints."""
    mean_time_between_failures_hours: PositiveFloat | None = None
    """In place of `every`: of the whole job, preemptions included. The interval follows from it and from what a save costs
    (Daly 2006)."""
    keep: PositiveInt = 2
    """Recovery checkpoints kept besides milestones."""
    milestone_every: Duration | None = None
    """Between checkpoints that are never deleted."""
    path: str | None = None
    """A folder or s3://bucket/prefix; the run's checkpoints get a folder of their own there. By default they lie in the run."""

    @model_validator(mode="after")
    def _one_interval(self) -> Self:
        if (self.every is None) == (self.mean_time_between_failures_hours is None):
            raise ValueError("give exactly one of every and mean_time_between_failures_hours")
        if self.path is not None and "://" in self.path and not self.path.startswith("s3://"):
            raise ValueError(f"path is a folder or an s3:// address, not {self.path}")
        return self


class GuardConfig(Section):
    """When a training that has gone wrong is sent back to an earlier checkpoint, and goes around the images where it did."""

    consecutive_skips: PositiveInt = 40
    """Steps refused in a row for a loss or gradient that is not finite; fp16's scale falls from 2¹⁶ to 1 in 17."""
    spike_factor: PositiveFloat | None = 12.0
    """A loss is too high above median + factor · 1.4826 · MAD of the last ones, and 1.5 times the median; null: never."""
    spike_steps: PositiveInt = 5
    """Steps in a row that are too high."""
    history_steps: Annotated[int, Field(ge=10)] = 200
    """Applied steps that the bound is taken from."""
    rollbacks: Annotated[int, Field(ge=0)] = 3
    """How often training is sent back within `rollback_steps`; then the stage ends with a report."""
    rollback_steps: PositiveInt = 1000


class PreviewConfig(Section):
    """Pictures of held prompts (DiT: of classes), while a stage trains and after it."""

    every: Duration | None = None
    """Between sheets that the EMA draws while the stage trains; without it there are none before its end."""
    guidance_scale: Annotated[float, Field(ge=1)] = 4.5
    num_inference_steps: PositiveInt = 20
    scheduler: str = "DPMSolverMultistepScheduler"
    """Class name of a diffusers scheduler."""
    null_caption: Literal["encoder", "weights"] = "encoder"
    """What guidance leads away from: the text encoder's empty caption under its own mask, as in diffusers, or the weights' stored
    null caption under the prompt's mask, as in training and in the released code."""
    seed: Annotated[int, Field(ge=0)] = 0
    count: PositiveInt = 24
    """Prompts in the grid."""


class StageConfig(Section):
    """One objective at one resolution, with an init source and a length."""

    name: Name
    description: str = ""
    paper: bool = False
    """Uses the published setting where a faster one is the default: fp32 self-attention."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 43
    length: Duration
    global_batch_size: PositiveInt
    precision: Literal["fp16", "bf16", "fp32"] = "fp16"
    min_snr_gamma: PositiveFloat | None = None
    """Weighs the ε-MSE of a timestep by min(SNR, γ) / SNR (Hang et al. 2023); without it, as in the paper, all weigh the same."""
    model: ModelConfig
    init: InitConfig
    data: DataConfig
    order: OrderConfig = OrderConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    execution: ExecutionConfig = ExecutionConfig()
    checkpoint: CheckpointConfig
    guard: GuardConfig = GuardConfig()
    previews: PreviewConfig = PreviewConfig()
    paper_gpus: PositiveInt | None = None
    """V100s that the paper used for this stage (Table 4)."""
    paper_gpu_days: PositiveFloat | None = None
    """V100-days that the paper states for this stage (Table 4)."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        problems = []
        if self.init.source == "reparameterise" and self.model.kind != "pixart":
            problems.append("init.source reparameterise makes a PixArt net, but model.kind is dit")
        shared = self.init.shared_modulation
        if isinstance(shared, int) and shared >= self.model.depth:
            problems.append(
                f"init.shared_modulation {shared} is no block of {self.model.depth}; use 0 to {self.model.depth - 1}"
            )
        if self.fp32_attention and self.execution.attention_backend == "flash":
            problems.append(
                "execution.attention_backend flash has no fp32 kernel for model.fp32_attention; use memory_efficient or auto"
            )
        if self.init.stage == self.name:
            problems.append(f"init.stage is the stage itself ({self.name!r}); name the one before")
        if self.optimizer.warmup_steps > self.total_steps:
            problems.append(
                f"optimizer.warmup_steps {self.optimizer.warmup_steps} exceeds the stage's {self.total_steps} steps; "
                "lower it or lengthen the stage"
            )
        if (
            isinstance(self.execution.checkpointed_blocks, int)
            and self.execution.checkpointed_blocks > self.model.depth
        ):
            problems.append(
                f"execution.checkpointed_blocks {self.execution.checkpointed_blocks} exceeds model.depth {self.model.depth}; "
                "use all"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def total_steps(self) -> int:
        return self.length.in_steps(self.global_batch_size)

    @property
    def total_images(self) -> int:
        return self.length.in_images(self.global_batch_size)

    @property
    def fp32_attention(self) -> bool:
        return self.paper or self.model.fp32_attention


class BudgetConfig(Section):
    """What a run may use up, all its stages and attempts together; null or left away: no limit."""

    gpu_days: PositiveFloat | None = None
    """Device-days as the cost report counts them: GPUs times days held; on a CPU one core for each rank."""
    kwh: PositiveFloat | None = None
    """With the node's share and PUE."""
    kg_co2e: PositiveFloat | None = None
    """Location-based; without that of making the devices."""
    usd: PositiveFloat | None = None

    @property
    def limits(self) -> dict[str, float]:
        """Those that are set."""
        return self.model_dump(exclude_none=True)


class ChainConfig(Section):
    """Ordered stages; how each starts is in its own `init`."""

    name: Name
    stages: Annotated[tuple[StageConfig, ...], Field(min_length=1, strict=False)]
    budget: BudgetConfig | None = None
    """What a new run begins with. From then on RUN/budget.json counts, which `pixart-ds budget` changes, not the copy of this in
    the run's chain.yaml."""

    @model_validator(mode="after")
    def _handovers(self) -> Self:
        problems: list[str] = []
        before: dict[str, StageConfig] = {}
        for stage in self.stages:
            if stage.name in before:
                problems.append(f"two stages are called {stage.name}")
            origin = before.get(stage.init.stage or "")
            if stage.init.stage is not None and origin is None:
                problems.append(
                    f"{stage.name}.init.stage {stage.init.stage!r} is not an earlier stage ({', '.join(before) or 'none'})"
                )
            if origin is not None:
                wanted = "dit" if stage.init.source == "reparameterise" else stage.model.kind
                if origin.model.kind != wanted:
                    problems.append(
                        f"{stage.name}.init.source {stage.init.source} needs a {wanted} net from {origin.name}, "
                        f"which trains a {origin.model.kind}"
                    )
                for key in ("depth", "hidden_size", "num_heads", "patch_size", "in_channels", "mlp_ratio"):
                    ours, theirs = getattr(stage.model, key), getattr(origin.model, key)
                    if ours != theirs:
                        problems.append(
                            f"{stage.name}.model.{key} {ours} differs from {origin.name}.model.{key} {theirs}"
                        )
            before[stage.name] = stage
        if problems:
            raise ValueError("; ".join(problems))
        return self


class LatentsConfig(Section):
    """One set of latents that `prepare` writes."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    """`256-square`, `512`, `1024`, …"""
    square: PositiveInt | None = None
    """Side in pixels: every picture is resized on its shorter side and centre-cropped to a square."""
    sizes: Annotated[tuple[Size, ...], Field(strict=False)] | Literal["paper-256", "paper-512", "paper-1024"] | None = (
        None
    )
    """One (height, width) in pixels for each ratio of `ratios`, or the paper's table at 256, 512 or 1024 px."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.square is None) == (self.sizes is None):
            raise ValueError("give exactly one of square and sizes")
        return self


class SourceConfig(Section):
    """Where pictures and what is said of them come from."""

    path: str
    """What `kind` says: a folder, a file, or a pattern of files; local or s3://bucket/…"""
    kind: Literal["folder", "imagenet", "list", "webdataset", "parquet"] = "folder"
    """`folder`: pictures with a caption file beside each; the folder a picture lies in is its class. `imagenet`: a folder for each
    class, whose name is the caption. `list`: JSON, JSONL or CSV files with an entry for each picture, such as the released code's
    (path, prompt, width, height, ratio). `webdataset`: tar files whose members of one stem are one sample. `parquet`: files with a
    row for each picture, which holds its bytes or its path."""
    root: str | None = None
    """Where relative paths of a list or of parquet rows begin; null: the folder of the file that names them."""
    caption_suffix: str = ".txt"
    """`folder` and `webdataset`: `.txt` takes NAME.txt (the dense caption), `.short.txt` takes NAME.short.txt."""
    caption_key: str | None = None
    """`list`, `parquet`, and the JSON member of a `webdataset`: what the caption is called; null: the first that is there of
    `prompt`, `caption`, `text`, `txt`."""
    picture_key: str | None = None
    """`list` and `parquet`: what the path, or the picture itself, is called; null: the first that is there of `path`, `image`,
    `file_name`, `filename`, `jpg`, `png`, `webp`."""
    class_key: str | None = None
    """What the class is called; null: there is none."""
    class_names: str | None = None
    """`imagenet`: a file of lines `n01440764 tench, Tinca tinca`, or a JSON of {"0": ["n01440764", "tench"], …}; null: folders'
    names."""


class FilterConfig(Section):
    """Which pictures are prepared at all. What is filtered out is counted, and listed with the reason."""

    min_ratio: PositiveFloat | None = None
    """Height / width is at least this."""
    max_ratio: PositiveFloat | None = None
    min_side: PositiveInt | None = None
    """The shorter side has at least so many pixels."""
    max_pixels: PositiveInt = 400_000_000
    """Larger pictures are left out: a small file can unpack to more than there is memory."""
    minimum: dict[str, float] = {}
    """For numbers that the source gives: `{aesthetic_score: 6.5}` takes pictures with at least this score, and none without."""
    maximum: dict[str, float] = {}


class CaptionsConfig(Section):
    """Where captions come from, and what is done to them."""

    captioner: str = "source"
    """`source`: as the source has them. `llava`: a vision-language model of transformers writes them. `package.module:Name`: your
    own, see `pixart_ds.encoders.captions.Captioner`."""
    model: str | None = None
    """llava: folder or hub name; paper: LLaVA-7B. Your own captioner is handed it as well."""
    prompt: str = "Describe this image and its style in a very detailed manner"
    """Paper, §2.4."""
    with_original: bool = False
    """The paper's form for LAION: the model is told the source's caption first."""
    precision: Literal["fp16", "bf16", "fp32"] = "fp16"
    max_new_tokens: PositiveInt = 1024
    temperature: Annotated[float, Field(ge=0)] = 0.2
    """0: the likeliest word each time."""
    batch_size: PositiveInt = 8
    """Pictures described at once; a LLaVA of 7 B takes about 0.6 GB for each."""
    clean: bool = True
    """Captions are cleaned, twice as in the released code, before they are encoded; prompts too. The set holds them uncleaned."""
    missing: Literal["error", "skip"] = "error"
    """What is done about pictures without a caption."""


class PrepareConfig(Section):
    """Pictures and captions to a prepared set."""

    source: SourceConfig
    output: str
    """Folder, or s3://bucket/prefix, of the prepared set. A finished one is never changed: name a version: data/internal/v1."""
    work: str | None = None
    """Folder for lists of pictures, the plan and captions while a set is being made; all processes see it. null: OUTPUT/.work, but
    an object store needs one."""
    filter: FilterConfig = FilterConfig()
    captions: CaptionsConfig = CaptionsConfig()
    vae: str
    """Folder (or hub name) of a diffusers AutoencoderKL."""
    vae_precision: Literal["fp16", "bf16", "fp32"] = "fp32"
    text_encoder: str
    """Folder (or hub name) of a transformers T5EncoderModel with its tokenizer."""
    text_precision: Literal["fp16", "bf16", "fp32"] = "fp16"
    """fp16 keeps the layers that overflow in fp32, as transformers does for T5."""
    caption_codec: Literal["fp16", "int8"] = "fp16"
    """How caption features are stored: as they are, or in 8 bits with a scale for each 64 channels, in half the space."""
    max_tokens: PositiveInt = 120
    ratios: Annotated[tuple[PositiveFloat, ...], Field(strict=False, min_length=1)] | Literal["paper"] = "paper"
    """Aspect ratios (height / width) by which rows are partitioned: the paper's 40, or an own list, rising."""
    latents: Annotated[tuple[LatentsConfig, ...], Field(strict=False, min_length=1)]
    rows_per_group: PositiveInt = 128
    """Rows of one shard of captions and of each shard of latents: a part, what a killed process does again."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the order in which pictures are written, and of sampled captions."""
    prompts: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Held prompts whose features are stored for previews."""
    batch_size: PositiveInt = 32
    """Pictures or captions encoded at once, at most."""
    batch_pixels: PositiveInt = 8_388_608
    """And so many pixels: 128 pictures of 256 x 256, 8 of 1024 x 1024."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        problems = []
        if self.output.startswith("s3://") and self.work is None:
            problems.append("work must name a folder that all processes see, since output is an object store")
        if self.work is not None and not self.output.startswith("s3://"):
            inside = os.path.relpath(self.work, self.output).split(os.sep)[0]
            if inside in (".", "captions", "parts") or inside.startswith("latents-"):
                problems.append(
                    f"work {self.work} is where the set itself is written; name another folder, or leave it out"
                )
        if self.captions.captioner == "llava" and self.captions.model is None:
            problems.append("captions.model must name a LLaVA, a folder or a hub name")
        if self.ratios != "paper" and list(self.ratios) != sorted(set(self.ratios)):
            problems.append(f"ratios must rise without repeats, not {list(self.ratios)}")
        names = [latents.name for latents in self.latents]
        problems += [f"two latents are called {name}" for name in sorted({n for n in names if names.count(n) > 1})]
        for latents in self.latents:
            if isinstance(latents.sizes, str):
                if self.ratios != "paper":
                    problems.append(f"latents {latents.name}: {latents.sizes} needs ratios: paper")
            elif latents.sizes is not None:
                if self.ratios == "paper":
                    problems.append(
                        f"latents {latents.name}: ratios: paper needs sizes paper-256, paper-512 or paper-1024"
                    )
                elif len(latents.sizes) != len(self.ratios):
                    problems.append(f"latents {latents.name}: {len(latents.sizes)} sizes for {len(self.ratios)} ratios")
        if problems:
            raise ValueError("; ".join(problems))
        return self
