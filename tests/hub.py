"""A loopback stand-in for the Hugging Face hub and ModelScope, so that the real download code runs without a network.

    with Hub() as hub:
        hub.add("models", "owner/name", {"config.json": b"{}"})
        subprocess.run(..., env={**os.environ, **hub.environment(tmp_path)})

Uploads go the same way: `hub.uploads` lists the repositories that were made, with their visibility.

The endpoints are read when the clients are imported, so code under test runs in a subprocess with `environment()`.
`hub.calls` lists "METHOD path" of all requests.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


class Hub:
    """Repositories by (kind, id); kind is "models" or "datasets". One commit each, the branch main (and master)."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], dict[str, bytes]] = {}
        self.calls: list[str] = []
        self.uploads: dict[str, dict] = {}  # repository -> the request that made it, and whether it is private
        self.refuse: str | None = None  # a part of a path whose requests fail, to break an upload half-way
        self._blobs: dict[str, bytes] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def add(self, kind: str, name: str, files: dict[str, bytes | str | Path]) -> str:
        """Publish files (contents, or local paths); returns the commit."""
        read = {k: v.read_bytes() if isinstance(v, Path) else v.encode() if isinstance(v, str) else v for k, v in files.items()}
        self.repos[kind, name] = read
        return self.sha(kind, name)

    def add_folder(self, kind: str, name: str, folder: Path) -> str:
        return self.add(kind, name, {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()})

    def sha(self, kind: str, name: str) -> str:
        digest = hashlib.sha1()
        for path, data in sorted(self.repos[kind, name].items()):
            digest.update(path.encode() + b"\0" + data)
        return digest.hexdigest()

    def environment(self, home: Path) -> dict[str, str]:
        """Variables that send both hubs' clients here and keep their caches below `home`."""
        return {
            "HF_ENDPOINT": self.url, "HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1", "MODELSCOPE_ENDPOINT": self.url, "MODELSCOPE_DOMAIN": self.url.removeprefix("http://"),
            "MODELSCOPE_CACHE": str(home / "ms"), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
        }

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self._body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) if "Content-Length" in self.headers else self._chunks()
        self._answer()

    do_PUT = do_POST

    def _chunks(self) -> bytes:
        body = b""
        while "chunked" in (self.headers.get("Transfer-Encoding") or "") and (size := int(self.rfile.readline(), 16)):
            body += self.rfile.read(size)
            self.rfile.readline()
        return body

    def _answer(self) -> None:
        url = urlsplit(self.path)
        path, query = unquote(url.path), {k: v[0] for k, v in parse_qs(url.query).items()}
        self.hub.calls.append(f"{self.command} {self.path}")
        if self.hub.refuse and self.hub.refuse in path:
            return self._json({"error": "refused by the test"}, 403)
        for pattern, method in (
            (r"/api/repos/create", self._create),
            (r"/api/validate-yaml", self._card),
            (r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", self._preupload),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._lfs),
            (r"/api/v1/repos/models/([^/]+/[^/]+)/info/lfs/objects/batch", self._lfs),
            (r"/blob/([0-9a-f]{64})", self._blob),
            (r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", self._commit),
            (r"/api/v1/models/?", self._ms_create),
            (r"/api/v1/repos/models/([^/]+/[^/]+)/commit/([^/]+)", self._ms_commit),
            (r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/(.+))?", self._info),
            (r"/api/(models|datasets)/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", self._tree),
            (r"/api/(models|datasets)/([^/]+/[^/]+)/paths-info/(.+)", self._paths),
            (r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._file),
            (r"/api/v1/(models|datasets)/([^/]+/[^/]+)/repo(?:/files|/tree)", self._ms_files),
            (r"/api/v1/(models|datasets)/([^/]+/[^/]+)/repo", self._ms_file),
            (r"/api/v1/(models|datasets)/([^/]+/[^/]+)/revisions", self._ms_revisions),
            (r"/api/v1/(models|datasets)/([^/]+/[^/]+)", self._ms_info),
            (r"/api/v1/(datasets)/(\d+)/repo/tree", self._ms_files),
        ):
            match = re.fullmatch(pattern, path)
            if match:
                return method(*match.groups(), query=query)
        self._missing()

    # -- uploads --

    def _new(self, name: str, private: bool, body: dict) -> bool:
        if not (self.headers.get("Authorization") or self.headers.get("Cookie")):
            self._json({"error": "not logged in", "Message": "not logged in", "Success": False}, 401)
        elif ("models", name) in self.hub.repos:
            self._json({"error": "You already created this model repo", "Code": 10010203001, "Message": "exists already", "Success": False}, 409)
        else:
            self.hub.add("models", name, {})
            self.hub.uploads[name] = {"private": private, "body": body}
            return True
        return False

    def _create(self, query: dict) -> None:
        body = json.loads(self._body)
        name = f"{body['organization']}/{body['name']}" if body.get("organization") else body["name"]
        if self._new(name, body.get("visibility") == "private" or bool(body.get("private")), body):
            self._json({"url": f"{self.hub.url}/{name}", "name": name, "id": "0" * 24})

    def _card(self, query: dict) -> None:
        """The hub reads a model card's fields before it takes it; one rule of its own is enough here."""
        text = json.loads(self._body)["content"]
        wrong = [] if re.match(r"---\n(?s:.*)\nlicense: .*\n(?s:.*)---\n", text) else [{"message": "no front matter with a license"}]
        self._json({"errors": wrong, "warnings": []}, 400 if wrong else 200)

    def _preupload(self, name: str, revision: str, query: dict) -> None:
        files = json.loads(self._body)["files"]
        modes = [{"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular", "shouldIgnore": False} for f in files]
        self._json({"files": modes, "commitOid": self.hub.sha("models", name)})

    def _lfs(self, name: str, query: dict) -> None:
        objects = json.loads(self._body)["objects"]
        answered = [{**o, "authenticated": True, "actions": {"upload": {"href": f"{self.hub.url}/blob/{o['oid']}", "header": {}}}} for o in objects]
        self._json({"transfer": "basic", "objects": answered, "Code": 200, "Success": True, "Data": {"objects": answered}})

    def _blob(self, oid: str, query: dict) -> None:
        if hashlib.sha256(self._body).hexdigest() != oid:
            return self._json({"error": "another content"}, 400)
        self.hub._blobs[oid] = self._body
        self._json({})

    def _commit(self, name: str, revision: str, query: dict) -> None:
        for line in self._body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                self.hub.repos["models", name][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "lfsFile":
                self.hub.repos["models", name][entry["value"]["path"]] = self.hub._blobs[entry["value"]["oid"]]
        sha = self.hub.sha("models", name)
        self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha, "success": True})

    def _ms_create(self, query: dict) -> None:
        body = json.loads(self._body)
        if self._new(f"{body['Path']}/{body['Name']}", body.get("Visibility") == 1, body):
            self._json({"Code": 200, "Success": True, "Data": {"Id": 1, "Name": body["Name"], "Path": body["Path"]}})

    def _ms_commit(self, name: str, revision: str, query: dict) -> None:
        for action in json.loads(self._body)["actions"]:
            content = self.hub._blobs[action["sha256"]] if action["type"] == "lfs" else base64.b64decode(action["content"])
            self.hub.repos["models", name][action["path"]] = content
        self._json({"Code": 200, "Success": True, "Data": {"oid": self.hub.sha("models", name)}})

    # -- Hugging Face --

    def _info(self, kind: str, name: str, revision: str | None, query: dict) -> None:
        files = self._repo(kind, name, revision)
        if files is not None:
            self._json({"_id": "0" * 24, "id": name, "modelId": name, "sha": self.hub.sha(kind, name), "private": False, "gated": False,
                        "disabled": False, "downloads": 0, "likes": 0, "tags": [], "author": name.split("/")[0],
                        "lastModified": "2024-01-01T00:00:00.000Z", "createdAt": "2024-01-01T00:00:00.000Z",
                        "siblings": [{"rfilename": p} for p in sorted(files)]})

    def _tree(self, kind: str, name: str, revision: str, folder: str | None, query: dict) -> None:
        files = self._repo(kind, name, revision)
        if files is None:
            return
        inside = (folder or "").strip("/")
        prefix = inside + "/" if inside else ""
        below = {p: d for p, d in files.items() if p.startswith(prefix)}
        if inside and not below:
            return self._missing("EntryNotFound")
        deep = query.get("recursive", "false").lower() in ("true", "1")
        entries = {}
        for path, data in below.items():
            parts = path[len(prefix):].split("/")
            for i in range(1, len(parts) if deep else min(2, len(parts))):
                entries[prefix + "/".join(parts[:i])] = {"type": "directory", "path": prefix + "/".join(parts[:i]), "oid": "0" * 40, "size": 0}
            if deep or len(parts) == 1:
                entries[path] = self._entry(path, data)
        self._json([entries[k] for k in sorted(entries)])

    def _paths(self, kind: str, name: str, revision: str, query: dict) -> None:
        files = self._repo(kind, name, revision)
        if files is None:
            return
        body = self._body.decode()
        wanted = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body).get("paths", [])
        wanted = [wanted] if isinstance(wanted, str) else wanted
        found = [self._entry(p, files[p]) for p in wanted if p in files]
        found += [{"type": "directory", "path": p, "oid": "0" * 40} for p in wanted if any(f.startswith(p.strip("/") + "/") for f in files)]
        self._json(found)

    def _file(self, datasets: str | None, name: str, revision: str, path: str, query: dict) -> None:
        kind = "datasets" if datasets else "models"
        files = self._repo(kind, name, revision)
        if files is None:
            return
        if path not in files:
            return self._missing("EntryNotFound")
        self._bytes(files[path], {"X-Repo-Commit": self.hub.sha(kind, name)})

    @staticmethod
    def _entry(path: str, data: bytes) -> dict:
        return {"type": "file", "path": path, "oid": hashlib.sha1(data).hexdigest(), "size": len(data)}

    def _repo(self, kind: str, name: str, revision: str | None) -> dict[str, bytes] | None:
        files = self.hub.repos.get((kind, name))
        if files is None:
            self._missing("RepoNotFound")
        elif revision not in (None, "main", "master", self.hub.sha(kind, name)):
            files = None
            self._missing("RevisionNotFound")
        return files

    # -- ModelScope --

    def _ms_find(self, kind: str, name: str) -> tuple[str, dict[str, bytes]] | None:
        """A data set is named by owner/name or by the number that `_ms_info` gives it."""
        names = [n for k, n in sorted(self.hub.repos) if k == kind]
        if name.isdigit() and int(name) <= len(names):
            name = names[int(name) - 1]
        if (kind, name) in self.hub.repos:
            return name, self.hub.repos[kind, name]
        self._json({"Code": 10010205001, "Message": f"{name} not found", "Success": False}, 404)
        return None

    def _ms_info(self, kind: str, name: str, query: dict) -> None:
        if self._ms_find(kind, name):
            number = [n for k, n in sorted(self.hub.repos) if k == kind].index(name) + 1
            self._json({"Code": 200, "Success": True, "Data": {"Id": number, "Type": 4, "Name": name.split("/")[1], "Visibility": 5}})

    def _ms_revisions(self, kind: str, name: str, query: dict) -> None:
        if self._ms_find(kind, name):
            branches = [{"Revision": "master", "CreatedAt": 1700000000}]
            self._json({"Code": 200, "Success": True, "Data": {"RevisionMap": {"Branches": branches, "Tags": []}}})

    def _ms_files(self, kind: str, name: str, query: dict) -> None:
        found = self._ms_find(kind, name)
        if found is None:
            return
        page, size = int(query.get("PageNumber", 1)), int(query.get("PageSize", 10 ** 6))
        inside = query.get("Root", "").strip("/")
        prefix = inside + "/" if inside else ""
        deep = query.get("Recursive", "False").lower() == "true"
        sha, entries = self.hub.sha(kind, found[0]), {}
        for path, data in found[1].items():
            if not path.startswith(prefix):
                continue
            parts = path[len(prefix):].split("/")
            for i in range(1, len(parts) if deep else min(2, len(parts))):
                folder = prefix + "/".join(parts[:i])
                entries[folder] = {"Path": folder, "Name": parts[i - 1], "Type": "tree", "Size": 0, "Sha256": "", "Revision": sha}
            if deep or len(parts) == 1:
                entries[path] = {"Path": path, "Name": parts[-1], "Type": "blob", "Size": len(data),
                                 "Sha256": hashlib.sha256(data).hexdigest(), "Revision": sha, "CommittedDate": 1700000000}
        files = [entries[k] for k in sorted(entries)][(page - 1) * size:page * size]
        self._json({"Code": 200, "Success": True, "Data": {"Files": files, "TotalCount": len(entries)}})

    def _ms_file(self, kind: str, name: str, query: dict) -> None:
        found = self._ms_find(kind, name)
        if found is None:
            return
        if query.get("FilePath") not in found[1]:
            return self._json({"Code": 404, "Message": "file not found", "Success": False}, 404)
        self._bytes(found[1][query["FilePath"]], {})

    # -- answers --

    def _json(self, value: object, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _missing(self, code: str = "EntryNotFound") -> None:
        self._send(404, b'{"error": "not found"}', {"X-Error-Code": code, "X-Error-Message": "not found", "Content-Type": "application/json"})

    def _bytes(self, data: bytes, headers: dict[str, str]) -> None:
        headers = {**headers, "ETag": f'"{hashlib.sha256(data).hexdigest()}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked:
            start = int(asked[1])
            stop = min(int(asked[2]) + 1 if asked[2] else len(data), len(data))
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            return self._send(206, data[start:stop], headers)
        self._send(200, data, headers)

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
