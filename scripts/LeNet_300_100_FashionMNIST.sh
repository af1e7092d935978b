#!/usr/bin/env bash
# LeNet-300-100 on FashionMNIST: original, prune, merge, …
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
experiment "-t -c -r=0.5" --arch LeNet_300_100 --dataset FashionMNIST --evaluate -- "$@"
