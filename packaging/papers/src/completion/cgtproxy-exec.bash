# Completion of cgtproxy-exec for bash.

_cgtproxy_exec() {
    local current=${COMP_WORDS[COMP_CWORD]} at=1 moves='' values=' @WITH_VALUE@ '

    # Options stand before the target. bash makes three words of --option=value.
    while [ "$at" -lt "$COMP_CWORD" ]; do
        case ${COMP_WORDS[at]} in
        --)
            at=$((at + 1))
            break
            ;;
        -*)
            [ "${COMP_WORDS[at]}" != --pid ] || moves=yes
            if [[ $values = *" ${COMP_WORDS[at]} "* ]]; then
                at=$((at + 1))
                [ "${COMP_WORDS[at]}" != = ] || at=$((at + 1))
            fi
            at=$((at + 1))
            ;;
        *) break ;;
        esac
    done

    if [ "$at" -gt "$COMP_CWORD" ]; then
        # The value of an option, which is a process of one's own.
        [ "$current" != = ] || current=
        mapfile -t COMPREPLY < <(compgen -W "$(ps -u "$EUID" -o pid= 2>/dev/null)" -- "$current")
    elif [ "$at" -eq "$COMP_CWORD" ] && [[ $current = -* ]]; then
        mapfile -t COMPREPLY < <(compgen -W '@OPTIONS@' -- "$current")
    elif [ "$at" -eq "$COMP_CWORD" ]; then
        mapfile -t COMPREPLY < <(compgen -W "$(command cgtproxy-exec --list 2>/dev/null)" -- "$current")
    elif [ -n "$moves" ]; then
        COMPREPLY=()
    elif declare -F _command_offset >/dev/null; then
        _command_offset $((at + 1))
    elif [ "$COMP_CWORD" -eq $((at + 1)) ]; then
        mapfile -t COMPREPLY < <(compgen -c -- "$current")
    fi
}
complete -o default -F _cgtproxy_exec cgtproxy-exec
