//! What people write on a command line: names, sizes, durations, pairs.

use std::time::Duration;

use warren_proto::units::Bytes;

/// `tenants/{tenant}/sandboxes/{id}` of a bare id or a full name.
pub fn sandbox(tenant: &str, text: &str) -> String {
    if text.contains('/') { text.to_owned() } else { format!("tenants/{tenant}/sandboxes/{text}") }
}

/// `{collection}/{id}` of a bare id or a full name.
pub fn in_collection(collection: &str, text: &str) -> String {
    if text.contains('/') { text.to_owned() } else { format!("{collection}/{text}") }
}

/// `key=value`.
pub fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("expected KEY=VALUE".to_owned()),
    }
}

/// vCPU, such as `0.25` or `2`; in thousandths.
pub fn cpu(text: &str) -> Result<i64, String> {
    let wrong = || format!("`{text}` is no count of vCPU: expected 0.25, 2 or the like, with at most three decimals");
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    if fraction.len() > 3 || (whole.is_empty() && fraction.is_empty()) {
        return Err(wrong());
    }
    let number = |digits: &str| if digits.is_empty() { Ok(0) } else { digits.parse::<u32>() };
    let whole = i64::from(number(whole).map_err(|_| wrong())?);
    let milli = i64::from(number(&format!("{fraction:0<3}")).map_err(|_| wrong())?);
    Ok(whole * 1000 + milli)
}

/// A size such as `256MiB`, `1.5GiB` or `1048576`; in bytes.
pub fn size(text: &str) -> Result<i64, String> {
    let wrong = || format!("`{text}` is no size: expected 256MiB, 1GiB or the like");
    let end = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let unit = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "ki" | "kib" => Bytes::KIB,
        "m" | "mi" | "mib" => Bytes::MIB,
        "g" | "gi" | "gib" => Bytes::GIB,
        "t" | "ti" | "tib" => Bytes::GIB * 1024,
        _ => return Err(wrong()),
    };
    let (whole, fraction) = number.trim().split_once('.').unwrap_or((number.trim(), "0"));
    let whole: u64 = whole.parse().map_err(|_| wrong())?;
    let digits = u32::try_from(fraction.len()).map_err(|_| wrong())?;
    let scale = 10u64.checked_pow(digits).ok_or_else(wrong)?;
    let fraction: u64 = fraction.parse().map_err(|_| wrong())?;
    let bytes = whole.checked_mul(unit).and_then(|w| w.checked_add(fraction.checked_mul(unit)? / scale));
    bytes.and_then(|bytes| i64::try_from(bytes).ok()).ok_or_else(wrong)
}

/// `500ms`, `30s`, `5m`, `1h`, or seconds.
pub fn duration(text: &str) -> Result<Duration, String> {
    let end = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let number: u64 = number.parse().map_err(|_| format!("`{text}` is no duration: expected 30s, 5m or the like"))?;
    match unit {
        "ms" => Ok(Duration::from_millis(number)),
        "" | "s" => Ok(Duration::from_secs(number)),
        "m" => Ok(Duration::from_secs(number.saturating_mul(60))),
        "h" => Ok(Duration::from_secs(number.saturating_mul(3600))),
        _ => Err(format!("`{unit}` is no unit of time: expected ms, s, m or h")),
    }
}

/// Orders `x-2` before `x-10`: by what stands before a last number, then by that number.
pub fn natural(name: &str) -> (&str, u64, &str) {
    let stem = name.trim_end_matches(|c: char| c.is_ascii_digit());
    (stem, name[stem.len()..].parse().unwrap_or(0), name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_as_people_write_them() {
        assert_eq!((cpu("0.25"), cpu("2"), cpu(".5")), (Ok(250), Ok(2000), Ok(500)));
        assert_eq!((size("256MiB"), size("1.5GiB"), size("10")), (Ok(256 << 20), Ok(3 << 29), Ok(10)));
        assert_eq!((duration("500ms"), duration("2m")), (Ok(Duration::from_millis(500)), Ok(Duration::from_secs(120))));
        for bad in ["", "x", "1.2.3", "0.1234", "-1", "."] {
            assert!(cpu(bad).is_err(), "{bad}");
            assert!(bad == "0.1234" || size(bad).is_err(), "{bad}");
        }
        assert!(duration("5 parsecs").is_err());
        assert!(size("99999999999999TiB").is_err());
    }

    #[test]
    fn numbered_names_stand_in_order() {
        let mut names = ["a-10", "a-9", "a-1", "a", "b-2", "a-007"];
        names.sort_by(|a, b| natural(a).cmp(&natural(b)));
        assert_eq!(names, ["a", "a-1", "a-007", "a-9", "a-10", "b-2"]);
    }

    #[test]
    fn a_bare_name_gets_its_tenant() {
        assert_eq!(sandbox("acme", "x"), "tenants/acme/sandboxes/x");
        assert_eq!(sandbox("acme", "tenants/b/sandboxes/x"), "tenants/b/sandboxes/x");
    }
}
