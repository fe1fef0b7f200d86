# make              build the programs, their manual pages, the shells' completions and the licences of what is linked
# make test         install what is missing, build, run every test
# make soak         run the tests of many starts, much data and long use with far more of each, the others per datagram
# make fuzz         fuzz what comes from outside: FUZZ='session path', SECONDS_EACH=600; needs a nightly compiler
# make miri         look for undefined behaviour where Miri can; needs a nightly compiler
# make valgrind     look for misuse of memory by what writes messages to nftables
# make bench        install what is missing, build, measure: BENCH='--quick latency …' for some of it
# make demo         install what is missing, build, show the programs at work in a sandbox
# make install      install what was built: DESTDIR=, PREFIX=/usr/local
# make uninstall    remove it again
# make deb          build a package for Debian and Ubuntu: OUTDIR=target/packages
# make rpm          build a package for Fedora, openSUSE and others
# make tarball      build an archive to install from without a compiler
# make clean        remove what was built

PREFIX ?= /usr/local
DESTDIR ?=

TARGETDIR ?= $(or $(CARGO_TARGET_DIR),target)
# Where the programs to install are, and what is made for them. Packages are made of what is there if it is given.
BUILDDIR ?= $(TARGETDIR)/release
PAPERSDIR ?= $(BUILDDIR)/papers
OUTDIR ?= $(TARGETDIR)/packages
# Where they go. packaging/install has the defaults, which hang together with PREFIX.
INSTALLATION = PREFIX DESTDIR BINDIR LIBEXECDIR DATADIR MANDIR DOCDIR ZSHDIR UNITDIR USERUNITDIR PRESETDIR \
	USERPRESETDIR SYSUSERSDIR
export $(INSTALLATION) BUILDDIR PAPERSDIR OUTDIR

# The date of everything that is made, so that it is the same whenever it is made.
SOURCE_DATE_EPOCH ?= $(or $(shell git log -1 --format=%ct 2>/dev/null),$(shell stat -c %Y CHANGELOG.md))
export SOURCE_DATE_EPOCH

# rustup puts cargo where a shell that was started before does not look.
CARGO ?= $(shell command -v cargo || echo "$${CARGO_HOME:-$$HOME/.cargo}/bin/cargo")

# The test beds make namespaces and control groups, for which they have to be root.
SUDO ?= $(if $(filter-out 0,$(shell id -u)),sudo)
AS_ROOT = $(if $(SUDO),--config 'target."cfg(unix)".runner = "$(SUDO) -E"')

.DEFAULT_GOAL := build
.PHONY: build papers test soak fuzz miri valgrind bench demo install uninstall deb rpm tarball clean

build:
	$(CARGO) build --release --locked -p cgtproxy-helper -p cgtproxy-agent -p cgtproxy-relay
	$(MAKE) papers

# What writes them runs once, here: it is not optimised, and not installed.
papers:
	$(CARGO) run --quiet --locked -p cgtproxy-papers -- \
		--date "$$(date -u -d "@$$SOURCE_DATE_EPOCH" +%F)" "$(PAPERSDIR)"

# Tests run programs of other packages, which cargo builds only when it is told to.
test:
	.ci/dependencies test
	$(CARGO) build --workspace --locked
	$(CARGO) $(AS_ROOT) test --workspace --locked

# What takes too long for each run: programs that are started under `start: closed`, megabytes through the relay,
# rounds in which everything comes and goes, and policies that are made at random.
STARTS ?= 10000
BULK ?= 1024
ROUNDS ?= 100
POLICIES ?= 200
soak:
	.ci/dependencies test
	$(CARGO) build --workspace --locked
	CGTPROXY_TEST_STARTS=$(STARTS) CGTPROXY_TEST_BULK=$(BULK) CGTPROXY_TEST_ROUNDS=$(ROUNDS) \
	CGTPROXY_TEST_POLICIES=$(POLICIES) CGTPROXY_TEST_DEADLINE=3600 \
		$(CARGO) $(AS_ROOT) test --workspace --locked \
		--test closed --test relay_load --test churn --test random
	CGTPROXY_TEST_UDP_VERDICTS=per-datagram \
		$(CARGO) $(AS_ROOT) test --locked --no-fail-fast -p cgtproxy-tests

# `make test` does a bounded run of the same.
FUZZ ?= $(basename $(notdir $(wildcard tests/fuzz/fuzz_targets/*.rs)))
SECONDS_EACH ?= 600
# What is found is not for the sources, but for the next run.
FOUND = $(TARGETDIR)/fuzz-corpus
fuzz:
	@$(CARGO) +nightly fuzz --version >/dev/null 2>&1 || { echo "fuzzing needs a nightly compiler" \
		"(rustup toolchain install nightly) and cargo-fuzz (cargo install cargo-fuzz)" >&2; exit 1; }
	for target in $(FUZZ); do \
		mkdir -p "$(FOUND)/$$target" && \
		$(CARGO) +nightly fuzz run --fuzz-dir tests/fuzz --sanitizer none "$$target" \
			"$(FOUND)/$$target" "tests/fuzz/corpus/$$target" -- -max_total_time=$(SECONDS_EACH) || exit; \
	done

# What reads what comes from outside and decides about it, and needs neither files nor sockets nor C. A few cases of
# each property: Miri takes a thousand times as long.
MIRI = MIRIFLAGS=-Zmiri-disable-isolation PROPTEST_CASES=2 $(CARGO) +nightly miri test --locked --lib
miri:
	@$(CARGO) +nightly miri --version >/dev/null 2>&1 || { echo "this needs Miri" \
		"(rustup component add miri rust-src --toolchain nightly)" >&2; exit 1; }
	$(MIRI) -p cgtproxy-proto --features yaml -- interface:: message:: name:: nearest:: network:: path:: yaml::
	$(MIRI) -p cgtproxy-helper -- bypass:: config:: conntrack:: mark:: netlink:: nft::foreign registry:: snapshot::
	$(MIRI) -p cgtproxy-agent -- config::upstream \
		policy::application policy::exec_slices policy::subject sync::wire text::
	$(MIRI) -p cgtproxy-relay -- dns:: fake:: http:: socks::

# All unsafe code is behind these messages. `make test` does the same.
MEMCHECK = valgrind --error-exitcode=1 --leak-check=full --errors-for-leak-kinds=definite
valgrind:
	$(CARGO) --config 'target."cfg(unix)".runner = "$(MEMCHECK)"' test --locked -p cgtproxy-helper --lib -- \
		--test-threads=1 nft:: --skip nothing_is_used_that_is_not_ours

# The daemons as they are installed, beside programs that measure them, which take less time to link.
BENCHDIR = $(TARGETDIR)/bench
BENCH ?=
bench:
	.ci/dependencies
	$(CARGO) build --release --locked -p cgtproxy-helper -p cgtproxy-agent -p cgtproxy-relay
	$(CARGO) build --profile tools --locked -p cgtproxy-bench -p cgtproxy-tests
	install -D -t $(BENCHDIR) \
		$(addprefix $(dir $(BENCHDIR))release/,cgtproxy-helper cgtproxy-agent cgtproxy-relay) \
		$(addprefix $(dir $(BENCHDIR))tools/,cgtproxy-bench cgtproxy-testapp)
	$(SUDO) $(BENCHDIR)/cgtproxy-bench --out $(BENCHDIR)/results $(BENCH)
	$(if $(SUDO),$(SUDO) chown -R "$$(id -u):$$(id -g)" $(BENCHDIR)/results)

# Unoptimised: link-time optimisation takes minutes, and nothing here is about speed.
demo:
	.ci/dependencies
	$(CARGO) build --workspace --locked
	$(SUDO) $(TARGETDIR)/debug/cgtproxy-demo

# Users' managers read the new units as well, without anybody waiting for them. Restarted, the helper leaves what is in
# the kernel to its successor. That a service waits for its configuration, systemctl says, and is no failure of this.
install:
	packaging/install install
ifeq ($(DESTDIR),)
	if [ -d /run/systemd/system ]; then \
		systemd-sysusers "$$(packaging/install list | grep '/cgtproxy\.conf$$')" && systemctl daemon-reload && \
		{ systemctl list-units --plain --no-legend --state=active 'user@*.service' | \
			sed -n 's/^\(user@[0-9]*\.service\) .*/\1/p' | \
			xargs -r systemctl kill --kill-whom=main --signal=SIGHUP || :; } && \
		{ systemctl try-restart cgtproxy-helper.service cgtproxy-agent-system.service || :; }; \
	fi
	if [ -d /run/systemd/system ] && systemctl is-active --quiet cgtproxy.service; then \
		echo 'cgtproxy.service, the daemon of the original cgtproxy, is running, and cgtproxy-helper would replace its'; \
		echo "table in the kernel. How to move: $$(packaging/install list | grep '/moving\.md$$')"; \
	fi
endif

# Users' agents are stopped first, which would start the helper again. A user decides how long their manager takes: all
# are asked at once and have 15 seconds. What asks runs as the user, and may outlive that: it gets no file of ours.
# Stopping the helper's socket also removes what it has in the kernel.
uninstall:
ifeq ($(DESTDIR),)
	if [ -d /run/systemd/system ] && systemctl cat cgtproxy-helper.socket >/dev/null 2>&1; then \
		systemctl list-units --plain --no-legend 'user@*.service' | \
			sed -n 's/^user@\([0-9]*\)\.service .*/\1/p' | { \
			while read -r uid; do \
				timeout 15 systemctl --user --machine="$$uid@" stop \
					cgtproxy-agent.service cgtproxy-relay.socket cgtproxy-relay.service </dev/null >/dev/null 2>&1 & \
			done; \
			wait; \
		}; \
		systemctl disable --now cgtproxy-agent-system.service cgtproxy-helper.socket cgtproxy-helper.service || :; \
		systemctl --global disable cgtproxy-agent.service cgtproxy-relay.socket || :; \
	fi
endif
	packaging/install uninstall
ifeq ($(DESTDIR),)
	if [ -d /run/systemd/system ]; then systemctl daemon-reload; fi
	rmdir /run/cgtproxy 2>/dev/null || :
endif

# With BUILDDIR= on the command line, of programs and papers that are there.
deb rpm tarball: $(if $(filter command line environment,$(origin BUILDDIR)),,build)
	packaging/$@

clean:
	$(CARGO) clean
