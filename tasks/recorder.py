"""Where a task's numbers go: metrics.jsonl, which is the truth, and TensorBoard, which is a view of it."""

from collections.abc import Mapping

from torch.utils.tensorboard import SummaryWriter

from orchestration.run_directory import MetricsFile, RunDirectory


class Recorder:
    """Writes the metrics of one run; `metrics_length` and `step` say where a resumed run goes on."""

    def __init__(self, run: RunDirectory, metrics_length: int = 0, step: int = 0):
        self._metrics = MetricsFile(run.metrics)
        try:
            self._metrics.keep(metrics_length)
        except BaseException:
            self._metrics.close()
            raise
        self._board = SummaryWriter(str(run.tensorboard), purge_step=step + 1 if metrics_length else None)

    def record(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Add these metrics of a step."""
        self._metrics.append(step, split, values)
        for name, value in values.items():
            self._board.add_scalar(f"{split}/{name}", value, step)

    def sync(self) -> int:
        """Bring all that was recorded to the disk; return the length of metrics.jsonl in bytes."""
        self._board.flush()
        return self._metrics.sync()

    def close(self) -> None:
        """Close both."""
        self._board.close()
        self._metrics.close()
