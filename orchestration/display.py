"""What a manager shows while it works: live tables on a terminal, plain lines elsewhere."""

import time
from collections import Counter, deque
from dataclasses import dataclass

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from orchestration.executors import Event

BURST = 20  # lines about jobs that may come at once
REFILL = 5.0  # seconds until one more may come: what exceeds them is counted in one line
STYLES = {"done": "green", "running": "cyan", "failed": "red", "aborted": "magenta", "queued": "white"}


@dataclass
class _Slot:
    """What a slot is doing."""

    job: str
    since: float
    step: int = 0
    steps: int = 0


class Display:
    """The state of one experiment: counts by state, time left, and what each worker is doing."""

    def __init__(self, name: str, slots: int):
        self.name, self.slots = name, slots
        self.console = Console(highlight=False, soft_wrap=True)
        self._counts: Counter[str] = Counter()
        self._busy: dict[str, _Slot] = {}
        self._durations: deque[float] = deque(maxlen=200)
        self._waiting = False
        self._lines = float(BURST)  # about jobs, that may be printed
        self._refilled = time.monotonic()
        self._unsaid: Counter[str] = Counter()
        self._live: Live | None = None
        if self.console.is_terminal:
            self._live = Live(self.render(), console=self.console, refresh_per_second=4, transient=True)
            self._live.start()

    def say(self, text: str) -> None:
        """Print one line that stays."""
        self.console.print(text, markup=False)

    def count(self, counts: Counter[str]) -> None:
        """Take note of how many jobs are in each state."""
        self._counts = counts

    def started(self, slot: str, job: str) -> None:
        """Take note of a job that was handed to a slot."""
        self._busy[slot] = _Slot(job, time.monotonic())

    def progress(self, event: Event) -> None:
        """Take note of how far a job is."""
        if slot := self._busy.get(event.slot):
            slot.step, slot.steps = event.step, event.steps

    def returned(self, event: Event) -> None:
        """Take note of a job that its slot was handed and has not begun."""
        if (slot := self._busy.get(event.slot)) and slot.job == event.id:
            del self._busy[event.slot]

    def ended(self, event: Event, seconds: float) -> None:
        """Say what became of a job."""
        self._busy.pop(event.slot, None)
        if event.state == "done":
            self._durations.append(seconds)
        state = {"died": "lost", "queued": "stopped", "crowded": "stopped"}.get(event.state, event.state)
        why = f": {event.error}" if event.error else ""
        if self._live is None or event.state != "done":
            if self._may_say():
                self.say_unsaid()
                self.say(f"{time.strftime('%H:%M:%S')}  {state:<8} {event.id}  ({_duration(seconds)}){why}")
            else:
                self._unsaid[state] += 1

    def say_unsaid(self) -> None:
        """Say how many jobs have ended for which there was no line."""
        if self._unsaid:
            counts = ", ".join(f"{count} {state}" for state, count in sorted(self._unsaid.items()))
            self.say(f"{time.strftime('%H:%M:%S')}  and {counts}  ({self.summary()})")
            self._unsaid.clear()

    def _may_say(self) -> bool:
        """Say whether there is room for a line about a job: a terminal or a log is to stay readable."""
        now = time.monotonic()
        self._lines = min(float(BURST), self._lines + (now - self._refilled) / REFILL)
        self._refilled = now
        if self._lines < 1:
            return False
        self._lines -= 1
        return True

    def waiting(self, count: int) -> None:
        """Say once that only jobs of other managers are left."""
        if not self._waiting:
            self._waiting = True
            self.say(f"nothing left to claim: waiting for {count} job(s) that others run")

    def draw(self) -> None:
        """Show the present state on a terminal."""
        if self._unsaid and self._may_say():
            self.say_unsaid()
        if self._live:
            self._live.update(self.render())

    def close(self) -> None:
        """Say what is left to say, and leave the terminal as it was."""
        self.say_unsaid()
        if self._live:
            self._live.stop()
            self._live = None

    def summary(self) -> str:
        """Return the counts as one line."""
        return ", ".join(f"{self._counts[state]} {state}" for state in STYLES if self._counts[state]) or "no jobs"

    def time_left(self) -> float | None:
        """Return the seconds that this manager alone would still need, None while no job has ended."""
        if not self._durations:
            return None
        mean = sum(self._durations) / len(self._durations)
        now = time.monotonic()
        begun = sum(max(0.0, mean - (now - slot.since)) for slot in self._busy.values())
        return (self._counts["queued"] * mean + begun) / self.slots

    def render(self) -> Group:
        """Return what a terminal shows."""
        total = sum(self._counts.values())
        counts = Text.assemble((self.name, "bold"), f"  {total:,} jobs  ")
        for state, style in STYLES.items():
            if self._counts[state]:
                counts.append(f"{self._counts[state]} {state}  ", style)
        left = self.time_left()
        if left is not None:
            counts.append(f"about {_duration(left)} left", "dim")
        table = Table.grid(padding=(0, 2))
        now = time.monotonic()
        for name, slot in sorted(self._busy.items()):
            steps = f"{slot.step:,}/{slot.steps:,} steps" if slot.steps else "starting"
            bar = ProgressBar(total=slot.steps or 1, completed=slot.step, width=20)
            table.add_row(Text(name, "dim"), bar, steps, _duration(now - slot.since), slot.job)
        overall = Table.grid()  # a bar alone does not end its line
        overall.add_row(ProgressBar(total=total or 1, completed=self._counts["done"], width=60))
        return Group(counts, overall, table)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
