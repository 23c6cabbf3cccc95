"A small server with the part of the Hugging Face Hub's HTTP interface that publishing and loading a model use"

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class Repo:
    "One repository: files by name of its newest commit"

    def __init__(self, private: bool = False):
        self.files, self.private, self.sha = {}, private, "0" * 40

    def commit(self, files: dict[str, bytes | None]):
        "Add or remove files; the commit is a hash of all of them"
        for name, content in files.items():
            self.files.pop(name, None) if content is None else self.files.update({name: content})
        self.sha = hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()


def entry(name: str, content: bytes) -> dict:
    "A file as the hub lists it; safetensors files are stored apart (LFS), as there"
    about = {"type": "file", "path": name, "rfilename": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
    if name.endswith(".safetensors"):
        digest = hashlib.sha256(content).hexdigest()
        about["lfs"] = {"oid": digest, "sha256": digest, "size": len(content), "pointerSize": 134}
    return about


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, content=b"", code=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, code, kind, text):
        self.answer({"error": text}, code, X_Error_Code=kind, X_Error_Message=text)

    def repo(self, name, write=False):
        "The repository, or None after an answer that refuses it"
        found, token = self.server.repos.get(name), self.headers.get("Authorization") == "Bearer hf_toy"
        if found is None or (found.private and not token):
            return self.refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        return self.refuse(403, "", "no right to write") if write and not token else found

    def handle_any(self):
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append(f"{self.command} {path}")
        for method, pattern, function in ROUTES:
            if self.command in method and (match := re.fullmatch(pattern, path)):
                return function(self, body, *match.groups())
        self.refuse(404, "EntryNotFound", f"no {path}")

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def info(self, _, name, revision=None):
        if repo := self.repo(name):
            if revision not in (None, "main", repo.sha):
                return self.refuse(404, "RevisionNotFound", "no such revision")
            files = [entry(*item) for item in repo.files.items()]
            self.answer({"id": name, "modelId": name, "sha": repo.sha, "private": repo.private, "siblings": files, "tags": []})

    def tree(self, _, name, revision):
        if repo := self.repo(name):
            self.answer([entry(*item) for item in repo.files.items()])

    def file(self, _, name, revision, file):
        if repo := self.repo(name):
            if file not in repo.files:
                return self.refuse(404, "EntryNotFound", f"no {file}")
            content, about = repo.files[file], entry(file, repo.files[file])
            self.answer(content, ETag=f'"{about.get("lfs", about)["oid"]}"', X_Repo_Commit=repo.sha)

    def create(self, body):
        if self.headers.get("Authorization") != "Bearer hf_toy":
            return self.refuse(401, "", "log in first")
        wanted = json.loads(body)
        name = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else wanted["name"]
        if name in self.server.repos:
            return self.answer({"error": "exists", "url": f"{self.server.url}/{name}"}, 409)
        self.server.repos[name] = Repo(wanted.get("private") or wanted.get("visibility") == "private")
        self.answer({"url": f"{self.server.url}/{name}", "name": name})

    def preupload(self, body, name, revision):
        if self.repo(name, write=True):
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular", "shouldIgnore": False} for f in files]
            self.answer({"files": modes})

    def batch(self, body, name):
        objects = [{**one, "actions": {"upload": {"href": f"{self.server.url}/upload/{one['oid']}", "header": {}}}} for one in json.loads(body)["objects"]]
        self.answer({"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")

    def upload(self, body, digest):
        assert hashlib.sha256(body).hexdigest() == digest
        self.server.objects[digest] = body
        self.answer()

    def commit(self, body, name, revision):
        if repo := self.repo(name, write=True):
            files = {}
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.server.objects[value["oid"]]
                elif line["key"] == "deletedFile":
                    files[value["path"]] = None
            repo.commit(files)
            self.answer({"commitUrl": f"{self.server.url}/{name}/commit/{repo.sha}", "commitOid": repo.sha, "hookOutput": ""})

    def validate(self, body):
        self.server.validated.append(json.loads(body)["content"])
        self.answer({"errors": [], "warnings": []})


ID = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    ("GET", f"/api/models/{ID}", Handler.info),
    ("GET", f"/api/models/{ID}/revision/([^/]+)", Handler.info),
    ("GET", f"/api/models/{ID}/tree/([^/]+)", Handler.tree),
    ("GET HEAD", f"/{ID}/resolve/([^/]+)/(.+)", Handler.file),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", f"/api/models/{ID}/preupload/([^/]+)", Handler.preupload),
    ("POST", rf"/{ID}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", "/upload/([0-9a-f]+)", Handler.upload),
    ("POST", f"/api/models/{ID}/commit/([^/]+)", Handler.commit),
    ("POST", "/api/validate-yaml", Handler.validate),
]


class Hub(ThreadingHTTPServer):
    "The server; `with Hub() as hub` serves `hub.url`"

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.objects, self.asked, self.validated = {}, {}, [], []
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()
