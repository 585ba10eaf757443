"""How many cores there are where a container allows fewer than the machine has."""

import os
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
