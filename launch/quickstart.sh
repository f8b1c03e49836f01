#!/usr/bin/env bash
# Prepares text, trains a 4-token model, and plots, exports and samples it, in a few minutes on two CPU cores.
#   bash launch/quickstart.sh                                  trains on Python's standard library, in runs/quickstart
#   bash launch/quickstart.sh [--run DIR] --corpus PATH ...    trains on your text, source tree or JSONL, in DIR (runs/own)
# On a small corpus of your own it trains fewer steps, at most four epochs.
# After Ctrl-C or SIGTERM, the same command continues where it stopped.
set -euo pipefail
corpus=(--standard-library) run='' check=(--min-margin 1.2) own=''
absolute() { case "$1" in /*) printf %s "$1" ;; *) printf %s "$here/$1" ;; esac; }
here="$PWD"
while [ $# -gt 0 ]; do
    case "$1" in
        --help | -h) sed -n '2,6s/^# //p' "${BASH_SOURCE[0]}"; exit 0 ;;
        --run) [ $# -gt 1 ] || { echo "megamtp: error: --run without a folder; expected --run DIR" >&2; exit 2; }
            run="$(absolute "$2")"; shift 2 ;;
        --corpus) [ $# -gt 1 ] || { echo "megamtp: error: --corpus without a path; expected --corpus PATH ..." >&2; exit 2; }
            shift; corpus=(--input) check=() own=yes run="${run:-runs/own}"
            for path in "$@"; do corpus+=("$(absolute "$path")"); done
            corpus+=(--exclude runs)  # the output of earlier runs is not part of your text
            break ;;
        *) echo "megamtp: error: $1: unknown argument; expected nothing, or [--run DIR] --corpus PATH ..." >&2; exit 2 ;;
    esac
done
run="${run:-runs/quickstart}"
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

# Runs one step of the quickstart. SIGTERM and Ctrl-C reach it as SIGTERM; this script exits when the step has ended.
run_step() {
    "$@" &
    local job=$! status=0 stopped=''
    trap 'stopped=yes; kill -TERM "$job" 2>/dev/null || true' TERM INT
    while :; do
        wait "$job" && status=0 || status=$?
        kill -0 "$job" 2>/dev/null || break
    done
    trap - TERM INT
    if [ "$status" = 75 ]; then
        echo "Stopped and saved. The same command continues from there."
    elif [ -n "$stopped" ]; then
        echo "Stopped. The same command continues from there."
        exit 75
    fi
    [ "$status" = 0 ] || exit "$status"
}

# Prints settings that limit a run on the corpus in folder $1 to MANY_EPOCHS epochs, if configs/quickstart.yaml trains more.
settings_for() {
    python - "$1" <<'PY'
import sys
from pathlib import Path
from megamtp.config import read_config
from megamtp.data.corpus import read_corpus
from megamtp.data.position import MANY_EPOCHS
config = read_config(["configs/quickstart.yaml", "data.train=unused", "run.directory=unused"])
tokens = read_corpus(Path(sys.argv[1])).tokens["train"]
steps = max(1, MANY_EPOCHS * tokens // config.train.global_batch_tokens)
if steps < config.train.steps:
    print(f"train.steps={steps} run.evaluate_every_steps={-(-steps // 5)} optimizer.warmup_steps={min(20, steps // 5)}")
PY
}

echo "1. Corpus and tokenizer"
run_step python -m megamtp.commands.prepare_data "${corpus[@]}" --output "$run/corpus"
echo "2. Pretraining"
settings=''
[ -z "$own" ] || settings="$(settings_for "$run/corpus")"
# shellcheck disable=SC2086 - $settings holds several words
run_step bash launch/local.sh configs/quickstart.yaml $settings "run.directory=$run" run.requeue_exit_code=75 \
    "data.train=$run/corpus/train" "data.validation=$run/corpus/validation" "data.tokenizer=$run/corpus/tokenizer.model"
echo "3. Loss curves"
run_step python -m megamtp.commands.report "$run" ${check[@]+"${check[@]}"}
echo "4. Export and a sample"
run_step python -m megamtp.commands.convert_checkpoint "$run" "$run/hf" --to hf
run_step python -m megamtp.commands.generate "$run/hf" --prompt "def " --max-new-tokens 64 --temperature 0.8
echo
echo "Corpus: $run/corpus. Checkpoints: $run/checkpoints. Metrics: $run/metrics.jsonl and $run/tensorboard."
echo "Loss curves: $run/loss.png. Exported Llama for transformers: $run/hf."
