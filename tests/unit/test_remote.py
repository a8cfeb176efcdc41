"""A bucket that fails, refuses or is not there: what is done again, and what is a sentence."""

import json
import os
import random
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pyarrow.fs
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from google.auth.exceptions import RefreshError, TransportError

from raybert import storage
from raybert.data.shards import open_shards
from raybert.errors import InputError, RunFailed
from raybert.storage import clients as remote
from tests.gcs import Fault

SMALL, BIG = random.Random(0).randbytes(1000), random.Random(1).randbytes(6 << 20)


@pytest.fixture
def bucket(gcs, request):
    name = "".join(c if c.isalnum() else "-" for c in request.node.name.lower())
    yield gcs.create_bucket(name)
    gcs.inject()


def local_copy(uri):
    with storage.local_copy(uri, ["x"]) as directory:
        return (directory / "x").read_bytes()


def opened(uri):
    with storage.open_uri(uri) as file:
        return file.read()


def through_arrow(uri):
    fs, path = pyarrow.fs.FileSystem.from_uri(storage.arrow_uri(uri))
    with fs.open_output_stream(path) as file:
        file.write(BIG)
    with fs.open_input_file(path) as file:
        return file.read()


def removed(uri):
    storage.remove(uri)
    return storage.exists(uri)


FUNCTIONS = {
    "read_bytes": (lambda uri: storage.read_bytes(f"{uri}/x"), SMALL),
    "read_range": (lambda uri: storage.read_range(f"{uri}/x", 5, 50), SMALL[5:50]),
    "read_ranges": (
        lambda uri: storage.read_ranges([(f"{uri}/x", 1, 2), (f"{uri}/x", 7, 9)]),
        [SMALL[1:2], SMALL[7:9]],
    ),
    "read_from": (lambda uri: storage.read_from(f"{uri}/x", 990), SMALL[990:]),
    "open": (lambda uri: opened(f"{uri}/x"), SMALL),
    "local_copy": (local_copy, SMALL),
    "size": (lambda uri: storage.size(f"{uri}/x"), 1000),
    "exists": (lambda uri: storage.exists(f"{uri}/x"), True),
    "list_dir": (lambda uri: len(storage.list_dir(uri)), 1),
    "list_files": (lambda uri: len(storage.list_files(uri)), 1),
    "write": (lambda uri: storage.write_bytes(f"{uri}/y", BIG) or storage.read_bytes(f"{uri}/y"), BIG),
    "upload": (lambda uri: storage.upload_file(BIG_FILE, f"{uri}/y") or storage.read_bytes(f"{uri}/y"), BIG),
    "remove": (lambda uri: removed(uri), False),
    "arrow": (lambda uri: through_arrow(f"{uri}/y"), BIG),
}
BIG_FILE = ""
KINDS = {
    "503": Fault("status", status=503),
    "429": Fault("status", status=429, burst=2),
    "cut": Fault("cut"),
    "lost": Fault("lost"),
    "refuse": Fault("refuse"),
}


def test_every_function_outlives_every_fault(bucket, gcs, tmp_path, monkeypatch):
    (tmp_path / "big").write_bytes(BIG)
    monkeypatch.setitem(globals(), "BIG_FILE", str(tmp_path / "big"))
    cases = [(f"{bucket}/{name}-{kind}", name, kind) for name in FUNCTIONS for kind in KINDS]
    for uri, _, _ in cases:
        storage.write_bytes(f"{uri}/x", SMALL)
    faults = [Fault(**{**vars(KINDS[kind]), "match": f"{name}-{kind}/", "seen": 0}) for _, name, kind in cases]
    # Parts of an upload under way are known by their session alone.
    gcs.inject(*faults, Fault("lost", match="upload_id", every=7), Fault("refuse", match="upload_id", every=9))

    def run(case):
        uri, name, kind = case
        function, expected = FUNCTIONS[name]
        assert function(uri) == expected, (name, kind)

    with ThreadPoolExecutor(len(cases)) as pool:
        list(pool.map(run, cases))
    assert gcs.injected().keys() == KINDS.keys()


def test_a_request_that_gets_no_byte_is_made_again(bucket, gcs, monkeypatch):
    monkeypatch.setattr(remote, "STALL", 3.0)
    storage.write_bytes(f"{bucket}/x", SMALL)
    gcs.inject(Fault("slow", match="alt=media", seconds=30))
    assert storage.read_bytes(f"{bucket}/x") == SMALL
    # Without another request the answer to the first would have come, late. On a busy machine a second may be late too.
    assert gcs.requests()["GET"] >= 2


def test_an_answer_that_nobody_expects_is_a_sentence(bucket, gcs):
    gcs.inject(Fault("status", status=418, message="not today", every=1))
    with pytest.raises(RunFailed, match=r"cannot be reached or answers with errors \(not today, 418\)"):
        storage.read_bytes(f"{bucket}/x")


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (Fault("status", status=403, message="denied", every=1), r"no permission .* \(403 .*roles/storage.objectAdmin"),
        (Fault("status", status=401, message="Unauthorized", every=1), r"expired or are wrong \(401 Unauthorized\)"),
        (
            Fault("status", match="^POST", status=403, message="denied", every=1),
            "write, list and delete objects in gs://",
        ),
        (Fault("status", match="^DELETE", status=403, message="denied", every=1), "delete objects in gs://"),
    ],
)
def test_a_refusal_is_a_sentence(bucket, gcs, fault, sentence):
    gcs.inject(fault)
    with pytest.raises(InputError, match=sentence) as refused:
        storage.require_writable(f"{bucket}/runs")
    assert "\n" not in str(refused.value)


def test_a_missing_bucket_is_a_sentence(gcs):
    for act in (storage.require_writable, storage.require_bucket, open_shards):
        with pytest.raises(InputError, match="There is no bucket gs://none; create it, or correct the URI gs://none/x"):
            act("gs://none/x")


def test_nothing_is_left_by_the_check(bucket, tmp_path):
    for root in (bucket, str(tmp_path)):
        storage.require_bucket(root)
        storage.require_writable(storage.join(root, "runs"))
        assert storage.list_files(root) == []
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        storage.require_writable(str(tmp_path / "file" / "runs"))


def test_what_another_process_writes_is_seen(bucket):
    assert storage.list_dir(bucket) == []
    other = fsspec.filesystem("gs", token="anon", skip_instance_cache=True)
    other.pipe_file(f"{bucket}/a/b", b"x")
    assert storage.list_dir(bucket) == [f"{bucket}/a"]
    assert storage.exists(f"{bucket}/a/b")


def test_ray_is_told_of_the_same_place(bucket, monkeypatch):
    storage.write_bytes(f"{bucket}/d/x", SMALL)
    fs, path = pyarrow.fs.FileSystem.from_uri(storage.arrow_uri(f"{bucket}/d/x"))
    assert fs.open_input_file(path).read() == SMALL
    # pyarrow marks a directory by an object of its own, which is no file of anybody's.
    fs.create_dir(path.rpartition("/")[0] + "/e")
    assert storage.list_files(bucket) == [f"{bucket}/d/x"]
    anonymous = bucket.replace("gs://", "gs://anonymous@")
    assert storage.arrow_uri(anonymous) == anonymous
    assert storage.list_files(anonymous) == [f"{anonymous}/d/x"]
    for name in ("STORAGE_EMULATOR_HOST", "CLOUD_STORAGE_EMULATOR_ENDPOINT"):
        monkeypatch.delenv(name)
    assert storage.arrow_uri("gs://b/x/") == "gs://b/x"
    assert storage.arrow_uri("s3://b/x") == "s3://b/x"
    assert storage.arrow_uri("az://b/x") == "fsspec+az://b/x"
    assert storage.arrow_uri("/b/x") == "/b/x"
    monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", "127.0.0.1:1")
    assert storage.arrow_uri("gs://b/x") == "gs://anonymous@b/x"
    assert os.environ["STORAGE_EMULATOR_HOST"] == "http://127.0.0.1:1", "one variable must do for both clients"


@pytest.mark.parametrize(("uri", "package"), [("s3://b/x", "s3fs"), ("az://c/x", "adlfs"), ("abfs://c/x", "adlfs")])
def test_a_package_that_is_missing_is_named(uri, package):
    pytest.importorskip("fsspec")
    with pytest.raises(InputError, match=f"pip install {package}"):
        storage.exists(uri)


@pytest.fixture
def google(gcs, monkeypatch, tmp_path):
    """As if there were no emulator, on a machine that no one is logged in on."""
    for name in ("STORAGE_EMULATOR_HOST", "CLOUD_STORAGE_EMULATOR_ENDPOINT", "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    yield gcs
    gcs.inject()
    remote._google.cache_clear()


def test_a_token_that_cannot_be_renewed_for_now_is_asked_for_again():
    """Unlike one that was revoked."""
    unreachable = RefreshError("Failed to retrieve the token from the metadata service")
    unreachable.__cause__ = TransportError("connection timed out")
    assert isinstance(remote.explain("gs://b/x", unreachable), RunFailed)
    assert isinstance(remote.explain("gs://b/x", RefreshError("invalid_grant")), InputError)


def test_no_credentials_is_a_sentence(google):
    with pytest.raises(InputError, match="There are no credentials for gs://b: run `gcloud auth"):
        storage.read_bytes("gs://b/x")


def test_credentials_come_from_googles_chain_and_expired_ones_are_a_sentence(google, monkeypatch, tmp_path):
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    account = {
        "type": "service_account",
        "client_email": "trainer@project.iam.gserviceaccount.com",
        "private_key": key.decode(),
        "private_key_id": "1",
        "token_uri": f"{google.endpoint}/token",
    }
    (tmp_path / "key.json").write_text(json.dumps(account))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
    fs, _ = storage.filesystem("gs://b/x")
    assert fs.credentials.credentials.service_account_email == account["client_email"]
    google.inject(Fault("status", match="POST /token", status=400, message="invalid_grant", every=1))
    with pytest.raises(InputError, match="credentials for gs://b have expired or are wrong"):
        storage.require_writable("gs://b/x")
    assert google.requests()["POST"] == 1, "a refused token was asked for again and again"


def test_what_azure_refuses_is_a_sentence():
    class HttpResponseError(Exception):
        """What azure-core raises; its package need not be installed."""

    class ResourceNotFoundError(HttpResponseError):
        pass

    found = remote.explain("az://box/x", ResourceNotFoundError("The specified container does not exist."))
    assert "no container az://box" in str(found)
    assert isinstance(found, InputError)
    busy = remote.explain("az://box/x", HttpResponseError("The server is busy."))
    assert "cannot be reached or answers with errors (The server is busy.)" in str(busy)
    assert isinstance(busy, RunFailed)
