#!/usr/bin/env bash
# VGG-16 on CIFAR-100, the paper's kept widths: original, prune, merge, …
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
experiment "-t -c" --arch VGG --depth-wide 16 --dataset cifar100 --evaluate -- "$@"
