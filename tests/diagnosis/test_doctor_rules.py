"""Each rule of the doctor accuses an ill model, and leaves a healthy one in peace."""

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
from normlab.diagnosis.patient import FACTS
from normlab.diagnosis.rule import Rule

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


def forgetful(momentum: float) -> nn.Sequential:
    return settled(momentum=momentum)


@dataclass(frozen=True)
class Case:
    """An ill model and a healthy one, and where and how the ill one is ill."""

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
        lambda: diagnose(network()), healthy, "1", "serious", "running_var 1 after 0 batches"
    ),
    "stale": Case(
        lambda: diagnose(settled(24, momentum=0.01)),
        lambda: diagnose(settled(24, momentum=0.5)),
        "1",
        "serious",
        "after 24 steps with m = 0.99 they weigh 0.79",
    ),
    "updated-unequally": Case(
        lambda: diagnose(unequal()), healthy, "1", "warning", "updated 80 times, others 81 times"
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
    "last-batch-of-one": Case(
        lambda: diagnose(settled(), data=DATA, batch_size=21),
        lambda: diagnose(settled(), data=DATA, batch_size=20),
        "batches",
        "serious",
        "leave one image over",
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
    "score-gap": Case(
        lambda: gap(shift=3.0),
        lambda: gap(shift=0.0),
        "model",
        "serious",
        "with running statistics",
    ),
}


WORST = {rule.id: rule.worst for rule in RULES}


def of(rule: str, diagnosis: Diagnosis) -> list[Finding]:
    assert rule in diagnosis.checked
    return [f for f in diagnosis.findings if f.rule == rule]


@pytest.mark.parametrize("rule", CASES)
def test_the_ill_are_accused(rule: str) -> None:
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
def test_the_healthy_are_not_accused(rule: str) -> None:
    assert of(rule, CASES[rule].healthy()) == []


@pytest.mark.parametrize("opset", [9, 17])
def test_training_mode_exported(tmp_path: Path, opset: int) -> None:
    rule = "training-mode-exported"
    ill = of(rule, doctor(exported(tmp_path / "ill.onnx", training=True, opset=opset)))
    assert [(f.where, f.severity) for f in ill] == [("bn", "serious")]
    healthy_graph = exported(tmp_path / "healthy.onnx", training=False, opset=opset)
    assert of(rule, doctor(healthy_graph)) == []


def test_a_healthy_model_has_no_findings_at_all() -> None:
    diagnosis = healthy()
    assert diagnosis.findings == ()
    assert not diagnosis.serious


def test_every_rule_has_its_case_and_its_line_in_the_docs() -> None:
    tested = {*CASES, "training-mode-exported", "no-normalizer", "not-read"}
    assert {r.id for r in RULES} == tested
    text = DOCS.read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert rows == [row(r) for r in RULES]


def row(rule: Rule) -> str:
    """A rule's line in docs/doctor.md."""
    name = {
        "no-normalizer": "test_a_file_without_normalisers_is_never_called_healthy",
        "not-read": "test_what_could_not_be_read_is_counted",
    }.get(rule.id, "test_training_mode_exported")
    if rule.id in CASES:
        name = f"test_the_ill_are_accused[{rule.id}]"
    needs = ", ".join(FACTS[need] for need in rule.needs)
    return f"| `{rule.id}` | {rule.title} | {rule.worst} | {needs} | `{name}` |"


def test_a_zero_variance_everywhere_is_serious_but_one_dead_channel_is_not() -> None:
    everywhere = diagnose(changed(1, "running_var", [0.0] * 16))
    assert [f.severity for f in of("variance-not-positive", everywhere)] == ["serious"]
    one = diagnose(changed(1, "running_var", 0.0))
    assert of("variance-not-positive", one) == []
    assert [f.severity for f in of("constant-channel", one)] == ["note"]


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


def test_normlabs_own_freeze_is_no_illness() -> None:
    model = nn.Sequential(normlab.BatchNorm(3).freeze(), nn.Conv2d(3, 4, 3)).train()
    rules = {f.rule for f in diagnose(model).findings}
    assert not rules & {"frozen-but-updating", "learning-but-frozen"}


def test_a_gap_names_its_cause() -> None:
    (finding, *_) = of("score-gap", gap(shift=3.0))
    assert "far from these data" in finding.evidence
    patient = from_module(classifier())
    scores = normlab.three_way(classifier(), *learnable(3.0), population=learnable(3.0)[0])
    stale = tuple(replace(n, old_weight=0.99, steps=10) for n in patient.normalizers)
    fresh = tuple(
        replace(n, running_mean=np.zeros(4), running_var=np.ones(4)) for n in patient.normalizers
    )
    turned = tuple(replace(n, old_weight=0.05) for n in patient.normalizers)
    for ill, cause in (
        (replace(patient, normalizers=stale), "they are stale"),
        (replace(patient, normalizers=fresh), "they were never updated"),
        (replace(patient, normalizers=turned), "their momentum is turned round"),
        (from_module(with_dropout(first=True)), "dropout stands before a normaliser"),
        (patient, "the cause is not known"),
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


def test_a_model_without_normalisers_is_not_accused_of_any() -> None:
    diagnosis = diagnose(nn.Sequential(nn.Linear(3, 2)), data=(torch.randn(8, 3), None))
    assert {f.rule for f in diagnosis.findings} == {"no-normalizer"}
    assert diagnosis.normalizers == 0


def test_a_forward_that_cannot_be_traced_leaves_the_graph_rules_unchecked() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.bn(x) if x.sum() > 0 else x

    diagnosis = diagnose(Branching())
    assert diagnosis.not_checked["useless-bias"] == "the order of the layers"
