"""Which files of an input are read, how far they go, and where the documents in them end."""

import functools
import gzip
import io
import json
import os
import threading
from contextlib import contextmanager, nullcontext
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from urllib.request import Request, urlopen

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from raybert import storage
from raybert.data.text import corpus, rows, zst
from raybert.data.text import documents as readers
from raybert.data.text.inputs import find, summary
from raybert.data.text.values import TOO_LARGE
from raybert.errors import InputError
from raybert.storage import clients
from tests.data import make_shards

LINES = [json.dumps({"text": f"text {i} {i * 7919 % 10007}"}).encode() + b"\n" for i in range(300)]


def skippable(content):
    return (0x184D2A5C).to_bytes(4, "little") + len(content).to_bytes(4, "little") + content


def zst_frames(parts):
    """Frames of every make, with skippable and empty ones between them."""
    makes = [{}, {"write_checksum": True, "write_content_size": False}, {"level": 19}, {"write_content_size": False}]
    for i, part in enumerate(parts):
        yield zstandard.ZstdCompressor(**makes[i % len(makes)]).compress(part)
        yield skippable(bytes(i % 3))
        yield zstandard.ZstdCompressor(**makes[i % len(makes)]).compress(b"")


def gz_members(parts):
    for part in parts:
        buffer = io.BytesIO()
        with gzip.GzipFile("a name", "wb", fileobj=buffer) as file:
            file.write(part)
        yield buffer.getvalue()


PARTS = [b"".join(LINES[:100]), os.urandom(400) + b"\n", b"x" * 500_000 + b"\n", b"".join(LINES[100:])]
COMPRESSED = {"zst": list(zst_frames(PARTS)), "gz": list(gz_members(PARTS))}


@pytest.mark.parametrize("kind", ["zst", "gz"])
@settings(max_examples=300)
@given(data=st.data())
def test_a_file_that_is_cut_off_is_refused_and_a_whole_one_is_read(tmp_path_factory, kind, data):
    frames = COMPRESSED[kind]
    whole = b"".join(frames)
    ends = {sum(map(len, frames[:i])): i for i in range(len(frames) + 1)}
    cut = data.draw(st.one_of(st.integers(0, len(whole)), st.sampled_from(list(ends))), "cut")
    path = tmp_path_factory.getbasetemp() / f"cut.txt.{kind}"
    path.write_bytes(whole[:cut])
    if cut in ends:
        with readers.open_text(str(path)) as file:
            content = file.read()
        per_part = 3 if kind == "zst" else 1
        assert content == b"".join(PARTS[: -(-ends[cut] // per_part)])
        assert b"".join(readers.lines(str(path))) == content
        return
    for read in (lambda: list(readers.lines(str(path))), lambda: list(readers.documents(piece(path), "text"))):
        with pytest.raises(
            InputError, match=f"{path} cannot be read \\(.*\\); it may be truncated or damaged"
        ) as refused:
            read()
        assert "\n" not in str(refused.value)


def piece(path, kind="txt", start=0, stop=1 << 60):
    return readers.Piece(str(path), kind, start, stop, 1)


def test_zeros_behind_gzip_are_no_fault_and_garbage_behind_a_frame_is(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"text") + bytes(100))
    assert list(readers.lines(str(tmp_path / "a.txt.gz"))) == [b"text"]
    for garbage in (b"g", b"garbage", bytes(10)):
        (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(b"text") + garbage)
        with pytest.raises(InputError, match=r"a\.txt\.zst cannot be read"):
            list(readers.lines(str(tmp_path / "a.txt.zst")))


def test_a_window_of_two_gigabytes_is_no_reason_to_refuse():
    parameters = zstandard.ZstdCompressionParameters(window_log=28, write_content_size=False)
    data = zstandard.ZstdCompressor(compression_params=parameters).compress(b"text")
    assert zst.open_zst(io.BytesIO(data)).read() == b"text"


@pytest.mark.parametrize("name", ["a.txt.zst", "b.jsonl.zst", "b.jsonl.gz"])
def test_every_reader_refuses_half_a_file(tmp_path, name):
    compress = zstandard.compress if name.endswith("zst") else gzip.compress
    data = compress(b"".join(json.dumps({"text": os.urandom(20).hex()}).encode() + b"\n" for _ in range(2000)))
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    uri = str(tmp_path / name)

    def embedded():
        for part in rows.plan(uri, "text").pieces:
            list(rows.read(part, "text"))

    def prepared():
        for part in corpus.plan([uri], "text").fragments[0]:
            list(readers.documents(part, "text"))

    for read in (embedded, prepared):
        with pytest.raises(InputError, match="truncated or damaged"):
            read()


@pytest.fixture(params=["local", "gs"])
def root(request, tmp_path):
    if request.param == "gs":
        return request.getfixturevalue("gcs").create_bucket(f"i-{tmp_path.name}".replace("_", "-")) + "/_in"
    return str(tmp_path / ".in")


def write(root, name, data=LINES[0]):
    storage.write_bytes(storage.join(root, name), data)


def names(found, root):
    return [uri.removeprefix(root + "/") for uri in found.files]


def test_hidden_parts_below_the_input_count_and_the_input_may_be_hidden(root):
    for name in (
        *("a.jsonl", "d/b.txt", ".ipynb_checkpoints/a-checkpoint.txt", "d/_temporary/0/c.jsonl"),
        *("_delta_log/0.json", "d/.h.jsonl", "_SUCCESS"),
    ):
        write(root, name)
    found = find(root, "text")
    assert names(found, root) == ["a.jsonl", "d/b.txt"]
    assert {(passed.name, passed.reason) for passed in found.passed_over} == {
        (name, "hidden")
        for name in (
            *(".ipynb_checkpoints/a-checkpoint.txt", "d/_temporary/0/c.jsonl", "_delta_log/0.json", "d/.h.jsonl"),
            "_SUCCESS",
        )
    }
    assert names(find(storage.join(root, "**", "*.jsonl"), "text"), root) == ["a.jsonl"]
    assert names(find(storage.join(root, "d", "_temporary"), "text"), root) == ["d/_temporary/0/c.jsonl"]
    assert names(find(storage.join(root, "d", "_temporary", "*", "*.jsonl"), "text"), root) == [
        "d/_temporary/0/c.jsonl"
    ]
    assert names(find(storage.join(root, "d", ".h.jsonl"), "text"), root) == ["d/.h.jsonl"]
    assert summary(found.passed_over).startswith("5 hidden (")
    assert summary(found.passed_over).endswith(", ...)")


def test_kinds_are_known_whatever_the_case_and_others_are_named(root):
    for name in ("B.JSONL", "C.Txt", "e.jsonl.GZ", "README.md", "x.csv", "y.parquet.gz"):
        write(root, name, gzip.compress(LINES[0]) if name.lower().endswith(".gz") else LINES[0])
    write(root, "d.jsonl.zstd", zstandard.compress(LINES[0]))
    found = find(root, "text")
    assert names(found, root) == ["B.JSONL", "C.Txt", "d.jsonl.zstd", "e.jsonl.GZ"]
    assert summary(found.passed_over) == "3 of other kinds (README.md, x.csv, y.parquet.gz)"
    pieces = [piece for part in corpus.plan([root], "text").fragments for piece in part]
    assert len([text for piece in pieces for text in readers.documents(piece, "text")]) == 4
    with pytest.raises(InputError, match=r"contains no file of a known kind \(\.parquet .*skipped: 1 of other kinds"):
        find(storage.join(root, "x.csv"), "text")


def test_shards_below_the_input_are_passed_over_also_when_they_have_no_manifest_yet(root, tmp_path):
    local = make_shards(str(tmp_path / "made"))
    for uri in storage.list_files(local.uri):
        write(root, f"out/{uri.rpartition('/')[2]}", storage.read_bytes(uri))
    write(root, "out/_tmp-12/000-000.spill")
    write(root, "a.jsonl")
    # A data set that others named the same way.
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": ["a text"]}), sink)
    write(root, "train-00000-of-00001.parquet", sink.getvalue().to_pybytes())
    for _ in range(2):
        found = find(root, "text")
        assert names(found, root) == ["a.jsonl", "train-00000-of-00001.parquet"]
        passed = {(passed.name, passed.reason) for passed in found.passed_over}
        assert ("out/train-00000-of-00002.parquet", "shards of raybert") in passed
        storage.remove(storage.join(root, "out", "manifest.json"))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.json", b"\n" + b"".join(LINES)),
        ("a.json", b"\xef\xbb\xbf" + b"".join(LINES)),
        ("a.json.gz", gzip.compress(b"".join(LINES))),
        ("a.JSON.zst", zstandard.compress(b"".join(LINES))),
    ],
)
def test_json_with_an_object_a_line_is_read(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    (part,) = corpus.plan([str(tmp_path)], "text").fragments
    texts = [text for piece in part for text in readers.documents(piece, "text")]
    assert texts == [json.loads(line)["text"] for line in LINES]


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b'[{"text": "a"}, {"text": "b"}]', r"a\.json contains one JSON array .* convert it: jq -c '\.\[\]'"),
        (b'\n  [\n{"text": "a"}\n]', "contains one JSON array"),
        (b'{\n  "text": "a"\n}\n', "has no JSON object on its first line; .* jq -c"),
        (b'"text"\n', "has no JSON object on its first line"),
        (b'{"other": "a"}\n', "has no column text; choose one of other with --text-column"),
    ],
)
def test_json_of_another_shape_is_refused_and_passed_over_beside_others(tmp_path, data, sentence):
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(InputError, match=sentence):
        corpus.plan([str(tmp_path / "a.json")], "text")
    write(str(tmp_path), "b.jsonl")
    found = find(str(tmp_path), "text")
    assert names(found, str(tmp_path)) == ["b.jsonl"]
    assert summary(found.passed_over) == "1 .json without one text per line (a.json)"


LINE = st.sampled_from(["", " ", "\u3000", "one", "two words", "é", "\t", "x" * 40])
ENDS = st.sampled_from(["\n", "\r\n"])


@given(st.lists(st.tuples(LINE, ENDS), max_size=30), st.booleans(), st.integers(1, 60))
@example([("", "\n"), ("one", "\n")], True, 1)
def test_the_pieces_of_a_text_file_hold_its_documents_once(tmp_path_factory, parts, mark, size):
    """Cut anywhere, each document is in one piece: the one in which the blank line before it begins."""
    path = tmp_path_factory.getbasetemp() / "cut.txt"
    text = "".join(line + end for line, end in parts)
    path.write_bytes(text.encode("utf-8-sig" if mark else "utf-8"))
    length = path.stat().st_size
    lines = [line.strip() for line, _ in parts]
    paragraphs = ["\n".join(run) for run in runs(lines)]
    for split, expected in (("lines", [line for line in lines if line]), ("blank-lines", paragraphs)):
        found = []
        for start in range(0, max(length, 1), size):
            part = piece(path, start=start, stop=min(start + size, length))
            found += readers.documents(part, "text", split)
        assert ["\n".join(line.strip() for line in text.splitlines()) for text in found] == expected, split


def runs(lines):
    run = []
    for line in [*lines, ""]:
        if line:
            run.append(line)
        elif run:
            yield run
            run = []


def test_a_run_of_lines_that_is_too_large_is_counted_once_and_the_next_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_DOCUMENT_BYTES", 1 << 10)
    (tmp_path / "a.txt").write_text("first\n\n" + "some words\n" * 1000 + "\n \nlast\n")
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress((tmp_path / "a.txt").read_bytes()))
    for name in ("a.txt", "a.txt.zst"):
        found = list(readers.documents(piece(tmp_path / name), "text", "blank-lines"))
        assert found == ["first\n", TOO_LARGE, "last\n"]


class Ranged(SimpleHTTPRequestHandler):
    """A server that answers for parts of files, as nearly all but Python's own do."""

    def do_GET(self):
        asked = self.headers.get("Range")
        path = self.translate_path(self.path)
        if not asked or not os.path.isfile(path):
            return super().do_GET()
        with open(path, "rb") as file:
            data = file.read()
        first, _, last = asked.removeprefix("bytes=").partition("-")
        start, stop = (len(data) - int(last), len(data)) if not first else (int(first), int(last or len(data) - 1) + 1)
        part = data[start:stop]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        return self.wfile.write(part)

    def log_message(self, *_):
        pass


class Plain(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(params=[Plain, Ranged])
def host(request, tmp_path):
    """A web server and the directory that it serves."""
    handler = functools.partial(request.param, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", tmp_path
        server.shutdown()


@pytest.mark.parametrize("query", ["", "?download=true", "?v=1.2&name=[x].csv#part"])
def test_files_of_a_web_server_are_read(host, query):
    address, folder = host
    texts = [json.loads(line)["text"] for line in LINES]
    data = b"".join(LINES)
    (folder / "a.jsonl").write_bytes(data)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(data))
    (folder / "C.JSON.zst").write_bytes(zstandard.compress(data))
    pq.write_table(pa.table({"text": texts * 100}), folder / "d.parquet", row_group_size=1000, compression="none")
    (folder / "e.txt").write_text("one\ntwo\n")
    for name, expected in {
        **dict.fromkeys(["a.jsonl", "b.jsonl.gz", "C.JSON.zst"], texts),
        "d.parquet": texts * 100,
        "e.txt": ["one\ntwo\n"],
    }.items():
        raw = corpus.plan([f"{address}/{name}{query}"], "text", fragment_bytes=4000)
        assert raw.inputs == corpus.plan([str(folder / name)], "text").inputs
        pieces = [piece for part in raw.fragments for piece in part]
        assert [text for piece in pieces for text in readers.documents(piece, "text")] == expected, name
    # A table that is embedded.
    (folder / "t.csv").write_text("text,n\nabc,1\n")
    (part,) = rows.plan(f"{address}/t.csv{query}", "text").pieces
    assert [table.column("text").to_pylist() for table in rows.read(part, "text")] == [["abc"]]


def test_what_a_web_server_does_not_have_is_a_sentence(host, monkeypatch):
    address, folder = host
    with pytest.raises(InputError, match=f"The input {address}/none.jsonl does not exist"):
        corpus.plan([f"{address}/none.jsonl"], "text")
    for act in (storage.require_writable, lambda uri: storage.write_json(uri, {})):
        with pytest.raises(InputError, match="is read-only; write to a local path or a bucket"):
            act(f"{address}/out")
    (folder / "large.jsonl").write_bytes(b"".join(LINES))
    monkeypatch.setattr(clients, "MOST_WITHOUT_RANGES", 1 << 10)
    with serves_ranges(address, "its server does not support range requests; download it and give the local file"):
        corpus.plan([f"{address}/large.jsonl"], "text")


@contextmanager
def serves_ranges(address, otherwise):
    """Whether what is inside works depends on that."""
    with urlopen(Request(f"{address}/large.jsonl", headers={"Range": "bytes=0-0"})) as answer:
        refused = nullcontext() if answer.status == 206 else pytest.raises(InputError, match=otherwise)
    with refused:
        yield


@pytest.mark.parametrize(
    ("uri", "needs"),
    [
        ("hdfs://namenode/x", "Hadoop's client (libhdfs) on every node"),
        ("hdfs:///x", "Hadoop's client (libhdfs) on every node"),
        ("abfss://box@account.dfs.core.windows.net/x", "pip install adlfs"),
        ("oss://box/x", "pip install ossfs"),
        ("lakefs://repo/main/x", "pip install lakefs-spec"),
        ("sftp://host/x", "pip install paramiko"),
    ],
)
def test_a_kind_of_storage_that_is_not_installed_is_named_with_what_it_needs(uri, needs):
    with pytest.raises(InputError) as refused:
        corpus.plan([uri], "text")
    assert needs in str(refused.value)
    assert "\n" not in str(refused.value)
