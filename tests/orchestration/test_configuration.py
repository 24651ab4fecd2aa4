import re
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from errors import UserError
from orchestration import configuration
from orchestration.configuration import compose, parse_override
from orchestration.schema import GROUPS, Rule

MODEL = """\
defaults:
  - override /dataset@_global_.dataset: points
target: mine.Model
width: 8
layers: [200, 200]
scale: 1.0
name: linear
gated: true
limit: null
double: ${.width}
"""
DATASET = """\
target: mine.Points
seed: 0
width: ${model.width}
label: "${dataset.width}-${seed}"
url: null
"""


@pytest.fixture(scope="module")
def user_dir(tmp_path_factory):
    """Return a user's directory with a model, whose data set takes its width from it."""
    folder = tmp_path_factory.mktemp("a user's, own")
    write(folder / "conf" / "model" / "mine.yaml", MODEL)
    write(folder / "conf" / "dataset" / "points.yaml", DATASET)
    return folder


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_defaults():
    job = compose([])
    assert job.overrides == []
    assert job.choices == job.config["choices"]
    assert job.choices == {
        "task": "train",
        "model": "gmm",
        "dataset": "gaussian_mixture",
        "estimator": "ovis-gamma1",
        "optimizer": "adam",
        "analysis": "default",
    }
    assert job.config["estimator"] == {
        "id": "ovis-gamma1", "mc": 1, "iw": 10, "alpha": 0.0, "beta": 1.0, "freebits": None,
    }  # fmt: skip
    assert job.config["optimizer"]["lr"] == 1e-3
    assert job.config["evaluation"] == {"iw": 100, "points": 1000}
    assert job.config["analysis"] == {"num_replicates": 1000, "parameters": ["inference_network"], "block_size": None}


FILES = [
    file for group in GROUPS if group != "estimator" for file in sorted((configuration.CONF / group).glob("*.yaml"))
]


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}={file.stem}")
def test_every_choice_composes(file):
    group, choice = file.parent.name, file.stem
    job = compose(["model=gmm", f"{group}={choice}"])
    assert job.choices[group] == choice
    assert compose(job.overrides) == job


def test_a_parametric_estimator_needs_no_file():
    job = compose(["estimator=ovis-gamma0.37"])
    assert job.config["estimator"]["id"] == job.choices["estimator"] == "ovis-gamma0.37"


def test_a_model_names_its_data_set_and_the_command_line_wins(user_dir):
    assert compose(["model=mine"], user_dir).choices["dataset"] == "points"
    assert compose(["model=mine", "dataset=gaussian_mixture"], user_dir).choices["dataset"] == "gaussian_mixture"
    assert compose(["dataset=gaussian_mixture", "model=mine"], user_dir).choices["dataset"] == "gaussian_mixture"


def test_later_overrides_win():
    assert compose(["seed=1", "seed=2"]).config["seed"] == 2
    assert compose(["optimizer=adam", "optimizer=sgd"]).choices["optimizer"] == "sgd"


def test_a_value_applies_to_the_final_choice():
    assert compose(["optimizer.momentum=0.9", "optimizer=sgd"]).config["optimizer"]["momentum"] == 0.9
    with pytest.raises(UserError, match=re.escape("optimizer.momentum=0.9: no such key")):
        compose(["optimizer=sgd", "optimizer.momentum=0.9", "optimizer=adam"])


def test_interpolations_follow_the_values(user_dir):
    config = compose(["model=mine", "model.width=5", "seed=7"], user_dir).config
    assert (config["model"]["double"], config["dataset"]["width"], config["dataset"]["label"]) == (5, 5, "5-7")
    assert compose(["model=mine", "dataset.width=3"], user_dir).config["dataset"]["label"] == "3-1"


def test_jobs_share_nothing():
    compose([]).config["analysis"]["parameters"].append("prior")
    assert compose([]).config["analysis"]["parameters"] == ["inference_network"]


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("steps=1e5", 100_000),
        ("optimizer.lr=1", 1.0),
        ("estimator.freebits=null", None),
        ("estimator.freebits=2", 2.0),
        ("analysis.parameters=b", ["b"]),
        ("analysis.parameters=[A,b]", ["A", "b"]),
        ("analysis.block_size=64", 64),
        ("tag=2024", "2024"),
        ("tag=", ""),
        ("tag='a=b, c'", "a=b, c"),
        ("model.layers=[50]", [50]),
        ("model.layers=50", [50]),
        ("model.layers=[]", []),
        ("model.gated=false", False),
        ("model.limit=3.0", 3),
        ("model.limit=[1.0,x]", [1, "x"]),
    ],
)
def test_values_take_the_type_of_their_key(override, value, user_dir):
    key = override.partition("=")[0]
    found = compose(["model=mine", override], user_dir).config
    for part in key.split("."):
        found = found[part]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=abc", "seed=abc: expected an integer of at least 0"),
        ("seed=null", "seed=null: expected an integer"),
        ("seed=-1", "seed=-1: expected an integer of at least 0"),
        (f"optimizer.lr=1{400 * '0'}", "expected a number above 0"),
        ("seed=true", "seed=true: expected an integer"),
        ("steps=0", "steps=0: expected an integer of at least 1"),
        ("estimator.iw=2.5", "estimator.iw=2.5: expected an integer of at least 1"),
        ("estimator.iw=0", "estimator.iw=0: expected an integer of at least 1"),
        ("estimator.mc=[1]", "estimator.mc=[1]: expected an integer of at least 1"),
        ("estimator.alpha=1", "estimator.alpha=1: expected a number of at least 0 and below 1"),
        ("estimator.beta=nan", "estimator.beta=nan: expected a number of at least 0"),
        ("estimator.freebits=-1", "estimator.freebits=-1: expected a number of at least 0 or null"),
        ("optimizer.lr=-1", "optimizer.lr=-1: expected a number above 0"),
        ("optimizer.lr=inf", "optimizer.lr=inf: expected a number above 0"),
        ("analysis.num_replicates=1", "analysis.num_replicates=1: expected an integer of at least 2"),
        ("analysis.parameters=[1.5]", "analysis.parameters=[1.5]: expected a list, each a text"),
        ("model.width=x", "model.width=x: expected an integer"),
        ("model.layers=[a]", "model.layers=[a]: expected a list, each an integer"),
        ("model.gated=1", "model.gated=1: expected true or false"),
        ("model.limit={a:1}", "expected a value or null"),
        ("estimator.iv=3", "estimator.iv=3: no such key; did you mean 'estimator.iw'"),
        ("iw=3", "iw=3: no such key; did you mean 'estimator.iw' or 'evaluation.iw'?"),
        ("estimatr.alpha=0", "estimatr.alpha=0: no such key; did you mean 'estimator.alpha'?"),
        ("modle=gmm", "modle=gmm: no such key; did you mean 'model'?"),
        ("hydra.run.dir=x", "hydra.run.dir=x: no such key; choose from analysis, batch_size,"),
        ("evaluation=3", "evaluation=3: this is a section; choose from evaluation.iw, evaluation.points"),
        ("estimator.id=reinforce", "an estimator is chosen by estimator=ID"),
        ("model=min", "model=min: unknown model; did you mean 'mine'?"),
        ("model=null", "unknown model"),
        ("optimizer=[a]", "optimizer='[a]': unknown optimizer"),
        ("estimator=vimco-arithmetik", "did you mean 'vimco-arithmetic'"),
        ("dataset=point", "dataset=point: unknown dataset; did you mean 'points'?"),
        ("+x=1", "+x=1: adding (+), deleting (~) and packages (@) are not supported"),
        ("~seed", "~seed: adding (+), deleting (~)"),
        ("model@x=gmm", "packages (@) are not supported"),
        ("seed", "seed: expected key=value"),
        ("tag=a=b", "tag=a=b: expected key=value in Hydra's grammar"),
        ("tag=${seed}", "interpolations belong in conf/"),
        ("seed=1,2", "seed=1,2: one job takes one value a key, not a sweep"),
        ("seed=range(3,3)", "the sweep is empty"),
        ("seed=shuffle(1,2)", "can be enumerated"),
        ("optimizer.lr=interval(0,1)", "can be enumerated"),
        ("model=glob(*)", "can be enumerated"),
        ("seed=range(1,nan)", "seed=range(1,nan): expected key=value"),
        ("seed=range(1,inf)", "seed=range(1,inf): the sweep has more than 100,000 values"),
        ("seed=range(1,10,1e-7)", "the sweep has more than 100,000 values"),
        ("seed=range(1,100000000)", "the sweep has more than 100,000 values"),
        (f"tag={3000 * '['}", "expected key=value"),
        ("tag=\nx", r"'tag=\nx': expected key=value"),
        ("tag='\n',x", r"one job takes one value"),
        ("seed='\n'", "expected an integer"),
    ],
)
def test_mistakes_are_refused_in_one_line(override, message, user_dir):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        compose(["model=mine", override], user_dir)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["[reinforce,ovis-gama1]", "ovis-gama1", "[ovis-gama1,3]"])
def test_what_an_estimator_is_compared_with_is_an_estimator(value):
    with pytest.raises(UserError, match="unknown estimator 'ovis-gama1'; did you mean 'ovis-gamma1'"):
        compose(["task=gradient_study", f"task.compare={value}"])


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (
            "optimizer/bad.yaml",
            "target: x.Y\nlr: fast\n",
            "conf/optimizer/bad.yaml: optimizer.lr=fast: expected a number",
        ),
        ("optimizer/bad.yaml", "target: x.Y\n", "conf/optimizer/bad.yaml: the key optimizer.lr is missing"),
        ("optimizer/bad.yaml", "target: [\n", "cannot be composed"),
        (
            "optimizer/bad.yaml",
            "target: x\nlr: ${nowhere}\n",
            "cannot be composed: Interpolation key 'nowhere' not found",
        ),
        ("optimizer/bad.yaml", "target: x\nlr: ???\n", "cannot be composed: Missing mandatory value: lr"),
        ("model/bad.yaml", "target: x\n", "model=bad names no data set: give dataset=NAME"),
        ("model/gmm.yaml", "target: x\n", "model 'gmm' exists already: rename yours"),
    ],
)
def test_mistakes_in_files_are_refused(file, text, message, tmp_path):
    write(tmp_path / "conf" / file, text)
    group, _, name = file.removesuffix(".yaml").partition("/")
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        compose([f"{group}={name}"], tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spellings"),
    [
        (["estimator.beta=0"], ["estimator.beta=0.0"], ["estimator.beta=-0.0"]),
        (["estimator=ovis-gamma1.0"], ["estimator=ovis-gamma1"], []),
        (["steps=1e4"], ["steps=10_000"], ["steps=10000"], []),
        (["optimizer.lr=0.001"], ["optimizer.lr=1e-3"], ["optimizer=adam"], ["optimizer.estimator_lr=null"], []),
        (["estimator=tvo-part5"], ["estimator=tvo-part5-beta10-left"]),
        (["analysis.parameters=prior"], ["analysis.parameters=[prior]"]),
        (["seed=2", "seed=1"], []),
        (["root=/elsewhere", "device=cpu", "checkpoint_every=7", "data_root=/data"], []),
        (["model=mine", "dataset=points", "dataset.url='http://x/'"], ["model=mine"]),
        (["model=mine", "model.limit=2.0"], ["model=mine", "model.limit=2"]),
        (["model=mine", "model.width=5", "dataset.width=5"], ["model=mine", "model.width=5"]),
        (["model=mine", "dataset.width=8"], ["model=mine"]),
        (
            ["task=gradient_study", "task.compare=[reinforce,ovis-gamma0.50]"],
            ["task=gradient_study", "task.compare=[reinforce,ovis-gamma0.5,ovis-gamma1.0,reinforce]"],
        ),
        (["task=gradient_study", "task.compare=ovis-gamma1"], ["task=gradient_study"]),
        (
            ["task=gradient_study", "estimator=reinforce", "task.compare=[reinforce,ovis-gamma1]"],
            ["task.compare=ovis-gamma1", "estimator=reinforce", "task=gradient_study"],
        ),
    ],
)
def test_two_spellings_are_one_job(spellings, user_dir):
    assert len({compose(spelling, user_dir).id for spelling in spellings}) == 1


def test_other_jobs_have_other_ids(user_dir):
    overrides = ["seed=2", "steps=5", "tag=x", "threads=2", "estimator.iw=5", "estimator=ovis-gamma0", "optimizer=sgd",
                 "evaluation.iw=5", "model=mine", "eval_every=10", "analysis.block_size=4",
                 "optimizer.estimator_lr=0.1"]  # fmt: skip
    assert len({compose([override], user_dir).id for override in overrides}) == len(overrides)
    studies = ["task.compare=[reinforce]", "task.compare=[reinforce,wake-wake]", "task.cost=true"]
    assert len({compose(["task=gradient_study", override]).id for override in studies}) == len(studies)


def test_ids_are_what_they_always_were():
    """Run directories on people's disks are found by them."""
    job = compose(["estimator=vimco-arithmetic", "estimator.iw=20", "seed=3", "optimizer.lr=0.01"])
    assert job.id == "gmm-vimco-arithmetic-iw20-seed3-b6afa21e8281"


def test_a_new_option_renames_nothing(tmp_path, monkeypatch):
    overrides = ["estimator.iw=20", "seed=3"]
    before = compose(overrides)
    conf = shutil.copytree(configuration.CONF, tmp_path / "conf")
    for file, option in [
        (conf / "config.yaml", "log_every: 10\n"),
        (conf / "optimizer" / "adam.yaml", "amsgrad: true\n"),
    ]:
        file.write_text(file.read_text() + option)
    monkeypatch.setattr(configuration, "CONF", conf)
    after = compose(overrides)
    assert after.config["log_every"] == 10
    assert after.config["optimizer"]["amsgrad"] is True
    assert after.id == before.id
    assert compose([*overrides, "log_every=20"]).id != before.id


def test_an_optimizers_file_need_not_speak_of_estimators(tmp_path):
    write(tmp_path / "conf/optimizer/plain.yaml", "target: torch.optim.SGD\nlr: 0.1\n")
    assert compose(["optimizer=plain"], tmp_path).config["optimizer"]["estimator_lr"] is None


OVERRIDES = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2**32 - 1).map(str),
        "estimator": st.sampled_from(["ovis-gamma1.0", "ovis-gamma0.5", "reinforce"]),
        "estimator.iw": st.integers(1, 10**6).map(str),
        "estimator.alpha": st.floats(0, 1, exclude_max=True).map(repr),
        "optimizer": st.sampled_from(["adam", "sgd"]),
        "optimizer.lr": st.floats(0, exclude_min=True, allow_infinity=False).map(repr),
        "analysis.parameters": st.lists(st.from_regex(r"[A-Za-z_.]+", fullmatch=True)).map(
            lambda names: f"[{','.join(names)}]"
        ),
    },
)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(OVERRIDES, st.randoms(use_true_random=False))
def test_the_order_of_overrides_says_nothing(overrides, random):
    lines = [f"{key}={value}" for key, value in overrides.items()]
    job = compose(lines)
    random.shuffle(lines)
    assert compose(lines) == job


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(OVERRIDES, st.text(st.characters(exclude_categories=["Cc", "Cs"])))
def test_a_job_makes_itself_again_from_its_overrides(overrides, tag):
    job = compose([f"{key}={value}" for key, value in overrides.items()])
    again = configuration.compose_values({**dict(map(values_of, job.overrides)), "tag": tag.replace("${", "")})
    assert compose(again.overrides) == again
    assert compose(job.overrides) == job


def values_of(override):
    key, values, _ = parse_override(override)
    return key, values[0]


def test_rules_of_defaults():
    assert Rule.of_default([1, 2.5]) == Rule(float, is_list=True)
    assert Rule.of_default([[1], [2]]).check([[1.0, "a"]]) == [[1, "a"]]
    assert Rule.of_default({}) == Rule(optional=True)
