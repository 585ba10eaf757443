"""What a study says of given outcomes: arms, plan, looks, verdicts, report."""

import csv
import html
import json
import re
import shlex
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from matplotlib.figure import Figure

from normlab.api.compare import open_study
from normlab.cli.compare import compare as command
from normlab.errors import DataError, UserError
from normlab.recipes import get
from normlab.reports.study_figures import plot_curves
from normlab.reports.study_report import closing_lines, runs_csv, write_report
from normlab.reports.study_report import command as command_of
from normlab.statistics import Contrast, judge
from normlab.study import outcomes as runs
from normlab.study import plan as plans
from normlab.study.arms import Arm, make_arms, parse_arm
from normlab.study.design import check_arm
from normlab.study.tuning import parse_tuning, trials
from studies import CLASSES, TEST_IMAGES, make_design, make_outcome, make_study

BETTER = {
    "batch": [0.80, 0.81, 0.79, 0.80, 0.82, 0.80],
    "none": [0.74, 0.73, 0.74, 0.75, 0.74, 0.73],
}


def test_an_arm_is_read_by_the_types_of_the_recipes_fields() -> None:
    assert parse_arm("batch") == Arm("batch", {"norm": "batch"})
    assert parse_arm("a: batch_size=64,learning_rate = 1e-2, patience=none, model=notebook") == Arm(
        "a", {"batch_size": 64, "learning_rate": 0.01, "patience": None, "model": "notebook"}
    )
    assert parse_arm("again: seed_offset=1000") == Arm("again", {}, seed_offset=1000)
    assert parse_arm("plain:") == Arm("plain")
    assert parse_arm("a: patience=3").recipe(get("notebook")).patience == 3


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        (
            ["batch", "a: lr=1"],
            "arm 'a': unknown setting 'lr': choose one of model, ",
        ),
        (["batch", "a: batch_size=2.5"], "arm 'a': batch_size=2.5: give a whole number"),
        (["batch", "a: patience=soon"], "patience=soon: give a whole number or none"),
        (["batch", "a: epochs"], "arm 'a': 'epochs' is not key=value"),
        (
            ["batch", "bacth"],
            "unknown norm 'bacth': did you mean 'batch'? Choose one of batch, ",
        ),
        (["batch"], "arms=batch: a comparison needs two or more"),
        (["batch", "BATCH: norm=none"], "two arms are called 'BATCH'"),
        (["batch", "a b: norm=none"], "arm 'a b': name it with letters, digits"),
    ],
)
def test_a_mistaken_arm_is_refused_in_one_line(arms: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        make_arms(arms)
    assert "\n" not in str(caught.value)


def test_what_an_arm_cannot_do_is_refused_before_any_run() -> None:
    with pytest.raises(UserError, match=r"arm 'instance': InstanceNorm on .* one value a group"):
        check_arm(parse_arm("instance"), get("notebook"), CLASSES, 32)
    with pytest.raises(UserError, match="arm 'a': epochs=0: choose 1 or more"):
        check_arm(parse_arm("a: epochs=0"), get("notebook"), CLASSES, 32)
    for norm in ("batch", "none", "layer", "group"):
        check_arm(parse_arm(norm), get("notebook"), CLASSES, 32)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seeds": 0}, "seeds=0: choose 1 or more"),
        ({"first_seed": 999_999_999}, "stay below 1,000,000,000"),
        ({"margin": 0.0}, "margin=0.0: choose a number above 0 and below 1"),
        ({"thresholds": (0.5, 70.0)}, "thresholds=0.5, 70.0: choose fractions"),
        ({"contrasts": (("batch", "layer"),)}, "contrast batch,layer: 'layer' is no arm"),
        ({"contrasts": (("batch", "batch"),)}, "name two different arms"),
    ],
)
def test_a_mistaken_plan_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        make_design(**fields)


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    tuning = parse_tuning("learning_rate=0.3,1,3")
    design = make_design(["batch", "big: batch_size=64, seed_offset=7"], tuning=tuning, looks=(6,))
    plans.save(tmp_path, design)
    assert plans.load(tmp_path) == design
    written = json.loads((tmp_path / "study.json").read_text())
    assert written["outcomes"]["primary"].startswith("test accuracy after the last epoch")
    (tmp_path / "study.json").write_text('{"recipe": 3}')
    with pytest.raises(DataError, match="is not a study's plan"):
        plans.load(tmp_path)


def test_a_changed_plan_is_told_by_what_differs() -> None:
    then = make_design()
    assert then.differences(make_design(seeds=12, looks=(6,), data="moved.npz")) == []
    now = make_design(["batch", "layer"], recipe=get("notebook").override(epochs=5), margin=0.01)
    found = "; ".join(then.differences(now))
    assert "epochs (25 then, 5 now)" in found
    assert "arms (batch: norm=batch; none: norm=none then, batch: norm=batch; layer:" in found
    assert "margin (0.005 then, 0.01 now)" in found
    assert then.differences(make_design(tuning=parse_tuning("learning_rate=1,3"))) == [
        "tune (none then, learning_rate=1,3 now)"
    ]


def test_adding_seeds_after_a_look_is_paid_for_and_taking_some_away_refused() -> None:
    design = make_design(seeds=6)
    second = design.extended(12, pairs_seen=6)
    assert (second.seeds, second.looks, second.look) == (12, (6,), 2)
    assert second.extended(24, pairs_seen=12).look == 3
    assert second.extended(24, pairs_seen=8).looks == (6, 8)
    assert second.extended(24, pairs_seen=6).looks == (6,)  # nothing was seen since
    assert design.extended(12, pairs_seen=1).looks == ()
    with pytest.raises(UserError, match="seeds=6: this study was planned with 12"):
        second.extended(6, pairs_seen=8)


def test_a_winner_is_not_named_more_often_by_adding_pairs_unless_the_first_ones_agree() -> None:
    """All that an arm compared with itself can give, where differences have one size."""
    six = make_design(seeds=6)
    twelve = six.extended(12, pairs_seen=5)

    @cache
    def winner(look: int, n: int, total: int) -> bool:
        signs = np.where(np.arange(n) < (n + total) // 2, 0.01, -0.01)
        generator = np.random.default_rng(0)
        [c] = judge([Contrast("a", "b", signs)], look=look, generator=generator)
        return c.verdict in ("better", "worse")

    named = 0
    for signs in product((-1, 1), repeat=12):
        design = six if abs(sum(signs[:5])) == 5 else twelve
        named += winner(design.look, design.seeds, sum(signs[: design.seeds]))
    assert named / 2**12 <= 0.04


def test_chance_is_a_balanced_accuracy_whose_interval_reaches_it() -> None:
    design = make_design()
    run = make_outcome(design, "batch", 0, 0.9)
    assert not design.at_chance(run)
    assert design.at_chance(replace(run, balanced_accuracy=0.1))  # the commonest class, always
    assert design.at_chance(replace(run, test_accuracy=0.13))  # of 200: from 0.090 on
    assert not design.at_chance(replace(run, test_accuracy=0.16))  # from 0.116 on


def test_a_new_study_has_as_many_seeds_as_can_decide() -> None:
    assert [plans.enough_pairs(m) for m in (1, 2, 4)] == [6, 7, 8]
    assert plans.enough_pairs(1, look=2) == 9


def test_a_clear_difference_is_better_and_its_mirror_worse(tmp_path: Path) -> None:
    [c] = make_study(tmp_path / "a", BETTER).comparisons
    assert (c.first, c.other, c.n, c.verdict, c.look) == ("batch", "none", 6, "better", 1)
    assert c.difference == pytest.approx(0.065)
    assert c.p_value == pytest.approx(2 / 64)
    mirror = {"none": BETTER["none"], "batch": BETTER["batch"]}
    [c] = make_study(tmp_path / "b", mirror).comparisons
    assert c.verdict == "worse"


def test_equal_arms_are_no_difference(tmp_path: Path) -> None:
    scores = [0.8, 0.79] * 3
    study = make_study(tmp_path, {"a: norm=batch": scores, "b: norm=batch": scores})
    [c] = study.comparisons
    assert (c.verdict, c.difference, c.p_value) == ("no_difference", 0.0, 1.0)


def test_the_second_look_is_judged_more_strictly(tmp_path: Path) -> None:
    scores = {arm: values[:] for arm, values in BETTER.items()}
    [c] = make_study(tmp_path, scores, looks=(3,)).comparisons
    assert (c.look, c.level, c.verdict) == (2, 0.005, "not_enough_seeds")


def test_a_diverged_run_counts_at_chance_and_never_reaches_anything(tmp_path: Path) -> None:
    scores = {"batch": BETTER["batch"], "none": [*BETTER["none"][:5], None]}
    study = make_study(tmp_path, scores)
    [c] = study.comparisons
    assert c.diverged == (0, 1)
    assert "Diverged and counted at chance: 1 of 6 runs of none." in c.sentence
    assert study.summaries[1]["diverged"] == 1
    assert study.summaries[1]["steps_to"]["0.5"]["reached"] == 5
    first, other = study.pairs("batch", "none")[5]
    assert first.accuracy - other.accuracy == pytest.approx(0.8 - 0.1)
    assert study.mcnemar((first, other)) is None


def test_an_arm_that_answers_at_chance_does_not_win_by_its_loss_without_a_word(
    tmp_path: Path,
) -> None:
    """A constant answer has the loss log K; one that is right, and too sure, may have more."""
    scores: dict[str, list[float | None]] = {"batch": [0.8] * 6, "none": [0.1] * 6}
    study = make_study(tmp_path, scores, outcome="loss")
    losses = {"batch": 2.8, "none": 2.302585}
    outcomes = tuple(
        replace(o, test_loss=losses[o.arm] + 0.001 * o.seed * (o.arm == "batch"))
        for o in study.outcomes
    )
    [c] = replace(study, outcomes=outcomes).comparisons
    assert (c.verdict, c.at_chance) == ("worse", (0, 6))
    assert "Not shown to answer better than chance: 6 of 6 runs of none." in c.sentence
    dead = make_study(tmp_path / "dead", {**scores, "none": [None] * 6}, outcome="loss")
    [c] = dead.comparisons
    assert (c.diverged, c.at_chance) == ((0, 6), (0, 0))
    assert "Diverged and counted as log K: 6 of 6 runs of none." in c.sentence
    [c] = make_study(tmp_path / "well", BETTER).comparisons
    assert c.at_chance == (0, 0)


def test_half_a_study_has_no_verdict(tmp_path: Path) -> None:
    study = make_study(tmp_path, BETTER, seeds=12)
    assert not study.complete
    with pytest.raises(UserError, match="has 12 of 24 runs: it has no verdict before all are done"):
        study.comparisons  # noqa: B018
    text = "\n".join(closing_lines(study))
    assert "Unfinished: 12 of 24 runs" in text
    assert "better" not in text
    assert study.as_dict()["comparisons"] == []
    assert "no verdict yet" in study._repr_html_()


def test_mcnemar_counts_the_images_that_one_set_of_weights_alone_has_right(tmp_path: Path) -> None:
    study = make_study(tmp_path, {"batch": [0.8], "none": [0.7]})
    [pair] = study.pairs("batch", "none")
    found = study.mcnemar(pair)
    assert found is not None
    assert (found.only_first, found.only_other) == (TEST_IMAGES // 10, 0)


def test_steps_are_counted_to_where_the_other_arm_ends(tmp_path: Path) -> None:
    study = make_study(tmp_path, BETTER)
    [end] = study.ends.values()
    steps = [study.arm("batch")[seed].steps_until(end) for seed in range(6)]
    median = sorted(step for step in steps if step is not None)[2]
    assert study.summaries[0]["steps_to_others_end"]["none"] == {
        "reached": 6,
        "median_steps": median,
    }


def test_a_runs_file_of_another_plan_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    study = make_study(tmp_path, BETTER)
    other = make_design(recipe=get("notebook").override(epochs=1))
    runs.save(tmp_path / "runs", make_outcome(other, "batch", 2, 0.9))
    with pytest.raises(DataError, match=r"batch-seed-2\.json is of another recipe, seed or data"):
        open_study(tmp_path)
    (tmp_path / "runs" / "batch-seed-2.json").write_text('{"arm": "batch"}')
    with pytest.raises(DataError, match=r"batch-seed-2\.json is not a run's file"):
        open_study(tmp_path)
    runs.save(tmp_path / "runs", make_outcome(study.design, "batch", 2, 0.79))
    assert open_study(tmp_path) == study


def test_the_report_is_one_page_that_fetches_nothing(tmp_path: Path) -> None:
    scores: dict[str, list[float | None]] = {**BETTER, "layer": [0.79, None, 0.8, 0.78, 0.8, 0.81]}
    study = make_study(tmp_path, scores)
    write_report(study)
    page = (tmp_path / "report.html").read_text()
    for c in study.comparisons:
        assert c.sentence.replace("+", "&#43;") in page or c.sentence in page
    assert page.count("<svg") == 4
    assert not re.search(r"(src|href)=[\"'](https?:)?//", page)
    assert "<script" not in page
    assert "layer seed 1: the loss is nan" in page
    assert "ciFAIR" in page
    assert "0.01/2^(k-1)" in page
    for name in ("differences", "curves", "pairs", "step-seconds"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert b"<svg" in (tmp_path / f"{name}.svg").read_bytes()
    assert "<svg" in study._repr_html_()
    assert set(study.figures) == {"differences", "curves", "pairs", "step-seconds"}


def test_the_report_says_what_decided_and_on_which_pictures(tmp_path: Path) -> None:
    study = make_study(tmp_path, BETTER, outcome="loss", held_out=0.2)
    write_report(study)
    page = (tmp_path / "report.html").read_text()
    assert "What decides is held-out loss after the last epoch, and this alone" in page
    assert '<th class="n">held-out accuracy</th>' in page
    assert "200 held-out images" in page
    assert "test accuracy" not in page.lower()
    (c,) = study.comparisons
    assert f'<td class="n">{c.difference:+.4g}</td>' in page  # nats, not points


def test_every_environment_that_runs_were_made_in_is_named(tmp_path: Path) -> None:
    study = make_study(tmp_path, BETTER)
    assert not [line for line in closing_lines(study) if line.startswith("Made with")]
    code = study.design.environment["code_sha256"]
    newer = {**study.design.environment, "code_sha256": 64 * "f"}  # edited within a version
    later = tuple(replace(o, environment=newer) if o.seed > 3 else o for o in study.outcomes)
    for outcome in later:
        runs.save(tmp_path / "runs", outcome)
    study = open_study(tmp_path)
    write_report(study)
    page = html.unescape((tmp_path / "report.html").read_text())
    both = [line for line in closing_lines(study) if line.startswith("Made with")]
    assert len(both) == len(study.as_dict()["environments"]) == 2
    for line in both:
        assert page.count(line.removeprefix("Made with: ")) == 2  # in the list and the methods
    assert f" (code {code[:8]}), PyTorch " in both[0]
    assert " (code ffffffff), PyTorch " in both[1]


def test_the_table_of_runs_holds_every_run(tmp_path: Path) -> None:
    study = make_study(tmp_path, {"batch": [0.8, None], "none": [0.7, 0.71]})
    first = replace(study.outcomes[0], balanced_accuracy=0.6, macro_f1=0.5)
    study = replace(study, outcomes=(first, *study.outcomes[1:]))
    rows = list(csv.DictReader(runs_csv(study).splitlines()))
    assert [rows[0][name] for name in ("balanced_accuracy", "macro_f1")] == ["0.6", "0.5"]
    assert [(r["arm"], r["seed"], float(r["test_accuracy"])) for r in rows] == [
        ("batch", "0", 0.8),
        ("batch", "1", 0.1),
        ("none", "0", 0.7),
        ("none", "1", 0.71),
    ]
    assert [bool(r["diverged"]) for r in rows] == [False, True, False, False]


def test_show_prints_the_verdict_and_the_json_again(tmp_path: Path) -> None:
    study = make_study(tmp_path, BETTER)
    result = CliRunner().invoke(command, ["--show", str(tmp_path), "--json"])
    assert result.exit_code == 0
    assert "Verdict: better. batch is better than none: +6.50 points" in result.output
    [comparison] = json.loads(result.output.splitlines()[-1])["comparisons"]
    keys = ("first", "other", "n", "difference", "interval", "p_value", "verdict", "diverged")
    assert list(comparison)[:8] == list(keys)
    assert command_of(study) in result.output
    refused = CliRunner().invoke(command, ["--show", str(tmp_path), "--seeds", "12"])
    assert refused.exit_code == 2
    assert "--show only prints" in refused.output
    missing = CliRunner().invoke(command, ["--show", str(tmp_path / "runs")])
    assert isinstance(missing.exception, UserError)


def test_the_command_that_repeats_a_study_says_all_that_was_changed(tmp_path: Path) -> None:
    study = make_study(
        tmp_path,
        {"batch": [0.8], "b: norm=batch, seed_offset=9": [0.8]},
        recipe=get("notebook").override(epochs=3),
        contrasts=(("b", "batch"),),
    )
    text = command_of(study)
    for part in ("--arm 'b: norm=batch, seed_offset=9'", "--contrast b,batch", "--epochs 3"):
        assert part in text
    hidden = get("fast79").override(flip=False, validation=0.1)
    text = command_of(make_study(tmp_path / "fast", {"batch": [0.8], "none": [0.8]}, recipe=hidden))
    assert "--validation 0.1" in text
    assert " --no-flip " in text
    asked = CliRunner().invoke(command, [*shlex.split(text)[2:], "--help"])
    assert asked.exit_code == 0, asked.output  # every option is one that exists


@pytest.mark.parametrize(("outcome", "margin"), [("loss", "0.02"), ("macro_f1", "2")])
def test_a_margin_is_in_points_and_of_a_loss_in_its_own_unit(
    outcome: str, margin: str, tmp_path: Path
) -> None:
    study = make_study(tmp_path, {"batch": [0.8], "none": [0.7]}, outcome=outcome, margin=0.02)
    text = command_of(study)
    assert f" --margin {margin} " in text
    refused = CliRunner().invoke(command, shlex.split(text)[2:])  # its data are made up
    assert "begun with other" in str(refused.exception)
    assert "margin (" not in str(refused.exception)


def test_trials_are_equal_and_use_seeds_that_no_pair_has() -> None:
    tuning = parse_tuning("learning_rate=0.5,1,2")
    jobs = trials(make_design(tuning=tuning), "sample")
    assert len(jobs) == 2 * 3 * 2
    assert {job.seed for job in jobs} == {1_000_000_000, 1_000_000_001}
    assert not any(job.test for job in jobs)
    assert sorted({job.task.recipe.optimizer.learning_rate for job in jobs}) == [
        0.0005,
        0.001,
        0.002,
    ]
    with pytest.raises(
        UserError, match="tune=epochs=1,2: unknown setting 'epochs': choose one of "
    ):
        parse_tuning("epochs=1,2")
    with pytest.raises(UserError, match="give two or more factors above 0"):
        parse_tuning("learning_rate=1,-3")
    blind = make_design(recipe=get("notebook").override(validation=0.0), tuning=tuning)
    with pytest.raises(UserError, match="set validation above 0"):
        trials(blind, "sample")


def test_a_single_epoch_without_validation_still_has_a_curve(tmp_path: Path) -> None:
    study = make_study(tmp_path, {"batch": [0.8] * 2, "none": [0.6] * 2})
    parts = [[0.5, 2.0, 0.3], [1.0, 1.0, 0.5]]
    row = {"epoch": 1, "steps": 250, "loss": 1.5, "accuracy": 0.4, "parts": parts}
    outcomes = tuple(replace(o, curve=[], history=[row]) for o in study.outcomes)
    ax = Figure().subplots()
    plot_curves(ax, replace(study, outcomes=outcomes))
    assert [list(line.get_xdata()) for line in ax.lines] == [[125, 250]] * 2
    assert [list(line.get_ydata()) for line in ax.lines] == [[30, 50]] * 2
    assert ax.get_ylabel() == "training accuracy, %"


def test_a_report_is_named_only_where_it_is(tmp_path: Path) -> None:
    study = make_study(tmp_path, BETTER)
    assert not [line for line in closing_lines(study) if line.startswith("Report")]
    write_report(study)
    assert f"Report: {tmp_path / 'report.html'}" in closing_lines(study)
