# All commands of this repository. Each first makes the environment: .venv, from requirements.lock.
# The folder's name may have a space: nothing here calls a console script or an absolute path.

PY    := .venv/bin/python
# What dvc runs (python -m pipelines ...) must come from .venv.
IN_VENV = exec env PATH="$$PWD/.venv/bin:$$PATH"
# The environment is up to date if the stamp for these two files, in this folder, exists. The stamp depends on content,
# not on dates, so a fresh checkout or another branch reinstalls only if the files differ.
STAMP := .venv/.installed-$(shell { cat requirements.lock pyproject.toml; pwd; } | cksum | cut -d' ' -f1)
# Two workers: tests spend much time waiting for processes to start. All tests of a file run in one worker, which shares
# its fixtures.
SIDE_BY_SIDE = -n 2 --dist loadfile --no-loadscope-reorder
# cpu or cuda: `make bench DEVICE=cuda`. Emptied here, so that an environment variable does not count.
DEVICE :=
BENCHMARKS = $(sort $(filter-out %/device.py,$(wildcard tests/benchmarks/*.py)))
FITS  := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))

.DEFAULT_GOAL := help
.PHONY: help env repro test test-8bit test-all drill bench gpu profile ablation speedrun ui clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile

env: $(STAMP) ## make only the environment

# PYTHON=... names the interpreter for .venv; default: the first that fits.
$(STAMP):
	@$(PY) -c '$(FITS)' 2>/dev/null || { \
		for python in "$(PYTHON)" python3 python3.11 python3.12 python3.13; do \
			if "$$python" -c '$(FITS)' 2>/dev/null; then exec "$$python" -m venv --clear .venv; fi; \
		done; \
		echo "pbe needs Python 3.11 or newer with its venv module (on Debian and Ubuntu: python3-venv), and neither" \
			"python3 nor python3.11, 3.12 or 3.13 on PATH is one; name yours with: make PYTHON=/path/to/python3" >&2; \
		exit 1; }
	@rm -f .venv/.installed-*
	PIP_CONSTRAINT=requirements.lock PIP_BUILD_CONSTRAINT=requirements.lock \
		$(PY) -m pip install --disable-pip-version-check -r requirements.lock
	$(PY) -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
	$(PY) -m pip check
	@touch "$@"

repro: $(STAMP) ## run the pipeline: photos in, trained model, metrics and reports/index.html out
	@$(IN_VENV) $(PY) -m pipelines repro

test: $(STAMP) ## lint, types, import contracts and the fast tests, in about ten minutes
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	$(PY) -c 'from importlinter.cli import lint_imports_command; lint_imports_command()'
	@$(IN_VENV) $(PY) -m pytest $(SIDE_BY_SIDE) --durations=25

test-8bit: $(STAMP) ## test train.optimizer: adamw_8bit, with bitsandbytes beside .venv's packages
	$(PY) -m pip install --disable-pip-version-check --quiet --no-deps --upgrade --target .venv/8bit bitsandbytes==0.50.2
	@$(IN_VENV) PYTHONPATH=.venv/8bit $(PY) -m pytest tests/train/test_eight_bit.py -m "slow or not slow"

# One at a time: they start several Rays and kill processes, and Ray Train complains about other Rays on the machine.
test-all: test test-8bit ## make test, then the long tests
	@$(IN_VENV) $(PY) -m pytest --durations=25 -m "slow and not drill"

drill: $(STAMP) ## long fault drills: kills, restarts, resumes
	@$(IN_VENV) $(PY) -m pytest -m drill

bench: $(STAMP) ## benchmarks, which print ratios; on the first GPU: make bench DEVICE=cuda
	@$(IN_VENV) sh -e -c 'for file in $(BENCHMARKS); do $(PY) "$$file" --device $(or $(DEVICE),cpu); done'

gpu: $(STAMP) ## measure and check training and editing on a GPU; rehearse without one: make gpu DEVICE=cpu
	@$(IN_VENV) $(PY) -m tests.gpu --device $(or $(DEVICE),cuda) $(if $(ONLY),--only $(ONLY))

profile: $(STAMP) ## write params.yaml from a profile: make profile P=coco ROOT=/photos
	@$(if $(P),,echo "choose with P=name, one of: $$(cd infra/profiles && echo *.yaml | sed 's/\.yaml//g')" >&2; exit 2)
	@$(IN_VENV) $(PY) -m pipelines profile $(P) $(if $(ROOT),--root "$(ROOT)")

ablation: $(STAMP) ## all rows of the paper's Table 3 on the sample photos: writes params.yaml, then as make repro
	@$(IN_VENV) $(PY) -m pipelines profile ablation
	@$(MAKE) --no-print-directory repro

speedrun: $(STAMP) ## a model from scratch on one GPU: make speedrun ROOT=/data; a rehearsal on two cores: P=speedrun-cpu
	@$(if $(ROOT),,echo "name the folder of photos (images/) and box files: make speedrun ROOT=/data" >&2; exit 2)
	@$(IN_VENV) infra/speedrun.sh "$(ROOT)" $(P)

ui: $(STAMP) ## compare runs in MLflow at http://127.0.0.1:5000
	@case "$${MLFLOW_TRACKING_URI:-}" in http*) echo "your MLflow server: $$MLFLOW_TRACKING_URI"; exit;; esac; \
		$(IN_VENV) MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_DISABLE_TELEMETRY=true \
		$(PY) -m mlflow ui --host 127.0.0.1 --workers 1 \
		--backend-store-uri "$${MLFLOW_TRACKING_URI:-sqlite:///mlflow.db}"

clean: ## remove the tools' caches; data, models, runs and .venv stay
	rm -rf .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis build pbe.egg-info
	find pbe pipelines tests -name __pycache__ -type d -prune -exec rm -rf {} +
