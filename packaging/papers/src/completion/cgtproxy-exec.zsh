#compdef cgtproxy-exec
# Completion of cgtproxy-exec for zsh.

_cgtproxy_exec_targets() {
    local -a targets
    targets=(${(f)"$(_call_program targets cgtproxy-exec --list 2>/dev/null)"})
    compadd "$@" -a targets
}

_cgtproxy_exec() {
    # Options stand before the target (-A), and what follows it is another command line.
    _arguments -S -A '-*' \
@OPTIONS@
    '1:target:_cgtproxy_exec_targets' \
    '*:::command:_normal'
}

_cgtproxy_exec "$@"
