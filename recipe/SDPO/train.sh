#!/usr/bin/env bash
# SDPO on stock verl, one step off policy: one GPU samples with vLLM, one trains with FSDP2.
#
#   bash train.sh                   Qwen2.5-VL-3B on Geometry3k, two GPUs: configs/geo3k_2gpus.yaml
#   SMOKE_TEST=1 bash train.sh      a tiny vision-language model, three steps, with or without GPUs
#   bash train.sh KEY=VALUE ...     settings of the config file (docs/configuration.md); other keys go to Hydra
#
# Variables and their defaults:
CONFIG_FILE=${CONFIG_FILE:-$(dirname "${BASH_SOURCE[0]}")/../../configs/geo3k_2gpus.yaml}
HF_MODEL_PATH=${HF_MODEL_PATH:-Qwen/Qwen2.5-VL-3B-Instruct}
TRAIN_FILE=${TRAIN_FILE:-$HOME/data/geo3k/train.parquet}
TEST_FILE=${TEST_FILE:-$HOME/data/geo3k/test.parquet}
TOTAL_TRAIN_STEPS=${TOTAL_TRAIN_STEPS:-100}
SMOKE_TEST=${SMOKE_TEST:-0}
PYTHON=${PYTHON:-python}
# and SMOKE_DIR, the output of the smoke test (model, data, log, checkpoints): a temporary folder

set -euo pipefail

if [ "$SMOKE_TEST" = 1 ]; then
  exec "$PYTHON" -m sdpo.verl_backend.smoke.suite "$@"
fi

exec "$PYTHON" -m sdpo.cli verl "$CONFIG_FILE" \
  model.path="$HF_MODEL_PATH" \
  data.train_files="[$TRAIN_FILE]" \
  data.val_files="[$TEST_FILE]" \
  max_steps="$TOTAL_TRAIN_STEPS" \
  "$@"
