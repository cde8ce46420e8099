#!/bin/sh
# Set up one environment from one pinned list; does nothing if that is already done.
#   requirements/install.sh .venv requirements/train.txt
# torch comes first, by pip and with its dependencies, so that the machine gets its own
# build (CUDA or CPU); the list holds everything else and is installed as it stands.
set -eu
venv=$1 list=$2
stamp=$venv/.installed
want=$(cat "$list" pyproject.toml | cksum)
# lm-eval finds tasks in its own folder; links there keep edits of this checkout live.
link_tasks() {
    for tasks in "$venv"/lib/python3*/site-packages/lm_eval/tasks; do
        [ -d "$tasks" ] || continue
        mkdir -p "$tasks/thinkswitch"
        ln -sf "$PWD"/lm_eval_tasks/* "$tasks/thinkswitch/"
        find "$tasks/thinkswitch" -xtype l -delete
    done
}
link_tasks
[ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ] && exit 0

python=${PYTHON:-python3.11}
command -v "$python" >/dev/null || { echo "setup: $python is missing; install Python 3.11 or set PYTHON=." >&2; exit 1; }
echo "setup: $venv from $list (a few minutes, once)"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip="$venv/bin/python -m pip --quiet --disable-pip-version-check --no-input"
$pip install "$(grep '^torch==' "$list")" 2>&1 | grep -v WARNING: || true
"$venv/bin/python" -W ignore -c 'import torch' || { echo "setup: torch could not be installed; see the lines above." >&2; exit 1; }

rest=$(mktemp)
trap 'rm -f "$rest"' EXIT
grep -v '^torch==' "$list" >"$rest"
# uv does in a minute what takes pip three; where it cannot reach the index, pip does it.
$pip install uv==0.13.8 2>/dev/null || true
VIRTUAL_ENV=$venv "$venv/bin/python" -m uv pip install --quiet --no-deps --compile-bytecode -r "$rest" 2>/dev/null \
    || $pip install --no-deps -r "$rest"

case $list in
*train.txt)
    $pip install --no-deps --no-build-isolation --editable .
    link_tasks
    ;;
esac
printf '%s' "$want" >"$stamp"
case $list in
*train.txt) echo "setup: done; the commands lie in $venv/bin (\`. $venv/bin/activate\` puts \`thinkswitch\` on the PATH)" ;;
*) echo "setup: done" ;;
esac
