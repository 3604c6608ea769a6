"""The report's tables: results in words and figures."""

from collections.abc import Sequence

from harness.measure import PROJECT
from harness.pages import Table
from harness.results import Record
from harness.verdicts import Verdict


def figure(value: float) -> str:
    """Three digits that mean something: 1,234, 56.7, 8.90, 0.0123."""
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}"
    if size >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if size >= 1 else f"{value:.3g}"


def range_of(spread: Record) -> str:
    """Median and quartiles: 1.23 (1.20 to 1.30); the median alone where they are one value."""
    if spread["low"] == spread["high"]:
        return figure(spread["median"])
    return f"{figure(spread['median'])} ({figure(spread['low'])} to {figure(spread['high'])})"


def measurements(records: Sequence[Record]) -> Table:
    """A row per case and contender, the project first."""
    rows = []
    for case, contenders in by_case(records).items():
        for record in contenders:
            first = case if record is contenders[0] else ""
            rows.append((first, record["opponent"], *_measurement(record)))
    headers = ("case", "contender", "median (quartiles)", f"{PROJECT} is … times as good", "n", "details")
    return Table(headers, rows, frozenset({2, 3, 4}))


def _measurement(record: Record) -> tuple[str, str, str, str]:
    if record["missing"]:
        return f"not measured: {record['missing']}", "", "", ""
    ratio = range_of(record["ratio"]) if record["ratio"] else ""
    return f"{range_of(record)} {record['unit']}", ratio, f"{record['n']}", _details(record)


def _details(record: Record) -> str:
    shown = {name: value for name, value in record["details"].items() if isinstance(value, int | float | str)}
    texts = (figure(value) if isinstance(value, float) else f"{value}" for value in shown.values())
    return ", ".join(f"{name} {text}" for name, text in zip(shown, texts, strict=True))


def series(records: Sequence[Record]) -> Table:
    """The points of the scaling benchmark and their exponents, by series."""
    rows = []
    previous = None
    for record in records:
        details = record["details"]
        name = details["series"] if details["series"] != previous else ""
        previous = details["series"]
        if record["unit"] == "exponent":
            error = details["standard_error"]
            spread = "" if error is None else f" ± {error:.2f}"
            rows.append((name, "exponent ± standard error", f"{record['median']:.2f}{spread}", ""))
        else:
            size = f"{details['axis']} {details['x']:,}"
            rows.append((name, size, f"{range_of(record)} {record['unit']}", f"{record['n']}"))
    return Table(("series", "size", "median (quartiles)", "n"), rows, frozenset({2, 3}))


def accuracy(records: Sequence[Record]) -> list[Table]:
    """A table per regime: errors, what they differ from the standard schedule's by, and what they cost."""
    headers = (
        "method",
        "test error, %",
        "minus the standard schedule's, points",
        "NLL",
        "seconds of training",
        "seeds",
    )
    return [
        Table(headers, [_accuracy_row(row) for row in rows], frozenset({1, 2, 3, 4, 5}))
        for rows in by_case(records).values()
    ]


def _accuracy_row(record: Record) -> tuple[str, ...]:
    details = record["details"]
    method = "snapshot ensemble (fastsnap)" if record["opponent"] == PROJECT else record["opponent"]
    difference = details["against_standard"]
    is_standard = not any(difference.values())
    return (
        method,
        interval(details["error"]),
        "" if is_standard else interval(difference, sign="+"),
        f"{details['nll']:.3f}",
        figure(details["seconds"]),
        f"{record['n']}",
    )


def interval(interval: Record, sign: str = "") -> str:
    """Mean and confidence interval: 52.10 (51.80 to 52.40)."""
    mean = f"{interval['mean']:{sign}.2f}"
    if interval["low"] is None:
        return mean
    return f"{mean} ({interval['low']:{sign}.2f} to {interval['high']:{sign}.2f})"


def gain(rows: Sequence[Record]) -> str:
    """In one sentence: what the snapshot ensemble gains in a regime."""
    (record,) = (row for row in rows if row["opponent"] == PROJECT)
    difference, n = record["details"]["against_standard"], record["n"]
    relation = "below" if difference["mean"] < 0 else "above"
    text = (
        f"{record['case']}: the snapshot ensemble's error is {abs(difference['mean']):.2f} points {relation} "
    )
    text += "the standard schedule's at equal epochs"
    if difference["low"] is None:
        return f"{text}; one seed, so no interval."
    excludes = difference["low"] > 0 or difference["high"] < 0
    return f"{text} ({n} seeds; the 95 % interval {'excludes' if excludes else 'includes'} zero)."


def by_case(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The records of each case."""
    cases: dict[str, list[Record]] = {}
    for record in records:
        cases.setdefault(record["case"], []).append(record)
    return cases


def targets(verdicts: Sequence[Verdict]) -> Table:
    """What the project set itself to reach, and what was found."""
    rows = [
        (
            verdict.target.text,
            f"{'at most' if verdict.target.at_most else 'at least'} {verdict.target.bound:g}",
            verdict.found,
            {True: "reached", False: "missed", None: "not known"}[verdict.met],
        )
        for verdict in verdicts
    ]
    return Table(("target", "bound", "found (spread)", ""), rows, frozenset({1, 2}))


def origins(records: Sequence[Record]) -> Table:
    """When, where and how each benchmark was measured; several rows for one measured piece by piece."""
    rows = {}
    for record in records:
        quick = "yes" if record["quick"] else "no"
        key = (record["benchmark"], record["commit"] or "unknown", quick, f"`{record['command']}`")
        rows[key] = record["date"][:16].replace("T", " ")
    return Table(
        ("benchmark", "commit", "quick", "command", "until (UTC)"),
        [(*key, date) for key, date in rows.items()],
    )


def machines(records: Sequence[Record]) -> list[str]:
    """A line for each machine and set of versions."""
    lines = []
    for record in records:
        machine = record["machine"]
        parts = [machine["cpu"], f"{machine['cores']} cores, {machine['threads']} threads"]
        parts += [machine["gpu"] or "no GPU", machine["system"]]
        parts += [f"{name}={value}" for name, value in machine["settings"].items()]
        parts += [f"{name} {version}" for name, version in record["versions"].items()]
        lines.append(", ".join(parts))
    return list(dict.fromkeys(lines))
