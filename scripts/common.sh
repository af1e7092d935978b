# Shared by all scripts: parses -t -c -r -h, then runs main.py with the experiment's settings.
#
#   experiment FLAGS MAIN_OPTION… -- "$@"      FLAGS: those of -t -c -r=DEFAULT that the script has
#
# The defaults are the published ones: the original network, l1-norm, and the ratio that each script names.
#
# The method's settings (threshold, λ, VGG's kept widths) are main.py's defaults for the network and data set: settings.py.

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage() {
    echo "usage: bash scripts/$(basename "$0")$1 [-- main.py's options]"
    [[ $1 == *-t* ]] && echo "  -t  original, prune, merge (published form), merge-derived, restore (ours), lbyl or fold   [original]"
    [[ $1 == *-c* ]] && echo "  -c  which neurons stay: l1-norm, l2-norm or l2-GM              [l1-norm]"
    [[ $1 == *-r* ]] && echo "  -r  share of neurons to drop, in [0, 1)                        [$2]"
    echo "  -h  this text; main.py's options: python main.py --help"
}

experiment() {
    local flags=$1 synopsis="" ratio="" options=() flag
    shift
    for flag in $flags; do
        case $flag in
        -t) synopsis+=" [-t TYPE]" options+=(--model-type original) ;;
        -c) synopsis+=" [-c CRITERION]" options+=(--criterion l1-norm) ;;
        -r=*) synopsis+=" [-r RATIO]" ratio=${flag#*=} && options+=(--pruning-ratio "$ratio") ;;
        esac
    done
    while [[ $1 != -- ]]; do options+=("$1") && shift; done
    shift
    while (($#)); do
        case $1 in
        --) shift && options+=("$@") && break ;;
        -h | --help) usage "$synopsis" "$ratio" && exit 0 ;;
        -t | -c | -r)
            if [[ " ${flags%=*} " != *" $1 "* ]]; then wrong "has no $1" "$synopsis"; fi
            if (($# < 2)) || [[ $2 == -[tcrh-] ]]; then wrong "$1 needs a value" "$synopsis"; fi
            case $1 in
            -t) options+=(--model-type "$2") ;;
            -c) options+=(--criterion "$2") ;;
            -r) options+=(--pruning-ratio "$2") ;;
            esac
            shift 2
            ;;
        *) wrong "does not know $1 (main.py's options go behind --)" "$synopsis" ;;
        esac
    done
    run "${options[@]}"
}

wrong() {
    echo "$(basename "$0"): $1; usage: bash scripts/$(basename "$0")$2 [-- main.py's options]" >&2
    exit 2
}

run() { # the environment that make made, else whatever python is on the PATH
    local python=$here/.venv/bin/python
    [[ -x $python ]] || python=$(command -v python3 || command -v python || echo python3)
    exec "$python" "$here/main.py" "$@"
}
