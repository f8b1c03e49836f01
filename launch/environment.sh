# The other scripts source this file. It installs the project and its dependencies into .venv once, and activates .venv.
# PYTHON selects the interpreter. The settings of pip (index, proxies, offline folders) apply as usual.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Succeeds if the system has a torch that setup.py accepts: .venv then uses it, and not the version in requirements.lock.
# .venv's own Python checks this, because it sees the system's packages but not those of another virtual environment.
megamtp_has_torch() {
    .venv/bin/python - <<'PY' 2>/dev/null
import importlib.metadata, re, sys
minimum = re.search(r'"torch>=(\d+)\.(\d+)"', open("setup.py").read())
installed = re.match(r"(\d+)\.(\d+)", importlib.metadata.version("torch"))
sys.exit(tuple(map(int, installed.groups())) < tuple(map(int, minimum.groups())))
PY
}

# The stamp is written last, so a failed or interrupted installation is repeated.
megamtp_install() {
    local python="${PYTHON:-python3}" lock=requirements.lock stamp
    if ! "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
        echo "megamtp: error: $python is not Python 3.10 to 3.12; install one of these, or select it: PYTHON=python3.12 bash $0" >&2
        return 2
    fi
    stamp="$(cat requirements.lock setup.py launch/environment.sh | cksum) $("$python" -c 'import sys; print(sys.version)')"
    [ "$(cat .venv/stamp 2>/dev/null)" != "$stamp" ] || return 0
    echo "Installing into $PWD/.venv (once; about two minutes) ..."
    # $python may be the interpreter of .venv itself, which is removed below. Its base interpreter remains.
    python="$("$python" -c 'import sys; print(sys._base_executable)')" || return 1
    rm -rf .venv
    "$python" -m venv --system-site-packages .venv || return 1
    if megamtp_has_torch; then
        grep -v '^torch==' requirements.lock >.venv/requirements.lock
        lock=.venv/requirements.lock
    else
        "$python" -m venv --clear .venv || return 1
    fi
    # DeepSpeed compiles an operation when it is first used. megamtp uses none, so none is built here.
    DS_BUILD_OPS=0 .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$lock" &&
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable . &&
        echo "$stamp" >.venv/stamp
}

megamtp_install || return
. .venv/bin/activate
# megamtp needs no CUDA toolkit. Without this setting DeepSpeed looks for one on a machine without a GPU.
export DS_IGNORE_CUDA_DETECTION=TRUE PYTHONWARNINGS="${PYTHONWARNINGS:-ignore}"
