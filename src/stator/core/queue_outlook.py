"""What a decode worker knows of its prefill queue when it decides where a prompt is prefilled. Pure.

Rules:

- The queue tells its size when that has changed, so news may be late, and none need come: a job that was put and
  cancelled at once changes nothing. Own jobs count as waiting from their put until the next news, until a prefill
  worker has taken them, or until they are wanted no more, whichever is first. A job that only news could end would
  count for ever when none comes, and a few of them would keep every later prompt from the queue.
- The queue is away from its loss until it is heard of again, and for `retry_s` after a put that it did not answer.
"""

from stator.ids import JobId

RETRY_S = 5.0


class QueueOutlook:
    """retry_s: after a put that was not answered; so long no other is tried, unless the queue is heard of before."""

    def __init__(self, retry_s: float = RETRY_S) -> None:
        self._retry_s = retry_s
        self._told_waiting = 0
        self._own: set[JobId] = set()
        self._away = False
        self._no_put_before = 0.0

    @property
    def told_waiting(self) -> int:
        """Jobs that waited when the queue last told its size."""
        return self._told_waiting

    @property
    def num_waiting(self) -> int:
        """Jobs that may wait now; at most as many too many as jobs of others were served since the last news."""
        return self._told_waiting + len(self._own)

    @property
    def away(self) -> bool:
        """Lost, and not heard of since."""
        return self._away

    def answers(self, now: float) -> bool:
        """Whether a put is worth a try. now: in seconds, of the clock that `unanswered` was called with."""
        return not self._away and now >= self._no_put_before

    def put(self, job_id: JobId) -> None:
        """An own job is about to be put."""
        self._own.add(job_id)

    def waits_no_more(self, job_id: JobId) -> None:
        """A prefill worker has this own job, or it is wanted no more. Harmless for any other."""
        self._own.discard(job_id)

    def unanswered(self, now: float) -> None:
        """A put had no answer."""
        self._no_put_before = now + self._retry_s

    def sized(self, num_waiting: int) -> None:
        """The queue tells its size: it is there, and what was put before is counted in it."""
        self._away = False
        self._no_put_before = 0.0
        self._told_waiting = num_waiting
        self._own.clear()

    def lost(self) -> None:
        self._away = True
