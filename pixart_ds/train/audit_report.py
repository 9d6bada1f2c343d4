"""The audit's answers for people."""

from __future__ import annotations

import textwrap
from typing import Any

from pixart_ds.log import si

_WIDTH = 98


def page(answer: dict[str, Any]) -> str:
    """One block for each stage, then the verdict."""
    if not answer["stages"]:
        return "no stage has begun; there is nothing to prove"
    return "\n\n".join(_block(stage) for stage in answer["stages"])


def _block(stage: dict[str, Any]) -> str:
    violation, proven = stage["violation"], stage["proven"]
    rows = [("steps", _steps(stage)), *_attempts(stage)]
    if rework := stage["rework"]["steps"]:
        rows.append(
            (
                "rework",
                f"{_count(rework, 'step')}, {_count(stage['rework']['images'], 'image')}: logged, then trained again",
            )
        )
    if stage["open_steps"]:
        rows.append(("open", f"{_count(stage['open_steps'], 'step')} after the newest checkpoint, not looked at"))
    if skipped := stage["skipped_steps"]:
        rows.append(("skipped", f"{_count(skipped, 'step')} not applied; their samples count as used"))
    if left_out := stage["left_out_steps"]:
        rows.append(("left out", f"{_count(left_out, 'step')} where training had gone wrong, as recorded"))
    if proven["steps"]:
        rows.append(("speed", f"{si(stage['samples_per_second'])} samples/s recomputed"))
    if violation is not None:
        rows += _violation(violation, stage["batch"])
    return "\n".join([f"{stage['stage']}: {_verdict(stage)}", *(line for row in rows for line in _lines(*row))])


def _lines(name: str, text: str) -> list[str]:
    """A named text, wrapped; a path stays whole, so that it can be copied."""
    parts = textwrap.wrap(text, _WIDTH, break_long_words=False, break_on_hyphens=False)
    return [f"  {label:<10}{part}" for label, part in zip([name, *[""] * (len(parts) - 1)], parts, strict=True)]


def _verdict(stage: dict[str, Any]) -> str:
    violation, proven = stage["violation"], stage["proven"]
    if violation is not None:
        return "NOT PROVEN" + (
            "" if violation["step"] is None else f", step {violation['step']} is the first violation"
        )
    if not stage["steps"]:
        return "nothing to prove yet, no checkpoint is committed"
    if proven["steps"] == stage["steps"]:
        return "proven"
    return (
        f"proven from step {proven['from_step']} to {proven['to_step']}"
        if proven["steps"]
        else "no step lies in that part"
    )


def _steps(stage: dict[str, Any]) -> str:
    proven = stage["proven"]
    many = _count(proven["images"], "image")
    if not proven["steps"]:
        return f"none of {stage['total_steps']:,} proven"
    each = f"{proven['passes']:.3g} passes over {_count(stage['samples'], 'sample')}"
    whole = proven["from_step"] == 1 and stage["violation"] is None
    visits = f", each used {_times(proven['images'], stage['samples'])}" if whole else ""
    end = "" if stage["done"] else ", the newest checkpoint" if proven["to_step"] == stage["steps"] else ""
    return f"{proven['from_step']:,} to {proven['to_step']:,} of {stage['total_steps']:,}{end}: {many}, {each}{visits}"


def _times(images: int, samples: int) -> str:
    """How often each sample was used."""
    passes, begun = divmod(images, samples)
    if passes == 0:
        return "at most once"
    least = "once" if passes == 1 else f"{passes:,} times"
    return f"{least} or once more" if begun else least


def _attempts(stage: dict[str, Any]) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    several = any(entry["launch"] != 1 for entry in stage["attempts"])
    for entry in stage["attempts"]:
        name = f"{entry['attempt']}, launch {entry['launch']}" if several else f"{entry['attempt']}"
        ranks = "ranks unknown" if entry["world_size"] is None else _count(entry["world_size"], "rank")
        counted = "nothing that counts" if entry["from_step"] is None else _span(entry["from_step"], entry["to_step"])
        again = f", {_count(entry['rework_steps'], 'step')} of rework" if entry["rework_steps"] else ""
        rows.append(("attempt" if not rows else "", f"{name:<{14 if several else 4}}{ranks:<10}{counted}{again}"))
    return rows


def _span(first: int, last: int) -> str:
    return f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"


def _violation(violation: dict[str, Any], batch: int) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    if (step := violation["step"]) is not None:
        who = "" if violation["attempt"] is None else f", attempt {violation['attempt']}, launch {violation['launch']}"
        rows.append(("violation", f"step {step:,} (images {(step - 1) * batch + 1:,} to {step * batch:,}){who}"))
        rows.append(("", violation["what"]))
    else:
        rows.append(("violation", violation["what"]))
    if violation["logged"] is not None:
        rows += [("logged", violation["logged"]), ("expected", violation["expected"])]
    return [*rows, ("where", violation["where"]), ("to do", violation["remedy"])]


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def step_table(answer: dict[str, Any]) -> str:
    """A step's samples, one in each line."""
    head = f"{answer['stage']}, step {answer['step']}: images {answer['from_image']:,} to {answer['to_image']:,}"
    lines = [head, _logged(answer)]
    lines += [f"set {number}: {path}" for number, path in enumerate(answer["sets"])]
    lines += [
        "",
        f"{'sample':>10}{'set':>5}{'part':>7}{'row':>6}{'visit':>7}{'bucket':>8}{'timestep':>10}{'dropped':>9}"
        f"  {'noise key':<18}name",
    ]
    for row in answer["samples"]:
        dropped = "yes" if row["dropped"] else "no"
        lines.append(
            f"{row['sample_id']:>10}{row['set']:>5}{row['part']:>7}{row['row']:>6}{row['visit']:>7}{row['bucket']:>8}"
            f"{row['timestep']:>10}{dropped:>9}  {row['noise_key']:<18}{row['name'] or '-'}"
        )
    return "\n".join(lines)


def _logged(answer: dict[str, Any]) -> str:
    logged = answer["logged"]
    if answer["violation"] is not None:
        return f"digest {answer['digest']}; the logs do not reach this step: {answer['violation']['what']}"
    if logged is None:
        return f"digest {answer['digest']}; no checkpoint's log holds this step yet"
    who = f"attempt {logged['attempt']}, launch {logged['launch']}" + (
        "" if logged["applied"] else ", step not applied"
    )
    if answer["proven"]:
        return f"digest {answer['digest']}, as logged by {who}"
    return f"digest {answer['digest']}, but {logged['digest']} was logged by {who}: other samples were used"
