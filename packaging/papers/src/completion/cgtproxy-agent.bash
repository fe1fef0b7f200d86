# Completion of cgtproxy-agent for bash.

_cgtproxy_agent() {
    local current=${COMP_WORDS[COMP_CWORD]} command=cgtproxy-agent commands='' options='' files='' at

    # Which command it is. bash makes three words of --option=value.
    for ((at = 1; at < COMP_CWORD; at++)); do
        case ${COMP_WORDS[at]} in
        @WITH_VALUE@)
            at=$((at + 1))
            [ "${COMP_WORDS[at]}" != = ] || at=$((at + 1))
            ;;
        *)
            case "$command ${COMP_WORDS[at]}" in
@COMMANDS@
                command+=" ${COMP_WORDS[at]}"
                ;;
            esac
            ;;
        esac
    done
    case $command in
@CASES@
    esac

    COMPREPLY=()
    if [ "$at" -gt "$COMP_CWORD" ]; then
        # The value of an option is a file, which bash completes better.
        return
    elif [[ $current = -* ]]; then
        mapfile -t COMPREPLY < <(compgen -W "$options" -- "$current")
        return
    fi
    [ -z "$commands" ] || mapfile -t COMPREPLY < <(compgen -W "$commands" -- "$current")
    if [ -z "$files" ]; then
        compopt +o default 2>/dev/null
    elif [ "${#COMPREPLY[@]}" -gt 0 ]; then
        compopt -o filenames 2>/dev/null
        mapfile -t -O "${#COMPREPLY[@]}" COMPREPLY < <(compgen -f -- "$current")
    fi
}
complete -o default -F _cgtproxy_agent cgtproxy-agent
