import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from raybert import storage
from raybert.errors import InputError


@pytest.fixture(params=["local", "memory", "gs"])
def root(request, tmp_path):
    """A local directory, a file system that is not local, and a bucket."""
    if request.param == "gs":
        return request.getfixturevalue("gcs").create_bucket(f"b-{tmp_path.name}".replace("_", "-"))
    return str(tmp_path) if request.param == "local" else f"memory://{tmp_path.name}"


def test_what_is_written_is_read_and_listed(root):
    storage.write_json(storage.join(root, "a", "b.json"), {"x": 1})
    storage.write_bytes(storage.join(root, "a", "c.bin"), b"12345")
    assert storage.read_json(storage.join(root, "a", "b.json")) == {"x": 1}
    assert storage.read_from(storage.join(root, "a", "c.bin"), 2) == b"345"
    assert storage.read_from(storage.join(root, "a", "c.bin"), 5) == b""
    assert storage.read_from(storage.join(root, "a", "none"), 0) == b""
    assert storage.list_dir(storage.join(root, "a")) == [storage.join(root, "a", name) for name in ("b.json", "c.bin")]
    assert storage.size(storage.join(root, "a", "c.bin")) == 5
    assert storage.read_range(storage.join(root, "a", "c.bin"), 1, 3) == b"23"
    ranges = [(storage.join(root, "a", "c.bin"), start, start + 2) for start in (0, 3)]
    assert storage.read_ranges(ranges) == [b"12", b"45"]
    with storage.open_uri(storage.join(root, "a", "c.bin")) as file:
        assert file.read() == b"12345"
    for place in ("", "a", "a/c.bin", "a/*.bin", "**/*.bin"):
        found = [uri.replace(":///", "://") for uri in storage.list_files(storage.join(root, place))]
        assert storage.join(root, "a", "c.bin") in found, place
    assert len(storage.list_files(root)) == 2
    assert storage.list_dir(storage.join(root, "none")) == []
    storage.remove(storage.join(root, "a"))
    storage.remove(storage.join(root, "a"))
    assert not storage.exists(storage.join(root, "a", "b.json"))


class AnswersWithNames(MemoryFileSystem):
    """Of a single file `find` gives a list of names, whatever it is asked for, as adlfs does."""

    protocol = "names"

    def find(self, path, **options):
        return [path] if self.isfile(path) else super().find(path, **options)


def test_a_single_file_is_listed_where_find_gives_its_name_alone():
    fsspec.register_implementation("names", AnswersWithNames, clobber=True)
    storage.write_bytes("names://box/a/b.csv", b"x")
    for place in ("names://box/a/b.csv", "names://box/a"):
        assert [uri.replace(":///", "://") for uri in storage.list_files(place)] == ["names://box/a/b.csv"], place


def test_a_local_copy_has_the_files_asked_for(root, tmp_path):
    storage.write_bytes(storage.join(root, "d", "x"), b"x")
    storage.write_bytes(storage.join(root, "d", "y"), b"y")
    with storage.local_copy(storage.join(root, "d"), ["x", "missing"]) as path:
        assert (path / "x").read_bytes() == b"x"
        assert not (path / "missing").exists()


def test_local_paths_become_absolute_and_uris_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("runs/") == str(tmp_path / "runs")
    assert storage.absolute("file:///a/b") == "/a/b"
    assert storage.absolute("gs://bucket/x/") == "gs://bucket/x"


def test_an_unknown_scheme_is_a_sentence():
    with pytest.raises(InputError, match="Install the fsspec package"):
        storage.exists("nosuchscheme://bucket/x")


STRANGE = ["v[1]", "My data [2024]", "what?", "a*b", "[!x]", "[", "100%25", "a b"]


@pytest.mark.parametrize("name", STRANGE)
def test_what_exists_is_itself_whatever_its_name(root, name):
    """A directory and a file of the name, beside what the name would match as a pattern."""
    for other in ("v1", "whatx", "axb", "y", name):
        storage.write_bytes(storage.join(root, other, "d", "x.txt"), other.encode())
        storage.write_bytes(storage.join(root, f"{other}.txt"), other.encode())
    place, file = storage.join(root, name), storage.join(root, f"{name}.txt")

    def contents(uri):
        return [(below, storage.read_bytes(found)) for found, below in storage.find_files(uri)]

    assert contents(place) == [("d/x.txt", name.encode())]
    assert contents(file) == [("", name.encode())]
    assert contents(storage.join(place, "*", "x.txt")) == [("d/x.txt", name.encode())]
    assert contents(storage.join(place, "**", "?.txt")) == [("d/x.txt", name.encode())]
    assert contents(storage.join(place, "d", "[xy].txt")) == [("x.txt", name.encode())]
    assert contents(storage.join(place, "none[1]")) == []
    storage.move(storage.join(place, "d"), storage.join(place, "e"))
    assert contents(place) == [("e/x.txt", name.encode())]
    storage.remove(place)
    storage.remove(file)
    assert len(storage.list_files(root)) == 8, "what the name would match as a pattern was deleted"


def test_a_pattern_is_what_does_not_exist(root):
    for name in ("v1.txt", "v2.txt", "w1.txt", "d/.h/v1.txt"):
        storage.write_bytes(storage.join(root, name), b"x")

    def below(pattern):
        return [path for _, path in storage.find_files(storage.join(root, pattern))]

    assert below("v[12].txt") == ["v1.txt", "v2.txt"]
    assert below("?1.txt") == ["v1.txt", "w1.txt"]
    assert below("**/v1.txt") == ["d/.h/v1.txt", "v1.txt"]
    assert below("d/.h/*") == ["v1.txt"]
