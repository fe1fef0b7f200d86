# Completion of cgtproxy-exec for fish.

# Prints how many words stand before the one that is being typed or the target, whichever comes first.
function __cgtproxy_exec_options
    set -l words (commandline -opc)
    set -l at 2
    while set -q words[$at]; and string match -q -- '-*' $words[$at]
        contains -- $words[$at] @WITH_VALUE@; and set at (math $at + 1)
        set at (math $at + 1)
    end
    math $at - 1
end

function __cgtproxy_exec_needs_target
    test (__cgtproxy_exec_options) -ge (count (commandline -opc))
end

function __cgtproxy_exec_needs_command
    not __cgtproxy_exec_needs_target; and not contains -- --pid (commandline -opc)
end

complete -c cgtproxy-exec -f
complete -c cgtproxy-exec -n __cgtproxy_exec_needs_target -a '(command cgtproxy-exec --list 2>/dev/null)' -d Target
@OPTIONS@
complete -c cgtproxy-exec -n __cgtproxy_exec_needs_command -x \
    -a '(__fish_complete_subcommand --fcs-skip=(math (__cgtproxy_exec_options) + 1))'
