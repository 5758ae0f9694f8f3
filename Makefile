# Two commands, each with its own set-up in .venv, made once and again when what it is made from changes:
#
#   make digits [ARGS="--num-epochs 5"]    trains on the handwritten digits
#   make test                              lints, type-checks, runs the quick tests
#
# All other tests, marked `slow`, which CI runs after these: repeated kills, whole examples, pages
# whose blocks train long, and whatever takes a second or more in a file with much to test:
#
#   make test-slow
#
# The contract tests against the real PyTorch, torchdata, datasets, TensorFlow, Haiku, metrax and
# trackio, and against a local MLflow server:
#
#   make test-peers                        makes .venv-test-peers, 5 GB; a skipped test is a failure
#
# Export to ONNX with the real jax2onnx and onnxruntime, which need an environment of their own:
#
#   make test-onnx                         makes .venv-test-onnx
#
# What Distaff costs beside hand-written loops and other frameworks (docs/speed.md):
#
#   make bench-peers                       makes .venv-peers: Keras, PyTorch, Lightning, Grain
#   make bench [ARGS="--only W1,process"]  measures everything, in about 20 minutes
#   make bench-quick                       two small models beside hand-written loops, in 3 minutes
#
# That no run is lost, in long forms of what `make test` does in short:
#
#   make chaos                             kills and stops 120 runs, up to 4 times each: half an hour
#   make fuzz                              10,000 hostile files and checkpoints of each kind
#   make soak [ARGS="--minutes 2"]         one run for half an hour, stopped and resumed, that must not grow
#
# The site of the documentation, in .site, from pages that are also read as they are:
#
#   make docs
#
# The tutorials, whose outputs their pages keep, are executed again by:
#
#   make tutorials [ARGS="gan text"]
#
# Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
ARGS ?=

# Each worker and each process that a test starts would compile every source file again.
test test-slow test-peers: export PYTHONDONTWRITEBYTECODE :=

# The quick tests compile thousands of small programs once each. The slow ones, and those against
# reference data, run with XLA's optimizations, as users do.
test: export JAX_DISABLE_MOST_OPTIMIZATIONS := 1

bin := .venv/bin
pinned := pyproject.toml $(wildcard constraints/*.txt)

.NOTPARALLEL:
.PHONY: digits test test-slow test-peers test-onnx test-plan lint format clean chaos fuzz soak bench
.PHONY: bench-quick bench-peers bench-many bench-plans docs tutorials

digits: .venv/.digits
	@$(bin)/distaff fit digits $(ARGS)

test: lint
	$(bin)/pytest -n logical --maxprocesses 8 --dist worksteal -m "not slow" $(ARGS)

test-slow: .venv/.test
	$(bin)/pytest -n logical --maxprocesses 8 --dist worksteal -m "slow or golden" --timeout 1200 $(ARGS)

test-peers: export DISTAFF_REQUIRE_PEERS := 1
test-peers: .venv-test-peers/.made
	.venv-test-peers/bin/pytest -n logical --maxprocesses 8 --dist worksteal -m peer --timeout 1200 $(ARGS)

test-onnx: export DISTAFF_REQUIRE_PEERS := 1
test-onnx: .venv-test-onnx/.made
	.venv-test-onnx/bin/pytest tests/contract/test_onnx.py --timeout 1200 $(ARGS)

test-plan: export DISTAFF_REQUIRE_PEERS := 1
test-plan: .venv-test-plan/.made
	.venv-test-plan/bin/pytest -m compiler --timeout 1200 $(ARGS)

lint: .venv/.test
	$(bin)/ruff format --check
	$(bin)/ruff check
	$(bin)/ty check src

format: .venv/.test
	$(bin)/ruff format
	$(bin)/ruff check --fix

chaos: .venv/.test
	@DISTAFF_CHAOS_RUNS=20 $(bin)/pytest -n logical tests/faults/test_resume.py $(ARGS)

fuzz: .venv/.test
	@DISTAFF_FUZZ_EXAMPLES=10000 $(bin)/pytest -n logical -k fuzz --timeout 3600 $(ARGS)

soak: .venv/.test
	@$(bin)/python tests/faults/soak.py $(ARGS)

bench: .venv/.digits
	@$(bin)/python -m benchmarks.run $(ARGS)

bench-quick: .venv/.digits
	@$(bin)/python -m benchmarks.run --quick $(ARGS)

bench-many: .venv/.digits
	@$(bin)/python -m benchmarks.many $(ARGS)

bench-plans: .venv-test-plan/.made
	@.venv-test-plan/bin/python -m benchmarks.plans $(ARGS)

bench-peers: .venv-peers/.made

docs: .venv-docs/.made
	@.venv-docs/bin/python site/build.py
	@echo "Open .site/index.html"

tutorials: .venv/.test
	@$(bin)/python site/tutorials.py $(ARGS)

clean:
	rm -rf .venv .venv-peers .venv-docs .site .venv-test-peers .venv-test-onnx .venv-test-plan .cache .pytest_cache .ruff_cache .hypothesis dist
	find src tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

# The extra `test` holds the other two, so that neither command installs what the other has installed.
.venv/.test: extras := test
.venv/.test: $(pinned)
	@$(install)
	@touch .venv/.test .venv/.digits

.venv/.digits: extras := digits,plots
.venv/.digits: $(pinned)
	@$(install)
	@touch .venv/.digits

# Apart from .venv: nothing of Distaff needs them. torch alone and first, so that nothing chooses its build.
.venv-peers/.made: benchmarks/requirements-peers.txt
	@$(make_peers)
	@touch $@

# One environment for all: no two of them contradict each other at these versions.
.venv-test-peers/.made: tests/requirements-peers.txt
	@$(make_peers)
	@.venv-test-peers/bin/python -m pip install -q --disable-pip-version-check --no-deps -e .
	@touch $@

.venv-test-onnx/.made: tests/requirements-onnx.txt $(pinned)
	@echo "Making $(@D)"
	@$(PYTHON) -m venv --clear $(@D)
	@$(@D)/bin/python -m pip install -q --disable-pip-version-check -r $< -e '.[export]'
	@$(@D)/bin/python -m pip install -q --disable-pip-version-check --no-deps jax2onnx==0.17.1
	@touch $@

.venv-test-plan/.made: $(pinned)
	@echo "Making $(@D)"
	@$(PYTHON) -m venv --clear $(@D)
	@pins=constraints/$$($(@D)/bin/python -c '$(pins_of)').txt; \
	$(@D)/bin/python -m pip install -q --disable-pip-version-check -c $$pins -e '.[test,plan-gpu,plan-tpu]' \
	"jax-cuda12-pjrt==$$(sed -n 's/^jax==//p' $$pins)"
	@touch $@

define make_peers
set -e; \
echo "Making $(@D)"; \
$(PYTHON) -m venv --clear $(@D); \
install="$(@D)/bin/python -m pip install -q --disable-pip-version-check --no-cache-dir"; \
$$install $$(grep ^torch== $<); \
$$install -r $<
endef

.venv-docs/.made: site/requirements.txt
	@echo "Making .venv-docs"
	@$(PYTHON) -m venv --clear .venv-docs
	@.venv-docs/bin/python -m pip install -q --disable-pip-version-check -r $<
	@touch $@

# A .venv whose interpreter is gone, or that was left half made, is made again.
define install
set -e; \
if ! $(bin)/python -m pip --version >/dev/null 2>&1; then \
	$(PYTHON) -c '$(new_enough)'; \
	echo "Making .venv"; \
	$(PYTHON) -m venv --clear .venv; \
fi; \
pins=constraints/$$($(bin)/python -c '$(pins_of)').txt; \
echo "Installing distaff[$(extras)] with $$pins"; \
$(bin)/python -m pip install -q --disable-pip-version-check -c $$pins -e '.[$(extras)]'
endef

new_enough := import sys; v = sys.version_info; v >= (3, 11) or \
	sys.exit("Distaff needs Python 3.11 or newer, and $(PYTHON) is %d.%d. \
	Name another: make PYTHON=python3.12 ..." % v[:2])
pins_of := import sys; print("py311" if sys.version_info < (3, 12) else "py312")
