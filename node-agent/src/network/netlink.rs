//! Links, addresses and routes, by messages to the kernel (`rtnetlink(7)`): no process is started for them.
//!
//! A socket belongs to the network namespace in which its thread was when it was opened, and stays there.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};

/// Of a message from the kernel: headers and attributes of one link have less than 4 KiB.
const RECEIVE_SIZE: usize = 32 << 10;
const HEADER: usize = 16;
/// `ifinfomsg`.
const LINK_HEADER: usize = 16;
/// Attributes that hold others.
const NESTED: u16 = 1 << 15;
const INFO_KIND: u16 = 1;
const INFO_DATA: u16 = 2;
const VETH_PEER: u16 = 1;

/// What went through a link, as its own side counts it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Traffic {
    pub received_bytes: u64,
    pub received_packets: u64,
    pub sent_bytes: u64,
    pub sent_packets: u64,
}

/// A link that there is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    pub index: u32,
    pub name: String,
    pub traffic: Traffic,
}

/// A socket to the kernel's routing part.
#[derive(Debug)]
pub struct Netlink(OwnedFd);

impl Netlink {
    pub fn open() -> io::Result<Self> {
        let (family, protocol) = (AddressFamily::Netlink, SockProtocol::NetlinkRoute);
        Ok(Self(socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?))
    }

    /// Makes a pair of links: `name` here and `peer` in another namespace.
    pub fn add_pair(&self, name: &str, peer: &str, peer_namespace: BorrowedFd<'_>) -> io::Result<()> {
        let fd = u32::try_from(peer_namespace.as_raw_fd()).map_err(io::Error::other)?;
        let mut message = Message::new(libc::RTM_NEWLINK, libc::NLM_F_CREATE | libc::NLM_F_EXCL);
        message.link(0, 0, 0).text(libc::IFLA_IFNAME, name);
        message.nest(libc::IFLA_LINKINFO, |info| {
            info.text(INFO_KIND, "veth");
            info.nest(INFO_DATA, |data| {
                data.nest(VETH_PEER, |other| {
                    other.link(0, 0, 0).text(libc::IFLA_IFNAME, peer);
                    other.attribute(libc::IFLA_NET_NS_FD, &fd.to_ne_bytes());
                });
            });
        });
        self.request(message)
    }

    pub fn set_up(&self, index: u32) -> io::Result<()> {
        let up = libc::IFF_UP as u32;
        let mut message = Message::new(libc::RTM_NEWLINK, 0);
        message.link(index, up, up);
        self.request(message)
    }

    /// Not being there is success.
    pub fn delete(&self, name: &str) -> io::Result<()> {
        let mut message = Message::new(libc::RTM_DELLINK, 0);
        message.link(0, 0, 0).text(libc::IFLA_IFNAME, name);
        match self.request(message) {
            Err(e) if e.raw_os_error() == Some(libc::ENODEV) => Ok(()),
            other => other,
        }
    }

    /// Gives a link an address of its own, no network around it. Having it is success.
    pub fn add_address(&self, index: u32, address: Ipv4Addr, scope: u8) -> io::Result<()> {
        self.address(libc::RTM_NEWADDR, libc::NLM_F_CREATE | libc::NLM_F_EXCL, index, address, scope)
            .or_else(|e| if e.raw_os_error() == Some(libc::EEXIST) { Ok(()) } else { Err(e) })
    }

    /// Not having it is success.
    pub fn delete_address(&self, index: u32, address: Ipv4Addr) -> io::Result<()> {
        self.address(libc::RTM_DELADDR, 0, index, address, 0)
            .or_else(|e| if e.raw_os_error() == Some(libc::EADDRNOTAVAIL) { Ok(()) } else { Err(e) })
    }

    fn address(&self, kind: u16, flags: i32, index: u32, address: Ipv4Addr, scope: u8) -> io::Result<()> {
        let mut message = Message::new(kind, flags);
        message.bytes(&[libc::AF_INET as u8, 32, 0, scope]).bytes(&index.to_ne_bytes());
        message.attribute(libc::IFA_LOCAL, &address.octets()).attribute(libc::IFA_ADDRESS, &address.octets());
        self.request(message)
    }

    /// `to`, alone, lies behind the link; packets to it that start here come from `source`.
    pub fn add_route_to(&self, index: u32, to: Ipv4Addr, source: Ipv4Addr) -> io::Result<()> {
        let mut message = Message::route(32, libc::RT_SCOPE_LINK);
        message.attribute(libc::RTA_DST, &to.octets()).attribute(libc::RTA_OIF, &index.to_ne_bytes());
        message.attribute(libc::RTA_PREFSRC, &source.octets());
        self.request(message)
    }

    /// Everything else lies behind `gateway`.
    pub fn add_default_route(&self, index: u32, gateway: Ipv4Addr) -> io::Result<()> {
        let mut message = Message::route(0, libc::RT_SCOPE_UNIVERSE);
        message.attribute(libc::RTA_GATEWAY, &gateway.octets()).attribute(libc::RTA_OIF, &index.to_ne_bytes());
        self.request(message)
    }

    /// Index of a link.
    pub fn index(&self, name: &str) -> io::Result<u32> {
        self.find(name).map(|link| link.index)
    }

    /// The link of that name.
    pub fn find(&self, name: &str) -> io::Result<Link> {
        let mut message = Message::new(libc::RTM_GETLINK, 0);
        message.link(0, 0, 0).text(libc::IFLA_IFNAME, name);
        self.send(message)?;
        let mut found = None;
        self.receive(&mut |link| found = Some(link))?;
        found.ok_or_else(|| io::Error::from_raw_os_error(libc::ENODEV))
    }

    /// Every link.
    pub fn links(&self) -> io::Result<Vec<Link>> {
        let mut message = Message::new(libc::RTM_GETLINK, libc::NLM_F_DUMP);
        message.link(0, 0, 0);
        self.send(message)?;
        let mut links = Vec::new();
        while self.receive(&mut |link| links.push(link))? {}
        Ok(links)
    }

    fn request(&self, mut message: Message) -> io::Result<()> {
        message.flag(libc::NLM_F_ACK);
        self.send(message)?;
        self.receive(&mut |_| {}).map(drop)
    }

    fn send(&self, message: Message) -> io::Result<()> {
        let bytes = message.finish();
        send(self.0.as_raw_fd(), &bytes, MsgFlags::empty())?;
        Ok(())
    }

    /// Takes one datagram of the answer; says whether another follows.
    fn receive(&self, each: &mut dyn FnMut(Link)) -> io::Result<bool> {
        let mut buffer = vec![0u8; RECEIVE_SIZE];
        let count = recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        let mut rest = &buffer[..count];
        let mut more = false;
        while let Some((header, body, next)) = split_message(rest) {
            match i32::from(header.kind) {
                libc::NLMSG_ERROR => match read_i32(body) {
                    Some(0) => {}
                    Some(code) => return Err(io::Error::from_raw_os_error(-code)),
                    None => return Err(io::ErrorKind::InvalidData.into()),
                },
                libc::NLMSG_DONE => return Ok(false),
                _ => {
                    more = header.flags & libc::NLM_F_MULTI as u16 != 0;
                    parse_link(body).into_iter().for_each(&mut *each);
                }
            }
            rest = next;
        }
        Ok(more)
    }
}

/// A message that is being written.
struct Message(Vec<u8>);

impl Message {
    fn new(kind: u16, flags: i32) -> Self {
        let mut bytes = vec![0; HEADER];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        let mut message = Self(bytes);
        message.flag(libc::NLM_F_REQUEST | flags);
        message
    }

    /// A route to `bits` of a destination, in the main table.
    fn route(bits: u8, scope: u8) -> Self {
        let mut message = Self::new(libc::RTM_NEWROUTE, libc::NLM_F_CREATE | libc::NLM_F_REPLACE);
        let (family, table) = (libc::AF_INET as u8, libc::RT_TABLE_MAIN);
        message.bytes(&[family, bits, 0, 0, table, libc::RTPROT_STATIC, scope, libc::RTN_UNICAST]).bytes(&[0; 4]);
        message
    }

    fn flag(&mut self, flags: i32) {
        let all = u16::from_ne_bytes([self.0[6], self.0[7]]) | flags as u16;
        self.0[6..8].copy_from_slice(&all.to_ne_bytes());
    }

    fn link(&mut self, index: u32, flags: u32, change: u32) -> &mut Self {
        self.bytes(&[0; 4]).bytes(&index.to_ne_bytes()).bytes(&flags.to_ne_bytes()).bytes(&change.to_ne_bytes())
    }

    fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    fn text(&mut self, kind: u16, text: &str) -> &mut Self {
        self.attribute(kind, &[text.as_bytes(), &[0]].concat())
    }

    fn attribute(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        let length = (4 + value.len()) as u16;
        self.bytes(&length.to_ne_bytes()).bytes(&kind.to_ne_bytes()).bytes(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    fn nest(&mut self, kind: u16, write: impl FnOnce(&mut Self)) {
        let begin = self.0.len();
        self.attribute(kind | NESTED, &[]);
        write(self);
        let length = (self.0.len() - begin) as u16;
        self.0[begin..begin + 2].copy_from_slice(&length.to_ne_bytes());
    }

    fn finish(mut self) -> Vec<u8> {
        let length = self.0.len() as u32;
        self.0[0..4].copy_from_slice(&length.to_ne_bytes());
        self.0
    }
}

struct Header {
    kind: u16,
    flags: u16,
}

/// The first message, its body, and what follows.
fn split_message(bytes: &[u8]) -> Option<(Header, &[u8], &[u8])> {
    let length = usize::try_from(read_u32(bytes)?).ok()?;
    let body = bytes.get(HEADER..length)?;
    let header = Header { kind: read_u16(&bytes[4..])?, flags: read_u16(&bytes[6..])? };
    Some((header, body, bytes.get(length.next_multiple_of(4)..).unwrap_or_default()))
}

fn parse_link(body: &[u8]) -> Option<Link> {
    let index = read_u32(body.get(4..)?)?;
    let mut link = Link { index, name: String::new(), traffic: Traffic::default() };
    let mut rest = body.get(LINK_HEADER..)?;
    while let Some((length, kind)) = read_u16(rest).zip(rest.get(2..).and_then(read_u16)) {
        let length = usize::from(length);
        let Some(value) = rest.get(4..length) else { break };
        match kind {
            libc::IFLA_IFNAME => link.name = String::from_utf8_lossy(value).trim_end_matches('\0').to_owned(),
            libc::IFLA_STATS64 => link.traffic = parse_traffic(value)?,
            _ => {}
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Some(link)
}

/// The first four of `rtnl_link_stats64`.
fn parse_traffic(value: &[u8]) -> Option<Traffic> {
    let number = |n: usize| Some(u64::from_ne_bytes(value.get(n * 8..n * 8 + 8)?.try_into().ok()?));
    Some(Traffic {
        received_packets: number(0)?,
        sent_packets: number(1)?,
        received_bytes: number(2)?,
        sent_bytes: number(3)?,
    })
}

fn read_u16(bytes: &[u8]) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?))
}

fn read_u32(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?))
}

fn read_i32(bytes: &[u8]) -> Option<i32> {
    Some(i32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?))
}
