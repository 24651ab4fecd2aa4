"""Task `gradient_study`: the gradients of one or several estimators at fixed parameters, replicate by replicate."""

import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from analysis.cost import evaluation_cost
from analysis.gradients import (
    KEPT_BYTES,
    KeptBlocks,
    Measurement,
    group_by_particles,
    parameter_labels,
    select_parameters,
)
from analysis.oracle import NoExactGradient, Oracles
from analysis.statistics import GradientStatistics, Oracle, reduce_together
from datasets.base import Dataset
from errors import CorruptFileError, UserError, near
from models.template import Template
from orchestration.storage import write_atomically
from seeding import derive_seed
from tasks import checkpoint
from tasks.build import build_dataset, build_estimators, build_model, prepare_torch
from tasks.context import Context, Interrupted
from tasks.evaluation import evaluate_bound
from tasks.recorder import Recorder

ORACLES = ("auto", "reference", "none")
REFERENCE_REPLICATES = 1000
CHECKPOINT_SECONDS = 30.0  # of work that a killed job loses at most, beside the block it was at

PASSES = 3  # of a reduction over gradients that are not kept

SAVED = ("mean", "mean_se", "variance", "variance_se", "snr", "snr_se")  # of GradientStatistics, in gradients.npz
SHOWN = (
    "grads/snr",
    "grads/variance",
    "grads/bias_z",
    "grads/cosine",
    "time/evaluation_ms",
    "memory/evaluation_mb",
)  # in the log
Ids = tuple[str, ...]  # of the estimators that one measurement gives the same particles


class Drawn:
    """The gradients drawn so far, by measurement."""

    def __init__(self, measurements: Mapping[Ids, Measurement]):
        self.blocks = {ids: KeptBlocks(measurement) for ids, measurement in measurements.items()}

    def __len__(self) -> int:
        return sum(map(len, self.blocks.values()))

    def state_dict(self) -> dict[Ids, Tensor]:
        """Return one tensor [estimators, replicates, parameters] for each measurement that has begun."""
        return {ids: blocks.joined() for ids, blocks in self.blocks.items() if len(blocks)}

    def load_state_dict(self, state: Mapping[Ids, Tensor]) -> None:
        """Put back what `state_dict` returned."""
        for ids, gradients in state.items():
            self.blocks[ids].extend(gradients)


class GradientStudy:
    """One study: the estimators, the model that stands still, and the gradients so far."""

    def __init__(self, config: DictConfig, context: Context):
        self.config, self.context = config, context
        self.device = prepare_torch(config)
        self.dataset = build_dataset(config)
        self.model = build_model(config, self.device, self.dataset)
        place(self.model, self.dataset, config)
        self.x = self.dataset.batch(0, config.batch_size, config.seed).to(self.device)
        self.estimators = build_estimators(config, self.device)
        self.parameters = list(config.analysis.parameters)
        ids = list(self.estimators)
        groups: list[Ids] = [tuple(ids[i] for i in each) for each in group_by_particles(list(self.estimators.values()))]
        self.measurements = {group: self._measurement(group) for group in groups}
        self.drawn = Drawn(self.measurements)
        self.keeps = sum(measurement.nbytes for measurement in self.measurements.values()) <= KEPT_BYTES
        self.singles = {ids: self._room_for_singles(measurement) for ids, measurement in self.measurements.items()}
        self.num_drawn = 0

    def run(self) -> None:
        """Measure, from the last checkpoint or from the start, then write all results."""
        self._resume()
        values = self._evaluate()
        oracles = self._oracles()
        statistics: dict[str, GradientStatistics] = {}
        self._saved_at = time.monotonic()
        for ids, measurement in self.measurements.items():
            blocks = partial(self._blocks, ids, measurement)
            reduced = reduce_together(blocks, measurement.dtype, [oracles[id] for id in ids])
            statistics |= zip(ids, reduced, strict=True)
        for id in self.estimators:
            # An infinite gradient shows in the mean, a variance that overflows in itself.
            if not (statistics[id].mean + statistics[id].variance).isfinite().all():
                raise FloatingPointError(f"the mean or the variance of {id}'s gradient is not finite")
        self._write(values, {id: statistics[id] for id in self.estimators}, oracles)

    def _measurement(self, ids: Ids) -> Measurement:
        return Measurement(
            [self.estimators[id] for id in ids],
            self.model,
            self.x,
            num_replicates=self.config.analysis.num_replicates,
            parameters=self.parameters,
            seed=derive_seed(self.config.seed, "gradients"),
            block_size=self.config.analysis.block_size,
        )

    def _resume(self) -> None:
        try:
            state = checkpoint.load(self.context.run, self.device)
            if state is not None:
                checkpoint.restore(state, {"gradients": self.drawn})
                self.num_drawn = len(self.drawn)
                print(f"going on from block {self.num_drawn:,}")
                return
        except CorruptFileError as error:
            print(f"{error}: starting from the first block")
        self.context.run.clear()
        checkpoint.seed_random_state(derive_seed(self.config.seed, "gradient study"))

    def _oracles(self) -> dict[str, Oracle | None]:
        """Return what the mean gradient of each estimator is compared with, None where there is nothing."""
        kind = self.config.task.oracle
        found: dict[str, Oracle | None] = dict.fromkeys(self.estimators)
        if kind == "none":
            return found
        num_reference = REFERENCE_REPLICATES if kind == "reference" else 0
        oracles = Oracles(self.model, self.x, self.parameters, derive_seed(self.config.seed, "oracle"), num_reference)
        without: list[str] = []
        for id, estimator in self.estimators.items():
            try:
                oracle = found[id] = oracles.of(estimator)
            except NoExactGradient:
                without.append(id)
            else:
                print(f"{id}: the mean gradient is compared with the oracle ({oracle.method})", flush=True)
        if without:
            model = type(self.model).__name__
            print(f"no exact gradient on {model}: {', '.join(without)}; task.oracle=reference estimates it", flush=True)
        return found

    def _blocks(self, ids: Ids, measurement: Measurement) -> Iterator[Tensor]:
        """Yield a measurement's blocks: those at hand, then others, between which it may be interrupted."""
        drawn = self.drawn.blocks[ids]
        for i in range(measurement.num_blocks):
            block = drawn[i] if i < len(drawn) else self._draw(measurement, i)
            if self.keeps and i == len(drawn):
                drawn.extend(block)
            start, singles = i * measurement.block_size, self.singles[ids]
            room = singles[:, start : start + block.shape[1]]
            room.copy_(block[:, : room.shape[1], : room.shape[2]])
            yield block

    def _room_for_singles(self, measurement: Measurement) -> Tensor:
        """Return room for the single gradients that gradients.npz keeps, [estimators, replicates, parameters]."""
        replicates = min(measurement.num_replicates, self.config.task.kept_replicates)
        parameters = min(measurement.num_parameters, self.config.task.kept_parameters)
        return torch.zeros(measurement.num_estimators, replicates, parameters)

    def _draw(self, measurement: Measurement, i: int) -> Tensor:
        self._pause()
        block = measurement.block(i)
        self.num_drawn += 1
        total = (1 if self.keeps else PASSES) * sum(each.num_blocks for each in self.measurements.values())
        self.context.progress(self.num_drawn, total)
        return block

    def _pause(self) -> None:
        """Write a checkpoint where that is due or the study is to stop; raise Interrupted where it is to stop.

        What is not kept is not in the checkpoint either: such a study starts anew.
        """
        stop = self.context.should_stop()
        if stop or time.monotonic() - self._saved_at > CHECKPOINT_SECONDS:
            if self.keeps:
                checkpoint.save(self.context.run, len(self.drawn), 0, {"gradients": self.drawn})
            self._saved_at = time.monotonic()
        if stop:
            raise Interrupted

    def _write(
        self,
        values: dict[str, float],
        statistics: Mapping[str, GradientStatistics],
        oracles: Mapping[str, Oracle | None],
    ) -> None:
        """Write gradients.npz, then the metrics, with which the study is complete."""
        singles = self._kept_replicates()
        labels = parameter_labels(self.model, self.parameters)
        self._write_gradients(labels, statistics, oracles, singles)
        for position, (id, found) in enumerate(statistics.items()):
            summary = found.summary()
            if self.config.task.cost:
                summary |= self._cost(id, summary["grads/variance"])
            values |= {name if position == 0 else f"{id}/{name}": value for name, value in summary.items()}
            print(f"{id}: {', '.join(f'{name} {summary[name]:.4g}' for name in SHOWN if name in summary)}")
        shutil.rmtree(self.context.run.tensorboard, ignore_errors=True)  # of an attempt that was killed in here
        recorder = Recorder(self.context.run)
        try:
            for id, gradients in singles.items():
                for label, replicates in zip(labels, gradients.T, strict=False):
                    recorder.record_histogram(0, "train", f"{id}/{label}", replicates)
            recorder.record(0, "train", {name: value for name, value in values.items() if math.isfinite(value)})
            recorder.sync()
        finally:
            recorder.close()
        self.context.run.checkpoint.unlink(missing_ok=True)

    def _kept_replicates(self) -> dict[str, np.ndarray]:
        """Return each estimator's first single gradients, [kept_replicates, kept_parameters]."""
        kept: dict[str, np.ndarray] = {}
        for ids, singles in self.singles.items():
            kept |= zip(ids, singles.numpy(), strict=True)
        return kept

    def _write_gradients(
        self,
        labels: Sequence[str],
        statistics: Mapping[str, GradientStatistics],
        oracles: Mapping[str, Oracle | None],
        singles: Mapping[str, np.ndarray],
    ) -> None:
        arrays = {"names": np.array(labels)}
        for id, found in statistics.items():
            arrays |= {f"{id}/{name}": getattr(found, name).cpu().numpy() for name in SAVED}
            arrays[f"{id}/replicates"] = singles[id]
            if (oracle := oracles[id]) is not None:
                arrays[f"{id}/oracle"] = oracle.gradient.cpu().numpy()
        write_atomically(self.context.run.gradients, lambda file: np.savez_compressed(file, **arrays))  # type: ignore

    def _evaluate(self) -> dict[str, float]:
        """Return the bound of the fixed evaluator and the model's own metrics, on the training points."""
        evaluation = self.config.evaluation
        x = self.dataset.points("train")[: evaluation.points].to(self.device)
        values = evaluate_bound(self.model, x, evaluation.iw, derive_seed(self.config.seed, "train", 0))
        values |= {name: value.item() for name, value in self.model.diagnostics(x, self.dataset).items()}
        for name, value in values.items():
            if math.isnan(value) or (name == "loss/L_k" and math.isinf(value)):
                raise FloatingPointError(f"train {name} is {value}")
        return values

    def _cost(self, id: str, variance: float) -> dict[str, float]:
        cost = evaluation_cost(self.estimators[id], self.model, self.x)
        return {
            "time/evaluation_ms": cost.milliseconds,
            "time/evaluation_ms_se": cost.milliseconds_se,
            "memory/evaluation_mb": cost.nbytes / 2**20,
            "time/work_normalised_variance": variance * cost.milliseconds / 1e3,
        }


def place(model: Template, dataset: Dataset, config: DictConfig) -> None:
    """Put the parameters `task.perturbation` away from the data set's optimum; leave them as they start where null.

    Raises UserError for what is no standard deviation, and for a model whose optimum is not known.
    """
    perturbation = config.task.perturbation
    if perturbation is None:
        return
    given = f"task.perturbation={perturbation}"
    is_number = isinstance(perturbation, int | float) and not isinstance(perturbation, bool)
    if not is_number or not 0 <= perturbation < math.inf:
        raise UserError(f"{given}: expected a standard deviation, at least 0, or null: the parameters as they start")
    place_at_optimum = getattr(model, "place_at_optimum", None)
    if place_at_optimum is None:
        name = type(model).__name__
        raise UserError(f"{given}: {name} has no place_at_optimum: give null, its parameters as they start")
    place_at_optimum(dataset, float(perturbation), derive_seed(config.seed, "perturbation"))


def run(config: DictConfig, context: Context) -> None:
    """Measure the gradients as `config` says; write metrics and gradients.npz to the run directory.

    Raises Interrupted where it is asked to stop: after a checkpoint, from which it goes on to the same numbers. A study
    whose gradients take more than 256 MiB draws them anew for each pass over them, and starts anew. Raises
    FloatingPointError, with the quantity, where the bound, or a gradient's mean or variance, is NaN or infinite.
    """
    GradientStudy(config, context).run()


def check(config: DictConfig) -> None:
    """Build everything once, take a gradient of each estimator on two observations; raise what a job would raise."""
    if config.task.oracle not in ORACLES:
        raise UserError(f"task.oracle={config.task.oracle}{near(str(config.task.oracle), ORACLES)}")
    for key in ("kept_replicates", "kept_parameters"):
        if config.task[key] < 1:
            raise UserError(f"task.{key}={config.task[key]}: expected at least 1")
    device = prepare_torch(config)
    dataset = build_dataset(config)
    model = build_model(config, device, dataset)
    place(model, dataset, config)
    dataset.batch(0, config.batch_size, config.seed)
    x = dataset.points("train")[:2].to(device)
    for estimator in build_estimators(config, device).values():
        estimator(model, x)[0].backward()
    model.diagnostics(x, dataset)
    select_parameters(model, list(config.analysis.parameters))
