"What several files of tests share."

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from walkthrough import ROOT

# Pages show figures that need no kernel: this one, in a lesson of the copy that is built, would end its script too early.
ABOUT = {"title": "</script>", "caption": "Look.", "texts": "", "step_label": "", "start": 0, "alt": "", "height": 300, "top": 40}
FIGURE = {"data": [{"type": "scatter", "x": [0, 1], "y": [0, 1]}], "layout": {"meta": {"cola": ABOUT}}}
FIGURE_LESSON = "00_idea"


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "The site, built from a copy in which one lesson has a figure that lives without a kernel."
    copy = tmp_path_factory.mktemp("docs")
    skipped = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for name in ("nbs", "cola_tutorial"): shutil.copytree(ROOT / name, copy / name, ignore=skipped)
    shutil.copytree(ROOT / "data" / "views", copy / "data" / "views")
    for name in ("pyproject.toml", "CHANGELOG.md", "CITATION.cff", "LICENSE"): shutil.copy(ROOT / name, copy)
    path = copy / "nbs" / f"{FIGURE_LESSON}.ipynb"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    output = {"output_type": "display_data", "metadata": {}, "data": {"application/vnd.plotly.v1+json": FIGURE}}
    cell = {"cell_type": "code", "id": "figure", "metadata": {}, "source": "figure", "execution_count": None, "outputs": [output]}
    notebook["cells"].append(cell)
    path.write_text(json.dumps(notebook), encoding="utf-8")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    build = [sys.executable, "nbs/_site/site_pages.py", "_docs"]
    run = subprocess.run(build, cwd=copy, env=env, capture_output=True, text=True)
    assert run.returncode == 0 and not run.stderr, run.stdout + run.stderr
    return copy / "_docs"
