//! What is answered to a query, whoever asks.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::ops::Range;

use simple_dns::rdata::{A, AAAA, RData};
use simple_dns::{CLASS, OPCODE, Packet, PacketFlag, QCLASS, QTYPE, RCODE, ResourceRecord, TYPE};

use crate::fake::{Fakes, LeftOut, is_host};

/// How long an application may keep an answer, in seconds: one that goes direct from now on asks again soon.
const TTL: u32 = 10;

/// Names that are no hosts'. Names of addresses would tell each application what all others have asked for. Others exist
/// only where the network has something to offer: another way to ask for names (RFC 9462), NAT64 (RFC 7050).
const UNKNOWN: [&str; 4] = ["in-addr.arpa", "ip6.arpa", "resolver.arpa", "ipv4only.arpa"];

/// How long a query's header is, in bytes (RFC 1035, 4.1.1).
const HEADER_BYTES: usize = 12;

/// What bits of the header's third byte mean (RFC 1035, 4.1.1): a response, and what kind of query.
const RESPONSE: u8 = 0x80;
const OPCODE_BITS: u8 = 0x78;

/// The bit of the header's fourth byte that is reserved.
const RESERVED: u8 = 0x40;

/// The answer to a query; none if there is nothing to say to that.
pub(crate) fn answer(query: &[u8], fakes: &mut Fakes, left_out: LeftOut) -> Option<Vec<u8>> {
    let flags = query.get(2).copied().unwrap_or_default();
    // Whether the rest of it can be read or not.
    if flags & RESPONSE != 0 {
        return None;
    }
    // [`Packet`] refuses to read what has it.
    let mut query = query.to_vec();
    if let Some(flags) = query.get_mut(3) {
        *flags &= !RESERVED;
    }
    let mut answer = answer_any_type(&query, fakes, left_out)?;
    if let Some(in_answer) = answer.get_mut(2) {
        *in_answer = *in_answer & !OPCODE_BITS | flags & OPCODE_BITS;
    }
    Some(answer)
}

fn answer_any_type(query: &[u8], fakes: &mut Fakes, left_out: LeftOut) -> Option<Vec<u8>> {
    let Some((known, place)) = with_known_type(query) else {
        return answer_known(query, fakes, left_out);
    };
    let mut answer = answer_known(&known, fakes, left_out)?;
    // Who asked takes no answer to another question. There is none in an answer to what can't be read.
    if let (Some(in_answer), Some(kind)) = (answer.get_mut(place.clone()), query.get(place)) {
        in_answer.copy_from_slice(kind);
    }
    Some(answer)
}

/// A query for records of a type that [`Packet`] refuses to read, as one for a type that it reads and that nothing
/// has here, and where in both the type is. It is in the same place in the answer, which begins with the question as
/// well.
pub(crate) fn with_known_type(query: &[u8]) -> Option<(Vec<u8>, Range<usize>)> {
    let mut at = HEADER_BYTES;
    loop {
        match *query.get(at)? {
            0 => break,
            length @ 1..=63 => at += 1 + usize::from(length),
            // A pointer (RFC 1035, 4.1.4), which can only lead to what is no name in a first question.
            _ => return None,
        }
    }
    let place = at + 1..at + 3;
    let kind = u16::from_be_bytes(*query.get(place.clone())?.first_chunk()?);
    if QTYPE::try_from(kind).is_ok() {
        return None;
    }
    let mut known = query.to_vec();
    let in_known = known.get_mut(place.clone())?;
    in_known.copy_from_slice(&u16::from(TYPE::NULL).to_be_bytes());
    Some((known, place))
}

/// The same for a query of a type that [`Packet`] reads.
fn answer_known(query: &[u8], fakes: &mut Fakes, left_out: LeftOut) -> Option<Vec<u8>> {
    let parsed = Packet::parse(query);
    let Ok(query) = parsed else {
        // An answer to what can't be read needs its number at least.
        let id = u16::from_be_bytes(*query.first_chunk()?);
        let mut answer = Packet::new_reply(id);
        *answer.rcode_mut() = RCODE::FormatError;
        return answer.build_bytes_vec().ok();
    };
    let mut answer = Packet::new_reply(query.id());
    answer.set_flags(PacketFlag::RECURSION_AVAILABLE);
    if query.has_flags(PacketFlag::RECURSION_DESIRED) {
        answer.set_flags(PacketFlag::RECURSION_DESIRED);
    }
    let [question] = query.questions.as_slice() else {
        *answer.rcode_mut() = RCODE::FormatError;
        return answer.build_bytes_vec().ok();
    };
    answer.questions.push(question.clone());
    if query.opcode() != OPCODE::StandardQuery {
        *answer.rcode_mut() = RCODE::NotImplemented;
        return answer.build_bytes_vec().ok();
    }
    if !matches!(question.qclass, QCLASS::CLASS(CLASS::IN) | QCLASS::ANY) {
        *answer.rcode_mut() = RCODE::Refused;
        return answer.build_bytes_vec().ok();
    }
    let name = question.qname.to_string();
    match records(&name, question.qtype, fakes, left_out) {
        Ok(records) => {
            let record = |rdata| ResourceRecord::new(question.qname.clone(), CLASS::IN, TTL, rdata);
            answer.answers = records.into_iter().map(record).collect();
        }
        Err(why) => *answer.rcode_mut() = why,
    }
    answer.build_bytes_vec_compressed().ok()
}

/// What there is of a name, or why there is nothing.
fn records(
    name: &str,
    kind: QTYPE,
    fakes: &mut Fakes,
    left_out: LeftOut,
) -> Result<Vec<RData<'static>>, RCODE> {
    let wants = |this| kind == QTYPE::TYPE(this) || kind == QTYPE::ANY;
    let lower = name.to_ascii_lowercase();
    let is_in = |zone: &str| {
        let below = lower.strip_suffix(zone);
        below.is_some_and(|below| below.is_empty() || below.ends_with('.'))
    };
    if UNKNOWN.into_iter().any(is_in) {
        return Err(RCODE::NameError);
    }
    // It exists, and has nothing itself. What does not exist would have nothing below it either (RFC 8020).
    if name.is_empty() {
        return Ok(Vec::new());
    }
    // RFC 6761, 6.3: it never means another machine.
    let ((ipv4, ipv6), left_out) = match is_in("localhost") {
        true => {
            let addresses = (Ipv4Addr::LOCALHOST, Ipv6Addr::LOCALHOST);
            (addresses, LeftOut::default())
        }
        false => {
            if !is_host(name) {
                return Err(RCODE::NameError);
            }
            // There is no room, or nothing random.
            let number = fakes.number(name).ok_or(RCODE::ServerFailure)?;
            (fakes.addresses(number), left_out)
        }
    };
    let mut records = Vec::new();
    if wants(TYPE::A) && !left_out.ipv4 {
        records.push(RData::A(A::from(ipv4)));
    }
    if wants(TYPE::AAAA) && !left_out.ipv6 {
        records.push(RData::AAAA(AAAA::from(ipv6)));
    }
    Ok(records)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::fake::Networks;
    use proptest::prelude::*;
    use simple_dns::rdata::OPT;
    use simple_dns::{Name, Question};
    use std::net::IpAddr;

    /// Nothing is left out.
    const ALL: LeftOut = left_out(false, false);

    const fn left_out(ipv4: bool, ipv6: bool) -> LeftOut {
        LeftOut { ipv4, ipv6 }
    }

    fn ask(fakes: &mut Fakes, name: &str, kind: TYPE, left_out: LeftOut) -> (RCODE, Vec<IpAddr>) {
        let mut query = Packet::new_query(7);
        let qname = Name::new_unchecked(name);
        let question = Question::new(qname, kind.into(), QCLASS::CLASS(CLASS::IN), false);
        query.questions.push(question);
        let bytes = query.build_bytes_vec().unwrap();
        let answer = answer(&bytes, fakes, left_out).unwrap();
        let answer = Packet::parse(&answer).unwrap();
        assert_eq!((answer.id(), answer.questions.len()), (7, 1));
        let address = |record: &ResourceRecord<'_>| match &record.rdata {
            RData::A(a) => Ipv4Addr::from(a.address).into(),
            RData::AAAA(a) => Ipv6Addr::from(a.address).into(),
            other => panic!("{other:?}"),
        };
        let addresses = answer.answers.iter().map(address).collect();
        (answer.rcode(), addresses)
    }

    #[test]
    fn names_have_one_address_of_each_family() {
        let mut fakes = Fakes::new(None);
        let (_, v4) = ask(&mut fakes, "example.org", TYPE::A, ALL);
        let (_, v6) = ask(&mut fakes, "example.org", TYPE::AAAA, ALL);
        let number = fakes.number("example.org").unwrap();
        let (ipv4, ipv6) = fakes.addresses(number);
        assert_eq!(v4, [IpAddr::from(ipv4)]);
        assert_eq!(v6, [IpAddr::from(ipv6)]);
        let nothing = (RCODE::NoError, Vec::new());
        let (no_ipv4, no_ipv6) = (left_out(true, false), left_out(false, true));
        for (kind, family, other) in [(TYPE::A, no_ipv4, no_ipv6), (TYPE::AAAA, no_ipv6, no_ipv4)] {
            assert_eq!(ask(&mut fakes, "example.org", kind, family), nothing);
            assert_eq!(ask(&mut fakes, "example.org", kind, other).1.len(), 1);
            // No proxy has anything to do with it.
            assert_eq!(ask(&mut fakes, "localhost", kind, family).1.len(), 1);
        }
        assert_eq!(ask(&mut fakes, "example.org", TYPE::MX, ALL), nothing);
        let local = ask(&mut fakes, "a.localhost", TYPE::A, ALL);
        assert_eq!(local.1, [IpAddr::from(Ipv4Addr::LOCALHOST)]);
        let missing = (RCODE::NameError, Vec::new());
        for name in ["1.2.0.192.in-addr.arpa", "x.ip6.arpa", "a b.org"] {
            assert_eq!(ask(&mut fakes, name, TYPE::PTR, ALL), missing, "{name}");
        }
    }

    /// One that exists is not to be taken for one that does not.
    #[test]
    fn a_name_that_there_is_no_room_for_is_to_be_asked_for_again() {
        let mut fakes = Fakes::new(None);
        fakes.set_networks(Networks::parse(Some("10.0.0.0/30"), None).unwrap());
        for name in ["a.example", "b.example"] {
            assert_eq!(ask(&mut fakes, name, TYPE::A, ALL).0, RCODE::NoError);
        }
        let no_room = (RCODE::ServerFailure, Vec::new());
        assert_eq!(ask(&mut fakes, "c.example", TYPE::A, ALL), no_room);
        assert_eq!(ask(&mut fakes, "b.example", TYPE::A, ALL).1.len(), 1);
    }

    /// Names of a home network (RFC 8375) are among those of hosts. What tells of resolvers and of NAT64 (RFC 9462 and
    /// RFC 7050) has no address that is made up.
    #[test]
    fn what_is_below_arpa_is_not_all_an_address() {
        let mut fakes = Fakes::new(None);
        for name in [
            "nas.home.arpa",
            "NAS.Home.ARPA",
            "home.arpa",
            "x.not-in-addr.arpa",
        ] {
            let (code, addresses) = ask(&mut fakes, name, TYPE::A, ALL);
            assert_eq!((code, addresses.len()), (RCODE::NoError, 1), "{name}");
        }
        let missing = (RCODE::NameError, Vec::new());
        for name in [
            "resolver.arpa",
            "_dns.resolver.arpa",
            "ipv4only.arpa",
            "x.IPv4only.arpa",
            "in-addr.arpa",
            "x.in-addr.arpa",
            "ip6.arpa",
        ] {
            assert_eq!(ask(&mut fakes, name, TYPE::A, ALL), missing, "{name}");
        }
    }

    /// They would tell each application what all others have asked for.
    #[test]
    fn addresses_lead_nobody_back_to_names() {
        let mut fakes = Fakes::new(None);
        let number = fakes.number("example.org").unwrap();
        let (ipv4, ipv6) = fakes.addresses(number);
        let [a, b, c, d] = ipv4.octets();
        let nibbles: Vec<String> = (0..32)
            .map(|n| format!("{:x}", ipv6.to_bits() >> (4 * n) & 15))
            .collect();
        let missing = (RCODE::NameError, Vec::new());
        for name in [
            format!("{d}.{c}.{b}.{a}.in-addr.arpa"),
            format!("{}.ip6.arpa", nibbles.join(".")),
        ] {
            for kind in [TYPE::PTR, TYPE::A] {
                assert_eq!(ask(&mut fakes, &name, kind, ALL), missing, "{name}");
            }
        }
    }

    /// SSHFP, TLSA and URI, as ssh, mail servers and kinit ask for them, and one that nobody has given out.
    #[test]
    fn other_records_than_addresses_have_empty_answers_of_whatever_type() {
        let mut fakes = Fakes::new(None);
        for kind in [44_u16, 52, 256, 65_000] {
            let mut query = Packet::new_query(7);
            let qname = Name::new_unchecked("_443._tcp.Example.org");
            let question = Question::new(qname, TYPE::MX.into(), CLASS::IN.into(), false);
            query.questions.push(question);
            *query.opt_mut() = Some(OPT {
                opt_codes: Vec::new(),
                udp_packet_size: 1232,
                version: 0,
            });
            let mut query = query.build_bytes_vec().unwrap();
            let question = HEADER_BYTES..HEADER_BYTES + 1 + 4 + 1 + 4 + 1 + 7 + 1 + 3 + 1 + 4;
            query[question.end - 4..question.end - 2].copy_from_slice(&kind.to_be_bytes());
            let answer = answer(&query, &mut fakes, ALL).unwrap();
            // The same number, a response without an error, to one question, and nothing more.
            assert_eq!(answer[..2], query[..2], "{kind}");
            assert_eq!((answer[2] & 0x80, answer[3] & 0x0f), (0x80, 0), "{kind}");
            assert_eq!(answer[4..HEADER_BYTES], [0, 1, 0, 0, 0, 0, 0, 0], "{kind}");
            assert_eq!(answer[HEADER_BYTES..], query[question], "{kind}");
        }
    }

    #[test]
    fn nonsense_is_answered_once_at_most() {
        let mut fakes = Fakes::new(None);
        assert_eq!(answer(b"", &mut fakes, ALL), None);
        assert_eq!(answer(b"x", &mut fakes, ALL), None);
        let refused = answer(b"ab\x01", &mut fakes, ALL).unwrap();
        let refused = Packet::parse(&refused).unwrap();
        assert_eq!(refused.rcode(), RCODE::FormatError);
        let reply = Packet::new_reply(1).build_bytes_vec().unwrap();
        for length in 3..=reply.len() {
            assert_eq!(answer(&reply[..length], &mut fakes, ALL), None);
        }
    }

    /// A query's bytes, which can be any in a class of any.
    pub(in crate::dns) fn query_of(name: &'static str, kind: TYPE, class: CLASS) -> Vec<u8> {
        let mut query = Packet::new_query(7);
        let question = Question::new(Name::new_unchecked(name), kind.into(), class.into(), false);
        query.questions.push(question);
        query.build_bytes_vec().unwrap()
    }

    /// What does not exist has nothing below it either (RFC 8020).
    #[test]
    fn the_root_exists() {
        for kind in [TYPE::NS, TYPE::A] {
            let query = query_of("", kind, CLASS::IN);
            let answer = answer(&query, &mut Fakes::new(None), ALL).unwrap();
            let answer = Packet::parse(&answer).unwrap();
            assert_eq!((answer.rcode(), answer.answers.len()), (RCODE::NoError, 0));
        }
    }

    #[test]
    fn another_class_is_refused_and_takes_no_name() {
        let mut fakes = Fakes::new(None);
        for class in [CLASS::CH, CLASS::HS] {
            let query = query_of("version.bind", TYPE::A, class);
            let answer = answer(&query, &mut fakes, ALL).unwrap();
            let answer = Packet::parse(&answer).unwrap();
            assert_eq!((answer.rcode(), answer.answers.len()), (RCODE::Refused, 0));
            assert_eq!(answer.questions.len(), 1);
        }
        assert_eq!(fakes.len(), 0);
    }

    /// RFC 1035, 4.1.1.
    #[test]
    fn an_answer_is_to_the_same_kind_of_query() {
        for opcode in [1, 2, 4, 5, 6, 15] {
            let mut query = query_of("example.org", TYPE::A, CLASS::IN);
            query[2] |= opcode << 3;
            let answer = answer(&query, &mut Fakes::new(None), ALL).unwrap();
            assert_eq!((answer[2] >> 3 & 15, answer[3] & 15), (opcode, 4));
        }
    }

    #[test]
    fn a_reserved_bit_means_nothing() {
        let mut query = query_of("example.org", TYPE::A, CLASS::IN);
        query[3] |= RESERVED;
        let answer = answer(&query, &mut Fakes::new(None), ALL).unwrap();
        assert_eq!(answer[3] & RESERVED, 0);
        let answer = Packet::parse(&answer).unwrap();
        assert_eq!((answer.rcode(), answer.answers.len()), (RCODE::NoError, 1));
    }

    proptest! {
        #[test]
        fn no_query_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut fakes = Fakes::new(None);
            let _ = answer(&bytes, &mut fakes, ALL);
        }
    }
}
