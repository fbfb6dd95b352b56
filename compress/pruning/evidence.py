"""What a criterion needs to know of a network: gradients, factors on channels, activations, over training images.

All of it in eval mode, so that BatchNorm's statistics stay, and the same on every process.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from compress.criteria import Evidence
from compress.criteria.evidence import Role
from compress.data.sample import sample, sample_size
from compress.errors import ModelError
from compress.models.coupled import Coupled, Side, channel_rows
from compress.product import Batch, Run
from compress.tasks import task_of
from compress.training import OutputsLoss, labels_loss, outputs_loss

SCORED_AT_ONCE = 32
"""Images in a mini-batch whose gradient enters `taylor`: the more, the more do opposite gradients cancel out."""


@dataclass(frozen=True)
class Collected:
    """What was measured of the whole network; what the criterion does not need is empty."""

    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    """By parameter."""
    by_set: Sequence[Tensor] = ()
    """(images, units) for each set: derivatives by a factor on the unit, or statistics of what is read of it."""


def collect(module: nn.Module, sets: Sequence[Coupled], criterion: Any, run: Run, images: int) -> Collected:
    """What `criterion` needs beyond the weights, from `images` of the training split."""
    match criterion.needs:
        case "gradients":
            return Collected(gradients=root_mean_square_gradients(module, run, images, at_once=SCORED_AT_ONCE))
        case "sampled_gradients":
            return Collected(gradients=root_mean_square_gradients(module, run, images, at_once=1, sampled=True))
        case "mask_gradients":
            return Collected(by_set=mask_gradients(module, sets, run, images))
        case "activations":
            return Collected(by_set=activations(module, sets, criterion.taken, run, images))
    return Collected()


def evidence_of(
    coupled: Coupled, number: int, module: nn.Module, collected: Collected, criterion: Any, generator: torch.Generator
) -> Evidence:
    """What is known of the set of that number. Raises ModelError where it lacks the BatchNorm that is needed."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    weights, gradients, roles = [], [], []
    for (name, side), channels in coupled.places.items():
        layer, key = module.get_submodule(name), f"{name}.weight"
        if key not in parameters:  # BatchNorm without a scale
            continue
        weights.append(unit_rows(layer, side, parameters[key].detach(), channels))
        roles.append(_role(layer, side))
        if collected.gradients:
            gradients.append(unit_rows(layer, side, collected.gradients[key], channels))
    if criterion.needs == "scales" and "normalizes" not in roles:
        way_out = f"keep it (`keep: [{coupled.producers[0]}]`), or use another criterion"
        raise ModelError(coupled.producers[0], f"no BatchNorm scales its channels, as `{criterion.use}` needs", way_out)
    found = collected.by_set[number] if collected.by_set else torch.empty(0)
    return Evidence(
        weights,
        roles,
        gradients,
        mask_gradients_NC=found if criterion.needs == "mask_gradients" else torch.empty(0),
        activations_NC=found if criterion.needs == "activations" else torch.empty(0),
        generator=generator,
    )


def root_mean_square_gradients(
    module: nn.Module, run: Run, images: int, *, at_once: int, sampled: bool = False
) -> dict[str, Tensor]:
    """By parameter, the root mean square of the loss's gradient over mini-batches of `at_once` images.

    `sampled`: the labels are drawn from the network's answers, and the loss is their -log p in nats.
    """
    copied = copy.deepcopy(module).to(run.device).requires_grad_(True).eval()
    squares: dict[str, Tensor] = {}
    count = 0
    for batch, loss, advance in _losses(copied, run, images, at_once, sampled):
        copied.zero_grad(set_to_none=True)
        value = loss(copied, batch)
        value.backward()
        for name, parameter in copied.named_parameters(remove_duplicate=False):
            if parameter.grad is not None:
                squares[name] = squares.get(name, 0) + parameter.grad.square()
        count += 1
        advance(f"loss {value.item():.3f}")
    return {name: (total / count).sqrt().cpu() for name, total in squares.items()}


def mask_gradients(module: nn.Module, sets: Sequence[Coupled], run: Run, images: int) -> list[Tensor]:
    """(images, units) for each set: the derivative of each image's -log p by a factor on what is read of the unit, at
    1, in nats.

    The labels are drawn from the network's answers, as the task has it. A unit whose factor is 0 is read as zeros
    everywhere.
    """
    copied = copy.deepcopy(module).to(run.device).requires_grad_(False).eval()
    found: list[list[Tensor]] = [[] for _ in sets]
    for batch, loss, advance in _losses(copied, run, images, SCORED_AT_ONCE, sampled=True):
        count = len(batch.images_NCHW)
        with _factors(copied, sets, count, run.device) as factors_NC:
            value = loss(copied, batch) * count  # the loss is the batch's mean
            gradients = torch.autograd.grad(value, factors_NC, allow_unused=True)
        for taken, factors, gradient in zip(found, factors_NC, gradients, strict=True):
            taken.append((torch.zeros_like(factors) if gradient is None else gradient).cpu())
        advance(f"loss {value.item() / count:.3f}")
    return [torch.cat(parts) for parts in found]


def activations(
    module: nn.Module, sets: Sequence[Coupled], statistic: Callable[[Tensor], Tensor], run: Run, images: int
) -> list[Tensor]:
    """(images, units) for each set: `statistic` of what is read of the unit, the mean over the layers that read it."""
    copied = copy.deepcopy(module).to(run.device).eval()
    found: list[list[Tensor]] = [[] for _ in sets]
    steps = -(-sample_size(run, images) // SCORED_AT_ONCE)
    with run.progress.steps("prune  activations", steps) as advance, torch.no_grad():
        for batch in sample(run, images, batch_size=SCORED_AT_ONCE):
            taken: list[list[Tensor]] = [[] for _ in sets]

            def look(number: int, channels: Tensor, x: Tensor, axis: int, taken: list[list[Tensor]] = taken) -> Tensor:
                of_units = x.movedim(axis, 1)[:, channels.flatten().to(x.device)]
                taken[number].append(statistic(of_units.reshape(len(x), len(channels), -1)))
                return x

            with _watched(copied, sets, look):
                copied(batch.images_NCHW.to(run.device))
            for parts, of_batch in zip(found, taken, strict=True):
                parts.append(torch.stack(of_batch).mean(dim=0).cpu())
            advance("")
    return [torch.cat(parts) for parts in found]


def _losses(
    module: nn.Module, run: Run, images: int, at_once: int, sampled: bool
) -> Iterator[tuple[Batch, Callable[[nn.Module, Batch], Tensor], Callable[[str], None]]]:
    """Each mini-batch on the run's device, with the loss and what tells of progress."""
    generator, rules = torch.Generator().manual_seed(run.seed), task_of(run.data.task)
    # The Fisher information is of the distribution that is drawn from: no weights of classes, no mean over labels.
    loss = labels_loss(_mean_of(rules.surprise) if sampled else outputs_loss(run.data))
    with run.progress.steps("prune  gradients", max(1, sample_size(run, images) // at_once)) as advance:
        for batch in sample(run, images, batch_size=at_once):
            batch = batch.to(run.device)
            if sampled:
                with torch.no_grad():
                    outputs_NK = module(batch.images_NCHW).cpu()
                batch = replace(batch, labels_N=rules.drawn(outputs_NK, generator).to(run.device))
            yield batch, loss, advance


def _mean_of(surprise: OutputsLoss) -> OutputsLoss:
    return lambda outputs, labels: surprise(outputs, labels).mean()


@contextmanager
def _factors(module: nn.Module, sets: Sequence[Coupled], images: int, device: torch.device) -> Iterator[list[Tensor]]:
    """A factor of 1 for each image and unit, (N, C) for each set, by which what is read of the unit is multiplied."""
    factors_NC = [torch.ones(images, coupled.units, device=device, requires_grad=True) for coupled in sets]

    def multiply(number: int, channels: Tensor, x: Tensor, axis: int) -> Tensor:
        units = torch.full((x.shape[axis],), channels.shape[0], dtype=torch.int64)  # one more column: of no unit
        units[channels.flatten()] = torch.arange(channels.shape[0]).repeat_interleave(channels.shape[1])
        padded = torch.cat([factors_NC[number], torch.ones(images, 1, device=device)], dim=1)
        by_channel = padded[:, units.to(device)]
        shape = [1] * x.ndim
        shape[0], shape[axis] = x.shape[0], x.shape[axis]
        return x * by_channel.reshape(shape)

    with _watched(module, sets, multiply):
        yield factors_NC


@contextmanager
def _watched(
    module: nn.Module, sets: Sequence[Coupled], act: Callable[[int, Tensor, Tensor, int], Tensor]
) -> Iterator[None]:
    """Calls `act(set, channels, x, axis)` with all that is read of a set's channels, and puts its result in x's place.

    Channels that no layer reads, such as the queries of an attention, are taken where the first layer makes them.
    """
    handles = []
    for number, coupled in enumerate(sets):
        readers = [(name, channels) for (name, side), channels in coupled.places.items() if side == "inputs"]
        for name, channels in readers:

            def before(
                layer: nn.Module, inputs: tuple[Any, ...], number: int = number, channels: Tensor = channels
            ) -> Any:
                return (act(number, channels, inputs[0], _axis(layer)), *inputs[1:])

            handles.append(module.get_submodule(name).register_forward_pre_hook(before))
        if not readers:
            name = coupled.producers[0]
            made = coupled.places[name, "outputs"]

            def after(layer: nn.Module, _: Any, output: Tensor, number: int = number, made: Tensor = made) -> Tensor:
                return act(number, made, output, _axis(layer))

            handles.append(module.get_submodule(name).register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _axis(layer: nn.Module) -> int:
    """Of the channels, in what the layer reads and makes."""
    return -1 if isinstance(layer, (nn.Linear, nn.LayerNorm)) else 1


def _role(layer: nn.Module, side: Side) -> Role:
    if side == "inputs":
        return "reads"
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        return "normalizes"
    return "bends" if isinstance(layer, nn.PReLU) else "makes"


def unit_rows(layer: nn.Module, side: Side, weight: Tensor, channels: Tensor) -> Tensor:
    """(units, elements): what each unit takes out of the weight of the layer, or out of its gradient."""
    return channel_rows(layer, side, weight)[channels.flatten()].reshape(len(channels), -1)
