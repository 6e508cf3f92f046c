# make demo: set up, then the whole pipeline on a CPU with a tiny Qwen3.5.   make test: set up, then the tests.
# make numerical: set up, then the numerical tests under every instruction set of the processor.
SNAKEMAKE := .venv/bin/snakemake --cores all

.PHONY: setup demo test numerical lint lock schema benchmark-tables

setup:
	@envs/setup.sh

demo: setup
	@$(SNAKEMAKE) --config 'models=[tiny]' results=results -- all
	@.venv/bin/python -c "print(open('results/tables/scores.md').read())"
	@echo "Read results/report.html, the curve is in results/plots/."

test: setup
	@.venv/bin/python -m pytest -n $$(($$(nproc) + 1)) --dist loadfile --no-loadscope-reorder

numerical: setup
	@tests/numerical.sh

lint: setup
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/snakefmt --check .

# Run after a change of envs/*.in.
lock:
	@envs/lock.sh

# Run after a change of workflow_scripts/milepost/configuration/schema.py: the JSON schemas that editors check YAML with.
schema: setup
	@PYTHONPATH=workflow_scripts .venv/bin/python -P -m milepost.configuration.json_schema

# Run after a new line in benchmarks/results: the tables of README.md and benchmarks/README.md.
benchmark-tables: setup
	@.venv/bin/python benchmarks/tables.py
