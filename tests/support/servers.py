"""Servers on this machine: of a folder of shards, failing as real ones do, of W&B runs, and of a Hugging Face Hub."""

import base64
import hashlib
import json
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote


def free_port() -> int:
    """A port of this machine on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """URL of a server of this machine that answers with `handler`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class Faults:
    """What goes wrong: for each request that finds a file, the next entry of `plan`; nothing once the plan is used up."""

    def __init__(self, *plan: str) -> None:
        self.plan, self.requests = list(plan), 0

    def next(self) -> str:
        self.requests += 1
        return self.plan.pop(0) if self.plan else ""


@contextmanager
def http_server(folder: Path, faults: Faults | None = None, knows_ranges: bool = True) -> Iterator[str]:
    """URL of a web server for the files of a folder.

    Faults: `503`, `cut` (half of the answer, then the connection breaks), `stall` (no byte for 3 s), `slow` (in small pieces),
    `404`.
    """
    faults = faults or Faults()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_HEAD(self) -> None:
            self.answer(has_body=False)

        def do_GET(self) -> None:
            self.answer(has_body=True)

        def answer(self, has_body: bool) -> None:
            file = folder / self.path.lstrip("/")
            fault = faults.next() if has_body and file.suffix == ".tar" else ""
            if not file.is_file() or fault in ("404", "503"):
                self.send_response(int(fault or 404))
                self.send_header("Content-Length", "0")
                self.send_header("Connection", "close")
                self.end_headers()
                return
            content, status = file.read_bytes(), 200
            asked = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            whole = len(content)
            if asked and knows_ranges:
                status, content = 206, content[int(asked[1]) : int(asked[2]) + 1]
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            if status == 206:
                self.send_header("Content-Range", f"bytes {asked[1]}-{asked[2]}/{whole}")
            if knows_ranges:
                self.send_header("Accept-Ranges", "bytes")
            self.send_header("Connection", "close")
            self.end_headers()
            if not has_body:
                return
            if fault == "stall":
                time.sleep(3)
            elif fault == "cut":
                self.wfile.write(content[: len(content) // 2])
                self.close_connection = True
            elif fault == "slow":
                for start in range(0, len(content), 4096):
                    self.wfile.write(content[start : start + 4096])
                    time.sleep(0.01)
            else:
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with serving(Handler) as url:
        yield url


class WandbRuns:
    """What a W&B server holds: runs as {id: (summary, history)}; `views`, the reports and workspaces that were saved."""

    def __init__(self, runs: dict[str, tuple[dict, list[dict]]], state: str = "finished") -> None:
        self.runs, self.state, self.views = runs, state, []

    def answer(self, query: str, given: dict) -> dict:
        """The data of one GraphQL answer."""
        page = {"endCursor": "end", "hasNextPage": False}
        if "query Runs(" in query or "sweep(sweepName" in query:
            edges = [{"node": self.node(run_id), "cursor": run_id} for run_id in self.runs]
            runs = {"edges": edges, "pageInfo": page}
            project = {"internalId": "1", "id": "1", "runCount": len(edges), "readOnly": False, "runs": runs}
            sweep = {"id": "1", "name": "s1", "state": "FINISHED", "config": "method: grid", "runCount": len(edges)}
            sweep |= {"displayName": "s1", "bestLoss": None, "method": "grid", "priorRuns": {"edges": []}, "runs": runs}
            return {"project": {**project, "sweep": sweep}}
        if "query HistoryPage" in query:
            history = [json.dumps(entry) for entry in self.runs[given["run"]][1]]
            return {"project": {"run": {"history": history[given["minStep"] : given["maxStep"]]}}}
        if "query GetProjects" in query:
            own = {"id": "1", "name": "varlab", "entityName": "me", "createdAt": "", "isBenchmark": False, "user": None}
            return {"models": {"pageInfo": page, "edges": [{"node": own}]}}
        if "query ProjectInternalId" in query:
            return {"project": {"id": "1", "internalId": "1"}}
        if "upsertView(" in query:
            self.views.append(given)
            project = {"id": "1", "name": given["projectName"], "entityName": given["entityName"]}
            view = {**given, "id": f"view{len(self.views)}", "project": project, "updatedAt": "2026-01-01T00:00:00"}
            return {"upsertView": {"view": view, "inserted": True}}
        if "project(" in query:
            return {"project": {"internalId": "1", "run": self.node(given.get("name") or given.get("runName"))}}
        viewer = {"id": "1", "username": "me", "entity": "me", "email": "", "flags": None, "teams": {"edges": []}}
        return {"viewer": viewer, "serverInfo": None}

    def node(self, run_id: str) -> dict:
        """One run."""
        summary, history = self.runs[run_id]
        empty = dict.fromkeys(("sweepName", "group", "jobType", "commit", "description", "notes"))
        times = dict.fromkeys(("createdAt", "heartbeatAt"), "2026-01-01T00:00:00Z")
        return {
            **empty, **times, "id": run_id, "tags": [], "name": run_id, "displayName": summary.get("name", run_id), "state": self.state,
            "readOnly": False, "historyLineCount": len(history), "projectId": "1", "user": {"name": "me", "username": "me"},
            "config": "{}", "systemMetrics": "{}", "summaryMetrics": json.dumps(summary),
            "historyKeys": {"step": len(history), "lastStep": len(history) - 1, "keys": {}},
        }  # fmt: skip


@contextmanager
def wandb_server(runs: WandbRuns) -> Iterator[str]:
    """URL of a server that speaks the part of W&B's language which reading runs and saving reports needs."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            content = b""
            if self.path.startswith("/graphql"):
                request = json.loads(sent)
                content = json.dumps({"data": runs.answer(request["query"], request.get("variables") or {})}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with serving(Handler) as url:
        yield url


class HubModels:
    """What a Hugging Face Hub holds: files of models by name, one commit each. `private`: names that are not found without the
    token `secret`."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.downloads: list[str] = []
        self.cards: list[str] = []

    def commit(self, name: str) -> str:
        """A commit's hash, which follows from the files."""
        return hashlib.sha1(repr(sorted(self.files[name].items())).encode()).hexdigest()

    def post(self, path: str, sent: bytes) -> dict | None:
        """The answer to a request that creates a model or commits files; None for any other."""
        if path == "/api/repos/create":
            asked = json.loads(sent)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.files.setdefault(name, {})
            if asked.get("private") or asked.get("visibility") == "private":
                self.private.add(name)
            return {"url": f"{self.url}/{name}", "id": name}
        if path == "/api/validate-yaml":  # of a model card
            self.cards.append(json.loads(sent)["content"])
            return {"errors": [], "warnings": []}
        name, verb = re.match(r"/api/models/([^/]+/[^/]+)/(\w+)/main", path).groups()
        if verb == "preupload":
            given = [file["path"] for file in json.loads(sent)["files"]]
            return {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in given]}
        for line in map(json.loads, sent.splitlines()):
            if line["key"] == "file":
                self.files[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        oid = self.commit(name)
        return {"commitUrl": f"{self.url}/{name}/commit/{oid}", "commitOid": oid, "pullRequestUrl": None}

    url = ""


@contextmanager
def hub_server(models: HubModels) -> Iterator[str]:
    """URL of a server that speaks the part of the Hugging Face Hub's language which uploading and downloading a small model
    needs."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(self.path.split("?")[0])
            info = re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/(revision|tree)/([^/]+))?", path)
            file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            name = info[1] if info else file[1] if file else ""
            is_hidden = name in models.private and self.headers.get("Authorization") != "Bearer secret"
            if name not in models.files or is_hidden:
                return self.reply(b"", 401, {"X-Error-Code": "RepoNotFound"})
            oid, files = models.commit(name), models.files[name]
            revision = (info[3] if info else file[2]) or "main"
            if revision not in ("main", oid):
                return self.reply(b"", 404, {"X-Error-Code": "RevisionNotFound"})
            if info and info[2] == "tree":
                tree = [{"type": "file", "path": p, "size": len(c), "oid": git_hash(c)} for p, c in files.items()]
                return self.reply(json.dumps(tree).encode())
            if info:
                siblings = [{"rfilename": path} for path in files]
                about = {"id": name, "modelId": name, "sha": oid, "private": name in models.private, "tags": []}
                return self.reply(json.dumps({**about, "siblings": siblings, "downloads": 0, "likes": 0}).encode())
            if file[3] not in files:
                return self.reply(b"", 404, {"X-Error-Code": "EntryNotFound"})
            if self.command == "GET":
                models.downloads.append(file[3])
            content = files[file[3]]
            self.reply(content, headers={"ETag": f'"{git_hash(content)}"', "X-Repo-Commit": oid})

        def do_POST(self) -> None:
            sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Authorization") != "Bearer secret":
                return self.reply(b'{"error": "Invalid username or password."}', 401)
            self.reply(json.dumps(models.post(unquote(self.path.split("?")[0]), sent)).encode())

        def reply(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in {"Content-Type": "application/json", **(headers or {})}.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with serving(Handler) as models.url:
        yield models.url


def git_hash(content: bytes) -> str:
    """The hash of a file's content in git."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
