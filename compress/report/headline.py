"""The verdict of a run in one sentence, and the figures it rests on with their conditions."""

from __future__ import annotations

from typing import Any

from compress.report import wording
from compress.report.parts import Benchmark, Conditions, NetworkFigures, Verification
from compress.report.wording import ACCURACY, NOT_MEASURED, SIMULATED, Score
from compress.targets import is_emulated


def machine(conditions: Conditions) -> dict[str, Any]:
    """Who measured the latencies, and the sentence that has to stand beside every one of them."""
    arch = conditions.arch
    looks_arm = str(arch).lower().startswith(("aarch64", "arm"))
    emulated = is_emulated(conditions.target)
    cpu = conditions.machine or conditions.cpu or "a CPU the benchmark did not name"
    if emulated:
        statement = f"{cpu[0].upper()}{cpu[1:]}: outputs are checked and instructions counted. No time was measured."
    elif conditions.emulator:
        statement = f"Timed under {conditions.emulator}, which emulates {cpu}: this is not ARM fps."
    elif conditions.is_arm and looks_arm:
        statement = f"Measured on {cpu} ({arch})."
    elif arch:
        family = "x86" if arch.lower() in ("x86_64", "amd64", "i386", "i686") else arch
        statement = f"These are {family} figures on {cpu}, not ARM fps."
    else:
        statement = f"Measured on {cpu}, architecture not recorded: do not take the figures for ARM fps."
    name = f"{cpu} ({arch})" if arch else cpu
    return {
        "cpu": cpu,
        "arch": arch,
        "is_arm": bool(conditions.is_arm and looks_arm and not emulated and not conditions.emulator),
        "emulated": emulated,
        "statement": statement,
        "conditions": ", ".join([*_threads(conditions.threads), f"batch {conditions.batch or 1}", name]),
    }


def _threads(threads: Any) -> list[str]:
    if not isinstance(threads, int):
        return []
    return ["1 thread" if threads == 1 else f"{threads} threads"]


def headline(
    networks: list[dict[str, Any]],
    parent: NetworkFigures | None,
    best: dict[str, Any] | None,
    baseline: dict[str, Any] | None,
    verification: Verification | None,
    benchmark: Benchmark | None,
    board: dict[str, Any] | None = None,
    ablation: dict[str, Any] | None = None,
    controls: tuple[dict[str, str], str] | None = None,
    score: Score = ACCURACY,
) -> dict[str, Any]:
    """The verdict in one sentence, the figures behind it with their conditions, and what must not be overlooked."""
    left = {stage["folder"]: stage["network"] for stage in networks if stage["network"]}
    final = next(reversed(left.values()), None)
    if best and best["kind"] == "parent" and final and not final["is_parent"]:
        best = baseline = None  # compressed, but only the parent was exported
    if best:
        final = left.get(best["stage"], final)  # a later stage's network has no file: the report's warnings say so
    facts = {
        "speed": _speed(best, baseline, benchmark),
        "accuracy": _accuracy(best, baseline, final, parent, score),
        "size": _size(best, baseline),
        "compute": _compute(final, parent),
        "parity": _parity(verification),
    }
    emulated = bool(benchmark and is_emulated(benchmark.conditions.target))
    if board and emulated:
        facts["speed"] = _instructions(best, board)
    if board and (board["accuracy"] or board["parity"]):
        facts["board"] = _on_target(board, emulated)
    if ablation:
        facts["ablation"] = _ablation(ablation, score)
    if controls:
        facts["controls"] = controls[0]
    last = next(reversed(left.values()), None)
    unexecuted = last["numbers"] if last and last["simulated"] else ""
    if unexecuted and not best:
        absent = f"no runtime here executes {unexecuted}"
        facts["speed"] = _fact("Speed", SIMULATED, absent)
        facts["size"] = _fact("File size", SIMULATED, f"{absent}, so no file was exported")
    compressed = (best and best["kind"] != "parent") or (final and not final["is_parent"])
    phrases = [fact["phrase"] for fact in facts.values() if fact["phrase"]]
    if unexecuted and not best:
        told = facts["accuracy"]["phrase"] or f"{score.name} not measured"
        sentence = f"{unexecuted} simulated: {told}; no file, size or speed"
    elif compressed:
        names = {"speed": "speed", "accuracy": score.name, "size": "size"}
        missing = [name for fact, name in names.items() if facts[fact]["value"] == NOT_MEASURED]
        sentence = ", ".join(phrases[:3]) or "compressed"
        sentence += f"; {' and '.join(missing)} not measured" if missing else ""
        sentence += "; speed not measured (emulated)" if emulated else ""
        if last and unexecuted:
            lost = f"{score.name} not measured" if last["difference"] is None else score.lost(last["difference"])
            sentence += f"; {unexecuted} simulated: {lost}"
        sentence += f"; {controls[1]}" if controls and controls[1] else ""
    else:
        sentence = "Nothing compressed: " + (", ".join(phrases[:3]) or "nothing measured")
    return {
        "sentence": sentence[0].upper() + sentence[1:],
        "compressed": bool(compressed),
        "file": best and best["file"],
        "baseline": baseline and baseline["file"],
        "measured": _measured(best, benchmark) if best and best["timing"] and benchmark else None,
        "facts": facts,
    }


def _fact(
    label: str, value: str, detail: str = "", condition: str = "", phrase: str = "", tone: str = ""
) -> dict[str, str]:
    """`phrase` is the fact's part of the headline; `tone` is "", "good" or "bad"."""
    return {"label": label, "value": value, "detail": detail, "condition": condition, "phrase": phrase, "tone": tone}


def _speed(best: dict[str, Any] | None, baseline: dict[str, Any] | None, benchmark: Benchmark | None) -> dict[str, str]:
    if not best or not best["timing"] or not benchmark:
        return _fact("Speed", NOT_MEASURED, "no benchmark of this network in this run")
    timing, pair, condition = best["timing"], best["pair"], _measured(best, benchmark)
    p50, fps = wording.ms(timing["p50_ms"]), wording.fps(timing["fps"])
    if not pair or not baseline or not baseline["timing"]:
        return _fact("Speed", fps, f"{p50} at p50", condition, phrase=fps)
    phrase = wording.faster(pair["speedup"], pair["interval"])
    noisy = pair["verdict"] == "NOISY"
    if pair["interval"]:
        how = f"interval {pair['interval'][0]:.2f} to {pair['interval'][1]:.2f}×"
    else:
        how = "ratio of the medians"
    before = baseline["timing"]
    return _fact(
        "Speed",
        phrase,
        f"{wording.three_digits(before['p50_ms'])} → {p50} p50, {wording.three_digits(before['fps'])} → {fps}",
        f"{how}{', NOISY' if noisy else ''}; {condition}",
        phrase=f"about {phrase}" if noisy and "no " not in phrase else phrase,
        tone="" if noisy else "good" if "faster" in phrase else "bad" if "slower" in phrase else "",
    )


def _instructions(best: dict[str, Any] | None, board: dict[str, Any]) -> dict[str, str]:
    """What an emulated core executes for one image, in place of a speed that it cannot tell."""
    own = [count for count in board["counts"] if best and count["file"] == best["file"]]
    if not own:
        return _fact("Instructions", NOT_MEASURED, "no count of this network in this run")
    per_core = [f"{wording.core(count['cpu'])} {wording.count(count['instructions'])}" for count in own]
    fewer = [
        f"{wording.core(count['cpu'])} {wording.ratio(count['fewer_cycles'])}"
        for count in own
        if count["fewer_cycles"] is not None
    ]
    estimate = f"; cycles estimated: {', '.join(fewer)} fewer than the parent" if fewer else ""
    return _fact(
        "Instructions",
        wording.count(own[0]["instructions"]),
        f"{', '.join(per_core)}; {own[0]['file']}"
        if len(own) > 1
        else f"{own[0]['file']} on {wording.core(own[0]['cpu'])}",
        f"one image, one thread, counted under emulation{estimate}",
    )


def _on_target(board: dict[str, Any], emulated: bool) -> dict[str, str]:
    """Whether the machine that measured computes what this one does."""
    label = "On emulated ARM cores" if emulated else "Outputs there and here"
    entries = [entry for entry in board["parity" if emulated else "accuracy"] if entry["exact"]]
    accuracy = [
        f"{sample['file']} {wording.percent(sample['accuracy'])}"
        for sample in board["accuracy"]
        if sample["accuracy"] is not None
    ]
    if not entries:
        condition = f"accuracy on {board['accuracy'][0]['images']:,} images there" if accuracy else ""
        return _fact(label, "no integers to compare", ", ".join(accuracy), condition)
    differing, outputs = (sum(entry[name] for entry in entries) for name in ("differing", "outputs"))
    files = ", ".join(dict.fromkeys(entry["file"] for entry in entries))
    if emulated:
        condition = ", ".join(dict.fromkeys(wording.core(entry["cpu"]) for entry in entries))
    else:
        versions = [f"{wording.runtime(entry['runtime'])} {entry['versions']}" for entry in entries]
        condition = f"{entries[0]['images']:,} images, {', '.join(dict.fromkeys(versions))}"
    return _fact(
        label,
        f"{differing:,} of {outputs:,} differ" if differing else "equal, bit for bit",
        files,
        condition,
        tone="bad" if differing else "good",
    )


def _measured(file: dict[str, Any], benchmark: Benchmark) -> str:
    """Runtime, threads, batch and machine of a file's latency."""
    conditions = benchmark.conditions
    own = conditions.model_copy(update={"threads": file["timing"]["threads"] or conditions.threads})
    version = conditions.runtimes.get(file["runtime"])
    return f"{wording.runtime(file['runtime'], version)}, {machine(own)['conditions']}"


def _accuracy(
    best: dict[str, Any] | None,
    baseline: dict[str, Any] | None,
    final: dict[str, Any] | None,
    parent: NetworkFigures | None,
    score: Score,
) -> dict[str, str]:
    measured = best if best and best["accuracy"] is not None else final
    if not measured or measured["accuracy"] is None:
        return _fact(score.title, NOT_MEASURED, "neither of a file nor of a torch network")
    accuracy, images, difference = measured["accuracy"], measured["images"], measured["difference"]
    on_file = measured is best and best["accuracy_of"] == "file"
    one = f", one is {100 / images:.2g} points" if images and score.name == "accuracy" else ""
    images_text = f"; {images:,} images{one}" if images else ""
    is_parent = measured["kind"] == "parent" if measured is best else measured["is_parent"]
    if is_parent or difference is None:
        condition = (f"measured on {best['file']}" if on_file and best else "of the torch network") + images_text
        said = score.said(accuracy)
        return _fact(score.title, said, score.suffix.strip(), condition, f"{said} {score.name}")
    if on_file and best and baseline and best["difference_from"] == baseline["file"]:
        before, condition = baseline["accuracy"], f"measured on {baseline['file']} and {best['file']}"
    elif on_file and best:
        before, condition = accuracy - difference, f"measured on {best['file']}, against the torch parent"
    else:
        before, condition = accuracy - difference, "of the torch networks, not of exported files"
    return _fact(
        score.title,
        score.change(difference),
        f"{score.said(before)} → {score.said(accuracy)}{score.suffix}",
        condition + images_text,
        phrase=score.lost(difference),
    )


def _size(best: dict[str, Any] | None, baseline: dict[str, Any] | None) -> dict[str, str]:
    if not best or best["size_bytes"] is None:
        return _fact("File size", NOT_MEASURED, "no file of this network was exported")
    size, times = wording.size(best["size_bytes"]), best["times_smaller"]
    if best["kind"] == "parent" or times is None or not baseline:
        return _fact("File size", size, best["file"], phrase=size)
    return _fact(
        "File size",
        wording.smaller(times),
        f"{wording.size(baseline['size_bytes'])} → {size}",
        f"{baseline['file']} and {best['file']}",
        phrase=wording.smaller(times),
        tone="good" if times > 1 else "bad",
    )


def _compute(final: dict[str, Any] | None, parent: NetworkFigures | None) -> dict[str, str]:
    if not final or final["macs"] is None:
        return _fact("Multiply-adds", NOT_MEASURED)
    macs, params = wording.count(final["macs"]), wording.count(final["params"])
    times = final["times_fewer_macs"]
    if final["is_parent"] or not parent or times is None:
        return _fact("Multiply-adds", macs, f"{params} parameters", "one image")
    if times == 1:
        return _fact("Multiply-adds", "unchanged", f"{macs}; {params} parameters", "one image")
    fewer_params = f"{wording.count(parent.params)} → {params} parameters" if parent.params else f"{params} parameters"
    return _fact(
        "Multiply-adds",
        f"{times:.1f}× fewer" if times > 1 else f"{1 / times:.1f}× more",
        f"{wording.count(parent.macs)} → {macs}",
        f"one image; {fewer_params}",
    )


def _parity(verification: Verification | None) -> dict[str, str]:
    label = "Parity"
    if not verification:
        return _fact(label, NOT_MEASURED, "no verify stage in this run")
    int8 = [agreement for agreement in verification.agreement if agreement.max_lsb is not None]
    detail = ""
    if int8:
        differing, logits = sum(a.differing or 0 for a in int8), sum(a.logits or 0 for a in int8)
        detail = f"{differing:,} of {logits:,} logits differ, by at most {max(a.max_lsb or 0 for a in int8)} LSB"
    elif worst := [agreement.max_abs for agreement in verification.agreement if agreement.max_abs is not None]:
        detail = f"float outputs within {max(worst):.1e}"
    parts = [f"allowed: {verification.tolerance_lsb} LSB"] if verification.tolerance_lsb is not None and int8 else []
    parts += [f"{verification.images:,} images"] if verification.images else []
    tone = "good" if verification.verdict == "PASS" else "bad"
    return _fact(label, verification.verdict, detail, ", ".join(parts), tone=tone)


def _ablation(ablation: dict[str, Any], score: Score) -> dict[str, str]:
    label = "Without distillation"
    if ablation["without"] is None:
        return _fact(label, NOT_MEASURED, "the run without a teacher did not finish")
    measured = "of the torch networks" if ablation["of"] == "torch" else f"measured on {ablation['of']}"
    images = f", {ablation['images']:,} images" if ablation["images"] else ""
    return _fact(
        label,
        f"{score.said(ablation['without'])} ({score.change(ablation['difference'])})",
        score.distilled(ablation["with"], ablation["without"]),
        f"{measured}{images}; the same training on the labels alone, one seed",
        tone="bad" if ablation["difference"] > 0 else "",
    )
