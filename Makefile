# Two commands on a fresh machine: `make demo` and `make test`. Both set up .venv/ once.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
READY := .venv/.ready

# Files that a checkpoint's or an answer's digests stand in hold no secret for it.
NO_SECRETS := 'sha256|"id":"[0-9a-f]{32}"'

.PHONY: demo test lint format audit setup need-python need-java want-chromium clean

demo: setup need-java
	@$(BIN)/elude demo

# Processes with a thread each: with more, threads of one wait for the other. Three on two cores, for a third of the time
# is spent waiting for servers; in the order of the files, so that these do not all come last.
test: setup need-java want-chromium
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: setup
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

# Offline: versions that fit together, no secret in a file of the repository, a bill of materials. With a network: known
# vulnerabilities of what is installed, which pip-audit asks a service for.
audit: setup
	@$(BIN)/python -m pip install --quiet --editable '.[audit]'
	@$(BIN)/python -m pip check
	@git ls-files -z | xargs -0 $(BIN)/detect-secrets-hook --exclude-lines $(NO_SECRETS) && echo "No secrets found."
	@mkdir -p build && $(BIN)/cyclonedx-py environment --pyproject pyproject.toml --of JSON -o build/sbom.json $(BIN)/python \
		&& echo "build/sbom.json: the bill of materials (CycloneDX)"
	@$(BIN)/pip-audit --skip-editable --strict || \
		{ echo "Known vulnerabilities were found, or could not be asked for: pip-audit needs a network."; exit 1; }

setup: $(READY)

# Once, and again only when pyproject.toml changed.
$(READY): pyproject.toml | need-python
	@echo "Setting up .venv (PyTorch is several GB the first time) …"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $(READY)

need-python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is missing. Debian or Ubuntu: sudo apt-get install python3.11 python3.11-venv"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "Python's venv module is missing. Debian or Ubuntu: sudo apt-get install python3-venv"; exit 2; }

need-java:
	@$${JAVA_HOME:+$$JAVA_HOME/bin/}java -version 2>&1 | grep -Eq 'version "(1[7-9]|[2-9][0-9])' || \
		{ echo "Java 17 is missing (TorchServe runs on it). Debian or Ubuntu: sudo apt-get install openjdk-17-jre-headless"; exit 2; }

# Tests in a browser are skipped without one; root on Debian or Ubuntu, as in a container, gets it here.
want-chromium:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || \
		{ [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && echo "Installing chromium for the tests …" && \
		apt-get update -qq && apt-get install -qqy chromium >/dev/null; } || \
		echo "No Chromium: tests in a browser are skipped. Debian or Ubuntu: sudo apt-get install chromium"

clean:
	rm -rf .venv build dist elude-demo .pytest_cache .ruff_cache .mypy_cache
