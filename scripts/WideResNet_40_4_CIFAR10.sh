#!/usr/bin/env bash
# WideResNet-40-4 on CIFAR-10: original, prune, merge, …
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
experiment "-t -c -r=0.2" --arch WideResNet --depth-wide 40,4 --dataset cifar10 --evaluate -- "$@"
