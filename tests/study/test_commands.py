"""Studies of commands and functions: real processes, real logs, mistakes that are found."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import normlab
from normlab.__main__ import run as normlab_command
from normlab.api.measured import compare_command, open_study
from normlab.errors import UserError
from normlab.reports import measured_report
from normlab.reports.measured_report import closing_lines, methods
from normlab.study.commands import Command, NoNumber, parse_arm, pick, write_arm
from normlab.study.measured import TIMES
from normlab.study.runner import StudyStopped

# Half a second of Python's start is most of a run here, so runs leave out what they do not need.
PYTHON = f"{shlex.quote(sys.executable)} -S"
TRAIN = """
import json, random, sys
norm, seed = sys.argv[1], sys.argv[2]
draw = random.Random(seed).random() + random.Random(seed + norm).random() / 100
print("epoch 1")
print(json.dumps({"score": draw + (0.1 if norm == "batch" else 0), "test": {"loss": 1 - draw}}))
print("saved")
"""
ARMS = ["batch: norm=batch", "none: norm=none"]


@pytest.fixture
def report() -> None:
    """For tests of what is drawn of a study; the others save the second that it takes."""


@pytest.fixture(autouse=True)
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "report" not in request.fixturenames:
        monkeypatch.setattr(measured_report, "write_report", lambda study: None)


@pytest.fixture
def script(in_tmp: Path) -> str:
    (in_tmp / "train.py").write_text(TRAIN)
    return f"{PYTHON} train.py {{norm}} {{seed}}"


def compare(command: str, **options: Any) -> Any:
    return compare_command(command, **{"arms": ARMS, "metric": "score", **options})


def fake(code: str) -> str:
    """A command that runs Python code with the arm's value and the seed as arguments."""
    return f"{PYTHON} -c {shlex.quote(code)} {{norm}} {{seed}}"


def test_a_command_is_compared_and_its_study_goes_on_and_grows(
    script: str, in_tmp: Path, report: None
) -> None:
    study = compare(script, seeds=6, jobs=2)
    [c] = study.comparisons
    assert (c.verdict, c.n, c.margin) == ("better", 6, None)
    assert c.difference == pytest.approx(0.1, abs=0.01)
    assert "in score, 96 % interval" in c.sentence
    assert study.path == Path("studies/train-batch-none")
    outcome = study.arm("batch")[3]
    assert outcome.values.keys() == {"score", "test.loss"}
    assert outcome.environment["versions"]["python"]
    assert (study.path / "logs" / "batch-seed-3.out").read_text().startswith("epoch 1\n")
    page = (study.path / "report.html").read_text()
    assert "train.py, SHA-256" in page
    assert not re.search(r"(src|href)=[\"'](https?:)?//", page)
    assert f"`{script}`" in methods(study)
    rows = (study.path / "runs.csv").read_text().splitlines()
    assert rows[0] == "arm,seed,value,diverged,seconds,processor_seconds,score,test.loss"
    assert len(rows) == 13

    before = {p: p.read_bytes() for p in (study.path / "runs").iterdir()}
    more = compare(script, seeds=9)
    assert more.comparisons[0].look == 2
    assert {p: p.read_bytes() for p in before} == before
    assert closing_lines(open_study(study.path)) == closing_lines(more)
    with pytest.raises(UserError, match=r"metric \(score then, test\.loss now\)"):
        compare(script, metric="test.loss")
    (in_tmp / "train.py").write_text(TRAIN + "# better\n")
    with pytest.raises(UserError, match=r"content of train\.py, which changed since"):
        compare(script)


def test_lower_is_better_and_the_margin_is_in_the_metrics_unit(script: str) -> None:
    arms = ["none: norm=none", "again: norm=none, seed_offset=0", "batch: norm=batch"]
    study = compare(script, arms=arms, lower_is_better=True, margin=0.02, out="s")
    same, worse = study.comparisons
    assert same.verdict == "no_difference"
    assert "none and again scored the same in every pair" in same.sentence
    assert worse.verdict == "better"  # none is lower
    assert "(lower is better)" in worse.sentence
    assert any("does what the arms change reach the run?" in f for f in study.findings)


def test_the_printed_command_goes_on_with_the_study(
    script: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compare", "--command", script, "--arm", "a: norm='x, y'", "--arm", "b: norm=$(x)"]
    assert normlab_command([*words, "--metric", "test.loss", "--seeds", "2", "--out", "s s"]) == 0
    lines = capsys.readouterr().out.splitlines()
    again = shlex.split(lines[-1].removeprefix("Again: "))
    assert again[:2] == ["normlab", "compare"]
    assert normlab_command(again[1:]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == lines[-1]
    assert normlab_command(["compare", "--show", "s s", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert shown["metric"] == "test.loss"
    assert shown["comparisons"][0]["interval"] == [None, None]


def test_values_are_arguments_and_no_shell_reads_them(in_tmp: Path) -> None:
    code = "import sys; print(len(sys.argv[1:]), sys.argv[1] == '; touch x $(touch x) `touch x`')"
    odd = "odd: norm='; touch x $(touch x) `touch x`'"
    command = f"{fake(code)} {{*more}}"
    arms = [f"{odd}, more=", "plain: norm=p, more=--a '1 2'"]
    for shell in (False, True):
        study = compare(
            command, arms=arms, seeds=1, metric=None, pattern=r"^(\d)", shell=shell,
            out=f"s{shell}",
        )  # fmt: skip
        assert study.arm("odd")[0].value == 2
        assert study.arm("plain")[0].value == 4
        said = (study.path / "logs" / "odd-seed-0.out").read_text()
        assert said == "2 True\n"
    assert not Path("x").exists()


@settings(max_examples=40)
@given(
    name=st.from_regex(r"[a-z]{1,8}", fullmatch=True),
    values=st.dictionaries(
        st.from_regex(r"[a-z]{1,8}", fullmatch=True),
        st.text(st.characters(codec="utf-8", exclude_characters="\"'\n"), max_size=12),
        min_size=1,
    ),
)
def test_an_arm_is_read_as_it_is_written(name: str, values: dict[str, str]) -> None:
    assert parse_arm(write_arm(name, values)) == (name, values)


@settings(max_examples=40)
@given(value=st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20))
def test_any_value_reaches_the_program_as_one_argument(value: str) -> None:
    assert Command(text="p --x {x} {seed}").words({"x": value, "seed": "1"}) == [
        "p", "--x", value, "1",
    ]  # fmt: skip
    [_, _, line] = Command(text="p {x}", shell=True).words({"x": value})
    assert shlex.split(line) == ["p", value]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"command": "train {norm}"}, "the command has no {seed}"),
        ({"command": "train {norm} {width} {seed}"}, "arm 'batch' does not fill {width}"),
        ({"command": "train {seed}"}, "arm 'batch' sets 'norm', and the command has no {norm}"),
        ({"command": "train '{norm} {seed}"}, "close its quotes"),
        ({"command": ""}, "--command is empty"),
        ({"arms": ["batch: norm=batch"]}, "a comparison needs two or more"),
        ({"arms": ["batch", "none"]}, "say what it fills in the command"),
        ({"arms": ["a: norm=1", "b: norm=1, seed=3"]}, "arm 'b' sets 'seed', which normlab fills"),
        ({"result": "out.json:acc", "metric": None}, "would be one file for all runs"),
        ({"result": "out.json", "metric": None}, "give FILE:key"),
        ({"pattern": "acc"}, "has 0 groups: put brackets"),
        ({"pattern": "("}, "is no regular expression"),
        ({"time_limit": 0.0}, "--time-limit 0: give seconds above 0"),
        ({"margin": 0.0}, "choose a number above 0, in the metric's own unit"),
        ({"diverged": float("nan")}, "choose a finite number"),
        ({"jobs": 0}, "jobs=0: choose 1 or more"),
    ],
)
def test_a_mistaken_study_is_refused_before_any_run(
    options: dict[str, Any], message: str, in_tmp: Path
) -> None:
    command = options.pop("command", "touch ran{norm} {seed}")
    with pytest.raises(UserError, match=re.escape(message)):
        compare(command, **options)
    assert not list(in_tmp.glob("ran*"))


@pytest.mark.parametrize(
    ("found", "metric", "message"),
    [
        ({"loss": 1.0}, "los", "it gave no 'los': did you mean 'loss'?"),
        ({"loss": "low"}, "loss", "its loss is 'low', which is no number"),
        ({"loss": True}, "loss", "its loss is True, which is no number"),
        ({"a": 1, "b": 2}, None, "it gave 2 numbers (a, b): name one with --metric"),
        ({"a": "x"}, None, "it gave 0 numbers (none)"),
        ("text", None, "it gave 'text': give a number"),
    ],
)
def test_a_metric_that_is_missing_or_no_number_is_told(
    found: Any, metric: str | None, message: str
) -> None:
    with pytest.raises(NoNumber, match=re.escape(message)):
        pick(found, metric)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("print('done')", "it printed no line of JSON"),
        ('print(\'{"score": "0.5"}\')', "its score is '0.5', which is no number"),
        ("print('{\"score\": NaN}')", "its score is nan.*the study stops"),
        ("raise ValueError('no data')", "exit code 1: ValueError: no data.*the study stops"),
        ("import os; os.kill(os.getpid(), 11)", "ended with signal 11"),
    ],
)
def test_a_run_that_fails_stops_the_study_unless_it_was_declared(
    code: str, message: str, in_tmp: Path
) -> None:
    with pytest.raises(StudyStopped, match=message) as caught:
        compare(fake(code), out="s")
    assert "batch seed 0: " in str(caught.value)
    assert "\n" not in str(caught.value)
    if "the study stops" in message:
        study = compare(fake(code), out="t", seeds=2, diverged=0.1)
        assert [study.design.value(o) for o in study.outcomes] == [0.1] * 4
        assert any(f.startswith("every run of batch failed") for f in study.findings)
        assert "Diverged and counted as 0.1: 2 of 2 runs" in study.comparisons[0].sentence


def test_a_script_that_failed_at_once_may_be_mended(in_tmp: Path) -> None:
    """The plan holds its hash, but nothing was seen of it."""
    Path("train.py").write_text("raise SystemExit(3)")
    command = f"{PYTHON} train.py {{norm}} {{seed}}"
    with pytest.raises(StudyStopped, match="ended with exit code 3"):
        compare(command, out="s", seeds=1)
    Path("train.py").write_text(TRAIN)
    assert compare(command, out="s", seeds=1).complete
    Path("train.py").write_text(TRAIN + "# another\n")
    with pytest.raises(UserError, match="which changed since"):
        compare(command, out="s", seeds=1)


def test_a_program_that_is_not_there_is_named(in_tmp: Path) -> None:
    with pytest.raises(StudyStopped, match=r"no-such-program.*name a program that is there"):
        compare("no-such-program {norm} {seed}", out="s")


def test_a_seed_that_changes_nothing_stops_the_study_after_two_pairs(
    in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "import sys; print('{\"score\": 0.%d}' % len(sys.argv[1]))"
    with pytest.raises(StudyStopped, match="the seed changes nothing: each arm gave the same"):
        compare(fake(code), out="s")
    assert len(list(Path("s/runs").iterdir())) == 4
    with pytest.raises(StudyStopped, match="not pairs but one pair seen again"):
        compare(fake(code), out="s")
    assert normlab_command(["compare", "--show", "s"]) == 0
    assert "Found: the seed changes nothing" in capsys.readouterr().out


def test_a_metric_may_be_a_time_or_have_one_in_its_name(in_tmp: Path) -> None:
    for metric in ("seconds", "sentiment_f1"):
        code = f"import sys; print('{{\"{metric}\": %s.%d}}' % (sys.argv[2], len(sys.argv[1])))"
        assert compare(fake(code), metric=metric, out=metric, seeds=3).findings == ()


def test_seeds_of_other_pairs_are_refused(in_tmp: Path) -> None:
    settings: dict[str, Any] = {"seeds": 3, "arms": ["a: norm=1", "b: norm=2, seed_offset=2"]}
    code = fake("import sys; print(sys.argv[2])")
    with pytest.raises(UserError, match=r"a and b: pairs would share seeds.*differ by 3 or more"):
        compare(code, metric=None, out="s", **settings)
    assert compare(code, metric=None, out="s", **{**settings, "seeds": 2}).complete
    with pytest.raises(UserError, match="pairs would share seeds"):
        compare(code, metric=None, out="s", **settings)


def test_only_times_are_left_out_of_what_must_repeat() -> None:
    times = ["train_seconds", "time", "wall_time", "runtime", "trainTime", "secondsPerEpoch"]
    for name in (*times, "timestamp", "timer_ms", "Time (s)", "second"):
        assert TIMES.search(name), name
    for name in ("sentiment_f1", "loss", "estimated", "secondary_score", "multimetric"):
        assert not TIMES.search(name), name


def test_a_repeated_run_of_a_script_that_was_mended_since_is_made_again(in_tmp: Path) -> None:
    """The repeat is the first run of all, so it may be there where no other is."""
    script = "import sys\nopen('ran', 'a').write('.')\n"
    stops = script + "if len(open('ran').read()) > 1: raise SystemExit(3)\nprint(0.5)"
    Path("train.py").write_text(stops)
    command = f"{PYTHON} train.py {{norm}} {{seed}}"
    settings: dict[str, Any] = {"out": "s", "seeds": 1, "check_repeat": True}
    with pytest.raises(StudyStopped, match="ended with exit code 3"):
        compare(command, **settings)
    Path("train.py").write_text(script + "print(0.6)")
    assert not any("does not hold" in f for f in compare(command, **settings).findings)


def test_a_seed_that_does_not_hold_is_found_by_repeating_a_run(in_tmp: Path) -> None:
    code = "import os; print('{\"score\": %d}' % os.getpid())"
    study = compare(fake(code), out="s", seeds=2, check_repeat=True)
    [finding] = study.findings
    assert finding.startswith("the seed does not hold: batch seed 0 gave score ")
    held = compare(fake("import sys; print(sys.argv[2])"), metric=None, out="t", seeds=2,
                   arms=["a: norm=1", "b: norm=2"], check_repeat=True)  # fmt: skip
    assert not any("does not hold" in finding for finding in held.findings)


def test_a_result_is_read_from_json_csv_and_lines_of_a_folder_of_each_run(in_tmp: Path) -> None:
    code = (
        "import sys; out, seed = sys.argv[3], sys.argv[2]\n"
        "open(out + '/r.json', 'w').write('{\"a\": {\"b\": %s}}' % seed)\n"
        "open(out + '/r.jsonl', 'w').write('{\"b\": 9}\\n{\"b\": %s}\\n' % seed)\n"
        "open(out + '/r.csv', 'w').write('epoch,b\\n1,9\\n2,%s\\n' % seed)"
    )
    for i, result in enumerate(["r.json:a.b", "r.jsonl:b", "r.csv:b"]):
        command = f"{fake(code)} {{out}}"
        study = compare(command, metric=None, result=f"{{out}}/{result}", seeds=2, out=str(i))
        assert [o.value for o in study.arm("batch").values()] == [0, 1]
    with pytest.raises(StudyStopped, match=r"r\.txt: No such file"):
        compare(f"{fake(code)} {{out}}", metric=None, result="{out}/r.txt:b", out="none")


STRAYS = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
name = sys.argv[1] + "-" + sys.argv[2]
if os.fork() == 0:
    os.setsid()
    if os.fork():
        os._exit(0)
    open(f"stray-{name}", "w").write(str(os.getpid()))
    time.sleep(600)
while not os.path.exists(f"stray-{name}"):
    time.sleep(0.01)
if sys.argv[1] == "slow":
    time.sleep(600)
print(sys.argv[2])
"""


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def strays(folder: Path) -> list[int]:
    return [int(p.read_text() or 0) for p in folder.glob("stray-*")]


@pytest.mark.skipif(sys.platform != "linux", reason="strays are adopted on Linux")
def test_a_run_ends_at_its_time_limit_and_leaves_no_process(in_tmp: Path) -> None:
    (in_tmp / "strays.py").write_text(STRAYS)
    study = compare(
        f"{PYTHON} strays.py {{norm}} {{seed}}", arms=["slow: norm=slow", "fast: norm=fast"],
        metric=None, seeds=1, time_limit=2.0, diverged=-1.0, out="s",
    )  # fmt: skip
    assert study.arm("slow")[0].diverged == "it took more than 2 s"
    assert study.arm("fast")[0].value == 0
    assert len(strays(in_tmp)) == 2
    assert not any(map(is_alive, strays(in_tmp)))


@contextlib.contextmanager
def process(words: list[str]) -> Iterator["subprocess.Popen[str]"]:
    child = subprocess.Popen(
        [sys.executable, "-m", "normlab", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def wait_until(condition: Any, what: str) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


@pytest.mark.skipif(sys.platform != "linux", reason="strays are adopted on Linux")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_study_that_is_killed_or_interrupted_takes_its_runs_along_and_goes_on(
    how: signal.Signals, in_tmp: Path
) -> None:
    (in_tmp / "strays.py").write_text(STRAYS)
    words = ["compare", "--command", f"{PYTHON} strays.py {{norm}} {{seed}}", "--out", "s"]
    words += ["--arm", "fast: norm=fast", "--arm", "slow: norm=slow", "--jobs", "2"]
    words += ["--seeds", "2"]
    with process(words) as study:
        wait_until(lambda: Path("stray-slow-0").exists() and Path("stray-slow-1").exists(), "runs")
        assert Path("s/runs/fast-seed-0.json").exists()
        os.kill(study.pid, how)
        output, _ = study.communicate(timeout=60)
    assert "Traceback" not in output, output
    if how == signal.SIGINT:
        assert study.returncode == 130
        assert "2 of 4 runs are kept" in output
    wait_until(lambda: not any(map(is_alive, strays(in_tmp))), "runs outlive their study")
    Path("strays.py").write_text("print(1)")
    assert normlab_command([*words[:-2], "--seeds", "2"]) == 2  # another script is another study
    Path("strays.py").write_text(STRAYS)
    kept = Path("s/runs/fast-seed-0.json").read_bytes()
    assert normlab_command([*words, "--time-limit", "1"]) == 2
    assert Path("s/runs/fast-seed-0.json").read_bytes() == kept


def test_the_user_s_environment_reaches_the_run_as_it_is(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`normlab` takes the current folder off its own path, which a script may need."""
    (in_tmp / "helper.py").write_text("value = 5")
    (in_tmp / "train.py").write_text("import sys, helper; print(helper.value + int(sys.argv[2]))")
    words = ["compare", "--command", f"{PYTHON} train.py {{norm}} {{seed}}", "--seeds", "2"]
    words += ["--arm", "a: norm=a", "--arm", "b: norm=b", "--out", "s", "--threads", "3"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    done = subprocess.run(
        [sys.executable, "-m", "normlab", *words], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert [o.value for o in open_study("s").arm("a").values()] == [5, 6]
    code = "import os; print(os.environ['OMP_NUM_THREADS'])"
    study = compare(fake(code), metric=None, seeds=1, threads=3, out="t")
    assert study.outcomes[0].value == 3


def test_options_of_recipes_and_of_commands_are_not_mixed(
    in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert normlab_command(["compare", "--command", "x {seed}", "--epochs", "3"]) == 2
    assert "--epochs: --command has no recipe: leave it out" in capsys.readouterr().err
    assert normlab_command(["compare", "fast79", "--command", "x {seed}"]) == 2
    assert "RECIPE: --command has no recipe" in capsys.readouterr().err
    assert normlab_command(["compare", "--metric", "x", "--data", "sample"]) == 2
    assert "--metric: only --command has that" in capsys.readouterr().err


def test_neither_a_command_nor_a_function_needs_pytorch(script: str, in_tmp: Path) -> None:
    """Its import takes seconds, and whoever trains with something else may not have it."""
    Path("check.py").write_text(
        "import sys, normlab\n"
        "class NoTorch:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch': raise ImportError('no PyTorch here')\n"
        "sys.meta_path.insert(0, NoTorch())\n"
        "from normlab.__main__ import run\n"
        "def train(seed, norm): return seed + norm\n"
        "if __name__ == '__main__':\n"
        f"    words = ['compare', '--command', {script!r}, '--arm', 'a: norm=a']\n"
        "    words += ['--arm', 'b: norm=b', '--seeds', '2', '--metric', 'score']\n"
        "    assert run(words) == 0\n"
        "    arms = {'a': {'norm': 1}, 'b': {'norm': 2}}\n"
        "    study = normlab.compare(train, arms=arms, seeds=2, out='f')\n"
        "    assert study.arm('b')[1].value == 3\n"
        "    assert '<svg' in study._repr_html_()\n"
    )
    done = subprocess.run([sys.executable, "check.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def train(seed: int, rate: float, wild: bool = False) -> dict[str, float]:
    if wild and seed == 1:
        raise ArithmeticError("it blew up")
    return {"loss": rate + seed / 7, "pid": os.getpid()}


def test_a_function_is_compared_in_processes(in_tmp: Path) -> None:
    arms: dict[str, dict[str, Any]] = {"slow": {"rate": 0.1}, "fast": {"rate": 0.3, "wild": True}}
    with pytest.raises(StudyStopped, match="fast seed 1: ArithmeticError: it blew up"):
        normlab.compare(train, arms=arms, metric="loss", seeds=2, jobs=1)
    study = normlab.compare(
        train, arms=arms, metric="loss", seeds=6, jobs=2, lower_is_better=True, diverged=9.0,
        out="s",
    )  # fmt: skip
    assert study.comparisons[0].verdict == "better"
    assert study.arm("fast")[1].diverged == "ArithmeticError: it blew up"
    assert os.getpid() not in {o.values.get("pid") for o in study.outcomes}
    assert study.outcomes[0].environment["versions"]["numpy"] == np.__version__
    assert normlab.open_study("s").comparisons == study.comparisons
    with pytest.raises(UserError, match=r"begun with other (metric|lower)"):
        normlab.compare(train, arms=arms, metric="pid", out="s")


def leave(seed: int, rate: float) -> float:
    if rate == 0.3:
        sys.exit("no data")
    return rate + seed


def test_a_function_that_calls_sys_exit_is_a_failed_run(in_tmp: Path) -> None:
    arms = {"slow": {"rate": 0.1}, "fast": {"rate": 0.3}}
    with pytest.raises(StudyStopped, match="fast seed 0: SystemExit: no data"):
        normlab.compare(leave, arms=arms, seeds=1, jobs=1)
    study = normlab.compare(leave, arms=arms, seeds=1, jobs=1, diverged=0.0, out="s")
    assert study.arm("fast")[0].diverged == "SystemExit: no data"


@pytest.mark.soak
def test_commands_go_to_the_workers_of_a_dask_scheduler(script: str, in_tmp: Path) -> None:
    distributed = pytest.importorskip("distributed", reason="needs the extra `cluster`")
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, processes=True, dashboard_address=None
    ) as cluster:
        study = compare(script, seeds=2, scheduler=cluster.scheduler_address, out="far")
    near = compare(script, seeds=2, out="near")
    assert [o.values for o in study.outcomes] == [o.values for o in near.outcomes]
    log = Path("logs", "none-seed-1.out")
    assert (study.path / log).read_bytes() == (near.path / log).read_bytes()
