"""The images a network learns from and is judged by: one file per source, one loader for all.

To add a source: its file with a settings class and a function that lists its images for `gathered.opened`, its line in
`DataSettings` and in `open_data`, one test.
"""

from pathlib import Path
from typing import Annotated

from pydantic import Discriminator, Tag

from compress.data.cifar import Cifar, open_cifar
from compress.data.csv import Csv, open_csv
from compress.data.digits import Digits, open_digits
from compress.data.factory import FactoryData, open_factory
from compress.data.folder import Folder, open_folder
from compress.data.huggingface import HuggingFace, open_huggingface
from compress.product import Data, Preprocess
from compress.progress import Progress
from compress.settings import named_or_own

SOURCES = ("folder", "csv", "cifar", "huggingface", "digits")


DataSettings = Annotated[
    Annotated[Folder, Tag("folder")]
    | Annotated[Csv, Tag("csv")]
    | Annotated[Cifar, Tag("cifar")]
    | Annotated[HuggingFace, Tag("huggingface")]
    | Annotated[Digits, Tag("digits")]
    | Annotated[FactoryData, Tag("factory")],
    Discriminator(
        named_or_own(SOURCES),
        custom_error_type="no_such_data",
        custom_error_message=f"known: {', '.join(SOURCES)}, or package.module:function for your own",
    ),
]


def open_data(
    settings: Folder | Csv | Cifar | HuggingFace | Digits | FactoryData,
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
        case Folder():
            return open_folder(settings, preprocess, progress, base, checked)
        case Csv():
            return open_csv(settings, preprocess, progress, base, checked)
        case Cifar():
            return open_cifar(settings, preprocess, progress, base, checked)
        case HuggingFace():
            return open_huggingface(settings, preprocess, progress, base, checked)
        case Digits():
            return open_digits(settings, preprocess)
        case FactoryData():
            return open_factory(settings, preprocess, progress, base, checked)
