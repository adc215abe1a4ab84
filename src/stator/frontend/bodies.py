"""What the bodies of a Frontend's open requests may take together: places while they arrive, and bytes."""

from asyncio import Timeout

FREE_BYTES = 64 * 1024
"""Of each body, which count for nothing: so large bodies cannot keep out the small ones, which nearly all are."""


class Bodies:
    """max_arriving: bodies of which a part is still to come. At the bound the one that began first is given up, so
    that clients which never end theirs do not keep out those that do. max_bytes: of all bodies of open requests."""

    def __init__(self, max_arriving: int, max_bytes: int) -> None:
        self._max_arriving = max_arriving
        self._max_bytes = max_bytes
        self._arriving: dict[Timeout, None] = {}
        self.num_bytes = 0

    def arrives(self, deadline: Timeout, now: float) -> None:
        """deadline: of receiving this one, entered; now: on the loop's clock."""
        if len(self._arriving) >= self._max_arriving:
            first = next(iter(self._arriving))
            del self._arriving[first]
            if not first.expired():
                first.reschedule(now)
        self._arriving[deadline] = None

    def arrived(self, deadline: Timeout) -> None:
        self._arriving.pop(deadline, None)

    def hold(self, num_bytes: int, held: int) -> int | None:
        """What a body of num_bytes counts for, of which held counted before; None if there is no room for it."""
        counted = max(0, num_bytes - FREE_BYTES)
        if counted > held and self.num_bytes + counted - held > self._max_bytes:
            return None
        self.num_bytes += counted - held
        return counted

    def release(self, held: int) -> None:
        self.num_bytes -= held
