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
                _cgtproxy_kind=$(whence -w -- "$2") || :
                _cgtproxy_kind=${_cgtproxy_kind##*: }
            else
                _cgtproxy_kind=$(type -t -- "$2") || :
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
