# make demo       set up, train on real digits with two CPU processes, evaluate the best checkpoint
# make test       set up, lint, and run the tests
# make test-slow  the tests that take minutes each
# make test-chaos kills, mutated files and cut links, for many minutes
PYTHON ?= python3
SEED ?= 0
VENV := .venv
BIN := $(VENV)/bin
DEMO := output/digits/seed$(SEED)

.PHONY: demo demo-clean test test-slow test-chaos

$(VENV)/.installed: requirements.txt requirements-dev.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("error: Python 3.10 or newer is needed; make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements-dev.txt
	touch $@

demo: $(VENV)/.installed
	@if [ -e $(DEMO)/best.pth ]; then echo "found $(DEMO): resuming it (make demo-clean starts clean)"; \
	else echo "starting clean in $(DEMO)"; fi
	$(BIN)/python tools/make_digits.py datasets/digits
	$(BIN)/python -m torch.distributed.launch --standalone --nproc_per_node 2 main.py \
	    --cfg configs/digits.yaml --data-path datasets/digits --device cpu --tag seed$(SEED) --opts SEED $(SEED)
	$(BIN)/torchrun --standalone --nproc_per_node 2 main.py --cfg configs/digits.yaml \
	    --data-path datasets/digits --device cpu --tag seed$(SEED) --resume $(DEMO)/best.pth --eval
	@echo "best checkpoint: $(DEMO)/best.pth"
	@grep 'Acc@1' $(DEMO)/log_rank0.txt | tail -n 1 | sed 's/.*\* /validation:      /'
	@echo "training curves: $(DEMO)/curves.png"

demo-clean:
	rm -rf $(DEMO)

test: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow

test-chaos: $(VENV)/.installed
	$(BIN)/python -m pytest -m chaos
