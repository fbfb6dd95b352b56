"""Contrastive representation distillation: Tian et al., 2020 (arXiv:1910.10699), section 3.1.

An image's embedding by the student should tell its embedding by the teacher from those of other images, and the other
way round. The others come from two banks that hold the last embeddings of all training images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from compress.errors import DataError
from compress.labels import Task
from compress.losses.embeddings import embedding, refuse_unless_embedded, width
from compress.losses.lesson import Facts, FeatureTerm, Lesson
from compress.losses.maps import unit
from compress.product import NO_LABEL


def noise_contrastive(positive_N: Tensor, negative_NK: Tensor, counts_NK: Tensor, images: int) -> Tensor:
    """-log of the probability of telling positives and negatives right (NCE), summed over K, batch mean; equation 18.

    Scores are logarithms log g, and a score is told a positive with the probability g / (g + m / images), where m is
    the row's number of negatives; only those count where `counts_NK` is True. At least 0, and 0 for a row without any.
    """
    noise_N = (counts_NK.sum(1).to(positive_N.dtype) / images).log()
    missed_N = F.softplus(noise_N - positive_N)
    mistaken_NK = F.softplus(negative_NK - noise_N[:, None])
    return missed_N.mean() + torch.where(counts_NK, mistaken_NK, 0).sum() / len(positive_N)


def drawn(allowed_NM: Tensor, number: int) -> tuple[Tensor | None, Tensor]:
    """Up to `number` of each row's allowed columns, without repetition: their indices (N, K), and which of them count.

    Drawn from torch's global generator, each with the same probability. None for all columns, where `number` does not
    limit them.
    """
    if number >= allowed_NM.shape[1] - 1:
        return None, allowed_NM
    lots_NM = torch.rand(allowed_NM.shape, device=allowed_NM.device).masked_fill(~allowed_NM, -1)
    highest = lots_NM.topk(number, dim=1, sorted=False)
    return highest.indices, highest.values >= 0


class Contrast(nn.Module):
    """Both embeddings, which are trained, and what is remembered of the training images by their indices.

    The banks begin with noise about as long as the embeddings. In a training by several processes, each has its own
    and fills it from its share of the images, which is another one in each epoch.
    """

    student_bank_MD: Tensor
    teacher_bank_MD: Tensor
    labels_M: Tensor
    log_norms: Tensor

    def __init__(self, student: int, teacher: int, images: int, size: int) -> None:
        super().__init__()
        self.student = nn.Linear(student, size)
        self.teacher = nn.Linear(teacher, size)
        bound = math.sqrt(3 / size)
        for bank in ("student_bank_MD", "teacher_bank_MD"):
            self.register_buffer(bank, torch.empty(images, size).uniform_(-bound, bound))
        # The labels come with the batches: an image not yet seen has noise in the banks, which is nobody's class.
        self.register_buffer("labels_M", torch.full((images,), NO_LABEL))
        self.register_buffer("log_norms", torch.full((2,), math.nan))

    @torch.no_grad()
    def save(self, indices_N: Tensor, student_ND: Tensor, teacher_ND: Tensor, momentum: float) -> None:
        """Mixes a batch into the banks. As new tensors: the gradients of the batch need the banks as they were."""
        for name, latest_ND in (("student_bank_MD", student_ND), ("teacher_bank_MD", teacher_ND)):
            bank_MD = getattr(self, name)
            mixed_ND = momentum * bank_MD[indices_N] + (1 - momentum) * latest_ND
            setattr(self, name, bank_MD.index_copy(0, indices_N, unit(mixed_ND, dim=1)))

    def forward(
        self,
        student_NC: Tensor,
        teacher_NC: Tensor,
        indices_N: Tensor,
        labels_N: Tensor,
        *,
        temperature: float,
        negatives: int,
        momentum: float,
    ) -> Tensor:
        """The loss of both directions, added; then the banks take the batch in."""
        known_N = labels_N != NO_LABEL
        self.labels_M[indices_N[known_N]] = labels_N[known_N]
        allowed_NM = (self.labels_M != labels_N[:, None]) | ~known_N[:, None]
        allowed_NM.scatter_(1, indices_N[:, None], False)
        columns_NK, counts_NK = drawn(allowed_NM, negatives)

        student_ND, teacher_ND = unit(self.student(student_NC), dim=1), unit(self.teacher(teacher_NC), dim=1)
        total = student_ND.new_zeros(())
        directions = ((student_ND, self.teacher_bank_MD), (teacher_ND, self.student_bank_MD))
        for direction, (anchor_ND, bank_MD) in enumerate(directions):
            scores_NM = anchor_ND @ bank_MD.T / temperature
            positive_N = scores_NM.gather(1, indices_N[:, None])[:, 0]
            negative_NK = scores_NM if columns_NK is None else scores_NM.gather(1, columns_NK)
            if self.log_norms[direction].isnan():
                self.log_norms[direction] = log_norm(positive_N, negative_NK, counts_NK, len(bank_MD))
            norm = self.log_norms[direction]
            total = total + noise_contrastive(positive_N - norm, negative_NK - norm, counts_NK, len(bank_MD))
        self.save(indices_N, student_ND, teacher_ND, momentum)
        return total


@torch.no_grad()
def log_norm(positive_N: Tensor, negative_NK: Tensor, counts_NK: Tensor, images: int) -> Tensor:
    """log of what scores are divided by: the mean of exp(score), times the number of images.

    Taken from the first batch and kept, as in the authors' code and in Wu et al., 2018 (arXiv:1805.01978).
    """
    scores = torch.cat([positive_N, negative_NK[counts_NK]])
    return scores.logsumexp(0) - math.log(len(scores)) + math.log(images)


class CRD(FeatureTerm):
    """Tell an image by its embedding from all others as the teacher does.

    The paper's NCE (not InfoNCE) with the settings of RepDistiller. Negatives are drawn without repetition from the
    images of other classes, or of all others for an image without a label. There are fewer than `negatives` in a small
    data set: then all are taken. Scores against both banks are computed whole, N * images numbers each, instead of
    fetching K vectors for each image.
    """

    tasks: ClassVar[tuple[Task, ...]] = ("classification",)

    where = "last"

    use: Literal["crd"]
    embedding: int = Field(default=128, ge=1)
    """Numbers in an embedding."""
    temperature: float = Field(default=0.07, gt=0)
    negatives: int = Field(default=16384, ge=1)
    """Other images that each is told from."""
    momentum: float = Field(default=0.5, ge=0, lt=1)
    """What remains of an image's old embedding in the bank when the new one is mixed in."""
    weight: float = Field(default=0.8, ge=0)

    def parts(self, facts: Facts) -> nn.Module | None:
        refuse_unless_embedded(self.use, facts)
        if facts.images < 2:
            raise DataError("training images", f"`crd` tells images apart, and there is {facts.images}", "add some")
        pairs = zip(facts.student_shapes, facts.teacher_shapes, strict=True)
        return nn.ModuleList([Contrast(width(s), width(t), facts.images, self.embedding) for s, t in pairs])

    def __call__(self, lesson: Lesson) -> Tensor:
        contrasts = cast(Sequence[Contrast], lesson.parts)
        indices_N, images = lesson.indices_N, len(contrasts[0].labels_M)
        if indices_N is None:
            raise DataError(
                "training images",
                "`crd` remembers each one and this data does not number them",
                "fill `Batch.indices_N`, or take another loss",
            )
        if len(indices_N) and (int(indices_N.min()) < 0 or int(indices_N.max()) >= images):
            raise DataError(
                "training images",
                f"`crd` was told of {images} and got one numbered {int(indices_N.max())}",
                "number them from 0",
            )
        values = []
        for student, teacher, contrast in zip(lesson.student_maps, lesson.teacher_maps, contrasts, strict=True):
            value = contrast(
                embedding(student),
                embedding(teacher),
                indices_N,
                lesson.labels_N,
                temperature=self.temperature,
                negatives=self.negatives,
                momentum=self.momentum,
            )
            values.append(value)
        return torch.stack(values)
