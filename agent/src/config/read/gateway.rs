//! What the machine forwards.

use std::collections::BTreeMap;

use cgtproxy_proto::interface::InterfaceName;

use crate::config::finding::Place;
use crate::config::reader::Reader;
use crate::config::yaml::{Node, Value};
use crate::config::{Gateway, Scope};
use crate::policy::Target;
use crate::text::printable;

use super::proxies::Proxies;

const GATEWAY_KEYS: &[&str] = &["interfaces", "tproxy"];

impl Reader<'_> {
    pub(super) fn gateway(
        &mut self,
        node: &Node,
        proxies: &Proxies,
        used: &mut Vec<String>,
        scope: Scope,
    ) -> Option<Gateway> {
        if scope == Scope::User {
            self.error(node.place, "only the system configuration has a 'gateway'")
                .help = Some(
                "it belongs into /etc/cgtproxy/config.yaml, for cgtproxy-agent --system".into(),
            );
            return None;
        }
        let entries = self.entries(node, "'gateway'", GATEWAY_KEYS)?;
        let interfaces = match entries.get("interfaces") {
            Some(node) => self.interfaces(node),
            None => {
                self.error(node.place, "'gateway' has no interfaces").help = Some(
                    "write those that other machines are behind, like 'interfaces: [br0]'".into(),
                );
                None
            }
        };
        let proxy = match entries.get("tproxy") {
            Some(node) => match self.reference(node, "tproxy", proxies, used) {
                Some(Target::Proxy(name)) => {
                    self.warn_of_local_dns(node.place, proxies, name.as_str());
                    Some(name)
                }
                _ => None,
            },
            None => {
                self.error(node.place, "'gateway' has no tproxy").help =
                    Some("write where forwarded traffic is to go, like 'tproxy: NAME'".into());
                None
            }
        };
        Some(Gateway {
            interfaces: interfaces?,
            proxy: proxy?,
        })
    }

    fn interfaces(&mut self, node: &Node) -> Option<Vec<InterfaceName>> {
        let Value::List(items) = &node.value else {
            self.wrong_kind(node, "'interfaces'", "a list of network interfaces");
            return None;
        };
        if items.is_empty() {
            self.error(node.place, "'gateway' has no interfaces").help =
                Some("write at least one, or leave 'gateway' out".into());
        }
        let mut places: BTreeMap<InterfaceName, Place> = BTreeMap::new();
        let mut interfaces = Vec::new();
        for item in items {
            let Some(text) = self.text(item, "an entry of 'interfaces'") else {
                continue;
            };
            match text.parse::<InterfaceName>() {
                Err(why) => {
                    let message = format!("'{}' is no network interface: {why}", printable(&text));
                    self.error(item.place, message).help =
                        Some("'ip link' lists those there are".into());
                }
                Ok(name) => match places.get(&name) {
                    Some(first) => {
                        let first = *first;
                        self.repeated(item.place, first, &format!("interface '{name}'"));
                    }
                    None => {
                        places.insert(name.clone(), item.place);
                        interfaces.push(name);
                    }
                },
            }
        }
        Some(interfaces)
    }

    /// A packet from elsewhere can't be sent on to a loopback address.
    fn warn_of_local_dns(&mut self, place: Place, proxies: &Proxies, name: &str) {
        let hijack = proxies
            .list
            .iter()
            .find(|proxy| proxy.name.as_str() == name)
            .and_then(|proxy| proxy.dns_hijack.as_ref());
        let local = hijack.is_some_and(|hijack| {
            hijack.ipv4.is_some_and(|address| address.is_loopback())
                || hijack.ipv6.is_some_and(|address| address.is_loopback())
        });
        if local {
            self.warning(
                place,
                "DNS queries that are forwarded can't be hijacked to a loopback address",
            )
            .help = Some(
                "they go to the tproxy like other packets; an address of the machine in that network \
                 would do"
                    .into(),
            );
        }
    }
}
