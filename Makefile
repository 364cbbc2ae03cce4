# The verbs of this project; `make` alone lists them.
# Written for GNU make 3.81 and a POSIX shell, which is what macOS and every Linux have.

PYTHON ?=
PORT ?= 8888
LAB_ARGS ?=
EXPLORE_ARGS ?=
PYTEST_ARGS ?=
NOTEBOOKS ?=

VENV = .venv
BIN = $(VENV)/bin
READY = $(VENV)/ready
PYTHONS = $(if $(PYTHON),$(PYTHON),python3.13 python3.12 python3.11 python3)
SPACE_KB = 3145728

.DEFAULT_GOAL = help
.PHONY: help lab explore test walkthrough export clean-notebooks readme docs pretrained posterior-lab

help: ## list the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo 'PYTHON=python3.12 chooses the Python (3.11 to 3.13) on the first run; remove $(VENV) to choose again.'

lab: $(READY) ## open the lessons in JupyterLab (PORT=8888 LAB_ARGS=--no-browser)
	@echo 'Opening nbs/index.ipynb in JupyterLab. Its address, with the token, follows; Ctrl-C stops it.'
	@root=; if [ "$$(id -u)" = 0 ]; then root=--allow-root; fi; \
	PATH="$(CURDIR)/$(BIN):$$PATH"; export PATH; \
	exec "$(BIN)/python" -m jupyterlab --port=$(PORT) --ServerApp.root_dir="$(CURDIR)" \
	  --LabApp.default_url=/lab/tree/nbs/index.ipynb \
	  --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate --LabApp.news_url=None \
	  $$root $(LAB_ARGS)

explore: $(READY) ## open the explorer in a browser (EXPLORE_ARGS='--no-browser --port=8890')
	@"$(BIN)/cola-explore" $(EXPLORE_ARGS)

test: $(READY) ## run every test, the notebooks included (PYTEST_ARGS='-k flow')
	@"$(BIN)/python" -m pytest $(PYTEST_ARGS)

walkthrough: $(READY) ## run every lesson as a reader would, and time it (NOTEBOOKS='06_flow 07_dit')
	@"$(BIN)/python" tests/walkthrough.py $(NOTEBOOKS)

export: $(READY) ## write the package from the notebooks
	@env -u IN_TEST "$(BIN)/nbdev-export"

clean-notebooks: $(READY) ## strip from the notebooks what does not belong in a commit, widget state included
	@"$(BIN)/python" -m nbconvert --log-level=ERROR --to notebook --inplace --ClearMetadataPreprocessor.enabled=True \
	  --ClearMetadataPreprocessor.clear_cell_metadata=False \
	  --ClearMetadataPreprocessor.preserve_nb_metadata_mask=kernelspec nbs/*.ipynb
	@"$(BIN)/nbdev-clean"

readme: $(READY) ## write README.md from nbs/index.ipynb
	@"$(BIN)/python" tests/test_project.py

docs: $(READY) ## build the web site in _docs from the notebooks; it is read without a network
	@"$(BIN)/python" nbs/_site/site_pages.py _docs

pretrained: $(READY) ## train the shipped checkpoint again by its recipe, into runs/pretrained
	@"$(BIN)/cola-train" --recipe data/pretrained/run.json --out runs/pretrained

posterior-lab: $(READY) ## train the posterior lab's small models again, into data/views/posterior_lab.json
	@"$(BIN)/python" -c 'from cola_tutorial.views.latents import write_posterior_lab; write_posterior_lab()'

# The mark is made last, so an interrupted installation is taken up again and a finished one is never repeated.
$(READY): settings.ini setup.py constraints.txt
	@if "$(BIN)/python" -c 'import pip' >/dev/null 2>&1; then exit 0; fi; \
	found=; \
	for candidate in $(PYTHONS); do \
	  if "$$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; \
	  then found=$$candidate; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo 'No Python 3.11, 3.12 or 3.13 found. Tried: $(PYTHONS).' >&2; \
	  echo 'Install one, or say where one is, for example: make lab PYTHON=/opt/python/bin/python3.12' >&2; \
	  exit 1; \
	fi; \
	if ! "$$found" -c 'import ensurepip, venv' >/dev/null 2>&1; then \
	  echo "$$found has no venv module. On Debian and Ubuntu: apt install python3-venv" >&2; \
	  exit 1; \
	fi; \
	free=$$(df -Pk . | awk 'NR == 2 { print $$4 }'); \
	if [ "$$free" -lt $(SPACE_KB) ]; then \
	  echo "Only $$((free / 1024)) MB are free here; the installation needs $$(($(SPACE_KB) / 1024)) MB." >&2; \
	  echo 'Make room on this disk, or clone to one that has it.' >&2; \
	  exit 1; \
	fi; \
	echo "Making $(VENV) with $$found."; \
	"$$found" -m venv --clear "$(VENV)"
	@echo 'Installing the tested versions into $(VENV): once, a few minutes.'
	@"$(BIN)/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[lab,test,docs]'
	@touch "$(READY)"
