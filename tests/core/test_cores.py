"""How many cores a container allows, and whether others are at work on them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from normlab.core import cores as module
from normlab.core.cores import cores, quotas


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, []),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, [1.5]),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, []),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/cpu.max": "max 100000",
                "sys/fs/cgroup/a/cpu.max": "300000 100000",
            },
            [3],
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/docker/x\n2:cpuset:/y\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            [0.5],
        ),
        (
            {
                "proc/self/cgroup": "1:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            [],
        ),
        ({"proc/self/cgroup": "nonsense\n0::/\n", "sys/fs/cgroup/cpu.max": "a lot"}, []),
    ],
)
def test_quotas_of_both_versions(
    tmp_path: Path, files: dict[str, str], expected: list[float]
) -> None:
    assert list(quotas(tree(tmp_path, files))) == expected


@pytest.mark.parametrize(("quota", "expected"), [(0.2, 1), (1, 1), (1.5, 2), (999, 3)])
def test_the_smallest_limit_counts(
    monkeypatch: pytest.MonkeyPatch, quota: float, expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 5}, raising=False)
    monkeypatch.setattr(module, "quotas", lambda: [quota])
    assert cores() == expected


ASKED = """
import os
from normlab.core.cores import spare_others
spare_others()
print(os.environ.get("GOMP_SPINCOUNT"))
"""


def asked(**environment: str) -> str:
    cleared = {
        k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    result = subprocess.run(
        [sys.executable, "-c", ASKED], capture_output=True, text=True, env=cleared | environment
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.skipif(not module.LOADAVG.exists(), reason="no /proc/loadavg here")
def test_beside_real_busy_programs_threads_sleep_sooner() -> None:
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cores())]
    try:
        assert asked() == module.AWAKE
        assert asked(GOMP_SPINCOUNT="7") == "7"
        assert asked(OMP_WAIT_POLICY="active") == "None"
    finally:
        for process in busy:
            process.kill()
            process.wait()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.1 0.2 0.3 1/79 100\n", False),
        ("0.1 0.2 0.3 2/79 100\n", True),
        ("0.1 0.2 0.3 9/79 100\n", True),
        ("", False),
        ("0.1 0.2 0.3 many 100\n", False),
        (None, False),
    ],
)
def test_others_are_counted_from_what_linux_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, expected: bool
) -> None:
    file = tmp_path / "loadavg"
    if text is not None:
        file.write_text(text)
    monkeypatch.setattr(module, "LOADAVG", file)
    monkeypatch.setattr(module, "cores", lambda: os.cpu_count() or 1)
    assert module.crowded() is expected


def test_a_few_cores_of_many_leave_room_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loadavg").write_text("0.1 0.2 0.3 5/79 100\n")
    monkeypatch.setattr(module, "LOADAVG", tmp_path / "loadavg")
    monkeypatch.setattr(module, "cores", lambda: 4)
    for of, expected in ((8, False), (7, True)):
        monkeypatch.setattr(os, "cpu_count", lambda of=of: of)
        assert module.crowded() is expected
