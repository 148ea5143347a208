"""A stand-in for the Hugging Face Hub over real HTTP, for the real clients: `HF_ENDPOINT=server.url`.

Repositories have commits; a branch moves with each. Large files are served as the hub does it: /resolve/ redirects to
another host (here another name of this one), which must never see the token. `knobs` make single files misbehave.
"""

import hashlib
import json
import os
import subprocess
import sys
import textwrap
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

LARGE = 1024
"""Files of at least so many bytes are LFS files."""
PAGE = 7
"""Entries on one page of a tree listing: few, so that clients have to turn pages."""

CHECKOUT = Path(__file__).resolve().parents[1]
PRELUDE = """
import json
from dataclasses import asdict
from pathlib import Path
from nemoflow import hub, locks
from nemoflow.data import download
from nemoflow.errors import NemoflowError
from nemoflow.store import Store
def show(value):
    print(json.dumps(value), flush=True)
try:
"""
EPILOGUE = """
except NemoflowError as error:
    show(str(error))
"""


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repository:
    """A repository: its commits, oldest first, and who may read it."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    def commit(self, files: dict[str, bytes]) -> str:
        """Add a commit with exactly these files; returns its name."""
        content = str([(len(self.commits), name, git_sha1(data)) for name, data in sorted(files.items())])
        name = hashlib.sha1(content.encode()).hexdigest()
        self.commits[name] = dict(files)
        return name


@dataclass
class Knobs:
    """What goes wrong with the files whose path matches: each a list of things used up in turn, one per transfer.

    drop: bytes after which a transfer breaks off. corrupt: whether a byte is changed. status: an error to answer with.
    """

    drop: list[int] = field(default_factory=list)
    corrupt: list[bool] = field(default_factory=list)
    status: list[int] = field(default_factory=list)
    always_corrupt: bool = False
    no_ranges: bool = False
    seconds_per_chunk: float = 0


class Hub:
    """The server, as a context manager. `datasets` and `models` by name; `tokens` are accepted, `granted` also to
    gated repositories. `log` lists (method, path, status, range, token) of every answer, `served` bytes by file."""

    def __init__(self):
        self.datasets: dict[str, Repository] = defaultdict(Repository)
        self.models: dict[str, Repository] = defaultdict(Repository)
        self.knobs: dict[str, Knobs] = defaultdict(Knobs)
        self.tokens = {"hf_known", "hf_granted"}
        self.granted = {"hf_granted"}
        self.log: list[tuple] = []
        self.served: dict[str, int] = defaultdict(int)
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.server.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    @property
    def other_host(self) -> str:
        """The host large files come from."""
        return f"http://localhost:{self.server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    def start(self, code: str, cwd: Path, token: str | None = None, **env: str) -> subprocess.Popen:
        """Start Python code whose clients use this hub (they read the environment when they are imported)."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        clean |= {"HF_ENDPOINT": self.url, "HF_HOME": str(cwd / ".hf"), "HF_UPDATE_DOWNLOAD_COUNTS": "0"}
        clean |= {"HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHECKOUT)}
        clean |= ({"HF_TOKEN": token} if token else {}) | env
        return subprocess.Popen(
            [sys.executable, "-c", code], cwd=cwd, env=clean, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def run(self, code: str, cwd: Path, token: str | None = None, **env: str) -> list:
        """Run such code; returns what it gave to show(), and the message of the NemoflowError that ended it, if any."""
        process = self.start(PRELUDE + textwrap.indent(textwrap.dedent(code), "    ") + EPILOGUE, cwd, token, **env)
        printed, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        return [json.loads(line) for line in printed.splitlines()]

    def knob(self, path: str) -> Knobs:
        """The knobs of a file."""
        return next((k for pattern, k in self.knobs.items() if fnmatch(path, pattern)), Knobs())


class _Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = ""):
        self.status, self.code, self.message = status, code, message


def _entry(path: str, data: bytes) -> dict:
    entry = {"type": "file", "path": path, "size": len(data), "oid": git_sha1(data)}
    if len(data) >= LARGE:
        pointer = f"version\noid sha256:{hashlib.sha256(data).hexdigest()}\nsize {len(data)}\n".encode()
        entry["oid"] = git_sha1(pointer)
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": len(pointer)}
    return entry


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_) -> None:
            pass

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            if "Content_Length" not in headers:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)
            self.record(status)

        def record(self, status: int) -> None:
            with hub.lock:
                hub.log.append((self.command, self.path, status, self.headers.get("Range"), self.token))

        @property
        def token(self) -> str | None:
            return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

        def respond(self) -> None:
            try:
                url = urlsplit(self.path)
                parts = url.path.strip("/").split("/")
                if parts[0] == "api" and parts[1] in ("datasets", "models"):
                    self.api(parts[1], parts[2:], parse_qs(url.query))
                elif parts[0] == "large":
                    self.large(*map(unquote, parts[1:]))
                elif parts[0] == "datasets":
                    self.resolve("datasets", "/".join(parts[1:3]), unquote(parts[4]), unquote("/".join(parts[5:])))
                elif "resolve" in parts:
                    self.resolve("models", "/".join(parts[:2]), unquote(parts[3]), unquote("/".join(parts[4:])))
                else:
                    raise _Refused(404)
            except _Refused as refused:
                headers = {"X_Error_Code": refused.code} if refused.code else {}
                self.answer(refused.status, X_Error_Message=refused.message or "refused", **headers)
            except ConnectionError:
                self.close_connection = True

        do_GET = do_HEAD = do_POST = respond

        def repository(self, kind: str, name: str) -> Repository:
            if self.token and self.token not in hub.tokens:
                raise _Refused(401, message="Invalid credentials in Authorization header")
            found = getattr(hub, kind).get(name)
            if found is None or (found.private and self.token not in hub.granted):
                raise _Refused(404 if self.token else 401, "RepoNotFound" if self.token else "")
            return found

        def readable(self, repository: Repository) -> None:
            if repository.gated and self.token not in hub.granted:
                raise _Refused(403 if self.token else 401, "GatedRepo", "Access is restricted")

        def files(self, repository: Repository, revision: str) -> tuple[str, dict[str, bytes]]:
            commit = repository.head if revision == "main" else revision
            if commit not in repository.commits:
                raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return commit, repository.commits[commit]

        def api(self, kind: str, parts: list[str], query: dict) -> None:
            name, action, rest = "/".join(parts[:2]), (parts[2:3] or ["revision"])[0], [unquote(p) for p in parts[3:]]
            repository = self.repository(kind, name)
            commit, files = self.files(repository, rest[0] if rest else "main")
            match action:
                case "revision":
                    found = {"id": name, "sha": commit, "gated": repository.gated, "private": repository.private}
                    if "expand" not in query:
                        found["siblings"] = [{"rfilename": path} for path in sorted(files)]
                case "paths-info":
                    body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                    found = [_entry(path, files[path]) for path in parse_qs(body)["paths"] if path in files]
                case "tree":
                    self.tree(files, "/".join(rest[1:]), query)
                    return
                case _:
                    raise _Refused(404)
            self.answer(200, json.dumps(found).encode(), Content_Type="application/json")

        def tree(self, files: dict[str, bytes], directory: str, query: dict) -> None:
            prefix = directory + "/" if directory else ""
            below = {path: data for path, data in sorted(files.items()) if path.startswith(prefix)}
            if not below:
                raise _Refused(404, "EntryNotFound")
            recursive = query.get("recursive", ["false"])[0].lower() == "true"
            entries = {}
            for path, data in below.items():
                steps = path[len(prefix) :].split("/")
                for depth in range(1, len(steps) if recursive else min(2, len(steps))):
                    folder = prefix + "/".join(steps[:depth])
                    entries[folder] = {"type": "directory", "path": folder, "oid": git_sha1(folder.encode()), "size": 0}
                if recursive or len(steps) == 1:
                    entries[path] = _entry(path, data)
            first = int(query.get("cursor", ["0"])[0])
            page = list(entries.values())[first : first + PAGE]
            headers = {}
            if first + PAGE < len(entries):
                link = f"{hub.url}{urlsplit(self.path).path}?recursive={recursive}&cursor={first + PAGE}"
                headers["Link"] = f'<{link}>; rel="next"'
            self.answer(200, json.dumps(page).encode(), Content_Type="application/json", **headers)

        def resolve(self, kind: str, name: str, revision: str, path: str) -> None:
            repository = self.repository(kind, name)
            commit, files = self.files(repository, revision)
            if path != "README.md":
                self.readable(repository)
            if path not in files:
                raise _Refused(404, "EntryNotFound")
            data = files[path]
            if len(data) < LARGE:
                self.send(path, data, X_Repo_Commit=commit, ETag=f'"{git_sha1(data)}"')
                return
            digest = hashlib.sha256(data).hexdigest()
            self.answer(
                302,
                Location=f"{hub.other_host}/large/{kind}/{quote(name, safe='')}/{commit}/{quote(path, safe='')}",
                X_Repo_Commit=commit,
                X_Linked_Etag=f'"{digest}"',
                X_Linked_Size=str(len(data)),
                ETag=f'"{digest}"',
            )

        def large(self, kind: str, name: str, commit: str, path: str) -> None:
            self.send(path, getattr(hub, kind)[name].commits[commit][path], ETag='"of the other host"')

        def send(self, path: str, data: bytes, **headers: str) -> None:
            knob, start, status = hub.knob(path), 0, 200
            asked = None if knob.no_ranges else self.headers.get("Range")
            if self.command == "HEAD":
                self.answer(200, Content_Length=str(len(data)), Accept_Ranges="bytes", **headers)
                return
            with hub.lock:
                if knob.status:
                    raise _Refused(knob.status.pop(0))
                broken = knob.corrupt.pop(0) if knob.corrupt else knob.always_corrupt
                drop = knob.drop.pop(0) if knob.drop else None
            if broken:
                middle = len(data) // 2
                data = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
            total = len(data)
            if asked:
                first, _, last = asked.removeprefix("bytes=").partition("-")
                start = int(first) if first else max(0, total - int(last))
                end = min(total, int(last) + 1) if first and last else total
                if start >= total:
                    self.answer(416, Content_Range=f"bytes */{total}")
                    return
                data, status = data[start:end], 206
                headers["Content_Range"] = f"bytes {start}-{end - 1}/{total}"
            self.send_response(status)
            for name, value in (headers | {"Content_Length": str(len(data)), "Accept_Ranges": "bytes"}).items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.record(status)
            self.transfer(path, data[:drop], knob.seconds_per_chunk)
            if drop is not None:
                self.wfile.flush()
                self.close_connection = True

        def transfer(self, path: str, data: bytes, seconds_per_chunk: float) -> None:
            step = 1 << 16 if seconds_per_chunk else len(data) or 1
            for at in range(0, len(data), step):
                self.wfile.write(data[at : at + step])
                with hub.lock:
                    hub.served[path] += len(data[at : at + step])
                threading.Event().wait(seconds_per_chunk)

    return Handler
