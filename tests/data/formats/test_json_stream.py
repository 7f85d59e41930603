"""Reading json entry by entry, in pieces of any size, and what is said of broken files."""

import json
import tracemalloc

import pytest

from opendet_jax.data.formats import json_stream
from opendet_jax.data.formats.json_stream import AnnotationError, is_list, lists_of

CONTENT = {
    "info": {"year": 2026, "nested": [1, {"a": []}]},
    "images": [{"id": 1, "name": 'a "quoted" ] } name \\ \u00e4 \U0001f600'}, {"id": 2.5e-3}],
    "empty": [],
    "numbers": [1, -20, 3.25, 1e30, True, None, "x"],
    "licence": "none",
}


def read(path):
    return {part: list(entries) for part, entries in lists_of(path)}


@pytest.fixture
def written(tmp_path):
    def write(text):
        path = tmp_path / "a.json"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 10**6])
@pytest.mark.parametrize("layout", [{}, {"indent": 2}, {"ensure_ascii": False}, {"separators": (",", ":")}])
def test_the_lists_of_an_object(written, monkeypatch, chunk, layout):
    monkeypatch.setattr(json_stream, "CHUNK", chunk)
    path = written(json.dumps(CONTENT, **layout))
    assert read(path) == {part: value for part, value in CONTENT.items() if isinstance(value, list)}
    assert not is_list(path)


@pytest.mark.parametrize("chunk", [1, 5, 10**6])
def test_a_list(written, monkeypatch, chunk):
    monkeypatch.setattr(json_stream, "CHUNK", chunk)
    path = written(b"\xef\xbb\xbf \n" + json.dumps(CONTENT["numbers"]).encode())
    assert read(path) == {"": CONTENT["numbers"]}
    assert is_list(path)


def test_entries_may_be_left(written):
    path = written(json.dumps(CONTENT))
    seen = []
    for part, entries in lists_of(path):
        seen.append((part, next(entries, None)))
    assert seen == [("images", CONTENT["images"][0]), ("empty", None), ("numbers", 1)]


@pytest.mark.parametrize("text", ["{}", " [] ", "5", '"text"', "null"])
def test_files_with_no_entry(written, text):
    assert not any(read(written(text)).values())


def test_not_a_number_is_read(written):
    [nan, infinite] = read(written("[NaN, -Infinity]"))[""]
    assert nan != nan
    assert infinite == float("-inf")


@pytest.mark.parametrize("chunk", [3, 10**6])
def test_a_file_cut_anywhere_is_an_error_that_names_it(written, monkeypatch, chunk):
    monkeypatch.setattr(json_stream, "CHUNK", chunk)
    whole = json.dumps(CONTENT, ensure_ascii=False).encode()
    for length in range(len(whole)):
        path = written(whole[:length])
        with pytest.raises(AnnotationError, match=r"a\.json: is not json: .*, at character [\d,]+: "):
            read(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "its beginning, at character 0: the file is empty"),
        ('{"images": [{"id": 1}, {"id": 2, "na', r"images\[1\], at character 23: the file ends in the middle of it"),
        ('{"images": [{"id": 1}, {"id": 2}', r"images\[1\], at character 32: the file ends there"),
        ('{"images": [{"id": 1} {"id": 2}]}', r"images\[0\], at character 22: ',' is expected, not '{'"),
        ('{"images": [{"id": 1}, {"id" 2}], "other": 123456}', r"images\[1\], at character 23: Expecting ':'"),
        ('{"images": [}, "other": [1, 2, 3, 4, 5, 6]}', r"images\[0\], at character 12: Expecting value"),
        ("[1, 2", r"\[1\], at character 5: the file ends there"),
        ('{"a": 1} {"b": 2}', "'a', at character 9: '{' after its end"),
        ("{1: 2}", "its beginning, at character 1: a key in quotes is expected"),
        ("[" * 100_000, r"\[0\], at character 1: maximum recursion depth"),
        ("[" + "1" * 5000 + "]", r"\[0\], at character 1: Exceeds the limit"),
        (b'{"images": [{"name": "\xff"}]}', "can't decode byte 0xff"),
    ],
)
def test_broken_files(written, text, message):
    path = written(text)
    with pytest.raises(AnnotationError, match=f"a.json: is not json: .*{message}"):
        read(path)


@pytest.mark.parametrize("function", [read, is_list])
def test_files_that_cannot_be_opened(tmp_path, function):
    with pytest.raises(AnnotationError, match=r"none\.json: cannot be read: No such file"):
        function(tmp_path / "none.json")
    with pytest.raises(AnnotationError, match="cannot be read: Is a directory"):
        function(tmp_path)


def test_memory_holds_an_entry_not_the_file(written, monkeypatch):
    monkeypatch.setattr(json_stream, "CHUNK", 2**12)
    path = written(json.dumps({"annotations": [{"id": i, "segmentation": [0.5] * 50} for i in range(5000)]}))
    tracemalloc.start()
    count = sum(1 for _, entries in lists_of(path) for _ in entries)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 5000
    assert peak < 0.2 * path.stat().st_size
