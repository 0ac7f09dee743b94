"""Reports: no mixed machines, regressions marked, and the README shows what was measured."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import latency, report, tables
from benchmarks.machine import slug
from benchmarks.results import RESULTS, load
from benchmarks.tables import markdown, ratio

MACHINE = {
    "machine": "x86_64",
    "cpu": {"brand_raw": "Some(R) CPU @ 2GHz"},
    "deqfuse": {
        "threads": 2,
        "products": "float32",
        "gpu": None,
        "versions": {"deqfuse": "0.1.0", "torch": "2.13.0"},
        "instruction_set": "avx512",
        "compiler": "c++ 12",
        "matmul_rates": {"F.linear": 1e11, "deqfuse kernel, in a solve": 2e11},
        "bandwidth": 1e10,
    },
}
SECONDS = {"deqfuse-cpu": 0.01, "torchdeq": 0.05, "released": 0.04}


def entry(variant: str, quantity: str, seconds: float) -> dict[str, Any]:
    facts = {
        "kind": "speed", "regime": "tolerance", "quantity": quantity, "variant": variant,
        "case": {"name": "small", "rows": 32, "modalities": 3, "dim": 64}, "tol": 1e-4,
        "nfe_cells": 5.0, "nfe_fuse": 4.0, "residual": 1e-5, "solved": 1.0, "error": 1e-6,
        "gradient_error": 1e-5, "flops": {"forward": 1e8, "backward": 3e8}, "bytes": 1e6,
        "linear_rate": 1e11, "kernel_rate": 3e11,
    }  # fmt: skip
    name = f"test_speed[tolerance-small-{quantity}-{variant}]"
    data = [seconds * (1 + 0.01 * i) for i in range(5)]
    group = f"tolerance small {quantity}"
    return {
        "name": name,
        "fullname": name,
        "group": group,
        "stats": {"data": data},
        "extra_info": facts,
    }


def raw() -> dict[str, Any]:
    return {
        "machine_info": copy.deepcopy(MACHINE),
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "datetime": "2026-01-01T00:00:00",
        "benchmarks": [
            entry(variant, quantity, seconds)
            for variant, seconds in SECONDS.items()
            for quantity in ("forward", "step")
        ],
        "refused": [],
    }


def saved(path: Path, run: dict[str, Any]) -> Path:
    path.write_text(json.dumps(run))
    return path


def test_machine_is_named_by_processor_and_threads() -> None:
    assert slug(MACHINE) == "some-cpu-2ghz-2-threads"
    rounded = {**MACHINE, "deqfuse": {**MACHINE["deqfuse"], "products": "TF32"}}
    assert slug(rounded) == "some-cpu-2ghz-2-threads-tf32"


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("machine", lambda run: run["machine_info"]["cpu"].update(brand_raw="Another CPU")),
        ("machine", lambda run: run["machine_info"]["deqfuse"].update(threads=1)),
        ("machine", lambda run: run["machine_info"]["deqfuse"].update(instruction_set="avx2")),
        ("versions", lambda run: run["machine_info"]["deqfuse"]["versions"].update(torch="2.12")),
        ("commit", lambda run: run["commit_info"].update(id="fedcba")),
    ],
)
def test_runs_of_different_origin_are_not_mixed(tmp_path: Path, what: str, change: Any) -> None:
    other = raw()
    change(other)
    paths = [saved(tmp_path / "a.json", raw()), saved(tmp_path / "b.json", other)]
    with pytest.raises(ValueError, match=f"{what} .* not mixed"):
        load(paths)


def test_runs_of_one_machine_are_joined(tmp_path: Path) -> None:
    first, second = raw(), raw()
    first["benchmarks"], second["benchmarks"] = first["benchmarks"][::2], first["benchmarks"][1::2]
    run = load([saved(tmp_path / "a.json", first), saved(tmp_path / "b.json", second)])
    assert len(run.entries) == len(raw()["benchmarks"])


def test_samples_of_different_runs_are_not_paired(tmp_path: Path) -> None:
    """One variant from one run and its rival from another were never in the same turn."""
    first, second = raw(), raw()
    first["benchmarks"], second["benchmarks"] = first["benchmarks"][:2], first["benchmarks"][2:]
    with pytest.raises(ValueError, match="not from the same turns"):
        load([saved(tmp_path / "a.json", first), saved(tmp_path / "b.json", second)])


def test_foreign_json_is_refused(tmp_path: Path) -> None:
    foreign = raw()
    del foreign["machine_info"]["deqfuse"]
    with pytest.raises(ValueError, match="a run of this suite"):
        load([saved(tmp_path / "a.json", foreign)])


def test_page_says_ratio_spread_and_floor(tmp_path: Path) -> None:
    run = load([saved(tmp_path / "a.json", raw())])
    entries = run.by_variant("speed", "small", regime="tolerance", quantity="forward")
    assert ratio(entries, "torchdeq", "deqfuse-cpu") == "**5** (5-5)"
    text = report.page(run, [])
    # 1e8 flops at the best rate, 2e11, are 0.5 ms of the 10.2 ms median.
    assert "| small | (32, 3, 64) | 5 | 10.2 (10.1-10.3) | **5** (5-5) | **4** (4-4) |" in text
    assert "| 0.5 | 4.9% |" in text
    assert "0123456789ab" in text
    assert "torch 2.13.0" in text


def test_the_page_has_latencies_where_they_were_measured(tmp_path: Path) -> None:
    run = raw()
    assert "Latency" not in report.page(load([saved(tmp_path / "a.json", run)]), [])
    for variant, seconds in (("deqfuse-cpu", 2e-4), (latency.PREPARED, 1e-4), ("F.linear", 3e-4)):
        own: dict[str, Any] = copy.deepcopy(entry(variant, "latency", seconds))
        own["extra_info"] = {
            "kind": "latency", "variant": variant, "threads": 1, "products": 10,
            "case": {"name": "tiny", "rows": 3, "modalities": 2, "dim": 16},
            "flops": 1e6, "bytes": 1e6, "rate": 1e11, "bandwidth": 1e11,
        }  # fmt: skip
        own["group"] = "latency tiny threads=1"
        run["benchmarks"].append(own)
    text = report.page(load([saved(tmp_path / "a.json", run)]), [])
    # Samples are 1.00 to 1.04 times as long: the median is the third of five, 99% the last.
    assert "| (3, 2, 16) | 1 | 204 / 208 | 102 / 104 | 306 / 312 | 10 | 10 |" in text


def test_factors_of_the_ratio_multiply_to_it(tmp_path: Path) -> None:
    """5 times: 9 evaluations for 4.75, half as many products in all, a kernel 3 times as fast."""
    changed = raw()
    for b in changed["benchmarks"]:
        if b["extra_info"]["variant"] == "torchdeq":
            b["extra_info"] |= {"nfe_fuse": 9.0, "flops": {"forward": 4e8, "backward": 3e8}}
    table = tables.origin_table(load([saved(tmp_path / "a.json", changed)]))
    # 9 / 4.75, 4 / 1.895, 3e11 / 1e11, 5 / (4 * 3)
    assert "| small | 5 | 1.89 | 2.11 | 3 | 0.417 | 300 / 100 |" in table


def test_every_regime_shows_the_floor(tmp_path: Path) -> None:
    changed = raw()
    for regime, b in zip(("equal-error", "torch-init"), changed["benchmarks"][:2], strict=False):
        b["extra_info"] |= {"regime": regime, "quantity": "forward"}
    run = load([saved(tmp_path / "a.json", changed)])
    for regime in ("equal-error", "torch-init"):
        assert "| 0.5 | 4.9% |" in tables.speed_table(run, regime, "forward")


def test_refused_variants_are_listed(tmp_path: Path) -> None:
    wrong = raw()
    wrong["refused"] = [
        {"variant": "released", "case": "small", "regime": "tolerance", "reason": "residual 1"}
    ]
    wrong["benchmarks"] = [b for b in wrong["benchmarks"] if "released" not in b["name"]]
    text = report.page(load([saved(tmp_path / "a.json", wrong)]), [])
    assert "| small | tolerance | released | residual 1 |" in text


def test_compare_marks_regressions_and_corrects_drift(tmp_path: Path) -> None:
    """Everything takes twice as long: the machine. Only ours: a regression."""
    old = load([saved(tmp_path / "old.json", raw())])

    def scaled(factors: dict[str, float]) -> Any:
        run = raw()
        for b in run["benchmarks"]:
            factor = factors.get(b["extra_info"]["variant"], 1.0)
            b["stats"]["data"] = [factor * s for s in b["stats"]["data"]]
        return load([saved(tmp_path / "new.json", run)])

    text, found = report.compare(scaled(dict.fromkeys(SECONDS, 2.0)), old)
    assert found == 0
    assert "corrected for: 2.00" in text
    text, found = report.compare(scaled({"deqfuse-cpu": 1.3}), old)
    assert found == 2  # forward and step
    assert text.count("**regression**") == 2
    assert report.compare(scaled({"deqfuse-cpu": 0.5}), old)[1] == 0


def test_compare_reports_what_is_missing_or_refused(tmp_path: Path) -> None:
    old, new = raw(), raw()
    new["benchmarks"] = [b for b in new["benchmarks"] if "step-deqfuse-cpu" not in b["name"]]
    refusal = {"case": "small", "regime": "tolerance", "reason": "gradient off"}
    new["refused"] = [{"variant": "deqfuse-cpu", **refusal}, {"variant": "released", **refusal}]
    runs = [load([saved(tmp_path / f"{i}.json", r)]) for i, r in enumerate((new, old))]
    text, found = report.compare(*runs)
    assert found == 1  # ours
    assert "Measured before and not now: tolerance small step deqfuse-cpu" in text
    assert "| small | tolerance | deqfuse-cpu | gradient off |" in text


def test_compare_refuses_another_machine(tmp_path: Path) -> None:
    other = raw()
    other["machine_info"]["deqfuse"]["threads"] = 1
    runs = [load([saved(tmp_path / f"{i}.json", r)]) for i, r in enumerate((raw(), other))]
    with pytest.raises(ValueError, match="not compared"):
        report.compare(*runs)


def test_report_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "run.json", raw())
    monkeypatch.setattr("sys.argv", ["report", str(path), "--out", str(tmp_path / "out")])
    assert report.main() == 0
    folder = tmp_path / "out" / "some-cpu-2ghz-2-threads"
    assert {p.name for p in folder.iterdir()} == {
        "README.md", "run.json", "speedup.png", "roofline.png",
    }  # fmt: skip
    assert load([folder / "run.json"]).entries == load([path]).entries


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    ("goal", "bench", "passed_on", "readme", "out"),
    [
        ("bench", "", "", True, False),
        ("bench-full", "", "--full", True, False),
        ("bench-full", "--threads 1", "--full --threads 1", False, False),
        ("bench", "-k brca", "-k brca", False, True),
    ],
)
def test_make_passes_on_what_was_asked_for(
    goal: str, bench: str, passed_on: str, readme: bool, out: bool
) -> None:
    command = ["make", "-n", goal, "VENV=none", f"PYTHON={sys.executable}"]
    command += [f"BENCH={bench}"] if bench else []
    root = report.README.parent
    text = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True).stdout
    line = next(line for line in text.splitlines() if "--benchmark-json" in line)
    assert line.partition(".json ")[2].partition(";")[0].split() == passed_on.split()
    assert ("--readme" in text) == readme
    assert ("--out build/results" in text) == out
    assert text.index("rm -f build/bench") < text.index("--benchmark-json")


def test_readme_block_is_replaced(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- benchmarks: none -->\nold\n<!-- end of benchmarks -->\nb\n")
    run = load([saved(tmp_path / "run.json", raw())])
    report.update_readme(run, readme)
    text = readme.read_text()
    assert text == f"a\n{report.readme_block(run)}\nb\n"
    assert "old" not in text
    assert "| (32, 3, 64) | x 5 (10.2 ms) | x 5 (10.2 ms) | - |" in text
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="found none"):
        report.update_readme(run, readme)


def test_readme_agrees_with_the_saved_results() -> None:
    """``python -m benchmarks.report --readme`` was run after the last measurement."""
    shown = report.BLOCK.search(report.README.read_text(encoding="utf-8"))
    assert shown is not None
    path = RESULTS / shown["machine"] / "run.json"
    if not RESULTS.exists():
        pytest.skip("this tree comes without benchmarks/results")
    run = load([path])
    assert shown[0] == report.readme_block(run)
    assert path.parent.name == run.slug


def test_saved_pages_agree_with_the_saved_results() -> None:
    for path in RESULTS.glob("*/run.json"):
        pictures = [p.name for p in path.parent.glob("*.png")]
        page = (path.parent / "README.md").read_text(encoding="utf-8")
        assert page == report.page(load([path]), pictures), path


def test_empty_tables_say_so() -> None:
    assert markdown(["a"], []) == "Not measured in this run."


def test_suite_saves_benchmark_json_that_the_report_reads(tmp_path: Path) -> None:
    """One quick benchmark in a process of its own; its clock replays the sample exactly."""
    pytest.importorskip("pytest_benchmark")
    path = tmp_path / "run.json"
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-quiet", "-q"]
    command += [f"--benchmark-json={path}", "-k", "residual_per_step and Picard", "--threads", "1"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=report.README.parent)
    assert result.returncode == 0, result.stdout + result.stderr
    run = load([path])
    assert [e.facts["init"] for e in run.select("residuals")] == ["contractive", "torch"]
    assert [e.samples for e in run.entries] == [[1.0], [1.0]]
    assert run.machine["threads"] == 1
    assert "| case |" not in report.page(run, [])  # nothing else was measured, and nothing is shown
    with pytest.raises(ValueError, match="Remedy: make bench"):
        report.readme_block(run)
