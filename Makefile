# make demo       set up, train on real digits with two CPU processes, evaluate the best checkpoint
# make demo-coco  set up, train a small detector on generated shapes, evaluate its best checkpoint
# make ablate     set up, compare models on a task that needs two distant windows: four variants, three seeds
# make test       set up, lint, and run the tests
# make test-slow  the tests that take minutes each
# make test-chaos kills and mutated files, for many minutes
PYTHON ?= python3
SEED ?= 0
VENV := .venv
BIN := $(VENV)/bin
DEMO := output/digits/seed$(SEED)
SHAPES := output/shapes/seed$(SEED)

ABLATIONS := shuffled not_exchanged no_messengers swin

.PHONY: demo demo-clean demo-coco demo-coco-clean ablate test test-slow test-chaos

$(VENV)/.installed: requirements.txt requirements-dev.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("error: Python 3.10 or newer is needed; make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements-dev.txt
	touch $@

# torchrun's own default, set so that it need not warn of it. DDP warns in every run that the search for unused
# parameters finds none; it is on for the order of its sums (distributed.py).
demo: export OMP_NUM_THREADS ?= 1
demo: export TORCH_CPP_LOG_LEVEL ?= ERROR
demo: $(VENV)/.installed
	@if [ -e $(DEMO)/best.pth ]; then echo "found $(DEMO): resuming it (make demo-clean starts clean)"; \
	else echo "starting clean in $(DEMO)"; fi
	@$(BIN)/python tools/make_digits.py datasets/digits
	$(BIN)/torchrun --standalone --nproc_per_node 2 main.py --cfg configs/digits.yaml \
	    --data-path datasets/digits --device cpu --tag seed$(SEED) --opts SEED $(SEED)
	$(BIN)/torchrun --standalone --nproc_per_node 2 main.py --cfg configs/digits.yaml \
	    --data-path datasets/digits --device cpu --tag seed$(SEED) --resume $(DEMO)/best.pth --eval
	@echo "best checkpoint: $(DEMO)/best.pth"
	@grep 'Acc@1' $(DEMO)/log_rank0.txt | tail -n 1 | sed 's/.*\* /validation:      /'
	@echo "training curves: $(DEMO)/curves.png"

demo-clean:
	rm -rf $(DEMO)

demo-coco: $(VENV)/.installed
	@if [ -e $(SHAPES)/best.pth ]; then echo "found $(SHAPES): resuming it (make demo-coco-clean starts clean)"; \
	else echo "starting clean in $(SHAPES)"; fi
	@$(BIN)/python tools/make_shapes.py datasets/shapes
	$(BIN)/python detect.py --cfg configs/coco/shapes.yaml --data-path datasets/shapes --device cpu \
	    --tag seed$(SEED) --opts SEED $(SEED)
	$(BIN)/python detect.py --cfg configs/coco/shapes.yaml --data-path datasets/shapes --device cpu \
	    --tag seed$(SEED) --resume $(SHAPES)/best.pth --eval
	@echo "best checkpoint: $(SHAPES)/best.pth"
	@grep 'box AP50' $(SHAPES)/log_rank0.txt | tail -n 1 | sed 's/.*\* /validation:      /'
	@echo "detections:      $(SHAPES)/detections.png"
	@echo "training curves: $(SHAPES)/curves.png"

demo-coco-clean:
	rm -rf $(SHAPES)

ablate: $(VENV)/.installed
	@$(BIN)/python tools/make_cues.py datasets/cues
	$(BIN)/python tools/ablate.py $(ABLATIONS:%=configs/ablations/cues/%.yaml) --seeds 3 \
	    --data-path datasets/cues --output output/ablations/cues

# Two tests at a time, each on one core.
test: export OMP_NUM_THREADS ?= 1
test: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow

test-chaos: $(VENV)/.installed
	$(BIN)/python -m pytest -m chaos
