"""The manager's loop: claim jobs, hand them to the executor's slots, write back what became of them."""

import signal
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from orchestration.display import Display
from orchestration.executors import Event, Executor
from orchestration.queue import Manager, Queue, Result, Row

POLL_INTERVAL = 1.0  # seconds between two looks at what other managers run
EVENT_TIMEOUT = 0.25  # seconds to wait for a worker before the display is drawn again
SHORT_JOB = 5.0  # seconds: jobs shorter than this are claimed ahead, so that no slot waits for the queue's file


class Scheduler:
    """Runs the jobs of one queue until none is left, it is interrupted, or `max_jobs` have been claimed."""

    def __init__(
        self,
        queue: Queue,
        manager: Manager,
        executor: Executor,
        display: Display,
        slots: int,
        max_jobs: int | None = None,
    ):
        self.queue, self.manager, self.executor, self.display = queue, manager, executor, display
        self.slots = slots
        self.allowance = max_jobs
        self.interrupts = 0
        self._obeyed = 0
        self.refusal = ""
        self._hand: deque[Row] = deque()  # claimed and not yet handed to a slot
        self._running: dict[str, float] = {}  # job id -> when it was handed over
        self._results: list[Result] = []
        self._durations: deque[float] = deque(maxlen=20)
        self._next_poll = 0.0

    def run(self) -> Counter[str]:
        """Return how many jobs were in each state at the end."""
        with self._signals():
            try:
                while not self._finished():
                    self._work()
            except BaseException:
                self.executor.stop()
                raise
            finally:
                self.executor.close()
        return self.queue.counts()

    def _work(self) -> None:
        self._obey()
        self._hand_out()
        for event in self.executor.events(EVENT_TIMEOUT if self._running else 0.0):
            self._take(event)
        self._hand_out()
        self._exchange()
        self.display.draw()

    def _obey(self) -> None:
        """Pass an interrupt on to the workers: the signal's handler itself only counts."""
        if self.interrupts > self._obeyed:
            if self._obeyed == 0 and self._running:
                self.display.say(
                    "interrupted: jobs write a checkpoint and go back to the queue; once more stops at once"
                )
            self._obeyed = self.interrupts
            if self.interrupts == 1:
                self.executor.stop()
            else:
                self.executor.kill()

    def _finished(self) -> bool:
        if self._running or self._hand or self._results:
            return False
        if self.interrupts or self.refusal or self.allowance == 0:
            return True
        counts = self.queue.counts()
        self.display.count(counts)
        if counts["queued"]:
            return False
        if counts["running"]:
            self.display.waiting(counts["running"])
            time.sleep(max(0.0, min(POLL_INTERVAL, self._next_poll - time.monotonic())))
            return False
        return True

    def _hand_out(self) -> None:
        while self._hand and not self._ending and self.executor.free():
            row = self._hand.popleft()
            self._running[row.id] = time.monotonic()
            self.display.started(self.executor.submit(row), row.id)

    @property
    def _ending(self) -> bool:
        return bool(self.interrupts or self.refusal)

    def _take(self, event: Event) -> None:
        if event.kind == "progress":
            self.display.progress(event)
        elif event.kind in ("ended", "died") and event.id:
            duration = time.monotonic() - self._running.pop(event.id)
            if event.kind == "died" and self.interrupts > 1:
                event = event._replace(state="queued", error="")
            if event.state == "refused":
                self._refuse(f"{event.id}: {event.error}")
                event = event._replace(state="queued")
            if event.state in ("done", "failed"):
                self._durations.append(duration)
            if event.state != "withdrawn":
                self._results.append(Result(event.id, event.attempt, event.state))
            self.display.ended(event, duration)

    def _refuse(self, why: str) -> None:
        """Take note that the disk refused, and have the running jobs stop."""
        if not self.refusal:
            self.refusal = why
            self.executor.stop()

    def _exchange(self) -> None:
        """Write back results and claim what the slots can take, in one change of the queue."""
        if self._ending:
            self._results += [Result(row.id, row.attempt, "queued") for row in self._hand]
            self._hand.clear()
            wanted = 0
        else:
            wanted = max(0, self.executor.free() + self._ahead() - len(self._hand))
            if self.allowance is not None:
                wanted = min(wanted, self.allowance)
        if not self._results and (not wanted or time.monotonic() < self._next_poll):
            return
        try:
            claimed, counts = self.queue.claim(self.manager, wanted, self._results)
        except OSError as error:
            # What the jobs left on the disk is collected by the next manager.
            self._refuse(f"{error.strerror}: {error.filename or self.queue.folder.queue}")
            claimed, counts = [], self.queue.counts()
        self._results.clear()
        if self.allowance is not None:
            self.allowance -= len(claimed)
        if len(claimed) < wanted:
            self._next_poll = time.monotonic() + POLL_INTERVAL
        self._hand.extend(claimed)
        ahead = Counter(running=-len(self._hand), queued=len(self._hand))  # claimed, but not yet in a slot
        self.display.count(Counter({state: counts[state] + ahead[state] for state in {*counts, *ahead}}))

    def _ahead(self) -> int:
        short = len(self._durations) > 0 and sum(self._durations) / len(self._durations) < SHORT_JOB
        return self.slots if short else 0

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def interrupted(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 (signal's signature)
            self.interrupts += 1

        before = {number: signal.signal(number, interrupted) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
