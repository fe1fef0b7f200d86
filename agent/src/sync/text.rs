//! What the helper's errors mean, for a person.

use std::io;
use std::path::Path;

use cgtproxy_proto::helper::ErrorKind;
use cgtproxy_proto::service::Fault;

use crate::connection::nobody_listens;
use crate::ledger::too_many_control_groups;
use crate::text::{chain, printable};

/// That nobody answers at the helper's socket.
pub(super) fn unreachable(socket: &Path, error: &io::Error) -> String {
    let socket = printable(&socket.to_string_lossy());
    match nobody_listens(error) {
        true => format!("no helper listens on {socket}"),
        false => format!("can't connect to the helper at {socket}: {}", chain(error)),
    }
}

/// An error of the helper for a person. `closed`: the configuration says `start: closed`.
pub(super) fn refusal(fault: &Fault, closed: bool) -> String {
    use ErrorKind as Kind;
    let text = |text: Option<&str>| printable(text.unwrap_or_default());
    let limit = |limit: Option<i64>| limit.map_or_else(|| "so many".to_owned(), |n| n.to_string());
    match fault.kind() {
        Kind::NoUserManager(args) => format!(
            "the helper finds no control group {}: is there a user manager, and is the control \
             group root the same for both?",
            text(args.as_ref().map(|args| &*args.controlGroup))
        ),
        Kind::ProxyExists(args) => format!(
            "two proxies are named '{}'",
            text(args.as_ref().map(|args| &*args.name))
        ),
        Kind::UnknownProxy(args) => format!(
            "the helper knows no proxy '{}'",
            text(args.as_ref().map(|args| &*args.name))
        ),
        Kind::TooManyProxies(args) => format!(
            "the administrator allows no more than {} proxies per user",
            limit(args.map(|args| args.limit))
        ),
        Kind::TooManyBypassEntries(args) => format!(
            "the administrator allows no more than {} bypass entries per user",
            limit(args.map(|args| args.limit))
        ),
        Kind::TooManyControlGroups(args) => {
            too_many_control_groups(limit(args.map(|args| args.limit)), closed)
        }
        Kind::TooManyConnections(args) => format!(
            "the administrator allows no more than {} connections per user",
            limit(args.map(|args| args.limit))
        ),
        Kind::MessageTooLarge(args) => format!(
            "the helper takes no messages of more than {} bytes",
            limit(args.map(|args| args.limit))
        ),
        Kind::TooManyBytes(args) => format!(
            "the helper holds no more than {} bytes of unfinished messages per user",
            limit(args.map(|args| args.limit))
        ),
        Kind::NoMarksLeft(_) => {
            "all packet marks of the machine's range are in use; those of proxies that are renamed or \
             replaced become free only when these are taken out first, or the agent is stopped and started"
                .to_owned()
        }
        Kind::KernelRefused(args) => format!(
            "the kernel refused the policy: {}",
            text(args.as_ref().map(|args| &*args.message))
        ),
        Kind::NoSession(_) => "the helper has ended the session".to_owned(),
        _ if fault.is_permission_denied() => {
            "the administrator does not allow this user to use the helper".to_owned()
        }
        _ => format!(
            "the helper refused with {} {}",
            printable(&fault.name),
            printable(&fault.parameters.to_string())
        ),
    }
}
