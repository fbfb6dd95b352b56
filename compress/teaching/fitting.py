"""Whether losses fit the networks, asked before anything is trained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NoReturn

import torch
from torch import nn

from compress.errors import ModelError
from compress.losses.lesson import FeatureTerm
from compress.losses.weights import Weights
from compress.models.patterns import matching
from compress.observation import answers_to_blank
from compress.product import Network, Preprocess, Structure
from compress.quantization.fake_quant import ActivationQuantizer
from compress.teachers import TeacherSettings, everyone
from compress.teaching.pairs import Pair, pair_up

PLENTY = 10_000
"""Images, where losses are asked about networks before there are data."""
TWICE = "differentiates twice, and {} has no second derivative"


def refuse_misfits(
    losses: Sequence[Any],
    teacher: TeacherSettings,
    module: nn.Module,
    preprocess: Preprocess,
    place: str,
    *,
    quantized: bool = False,
) -> None:
    """Raises ModelError for a loss that does not fit the student or, of one architecture with it, the teacher.

    `module` is the network before anything was trained; `quantized` says that it will be taught with fake quantization.
    Costs no training.
    """
    names = [name for name, _ in module.named_modules() if name]
    alike = all(single.use != "saved" for single in everyone(teacher))
    classes = answers_to_blank(module, preprocess.size, channels=preprocess.channels).logits_NK.shape[1]
    structure = Structure(model={}, num_classes=classes, preprocess=preprocess)
    network = Network(module, structure)
    for number, term in enumerate(losses):
        where = f"{place}: losses.{number} ({term.use})"
        if term.needs_input_gradients:
            if quantized or rounds(module):
                refuse_rounding(where)
            refuse_single_derivatives(module, preprocess, where)
        if isinstance(term, FeatureTerm) and (alike or not term.needs_teacher):
            with said_of(where):
                pairs, facts = pair_up(term, network, module, network, where, images=PLENTY, related=True)
                term.parts(facts)
            refuse_number_of_weights(term, pairs, where)
        else:
            layers = getattr(term, "layers", ())
            known = term.candidates(module) if isinstance(term, Weights) else names
            for pattern in layers if layers != "auto" else ():
                matching(pattern, known, field="layers", place=where)


def refuse_rounding(place: str) -> NoReturn:
    """Raises the ModelError of a loss that differentiates twice, under fake quantization."""
    raise ModelError(place, TWICE.format("rounding"), "use it in a float stage")


def rounds(module: nn.Module) -> bool:
    """Whether the network is fake-quantized."""
    return any(isinstance(child, ActivationQuantizer) for child in module.modules())


def refuse_single_derivatives(module: nn.Module, preprocess: Preprocess, place: str) -> None:
    """Raises ModelError where the gradient of a float network's input cannot be differentiated itself."""
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    shape = (2, preprocess.channels, preprocess.size, preprocess.size)
    images = torch.rand(shape, device=device, requires_grad=True)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    was_training = module.training
    try:
        (gradient,) = torch.autograd.grad(module.eval()(images).square().sum(), images, create_graph=True)
        torch.autograd.grad(gradient.square().sum(), trained, allow_unused=True)
    except RuntimeError as error:
        first = (str(error).strip().splitlines() or ["an operator"])[0]
        problem = TWICE.format("an operator of this network") + f" ({first})"
        raise ModelError(place, problem, "use another loss") from error
    finally:
        module.train(was_training)


@contextlib.contextmanager
def said_of(place: str) -> Iterator[None]:
    """A ModelError from inside says which stage and loss it is about."""
    try:
        yield
    except ModelError as error:
        if error.place == place:
            raise
        raise ModelError(place, f"{error.place}: {error.problem}", error.way_out) from error


def refuse_number_of_weights(term: FeatureTerm, pairs: Sequence[Pair], place: str) -> None:
    """Raises ModelError where `layer_weights` are not as many as the values that the loss returns."""
    names = names_of_values(term, pairs)
    if isinstance(term.layer_weights, tuple) and len(term.layer_weights) != len(names):
        kind = "pairs of layers" if term.between else "layers"
        raise ModelError(
            place, f"{len(term.layer_weights)} layer_weights for {len(names)} {kind}", f"they are {', '.join(names)}"
        )


def names_of_values(term: FeatureTerm, pairs: Sequence[Pair]) -> list[str]:
    """What each value that a loss returns belongs to: a layer, or the way from one to the next."""
    names = [pair.student for pair in pairs]
    return [f"{a} to {b}" for a, b in pairwise(names)] if term.between else names
