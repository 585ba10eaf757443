"""What a machine is called in a result."""

from pathlib import Path

import pytest

from normlab.core import machine

VIRTUAL = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 26
model\t\t: 2
model name\t: AMD EPYC
flags\t\t: fpu vme

processor\t: 1
model name\t: another
"""


@pytest.mark.parametrize(
    ("said", "name", "model"),
    [
        (VIRTUAL, "AMD EPYC", "family 26, model 2"),
        ("model name\t: POWER9\n", "POWER9", ""),
        ("processor\t: 0\nBogoMIPS\t: 50.00\n", "aarch64", ""),  # as on Arm
        (None, "aarch64", ""),
    ],
)
def test_a_processor_is_told_from_its_other_generations(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: str | None, name: str, model: str
) -> None:
    if said is not None:
        (tmp_path / "cpuinfo").write_text(said)
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(machine.sys, "platform", "linux")
    monkeypatch.setattr(machine.platform, "processor", lambda: "aarch64")
    assert machine.cpu_name() == name
    assert machine.cpu_model() == model


def test_what_changes_results_is_told() -> None:
    environment = {
        **{"normlab": "0.1.0", "code_sha256": 8 * "1a2b3c4d", "torch": "2.13.0", "threads": 2},
        **{"cpu": "A Xeon", "cpu_model": "family 6", "cpu_capability": "AVX512", "cores": 2},
    }
    assert machine.told(environment | {"amx": True}) == (
        "normlab 0.1.0 (code 1a2b3c4d), PyTorch 2.13.0, NumPy None, Python None, "
        "A Xeon (family 6, AVX512, AMX, 2 cores), 2 threads a run"
    )
    assert "AMX" not in machine.told(environment | {"amx": False})
    assert "code" not in machine.told({**environment, "code_sha256": ""})
