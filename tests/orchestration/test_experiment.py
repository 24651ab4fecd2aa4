import re

import pytest

from errors import UserError
from orchestration import experiment
from orchestration.experiment import difference, expand, load, parse


def jobs_of(text, *overrides):
    return expand(parse("study", text, "study.yaml"), overrides)


def points(jobs, *keys):
    """Return the values of some keys, by their last part, of each job."""
    return [tuple({**job.config, **job.config["estimator"], **job.choices}[key] for key in keys) for job in jobs]


def test_grid_is_the_product_in_the_order_of_the_file():
    jobs = jobs_of("grid: {seed: 'range(1,3)', estimator.iw: [5, 2], estimator: 'choice(reinforce,ovis-gamma1)'}")
    assert points(jobs, "seed", "iw", "estimator") == [
        (seed, iw, estimator) for seed in (1, 2) for iw in (5, 2) for estimator in ("reinforce", "ovis-gamma1")
    ]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ("1,2,3", [1, 2, 3]),
        ("1, 2", [1, 2]),
        ("range(1,4)", [1, 2, 3]),
        ("range(1,8,3)", [1, 4, 7]),
        ("choice(4,2)", [4, 2]),
        ("[1, 2]", [1, 2]),
        ("['1,2', 1e3]", [1, 2, 1000]),
        ("7", [7]),
        ("[7]", [7]),
    ],
)
def test_values_of_an_axis(values, expected):
    assert points(jobs_of(f"grid:\n  seed: {values}"), "seed") == [(seed,) for seed in expected]


def test_an_axis_of_numbers_that_yaml_takes_for_texts():
    assert [job.config["optimizer"]["lr"] for job in jobs_of("grid: {optimizer.lr: [1e-3, 2.e-4]}")] == [1e-3, 2e-4]


def test_an_axis_of_lists():
    jobs = jobs_of("grid: {analysis.parameters: [[A, b], [A], b]}")
    assert [job.config["analysis"]["parameters"] for job in jobs] == [["A", "b"], ["A"], ["b"]]


def test_later_layers_win():
    text = "base: [seed=1, steps=1, threads=1]\nvariants: [[seed=2, steps=2], [steps=3]]\ngrid: {steps: [4]}"
    assert points(jobs_of(text), "seed", "steps") == [(2, 4), (1, 4)]
    assert points(jobs_of(text, "steps=5"), "seed", "steps") == [(2, 5), (1, 5)]
    assert points(jobs_of(text, "seed=9"), "seed", "steps") == [(9, 4)]


def test_the_command_line_replaces_an_axis():
    text = "grid: {seed: 'range(1,11)', estimator.iw: [2, 5]}"
    assert points(jobs_of(text, "seed=3"), "seed", "iw") == [(3, 2), (3, 5)]
    assert points(jobs_of(text, "seed=3,4", "estimator.iw=7"), "seed", "iw") == [(3, 7), (4, 7)]
    assert points(jobs_of("base: [steps=5]", "seed=1,2"), "seed", "steps") == [(1, 5), (2, 5)]


def test_the_same_job_is_there_once():
    text = (
        "variants: [[estimator=ovis-gamma1], [estimator=ovis-gamma1.0, optimizer.lr=0.001]]\ngrid: {seed: [1, 1.0, 2]}"
    )
    assert points(jobs_of(text), "seed") == [(1,), (2,)]


def test_exclude_drops_what_it_matches():
    text = "grid: {estimator: 'reinforce,ovis-gamma1', estimator.iw: [2, 5, 10]}\n"
    everything = points(jobs_of(text), "estimator", "iw")
    left = points(
        jobs_of(text + "exclude: [[estimator=ovis-gamma1.0, estimator.iw=2.0], [estimator.iw=10]]"), "estimator", "iw"
    )
    assert left == [point for point in everything if point != ("ovis-gamma1", 2) and point[1] != 10]
    assert left == points(
        jobs_of(text + "exclude: [[estimator=ovis-gamma1, estimator.iw=2], [seed=1, 'estimator.iw=7,10']]"),
        "estimator",
        "iw",
    )


def test_exclude_sees_defaults_and_other_groups():
    text = "grid: {model: 'gmm,gaussian_toy'}\n"
    assert points(jobs_of(text + "exclude: [[dataset=gaussian_toy]]"), "model") == [("gmm",)]
    assert points(jobs_of(text + "exclude: [[model=gmm, estimator.iw=10]]"), "model") == [("gaussian_toy",)]
    assert points(jobs_of(text + "exclude: [[model=gmm, estimator.iw=11]]"), "model") == [("gmm",), ("gaussian_toy",)]


def test_expansion_is_pure():
    study = parse("study", "grid: {seed: [1, 2]}\nexclude: [[seed=2]]", "study.yaml")
    first = expand(study, ["steps=5"])
    first[0].config["seed"] = "changed"
    assert points(expand(study, ["steps=5"]), "seed", "steps") == [(1, 5)]


def test_ten_thousand_jobs():
    jobs = jobs_of("grid: {estimator: 'reinforce,ovis-gamma1', estimator.iw: 'range(1,51)', seed: 'range(100)'}")
    assert len({job.id for job in jobs}) == len(jobs) == 10_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "study.yaml: expected a mapping with the keys description, base, variants, grid, exclude, report"),
        ("- seed=1", "study.yaml: expected a mapping"),
        ("base: [\n  seed=1\ngrid: {", "study.yaml, line 3: not YAML"),
        ("grid: {seed: 1}\ngrid: {seed: 2}", "study.yaml, line 2: not YAML: found duplicate key grid"),
        ("gird: {seed: 1}", "study.yaml: unknown key 'gird'; did you mean 'grid'?"),
        ("1: 2", "study.yaml: unknown key '1'"),
        ("description: [a]", "study.yaml: description: expected a text, not ['a']"),
        ("base: seed=1", "study.yaml: base: expected a list of overrides such as [model=gmm, seed=1], not 'seed=1'"),
        ("base:", "study.yaml: base: expected a list of overrides"),
        ("base: [{seed: 1}]", "study.yaml: base: expected a list of overrides"),
        ("base: ['seed=1,2']", "study.yaml: base: seed: expected one value, not 2: a sweep belongs in the grid"),
        ("base: [seed]", "study.yaml: base: seed: expected key=value"),
        ("variants: []", "study.yaml: variants: expected lists of overrides"),
        ("variants: [seed=1]", "study.yaml: variants: expected a list of overrides"),
        ("variants: [['seed=1,2']]", "study.yaml: variants: seed: expected one value"),
        ("grid: {}", "study.yaml: grid: expected a mapping of keys to values"),
        ("grid:", "study.yaml: grid: expected a mapping of keys to values"),
        ("grid: [seed=1]", "study.yaml: grid: expected a mapping"),
        ("grid: {seed: []}", "study.yaml: grid: seed: expected values, as [1, 2, 3] or 1,2,3 or range(1,4), not []"),
        ("grid: {seed: {a: 1}}", "study.yaml: grid: seed: expected values"),
        ("grid: {seed: 'range(1,'}", "study.yaml: grid: seed=range(1,: expected key=value in Hydra's grammar"),
        ("grid: {seed: 'range(3,3)'}", "study.yaml: grid: seed=range(3,3): the sweep is empty"),
        ("exclude: [seed=1]", "study.yaml: exclude: expected a list of overrides"),
        ("report: [a]", "study.yaml: report: expected a mapping of report.py's options"),
        ("base: [estimator.iv=1]", "study.yaml: estimator.iv=1: no such key; did you mean 'estimator.iw'"),
        ("grid: {estimator.iw: [0]}", "study.yaml: estimator.iw=0: expected an integer of at least 1"),
        ("grid: {estimator: [ovis]}", "study.yaml: estimator=ovis: unknown estimator"),
        ("exclude: [[sed=1]]", "study.yaml: sed=1: no such key; did you mean 'seed'"),
        ("exclude: [[estimator.iw=10]]", "study.yaml: exclude drops every job"),
        ("description: ${", "study.yaml: not an experiment"),
        ("3", "study.yaml: expected a mapping"),
        ("grid: &a {seed: *a}", "study.yaml: not an experiment: it contains itself"),
        ("base: &a [*a]", "study.yaml: not an experiment: it contains itself"),
        (f"base: {5000 * '['}", "study.yaml: not an experiment: it contains itself, or is nested too deeply"),
        (f"grid: {{seed: {5000 * '1'}}}", "study.yaml: not an experiment"),
        ('grid: {seed: "\\n,"}', "study.yaml: grid: 'seed=\\n,': expected key=value"),
        ("grid: {seed: 'range(1,inf)'}", "study.yaml: grid: seed=range(1,inf): the sweep has more than 100,000 values"),
        ("grid: {seed: 'range(2000)', steps: 'range(1,502)'}", "study.yaml: the grid has 1,002,000 combinations"),
        ("exclude: [['seed=range(2000)', 'steps=range(1,502)']]", "study.yaml: exclude has 1,002,000 combinations"),
    ],
)
def test_mistakes_are_refused_in_one_line(text, message):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        jobs_of(text)
    assert "\n" not in str(caught.value)


def test_a_mistake_on_the_command_line_does_not_blame_the_file():
    with pytest.raises(UserError, match=r"^steps=no: expected an integer"):
        jobs_of("base: [steps=5]", "steps=no")


def test_load_reads_the_source_and_a_users_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "EXPERIMENTS", tmp_path / "source")
    for file in ("source/quick.yaml", "user/experiments/slow.yaml"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text("description: a study")
    assert load("quick").description == "a study"
    assert load("slow", tmp_path / "user").text == "description: a study"
    with pytest.raises(UserError, match=re.escape("no experiment 'slwo'; did you mean 'slow'?")):
        load("slwo", tmp_path / "user")
    with pytest.raises(UserError, match=re.escape("no experiment 'slow'; choose from quick")):
        load("slow")
    (tmp_path / "source" / "binary.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"binary\.yaml: not YAML: expected UTF-8 text"):
        load("binary")
    (tmp_path / "user" / "experiments" / "quick.yaml").write_text("description: another")
    with pytest.raises(UserError, match="'quick' exists already: rename yours"):
        load("quick", tmp_path / "user")


@pytest.mark.parametrize("name", ["", ".", "../quick", "a/quick", "quick.yaml"])
def test_a_name_that_is_no_plain_file_name_is_unknown(name, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "EXPERIMENTS", tmp_path)
    (tmp_path / "quick.yaml").write_text("description: a study")
    with pytest.raises(UserError, match=re.escape(f"no experiment {name!r}; ") + ".*quick"):
        load(name)


def test_the_name_of_the_folder_of_single_runs_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "EXPERIMENTS", tmp_path)
    (tmp_path / "single.yaml").write_text("description: a study")
    with pytest.raises(UserError, match=r"single\.yaml: the name 'single' is taken by run.py's jobs: rename yours$"):
        load("single")


def test_difference():
    before, after = jobs_of("grid: {seed: [1, 2, 3]}"), jobs_of("grid: {seed: [2, 3, 4, 5]}")
    added, removed = difference([job.id for job in before], after)
    assert points(added, "seed") == [(4,), (5,)]
    assert removed == [before[0].id]


@pytest.mark.parametrize("name", [file.stem for file in sorted(experiment.EXPERIMENTS.glob("*.yaml"))])
def test_every_experiment_that_ships_expands(name):
    study = load(name)
    assert study.description
    assert study.report
    assert expand(study)


def test_the_sizes_of_the_studies():
    sizes = {"quickstart": 12, "gaussian-mixture-model": 10 * 4 * 10}
    assert {name: len(expand(load(name))) for name in sizes} == sizes
