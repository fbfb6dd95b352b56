"""The only training loop. Training, fine-tuning, distillation and QAT differ in the `loss` they pass."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from compress import processes
from compress.allocator import memory_kept
from compress.epochs import State, Training
from compress.errors import ModelError, TrainingError
from compress.holding import keeper
from compress.product import Batch, Data, Run
from compress.settings import Settings
from compress.tasks.classification import cross_entropy
from compress.tasks.multi_label import binary_cross_entropy
from compress.tasks.regression import squared_error
from compress.tensors import load_state, under

Loss = Callable[[nn.Module, Batch], Tensor]
"""Runs the (possibly wrapped) module on a batch that lies on its device and returns a scalar to minimise."""
OutputsLoss = Callable[[Tensor, Tensor], Tensor]
"""The same of outputs (N, K) and their labels."""


class Fit(Settings):
    """How long and how fast to train."""

    epochs: int = Field(default=10, ge=0)
    batch_size: int = Field(default=64, ge=1)
    """Images a step, over all processes."""
    lr: float = Field(default=0.05, gt=0)
    """Peak learning rate, reached after the warm-up and followed by a cosine to zero (Loshchilov & Hutter, 2017)."""
    warmup_epochs: float = Field(default=1.0, ge=0)
    """At most half of the training."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """`sgd` is with Nesterov momentum 0.9."""
    weight_decay: float = Field(default=1e-4, ge=0)
    """On weights of convolutions and linear layers only: not on biases, BatchNorm or quantization scales."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """For the labels' cross entropy; classification only."""
    huber: float | None = Field(default=None, gt=0)
    """Regression only: errors beyond so many standard deviations of the training images' numbers count linearly, so
    that outliers pull no harder (Huber, 1964). null squares all."""
    clip_norm: float | None = Field(default=5.0, gt=0)
    """Largest gradient norm, or null for no clipping."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay of the moving average of the weights that becomes the result, or null for the last weights."""
    augment: bool = True
    only: tuple[str, ...] = ()
    """Train only parameters whose name matches one of these (`classifier.*`); the rest and its BatchNorm stay."""


class Memory(Protocol):
    """What a loss remembers from one epoch to the next, besides what is trained."""

    def state(self) -> dict[str, Tensor]:
        """After an epoch."""
        ...

    def restore(self, state: Mapping[str, Tensor], student: nn.Module) -> None:
        """As it was after that epoch; `student` is as it was then, too."""
        ...


class Narrowing(Protocol):
    """What takes channels out of a network that is being trained."""

    def due(self, step: int, total: int, epoch: int) -> bool:
        """Whether channels go before that step of a training of `total` steps, `epoch` of them in an epoch."""
        ...

    def narrow(
        self,
        student: nn.Module,
        average: AveragedModel | None,
        optimizer: torch.optim.Optimizer,
        layout: torch.memory_format,
        *,
        step: int,
        total: int,
        epoch: int,
    ) -> None:
        """Takes them out of all three, in place."""
        ...

    def state(self) -> dict[str, Any]:
        """JSON: what went so far."""
        ...

    def restore(
        self,
        state: Mapping[str, Any],
        student: nn.Module,
        average: AveragedModel | None,
        optimizer: torch.optim.Optimizer,
        layout: torch.memory_format,
    ) -> None:
        """Takes the same out again; the values come after."""
        ...


class Regularizer(Protocol):
    """What pulls the network's weights towards zero besides its loss, as weight decay does."""

    def penalty(self, student: nn.Module, batch: Batch) -> Tensor:
        """A scalar, made of the network's parameters, whose gradient is added to that of the loss."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What was chosen before the training."""
        ...

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """The choice that was made when the training began first."""
        ...


def labels_loss(judged: OutputsLoss = cross_entropy) -> Loss:
    """What the labels alone teach."""

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        return judged(module(batch.images_NCHW), batch.labels_N)

    return loss


def outputs_loss(data: Data, settings: Fit | None = None) -> OutputsLoss:
    """What outputs cost beside their labels, as the data's task and the settings have it; 0 where no image has any."""
    settings = settings or Fit()
    weights_K = torch.tensor(data.label_weights) if data.label_weights is not None else None
    match data.task:
        case "classification":
            return partial(cross_entropy, label_smoothing=settings.label_smoothing, weights_K=weights_K)
        case "multi_label":
            return partial(binary_cross_entropy, weights_K=weights_K)
        case "regression":
            return partial(squared_error, huber=settings.huber)


def learning_rate(step: int, *, total: int, warmup: int, peak: float) -> float:
    """Linear warm-up to `peak` over `warmup` steps, then a half cosine that ends at zero after `total` steps."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def fit(
    module: nn.Module,
    *,
    loss: Loss,
    run: Run,
    settings: Fit,
    label: str,
    views: int | None = None,
    after: tuple[float, Callable[[nn.Module], None]] | None = None,
    companion: nn.Module | None = None,
    companion_lr: float | None = None,
    memory: Memory | None = None,
    regularizer: Regularizer | None = None,
    narrowing: Narrowing | None = None,
    apart: bool = False,
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """A trained copy of `module` (CPU, eval mode) and one entry per epoch: epoch, loss, lr, seconds.

    Augmentations repeat after `views` epochs, or never. `after` is a part of the training in [0, 1] and what is done to
    the network once that many of its steps are over; it may stop parameters from being trained.

    `companion` is what `loss` trains along with the network: adaptors, heads, peers, generators. It is trained in
    place, by the same optimizer (peak learning rate `companion_lr`, or that of the network), and ends on the CPU in
    eval mode.

    `regularizer` adds its penalty's gradient to what is trained of the network, after clipping: a pull that grows
    leaves the loss its own share of `clip_norm`. The entries then have its last `penalty`. `narrowing` takes channels
    out on the way: what is trained, averaged and remembered afterwards is the narrower network.

    What the training has reached is kept in `run.epochs` after each epoch, and a training that finds itself there goes
    on: same weights, same optimizer, same random numbers, and what `loss` remembers from one epoch to the next, its
    `memory`. The result is that of a training that was never stopped, byte by byte where the processes and their
    threads are as many as before.

    Runs alone or, where torch.distributed is initialised, as one of `run.world_size` processes that share each batch;
    with `apart` each of them trains a network of its own, and begins again if it was stopped.
    Raises TrainingError at the first loss that is not finite, naming `label`, epoch and step.
    """
    with memory_kept():
        return _fit(
            module,
            loss,
            run,
            settings,
            label,
            views,
            after,
            companion,
            companion_lr,
            memory,
            regularizer,
            narrowing,
            apart,
        )


def _fit(
    module: nn.Module,
    loss: Loss,
    run: Run,
    settings: Fit,
    label: str,
    views: int | None,
    after: tuple[float, Callable[[nn.Module], None]] | None,
    companion: nn.Module | None,
    companion_lr: float | None,
    memory: Memory | None,
    regularizer: Regularizer | None,
    narrowing: Narrowing | None,
    apart: bool,
) -> tuple[nn.Module, list[dict[str, Any]]]:
    student = copy.deepcopy(module)
    if settings.epochs == 0:
        return student.eval(), []
    torch.manual_seed(run.seed)
    trained = _choose_parameters(student, settings.only, label)
    layout = torch.channels_last if run.data.channels_last else torch.contiguous_format
    student.to(run.device, memory_format=layout)  # type: ignore[call-overload]
    student.train()
    if companion is not None:
        companion.to(run.device).train()
    if settings.only:
        _freeze_statistics(student, trained)
    per_process, left = divmod(settings.batch_size, run.world_size)
    if left:
        raise TrainingError(
            f"stage {run.stage or label}",
            f"batch_size {settings.batch_size} cannot be shared equally by {run.world_size} processes",
            f"try {(per_process + 1) * run.world_size}",
        )

    def epoch_batches(epoch: int) -> Any:
        return run.data.batches(
            "train",
            batch_size=per_process,
            augment=settings.augment,
            shuffle=True,
            seed=run.seed,
            epoch=epoch,
            rank=run.rank,
            world_size=run.world_size,
            view=epoch % views if views else None,
        )

    steps = max(1, run.data.count("train") // run.world_size // per_process)
    total = steps * settings.epochs
    warmup = min(round(steps * settings.warmup_epochs), total // 2)
    optimizer = optimizer_of(student, settings, run.device, companion, companion_lr)
    peaks = [group["lr"] for group in optimizer.param_groups]
    average = AveragedModel(student, multi_avg_fn=_ema(settings.ema), use_buffers=True) if settings.ema else None
    wrapped = student if apart else _wrapped(student, run)
    change_at = round(after[0] * total) if after else None

    put_back = keeper(student)
    history: list[dict[str, Any]] = []
    course = _Course(student, optimizer, average, companion, memory, regularizer, narrowing, layout)
    kept = run.epochs.begin() if not apart else Training(None)
    done = processes.shared(kept.epoch)
    if done:
        if after and change_at is not None and done * steps > change_at:
            after[1](student)
            wrapped = _wrapped(student, run)
        history = course.restore(kept.load(), run)
        wrapped = _wrapped(student, run) if narrowing is not None else wrapped
        run.epochs.earlier_s += sum(entry["seconds"] for entry in history)
        run.progress.note(f"{label}: goes on after epoch {done}")
    step = done * steps
    for epoch in range(done, settings.epochs):
        began, losses, lr, images = time.perf_counter(), 0.0, 0.0, 0
        penalty: Tensor | float = 0.0
        with run.progress.steps(f"{label}  epoch {epoch + 1}/{settings.epochs}", steps) as advance:
            for number, batch in enumerate(epoch_batches(epoch)):
                lr = learning_rate(step, total=total, warmup=warmup, peak=settings.lr)
                for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                    group["lr"] = lr * peak / settings.lr
                if after and step == change_at:
                    optimizer.zero_grad(set_to_none=True)
                    after[1](student)
                    # It must know anew which gradients to wait for.
                    wrapped = student if apart else _wrapped(student, run)
                if narrowing is not None and narrowing.due(step, total, steps):
                    optimizer.zero_grad(set_to_none=True)
                    narrowing.narrow(student, average, optimizer, layout, step=step, total=total, epoch=steps)
                    wrapped = student if apart else _wrapped(student, run)
                batch = replace(batch.to(run.device), epoch=epoch, progress=step / total, step=step)
                value = loss(wrapped, batch)
                loss_now = processes.mean(value.item(), run.device)
                if not math.isfinite(loss_now):
                    raise TrainingError(
                        f"stage {run.stage or label}",
                        f"the loss is {loss_now} at epoch {epoch + 1}, step {number + 1}",
                        f"try a lower lr (now {settings.lr:g}), a longer warm-up or a smaller clip_norm",
                    )
                optimizer.zero_grad(set_to_none=True)
                value.backward()
                if companion is not None and not apart:
                    processes.average_gradients(companion)
                if settings.clip_norm is not None:
                    nn.utils.clip_grad_norm_(student.parameters(), settings.clip_norm)
                    if companion is not None:
                        nn.utils.clip_grad_norm_(companion.parameters(), settings.clip_norm)
                if regularizer is not None:
                    penalty = _pull(regularizer.penalty(student, batch), student)
                optimizer.step()
                put_back()
                if average is not None:
                    average.update_parameters(student)
                losses += loss_now
                images += len(batch.images_NCHW) * run.world_size
                step += 1
                advance(f"loss {losses / (number + 1):.3f}")
        history.append(
            {
                "epoch": epoch + 1,
                "loss": losses / (number + 1),
                "lr": lr,
                "seconds": time.perf_counter() - began,
            }
            | ({"penalty": float(penalty)} if regularizer is not None else {})
        )
        told = {"training": label, "epochs": settings.epochs, "images_per_second": images / history[-1]["seconds"]}
        run.progress.event("epoch", **history[-1], **told)
        state = course.state(history, run)
        if run.rank == 0:
            kept.save(state)
    if companion is not None:
        companion.to("cpu").eval()
    result = average.module if average is not None else student
    if not all(parameter.isfinite().all() for parameter in result.parameters()):
        raise TrainingError(
            f"stage {run.stage or label}",
            "weights are not finite after the last step",
            f"try a lower lr (now {settings.lr:g})",
        )
    result.to("cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return result.requires_grad_(True).eval(), history


def _pull(penalty: Tensor, student: nn.Module) -> Tensor:
    """The penalty, whose gradient is added to those of the trained parameters."""
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    if penalty.requires_grad:  # some of what it is made of is trained
        gradients = torch.autograd.grad(penalty, trained, allow_unused=True)
        for parameter, gradient in zip(trained, gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
    return penalty.detach()


@dataclass(frozen=True)
class _Course:
    """All that changes while a network is trained."""

    student: nn.Module
    optimizer: torch.optim.Optimizer
    average: AveragedModel | None
    companion: nn.Module | None
    memory: Memory | None
    regularizer: Regularizer | None
    narrowing: Narrowing | None
    layout: torch.memory_format

    def state(self, history: list[dict[str, Any]], run: Run) -> State:
        tensors: dict[str, Tensor] = {}
        for role, module in self._modules():
            tensors |= {f"{role}.{name}": value for name, value in module.state_dict().items()}
        for number, parameter in enumerate(self._parameters()):
            for name, value in self.optimizer.state.get(parameter, {}).items():
                if value is not None:
                    tensors[f"optimizer.{number}.{name}"] = torch.as_tensor(value)
        for name, value in (self.memory.state() if self.memory else {}).items():
            tensors[f"memory.{name}"] = value
        for name, value in (self.regularizer.state() if self.regularizer else {}).items():
            tensors[f"sparsity.{name}"] = value
        for rank, numbers in enumerate(processes.gathered(_random_state(run.device))):
            tensors |= {f"random.{rank}.{name}": value for name, value in numbers.items()}
        narrowed = {"narrowed": self.narrowing.state()} if self.narrowing is not None else {}
        return State(tensors, {"epoch": len(history), "history": history, **narrowed})

    def restore(self, state: State, run: Run) -> list[dict[str, Any]]:
        """Puts everything back where it was; the history."""
        if self.narrowing is not None:
            found = state.facts["narrowed"]
            self.narrowing.restore(found, self.student, self.average, self.optimizer, self.layout)
        for role, module in self._modules():
            load_state(module, under(state.tensors, f"{role}."))
        for number, parameter in enumerate(self._parameters()):
            values = under(state.tensors, f"optimizer.{number}.")
            if values:
                self.optimizer.state[parameter] = {name: like(parameter, value) for name, value in values.items()}
        if self.memory is not None:
            self.memory.restore(under(state.tensors, "memory."), self.student)
        if self.regularizer is not None:
            self.regularizer.restore(under(state.tensors, "sparsity."))
        numbers = under(state.tensors, f"random.{run.rank}.") or under(state.tensors, "random.0.")
        _restore_random_state(numbers, run.device)
        return list(state.facts["history"])

    def _modules(self) -> list[tuple[str, nn.Module]]:
        found = {"student": self.student, "average": self.average, "companion": self.companion}
        return [(role, module) for role, module in found.items() if module is not None]

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]


def like(parameter: Tensor, value: Tensor) -> Tensor:
    """An optimizer's value on the device and in the memory order of its parameter: fused steps read both as one."""
    if value.shape != parameter.shape:
        return value.to(parameter.device)  # the number of steps
    return torch.empty_like(parameter, requires_grad=False).copy_(value)


def _random_state(device: torch.device) -> dict[str, Tensor]:
    found = {"cpu": torch.get_rng_state()}
    return found | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def _restore_random_state(found: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(found["cpu"])
    if device.type == "cuda" and "cuda" in found:
        torch.cuda.set_rng_state(found["cuda"], device)


def reestimated_batchnorm(module: nn.Module, batches: Iterable[Batch], device: torch.device) -> nn.Module:
    """A copy whose BatchNorm statistics are the mean over `batches`; the weights stay.

    Channels that were removed leave the statistics of all later layers wrong: a pruned network computes noise until
    they are measured again (Li et al., 2020, arXiv:2007.02491, section 4.2).
    """
    copied = copy.deepcopy(module).eval().to(device)
    momenta = {}
    for norm in copied.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.track_running_stats:
            momenta[norm] = norm.momentum
            norm.reset_running_stats()
            norm.momentum = None  # a plain mean over batches
            norm.train()
    if momenta:
        with torch.no_grad():
            for batch in batches:
                copied(batch.images_NCHW.to(device))
    for norm, momentum in momenta.items():
        norm.momentum = momentum
    return copied.cpu().eval()


def refuse_unmatched(module: nn.Module, patterns: tuple[str, ...], label: str) -> None:
    """Raises ModelError for a pattern of `Fit.only` that matches no parameter."""
    names = [name for name, _ in module.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ModelError(
                f"stage {label}",
                f"`only: {pattern}` matches no parameter",
                f"the last ones are {', '.join(names[-4:])}",
            )


def _choose_parameters(module: nn.Module, patterns: tuple[str, ...], label: str) -> set[str]:
    """Freezes what no pattern matches; the names of what is trained."""
    refuse_unmatched(module, patterns, label)
    names = [name for name, _ in module.named_parameters()]
    chosen = {n for n in names if not patterns or any(fnmatchcase(n, pattern) for pattern in patterns)}
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in chosen)
    return chosen


def _freeze_statistics(module: nn.Module, trained: set[str]) -> None:
    """Puts every BatchNorm without a trained parameter into eval mode, so frozen layers compute what they computed."""
    for name, child in module.named_modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and f"{name}.weight" not in trained:
            child.eval()


def _wrapped(student: nn.Module, run: Run) -> nn.Module:
    if run.world_size == 1:
        return student
    return DistributedDataParallel(student, device_ids=[run.device] if run.device.type == "cuda" else None)


def optimizer_of(
    module: nn.Module,
    settings: Fit,
    device: torch.device,
    companion: nn.Module | None = None,
    companion_lr: float | None = None,
) -> torch.optim.Optimizer:
    """The optimizer of both; each parameter group begins with its own peak learning rate."""
    groups: list[dict[str, Any]] = []
    for owner, lr in ((module, settings.lr), (companion, companion_lr or settings.lr)):
        trained = [p for p in owner.parameters() if p.requires_grad] if owner is not None else []
        if owner is module or trained:
            matrices, vectors = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
            groups.append({"params": matrices, "weight_decay": settings.weight_decay, "lr": lr})
            groups.append({"params": vectors, "weight_decay": 0.0, "lr": lr})
    # One pass over all of a parameter's state instead of five to twelve.
    fused = device.type in ("cpu", "cuda") or None
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr, fused=fused)
    return torch.optim.SGD(groups, lr=settings.lr, momentum=0.9, nesterov=True, fused=fused)


def _ema(decay: float) -> Callable[[Any, Any, Any], None]:
    """Moving average whose decay grows from 0.1 to `decay`, so that short runs are not held at their first weights."""

    @torch.no_grad()
    def update(averaged: list[Tensor], current: list[Tensor], count: Tensor) -> None:
        ramped = min(decay, (1 + int(count)) / (10 + int(count)))
        for mean, value in zip(averaged, current, strict=True):
            if mean.is_floating_point():
                mean.lerp_(value.to(mean.dtype), 1 - ramped)
            else:
                mean.copy_(value)

    return update
