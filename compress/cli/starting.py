"""`compress init`: from a network and images to a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compress.cli.console import messages, say, warn
from compress.progress import RichProgress


def init(
    data: Annotated[str, typer.Option(help="A folder or .zip with train/<class>/<image>, a .csv, or digits.")],
    model: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="mobilenet_v2, torchvision:NAME, timm:NAME, huggingface:NAME or module:factory."
        ),
    ] = "mobilenet_v2",
    weights: Annotated[
        str | None, typer.Option(help="A .safetensors, .pth or .pt file, or DEFAULT or pretrained: published ones.")
    ] = None,
    target: Annotated[
        str, typer.Option(help="Where files are measured: local, ssh://user@host[:port] or emulated.")
    ] = "local",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The recipe; default <model>_<data>.yaml.")] = None,
) -> None:
    """Write a commented recipe for a network and images."""
    from compress.starting import start

    made = start(
        model=model,
        data=data,
        weights=weights,
        target=target,
        path=out,
        progress=RichProgress(messages),
        base=Path.cwd(),
    )
    for line in made.text.splitlines():
        say(f"  {line}")
    for note in made.notes:
        warn("note", note)
    say(f"{made.path}: written; next: compress check {made.path}, then compress run {made.path}")
