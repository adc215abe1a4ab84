"""A model hub on loopback for tests: the part of Hugging Face's API that huggingface_hub calls to download a model.

Large files are answered with a redirect and carry a SHA-256, small ones come at once and carry a git blob id, as there.
"""

import asyncio
import contextlib
import hashlib
import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

LARGE = (".safetensors", ".bin", ".pt", ".pth")
CHUNK = 64 * 1024


@dataclass
class FakeModel:
    """files: content by path. commits: of branches and tags. tokens: who may read it; None for everybody.

    gated: its pages are public, its files are not; otherwise those without a token do not learn that it exists.
    cut_after: path to byte counts: the connections for it break there, one after the other.
    """

    files: dict[str, bytes]
    commits: dict[str, str] = field(default_factory=lambda: {"main": "1" * 40})
    tokens: tuple[str, ...] | None = None
    gated: bool = False
    cut_after: dict[str, list[int]] = field(default_factory=dict[str, list[int]])

    @classmethod
    def of_directory(cls, directory: Path, **options: Any) -> "FakeModel":
        return cls({path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.is_file()}, **options)


class FakeModelHub:
    """A context manager; serves in a thread of its own. models: by id, may be changed at any time.

    num_gets, num_bytes: by path, what bodies were asked for and how much of them was sent. ranges: the Range headers.
    holding: set once a body that `hold` names is on hold. num_requests: of all kinds. known_tokens: others are "invalid
    credentials". broken: every answer is 503.
    """

    def __init__(self, models: dict[str, FakeModel] | None = None, known_tokens: tuple[str, ...] = ()) -> None:
        self.models = models or {}
        self.known_tokens = known_tokens
        self.num_gets: Counter[str] = Counter()
        self.num_bytes: Counter[str] = Counter()
        self.ranges: list[str] = []
        self.num_requests = 0
        self._held: set[str] = set()
        self._released = threading.Event()
        self.holding = threading.Event()
        self.broken = False
        self.url = self._files_url = ""
        self._loop = asyncio.new_event_loop()
        self._stopping: asyncio.Event | None = None

    def __enter__(self) -> "FakeModelHub":
        started = threading.Event()
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._serve(started)), daemon=True)
        self._thread.start()
        if not started.wait(10):
            raise RuntimeError("the model hub did not start")
        return self

    def __exit__(self, *_: object) -> None:
        assert self._stopping is not None
        self.release()
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(10)
        self._loop.close()

    def hold(self, *paths: str) -> None:
        """From now on their bodies stop after the first chunk, until `release`."""
        self._released.clear()
        self.holding.clear()
        self._held = set(paths)

    def release(self) -> None:
        self._held = set()
        self._released.set()

    async def _serve(self, started: threading.Event) -> None:
        self._stopping = asyncio.Event()
        app = web.Application(middlewares=[self._count])
        app.router.add_get("/api/models/{org}/{name}/revision/{revision}", self._info)
        app.router.add_get("/api/models/{org}/{name}/tree/{revision}", self._tree)
        app.router.add_get("/cdn/{org}/{name}/{path:.*}", self._content)
        app.router.add_get("/{org}/{name}/resolve/{revision}/{path:.*}", self._resolve)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        # The library itself follows a redirect that stays on the hub's host; large files live on another.
        for host in ("127.0.0.1", "127.0.0.2"):
            await web.TCPSite(runner, host, 0).start()
        self.url, self._files_url = (f"http://{host}:{port}" for host, port in runner.addresses)
        started.set()
        await self._stopping.wait()
        await runner.cleanup()

    @web.middleware
    async def _count(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.num_requests += 1
        if self.broken:
            return web.Response(status=503)
        token = _token(request)
        if token is not None and token not in self.known_tokens:
            return _error(401, None, "Invalid credentials in Authorization header")
        return await handler(request)

    def _find(self, request: web.Request, files: bool) -> tuple[str, FakeModel] | web.Response:
        model_id = f"{request.match_info['org']}/{request.match_info['name']}"
        model, token = self.models.get(model_id), _token(request)
        may_read = model is not None and (model.tokens is None or token in model.tokens)
        if model is not None and (may_read or (model.gated and not files)):
            return model_id, model
        if model is not None and model.gated:
            return _error(401 if token is None else 403, "GatedRepo", f"Access to model {model_id} is restricted.")
        return _error(401 if token is None else 404, "RepoNotFound", "Repository not found")

    def _commit(self, request: web.Request, model: FakeModel) -> str | web.Response:
        revision = request.match_info["revision"]
        if revision in model.commits.values():
            return revision
        return model.commits.get(revision) or _error(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    async def _info(self, request: web.Request) -> web.Response:
        found = self._find(request, files=False)
        if isinstance(found, web.Response):
            return found
        model_id, model = found
        commit = self._commit(request, model)
        if isinstance(commit, web.Response):
            return commit
        siblings = [{"rfilename": path} for path in model.files]
        gated = "manual" if model.gated else False
        body = {"id": model_id, "modelId": model_id, "sha": commit, "private": False, "gated": gated}
        return web.json_response({**body, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0})

    async def _tree(self, request: web.Request) -> web.Response:
        found = self._find(request, files=False)
        if isinstance(found, web.Response):
            return found
        entries: list[dict[str, Any]] = []
        for path, content in found[1].files.items():
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": _blob_id(content)}
            if path.endswith(LARGE):
                entry["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 134}
            entries.append(entry)
        return web.json_response(entries)

    async def _resolve(self, request: web.Request) -> web.StreamResponse:
        found = self._find(request, files=True)
        if isinstance(found, web.Response):
            return found
        model_id, model = found
        commit, path = self._commit(request, model), request.match_info["path"]
        if isinstance(commit, web.Response):
            return commit
        if path not in model.files:
            return _error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        headers = {"X-Repo-Commit": commit}
        if path.endswith(LARGE):
            content = model.files[path]
            headers |= {"X-Linked-Etag": f'"{_sha256(content)}"', "X-Linked-Size": str(len(content))}
            return web.Response(status=302, headers={**headers, "Location": f"{self._files_url}/cdn/{model_id}/{path}"})
        return await self._content(request, headers)

    async def _content(self, request: web.Request, headers: dict[str, str] | None = None) -> web.StreamResponse:
        model = self.models[f"{request.match_info['org']}/{request.match_info['name']}"]
        path = request.match_info["path"]
        content, begin, status = model.files[path], 0, 200
        end = len(content)
        response_headers = {**(headers or {}), "ETag": f'"{_blob_id(content)}"'}
        if (asked := request.headers.get("Range")) is not None and request.method == "GET":
            self.ranges.append(asked)
            first, _, last = asked.removeprefix("bytes=").partition("-")
            begin, end, status = int(first), min(end, int(last) + 1) if last else end, 206
            response_headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(content)}"
        response = web.StreamResponse(status=status, headers=response_headers)
        response.content_length = end - begin
        await response.prepare(request)
        if request.method == "GET":
            self.num_gets[path] += 1
            with contextlib.suppress(ConnectionError):  # the other side is gone
                await self._send(request, response, model, path, begin, end)
        return response

    async def _send(
        self, request: web.Request, response: web.StreamResponse, model: FakeModel, path: str, begin: int, end: int
    ) -> None:
        content, cuts = model.files[path], model.cut_after.get(path)
        cut = min(end, begin + cuts.pop(0)) if cuts else end
        for at in range(begin, cut, CHUNK):
            if at > begin and path in self._held:
                self.holding.set()
                await asyncio.to_thread(self._released.wait)
            piece = content[at : min(cut, at + CHUNK)]
            await response.write(piece)
            self.num_bytes[path] += len(piece)
        if cut < end and request.transport is not None:
            request.transport.close()


def _token(request: web.Request) -> str | None:
    value = request.headers.get("Authorization")
    return value.removeprefix("Bearer ") if value else None


def _error(status: int, code: str | None, message: str, headers: dict[str, str] | None = None) -> web.Response:
    more = {"X-Error-Code": code} if code else {}
    return web.json_response(
        {"error": message}, status=status, headers={**(headers or {}), **more, "X-Error-Message": message}
    )


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
