"""A small HTTP server that speaks the Hub's protocol, LFS among it, and fails on request."""

import base64
import hashlib
import json
import socket
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".arrow", ".png", ".npz")  # files that go to LFS
OWNERS = ("me", "team")


@dataclass
class Fault:
    """What happens to the next `times` requests whose path has `part`: a status, "hang" or "drop"."""

    part: str
    what: int | str
    times: int = 10**9


class Hub(BaseHTTPRequestHandler):
    """Creates repositories of `OWNERS`, remembers what is pushed, and gives it back.

    A repository is a dict from path to content, under its name, with datasets/ in front for a dataset.
    """

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        path, server = urlsplit(self.path).path, self.server
        body = self.body()
        if body is None or self.refused():
            return None
        server.tokens.add(self.headers.get("Authorization"))
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if "/preupload/" in path:
            files = [
                {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular"}
                for file in json.loads(body)["files"]
            ]
            return self.answer({"files": [file | {"shouldIgnore": False, "oid": None} for file in files]})
        if path.endswith("/info/lfs/objects/batch"):
            return self.answer({"transfer": "basic", "objects": [*map(self.lfs_object, json.loads(body)["objects"])]})
        if path == "/lfs/verify":
            wanted = json.loads(body)
            held = server.objects.get(wanted["oid"])
            return self.answer({}) if held and len(held) == wanted["size"] else self.error(404, "EntryNotFound")
        if "/commit/" in path:
            return self.commit(self.repository(path), [json.loads(line) for line in body.splitlines()])
        if "/paths-info/" in path:
            return self.answer(self.paths_info(self.repository(path), body))
        return self.answer({})

    def do_PUT(self):
        content = self.body()
        if content is None:
            return
        oid = self.path.rpartition("/")[2]
        if hashlib.sha256(content).hexdigest() != oid:
            return self.error(422, "WrongContent")
        self.server.objects[oid] = content
        self.answer({})

    def do_GET(self):
        if self.body() is None or self.refused():
            return None
        path = unquote(urlsplit(self.path).path)
        if path == "/api/whoami-v2":
            return self.answer({"name": "me", "type": "user", "orgs": [{"name": "team"}]})
        if path.startswith("/api/"):
            return self.describe(path)
        name, _, file = path.lstrip("/").partition("/resolve/")
        content = self.server.repositories.get(name, {}).get(file.partition("/")[2])
        if content is None:
            return self.error(404, "EntryNotFound" if name in self.server.repositories else "RepoNotFound")
        etag = hashlib.sha1(content).hexdigest()
        first = int((self.headers.get("Range") or "bytes=0-")[6:].partition("-")[0])
        status, headers = 200, {"ETag": f'"{etag}"', "X-Repo-Commit": self.server.head(name), "Accept-Ranges": "bytes"}
        if self.headers.get("Range"):
            status, headers["Content-Range"] = 206, f"bytes {first}-{len(content) - 1}/{len(content)}"
        self.respond(status, content[first:], headers)

    do_HEAD = do_GET

    def create(self, asked):
        owner, prefix = asked.get("organization") or "me", "datasets/" if asked.get("type") == "dataset" else ""
        name = f"{prefix}{owner}/{asked['name']}"
        if owner not in OWNERS:
            return self.error(403, "Forbidden")
        self.server.created.append(asked)
        status = 409 if name in self.server.repositories else 200
        self.server.repositories.setdefault(name, {})
        self.answer({"url": f"{self.server.url}/{name}", "id": name}, status)

    def lfs_object(self, asked):
        if asked["oid"] in self.server.objects:
            return asked
        upload = {"href": f"{self.server.url}/lfs/{asked['oid']}"}
        return asked | {"actions": {"upload": upload, "verify": {"href": f"{self.server.url}/lfs/verify"}}}

    def commit(self, name, lines):
        if name not in self.server.repositories:
            return self.error(404, "RepoNotFound")
        held, changed = self.server.repositories[name], {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                changed[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                changed[value["path"]] = self.server.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                held.pop(value["path"], None)
        held.update(changed)
        self.server.commits.append(changed)
        self.server.messages.append(next(line["value"]["summary"] for line in lines if line["key"] == "header"))
        head = self.server.head(name)
        self.answer({"commitUrl": f"{self.server.url}/{name}/commit/{head}", "commitOid": head})

    def repository(self, path):
        kind, owner, name = path.split("/")[2:5]
        return f"{'' if kind == 'models' else f'{kind}/'}{owner}/{name}"

    def describe(self, path):
        name = self.repository(path)
        held = self.server.repositories.get(name)
        if held is None:
            return self.error(404, "RepoNotFound")
        if "/tree/" in path:
            return self.tree(held, "/".join(path.split("/")[7:]))
        about = {"id": name.removeprefix("datasets/"), "sha": self.server.head(name), "private": False, "tags": []}
        self.answer(about | {"siblings": [{"rfilename": file} for file in held]})

    def tree(self, held, folder):
        start = f"{folder}/" if folder else ""
        inside = [file for file in held if file.startswith(start)]
        if folder and not inside:
            return self.error(404, "EntryNotFound")
        folders = {start + file[len(start) :].partition("/")[0] for file in inside if "/" in file[len(start) :]}
        if "recursive=true" not in self.path.lower():
            inside = [file for file in inside if "/" not in file[len(start) :]]
        self.answer([*(self.entry(file, held) for file in inside), *map(directory, sorted(folders))])

    def paths_info(self, name, body):
        held = self.server.repositories.get(name, {})
        wanted = json.loads(body)["paths"]
        found = [self.entry(file, held) for file in wanted if file in held]
        folders = {path for path in wanted if any(file.startswith(f"{path}/") for file in held)}
        return [*found, *map(directory, sorted(folders))]

    def entry(self, file, held):
        return {"type": "file", "oid": hashlib.sha1(held[file]).hexdigest(), "size": len(held[file]), "path": file}

    def body(self):
        """The body of the request; None if a fault has answered it already."""
        length = int(self.headers.get("Content-Length") or 0)
        self.server.requests.append(f"{self.command} {self.path}")
        fault = self.server.next_fault(self.path)
        if fault is None:
            return self.rfile.read(length) if not self.headers.get("Transfer-Encoding") else self.chunks()
        if fault == "hang":
            self.server.is_closing.wait()
        elif fault == "drop":
            self.rfile.read(length // 2)
        else:
            self.rfile.read(length) if not self.headers.get("Transfer-Encoding") else self.chunks()
            self.error(fault, "Fault")
            return None
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)
        return None

    def chunks(self):
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def refused(self):
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in self.server.refused_tokens:
            return False
        self.error(401, "InvalidToken")
        return True

    def error(self, status, code):
        self.respond(status, json.dumps({"error": code}).encode(), {"X-Error-Code": code})

    def answer(self, content, status=200):
        self.respond(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def respond(self, status, body, headers):
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass


def directory(path):
    return {"type": "directory", "oid": "0", "size": 0, "path": path}


class Server(ThreadingHTTPServer):
    def __init__(self):
        super().__init__(("127.0.0.1", 0), Hub)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.created, self.commits, self.messages, self.requests, self.faults = [], [], [], [], []
        self.tokens, self.refused_tokens, self.repositories, self.objects = set(), set(), {}, {}
        self.is_closing, self._lock = threading.Event(), threading.Lock()

    def fail(self, part, what, times=10**9):
        """Have the next `times` requests whose path has `part` fail: with a status, or "hang" or "drop"."""
        self.faults.append(Fault(part, what, times))

    def next_fault(self, path):
        with self._lock:
            for fault in self.faults:
                if fault.part in path and fault.times > 0:
                    fault.times -= 1
                    return fault.what
        return None

    def head(self, name):
        """The commit of a repository: it changes with its content."""
        held = self.repositories.get(name, {})
        return hashlib.sha1(repr([(file, hashlib.sha1(held[file]).hexdigest()) for file in held]).encode()).hexdigest()

    def handle_error(self, request, client_address):
        pass  # a client that was killed


@contextmanager
def serve_hub():
    server = Server()
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield server
    finally:
        server.is_closing.set()
        server.shutdown()
        server.server_close()


def publish(server, name, folder):
    """Have the server give out the files of `folder` as the repository `name`."""
    folder = Path(folder)
    files = [file for file in folder.rglob("*") if file.is_file()]
    server.repositories[name] = {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def environment(server, home):
    """Environment variables that make a process use `server` as the Hub, with its cache in `home`."""
    return {
        "HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": str(home),
    }  # fmt: skip
