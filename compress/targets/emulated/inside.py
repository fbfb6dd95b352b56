"""Runs in the emulated Python: does one inference at a time between two marks that `counter.c` sees.

    python inside.py AGENT MODEL RUNTIME [--inputs X.npy] [--windows 3]
    python inside.py AGENT LIST.json RUNTIME --each

Prints one JSON object. With `--each` the list names models, and each has a window and a file of counts of its own. It
knows of `compress` only the agent, which opens the model as it does on a board.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.util
import json
import sys
from collections.abc import Callable
from typing import Any

MARK = 0x434D5052
BEGIN, END, WRITE = 1, 2, 3
WARM_UP = 10
"""Calls before the first window. Runtimes allocate and choose their kernels in the first two; Python specialises the
functions that it calls from the eighth call on (3.11), and until then takes a thousand instructions more for each."""

syscall = ctypes.CDLL(None).syscall
syscall.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_long]


def empty(array: Any) -> None:
    """What calling a function costs Python."""


def window(function: Callable[[Any], Any] | None, array: Any, blocks_too: int) -> None:
    """One call between two marks, or, without a function, nothing: what the marks themselves cost."""
    if function is None:
        syscall(MARK, BEGIN, blocks_too)
        syscall(MARK, END, 0)
    else:
        syscall(MARK, BEGIN, blocks_too)
        function(array)
        syscall(MARK, END, 0)


FEW = 3
"""Warm-up calls of each of many models: Python's part is the same in all of them, and what counts is differences."""


def each(agent: Any, names: list[str], runtime: str) -> str:
    """One window for every model, written out under its number from 1 on; the version of the runtime."""
    gc.disable()
    version = ""
    for number, name in enumerate(names, start=1):
        model = agent.open_model(name, runtime, 1)
        array, version = agent.random_input(model.input), model.version
        for _ in range(FEW):
            window(model.infer, array, 0)
        syscall(MARK, WRITE, len(names) + 1)  # forget them
        window(model.infer, array, 1)
        syscall(MARK, WRITE, number)
    return version


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("agent", "model", "runtime"):
        parser.add_argument(name)
    parser.add_argument("--inputs")
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--each", action="store_true")
    given = parser.parse_args()

    spec = importlib.util.spec_from_file_location("agent", given.agent)
    assert spec is not None
    assert spec.loader is not None
    agent = importlib.util.module_from_spec(spec)
    sys.modules["agent"] = agent
    spec.loader.exec_module(agent)
    import numpy as np

    try:
        if given.each:
            with open(given.model, encoding="utf-8") as file:
                version = each(agent, json.load(file), given.runtime)
            print(json.dumps({"runtime": given.runtime, "version": version}))
            return
        model = agent.open_model(given.model, given.runtime, 1)
        array = (
            model.feed(np.load(given.inputs, allow_pickle=False)[0])
            if given.inputs
            else agent.random_input(model.input)
        )
    except agent.AgentError as error:
        sys.exit(f"agent: error: {error}")
    for _ in range(WARM_UP):
        model.infer(array)
        empty(array)
        window(None, array, 0)
        window(empty, array, 0)
    gc.collect()
    gc.disable()  # a collection inside a window would be counted
    for function in (None, empty, model.infer):
        for index in range(given.windows):
            window(function, array, int(function is model.infer and index == given.windows - 1))
    syscall(MARK, WRITE, 0)
    print(json.dumps({"runtime": model.runtime, "version": model.version, "windows": given.windows}))


if __name__ == "__main__":
    main()
