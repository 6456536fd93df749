"""A small HTTP server that answers as the Hub does: it takes pushes and gives out what was pushed."""

import base64
import hashlib
import json
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

OBJECT_ID = "0" * 40


class Hub(BaseHTTPRequestHandler):
    """Creates any repository, takes every file in the commit itself, remembers both, and gives the files back."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.tokens.add(self.headers.get("Authorization"))
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            name = f"me/{self.server.created[-1]['name']}"
            self.answer({"url": f"{self.server.url}/{name}", "id": name})
        elif "/preupload/" in self.path:
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            self.answer({"files": [file | {"shouldIgnore": False, "oid": None} for file in files]})
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            self.server.commits.append({file["path"]: base64.b64decode(file["content"]) for file in files})
            name = self.path.removeprefix("/api/models/").partition("/commit/")[0]
            self.server.repositories.setdefault(name, {}).update(self.server.commits[-1])
            self.answer({"commitUrl": f"{self.server.url}/{name}/commit/{OBJECT_ID}", "commitOid": OBJECT_ID})
        else:
            self.answer({})

    def do_GET(self):
        if self.path.startswith("/api/"):
            name = "/".join(self.path.split("?")[0].split("/")[3:5])
            held = self.server.repositories.get(name, {})
            if "/tree/" in self.path:
                folder = "/".join(self.path.split("?")[0].split("/")[7:])
                inside = {file: held[file] for file in held if file.startswith(f"{folder}/" if folder else "")}
                listed = [{"type": "file", "oid": "0", "size": len(inside[file]), "path": file} for file in inside]
                return self.answer(listed) if inside else self.missing("EntryNotFound")
            files = [{"rfilename": file} for file in held]
            return self.answer(
                {"id": name, "sha": OBJECT_ID, "siblings": files, "private": False, "tags": [], "name": "me"}
            )
        name, found, file = self.path.lstrip("/").partition("/resolve/")
        content = self.server.repositories.get(name, {}).get(file.partition("/")[2])
        if not found or content is None:
            return self.missing("EntryNotFound" if name in self.server.repositories else "RepoNotFound")
        self.respond(200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": OBJECT_ID})

    do_HEAD = do_GET

    def missing(self, code):
        self.respond(404, b"{}", {"X-Error-Code": code})

    def answer(self, content):
        self.respond(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def respond(self, status, body, headers):
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@contextmanager
def serve_hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.created, server.commits, server.tokens, server.repositories = [], [], set(), {}
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


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
