#!/usr/bin/env bash
# Train VGG-16 on CIFAR-100 with the published recipe (200 epochs)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
experiment "" --arch VGG --depth-wide 16 --dataset cifar100 --save "$here/pretrained/VGG.cifar100.original.pth.tar" -- "$@"
