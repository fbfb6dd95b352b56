"""Calls that could run what a file says are nowhere in our sources; those that have a safe form are used in it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCES = sorted((Path(__file__).parents[2] / "compress").rglob("*.py"))
MODULES = {
    "cPickle",
    "cloudpickle",
    "dill",
    "joblib",
    "marshal",
    "pickle",
    "shelve",
    "xmlrpc",
    "xml",
    "yaml",
    "telnetlib",
    "ftplib",
}
"""That load objects, or speak in the clear; the exceptions below say why."""
IMPORTS_ALLOWED = {
    ("models/weights.py", "pickle"),  # the exception that torch.load(weights_only=True) raises
    ("report/charts.py", "xml"),  # xml.sax.saxutils.escape
    ("sweep/joblib_engine.py", "joblib"),  # its processes are ours, and no file passes between them
}
FORBIDDEN = {
    "eval",
    "exec",
    "os.system",
    "os.popen",
    "os.execv",
    "os.execvp",
    "os.spawnl",
    "os.spawnv",
    "tempfile.mktemp",
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "marshal.loads",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "yaml.load",
    "yaml.unsafe_load",
    "torch.hub.load",
    "torch.jit.load",
    "torch.package.PackageImporter",
    "ssl._create_unverified_context",
    "os.chmod",
    "shutil.unpack_archive",
    "__import__",
    "code.interact",
    "pd.read_pickle",
    "pandas.read_pickle",
}
NEED = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False), "np.save": ("allow_pickle", False)}
"""Calls, and what they must say."""


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Every call by the dotted name of what is called."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            parts, function = [], node.func
            while isinstance(function, ast.Attribute):
                parts.append(function.attr)
                function = function.value
            if isinstance(function, ast.Name):
                yield ".".join([function.id, *reversed(parts)]), node


def faults(name: str, text: str) -> list[str]:
    """What a source of ours must not have, each with its line."""
    found = []
    tree = ast.parse(text)
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        for module in names:
            if module.partition(".")[0] in MODULES and (name, module.partition(".")[0]) not in IMPORTS_ALLOWED:
                found.append(f"{name}:{node.lineno}: imports {module}")
    for called, node in calls(tree):
        said = {word.arg: word.value for word in node.keywords}
        where = f"{name}:{node.lineno}: {called}"
        if called in FORBIDDEN:
            found.append(where)
        if called in NEED:
            word, wanted = NEED[called]
            value = said.get(word)
            if not (isinstance(value, ast.Constant) and value.value is wanted):
                found.append(f"{where} without {word}={wanted}")
        shell = said.get("shell")
        starts = called.startswith("subprocess.") or called in ("Popen", "run", "call", "check_call", "check_output")
        if starts and shell is not None and not (isinstance(shell, ast.Constant) and shell.value is False):
            found.append(f"{where} with a shell")
        if called.endswith(".extractall"):
            found.append(f"{where}: unpacks names of an archive")
        if called == "YAML" and not (isinstance(said.get("typ"), ast.Constant) and said["typ"].value == "safe"):  # type: ignore[attr-defined]
            found.append(f"{where} that is not safe") if name not in DUMPS else None
        if (called.endswith("from_pretrained") or called == "load_dataset" or called.endswith(".load_dataset")) and (
            (trust := said.get("trust_remote_code")) is not None
            and not (isinstance(trust, ast.Constant) and trust.value is False)
        ):
            found.append(f"{where} runs code of the hub")
    return found


DUMPS = {"recipe/__init__.py", "starting/recipe.py"}
"""Where ruamel.yaml writes; the test below sees that it never reads there."""


def test_no_source_of_ours_runs_what_a_file_says():
    assert len(SOURCES) > 150
    root = SOURCES[0].parents[0]
    found = [
        fault
        for path in SOURCES
        for fault in faults(path.relative_to(root).as_posix(), path.read_text(encoding="utf-8"))
    ]
    assert found == []


def test_where_yaml_is_written_none_is_read():
    root = SOURCES[0].parents[0]
    for name in DUMPS:
        path = root / name
        if path.exists():
            names = {called for called, _ in calls(ast.parse(path.read_text(encoding="utf-8")))}
            assert not any(
                called.endswith((".load", ".load_all", ".compose")) and "yaml" in called.lower() for called in names
            )


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from dill import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "eval(text)",
        "exec(text)",
        "os.system(text)",
        "subprocess.run(text, shell=True)",
        "subprocess.run(text, shell=flag)",
        "tempfile.mktemp()",
        "yaml.load(text)",
        "archive.extractall(folder)",
        "YAML()",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "np.save(path, array)",
        "import yaml",
    ],
)
def test_each_of_them_would_be_found(line):
    assert len(faults("anywhere.py", line)) >= 1


def test_their_safe_forms_are_no_faults():
    safe = (
        "torch.load(path, weights_only=True)",
        "np.load(path, allow_pickle=False)",
        "YAML(typ='safe')",
        "module.eval()",
        "subprocess.run([text], shell=False)",
        "ast.literal_eval(text)",
        "AutoModel.from_pretrained(name)",
    )
    for line in safe:
        assert faults("anywhere.py", line) == []
