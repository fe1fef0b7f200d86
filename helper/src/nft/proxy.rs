//! The chains of one proxy: which packets are diverted to it, and how they are delivered.

use std::ffi::CStr;
use std::net::{Ipv4Addr, Ipv6Addr};

use cgtproxy_proto::name::ProxyName;

use super::common_rules::to_proxy_of_answer;
use super::names::{Names, ProxyChain};
use super::plan::Layout;
use super::policy::{Delivery, Proxy, UdpVerdicts};
use super::rule::{Protocol, RuleBuilder};
use super::ruleset::REFUSE;
use super::transaction::Transaction;

impl Transaction<'_> {
    /// A proxy's chains, and the elements that lead from its mark and its number to them.
    pub(super) fn create_proxy(
        &mut self,
        names: &Names,
        layout: &Layout,
        name: &ProxyName,
        proxy: &Proxy,
    ) {
        for chain in names.of_proxy(name, proxy) {
            self.add_chain(&chain);
        }
        self.proxy_rules(names, layout, name, proxy);
        self.add_map_elements(&names.proxy_elements(self.marks, name, proxy));
    }

    /// Adds the chains that a proxy needs and did not need before.
    pub(super) fn create_chains_between(
        &mut self,
        names: &Names,
        name: &ProxyName,
        before: &Proxy,
        after: &Proxy,
    ) {
        let had = names.of_proxy(name, before);
        for chain in names.of_proxy(name, after) {
            if !had.contains(&chain) {
                self.add_chain(&chain);
            }
        }
    }

    /// Writes a proxy's rules and elements for another port, other exceptions or another DNS server. Its mark stays.
    pub(super) fn change_proxy(
        &mut self,
        names: &Names,
        layout: &Layout,
        name: &ProxyName,
        before: &Proxy,
        after: &Proxy,
    ) {
        self.proxy_rules(names, layout, name, after);
        let elements = |proxy| names.proxy_elements(self.marks, name, proxy);
        let (had, has) = (elements(before), elements(after));
        self.change_map_elements(&had, &has);
    }

    /// Writes all rules of a proxy's chains anew.
    pub(super) fn proxy_rules(
        &mut self,
        names: &Names,
        layout: &Layout,
        name: &ProxyName,
        proxy: &Proxy,
    ) {
        for chain in names.of_proxy(name, proxy) {
            self.flush_chain(&chain);
        }
        match proxy.settings.delivery {
            Delivery::Tproxy(_) => {
                self.tproxy_chains();
                self.delivery_rules(names);
            }
            Delivery::Redirect(_) => self.nat_chains(),
        }
        self.open_rules(names, layout, name, proxy);
        self.new_rules(names, layout, name, proxy);
        if names.is_system() {
            self.divert_rules(&names.chain(ProxyChain::Divert, name), proxy);
        }
        if let Delivery::Redirect(Some(port)) = proxy.settings.delivery {
            self.redirect_rules(&names.chain(ProxyChain::Redirect, name), port.get());
        }
        if proxy.is_translated() {
            self.receive_rules(names, layout, name, proxy);
        }
        if let Some(hijack) = &proxy.settings.dns_hijack {
            self.nat_chains();
            self.dns_rules(names, layout, name, proxy.mark, hijack);
            self.resolve_rules(&names.chain(ProxyChain::Resolve, name), hijack);
        }
    }

    /// Chain `proxy-UID-NAME`, for open connections: those that have this proxy's mark go on to it, whatever the
    /// verdict is by now. A packet comes here from its control group's verdict, or by its mark alone: then it has to be
    /// of the user whose proxy this is, for the mark may have been another user's when the connection began.
    fn open_rules(&mut self, names: &Names, layout: &Layout, name: &ProxyName, proxy: &Proxy) {
        let chain = names.chain(ProxyChain::Proxy, name);
        let (mask, mark) = (self.marks.mask(), proxy.mark.value());
        if matches!(proxy.settings.delivery, Delivery::Redirect(_)) {
            // A connection that was open before this proxy was what it is now: its packets would leave as they
            // are.
            // ct mark & MASK == MARK ct status & (confirmed | dnat) == confirmed goto refuse
            self.add_rules(
                &chain,
                [&|rule| {
                    rule.ct_mark_is(mask, mark)
                        .ct_confirmed_without_dnat()
                        .goto(REFUSE)
                }],
            );
        }
        // ct mark & MASK == MARK …: meta mark set meta mark & ~MASK | MARK accept
        self.whose_rules(
            &chain,
            names,
            layout,
            |rule| rule.ct_mark_is(mask, mark),
            |rule| go_on(rule, proxy, mask),
        );
    }

    /// Rules for the packets of open connections that `of` matches: `own` if they are the user's own. Those of others
    /// are refused, since the mark may have been another user's when the connection began. In the system's policy,
    /// `own` is for all.
    pub(super) fn whose_rules(
        &mut self,
        chain: &CStr,
        names: &Names,
        layout: &Layout,
        of: impl Fn(RuleBuilder<'_>) -> RuleBuilder<'_>,
        own: impl Fn(RuleBuilder<'_>) -> RuleBuilder<'_>,
    ) {
        let (level, id) = (layout.subtree.level(), layout.subtree.id().to_bytes());
        if !names.is_system() {
            self.add_rules(
                chain,
                [
                    // … socket cgroupv2 level LEVEL SUBTREE OWN
                    &|rule| own(of(rule).socket_cgroupv2(level, &id)),
                    // A service's has no level that deep, and nothing is equal or not to what is not there.
                    // … socket cgroupv2 level 1 != 0 goto refuse
                    &|rule| of(rule).socket_level_exists(1).goto(REFUSE),
                    // At the root are the kernel's own sockets too, which nobody has open.
                    // … meta skuid >= 0 goto refuse
                    &|rule| of(rule).skuid_known().goto(REFUSE),
                    // What the kernel sends through a tunnel (see `kernel_rules`).
                    // … meta l4proto udp goto refuse
                    &|rule| of(rule).l4proto(Protocol::Udp).goto(REFUSE),
                ],
            );
        }
        // What the kernel says by itself to a server, when the application's socket is gone: the last
        // acknowledgement of a connection, or that there is none. The server would wait for it, and refuse the next
        // connection from the same port.
        // … OWN
        self.add_rules(chain, [&|rule| own(of(rule))]);
    }

    /// Chain `proxy-UID-NAME`, for answers to a peer for whom a TPROXY server has spoken first. They go to the proxy as
    /// well: the connection is that server's and open, and who answers directly would tell the machine's own address.
    fn answer_rules(&mut self, chain: &CStr, proxy: &Proxy) {
        let (mask, begun) = (self.marks.mask(), self.marks.begun_by_proxy());
        // ct mark & MASK == DIVERT fib daddr type 2-5 return
        self.add_rules(
            chain,
            [&|rule| rule.ct_mark_is(mask, begun).daddr_local_or_many().return_()],
        );
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            if !proxy.settings.exceptions.takes(protocol) {
                continue;
            }
            // ct mark & MASK == DIVERT meta l4proto PROTOCOL
            //   meta priority set MARK meta mark set meta mark & ~MASK | DIVERT accept, or goto refuse
            self.add_rules(
                chain,
                [&|rule| {
                    let rule = rule.ct_mark_is(mask, begun).l4proto(protocol);
                    match proxy.settings.delivery {
                        Delivery::Tproxy(_) => {
                            to_proxy_of_answer(rule, proxy, mask, begun).accept()
                        }
                        Delivery::Redirect(_) => rule.goto(REFUSE),
                    }
                }],
            );
        }
    }

    /// Chain `proxy-UID-NAME`, for new connections: whether one is diverted is decided at its first packet.
    fn new_rules(&mut self, names: &Names, layout: &Layout, name: &ProxyName, proxy: &Proxy) {
        let chain = names.chain(ProxyChain::Proxy, name);
        self.answer_rules(&chain, proxy);
        // See `replies`: it is open, and can't be taken any more.
        // ct direction reply tcp flags & (syn | ack) == syn goto refuse
        self.add_rules(
            &chain,
            [&|rule| rule.ct_direction_reply().tcp_syn().goto(REFUSE)],
        );
        // A connection that is open goes on directly, or to another proxy.
        self.open_connection_rules(&chain, self.udp_verdicts, |rule| rule);
        if self.udp_verdicts == UdpVerdicts::PerDatagram {
            // One that another proxy has taken stays there, or is refused there if it is another user's: it may be
            // translated already, to wherever that user likes.
            // ct mark & MASK != 0 ct status confirmed meta l4proto udp return
            let mask = self.marks.mask();
            self.add_rules(
                &chain,
                [&|rule| {
                    rule.ct_mark_has(mask)
                        .ct_confirmed()
                        .l4proto(Protocol::Udp)
                        .return_()
                }],
            );
        }
        if !names.is_system() {
            // No verdict of one user's is about another's control groups. Should ever an element be wrong, then
            // nobody's packets get to this proxy by it. What comes here has that level: an element was found no less
            // deep.
            // socket cgroupv2 level LEVEL != SUBTREE return
            let (level, id) = (layout.subtree.level(), layout.subtree.id().to_bytes());
            self.add_rules(
                &chain,
                [&|rule| rule.socket_cgroupv2_not(level, &id).return_()],
            );
        }
        if let Some(hijack) = &proxy.settings.dns_hijack {
            let dns = names.chain(ProxyChain::Dns, name);
            for address in &hijack.addresses {
                self.query_rules(&chain, address, hijack.tcp, &dns);
            }
        }
        self.fake_rules(&chain, proxy);
        self.exception_rules(&chain, proxy.settings.exceptions);
        self.unreachable_rules(&chain);
        if let Some(list) = &layout.bypass {
            self.bypass_rules(list, &chain);
        }
        self.begun_by_others_rules(&chain, proxy.settings.delivery);
        let mask = self.marks.mask();
        self.add_rules(
            &chain,
            [
                // meta l4proto tcp ct mark set … meta mark set … accept
                &|rule| take(rule.l4proto(Protocol::Tcp), proxy, mask),
                // meta l4proto udp ct mark set … meta mark set … accept, or reject
                &|rule| match rule.l4proto(Protocol::Udp) {
                    rule if proxy.settings.reject_udp => rule.reject(),
                    rule => take(rule, proxy, mask),
                },
                // What belongs to no connection can't be taken, and must not leave: the end of one that the kernel has
                // forgotten (`ct state invalid`), or what another program has not tracked. In TCP, its connection may
                // go on with the next packet.
                // tcp flags ! syn drop
                &|rule| rule.tcp_without_syn().drop(),
                // meta l4proto tcp goto refuse
                &|rule| rule.l4proto(Protocol::Tcp).goto(REFUSE),
                // meta l4proto udp goto refuse
                &|rule| rule.l4proto(Protocol::Udp).goto(REFUSE),
            ],
        );
    }

    /// Chain `redirect-UID-NAME`: the translation to the proxy's port.
    fn redirect_rules(&mut self, chain: &CStr, port: u16) {
        for address in [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()] {
            // dnat ip to 127.0.0.1:PORT, dnat ip6 to [::1]:PORT
            self.add_rules(chain, [&|rule| rule.dnat(address, port)]);
        }
    }

    /// Chain `receive-UID-NAME`: a translated packet reaches only a socket that was made below the user's own subtree;
    /// a query to a server that the user has named, any but one that was made in a session of another user's.
    ///
    /// Unlike a packet that `tproxy` delivers, a translated one does not have its socket yet, so `skuid` knows nothing;
    /// `socket` looks for it, and knows its control group.
    fn receive_rules(&mut self, names: &Names, layout: &Layout, name: &ProxyName, proxy: &Proxy) {
        let chain = &names.chain(ProxyChain::Receive, name);
        // As in `guard_rules`.
        // tcp flags & (syn | ack) != syn ct state != new return
        self.add_rules(
            chain,
            [&|rule| rule.tcp_but_syn().ct_state_not_new().return_()],
        );
        if let Some(hijack) = proxy
            .settings
            .dns_hijack
            .as_ref()
            .filter(|hijack| !hijack.own)
        {
            self.answerer_rules(names, layout, name, proxy.mark, hijack);
            if matches!(proxy.settings.delivery, Delivery::Tproxy(_)) {
                // Nothing else is translated.
                return;
            }
        }
        let (level, id) = (layout.subtree.level(), layout.subtree.id().to_bytes());
        self.add_rules(
            chain,
            [
                // socket cgroupv2 level LEVEL SUBTREE return
                &|rule| rule.socket_cgroupv2(level, &id).return_(),
                // Whoever else has the port.
                // meta l4proto tcp socket wildcard { 0, 1 } reject with tcp reset
                &|rule| {
                    rule.l4proto(Protocol::Tcp)
                        .socket_wildcard_any()
                        .reject_with_tcp_reset()
                },
                // The rest of an earlier connection from the same port, which was let in (TIME-WAIT). It makes way for
                // this one, whose listener can't be told here: it may be another one by now.
                // meta l4proto tcp socket transparent { 0, 1 } return
                &|rule| {
                    rule.l4proto(Protocol::Tcp)
                        .socket_transparent_any()
                        .return_()
                },
                // goto refuse
                &|rule| rule.goto(REFUSE),
            ],
        );
    }
}

/// What becomes of packets of a connection that goes to this proxy.
fn go_on<'a>(rule: RuleBuilder<'a>, proxy: &Proxy, mask: u32) -> RuleBuilder<'a> {
    match proxy.settings.delivery {
        Delivery::Tproxy(_) => rule.meta_mark_set(mask, proxy.mark.value()).accept(),
        Delivery::Redirect(Some(_)) => rule.accept(),
        // Nobody listens yet.
        Delivery::Redirect(None) => rule.goto(REFUSE),
    }
}

/// What becomes of the first packet of a connection that is to go to this proxy.
fn take<'a>(rule: RuleBuilder<'a>, proxy: &Proxy, mask: u32) -> RuleBuilder<'a> {
    match proxy.settings.delivery {
        // A packet that is to be translated stays as it is until the nat chain has its turn, which sees the first
        // packet of a connection only.
        Delivery::Tproxy(_) | Delivery::Redirect(Some(_)) => {
            go_on(rule.ct_mark_set(mask, proxy.mark.value()), proxy, mask)
        }
        Delivery::Redirect(None) => go_on(rule, proxy, mask),
    }
}
