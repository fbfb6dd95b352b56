"""Answers that are kept: the same numbers, fewer questions, and every way in which a cache can be wrong."""

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sharing
import torch
from conftest import PREPROCESS, SmallNet, Stripes, randomized
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from compress.data.augment import AugmentDigit, AugmentPhoto
from compress.data.loader import ImageData, Images
from compress.data.unlabeled import NO_LABEL, WithUnlabeled
from compress.errors import DataError
from compress.losses.kd import soft_targets
from compress.product import Batch, Network, Run
from compress.progress import Silent
from compress.teachers.teacher import Frozen
from compress.teaching.cache import Cached, Remembered, asked_once, facts
from compress.training import Fit, fit

FINGERPRINT = "f" * 64


class Counting(nn.Module):
    """A network that counts the images it sees."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.seen = network, []

    def forward(self, x):
        self.seen.append(len(x))
        return self.network(x)

    def __call__(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            return super().__call__(batch.images_NCHW)


def network(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # for the biases, which `randomized` leaves as they are
        return randomized(SmallNet(), seed)


def teacher() -> Counting:
    return Counting(network(9))


def image_data(count: int = 40, seed: int = 5, fingerprint: str = "a" * 64) -> ImageData:
    images = np.random.default_rng(seed).integers(0, 256, (count, 24, 24, 3), np.uint8)
    split = Images(np.arange(count) % 5, lambda index, _: Image.fromarray(images[index]))
    return ImageData(("a", "b", "c", "d", "e"), PREPROCESS, fingerprint, split, split, AugmentPhoto(), 0)


@pytest.fixture
def photographs(run: Run) -> Run:
    """The run on 40 real images with real augmentation: flips and crops."""
    return replace(run, data=image_data())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "answers"


def first_batch(run: Run, **options: Any) -> Batch:
    options = {"batch_size": 8, "augment": True, "shuffle": True, "seed": run.seed, **options}
    return next(iter(run.data.batches("train", **options)))


def trained(run: Run, ask: Callable[[Batch], Tensor], **options: Any) -> dict[str, Tensor]:
    """The state of a small network after a distillation."""
    views = options.pop("views", 2)
    settings = Fit(**{"epochs": 5, "batch_size": 8, "lr": 0.02, **options})

    def loss(student: nn.Module, batch: Batch) -> Tensor:
        said_NK = student(batch.images_NCHW)
        labels = F.cross_entropy(said_NK, batch.labels_N, ignore_index=NO_LABEL)
        return 0.1 * labels + soft_targets(said_NK, ask(batch), 4.0)

    return fit(network(1), loss=loss, run=run, settings=settings, label="x", views=views)[0].state_dict()


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


# In memory


def test_views_repeat_pixel_by_pixel_while_the_order_changes(photographs):
    def pixels(epoch: int, view: int | None) -> dict[int, bytes]:
        batches = photographs.data.batches("train", batch_size=8, augment=True, shuffle=True, epoch=epoch, view=view)
        seen = {}
        for batch in batches:
            assert batch.view == (epoch if view is None else view)
            for image, index, label in zip(batch.images_NCHW, batch.indices_N, batch.labels_N, strict=True):
                assert int(label) == int(index) % 5
                seen[int(index)] = image.numpy().tobytes()
        return seen

    first, again, other, plain = pixels(0, 0), pixels(2, 0), pixels(1, 1), pixels(1, None)
    assert first == again
    assert list(first) != list(again)
    assert other == plain
    assert all(first[index] != other[index] for index in first)


@pytest.mark.parametrize("count", [40, 43])
def test_remembering_changes_no_weight_and_asks_the_teacher_once_for_each_view(photographs, count):
    """Two views in five epochs, shuffled: the same bytes as with a teacher that looks every time.

    Of 43 images three are left out of each epoch, so later epochs have batches with few new images. Those alone would
    get other last bits from the teacher than a whole batch does.
    """
    run = replace(photographs, data=image_data(count))
    online, remembering = teacher(), teacher()
    every_time = trained(run, online)
    assert same(trained(run, Remembered(remembering, count, 2)), every_time)
    assert sum(online.seen) == 5 * 40
    assert set(remembering.seen) == {8}
    assert sum(remembering.seen) == 2 * 40 if count == 40 else sum(remembering.seen) < 4 * 40


def test_each_process_asks_for_the_images_it_meets_first(photographs):
    """Shares change by epoch: what a process has not seen of a view is asked for, the rest is not."""
    counting = teacher()
    remembered = Remembered(counting, 40, 1, whole=False)
    known: set[int] = set()
    for epoch in range(6):
        options = {"shuffle": True, "epoch": epoch, "rank": 1, "world_size": 2, "view": 0}
        for batch in photographs.data.batches("train", batch_size=8, augment=True, **options):
            before = sum(counting.seen)
            answers = remembered(batch)
            assert sum(counting.seen) - before == len(set(batch.indices_N.tolist()) - known)
            known |= set(batch.indices_N.tolist())
            torch.testing.assert_close(answers, counting.network(batch.images_NCHW))
    assert len(known) > 20


def test_data_without_numbers_is_refused(photographs, folder):
    batch = Batch(torch.zeros(2, 3, 16, 16), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(DataError, match="`views` needs data that numbers its images"):
        Remembered(teacher(), 2, 1)(batch)
    with pytest.raises(DataError, match="`cache` needs data that numbers its images"):
        Cached(teacher(), folder, FINGERPRINT, photographs, augment=True)(batch)


# On disk


@pytest.mark.parametrize("options", [{}, {"views": None}, {"augment": False, "views": None}], ids=str)
@pytest.mark.parametrize("count", [40, 43])
def test_a_training_is_the_same_without_with_a_new_and_with_a_full_cache(photographs, folder, count, options):
    """Byte for byte; with a full cache, nobody asks the teacher."""
    run = replace(photographs, data=image_data(count))
    augment = options.get("augment", True)
    online = trained(run, teacher(), **options)
    asked = []
    for _ in range(3):
        counting = teacher()
        assert same(trained(run, Cached(counting, folder, FINGERPRINT, run, augment=augment), **options), online)
        asked.append(sum(counting.seen))
    assert asked[1:] == [0, 0]
    views = 5 if options == {"views": None} else 2 if augment else 1
    assert asked[0] == views * 40 if count == 40 or views == 5 else asked[0] < 5 * 40
    assert len(list(folder.glob("*.logits"))) == views


def test_a_teacher_of_the_package_keeps_its_answers(photographs, product, folder):
    """The network's own fingerprint, and logits that are those of the teacher, image by image."""
    frozen = Frozen(Network(network(9), product.network.structure), photographs, related=False)
    notes = []
    run = replace(photographs, progress=type("Notes", (Silent,), {"note": lambda _, text: notes.append(text)})())

    def ask(batch: Batch) -> Tensor:
        return frozen.answers(batch, ()).logits_NK

    cached = asked_once(ask, frozen.fingerprint, run, views=None, cache=folder, augment=True)
    batch = first_batch(run)
    assert torch.equal(cached(batch), ask(batch))
    assert json.loads((folder / "cache.json").read_text())["teacher"] == frozen.fingerprint
    assert notes == [f"The teacher's answers are kept in {folder} (up to 0.00112 MB a view)."]  # 40 x (5 x 4 + 8) bytes


def test_a_batch_in_another_order_finds_its_own_answers(photographs, folder):
    counting = teacher()
    cached = Cached(counting, folder, FINGERPRINT, photographs, augment=True)
    batch = first_batch(photographs)
    expected = cached(batch)
    order = torch.tensor([5, 2, 2, 0])
    mixed = replace(
        batch,
        images_NCHW=batch.images_NCHW[order],
        labels_N=batch.labels_N[order],
        indices_N=batch.indices_N[order],
    )
    assert torch.equal(cached(mixed), expected[order])
    assert counting.seen == [8]


def test_seeds_have_rows_of_their_own(photographs, folder):
    """Another seed is another augmentation of the same view: no answer serves both, and none is refused."""
    for seed in (3, 4, 3):
        run = replace(photographs, seed=seed)
        counting = teacher()
        answers = Cached(counting, folder, FINGERPRINT, run, augment=True)(first_batch(run))
        assert torch.equal(answers, counting(first_batch(run)))
    assert {path.name for path in folder.glob("*.logits")} == {"3-0.logits", "4-0.logits"}


def test_unlabelled_images_have_rows_behind_the_labelled_ones(photographs, folder):
    extra = image_data(9, seed=8)
    extra = replace(extra, train=Images(np.full(9, NO_LABEL), extra.train.read, first=40))
    run = replace(photographs, data=WithUnlabeled(photographs.data, extra, 0.5))
    online = trained(run, teacher())
    asked = []
    for _ in range(2):
        counting = teacher()
        assert same(trained(run, Cached(counting, folder, FINGERPRINT, run, augment=True)), online)
        asked.append(sum(counting.seen))
    assert asked[0] > 0
    assert asked[1] == 0
    assert (folder / "3-0.logits").stat().st_size == 49 * (5 * 4 + 8)
    counting = teacher()
    assert same(trained(run, Remembered(counting, 49, 2)), online)


def test_without_a_cache_only_views_of_a_steady_teacher_are_remembered(photographs, folder):
    ask = teacher()
    options = {"run": photographs, "augment": True}
    assert asked_once(ask, FINGERPRINT, views=None, cache=None, **options) is ask
    assert asked_once(ask, None, views=2, cache=None, **options) is ask
    assert isinstance(asked_once(ask, FINGERPRINT, views=2, cache=None, **options), Remembered)
    with pytest.raises(DataError, match="this teacher changes while it teaches"):
        asked_once(ask, None, views=2, cache=folder, **options)
    assert not folder.exists()


# Several processes


def test_processes_share_a_folder(folder):
    """Two that begin at once and meet the same images: each image has one answer, which serves both."""
    command = [sys.executable, sharing.__file__, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "ready\n"
        other.stdin.write("\n")
        other.stdin.flush()
        asked, answers = sharing.ask_share(0, folder)
        asked_there, answers_there = json.loads(other.stdout.readline())
    assert other.returncode == 0
    assert set(answers) | {int(number) for number in answers_there} == set(range(40))
    for number in range(40):
        assert len({*answers.get(number, ()), *answers_there.get(str(number), ())}) == 1
    assert 40 <= asked + asked_there < 4 * 40
    again, found = sharing.ask_share(0, folder)
    assert again == 0
    assert found == answers


# Stale or damaged


STALE = {
    "teacher": lambda run: (run, "e" * 64),
    "data": lambda run: (replace(run, data=replace(run.data, fingerprint="b" * 64)), FINGERPRINT),
    "images": lambda run: (replace(run, data=image_data(39)), FINGERPRINT),
    "labels": lambda run: (replace(run, data=replace(run.data, labels=("a", "b", "c", "e", "d"))), FINGERPRINT),
    "augment": lambda run: (replace(run, data=replace(run.data, augment=AugmentPhoto(color=0.3))), FINGERPRINT),
    "preprocess": lambda run: (
        replace(run, data=replace(run.data, preprocess=PREPROCESS.model_copy(update={"crop": 0.9}))),
        FINGERPRINT,
    ),
    "channels_last": lambda run: (replace(run, data=run.data.in_nchw()), FINGERPRINT),
    "device": lambda run: (replace(run, device=torch.device("meta")), FINGERPRINT),
}


@pytest.mark.parametrize("name", STALE)
def test_a_stale_cache_is_refused_by_name(photographs, folder, name):
    Cached(teacher(), folder, FINGERPRINT, photographs, augment=True)(first_batch(photographs))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    run, fingerprint = STALE[name](photographs)
    with pytest.raises(DataError, match=f"is a stale cache: its {name} was .*, now .*; remove .* or name another"):
        Cached(teacher(), folder, fingerprint, run, augment=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    Cached(teacher(), folder, FINGERPRINT, photographs, augment=True)


def test_augmented_and_plain_images_do_not_share_a_cache(photographs, folder):
    Cached(teacher(), folder, FINGERPRINT, photographs, augment=False)
    with pytest.raises(DataError, match="its augment was None, now"):
        Cached(teacher(), folder, FINGERPRINT, photographs, augment=True)


def test_a_cache_of_another_version_is_refused(photographs, folder, monkeypatch):
    Cached(teacher(), folder, FINGERPRINT, photographs, augment=True)
    monkeypatch.setattr("compress.teaching.cache.__version__", "99.0")
    with pytest.raises(DataError, match=r"its compress was .*, now 99\.0"):
        Cached(teacher(), folder, FINGERPRINT, photographs, augment=True)


def test_facts_know_every_kind_of_data(photographs):
    plain = facts(photographs, FINGERPRINT, augment=True)["augment"]
    assert plain == {"use": "AugmentPhoto", "crop_scale": [0.35, 1.0], "flip": True, "color": 0.2}
    digits = replace(photographs.data, augment=AugmentDigit())
    both = replace(photographs, data=WithUnlabeled(digits, photographs.data, 1.0))
    assert facts(both, FINGERPRINT, augment=True)["augment"][1] == plain
    assert facts(both, FINGERPRINT, augment=True)["augment"][0]["use"] == "AugmentDigit"
    assert facts(replace(photographs, data=Stripes()), FINGERPRINT, augment=True)["augment"] == {"use": "Stripes"}


def test_other_pixels_are_noticed_where_no_setting_changed(photographs, folder):
    """Code that draws the augmentation otherwise: every fact is as before, the pixels are not."""
    Cached(teacher(), folder, FINGERPRINT, photographs, augment=True)(first_batch(photographs))
    changed = replace(photographs, data=image_data(seed=6))
    with pytest.raises(DataError, match=r"image \d+ has other pixels than when the teacher answered it"):
        Cached(teacher(), folder, FINGERPRINT, changed, augment=True)(first_batch(changed))


def test_every_damage_is_found(photographs, folder):
    """Each byte of a known row, a file of another length, rows that changed places, a header without sense."""
    batch = first_batch(photographs)
    Cached(teacher(), folder, FINGERPRINT, photographs, augment=True)(batch)
    path, size = folder / "3-0.logits", 5 * 4 + 8
    whole = path.read_bytes()
    first, second = batch.indices_N[:2].tolist()

    def found(match: str) -> None:
        counting = teacher()
        with pytest.raises(DataError, match=match):
            Cached(counting, folder, FINGERPRINT, photographs, augment=True)(batch)
        assert counting.seen == []

    for place in range(size):
        damaged = bytearray(whole)
        damaged[first * size + place] ^= 0x10
        path.write_bytes(damaged)
        found(f"the answer to image {first} was altered or written in part; remove")
    for cut in (whole[:-1], whole[: size * 20], b"", whole + b"\0"):
        path.write_bytes(cut)
        found(rf"(was cut short|is too long) \({len(cut)} of {len(whole)} bytes\)")
    swapped = bytearray(whole)
    swapped[first * size : (first + 1) * size] = whole[second * size : (second + 1) * size]
    swapped[second * size : (second + 1) * size] = whole[first * size : (first + 1) * size]
    path.write_bytes(swapped)
    found("was altered")
    path.write_bytes(whole)
    shutil.copy(path, folder / "3-1.logits")
    with pytest.raises(DataError, match="was altered"):
        Cached(teacher(), folder, FINGERPRINT, photographs, augment=True)(first_batch(photographs, view=1))
    (folder / "cache.json").write_text('{"format": 1, "compr')
    found(r"cache\.json: is not readable; remove")


def test_a_row_that_was_begun_and_not_finished_is_asked_again(photographs, folder):
    """What a process leaves that is killed while it writes: no checksum, which is the last thing of a row."""
    batch = first_batch(photographs)
    expected = Cached(teacher(), folder, FINGERPRINT, photographs, augment=True)(batch)
    path, size = folder / "3-0.logits", 5 * 4 + 8
    content, number = bytearray(path.read_bytes()), int(batch.indices_N[3])
    content[number * size + 9 : (number + 1) * size] = bytes(size - 9)
    path.write_bytes(content)
    counting = teacher()
    assert torch.equal(Cached(counting, folder, FINGERPRINT, photographs, augment=True)(batch), expected)
    assert counting.seen == [8]


def test_what_is_no_cache_stays_as_it_is(photographs, folder, tmp_path):
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match=r"holds thesis\.tex, but no cache\.json"):
        Cached(teacher(), folder, FINGERPRINT, photographs, augment=True)
    assert (folder / "thesis.tex").read_text() == "years of work"
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]
    with pytest.raises(DataError, match="cannot be kept here"):
        Cached(teacher(), folder / "thesis.tex", FINGERPRINT, photographs, augment=True)


def test_the_teacher_is_not_moved_and_its_answers_have_no_gradient(photographs, folder):
    counting = teacher()
    before = copy.deepcopy(counting.network.state_dict())
    cached = Cached(counting, folder, FINGERPRINT, photographs, augment=True)
    assert not cached(first_batch(photographs)).requires_grad
    trained(photographs, cached)
    assert same(counting.network.state_dict(), before)
