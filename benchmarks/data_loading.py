"""Whether loading keeps up with training: what an image costs to load and to train on, by source, size and threads.

    python benchmarks/data_loading.py ../shared/data/imagenette_112px.zip --size 96
    python benchmarks/data_loading.py ../shared/data/imagenette_112px.zip --size 96 --enlarge 1000 750

The folder or archive is that of the recipe's `folder` source. `--enlarge` makes large photographs of some of its images
first (JPEG, quality 90, a little noise so that they are as hard to decode as a camera's). CPU milliseconds count all
threads of the process and hardly depend on what else the machine does; images per second do. The step is forward,
backward and SGD of MobileNetV2 at batch 64, channels_last, float32.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # a thread that waits in a loop would count as CPU time

import argparse
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from compress.data import Folder, open_data
from compress.data.loader import ImageData, spread
from compress.models import build
from compress.models.mobilenet_v2 import MobileNetV2Settings
from compress.product import Batch, Data, Preprocess
from compress.progress import Silent

BATCH = 32


def enlarged(source: ImageData, folder: Path, size: tuple[int, int], count: int) -> Path:
    """A folder of `count` training images and a fifth of that for evaluation, of all classes, each of `size` pixels."""
    rng = np.random.default_rng(0)
    for images, place, most in ((source.train, "train", count), (source.evaluation, "val", count // 5)):
        for number in spread(images.targets, max(most, len(source.labels)), 0).tolist():
            grown = np.asarray(images.read(number, None).resize(size, Image.Resampling.BICUBIC), np.int16)
            noisy = grown + rng.normal(0, 8, (*grown.shape[:2], 1)).astype(np.int16)
            where = folder / place / str(images.targets[number])
            where.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(where / f"{number}.jpg", quality=90)
    return folder


def cost(work: Callable[[], Iterator[int]]) -> tuple[float, float]:
    """CPU milliseconds an image, and images per second, of the images that `work` counts."""
    cpu, began, images = time.process_time(), time.perf_counter(), 0
    for done in work():
        images += done
    return 1000 * (time.process_time() - cpu) / images, images / (time.perf_counter() - began)


def loading(data: Data, most: int) -> Callable[[], Iterator[int]]:
    def work() -> Iterator[int]:
        seen = 0
        for batch in data.batches("train", batch_size=BATCH, augment=True, shuffle=True):
            yield len(batch.labels_N)
            seen += len(batch.labels_N)
            if seen >= most:
                return

    return work


def stepping(size: int, classes: int, steps: int) -> Callable[[], Iterator[int]]:
    network = build(MobileNetV2Settings(use="mobilenet_v2"), classes, size).train()
    network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, fused=True)
    batch = Batch(
        torch.randn(64, 3, size, size).contiguous(memory_format=torch.channels_last), torch.arange(64) % classes
    )

    def work() -> Iterator[int]:
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(network(batch.images_NCHW), batch.labels_N).backward()
            optimizer.step()
            yield 64

    list(work())
    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--images", type=int, default=1600)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--enlarge", type=int, nargs=2, metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--steps", type=int, default=4)
    arguments = parser.parse_args()
    preprocess = Preprocess(size=arguments.size)
    with tempfile.TemporaryDirectory() as made:
        os.environ["XDG_CACHE_HOME"] = f"{made}/cache"
        path = arguments.path
        if arguments.enlarge:
            small = open_data(Folder(use="folder", path=str(path)), preprocess, Silent(), Path.cwd())
            path = enlarged(small, Path(made) / "photos", tuple(arguments.enlarge), min(arguments.images, 320))
        first = open_data(Folder(use="folder", path=str(path)), preprocess, Silent(), Path.cwd())
        most = min(arguments.images, first.count("train") // BATCH * BATCH)
        load = os.getloadavg()[0]
        print(f"{platform.machine()}, {os.cpu_count()} cores, load {load:.1f}, torch threads {torch.get_num_threads()}")
        print("| what | CPU ms/image | images/s |\n|---|---|---|")
        for cache in ("none", "decoded"):
            for workers in arguments.workers:
                settings = Folder(use="folder", path=str(path), workers=workers, cache=cache)
                data = open_data(settings, preprocess, Silent(), Path.cwd(), first.fingerprint)
                if cache == "decoded" and workers == arguments.workers[0]:
                    ms, rate = cost(loading(data, most))
                    print(f"| filling the cache, {workers} workers | {ms:.2f} | {rate:.0f} |", flush=True)
                ms, rate = cost(loading(data, most))
                print(f"| cache {cache}, {workers} workers | {ms:.2f} | {rate:.0f} |", flush=True)
        kept = [file for file in Path(made, "cache").rglob("*") if file.is_file()]
        size_mb = sum(file.stat().st_size for file in kept) / 1e6
        print(f"| cache holds | {size_mb / max(1, len(kept)):.2f} MB/image | |")
        ms, rate = cost(stepping(arguments.size, len(first.labels), arguments.steps))
        print(f"| training step | {ms:.2f} | {rate:.0f} |")


if __name__ == "__main__":
    main()
