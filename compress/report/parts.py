"""What `run.json` and the manifests of a run's stages say, checked.

Everything a stage may leave out is optional here, and None means "not measured". Unknown fields are let through or
ignored, so that a report can be written for a run folder of another version.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)

from compress.targets.agent import UNAVAILABLE


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False, use_attribute_docstrings=True)


def _found_out(value: Any) -> Any:
    """None for "unavailable", the agent's word for what a machine does not tell."""
    return None if value == UNAVAILABLE else value


Told = Annotated[NonNegativeFloat | None, BeforeValidator(_found_out)]
"""A figure that not every machine tells."""


class Layer(Part):
    name: str
    kind: str = ""
    inputs: int
    outputs: int
    groups: int = 1
    kernel: list[int] = []
    macs: int | None = None
    params: int | None = None


class Output(Part):
    """How well a network tells one label (the first three figures) or number."""

    name: str
    average_precision: float | None = None
    positives: int | None = None
    right: float | None = None
    r2: float | None = None
    mae: float | None = None
    rmse: float | None = None


class NetworkFigures(Part):
    """The torch network after a stage."""

    accuracy: float | None = Field(default=None, le=1)
    """The task's score: R2 has no lower bound."""
    outputs: list[Output] = []
    images: int | None = None
    params: int | None = None
    macs: int | None = None
    precision: str = "float32"
    """`float32`, `int8 (fake quant)`, `int8 + 2 layers float32 (fake quant)`, `W4A8 (simulated)`."""
    layers: list[Layer] = []

    @property
    def numbers(self) -> str:
        """What it computes in: `float32`, `int8`, `int8 + 2 layers float32`, `W4A8`."""
        return self.precision.partition(" (")[0]

    @property
    def simulated(self) -> bool:
        """Whether no runtime executes what the network computes."""
        return self.precision.endswith("(simulated)")


class Epoch(Part):
    epoch: int
    loss: float
    lr: float | None = None
    seconds: float | None = None


class ExportedFile(Part):
    format: str
    kind: str
    """parent, float, float16, int8_weights or int8."""
    size_bytes: PositiveInt | None = None
    sha256: str | None = None


class Export(Part):
    files: dict[str, ExportedFile] = {}


class VerifiedFile(Part):
    runtime: str
    accuracy: float | None = Field(default=None, le=1)
    outputs: list[Output] = []
    images: int | None = None


class Agreement(Part):
    """How far two forms of one network agree on the same images."""

    a: str
    b: str
    kind: str = ""
    logits: int | None = None
    differing: int | None = None
    max_lsb: int | None = None
    max_abs: float | None = None
    max_relative: float | None = None
    """`max_abs` over the largest logit."""
    top1_agreement: float | None = None
    histogram: dict[int, NonNegativeInt] = {}
    """Number of logits by how many steps of the output's grid they differ."""


class Stored(Part):
    """Scales, zero points, weights and biases, read from the files and compared exactly."""

    witnesses: list[str] = []
    grids: int = 0
    layers: int = 0
    differing: int = 0
    """Layers with a number that differs."""


class LayerNoise(Part):
    layer: str
    output_db: float | None = None
    """Signal over error at the output when this layer alone is rounded; None where there is no error."""
    own_db: float | None = None
    sqnr_db: float | None = None


class Noise(Part):
    """What rounding costs, layer by layer."""

    exact: str
    rounded: str
    images: int | None = None
    output_db: float | None = None
    worst: list[str] = []
    """The layers that cost most, the worst first."""
    layers: list[LayerNoise] = []


class Confusion(Part):
    """Which classes a file takes for which."""

    matrix: list[list[NonNegativeInt]] | None = None
    """A row per true class, a column per class that was said; None where there are too many to read."""
    worst: list[tuple[NonNegativeInt, NonNegativeInt, NonNegativeInt]] = []
    """True class, class said, images; the commonest first."""
    mistakes: NonNegativeInt = 0
    recall: list[tuple[NonNegativeInt, NonNegativeInt]] = []
    """Images of each class, and how many of them were right."""


class Example(Part):
    """An image that the compressed file gets wrong and the parent's right."""

    image: str
    """`wrong/00.png`, in the stage's folder."""
    index: NonNegativeInt
    true: NonNegativeInt
    parent: NonNegativeInt
    compressed: NonNegativeInt
    parent_confidence: float | None = None
    compressed_confidence: float | None = None


class Wrong(Part):
    """The same images, one file against another."""

    file: str
    parent: str
    images: NonNegativeInt
    lost: NonNegativeInt
    """Right in the parent's file alone."""
    gained: NonNegativeInt
    """Right in the compressed file alone."""
    both: NonNegativeInt
    """Wrong in both."""
    examples: list[Example] = []


class Verification(Part):
    tolerance_lsb: int | None = None
    tolerance_float: float | None = None
    """Largest `max_relative` allowed between float files."""
    images: int | None = None
    verdict: str
    reason: str = ""
    """Why not PASS."""
    files: dict[str, VerifiedFile] = {}
    agreement: list[Agreement] = []
    static: Stored | None = None
    sqnr: Noise | None = None
    confusion: dict[str, Confusion] = {}
    """Of the most compressed file, and of the parent's."""
    wrong: Wrong | None = None
    notes: list[str] = []


class Conditions(Part):
    """The machine that measured and how; fields that this class does not name are kept and shown."""

    model_config = ConfigDict(extra="allow")

    target: str = "local"
    machine: str | None = None
    cpu: str | None = None
    arch: str | None = None
    is_arm: bool | None = None
    emulator: Annotated[str | None, BeforeValidator(_found_out)] = None
    """What a board runs programs of its architecture by, where that is no CPU: `qemu-aarch64`."""
    threads: int | list[int] | str | None = None
    batch: int | None = None
    runtimes: dict[str, Any] = {}
    before: dict[str, Any] = {}
    """Temperature, clock, throttling and load before the first process."""
    during: dict[str, Any] = {}
    """Least and most of clock and temperature over all processes."""
    after: dict[str, Any] = {}
    """As before, after the last process."""
    throttled: list[str] = []
    """Why the machine is taken for throttled while it measured."""


class Timing(Part):
    """One file timed in one runtime, batch 1."""

    file: str
    kind: str
    runtime: str
    threads: int | None = None
    p50_ms: PositiveFloat
    p90_ms: PositiveFloat | None = None
    p99_ms: PositiveFloat | None = None
    min_ms: PositiveFloat | None = None
    max_ms: PositiveFloat | None = None
    fps: PositiveFloat | None = None
    startup_ms: NonNegativeFloat | None = None
    first_ms: NonNegativeFloat | None = None
    peak_rss_mb: NonNegativeFloat | None = None
    samples: int | None = None
    sampled_s: NonNegativeFloat | None = None
    """Seconds of all samples together."""
    size_bytes: PositiveInt | None = None
    sha256: str | None = None


class Pair(Part):
    """Candidate against baseline, measured in turns."""

    runtime: str
    baseline: str
    candidate: str
    threads: int | None = None
    speedup: PositiveFloat
    interval: tuple[PositiveFloat, PositiveFloat] | None = None
    aa_ratio: float | None = None
    """The baseline against itself: what the machine calls a difference where there is none."""
    verdict: str | None = None
    reasons: list[str] = []
    """Why NOISY."""


class OnTarget(Part):
    """A sample of the evaluation images on the machine that measured, and on the host by a runtime of the same name."""

    file: str
    runtime: str
    images: int
    correct: int | None = None
    accuracy: float | None = Field(default=None, ge=0, le=1)
    host_accuracy: float | None = Field(default=None, ge=0, le=1)
    outputs: int
    """Output values compared."""
    differing: int
    max_lsb: int | None = None
    """Of integer outputs."""
    max_difference: float | None = None
    """Of float outputs."""
    equal: bool
    """Bit for bit."""
    board_version: str | None = None
    host_version: str | None = None
    outputs_sha256: str | None = None


class Point(Part):
    """A few seconds of a sustained run."""

    t_s: NonNegativeFloat
    p50_ms: PositiveFloat
    p90_ms: PositiveFloat | None = None
    samples: int | None = None
    mhz: Told = None
    temperature_c: Annotated[float | None, BeforeValidator(_found_out)] = None
    throttled: list[str] = []
    """Why the machine is taken for held back at that time."""


class Sustained(Part):
    """One file without a pause for minutes."""

    file: str
    runtime: str
    threads: int | str | None = None
    series: list[Point] = []
    first_minute_p50_ms: PositiveFloat | None = None
    last_minute_p50_ms: PositiveFloat | None = None
    slowdown: PositiveFloat | None = None
    throttled: list[str] = []
    verdict: str | None = None


class EmulatedParity(Part):
    """A file's outputs from the kernels that an emulated core runs, compared with the host's."""

    file: str
    runtime: str
    cpu: str
    images: int | None = None
    outputs: int
    differing: int
    max_lsb: int | None = None
    max_difference: float | None = None
    outputs_sha256: str | None = None


class InstructionCount(Part):
    """Instructions of one inference by one thread of an emulated core."""

    file: str
    runtime: str
    cpu: str
    instructions: PositiveInt
    repeat_instructions: PositiveInt | None = None
    """Of a second count of the same: how far it may be trusted."""
    overhead_instructions: NonNegativeInt | None = None
    cycles_estimated: Told = None
    share_covered: Told = None
    """Part of the instructions that the estimate of cycles looked at."""
    size_bytes: PositiveInt | None = None
    sha256: str | None = None


class Benchmark(Part):
    conditions: Conditions
    rows: list[Timing] = []
    pairs: list[Pair] = []
    accuracy: list[OnTarget] = []
    sustained: list[Sustained] = []
    parity: list[EmulatedParity] = []
    counts: list[InstructionCount] = []
    notes: list[str] = []


class Measure(Part):
    """One figure of the network and of the one it was made from."""

    name: str
    group: str = ""
    unit: str = "fraction"
    images: int | None = None
    student: float | None = None
    teacher: float | None = None
    """None where the figure is of both together, such as how often they agree."""


class Knowledge(Part):
    """What a network has of its original beyond accuracy."""

    images: int | None = None
    attack_images: int | None = None
    eps_255ths: float | None = None
    """How far attacks moved a pixel."""
    severities: list[int] = []
    """Of the corruptions."""
    measures: list[Measure] = []


class Training(Part):
    history: list[Epoch] = []


class Sample(Part):
    """An image as the network sees it."""

    image: str = Field(validation_alias=AliasChoices("image", "file", "path"))
    """`samples/train-00.png`, in the stage's folder."""
    split: str = "train"
    label: Any = None
    """What it is called."""


class Loading(Training):
    samples: list[Sample] = []
    classes: dict[str, list[NonNegativeInt]] = {}
    """Images of each class, by split."""


class Sensitivity(Part):
    """What fewer channels of one set of coupled layers do to the outputs, all others being whole."""

    name: str
    units: PositiveInt
    kept: NonNegativeInt | None = None
    """How many the network kept."""
    widths: list[NonNegativeInt] = []
    kl: list[float | None] = []
    """KL divergence of the outputs from those of the whole network, in nats, for each width."""
    accuracy: list[float | None] = []


class LayerChannels(Part):
    layer: str
    before: list[NonNegativeInt] = []
    """Outputs, inputs."""
    after: list[NonNegativeInt] = []


class Block(Part):
    """A residual block that could be left out."""

    name: str
    kl: float | None = None
    dropped: bool = False


class Way(Part):
    """One way to spend the time, by what it would take and how far the answers would move."""

    name: str
    us: float
    kl: float | None = None


class Round(Part):
    """One step to a goal of speed."""

    step: int
    most_us: float
    candidates: list[Way] = []
    chosen: str
    corrected: bool = False


class Reach(Part):
    """A time that some narrower network has, and what the curves foretell that it loses."""

    us: PositiveFloat
    loss: float | None = None


class Pruning(Training):
    goal: str | None = None
    """Of speed, as the recipe has it; the next ones belong to it. Times are in microseconds."""
    target: str | None = None
    runtime: str | None = None
    threads: int | None = None
    estimated: bool = False
    parent_us: PositiveFloat | None = None
    whole_us: PositiveFloat | None = None
    most_us: PositiveFloat | None = None
    predicted_us: PositiveFloat | None = None
    measured_us: PositiveFloat | None = None
    rounds: list[Round] = []
    frontier: list[Reach] = []
    goal_macs: float | None = None
    macs_before: int | None = None
    macs_after: int | None = None
    reached: float | None = None
    criterion: Any = None
    round_to: int | None = None
    steps: int | None = None
    sensitivity: list[Sensitivity] = []
    channels: list[LayerChannels] = []
    blocks: list[Block] = []


Metrics = Export | Verification | Benchmark | Knowledge | Loading | Pruning | Training

METRICS: dict[str, type[Metrics]] = {
    "load": Loading,
    "prune": Pruning,
    "knowledge": Knowledge,
    "export": Export,
    "verify": Verification,
    "benchmark": Benchmark,
}
"""By stage; any other stage is one that may have trained."""


class ProductFolders(Part):
    """Where the product lay after a stage, relative to the run's folder."""

    parent: str | None = None
    """`stages/01-train/network`; None while nothing was compressed."""


class Manifest(Part):
    stage: str
    index: int
    folder: str
    settings: dict[str, Any] = {}
    seconds: float | None = None
    finished: str | None = None
    resumed: bool = False
    product: ProductFolders = ProductFolders()
    notes: list[str] = []
    network: NetworkFigures | None = None
    metrics: dict[str, Any] = {}


class DataDescription(Part):
    use: str | None = None
    task: str = "classification"
    labels: list[str] = []
    train: int | None = None
    evaluation: int | None = None
    fingerprint: str | None = None
    notes: list[str] = []


class ControlSearch(Part):
    at: float
    ratio: PositiveFloat


class ControlNetwork(Part):
    """A control, or the run's own network (`ours`), with all its seeds."""

    name: str
    folders: list[str] = []
    left_out: str = ""
    failed: list[str] = []
    setting: dict[str, float] = {}
    search: list[ControlSearch] = []
    accuracy: list[float] = []
    """Of its file, for each seed."""
    mean: float | None = None
    sd: float | None = None
    size_bytes: PositiveInt | None = None
    macs: int | None = None
    params: int | None = None
    latency_ms: PositiveFloat | None = None
    ratio: PositiveFloat | None = None
    """Its time over ours."""
    ratio_interval: tuple[PositiveFloat, PositiveFloat] | None = None
    speedup: PositiveFloat | None = None
    """Over the parent's file."""
    noisy: bool | None = None
    verdict: str | None = None
    """Of our network against it: win, tie, lose or trade."""
    said: str = ""
    difference: float | None = None
    """Ours less its own, of mean accuracies."""
    images_p: float | None = None
    seeds_p: float | None = None


class EqualLatency(Part):
    """Simpler networks that are as fast as the run's own, timed in one session."""

    finished: bool = False
    file: str
    runtime: str
    target: str = "local"
    threads: int | str | None = None
    tolerance: float | None = None
    seeds: int = 1
    conditions: dict[str, Any] = {}
    networks: list[ControlNetwork] = []


class RunDescription(Part):
    name: str
    command: str | None = None
    started: str | None = None
    finished: str | None = None
    seconds: float | None = None
    recipe_hash: str | None = None
    compress: str | None = None
    versions: dict[str, str] = {}
    python: str | None = None
    platform: str | None = None
    cpu: str | None = None
    threads: int | None = None
    processes: int | None = None
    device: str | None = None
    seed: int | None = None
    data: DataDescription = DataDescription()
    preprocess: dict[str, Any] = {}
    model: dict[str, Any] = {}
    stages: list[str] | None = None
    controls: list[str] = []
    """Other runs to compare this one with, in its folder `controls`."""
    equal_latency: EqualLatency | None = None
