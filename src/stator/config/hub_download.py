"""Brings a model from the hub into huggingface_hub's cache of this node, once however many processes ask.

Files that are complete in the cache are never fetched again, so that a download that was interrupted goes on with the
file it was at; within a run a broken connection goes on at its byte. Imported only where a hub id is used: it costs
half a second, and the library reads its environment variables (HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE, ...)
then.
"""

import contextlib
import fcntl
import json
import logging
import os
import queue
import re
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Generator
from pathlib import Path
from typing import Any, TypeVar, cast

from huggingface_hub import (
    HfApi,
    constants,
    get_cached_repo_tree,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import CachedRepoTreeNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import disable_progress_bars

from stator.config import hub_errors
from stator.core.hub_files import (
    SAFETENSORS_INDEX,
    DownloadProgress,
    Needs,
    format_bytes,
    small_files,
    weight_files,
)
from stator.errors import ConfigError

logger = logging.getLogger(__name__)

T = TypeVar("T")

NUM_CONNECTIONS = 8
ATTEMPTS = 4
RETRY_DELAY_S = 1.0
LOCK_POLL_S = 0.2
STILL_WAITING_S = 60.0

_COMMIT = re.compile(r"[0-9a-f]{40}")
_CONFIG = "config.json"


class Stopped(Exception):
    """The process is asked to end; what is complete stays in the cache."""


def free_bytes(directory: Path) -> int:
    """Of the file system that holds the directory, which need not exist yet."""
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    return shutil.disk_usage(existing).free


class ModelDownload:
    """One `run`. Raises ConfigError, or Stopped soon after `stop` is set. commit: known after `run`."""

    def __init__(self, model: str, revision: str | None, needs: Needs, stop: threading.Event) -> None:
        self.commit = ""
        self._model, self._revision, self._needs, self._stop = (
            model,
            revision or constants.DEFAULT_REVISION,
            needs,
            stop,
        )
        self._cache = Path(constants.HF_HUB_CACHE)
        folder = "models--" + model.replace("/", "--")
        self._storage, self._locks = self._cache / folder, self._cache / ".locks" / folder

    def run(self) -> Path:
        _quiet()
        try:
            return self._run()
        except (ConfigError, Stopped):
            raise
        except Exception as error:
            # Whatever the library raises: the start of a process is the edge where it becomes one line.
            logger.debug("the download of %s failed", self._model, exc_info=True)
            raise hub_errors.explain(error, self._model, self._revision) from None

    def _run(self) -> Path:
        self.commit, online = self._resolve_commit()
        if not self._is_complete():
            self._complete(online)
        logger.info("model %s: commit %s, in %s", self._model, self.commit, self._snapshot)
        return self._snapshot

    def _complete(self, online: bool) -> None:
        try:
            if online:
                self._fetch_all()
                return
            reason = "no network"
        except Exception as error:
            if not hub_errors.is_transient(error) or self._lacks() is not None:
                raise
            reason = type(hub_errors.root_of(error)).__name__
        lacks = self._lacks()
        if lacks is not None:
            raise self._incomplete(lacks, reason)
        logger.warning("model %s: taken from the cache without asking the hub (%s)", self._model, reason)

    def _incomplete(self, lacks: str, reason: str) -> ConfigError:
        if constants.HF_HUB_OFFLINE:
            return hub_errors.offline(self._model, lacks)
        return ConfigError(f"model {self._model}: {hub_errors.not_reached(reason)}")

    @property
    def _snapshot(self) -> Path:
        return self._storage / "snapshots" / self.commit

    def _resolve_commit(self) -> tuple[str, bool]:
        """The commit, and whether the hub may be asked for its files."""
        offline = constants.HF_HUB_OFFLINE
        if _COMMIT.fullmatch(self._revision):
            return self._revision, not offline
        cached = self._cached_commit()
        if offline:
            if cached is None:
                raise hub_errors.offline(self._model, f"revision {self._revision} of it")
            return cached, False
        api = HfApi(endpoint=constants.ENDPOINT)
        try:
            info = self._retrying(lambda: api.model_info(self._model, revision=self._revision, timeout=10), "the hub")
        except Exception as error:
            if cached is None or not hub_errors.is_transient(error):
                raise
            logger.warning(
                "model %s: the hub cannot be asked where %s is now (%s); taking commit %s from the cache",
                self._model,
                self._revision,
                type(hub_errors.root_of(error)).__name__,
                cached,
            )
            return cached, False
        if info.sha is None:
            raise ConfigError(
                f"model {self._model}: {constants.ENDPOINT} does not say which commit {self._revision} is"
            )
        self._remember(info.sha)
        return info.sha, True

    def _remember(self, commit: str) -> None:
        """Where the branch or tag was last seen: what it means without network. The cache may be read-only."""
        ref = self._storage / "refs" / self._revision
        part = ref.with_name(f"{ref.name}.{os.getpid()}.tmp")
        with contextlib.suppress(OSError):
            if ref.exists() and ref.read_text() == commit:
                return
            ref.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(commit)
            part.replace(ref)

    def _cached_commit(self) -> str | None:
        found = try_to_load_from_cache(self._model, _CONFIG, cache_dir=self._cache, revision=self._revision)
        return Path(found).parent.name if isinstance(found, str) else None

    def _lacks(self) -> str | None:
        """What the cache has not, judged by the files themselves: a list of them may never have been there."""
        names = _names_in(self._snapshot)
        if _CONFIG not in names:
            return f"commit {self.commit} of it"
        weights = weight_files(names, self._indexed(), self._needs)
        missing = [name for name in weights if name not in names]
        if missing:
            return f"{missing[0]} of it ({len(missing)} files are missing)"
        return None if weights or self._needs is Needs.TOKENIZER else "weights of it"

    def _is_complete(self) -> bool:
        """Whether everything is there by the cached list of the commit's files; without a list it counts as not."""
        try:
            listing = self._listing_in_cache()
        except CachedRepoTreeNotFoundError:
            return False
        wanted = small_files(listing, self._needs)
        if not self._all_present(wanted):
            return False
        weights = weight_files(listing, self._indexed(), self._needs)
        return self._all_present(weights) and (bool(weights) or self._needs is Needs.TOKENIZER)

    def _all_present(self, names: Collection[str]) -> bool:
        return all((self._snapshot / name).exists() for name in names)

    def _listing_in_cache(self) -> dict[str, RepoFile]:
        """Without the names that contents have in the cache: the library does not give them here."""
        files = get_cached_repo_tree(self._model, revision=self.commit, cache_dir=self._cache)
        return {file.path: file for file in files}

    def _listing(self) -> dict[str, RepoFile]:
        api = HfApi(endpoint=constants.ENDPOINT)

        def ask() -> dict[str, RepoFile]:
            entries = api.list_repo_tree(self._model, recursive=True, revision=self.commit)
            return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

        def keep() -> None:
            snapshot_download(
                self._model,
                revision=self.commit,
                cache_dir=self._cache,
                endpoint=constants.ENDPOINT,
                allow_patterns=[_CONFIG],
                max_workers=1,
            )

        listing = self._retrying(ask, "the list of files")
        # Of the library's calls this one keeps the list in the cache, where we and vLLM find it the next time.
        self._retrying(keep, _CONFIG)
        return listing

    def _fetch_all(self) -> None:
        listing = self._listing()
        if _CONFIG not in listing:
            raise ConfigError(
                f"model {self._model}: there is no {_CONFIG} in {constants.ENDPOINT}/{self._model}/tree/{self.commit}; "
                "expected a model in Hugging Face's layout (config.json, tokenizer.json, *.safetensors)"
            )
        # Two locks: who needs the tokenizer only does not wait for the weights.
        self._fetch_stage("files", [listing[name] for name in small_files(listing, self._needs)])
        names = weight_files(listing, self._indexed(), self._needs)
        absent = [name for name in names if name not in listing]
        if absent:
            raise ConfigError(
                f"model {self._model}: {SAFETENSORS_INDEX} names {absent[0]}, which the hub does not have"
            )
        if not names and self._needs is not Needs.TOKENIZER:
            wanted = "*.safetensors" if self._needs is Needs.WEIGHTS else "*.safetensors, *.bin or *.pt"
            raise ConfigError(f"model {self._model}: it has no weights in a format that is of use here ({wanted})")
        self._fetch_stage("weights", [listing[name] for name in names])

    def _indexed(self) -> set[str] | None:
        path = self._snapshot / SAFETENSORS_INDEX
        if self._needs is Needs.TOKENIZER or not path.exists():
            return None
        try:
            weight_map: Any = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            return {str(name) for name in weight_map.values()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"model {self._model}: {path} is not an index of weights: {error!r}") from error

    def _fetch_stage(self, stage: str, files: list[RepoFile]) -> None:
        if not self._missing(files):
            return
        with self._lock(stage):
            missing = self._missing(files)  # another process may have brought them while we waited
            if missing:
                self._remove_abandoned(missing)
                fetched = [file for file in missing if not (self._storage / "blobs" / _etag(file)).exists()]
                num_bytes = sum(file.size for file in fetched)
                self._check_disk(num_bytes)
                self._download(missing, num_bytes)

    def _missing(self, files: list[RepoFile]) -> list[RepoFile]:
        return [file for file in files if not (self._snapshot / file.path).exists()]

    @contextlib.contextmanager
    def _lock(self, stage: str) -> Generator[None]:
        """Held by the one process of this node (or of those that share the cache) that downloads."""
        self._locks.mkdir(parents=True, exist_ok=True)
        fd = os.open(self._locks / f"stator-{stage}.lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            began = time.monotonic()
            said: float | None = None
            while not _try_lock(fd):
                now = time.monotonic()
                if said is None or now - said >= STILL_WAITING_S:
                    said = now
                    logger.info(
                        "model %s: another process downloads its %s; waiting (%.0f s)", self._model, stage, now - began
                    )
                self._pause(LOCK_POLL_S)
            yield
        finally:
            os.close(fd)  # which unlocks

    def _remove_abandoned(self, files: list[RepoFile]) -> None:
        """Parts of files that processes killed in mid-download left; the library never goes on with them.

        Only where the library's own lock of the file is free: somebody else may be downloading it.
        """
        for file in files:
            parts = list((self._storage / "blobs").glob(f"{_etag(file)}.*.incomplete"))
            if not parts:
                continue
            with contextlib.suppress(OSError):
                fd = os.open(self._locks / f"{_etag(file)}.lock", os.O_RDWR | os.O_CREAT, 0o664)
                try:
                    for part in parts if _try_lock(fd) else ():
                        part.unlink(missing_ok=True)
                finally:
                    os.close(fd)

    def _check_disk(self, num_bytes: int) -> None:
        free = free_bytes(self._cache)
        if free < num_bytes:
            raise ConfigError(
                f"model {self._model}: {format_bytes(num_bytes)} are to be downloaded, and the disk of {self._cache} "
                f"has {format_bytes(free)} free; free some, or set HF_HOME to a directory on a larger one"
            )

    def _download(self, files: list[RepoFile], num_bytes: int) -> None:
        logger.info(
            "model %s: downloading %d files, %s, of commit %s into %s",
            self._model,
            len(files),
            format_bytes(num_bytes),
            self.commit,
            self._cache,
        )
        counter = _Counter(DownloadProgress(num_bytes, len(files), time.monotonic()), self._model, self._stop)
        pending, results = deque(files), queue.SimpleQueue[tuple[RepoFile, BaseException | None]]()

        def work() -> None:
            while not counter.given_up.is_set():
                try:
                    file = pending.popleft()
                except IndexError:
                    return
                error: BaseException | None = None
                try:
                    self._fetch(file, counter)
                except BaseException as raised:
                    error = raised
                results.put((file, error))

        # Daemons: a process that is asked to end does not wait for a server that says nothing.
        for number in range(min(NUM_CONNECTIONS, len(files))):
            threading.Thread(target=work, name=f"download {self._model} {number}", daemon=True).start()
        try:
            for _ in files:
                file, error = self._next(results)
                if error is not None:
                    raise error
                counter.finished(file.path)
        finally:
            counter.given_up.set()
        counter.done()

    def _next(self, results: "queue.SimpleQueue[tuple[RepoFile, BaseException | None]]") -> Any:
        while True:
            if self._stop.is_set():
                raise Stopped
            with contextlib.suppress(queue.Empty):
                return results.get(timeout=LOCK_POLL_S)

    def _fetch(self, file: RepoFile, counter: "_Counter") -> None:
        counted = 0

        def count(num_bytes: int) -> None:
            nonlocal counted
            counted += num_bytes
            counter.received(num_bytes)

        def attempt() -> None:
            count(-counted)  # what an attempt before this one fetched is gone
            hf_hub_download(
                self._model,
                file.path,
                revision=self.commit,
                cache_dir=self._cache,
                endpoint=constants.ENDPOINT,
                tqdm_class=cast(Any, _bar_class(count)),
            )

        self._retrying(attempt, file.path)

    def _retrying(self, call: Callable[[], T], what: str) -> T:
        for attempt in range(ATTEMPTS):
            try:
                return call()
            except Exception as error:
                if attempt == ATTEMPTS - 1 or not hub_errors.is_transient(error):
                    raise
                cause = type(hub_errors.root_of(error)).__name__
                logger.warning("model %s: %s: %s; trying again", self._model, what, cause)
            self._pause(RETRY_DELAY_S * 2**attempt)
        raise AssertionError("unreachable")

    def _pause(self, seconds: float) -> None:
        if self._stop.wait(seconds):
            raise Stopped


class _Counter:
    """Bytes of all connections, on the log."""

    def __init__(self, progress: DownloadProgress, model: str, stop: threading.Event) -> None:
        self.given_up = threading.Event()
        self._progress, self._model, self._stop = progress, model, stop
        self._mutex = threading.Lock()

    def received(self, num_bytes: int) -> None:
        """Raises Stopped in the connection's thread, which makes the library remove the part that it has."""
        if self._stop.is_set() or self.given_up.is_set():
            raise Stopped
        with self._mutex:
            line = self._progress.received(num_bytes, time.monotonic())
        if line is not None:
            logger.info("model %s: %s", self._model, line)

    def finished(self, name: str) -> None:
        with self._mutex:
            line = self._progress.finished(name, time.monotonic())
        logger.info("model %s: %s", self._model, line)

    def done(self) -> None:
        logger.info("model %s: %s", self._model, self._progress.done(time.monotonic()))


def _bar_class(count: Callable[[int], None]) -> type:
    """What the library takes for a tqdm class. `update` gets the bytes of the file, `update_transfer` those of the
    network, which may be fewer."""

    class Bar:
        def __init__(self, *_: Any, total: int | None = None, **__: Any) -> None:
            self.total, self.n = total, 0

        def __enter__(self) -> "Bar":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def update(self, n: float | None = 1) -> None:
            self.n += int(n or 0)
            count(int(n or 0))

        def update_transfer(self, n: float | None = 1) -> None:
            pass

        def set_postfix_str(self, *_: Any, **__: Any) -> None:
            pass

        set_transfer_postfix_str = set_description = set_description_str = refresh = close = set_postfix_str

    return Bar


def _etag(file: RepoFile) -> str:
    """The name of the file's content in the cache."""
    return file.lfs.sha256 if file.lfs is not None else file.blob_id


def _names_in(snapshot: Path) -> set[str]:
    return {str(path.relative_to(snapshot)) for path in snapshot.rglob("*") if path.exists() and not path.is_dir()}


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        # Some network file systems have no locks: then files may be fetched twice, and are right all the same.
        logger.debug("no lock on this file system: %s", error)
    return True


def _quiet() -> None:
    """No bars into a pipe, and no line for each request: its address may hold a signature."""
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
        disable_progress_bars()
    for name in ("httpx", "httpx2"):
        library = logging.getLogger(name)
        library.setLevel(max(logging.WARNING, library.level))
