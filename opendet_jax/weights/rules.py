"""One engine for weight conversion, both ways: a table of rules, and one error that lists all it does not cover.

A rule pairs a PyTorch name with a path in our tree (slashes separate modules). `{i}` in both stands for the same
number. Several names may share a path: tensors that a checkpoint lists more than once, which must then be equal.
Path None names a tensor that no output depends on, and `why` says what it is.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from opendet_jax.errors import WeightsError

Shape = tuple[int, ...]
LISTED = 40  # names in an error message, of each kind
FLOATS = ("float16", "bfloat16", "float32", "float64")


class Layout(NamedTuple):
    """How an array lies on either side: our array from theirs, and theirs from ours."""

    ours: Callable[[np.ndarray], np.ndarray]
    theirs: Callable[[np.ndarray], np.ndarray]


def _same(x: np.ndarray) -> np.ndarray:
    return x


SAME = Layout(_same, _same)
LINEAR = Layout(np.transpose, np.transpose)  # (out, in) ↔ (in, out)
CONV = Layout(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))  # (out, in, h, w) ↔ (h, w, in, out)


class Part(NamedTuple):
    """Theirs is one of several equal pieces of ours, along its last axis."""

    number: int
    count: int


WHOLE = Part(0, 1)


class Rule(NamedTuple):
    name: str
    path: str | None
    layout: Layout = SAME
    part: Part = WHOLE
    why: str = ""  # where path is None


def dead(why: str, names: Iterable[str]) -> tuple[Rule, ...]:
    """Rules for tensors that no output depends on. `why`: what they are."""
    return tuple(Rule(name, None, why=why) for name in names)


class Place(NamedTuple):
    """Where a name's array goes in our tree."""

    path: str | None
    layout: Layout
    part: Part


def _pattern(template: str) -> re.Pattern[str]:
    pieces = re.split(r"\{(\w+)\}", template)
    names, seen, text = pieces[1::2], set(), re.escape(pieces[0])
    for name, rest in zip(names, pieces[2::2], strict=True):
        text += (rf"(?P={name})" if name in seen else rf"(?P<{name}>\d+)") + re.escape(rest)
        seen.add(name)
    return re.compile(text)


class Rules:
    """A table of rules, ready to be asked in both directions. The first rule that matches a name decides."""

    def __init__(self, rules: Iterable[Rule]):
        self.rules = tuple(rules)

    @cached_property
    def _by_name(self) -> list[tuple[re.Pattern[str], Rule]]:
        return [(_pattern(rule.name), rule) for rule in self.rules]

    @cached_property
    def _by_path(self) -> list[tuple[re.Pattern[str], Rule]]:
        return [(_pattern(rule.path), rule) for rule in self.rules if rule.path is not None]

    def _first(self, name: str) -> tuple[re.Match[str], Rule] | None:
        """The first rule that matches a name."""
        return next(((match, rule) for pattern, rule in self._by_name if (match := pattern.fullmatch(name))), None)

    def place(self, name: str) -> Place:
        """Where the first rule for `name` puts it. Raises KeyError if there is none."""
        found = self._first(name)
        if found is None:
            raise KeyError(name)
        match, rule = found
        path = rule.path.format(**match.groupdict()) if rule.path is not None else None
        return Place(path, rule.layout, rule.part)

    def left_out(self, names: Iterable[str]) -> dict[str, list[str]]:
        """Those of the names that no output depends on, by what they are."""
        out: dict[str, list[str]] = {}
        for name in names:
            found = self._first(name)
            if found is not None and found[1].path is None:
                out.setdefault(found[1].why, []).append(name)
        return out

    def names(self, path: str) -> list[tuple[str, Layout, Part]]:
        """Every name under which a checkpoint of theirs holds (a part of) the array at `path`."""
        found = []
        for pattern, rule in self._by_path:
            match = pattern.fullmatch(path)
            if match:
                name = rule.name.format(**match.groupdict())
                if self.place(name).path == path:
                    found.append((name, rule.layout, rule.part))
        return found

    def to_ours(self, source: Mapping[str, np.ndarray], wanted: Mapping[str, Shape]) -> dict[str, Any]:
        """Our nested tree, float32, of exactly the `wanted` paths.

        Raises WeightsError that lists every name without a rule or a place, every path without a name, every pair of
        shapes that differ, and every array that is not of finite floats.
        """
        pieces: dict[str, dict[int, np.ndarray]] = {}
        layouts: dict[str, tuple[int, str]] = {}
        problems = _Problems()
        for name, value in source.items():
            try:
                path, layout, part = self.place(name)
            except KeyError:
                problems.unused.append(f"{name} {tuple(value.shape)}")
                continue
            if path is None:
                continue
            if path not in wanted:
                problems.unused.append(f"{name} {tuple(value.shape)}: the model has no {path}")
                continue
            value = np.asarray(value)
            if value.dtype.name not in FLOATS:
                problems.numbers.append(f"{name} is {value.dtype.name}: a quantised file?")
                continue
            value = layout.ours(value)
            before = pieces.setdefault(path, {}).get(part.number)
            if before is not None and not _equal(before, value):
                problems.unequal.append(f"{name} and {layouts[path][1]}, which both are {path}")
            pieces[path].setdefault(part.number, value)
            layouts.setdefault(path, (part.count, name))
        filled = {}
        for path, shape in wanted.items():
            found, count = pieces.get(path, {}), layouts.get(path, (1, ""))[0]
            if len(found) < count or not found:
                names = [name for name, _, part in self.names(path) if part.number not in found]
                problems.missing.append(f"{path} {shape}, in theirs {names[0] if names else '(no rule)'}")
                continue
            value = found[0] if count == 1 else np.concatenate([found[n] for n in range(count)], axis=-1)
            if value.shape != shape:
                problems.shapes.append(f"{layouts[path][1]} is {value.shape} in our layout, {path} is {shape}")
                continue
            with np.errstate(over="ignore"):  # float64 beyond float32: infinite, and said
                filled[path] = np.ascontiguousarray(value, np.float32)
            if not np.isfinite(filled[path]).all():
                problems.numbers.append(f"{layouts[path][1]} holds NaN or infinity")
        problems.raise_if_any()
        return nested(filled)

    def to_theirs(self, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """All names and arrays, in their layout, that our tree gives; shared tensors under each of their names.

        Raises WeightsError for a parameter of ours that has no name there.
        """
        state, nameless = {}, []
        for path, value in flat(params).items():
            names = self.names(path)
            if not names:
                nameless.append(path)
            for name, layout, part in names:
                piece = np.split(np.asarray(value), part.count, axis=-1)[part.number]
                # safetensors writes an array's memory as it lies: a transposed view would come back scrambled.
                state[name] = np.ascontiguousarray(layout.theirs(piece))
        if nameless:
            raise WeightsError(f"{len(nameless)} parameters have no name in that layout:\n  " + "\n  ".join(nameless))
        return state


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and (a.__array_interface__ == b.__array_interface__ or np.array_equal(a, b))


class _Problems:
    """Everything wrong with a source, for one message."""

    def __init__(self):
        self.unused: list[str] = []
        self.missing: list[str] = []
        self.shapes: list[str] = []
        self.unequal: list[str] = []
        self.numbers: list[str] = []

    def raise_if_any(self) -> None:
        parts = []
        for title, lines in (
            ("names that nothing uses", self.unused),
            ("parameters that nothing fills", self.missing),
            ("arrays of another shape", self.shapes),
            ("tensors that should be one but differ", self.unequal),
            ("arrays that are not finite floats", self.numbers),
        ):
            if lines:
                rest = [f"… and {len(lines) - LISTED} more"] if len(lines) > LISTED else []
                parts.append(f"{len(lines)} {title}:\n  " + "\n  ".join([*lines[:LISTED], *rest]))
        if parts:
            raise WeightsError("these weights do not fit the model\n" + "\n".join(parts))


def flat(params: Mapping[str, Any]) -> dict[str, Any]:
    """Our nested tree as path → array."""
    leaves: Any = flatten_dict(dict(params), sep="/")
    return leaves


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flat`."""
    return unflatten_dict(dict(leaves), sep="/")


def shapes_of(params: Mapping[str, Any]) -> dict[str, Shape]:
    """The `wanted` of `Rules.to_ours`: path → shape of every parameter of a (possibly abstract) tree."""
    return {path: tuple(leaf.shape) for path, leaf in flat(params).items()}


def dense(name: str, path: str) -> tuple[Rule, ...]:
    return Rule(f"{name}.weight", f"{path}/kernel", LINEAR), Rule(f"{name}.bias", f"{path}/bias")


def convolution(name: str, path: str) -> tuple[Rule, ...]:
    return Rule(f"{name}.weight", f"{path}/kernel", CONV), Rule(f"{name}.bias", f"{path}/bias")


def norm(name: str, path: str) -> tuple[Rule, ...]:
    return Rule(f"{name}.weight", f"{path}/scale"), Rule(f"{name}.bias", f"{path}/bias")


def self_attention(name: str, path: str) -> tuple[Rule, ...]:
    """Query, key and value projections are packed, in this order, into one."""
    return (
        Rule(f"{name}.in_proj_weight", f"{path}/in_proj/kernel", LINEAR),
        Rule(f"{name}.in_proj_bias", f"{path}/in_proj/bias"),
        *dense(f"{name}.out_proj", f"{path}/out_proj"),
    )


def deformable_attention(name: str, path: str) -> tuple[Rule, ...]:
    parts = ("value_proj", "sampling_offsets", "attention_weights", "output_proj")
    return tuple(rule for part in parts for rule in dense(f"{name}.{part}", f"{path}/{part}"))
