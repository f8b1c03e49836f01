#!/usr/bin/env bash
# From text to a trained 4-token model, its loss curves, an export and a sample, in a few minutes on two CPU cores.
#   bash launch/quickstart.sh                      the standard library of the running Python
#   bash launch/quickstart.sh --corpus PATH ...    your own text files, source tree or JSONL
# Interrupted and started again, it goes on where it was. Everything lies in runs/quickstart (with --corpus: runs/own).
set -euo pipefail
here="$PWD"
corpus=(--standard-library) run=runs/quickstart
if [ "${1:-}" = --corpus ] && [ $# -gt 1 ]; then
    shift
    corpus=(--input) run=runs/own
    for path in "$@"; do
        case "$path" in /*) corpus+=("$path") ;; *) corpus+=("$here/$path") ;; esac
    done
elif [ $# -gt 0 ]; then
    echo "megamtp: error: $*: unknown arguments; expected nothing, or --corpus PATH ..." >&2
    exit 2
fi
. "$(dirname "$0")/environment.sh"

echo "1. Corpus and tokenizer"
python -m megamtp.commands.prepare_data "${corpus[@]}" --output "$run/corpus"
echo "2. Pretraining"
bash launch/local.sh configs/quickstart.yaml "run.directory=$run" run.requeue_exit_code=75 \
    "data.train=$run/corpus/train" "data.validation=$run/corpus/validation" "data.tokenizer=$run/corpus/tokenizer.model" &
job=$! status=0
trap 'kill -TERM "$job" 2>/dev/null || true' TERM INT  # the job saves and ends; so does this script then
while kill -0 "$job" 2>/dev/null; do
    wait "$job" && status=0 || status=$?
done
trap - TERM INT
if [ "$status" = 75 ]; then
    echo "Stopped and saved. The same command goes on from there."
fi
[ "$status" = 0 ] || exit "$status"
echo "3. Loss curves"
python -m megamtp.commands.report "$run" --min-margin 0.8
echo "4. Export and a sample"
python -m megamtp.commands.convert_checkpoint "$run" "$run/hf" --to hf
python -m megamtp.commands.generate "$run/hf" --prompt "def " --max-new-tokens 64 --temperature 0.8
echo
echo "The corpus lies in $run/corpus, checkpoints in $run/checkpoints, metrics in $run/metrics.jsonl and $run/tensorboard,"
echo "the curves in $run/loss.png, and the exported Llama, for transformers, in $run/hf."
