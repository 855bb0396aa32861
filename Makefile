PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0

.PHONY: demo install test test-slow lint types imports listing peers docs clean

demo: $(VENV)/.train
	$(BIN)/regard demo

install: $(VENV)/.train

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.dev
	$(BIN)/ruff check src tests benchmarks docs/*.py
	$(BIN)/ruff format --check src tests benchmarks docs/*.py

types: $(VENV)/.dev
	$(BIN)/mypy

imports: $(VENV)/.dev
	$(BIN)/lint-imports

# what `regard models` and `regard mixers` print without loading torch; a test says when it is old
listing: $(VENV)/.dev
	$(BIN)/python -m regard.catalog > $(VENV)/listing.json
	mv $(VENV)/listing.json src/regard/listing.json

# site/index.html; reads the repository only. A warning is an error, see mkdocs.yml; the variable silences an advertisement
docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

$(VENV)/.torch:
	@echo "== an environment in $(VENV)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip
	@echo "== torch, some 200 MB: a minute or two"
	$(BIN)/python -m pip install $(TORCH)
	touch $@

$(VENV)/.train: $(VENV)/.torch pyproject.toml
	@echo "== regard and what training needs: about a minute"
	$(BIN)/python -m pip install -e ".[train]"
	touch $@

# timm and torchvision serve peer tests only; torchvision's compiled operators are not needed, so no dependencies
$(VENV)/.dev: $(VENV)/.train
	@echo "== what the tests need: some minutes"
	$(BIN)/python -m pip install -e ".[dev]"
	$(BIN)/python -m pip install --no-deps --upgrade --target $(VENV)/peers timm==1.0.31 torchvision==0.28.0
	touch $@

clean:
	rm -rf $(VENV) regard-report site
