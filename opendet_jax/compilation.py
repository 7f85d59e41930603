"""How programs are compiled, and kept on disk, so that only the first run of a config waits for the compiler."""

import ctypes
import hashlib
import os
import pickle
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable
from tqdm import tqdm

_HANDED_OVER = "xla_cpu_experimental_ynn_fusion_type"
MONTH = 30 * 24 * 3600  # seconds
MANY = 100_000_000  # parameters: the paper's models have 295 million and more, that of scenes 5


def enable_cache() -> None:
    """Keeps compiled programs in ~/.cache/opendet_jax, unless JAX_COMPILATION_CACHE_DIR names another folder.

    jax does; those of `StoredProgram` are in the folder programs/ there.
    """
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "opendet_jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def compiler_options(platform: str, trains: bool = False, params: Any = None) -> dict[str, str]:
    """Of `jax.jit` for a program of the model, forward or, where it `trains` (`params`), of thousands of operations.

    On CPUs XLA hands products and sums to a library, YNN. With jax 0.11.2 the first call of a backward pass gave one
    product with wrong rows, and the second, of the same arguments, the right ones (docs/install.md): from jax 0.11 on
    nothing goes there. Before, sums do not in training, for XLA looks for each of what is handed over among all
    operations when it loads a program from disk: the full training step's in 69 s, with products alone in about 43.
    Neither do products where the parameters are many: of small ones YNN is the faster, of large ones it is not, and
    the full step is loaded in 51 s instead of 68 (docs/benchmarks.md).
    """
    if platform != "cpu":
        return {}
    if jax.__version_info__ >= (0, 11) or _size(params) >= MANY:
        return {_HANDED_OVER: ""}
    return {_HANDED_OVER: "LIBRARY_FUSION_TYPE_DOT"} if trains else {}


def _size(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def give_back_memory() -> None:
    """To the kernel, what compiling a program has used and glibc keeps: as much again as a small run needs."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim:
        trim(0)


class StoredProgram:
    """`jax.jit(function)` for processes that compute little: what is compiled is read from disk without being traced.

    jax's own cache is asked with a program that is traced and lowered, which takes a small model several times as long
    as reading it (docs/first_steps.md#seconds). Here what a program depends on is told instead: `of`, the text of all
    that `function` holds; its arguments' shapes; jax's options; this package's sources, the versions of jax, Flax and
    NumPy; the processor.

    It is `jax.jit`, with jax's cache, where `of` is None, without a folder for programs (`enable_cache`) that can be
    written to, and on GPUs and TPUs.
    """

    def __init__(self, function: Callable[..., Any], of: str | None = None):
        """`function` of trees of arrays, and of keywords for which it is compiled anew."""
        self._function = function
        self._of = of and f"{function.__qualname__} of {of}"
        self._jits: dict[Any, Any] = {}
        self._programs: dict[Any, Callable[..., Any]] = {}

    def __call__(self, *arrays: Any, **static: Any) -> Any:
        leaves, tree = jax.tree.flatten(arrays)
        key = tree, tuple(map(_kind, leaves)), tuple(sorted(static.items())), _options()
        if key not in self._programs:
            self._programs[key] = self._program(key, self._jitted(tree, static), leaves)
        return self._programs[key](*leaves)

    def _jitted(self, tree: Any, static: dict[str, Any]) -> Any:
        """Of the leaves of its arguments: a file needs to know no other tree than that of the results."""
        key = tree, tuple(sorted(static.items()))
        if key in self._jits:
            return self._jits[key]

        def of_leaves(*leaves: Any) -> Any:
            return self._function(*tree.unflatten(leaves), **static)

        of_leaves.__name__ = self._function.__name__  # which profiles show
        return self._jits.setdefault(key, jax.jit(of_leaves, compiler_options=compiler_options(jax.default_backend())))

    def _program(self, key: Any, jitted: Any, leaves: list[Any]) -> Callable[..., Any]:
        folder = _folder() if self._of else None
        surroundings = _surroundings() if folder else None
        if not folder or not surroundings:
            return jitted
        file = folder / hashlib.sha256(repr((self._of, key, surroundings)).encode()).hexdigest()
        program = _read(file)
        if program is None and _can_be_written(folder):
            program = _compile(jitted, leaves, file)
        return program or jitted

    def lower(self, *arrays: Any, **static: Any) -> jax.stages.Lowered:
        leaves, tree = jax.tree.flatten(arrays)
        return self._jitted(tree, static).lower(*leaves)

    def count(self) -> int:
        """Programs that have been called."""
        return len(self._programs)


def _kind(leaf: Any) -> tuple[Any, ...]:
    return getattr(leaf, "shape", ()), getattr(leaf, "dtype", type(leaf)), getattr(leaf, "weak_type", None)


def _options() -> tuple[tuple[str, Any], ...]:
    return tuple((name, value) for name, value in jax.config.values.items() if "cache" not in name)


def _folder() -> Path | None:
    folder = jax.config.values["jax_compilation_cache_dir"]
    is_kept = folder and "://" not in folder and jax.config.values["jax_enable_compilation_cache"]
    return Path(folder, "programs") if is_kept and sys.platform == "linux" and jax.default_backend() == "cpu" else None


def _sources() -> str | None:
    """Their hash; None where the package has been installed without them."""
    package, found = Path(__file__).parent, hashlib.sha256()
    files = sorted(package.rglob("*.py"))
    for file in files:
        found.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes())
    return found.hexdigest() if files else None


# Now, for files may change while the process lives.
_SOURCES = _sources()


@cache
def _surroundings() -> str | None:
    """What programs of this process depend on: the code, and the machine that it is compiled for. None: not known."""
    try:
        versions = sys.version_info, [version(name) for name in ("jax", "jaxlib", "flax", "numpy")]
        processors = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except (OSError, PackageNotFoundError):
        return None
    # x86 says "flags", ARM "Features"; XLA divides the work among the cores that the process may use.
    features = {line for line in processors if line.startswith(("model name", "flags", "Features", "CPU part"))}
    cores = len(os.sched_getaffinity(0)), len(jax.devices())
    machine = sorted(features), cores, os.environ.get("XLA_FLAGS")
    return repr((_SOURCES, versions, machine)) if _SOURCES and features else None


def _read(file: Path) -> Callable[..., Any] | None:
    """None where there is none, undamaged and of this user: it is code, which is not taken from others."""
    try:
        with file.open("rb") as opened:
            content, owner = opened.read(), os.fstat(opened.fileno()).st_uid
        if owner != os.getuid() or hashlib.sha256(content[32:]).digest() != content[:32]:
            return None
        with suppress(OSError):
            os.utime(file)  # it has been used
        stored = pickle.loads(content[32:])
        return serialize_executable.deserialize_and_load(*stored, execution_devices=jax.devices()[:1])
    except (OSError, ValueError, pickle.PickleError, jax.errors.JaxRuntimeError):
        return None


def _can_be_written(folder: Path) -> bool:
    there = next(place for place in (folder, *folder.absolute().parents) if os.path.exists(place))
    return os.access(there, os.W_OK)


_COMPILING = threading.Lock()


def _compile(jitted: Any, leaves: list[Any], file: Path) -> Callable[..., Any]:
    """The program, which `file` then holds if it took, tracing included, as long as what jax's cache keeps.

    It stays out of jax's cache: what jax has read from there cannot be written again
    (findings/jax_serialize_cached_program.sh).
    """
    option, hits = "jax_persistent_cache_min_compile_time_secs", []

    def note(event: str, **_: Any) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            hits.append(event)

    with _COMPILING:
        least = jax.config.values[option]
        jax.config.update(option, float("inf"))
        jax.monitoring.register_event_listener(note)
        start = time.monotonic()
        try:
            program = jitted.lower(*leaves).compile()
        finally:
            jax.monitoring.unregister_event_listener(note)
            jax.config.update(option, least)
    if not hits and time.monotonic() - start >= least:
        _write(program, file)
    return program


def _write(program: jax.stages.Compiled, file: Path) -> None:
    """Whole or not at all, and instead of what nobody has used for a month: each version has programs of its own."""
    if _sources() != _SOURCES:
        return
    try:
        content = pickle.dumps(serialize_executable.serialize(program))
    except Exception:  # some cannot be, those that call back into Python for one, and each in its own way
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        for other in file.parent.iterdir():
            with suppress(OSError):  # another process has removed it
                if other.stat().st_mtime < time.time() - MONTH:
                    other.unlink()
        with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as part:
            try:
                part.write(hashlib.sha256(content).digest() + content)
                part.flush()
                os.replace(part.name, file)
            except OSError:
                os.unlink(part.name)
                raise
    except OSError as error:
        warnings.warn(f"{file.parent}: a compiled program cannot be kept there: {error}", stacklevel=2)


class CompilingFirst(tqdm):
    """A bar of work whose first piece waits for the compiler: rate and time left are those of the pieces after it."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, smoothing=0, postfix="compiling", **options)

    def update(self, n: int | float | None = 1) -> bool | None:
        if self.n or self.disable:
            return super().update(n)
        self.n += n or 0
        self.initial, self.start_t = self.n, time.time()  # its own clock
        self.set_postfix_str("")
        return True
