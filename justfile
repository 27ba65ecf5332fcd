# Recipes for a checkout with `.venv` (see CONTRIBUTING.md); `just --list` shows them.

bin := justfile_directory() / ".venv/bin"

# lint and test
default: lint test

# the whole suite; further words go to pytest: just test -k config
test *words:
    {{ bin }}/pytest {{ words }}

# property tests on new random examples, for as long as it pleases you
fuzz *words:
    while {{ bin }}/pytest -q --hypothesis-profile fuzz -m "not slow" {{ words }}; do :; done

# style, formatting, types, and who imports whom
lint:
    {{ bin }}/ruff check .
    {{ bin }}/ruff format --check .
    {{ bin }}/mypy
    {{ bin }}/lint-imports

# mend style and formatting
fmt:
    {{ bin }}/ruff check --fix .
    {{ bin }}/ruff format .

# write the generated pages anew
docs:
    {{ bin }}/python docs/configuration.py > docs/configuration.new
    mv docs/configuration.new docs/configuration.md
    {{ bin }}/python docs/cli.py > docs/cli.new
    mv docs/cli.new docs/cli.md
    {{ bin }}/python docs/metrics.py > docs/metrics.new
    mv docs/metrics.new docs/metrics.md
    {{ bin }}/python docs/observability.py > docs/observability.new
    mv docs/observability.new docs/observability.md
    {{ bin }}/python docs/readme.py > README.new
    mv README.new README.md
    {{ bin }}/python -m deploy.grafana.dashboard > deploy/grafana/kvtally.new
    mv deploy/grafana/kvtally.new deploy/grafana/kvtally.json

# the suite on every supported Python that is here
matrix:
    #!/usr/bin/env bash
    set -euo pipefail
    for version in 3.11 3.12 3.13; do
        if ! python=$(command -v "python$version"); then echo "no python$version here"; continue; fi
        folder=$(mktemp -d)
        "$python" -m venv "$folder"
        "$folder/bin/pip" install --quiet -e '.[test]'
        "$folder/bin/pytest" --quiet
        rm -r "$folder"
    done

# measure CPU, memory and disk
bench *words:
    {{ bin }}/python -m tests.bench.run {{ words }}

# savings on simulated deployments with known truth: bias, error, coverage
savings *words:
    {{ bin }}/python -m tests.bench.simulated_savings {{ words }}

# savings on recordings of one trace under several arms, beside the truth: just recorded FOLDER
recorded folder:
    {{ bin }}/python -m tests.bench.recorded_savings {{ folder }}

# run against a real vLLM
real *words:
    {{ bin }}/pytest tests/bench -m slow -k real_engine {{ words }}

# run the daemon for hours and watch its memory
soak *words:
    {{ bin }}/pytest tests/bench -m slow -k soak --timeout 0 {{ words }}

# pin what is installed, with hashes and for Python 3.11 to 3.13 (needs uv)
lock:
    uv pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --extra test \
        --quiet pyproject.toml --output-file requirements.lock

# wheel and sdist into dist/
wheel:
    {{ bin }}/python -m hatchling build

# the dashboard and the alerts against a real Prometheus and VictoriaMetrics, which must be on PATH
observe *words:
    {{ bin }}/python -m tests.bench.observability {{ words }}
