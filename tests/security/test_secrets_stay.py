"""Secrets of the environment, passwords in addresses and tokens reach no log, report, manifest or message."""

import json
import logging

import pytest

from compress.errors import CompressError, RecipeError
from compress.shown import one_line, visible, without_secrets
from compress.written import write_json

VALUE = "Zq9-very-secret-value"
NAMES = (
    "HF_TOKEN",
    "AWS_SECRET_ACCESS_KEY",
    "DB_PASSWORD",
    "MLFLOW_TRACKING_PASSWORD",
    "GITHUB_TOKEN",
    "OPENAI_API_KEY",
    "my_api_key",
    "SSH_PASSPHRASE",
    "BASIC_AUTH",
    "GOOGLE_CREDENTIALS",
    "WANDB_API_KEY",
)


@pytest.mark.parametrize("name", NAMES)
def test_a_secret_of_the_environment_is_masked_in_every_message(name, monkeypatch):
    monkeypatch.setenv(name, VALUE)
    error = CompressError(f"https://host/{VALUE}", f"refused {VALUE}", f"give {VALUE}")
    assert VALUE not in str(error)
    assert "***" in str(error)
    assert VALUE not in str(RecipeError([f"recipe.yaml:1: model.args.token: {VALUE}"]))


@pytest.mark.parametrize("name", ["SSH_AUTH_SOCK", "XAUTHORITY", "HOME", "LANG"])
def test_what_is_no_secret_stays(name, monkeypatch):
    monkeypatch.setenv(name, "/run/user/1000/something")
    assert without_secrets("/run/user/1000/something else") == "/run/user/1000/something else"


def test_short_values_blot_nothing_out(monkeypatch):
    monkeypatch.setenv("USE_AUTH", "true")
    assert without_secrets("it is true") == "it is true"


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("ssh://user:hunter2@host:22", "ssh://user:***@host:22"),
        ("pip --index https://me:p%40ss@host/simple failed", "pip --index https://me:***@host/simple failed"),
        ("https://:token@host/", "https://:***@host/"),
        ("token hf_abcdefghijklmnopqrstuvwx is wrong", "token hf_*** is wrong"),
        ("ghp_0123456789abcdefghijABCDEFGHIJ", "ghp_***"),
        ("ssh://user@host:22", "ssh://user@host:22"),
        ("00:11:22 at 5@x", "00:11:22 at 5@x"),
    ],
)
def test_passwords_and_tokens_are_known_by_their_form(text, masked):
    assert without_secrets(text) == masked
    assert one_line(text) == masked


def test_values_of_json_files_are_masked_and_their_keys_stay(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", VALUE)
    write_json(
        tmp_path / "run.json",
        {"command": f"compress run x --token {VALUE}", "notes": [VALUE], "deep": {"a": {"b": VALUE}}},
    )
    text = (tmp_path / "run.json").read_text()
    assert VALUE not in text
    assert json.loads(text)["deep"]["a"]["b"] == "***"


def test_a_run_with_a_secret_leaves_it_nowhere(tmp_path, monkeypatch, capsys):
    """In the command, in an argument of the network, in what the user's code says and raises: all files, all output."""
    import shlex
    import sys

    from compress.cli import main
    from compress.report import write_report

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", VALUE)
    (tmp_path / "mynet.py").write_text(
        "from torch import nn\n"
        "def net(num_classes, token=''):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, num_classes))\n"
        "def broken(num_classes, token=''):\n"
        "    raise RuntimeError(f'no access with {token}')\n"
    )
    recipe = f"""
name: leak
model: {{use: "mynet:net", args: {{token: "{VALUE}"}}}}
data: {{use: digits}}
preprocess: {{size: 8}}
stages:
  - {{use: train, epochs: 1, batch_size: 512}}
"""
    (tmp_path / "recipe.yaml").write_text(recipe)
    (tmp_path / "broken.yaml").write_text(recipe.replace("mynet:net", "mynet:broken"))
    for name, wanted in (("recipe.yaml", 0), ("broken.yaml", 1)):
        monkeypatch.setattr(
            sys, "argv", ["compress", "run", name, "--out", f"runs/{name}", f"model.args.token={VALUE}"]
        )
        assert VALUE in shlex.join(sys.argv)
        with pytest.raises(SystemExit) as ended:
            main()
        assert (ended.value.code or 0) == wanted
    write_report(tmp_path / "runs" / "recipe.yaml")
    said = capsys.readouterr()
    assert VALUE not in said.out
    assert VALUE not in said.err
    assert "***" in said.err
    found = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert any(path.name == "report.html" for path in found)
    holding = {path.name for path in found if VALUE.encode() in path.read_bytes()}
    assert holding <= {"structure.json", "weights.safetensors"}  # how to call the user's factory again
    logging.shutdown()


def test_text_of_others_is_shown_without_what_a_terminal_obeys():
    assert visible("\x1b[2J\x07\x9b31m\u202eabc\udc80") == "\\x1b[2J\\x07\\x9b31m\\u202eabc\\udc80"
    assert visible("Straße 東京 \t\n|") == "Straße 東京 \t\n|"
    assert str(CompressError("a\nb", "c\x1b[31m")) == "a b: c\\x1b[31m"
