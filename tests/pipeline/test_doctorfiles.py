# SPDX-License-Identifier: Apache-2.0
"""What `doctor` says of the files of others that a scale starts from."""

from pathlib import Path

import pytest

from pipeline.doctorfiles import checks
from scm_core.published import INCEPTION, WEIGHTS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty folders of data and weights."""
    monkeypatch.setenv("SCM_ROOT", str(ROOT))
    for name in ("DATA", "WEIGHTS"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"SCM_{name}", str(tmp_path / name))
    return tmp_path


def test_scale_paper_names_everything_that_is_missing(home: Path) -> None:
    found = {check.what: check for check in checks(True, "paper")}
    named = {
        "data set cifar10",
        "data set imagenet",
        "autoencoder sd-vae-ft-mse",
        "weights of inception",
        "weights of dinov2",
    }
    assert set(found) == named
    assert not any(check.ok for check in found.values())
    assert f"{home}/DATA/cifar10/cifar-10-binary.tar.gz is not there" in found["data set cifar10"].detail
    assert "SHA-256 a1d993488569e928" in found["autoencoder sd-vae-ft-mse"].remedy
    assert "SCM_DATA" in found["data set imagenet"].remedy


def test_what_is_there_is_looked_at(home: Path) -> None:
    known = WEIGHTS[INCEPTION]
    file = home / "WEIGHTS" / known.file
    file.write_bytes(b"x")
    (home / "DATA/imagenet/n01440764").mkdir(parents=True)
    found = {check.what: check for check in checks(True, "paper")}
    assert found["data set imagenet"].ok
    assert f"1 bytes, {known.size} expected" in found["weights of inception"].detail
    with file.open("wb") as sparse:
        sparse.truncate(known.size)
    assert {check.what: check.ok for check in checks(True, "paper")}["weights of inception"]
    found = {check.what: check for check in checks(False, "paper")}
    assert "damaged or another file" in found["weights of inception"].detail


def test_the_demo_starts_from_nothing(home: Path) -> None:
    assert list(checks(True, "demo")) == []
