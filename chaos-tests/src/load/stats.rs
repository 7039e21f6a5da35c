//! Many numbers, told in few.

use std::time::Duration;

use serde::Serialize;

/// How long something took, many times. Exact: every one is kept, and there are at most some millions.
#[derive(Debug, Clone, Default)]
pub struct Durations(Vec<Duration>);

/// What is said of them, in milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Summary {
    pub count: usize,
    pub p50_ms: f64,
    pub p99_ms: f64,
    pub max_ms: f64,
}

impl Durations {
    pub fn push(&mut self, duration: Duration) {
        self.0.push(duration);
    }

    pub fn extend(&mut self, other: Self) {
        self.0.extend(other.0);
    }

    pub fn summary(mut self) -> Summary {
        self.0.sort_unstable();
        let at = |percent| milliseconds(percentile(&self.0, percent));
        Summary { count: self.0.len(), p50_ms: at(50), p99_ms: at(99), max_ms: at(100) }
    }
}

/// The smallest of sorted values that `percent` of them do not exceed; zero of none.
fn percentile(sorted: &[Duration], percent: usize) -> Duration {
    let rank = (sorted.len() * percent).div_ceil(100);
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or_default()
}

pub fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// The middle value, or the mean of the two; zero of none.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let (low, high) = (values.len().saturating_sub(1) / 2, values.len() / 2);
    match (values.get(low), values.get(high)) {
        (Some(low), Some(high)) => (low + high) / 2.0,
        _ => 0.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_occurred() {
        let mut durations = Durations::default();
        (1..=200).rev().for_each(|n| durations.push(Duration::from_millis(n)));
        let summary = durations.summary();
        assert_eq!((summary.count, summary.p50_ms, summary.p99_ms, summary.max_ms), (200, 100.0, 198.0, 200.0));
        assert_eq!(Durations::default().summary(), Summary::default());
    }

    #[test]
    fn a_median_of_an_even_count_lies_between() {
        assert_eq!(median(vec![9.0, 1.0, 3.0]), 3.0);
        assert_eq!(median(vec![9.0, 1.0]), 5.0);
        assert_eq!(median(Vec::new()), 0.0);
    }
}
