//! PURE: what becomes of a question, by the policy of the sandbox that asks.

use std::net::Ipv4Addr;
use std::time::Duration;

use hickory_proto::op::{Message, MessageType, OpCode, ResponseCode};
use hickory_proto::rr::{RData, RecordType};

use super::super::egress::{Egress, is_public};
use super::super::rules::Learnt;

/// How long an address stays allowed at least: programs connect a while after they asked.
const SHORTEST: Duration = Duration::from_secs(60);
/// And at most: a name that keeps its addresses for longer is asked for again.
const LONGEST: Duration = Duration::from_secs(3600);

/// Addresses that are taken from one answer: more than names have.
const MAX_ADDRESSES: usize = 64;

/// One question of a sandbox.
#[derive(Debug, Clone)]
pub struct Question {
    message: Message,
    /// Lower case, without a dot at its end.
    name: String,
    kind: RecordType,
}

/// What becomes of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// This, at once.
    Answer(Option<Vec<u8>>),
    /// What the resolvers say; the addresses in it are to be allowed on these ports (`None`: all), none where this is empty.
    Ask { ports: Vec<Option<u16>> },
}

impl Question {
    /// `None` for what is not one question.
    pub fn parse(message: &[u8]) -> Option<Self> {
        let message = Message::from_vec(message).ok()?;
        let asks = message.metadata.message_type == MessageType::Query && message.metadata.op_code == OpCode::Query;
        let [query] = message.queries.as_slice() else { return None };
        let name = query.name.to_lowercase().to_ascii().trim_end_matches('.').to_owned();
        let kind = query.query_type;
        asks.then_some(Self { message, name, kind })
    }

    /// The answer for when no resolver gave one.
    pub fn failure(&self) -> Option<Vec<u8>> {
        self.answer(ResponseCode::ServFail)
    }

    /// Whether `answer` is one to this question.
    pub fn is_answered_by(&self, answer: &[u8]) -> bool {
        let Ok(answer) = Message::from_vec(answer) else { return false };
        answer.metadata.message_type == MessageType::Response
            && answer.metadata.id == self.message.metadata.id
            && answer.queries == self.message.queries
    }

    fn answer(&self, code: ResponseCode) -> Option<Vec<u8>> {
        let asked = &self.message.metadata;
        let mut answer = Message::error_msg(asked.id, asked.op_code, code);
        answer.metadata.recursion_desired = asked.recursion_desired;
        answer.metadata.recursion_available = true;
        answer.queries.clone_from(&self.message.queries);
        answer.to_vec().ok()
    }
}

/// Under a list only addresses are answered: other records could carry anything, and no other kind is needed to connect.
pub fn decide(question: &Question, egress: &Egress) -> Decision {
    match egress {
        Egress::None => Decision::Answer(question.answer(ResponseCode::Refused)),
        Egress::Public => Decision::Ask { ports: Vec::new() },
        Egress::List(_) => match egress.ports_of(&question.name) {
            ports if ports.is_empty() => Decision::Answer(question.answer(ResponseCode::Refused)),
            ports if question.kind == RecordType::A => Decision::Ask { ports },
            _ => Decision::Answer(question.answer(ResponseCode::NoError)),
        },
    }
}

/// The public addresses in an answer that are to be allowed, and for how long. A name does not allow private ones: whoever
/// owns it could name any address of the host's network.
pub fn found(answer: &[u8], by: Ipv4Addr, ports: &[Option<u16>]) -> (Vec<Learnt>, Duration) {
    let Ok(message) = Message::from_vec(answer) else { return (Vec::new(), SHORTEST) };
    let addresses = message.answers.iter().filter_map(|record| match &record.data {
        RData::A(address) if is_public(address.0) => Some((address.0, record.ttl)),
        _ => None,
    });
    let addresses: Vec<(Ipv4Addr, u32)> = addresses.take(MAX_ADDRESSES).collect();
    let ttl = addresses.iter().map(|(_, ttl)| *ttl).max().unwrap_or(0);
    let of = |address: Ipv4Addr| ports.iter().map(move |port| Learnt { by, address, port: *port });
    let found = addresses.iter().flat_map(|(address, _)| of(*address)).collect();
    (found, Duration::from_secs(u64::from(ttl)).clamp(SHORTEST, LONGEST))
}

#[cfg(test)]
mod tests {
    use hickory_proto::op::Query;
    use hickory_proto::rr::rdata::A;
    use hickory_proto::rr::{Name, Record};

    use super::super::super::egress::Destination;
    use super::*;

    fn message(name: &str, kind: RecordType) -> Message {
        let mut message = Message::new(7, MessageType::Query, OpCode::Query);
        message.add_query(Query::query(Name::from_ascii(name).expect("a name"), kind));
        message
    }

    fn question(name: &str, kind: RecordType) -> Question {
        Question::parse(&message(name, kind).to_vec().expect("bytes")).expect("a question")
    }

    fn code(decision: Decision) -> Option<ResponseCode> {
        match decision {
            Decision::Answer(answer) => {
                let answer = Message::from_vec(&answer.expect("bytes")).expect("an answer");
                assert_eq!((answer.metadata.id, answer.answers.len()), (7, 0));
                Some(answer.metadata.response_code)
            }
            Decision::Ask { .. } => None,
        }
    }

    #[test]
    fn only_what_the_policy_names_is_asked_for() {
        let entries = ["allowed.example:443", "allowed.example:80", "1.2.3.4"];
        let list = Egress::List(entries.iter().filter_map(|entry| Destination::parse(entry)).collect());
        let a = |name| question(name, RecordType::A);
        assert_eq!(code(decide(&a("any.example."), &Egress::None)), Some(ResponseCode::Refused));
        assert_eq!(decide(&a("any.example."), &Egress::Public), Decision::Ask { ports: Vec::new() });
        let ports = vec![Some(443), Some(80)];
        assert_eq!(decide(&a("ALLOWED.example."), &list), Decision::Ask { ports });
        for other in ["example.", "x.allowed.example.", "allowed.example.evil.", "1.2.3.4."] {
            assert_eq!(code(decide(&a(other), &list)), Some(ResponseCode::Refused), "{other}");
        }
        assert_eq!(code(decide(&question("allowed.example.", RecordType::TXT), &list)), Some(ResponseCode::NoError));
        assert_eq!(code(decide(&question("other.example.", RecordType::TXT), &list)), Some(ResponseCode::Refused));
    }

    #[test]
    fn public_addresses_of_an_answer_are_allowed_for_a_bounded_time() {
        let name = Name::from_ascii("allowed.example.").expect("a name");
        let mut answer = message("allowed.example.", RecordType::A).into_response();
        for (address, ttl) in [([1, 2, 3, 4], 5), ([10, 0, 0, 1], 9_000), ([5, 6, 7, 8], 9_000)] {
            let data = RData::A(A(Ipv4Addr::from(address)));
            answer.add_answer(Record::from_rdata(name.clone(), ttl, data));
        }
        let bytes = answer.to_vec().expect("bytes");
        let by = Ipv4Addr::new(10, 224, 0, 2);
        let (learnt, ttl) = found(&bytes, by, &[Some(443), None]);
        let seen: Vec<_> = learnt.iter().map(|l| (l.address.octets()[0], l.port)).collect();
        assert_eq!(seen, [(1, Some(443)), (1, None), (5, Some(443)), (5, None)]);
        assert_eq!(ttl, LONGEST);
        assert!(found(&bytes, by, &[]).0.is_empty());
        assert!(question("allowed.example.", RecordType::A).is_answered_by(&bytes));
        assert!(!question("other.example.", RecordType::A).is_answered_by(&bytes));
    }

    #[test]
    fn what_is_no_question_is_none() {
        assert!(Question::parse(b"").is_none() && Question::parse(&[0; 12]).is_none());
        let answer = message("a.example.", RecordType::A).into_response().to_vec().expect("bytes");
        assert!(Question::parse(&answer).is_none());
    }
}
