PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
# what a fresh machine installs beside torch; `make lock` finds newer ones, `make test-latest` takes what is newest today
LOCK := --constraint constraints.txt
TOOLS := pytest pytest-xdist hypothesis expecttest

.PHONY: demo install test test-slow test-latest test-oldest test-machines fuzz lock lint types imports listing peers docs clean

demo: $(VENV)/.train
	$(BIN)/regard demo

install: $(VENV)/.train

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

# the newest of everything but torch, without the lock
test-latest:
	$(MAKE) test VENV=.venv-latest LOCK=

# the package's own lower bounds
test-oldest: .venv-oldest/.oldest
	.venv-oldest/bin/python -m pytest -n 2 --dist worksteal -m "not slow and not peer" tests/ops tests/layers tests/models tests/data

# the fast suite on other vector widths, matrix libraries and thread counts, one after another
test-machines: $(VENV)/.dev
	bash tests/machines.sh $(BIN)/python

# 100,000 valid and 100,000 invalid calls, 20,000 damaged files; writes the table of docs/reliability.md
fuzz: $(VENV)/.dev
	$(BIN)/python -m tests.fuzz --calls 100000 --invalid 100000 --files 20000 --seed 0 --processes 2 --json docs/reliability.json
	$(BIN)/python docs/reliability.py

# resolves for all supported versions of Python, with what torch on a GPU needs left out
lock:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet uv
	echo "$(TORCH)" > .venv-lock/torch.txt
	.venv-lock/bin/uv pip compile pyproject.toml --universal --python-version 3.11 --extra dev --upgrade --quiet \
		--constraint .venv-lock/torch.txt --no-annotate --no-header -o .venv-lock/new.txt
	grep -v -E "^(nvidia|cuda)-" .venv-lock/new.txt > constraints.txt
	.venv-lock/bin/uv pip compile pyproject.toml --python-version 3.11 --resolution lowest-direct --upgrade --quiet \
		--constraint .venv-lock/torch.txt --extra train --extra lens --extra app --no-annotate --no-header -o .venv-lock/old.txt
	grep -v -E "^(nvidia|cuda|triton)" .venv-lock/old.txt > constraints-oldest.txt

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
	$(BIN)/python -m pip install $(LOCK) $(TORCH)
	touch $@

$(VENV)/.train: $(VENV)/.torch pyproject.toml constraints.txt
	@echo "== regard and what training needs: about a minute"
	$(BIN)/python -m pip install $(LOCK) -e ".[train]"
	touch $@

# timm, torchvision and NATTEN serve peer tests only; their compiled operators are not needed, so no dependencies
$(VENV)/.dev: $(VENV)/.train
	@echo "== what the tests need: some minutes"
	$(BIN)/python -m pip install $(LOCK) -e ".[dev]"
	$(BIN)/python -m pip install --no-deps --upgrade --target $(VENV)/peers timm==1.0.31 torchvision==0.28.0
	$(BIN)/python -m pip install --no-deps --no-build-isolation natten==0.21.7
	touch $@

.venv-oldest/.oldest: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --upgrade pip
	.venv-oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt -e ".[train,lens,app]" $(TOOLS)
	touch $@

clean:
	rm -rf $(VENV) .venv-latest .venv-oldest .venv-lock regard-report site
