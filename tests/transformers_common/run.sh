#!/usr/bin/env bash
# Runs transformers' common model tests for RSMarian and for stock Marian, outside this project's own suite:
#   tests/transformers_common/run.sh [pytest options]
# Fetches transformers' source distribution by pip; PYTHON names the environment's interpreter (default .venv's).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-$here/../../.venv/bin/python}
version=$("$python" -c 'import transformers; print(transformers.__version__)')
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m pip download --quiet --no-deps --no-binary transformers -d "$work" "transformers==$version"
tar -xzf "$work/transformers-$version.tar.gz" -C "$work"
tests=$work/transformers-$version/tests
mkdir -p "$tests/models/rs_marian" "$tests/exporters" "$tests/generation"
touch "$tests/__init__.py" "$tests/models/__init__.py" "$tests/models/rs_marian/__init__.py"
mkdir -p "$tests/utils"
touch "$tests/exporters/__init__.py" "$tests/generation/__init__.py" "$tests/utils/__init__.py"
# Imported by the common tests, but not part of the source distribution.
[ -e "$tests/exporters/test_export.py" ] || echo 'class ExportTesterMixin: pass' >"$tests/exporters/test_export.py"
[ -e "$tests/generation/test_utils.py" ] || echo 'class GenerationTesterMixin: pass' >"$tests/generation/test_utils.py"
[ -e "$tests/utils/test_configuration_utils.py" ] ||
    echo 'config_common_kwargs = {"return_dict": False}' >"$tests/utils/test_configuration_utils.py"
cp "$here/rs_marian_common.py" "$tests/models/rs_marian/test_modeling_rs_marian.py"
cd "$work/transformers-$version"
# The generation mixin is not in the source distribution either; generation is held against stock Marian in this suite.
RUN_TRAINING_TESTS=1 "$python" -m pytest -q -p no:cacheprovider --rootdir . \
    --deselect tests/models/rs_marian/test_modeling_rs_marian.py::RSMarianModelTest::test_generation_tester_mixin_inheritance \
    --deselect tests/models/rs_marian/test_modeling_rs_marian.py::StockMarianModelTest::test_generation_tester_mixin_inheritance \
    "$@" tests/models/rs_marian/test_modeling_rs_marian.py
