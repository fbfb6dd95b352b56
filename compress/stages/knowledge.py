"""What the network has of its original beyond accuracy, after Ojha et al., NeurIPS 2023 (arXiv:2205.16004)."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from statistics import fmean
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from compress.data.pixels import to_pixels
from compress.errors import ModelError
from compress.knowledge.adversarial import fgsm, fools_too, pgd
from compress.knowledge.agreement import agreement, agreement_on_mistakes, mean_js, mean_kl, right
from compress.knowledge.calibration import (
    brier_score,
    expected_calibration_error,
    negative_log_likelihood,
    reliability,
)
from compress.knowledge.corruptions import CORRUPTIONS, Corruption, corrupt
from compress.knowledge.invariance import diagonal_shifts, flipped, shifted
from compress.knowledge.pixels import normalized, to_input, to_unit
from compress.product import Batch, Network, Product, Run
from compress.quantization import fold_batchnorm
from compress.settings import Settings

BATCH = 50
SEED = 0
"""Of the images and of all that is random in them: the same ones in every run, so that figures of two runs compare."""

Attack = Literal["fgsm", "pgd"]
Severity = Annotated[int, Field(ge=1, le=5)]
STUDENT, TEACHER = "student", "teacher"
Networks = Mapping[str, nn.Module]
"""The student and the teacher."""
Logits = Mapping[str, Tensor]
"""What each of them says to the same images, (N, K) on the CPU."""
PLAIN, FLIPPED, SHIFTED = "as they are", "flipped", "shifted"
FRACTION, NATS, SQUARED = "fraction", "nats", "squared distance"
"""Units."""


class Knowledge(Settings):
    """Compares the network with the one before compression: answers, calibration, corruptions, attacks, invariance."""

    use: Literal["knowledge"]
    images: int | None = Field(default=500, ge=1)
    """Evaluation images, spread over the classes; null takes all of them."""
    calibration_bins: int = Field(default=15, ge=1)
    corruptions: tuple[Corruption, ...] = CORRUPTIONS
    """Those of ImageNet-C that are tried; `[]` for none."""
    severities: tuple[Severity, ...] = Field(default=(1, 3, 5), min_length=1)
    """Of the corruptions, 1 (mild) to 5."""
    attacks: tuple[Attack, ...] = ("fgsm", "pgd")
    """`[]` for none."""
    attack_images: int = Field(default=200, ge=1)
    """So many of the images are attacked, at most."""
    eps: float = Field(default=1.0, gt=0, le=255)
    """How far an attack may move a pixel, of 255."""
    pgd_steps: int = Field(default=7, ge=1)
    """Each moves pixels by a quarter of `eps`."""
    shift: float = Field(default=0.0625, gt=0, lt=0.5)
    """How far crops move for the invariance, as a part of the side."""

    def apply(self, product: Product, run: Run) -> Product:
        if product.parent is None:
            raise ModelError(
                f"stage {run.stage or self.use}",
                "nothing is pruned or quantized yet, so the network would be compared with itself",
                "move the stage down",
            )
        networks = {STUDENT: _copy(product.network, run), TEACHER: _copy(product.original, run)}
        available = run.data.count("evaluation")
        attacked_N = _evenly(min(self.images or available, available), self.attack_images if self.attacks else 0)
        parts: defaultdict[str, list[Logits]] = defaultdict(list)
        labels: list[Tensor] = []
        batches = run.data.batches("evaluation", batch_size=BATCH, limit=len(attacked_N), seed=SEED)
        with run.progress.steps("knowledge", self._looks(attacked_N, run.data.preprocess.size)) as advance:
            for batch, rows_N in zip(batches, attacked_N.split(BATCH), strict=True):
                begun = sum(map(len, labels))
                labels.append(batch.labels_N)
                names_N = torch.arange(begun, begun + len(rows_N)) if batch.indices_N is None else batch.indices_N
                for what, images_NCHW in self._changed(batch, names_N, rows_N, networks, run):
                    with torch.inference_mode():
                        parts[what].append({who: module(images_NCHW).cpu() for who, module in networks.items()})
                    advance(what)
        said = {
            what: {who: torch.cat([part[who] for part in each]) for who in networks} for what, each in parts.items()
        }
        return replace(product, metrics=self._metrics(said, torch.cat(labels), attacked_N))

    def _looks(self, attacked_N: Tensor, size: int) -> int:
        """How many changed batches `_changed` gives in all."""
        batches = attacked_N.split(BATCH)
        everywhere = 2 + len(diagonal_shifts(size, self.shift)) + len(self.corruptions) * len(self.severities)
        return everywhere * len(batches) + 2 * len(self.attacks) * sum(bool(rows_N.any()) for rows_N in batches)

    def _changed(
        self, batch: Batch, names_N: Tensor, rows_N: Tensor, networks: Networks, run: Run
    ) -> Iterator[tuple[str, Tensor]]:
        """What is done to the images, and what the networks then see. Those of `rows_N` alone are attacked."""
        preprocess, channels_last = run.data.preprocess, run.data.channels_last
        pixels_NHWC, names = to_pixels(batch.images_NCHW, preprocess), names_N.tolist()

        def seen(changed_NHWC: np.ndarray) -> Tensor:
            return to_input(changed_NHWC, preprocess, channels_last=channels_last).to(run.device)

        yield PLAIN, seen(pixels_NHWC)
        yield FLIPPED, seen(flipped(pixels_NHWC))
        for x, y in diagonal_shifts(preprocess.size, self.shift):
            yield f"{SHIFTED} {x} {y}", seen(shifted(pixels_NHWC, right=x, down=y))
        for corruption in self.corruptions:
            for severity in self.severities:
                pairs = zip(pixels_NHWC, names, strict=True)
                corrupted = [corrupt(image, corruption, severity, seed=SEED, image=name) for image, name in pairs]
                yield f"{corruption} {severity}", seen(np.stack(corrupted))
        if not rows_N.any():
            return
        unit_NCHW = to_unit(pixels_NHWC[rows_N.numpy()], channels_last=channels_last).to(run.device)
        labels_N = batch.labels_N[rows_N].to(run.device)
        start_NCHW = _random_start(unit_NCHW, names_N[rows_N].tolist())
        for victim, module in networks.items():

            def classify(unit_NCHW: Tensor, module: nn.Module = module) -> Tensor:
                logits_NK: Tensor = module(normalized(unit_NCHW, preprocess))
                return logits_NK

            for attack in self.attacks:
                if attack == "fgsm":
                    attacked_NCHW = fgsm(classify, unit_NCHW, labels_N, eps=self.eps / 255)
                else:
                    attacked_NCHW = pgd(
                        classify, unit_NCHW, labels_N, eps=self.eps / 255, steps=self.pgd_steps, start_NCHW=start_NCHW
                    )
                yield f"{attack} of the {victim}", normalized(attacked_NCHW, preprocess)

    def _metrics(self, said: Mapping[str, Logits], labels_N: Tensor, attacked_N: Tensor) -> dict[str, Any]:
        """JSON. `measures` has a row per figure; the rest is what some of them are made of."""
        plain = said[PLAIN]
        corrupted = [
            {"corruption": corruption, "severity": severity, "unit": FRACTION}
            | {who: _accuracy(logits_NK, labels_N) for who, logits_NK in logits.items()}
            | {"agreement": agreement(logits[STUDENT], logits[TEACHER])}
            for corruption in self.corruptions
            for severity in self.severities
            for logits in [said[f"{corruption} {severity}"]]
        ]
        moved = [logits for what, logits in said.items() if what.startswith(SHIFTED)]
        measures = [
            *_answers(plain, labels_N),
            *_confidence(plain, labels_N, self.calibration_bins),
            *_corruptions(corrupted, len(labels_N)),
            *(row for attack in self.attacks for row in _attack(attack, said, labels_N, attacked_N)),
            *(_invariance(name, plain, looks) for name, looks in (("flips", [said[FLIPPED]]), ("shifts", moved))),
        ]
        return {
            "images": len(labels_N),
            "attack_images": int(attacked_N.sum()),
            "eps_255ths": self.eps,
            "severities": list(self.severities),
            "measures": measures,
            "corruptions": corrupted,
            "reliability": {
                who: [asdict(part) for part in reliability(logits_NK, labels_N, self.calibration_bins)]
                for who, logits_NK in plain.items()
            },
        }


def _measure(name: str, group: str, images: int, figures: Mapping[str, Any], unit: str = FRACTION) -> dict[str, Any]:
    """One figure of each network; the teacher has none where it is of both networks together."""
    return {"name": name, "group": group, "unit": unit, "images": images, STUDENT: None, TEACHER: None, **figures}


def _answers(plain: Logits, labels_N: Tensor) -> Iterator[dict[str, Any]]:
    student_NK, teacher_NK = plain[STUDENT], plain[TEACHER]
    images, mistakes = len(labels_N), int((~right(teacher_NK, labels_N)).sum())
    same_mistakes = agreement_on_mistakes(student_NK=student_NK, teacher_NK=teacher_NK, labels_N=labels_N)
    kl, js = mean_kl(student_NK=student_NK, teacher_NK=teacher_NK), mean_js(student_NK, teacher_NK)
    yield _measure("accuracy", "answers", images, {who: _accuracy(said, labels_N) for who, said in plain.items()})
    yield _measure("agreement", "answers", images, {STUDENT: agreement(student_NK, teacher_NK)})
    yield _measure("agreement_on_mistakes", "answers", mistakes, {STUDENT: same_mistakes})
    yield _measure("kl", "answers", images, {STUDENT: kl}, NATS)
    yield _measure("js", "answers", images, {STUDENT: js}, NATS)


def _confidence(plain: Logits, labels_N: Tensor, bins: int) -> Iterator[dict[str, Any]]:
    images = len(labels_N)
    errors = {who: expected_calibration_error(said, labels_N, bins) for who, said in plain.items()}
    nll = {who: negative_log_likelihood(said, labels_N) for who, said in plain.items()}
    brier = {who: brier_score(said, labels_N) for who, said in plain.items()}
    yield _measure("ece", "confidence", images, errors)
    yield _measure("nll", "confidence", images, nll, NATS)
    yield _measure("brier", "confidence", images, brier, SQUARED)


def _corruptions(corrupted: list[dict[str, Any]], images: int) -> Iterator[dict[str, Any]]:
    """Means over all corruptions and severities, then over the severities of each."""
    if not corrupted:
        return

    def means(rows: list[dict[str, Any]]) -> dict[str, float]:
        return {who: fmean(row[who] for row in rows) for who in (STUDENT, TEACHER)}

    yield _measure("corrupted_accuracy", "corruptions", images, means(corrupted))
    same = fmean(row["agreement"] for row in corrupted)
    yield _measure("corrupted_agreement", "corruptions", images, {STUDENT: same})
    for name in dict.fromkeys(row["corruption"] for row in corrupted):
        yield _measure(name, "corruptions", images, means([row for row in corrupted if row["corruption"] == name]))


def _attack(
    attack: Attack, said: Mapping[str, Logits], labels_N: Tensor, attacked_N: Tensor
) -> Iterator[dict[str, Any]]:
    """White-box: each network under the attack made for it. Transfer: each under the attack made for the other."""
    of_student, of_teacher = said[f"{attack} of the {STUDENT}"], said[f"{attack} of the {TEACHER}"]
    labels_N, images = labels_N[attacked_N], int(attacked_N.sum())
    before = {who: right(logits_NK[attacked_N], labels_N) for who, logits_NK in said[PLAIN].items()}

    def accuracies(student: Logits, teacher: Logits) -> dict[str, float]:
        return {STUDENT: _accuracy(student[STUDENT], labels_N), TEACHER: _accuracy(teacher[TEACHER], labels_N)}

    def fooled(logits: Logits, source: str, target: str) -> dict[str, float | None]:
        share = fools_too(
            source_before_N=before[source],
            source_after_N=right(logits[source], labels_N),
            target_before_N=before[target],
            target_after_N=right(logits[target], labels_N),
        )
        return {STUDENT: share}

    same = {STUDENT: agreement(of_teacher[STUDENT], of_teacher[TEACHER])}
    yield _measure(f"{attack}_accuracy", "attacks", images, accuracies(of_student, of_teacher))
    yield _measure(f"{attack}_transfer_accuracy", "attacks", images, accuracies(of_teacher, of_student))
    yield _measure(f"{attack}_agreement", "attacks", images, same)
    yield _measure(f"{attack}_of_teacher_fools_student", "attacks", images, fooled(of_teacher, TEACHER, STUDENT))
    yield _measure(f"{attack}_of_student_fools_teacher", "attacks", images, fooled(of_student, STUDENT, TEACHER))


def _invariance(change: str, plain: Logits, changed: list[Logits]) -> dict[str, Any]:
    """How often each network says of the changed images what it says of those as they are."""
    same = {who: fmean(agreement(plain[who], logits[who]) for logits in changed) for who in plain}
    return _measure(f"invariance_to_{change}", "invariance", len(plain[STUDENT]), same)


def _joined(parts: list[Logits]) -> Logits:
    return {who: torch.cat([part[who] for part in parts]) for who in (STUDENT, TEACHER)}


def _accuracy(logits_NK: Tensor, labels_N: Tensor) -> float:
    return float(right(logits_NK, labels_N).double().mean())


def _evenly(count: int, chosen: int) -> Tensor:
    """bool (count,): at most `chosen` places, evenly spread, because images come class by class."""
    chosen_N = torch.zeros(count, dtype=torch.bool)
    if chosen:
        chosen_N[torch.linspace(0, count - 1, min(count, chosen)).long()] = True
    return chosen_N


def _random_start(unit_NCHW: Tensor, names: list[int]) -> Tensor:
    """Uniform in [-1, 1], the same for an image whatever batch it is in."""
    shape = tuple(unit_NCHW.shape[1:])
    starts = [np.random.default_rng((SEED, name)).uniform(-1, 1, shape).astype(np.float32) for name in names]
    return torch.from_numpy(np.stack(starts)).to(unit_NCHW.device)


def _copy(network: Network, run: Run) -> nn.Module:
    """In eval mode on the run's device, without gradients for its parameters; the product keeps its own."""
    copied: nn.Module
    try:
        # A third faster. A fake-quantized network has no BatchNorm left.
        copied = fold_batchnorm(network.module) if network.structure.quantize is None else copy.deepcopy(network.module)
    except ModelError:  # its control flow cannot be traced
        copied = copy.deepcopy(network.module)
    layout = torch.channels_last if run.data.channels_last else torch.contiguous_format
    copied.eval().requires_grad_(False).to(run.device, memory_format=layout)  # type: ignore[call-overload]
    return copied
