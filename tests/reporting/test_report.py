"""report.py as its users run it: a process with arguments, files and an exit status."""

import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from report import main
from reporting import page
from tests.reporting.synthetic import config, gaussian_mixture, line, write_experiment, write_queue, write_run

SOURCE = Path(__file__).parents[2]
REPORT = {
    "keys": ["dataset", "estimator", "iw"],
    "metrics": ["test:gmm/posterior_mse", "train:grads/snr"],
    "detailed_metrics": ["train:grads/snr"],
    "pivot_metrics": ["min:test:gmm/posterior_mse", "mean:train:grads/snr"],
    "caption": "Two estimators & two seeds.",
}


def report(root: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SOURCE / "report.py", "--root", root / "runs", "--output", root / "reports", *arguments]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=root)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An experiment of two estimators, two K and two seeds, all done."""
    folder = tmp_path / "runs" / "study"
    for place, estimator in enumerate(("reinforce", "ovis-gamma1")):
        for iw in (5, 20):
            for seed in (1, 2):
                low = 0.1 * (place + 1) + 0.01 * seed + 0.001 * iw
                rows = line([0.9, low, low + 0.1]) + line([1.0, 2.0, 3.0 * seed], "train", "grads/snr")
                write_run(folder, f"{estimator}-iw{iw}-s{seed}", config(estimator, iw, seed), rows)
    write_experiment(folder, REPORT, "A <small> study.")
    return folder


class Links(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.found: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found |= {value for name, value in attrs if name in ("href", "src") and value}


def test_a_finished_experiment_needs_no_other_flag(folder, tmp_path):
    done = report(tmp_path, "--exp", "study")
    assert "study: 8 done" in done.stdout
    assert done.stderr == ""
    made = tmp_path / "reports" / "study"
    figures = {"pivot", "curves-test-gmm-posterior_mse", "curves-train-grads-snr", "detailed"}
    expected = {f"{stem}.{kind}" for stem in figures for kind in ("png", "pdf")}
    expected |= {"runs.csv", "curves.csv", "seeds.csv", "pivot.csv", "index.html", "manifest.txt"}
    assert {path.name for path in made.iterdir()} == expected

    pivot = pd.read_csv(made / "pivot.csv").set_index(["dataset", "estimator", "iw"])
    cell = pivot.xs(("gaussian_mixture", "reinforce", 20))
    assert cell["min:test:gmm/posterior_mse"] == pytest.approx((0.13 + 0.14) / 2)
    assert cell["min:test:gmm/posterior_mse sd"] == pytest.approx(0.01 / 2**0.5)
    assert cell["min:test:gmm/posterior_mse se"] == pytest.approx(0.005)
    assert cell["min:test:gmm/posterior_mse high"] == pytest.approx(0.135 + 12.7062047 * 0.005)
    assert cell["mean:train:grads/snr"] == pytest.approx((2.0 + 3.0) / 2)
    assert cell["mean:train:grads/snr n"] == 2

    runs = pd.read_csv(made / "runs.csv").set_index("id")
    assert len(runs) == 8
    assert runs.loc["ovis-gamma1-iw5-s2", "min:test:gmm/posterior_mse"] == pytest.approx(0.225)
    assert list(runs.loc["ovis-gamma1-iw5-s2", ["state", "last_step", "seed", "iw"]]) == ["done", 2000, 2, 5]

    curves = pd.read_csv(made / "curves.csv")
    assert len(curves) == 2 * 2 * 2 * 3
    seeds = pd.read_csv(made / "seeds.csv")
    assert len(seeds) == 2 * len(curves)
    row = curves[(curves["metric"] == "grads/snr") & (curves["step"] == 2000)].iloc[0]
    assert (row["split"], row["mean"], row["n"]) == ("train", 4.5, 2)


def test_the_page_is_whole(folder, tmp_path):
    report(tmp_path, "--exp", "study")
    made = tmp_path / "reports" / "study"
    page = (made / "index.html").read_text()
    links = Links(page).found
    assert {link for link in links if link.endswith(".png")} == {path.name for path in made.glob("*.png")}
    assert all((made / link).is_file() for link in links)
    assert "http" not in page
    assert "A &lt;small&gt; study." in page
    assert "Two estimators &amp; two seeds." in page
    assert "95% intervals (Student&#x27;s t over seeds; n = 2)" in page


def test_the_same_report_is_the_same_bytes(folder, tmp_path):
    report(tmp_path, "--exp", "study")
    made = tmp_path / "reports" / "study"
    first = {path.name: path.read_bytes() for path in made.iterdir()}
    report(tmp_path, "--exp", "study")
    assert {path.name: path.read_bytes() for path in made.iterdir()} == first


def test_flags_replace_the_files_entries(folder, tmp_path):
    report(
        tmp_path,
        "--exp=study",
        "--keys=estimator,iw",
        "--metrics=test:gmm/posterior_mse",
        "--detailed_metrics=",
        "--pivot_metrics=last:train:grads/snr",
        "--ylims=test:gmm/posterior_mse:0.01:1",
        "--ema=0.5",
        "--include=ovis",
        "--exclude=iw=5",
        "--latex",
    )
    made = tmp_path / "reports" / "study-inc=ovis-exc=iw=5"
    assert {path.name for path in made.glob("*.p*g")} == {"pivot.png", "curves-test-gmm-posterior_mse.png"}
    pivot = pd.read_csv(made / "pivot.csv")
    assert pivot[["estimator", "iw", "last:train:grads/snr"]].to_numpy().tolist() == [["ovis-gamma1", 20, 4.5]]
    assert "ovis-gamma1" in (made / "pivot.tex").read_text()
    assert "exponential moving average of 0.5" in (made / "index.html").read_text()


def test_the_report_of_another_root_leaves_that_of_the_default_root_alone(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for root, values in (("elsewhere/runs", [0.7]), ("other/runs", [0.8])):
        write_run(tmp_path / root / "study", "a", config(), line(values))
        write_experiment(tmp_path / root / "study", {"metrics": ["test:gmm/posterior_mse"]})
    assert main(["--exp=study", "--figures=pivot"]) == 0
    before = (tmp_path / "reports" / "study" / "runs.csv").read_bytes()
    assert main(["--exp=study", "--figures=pivot", "--root=elsewhere/runs"]) == 0
    assert main(["--exp=study", "--figures=pivot", f"--root={tmp_path}/other/runs"]) == 0
    assert main(["--exp=study", "--figures=pivot", f"--root={tmp_path}/runs"]) == 0
    made = {path.name for path in (tmp_path / "reports").iterdir()}
    assert made == {"study", "study-root=elsewhere_runs", "study-root=other_runs"}
    assert (tmp_path / "reports" / "study" / "runs.csv").read_bytes() == before
    assert "reports/study-root=other_runs/index.html" in capsys.readouterr().out
    assert main(["--exp=study", "--root=elsewhere/runs", "--output=mine"]) == 0
    assert (tmp_path / "mine" / "study" / "index.html").is_file()


def test_what_an_earlier_report_made_goes_and_what_it_did_not_stays(folder, tmp_path):
    report(tmp_path, "--exp", "study")
    made = tmp_path / "reports" / "study"
    (made / "notes.txt").write_text("mine")
    report(tmp_path, "--exp", "study", "--figures", "pivot")
    assert {path.name for path in made.glob("*.png")} == {"pivot.png"}
    assert (made / "notes.txt").read_text() == "mine"


def test_an_unfinished_experiment_is_reported_as_far_as_it_is(folder, tmp_path):
    write_run(folder, "young", config("wake-wake", 5, 1), line([0.8]), state="running")
    write_run(folder, "broken", config("wake-wake", 5, 2), line([9.0, 9.0]), state="failed")
    cut = write_run(folder, "cut", config("wake-wake", 20, 1), [])
    (cut / "config.yaml").write_text("choices: {")
    write_queue(folder, {"young": "running", "broken": "failed", "later-a": "queued", "later-b": "queued"})
    done = report(tmp_path, "--exp", "study")
    assert "study: 9 done, 1 running, 2 queued, 1 failed" in done.stdout
    assert "warning: job cut: config.yaml" in done.stderr
    made = tmp_path / "reports" / "study"
    page = (made / "index.html").read_text()
    assert "Missing: not finished (4)" in page
    assert all(job in page for job in ("young", "broken", "later-a", "later-b", "job cut: config.yaml"))
    assert "wake-wake" not in set(pd.read_csv(made / "pivot.csv")["estimator"])
    curves = pd.read_csv(made / "curves.csv")
    assert curves[curves["estimator"] == "wake-wake"]["mean"].tolist() == [0.8]
    assert set(pd.read_csv(made / "runs.csv")["state"]) == {"done", "running", "failed"}


def test_an_experiment_that_has_not_started_says_so(tmp_path):
    write_queue(tmp_path / "runs" / "study", {"a": "queued"})
    write_experiment(tmp_path / "runs" / "study", REPORT)
    done = report(tmp_path, "--exp", "study")
    assert "study: 1 queued" in done.stdout
    page = (tmp_path / "reports" / "study" / "index.html").read_text()
    assert "No job has recorded anything yet." in page
    assert "Missing: not finished (1)" in page


def test_an_experiment_that_was_never_run_says_so(tmp_path):
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "mine.yaml").write_text("description: Mine.\nreport: {metrics: [test:loss/L_k]}\n")
    done = report(tmp_path, "--exp", "mine", "--user_dir", str(tmp_path))
    assert "no job has started" in done.stdout
    assert (tmp_path / "reports" / "mine" / "index.html").is_file()


def test_a_metric_that_is_still_to_come_is_no_mistake(tmp_path):
    folder = tmp_path / "runs" / "study"
    write_run(folder, "a", config(), line([0.5, 0.4]), state="running")
    write_experiment(folder, REPORT)
    assert "train:grads/snr: not recorded yet" in report(tmp_path, "--exp", "study").stderr
    report(tmp_path, "--exp", "study", "--metrics", "train:grads/snr", code=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--exp", "studi"], "unknown experiment 'studi'"),
        (["--exp", "study", "--keys", "estimatr"], "keys: no run has a 'estimatr'; did you mean 'estimator'"),
        (["--exp", "study", "--metrics", "test:gmm/posterior_mes"], "did you mean 'test:gmm/posterior_mse'"),
        (["--exp", "study", "--metrics", "dev:grads/snr"], "unknown split 'dev'"),
        (["--exp", "study", "--pivot_metrics", "min:test:grads/snr"], "did you mean 'train:grads/snr'"),
        (["--exp", "study", "--include", "oviss"], "include: 'oviss' names no job"),
        (["--exp", "study", "--include", "nothing"], "names no job; choose from adam, default, gaussian_mixture, gmm,"),
        (["--exp", "study", "--include", "reinforce-iw5-s3"], "did you mean 'reinforce-iw5-s2' or"),
        (["--exp", "study", "--ema", "2"], "--ema: expected a number"),
        (["--exp", "study", "--ema", "much"], "argument --ema: invalid float value: 'much'"),
        (["--exp", "study", "--metric", "x"], "unknown argument '--metric'; did you mean '--metrics'"),
        ([], "the following arguments are required: --exp"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_2(folder, tmp_path, arguments, message):
    done = report(tmp_path, *arguments, code=2)
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert "choose from" not in message or "iw5" not in done.stderr
    assert not (tmp_path / "reports").exists()


def test_a_mistake_in_the_experiment_file_names_it(folder, tmp_path):
    write_experiment(folder, {"metrik": []})
    assert "experiment.json: report: unknown entry 'metrik'" in report(tmp_path, "--exp", "study", code=2).stderr


def test_an_output_that_cannot_be_written_is_one_line_and_exit_1(folder, tmp_path):
    (tmp_path / "reports").write_text("a file")
    done = report(tmp_path, "--exp", "study", code=1)
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "reports" in done.stderr


def test_an_interrupt_leaves_the_earlier_report_as_it_is(folder, tmp_path, monkeypatch, capsys):
    def interrupt(_):
        raise KeyboardInterrupt

    report(tmp_path, "--exp", "study")
    made = tmp_path / "reports" / "study"
    before = {path.name: path.read_bytes() for path in made.iterdir()}
    write_run(folder, "another", config(seed=3), line([0.5]))
    monkeypatch.setattr(page, "render", interrupt)
    assert main(["--exp=study", f"--root={tmp_path}/runs", f"--output={tmp_path}/reports"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert {path.name: path.read_bytes() for path in made.iterdir()} == before


def test_a_manifest_that_is_no_text_is_named(folder, tmp_path):
    made = tmp_path / "reports" / "study"
    made.mkdir(parents=True)
    (made / "manifest.txt").write_bytes(b"\xff\xfe")
    assert "manifest.txt: no text" in report(tmp_path, "--exp", "study").stderr
    assert "manifest.txt: no text" in (made / "index.html").read_text()
    assert report(tmp_path, "--exp", "study").stderr == ""


def test_a_job_whose_folder_is_gone_is_on_the_page(folder, tmp_path):
    write_queue(folder, {"lost": "done"})
    assert "job lost: its folder is missing" in report(tmp_path, "--exp", "study").stderr
    assert "job lost: its folder is missing" in (tmp_path / "reports" / "study" / "index.html").read_text()


def test_published_values_are_on_the_page_of_the_study_that_matches(tmp_path):
    gaussian_mixture(tmp_path / "runs", ["reinforce", "ovis-gamma1"], [2, 20], seeds=2, evaluations=3)
    report(tmp_path, "--exp", "gaussian-mixture-model")
    page = (tmp_path / "reports" / "gaussian-mixture-model" / "index.html").read_text()
    assert "Hollow: published by Liévin et al. 2020, Figure 2" in page
    assert "published 0.0126" in page


def test_help_answers_without_loading_anything(tmp_path):
    heavy = "{'numpy', 'pandas', 'matplotlib', 'torch'}"
    code = f"import sys, report; report.parser().format_help(); print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=SOURCE)
    assert done.stdout == "[]\n", done.stderr
    assert "--pivot_metrics" in report(tmp_path, "--help").stdout


def test_torch_is_never_imported(folder, tmp_path):
    code = (
        "import sys, report;"
        f"code = report.main(['--exp=study', '--root={tmp_path}/runs', '--output={tmp_path}/reports']);"
        "print(code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=SOURCE)
    assert done.stdout.endswith("0 False\n"), done.stderr
