"""Each rule of the doctor finds its fault in a faulty model, and nothing in a healthy one."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import normlab
from networks import pictures, settle
from normlab.diagnosis import RULES, Diagnosis, Finding, doctor, examine
from normlab.diagnosis.findings import SEVERITIES
from normlab.diagnosis.modules import from_module
from normlab.diagnosis.network import FACTS, Batches
from normlab.diagnosis.rule import Rule
from normlab.errors import UserError

DOCS = Path(__file__).parents[2] / "docs" / "doctor.md"


def network(**bn: Any) -> nn.Sequential:
    """Convolution, normaliser, ReLU twice over, and a head; never run yet."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False),
        nn.BatchNorm2d(16, **bn),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, stride=2, bias=False),
        nn.BatchNorm2d(24, **bn),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 10),
    )


def settled(steps: int = 80, **bn: Any) -> nn.Sequential:
    model = network(**bn)
    settle(model, steps=steps, size=8)
    return model


def changed(index: int, name: str, value: Any, model: nn.Sequential | None = None) -> nn.Sequential:
    """A settled network with `value` at the first channels of one tensor."""
    model = settled() if model is None else model
    with torch.no_grad():
        values = torch.as_tensor(value)
        getattr(model[index], name).view(-1)[: values.numel()] = values
    return model


DATA = (pictures(64, seed=99, size=8), None)


def diagnose(model: nn.Module, **options: Any) -> Diagnosis:
    return doctor(model, **options)


def learnable(shift: float = 0.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures of two classes, told apart by their contrast, and their labels."""
    x = pictures(200, seed=seed, size=8) + shift
    labels = torch.arange(200) % 2
    x[labels == 1, :, :, ::2] += 0.25
    return x, labels


@cache
def classifier() -> nn.Sequential:
    """A network trained to tell `learnable` pictures apart."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    for step in range(60):
        x, labels = learnable(seed=step % 5)
        order = torch.randperm(200, generator=torch.Generator().manual_seed(step))[:50]
        loss = nn.functional.cross_entropy(model(x[order]), labels[order])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@cache
def gap(shift: float) -> Diagnosis:
    x, labels = learnable(shift, seed=77)
    return diagnose(classifier(), data=(x, labels.numpy()), batch_size=50)


def frozen(*, thawed: bool) -> nn.Sequential:
    """A network in training whose first normaliser learns nothing."""
    model = settled().train()
    for parameter in model[1].parameters():
        parameter.requires_grad_(False)
    if not thawed:
        model[1].eval()
    return model


def stopped(*, learning: bool) -> nn.Sequential:
    """A network in training whose first normaliser stands in evaluation mode."""
    model = settled().train()
    model[1].eval()
    for parameter in model[1].parameters():
        parameter.requires_grad_(learning)
    return model


def with_dropout(*, first: bool) -> nn.Sequential:
    layers = list(settled())
    layers.insert(3 if first else 6, nn.Dropout(0.2))
    return nn.Sequential(*layers)


def with_bias(bias: bool) -> nn.Sequential:
    model = settled()
    model[3] = nn.Conv2d(16, 24, 3, stride=2, bias=bias)
    return model


def exported(path: Path, *, training: bool, opset: int = 17) -> Path:
    """An ONNX graph of one normaliser, as the ONNX standard writes it since version 14."""
    outputs = ["y", "mean_out", "var_out"] if training else ["y"]
    attributes = {"training_mode": int(training)} if opset >= 14 else {}
    node = helper.make_node(
        "BatchNormalization", ["x", "g", "b", "m", "v"], outputs, name="bn", **attributes
    )
    shape = ["N", 4, 2, 2]
    values = np.linspace(0.5, 1.5, 4, dtype=np.float32)
    graph = helper.make_graph(
        [node],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(values, name) for name in "gbmv"],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    onnx.save(model, path)
    return path


def vectors() -> nn.Sequential:
    """A network that normalises vectors: one value a channel from each image."""
    model = nn.Sequential(nn.Linear(192, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        for step in range(80):
            model(pictures(16, seed=step, size=8).flatten(1))
    return model


def forgetful(momentum: float) -> nn.Sequential:
    return settled(momentum=momentum)


@dataclass(frozen=True)
class Case:
    """A faulty model and a healthy one, and where and how the fault shows."""

    ill: Callable[[], Diagnosis]
    healthy: Callable[[], Diagnosis]
    where: str
    severity: str
    evidence: str


def unequal() -> nn.Sequential:
    model = settled()
    model.train()[1].eval()
    settle_some = pictures(16, size=8)
    with torch.no_grad():
        model(settle_some)
    return model.eval()


def healthy() -> Diagnosis:
    return diagnose(settled(), data=DATA, batch_size=16, accumulation=1)


CASES = {
    "not-finite": Case(
        lambda: diagnose(changed(0, "weight", [np.nan, np.inf])),
        healthy,
        "0.weight",
        "serious",
        "2 of 432 values",
    ),
    "variance-not-positive": Case(
        lambda: diagnose(changed(1, "running_var", -0.0048)),
        healthy,
        "1",
        "serious",
        "negative in 1 of 16 channels, at lowest -0.0048",
    ),
    "never-updated": Case(
        lambda: diagnose(network()), healthy, "1", "serious", "running_var 1 after 0 counted"
    ),
    "stale": Case(
        lambda: diagnose(settled(24, momentum=0.01)),
        lambda: diagnose(settled(24, momentum=0.5)),
        "1",
        "serious",
        "after 24 steps with m = 0.99 they weigh 0.79",
    ),
    "updated-unequally": Case(
        lambda: diagnose(unequal()), healthy, "1", "warning", "counted 80 updates, others 81"
    ),
    "momentum-turned-round": Case(
        lambda: diagnose(forgetful(0.99)),
        lambda: diagnose(forgetful(0.1)),
        "1",
        "serious",
        "keeps 0.01 of the old",
    ),
    "constant-channel": Case(
        lambda: diagnose(changed(0, "weight", [0.0] * 5 * 27, settled()), data=DATA),
        healthy,
        "1",
        "warning",
        "5 of 16 channels do not vary, 5 of them always 0 on these data",
    ),
    "eps-matters": Case(
        lambda: diagnose(settled(eps=0.5)),
        lambda: diagnose(settled(eps=1e-3)),
        "1",
        "warning",
        "ε = 0.5 exceeds",
    ),
    "gamma-vanished": Case(
        lambda: diagnose(changed(4, "weight", [1e-6] * 6)),
        healthy,
        "4",
        "warning",
        "in 6 of 24 channels",
    ),
    "useless-bias": Case(
        lambda: diagnose(with_bias(True)),
        lambda: diagnose(with_bias(False)),
        "3",
        "note",
        "4 follows",
    ),
    "dropout-before-normalizer": Case(
        lambda: diagnose(with_dropout(first=True)),
        lambda: diagnose(with_dropout(first=False)),
        "5",
        "note",
        "3 stands before it",
    ),
    "frozen-but-updating": Case(
        lambda: diagnose(frozen(thawed=True)),
        lambda: diagnose(frozen(thawed=False)),
        "1",
        "serious",
        "training mode",
    ),
    "learning-but-frozen": Case(
        lambda: diagnose(stopped(learning=True)),
        lambda: diagnose(stopped(learning=False)),
        "1",
        "warning",
        "fixed running statistics",
    ),
    "small-batches": Case(
        lambda: diagnose(settled(), batch_size=4),
        lambda: diagnose(settled(), batch_size=16),
        "batches",
        "warning",
        "4 images a batch",
    ),
    "pretrained-by-batch": Case(
        lambda: learnt_on("train", 4),
        lambda: learnt_on("eval", 4),
        "batches",
        "serious",
        "normalisers by the statistics of 4 images",
    ),
    "last-batch-of-one": Case(
        lambda: diagnose(vectors(), data=(DATA[0].flatten(1), None), batch_size=21),
        lambda: diagnose(vectors(), data=(DATA[0].flatten(1), None), batch_size=20),
        "batches",
        "serious",
        "batches of 21 leave one image over, which has no variance",
    ),
    "accumulation": Case(
        lambda: diagnose(settled(), batch_size=8, accumulation=4),
        lambda: diagnose(settled(), batch_size=32, accumulation=1),
        "batches",
        "warning",
        "an update sees 4 batches",
    ),
    "far-from-data": Case(
        lambda: diagnose(settled(), data=(DATA[0] * 3, None)),
        healthy,
        "1",
        "serious",
        "the variance by a factor of 8.",
    ),
    "no-running-statistics": Case(
        lambda: diagnose(settled(track_running_stats=False)),
        healthy,
        "1",
        "serious",
        "keeps no running statistics",
    ),
    "half-precision-statistics": Case(
        lambda: diagnose(settled().train().bfloat16()),
        lambda: diagnose(normlab.convert_batchnorm(settled()).train().bfloat16()),
        "1",
        "warning",
        "a step below 1/256",
    ),
    "score-gap": Case(
        lambda: gap(shift=3.0),
        lambda: gap(shift=0.0),
        "model",
        "serious",
        "with running statistics",
    ),
}


# Rules whose tests stand by themselves.
ELSEWHERE = {
    "training-mode-exported": "test_training_mode_exported",
    "no-normalizer": "test_a_file_without_normalisers_is_never_called_healthy",
    "not-read": "test_what_could_not_be_read_is_counted",
    "class-never-right": "test_results_of_runs_are_read",
    "no-better-than-simple": "test_results_of_runs_are_read",
}

WORST = {rule.id: rule.worst for rule in RULES}


def learnt_on(mode: str, size: int) -> Diagnosis:
    """A network whose normalisers stand in this mode in a training that began pretrained."""
    network = from_module(settled().train(), batches=Batches(size=size))
    by_batch = mode == "train"
    ns = tuple(replace(n, takes_batch=by_batch, updates=by_batch) for n in network.normalizers)
    return examine(replace(network, normalizers=ns, pretrained="resnet18"))


def test_large_batches_of_a_pretrained_network_are_a_warning() -> None:
    found = of("pretrained-by-batch", learnt_on("train", 32))
    assert [f.severity for f in found] == ["warning"]


def of(rule: str, diagnosis: Diagnosis) -> list[Finding]:
    assert rule in diagnosis.checked
    return [f for f in diagnosis.findings if f.rule == rule]


@pytest.mark.parametrize("rule", CASES)
def test_faults_are_found(rule: str) -> None:
    case = CASES[rule]
    diagnosis = case.ill()
    found = {f.where: f for f in of(rule, diagnosis)}
    finding = found[case.where]
    assert finding.severity == case.severity
    assert case.evidence in finding.evidence
    assert finding.remedy
    assert finding.source
    severities = [SEVERITIES.index(f.severity) for f in diagnosis.findings]
    assert severities == sorted(severities, reverse=True)
    for f, severity in zip(diagnosis.findings, severities, strict=True):
        assert severity <= SEVERITIES.index(WORST[f.rule])
    assert diagnosis.serious == (severities[0] == 2)


@pytest.mark.parametrize("rule", CASES)
def test_healthy_networks_are_left_alone(rule: str) -> None:
    assert of(rule, CASES[rule].healthy()) == []


@pytest.mark.parametrize("opset", [9, 17])
def test_training_mode_exported(tmp_path: Path, opset: int) -> None:
    rule = "training-mode-exported"
    ill = of(rule, doctor(exported(tmp_path / "ill.onnx", training=True, opset=opset)))
    assert [(f.where, f.severity) for f in ill] == [("bn", "serious")]
    healthy_graph = exported(tmp_path / "healthy.onnx", training=False, opset=opset)
    assert of(rule, doctor(healthy_graph)) == []


def test_results_of_runs_are_read() -> None:
    described = from_module(settled())
    classes = {"cat": (3, 4), "dog": (0, 9), "owl": (0, 2), "elk": (0, 0)}
    diagnosis = examine(replace(described, classes=classes, simple=(0.5, 0.6)))
    found = {f.where: f.severity for f in of("class-never-right", diagnosis)}
    assert found == {"class dog": "serious", "class owl": "warning"}
    assert [f.severity for f in of("no-better-than-simple", diagnosis)] == ["warning"]
    good = examine(replace(described, classes={"cat": (1, 9)}, simple=(0.7, 0.6)))
    assert of("class-never-right", good) == of("no-better-than-simple", good) == []
    assert of("no-better-than-simple", examine(replace(described, simple=(1.0, 1.0)))) == []


def test_a_healthy_model_has_no_findings_at_all() -> None:
    diagnosis = healthy()
    assert diagnosis.findings == ()
    assert not diagnosis.serious


def test_every_rule_has_its_case_and_its_line_in_the_docs() -> None:
    tested = {*CASES, *ELSEWHERE}
    assert {r.id for r in RULES} == tested
    text = DOCS.read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert rows == [row(r) for r in RULES]


def row(rule: Rule) -> str:
    """A rule's line in docs/doctor.md."""
    name = ELSEWHERE.get(rule.id, f"test_faults_are_found[{rule.id}]")
    needs = ", ".join(FACTS[need] for need in rule.needs) or "nothing"
    return f"| `{rule.id}` | {rule.title} | {rule.worst} | {needs} | `{name}` |"


def test_a_zero_variance_everywhere_is_serious_but_one_dead_channel_is_not() -> None:
    everywhere = diagnose(changed(1, "running_var", [0.0] * 16))
    assert [f.severity for f in of("variance-not-positive", everywhere)] == ["serious"]
    one = diagnose(changed(1, "running_var", 0.0))
    assert of("variance-not-positive", one) == []
    assert [f.severity for f in of("constant-channel", one)] == ["note"]


@pytest.mark.parametrize("dead", [1, 9, 15])
@pytest.mark.parametrize("variance", [0.0, 1e-15])
def test_dead_channels_are_found_however_many(dead: int, variance: float) -> None:
    """The running variance of a dead channel decays by m a step, and is never quite 0."""
    model = changed(1, "running_var", [variance] * dead)
    diagnosis = diagnose(changed(1, "running_mean", [variance] * dead, model))
    (finding,) = of("constant-channel", diagnosis)
    assert finding.evidence == f"{dead} of 16 channels do not vary, {dead} of them always 0"
    assert of("eps-matters", diagnosis) == []


@pytest.mark.parametrize("dead", [0, 9, 15, 16])
@pytest.mark.parametrize("variance", [0.0, 1e-15])
def test_statistics_off_the_data_are_found_however_many_channels_are_dead(
    dead: int, variance: float
) -> None:
    """The dead ones are like the data; with none but them nothing is off."""
    model = network()
    with torch.no_grad():
        model[0].weight[:dead] = 0
    settle(model, size=8)
    changed(1, "running_mean", [variance] * dead, model)
    changed(1, "running_var", [variance] * dead, model)

    def far(x: torch.Tensor) -> list[Finding]:
        return [f for f in of("far-from-data", diagnose(model, data=(x, None))) if f.where == "1"]

    assert far(DATA[0]) == []
    found = far(DATA[0] * 3)
    assert [f.severity for f in found] == ["serious"] * (dead < 16)
    assert all(f"in the median channel of {16 - dead} " in f.evidence for f in found)


@pytest.mark.parametrize("eps", [1e-8, 1e-3])
def test_channels_of_very_unlike_scale_are_not_dead(eps: float) -> None:
    """As columns of a table are that was never scaled."""
    layer = nn.BatchNorm1d(4, eps=eps)
    layer.running_var = torch.tensor([4e8, 2e2, 0.2, 4e-3])
    assert of("constant-channel", diagnose(nn.Sequential(layer))) == []


@pytest.mark.parametrize("gone", [[1e-6] * 23, [0.0] * 24, [np.nan] + [1e-6] * 23])
def test_vanished_scales_are_found_however_many(gone: list[float]) -> None:
    diagnosis = diagnose(changed(4, "weight", gone))
    (finding,) = of("gamma-vanished", diagnosis)
    assert (finding.where, finding.severity) == ("4", "warning")
    few = sum(abs(g) < 1e-3 for g in gone)
    assert finding.evidence.endswith(f"in {few} of 24 channels")


def test_scales_that_are_all_small_have_not_vanished() -> None:
    model = settled()
    for index in (1, 4):
        nn.init.uniform_(model[index].weight, 1e-4, 1e-2)
    assert of("gamma-vanished", diagnose(model)) == []


def test_momentum_of_the_other_library_is_found_both_ways() -> None:
    keras_with_torch_momentum = normlab.BatchNorm(4, convention="keras", momentum=0.1)
    torch_with_keras_momentum = nn.BatchNorm1d(4, momentum=0.99)
    for layer in (keras_with_torch_momentum, torch_with_keras_momentum):
        (finding,) = of("momentum-turned-round", diagnose(nn.Sequential(layer)))
        assert finding.severity == "serious"
    still = diagnose(nn.Sequential(nn.BatchNorm1d(4, momentum=0.0)))
    assert "takes in nothing" in of("momentum-turned-round", still)[0].evidence
    for layer in (normlab.BatchNorm(4), nn.BatchNorm1d(4), nn.BatchNorm1d(4, momentum=0.01)):
        assert of("momentum-turned-round", diagnose(nn.Sequential(layer))) == []


def test_cumulative_momentum_is_never_stale() -> None:
    diagnosis = diagnose(settled(3, momentum=None))
    assert "stale" in diagnosis.not_checked
    assert not diagnosis.serious


def test_normlabs_own_freeze_is_no_fault() -> None:
    model = nn.Sequential(normlab.BatchNorm(3).freeze(), nn.Conv2d(3, 4, 3)).train()
    rules = {f.rule for f in diagnose(model).findings}
    assert not rules & {"frozen-but-updating", "learning-but-frozen"}


def test_a_gap_names_its_cause() -> None:
    (finding, *_) = of("score-gap", gap(shift=3.0))
    assert "far from these data" in finding.evidence
    network = from_module(classifier())
    scores = normlab.three_way(classifier(), *learnable(3.0), population=learnable(3.0)[0])
    young = {"running_mean": np.full(4, 0.02), "running_var": np.full(4, 0.95)}
    stale = tuple(replace(n, decay=0.99, steps=10, **young) for n in network.normalizers)
    fresh = tuple(
        replace(n, running_mean=np.zeros(4), running_var=np.ones(4)) for n in network.normalizers
    )
    turned = tuple(replace(n, decay=0.05) for n in network.normalizers)
    for ill, cause in (
        (replace(network, normalizers=stale), "they are stale"),
        (replace(network, normalizers=fresh), "they were never updated"),
        (replace(network, normalizers=turned), "their momentum is turned round"),
        (from_module(with_dropout(first=True)), "dropout stands before a normaliser"),
        (network, "the cause is not known"),
    ):
        (finding, *_) = of("score-gap", examine(replace(ill, scores=scores)))
        assert cause in finding.evidence


def test_the_doctor_leaves_the_model_as_it_was() -> None:
    model = settled().train()
    model[4].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    x, labels = learnable()
    diagnose(model, data=(x, labels.numpy()), batch_size=20)
    assert torch.equal(torch.rand(3), expected)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_no_normaliser_is_a_finding() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    diagnosis = diagnose(
        model, data=(torch.randn(9, 3), np.zeros(9, int)), batch_size=4, accumulation=8
    )
    assert [(f.rule, f.severity) for f in diagnosis.findings] == [("no-normalizer", "note")]
    assert diagnosis.normalizers == 0
    assert "Nothing found" not in diagnosis.text()


def test_a_forward_that_cannot_be_traced_leaves_the_graph_rules_unchecked() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.bn(x) if x.sum() > 0 else x

    diagnosis = diagnose(Branching())
    assert diagnosis.not_checked["useless-bias"] == "the order of the layers"


def single_image_over(model: nn.Module, x: torch.Tensor) -> list[str]:
    found = diagnose(model, data=(x, None), batch_size=21)
    return [f.severity for f in found.findings if f.rule == "last-batch-of-one"]


def test_a_single_image_has_a_variance_over_its_pixels() -> None:
    assert single_image_over(settled(), DATA[0]) == ["warning"]
    assert single_image_over(vectors(), DATA[0].flatten(1)) == ["serious"]
    mixed = nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3))
    assert single_image_over(mixed, DATA[0]) == ["serious"]


def test_batches_of_one_are_examined_too() -> None:
    """Legal over H × W pixels, not over a vector; scores are taken with batches of two."""
    labels = torch.arange(64) % 2
    for model, x, severity, effect in (
        (settled(), DATA[0], "warning", "which is normalised by itself"),
        (vectors(), DATA[0].flatten(1), "serious", "which has no variance"),
    ):
        diagnosis = diagnose(model, data=(x, labels), batch_size=1, accumulation=4)
        (one,) = of("last-batch-of-one", diagnosis)
        assert (one.severity, one.evidence) == (severity, f"a batch is one image, {effect}")
        assert of("small-batches", diagnosis)[0].evidence == "1 image a batch"
        assert of("accumulation", diagnosis)[0].evidence.endswith("only one, of 1 image")
        assert "score-gap" in diagnosis.checked


# Premises: a rule says nothing where what it is about cannot happen.

BATCH_RULES = {"small-batches", "last-batch-of-one", "accumulation"}


def all_frozen(how: str) -> nn.Module:
    if how == "normlab":
        model = nn.Sequential(nn.Conv2d(3, 8, 3), normlab.BatchNorm(8), nn.Conv2d(8, 4, 3))
        for step in range(900):
            model[:2](pictures(4, seed=step % 9, size=4))
        model[1].freeze()
        return model
    model = settled()
    if how == "modes":
        model.train()
    for index in (1, 4):
        model[index].eval().requires_grad_(how == "modes")
    return model


@pytest.mark.parametrize("how", ["normlab", "modes", "nothing learns"])
def test_rules_on_batches_pass_frozen_normalisers_by(how: str) -> None:
    model = all_frozen(how)
    diagnosis = diagnose(model, data=(DATA[0][:33], None), batch_size=4, accumulation=4)
    assert {*diagnosis.not_checked} >= BATCH_RULES
    assert not {f.rule for f in diagnosis.findings} & {*BATCH_RULES, "useless-bias"}
    assert not diagnosis.serious


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 8), nn.InstanceNorm2d(8), nn.Identity()])
def test_rules_on_batches_pass_other_normalisers_by(norm: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU())
    diagnosis = diagnose(model, data=(DATA[0][:33], None), batch_size=4, accumulation=4)
    assert {*diagnosis.not_checked} >= BATCH_RULES
    assert not diagnosis.serious


def test_momentum_of_a_frozen_layer_is_nobodys_concern() -> None:
    layer = normlab.BatchNorm(3, momentum=0.01)
    layer(pictures(9, size=4))
    assert of("momentum-turned-round", diagnose(nn.Sequential(layer)))
    layer.freeze()
    diagnosis = diagnose(nn.Sequential(layer, nn.Conv2d(3, 2, 1)))
    assert of("momentum-turned-round", diagnosis) == []


def test_a_new_container_of_evaluated_layers_is_not_in_training() -> None:
    model = nn.Sequential(*settled().eval())
    assert model.training
    assert diagnose(model).findings == ()


def test_statistics_that_are_not_tracked_any_more() -> None:
    model = settled().train()
    model[1].track_running_stats = False
    rules = {(f.rule, f.where, f.severity) for f in diagnose(model).findings}
    assert rules == {("no-running-statistics", "1", "warning")}


def test_an_attention_mask_is_no_infinite_weight() -> None:
    model = settled()
    model.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))
    assert diagnose(model).findings == ()
    model.mask[0, 0] = torch.nan
    assert {f.where for f in of("not-finite", diagnose(model))} == {"mask"}


# A counter is a lower bound of the steps.


def resumed(steps: int, **bn: Any) -> nn.Sequential:
    """A network whose counter began anew, `steps` ago, when its old weights were loaded."""
    old = {k: v for k, v in settled(200).state_dict().items() if "num_batches" not in k}
    model = network(**bn)
    model.load_state_dict(old)
    model.train()
    with torch.no_grad():
        for step in range(steps):
            model(pictures(16, seed=step, size=8))
    return model.eval()


@pytest.mark.parametrize("data", [None, DATA])
@pytest.mark.parametrize("momentum", [0.1, 0.01])
def test_a_counter_that_began_anew_is_no_staleness(data: Any, momentum: float) -> None:
    diagnosis = diagnose(resumed(3, momentum=momentum), data=data)
    assert "stale" in diagnosis.checked
    assert diagnosis.findings == ()


def wide_layer(mean: float, var: float, steps: int) -> nn.Sequential:
    """One layer that says `mean` and `var` after `steps` updates of PyTorch's momentum."""
    layer = nn.BatchNorm1d(4)
    with torch.no_grad():
        layer.running_mean.fill_(mean)
        layer.running_var.fill_(var)
        layer.num_batches_tracked.fill_(steps)
    return nn.Sequential(layer).eval()


def severities(model: nn.Module, data: Any = None) -> list[str]:
    return [f.severity for f in of("stale", diagnose(model, data=data))]


def test_without_data_the_distance_from_0_and_1_decides() -> None:
    assert severities(wide_layer(0.1, 0.9, steps=3)) == ["serious"]
    assert severities(wide_layer(1.0, 1.5, steps=3)) == ["warning"]  # nobody can know
    assert severities(wide_layer(0.1, 0.6, steps=3)) == []  # 0.73 of 1 is more than that
    assert severities(wide_layer(2.0, 1.5, steps=3)) == []  # three batches with a mean of 7?
    assert severities(wide_layer(0.1, 0.9, steps=25)) == ["warning"]
    assert severities(wide_layer(0.1, 0.9, steps=0)) == []


def test_with_data_these_decide() -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(256, 4, generator=rng)
    assert severities(wide_layer(0.1, 0.9, steps=3), (x, None)) == []
    assert severities(wide_layer(1.0, 2.0, steps=3), (x * 1.4 + 1, None)) == []
    assert severities(wide_layer(1.0, 2.0, steps=3), (x * 9 + 4, None)) == ["serious"]


# Networks that are no plain classifiers.


@dataclass
class Output:
    loss: torch.Tensor | None
    logits: torch.Tensor


class Answering(nn.Module):
    """The settled network, with its answer in another form."""

    def __init__(self, wrap: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.inner = settled()
        self.wrap = wrap

    def forward(self, pixels: torch.Tensor) -> Any:
        return self.wrap(self.inner(pixels))


ANSWERS: dict[str, Callable[[torch.Tensor], Any]] = {
    "tuple": lambda y: (y, [y]),
    "nested": lambda y: ([None, {"out": y}], 3),
    "dictionary": lambda y: {"loss": y.sum(), "logits": y},
    "dataclass": lambda y: Output(None, y),
}
LABELS = np.arange(64) % 10


@pytest.mark.parametrize("form", ANSWERS)
@pytest.mark.parametrize("keywords", [True, False])
def test_answers_of_all_forms(form: str, keywords: bool) -> None:
    images = {"pixels": DATA[0]} if keywords else DATA[0]
    model = Answering(ANSWERS[form])
    plain = diagnose(settled(), data=(DATA[0], LABELS))
    found = diagnose(model, data=(images, torch.as_tensor(LABELS)))
    assert found.checked == plain.checked
    assert [f.evidence for f in found.findings] == [f.evidence for f in plain.findings]


def test_a_normaliser_called_by_keyword() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.bn(input=x)

    assert of("far-from-data", diagnose(Named(), data=(DATA[0] + 9, None)))


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (DATA[0], LABELS[:10], r"labels of shape \(10,\) for 64 images"),
        (DATA[0], np.eye(10)[LABELS], "argmax"),
        (DATA[0], LABELS + 0.5, "type float64"),
        (DATA[0], LABELS + 7, "from 7 to 16 for a network of 10 classes"),
        (DATA[0], LABELS - 1, "from -1 to 8"),
        (DATA[0][:, :2], LABELS, "fails on these images"),
        ({"picture": DATA[0]}, None, "unexpected keyword argument"),
        ({"a": DATA[0], "b": DATA[0][:3]}, None, "same number"),
        ({}, None, "as a torch.Tensor"),
        (np.zeros((4, 3, 8, 8)), None, "as a torch.Tensor"),
        (DATA[0] * torch.nan, None, "NaN"),
        (DATA[0][:1], None, "two or more"),
    ],
)
def test_data_that_do_not_fit_are_refused_in_one_line(
    images: Any, labels: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        diagnose(settled(), data=(images, labels))
    assert len(str(caught.value).splitlines()) == 1


def test_networks_that_cannot_be_scored_are_refused_in_one_line() -> None:
    data = (DATA[0], LABELS)
    with pytest.raises(UserError, match=r"holds no tensor"):
        diagnose(Answering(lambda y: y.tolist()), data=data)
    with pytest.raises(UserError, match=r"scores take \(N, K\)"):
        diagnose(Answering(lambda y: y[:, :, None]), data=data)
    for wrap in (lambda y: y.tolist(), lambda y: y[:, :, None]):
        assert "far-from-data" in diagnose(Answering(wrap), data=(DATA[0], None)).checked


def test_networks_without_values_are_refused_in_one_line() -> None:
    with pytest.raises(UserError, match="lazy layers"):
        diagnose(nn.Sequential(nn.Conv2d(3, 4, 3), nn.LazyBatchNorm2d()))
    with pytest.raises(UserError, match="'meta'"), torch.device("meta"):
        diagnose(network())
    with pytest.raises(UserError, match="a dict cannot be examined"):
        doctor({"weight": torch.zeros(3)})
    with pytest.raises(UserError, match="of 1 parts"):
        diagnose(settled(), data=(DATA[0],))


class Fixed(nn.Module):
    """Somebody's own normaliser, of no class that is known."""

    def __init__(self, var: float) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(3) + 0.1)
        self.register_buffer("running_var", torch.full((3,), var))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = (self.running_var + 1e-5).rsqrt()
        return (x - self.running_mean[:, None, None]) * scale[:, None, None]


@pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated:DeprecationWarning")
def test_normalisers_of_other_classes_are_read_by_their_statistics() -> None:
    assert diagnose(nn.Sequential(Fixed(0.5), nn.ReLU())).findings == ()
    found = of("variance-not-positive", diagnose(nn.Sequential(Fixed(-0.5), nn.ReLU())))
    assert [f.where for f in found] == ["0"]
    scripted = torch.jit.trace(changed(1, "running_var", -1.0).eval(), DATA[0])
    assert [f.where for f in of("variance-not-positive", diagnose(scripted))] == ["1"]


def test_what_was_assumed_is_told_when_nothing_is_found(tmp_path: Path) -> None:
    torch.save(settled().state_dict(), tmp_path / "healthy.pt")
    diagnosis = doctor(tmp_path / "healthy.pt")
    assert diagnosis.findings == ()
    assert "momentum 0.1 and eps 1e-5" in diagnosis.text(width=1000)
    assert diagnosis.as_dict()["assumes"]
    assert diagnose(settled()).assumes == ""
