"""The images a network learns from and is judged by: one file per source, one loader for all.

To add a source: its file with a settings class and a function that returns an `ImageData`, its line in
`DataSettings` and in `open_data`, one test.
"""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from compress.data.digits import Digits, open_digits
from compress.data.folder import Folder, open_folder
from compress.product import Data, Preprocess
from compress.progress import Progress

DataSettings = Annotated[Digits | Folder, Field(discriminator="use")]


def open_data(
    settings: Digits | Folder,
    preprocess: Preprocess,
    progress: Progress,
    base: Path,
    checked: str | None = None,
) -> Data:
    """The recipe's data, with every image known to be readable.

    A relative path of the recipe starts at `base`. `checked` is the fingerprint of data that was opened before:
    where it still holds, the images are hashed but not decoded again. Raises DataError, naming the file.
    """
    match settings:
        case Digits():
            return open_digits(settings, preprocess)
        case Folder():
            return open_folder(settings, preprocess, progress, base, checked)
