"""The manager's loop: claim jobs, hand them to the executor's slots, write back what became of them."""

import math
import signal
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from filelock import Timeout

from orchestration.display import Display
from orchestration.executors import Event, Executor
from orchestration.locks import holder
from orchestration.queue import PATIENCE, Manager, Queue, Result, Row

POLL_INTERVAL = 1.0  # seconds between two looks at what other managers run
EVENT_TIMEOUT = 0.25  # seconds to wait for a worker before the display is drawn again
HORIZON = 2.0  # seconds of work that a manager of short jobs claims ahead, so that no slot waits for the queue's file
SHORT_JOB = 5.0  # seconds: longer jobs are not claimed ahead
MOST_AHEAD = 50  # jobs a slot, however short they are
STALL = 0.25  # seconds that a manager may be busy elsewhere: so much work a worker of short jobs holds ahead
MOST_HELD = 8  # jobs that a worker holds ahead, however short they are
PLENTY = 10  # jobs a slot that wait in the queue: so many that one a slot, claimed ahead, keeps no other manager idle
LOOK_INTERVAL = 30.0  # seconds between two looks at whether there are still so many
BUSY_WAIT = 0.05  # seconds to wait for the queue's lock before the slots are looked after again
EXCHANGE_SHARE = 0.1  # of a manager's time goes to the queue's file, while its slots are busy


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
        self._handed: dict[tuple[str, int], Row] = {}  # job id and attempt -> what a slot has, begun or not
        self._running: dict[tuple[str, int], float] = {}  # of these the first of each slot -> since when
        self._results: list[Result] = []
        self._durations: deque[float] = deque(maxlen=20)
        self._last_end = 0.0
        self._queued = 0  # jobs that were left in the queue at the last exchange
        self._busy_since: float | None = None  # when the queue's lock was first found to be held by another
        self._has_said_who = False
        self._next_poll = 0.0
        self._next_exchange = 0.0
        self._next_look = 0.0

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
                self.executor.close(at_once=lambda: self.interrupts > 1)
        return self.queue.counts()

    def _work(self) -> None:
        self._obey()
        self._hand_out()
        for event in self.executor.events(self._patience()):
            self._take(event)
        self._hand_out()
        self._exchange()
        if self.executor.free() and not (self._hand or self._ending):
            self.executor.recall()
        self.display.draw()

    def _patience(self) -> float:
        """Return for how many seconds nothing but an event of a slot can make work."""
        if not self._handed:
            return 0.0
        return EVENT_TIMEOUT if self._busy_since is None else BUSY_WAIT

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
        if self._handed or self._hand or self._results:
            return self._gives_up()
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

    def _gives_up(self) -> bool:
        """Say whether to leave without the queue's lock: what the jobs left on the disk is collected by another."""
        if self._handed or self._busy_since is None or not self.interrupts:
            return False
        if self.interrupts == 1 and time.monotonic() - self._busy_since < PATIENCE:
            return False
        self.display.say(f"{self._who()}: left without it, the next manager collects what the jobs have done")
        return True

    def _who(self) -> str:
        lock = self.queue.folder.queue_lock
        return f"{holder(lock)} holds {lock}"

    def _hand_out(self) -> None:
        """Hand jobs to free slots, then, where they are short, to busy ones to go on with."""
        full = False
        for row in list(self._hand):
            if self._ending:
                return
            if (row.alone or not full) and self.executor.takes(row):
                self._hand.remove(row)
                self._handed[row.id, row.attempt] = row
                self._begin(self.executor.submit(row), row.id, row.attempt)
            else:
                full = full or not row.alone
        mean = self._duration()
        if mean <= SHORT_JOB:
            held = min(MOST_HELD, math.ceil(STALL / max(mean, STALL / MOST_HELD)))
            while self._hand and self.executor.submit_ahead(self._hand[0], held):
                row = self._hand.popleft()
                self._handed[row.id, row.attempt] = row

    def _begin(self, slot: str, identity: str, attempt: int) -> None:
        self._running[identity, attempt] = time.monotonic()
        self.display.started(slot, identity)

    @property
    def _ending(self) -> bool:
        return bool(self.interrupts or self.refusal)

    def _take(self, event: Event) -> None:
        if event.kind == "progress":
            self.display.progress(event)
        elif event.kind == "waiting":
            self.display.say(f"waits    {event.id}: {event.error}")
        elif event.kind == "next":
            self._begin(event.slot, event.id, event.attempt)
        elif event.kind == "returned":
            if row := self._handed.pop((event.id, event.attempt), None):
                self._running.pop((event.id, event.attempt), None)
                self.display.returned(event)
                self._hand.appendleft(row)
        elif event.kind in ("ended", "died") and event.id:
            del self._handed[event.id, event.attempt]
            self._last_end = time.monotonic()
            duration = self._last_end - self._running.pop((event.id, event.attempt))
            if event.kind == "died" and self.interrupts > 1:
                event = event._replace(state="queued", error="")
            if event.state == "refused":
                self._refuse(f"{event.id}: {event.error}")
                event = event._replace(state="queued")
            if event.state in ("done", "failed"):
                self._durations.append(duration)
            if event.state != "withdrawn":
                self._results.append(Result(event.id, event.attempt, event.state, event.error))
            self.display.ended(event, duration)

    def _refuse(self, why: str) -> None:
        """Take note that the disk refused, and have the running jobs stop."""
        if not self.refusal:
            self.refusal = why
            self.executor.stop()

    def _exchange(self) -> None:
        """Write back results and claim what the slots can take, in one change of the queue.

        Results can wait a little: the jobs' own status files hold them, and another manager collects them from there.
        """
        if self._ending:
            self._give_back(list(self._hand))
            wanted = 0
        else:
            wanted = self.executor.free() + self._ahead() - len(self._hand) - self._held()
            if wanted < 0 and self._duration() > SHORT_JOB:
                # They were claimed as short ones: who waits for them would wait long.
                self.executor.recall()
                self._give_back([row for row in self._hand if not row.alone][wanted:])
            wanted = max(0, wanted)
            if self.allowance is not None:
                wanted = min(wanted, self.allowance)
        began = time.monotonic()
        hungry = wanted > 0 and began >= self._next_poll
        waited_for = not self._handed or (hungry and not self._hand and self.executor.free() > 0)
        if not (self._results or hungry) or not (waited_for or began >= self._next_exchange):
            return
        try:
            claimed, counts = self.queue.claim(self.manager, wanted, self._results, BUSY_WAIT)
        except Timeout:
            self._say_who_holds_the_lock(began)
            return
        except OSError as error:
            # What the jobs left on the disk is collected by the next manager.
            self._refuse(f"{error.strerror}: {error.filename or self.queue.folder.queue}")
            claimed, counts = [], self.queue.counts()
        self._busy_since, self._has_said_who = None, False
        self._queued = counts["queued"]
        self._results.clear()
        took = time.monotonic() - began
        self._next_exchange = began + min(took / EXCHANGE_SHARE, HORIZON / 2)
        if self.allowance is not None:
            self.allowance -= len(claimed)
        if len(claimed) < wanted:
            self._next_poll = time.monotonic() + POLL_INTERVAL
        self._hand.extend(claimed)
        unbegun = len(self._hand) + self._held()  # claimed, but not yet begun
        ahead = Counter(running=-unbegun, queued=unbegun)
        self.display.count(Counter({state: counts[state] + ahead[state] for state in {*counts, *ahead}}))

    def _say_who_holds_the_lock(self, now: float) -> None:
        """Say once who keeps this manager from the queue; its slots are looked after meanwhile."""
        self._busy_since = now if self._busy_since is None else self._busy_since
        if now - self._busy_since > PATIENCE and not self._has_said_who:
            self._has_said_who = True
            self.display.say(f"{self._who()}: waiting for it")

    def _give_back(self, rows: Sequence[Row]) -> None:
        """Have the next exchange queue again what was claimed and is not handed over."""
        self._results += [Result(row.id, row.attempt, "queued") for row in rows]
        for row in rows:
            self._hand.remove(row)
        if self.allowance is not None:
            self.allowance += len(rows)

    def _held(self) -> int:
        """Return how many jobs the slots hold to go on with."""
        return len(self._handed) - len(self._running)

    def _duration(self) -> float:
        """Return how long a job may be expected to take, in seconds: infinitely long where nothing is known."""
        if not self._durations:
            return math.inf
        return max(sum(self._durations) / len(self._durations), time.monotonic() - self._last_end)

    def _ahead(self) -> int:
        """Return how many jobs to hold beyond those that run: a horizon's worth where they are short.

        Of long ones it is one a slot, and that only while no other manager could be in need of them.
        """
        if (mean := self._duration()) > SHORT_JOB:
            if self._hand and time.monotonic() >= self._next_look:
                self._next_look = time.monotonic() + LOOK_INTERVAL
                self._queued = self.queue.counts()["queued"]
            return self.slots if self._durations and self._queued >= PLENTY * self.slots else 0
        return self.slots * min(MOST_AHEAD, max(1, round(HORIZON / mean)))

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
