# make              build the programs
# make test         install what is missing, build, run every test
# make bench        install what is missing, build, measure: BENCH='--quick latency …' for some of it
# make demo         install what is missing, build, show the programs at work in a sandbox
# make install      install what was built: DESTDIR=, PREFIX=/usr/local
# make uninstall    remove it again
# make clean        remove what was built

PREFIX ?= /usr/local
DESTDIR ?=
BINDIR ?= $(PREFIX)/bin
LIBEXECDIR ?= $(PREFIX)/libexec
DATADIR ?= $(PREFIX)/share
DOCDIR ?= $(DATADIR)/doc/cgtproxy
UNITDIR ?= $(PREFIX)/lib/systemd/system
USERUNITDIR ?= $(PREFIX)/lib/systemd/user
SYSUSERSDIR ?= $(PREFIX)/lib/sysusers.d

# rustup puts cargo where a shell that was started before does not look.
CARGO ?= $(shell command -v cargo || echo "$${CARGO_HOME:-$$HOME/.cargo}/bin/cargo")
INSTALL ?= install
# Where the programs to install are.
BUILDDIR ?= $(or $(CARGO_TARGET_DIR),target)/release

# The test beds make namespaces and control groups, for which they have to be root.
SUDO ?= $(if $(filter-out 0,$(shell id -u)),sudo)
AS_ROOT = $(if $(SUDO),--config 'target."cfg(unix)".runner = "$(SUDO) -E"')

.DEFAULT_GOAL := build
.PHONY: build test bench demo install uninstall clean

build:
	$(CARGO) build --release --locked -p cgtproxy-helper -p cgtproxy-agent

# Tests run programs of other packages, which cargo builds only when it is told to.
test:
	.ci/dependencies test
	$(CARGO) build --workspace --locked
	$(CARGO) $(AS_ROOT) test --workspace --locked

# The daemons as they are installed, beside programs that measure them, which take less time to link.
BENCHDIR = $(or $(CARGO_TARGET_DIR),target)/bench
BENCH ?=
bench:
	.ci/dependencies
	$(CARGO) build --release --locked -p cgtproxy-helper -p cgtproxy-agent
	$(CARGO) build --profile tools --locked -p cgtproxy-bench -p cgtproxy-tests
	$(INSTALL) -D -t $(BENCHDIR) \
		$(addprefix $(BENCHDIR)/../release/,cgtproxy-helper cgtproxy-agent) \
		$(addprefix $(BENCHDIR)/../tools/,cgtproxy-bench cgtproxy-testapp)
	$(SUDO) $(BENCHDIR)/cgtproxy-bench --out $(BENCHDIR)/results $(BENCH)

# Unoptimised: link-time optimisation takes minutes, and nothing here is about speed.
demo:
	.ci/dependencies
	$(CARGO) build --workspace --locked
	$(SUDO) $(or $(CARGO_TARGET_DIR),target)/debug/cgtproxy-demo

# The files name the directories of a distribution's package.
SUBSTITUTE = sed -e 's|/usr/libexec/|$(LIBEXECDIR)/|g' -e 's|/usr/bin/|$(BINDIR)/|g' \
	-e 's|/usr/share/|$(DATADIR)/|g'

EXECUTABLES = \
	$(LIBEXECDIR)/cgtproxy-helper \
	$(BINDIR)/cgtproxy-agent \
	$(BINDIR)/cgtproxy-exec
UNITS = \
	$(UNITDIR)/cgtproxy-helper.socket \
	$(UNITDIR)/cgtproxy-helper.service \
	$(USERUNITDIR)/cgtproxy-agent.service
SYSUSERS = $(SYSUSERSDIR)/cgtproxy.conf
SHELL_FUNCTIONS = \
	$(DATADIR)/cgtproxy/cgtproxy-exec.sh \
	$(DATADIR)/cgtproxy/cgtproxy-exec.fish
DOCUMENTS = $(addprefix $(DOCDIR)/,$(notdir README.md CHANGELOG.md LICENSE $(wildcard docs/*.md)))
EXAMPLES = $(addprefix $(DOCDIR)/examples/,$(notdir $(wildcard docs/examples/*.yaml)))

install:
	@test -x $(BUILDDIR)/cgtproxy-helper || { \
		echo "There is nothing to install in $(BUILDDIR) yet: run 'make' first." >&2; exit 1; }
	for file in $(EXECUTABLES); do \
		$(INSTALL) -D -m 755 "$(BUILDDIR)/$${file##*/}" "$(DESTDIR)$$file" || exit 1; \
	done
	for file in $(UNITS); do \
		$(INSTALL) -d "$(DESTDIR)$${file%/*}" && \
		$(SUBSTITUTE) "systemd/$${file##*/}" >"$(DESTDIR)$$file" && \
		chmod 644 "$(DESTDIR)$$file" || exit 1; \
	done
	$(INSTALL) -D -m 644 systemd/cgtproxy.sysusers "$(DESTDIR)$(SYSUSERS)"
	for file in $(SHELL_FUNCTIONS); do \
		$(INSTALL) -d "$(DESTDIR)$${file%/*}" && \
		$(SUBSTITUTE) "agent/shell/$${file##*/}" >"$(DESTDIR)$$file" && \
		chmod 644 "$(DESTDIR)$$file" || exit 1; \
	done
	for file in README.md CHANGELOG.md LICENSE docs/*.md; do \
		$(INSTALL) -D -m 644 "$$file" "$(DESTDIR)$(DOCDIR)/$${file##*/}" || exit 1; \
	done
	for file in docs/examples/*.yaml; do \
		$(INSTALL) -D -m 644 "$$file" "$(DESTDIR)$(DOCDIR)/examples/$${file##*/}" || exit 1; \
	done
ifeq ($(DESTDIR),)
	if [ -d /run/systemd/system ]; then \
		systemd-sysusers "$(SYSUSERS)" && systemctl daemon-reload; \
	fi
endif

# Stopping the socket also removes what the helper has in the kernel.
uninstall:
ifeq ($(DESTDIR),)
	if [ -d /run/systemd/system ] && [ -e "$(UNITDIR)/cgtproxy-helper.socket" ]; then \
		systemctl disable --now cgtproxy-helper.socket cgtproxy-helper.service; \
		systemctl --global disable cgtproxy-agent.service; \
	fi
endif
	rm -f $(addprefix $(DESTDIR),$(EXECUTABLES) $(UNITS) $(SYSUSERS) $(SHELL_FUNCTIONS) \
		$(DOCUMENTS) $(EXAMPLES))
	for directory in $(DOCDIR)/examples $(DOCDIR) $(DATADIR)/cgtproxy; do \
		rmdir "$(DESTDIR)$$directory" 2>/dev/null || :; \
	done
ifeq ($(DESTDIR),)
	if [ -d /run/systemd/system ]; then systemctl daemon-reload; fi
endif

clean:
	$(CARGO) clean
