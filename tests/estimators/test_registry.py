from pathlib import Path

import pytest

from errors import UserError
from estimators import registry
from estimators.registry import parse, spell

FAMILY = """
id: half-wake<share>
target: half_wake.HalfWake
parameters: {share: float}
examples: [half-wake0.5]
declares: biased
source: nobody
needs: log q(z|x)
"""
OPTIONAL = FAMILY.replace("half-wake<share>", "half-wake[<share>]") + "defaults: {share: 0.5}\n"


def write_family(user_dir: Path, content: str = FAMILY, name: str = "half-wake") -> Path:
    file = user_dir / "conf" / "estimator" / f"{name}.yaml"
    file.write_text(content)
    registry.add_directory(user_dir)
    return file


@pytest.mark.parametrize(
    ("id", "canonical", "parameters"),
    [
        ("reinforce", "reinforce", {}),
        ("vimco-arithmetic", "vimco-arithmetic", {"mean": "arithmetic"}),
        ("vimco-geometric", "vimco-geometric", {"mean": "geometric"}),
        ("ovis-gamma1", "ovis-gamma1", {"gamma": 1.0}),
        ("ovis-gamma1.0", "ovis-gamma1", {"gamma": 1.0}),
        ("ovis-gamma00.370", "ovis-gamma0.37", {"gamma": 0.37}),
        ("ovis-gamma0.000001", "ovis-gamma0.000001", {"gamma": 1e-6}),
        ("ovis-S10", "ovis-S10", {"auxiliary": 10}),
        ("ovis-S010-exclusive", "ovis-S10-exclusive", {"auxiliary": 10}),
        ("ovis-S0.30", "ovis-S0.3", {"auxiliary": 0.3}),
        ("wake-wake", "wake-wake", {}),
        ("tvo-part05-beta2.50", "tvo-part5-beta2.5", {"num_intervals": 5, "exponent": 2.5, "rule": "left"}),
        ("tvo-part5-beta10.0-left", "tvo-part5", {"num_intervals": 5, "exponent": 10.0, "rule": "left"}),
        ("tvo-part5-beta2", "tvo-part5-beta2", {"num_intervals": 5, "exponent": 2.0, "rule": "left"}),
        ("tvo-part5-trapz", "tvo-part5-trapz", {"num_intervals": 5, "exponent": 10.0, "rule": "trapz"}),
        ("tvo-part5-beta2-right", "tvo-part5-beta2-right", {"num_intervals": 5, "exponent": 2.0, "rule": "right"}),
        ("tvo-part5-config1-left", "tvo-part5-config1", {"num_intervals": 5, "partition": "config1", "rule": "left"}),
        (
            "tvo-part5-linear-trapz",
            "tvo-part5-linear-trapz",
            {"num_intervals": 5, "partition": "linear", "rule": "trapz"},
        ),
        ("ovis-arithmetic-gamma1.0", "ovis-arithmetic-gamma1", {"mean": "arithmetic", "gamma": 1.0}),
        ("pathwise-iwae", "pathwise-iwae", {}),
        ("pathwise-vae", "pathwise-vae", {}),
        ("stl", "stl", {}),
        ("dreg", "dreg", {}),
    ],
)
def test_ids_have_one_canonical_spelling(id: str, canonical: str, parameters: dict):
    parsed = parse(id)
    assert (parsed.id, parsed.parameters) == (canonical, parameters)
    assert parse(canonical) == parsed
    assert [type(value) for value in parsed.parameters.values()] == [type(value) for value in parameters.values()]


@pytest.mark.parametrize(
    ("id", "near"),
    [
        ("ovis-S10x", "ovis-S10"),
        ("ovis-S10.0", "ovis-S10"),
        ("ovis-S-1", "ovis-S1"),
        ("ovis-S1.5", "ovis-S1"),
        ("ovis-gamma-1", "ovis-gamma1"),
        ("ovis-gammanan", "ovis-gamma1"),
        ("ovis-gamma1e3", "ovis-gamma1"),
        ("ovis-gamma1.", "ovis-gamma1"),
        ("ovis-gamma", "ovis-gamma1"),
        ("ovis-gamma1\n", "ovis-gamma1"),
        ("ovis-gamma٣", "ovis-gamma1"),
        ("OVIS-gamma1", "ovis-gamma1"),
        ("tvo-part5-", "tvo-part5"),
        ("tvo-part5-beta", "tvo-part5"),
        ("tvo-part5-trapz-beta2", "tvo-part5-beta2-trapz"),
        ("tvo-part5-beta2-linear", "tvo-part5-linear-trapz"),
        ("tvo-part2.5-beta2", "tvo-part5-beta2"),
        ("vimco-arithmetik", "vimco-arithmetic"),
        ("xreinforce", "reinforce"),
    ],
)
def test_other_ids_are_refused_with_the_near_names(id: str, near: str):
    with pytest.raises(UserError) as refusal:
        parse(id)
    message = str(refusal.value)
    assert message.startswith(f"unknown estimator {id!r}; did you mean")
    assert repr(near) in message
    assert "\n" not in message


def test_an_id_unlike_any_lists_them_all():
    with pytest.raises(UserError, match=r"choose from .*reinforce, .*wake-wake"):
        parse("zzz")


def test_spelling_has_no_exponent():
    assert spell(1e-7) == "0.0000001"
    assert spell(123456789.0) == "123456789"
    assert spell("arithmetic") == "arithmetic"


def test_every_family_says_what_it_declares():
    for family in registry.families():
        assert family.declares
        assert family.source
        assert family.needs
        assert all(parse(example).family == family.name for example in family.examples)


@pytest.mark.parametrize(
    ("id", "declared"),
    [
        ("ovis-gamma0", "unbiased"),
        ("ovis-gamma0.0", "unbiased"),
        ("ovis-gamma0.5", "grad L + gamma beta E[sum_k v_k h_k]"),
        ("ovis-geometric-gamma0", "unbiased"),
        ("ovis-geometric-gamma1", "grad L + gamma beta E[sum_k v_k h_k]"),
        ("rloo", "unbiased, for the ELBO"),
    ],
)
def test_an_id_declares_the_case_that_it_is(id, declared):
    assert registry.declares(id) == declared


def test_objectives():
    found = {example: registry.objective(example) for family in registry.families() for example in family.examples}
    assert {found[id] for id in ("reinforce", "ovis-gamma1", "ovis-S10-exclusive", "stl", "nvil")} == {"L_K"}
    assert {found[id] for id in ("rloo", "vargrad", "pathwise-vae")} == {"ELBO"}
    assert {objective for id, objective in found.items() if id.startswith("tvo")} == {"own Riemann sum"}
    assert (found["ovis-S1"], found["wake-wake"], found["wake-sleep"]) == ("L_{K-S}", "wake phase", "sleep phase")


def test_a_users_family_is_found(user_dir: Path):
    write_family(user_dir)
    expected = registry.EstimatorId("half-wake0.25", "half-wake", "half_wake.HalfWake", {"share": 0.25})
    assert parse("half-wake0.250") == expected
    assert parse("reinforce").family == "reinforce"


def test_an_optional_part_is_left_out_where_it_says_nothing(user_dir: Path):
    write_family(user_dir, OPTIONAL)
    assert parse("half-wake") == parse("half-wake0.50")
    assert parse("half-wake").id == "half-wake"
    assert parse("half-wake").parameters == {"share": 0.5}
    assert parse("half-wake0.25").id == "half-wake0.25"


def test_a_user_directory_without_estimators_adds_none(user_dir: Path):
    before = registry.families()
    registry.add_directory(user_dir / "elsewhere")
    assert registry.families() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id: [", "not YAML"),
        ("- reinforce", "expected exactly the keys"),
        (FAMILY.replace("needs: log q(z|x)", "want: x"), "expected exactly the keys"),
        (FAMILY.replace("share: float", "part: float"), "`parameters` must give the type of each"),
        (FAMILY.replace("share: float", "share: floot"), "'share' has type 'floot'; did you mean 'float'"),
        (FAMILY.replace("share: float", "share: [1, 2]"), "'share' has type [1, 2]; choose from count, float, int"),
        (FAMILY.replace("{share: float}", ""), "parameters = None, expected a dict"),
        (FAMILY.replace("[half-wake0.5]", "[half-wakes]"), "example 'half-wakes'"),
        (OPTIONAL.replace("defaults: {share: 0.5}", ""), "`defaults` must give the value of each of ['share']"),
        (FAMILY + "defaults: {share: 0.5}", "`defaults` must give the value of each of []"),
        (OPTIONAL.replace("0.5}", "half}"), "the default 'half' of 'share' is not of its type, 'float'"),
        (FAMILY + "limits: 3", "limits = 3, expected a str"),
    ],
)
def test_a_file_that_is_no_family_is_named(user_dir: Path, content: str, message: str):
    file = write_family(user_dir, content)
    with pytest.raises(UserError) as refusal:
        parse("reinforce")
    assert str(refusal.value).startswith(f"{file}: ")
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_an_id_of_two_families_is_refused(user_dir: Path):
    write_family(user_dir)
    write_family(user_dir, name="another")
    with pytest.raises(UserError, match="'half-wake1' is of two families, 'another' and 'half-wake'"):
        parse("half-wake1")
