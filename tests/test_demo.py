"""The page in the browser, in a real one: Chromium, which the system provides. The server has a process of its own."""

import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from opendet_jax.config import Config, DataConfig
from opendet_jax.data.scene_drawing import draw_scene
from opendet_jax.demo import SCENES, SEED, drawn_examples, find_examples, main, serve
from opendet_jax.errors import InputError
from opendet_jax.predict.detections import Detections
from opendet_jax.predict.detector import Detector, load

REASON = "the page has packages of its own: make test-demo"
pytest.importorskip("gradio", reason=REASON)
playwright_api = pytest.importorskip("playwright.sync_api", reason=REASON)
expect, sync_playwright = playwright_api.expect, playwright_api.sync_playwright

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium")
MAX_PIXELS = 100_000
NO_MEMORY = 66  # the width of a picture for which the scripted detector has none
NAMES = ("{} by {}", "<img src=x onerror=alert(1)>", "${alert(1)} {{x}} & “so”")  # the first is the picture's size
SCORES = (0.9, 0.6, 0.4)
BOXES = ((0.1, 0.1, 0.9, 0.9), (0.2, 0.2, 0.5, 0.5), (0.6, 0.7, 0.9, 1.0))  # of the picture


class Scripted(Detector):
    """Finds three objects in every picture, and fails where it is called twice at once."""

    def __init__(self):
        self.config = Config(name="scripted", data=DataConfig(max_pixels=MAX_PIXELS))
        self.free = threading.Lock()

    def detect(self, images, max_detections=100, min_score=0.3, nms_iou=0.9, *, names=None, by="language"):
        assert self.free.acquire(blocking=False), "two at once"
        time.sleep(0.2)
        self.free.release()
        height, width, _ = images.shape
        if width == NO_MEMORY:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        if names == ["unknown"]:
            raise InputError(f"no embedding of 'unknown', by {by}")
        kept = [place for place in range(3) if SCORES[place] >= min_score][:max_detections]
        boxes = np.array(BOXES, np.float32) * np.array([width, height] * 2, np.float32)
        return Detections(
            boxes=boxes[kept],
            scores=np.array(SCORES, np.float32)[kept],
            names=[(names or drawn(width, height))[place] for place in kept],
            alternatives=[["a <second> name"]] * len(kept),
            name_scores=np.tile(np.array([[-0.001, -1.5]], np.float32), (len(kept), 1)),
        )


def drawn(width: int, height: int) -> list[str]:
    return [NAMES[0].format(width, height), *NAMES[1:]]


@contextmanager
def serving(module: str) -> Iterator[str]:
    """The address at which a program says that the page is; it is to stay on this machine, and end with one line."""
    command = [sys.executable, "-u", "-m", module]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            said = [process.stdout.readline() for _ in range(2)]
            address = re.fullmatch(r"the page is at (\S+); Ctrl-C ends it\n", said[1])
            assert address, said + process.stdout.readlines()
            yield address[1]
        finally:
            process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=20)[0].splitlines()
        assert said[-1] == "stopped"
        assert [line for line in said if line.startswith("connects to ")] == []


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(browser):
    with serving("tests.test_demo") as address:
        yield address


@pytest.fixture(scope="module")
def visit(browser):
    """Opens a page as a visitor of its own. None may ask another host, keep a picture, or run what a name says."""
    contexts, asked, alerts = [], [], []

    def open_page(address):
        contexts.append(browser.new_context())
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.on("request", lambda request: asked.append(request.url))
        page.on("dialog", lambda dialog: (alerts.append(dialog.message), dialog.dismiss()))
        page.goto(address)
        expect(page.locator("#examples button")).to_have_count(SCENES)
        return page

    yield open_page
    kept = [context.pages[0].evaluate("JSON.stringify(localStorage)") for context in contexts]
    for context in contexts:
        context.close()
    assert max(map(len, kept)) < 1000
    assert asked
    assert ([url for url in asked if not re.match(r"http://127\.0\.0\.1:\d+/|data:|blob:", url)], alerts) == ([], [])


@pytest.fixture(scope="module")
def page(visit, address):
    return visit(address)


@pytest.fixture
def found(page):
    """The page after a picture of 80×60, and what the Python interface finds in one."""
    upload(page, "a b.png", png(80, 60))
    shows(page, 80, 60)
    return Scripted().detect(np.zeros((60, 80, 3), np.uint8))


def png(width: int, height: int) -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), width % 256, np.uint8)).save(content, "PNG")
    return content.getvalue()


def upload(page, name: str, content: bytes) -> None:
    page.locator("input[type=file]").set_input_files({"name": name, "mimeType": "image/png", "buffer": content})


def shows(page, width: int, height: int) -> None:
    first = "name => document.querySelector('.objects td')?.innerText === name"
    page.wait_for_function(first, arg=f"{width} by {height}")  # looks at every frame, where `expect` waits up to 1 s


def says(page, objects: str) -> None:
    expect(page.locator("#status")).to_have_text(re.compile(rf"^\s*{objects} in \d+\.\d\d s\s*$"))


def table(page) -> list[list[str]]:
    return [row.locator("td").all_inner_texts() for row in page.locator(".objects tr").all()[1:]]


def as_table(found: Detections) -> list[list[str]]:
    boxes = [", ".join(f"{number:.0f}" for number in box) for box in found.boxes]
    columns = (found.names, (f"{score:.2f}" for score in found.scores), map(", ".join, found.alternatives), boxes)
    return [list(row) for row in zip(*columns, strict=True)]


def test_the_page_shows_what_detect_finds(page, found):
    says(page, "3 objects")
    assert table(page) == as_table(found)
    picture = page.locator(".picture img")
    assert picture.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [1200, 900]
    frame = picture.bounding_box()
    for place, (x0, y0, x1, y1) in enumerate(BOXES):
        box = page.locator(".object").nth(place).bounding_box()
        sides = [(box["x"] - frame["x"]) / frame["width"], (box["y"] - frame["y"]) / frame["height"]]
        sides += [box["width"] / frame["width"], box["height"] / frame["height"]]
        assert sides == pytest.approx([x0, y0, x1 - x0, y1 - y0], abs=2e-3)  # a pixel of the picture on the screen


def test_the_json_is_that_of_the_python_interface(page, found):
    with page.expect_download() as download:
        page.get_by_text("Download as json").click()
    assert download.value.suggested_filename == "a b.json"
    assert download.value.path().read_text(encoding="utf-8") == found.to_json()


def test_the_pointer_on_a_box_shows_its_other_names(page, found):
    cards = page.locator(".card")
    for place, name in enumerate(drawn(80, 60)):
        page.locator(".object").nth(place).hover(position={"x": 4, "y": 4})  # the largest reaches under the others
        expect(cards.nth(place)).to_be_visible()
        assert cards.locator("visible=true").count() == 1
        assert cards.nth(place).inner_text().splitlines() == [
            f"{name}: {SCORES[place]:.2f}",
            "names, with their scores",
            f"{name} 0.00",
            "a <second> name -1.50",
        ]


def test_sliders_need_no_new_upload(visit, address):
    page = visit(address)
    upload(page, "a.png", png(80, 60))
    says(page, "3 objects")
    page.get_by_label("number input for Least score").fill("0.5")
    says(page, "2 objects")
    assert page.locator(".object").count() == 2
    page.get_by_label("number input for Most boxes").fill("1")
    says(page, "1 object")
    page.get_by_label("range slider for Least score").press("End")
    says(page, "0 objects")
    assert table(page) == []


def test_names_that_are_typed_in(visit, address):
    page = visit(address)
    upload(page, "a.png", png(80, 60))
    says(page, "3 objects")
    typed = page.get_by_label("Names to choose from")
    typed.fill("a cat, dog,, traffic light")
    typed.press("Enter")
    expect(page.locator(".objects td").first).to_have_text("a cat")
    assert [row[0] for row in table(page)] == ["a cat", "dog", "traffic light"]
    typed.fill("unknown")
    page.get_by_label("alignment").check()
    expect(page.locator("#status .refused")).to_have_text("no embedding of 'unknown', by alignment")
    typed.fill("")
    typed.press("Enter")
    shows(page, 80, 60)


def test_a_picture_dropped_from_the_desktop(page):
    drop = """([target, content]) => {
        const data = new DataTransfer();
        data.items.add(new File([Uint8Array.from(content)], "dropped.png", {type: "image/png"}));
        target.dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true}));
    }"""
    target = page.locator("button:has(input[type=file])").element_handle()
    page.evaluate(drop, [target, list(png(50, 40))])
    shows(page, 50, 40)


def test_what_was_chosen_last_is_shown(page):
    """Also where it was chosen before, and where detection is still busy with others."""
    example = page.locator("#examples button")
    for width in (40, 41):
        upload(page, "same name.png", png(width, 60))
        shows(page, width, 60)
        example.nth(1).click()
        shows(page, 128, 128)
    for width in (30, 31):
        upload(page, "a.png", png(width, 60))
        example.nth(width % 3).click()
    upload(page, "last.png", png(70, 60))
    shows(page, 70, 60)
    page.wait_for_timeout(1000)  # longer than all before it take
    shows(page, 70, 60)


def test_two_visitors_at_once(page, visit, address):
    other = visit(address)
    for one, width in ((page, 90), (other, 91)):
        upload(one, f"{width}.png", png(width, 60))
    for one, width in ((page, 90), (other, 91)):
        shows(one, width, 60)
        assert table(one) == as_table(Scripted().detect(np.zeros((60, width, 3), np.uint8)))
    upload(page, "92.png", png(92, 60))
    other.get_by_label("number input for Least score").fill("0.5")
    shows(page, 92, 60)
    says(other, "2 objects")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("notes.png", b"not a picture", "notes.png: is not an image, or of a kind that Pillow cannot read"),
        ("half.png", png(200, 200)[:100], "half.png: cannot be decoded: "),
        ("empty.png", b"", "empty.png: is not an image"),
        ("huge.png", png(400, 251), "huge.png: has 400×251 = 100,400 pixels, more than data.max_pixels = 100,000"),
        ("heavy.png", png(NO_MEMORY, 20), "detection failed: RuntimeError: RESOURCE_EXHAUSTED: out of memory"),
    ],
    ids=["text", "damaged", "empty", "huge", "memory"],
)
def test_what_cannot_be_used_gets_a_sentence_and_the_page_lives_on(page, name, content, said):
    upload(page, name, content)
    expect(page.locator("#status .refused")).to_contain_text(said)
    assert "/" not in page.locator("#status .refused").inner_text()  # no folders
    expect(page.locator(".picture")).to_have_count(0)
    upload(page, "a.png", png(20, 20))
    shows(page, 20, 20)


def test_a_file_reaches_the_models_own_reader_as_it_is(page):
    """EXIF turns a picture upright, and of 16 bits the upper ones are seen."""
    exif, content = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.new("RGB", (80, 60)).save(content, "PNG", exif=exif)
    upload(page, "on_its_side.png", content.getvalue())
    shows(page, 60, 80)
    content = io.BytesIO()
    Image.fromarray(np.linspace(0, 65535, 48 * 64).astype(np.uint16).reshape(48, 64)).save(content, "PNG")
    upload(page, "sixteen_bits.png", content.getvalue())
    shows(page, 64, 48)
    grey = """image => {
        const canvas = document.createElement("canvas");
        [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
        const context = canvas.getContext("2d");
        context.drawImage(image, 0, 0);
        return [0.02, 0.5, 0.98].map(y => context.getImageData(20, y * canvas.height, 1, 1).data[0]);
    }"""
    rows = page.locator(".picture img").evaluate(grey)  # at the left edge, where no box is
    assert rows == pytest.approx([0.02 * 255, 0.5 * 255, 0.98 * 255], abs=8)  # a row of 48 has 5, JPEG the rest


def test_the_model_that_comes_along(visit):
    with serving("opendet_jax.demo") as address:
        page = visit(address)
        page.locator("#examples button").nth(2).click()
        expect(page.locator("#status")).to_contain_text("compiling for pictures of this size")
        page.locator(".objects").wait_for(timeout=120_000)
        found = load("scenes_tiny").detect(draw_scene(SEED, "val", 2, 128)[0])
        assert len(found) > 1
        assert table(page) == as_table(found)
        page.get_by_label("Names to choose from").fill("red ring, blue star")
        page.get_by_label("Names to choose from").press("Enter")
        expect(page.locator("#status")).to_contain_text("compiling for pictures of this size")
        says(page, r"\d+ objects?")
        assert {row[0] for row in table(page)} <= {"red ring", "blue star"}


def test_without_gradio_one_line_says_so(tmp_path):
    for path in Path(np.__file__).parents[1].iterdir():
        if not path.name.startswith("gradio"):
            (tmp_path / path.name).symlink_to(path)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    command = [f"{sys.base_exec_prefix}/bin/python3", "-m", "opendet_jax.demo"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    said = "error: the page needs gradio: pip install 'opendet_jax[demo]'\n"
    assert (run.stdout, run.stderr, run.returncode) == ("", said, 1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--port=0"], "error: --port=0 is not between 1 and 65535"),
        (["--host=192.0.2.1"], r"error: --host=192\.0\.2\.1: .*Cannot assign requested address"),
        (["--examples=no/such/folder"], "error: --examples: no/such/folder cannot be listed: No such file"),
        (["--workdir=no/such/folder"], "error: no checkpoint in no/such/folder"),
    ],
)
def test_what_is_wrong_on_the_command_line(arguments, said):
    with pytest.raises(SystemExit, match=said):
        main(arguments)


def test_a_port_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(SystemExit, match="Address already in use"):
        main([f"--port={server.getsockname()[1]}"])


def test_a_folder_of_examples(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(InputError, match=r"there is no picture in .*, which holds 1 files"):
        find_examples(tmp_path)
    (tmp_path / "wide.png").write_bytes(png(80, 20))
    [(name, source, thumbnail)] = find_examples(tmp_path)
    assert (name, source, thumbnail.size) == ("wide.png", tmp_path / "wide.png", (240, 60))
    assert capsys.readouterr().err.startswith(f"left out: 1 files of {tmp_path}, as notes.txt: is not an image")


def stay_here(event: str, arguments: tuple) -> None:
    """An audit hook: the server may speak to this machine alone."""
    if event == "socket.connect" and arguments[1][0] not in ("127.0.0.1", "localhost", "::1"):
        print(f"connects to {arguments[1]}", flush=True)


if __name__ == "__main__":
    sys.addaudithook(stay_here)
    print("scripted", flush=True)
    try:
        serve(Scripted(), drawn_examples(), "127.0.0.1", None)
    except KeyboardInterrupt:
        print("stopped", flush=True)
