"""Run directories made by hand, in the format that the report reads."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

Row = tuple[int, str, str, float]


def config(estimator: str = "reinforce", iw: int = 5, seed: int = 1, **more: Any) -> dict[str, Any]:
    """Return a resolved configuration; `more` has dotted paths with __ for the dots."""
    resolved: dict[str, Any] = {
        "choices": {"task": "train", "model": "gmm", "dataset": "gaussian_mixture", "estimator": estimator}
        | {"optimizer": "adam", "analysis": "default"},
        "tag": "",
        "seed": seed,
        "steps": 100000,
        "batch_size": 100,
        "model": {"target": "models.gaussian_mixture.GaussianMixture"},
        "dataset": {"target": "datasets.gaussian_mixture.GaussianMixtureData", "seed": 0},
        "estimator": {"id": estimator, "mc": 1, "iw": iw, "alpha": 0.0},
        "optimizer": {"target": "torch.optim.Adam", "lr": 0.001},
        "evaluation": {"iw": 100, "points": 1000},
        "analysis": {"num_replicates": 1000, "parameters": ["inference_network"]},
    }
    for path, value in more.items():
        *groups, last = path.split("__")
        place = resolved
        for group in groups:
            place = place[group]
        place[last] = value
    return resolved


def write_run(folder: Path, job: str, settings: Mapping[str, Any], rows: Iterable[Row], state: str = "done") -> Path:
    """Write one run directory below the experiment's folder; return it."""
    run = folder / "jobs" / job
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(dict(settings), sort_keys=False))
    (run / "status.json").write_text(json.dumps({"state": state, "attempt": 1, "error": None}))
    lines = (
        json.dumps({"step": step, "split": split, "name": name, "value": value}) for step, split, name, value in rows
    )
    (run / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    return run


def write_queue(folder: Path, states: Mapping[str, str], overrides: Mapping[str, list[str]] | None = None) -> None:
    """Write queue.json with these jobs."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = {
        str(i): {"id": job, "state": state, "overrides": (overrides or {}).get(job, []), "attempt": 1}
        for i, (job, state) in enumerate(states.items(), start=1)
    }
    (folder / "queue.json").write_text(json.dumps({"jobs": rows, "meta": {"1": {"snapshot": "x"}}}))


def write_experiment(folder: Path, report: Mapping[str, Any] | None = None, description: str = "") -> None:
    """Write experiment.json with the experiment file's text."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"description": description, "base": [], "grid": {}} | ({"report": dict(report)} if report else {})
    (folder / "experiment.json").write_text(json.dumps({"name": folder.name, "file": yaml.safe_dump(content)}))


def line(values: Iterable[float], split: str = "test", name: str = "gmm/posterior_mse", every: int = 1000) -> list[Row]:
    """Return the rows of one metric, a value each `every` steps from 0."""
    return [(i * every, split, name, value) for i, value in enumerate(values)]


# What each estimator of the made-up study ends at, for K = 2: posterior error, SNR, and how both go with K.
SHAPES = {
    "ovis-gamma1": (0.575, 0.63, -1.6, 0.55),
    "ovis-gamma0": (0.553, 0.40, -1.4, 0.42),
    "ovis-S10-exclusive": (0.56, 0.5, -1.5, 0.5),
    "wake-wake": (0.86, 0.46, -1.5, 0.18),
    "tvo-part5-beta2": (0.81, 0.275, -1.3, 0.22),
    "vimco-arithmetic": (0.67, 0.20, -0.5, -0.1),
    "vimco-geometric": (0.65, 0.19, -0.45, -0.12),
    "reinforce": (0.70, 0.089, -0.05, -0.3),
    "reinforce-baseline": (0.69, 0.11, -0.1, -0.25),
    "pathwise-iwae": (0.5, 0.33, -0.3, -0.5),
}


def gaussian_mixture(
    root: Path,
    estimators: Iterable[str] = tuple(SHAPES),
    particles: Iterable[int] = (2, 5, 10, 20),
    seeds: int = 5,
    evaluations: int = 101,
) -> Path:
    """Write a whole study shaped like gaussian-mixture-model, from smooth curves with wiggles that differ by seed."""
    folder = root / "gaussian-mixture-model"
    for estimator in estimators:
        error, snr, error_slope, snr_slope = SHAPES[estimator]
        for iw in particles:
            for seed in range(1, seeds + 1):
                rows: list[Row] = []
                for i in range(evaluations):
                    step = 1000 * i
                    wiggle = 0.1 * math.sin(seed * 1.7 + i * (0.3 + 0.05 * seed) + len(estimator))
                    floor = error * (iw / 2) ** error_slope
                    fall = math.exp(-i / 18)
                    error_now = math.exp(math.log(0.95) * fall + math.log(floor) * (1 - fall) + wiggle)
                    snr_now = snr * (iw / 2) ** snr_slope * math.exp(0.6 * fall + wiggle)
                    rows += [
                        (step, "test", "gmm/posterior_mse", error_now),
                        (step, "test", "gmm/prior_mse", 0.3 * fall + 0.02 * (1 + wiggle)),
                        (step, "test", "loss/L_k", -5.2 - 2 * fall - 0.05 * error * (1 + wiggle)),
                        (step, "train", "grads/snr", snr_now),
                        (step, "train", "grads/snr_se", 0.01 * snr_now),
                        (step, "train", "snr/p50", 0.8 * snr_now),
                        (step, "train", "grads/variance", 1e-4 * error / snr_now),
                        (step, "train", "loss/ess", 1 + (iw - 1) * (1 - 0.6 * fall) * 0.5),
                    ]
                write_run(folder, f"gmm-{estimator}-iw{iw}-seed{seed}", config(estimator, iw, seed), rows)
    write_experiment(
        folder,
        {
            "keys": ["dataset", "estimator", "iw"],
            "metrics": ["test:gmm/posterior_mse", "test:gmm/prior_mse", "train:grads/variance", "train:grads/snr"],
            "detailed_metrics": ["test:gmm/posterior_mse", "test:loss/L_k", "train:loss/ess", "train:grads/snr"],
            "pivot_metrics": ["min:test:gmm/posterior_mse", "min:test:gmm/prior_mse", "mean:train:grads/snr"],
        },
        "A Gaussian mixture model trained with ten estimators.",
    )
    return folder


# Of each estimator at K = 1: SNR and its power of K, variance and its power.
POWERS = {
    "pathwise-iwae": (2.2, -0.5, 2.3e-3, -1.0),
    "ovis-gamma0": (1.5, 0.3, 6e-3, -3.0),
    "ovis-gamma1": (1.7, 0.5, 4e-3, -3.0),
}


def study_config(estimator: str, compare: Iterable[str], iw: int, seed: int = 1, **more: Any) -> dict[str, Any]:
    """Return the configuration of a gradient study of the published settings."""
    settings = config(estimator, iw, seed)
    settings["choices"] |= {"task": "gradient_study", "model": "gaussian_toy", "dataset": "gaussian_toy"}
    settings["task"] = {"target": "tasks.gradient_study.run", "perturbation": 0.01, "compare": list(compare)}
    settings |= {"batch_size": 1024, "model": {"dim": 20, "scale": "std"}}
    settings["analysis"]["parameters"] = ["b"]
    for path, value in more.items():
        group, last = path.split("__")
        settings[group][last] = value
    return settings


def gradient_metrics(snr: float, variance: float) -> dict[str, float]:
    """Return the summary of one estimator's gradients, with standard errors of 2%."""
    values = {"snr": snr, "dsnr": 1.4 * snr, "variance": variance, "magnitude": snr * variance**0.5}
    return {f"grads/{name}{end}": scale * value for name, value in values.items() for end, scale in ENDS.items()}


ENDS = {"": 1.0, "_se": 0.02}


def write_gradients(run: Path, estimators: Mapping[str, tuple[float, float]], replicates: int = 200) -> None:
    """Write gradients.npz: of each estimator, by SNR and variance, normal gradients of two parameters."""
    random = np.random.default_rng(0)
    arrays: dict[str, Any] = {"names": np.array(["b[0]", "b[1]"])}
    for estimator, (snr, variance) in estimators.items():
        mean = snr * variance**0.5 * np.array([1.0, -1.0])
        both = {"mean": mean, "variance": np.full(2, variance), "snr": np.full(2, snr)}
        arrays |= {f"{estimator}/{name}": value for name, value in both.items()}
        arrays |= {f"{estimator}/{name}_se": 0.02 * abs(value) for name, value in both.items()}
        noise = variance**0.5 * random.standard_normal((replicates, 2))
        arrays[f"{estimator}/replicates"] = (mean + noise).astype(np.float32)
    np.savez_compressed(run / "gradients.npz", **arrays)


def gradient_study(
    root: Path,
    particles: Iterable[int] = (3, 12, 54, 234, 1000),
    seeds: int = 1,
    report: Mapping[str, Any] | None = None,
) -> Path:
    """Write a study of exact power laws, shaped like asymptotic-analysis: a job for each K compares all estimators."""
    folder = root / "asymptotic"
    own, *others = POWERS
    for iw in particles:
        for seed in range(1, seeds + 1):
            found = {
                estimator: (seed * snr * iw**rise, variance * float(iw) ** fall)
                for estimator, (snr, rise, variance, fall) in POWERS.items()
            }
            rows: list[Row] = [
                (0, "train", name if estimator == own else f"{estimator}/{name}", value)
                for estimator, moments in found.items()
                for name, value in gradient_metrics(*moments).items()
            ]
            run = write_run(folder, f"toy-iw{iw}-seed{seed}", study_config(own, others, iw, seed), rows)
            write_gradients(run, found)
    write_experiment(folder, report or {"keys": ["estimator", "iw"], "figures": ["asymptotics", "distribution"]})
    return folder


def zoo(root: Path, estimators: Iterable[str] = tuple(SHAPES), models: Iterable[str] = ("gmm", "gaussian_toy")) -> Path:
    """Write a league: a job for each model compares all estimators at one K, each with its bias, time and memory."""
    folder = root / "zoo"
    own, *others = estimators
    for model in models:
        rows: list[Row] = []
        for place, estimator in enumerate((own, *others)):
            variance, milliseconds = 10 ** -(1 + place % 5), 2.0 + 1.3 * (7 * place % 11)
            values = gradient_metrics(1 + place, variance) | {
                "grads/bias": 1e-3,
                "grads/bias_se": 1e-4,
                "grads/bias_z": 12.0 if estimator.startswith("tvo") else 1.0 + 0.1 * (place % 3),
                "grads/cosine": 0.9,
                "time/evaluation_ms": milliseconds,
                "memory/evaluation_mb": 1.0 + place,
                "time/work_normalised_variance": variance * milliseconds / 1e3,
            }
            prefix = "" if estimator == own else f"{estimator}/"
            rows += [(0, "train", f"{prefix}{name}", value) for name, value in values.items()]
        settings = study_config(own, others, 5)
        settings["choices"]["model"] = model
        write_run(folder, model, settings, rows)
    write_experiment(folder, {"keys": ["model", "estimator", "iw"], "figures": ["league", "frontier"], "latex": True})
    return folder
