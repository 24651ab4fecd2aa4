import re
from collections import Counter

from rich.console import Console

from orchestration.display import Display
from orchestration.executors import Event


def rendered(display):
    console = Console(width=120, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(display.render())
        return console.export_text().splitlines()


def test_the_live_display_says_what_is_done_and_what_each_slot_does():
    display = Display("study", slots=2)
    display.started("cpu:0", "job-a")
    display.started("cpu:1", "job-b")
    display.progress(Event("progress", "cpu:1", "job-b", step=1500, steps=3000))
    display.count(Counter(done=3, running=2, failed=1, queued=4))
    lines = rendered(display)
    assert lines[0].split() == ["study", "10", "jobs", "3", "done", "2", "running", "1", "failed", "4", "queued"]
    assert "cpu:0" in lines[2]
    assert "starting" in lines[2]
    assert "job-a" in lines[2]
    assert "1,500/3,000 steps" in lines[3]
    assert len(lines) == 4


def test_the_time_left_follows_from_the_jobs_that_are_done():
    display = Display("study", slots=2)
    display.count(Counter(done=1, queued=10))
    assert display.time_left() is None
    display.ended(Event("ended", "cpu:0", "job-a", state="done"), seconds=60)
    assert display.time_left() == 10 * 60 / 2
    assert "about 5 min 00 s left" in rendered(display)[0]


def test_plain_lines_where_the_output_is_no_terminal(capsys):
    display = Display("study", slots=1)
    display.started("cpu:0", "job-a")
    display.ended(Event("ended", "cpu:0", "job-a", state="failed", error="ValueError: bad"), seconds=61)
    display.draw()
    display.close()
    line = capsys.readouterr().out
    assert line.endswith("failed   job-a  (1 min 01 s): ValueError: bad\n")
    assert "\x1b" not in line


def test_a_flood_of_jobs_is_counted_in_few_lines(capsys, monkeypatch):
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    display = Display("study", slots=1)
    for number in range(10_000):  # fifty a second
        now += 0.02
        state = "failed" if number % 1000 == 999 else "done"
        display.ended(Event("ended", "cpu:0", f"job-{number}", state=state), seconds=1)
    display.count(Counter(done=9990, failed=10))
    display.close()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 2 * (20 + 200 / 5) + 1
    counted: Counter[str] = Counter()
    for line in lines:
        first = line.split()[1]
        if first == "and":
            for count, state in re.findall(r"(\d+) (\w+)", line.partition("and ")[2].partition("  (")[0]):
                counted[state] += int(count)
        else:
            counted[first] += 1
    assert counted == {"done": 9990, "failed": 10}
    assert lines[-1].endswith("(9990 done, 10 failed)")
