"""Where a task's numbers go: metrics.jsonl, which is the truth, and TensorBoard, which is a view of it."""

import io
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import histogram, scalar

from orchestration.run_directory import MetricsFile, RunDirectory

EVENTS = "events.out.tfevents"  # how TensorBoard knows a file for its own
NUM_BINS = 64  # of a histogram


class Recorder:
    """Writes the metrics of one run; `metrics_length` and `step` say where a resumed run goes on."""

    def __init__(self, run: RunDirectory, metrics_length: int = 0, step: int = 0):
        self._metrics = MetricsFile(run.metrics)
        try:
            self._metrics.keep(metrics_length)
            self._events = EventFile(run.tensorboard, purge_step=step + 1 if metrics_length else None)
        except BaseException:
            self._metrics.close()
            raise

    def record(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Add these metrics of a step."""
        self._metrics.append(step, split, values)
        self._events.append(step, *(scalar(f"{split}/{name}", value) for name, value in values.items()))

    def record_histogram(self, step: int, split: str, name: str, values: np.ndarray) -> None:
        """Add a histogram to the view; metrics.jsonl has no rows of it."""
        self._events.append(step, histogram(f"{split}/{name}", values, bins=NUM_BINS))

    def record_picture(self, step: int, name: str, picture: np.ndarray, content: bytes) -> None:
        """Add a picture [height, width, channels], and its content as a PNG file, to the view alone."""
        height, width, channels = picture.shape
        image = Summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=content)
        self._events.append(step, Summary(value=[Summary.Value(tag=f"samples/{name}", image=image)]))

    def sync(self) -> int:
        """Bring all that was recorded to the disk; return the length of metrics.jsonl in bytes."""
        return self._metrics.sync()

    def close(self) -> None:
        """Close both."""
        self._events.close()
        self._metrics.close()


class EventFile:
    """The TensorBoard events of one attempt: one more file in the run's folder, read after those before it.

    Its first event tells the reader to drop what earlier files hold from `purge_step` on. TensorBoard reads the files
    in the order of their names, so these are numbered: a name by the time or the process would order two attempts
    within one second, or around a change of the clock, by chance. A refused write raises OSError in place; torch's
    SummaryWriter would leave it to a thread, and that one's traceback to the log.
    """

    def __init__(self, folder: Path, purge_step: int | None):
        folder.mkdir(exist_ok=True)
        last = max((int(path.suffix[1:]) for path in folder.glob(f"{EVENTS}.*")), default=-1)
        self._file = open(folder / f"{EVENTS}.{last + 1:010d}", "xb", buffering=0)  # noqa: SIM115 (closed by close)
        self._write(Event(file_version="brain.Event:2"))
        if purge_step is not None:
            self._write(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def append(self, step: int, *summaries: Summary) -> None:
        """Add the summaries of one step."""
        self._write(*(Event(step=step, summary=summary) for summary in summaries))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, *events: Any) -> None:
        records = io.BytesIO()
        for event in events:
            event.wall_time = time.time()
            RecordWriter(records).write(event.SerializeToString())
        content = records.getbuffer()
        while content:
            content = content[self._file.write(content) :]
