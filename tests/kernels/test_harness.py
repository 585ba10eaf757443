"""The kernels in plain C: clean under sanitizers on every instruction set, right on Arm."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import normlab
from normlab import kernels

KERNELS = Path(normlab.__file__).parent / "kernels"
HARNESS = Path(__file__).parent / "harness.c"
SANITIZED = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover"]
X86 = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma"],
    "avx2": ["-mavx2", "-mfma"],
    "default": [],
}
ARM, EMULATOR = "aarch64-linux-gnu-gcc", ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"]


def build(folder: Path, compiler: str, *flags: str) -> Path:
    sources = [HARNESS, *(path for path in KERNELS.glob("*.c") if path.name != "kernels.c")]
    program = folder / "harness"
    command = [compiler, "-std=gnu11", "-Wall", "-fopenmp", f"-I{KERNELS}", *flags]
    subprocess.run([*command, "-o", program, *sources, "-lm"], check=True, timeout=300)
    return program


def run(*command: str | Path) -> str:
    """What the program prints; leaks cannot be looked for under an emulator."""
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"} if len(command) > 2 else None
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def comparisons(said: str) -> int:
    return int(said.split(" comparisons held")[0])


@pytest.mark.soak
@pytest.mark.skipif(not shutil.which("gcc"), reason="no gcc")
@pytest.mark.parametrize("variant", X86)
def test_kernels_are_right_and_clean_under_sanitizers(tmp_path: Path, variant: str) -> None:
    cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    if not all(flag[2:] in cpu for flag in X86[variant]):
        pytest.skip(f"this processor has no {variant}")
    assert comparisons(run(build(tmp_path, "gcc", *SANITIZED, *X86[variant]), "10")) > 200


@pytest.mark.soak
@pytest.mark.skipif(not shutil.which("gcc"), reason="no gcc")
def test_products_in_tiles_of_amx_are_right(tmp_path: Path) -> None:
    """Under an emulation of the tiles, as hardly any processor has them; all others are real."""
    if "avx512_bf16" not in Path("/proc/cpuinfo").read_text(encoding="utf-8"):
        pytest.skip("this processor has no AVX512-BF16")
    emulated = ["-include", str(HARNESS.parent / "emulated_amx.h")]
    said = run(build(tmp_path, "gcc", *SANITIZED, *X86["avx512"], *emulated), "10")
    if kernels.available() and not kernels.has_bfloat16():
        pytest.skip("this compiler has no AVX512-BF16")
    assert " 160 of AMX, " in said


@pytest.mark.soak
@pytest.mark.skipif(
    not (shutil.which(ARM) and shutil.which(EMULATOR[0])), reason="no compiler or emulator for Arm"
)
@pytest.mark.parametrize("flags", [["-O3", "-fno-math-errno", "-fno-trapping-math"], SANITIZED])
def test_kernels_are_right_on_arm(tmp_path: Path, flags: list[str]) -> None:
    said = run(*EMULATOR, build(tmp_path, ARM, *flags), "4")
    assert comparisons(said) > 80
    assert "vectors of 4" in said


@pytest.mark.soak
@pytest.mark.skipif(not shutil.which("gcc"), reason="no gcc")
def test_the_harness_sees_a_wrong_constant(tmp_path: Path) -> None:
    wrong = tmp_path / "kernels"
    shutil.copytree(KERNELS, wrong, ignore=shutil.ignore_patterns("*.so", "*.py", "__pycache__"))
    source = (wrong / "winograd4.c").read_text(encoding="utf-8")
    assert "2.5f * d[2]" in source
    (wrong / "winograd4.c").write_text(source.replace("2.5f * d[2]", "2.4999f * d[2]", 1))
    program = tmp_path / "harness"
    sources = [HARNESS, *(path for path in wrong.glob("*.c") if path.name != "kernels.c")]
    command = ["gcc", "-std=gnu11", "-O1", "-fopenmp", f"-I{wrong}", "-o", program, *sources, "-lm"]
    subprocess.run(command, check=True, timeout=300)
    done = subprocess.run([program, "10"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "convolution: off by" in done.stdout
