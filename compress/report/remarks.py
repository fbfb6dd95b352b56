"""What goes with the figures: what they hold for, what the stages noted, and what a reader must not overlook."""

from __future__ import annotations

from typing import Any

from compress.report import controls, wording
from compress.report.files import session
from compress.report.folder import NO_DISTILLATION, RunFolder
from compress.report.parts import Benchmark, RunDescription, Verification


def conditions(run: RunDescription) -> dict[str, str]:
    """What the run's figures hold for, by name and in words; what the run does not say is left out."""
    data, preprocess = run.data, run.preprocess
    labels = ", ".join(data.labels[:12]) + (", …" if len(data.labels) > 12 else "")
    images = [
        f"{number:,} for {use}" for number, use in ((data.train, "training"), (data.evaluation, "evaluation")) if number
    ]
    found = {
        "Recipe hash": run.recipe_hash,
        "Seed": run.seed,
        "Data": ", ".join([data.use, *images] if data.use else images),
        "Data fingerprint": data.fingerprint,
        "Classes": f"{len(data.labels)}: {labels}" if data.labels else None,
        "Input": preprocess,
        "Model": run.model,
        "Trained on": run.device,
        "Host CPU": run.cpu,
        "Threads in training": run.threads,
        "Processes in training": run.processes if run.processes != 1 else None,
        "Platform": run.platform,
        "Versions": {
            **({"compress": run.compress} if run.compress else {}),
            **({"Python": run.python} if run.python else {}),
        }
        | run.versions,
        "Started": run.started and wording.moment(run.started),
        "Time taken": None if run.seconds is None else wording.duration(run.seconds),
    }
    return {name: wording.as_text(value) for name, value in found.items() if value not in (None, "", {})}


def notes(folder: RunFolder) -> list[dict[str, Any]]:
    """What data and stages remarked, each sentence once per place."""
    found = [("data", folder.run.data.notes)]
    for stage in folder.stages:
        own = list(stage.manifest.notes)
        if isinstance(stage.metrics, (Verification, Benchmark)):
            own += stage.metrics.notes
        found.append((stage.manifest.folder, own))
    return [{"where": where, "texts": list(dict.fromkeys(texts))} for where, texts in found if texts]


def warnings(report: dict[str, Any]) -> list[str]:
    """What a reader must not overlook, most important first."""
    found = []
    if report["verify"] and report["verify"]["verdict"] != "PASS":
        found.append(
            f"Parity {report['verify']['verdict']}: exported files do not agree with the network they were made from."
            f" Do not ship them. {report['verify']['reason']}".rstrip()
        )
    of_controls = controls.warnings(report["controls"])
    lost = [sentence for sentence in of_controls if sentence.startswith(controls.LOSES)]
    found += lost
    if report["machine"] and not report["machine"]["is_arm"]:
        found.append(report["machine"]["statement"])
    noisy = [pair for pair in (report["benchmark"] or {}).get("pairs", []) if pair["verdict"] == "NOISY"]
    if noisy:
        names = ", ".join(dict.fromkeys(pair["candidate"] for pair in noisy))
        found.append(
            f"Noisy measurement ({names}): take the speed-up for a rough figure and measure again on a quiet machine."
        )
    if report["benchmark"] and report["benchmark"]["earlier"] and report["benchmark"]["rows"]:
        when = report["benchmark"]["measured"]
        found.append(
            f"The times were measured by an earlier run{f', {wording.moment(when)}' if when else ''}:"
            " this one took them over."
        )
    found += _board_warnings(report["board"])
    files = {file["file"]: file for file in report["files"]}
    best = files.get(report["headline"]["file"])
    if best and best["timing"]:
        quicker = [
            file
            for file in files.values()
            if session(file) == session(best) and file["timing"]["p50_ms"] < best["timing"]["p50_ms"]
        ]
        found += [
            f"{file['file']} is faster here than {best['file']}:"
            f" {wording.ms(file['timing']['p50_ms'])} against {wording.ms(best['timing']['p50_ms'])} at p50."
            for file in quicker
        ]
    found += [sentence for sentence in of_controls if sentence not in lost]
    judged = controls.names(report["controls"], NO_DISTILLATION)
    found += [] if judged else _ablation_warnings(report["ablation"], wording.score_of(report["run"]["data"]["task"]))
    if report["unfinished"]:
        found.append(f"Unfinished run: {', '.join(report['unfinished'])} left no result.")
    if report["stopped"]:
        found.append(_stopped(report["stopped"], report["missing"]))
    last, network = next(
        ((stage["folder"], stage["network"]) for stage in reversed(report["stages"]) if stage["network"]), (None, None)
    )
    if network and network["simulated"]:
        sentence = f"What {last} left is {network['numbers']}, simulated in training: no runtime here executes it."
        found.append(f"{sentence} There is no file of it, so no size and no latency.")
    elif last and best and best["stage"] not in (last, None):
        found.append(
            f"The network that {last} left was not exported: the headline speaks of {best['file']},"
            f" made from {best['stage']}."
        )
    return found + [f"{sentence[0].upper()}{sentence[1:]}." for sentence in report["stale"]]


def _stopped(stopped: dict[str, Any], stages: list[str]) -> str:
    """How far an unfinished run came, what stopped it, and what is missing."""
    epochs = stopped["training"][-1]["epoch"] if stopped["training"] else 0
    at = f" in {stopped['running']}" if stopped["running"] else ""
    at += f" after epoch {epochs}" if epochs else ""
    when = f" on {wording.moment(stopped['when'])}" if stopped["when"] else ""
    ended = stopped["ended"].rstrip(".")
    told = f"{ended}{at}{when}" if ended else f"it ended{at}{when} without a word, or it still runs" if at else ""
    missing = f"{', '.join(stages)} {'have' if len(stages) > 1 else 'has'} not ended"
    return (
        f"This run is not finished: {'; '.join(filter(None, (told, missing if stages else '')))}".rstrip(": ")
        + ". The same command goes on with it."
    )


def _board_warnings(board: dict[str, Any] | None) -> list[str]:
    if not board:
        return []
    found = []
    for sample in board["accuracy"]:
        if sample["exact"] and not sample["equal"]:
            largest = wording.apart(sample)
            found.append(
                f"{sample['file']} computes other outputs on the machine that measured than here:"
                f" {sample['differing']:,} of {sample['outputs']:,} differ, by at most {largest}"
                f" ({wording.runtime(sample['runtime'])} {sample['versions']})."
            )
    for entry in board["parity"]:
        if entry["exact"] and entry["differing"]:
            found.append(
                f"{entry['file']} computes other outputs on an emulated {wording.core(entry['cpu'])} than here:"
                f" {entry['differing']:,} of {entry['outputs']:,} differ, by at most {wording.apart(entry)}."
            )
    for series in board["sustained"]:
        if series["verdict"] not in (None, "OK"):
            end = f" takes {wording.ratio(series['slowdown'])} as long at the end as at the start of"
            during = f"{end if series['slowdown'] else ', during'} {wording.duration(60 * series['minutes'])}"
            found.append(f"The machine throttles: {series['file']}{during} without a pause.")
    return found


def _ablation_warnings(ablation: dict[str, Any] | None, score: wording.Score) -> list[str]:
    if not ablation:
        return []
    found = []
    if (ablation["difference"] or 0) > 0:
        counted = ablation["images"] and score == wording.ACCURACY
        images = round(ablation["difference"] * ablation["images"]) if counted else None
        size = f"{images:,} of {ablation['images']:,} images, one seed" if images is not None else "one seed"
        found.append(f"{score.distilled(ablation['with'], ablation['without'])} ({size}).")
    if not ablation["finished"] or ablation["without"] is None:
        found.append("The run without distillation did not finish: what distillation gained is not known.")
    if ablation["failed"]:
        found.append(f"Parity of the run without distillation failed: {ablation['failed']}.")
    return found
