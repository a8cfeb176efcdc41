"""A Google Cloud Storage server for tests: its JSON API over HTTP, in a process of its own, with faults on request.

`python -m tests.gcs` serves an empty project on a free port of the loopback address and prints the port. `Emulator`
starts one and tells it what to do wrong. What is spoken is what gcsfs and pyarrow's `GcsFileSystem` ask for: media,
multipart and resumable uploads, range reads, listings with prefix, delimiter and pages, delete, copy, rewrite, compose.

A fault is a rule: of each ``every`` requests whose ``METHOD /path?query`` matches ``match`` the first ``burst`` go
wrong in the way that ``kind`` says.
"""

import base64
import hashlib
import json
import re
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections import Counter
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import parse_qs, quote, unquote, urlsplit

import google_crc32c

from tests.waiting import LONGEST

Answer = tuple[int, bytes, dict[str, str]]


@dataclass
class Fault:
    """status: answer with that status and do nothing. cut: close in the middle of the answer's body. lost: do it and
    close without an answer. refuse: close in the middle of the request's body. slow: wait `seconds` before answering.
    """

    kind: Literal["status", "cut", "lost", "refuse", "slow"]
    match: str = "."
    every: int = 10**9
    burst: int = 1
    status: int = 503
    message: str = "injected fault"
    seconds: float = 0.0
    seen: int = field(default=0, compare=False)

    def strikes(self, request: str) -> bool:
        if not re.search(self.match, request):
            return False
        self.seen += 1
        return (self.seen - 1) % self.every < self.burst


@dataclass
class Object:
    """A stored object; its resource is what the JSON API shows of it."""

    data: bytes
    resource: dict[str, Any]


class Refused(Exception):  # noqa: N818 - an answer, not a fault of ours
    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        self.answer = _error(status, message, headers)


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> Answer:
    return status, json.dumps({"error": {"code": status, "message": message}}).encode(), headers or {}


def _json(value: Any, **headers: str) -> Answer:
    return 200, json.dumps(value).encode(), headers


class Project:
    """Buckets of objects, and uploads under way. One lock makes every operation atomic, as it is in the service."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.buckets: dict[str, dict[str, Object]] = {}
        self.uploads: dict[str, dict[str, Any]] = {}
        self.generation = 1_700_000_000_000_000

    def bucket(self, name: str) -> dict[str, Object]:
        if name not in self.buckets:
            raise Refused(404, "The specified bucket does not exist.")
        return self.buckets[name]

    def object(self, bucket: str, name: str) -> Object:
        found = self.bucket(bucket).get(name)
        if found is None:
            raise Refused(404, f"No such object: {bucket}/{name}")
        return found

    def put(self, bucket: str, name: str, data: bytes, about: dict[str, Any], query: dict[str, str]) -> dict[str, Any]:
        objects = self.bucket(bucket)
        wanted = query.get("ifGenerationMatch")
        if wanted is not None and wanted != (objects[name].resource["generation"] if name in objects else "0"):
            raise Refused(412, "At least one of the pre-conditions you specified did not hold.")
        self.generation += 1
        md5, crc = hashlib.md5(data).digest(), google_crc32c.Checksum(data).digest()
        now = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
        resource = {
            "kind": "storage#object",
            "id": f"{bucket}/{name}/{self.generation}",
            "name": name,
            "bucket": bucket,
            "generation": str(self.generation),
            "metageneration": "1",
            "contentType": about.get("contentType") or "application/octet-stream",
            "metadata": about.get("metadata") or {},
            "size": str(len(data)),
            "md5Hash": base64.b64encode(md5).decode(),
            "crc32c": base64.b64encode(crc).decode(),
            "etag": str(self.generation),
            "timeCreated": now,
            "updated": now,
            "storageClass": "STANDARD",
        }
        for key in ("md5Hash", "crc32c"):
            if about.get(key) not in (None, resource[key]):
                raise Refused(400, f"Provided {key} does not match what was received.")
        objects[name] = Object(data, resource)
        return resource

    def list(self, bucket: str, query: dict[str, str]) -> Answer:
        """Names in order, those below a delimiter as one prefix, a page at a time."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        first, end = query.get("startOffset", ""), query.get("endOffset")
        entries: dict[str, Object | None] = {}
        for name in sorted(self.bucket(bucket)):
            if not name.startswith(prefix) or name < first or (end is not None and name >= end):
                continue
            cut = name.find(delimiter, len(prefix)) if delimiter else -1
            if cut >= 0:
                entries[name[: cut + len(delimiter)]] = None
                if query.get("includeTrailingDelimiter") != "true" or cut + len(delimiter) != len(name):
                    continue
            entries[name] = self.buckets[bucket][name]
        names = [name for name in entries if name > query.get("pageToken", "")]
        page = names[: min(int(query.get("maxResults", 1000)), 1000)]
        found: dict[str, Any] = {
            "kind": "storage#objects",
            "items": [entry.resource for name in page if (entry := entries[name]) is not None],
            "prefixes": [name for name in page if entries[name] is None],
        }
        if len(page) < len(names):
            found["nextPageToken"] = page[-1]
        return _json(found)


class Handler(BaseHTTPRequestHandler):
    """One connection. `server` is a `Server`."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: "Server"

    def log_message(self, format: str, *args: Any) -> None:
        return

    def _serve(self) -> None:
        request = f"{self.command} {unquote(self.path)}"
        if self.path.startswith("/_faults"):
            return self._send(self._control(self._body()))
        fault = self.server.fault(request)
        if fault is not None and fault.kind == "refuse":
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            return self._hang_up()
        body = self._body()
        if fault is not None and fault.kind == "status":
            return self._send(_error(fault.status, fault.message))
        try:
            with self.server.project.lock:
                answer = self._answer(body)
        except Refused as refused:
            answer = refused.answer
        if fault is not None and fault.kind == "lost":
            return self._hang_up()
        if fault is not None and fault.kind == "slow":
            time.sleep(fault.seconds)
        return self._send(answer, cut=fault is not None and fault.kind == "cut")

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _serve  # noqa: N815 - names that http.server asks for

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, answer: Answer, *, cut: bool = False) -> None:
        status, body, headers = answer
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if cut else b"" if self.command == "HEAD" else body)
        if cut:
            self._hang_up()

    def _hang_up(self) -> None:
        self.wfile.flush()
        self.close_connection = True

    def _control(self, body: bytes) -> Answer:
        if self.command == "POST":
            self.server.set_faults([Fault(**rule) for rule in json.loads(body)])
        return _json({"injected": dict(self.server.injected), "requests": dict(self.server.requests)})

    # -- the API ------------------------------------------------------------------------------------------------

    def _answer(self, body: bytes) -> Answer:
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query, keep_blank_values=True).items()}
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        project = self.server.project
        match self.command, *parts:
            case "GET", "storage", "v1", "b":
                return _json({"items": [self._bucket(name) for name in sorted(project.buckets)]})
            case "POST", "storage", "v1", "b":
                name = json.loads(body)["name"]
                project.buckets.setdefault(name, {})
                return _json(self._bucket(name))
            case "GET", "storage", "v1", "b", bucket:
                project.bucket(bucket)
                return _json(self._bucket(bucket))
            case "GET", "storage", "v1", "b", bucket, "o":
                return project.list(bucket, query)
            case "GET", "storage", "v1", "b", bucket, "o", name if query.get("alt") != "media":
                return _json(project.object(bucket, name).resource)
            case ("GET", "storage", "v1", "b", bucket, "o", name) | (
                "GET", "download", "storage", "v1", "b", bucket, "o", name
            ):  # fmt: skip
                return self._media(project.object(bucket, name))
            case "DELETE", "storage", "v1", "b", bucket, "o", name:
                project.object(bucket, name)
                del project.buckets[bucket][name]
                return 204, b"", {}
            case "PATCH", "storage", "v1", "b", bucket, "o", name:
                found = project.object(bucket, name)
                found.resource["metadata"] |= json.loads(body).get("metadata", {})
                return _json(found.resource)
            case "POST", "storage", "v1", "b", bucket, "o", name, "rewriteTo" | "copyTo" as how, "b", to, "o", new:
                source = project.object(bucket, name)
                copied = project.put(to, new, source.data, source.resource | json.loads(body or b"{}"), query)
                done = {"done": True, "objectSize": copied["size"], "totalBytesRewritten": copied["size"]}
                return _json(copied if how == "copyTo" else {"resource": copied, **done})
            case "POST", "storage", "v1", "b", bucket, "o", name, "compose":
                wanted = json.loads(body)
                data = b"".join(project.object(bucket, part["name"]).data for part in wanted["sourceObjects"])
                return _json(project.put(bucket, name, data, wanted.get("destination", {}), query))
            case "POST" | "PUT" | "DELETE", "upload", "storage", "v1", "b", bucket, "o":
                return self._upload(bucket, query, body)
        return _error(501, f"this emulator does not know {self.command} {url.path}")

    @staticmethod
    def _bucket(name: str) -> dict[str, Any]:
        return {"kind": "storage#bucket", "name": name, "id": name, "location": "US", "storageClass": "STANDARD"}

    def _media(self, found: Object) -> Answer:
        data, size = found.data, len(found.data)
        headers = {
            "Content-Type": found.resource["contentType"],
            "X-Goog-Hash": f"crc32c={found.resource['crc32c']},md5={found.resource['md5Hash']}",
            "X-Goog-Generation": found.resource["generation"],
            "X-Goog-Stored-Content-Length": str(size),
        }
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return 200, data, headers
        if not wanted[1]:
            first, last = max(0, size - int(wanted[2])), size - 1
        else:
            first, last = int(wanted[1]), min(int(wanted[2] or size), size - 1)
        if first >= size:
            raise Refused(416, "The requested range cannot be satisfied.", {"Content-Range": f"bytes */{size}"})
        return 206, data[first : last + 1], headers | {"Content-Range": f"bytes {first}-{last}/{size}"}

    def _upload(self, bucket: str, query: dict[str, str], body: bytes) -> Answer:
        project = self.server.project
        if "upload_id" in query:
            return self._session(query["upload_id"], body)
        project.bucket(bucket)
        if query.get("uploadType") == "media":
            about = {"contentType": self.headers.get("Content-Type")}
            return _json(project.put(bucket, query["name"], body, about, query))
        if query.get("uploadType") == "multipart":
            boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])
            assert boundary is not None
            mark = b"--" + boundary[1].encode()
            first, second = body[body.index(mark) + len(mark) : body.rindex(mark)].split(mark, 1)
            about, data = json.loads(_part(first)[1]), _part(second)
            about.setdefault("contentType", data[0])
            return _json(project.put(bucket, query.get("name") or about["name"], data[1], about, query))
        about = json.loads(body or b"{}")
        about.setdefault("contentType", self.headers.get("X-Upload-Content-Type"))
        session, name = uuid.uuid4().hex, query.get("name") or about["name"]
        project.uploads[session] = {"bucket": bucket, "name": name, "about": about, "query": query, "data": bytearray()}
        host = self.headers["Host"]
        location = f"http://{host}/upload/storage/v1/b/{quote(bucket)}/o?uploadType=resumable&upload_id={session}"
        return 200, b"", {"Location": location, "X-GUploader-UploadID": session}

    def _session(self, session: str, body: bytes) -> Answer:
        """A chunk of a resumable upload, or a question about it. What came before is ignored when it comes again."""
        project = self.server.project
        upload = project.uploads.get(session)
        if upload is None:
            raise Refused(404, "There is no such upload.")
        if self.command == "DELETE":
            del project.uploads[session]
            return 499, b"", {}
        if "done" in upload:
            return _json(upload["done"])
        data: bytearray = upload["data"]
        wanted = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", self.headers.get("Content-Range", "bytes 0-0/*"))
        assert wanted is not None, self.headers["Content-Range"]
        total = None if wanted[2] == "*" else int(wanted[2])
        if "Content-Range" not in self.headers:
            total = len(body)
        if wanted[1] is not None:
            start = int(wanted[1])
            if start > len(data):
                raise Refused(503, f"Bytes {len(data)} to {start} are missing.")
            data += body[len(data) - start :]
        if total is not None and len(data) >= total:
            upload["done"] = project.put(
                upload["bucket"], upload["name"], bytes(data), upload["about"], upload["query"]
            )
            return _json(upload["done"])
        return 308, b"", {"Range": f"bytes=0-{len(data) - 1}"} if data else {}


def _part(text: bytes) -> tuple[str, bytes]:
    """Content type and body of one part of a multipart body; the line end before the next boundary is not its own."""
    text = text.removeprefix(b"\r\n").removeprefix(b"\n")
    head, body = re.split(rb"\r?\n\r?\n", text, maxsplit=1)
    kind = re.search(rb"(?i)content-type:\s*([^\r\n]+)", head)
    return kind[1].decode() if kind else "", body[: -2 if body.endswith(b"\r\n") else -1]


class Server(ThreadingHTTPServer):
    """The server, its faults and its counts."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.project = Project()
        self._lock = threading.Lock()
        self.set_faults([])

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def set_faults(self, rules: list[Fault]) -> None:
        with self._lock:
            self.faults = rules
            self.injected: Counter[str] = Counter()
            self.requests: Counter[str] = Counter()

    def fault(self, request: str) -> Fault | None:
        """The first fault that strikes this request; every rule counts it."""
        with self._lock:
            self.requests[request.partition(" ")[0]] += 1
            struck = [rule for rule in self.faults if rule.strikes(request)]
            if not struck:
                return None
            self.injected[struck[0].kind if struck[0].kind != "status" else str(struck[0].status)] += 1
            return struck[0]


class Emulator:
    """A server process and its remote control."""

    def __init__(self) -> None:
        self._process = subprocess.Popen([sys.executable, "-m", "tests.gcs"], stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.endpoint = f"http://127.0.0.1:{int(self._process.stdout.readline())}"

    def create_bucket(self, name: str) -> str:
        """Make a bucket and return its URI."""
        self._ask("POST", "/storage/v1/b", {"name": name})
        return f"gs://{name}"

    def inject(self, *faults: Fault) -> None:
        """From now on these faults, and no others; the counts begin anew."""
        self._ask("POST", "/_faults", [{k: v for k, v in asdict(fault).items() if k != "seen"} for fault in faults])

    def injected(self) -> dict[str, int]:
        """How many requests went wrong, by kind of fault (a status by its number)."""
        found: dict[str, int] = self._ask("GET", "/_faults")["injected"]
        return found

    def requests(self) -> dict[str, int]:
        """How many requests there were, by method, since the faults were last set."""
        found: dict[str, int] = self._ask("GET", "/_faults")["requests"]
        return found

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.endpoint + path, data=data, method=method)
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=LONGEST) as answer:
            return json.load(answer)

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait()


if __name__ == "__main__":
    server = Server()
    print(server.server_address[1], flush=True)
    server.serve_forever()
