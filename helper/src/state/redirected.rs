//! Where a packet that was sent to a proxy comes from, and where it was going.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::num::NonZeroU16;

use super::{Error, State};
use crate::conntrack::{Conntrack, Entry};
use crate::kernel::Kernel;
use crate::nft::{Delivery, Proxy};
use crate::peer::Uid;

impl<K: Kernel> State<K> {
    /// Who sends, and where to, when a proxy of this user's that UDP is redirected to sees that it comes
    /// from `client`.
    ///
    /// # Errors
    /// If the user has no such proxy, or it was not sent such packets; if the kernel can't tell.
    pub fn find_redirected(
        &mut self,
        uid: Uid,
        listener: SocketAddr,
        client: SocketAddr,
    ) -> Result<(SocketAddr, SocketAddr), Error> {
        let marks = self.marks_received_at(uid, listener);
        if marks.is_empty() {
            return Err(Error::NotRedirected);
        }
        let refused = |error: io::Error| Error::Conntrack(error.into());
        let conntrack = match self.conntrack.take() {
            Some(conntrack) => conntrack,
            // It stays open: no other look-up needs a descriptor.
            None => {
                let spare = self.root.spare();
                let _room = spare.make_room();
                Conntrack::open().map_err(refused)?
            }
        };
        let found = conntrack.find_udp(listener, client);
        self.conntrack = Some(conntrack);
        match found.map_err(Error::Conntrack)? {
            // What was sent to the port directly has no mark, and what another user's rules redirected has another one.
            Some(Entry {
                source,
                destination,
                mark,
            }) if marks.contains(&(mark & self.config.marks.mask())) => Ok((source, destination)),
            _ => Err(Error::NotRedirected),
        }
    }

    /// The marks of what a proxy of this user's receives at this address: connections to it, or DNS queries.
    fn marks_received_at(&self, uid: Uid, listener: SocketAddr) -> Vec<u32> {
        const ADDRESSES: [IpAddr; 2] = [
            IpAddr::V4(Ipv4Addr::LOCALHOST),
            IpAddr::V6(Ipv6Addr::LOCALHOST),
        ];
        let policy = self.registry.policy(uid);
        let policy = policy.filter(|_| ADDRESSES.contains(&listener.ip()));
        let (Some(policy), Some(port)) = (policy, NonZeroU16::new(listener.port())) else {
            return Vec::new();
        };
        let marks = |proxy: &Proxy| {
            let Proxy { mark, settings } = proxy;
            let redirected = settings.delivery == Delivery::Redirect(Some(port));
            let hijack = settings.dns_hijack.as_ref();
            let asked = hijack.is_some_and(|hijack| hijack.own && hijack.port == port);
            let dns = asked.then(|| self.config.marks.dns_value(*mark));
            redirected.then(|| mark.value()).into_iter().chain(dns)
        };
        policy.layout.proxies.values().flat_map(marks).collect()
    }
}
