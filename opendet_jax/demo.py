"""A page in the browser: a picture in, boxes with names out. It needs gradio, the extra "demo".

    opendet demo --workdir=runs/scenes_tiny        python -m opendet_jax.demo --workdir runs/scenes_tiny

Nothing leaves the machine unless --host says so, and what was dropped is deleted when the page ends.
"""

import argparse
import base64
import io
import os
import socket
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from opendet_jax import __version__
from opendet_jax.config import PredictConfig
from opendet_jax.data.pixels import MAX_PIXELS, ImageError, decode
from opendet_jax.data.scene_drawing import draw_scene
from opendet_jax.data.transforms import choose, evaluation_geometry
from opendet_jax.drawing import draw
from opendet_jax.errors import InputError

if TYPE_CHECKING:
    from opendet_jax.predict.detections import Detections
    from opendet_jax.predict.detector import Detector

PROGRAM = "python -m opendet_jax.demo"
DEFAULTS = PredictConfig()
SCENES, SEED = 8, 3  # drawn examples
MOST_EXAMPLES = 24  # of a folder
THUMBNAIL, SHOWN = 240, 1200  # pixels of the longer side; all pictures are shown at one size, so that names are legible
SENTENCE = "Finds the objects in a picture and names them itself, without a list of names to choose from."
COMPILING = "compiling for pictures of this size: a minute the first time …"
EMPTY = "<div class=empty>The boxes and their names come here.</div>"
CSS = """
.gradio-container {max-width: 1180px !important; margin: 0 auto !important}
.html-container {padding: 0 !important}
#examples .grid-wrap {min-height: 0; padding-top: 30px}
#examples .grid-container {grid-template-columns: repeat(4, 1fr); grid-auto-rows: auto; padding: 0}
#examples .thumbnail-lg {width: 100%; height: auto; aspect-ratio: 1}
#status {min-height: 24px}
.refused {color: #d93025}
.empty {padding: 150px 0; text-align: center; border: 1px dashed var(--border-color-primary); border-radius: 6px}
.picture {position: relative; display: inline-block; line-height: 0}
.picture img {max-width: 100%; max-height: 720px; border-radius: 6px}
.object {position: absolute; outline: none}
.object:hover, .object:focus-visible {box-shadow: 0 0 0 3px #fff, 0 0 0 4px #0009; background: #ffffff30}
.object:hover .card, .object:focus-visible .card {display: block}
.card {display: none; position: absolute; width: max-content; max-width: 320px; margin: 7px 0; padding: 8px 12px;
  border-radius: 6px; background: #1c1c20f0; color: #fff; font-size: 14px; line-height: 1.5; pointer-events: none}
.card * {display: block}
.objects {width: 100%; margin: 12px 0; border-collapse: collapse; font-size: 14px; text-align: left}
.objects :is(th, td) {padding: 6px 10px 6px 0; border-bottom: 1px solid var(--border-color-primary)}
.number {white-space: nowrap; font-variant-numeric: tabular-nums}
#result a {color: var(--link-text-color)}
"""
Pixels: TypeAlias = UInt8[np.ndarray, "h w 3"]
Example: TypeAlias = tuple[str, Path | Pixels, Image.Image]  # name, source, thumbnail


def parser(program: str = PROGRAM) -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog=program, description="A page in the browser: a picture in, boxes and names out.")
    model = "a run's folder, one of converted weights, hf://user/model, or what comes along: scenes_tiny (default)"
    top.add_argument("--workdir", default="scenes_tiny", metavar="DIR", help=model)
    top.add_argument("--checkpoint", type=int, default=-1, metavar="STEP", help="default: the newest")
    reach = "where to listen; default: 127.0.0.1, for this machine alone; 0.0.0.0: for all who can reach it"
    top.add_argument("--host", default="127.0.0.1", help=reach)
    top.add_argument("--port", type=int, help="default: 7860, or the next that is free")
    shown = f"pictures to choose from: the first {MOST_EXAMPLES} of a folder"
    top.add_argument("--examples", type=Path, metavar="DIR", help=shown)
    return top


def main(arguments: Sequence[str] | None = None, program: str = PROGRAM) -> None:
    """`program`: what help and errors call it."""
    options = parser(program).parse_args(arguments)
    if find_spec("gradio") is None:
        sys.exit("error: the page needs gradio: pip install 'opendet_jax[demo]'")
    print(f"opendet_jax {__version__}: loading {options.workdir} for a page in the browser", flush=True)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # nothing here needs PyTorch
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # what is too large, data.max_pixels says
    try:
        check_address(options.host, options.port)
        examples = find_examples(options.examples) if options.examples else []
        from opendet_jax.predict.detector import load

        serve(load(options.workdir, options.checkpoint), [*examples, *drawn_examples()], options.host, options.port)
    except (InputError, OSError) as error:  # OSError: gradio's, where no port is free
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr, flush=True)
        os._exit(1)  # Python itself would wait for the detection that is under way


def check_address(host: str, port: int | None) -> None:
    """Raises InputError where nothing can listen there, before a model is loaded."""
    try:
        if port is not None and not 0 < port < 2**16:
            raise InputError(f"--port={port} is not between 1 and {2**16 - 1}")
        socket.create_server((host, port or 0)).close()
    except OSError as error:
        raise InputError(f"--host={host}" + (f" --port={port}" if port else "") + f": {error}") from error


def drawn_examples() -> list[Example]:
    drawn = [draw_scene(SEED, "val", number, 128)[0] for number in range(SCENES)]
    return [(f"scene_{number}", pixels, _resized(pixels, THUMBNAIL)) for number, pixels in enumerate(drawn)]


def find_examples(folder: Path) -> list[Example]:
    """The first pictures of a folder; what cannot be read is counted. Raises InputError where there is no picture."""
    try:
        files = sorted(path for path in folder.iterdir() if path.is_file())
    except OSError as error:
        raise InputError(f"--examples: {folder} cannot be listed: {error.strerror}") from error
    examples: list[Example] = []
    refused: list[str] = []
    for path in files:
        try:
            if len(examples) < MOST_EXAMPLES:
                examples.append((path.name, path, _resized(read(path), THUMBNAIL)))
        except ImageError as error:
            refused.append(str(error))
    if not examples:
        raise InputError(f"--examples: there is no picture in {folder}, which holds {len(files)} files")
    if refused:
        print(f"left out: {len(refused)} files of {folder}, as {refused[0]}", file=sys.stderr)
    return examples


def read(source: Path | Pixels, max_pixels: int = MAX_PIXELS) -> Pixels:
    """As `Detector.detect` reads a file. Raises ImageError, which names it without its folder."""
    return source if isinstance(source, np.ndarray) else np.array(decode(source, source.name, max_pixels).image)


def serve(detector: "Detector", examples: Sequence[Example], host: str, port: int | None) -> None:
    """Shows the page until Ctrl-C."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # nothing leaves the machine
    proxied = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    os.environ["no_proxy"] = f"{proxied},{host},localhost"  # gradio calls its own address
    with tempfile.TemporaryDirectory(prefix="opendet_demo.", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # what was dropped goes with the page
        page = build(detector, examples)
        from gradio.themes import Default  # pyright: ignore[reportMissingImports]

        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            theme=Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            css=CSS,
            footer_links=[],
            run_history=False,  # the browser would keep every picture, and be slower with each
            quiet=True,
            share=False,
            ssr_mode=False,
            prevent_thread_lock=True,
        )
        print(f"the page is at {address}; Ctrl-C ends it", flush=True)
        threading.Event().wait()


def build(detector: "Detector", examples: Sequence[Example]) -> Any:
    """The page, as gradio's Blocks."""
    import gradio  # pyright: ignore[reportMissingImports]

    from opendet_jax.given_names import written_names

    data = detector.config.data
    compiled: set[tuple[int, str | None]] = set()

    def opened(chosen: str | int) -> tuple[str, Pixels]:
        """Name and pixels of what was dropped (its path), or of an example (its number). Raises ImageError."""
        name, source = (Path(chosen).name, Path(chosen)) if isinstance(chosen, str) else examples[chosen][:2]
        return name, read(source, data.max_pixels)

    def show(chosen: str | int) -> tuple[str, str]:
        """The picture alone, at once: its boxes may have to wait for the compiler, or for other visitors."""
        try:
            return "waiting …", f"<div class=picture>{_img(_resized(opened(chosen)[1], SHOWN))}</div>"
        except ImageError as error:
            return _refused(error), ""

    def detect(chosen: str | int | None, min_score: float, most: int, names: str, by: Any) -> Iterator[tuple[str, Any]]:
        if chosen is None:
            return
        try:
            name, pixels = opened(chosen)
            height, width, _ = pixels.shape
            bucket = choose(evaluation_geometry(height, width, data).size, data.buckets)
            given = written_names(names)
            program = bucket, by if given else None
            yield "detecting …" if program in compiled else COMPILING, gradio.skip()
            start = time.monotonic()
            found = detector.detect(pixels, max_detections=most, min_score=min_score, names=given, by=by)
            seconds = time.monotonic() - start
            compiled.add(program)
            said = f"{len(found)} object{'' if len(found) == 1 else 's'} in {seconds:.2f} s"
            yield said, rendered(name, pixels, found)
        except InputError as error:  # no image, or a name that the model has no embedding of
            yield _refused(error), ""
        except Exception as error:  # no memory left, say: the page stays, and the whole is on the screen
            traceback.print_exc()
            yield _refused(f"detection failed: {type(error).__name__}: {error}"[:300]), ""

    def take(event: gradio.SelectData) -> int:
        return event.index

    def drop(path: str) -> tuple[str, None, dict[str, Any]]:
        """There is room for the next file at once, and no example stays marked."""
        return path, None, gradio.update(selected_index=None)

    known = ", which knows drawn shapes alone" if data.source == "scenes" else ""
    with gradio.Blocks(title="Open-Det", analytics_enabled=False, fill_width=True) as page:
        gradio.Markdown(f"# Open-Det\n{SENTENCE} The model is {detector.config.name}{known}.")
        chosen = gradio.State(None)
        with gradio.Row():
            with gradio.Column(scale=2, min_width=300):
                file = gradio.File(label="Drop a picture", height=150)
                gallery = gradio.Gallery(
                    [thumbnail for _, _, thumbnail in examples],
                    label="or take one of these",
                    elem_id="examples",
                    height="auto",
                    allow_preview=False,
                    buttons=[],
                )
                min_score = gradio.Slider(0, 1, DEFAULTS.min_score, step=0.01, label="Least score")
                most = gradio.Slider(1, DEFAULTS.max_detections, DEFAULTS.max_detections, step=1, label="Most boxes")
                names = gradio.Textbox(label="Names to choose from, with commas", placeholder="none: it makes them up")
                by = gradio.Radio(["language", "alignment"], value=DEFAULTS.by, label="and how it chooses among them")
            with gradio.Column(scale=3, min_width=400):
                status = gradio.HTML(elem_id="status", apply_default_css=False)
                result = gradio.HTML(EMPTY, elem_id="result", apply_default_css=False)
        file.upload(drop, file, [chosen, file, gallery], show_progress="hidden")
        gallery.select(take, None, chosen, show_progress="hidden")
        settings: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "always_last"}
        settings["concurrency_id"] = "detector"  # one picture at a time, whosever it is
        inputs, outputs = [chosen, min_score, most, names, by], [status, result]
        chosen.change(show, chosen, outputs, show_progress="hidden").then(detect, inputs, outputs, **settings)
        changed = [min_score.input, most.input, names.submit, names.blur, by.input]
        gradio.on(changed, detect, inputs, outputs, **settings)
    return page


def rendered(name: str, pixels: Pixels, found: "Detections") -> str:
    """The picture with boxes and names, a card that opens over each box, a table, and the json to download."""
    height, width, _ = pixels.shape
    picture = _resized(pixels, SHOWN)
    factors = np.array([picture.width / width, picture.height / height] * 2, np.float32)
    rows = cards = ""
    for place, box in enumerate(found.boxes.tolist()):
        names = [escape(name or "?") for name in (found.names[place], *found.alternatives[place])]
        score = f"{found.scores[place]:.2f}"
        corners = ", ".join(f"{number:.0f}" for number in box)
        rows += f"<tr><td>{names[0]}<td class=number>{score}<td>{', '.join(names[1:])}<td class=number>{corners}</tr>"
        x0, y0, x1, y1 = box[0] / width, box[1] / height, box[2] / width, box[3] / height
        # The smallest area lies on top, so that the pointer reaches it. The card opens beside it, where there is room.
        area = f"left:{x0:.2%};top:{y0:.2%};width:{x1 - x0:.2%};height:{y1 - y0:.2%}"
        level = round(1000 * (1 - (x1 - x0) * (y1 - y0)))
        beside = "top:100%" if y1 < 0.8 else "bottom:100%" if y0 > 0.25 else "top:0"
        beside += ";left:0" if x0 + x1 < 1 else ";right:0"
        scored = zip(names, found.name_scores[place], strict=False)  # of given names there may be fewer
        lines = "".join(f"<span>{name} {score:z.2f}</span>" for name, score in scored)
        cards += (
            f'<div class=object tabindex=0 style="{area};z-index:{level}"><div class=card style="{beside}">'
            f"<b>{names[0]}: {score}</b><i>names, with their scores</i>{lines}</div></div>"
        )
    head = "<tr><th>Name<th>Score<th>Other names<th class=number>Box: x0, y0, x1, y1</tr>"
    json = base64.b64encode(found.to_json().encode()).decode()
    return (
        f"<div class=picture>{_img(draw(picture, found.boxes * factors, found.names, found.scores))}{cards}</div>"
        f"<table class=objects>{head}{rows}</table>"
        f'<a download="{escape(Path(name).stem)}.json" href="data:application/json;base64,{json}">Download as json</a>'
    )


def _refused(error: object) -> str:
    return f"<span class=refused>{escape(str(error))}</span>"


def _resized(pixels: Pixels, longer: int) -> Image.Image:
    factor = longer / max(pixels.shape[:2])
    height, width = (max(1, round(side * factor)) for side in pixels.shape[:2])
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS)


def _img(picture: Image.Image) -> str:
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=90, subsampling=0)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}">'


if __name__ == "__main__":
    main()
