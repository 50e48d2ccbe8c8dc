"""A stand-in for the Hub: repositories in memory, the endpoints that huggingface_hub asks for an upload."""

from __future__ import annotations

import base64
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub:
    """What has been sent: `repos` {id: {"private", "files", "commits"}}, `collections`."""

    def __init__(self) -> None:
        self.repos: dict[str, dict] = {}
        self.collections: dict[str, dict] = {}
        self.blobs: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        self.refuse: str | None = None
        """A path of which every request gets status 403."""
        self.url = ""


@contextmanager
def serving():
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments) -> None:
            pass

        def answer(self, value, status: int = 200, **headers: str) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            for name, text in {"Content-Type": "application/json", **headers}.items():
                self.send_header(name.replace("_", "-"), text)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def handled(self) -> None:
            path = self.path.partition("?")[0]
            data = self.body()
            if not path.startswith("/blob/"):
                hub.tokens.add(self.headers.get("Authorization"))
            if hub.refuse and hub.refuse in path:
                self.answer({"error": "You have no right to do this"}, 403)
                return
            for pattern, method in ROUTES:
                if found := re.fullmatch(pattern, path):
                    method(self, data, *found.groups())
                    return
            self.answer({"error": f"no such place: {self.command} {path}"}, 404)

        do_GET = do_POST = do_PUT = do_HEAD = do_PATCH = handled

    def whoami(request, data) -> None:
        request.answer({"type": "user", "name": "someone", "orgs": [], "auth": {"type": "access_token"}})

    def create(request, data) -> None:
        wanted = json.loads(data)
        repo = f"{wanted.get('organization') or 'someone'}/{wanted['name']}"
        hub.repos.setdefault(
            repo, {"private": wanted.get("visibility") == "private", "files": {}, "commits": 0}
        )
        request.answer({"url": f"{hub.url}/{repo}", "name": repo, "id": repo})

    def info(request, data, repo, *rest) -> None:
        if repo not in hub.repos:
            request.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            return
        known = hub.repos[repo]
        request.answer({"id": repo, "private": known["private"], "sha": "0" * 40, "siblings": [], "tags": []})

    def preupload(request, data, repo, revision) -> None:
        files = [
            {"path": file["path"], "shouldIgnore": False, "oid": None,
             "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular"}
            for file in json.loads(data)["files"]
        ]  # fmt: skip
        request.answer({"files": files})

    def batch(request, data, repo) -> None:
        objects = [
            {**item, "authenticated": True, "actions": {"upload": {"href": f"{hub.url}/blob/{item['oid']}"}}}
            for item in json.loads(data)["objects"]
        ]
        request.answer({"transfer": "basic", "objects": objects})

    def blob(request, data, oid) -> None:
        hub.blobs[oid] = data
        request.answer({})

    def commit(request, data, repo, revision) -> None:
        files = {}
        for line in data.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = hub.blobs[value["oid"]]
        hub.repos[repo]["files"] |= files
        hub.repos[repo]["commits"] += 1
        request.answer({"commitOid": "1" * 40, "commitUrl": f"{hub.url}/{repo}/commit/{'1' * 40}"})

    def collect(request, data) -> None:
        wanted = json.loads(data)
        slug = f"{wanted['namespace']}/{wanted['title'].split(':')[0]}-0123456789abcdef01234567"
        hub.collections[slug] = {"private": wanted["private"], "items": []}
        request.answer(collection(slug, wanted["title"]))

    def collection(slug: str, title: str) -> dict:
        return {
            "slug": slug, "title": title, "owner": {"name": "someone"}, "items": [], "position": 0,
            "theme": "blue", "lastUpdated": "2026-01-01T00:00:00.000Z", "private": True,
            "upvotes": 0, "description": "",
        }  # fmt: skip

    def item(request, data, slug) -> None:
        hub.collections[slug]["items"].append(json.loads(data)["item"]["id"])
        request.answer(collection(slug, "x"))

    ROUTES = [
        (r"/api/whoami-v2", whoami),
        (r"/api/repos/create", create),
        (r"/api/validate-yaml", lambda request, data: request.answer({"errors": [], "warnings": []})),
        (r"/api/models/([\w.-]+/[\w.-]+)/preupload/(\w+)", preupload),
        (r"/api/models/([\w.-]+/[\w.-]+)/commit/(\w+)", commit),
        (r"/api/models/([\w.-]+/[\w.-]+)(/revision/\w+)?", info),
        (r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", batch),
        (r"/blob/(\w+)", blob),
        (r"/api/collections", collect),
        (r"/api/collections/([\w.-]+/[\w.-]+)/items", item),
    ]
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
