"""The loss of a training stage: the labels, and what a teacher says of the same images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, fx, nn

from compress.data.unlabeled import Unlabeled, WithUnlabeled, numbered, with_unlabeled
from compress.errors import ModelError
from compress.losses import LossSettings
from compress.losses.lesson import Facts, FeatureTerm, Lesson
from compress.observation import Answers, observe, unwrapped
from compress.product import Batch, Preprocess, Product, Run, labelled
from compress.settings import Settings
from compress.teachers import TeacherSettings, changes, has_features
from compress.teachers.parent import Parent
from compress.teachers.teacher import Teacher
from compress.teaching.cache import Ask, asked_once
from compress.teaching.default import default_losses, soft_loss
from compress.teaching.fitting import (
    names_of_values,
    refuse_misfits,
    refuse_number_of_weights,
    refuse_rounding,
    rounds,
    said_of,
)
from compress.teaching.networks import Counterpart
from compress.teaching.pairs import Pair, pair_up
from compress.tensors import under
from compress.training import Fit, Loss, Narrowing, Regularizer, fit, labels_loss, outputs_loss

Part = Annotated[float, Field(ge=0, le=1)]


class Distillation(Settings):
    """Who teaches, and how: the sum of the weighted losses, and the labels' own loss times `labels`."""

    teacher: TeacherSettings = Field(default=Parent(use="parent"), validate_default=True)
    """`parent` is the network before compression; a text is the folder of a saved network
    (`runs/other/stages/01-train/network`); other kinds are mappings."""
    losses: tuple[LossSettings, ...] | None = Field(default=None, min_length=1)
    """null: `kd` at temperature 4 (in a multi-label task `binary_kd`, in a regression `mse`), and for a float student
    that was pruned from its teacher `fitnets` on the channels it kept, at the ends of stages."""
    labels: float = Field(default=0.1, ge=0)
    """Weight of the labels' own loss: of the cross entropy, where images have one class."""
    labels_active: tuple[Part, Part] = (0.0, 1.0)
    """The part of the training in which the labels count: `[0.3, 1]` leaves them out of the first 30 percent."""
    views: int | None = Field(default=None, ge=1)
    """So many different augmentations of each image, repeated in turn epoch by epoch; the teacher then looks at each
    once, and its answers stay in memory (4 bytes for each image, view and class). null draws new ones for ever."""
    cache: str | None = Field(default=None, min_length=1)
    """A folder where the teacher's logits are kept for later trainings, by image and augmentation; a relative path
    starts at the current directory. Answers of another teacher or to other data are refused. Without `views` a later
    training is answered from it only where it draws the same augmentations: the same recipe again."""
    unlabeled: Unlabeled | None = None
    """Images without labels, from which only the teacher teaches."""

    @model_validator(mode="after")
    def _teacher_serves(self) -> Any:
        if self.cache is not None and changes(self.teacher):
            raise ValueError("`cache`: a teacher that changes while it teaches has no answers to keep; leave it out")
        if not has_features(self.teacher):
            term: Any
            for term in self.losses or ():
                if term.needs_teacher and (isinstance(term, FeatureTerm) or term.needs_networks):
                    raise ValueError(f"`{term.use}` needs one of several teachers: set `features_from: 0` in `teacher`")
        return self

    def refuse_misfits(self, module: nn.Module, preprocess: Preprocess, place: str, *, quantized: bool = False) -> None:
        """Raises ModelError for a loss that does not fit `module`, the network before anything was trained."""
        refuse_misfits(self.losses or (), self.teacher, module, preprocess, place, quantized=quantized)


class Taught(Fit, Distillation):
    """A training with a teacher: how long, how fast, by whom and with what."""


@dataclass
class _Judge:
    """One loss with what it needs in this training."""

    term: Any
    pairs: Sequence[Pair]
    parts: nn.Module | None
    weights: Tensor | None
    """Factors of the layers, or None where all are 1."""
    sums: Tensor | float = 0.0
    count: int = 0
    epoch: int = -1

    def active(self, progress: float) -> bool:
        begin, end = self.term.active
        return bool(begin <= progress < end and self.term.weight > 0)

    def asks_always(self) -> bool:
        """Whether it needs the teacher's forward pass at every step, so that kept logits save nothing."""
        more = bool(self.pairs) or self.term.needs_input_gradients
        return bool(self.term.needs_teacher and more and self.term.weight > 0 and self.term.active == (0.0, 1.0))

    def keep(self, values: Tensor, epoch: int) -> None:
        """Adds to the mean of the running epoch, for `layer_losses`."""
        if epoch != self.epoch:
            self.sums, self.count, self.epoch = 0.0, 0, epoch
        self.sums, self.count = self.sums + values.detach(), self.count + 1


class Objective:
    """The loss of one training; `loss` is what `fit` minimises, and schemes put it together from `see` and `judge`."""

    def __init__(
        self,
        distillation: Distillation,
        teacher: Teacher,
        product: Product,
        run: Run,
        student: nn.Module,
        training: Fit | None,
        augment: bool,
        cache: Path | None,
    ) -> None:
        self.settings, self.teacher, self.run = distillation, teacher, run
        self.labels_loss = outputs_loss(run.data, training)
        self._counterpart = Counterpart(teacher, product.float_network or product.network, run)
        terms: Sequence[Any] = distillation.losses or ()
        if distillation.losses is None:
            # Fake quantization was not part of the comparison that chose the hints.
            soft_alone = isinstance(student, fx.GraphModule)
            soft = soft_loss(run.data.task)
            terms = (soft,) if soft_alone else default_losses(product.network, teacher, soft)
            for hints in (term for term in terms if isinstance(term, FeatureTerm)):
                layers = ", ".join(hints.layers)
                run.progress.note(f"No losses are named: `{soft.use}`, and hints on the kept channels of {layers}.")
        self._judges = [
            _judge(number, term, teacher, product, run, student, self._counterpart) for number, term in enumerate(terms)
        ]
        trained = [module for judge in self._judges for module in _trained(judge)]
        self.companion: nn.Module | None = nn.ModuleList(trained) if trained else None
        self.layers = tuple(dict.fromkeys(pair.student for judge in self._judges for pair in judge.pairs))
        self._logits: Ask = self._asked
        always = [judge.term.use for judge in self._judges if judge.asks_always()]
        if not always:
            self._logits = asked_once(
                self._asked, teacher.fingerprint, run, views=distillation.views, cache=cache, augment=augment
            )
        elif distillation.views or cache is not None:
            run.progress.note(f"The teacher is asked at every step: `{always[0]}` needs more of it than logits.")

    def _asked(self, batch: Batch) -> Tensor:
        return self.teacher.answers(batch, ()).logits_NK

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        return self.judge(self.see(module, batch), batch, module)

    def train(
        self,
        module: nn.Module,
        settings: Fit,
        *,
        label: str,
        loss: Loss | None = None,
        beside: nn.Module | None = None,
        beside_lr: float | None = None,
        after: tuple[float, Callable[[nn.Module], None]] | None = None,
        regularizer: Regularizer | None = None,
        narrowing: Narrowing | None = None,
    ) -> tuple[nn.Module, dict[str, Any]]:
        """A trained copy of `module`, and what its manifest says.

        A scheme gives its own `loss`, and what it trains `beside` the network at the peak learning rate `beside_lr`.
        """
        companions = [companion for companion in (beside, self.companion) if companion is not None]
        trained, history = fit(
            module,
            loss=loss or self.loss,
            run=self.run,
            settings=settings,
            label=label,
            views=self.settings.views,
            after=after,
            companion=nn.ModuleList(companions) if companions else None,
            companion_lr=beside_lr,
            memory=self,
            regularizer=regularizer,
            narrowing=narrowing,
        )
        return trained, {"history": history} | self.metrics()

    def see(self, module: nn.Module, batch: Batch, layers: Sequence[str] = ()) -> Answers:
        """The student's forward pass, with the maps that the losses need and those of `layers`."""
        active = [judge for judge in self._judges if judge.active(batch.progress)]
        if any(judge.term.needs_input_gradients for judge in active):
            batch.images_NCHW.requires_grad_(True)
        needed = [pair.student for judge in active for pair in judge.pairs]
        return observe(module, batch.images_NCHW, (*needed, *layers))

    def judge(self, said: Answers, batch: Batch, module: nn.Module, *, again: bool = False) -> Tensor:
        """The loss of what the student said.

        `again` is for what another network said of the batch, with maps like the student's: the teacher follows the
        student once a step, `layer_losses` are the student's, and losses on its weights count once.
        """
        student = unwrapped(module)
        if not again:
            self.teacher.follow(student, batch)
        total = said.logits_NK.new_zeros(())
        begin, end = self.settings.labels_active
        if self.settings.labels and begin <= batch.progress < end:
            total = total + self.settings.labels * self.labels_loss(said.logits_NK, batch.labels_N)
        active = [judge for judge in self._judges if judge.active(batch.progress)]
        active = [judge for judge in active if not (again and judge.term.needs_networks)]
        if not active:
            return total
        answers = self._answers(active, said, batch)
        for judge in active:
            lesson = self._lesson(judge, said, answers, batch, student)
            if lesson is None:
                continue
            values = judge.term(lesson)
            if values.ndim:
                if not again:
                    judge.keep(values, batch.epoch)
                values = values if judge.weights is None else values * judge.weights.to(values.device)
            total = total + judge.term.weight * values.sum()
        return total

    def _answers(self, active: Sequence[_Judge], said: Answers, batch: Batch) -> Answers:
        active = [judge for judge in active if judge.term.needs_teacher]
        if not active:
            return Answers(said.logits_NK.detach())
        layers = tuple(dict.fromkeys(pair.teacher for judge in active for pair in judge.pairs))
        if any(judge.term.needs_input_gradients for judge in active):
            return self.teacher.answers(batch, layers, differentiable=True)
        if layers:
            return self.teacher.answers(batch, layers)
        return Answers(self._logits(batch))

    def _lesson(
        self, judge: _Judge, said: Answers, answers: Answers, batch: Batch, student: nn.Module
    ) -> Lesson | None:
        if judge.term.needs_teacher:
            aligned = [pair.align(said.maps[pair.student], answers.maps[pair.teacher]) for pair in judge.pairs]
        else:  # it is given the student's own maps
            aligned = [(said.maps[pair.student], said.maps[pair.student].detach()) for pair in judge.pairs]
        lesson = Lesson(
            student_NK=said.logits_NK,
            teacher_NK=answers.logits_NK,
            labels_N=batch.labels_N,
            student_maps=[mine for mine, _ in aligned],
            teacher_maps=[theirs for _, theirs in aligned],
            layers=[pair.student for pair in judge.pairs],
            parts=judge.parts,
            images_NCHW=batch.images_NCHW,
            indices_N=batch.indices_N,
            progress=batch.progress,
        )
        if judge.term.needs_networks:
            original = self._counterpart.module(student) if judge.term.needs_teacher else None
            lesson = replace(lesson, student=student, teacher=original, kept=self._counterpart.kept)
        return _labelled(lesson) if judge.term.needs_labels else lesson

    def state(self) -> dict[str, Tensor]:
        """What the teacher has become, and the layers' losses of the last epoch."""
        found = {f"teacher.{name}": value for name, value in self.teacher.state().items()}
        for number, judge in enumerate(self._judges):
            if isinstance(judge.sums, Tensor):
                found[f"sums.{number}"] = judge.sums
                found[f"seen.{number}"] = torch.tensor([judge.count, judge.epoch])
        return found

    def restore(self, state: Mapping[str, Tensor], student: nn.Module) -> None:
        """As it was after that epoch."""
        self.teacher.restore(under(state, "teacher."), student)
        for number, judge in enumerate(self._judges):
            if f"sums.{number}" in state:
                judge.sums = state[f"sums.{number}"].to(self.run.device)
                judge.count, judge.epoch = state[f"seen.{number}"].tolist()

    def layer_losses(self) -> dict[str, dict[str, float]]:
        """The mean of each layer's loss in the last epoch, by the loss's name, before weights."""
        found: dict[str, dict[str, float]] = {}
        for judge in self._judges:
            if isinstance(judge.sums, Tensor) and judge.count:
                means = (judge.sums / judge.count).tolist()
                names = names_of_values(judge.term, judge.pairs) if judge.pairs else []
                if len(names) != len(means):
                    names = [str(number) for number in range(len(means))]
                found.setdefault(judge.term.use, {}).update(zip(names, means, strict=True))
        return found

    def metrics(self) -> dict[str, Any]:
        """What the training's manifest says of the teacher and of the layers."""
        found: dict[str, Any] = {"teacher": self.settings.teacher.model_dump(mode="json")}
        found["losses"] = [judge.term.model_dump(mode="json") for judge in self._judges]
        losses = self.layer_losses()
        return found | ({"layer_losses": losses} if losses else {})


def objective(
    distillation: Distillation,
    product: Product,
    run: Run,
    *,
    student: nn.Module,
    training: Fit | None = None,
    augment: bool | None = None,
    teacher: Teacher | None = None,
) -> Objective:
    """The loss of a training with a teacher, opened here unless one is given; its parameters never move.

    `student` is the network that will be trained: the product's, or the same with fake quantization. `training` says
    how the labels count. Raises ModelError where losses and networks do not fit.
    """
    # A folder holds one teacher's answers: not those of the assistants and generations that a scheme gives.
    cache = Path(distillation.cache).expanduser() if distillation.cache and teacher is None else None
    teacher = teacher or distillation.teacher.open(product, run)
    if augment is None:
        augment = distillation.augment if isinstance(distillation, Fit) else True
    return Objective(distillation, teacher, product, run, student, training, augment, cache)


def teach(
    module: nn.Module,
    settings: Fit,
    product: Product,
    run: Run,
    *,
    label: str,
    by: Distillation | None = None,
    teacher: Teacher | None = None,
    after: tuple[float, Callable[[nn.Module], None]] | None = None,
    regularizer: Regularizer | None = None,
    narrowing: Narrowing | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """A trained copy of `module`, and what its manifest says.

    Who teaches stands in `settings` themselves (`Taught`) or in `by`; without either, only the labels do.
    """
    by = settings if isinstance(settings, Distillation) else by
    if by is None:
        loss = labels_loss(outputs_loss(run.data, settings))
        trained, history = fit(
            module,
            loss=loss,
            run=run,
            settings=settings,
            label=label,
            after=after,
            regularizer=regularizer,
            narrowing=narrowing,
        )
        return trained, {"history": history}
    run = with_more_images(by, run)
    if narrowing is not None and by.losses is None:  # hints would be on channels that go
        by = by.model_copy(update={"losses": (soft_loss(run.data.task),)})
    goal = objective(
        by,
        product,
        run,
        student=module,
        training=settings,
        augment=settings.augment,
        teacher=teacher,
    )
    return goal.train(module, settings, label=label, after=after, regularizer=regularizer, narrowing=narrowing)


def with_more_images(distillation: Distillation, run: Run) -> Run:
    """The run on its data and the images without labels. Raises DataError where those cannot be read."""
    if distillation.unlabeled is None or isinstance(run.data, WithUnlabeled):
        return run
    return replace(run, data=with_unlabeled(run.data, distillation.unlabeled, run.progress, Path.cwd()))


def _judge(
    number: int,
    term: Any,
    teacher: Teacher,
    product: Product,
    run: Run,
    student: nn.Module,
    counterpart: Counterpart,
) -> _Judge:
    place = f"stage {run.stage or 'distill'}: losses.{number} ({term.use})"
    if term.needs_networks and term.needs_teacher and teacher.network is None:
        raise ModelError(place, "needs one network as teacher, not several", "choose another teacher")
    if term.needs_input_gradients and rounds(student):
        refuse_rounding(place)
    network = product.float_network or product.network
    images = numbered(run.data)
    if isinstance(term, FeatureTerm):
        there = teacher.network if teacher.network is not None and term.needs_teacher else network
        with said_of(place):
            pairs, facts = pair_up(term, network, student, there, place, images=images, related=teacher.related)
        weights = _layer_weights(term, product, pairs, place)
    else:
        pairs, facts, weights = [], Facts((), (), (), network.structure.num_classes, images), None
        if term.needs_networks:
            theirs = counterpart.module(student) if term.needs_teacher else None
            facts = replace(facts, student=student, teacher=theirs, kept=counterpart.kept)
    with said_of(place):
        parts = term.parts(facts)
    return _Judge(term, pairs, parts, weights)


def _trained(judge: _Judge) -> list[nn.Module]:
    adaptors = [pair.adaptor for pair in judge.pairs if pair.adaptor is not None]
    return [*adaptors, *([judge.parts] if judge.parts is not None else [])]


def _layer_weights(term: Any, product: Product, pairs: Sequence[Pair], place: str) -> Tensor | None:
    if term.layer_weights == "equal":
        return None
    names = names_of_values(term, pairs)
    if term.layer_weights == "carried":
        before: Mapping[str, float] = product.layer_losses.get(term.use, {})
        missing = [name for name in names if name not in before]
        if missing:
            raise ModelError(
                place,
                f"`layer_weights: carried`: no stage before had this loss on {missing[0]}",
                "distill with the same loss and layers first, or use `equal`",
            )
        values = torch.tensor([before[name] for name in names])
        return values / values.mean().clamp_min(torch.finfo(values.dtype).tiny)
    refuse_number_of_weights(term, pairs, place)
    return torch.tensor(term.layer_weights)


def _labelled(lesson: Lesson) -> Lesson | None:
    """The images that have a label; None where there are none."""
    rows = labelled(lesson.labels_N)
    if bool(rows.all()):
        return lesson
    if not bool(rows.any()):
        return None
    return replace(
        lesson,
        student_NK=lesson.student_NK[rows],
        teacher_NK=lesson.teacher_NK[rows],
        labels_N=lesson.labels_N[rows],
        student_maps=[values[rows] for values in lesson.student_maps],
        teacher_maps=[values[rows] for values in lesson.teacher_maps],
        images_NCHW=None if lesson.images_NCHW is None else lesson.images_NCHW[rows],
        indices_N=None if lesson.indices_N is None else lesson.indices_N[rows],
    )
