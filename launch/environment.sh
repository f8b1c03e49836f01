# Sourced by the other scripts: makes .venv with everything the project needs, once, and activates it.
# PYTHON chooses the interpreter. pip's own settings (index, proxies, offline folders) are left to pip.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Of an installed torch that setup.py accepts, the virtual environment makes use; otherwise the lock decides.
# Asked of the new environment: it sees the system's packages, but not those of another virtual environment.
megamtp_keep_torch() {
    .venv/bin/python - <<'PY' 2>/dev/null
import importlib.metadata, re, sys
minimum = re.search(r'"torch>=(\d+)\.(\d+)"', open("setup.py").read())
found = re.match(r"(\d+)\.(\d+)", importlib.metadata.version("torch"))
sys.exit(tuple(map(int, found.groups())) < tuple(map(int, minimum.groups())))
PY
}

# The stamp comes last, so a failed or interrupted installation is begun again.
megamtp_install() {
    local python="${PYTHON:-python3}" lock=requirements.lock stamp
    if ! "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
        echo "megamtp: error: $python is not Python 3.10 to 3.12; install one of these, or name it: PYTHON=python3.12 bash $0" >&2
        return 2
    fi
    stamp="$(cat requirements.lock setup.py launch/environment.sh | cksum) $("$python" -c 'import sys; print(sys.version)')"
    [ "$(cat .venv/stamp 2>/dev/null)" != "$stamp" ] || return 0
    echo "Installing into $PWD/.venv (once; about two minutes) ..."
    # An activated .venv is what $python may name, and it is about to go: the interpreter below it stays.
    python="$("$python" -c 'import sys; print(sys._base_executable)')" || return 1
    rm -rf .venv
    "$python" -m venv --system-site-packages .venv || return 1
    if megamtp_keep_torch; then
        grep -v '^torch==' requirements.lock >.venv/requirements.lock
        lock=.venv/requirements.lock
    else
        "$python" -m venv --clear .venv || return 1
    fi
    # DeepSpeed compiles its operations at first use, if one is used: none of ours is.
    DS_BUILD_OPS=0 .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$lock" &&
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable . &&
        echo "$stamp" >.venv/stamp
}

megamtp_install || return
. .venv/bin/activate
# No CUDA toolkit is needed, and without a GPU DeepSpeed is not to look for one.
export DS_IGNORE_CUDA_DETECTION=TRUE PYTHONWARNINGS="${PYTHONWARNINGS:-ignore}"
