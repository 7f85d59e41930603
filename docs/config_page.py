"""docs/config.md, made from the dataclasses of opendet_jax/config.py and the comments beside their fields.

python docs/config_page.py           # writes the page
python docs/config_page.py --check   # fails where the page is not what it would write
"""

import ast
import dataclasses
import inspect
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from opendet_jax import config
from opendet_jax.config import CLIPTextConfig, Config, DatasetPaths

PAGE = Path(__file__).with_name("config.md")
HEAD = """# Configuration

Every field of a config, with its default: the paper's Swin-T model and recipe. A file in `configs/` changes some of
them; `--config.<field>=<value>` changes one on the command line. [method.md](method.md) explains the letters.

This page is made from `opendet_jax/config.py` by `make config-page`.
"""


def comments(source: str) -> dict[tuple[str, str], str]:
    """(class, field) → the comment after the field or, where it is long, on the lines above it."""
    lines = source.splitlines()
    return {
        (cls.name, field.target.id): _comment(lines, field)
        for cls in ast.parse(source).body
        if isinstance(cls, ast.ClassDef)
        for field in cls.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    }


def _comment(lines: list[str], field: ast.AnnAssign) -> str:
    assert field.end_lineno is not None
    assert field.end_col_offset is not None
    after = lines[field.end_lineno - 1].encode()[field.end_col_offset :].decode()  # ast counts bytes
    if "#" in after:
        return after.partition("#")[2].strip()
    above = []
    for line in reversed(lines[: field.lineno - 1]):
        if not line.strip().startswith("#"):
            break
        above.append(line.strip("# "))
    return " ".join(reversed(above))


COMMENTS = comments(inspect.getsource(config))


def section(cls: type, title: str, prefix: str = "") -> Iterator[str]:
    """A heading, the class's own words and a table; then the same of each section in it."""
    yield f"\n## {title}\n"
    if not (cls.__doc__ or "").startswith(f"{cls.__name__}("):  # what dataclasses write of themselves
        yield inspect.cleandoc(cls.__doc__ or "") + "\n"
    kinds, inner = typing.get_type_hints(cls), []
    rows = []
    for field in dataclasses.fields(cls):
        kind, name = kinds[field.name], f"{prefix}{field.name}"
        if dataclasses.is_dataclass(kind) and kind is not DatasetPaths:
            inner.append((kind, name))
            continue
        what = COMMENTS[cls.__name__, field.name]
        if not what:
            sys.exit(f"opendet_jax/config.py: {cls.__name__}.{field.name} has no comment that says what it is")
        rows.append(f"| `{name}` | {_default(field, kind)} | {_kind(kind)} | {what.replace('|', '&#124;')} |")
    if rows:
        yield "\n".join(("| field | default | kind | what it is |", "|---|---|---|---|", *rows, ""))
    for kind, name in inner:
        yield from section(kind, f"`{name}`", f"{name}.")


def _default(field: Any, kind: Any) -> str:
    if kind is DatasetPaths:
        return "none"
    if field.default == "":
        return "empty"
    return f"`{field.default}`"


def _kind(kind: Any) -> str:
    """A type as a reader would say it."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return " or ".join(f"`{choice}`" for choice in inner)
    if origin is tuple:
        if inner[-1] is Ellipsis:
            return "data sets" if inner[0] is DatasetPaths else f"a row, each {_kind(inner[0])}"
        return " and ".join(map(_kind, inner))
    names = {int: "whole number", float: "number", bool: "True or False", str: "text", DatasetPaths: "data set"}
    return names[kind]


def page() -> str:
    return (
        "\n".join(
            (
                HEAD.rstrip("\n"),
                *section(Config, "The run"),
                *section(DatasetPaths, "A data set", "data.train."),
                "`data.eval` and each entry of `data.mixture` have the same fields.\n",
                *section(CLIPTextConfig, "CLIP's text tower"),
                "These are read off converted weights; no config names them.",
            )
        )
        + "\n"
    )


def main() -> None:
    if sys.argv[1:] == ["--check"]:
        if not PAGE.exists() or PAGE.read_text() != page():
            sys.exit(f"{PAGE}: is not what opendet_jax/config.py says; `make config-page` writes it anew")
    elif sys.argv[1:]:
        sys.exit(__doc__)
    else:
        PAGE.write_text(page())
        print(f"written to {PAGE}")


if __name__ == "__main__":
    main()
