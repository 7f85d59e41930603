"""Where the time of the full training step goes: seconds of its threads by part, as XLA's profiler saw one step.

    python -m benchmarks.parts [--objects 10] [--tokens 5]

Each operation of the compiled program bears the name of the module that it was traced in; its seconds are those that
it ran itself, on whatever thread. A profile takes some time of its own: ratios count, not the sum.
"""

import argparse
import gzip
import json
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

# Part and what its operations' names hold, the first that fits. "Backward" is what bears "transpose".
PARTS = (
    ("language model", "name_generator"),
    ("distiller", "distiller"),
    ("aligners", "aligner"),
    ("backbone", "backbone"),
    ("neck", "neck"),
    ("encoder", "encoder/"),
    ("query selection", "query_selection"),
    ("decoder", "decoder/"),
    ("matching and losses", "jvp"),
    ("clipping, AdamW, norms", "train_step"),
    ("scores, suppression", "_second_half"),
)


def part_of(name: str) -> str:
    part = next((part for part, held in PARTS if held in name), "copies and the like, without a name")
    return f"{part}, backward" if "transpose(" in name else part


def named_operations(program: str) -> dict[str, str]:
    """From the text of a compiled program: the name each instruction was traced under."""
    found = re.finditer(r'^\s*(?:ROOT )?%?(\S+) = .*?op_name="([^"]*)"', program, re.MULTILINE)
    return {match[1]: match[2] for match in found}


def own_durations(events: Iterable[dict[str, Any]]) -> list[tuple[dict[str, Any], float]]:
    """Of each event, the seconds without those of the events that lie within it, on its thread; by thread and time."""
    threads = defaultdict(list)
    for event in events:
        threads[event["pid"], event["tid"]].append(event)
    found = []
    for thread in threads.values():
        open_events: list[int] = []  # places in `found`
        for event in sorted(thread, key=lambda event: (event["ts"], -event["dur"])):
            while open_events and _end(found[open_events[-1]][0]) <= event["ts"]:
                open_events.pop()
            if open_events:
                around, seconds = found[open_events[-1]]
                found[open_events[-1]] = (around, seconds - event["dur"] / 1e6)
            open_events.append(len(found))
            found.append((event, event["dur"] / 1e6))
    return found


def _end(event: dict[str, Any]) -> float:
    return event["ts"] + event["dur"]


def own_seconds(events: Iterable[dict[str, Any]]) -> Counter[str]:
    """Those of all events of a name together."""
    seconds: Counter[str] = Counter()
    for event, own in own_durations(events):
        seconds[event["name"]] += own
    return seconds


def traced(run: Callable[[], Any]) -> list[dict[str, Any]]:
    """What XLA's profiler saw in one `run`: events with a beginning, "ts", and a duration, "dur", in microseconds."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True, profiler_options=options):
            run()
        [file] = Path(folder).rglob("perfetto_trace.json.gz")
        trace = json.loads(gzip.decompress(file.read_bytes()))
    events = trace if isinstance(trace, list) else trace["traceEvents"]
    return [event for event in events if event.get("ph") == "X"]


def profile(run: Callable[[], Any], program: str) -> Counter[str]:
    """Seconds of one `run` by part; `program` is the text of what it runs."""
    names, parts = named_operations(program), Counter()
    # Instructions have a number or "fusion" in their names; the rest are the executor's and Python's own.
    for name, seconds in own_seconds(traced(run)).items():
        if name in names or re.fullmatch(r"[a-z_]*(fusion|copy|dot|broadcast|reduce|while)[\w.-]*", name):
            parts[part_of(names.get(name, ""))] += seconds
    return parts


def table(parts: Counter[str]) -> str:
    total = sum(parts.values())
    rows = [f"| {part} | {seconds:.2f} | {seconds / total:.0%} |" for part, seconds in parts.most_common()]
    return "\n".join(["| part | seconds of threads | share |", "|---|---|---|", *rows])


def main() -> None:
    from benchmarks.training_step import full_step

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", type=int, default=10, help="in the image (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=5, help="of each name (default: %(default)s)")
    arguments = parser.parse_args()
    run, program, _ = full_step(arguments.objects, arguments.tokens)
    run()  # what happens once only
    print(table(profile(run, program.as_text())))


if __name__ == "__main__":
    main()
