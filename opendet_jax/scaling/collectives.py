"""What devices tell each other in a compiled program: its text, read."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) (?:\(.*)?.*\{$")
_CALL = re.compile(r"(body|condition|to_apply|calls|\w+_computations?)=(\{[^}]*\}|%?[\w.\-]+)")
_NAME = re.compile(r"%?([\w.\-]+)")
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_ARRAY = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")
# Devices that speak to each other: {{0,1},{2,3}}, or [groups,size]<=…, or axes of a mesh: mesh['a'=2,'b'=4] {'b'}.
_GROUPS = re.compile(
    r"replica_groups=(?:\{\}|\{\{(?P<listed>[\d,]+)\}|\[\d+,(?P<size>\d+)\]"
    r"|mesh\[(?P<mesh>[^]]*)\].*? \{(?P<axes>[^}]*)\})"
)
_AXIS = re.compile(r"'([^']+)'(?::\(\d+\)(\d+))?")  # a part of one: 'a':(before)size
_BITS = re.compile(r"\d+$")


class Array(NamedTuple):
    """The type of an array in a program's text."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        bits = _BITS.search(self.dtype)
        return math.prod(self.shape) * (max(8, int(bits[0])) if bits else 8) // 8


class Collective(NamedTuple):
    """One instruction. In a loop it is carried out once a round; how many rounds there are a program does not say."""

    kind: str
    results: tuple[Array, ...]  # on each device
    group: int  # devices that take part
    in_loop: bool

    @property
    def bytes(self) -> int:
        """Of its larger side, on a device: of what is summed, gathered, scattered or sent."""
        size = sum(array.bytes for array in self.results)
        return size * self.group if self.kind == "reduce-scatter" else size

    @property
    def sent(self) -> float:
        """Bytes that a device must send at least: those of a ring."""
        if self.kind == "collective-permute":
            return float(self.bytes)
        share = (self.group - 1) / self.group
        return self.bytes * share * (2 if self.kind == "all-reduce" else 1)


def collectives(program: str, devices: int) -> list[Collective]:
    """Those of a program's text in which more than one of its `devices` take part."""
    bodies, calls, loops = _read(program)
    inside = _reached(loops, calls)
    found = []
    for name, lines in bodies.items():
        for line in lines:
            match = _COLLECTIVE.search(line)
            if match:
                kind, started = match[2], bool(match[3])
                group = _group(line, devices) if kind != "collective-permute" else 2
                if group > 1:
                    found.append(Collective(kind, _results(match[1], kind, started), group, name in inside))
    return found


def summary(found: Sequence[Collective]) -> dict[str, dict[str, int | float]]:
    """Of each kind the number of instructions, how many of them are in loops, and their bytes on a device."""
    kinds = {kind: [c for c in found if c.kind == kind] for kind in KINDS}
    return {
        kind: {
            "count": len(these),
            "in_loops": sum(c.in_loop for c in these),
            "bytes": sum(c.bytes for c in these),
            "bytes_sent": sum(c.sent for c in these),
        }
        for kind, these in kinds.items()
        if these
    }


def _read(program: str) -> tuple[dict[str, list[str]], dict[str, set[str]], set[str]]:
    """Of a program's text: the lines of each computation, which others each one uses, and the bodies of loops."""
    bodies: dict[str, list[str]] = {}
    calls: dict[str, set[str]] = {}
    loops: set[str] = set()
    name = ""
    for line in program.splitlines():
        if line.endswith("{") and not line.startswith(" ") and (match := _COMPUTATION.match(line)):
            name = match[1]
            bodies[name], calls[name] = [], set()
        elif name:
            bodies[name].append(line)
            for how, names in _CALL.findall(line):
                used = set(_NAME.findall(names))
                calls[name] |= used
                if how in ("body", "condition"):
                    loops |= used
    return bodies, calls, loops


def _reached(start: set[str], calls: Mapping[str, set[str]]) -> set[str]:
    found, waiting = set(), list(start)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += calls.get(name, ())
    return found


def _results(text: str, kind: str, started: bool) -> tuple[Array, ...]:
    arrays = tuple(_arrays(text))
    if started and kind in ("all-gather", "reduce-scatter"):
        return arrays[len(arrays) // 2 :]  # operands, then results
    if started and kind == "collective-permute":
        return arrays[1:2]
    return arrays


def _arrays(text: str) -> Iterator[Array]:
    text = re.sub(r"\{[^{}]*\}", "", text)  # layouts
    for dtype, shape in _ARRAY.findall(text):
        yield Array(dtype, tuple(int(size) for size in shape.split(",") if size))


def _group(line: str, devices: int) -> int:
    if "replica_groups=" not in line:
        return devices
    match = _GROUPS.search(line)
    if not match:
        raise ValueError(f"a form of replica groups that is not known: {line.partition('replica_groups=')[2][:200]}")
    if match["mesh"] is not None:
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match["mesh"])}
        return math.prod(int(part) if part else sizes[name] for name, part in _AXIS.findall(match["axes"]))
    if match["listed"] is not None:
        return len(match["listed"].split(","))
    return int(match["size"]) if match["size"] else devices
