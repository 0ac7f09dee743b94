"""What the proof on a GPU consists of: parts, what each needs, and where programs are found."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

PYTHON = sys.executable
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
PASSED = r"[1-9]\d* passed"  # and not all skipped, which pytest finds fine
# Child processes that a benchmark starts keep torch's default; those of test_speed.py are none.
TF32_PYTEST = (
    "import sys, pytest, torch; torch.backends.cuda.matmul.fp32_precision = 'tf32'; "
    "sys.exit(pytest.main(sys.argv[1:]))"
)
NCU_SECTIONS = ("SpeedOfLight", "Occupancy", "LaunchStats", "ComputeWorkloadAnalysis")


@dataclass(frozen=True)
class Part:
    """Commands that run one after the other, whatever the ones before gave."""

    name: str
    commands: Sequence[Sequence[str]]
    programs: Sequence[str] = ()  # that must be there
    modules: Sequence[str] = ()
    environment: dict[str, str] = field(default_factory=dict)
    says: str = ""  # a pattern without which the log is no proof
    leaves: Sequence[str] = ()  # files in the checkout, without which it counts as not done
    optional: bool = False  # not needed for exit status 0


def all_parts(out: Path, gpu: dict[str, str]) -> list[Part]:
    """In the order in which they run; each is to take less than ten minutes."""
    pytest = [PYTHON, "-m", "pytest", "-p", "no:cacheprovider", "--durations=5"]
    files = {"tests-solves": "test_triton_gpu", "tests-steps": "test_triton_gpu_steps"}
    tests = [
        Part(
            name,
            [[*pytest, "-m", "gpu and not slow", f"tests/triton/{file}.py"]],
            modules=["pytest"],
            says=PASSED,
        )
        for name, file in files.items()
    ]
    others = ["tests", *(f"--ignore=tests/triton/{file}.py" for file in files.values())]
    tests += [
        Part(
            "tests-cuda",
            [[*pytest, "-m", "gpu and not slow", *others]],
            modules=["pytest"],
            says=PASSED,
        ),
        Part(
            "tests-slow",
            [[*pytest, "-m", "gpu and slow", "tests"]],
            modules=["pytest"],
            says=PASSED,
        ),
    ]
    tests += [replace(part, name=part.name.replace("-", "-again-")) for part in tests]
    kernels = [PYTHON, "-m", "tools.gpu_kernels"]
    sanitizer = find_program("compute-sanitizer") or "compute-sanitizer"
    sanitizers = [
        Part(
            f"sanitize-{tool}",
            [[sanitizer, "--tool", tool, "--error-exitcode", "99", *kernels]],
            programs=["compute-sanitizer"],
            # torch's allocator hides accesses out of bounds, and memory that was never written.
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            says=r"(?s)every kernel ran.*(ERROR|RACECHECK) SUMMARY: 0 (errors|hazards)",
        )
        for tool in SANITIZERS
    ]
    profile = [PYTHON, "-m", "benchmarks.gpu_profile"]
    save = f"--benchmark-json={out}/bench-"
    bench = ["-q", "--benchmark-quiet", "--device", "cuda"]
    report = [PYTHON, "-m", "benchmarks.report", "--out", f"{out}/results"]
    needed = ["pytest", "pytest_benchmark", "matplotlib"]
    ncu = find_program("ncu") or "ncu"
    counters = [ncu, "--clock-control", "none", "--csv", "--log-file", f"{out}/ncu.csv"]
    counters += ["--kernel-name", "regex:solve_|residual_cell|purify_combine|anderson_step|adjoint"]
    counters += [word for section in NCU_SECTIONS for word in ("--section", section)]
    return [
        Part(
            "build",
            [[PYTHON, "setup.py", "-q", "build_ext", "--inplace"]],
            programs=["nvcc"],
            modules=["setuptools"],
            environment={"DEQFUSE_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": gpu["capability"]},
            leaves=["deqfuse/_cuda.so", "deqfuse/_cpu.so"],
        ),
        # Also what the sanitizers need compiled before they start.
        Part("kernels", [kernels], says=r"every kernel ran"),
        *tests,
        *sanitizers,
        Part("profile-float32", [[*profile, "--json", f"{out}/profile-float32.json"]]),
        Part("profile-tf32", [[*profile, "--tf32", "--json", f"{out}/profile-tf32.json"]]),
        Part(
            "bench-float32",
            [
                [PYTHON, "-m", "pytest", "benchmarks", *bench, f"{save}float32.json"],
                [*report, f"{out}/bench-float32.json"],
            ],
            modules=needed,
        ),
        Part(
            "bench-tf32",
            [
                [PYTHON, "-c", TF32_PYTEST, "benchmarks/test_speed.py", *bench, f"{save}tf32.json"],
                [*report, f"{out}/bench-tf32.json"],
            ],
            modules=needed,
        ),
        Part("ncu", [[*counters, *profile, "--once"]], programs=["ncu"], optional=True),
    ]


def find_program(name: str) -> str | None:
    """On PATH, or in a CUDA toolkit."""
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda", *_globbed("/usr/local", "cuda-*")]
    homes += _globbed("/opt/nvidia/nsight-compute", "*")
    places = [f"{home}/{place}" for home in homes if home for place in ("bin", name, "")]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(places))


def _globbed(folder: str, pattern: str) -> list[str]:
    """Newest version first: cuda-12.10 before cuda-12.9."""
    found = map(str, Path(folder).glob(pattern))
    return sorted(found, key=lambda path: [int(n) for n in re.findall(r"\d+", path)], reverse=True)


def find_gpu() -> dict[str, str] | str:
    """Name and compute capability of the first GPU, and what compiles for it, or why there is none.

    Asked in a process of its own, so that none of the GPU's memory is taken here.
    """
    ask = (
        "import torch, json, importlib.metadata as m; ok = torch.cuda.is_available(); "
        "why = 'sees none' if torch.version.cuda else 'is built without CUDA'; "
        "print(json.dumps({'name': torch.cuda.get_device_name(), 'torch': torch.__version__, "
        "'triton': next((d.version for d in m.distributions(name='triton')), 'none'), "
        "'capability': '.'.join(map(str, torch.cuda.get_device_capability()))} if ok "
        "else f'torch {torch.__version__} {why}'))"
    )
    answer = subprocess.run([PYTHON, "-c", ask], capture_output=True, text=True)
    if answer.returncode != 0:
        return f"{PYTHON} cannot ask torch: {(answer.stderr.strip() or '?').splitlines()[-1]}"
    found: dict[str, str] | str = json.loads(answer.stdout.splitlines()[-1])
    if isinstance(found, dict) and (nvcc := find_program("nvcc")):
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
        found["nvcc"] = said.stdout.strip()
    return found


def missing(part: Part) -> str | None:
    """What the part cannot do without, or None."""
    lacking = [f"no {name} on PATH or in a CUDA toolkit" for name in part.programs
               if find_program(name) is None]  # fmt: skip
    lacking += [f"{PYTHON} has no {name}" for name in part.modules
                if importlib.util.find_spec(name) is None]  # fmt: skip
    return "; ".join(lacking) or None
