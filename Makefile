# make demo       export the tiny checkpoint to ONNX, check it, ask it about a picture
# make test       lint, types and all tests but the slow ones
# make test-full  the slow ones too
# Plain POSIX make: works with GNU make and BSD make. The first call sets up .venv, later ones reuse it.

PYTHON = .venv/bin/python
SETUP = .venv/.installed
BUNDLE = out/qwen3.5-tiny-onnx-int4-mlp
PICTURE = docs/demo.png
QUESTION = Read.

.PHONY: demo test test-full lint setup clean

demo: $(SETUP)
	$(PYTHON) -m export --target onnx --size tiny -o $(BUNDLE) --overwrite
	@echo
	@echo "picture:  $(PICTURE)"
	@echo "question: $(QUESTION)"
	@$(PYTHON) -m export run $(BUNDLE) --image $(PICTURE) --prompt "$(QUESTION)"
	@echo "report:   $(BUNDLE)/report.html"

test: lint
	$(PYTHON) -m pytest -m "not slow" -n 2 --dist worksteal

test-full: lint
	$(PYTHON) -m pytest

lint: $(SETUP)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy

setup: $(SETUP)

# The stamp is older than pyproject.toml only if the dependencies may have changed.
$(SETUP): pyproject.toml
	@python=python3.11; command -v $$python >/dev/null 2>&1 || python=python3; \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")' && \
	$$python -m venv .venv
	$(PYTHON) -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -e '.[onnx,executorch,coreml,optimum,dev]'
	@touch $(SETUP)

clean:
	rm -rf .venv out build dist .mypy_cache .pytest_cache .ruff_cache
