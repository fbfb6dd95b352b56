"""The documentation as a whole: every page can be found, every link leads somewhere, every command line parses."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from compress import cli

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("**/*.md"))]
GROUP = typer.main.get_command(cli.app)
FENCE = re.compile(r"^```[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
OPERATORS = {">", ">>", "|", "&&", "||", ";", "2>", "&"}


def links(text: str) -> list[str]:
    """Targets of links outside blocks of code."""
    return re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", FENCE.sub("", text))


def anchors(page: Path) -> set[str]:
    """As GitHub names headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def command_lines(text: str) -> list[list[str]]:
    """The words behind `compress` of each line of a block that calls it."""
    found = []
    for block in FENCE.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            at = re.match(r"(?:\s*(?:\$ |[A-Z_]+=\S+ |torchrun .*?|\S*bin/(?=compress)))*compress (?=\S)", line)
            if at is None:
                continue
            words = shlex.split(line[at.end() :], comments=True)
            ends = [words.index(operator) for operator in OPERATORS if operator in words]
            found.append(words[: min(ends, default=len(words))])
    return found


def test_every_page_is_linked_from_the_readme():
    readme = ROOT / "README.md"
    linked = {(ROOT / target.partition("#")[0]).resolve() for target in links(readme.read_text())}
    assert len(PAGES) > 12
    assert not [page.relative_to(ROOT) for page in PAGES if page != readme and page.resolve() not in linked]
    assert (ROOT / "LICENSE").read_text().lstrip().startswith("Apache License")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    for target in links(page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        assert file.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_line_parses(page):
    text = page.read_text()
    for words in command_lines(text):
        if words[0] in ("...", "--help"):
            continue
        command = GROUP.commands.get(words[0])
        assert command is not None, words
        if "--help" not in words:
            command.make_context(words[0], [word for word in words[1:] if word != "..."])
    for said in re.findall(r"`compress ((?!\.)[^`]+)`", FENCE.sub("", text)):
        name, *words = said.split()
        command = GROUP.commands.get(name.rstrip(",;."))
        assert command is not None or name.startswith("-"), said
        known = (
            {option for param in command.params for option in param.opts + param.secondary_opts} if command else set()
        )
        for word in words:
            option = word.partition("=")[0]
            assert not option.startswith("-") or option in known | {"--help"}, said


def test_the_lines_are_found_and_a_wrong_one_is_refused():
    lines = [
        "$ OMP_NUM_THREADS=1 compress run a.yaml --spee 3  # fast",
        "torchrun --n 2 .venv/bin/compress run b.yaml > c",
    ]
    text = "```\n" + "\n".join(lines) + "\n```\n"
    assert command_lines(text) == [["run", "a.yaml", "--spee", "3"], ["run", "b.yaml"]]
    with pytest.raises(Exception, match="--spee"):
        GROUP.commands["run"].make_context("run", ["a.yaml", "--spee", "3"])
    assert sum(len(command_lines(page.read_text())) for page in PAGES) > 40
