#!/usr/bin/env bash
# Proves that this machine can train with SDPO on verl: tiny models through every part that its devices allow, three
# steps each, then checks of losses, sampler, teacher, images, resumption and checkpoints.
#
#   bash prove.sh                   one GPU: text (resumed once), images and LoRA, sampled by vLLM; two or more: also one
#                                   step off policy, weights over NCCL; none: all of it on the CPU, without vLLM
#   bash prove.sh text images       these parts alone
#   bash prove.sh all KEY=VALUE     with settings of verl's
#
# SMOKE_DIR names the folder for models, logs and checkpoints (default: a temporary one); PYTHON the interpreter.
set -euo pipefail
[ $# -gt 0 ] || set -- all
exec "${PYTHON:-python}" -m sdpo.verl_backend.smoke.suite "$@"
