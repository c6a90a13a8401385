#!/usr/bin/env bash
# Checks that this machine can train with SDPO on verl: tiny models, three steps each, then checks of losses, sampler,
# teacher, images, resuming and checkpoints.
#
#   bash prove.sh                   one GPU: text (resumed once), images and LoRA, sampled by vLLM; two GPUs or more: also
#                                   one step off policy with NCCL; no GPU: all parts on the CPU, without vLLM
#   bash prove.sh text images       only these parts
#   bash prove.sh all KEY=VALUE     with settings of verl
#
# SMOKE_DIR: folder for models, logs and checkpoints (default: a temporary folder). PYTHON: the interpreter.
set -euo pipefail
[ $# -gt 0 ] || set -- all
exec "${PYTHON:-python}" -m sdpo.verl_backend.smoke.suite "$@"
