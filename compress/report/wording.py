"""Figures in words, the same in the page, the table and the terminal. None is "not measured", never a zero."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from compress.targets.agent import UNAVAILABLE
from compress.tasks import RULES

NOT_MEASURED = "not measured"

SIMULATED = "simulated"
"""In place of size and latency of a network that no runtime here executes."""

RUNTIMES = {"onnxruntime": "ONNX Runtime", "litert": "LiteRT", "ncnn": "ncnn"}

KINDS = {"float16": "float16 weights", "int8_weights": "int8 weights"}
"""Kinds of files whose name is not all that is to say; they compute in float32."""


def kind(name: str) -> str:
    return KINDS.get(name, name)


def percent(fraction: float | None) -> str:
    return NOT_MEASURED if fraction is None else f"{100 * fraction:.1f}%"


def uncounted(pair: dict[str, Any]) -> str:
    """In place of a count of outputs that differ: rounded weights and what was trained are compared by decisions."""
    return "decisions compared" if pair["kind"] in ("int8", *KINDS) else NOT_MEASURED


def decibels(value: float | None) -> str:
    """Of a signal over its error; None is no error."""
    return "exact" if value is None else f"{value:.1f} dB"


def agreement(fraction: float | None) -> str:
    """Never rounded up to 100%."""
    if fraction is None or fraction in (0, 1):
        return NOT_MEASURED if fraction is None else f"{100 * fraction:.0f}%"
    return f"{min(100 * fraction, 99.99):.2f}%"


def points(difference: float | None) -> str:
    """A difference of two accuracies (fractions) in percentage points, with its sign."""
    if difference is None:
        return NOT_MEASURED
    text = f"{100 * difference:+.1f}".replace("-", "\N{MINUS SIGN}")
    return "0.0 points" if float(f"{100 * difference:.1f}") == 0 else f"{text} points"


@dataclass(frozen=True)
class Score:
    """How the score of a task is worded; the figures go by the name `accuracy`, whatever they are."""

    name: str = "accuracy"
    percent: bool = True

    @property
    def title(self) -> str:
        return self.name[0].upper() + self.name[1:]

    @property
    def suffix(self) -> str:
        """Behind an accuracy, as people write it."""
        return " top-1" if self.name == "accuracy" else ""

    def said(self, value: float | None) -> str:
        if self.percent or value is None:
            return percent(value)
        return f"{value:.3f}".replace("-", "\N{MINUS SIGN}")

    def change(self, difference: float | None) -> str:
        """A difference of two scores, with its sign."""
        if self.percent or difference is None:
            return points(difference)
        return f"{difference:+.3f}".replace("-", "\N{MINUS SIGN}")

    def lost(self, difference: float) -> str:
        """`0.4 points lost`, `0.012 of R2 lost`."""
        if difference == 0:
            return f"{self.name} unchanged"
        word, some = ("lost" if difference < 0 else "gained"), "" if self.name == "accuracy" else f" of {self.name}"
        if not self.percent:
            amount = f"{abs(difference):.3f}"
            return f"{'less than 0.001' if amount == '0.000' else amount}{some} {word}"
        amount = f"{abs(100 * difference):.1f}"
        return f"{'less than 0.1 points' if amount == '0.0' else f'{amount} points'}{some} {word}"

    def distilled(self, with_it: float, without: float) -> str:
        """What distillation did to the score, in a sentence without its stop; a loss is called one."""
        if with_it == without:
            return f"Distillation changed nothing: {self.said(with_it)} with and without it"
        word = "gained" if with_it > without else "lost"
        amount = self.lost(with_it - without).removesuffix(" gained").removesuffix(" lost")
        return f"Distillation {word} {amount}: {self.said(without)} without it, {self.said(with_it)} with it"


ACCURACY = Score()


def score_of(task: str) -> Score:
    """Of a run's task; a run that says nothing known of it classified."""
    rules = next((rules for name, rules in RULES.items() if name == task), RULES["classification"])
    return Score(rules.score_name, rules.percent)


def output(value: float | None, fraction: bool) -> str:
    """A figure of one output: a percentage, or four digits in the unit of the data."""
    if fraction or value is None:
        return percent(value)
    return f"{value:.4g}".replace("-", "\N{MINUS SIGN}")


def ms(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{three_digits(value)} ms"


def fps(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{three_digits(value)} fps"


def ratio(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:.2f}×"


def size(size_bytes: float | None) -> str:
    """Decimal units: 1 MB is 1,000,000 bytes."""
    if size_bytes is None:
        return NOT_MEASURED
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size_bytes >= factor:
            return f"{three_digits(size_bytes / factor)} {unit}"
    return f"{size_bytes:.0f} B"


def count(number: float | None) -> str:
    """`94.0 M`: three digits and a decimal unit; numbers below ten thousand in full."""
    if number is None:
        return NOT_MEASURED
    for least, factor, unit in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if number >= least:
            return f"{three_digits(number / factor)} {unit}"
    return f"{number:,.0f}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return NOT_MEASURED
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def moment(text: str) -> str:
    """An ISO time without its seconds; anything else as it is."""
    try:
        return datetime.fromisoformat(text).strftime("%Y-%m-%d %H:%M %Z").strip()
    except ValueError:
        return text


def label(number: int, labels: list[str]) -> str:
    """What a class is called; its number where the run does not say."""
    return labels[number] if number < len(labels) else f"class {number}"


def sure(confidence: float) -> str:
    """Whole percents, never rounded up to 100."""
    return f"{min(100 * confidence, 99.9):.0f}%" if confidence < 0.995 else ("100%" if confidence == 1 else "over 99%")


def came(stage: dict[str, Any]) -> str:
    """Whether a stage ran for this report or an earlier result served, and from when that is."""
    if not stage["resumed"]:
        return "ran"
    word = "measured earlier" if stage["stage"] == "benchmark" else "taken from an earlier run"
    return f"{word}, {moment(stage['finished'])}" if stage["finished"] else word


def runtime(name: str | None, version: object = None) -> str:
    label = RUNTIMES.get(name or "", name or NOT_MEASURED)
    return f"{label} {version}" if version and version != UNAVAILABLE else label


def faster(speedup: float, interval: tuple[float, float] | list[float] | None = None) -> str:
    """`3.4× faster`, `4% slower`, or that no difference was measured (the interval holds 1)."""
    if interval and interval[0] <= 1 <= interval[1]:
        return "no measurable change in speed"
    return _compared(speedup, "faster", "slower", "no change in speed")


def smaller(times: float) -> str:
    return _compared(times, "smaller", "larger", "no change in size")


ATTACKS = {"fgsm": "FGSM", "pgd": "PGD"}

GROUPS = {
    "answers": "Answers",
    "confidence": "Confidence",
    "corruptions": "Corrupted images",
    "attacks": "Attacks",
    "invariance": "Mirrored and moved",
}

MEASURES = {
    "accuracy": "Accuracy",
    "agreement": "Same answer as the teacher",
    "agreement_on_mistakes": "Same answer where the teacher errs",
    "kl": "KL divergence from the teacher",
    "js": "Jensen-Shannon divergence from the teacher",
    "ece": "Expected calibration error",
    "nll": "Negative log-likelihood of the label",
    "brier": "Brier score",
    "corrupted_accuracy": "Accuracy on corrupted images, mean of all",
    "corrupted_agreement": "Same answer as the teacher on corrupted images",
    "jpeg": "JPEG",
    "invariance_to_flips": "Same answer to the mirrored image",
    "invariance_to_shifts": "Same answer to moved crops",
}

OF_ATTACKS = {
    "accuracy": "Accuracy under {}",
    "transfer_accuracy": "Accuracy under the other network's {}",
    "agreement": "Same answer as the teacher under its {}",
    "of_teacher_fools_student": "Fooled by {} that fools the teacher",
    "of_student_fools_teacher": "Its {} fools the teacher too",
}


def measure(name: str) -> str:
    """What a figure of a stage `knowledge` says."""
    attack, _, what = name.partition("_")
    if attack in ATTACKS and what in OF_ATTACKS:
        return OF_ATTACKS[what].format(ATTACKS[attack])
    return MEASURES.get(name, name.replace("_", " ").capitalize())


def group(name: str) -> str:
    return GROUPS.get(name, name)


def looked_at(found: dict[str, Any]) -> str:
    """How many images the figures of a stage `knowledge` are of, and what was done to them."""
    parts = ["The teacher is the network before compression"]
    parts += [f"{found['images']:,} evaluation images"] if found["images"] else []
    if found["severities"] and any(row["group"] == "corruptions" for row in found["measures"]):
        severities = ", ".join(map(str, found["severities"]))
        parts.append(f"corruptions at severity {severities} of 5")
    if found["attack_images"]:
        bound = f", pixels moved by at most {found['eps_255ths']:g}/255" if found["eps_255ths"] else ""
        parts.append(f"{found['attack_images']:,} of them attacked{bound}")
    missing = [row for row in found["measures"] if row["name"] == "agreement_on_mistakes" and row["images"]]
    parts += [f"the teacher errs on {row['images']:,}" for row in missing]
    return "; ".join(parts) + "."


def figure(value: float | None, unit: str) -> str:
    """A measure in its unit. None is "no such image": nothing was fooled, or the teacher erred nowhere."""
    if value is None:
        return "no such image"
    if unit == "fraction":
        return percent(value)
    return f"{value:.3f} {unit}" if unit == "nats" else f"{value:.3f}"


def change(value: float | None, unit: str) -> str:
    """A difference of two such measures, with its sign."""
    if value is None:
        return "no such image"
    if unit == "fraction":
        return points(value)
    text = f"{value:+.3f}".replace("-", "\N{MINUS SIGN}")
    return "0.000" if float(f"{value:.3f}") == 0 else text


def as_text(value: Any) -> str:
    """A setting or condition as a reader would write it: no quotes, no braces."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{key} {as_text(item)}" for key, item in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(as_text, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def core(name: str) -> str:
    """`cortex-a72` as Arm writes it."""
    return "-".join(part.capitalize() for part in name.split("-"))


def apart(entry: dict[str, Any]) -> str:
    """How far two runs of a file are from each other at most."""
    if entry["max_lsb"] is not None:
        return f"{entry['max_lsb']} LSB"
    return NOT_MEASURED if entry["max_difference"] is None else f"{entry['max_difference']:.2g}"


def span(ends: list[float] | None, unit: str) -> str:
    """From least to most of a series; None where the machine did not tell."""
    if ends is None:
        return UNAVAILABLE
    low, high = (f"{end:,.0f}" for end in ends)
    return f"{low} {unit}" if low == high else f"{low} to {high} {unit}"


def _compared(times: float, more: str, less: str, same: str) -> str:
    word, times = (more, times) if times >= 1 else (less, 1 / times)
    if times < 1.005:
        return same
    if times < 1.1:  # "1.0× faster" would say nothing
        return f"{100 * (times - 1):.0f}% {word}"
    return f"{times:.1f}× {word}" if times < 99.5 else f"{times:.0f}× {word}"


def three_digits(value: float | None) -> str:
    if value is None:
        return NOT_MEASURED
    if value >= 99.95:
        return f"{value:,.0f}"
    if value >= 9.995:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 0.0995 else f"{value:.2g}"
