#!/usr/bin/env bash
# ResNet-56 on CIFAR-10: original, prune, merge, …
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
experiment "-t -c -r=0.2" --arch ResNet --depth-wide 56 --dataset cifar10 --evaluate -- "$@"
