# cgtproxy-exec for bash and zsh. Source this file from ~/.bashrc or ~/.zshrc:
#
#     . /usr/share/cgtproxy/cgtproxy-exec.sh
#
# The program cgtproxy-exec can only run other programs. The function of the same name that is defined
# here runs aliases, functions and builtins of your shell as well:
#
#     alias ll='ls -l'
#     cgtproxy-exec proxy ll /net/share
#     update() { git fetch && git rebase; }
#     cgtproxy-exec direct update
#
# These run in a subshell, which is moved to the target first: what they change in the shell itself
# (variables, the working directory) is gone when they end. All else goes to the program as it is.
#
# Names of targets are completed where the shell's completion is loaded before this file.

# shellcheck shell=bash
# shellcheck disable=SC2154,SC2034 # zsh's own variables

cgtproxy-exec() {
    # Names begin like this because what is run below sees them.
    local _cgtproxy_no_wait='' _cgtproxy_kind='' _cgtproxy_line=''

    if [ "${1-}" = --no-wait ]; then
        _cgtproxy_no_wait=--no-wait
        shift
    fi
    case ${1-} in
    -*) ;; # another option of the program, which is not followed by a command
    *)
        if [ "$#" -ge 2 ]; then
            if [ -n "${ZSH_VERSION-}" ]; then
                _cgtproxy_kind=$(whence -w -- "$2")
                _cgtproxy_kind=${_cgtproxy_kind##*: }
            else
                _cgtproxy_kind=$(type -t -- "$2")
            fi
        fi
        ;;
    esac

    case $_cgtproxy_kind in
    alias | keyword | reserved)
        # Quotes would make another word of it.
        _cgtproxy_line=$2
        ;;
    function | builtin)
        _cgtproxy_line=$(printf '%q' "$2")
        ;;
    *)
        command cgtproxy-exec ${_cgtproxy_no_wait:+"$_cgtproxy_no_wait"} "$@"
        return
        ;;
    esac

    (
        if [ -n "${ZSH_VERSION-}" ]; then
            zmodload zsh/system && _cgtproxy_pid=${sysparams[pid]}
        else
            _cgtproxy_pid=$BASHPID
        fi
        command cgtproxy-exec ${_cgtproxy_no_wait:+"$_cgtproxy_no_wait"} \
            --pid "$_cgtproxy_pid" -- "$1" || exit
        shift 2
        if [ "$#" -gt 0 ]; then
            _cgtproxy_line="$_cgtproxy_line$(printf ' %q' "$@")"
        fi
        eval "$_cgtproxy_line"
    )
}

if [ -n "${ZSH_VERSION-}" ]; then
    if whence -w compdef >/dev/null; then
        _cgtproxy_exec() {
            while [ "$CURRENT" -gt 2 ] && [ "${words[2]}" = --no-wait ]; do
                shift words
                CURRENT=$((CURRENT - 1))
            done
            if [ "$CURRENT" -eq 2 ]; then
                # shellcheck disable=SC2046 # one word for each target
                compadd -- --no-wait $(command cgtproxy-exec --list 2>/dev/null)
            else
                shift 2 words
                CURRENT=$((CURRENT - 2))
                _normal
            fi
        }
        compdef _cgtproxy_exec cgtproxy-exec
    fi
elif [ -n "${BASH_VERSION-}" ]; then
    _cgtproxy_exec() {
        local target=1 names
        if [ "${COMP_WORDS[1]}" = --no-wait ]; then
            target=2
        fi
        if [ "$COMP_CWORD" -le "$target" ]; then
            names=$(command cgtproxy-exec --list 2>/dev/null)
            mapfile -t COMPREPLY < <(compgen -W "--no-wait $names" -- "${COMP_WORDS[COMP_CWORD]}")
        elif declare -F _command_offset >/dev/null; then
            _command_offset $((target + 1))
        elif [ "$COMP_CWORD" -eq $((target + 1)) ]; then
            mapfile -t COMPREPLY < <(compgen -c -- "${COMP_WORDS[COMP_CWORD]}")
        fi
    }
    complete -o default -F _cgtproxy_exec cgtproxy-exec
fi
