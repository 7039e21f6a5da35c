//! Pages of a list: how many, and where the next begins (google.aip.dev/158).
//!
//! A page token names the last item of the page before and the list that it belongs to, so a list stays complete while items
//! come and go: every item that is there throughout is seen once.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use tonic::Status;

use super::status;

/// Items on a page when the request does not say.
const DEFAULT_PAGE: usize = 100;

/// Most items on a page.
const MAX_PAGE: usize = 1000;

/// Where in a list a page begins, and how long it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    /// Whose list this is: a token of another is refused.
    list: String,
    pub size: usize,
    /// The last item of the page before.
    pub after: Option<String>,
}

impl Page {
    /// Reads a request's size and token. `list` names what is listed: method and parent.
    pub fn parse(list: &str, size: i32, token: &str) -> Result<Self, Status> {
        let size = match usize::try_from(size) {
            Ok(0) => DEFAULT_PAGE,
            Ok(size) => size.min(MAX_PAGE),
            Err(_) => return Err(status::invalid_field("page_size", "must not be negative")),
        };
        let after = if token.is_empty() { None } else { Some(decode(list, token)?) };
        Ok(Self { list: list.to_owned(), size, after })
    }

    /// The token of the page after the one that ends with `last`.
    pub fn next_token(&self, last: &str) -> String {
        URL_SAFE_NO_PAD.encode(sealed(&self.list, last))
    }
}

/// CRC-32C over list and item, then the item.
fn sealed(list: &str, item: &str) -> Vec<u8> {
    let crc = crc32c::crc32c_append(crc32c::crc32c(list.as_bytes()), item.as_bytes());
    [&crc.to_be_bytes()[..], item.as_bytes()].concat()
}

fn decode(list: &str, token: &str) -> Result<String, Status> {
    let bytes = URL_SAFE_NO_PAD.decode(token).map_err(|_| status::invalid_page_token())?;
    let item = bytes.get(4..).and_then(|item| std::str::from_utf8(item).ok()).ok_or_else(status::invalid_page_token)?;
    if sealed(list, item) == bytes { Ok(item.to_owned()) } else { Err(status::invalid_page_token()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_good_for_its_own_list_only() {
        let page = Page::parse("sandboxes of a", 10, "").unwrap();
        let token = page.next_token("x");
        assert_eq!(Page::parse("sandboxes of a", 10, &token).unwrap().after.as_deref(), Some("x"));
        assert!(Page::parse("sandboxes of b", 10, &token).is_err());
        for rubbish in ["!", "AAAA", &token[1..], "AAAAAAAA"] {
            assert!(Page::parse("sandboxes of a", 10, rubbish).is_err(), "{rubbish}");
        }
    }

    #[test]
    fn sizes_are_bounded() {
        assert_eq!(Page::parse("l", 0, "").unwrap().size, DEFAULT_PAGE);
        assert_eq!(Page::parse("l", i32::MAX, "").unwrap().size, MAX_PAGE);
        assert!(Page::parse("l", -1, "").is_err());
    }
}
