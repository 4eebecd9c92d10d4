"""Claims of a sweep, compared with simulated sweeps whose true effects are known."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pipeline.tuning.analysis.effects import Effect, holm, setting_effects
from pipeline.tuning.analysis.factors import factors_of
from pipeline.tuning.analysis.importance import importances
from pipeline.tuning.analysis.noise import Noise, point_name, pooled_noise
from pipeline.tuning.analysis.verdict import (
    common_evaluation,
    confirmed_points,
    judge_sweep,
    pareto_front,
    top_points,
    verdict_text,
)
from pipeline.tuning.space import Domain, Point, grid_points, random_point, suggest_point
from tests.support.simulated_sweeps import loaded, phases, simulated, stopped

GRID = {"model.reg_max": Domain(choice=[8, 16, 32, 64]), "loss.ddf": Domain(choice=[0, 0.5, 1.5, 5])}
DEFAULT: Point = {"model.reg_max": 32, "loss.ddf": 1.5}
SD = 0.01  # standard deviation of one run's AP


def effects_of(points: list[Point], values: np.ndarray, space: dict[str, Domain], default: Point) -> list[Effect]:
    groups: dict[str, list[float]] = {}
    for point, value in zip(points, values, strict=True):
        groups.setdefault(point_name(point, default), []).append(float(value))
    return list(setting_effects(points, values, space, default, noise=pooled_noise(groups.values())))


def of(effects: list[Effect], key: str, setting: str) -> Effect:
    (found,) = [effect for effect in effects if (effect.key, effect.setting) == (key, setting)]
    return found


# Noise


def test_the_noise_of_a_single_group_is_its_standard_deviation() -> None:
    noise = pooled_noise([[0.40, 0.41, 0.43]])
    assert noise.sd == pytest.approx(np.std([0.40, 0.41, 0.43], ddof=1))
    assert (noise.df, noise.groups, noise.runs) == (2, 1, 3)
    # Two single runs, 95 %: t of two degrees of freedom is 4.303.
    assert noise.band() == pytest.approx(4.303 * noise.sd * math.sqrt(2), rel=1e-3)


def test_groups_are_pooled_by_their_degrees_of_freedom_whatever_their_level() -> None:
    noise = pooled_noise([[0.1, 0.3], [5.0, 5.2, 5.4], [9.0]])
    assert noise.sd**2 == pytest.approx((0.02 + 0.08) / 3)
    assert (noise.df, noise.runs) == (3, 5)


def test_without_two_seeds_of_any_point_the_noise_is_unknown_and_its_band_infinite() -> None:
    noise = pooled_noise([[0.4], [0.5]])
    assert noise.df == 0
    assert noise.band() == math.inf
    assert "unknown" in noise.text()


@pytest.mark.parametrize("runs", [2, 3, 6])
def test_the_band_holds_95_of_100_differences_even_with_two_seeds(runs: int) -> None:
    generator = np.random.default_rng(runs)
    seen = generator.normal(0.4, SD, (2000, runs))
    others = generator.normal(0.4, SD, (2000, 2))
    inside = [
        abs(a - b) <= pooled_noise([list(group)]).band()
        for group, (a, b) in zip(seen.tolist(), others.tolist(), strict=True)
    ]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.015)


# Settings


@given(p_values=st.lists(st.floats(0, 1), min_size=1, max_size=12))
@settings(deadline=None)
def test_holm_rejects_what_its_definition_rejects(p_values: list[float]) -> None:
    corrected = holm(p_values)
    order = np.argsort(p_values, kind="stable")
    rejecting = True
    for rank, index in enumerate(order):  # step down: stop at the first that is not rejected
        rejecting = rejecting and p_values[index] * (len(p_values) - rank) <= 0.05
        assert (corrected[index] <= 0.05) == rejecting


def test_a_comparison_that_could_not_be_made_does_not_count_in_the_correction() -> None:
    assert holm([0.02, math.nan, 0.03])[0] == pytest.approx(0.04)
    assert math.isnan(holm([0.02, math.nan])[1])


def test_one_key_is_an_ordinary_comparison_of_means() -> None:
    space = {"loss.ddf": GRID["loss.ddf"]}
    points = [{"loss.ddf": value} for value in (1.5, 1.5, 1.5, 5, 5)]
    values = np.array([0.40, 0.41, 0.42, 0.30, 0.32])
    effect = of(effects_of(points, values, space, {"loss.ddf": 1.5}), "loss.ddf", "5")
    expected = stats.ttest_ind(values[3:], values[:3])
    assert effect.effect == pytest.approx(-0.10)
    assert effect.p == pytest.approx(expected.pvalue)
    interval = expected.confidence_interval(0.95)
    assert (effect.low, effect.high) == pytest.approx((interval.low, interval.high))
    assert (effect.runs, effect.reference_runs, effect.df) == (2, 3, 3)


def test_a_balanced_design_has_the_effects_and_intervals_of_a_two_way_analysis_of_variance() -> None:
    """The effect in a full grid is the difference of marginal means; the error has the residual degrees of freedom."""
    space = {"a": Domain(choice=[0, 1, 2, 3]), "b": Domain(choice=[0, 1])}
    points = [{"a": a, "b": b} for a in range(4) for b in range(2)]
    table = np.array([[0.40, 0.43], [0.35, 0.37], [0.41, 0.48], [0.44, 0.45]])  # [a, b]
    effect = of(effects_of(points, table.ravel(), space, {"a": 0, "b": 0}), "b", "1")
    additive = table.mean(1, keepdims=True) + table.mean(0, keepdims=True) - table.mean()
    df = 8 - 1 - 3 - 1
    error = math.sqrt(((table - additive) ** 2).sum() / df * (1 / 4 + 1 / 4))
    difference = table[:, 1].mean() - table[:, 0].mean()
    assert (effect.effect, effect.df) == (pytest.approx(difference), df)
    assert effect.p == pytest.approx(2 * stats.t.sf(difference / error, df))
    assert (effect.low, effect.high) == pytest.approx(stats.t.interval(0.95, df, difference, error))


def test_keys_that_were_varied_together_are_separated() -> None:
    """DDF 5 was mostly tried with 8 bins, and only the bins do harm."""
    generator = np.random.default_rng(0)
    points = [{"model.reg_max": 8, "loss.ddf": 5}] * 8 + [{"model.reg_max": 8, "loss.ddf": 1.5}] * 2
    points += [{"model.reg_max": 32, "loss.ddf": 5}] * 2 + [DEFAULT] * 8
    values = np.array([0.4 - 0.05 * (p["model.reg_max"] == 8) for p in points]) + SD * generator.standard_normal(20)
    effects = effects_of(points, values, GRID, DEFAULT)
    assert of(effects, "model.reg_max", "8").verdict == "worse"
    assert of(effects, "loss.ddf", "5").verdict == "not distinguishable"


def test_settings_that_were_always_tried_together_are_not_separated() -> None:
    points = [DEFAULT] * 3 + [{"model.reg_max": 8, "loss.ddf": 5}] * 3
    two = {key: Domain(choice=[domain.values[0], domain.values[2], domain.values[3]]) for key, domain in GRID.items()}
    values = np.array([0.40, 0.41, 0.42, 0.10, 0.11, 0.12]) + 0.3
    effect = of(effects_of(points, values, two, DEFAULT), "loss.ddf", "5")
    assert effect.note == "other keys were not separated: too few trials"


def test_a_setting_that_was_not_tried_is_not_judged() -> None:
    effects = effects_of(
        [DEFAULT, DEFAULT, {"model.reg_max": 8, "loss.ddf": 1.5}], np.array([0.4, 0.41, 0.3]), GRID, DEFAULT
    )
    untried = of(effects, "loss.ddf", "5")
    assert untried.verdict == "not distinguishable"
    assert math.isnan(untried.effect)
    assert untried.note == "no run to compare"


def test_one_run_per_setting_and_no_replicates_prove_nothing() -> None:
    points = [{"model.reg_max": bins, "loss.ddf": 1.5} for bins in (8, 16, 32, 64)]
    effects = effects_of(points, np.array([0.1, 0.2, 0.4, 0.3]), GRID, DEFAULT)
    assert {effect.verdict for effect in effects} == {"not distinguishable"}
    assert all(math.isnan(effect.p) for effect in effects)


def null_sweeps(count: int, space: dict[str, Domain], default: Point, points: list[Point]) -> list[list[Effect]]:
    generator = np.random.default_rng(1)
    return [effects_of(points, generator.normal(0.4, SD, len(points)), space, default) for _ in range(count)]


@pytest.mark.parametrize("replicates", [0, 3])
def test_without_any_effect_a_sweep_claims_one_at_most_5_times_in_100(replicates: int) -> None:
    points = [*grid_points(GRID), *[DEFAULT] * replicates]
    sweeps = null_sweeps(200, GRID, DEFAULT, points)
    false = sum(any(effect.verdict != "not distinguishable" for effect in effects) for effects in sweeps)
    assert false <= stats.binom.ppf(0.999, 200, 0.05)
    covered = np.mean([effect.low <= 0 <= effect.high for effects in sweeps for effect in effects])
    assert covered >= 0.94


def test_the_same_holds_for_ranges_conditions_and_several_seeds_of_each_point() -> None:
    space = {
        "a": Domain(choice=["x", "y"]),
        "b": Domain(uniform=[0, 1], when={"a": "x"}),
        "c": Domain(loguniform=[1e-4, 1e-1]),
    }
    points = [random_point(space, seed) for seed in range(16) for _ in range(2)] + [{"a": "x", "b": 0.3, "c": 1e-3}] * 3
    sweeps = null_sweeps(120, space, {"a": "x", "b": 0.3, "c": 1e-3}, points)
    false = sum(any(effect.verdict != "not distinguishable" for effect in effects) for effects in sweeps)
    assert false <= stats.binom.ppf(0.999, 120, 0.05)


@pytest.mark.parametrize(("size", "least"), [(3, 0.6), (5, 0.99)])
def test_planted_effects_are_found_with_their_sign_at_the_rate_that_the_design_allows(size: int, least: float) -> None:
    generator = np.random.default_rng(2)
    points = [*grid_points(GRID), *[DEFAULT] * 3]
    planted = np.array([size * SD * ((p["model.reg_max"] == 64) - float(p["loss.ddf"] == 5)) for p in points])
    found: Counter[str] = Counter()
    for _ in range(100):
        effects = effects_of(points, planted + generator.normal(0.4, SD, len(points)), GRID, DEFAULT)
        found[of(effects, "loss.ddf", "5").verdict] += 1
        found[of(effects, "model.reg_max", "64").verdict + " bins"] += 1
        found["false"] += of(effects, "loss.ddf", "0").verdict != "not distinguishable"
    assert found["worse"] >= 100 * least
    assert found["better bins"] >= 100 * least
    assert found["better"] == found["worse bins"] == 0
    assert found["false"] <= 8


def test_seeds_of_few_points_do_not_count_as_many_points() -> None:
    """Points differ by more than seeds, at random: eight seeds of each must not turn that into effects."""
    generator = np.random.default_rng(3)
    points = [point for point in grid_points(GRID) for _ in range(8)]
    false = 0
    for _ in range(60):
        of_points = np.repeat(generator.normal(0, 3 * SD, 16), 8)
        effects = effects_of(points, 0.4 + of_points + SD * generator.standard_normal(128), GRID, DEFAULT)
        false += any(effect.verdict != "not distinguishable" for effect in effects)
    assert false <= stats.binom.ppf(0.999, 60, 0.05)


def test_a_rate_that_breaks_everything_is_found_and_does_not_hide_what_else_there_is() -> None:
    space = {**GRID, "optimizer.lr": Domain(choice=[2e-4, 2e-2])}
    default = {**DEFAULT, "optimizer.lr": 2e-4}
    found: Counter[str] = Counter()
    for seed in range(40):
        generator = np.random.default_rng([4, seed])
        points = [*(random_point(space, [seed, n]) for n in range(32)), *[default] * 3]
        values = np.array([0.4 - 0.05 * (p["loss.ddf"] == 0) for p in points]) + SD * generator.standard_normal(35)
        broken = np.array([p["optimizer.lr"] == 2e-2 for p in points])
        values[broken] = np.abs(0.003 * generator.standard_normal(broken.sum()))
        effects = effects_of(points, values, space, default)
        found["lr " + of(effects, "optimizer.lr", "0.02").verdict] += 1
        found["ddf " + of(effects, "loss.ddf", "0").verdict] += 1
        found["false"] += of(effects, "model.reg_max", "8").verdict != "not distinguishable"
        assert of(effects, "optimizer.lr", "0.02").collapsed == broken.sum()
    assert found["lr worse"] == 40
    assert found["ddf worse"] >= 30
    assert found["false"] <= 4


def test_a_default_that_is_no_candidate_is_a_setting_of_its_own() -> None:
    (factor,) = factors_of({"optimizer.lr": Domain(loguniform=[1e-3, 1e-1])}, {"optimizer.lr": 2e-4}, points=24)
    assert factor.labels == ("0.001 to 0.01", "0.01 to 0.1", "0.0002 (default)")
    assert (factor.reference, factor.level(2e-4), factor.level(1e-1), factor.level(0.002)) == (2, 2, 1, 0)
    with pytest.raises(ValueError, match="not among"):
        factor.level(1)


@given(value=st.floats(1e-5, 1e-1), points=st.integers(0, 200))
@settings(deadline=None)
def test_every_value_of_a_range_lies_in_one_interval(value: float, points: int) -> None:
    domain = Domain(loguniform=[1e-5, 1e-1])
    (factor,) = factors_of({"lr": domain}, {"lr": 1e-3}, points=points)
    level = factor.level(value)
    assert factor.edges[level] <= value <= factor.edges[level + 1]


# Whole sweeps


def test_stopped_trials_are_compared_with_all_others_at_the_evaluation_they_reached(tmp_path: Path) -> None:
    sweep = loaded(tmp_path, searcher={"kind": "grid"})
    records = simulated(sweep, lambda _: 0.4, sd=SD, rungs=(2, 6))
    assert Counter(record.status for record in records)["pruned"] == 15
    assert common_evaluation(records, "AP") == 2
    verdict = judge_sweep(records, space=sweep.space, default=DEFAULT, metric="AP")
    assert verdict.compared == len(records)
    assert "after evaluation 2" in verdict_text(verdict)
    assert sum(effect.runs for effect in verdict.effects if effect.key == "loss.ddf") + of(
        list(verdict.effects), "loss.ddf", "5"
    ).reference_runs == len(records)


def test_stopping_bad_trials_makes_no_setting_look_better(tmp_path: Path) -> None:
    """Had only finished trials been compared, the lucky ones would stand for their settings."""
    sweep = loaded(tmp_path, searcher={"kind": "grid"}, replicates=5, confirm={"top": 0})
    false = sum(
        any(
            effect.verdict != "not distinguishable"
            for effect in judge_sweep(
                simulated(sweep, lambda _: 0.4, sd=SD, seed=seed, rungs=(1, 3)),
                space=sweep.space,
                default=DEFAULT,
                metric="AP",
            ).effects
        )
        for seed in range(60)
    )
    assert false <= stats.binom.ppf(0.999, 60, 0.05)


def test_failed_trials_are_counted_and_left_out(tmp_path: Path) -> None:
    sweep = loaded(tmp_path, searcher={"kind": "grid"})
    records = simulated(sweep, lambda _: 0.4)
    records[5] = type(records[5])(**{**vars(records[5]), "status": "failed", "curve": (), "final": {}})
    verdict = judge_sweep(records, space=sweep.space, default=DEFAULT, metric="AP")
    assert verdict.left_out == {"failed": 1}
    assert verdict.compared == len(records) - 1


def test_a_sweep_without_evaluations_has_no_verdict(tmp_path: Path) -> None:
    sweep = loaded(tmp_path)
    verdict = judge_sweep([], space=sweep.space, default=DEFAULT, metric="AP")
    assert (verdict.evaluation, verdict.effects, verdict.points) == (None, (), ())
    assert "no trial has been evaluated yet" in verdict_text(verdict)


def test_the_winner_of_a_sweep_without_effects_is_not_called_better(tmp_path: Path) -> None:
    """It won by chance; fresh seeds show it."""
    sweep = loaded(tmp_path, searcher={"kind": "grid"}, replicates=3, confirm={"top": 3, "seeds": 3})
    claimed, searched, confirmed = 0, [], []
    for seed in range(60):
        records = simulated(sweep, lambda _: 0.4, sd=SD, seed=seed)
        points = judge_sweep(records, space=sweep.space, default=DEFAULT, metric="AP").points
        claimed += any(point.verdict != "not distinguishable" for point in points)
        searched.append(max(record.final["AP"] for record in phases(records, "search")))
        confirmed.append(points[0].mean)
    assert claimed <= stats.binom.ppf(0.999, 60, 0.05)
    assert np.mean(searched) > 0.4 + SD  # what a bare "best" would have claimed
    assert np.mean(confirmed) == pytest.approx(0.4, abs=0.3 * SD)


def test_a_point_that_is_better_is_called_so(tmp_path: Path) -> None:
    sweep = loaded(tmp_path, searcher={"kind": "grid"}, replicates=3, confirm={"top": 2, "seeds": 3})
    found = 0
    for seed in range(20):
        records = simulated(
            sweep, lambda point: 0.4 + 0.05 * (point == {"model.reg_max": 16, "loss.ddf": 5}), seed=seed
        )
        first = judge_sweep(records, space=sweep.space, default=DEFAULT, metric="AP").points[0]
        found += first.verdict == "better" and first.point == {"model.reg_max": 16, "loss.ddf": 5}
    assert found >= 17


def test_a_single_confirmed_point_is_compared_by_an_ordinary_t_test(tmp_path: Path) -> None:
    sweep = loaded(tmp_path, searcher={"kind": "grid"}, replicates=4, confirm={"top": 1, "seeds": 3})
    records = [r for r in simulated(sweep, lambda _: 0.4) if r.phase != "search"]
    (point,) = judge_sweep(records, space=sweep.space, default=DEFAULT, metric="AP").points
    confirmed, default = ([r.final["AP"] for r in phases(records, phase)] for phase in ("confirm", "replicate"))
    expected = stats.ttest_ind(confirmed, default)
    interval = expected.confidence_interval(0.95)
    assert (point.df, point.p, point.p_corrected) == (5, pytest.approx(expected.pvalue), point.p)
    assert (point.low, point.high) == pytest.approx((interval.low, interval.high))


def test_a_point_is_not_judged_by_the_results_that_chose_it(tmp_path: Path) -> None:
    sweep = loaded(tmp_path, searcher={"kind": "grid"}, replicates=3, confirm={"top": 1, "seeds": 2})
    records = simulated(sweep, lambda _: 0.4)
    (point,) = judge_sweep(records, space=sweep.space, default=DEFAULT, metric="AP").points
    own = [record.final["AP"] for record in phases(records, "confirm")]
    assert point.runs == 2
    assert point.mean == pytest.approx(np.mean(own))
    assert top_points(records, DEFAULT, "AP", count=1) == [point.point]


def test_the_pareto_front_is_in_order_of_cost() -> None:
    costs = np.array([3.0, 1.0, 2.0, 2.0, 4.0])
    results = np.array([0.5, 0.2, 0.4, 0.3, 0.5])
    assert pareto_front(costs, results) == [1, 2, 0]


def test_points_of_the_pareto_front_are_confirmed_first_if_latency_is_an_objective(tmp_path: Path) -> None:
    sweep = loaded(tmp_path, searcher={"kind": "grid"}, confirm={"top": 0})
    records = simulated(sweep, lambda point: 0.3 + 0.1 * (point["model.reg_max"] >= 32), sd=0.001)
    assert top_points(records, DEFAULT, "AP", count=16)[0]["model.reg_max"] >= 32
    chosen = top_points(records, DEFAULT, "AP", count=4, latency=True)
    assert {8} < {point["model.reg_max"] for point in chosen}


def test_the_default_is_not_confirmed_again(tmp_path: Path) -> None:
    sweep = loaded(tmp_path, searcher={"kind": "grid"})
    records = simulated(sweep, lambda point: 0.4 + 0.2 * (point == DEFAULT))
    assert DEFAULT not in top_points(records, DEFAULT, "AP", count=16)
    assert len(top_points(records, DEFAULT, "AP", count=16)) == 15


def test_without_replicates_no_point_is_judged(tmp_path: Path) -> None:
    sweep = loaded(tmp_path, searcher={"kind": "grid"}, replicates=0)
    records = simulated(sweep, lambda point: 0.4 + 0.3 * (point["loss.ddf"] == 5))
    points = judge_sweep(records, space=sweep.space, default=DEFAULT, metric="AP").points
    assert {point.verdict for point in points} == {"not distinguishable"}
    assert {point.note for point in points} == {"no replicates of the default: noise unknown"}


def test_a_metric_to_be_minimized_swaps_better_and_worse(tmp_path: Path) -> None:
    sweep = loaded(tmp_path, replicates=3, searcher={"kind": "grid"})
    records = simulated(sweep, lambda point: 0.4 + 0.1 * (point["loss.ddf"] == 5))
    noise = Noise(0.01, 20, 1, 21)
    up = confirmed_points(records, DEFAULT, "AP", noise=noise)
    down = confirmed_points(records, DEFAULT, "AP", noise=noise, mode="min")
    assert {point.verdict for point in up} == {"better"}
    assert {point.verdict for point in down} == {"worse"}


def test_records_of_stopped_trials_have_no_later_evaluations(tmp_path: Path) -> None:
    (record, *_) = simulated(loaded(tmp_path), lambda _: 0.4)
    cut = stopped(record, 2)
    assert cut.at(2, "AP") == record.at(2, "AP")
    assert cut.at(3, "AP") is None
    assert cut.result("AP") is None


# Importance

CONTINUOUS = {
    "a": {"uniform": [0, 1]},
    "b": {"loguniform": [1e-4, 1e-1]},
    "c": {"choice": ["x", "y"]},
    "d": {"uniform": [0, 1], "when": {"c": "x"}},
}


def continuous() -> tuple[dict[str, Domain], list[list[Point]]]:
    space = {key: Domain(**domain) for key, domain in CONTINUOUS.items()}
    return space, [[random_point(space, [seed, n]) for n in range(40)] for seed in range(3)]


def as_records(points: list[Point], values: np.ndarray) -> list[object]:
    from pipeline.tuning.trial_records import TrialEvaluation, TrialRecord

    return [
        TrialRecord(
            id=str(n),
            number=n,
            phase="search",
            point=point,
            seed=0,
            status="finished",
            curve=(TrialEvaluation(1, 1.0, {"AP": float(value)}, 1.0),),
        )
        for n, (point, value) in enumerate(zip(points, values, strict=True))
    ]


def test_a_key_that_decides_is_found_and_keys_that_do_not_stay_below_chance() -> None:
    space, sweeps = continuous()
    hits: Counter[str] = Counter()
    for seed, points in enumerate(sweeps):
        noise = SD * np.random.default_rng(seed).standard_normal(len(points))
        found = importances(as_records(points, np.array([0.1 * p["a"] for p in points]) + noise), space, "AP")  # type: ignore[arg-type]
        assert found[0].key == "a"
        for one in found:
            assert one.low <= one.share <= one.high
            hits[one.key] += one.counts
    assert hits["a"] == 3
    assert sum(hits[key] for key in "bcd") <= 3  # out of 9 comparisons, of which 5 % exceed the threshold by chance


def test_importance_is_empty_for_few_trials() -> None:
    space, (points, *_) = continuous()
    assert importances(as_records(points[:6], np.arange(6.0)), space, "AP") == ()  # type: ignore[arg-type]


@pytest.mark.slow
def test_without_any_effect_a_searcher_that_learns_from_noise_does_not_make_a_sweep_claim_one() -> None:
    """TPE tries again what was lucky: the points depend on the results, which the ordinary theory does not allow for."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = {"lr": Domain(loguniform=[1e-5, 1e-2]), "bins": Domain(integer=[8, 64, 2]), "ddf": Domain(uniform=[0, 5])}
    default = {"lr": 2e-4, "bins": 32, "ddf": 1.5}
    false = 0
    for seed in range(150):
        generator = np.random.default_rng([5, seed])
        study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
        points, values = [default] * 3, generator.normal(0.4, SD, 3).tolist()
        for _ in range(24):
            trial = study.ask()
            points = [*points, suggest_point(space, trial)]
            values.append(float(generator.normal(0.4, SD)))
            study.tell(trial, values[-1])
        effects = effects_of(points, np.array(values), space, default)
        false += any(effect.verdict != "not distinguishable" for effect in effects)
    assert false <= stats.binom.ppf(0.999, 150, 0.05)
