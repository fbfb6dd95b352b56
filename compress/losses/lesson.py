"""What a loss sees of one batch, and what it may ask for: the vocabulary of all files in this folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Protocol

from pydantic import Field, model_validator
from torch import Tensor, nn

from compress.labels import Task
from compress.models.patterns import Pattern
from compress.product import NO_LABEL as NO_LABEL
from compress.product import KeptChannels
from compress.settings import Settings


@dataclass(frozen=True)
class Lesson:
    """One batch as student and teacher see it. Gradients flow into the student's tensors, never into the teacher's."""

    student_NK: Tensor
    """The student's outputs: logits, or numbers of a regression."""
    teacher_NK: Tensor
    """The teacher's."""
    labels_N: Tensor
    """As in `Batch`: int64 classes, `NO_LABEL` where an image has none."""
    student_maps: Sequence[Tensor] = ()
    """What `layers` return in the student, in their order: (N, C, H, W), (N, tokens, C) or (N, C)."""
    teacher_maps: Sequence[Tensor] = ()
    """The same layers in the teacher, of the same height and width; of the same channels if the loss asks for it."""
    layers: Sequence[str] = ()
    """The student's names of them."""
    parts: nn.Module | None = None
    """What the loss's own `parts` built: trained along with the student and thrown away afterwards."""
    images_NCHW: Tensor | None = None
    """The pixels; they require a gradient where the loss `needs_input_gradients`."""
    indices_N: Tensor | None = None
    """int64: which images of the training split these are, or None."""
    progress: float = 0.0
    """Part of the stage's training that is over, in [0, 1)."""
    student: nn.Module | None = None
    """The networks themselves, where the loss `needs_networks`."""
    teacher: nn.Module | None = None
    kept: Mapping[str, KeptChannels] | None = None
    """With the networks: which of the teacher's channels each of the student's layers kept."""


@dataclass(frozen=True)
class Facts:
    """What is known before training, for a loss that has `parts`. Shapes are without the batch, after alignment."""

    layers: Sequence[str]
    student_shapes: Sequence[tuple[int, ...]]
    teacher_shapes: Sequence[tuple[int, ...]]
    classes: int
    images: int
    """In the training split."""
    student: nn.Module | None = None
    """The networks themselves and the kept channels as in `Lesson`, where the loss `needs_networks`."""
    teacher: nn.Module | None = None
    kept: Mapping[str, KeptChannels] | None = None


class LessonLoss(Protocol):
    """A loss as the training uses it; `Term` and `FeatureTerm` have the fields that recipes know."""

    weight: float

    def __call__(self, lesson: Lesson) -> Tensor:
        """A scalar, or one value per layer, which are summed."""
        ...


class Term(Settings):
    """The fields of every loss."""

    needs_teacher: ClassVar[bool] = True
    """Without it, the lesson's `teacher_NK` are the student's own logits."""
    needs_labels: ClassVar[bool] = False
    """Computed on the images that have a label only."""
    needs_input_gradients: ClassVar[bool] = False
    needs_networks: ClassVar[bool] = False
    same_width: ClassVar[bool] = False
    """Compares channel with channel."""
    tasks: ClassVar[tuple[Task, ...]] = ("classification", "multi_label", "regression")
    """Where it makes sense; not where it reads outputs or labels as those of classes, and there are none."""

    weight: float = Field(default=1.0, ge=0)
    active: tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]] = (0.0, 1.0)
    """The part of the training in which the loss counts: `[0, 0.3]` is the first 30 percent."""

    @model_validator(mode="after")
    def _begins_before_it_ends(self) -> Any:
        if self.active[0] >= self.active[1]:
            raise ValueError(f"`active: {list(self.active)}` is no part of the training: the first is the smaller")
        return self

    def serves(self, task: Task) -> bool:
        """Whether it makes sense with these settings."""
        return task in self.tasks

    def parts(self, facts: Facts) -> nn.Module | None:
        """What the loss trains along with the student; None for nothing."""
        return None


class FeatureTerm(Term):
    """The fields of a loss on what layers return."""

    where: ClassVar[Literal["stages", "last", "activations"]] = "stages"
    """What `layers: auto` means: the ends of all stages, or of the last one, or what goes into each stage's last
    activation."""
    between: ClassVar[bool] = False
    """Returns a value for each pair of consecutive layers, not for each layer."""

    layers: Literal["auto"] | tuple[Pattern, ...] | dict[str, str] = "auto"
    """Layers by name or pattern (`features.*`, `re:features\\.\\d+`), or a mapping from the student's to the teacher's
    names. `auto`: the last layers before the image gets smaller."""
    adaptor: Literal["auto", "kept", "linear", "none"] = "auto"
    """How a narrower student is compared: with the channels of the teacher that pruning `kept`, or through a `linear`
    1x1 convolution trained along. `auto` takes the kept channels where they are known, and nothing for losses that do
    not compare channel with channel."""
    layer_weights: Literal["equal", "carried"] | tuple[Annotated[float, Field(ge=0)], ...] = "equal"
    """Factors of the layers. `carried`: in proportion to what each layer's loss was at the end of the last stage that
    had this loss (the idea of GPUSQ-ViT, arXiv:2305.10727), with mean 1."""

    @model_validator(mode="after")
    def _has_layers_to_compare(self) -> Any:
        if "layers" in self.model_fields_set and not self.layers:
            raise ValueError("`layers` names no layer; leave it out for `auto`")
        if not self.needs_teacher and (isinstance(self.layers, dict) or self.adaptor in ("kept", "linear")):
            raise ValueError("compares the student with itself: no `adaptor`, and `layers` without a mapping")
        return self
