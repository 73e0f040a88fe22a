"The files around the package agree with each other: settings, requirements, lock, environments, citation, commands, README."
import configparser, os, re, subprocess, sys, tomllib
from pathlib import Path

import pytest, yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import mmu_study
from mmu_study.sweeps import load_grid

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT/"pyproject.toml").read_text())
PROJECT, NBDEV = PYPROJECT["project"], PYPROJECT["tool"]["nbdev"]
DEPENDENCIES = PROJECT["dependencies"] + [r for extra in PROJECT["optional-dependencies"].values() for r in extra]
PAPERS = {"arXiv:2502.11051", "arXiv:2502.15910", "arXiv:2605.05909", "arXiv:2507.01271"}

def settings() -> dict:
    ini = configparser.ConfigParser()
    ini.read(ROOT/"settings.ini")
    return dict(ini["DEFAULT"])

def lock() -> list[str]:
    return [line for line in (ROOT/"requirements.lock").read_text().splitlines() if line and not line.startswith("#")]

def pins() -> dict[str, str]:
    "Version of each package in the lock, by its canonical name."
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lock())}

def make(*arguments) -> str:
    "What make prints; the variables of a make that runs these tests are kept away from it."
    env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES")}
    return subprocess.run(["make", *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout

def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):.*## ", (ROOT/"Makefile").read_text(), re.M))

# Settings

@pytest.mark.parametrize("setting, other", [
    ("lib_name", PROJECT["name"]), ("version", mmu_study.__version__), ("license", PROJECT["license"]),
    ("nbs_path", NBDEV["nbs_path"]), ("lib_path", NBDEV["lib_path"]), ("tst_flags", NBDEV.get("tst_flags", "notest"))])
def test_settings_agree_with_pyproject(setting, other): assert settings()[setting] == other

def test_version_is_the_package_s(): assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "mmu_study.__version__"}

def test_requirements_agree(): assert settings()["requirements"].split() == PROJECT["dependencies"]

def test_minimum_python_agrees():
    minimum = settings()["min_python"]
    assert PROJECT["requires-python"] == f">={minimum}"
    assert f"({minimum.replace('.', ', ')})" in (ROOT/"Makefile").read_text()

def test_caches_are_ignored_by_git():
    ignored = (ROOT/".gitignore").read_text().split()
    assert {f"{settings()['cache_path']}/", f"{settings()['runs_path']}/", ".venv/"} <= set(ignored)

# Environments

def test_lock_pins_every_line():
    assert [line for line in lock() if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    assert len(pins()) == len(lock())

def test_lock_has_torch_and_no_torchvision():
    assert "torch" in pins()
    assert "torchvision" not in pins()  # its wheels break a CPU torch; the study needs none of it

@pytest.mark.parametrize("dependency", DEPENDENCIES)
def test_lock_satisfies_the_package(dependency):
    requirement = Requirement(dependency)
    assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)])

def test_conda_environment_is_the_lock():
    *conda, pip = yaml.safe_load((ROOT/"environment.yml").read_text())["dependencies"]
    assert conda == [f"python>={settings()['min_python']}", "pip"]
    assert pip == {"pip": [*lock(), "-e ."]}

# Citation

def test_citation():
    citation = yaml.safe_load((ROOT/"CITATION.cff").read_text())
    assert (citation["cff-version"], citation["version"], citation["license"]) == ("1.2.0", mmu_study.__version__, PROJECT["license"])
    references = citation["references"]
    assert len(references) == 4 and {i["value"] for r in references for i in r["identifiers"]} == PAPERS
    assert all(r["title"] and all(a["family-names"] for a in r["authors"]) for r in references)

def test_license_is_complete():
    text = (ROOT/"LICENSE").read_text()
    assert "Apache License\n                           Version 2.0" in text and "END OF TERMS AND CONDITIONS" in text

def test_changelog_has_this_version(): assert f"## [{mmu_study.__version__}]" in (ROOT/"CHANGELOG.md").read_text()

# Commands

def test_ci_runs_make_test():
    ci = ROOT/".ci/run"
    commands = [line for line in ci.read_text().splitlines() if line and not line.startswith("#")]
    assert commands == ["set -euo pipefail", 'cd "$(dirname "$0")/.."', "make test"]
    assert os.access(ci, os.X_OK)

def test_make_test_runs_pytest_and_the_notebooks():
    commands = [line for line in make("-n", "test", "BIN=bin").splitlines() if not line.startswith("#")]
    assert commands[0].endswith("-j2 pytest notebooks")
    assert [c.split(" --")[0] for c in commands[1:]] == ["bin/python -m pytest tests", "bin/nbdev-test nbs"]
    assert "--skip-folder-re '^([_.]|studies$)'" in commands[-1]  # minutes each

def test_make_study_and_studies_run_pages_that_have_the_preset():
    for target, first in (("study", "overview"), ("studies", "overview mmunlearner manu null_space_cvf pulse robustness audit")):
        for preset in ("smoke", "quick", "full"):
            assert make("-n", target, "BIN=bin", f"PRESET={preset}") == f"bin/python -m mmu_study.cli study {first} --preset {preset}\n"
            assert all(len(load_grid(ROOT/f"data/grids/{name}.yaml", preset).runs) == 1 for name in first.split())

def test_make_phony_targets_are_the_listed_ones():
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT/"Makefile").read_text(), re.M)[1]
    assert set(phony.split()) == targets()

# README

def test_readme_names_the_commands():
    code = " ".join(re.findall(r"```.*?```|`[^`]+`", (ROOT/"README.md").read_text(), re.S))
    named = set(re.findall(r"\bmake ([a-z-]+)", code))
    assert {"study", "test"} <= named <= targets()

def test_readme_is_made_from_the_index_notebook(tmp_path):
    made = tmp_path/"README.md"
    make("readme", f"BIN={Path(sys.executable).parent}", f"README={made}")
    assert (ROOT/"README.md").read_text() == made.read_text(), "README.md is not what `make readme` writes from nbs/index.ipynb"

def test_readme_links_lead_somewhere():
    links = re.findall(r'(?:\]\(|src="|href=")([^)"#]+)', (ROOT/"README.md").read_text())
    assert [link for link in links if not link.startswith(("http://", "https://")) and not (ROOT/link).exists()] == []
