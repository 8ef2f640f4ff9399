# Two commands: `make demo` trains on real digits, `make test` checks everything. Both pick up what is there.
VENV ?= .venv
BIN := $(VENV)/bin
PYTHON ?= python3

.PHONY: demo test install lint

demo: install
	$(BIN)/ditmoe-data fit-vae --source sample:digits --out demo/vae
	$(BIN)/ditmoe-data encode --source sample:digits --vae demo/vae --out demo/latents
	@# two processes share the experts; a machine with one GPU holds one process
	processes=$$($(BIN)/python -c 'import torch; print(1 if torch.cuda.device_count() == 1 else 2)') && \
	OMP_NUM_THREADS=1 PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/deepspeed --num_accelerators $$processes --module ditmoe_ds.train recipes/digits.yaml parallel.expert=$$processes
	$(BIN)/ditmoe sample demo/run --classes 0,1,2,3,4,5,6,7,8,9 --out demo/samples.png
	$(BIN)/ditmoe analyze demo/run --out demo/analysis
	@$(BIN)/python -c "import json; r = [json.loads(l) for l in open('demo/run/metrics.jsonl')]; \
	print(f'\nloss {r[0][\"loss\"]:.3f} at step 1, {r[-1][\"loss\"]:.3f} at step {r[-1][\"step\"]}'); \
	print('samples      demo/samples.png\nloss curve   demo/analysis/loss.png\nrouting      demo/analysis/routing_timestep.png')"

test: install lint
	$(BIN)/pytest -q

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

install: $(VENV)/installed

$(VENV)/installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[demo,eval,dev]'
	touch $@
