//! Signals as people write them: `TERM`, `sigterm`, `15`.

/// Those of Linux by name, as every sandbox has them.
const NAMES: [(&str, i32); 31] = [
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("ILL", 4),
    ("TRAP", 5),
    ("ABRT", 6),
    ("BUS", 7),
    ("FPE", 8),
    ("KILL", 9),
    ("USR1", 10),
    ("SEGV", 11),
    ("USR2", 12),
    ("PIPE", 13),
    ("ALRM", 14),
    ("TERM", 15),
    ("STKFLT", 16),
    ("CHLD", 17),
    ("CONT", 18),
    ("STOP", 19),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("XCPU", 24),
    ("XFSZ", 25),
    ("VTALRM", 26),
    ("PROF", 27),
    ("WINCH", 28),
    ("IO", 29),
    ("PWR", 30),
    ("SYS", 31),
];

/// Number of the last one, a real-time signal.
const LAST: i32 = 64;

/// A name, with or without `SIG`, or a number.
pub fn parse(text: &str) -> Result<i32, String> {
    let wrong = || format!("`{text}` is no signal: expected a name such as TERM or KILL, or a number from 1 to {LAST}");
    if let Ok(number) = text.parse::<i32>() {
        return if (1..=LAST).contains(&number) { Ok(number) } else { Err(wrong()) };
    }
    let upper = text.to_ascii_uppercase();
    let bare = upper.strip_prefix("SIG").unwrap_or(&upper);
    NAMES.iter().find(|(name, _)| *name == bare).map(|(_, number)| *number).ok_or_else(wrong)
}

/// `SIGTERM`; `signal 34` for one without a name.
pub fn name(number: i32) -> String {
    let known = NAMES.iter().find(|(_, known)| *known == number);
    known.map_or_else(|| format!("signal {number}"), |(name, _)| format!("SIG{name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers() {
        for (text, number) in [("TERM", 15), ("sigkill", 9), ("SIGINT", 2), ("usr1", 10), ("64", 64), ("9", 9)] {
            assert_eq!(parse(text), Ok(number), "{text}");
        }
        for wrong in ["", "SIG", "0", "65", "-9", "TERMINATE"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
        assert_eq!((name(15), name(40)), ("SIGTERM".to_owned(), "signal 40".to_owned()));
    }
}
