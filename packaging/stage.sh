# shellcheck shell=sh
# What the builders of packages have in common; they read this in the repository's directory.

: "${BUILDDIR:?}" "${PAPERSDIR:?}" "${OUTDIR:?}" "${SOURCE_DATE_EPOCH:?}"
export SOURCE_DATE_EPOCH TZ=UTC LC_ALL=C
umask 022

# shellcheck disable=SC2034 # what reads this file uses it
version=$(sed -n '/^\[workspace\.package\]/,/^$/s/^version = "\(.*\)"$/\1/p' Cargo.toml)

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$OUTDIR"

# Everything as a distribution has it, in the directory $1: stripped, manual pages compressed, and a directory for what
# administrators write. Variables of packaging/install may follow.
stage() {
    root=$1
    shift
    env -i PATH="$PATH" BUILDDIR="$BUILDDIR" PAPERSDIR="$PAPERSDIR" \
        PREFIX=/usr DESTDIR="$root" "$@" packaging/install install
    strip_programs "$root"
    find "$root/usr/share/man" -type f -exec gzip -9n {} +
    mkdir -p "$root/etc/cgtproxy"
}

# What is not needed to run is left out, as cargo's release profile does.
strip_programs() {
    find "$1" -type f -perm -100 -name 'cgtproxy-*' \
        -exec "${STRIP:-strip}" --strip-unneeded --remove-section=.comment {} +
}

# The same dates whenever it is built.
set_dates() {
    find "$1" -exec touch --no-dereference --date="@$SOURCE_DATE_EPOCH" {} +
}

# The names of the units that a manifest's directory has.
units() {
    env -i PATH="$PATH" PREFIX=/usr packaging/install list | sed -n "s|^/usr/lib/systemd/$1/||p" | tr '\n' ' ' |
        sed 's/ $//'
}
