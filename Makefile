# The two commands of the README: `make quickstart` and `make test`. Both make what they need.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: quickstart test lint types packages env clean lock

# The whole pipeline on this machine: base -> sft -> rm -> ppo -> grpo and sft -> dpo, each evaluated.
quickstart: $(VENV)/.installed
	$(BIN)/python -m launchers.pipeline pipeline=quickstart cluster=local

test: $(VENV)/.installed-dev $(VENV)/qlora $(VENV)/vllm $(VENV)/lm_eval packages lint types
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder
	PYTHONPATH=$(VENV)/qlora $(BIN)/python -m pytest -m qlora tests/test_sft.py
	PYTHONPATH=$(VENV)/vllm:$(VENV)/lm_eval $(BIN)/python -m pytest -m "vllm or lm_eval" tests/test_vllm.py tests/test_benchmarks.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

# A real SLURM and a real browser for the tests, from Debian's packages, where this user may install them.
packages:
	@.ci/install-packages

env: $(VENV)/.installed-dev

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.lock pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@touch $@

$(VENV)/.installed-dev: requirements-dev.lock $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.lock
	@touch $@

# bitsandbytes, an extra, in a folder of its own: where it is installed, every start imports it, which takes seconds
$(VENV)/qlora: requirements-qlora.lock | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $@ -r requirements-qlora.lock
	@touch $@

# vLLM for CPUs, likewise: TRL imports it wherever it is installed
$(VENV)/vllm: requirements-vllm.lock | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --upgrade --target $@ -r $<
	@touch $@

# lm-eval, likewise: with all that it asks for, transformers would import scikit-learn at every start
$(VENV)/lm_eval: requirements-lm-eval.lock | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --upgrade --target $@ -r $<
	@touch $@

# wandb, an extra, and what it alone brings
WANDB := wandb|cwevals|distro|sniffio|opentelemetry-.*|googleapis-common-protos|requests|urllib3|charset-normalizer
# the extras serve and judge, and what they alone bring
SERVE := gradio|gradio_client|hf-gradio|brotli|fastapi|starlette|uvicorn|openai|httpx2|httpcore2|jiter|truststore|orjson|pydub|python-multipart|pytz|safehttpx|groovy|semantic-version|tomlkit
# the extra optuna, and what it alone brings
OPTUNA := hydra-optuna-sweeper|optuna|sqlalchemy|alembic|mako|cliff|cmaes|cmd2|colorlog|autopage|prettytable|prompt_toolkit|pyperclip|rich-argparse|stevedore|wcwidth
DEV := ^(playwright|greenlet|pyee|pytest|pytest-xdist|execnet|hypothesis|ruff|mypy|mypy_extensions|types-.*|pluggy|iniconfig|sortedcontainers|pathspec|librt|ast_serialize|$(WANDB)|$(SERVE)|$(OPTUNA))==

# Write down the versions of this environment, after it was upgraded and tested.
lock: $(VENV)/.installed-dev
	( head -n 1 requirements.lock; $(BIN)/pip freeze --all | grep -vE '^(pip|wheel)==' | grep -viE '$(DEV)' | sed 's/+cpu$$//' ) > requirements.lock.new
	( head -n 1 requirements-dev.lock; $(BIN)/pip freeze --all | grep -iE '$(DEV)' ) > requirements-dev.lock.new
	mv requirements.lock.new requirements.lock
	mv requirements-dev.lock.new requirements-dev.lock

clean:
	rm -rf $(VENV) outputs .pytest_cache .mypy_cache .ruff_cache
