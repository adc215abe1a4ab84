import asyncio

from stator.processor.suspects import SuspectLine


def test_one_goes_at_a_time_in_the_order_in_which_they_came() -> None:
    async def run() -> None:
        line, went = SuspectLine(), list[str]()
        a, b, c, d = (lambda name=name: went.append(name) for name in "abcd")
        assert line.may_go(a) and line.may_go(a)
        assert not line.may_go(b) and not line.may_go(c) and not line.may_go(b) and not line.may_go(d)
        line.leave(c)
        line.leave(b)
        assert not line.may_go(b), "behind the others now"
        await asyncio.sleep(0)
        assert went == []
        for expected in (["d"], ["d", "b"]):
            line.leave(a if expected == ["d"] else d)
            line.leave(a)
            await asyncio.sleep(0)
            assert went == expected
        assert line.may_go(b) and not line.may_go(a)
        line.leave(b)
        line.leave(a)
        assert line.may_go(d)

    asyncio.run(run())
