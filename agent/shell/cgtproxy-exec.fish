# cgtproxy-exec for fish. Source this file from ~/.config/fish/config.fish:
#
#     source /usr/share/cgtproxy/cgtproxy-exec.fish
#
# The program cgtproxy-exec can only run other programs. The function of the same name that is defined
# here runs functions (which is what fish's aliases are) and builtins as well:
#
#     alias ll 'ls -l'
#     cgtproxy-exec proxy ll /net/share
#
# fish has no subshells, so these run in a new fish, which is told the function's definition and has
# your configuration and exported variables, but not the other variables of this shell. All else goes
# to the program as it is.

function cgtproxy-exec --description 'Run a command under a target of cgtproxy'
    set -l options
    set -l rest $argv
    if test "$rest[1]" = --no-wait
        set options --no-wait
        set -e rest[1]
    end
    if set -q rest[2]; and not string match -q -- '-*' $rest[1]
        set -l run (status fish-path) -c
        if functions -q -- $rest[2]
            set -l definition (functions -- $rest[2] | string collect)
            command cgtproxy-exec $options $rest[1] $run 'eval $argv[1]; $argv[2..]' $definition $rest[2..]
            return
        else if builtin -q -- $rest[2]
            command cgtproxy-exec $options $rest[1] $run '$argv' $rest[2..]
            return
        end
    end
    command cgtproxy-exec $argv
end
