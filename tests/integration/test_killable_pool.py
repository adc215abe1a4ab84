"""Jobs in processes that are killed: real processes, which loop, crash, eat memory and print."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from stator.runtime.killable import JobFailed, JobKilled, JobTooLong, KillablePool, PoolUnavailable

WORKER = (sys.executable, str(Path(__file__).with_name("killable_worker.py")))
PLENTY = 60.0


@contextlib.asynccontextmanager
async def pool(*arguments: str, **options: Any) -> AsyncIterator[KillablePool]:
    made = KillablePool("the test process", (*WORKER, *arguments), **options)
    try:
        async with asyncio.timeout(PLENTY):
            yield made
    finally:
        await made.close()


async def pid_of(pool: KillablePool) -> int:
    return int(await pool.submit(b"pid", PLENTY))


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_jobs_are_answered_by_one_process_in_turn() -> None:
    async def run() -> None:
        async with pool() as made:
            payloads = [b"echo " + bytes([number]) * number * 1000 for number in range(200)]
            answers = await asyncio.gather(*(made.submit(payload, PLENTY) for payload in payloads))
            assert [b"echo " + answer for answer in answers] == payloads
            large = os.urandom(5_000_000)
            assert await made.submit(b"echo " + large, PLENTY) == large
            pid = await pid_of(made)
            assert pid == await pid_of(made) != os.getpid()
        assert not is_alive(pid)

    asyncio.run(run())


def test_a_job_that_does_not_end_is_killed_and_the_next_gets_a_new_process(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        async with pool() as made:
            before = await pid_of(made)
            stuck = made.submit(b"loop", 0.2)
            after = made.submit(b"pid", PLENTY)
            with pytest.raises(JobTooLong, match=r"0\.2 seconds"):
                await stuck
            assert int(await after) != before
            assert not is_alive(before)

    asyncio.run(run())
    assert "the test process: a job of 4 bytes was killed after 0.2 seconds" in caplog.text


def test_a_process_that_ends_fails_its_job_alone() -> None:
    async def run() -> None:
        async with pool() as made:
            crash, after = made.submit(b"crash", PLENTY), made.submit(b"echo a", PLENTY)
            with pytest.raises(JobKilled, match="status 7"):
                await crash
            assert await after == b"a"
            os.kill(await pid_of(made), signal.SIGKILL)
            # Noticed by the next job, whose fault it is not; but nobody can tell.
            with contextlib.suppress(JobKilled):
                await made.submit(b"echo b", PLENTY)
            assert await made.submit(b"echo c", PLENTY) == b"c"

    asyncio.run(run())


def test_an_exception_is_told_by_its_type_and_keeps_the_process() -> None:
    async def run() -> None:
        async with pool() as made:
            pid = await pid_of(made)
            with pytest.raises(JobFailed) as failed:
                await made.submit(b"raise a secret", PLENTY)
            assert str(failed.value) == "ValueError"
            assert await pid_of(made) == pid

    asyncio.run(run())


def test_what_is_printed_is_no_answer_and_in_no_log(capfd: pytest.CaptureFixture[str]) -> None:
    async def run() -> None:
        async with pool() as made:
            assert await made.submit(b"print", PLENTY) == b""
            assert await made.submit(b"echo a", PLENTY) == b"a"
            with pytest.raises(JobKilled, match="status 1"):
                await made.submit(b"end a secret", PLENTY)

    asyncio.run(run())
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_memory_is_bounded() -> None:
    async def run() -> None:
        async with pool(max_bytes=200 << 20) as made:
            with pytest.raises(JobFailed, match="MemoryError"):
                await made.submit(b"eat %d" % (300 << 20), PLENTY)
            assert await made.submit(b"eat %d" % (50 << 20), PLENTY) == b"%d" % (50 << 20)

    asyncio.run(run())


def test_a_job_that_nobody_waits_for_is_not_begun() -> None:
    async def run() -> None:
        async with pool() as made:
            wanted = True
            first = made.submit(b"echo 1", PLENTY)
            left = made.submit(b"crash", PLENTY, wanted=lambda: wanted)
            cancelled = made.submit(b"crash", PLENTY)
            cancelled.cancel()
            last = made.submit(b"echo 2", PLENTY)
            wanted = False
            assert (await first, await last) == (b"1", b"2")
            assert left.cancelled()

    asyncio.run(run())


def test_several_processes_work_at_once() -> None:
    async def run() -> None:
        async with pool(max_processes=2) as made:
            stuck = made.submit(b"loop", PLENTY)
            assert await made.submit(b"echo a", PLENTY) == b"a"
            assert not stuck.done()
            await made.close()
            with pytest.raises(PoolUnavailable):
                await stuck

    asyncio.run(run())


def test_a_pool_that_has_closed_takes_no_job() -> None:
    async def run() -> None:
        async with pool() as made:
            waiting = [made.submit(b"loop", PLENTY), made.submit(b"echo a", PLENTY)]
            await made.close()
            for job in (*waiting, made.submit(b"echo b", PLENTY)):
                with pytest.raises(PoolUnavailable):
                    await job
            await made.close()

    asyncio.run(run())


def test_a_process_that_does_not_start_is_told_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        async with pool("fail") as made:
            for _ in range(2):
                with pytest.raises(PoolUnavailable, match="status 3"):
                    await made.submit(b"echo a", PLENTY)
        missing = KillablePool("the missing one", ("/no/such/program",))
        with pytest.raises(PoolUnavailable):
            await missing.submit(b"", PLENTY)
        await missing.close()

    asyncio.run(run())
    assert "does not start" in caplog.text and "killable_worker.py" in caplog.text


def test_it_is_given_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with pool(environ={**os.environ, "STATOR_TOKEN": "secret"}) as made:
            assert await made.submit(b"environ", PLENTY) == b""

    asyncio.run(run())


_PARENT = """
import asyncio, sys
sys.path[:0] = {path!r}
from stator.runtime.killable import KillablePool
async def main():
    pool = KillablePool("the process", {command!r})
    print((await pool.submit(b"pid", 60)).decode(), flush=True)
    await pool.submit(b"loop", 60)
asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it ends when it next reads")
def test_it_ends_with_its_parent_whatever_it_does() -> None:
    async def run() -> None:
        program = _PARENT.format(path=sys.path, command=WORKER)
        parent = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE)
        assert parent.stdout is not None
        async with asyncio.timeout(PLENTY):
            pid = int(await parent.stdout.readline())
            parent.kill()
            await parent.wait()
            # The child has the pipe's other end too.
            while is_alive(pid) and not is_zombie(pid):  # noqa: ASYNC110 - somebody else's process
                await asyncio.sleep(0.01)

    asyncio.run(run())


def is_zombie(pid: int) -> bool:
    """Killed, and not yet reaped by whoever inherited it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
