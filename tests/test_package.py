"""What `python -m build` makes: a wheel and an sdist that install into an empty environment and work there."""

import os
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from helpers import ROOT, blocks

import perceiver_ar


def run(*command: str | Path, cwd: Path) -> str:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [str(word) for word in command]
    result = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both: the wheel is built from the sdist."""
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["*.whl", "*.tar.gz"])
def test_what_is_built_runs_the_readme_in_an_empty_environment(kind: str, built: Path, tmp_path: Path) -> None:
    """Empty but for what the package needs: torch and the others are those of this environment."""
    [file] = built.glob(kind)
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv/bin/python"
    # Files .pth in these folders, such as that of an editable install, do not count there.
    needed = [path for path in sys.path if path.endswith("-packages")]
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=tmp_path).strip()
    (Path(site) / "needed.pth").write_text("\n".join(needed))
    offline = ["--no-index", "--no-deps", "--no-build-isolation", "--ignore-installed"]
    run(python, "-m", "pip", "install", *offline, file, cwd=tmp_path)
    assert run(python, "-c", "import perceiver_ar; print(perceiver_ar.__file__)", cwd=tmp_path).startswith(site)
    assert run(tmp_path / "venv/bin/perceiver-ar", "--version", cwd=tmp_path).strip() == perceiver_ar.__version__
    for language, code in blocks("README.md"):
        if language == "python":
            run(python, "-c", code, cwd=tmp_path)
    assert (tmp_path / "my-model/model.safetensors").exists()


@pytest.mark.slow
def test_what_is_built_has_its_parts(built: Path) -> None:
    [wheel], [sdist] = built.glob("*.whl"), built.glob("*.tar.gz")
    names = zipfile.ZipFile(wheel).namelist()
    assert "perceiver_ar/py.typed" in names
    assert {name.partition("/")[0] for name in names} == {
        "perceiver_ar",
        f"perceiver_ar-{perceiver_ar.__version__}.dist-info",
    }
    metadata = next(name for name in names if name.endswith("METADATA"))
    about = Parser().parsestr(zipfile.ZipFile(wheel).read(metadata).decode())
    assert {"all", "hf", "docs"} <= set(about.get_all("Provides-Extra") or [])
    assert about["License-Expression"] == "MIT"
    with tarfile.open(sdist) as archive:
        parts = {name.split("/")[1] for name in archive.getnames() if "/" in name}
    assert {"src", "tests", "docs", "recipes", "examples", "Makefile", "constraints.txt", "LICENSE"} <= parts
